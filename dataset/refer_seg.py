"""Referring data sets: RefCLEF, RefCOCO/+/g, their R- and FP- variants, for training and for evaluation (protocol §2, §5)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from utils.image import read_image

from . import templates
from .draw import choose, pick
from .refer_api import Refer, ReferImage
from .types import Sample

log = logging.getLogger(__name__)


class ReferTraining:
    """Referring expressions of one set to learn from: uniform over pictures, then `k` of the picture's expressions.

    False premises of an FP set that say nothing of what is there instead (`gt_sent`) cannot be corrected: they are left out, and
    counted in a warning.
    """

    def __init__(self, dataset_dir: str | Path, name: str, k: int = 1) -> None:
        self.refer = Refer(dataset_dir, name)
        self.pictures = self.refer.of_split("train")
        self.k = k
        if lacking := _leave_out_uncorrectable(self.pictures, name):
            self.pictures = [picture for picture in self.pictures if picture.sentences]
            log.warning("%s, split train: %d false premises have no gt_sent and are left out", self.refer.refs_file, lacking)
            if not self.pictures:
                raise ValueError(f"{self.refer.refs_file}, split train: it has false premises alone, and none has a gt_sent")

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random picture with up to `k` different expressions."""
        refer = self.refer
        picture = self.pictures[rng.integers(len(self.pictures))]
        chosen = choose(picture.sentences, self.k, rng)
        path, image = _read(refer, picture)
        masks = [refer.mask(s["ann_id"], *image.shape[:2]) for s in chosen if s["exists"]]
        return Sample(
            image_path=str(path),
            image=image,
            conversations=[[(_question(s["sent"], rng), answer(s, rng, refer.name))] for s in chosen],
            masks=np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), np.uint8),
            exists=[s["exists"] for s in chosen],
            questions=[s["sent"] for s in chosen],
            meta={"dataset": refer.name, "split": "train"},
        )


def _leave_out_uncorrectable(pictures: list[ReferImage], name: str) -> int:
    """Takes the false premises without `gt_sent` out of an FP set's images; says how many."""
    lacking = 0
    for picture in pictures if name.startswith("fp") else ():
        kept = [s for s in picture.sentences if s["exists"] or s["gt_sent"]]
        lacking += len(picture.sentences) - len(kept)
        picture.sentences = kept
    return lacking


def _read(refer: Refer, picture: ReferImage) -> tuple[Path, np.ndarray]:
    """Path and pixels of a picture.

    Raises:
        ValueError: its size is another than that for which its polygons were drawn; they would be somewhere else.
    """
    path = refer.image_dir / picture.file_name
    image = read_image(path)
    if image.shape[:2] != (picture.height, picture.width):
        raise ValueError(
            f"{path} has {image.shape[0]} x {image.shape[1]} pixels (turned, if its EXIF data say so), but "
            f"{refer.instances_file}, image {picture.image_id}, height and width: {picture.height} x {picture.width}"
        )
    return path, image


def _question(text: str, rng: np.random.Generator) -> str:
    """The expression in small letters with the blanks at its ends, as the original asks it; answers have it without them."""
    return pick(templates.SHORT_QUESTION, rng).format(class_name=text.lower())


def answer(sentence: dict[str, Any], rng: np.random.Generator, name: str) -> str:
    """A true premise is segmented, a false one of an FP set corrected, any other false one denied (§2)."""
    text = sentence["sent"].strip().lower()
    if sentence["exists"]:
        pool, slots = templates.SHORT_ANSWER, {"class_name": text}
    elif name.startswith("fp"):
        if not sentence["gt_sent"]:
            raise ValueError(f"{name}: the false premise {text!r} (sent_id {sentence['sent_id']}) has no gt_sent")
        pool, slots = templates.CORRECT_ANSWER, {"class_name": text, "gt_name": sentence["gt_sent"].strip().lower()}
    else:
        pool, slots = templates.NEG_ANSWER, {"class_name": text}
    return pick(pool, rng).format(**slots)


class ReferEvaluation:
    """A split, one item a picture with all its expressions; masks of false premises are empty (§5).

    Raises:
        FileNotFoundError, ValueError: the set or the split is not there, or broken. A picture that is missing, damaged or of
            another size, and an annotation that cannot be drawn, are told when that item is asked for.
    """

    def __init__(
        self, dataset_dir: str | Path, name: str, split: str, protocol: str, random_templates: bool = False, seed: int = 0
    ) -> None:
        self.refer = Refer(dataset_dir, name)
        self.pictures: list[ReferImage] = self.refer.of_split(split)
        self.split, self.protocol, self.random_templates, self.seed = split, protocol, random_templates, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def places(self) -> list[dict[str, Any]]:
        """{"image", "asked"} of each item (`utils.content`); an evaluation goes on only where this is unchanged."""
        segmentations = {number: note.get("segmentation") for number, note in self.refer.annotations.items()}
        return [
            {
                "image": self.refer.image_dir / picture.file_name,
                "asked": [picture.height, picture.width, [self._asked(s, segmentations) for s in picture.sentences]],
            }
            for picture in self.pictures
        ]

    def _asked(self, sentence: dict[str, Any], segmentations: dict[Any, Any]) -> list[Any]:
        """All of one expression that decides its record."""
        notes = sentence["ann_id"] if isinstance(sentence["ann_id"], list | tuple) else [sentence["ann_id"]]
        fields = [sentence[name] for name in ("sent", "exists", "gt_sent", "ref_id", "sent_id")]
        return [*fields, [segmentations.get(number) for number in notes]]

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        path, image = _read(self.refer, picture)
        empty = np.zeros(image.shape[:2], np.uint8)
        rng = np.random.default_rng([self.seed, index])
        conversations = []
        for s in picture.sentences:
            if self.random_templates:
                question = _question(s["sent"], rng)
            else:
                question = templates.EVAL_SHORT_QUESTION.format(class_name=s["sent"].lower())
            reply = None
            if self.protocol == "forced":
                pool = templates.SHORT_ANSWER
                reply = templates.EVAL_ANSWER
                if self.random_templates:
                    reply = pool[rng.integers(len(pool))].format(class_name=s["sent"].strip().lower())
            conversations.append([(question, reply)])
        return Sample(
            image_path=str(path),
            image=image,
            conversations=conversations,
            masks=np.stack(
                [self.refer.mask(s["ann_id"], *image.shape[:2]) if s["exists"] else empty for s in picture.sentences]
            ),
            exists=[s["exists"] for s in picture.sentences],
            questions=[s["sent"] for s in picture.sentences],
            meta={
                "dataset": self.refer.name,
                "split": self.split,
                "ref_ids": [s["ref_id"] for s in picture.sentences],
                "sent_ids": [s["sent_id"] for s in picture.sentences],
                "references": [None if s["exists"] else s["gt_sent"] for s in picture.sentences],
            },
        )
