"""ReasonSeg, with and without false premises (protocol §2, §5): `reason_seg/ReasonSeg/<split>/<name>.jpg` with `<name>.json`.

    text               a question, or a list of them        is_sentence   true or false
    shapes             [{label, points: [[x, y], ...]}]     a label `flag` is dropped, one with `ignore` in it is neither right
                                                            nor wrong, any other is the target
    false_premise_QA   [[question, is_sentence, answer]]    may be missing

Points are pixels of the picture as it is seen (turned by its EXIF data), and may lie outside of it; one point is a dot, two
are a line. A file without shapes has an empty target. Two of the 779 test files are such, and the released evaluation counts
them: IoU is 1 where nothing is predicted and else 0, and what is predicted enlarges cIoU's union. `dataset.check` names them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.image import read_image

from . import templates
from .draw import choose, pick
from .types import Sample

IGNORE = 255
FAR = 10**6
"""No point lies further out, in pixels: it takes ever longer to draw, and with NaN it never ends."""
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
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, or a field is missing or of the wrong kind; the message names file and field.
    """
    if not file.is_file():
        raise FileNotFoundError(f"annotation {file} does not exist")
    data = file.read_bytes()
    where = ""
    try:
        try:
            content = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            content = json.loads(data.decode("cp1252"))
        texts = content["text"]
        texts = [texts] if isinstance(texts, str) else list(texts)
        where = ", text"
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"must be a question, or a list of them, found {content['text']!r}")
        where, shapes = "", []
        for number, shape in enumerate(content["shapes"]):
            where = f", shapes[{number}]"
            if shape["label"].lower() != "flag":
                if not len(outline(shape["points"])):
                    raise ValueError("points: is empty")
                shapes.append(shape)
        where = ""
        is_sentence = content["is_sentence"]
        where = ", is_sentence"
        if not isinstance(is_sentence, bool | int):
            raise ValueError(f"must be true or false, found {is_sentence!r}")
        where = ", false_premise_QA"
        false = [(str(q), bool(s), str(a)) for q, s, a in content.get("false_premise_QA") or []]
    except KeyError as field:
        raise ValueError(f"{file}{where} lacks the field {field}") from field
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}{where}: {error}" if where else f"{file} is no ReasonSeg file: {error}") from error
    return Annotation(texts, bool(is_sentence), shapes, false)


def outline(points: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, 2) float64 of the points of a shape, (x, y) in pixels.

    Raises:
        ValueError: they are no pairs of numbers, or one is not finite or further away than `FAR`.
    """
    try:
        found = np.asarray(points, dtype=float)
    except (ValueError, TypeError) as error:
        raise ValueError(f"points: must be pairs [x, y]: {error}") from error
    if found.size and (found.ndim != 2 or found.shape[1] != 2):
        raise ValueError(f"points: must be pairs [x, y], found numbers in the shape {found.shape}")
    found = found.reshape(-1, 2)
    wrong = ~(np.abs(found) <= FAR).all(axis=1)  # NaN compares as false
    if wrong.any():
        raise ValueError(f"points: {found[wrong][0].tolist()} is no place in or near a picture")
    return found


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
        told = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{told}: does not exist, but the other file of its pair does")
    return pairs


def _pictures(folder: Path) -> list[Path]:
    return _files(folder, "*.jpg")


def _files(folder: Path, pattern: str) -> list[Path]:
    """Without hidden ones: archives made on a Mac carry a `._name.jpg` beside each picture."""
    return [file for file in folder.glob(pattern) if not file.name.startswith(".")]


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
        self.files = list_files(dataset_dir, joined.split("_"), whole=True)
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

    Raises:
        FileNotFoundError: the split is not there. A file of one picture that is missing (FileNotFoundError) or broken
            (ValueError) is told when that item is asked for.
    """

    def __init__(self, dataset_dir: str | Path, split: str, protocol: str, random_templates: bool = False, seed: int = 0):
        self.files = list_files(dataset_dir, [split])
        self.split, self.protocol, self.random_templates, self.seed = split, protocol, random_templates, seed

    def __len__(self) -> int:
        return len(self.files)

    def places(self) -> list[dict[str, Any]]:
        """{"image", "asked"} of each item (`utils.content`); an evaluation goes on only where this is unchanged."""
        return [{"image": picture, "asked": note} for picture, note in self.files]

    def __getitem__(self, index: int) -> Sample:
        picture, file = self.files[index]
        note = read_annotation(file)
        image = read_image(picture)
        mask = draw_mask(note.shapes, *image.shape[:2])
        rng = np.random.default_rng([self.seed, index])
        asked = [(note.texts[0], note.is_sentence, True)]
        references: list[str | None] = [None]
        if self.protocol == "generate":
            asked += [(text, is_sentence, False) for text, is_sentence, _ in note.false_premises]
            references += [answer for _, _, answer in note.false_premises]
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
            meta={
                "dataset": "ReasonSeg",
                "split": self.split,
                "is_sentence": [s for _, s, _ in asked],
                "references": references,
            },
        )
