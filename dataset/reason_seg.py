"""ReasonSeg, with and without false premises (protocol §2, §5): `reason_seg/ReasonSeg/<split>/<name>.jpg` with `<name>.json`.

    text               a question, or a list of them        is_sentence   true or false
    shapes             [{label, points: [[x, y], ...]}]     a label `flag` is dropped, one with `ignore` in it is neither right
                                                            nor wrong, any other is the target
    false_premise_QA   [[question, is_sentence, answer]]    may be missing

Truth values may be written 0 and 1. A shape that says `shape_type` is a polygon, a line or a point; a circle, a box of two
corners or a mask would be drawn as a line through its points, as the original did, and is refused.

Points are pixels of the picture as it is seen (turned by its EXIF data), and may lie outside of it; one point is a dot, two
are a line. A file without shapes has an empty target. Two of the 779 test files are such, and the released evaluation counts
them: IoU is 1 where nothing is predicted and else 0, and what is predicted enlarges cIoU's union. `dataset.check` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.cli import one_line
from utils.conversation import text_faults
from utils.files import as_object, read_json, shown, some_of
from utils.image import read_image

from . import templates
from .draw import choose, pick
from .types import Sample

IGNORE = 255
FAR = 10**6
"""No point lies further out, in pixels: it takes ever longer to draw, and with NaN it never ends."""
TRUE_SHARE = 0.85
"""Of the training samples whose file has false premises, this share asks for what is there."""
DRAWN_BY_POINTS = ("polygon", "line", "linestrip", "point")
"""Values of `shape_type` whose points are an outline, a line or a dot, as they are drawn."""
FOUR_CORNERS = ("rectangle", "rotation", "quadrilateral")
"""Values of `shape_type` that are polygons too, if four corners are given."""


@dataclass(frozen=True)
class Annotation:
    """One ReasonSeg file."""

    texts: list[str]
    is_sentence: bool
    shapes: list[dict]
    false_premises: list[tuple[str, bool, str]]
    """(query, is_sentence, answer) that the picture does not fulfil."""


def read_annotation(file: Path, any_shape: bool = True) -> Annotation:
    """A LabelMe-like JSON file of ReasonSeg, in UTF-8 or, as the original read it, in Windows' western encoding.

    Args:
        any_shape: `shape_type` is left to the caller; else a shape that its points do not outline is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, or a field is missing, of the wrong kind, empty, or holds a mark of the conversation
            format; the message names file and field.
    """
    content = as_object(read_json(file, cp1252=True), str(file))
    for name in ("text", "is_sentence", "shapes"):
        if name not in content:
            raise ValueError(f"{file} lacks the field {name!r}")
    texts = [content["text"]] if isinstance(content["text"], str) else content["text"]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{file}, text: must be a question, or a list of them, found {shown(content['text'])}")
    for number, text in enumerate(texts):
        _check_text(text, f"{file}, text[{number}]")
    is_sentence = _truth(content["is_sentence"], f"{file}, is_sentence")
    if not isinstance(content["shapes"], list):
        raise ValueError(f"{file}, shapes: must be a list of shapes, found {shown(content['shapes'])}")
    shapes = []
    for number, shape in enumerate(content["shapes"]):
        where = f"{file}, shapes[{number}]"
        for name in ("label", "points"):
            if name not in as_object(shape, where):
                raise ValueError(f"{where} lacks the field {name!r}")
        if not isinstance(shape["label"], str):
            raise ValueError(f"{where}: label: must be text, found {shown(shape['label'])}")
        if shape["label"].lower() == "flag":
            continue
        try:
            points = outline(shape["points"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not len(points):
            raise ValueError(f"{where}: points: is empty")
        kind = "polygon" if shape.get("shape_type") is None else shape["shape_type"]
        if not (any_shape or kind in DRAWN_BY_POINTS or (kind in FOUR_CORNERS and len(points) == 4)):
            raise ValueError(
                f"{where}: shape_type: a {shown(kind)} of {len(points)} points is no outline, and would be drawn as a line "
                "through its points: write its outline as a polygon"
            )
        shapes.append(shape)
    return Annotation(texts, is_sentence, shapes, _false_premises(content.get("false_premise_QA"), file))


def _false_premises(entries: Any, file: Path) -> list[tuple[str, bool, str]]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise ValueError(f"{file}, false_premise_QA: must be a list of [question, is_sentence, answer], found {shown(entries)}")
    found = []
    for number, entry in enumerate(entries):
        where = f"{file}, false_premise_QA[{number}]"
        if not isinstance(entry, list) or len(entry) != 3:
            raise ValueError(f"{where}: must be a list [question, is_sentence, answer], found {shown(entry)}")
        query, is_sentence, answer = entry
        _check_text(query, f"{where}, question")
        _check_text(answer, f"{where}, answer")
        found.append((query, _truth(is_sentence, f"{where}, is_sentence"), answer))
    return found


def _check_text(text: Any, where: str) -> None:
    if faults := text_faults(text):
        raise ValueError(f"{where}: {'; '.join(faults)}")


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, int) or value not in (0, 1):  # a bool is an int
        raise ValueError(f"{where}: must be true or false, found {shown(value)}")
    return bool(value)


def outline(points: Any) -> np.ndarray:
    """(n, 2) float64 of the points of a shape, (x, y) in pixels.

    Raises:
        ValueError: they are no pairs of numbers, or one is not finite or further away than `FAR`.
    """
    if not isinstance(points, list | tuple):
        raise ValueError(f"points: must be pairs [x, y], found {shown(points)}")
    for point in points:
        numbers = point if isinstance(point, list | tuple) else []
        if len(numbers) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
            raise ValueError(f"points: must be pairs [x, y] of numbers, found {shown(point)}")
    try:
        found = np.array(points, dtype=float).reshape(-1, 2)
    except OverflowError as error:  # a whole number of 400 digits
        raise ValueError(f"points: hold a number that is no place in or near an image: {error}") from error
    wrong = ~(np.abs(found) <= FAR).all(axis=1)  # NaN compares as false
    if wrong.any():
        raise ValueError(f"points: {found[wrong][0].tolist()} is no place in or near an image")
    return found


def draw_mask(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: 1 target, 0 rest, 255 ignored. Large shapes are drawn first, so the smaller drawn last wins (§2).

    Of shapes with equally many pixels the later in the file is drawn first, so the earlier wins.
    """
    drawn = []
    for shape in shapes:
        points = np.array(shape["points"], dtype=np.float64).reshape(-1, 1, 2).astype(np.int32)
        alone = np.zeros((height, width), np.uint8)
        _draw(alone, points, 1)
        drawn.append((int(alone.sum()), points, IGNORE if "ignore" in shape["label"].lower() else 1))
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(reversed(drawn), key=lambda item: item[0], reverse=True):
        _draw(mask, points, value)
    return mask


def _draw(mask: np.ndarray, points: np.ndarray, value: int) -> None:
    cv2.polylines(mask, [points], True, value, 1)
    cv2.fillPoly(mask, [points], value)


def list_files(dataset_dir: str | Path, splits: Sequence[str], whole: bool = False) -> list[tuple[Path, Path]]:
    """(picture, annotation) of the splits, in the order of the pictures' names.

    A name counts if one of its two files is there, so that a picture that is missing is missed when it is wanted.

    Raises:
        FileNotFoundError: a folder is missing or empty; the message names it and the splits that are there. With `whole` also
            if any file is missing.
    """
    root, pairs = Path(dataset_dir) / "reason_seg/ReasonSeg", []
    for split in splits:
        if not _pictures(root / split):
            found = sorted(folder.name for folder in root.glob("*") if _pictures(folder))
            raise FileNotFoundError(
                f"{root / split} has no pictures: ReasonSeg|{split} needs it (--dataset_dir {dataset_dir}). There "
                + (f"are the splits {', '.join(found)}" if found else f"are no splits in {root}")
            )
        notes = (file.with_suffix(".jpg") for file in _files(root / split, "*.json"))
        pairs += [(picture, picture.with_suffix(".json")) for picture in sorted({*_pictures(root / split), *notes})]
    missing = [file for pair in pairs for file in pair if whole and not file.is_file()]
    if missing:
        told = some_of(list(map(str, missing)), mark=", ")
        raise FileNotFoundError(f"{told}: does not exist, but the other file of its pair does")
    return pairs


def _pictures(folder: Path) -> list[Path]:
    return _files(folder, "*.jpg")


def _files(folder: Path, pattern: str) -> list[Path]:
    """Without folders and hidden files: archives made on a Mac carry a `._name.jpg` beside each picture."""
    return [file for file in folder.glob(pattern) if not file.name.startswith(".") and not file.is_dir()]


def read_annotations(pairs: Sequence[tuple[Path, Path]], tolerant: bool = False) -> list[Annotation | Exception]:
    """The annotation of each pair of `list_files`, or the error that reading it gave, if `tolerant` and one can be read.

    Raises:
        ValueError: a file is missing or broken; the message names it and the field, of several the first.
    """
    found: list[Annotation | Exception] = []
    for _, file in pairs:
        try:
            found.append(read_annotation(file, any_shape=False))
        except (OSError, ValueError) as error:
            found.append(error)
    faults = [note for note in found if isinstance(note, Exception)]
    if faults and not (tolerant and len(faults) < len(found)):
        raise ValueError(some_of(list(map(one_line, faults)))) from faults[0]
    return found


def question(text: str, is_sentence: bool, rng: np.random.Generator, as_written: bool = False) -> str:
    """A training question around a sentence (as it is) or a phrase (in small letters, unless `as_written`)."""
    if is_sentence:
        return pick(templates.LONG_QUESTION, rng).format(sent=text)
    return pick(templates.SHORT_QUESTION, rng).format(class_name=text if as_written else text.lower())


class ReasonTraining:
    """ReasonSeg to learn from; `splits` as the flag writes them: `ReasonSeg|train`, several joined by `_`.

    Raises:
        FileNotFoundError: a split or a file is not there.
        ValueError: an annotation is broken (all of them are read here); the message names file and field.
    """

    def __init__(self, dataset_dir: str | Path, splits: str = "ReasonSeg|train", k: int = 1, ignore: str = "background"):
        name, _, joined = splits.partition("|")
        if name != "ReasonSeg" or not all(joined.split("_")):
            raise ValueError(f"--reason_seg_data takes ReasonSeg|SPLIT or ReasonSeg|SPLIT_SPLIT, found {splits!r}")
        if ignore not in ("background", "ignored"):
            raise ValueError(f"ignore must be 'background' (as the original trains) or 'ignored', found {ignore!r}")
        self.files = list_files(dataset_dir, joined.split("_"), whole=True)
        self.notes = read_annotations(self.files)
        self.k, self.ignore = k, ignore

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random picture, its true questions (85 %) or, where the file has some, its false premises."""
        index = rng.integers(len(self.files))
        picture, note = self.files[index][0], self.notes[index]
        image = read_image(picture)
        size = image.shape[:2]
        false = note.false_premises and rng.random() > TRUE_SHARE
        pool = note.false_premises if false else [(text, note.is_sentence, None) for text in note.texts]
        chosen = choose(pool, self.k, rng)
        conversations = []
        for text, is_sentence, reply in chosen:
            reply = reply if reply is not None else pick(templates.LONG_ANSWER, rng)
            # The original asks false premises as they are written, also the short ones.
            conversations.append([(question(text, is_sentence, rng, as_written=bool(false)), reply)])
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

    Raises:
        FileNotFoundError: the split is not there.
        ValueError: not one of its annotations can be read. Else a file of one picture that is missing (FileNotFoundError) or
            broken (ValueError) is told when that item is asked for.
    """

    def __init__(self, dataset_dir: str | Path, split: str, protocol: str, random_templates: bool = False, seed: int = 0):
        self.files = list_files(dataset_dir, [split])
        self.notes = read_annotations(self.files, tolerant=True)
        self.split, self.protocol, self.random_templates, self.seed = split, protocol, random_templates, seed

    def __len__(self) -> int:
        return len(self.files)

    def places(self) -> list[dict[str, Any]]:
        """{"image", "asked"} of each item (`utils.content`); an evaluation goes on only where this is unchanged."""
        return [{"image": picture, "asked": note} for picture, note in self.files]

    def __getitem__(self, index: int) -> Sample:
        picture, note = self.files[index][0], self.notes[index]
        if isinstance(note, Exception):
            raise note.with_traceback(None)
        image = read_image(picture)
        mask = draw_mask(note.shapes, *image.shape[:2])
        rng = np.random.default_rng([self.seed, index])
        asked = [(note.texts[0], note.is_sentence, True)]
        references: list[str | None] = [None]
        if self.protocol == "generate":
            asked += [(text, is_sentence, False) for text, is_sentence, _ in note.false_premises]
            references += [answer for _, _, answer in note.false_premises]
        conversations = []
        for text, is_sentence, exists in asked:
            if self.random_templates:
                asks = question(text, is_sentence, rng, as_written=not exists)
            elif is_sentence:
                asks = templates.EVAL_LONG_QUESTION.format(sent=text)
            else:
                asks = templates.EVAL_SHORT_QUESTION.format(class_name=text.lower() if exists else text)
            conversations.append([(asks, templates.EVAL_ANSWER if self.protocol == "forced" else None)])
        return Sample(
            image_path=str(picture),
            image=image,
            conversations=conversations,
            masks=np.stack([mask if exists else np.zeros_like(mask) for _, _, exists in asked]),
            exists=[exists for _, _, exists in asked],
            questions=[text for text, _, _ in asked],
            meta={
                "dataset": "ReasonSeg",
                "split": self.split,
                "is_sentence": [s for _, s, _ in asked],
                "references": references,
            },
        )
