"""Semantic sets: ADE20K, COCO-Stuff, Mapillary, PASCAL-Part, PACO-LVIS; their class names become questions (protocol §2).

Two kinds of files: label maps, where a class has one mask in a picture, and COCO annotations of objects and parts, where each
annotation is a mask of its own. A sample asks for what is there, or for what is not, which is then denied or corrected.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.conversation import text_faults
from utils.files import as_object, read_object, read_text, shown, some_of
from utils.image import open_stored, read_image

from . import templates
from .draw import choose, pick
from .refer_api import draw_segmentation, id_faults, image_name, image_size, is_id
from .types import Sample

log = logging.getLogger(__name__)

UNLABELLED = 255
MODES, MODE_SHARES = ("true", "denial", "correction"), (0.85, 0.07, 0.08)
CLASSES = Path(__file__).resolve().parent / "classes"


@dataclass
class Content:
    """What one picture shows."""

    path: Path
    size: tuple[int, int]
    """(H, W) of the masks."""
    where: str
    """The file that says so, and its record, for messages."""
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
            FileNotFoundError, ValueError: the file is missing, no label map, or has a class number without a name; the
                message names it.
        """
        try:
            with open_stored(file) as image:
                stored = np.array(image)  # of a palette PNG the numbers, as Mapillary has them; cv2 gives the colours
        except ValueError as error:
            raise ValueError(f"{file} cannot be read as a label map: {error}") from error
        if stored.ndim != 2 or stored.dtype.kind not in "uib":
            raise ValueError(f"{file} is no label map: it has colours or fractions, not one whole number a pixel")
        labels = stored.astype(np.int64) - self.shift
        labels[np.isin(labels, self.ignored) | (labels == -1) | (stored == UNLABELLED)] = UNLABELLED
        known = min(len(self.classes), UNLABELLED)
        if (wrong := labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= known))]).size:
            raise ValueError(f"{file}: class number {wrong[0] + self.shift}, but there are {known} classes from {self.shift} on")
        return labels.astype(np.uint8)

    def content(self, index: int, rng: np.random.Generator) -> Content:
        path, file = self.pairs[index]
        labels = self.labels(file)
        found = [int(value) for value in np.unique(labels) if value != UNLABELLED]
        shown = set(found) | set(self.ignored)
        return Content(
            path,
            labels.shape,
            str(file),
            [(self.classes[value], lambda value=value: (labels == value).astype(np.uint8)) for value in found],
            [name for number, name in enumerate(self.classes) if number not in shown],
        )


class Parts:
    """COCO annotations whose categories are objects, `obj`, or their parts, `obj:part`.

    Raises:
        ValueError: the file is no COCO file, or a record lacks a field, has one of the wrong kind, an id that is there twice
            or that is nowhere; the message names the file and the first faults. A segmentation that cannot be drawn is told
            when it is drawn.
    """

    def __init__(self, file: Path, image_dir: Path) -> None:
        self.file, self.image_dir = file, image_dir
        content = read_object(file)
        faults: list[str] = []
        images, notes, categories = (self._by_id(content, part, faults) for part in ("images", "annotations", "categories"))
        for number, image in images.items():
            try:
                image_name(image, f"image {shown(number)}"), image_size(image, f"image {shown(number)}")
            except ValueError as error:
                faults.append(str(error))
        self.names: dict[Any, tuple[str, ...]] = {}
        for number, category in categories.items():
            name = category.get("name")
            wrong = text_faults(name)
            self.names[number] = () if wrong else tuple(word.split("_(")[0] for word in name.strip().split(":"))
            if not wrong and (len(self.names[number]) > 2 or not all(map(str.strip, self.names[number]))):
                wrong = [f"must be an object or object:part, found {shown(name)}"]
            faults += [f"category {shown(number)}, name: {fault}" for fault in wrong]
        self.notes: dict[Any, list[dict[str, Any]]] = {number: [] for number in images}
        for number, note in notes.items():
            for name, known in (("image_id", images), ("category_id", categories)):
                if not is_id(note.get(name)) or note[name] not in known:
                    faults.append(f"annotation {shown(number)}, {name}: there is no {shown(note.get(name))}")
            if is_id(note.get("image_id")):
                self.notes.setdefault(note["image_id"], []).append(note)
        if faults:
            raise ValueError(f"{file}: {some_of(faults)}")
        self.images = [image for number, image in images.items() if self.notes[number]]
        if not self.images:
            raise ValueError(f"{file} has no annotations of its {len(images)} images")

    def _by_id(self, content: dict[str, Any], part: str, faults: list[str]) -> dict[Any, dict[str, Any]]:
        """Records of a list by their ids; what is wrong with them goes to `faults`."""
        records = content.get(part)
        if not isinstance(records, list):
            found = f"found {shown(records)}" if part in content else "and it lacks it"
            raise ValueError(f"{self.file} is no COCO file: its field {part!r} must be a list, {found}")
        faults += id_faults(records, part)
        return {record["id"]: record for record in records if isinstance(record, dict) and is_id(record.get("id"))}

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def say(name: tuple[str, ...], rng: np.random.Generator) -> str:
        """`obj`; a part is `obj part` or `the part of the obj`, by even odds."""
        if len(name) == 1:
            return name[0]
        return f"{name[0]} {name[1]}" if rng.random() < 0.5 else f"the {name[1]} of the {name[0]}"

    def content(self, index: int, rng: np.random.Generator) -> Content:
        image = self.images[index]
        notes = self.notes[image["id"]]
        there = {self.names[note["category_id"]] for note in notes}
        return Content(
            self.image_dir / image["file_name"].replace("\\", "/"),
            (int(image["height"]), int(image["width"])),
            f"{self.file}, image {image['id']}",
            [
                (self.say(self.names[note["category_id"]], rng), lambda note=note: self.mask(note, image))
                for note in notes
            ],
            [self.say(name, rng) for name in self.names.values() if name not in there],
        )

    def mask(self, note: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        """(H, W) uint8 in {0, 1} of one annotation.

        Raises:
            DrawingError: it cannot be drawn; the message names file, annotation and field.
        """
        try:
            if not note.get("segmentation"):  # pycocotools draws none of these
                raise ValueError(f"is empty or missing: {shown(note.get('segmentation'))}")
            return draw_segmentation(note["segmentation"], int(image["height"]), int(image["width"]))
        except ValueError as error:
            raise DrawingError(f"{self.file}, annotation {note['id']}, segmentation: {error}") from error


class DrawingError(ValueError):
    """An annotation that cannot be drawn."""


# ------------------------------------------------------------------------------------------------ the five sets


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {name} needs it")
    return path


def _pairs(name: str, images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(picture, label map) of one name, for every label map; folders and hidden files (._a.png of a Mac) are passed over."""
    _existing(images, name)
    files = [file for file in sorted(_existing(labels, name).glob("*.png")) if not (file.name[0] == "." or file.is_dir())]
    pairs = [(images / f"{file.stem}.jpg", file) for file in files]
    if not pairs:
        raise FileNotFoundError(f"{labels} has no PNG files: {name} needs them")
    return pairs


def _names(name: str) -> list[str]:
    return read_text(CLASSES / f"{name}.txt").splitlines()


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
    labels = read_object(config).get("labels")
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"{config}, labels: must be a list of classes, found {shown(labels)}")
    names = []
    for number, label in enumerate(labels):
        name = as_object(label, f"{config}, labels[{number}]").get("readable")
        if faults := text_faults(name):
            raise ValueError(f"{config}, labels[{number}], readable: {'; '.join(faults)}")
        names.append(name.lower())
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
        self.redrawn: Counter[str] = Counter()
        """How often a sample was drawn anew, by the annotation that could not be drawn."""

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, rng: np.random.Generator) -> Sample:
        """What a random picture shows (85 %), or what it does not, denied (7 %) or corrected (8 %).

        An image that shows nothing, and one whose annotation cannot be drawn, is drawn anew. The latter is counted in `redrawn`,
        told the first time, and named in the sample's `meta["skipped"]`, so that a run counts it. (The original draws another set
        too, which changes their shares.)

        Raises:
            FileNotFoundError, ValueError: a picture is missing or damaged, or has another size than its masks.
        """
        source, mode = self.source, MODES[rng.choice(len(MODES), p=MODE_SHARES)]
        skipped: list[str] = []
        for _ in range(100):
            content = source.content(int(rng.integers(len(source))), rng)
            present = choose(content.present, self.k, rng)
            absent = choose(content.absent, len(present), rng)
            if not present or not (mode == "true" or absent):
                continue
            image = read_image(content.path)
            if content.size != image.shape[:2]:
                has, wants = (" x ".join(map(str, sides)) for sides in (image.shape[:2], content.size))
                raise ValueError(f"{content.path} has {has} pixels (turned, if its EXIF data say so), but {content.where} is "
                                 f"for {wants}")  # fmt: skip
            masks = np.zeros((0, *content.size), np.uint8)
            try:
                if mode == "true":
                    masks = np.stack([mask() for _, mask in present])
            except DrawingError as error:
                self._count(error)
                skipped.append(str(error))
                continue
            break
        else:
            raise ValueError(f"{self.name}: 100 images in a row show nothing that could be asked for and drawn")
        if mode == "true":
            asked = [name.lower() for name, _ in present]
            replies = [pick(templates.SHORT_ANSWER, rng).format(class_name=name) for name in asked]
        else:
            asked = [name.lower() for name in absent]
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
            meta={"dataset": self.name, "split": "train", "mode": mode} | ({"skipped": skipped} if skipped else {}),
        )

    def _count(self, error: DrawingError) -> None:
        if str(error) not in self.redrawn:
            log.warning("%s: another image is drawn instead", error)
        self.redrawn[str(error)] += 1
