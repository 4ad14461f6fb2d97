"""ReasonSeg, with and without false premises (protocol §2, §5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.image import read_image

from . import templates
from .draw import choose, pick
from .types import Sample

IGNORE = 255
TRUE_SHARE = 0.85
"""Of the training samples whose file has false premises, this share asks for what is there."""


@dataclass(frozen=True)
class Annotation:
    """One ReasonSeg file."""

    texts: list[str]
    is_sentence: bool
    shapes: list[dict]
    false_premises: list[tuple[str, bool, str]]
    """(query, is_sentence, answer) that the picture does not fulfil."""


def read_annotation(file: Path) -> Annotation:
    """A LabelMe-like JSON file of ReasonSeg.

    Raises:
        ValueError: the file is no JSON, or a field is missing or of the wrong kind; the message names file and field.
    """
    data = file.read_bytes()
    try:
        try:
            content = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            content = json.loads(data.decode("cp1252"))
        texts = content["text"]
        texts = [texts] if isinstance(texts, str) else list(texts)
        shapes = [shape for shape in content["shapes"] if "flag" != shape["label"].lower()]
        for shape in shapes:
            np.asarray(shape["points"], dtype=float).reshape(-1, 2)
        return Annotation(
            texts=texts,
            is_sentence=bool(content["is_sentence"]),
            shapes=shapes,
            false_premises=[(str(q), bool(s), str(a)) for q, s, a in content.get("false_premise_QA", [])],
        )
    except KeyError as field:
        raise ValueError(f"{file} lacks the field {field}") from field
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no ReasonSeg file: {error}") from error


def draw_mask(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: 1 target, 0 rest, 255 ignored. Large shapes are drawn first, so the smaller drawn last wins (§2)."""
    drawn = []
    for shape in shapes:
        points = np.array(shape["points"], dtype=np.float64).reshape(-1, 1, 2).astype(np.int32)
        alone = np.zeros((height, width), np.uint8)
        _draw(alone, points, 1)
        drawn.append((int(alone.sum()), points, IGNORE if "ignore" in shape["label"].lower() else 1))
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(drawn, key=lambda item: item[0], reverse=True):
        _draw(mask, points, value)
    return mask


def _draw(mask: np.ndarray, points: np.ndarray, value: int) -> None:
    cv2.polylines(mask, [points], True, value, 1)
    cv2.fillPoly(mask, [points], value)


def list_files(dataset_dir: str | Path, splits: Sequence[str]) -> list[tuple[Path, Path]]:
    """(picture, annotation) of the splits, in the order of the file names.

    Raises:
        FileNotFoundError: a folder is missing or empty, or a picture has no annotation; the message names it.
    """
    pairs = []
    for split in splits:
        folder = Path(dataset_dir) / "reason_seg/ReasonSeg" / split
        pictures = sorted(folder.glob("*.jpg"))
        if not pictures:
            raise FileNotFoundError(f"{folder} has no pictures: ReasonSeg|{split} needs it (--dataset_dir {dataset_dir})")
        for picture in pictures:
            annotation = picture.with_suffix(".json")
            if not annotation.is_file():
                raise FileNotFoundError(f"{annotation} does not exist, but its picture does")
            pairs.append((picture, annotation))
    return pairs


def question(text: str, is_sentence: bool, rng: np.random.Generator) -> str:
    """A training question around a sentence (as it is) or a phrase (in small letters)."""
    if is_sentence:
        return pick(templates.LONG_QUESTION, rng).format(sent=text)
    return pick(templates.SHORT_QUESTION, rng).format(class_name=text.lower())


class ReasonTraining:
    """ReasonSeg to learn from; `splits` as the flag writes them: `ReasonSeg|train`, several joined by `_`."""

    def __init__(self, dataset_dir: str | Path, splits: str = "ReasonSeg|train", k: int = 1, ignore: str = "background"):
        name, _, joined = splits.partition("|")
        if name != "ReasonSeg" or not joined:
            raise ValueError(f"--reason_seg_data takes ReasonSeg|SPLIT or ReasonSeg|SPLIT_SPLIT, found {splits!r}")
        if ignore not in ("background", "ignored"):
            raise ValueError(f"ignore must be 'background' (as the original trains) or 'ignored', found {ignore!r}")
        self.files = list_files(dataset_dir, joined.split("_"))
        self.k, self.ignore = k, ignore

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random picture, its true questions (85 %) or, where the file has some, its false premises."""
        picture, file = self.files[rng.integers(len(self.files))]
        note = read_annotation(file)
        image = read_image(picture)
        size = image.shape[:2]
        false = note.false_premises and rng.random() > TRUE_SHARE
        pool = note.false_premises if false else [(text, note.is_sentence, None) for text in note.texts]
        chosen = choose(pool, self.k, rng)
        conversations = []
        for text, is_sentence, reply in chosen:
            reply = reply if reply is not None else pick(templates.LONG_ANSWER, rng)
            conversations.append([(question(text, is_sentence, rng), reply)])
        mask = draw_mask(note.shapes, *size)
        if self.ignore == "background":
            mask = (mask == 1).astype(np.uint8)
        return Sample(
            image_path=str(picture),
            image=image,
            conversations=conversations,
            masks=np.zeros((0, *size), np.uint8) if false else np.repeat(mask[None], len(chosen), axis=0),
            exists=[not false] * len(chosen),
            questions=[text for text, _, _ in chosen],
            meta={"dataset": "ReasonSeg", "split": "train", "is_sentence": [s for _, s, _ in chosen]},
        )


class ReasonEvaluation:
    """A split of ReasonSeg: one item a picture; the first text alone counts, as published (§5).

    With the `generate` protocol the false premises of a file are asked as well (the original meant to, §8-12).
    """

    def __init__(self, dataset_dir: str | Path, split: str, protocol: str, random_templates: bool = False, seed: int = 0):
        self.files = list_files(dataset_dir, [split])
        self.split, self.protocol, self.random_templates, self.seed = split, protocol, random_templates, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        picture, file = self.files[index]
        note = read_annotation(file)
        image = read_image(picture)
        mask = draw_mask(note.shapes, *image.shape[:2])
        rng = np.random.default_rng([self.seed, index])
        asked = [(note.texts[0], note.is_sentence, True)]
        if self.protocol == "generate":
            asked += [(text, is_sentence, False) for text, is_sentence, _ in note.false_premises]
        conversations = []
        for text, is_sentence, _ in asked:
            if self.random_templates:
                asks = question(text, is_sentence, rng)
            elif is_sentence:
                asks = templates.EVAL_LONG_QUESTION.format(sent=text)
            else:
                asks = templates.EVAL_SHORT_QUESTION.format(class_name=text.lower())
            conversations.append([(asks, templates.EVAL_ANSWER if self.protocol == "forced" else None)])
        return Sample(
            image_path=str(picture),
            image=image,
            conversations=conversations,
            masks=np.stack([mask if exists else np.zeros_like(mask) for _, _, exists in asked]),
            exists=[exists for _, _, exists in asked],
            questions=[text for text, _, _ in asked],
            meta={"dataset": "ReasonSeg", "split": self.split, "is_sentence": [s for _, s, _ in asked]},
        )
