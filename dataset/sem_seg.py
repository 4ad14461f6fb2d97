"""Semantic sets: ADE20K, COCO-Stuff, Mapillary, PASCAL-Part, PACO-LVIS; their class names become questions (protocol §2).

Two kinds of files: label maps, where a class has one mask in a picture, and COCO annotations of objects and parts, where each
annotation is a mask of its own. A sample asks for what is there, or for what is not, which is then denied or corrected.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from utils.image import read_image

from . import templates
from .draw import choose, pick
from .refer_api import draw_segmentation
from .types import Sample

UNLABELLED = 255
MODES, MODE_SHARES = ("true", "denial", "correction"), (0.85, 0.07, 0.08)
CLASSES = Path(__file__).resolve().parent / "classes"


@dataclass
class Content:
    """What one picture shows."""

    path: Path
    present: list[tuple[str, Callable[[], np.ndarray]]]
    """(name, mask): the mask (H, W) uint8 is made when it is wanted."""
    absent: list[str]


class Source(Protocol):
    """One of the sets, as `SemSegTraining` draws from it."""

    def __len__(self) -> int: ...

    def content(self, index: int, rng: np.random.Generator) -> Content: ...


class LabelMaps:
    """Pictures with a PNG each whose values are class numbers."""

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], classes: Sequence[str], ignored: Sequence[int] = (), shift: int = 0
    ):
        self.pairs, self.classes, self.shift = list(pairs), list(classes), shift
        self.ignored = [*ignored, UNLABELLED]

    def __len__(self) -> int:
        return len(self.pairs)

    def labels(self, file: Path) -> np.ndarray:
        """(H, W) uint8 class numbers, `UNLABELLED` where there is none.

        Raises:
            ValueError: the file is no label map; the message names it.
        """
        try:
            stored = np.array(Image.open(file))  # of a palette PNG the numbers, as Mapillary has them; cv2 gives the colours
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be read as a label map: {error}") from error
        if stored.ndim != 2:
            raise ValueError(f"{file} is no label map: it has colours, not one number a pixel")
        labels = stored.astype(np.int64) - self.shift
        labels[np.isin(labels, self.ignored) | (labels < 0) | (stored == UNLABELLED)] = UNLABELLED
        return labels.astype(np.uint8)

    def content(self, index: int, rng: np.random.Generator) -> Content:
        path, file = self.pairs[index]
        labels = self.labels(file)
        found = [int(value) for value in np.unique(labels) if value != UNLABELLED]
        if found and found[-1] >= len(self.classes):
            raise ValueError(f"{file}: class number {found[-1]}, but there are {len(self.classes)} classes")
        shown = set(found) | set(self.ignored)
        return Content(
            path,
            [(self.classes[value], lambda value=value: (labels == value).astype(np.uint8)) for value in found],
            [name for number, name in enumerate(self.classes) if number not in shown],
        )


class Parts:
    """COCO annotations whose categories are objects, `obj`, or their parts, `obj:part`."""

    def __init__(self, file: Path, image_dir: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            try:
                self.coco = COCO(str(file))
            except (ValueError, KeyError, AssertionError) as error:
                raise ValueError(f"{file} is no COCO file: {error!r}") from error
        self.file, self.image_dir = file, image_dir
        self.images = [image for image in self.coco.getImgIds() if self.coco.getAnnIds(imgIds=image)]
        self.names = {
            category["id"]: tuple(word.split("_(")[0] for word in category["name"].strip().split(":"))
            for category in self.coco.loadCats(self.coco.getCatIds())
        }

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def say(name: tuple[str, ...], rng: np.random.Generator) -> str:
        """`obj`; a part is `obj part` or `the part of the obj`, by even odds."""
        if len(name) == 1:
            return name[0]
        return f"{name[0]} {name[1]}" if rng.random() < 0.5 else f"the {name[1]} of the {name[0]}"

    def content(self, index: int, rng: np.random.Generator) -> Content:
        image = self.coco.loadImgs([self.images[index]])[0]
        notes = self.coco.loadAnns(self.coco.getAnnIds(imgIds=image["id"]))
        shown = {self.names[note["category_id"]] for note in notes}
        return Content(
            self.image_dir / image["file_name"],
            [
                (self.say(self.names[note["category_id"]], rng), lambda note=note: self.mask(note, image))
                for note in notes
            ],
            [self.say(name, rng) for name in self.names.values() if name not in shown],
        )

    def mask(self, note: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        """(H, W) uint8 in {0, 1} of one annotation.

        Raises:
            ValueError: it cannot be drawn; the message names file, annotation and field.
        """
        try:
            return draw_segmentation(note["segmentation"], image["height"], image["width"])
        except ValueError as error:
            raise ValueError(f"{self.file}, annotation {note['id']}, segmentation: {error}") from error


# ------------------------------------------------------------------------------------------------ the five sets


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {name} needs it")
    return path


def _pairs(name: str, images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(picture, label map) of one name, for every label map."""
    _existing(images, name)
    pairs = [(images / f"{file.stem}.jpg", file) for file in sorted(_existing(labels, name).glob("*.png"))]
    if not pairs:
        raise FileNotFoundError(f"{labels} has no PNG files: {name} needs them")
    return pairs


def _names(name: str) -> list[str]:
    return (CLASSES / f"{name}.txt").read_text().splitlines()


def _ade20k(root: Path) -> Source:
    folder = root / "ade20k"
    return LabelMaps(
        _pairs("ade20k", folder / "images/training", folder / "annotations/training"), _names("ade20k"), shift=1
    )


def _cocostuff(root: Path) -> Source:
    names = _names("cocostuff")
    unclear = [number for number, name in enumerate(names) if "-" in name]  # wall-other and the like
    return LabelMaps(_pairs("cocostuff", root / "coco/train2017", root / "cocostuff/train2017"), names, unclear)


def _mapillary(root: Path) -> Source:
    folder = root / "mapillary"
    config = _existing(folder / "config_v2.0.json", "mapillary")
    try:
        names = [label["readable"].lower() for label in json.loads(config.read_text())["labels"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} must hold labels with the field 'readable': {error!r}") from error
    return LabelMaps(_pairs("mapillary", folder / "training/images", folder / "training/v2.0/labels"), names)


def _pascal_part(root: Path) -> Source:
    folder = root / "vlpart/pascal_part"
    return Parts(
        _existing(folder / "train.json", "pascal_part"),
        _existing(folder / "VOCdevkit/VOC2010/JPEGImages", "pascal_part"),
    )


def _paco_lvis(root: Path) -> Source:
    file = root / "vlpart/paco/annotations/paco_lvis_v1_train.json"
    return Parts(_existing(file, "paco_lvis"), _existing(root / "coco", "paco_lvis"))


SOURCES: dict[str, Callable[[Path], Source]] = {
    "ade20k": _ade20k,
    "cocostuff": _cocostuff,
    "pascal_part": _pascal_part,
    "paco_lvis": _paco_lvis,
    "mapillary": _mapillary,
}


class SemSegTraining:
    """Class names of one set to learn from: uniform over pictures, then `k` of what the picture shows.

    Raises:
        ValueError: an unknown set, or a broken file. FileNotFoundError: the set is not on disk; the message names the file.
    """

    def __init__(self, dataset_dir: str | Path, name: str, k: int = 1) -> None:
        if name not in SOURCES:
            raise ValueError(f"no semantic set {name!r}; there are {', '.join(SOURCES)}")
        self.name, self.k = name, k
        self.source = SOURCES[name](Path(dataset_dir))

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, rng: np.random.Generator) -> Sample:
        """What a random picture shows (85 %), or what it does not, denied (7 %) or corrected (8 %)."""
        source, mode = self.source, MODES[rng.choice(len(MODES), p=MODE_SHARES)]
        for _ in range(100):
            content = source.content(int(rng.integers(len(source))), rng)
            present = choose(content.present, self.k, rng)
            absent = choose(content.absent, len(present), rng)
            if present and (mode == "true" or absent):
                break
        else:
            raise ValueError(f"{self.name}: 100 pictures in a row show nothing that could be asked for")
        image = read_image(content.path)
        if mode == "true":
            asked = [name.lower() for name, _ in present]
            replies = [pick(templates.SHORT_ANSWER, rng).format(class_name=name) for name in asked]
            masks = np.stack([mask() for _, mask in present])
            if masks.shape[1:] != image.shape[:2]:
                raise ValueError(f"{content.path} is {image.shape[:2]} high and wide, its annotation {masks.shape[1:]}")
        else:
            asked, masks = [name.lower() for name in absent], np.zeros((0, *image.shape[:2]), np.uint8)
            pool = templates.NEG_ANSWER if mode == "denial" else templates.CORRECT_ANSWER
            replies = [
                pick(pool, rng).format(class_name=name, gt_name=true.lower())
                for name, (true, _) in zip(asked, present, strict=False)
            ]
        questions = [pick(templates.SHORT_QUESTION, rng).format(class_name=name) for name in asked]
        return Sample(
            image_path=str(content.path),
            image=image,
            conversations=[[turn] for turn in zip(questions, replies, strict=True)],
            masks=masks,
            exists=[mode == "true"] * len(asked),
            questions=asked,
            meta={"dataset": self.name, "split": "train", "mode": mode},
        )
