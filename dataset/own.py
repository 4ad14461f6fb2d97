"""Own pictures, read as they are: a table, a COCO file or LabelMe files.

    mydata/questions.csv        image,mask,question,split
                                desk.jpg,cup.png,the blue cup,train
                                desk.jpg,,the stapler,train                                  <- no mask: it is not there
                                shelf.jpg,lamp.png,Which of these would help me to read?,val
    mydata/*.jpg, mydata/*.png  pictures, and masks of the same size: what is not 0 is the object

    python -m dataset.check --own_data mydata
    python train_read.py --dataset own --sample_rates 1 --own_data mydata --val_dataset mydata
    python test_read.py --data "mydata|val"

What PATH is tells the form:

    table     a folder with questions.csv (commas, semicolons or tabs) or questions.jsonl, or the path of a .csv or .jsonl
    COCO      a .json with images, annotations and categories, or the folder of such files; the pictures are beside it, in
              `images`, in a folder named like the split (`train2017`), or in one of these one folder up
    LabelMe   a folder of .json files beside their pictures; one that has a field `text` is read as ReasonSeg's. Polygons,
              rectangles (turned ones and quadrilaterals too, by their four corners), circles and the masks of LabelMe's AI tools
              are read; points and lines have no area, and are refused

Texts are UTF-8, or UTF-16 with its byte order mark; any other encoding is refused. Excel's first line `sep=;` is understood.
Hidden files, folders and .json files of other programs are passed over; the latter are named in a warning.

Splits are train, val (valid, validation) and test: sub-folders of these names, each a data set of its own; or the column `split`
of a table (an empty cell is train); or COCO files `instances_train.json`, `instances_val.json`. All else is train.

Columns of a table, any but the first three may be left out. Paths are relative to the table's folder:

    image, question
    mask         a PNG, TIFF or BMP; a pixel that is not 0 is the object, 255 like any other (of a palette the numbers, of
                 colours any channel, nothing transparent); empty: what is asked for is not there
    answer       of what is there: with one [SEG], or " The segmentation result is [SEG]." is put behind it; of what is not:
                 without; empty: a template
    correction   what is there instead; makes a template's answer, which without it only denies
    is_sentence  true or false; empty: true if the question ends with one of ? . !
    exists       true or false, to be safe: it must agree with whether there is a mask
    split        see above

A COCO category or a LabelMe label is a question (in small letters, `_` a space), and all its shapes in a picture are one mask.
LabelMe shapes whose label contains `ignore` are left out of loss and measure (255). Pictures without a question are left out, and
so is a thing whose shapes cover no pixel (dataset.check names it).

Training asks `k` questions of a random picture. From a table, all rows of the picture are drawn alike. Else 85 % of the samples
ask for what is there and 15 % for what is not: ReasonSeg's false premises, or a COCO category that the file has, but not in this
picture, denied or corrected as 7 to 8 (so annotate all categories in every picture). LabelMe's labels are never denied.

Evaluation has one item a picture. What is not there is asked with the `generate` protocol alone, as a forced answer cannot deny;
absent COCO categories are as many as present ones.
"""

from __future__ import annotations

import base64
import csv
import io
import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.content import content_name
from utils.conversation import text_faults
from utils.files import parse_json, read_json, read_text, shown, some_of, whole_number
from utils.image import open_stored, read_image
from utils.rle import MAX_PIXELS

from . import templates
from .draw import choose, pick
from .reason_seg import FAR, IGNORE, TRUE_SHARE, draw_mask, outline, question, read_annotation
from .refer_api import draw_segmentation, id_faults, image_name, image_size, is_id
from .sem_seg import MODE_SHARES
from .types import Sample

log = logging.getLogger(__name__)

FORMS = "own data is a folder with questions.csv or questions.jsonl, a COCO .json, or a folder of LabelMe .json beside pictures"
TABLES = ("questions.csv", "questions.jsonl")
REQUIRED = ("image", "mask", "question")
COLUMNS = (*REQUIRED, "answer", "is_sentence", "split", "exists", "correction")
FLAGS = ("is_sentence", "exists")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What folders, files and cells may be called, and the split that it means."""
NAMED_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test)\d*$", re.IGNORECASE)
"""The end of a COCO file's name: instances_train, instances_val2017."""
TRUTH = {"": None, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")
PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
COCO_FIELDS = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"),
               "annotations": ("id", "image_id", "category_id", "segmentation")}  # fmt: skip
CORNERS = {"polygon": range(3, FAR), "rectangle": (2, 4), "circle": (2,), "mask": (2,),
           **dict.fromkeys(("rotation", "oriented_rectangle", "quadrilateral"), (4,))}  # fmt: skip
"""Shapes of LabelMe and X-AnyLabeling that have an area, and how many points each may have."""
SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)
"""The line that Excel's users put before a table."""
SEG, APPENDED = "[SEG]", "The segmentation result is [SEG]."
UNNAMED = "such thing"
"""Stands for a whole sentence where a denial would name the thing."""
CORRECTED = MODE_SHARES[2] / (MODE_SHARES[1] + MODE_SHARES[2])
BAD_IMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged or no images."""
SHOWN = 20
"""So many faults are told, the rest is counted."""


class OwnDataError(ValueError):
    """Everything that is wrong with one table, file or folder."""

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.faults = [fault if fault.startswith(f"{path}{os.sep}") else f"{path}: {fault}" for fault in faults]
        super().__init__(f"{path} cannot be used:\n  " + some_of(faults, SHOWN, "\n  "))


@dataclass
class Question:
    """One question of a picture."""

    text: str
    is_sentence: bool = False
    mask: Callable[[int, int], np.ndarray] | None = None
    """(height, width) -> (H, W) uint8: 1 object, 0 rest, 255 ignored; None: it is not there."""
    answer: str | None = None
    correction: str | None = None
    where: str = ""
    """File and record, for messages."""

    @property
    def exists(self) -> bool:
        return self.mask is not None


@dataclass
class Picture:
    """One picture and what its data set asks of it."""

    path: Path
    questions: list[Question]
    size: tuple[int, int] | None = None
    """(H, W) for which its shapes were drawn, where the file says so."""


@dataclass
class OwnSplit:
    """One split of own data, whatever its form."""

    pictures: list[Picture]
    alike: bool = False
    """What is there and what is not are drawn alike."""
    names: list[str] = field(default_factory=list)
    """Each may be denied where no question of the picture has it."""

    def absent(self, picture: Picture, count: int, rng: np.random.Generator) -> list[Question]:
        """Up to `count` questions for names that the picture does not show."""
        there = [asked.text for asked in picture.questions]
        others = [name for name in self.names if name not in there]
        return [
            Question(name, correction=pick(there, rng) if rng.random() < CORRECTED else None)
            for name in choose(others, count, rng)
        ]


# ------------------------------------------------------------------------------------------------ table


def read_table(file: Path, within: str | None = None) -> dict[str, OwnSplit]:
    """Every split of a table; `within` is the split of the sub-folder it lies in. OwnDataError has all faults of all rows."""
    pictures: dict[str, dict[Path, Picture]] = {}
    masks: dict[tuple[Path, str], tuple[str, int]] = {}
    faults: list[str] = []
    for line, row in _rows(file, faults):
        image, mask = (Path(os.path.normpath(file.parent / row[name].replace("\\", "/"))) for name in ("image", "mask"))
        wrong = _faults(row, image, mask)
        split = SPLITS.get((row["split"] or within or "train").lower())
        if within and split not in (within, None):
            wrong.append(f"split: {row['split']!r}, but the table lies in the folder of {within}")
        first, before = masks.setdefault((image, row["question"].lower()), (row["mask"], line))
        if first != row["mask"] and not wrong:
            wrong.append(f"question: line {before} asks it of the same picture with another mask: one mask must hold all of it")
        faults += [f"line {line}, {fault}" for fault in wrong]
        if not wrong:
            is_sentence = TRUTH[row["is_sentence"].lower()]
            asked = Question(
                row["question"],
                row["question"][-1] in "?.!" if is_sentence is None else is_sentence,
                partial(read_mask, mask) if row["mask"] else None,
                row["answer"] or None,
                row["correction"] or None,
                f"{file}, line {line}",
            )
            pictures.setdefault(split, {}).setdefault(image, Picture(image, [])).questions.append(asked)
    if faults or not pictures:
        raise OwnDataError(file, faults or ["it has no rows"])
    return {split: OwnSplit(list(found.values()), alike=True) for split, found in pictures.items()}


def _rows(file: Path, faults: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, text of every column) of the rows that can be read; what is wrong with the others goes to `faults`."""
    text = read_text(file)
    if file.suffix.lower() == ".jsonl":
        for line, words in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
            if not words.strip():
                continue
            try:
                items = parse_json(words, "the line").items()
            except (ValueError, AttributeError) as error:
                faults.append(f"line {line}: no JSON object: {error}")
                continue
            wrong = _column_faults([name.strip().lower() for name, _ in items])
            record = {name.strip().lower(): value for name, value in items}
            wrong += [f"{name}: must be text, found {shown(value)}" for name, value in record.items()
                      if not isinstance(value, str | None | int if name in FLAGS else str | None)]  # fmt: skip
            faults += [f"line {line}, {fault}" for fault in wrong]
            if not wrong:
                yield line, {name: _text(record.get(name)) for name in COLUMNS}
        return
    header, *_ = re.split(r"[\r\n]", text, maxsplit=1)
    if "\0" in header:
        raise OwnDataError(file, ["line 1: it is UTF-16 without its byte order mark: save it as UTF-8 (Excel: CSV UTF-8)"])
    delimiter, before = max(",;\t", key=header.count), 0
    if separator := SEPARATOR.fullmatch(header):
        delimiter, before = separator[1], 1
        text = re.split(r"\r\n|\r|\n", text, maxsplit=1)[-1]
    # strict: a quote that is never closed would hide the rest of the table without an error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        faults += [f"line {before + 1}, {fault}" for fault in _column_faults(reader.fieldnames)]
        for record in reader if not faults else ():
            line = reader.line_num + before
            if None in record:
                faults.append(f"line {line}: more cells than columns: text that contains {delimiter!r} needs quotes")
            elif any(map(_text, record.values())):
                yield line, {name: _text(record.get(name)) for name in COLUMNS}
    except csv.Error as error:
        line = reader.line_num + before
        faults.append(f"line {line}: {error}: is a quote not closed, or not doubled inside of quotes?")


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def _column_faults(names: Sequence[str]) -> list[str]:
    found = [f"{name!r}: no such column; there are {', '.join(COLUMNS)}" for name in names if name not in COLUMNS]
    found += [f"{name}: is lacking (what is not there has an empty mask)" for name in REQUIRED if name not in names]
    return found + [f"{name}: is there twice" for name, count in Counter(names).items() if count > 1]


def _faults(row: dict[str, str], image: Path, mask: Path) -> list[str]:
    """What is wrong with one row, each with its column."""
    found = [] if row["image"] else ["image: is empty"]
    found += [f"{name}: {path} {'is a folder' if os.path.isdir(path) else 'does not exist'}"
              for name, path in (("image", image), ("mask", mask)) if row[name] and not os.path.isfile(path)]  # fmt: skip
    if row["mask"] and mask.suffix.lower() not in LOSSLESS:
        found.append(f"mask: must be one of {', '.join(LOSSLESS)}, found {row['mask']!r}: a JPEG blurs its edges")
    for name in FLAGS:
        if row[name].lower() not in TRUTH:
            found.append(f"{name}: must be true, false or empty, found {row[name]!r}")
    if row["split"] and row["split"].lower() not in SPLITS:
        found.append(f"split: must be train, val, test or empty, found {row['split']!r}")
    exists = TRUTH.get(row["exists"].lower())
    if exists is not None and exists != bool(row["mask"]):
        found.append("exists: true, but there is no mask" if exists else "exists: false, so the mask must be left empty")
    if row["correction"] and row["mask"]:
        found.append("correction: is for what is not there, and here is a mask")
    return found + _said_faults(row["question"], row["answer"] or None, row["correction"] or None, bool(row["mask"]))


def _said_faults(text: str, answer: str | None, correction: str | None, exists: bool) -> list[str]:
    """What is wrong with the words of one question; None is what it does not say."""
    found = [
        f"{name}: {fault}"
        for name, said, allowed in (("question", text, ()), ("correction", correction, ()), ("answer", answer, (SEG,)))
        if said is not None
        for fault in text_faults(said, allowed)
    ]
    answer = answer or ""
    if answer.lower().count(SEG.lower()) > exists or answer.count(SEG) < answer.lower().count(SEG.lower()):
        found.append(f"answer: {'one [SEG] in capitals at most' if exists else 'no [SEG], as there is no mask'}: {answer!r}")
    return found


def read_mask(file: Path, height: int = 0, width: int = 0) -> np.ndarray:
    """(H, W) uint8 of a mask file, 1 where it is not 0. It has its own size, so the picture's is not looked at here.

    Raises:
        ValueError: it cannot be read, or is 0 everywhere; the message names it.
    """
    try:
        with open_stored(file) as image:
            mask = _not_zero(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a mask: {error}") from error
    if not mask.any():
        raise ValueError(f"{file} is 0 everywhere: leave the cell `mask` empty if the thing is not there")
    return mask


def _not_zero(image: Image.Image) -> np.ndarray:
    """(H, W) uint8, 1 where an image is not 0: of a palette the numbers, of colours any channel, nothing transparent."""
    stored, alpha = np.asarray(image), image.getbands()[-1] == "A"
    solid = stored[..., -1] != 0 if alpha else True
    if stored.ndim == 3:
        stored = stored[..., : stored.shape[2] - alpha].any(axis=2)
    return ((stored != 0) & solid).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ COCO


def read_coco(file: Path, content: Any = None) -> OwnSplit:
    """A COCO file; `content` is what it holds, if that is known. OwnDataError has all faults of all records."""
    content = read_json(file) if content is None else content
    if not _is_coco(content):
        raise ValueError(f"{file} is no COCO file: it needs the lists {', '.join(COCO_FIELDS)} and has {_fields(content)} (of "
                         "LabelMe files give the folder)")  # fmt: skip
    faults = [fault for part in COCO_FIELDS for fault in _record_faults(content[part], part)]
    if faults:
        raise OwnDataError(file, faults)
    names = {category["id"]: _phrase(category["name"]) for category in content["categories"]}
    images: dict[str, tuple[Any, tuple[int, int]]] = {}
    notes: dict[Any, dict[str, list[dict]]] = {}
    for image in content["images"]:
        where = f"image {shown(image['id'])}"
        try:
            name, size = image_name(image, where), image_size(image, where)
        except ValueError as error:
            faults.append(str(error))
            continue
        # Files that were joined list an image once for each: what one of them shows must not be denied for the other.
        first, as_before = images.setdefault(os.path.normpath(name), (image["id"], size))
        if size != as_before:
            faults.append(f"{where}, height and width: {size}, but image {shown(first)} is the same file and has {as_before}")
        notes[image["id"]] = notes.get(first, {})
    for note in content["annotations"] if not faults else ():
        for key, known in (("image_id", notes), ("category_id", names)):
            if not is_id(note[key]) or note[key] not in known:
                faults.append(f"annotation {shown(note['id'])}, {key}: there is no {shown(note[key])}")
                break
        else:
            notes[note["image_id"]].setdefault(names[note["category_id"]], []).append(note)
    named = NAMED_SPLIT.search(file.stem)
    places = ("", "images", *((named[0], f"images/{named[0]}") if named else ()))
    roots = [base / place for base in (file.parent, file.parent.parent) for place in places]
    pictures = []
    for name, (number, size) in images.items():
        if not notes[number]:
            continue
        path = next((path for path in (root / name for root in roots) if os.path.isfile(path)), None)
        if path is None:
            faults.append(f"image {shown(number)}, file_name: {name} is neither beside the file nor in `images` there")
            continue
        asked = [Question(text, mask=partial(draw_coco, of), where=f"{file}, image {shown(number)}, category {text!r}")
                 for text, of in notes[number].items()]  # fmt: skip
        pictures.append(Picture(path, asked, size))
    if faults or not pictures:
        raise OwnDataError(file, faults or ["it has no annotations"])
    return OwnSplit(pictures, names=sorted({asked.text for picture in pictures for asked in picture.questions}))


def _record_faults(records: Sequence[Any], part: str) -> Iterator[str]:
    """What is wrong with the records of one of a COCO file's lists: ids, fields that are lacking, names and segmentations."""
    yield from id_faults(records, part)
    fields = [name for name in COCO_FIELDS[part] if name != "id"]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            continue
        lacking = [name for name in fields if name not in record]
        yield from (f"{part}[{number}] lacks the field {name!r}" for name in lacking)
        if part == "categories" and not lacking:
            faults = text_faults(record["name"]) or (["is empty"] if not _phrase(record["name"]) else [])
            yield from (f"{part}[{number}], name: {fault}" for fault in faults)
        elif part == "annotations" and not lacking:
            segmentation, where = record["segmentation"], f"annotation {shown(record.get('id'))}, segmentation:"
            if segmentation is None or isinstance(segmentation, list | dict) and not segmentation:
                yield f"{where} is empty, and a box alone is no mask"
            elif not isinstance(segmentation, list | dict):
                yield f"{where} must be a list of polygons or an RLE, found {shown(segmentation)}"


def draw_coco(notes: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of annotations together: polygons, RLE or compressed RLE. ValueError names one that cannot be drawn."""
    mask = np.zeros((height, width), np.uint8)
    for note in notes:
        try:
            mask |= draw_segmentation(note["segmentation"], height, width)
        except ValueError as error:
            raise ValueError(f"annotation {shown(note['id'])} does not fit {height} x {width} pixels: {error}") from error
    return mask


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(part), list) for part in COCO_FIELDS)


def _is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


# ------------------------------------------------------------------------------------------------ LabelMe, ReasonSeg


def read_labelme(folder: Path) -> OwnSplit:
    """LabelMe's files of a folder, and ReasonSeg's. OwnDataError has the first fault of every file."""
    pictures, faults, others = [], [], []
    for file in _json_files(folder):
        try:
            content = _read(file)
            if _is_coco(content):
                raise ValueError(f"{file} is a COCO file among LabelMe files: give its path, or move it away")
            if not _is_labelme(content) and not _image_of(file, content):
                others.append(file)
            else:
                pictures.append(_labelme(file, content))
        except ValueError as error:
            faults.append(str(error))
    _pass_over(folder, others)
    pictures = [picture for picture in pictures if picture.questions]
    if faults or not pictures:
        raise OwnDataError(folder, faults or ["no file has a labelled shape"])
    return OwnSplit(pictures)


def _read(file: Path) -> Any:
    """What a .json file holds. ReasonSeg's, which are English, may be in Windows' western encoding (`read_annotation`)."""
    try:
        return read_json(file)
    except ValueError:
        content = read_json(file, cp1252=True)
        if isinstance(content, dict) and "is_sentence" in content:
            return content
        raise


def _image_of(file: Path, content: Any) -> Path | None:
    """The image that a LabelMe file names, or that stands beside it."""
    named = content.get("imagePath") if isinstance(content, dict) else None
    named = named.replace("\\", "/") if isinstance(named, str) else ""
    # The path may be one of another computer: then the name alone, beside the file.
    tried = [file.parent / name for name in (named, Path(named).name) if name]
    return next((p for p in [*tried, *(file.with_suffix(suffix) for suffix in PICTURES)] if os.path.isfile(p)), None)


def _labelme(file: Path, content: Any) -> Picture:
    if not _is_labelme(content):
        raise ValueError(f"{file} is no LabelMe file: `shapes` must be a list, and it has {_fields(content)}")
    named = content.get("imagePath")
    if not isinstance(named, str | None):
        raise ValueError(f"{file}, imagePath: must be the name of an image file, found {shown(named)}")
    path = _image_of(file, content)
    if path is None:
        raise ValueError(f"{file}, imagePath: neither {shown(named or '')} nor {file.stem}.jpg, .jpeg or .png is there")
    size = _labelme_size(file, content)
    if content.get("text") not in (None, "") or "is_sentence" in content:  # AnyLabeling writes an empty `text` into every file
        note = read_annotation(file)
        mask = partial(draw_shapes, _outlines(file, note.shapes, asked=False))
        asked = [Question(_text(text), note.is_sentence, mask, where=f"{file}, text") for text in note.texts]
        asked += [Question(_text(text), is_sentence, None, answer, where=f"{file}, false_premise_QA")
                  for text, is_sentence, answer in note.false_premises]  # fmt: skip
    else:
        shapes = _outlines(file, content["shapes"], asked=True)
        labels = {_phrase(shape["label"]): [] for shape in shapes if not _ignored(shape)}
        for label, of in labels.items():
            of += [shape for shape in shapes if _phrase(shape["label"]) == label or _ignored(shape)]
        asked = [Question(label, mask=partial(draw_shapes, of), where=f"{file}, label {label!r}") for label, of in labels.items()]
    for one in asked:
        for fault in _said_faults(one.text, one.answer, None, one.exists):
            raise ValueError(f"{one.where}: {fault}")
    return Picture(path, asked, size)


def _labelme_size(file: Path, content: dict[str, Any]) -> tuple[int, int] | None:
    """(H, W) that a LabelMe file says; null, or a side that is not said, is none."""
    sides = {name: content.get(name) for name in ("imageHeight", "imageWidth")}
    found = [whole_number(side, f"{file}, {name}") for name, side in sides.items() if side is not None]
    if len(found) < 2:
        return None
    if found[0] * found[1] > MAX_PIXELS:
        raise ValueError(f"{file}, imageHeight and imageWidth: {found[0]} x {found[1]} are more than {MAX_PIXELS} pixels")
    return found[0], found[1]


def _outlines(file: Path, shapes: Sequence[Any], asked: bool) -> list[dict[str, Any]]:
    """Shapes as `draw_shapes` takes them: a label, the points (n, 2) of the outline, (x, y) in pixels, and perhaps a PNG.

    Args:
        asked: the labels are questions, and dots and lines, which ReasonSeg has, are no shapes.
    """
    found = []
    for number, shape in enumerate(shapes):
        where = f"{file}, shapes[{number}]"
        try:
            if not isinstance(shape, dict):
                raise ValueError(f"must be an object {{...}}, found {shown(shape)}")
            label, kind = shape["label"], shape.get("shape_type")
            kind = "polygon" if kind in (None, "") else kind
            for name, value in (("label", label), ("shape_type", kind)):
                if not isinstance(value, str):
                    raise ValueError(f"{name} must be text, found {shown(value)}")
            if asked and not _ignored(shape):
                for fault in text_faults(label) or ([] if _phrase(label) else ["is empty"]):
                    raise ValueError(f"label {shown(_text(label))}: {fault}")
            points = outline(shape["points"])
            if len(points) not in CORNERS.get(kind, ()) and (asked or kind != "polygon" or not len(points)):
                raise ValueError(f"a {kind} of {len(points)} points has no area: use polygons, rectangles or circles")
            one = {"label": label.strip(), "points": points}
            if kind == "rectangle" and len(points) == 2:  # opposite corners
                one["points"] = np.stack([points[[0, 1, 1, 0], 0], points[[0, 0, 1, 1], 1]], axis=1)
            elif kind == "circle":  # its centre and a point of it
                angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
                radius = np.hypot(*(points[1] - points[0]))
                one["points"] = points[0] + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            elif kind == "mask":
                one["png"] = _png_of_mask(shape, points)
        except KeyError as name:
            raise ValueError(f"{where} lacks the field {name}") from name
        except (ValueError, OverflowError) as error:  # the latter of a number like 10^400
            raise ValueError(f"{where}: {error}") from error
        found.append(one)
    return found


def _ignored(shape: dict[str, Any]) -> bool:
    return "ignore" in shape["label"].lower()


def _png_of_mask(shape: dict[str, Any], points: np.ndarray) -> bytes:
    """The PNG file of a shape `mask`, as LabelMe's AI tools write it: all pixels from its first point to its second."""
    try:
        png = base64.b64decode(shape["mask"], validate=True)
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            width, height = image.size
    except (*BAD_IMAGE, AttributeError) as error:
        raise ValueError(f"mask: must be a PNG in base64, found {shown(shape['mask'])}: {error}") from error
    right, bottom = (points[1].astype(int) - points[0].astype(int) + 1).tolist()
    if (height, width) != (bottom, right):
        raise ValueError(f"mask: has {height} x {width} pixels, but its points are the corners of {bottom} x {right}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"mask: {height} x {width} are more than {MAX_PIXELS} pixels")
    return png


def draw_shapes(shapes: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """(H, W) uint8 as `draw_mask` gives it, 1 object, 0 rest, 255 ignored, of shapes some of which may be PNGs.

    Raises:
        ValueError: a PNG is damaged.
    """
    if not any("png" in shape for shape in shapes):
        return draw_mask(list(shapes), height, width)
    areas = [int(_draw_alone(shape, height, width).sum()) for shape in shapes]
    mask = np.zeros((height, width), np.uint8)
    for number in sorted(range(len(shapes)), key=lambda n: (-areas[n], -n)):  # what is smaller, or comes earlier, wins
        mask[_draw_alone(shapes[number], height, width) > 0] = IGNORE if _ignored(shapes[number]) else 1
    return mask


def _draw_alone(shape: dict[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) uint8 in {0, 1} of one shape."""
    if "png" not in shape:
        return draw_mask([{**shape, "label": ""}], height, width)
    try:
        with Image.open(io.BytesIO(shape["png"]), formats=["PNG"]) as image:
            part = _not_zero(image)
    except BAD_IMAGE as error:
        raise ValueError(f"its mask cannot be read: {error}") from error
    left, top = shape["points"][0].astype(int).tolist()
    mask = np.zeros((height, width), np.uint8)
    seen = part[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    mask[max(top, 0) : max(top, 0) + seen.shape[0], max(left, 0) : max(left, 0) + seen.shape[1]] = seen
    return mask


# ------------------------------------------------------------------------------------------------ which form, which splits


def open_splits(path: str | Path) -> dict[str, Callable[[], OwnSplit]]:
    """Each split of own data, and what reads it.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is none of the forms, or several at once, or a broken table; the message says what was found.
    """
    path = Path(os.path.expanduser(path))  # which leaves ~ of an unknown user as it is
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {FORMS}")
    folders = sorted(f for f in path.iterdir() if f.name.lower() in SPLITS and _data_files(f)) if path.is_dir() else []
    splits = [SPLITS[folder.name.lower()] for folder in folders]
    files = _data_files(path)
    if len(set(splits)) < len(splits) or (folders and files):
        told = ", ".join(entry.name for entry in [*files, *folders][:5])
        raise ValueError(f"{path} holds several data sets ({told}): give the path of one, or move the others away")
    if folders:
        return {split: _open(folder, _data_files(folder), split)[split] for split, folder in zip(splits, folders, strict=True)}
    return _open(path, files)


def _data_files(path: Path) -> list[Path]:
    """The files of a folder, or the file itself, that could be own data."""
    if not path.is_dir():
        return [path] if path.suffix.lower() in (".csv", ".jsonl", ".json") else []
    return [path / name for name in TABLES if (path / name).is_file()] + _json_files(path)


def _json_files(folder: Path) -> list[Path]:
    """Without hidden ones: archives made on a Mac carry a `._name.json` beside each. COCO's own folder has captions too."""
    files = sorted(file for file in folder.glob("*.json") if not file.is_dir() and not file.name.startswith("."))
    return [file for file in files if file.name.startswith("instances_")] or files


def _pass_over(folder: Path, others: Sequence[Path]) -> None:
    """Names the .json files that are no data in a warning."""
    if others:
        told = some_of([file.name for file in others], mark=", ")
        log.warning("%s: passed over, as they are neither COCO nor LabelMe files: %s", folder, told)


def _open(path: Path, files: list[Path], within: str | None = None) -> dict[str, Callable[[], OwnSplit]]:
    tables = [file for file in files if file.suffix.lower() != ".json"]
    coco: dict[Path, Any] = {}
    labelme, broken, others = [], {}, []
    for file in files[len(tables) :]:
        try:
            content = _read(file)
        except ValueError as error:
            broken[file] = error
            continue
        if _is_coco(content) or not path.is_dir():
            coco[file] = content
        elif _is_labelme(content):
            labelme = [file]
            break  # a folder of LabelMe files is read once, when it is opened
        else:
            others.append(file)
    data = [*tables, *coco, *labelme] + (list(broken) if tables else [])
    if not data:
        if broken:
            raise next(iter(broken.values()))
        if others:
            raise ValueError(f"{others[-1]} has {_fields(content)}: it is no COCO file, which has the lists "
                             f"{', '.join(COCO_FIELDS)}, and no LabelMe file, which has the list shapes. {FORMS}")  # fmt: skip
        entries = path.iterdir() if path.is_dir() else [path]
        kinds = Counter("folder" if entry.is_dir() else entry.suffix or "without suffix" for entry in entries)
        raise ValueError(f"{path} has {', '.join(f'{n} {kind}' for kind, n in kinds.most_common(5)) or 'no files'}: {FORMS}")
    if len(data) > 1 and (tables or labelme):
        raise ValueError(f"{path} holds {data[0].name} and {data[-1].name}: give the path of the file that is meant, or move the "
                         "others away")  # fmt: skip
    if labelme:
        return {within or "train": partial(read_labelme, path)}
    _pass_over(path, others)
    if tables:
        return {split: lambda data=data: data for split, data in read_table(tables[0], within).items()}
    found: dict[str, Callable[[], OwnSplit]] = {}
    named = {file: NAMED_SPLIT.search(file.stem) for file in sorted([*coco, *broken])}
    if unnamed := [file for file in broken if within or not named[file]]:
        raise broken[unnamed[0]]  # those of one split are named when it is opened, and hide no other
    for file, name in named.items():
        split = within or (SPLITS[name[1].lower()] if name else "train")
        if split in found or (len(named) > 1 and not name):
            told = ", ".join(f.name for f in list(named)[:5])
            raise ValueError(f"{path} holds {len(named)} files ({told}): give the path of one, or let the names of COCO files "
                             "end with train, val and test, one each")  # fmt: skip
        found[split] = partial(read_coco, file, coco.get(file))
    return found


def open_split(path: str | Path, split: str) -> OwnSplit:
    """One split of own data.

    Raises:
        FileNotFoundError: there is no such path. ValueError: it is no own data, is broken, or has no such split.
    """
    splits = open_splits(path)
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(splits)}. Sub-folders train, val, test make splits, or "
                         "a column `split` in the table, or COCO files named ..._train.json, ..._val.json")  # fmt: skip
    return splits[split]()


def _fields(content: Any) -> str:
    return f"the fields {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else "no fields"


def _phrase(name: Any) -> str:
    return _text(str(name).replace("_", " ")).lower()


# ------------------------------------------------------------------------------------------------ samples


class OwnTraining:
    """The train split of own data: uniform over pictures, then up to `k` questions.

    Raises:
        FileNotFoundError: there is no such path. ValueError: it is no own data, or broken; the message names the faults.
    """

    def __init__(self, path: str | Path, k: int = 1) -> None:
        self.name, self.k = str(path), k
        self.data = open_split(path, "train")

    def __len__(self) -> int:
        return len(self.data.pictures)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random picture with what it shows, or with what it does not."""
        for _ in range(100):
            picture = pick(self.data.pictures, rng)
            image = read_image(picture.path)
            asked, masks = _visible(picture, self._questions(picture, rng), *image.shape[:2])
            if asked:
                break
        else:
            raise ValueError(f"{self.name}: 100 images in a row have shapes that cover no pixel")
        turns = [[(question(one.text, one.is_sentence, rng), answer(one, rng))] for one in asked]
        masks = masks[[one.exists for one in asked]]
        return _sample(picture, image, asked, masks, turns, dataset=self.name, split="train")

    def _questions(self, picture: Picture, rng: np.random.Generator) -> list[Question]:
        if self.data.alike:
            return choose(picture.questions, self.k, rng)
        there, false = ([one for one in picture.questions if one.exists == exists] for exists in (True, False))
        if there and rng.random() < TRUE_SHARE:
            return choose(there, self.k, rng)
        false = false or self.data.absent(picture, self.k, rng)
        return choose(false or there, self.k, rng)


class OwnEvaluation:
    """A split of own data, one item a picture with all its questions.

    Raises:
        FileNotFoundError: there is no such path. ValueError: it is no own data, is broken, or has no such split.
    """

    def __init__(
        self, path: str | Path, split: str, protocol: str, random_templates: bool = False, seed: int = 0
    ) -> None:
        self.name, self.data = str(path), open_split(path, split)
        self.split, self.protocol, self.random_templates, self.seed = split, protocol, random_templates, seed
        self.pictures = [p for p in self.data.pictures if protocol == "generate" or any(q.exists for q in p.questions)]
        if not self.pictures:
            raise ValueError(f"{path}|{split}: nothing that is asked for is there; only the generate protocol measures that")

    def __len__(self) -> int:
        return len(self.pictures)

    def places(self) -> list[dict[str, Any]]:
        """{"image", "asked"} of each item (`utils.content`); an evaluation goes on only where this is unchanged."""
        names = content_name(self.data.names)  # what may be denied of any image
        return [
            {"image": picture.path, "asked": [names, picture.size, [_asked(one) for one in picture.questions]]}
            for picture in self.pictures
        ]

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        image = read_image(picture.path)
        rng = np.random.default_rng([self.seed, index])
        asked = picture.questions
        if self.protocol == "generate":
            asked = [*asked, *self.data.absent(picture, len(asked), rng)]
        else:
            asked = [one for one in asked if one.exists]
        asked, masks = _visible(picture, asked, *image.shape[:2])
        turns = [[self._turn(one, rng)] for one in asked]
        return _sample(picture, image, asked, masks, turns, dataset=self.name, split=self.split)

    def _turn(self, one: Question, rng: np.random.Generator) -> tuple[str, str | None]:
        """Question and answer in the words of the protocol; the data's own answers are for training alone."""
        if self.random_templates:
            asks, reply = question(one.text, one.is_sentence, rng), answer(Question(one.text, one.is_sentence, one.mask), rng)
        else:
            form = templates.EVAL_LONG_QUESTION if one.is_sentence else templates.EVAL_SHORT_QUESTION
            asks, reply = form.format(sent=one.text, class_name=one.text.lower()), templates.EVAL_ANSWER
        return asks, reply if self.protocol == "forced" else None


def _asked(one: Question) -> list[Any]:
    """All of a question that decides its record; of a mask the file, or the shapes, from which it is made."""
    return [one.text, one.is_sentence, one.answer, one.correction, one.mask]


def answer(asked: Question, rng: np.random.Generator) -> str:
    """The answer to learn: the data's own, completed by its [SEG], or a template."""
    if asked.answer is not None:
        if not asked.exists or SEG in asked.answer:
            return asked.answer
        return f"{asked.answer}{'' if asked.answer[-1] in '.!?' else '.'} {APPENDED}"
    if asked.exists:
        pool = templates.LONG_ANSWER if asked.is_sentence else templates.SHORT_ANSWER
    else:
        pool = templates.CORRECT_ANSWER if asked.correction else templates.NEG_ANSWER
    name = UNNAMED if asked.is_sentence else asked.text.lower()
    return pick(pool, rng).format(class_name=name, gt_name=(asked.correction or "").lower())


def question_mask(picture: Picture, asked: Question, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of a question to a picture of that size: 1 object, 0 rest, 255 ignored; zeros if it is not there.

    Raises:
        ValueError: it cannot be made, or was made for another size; the message names file and record.
    """
    if asked.mask is None:
        return np.zeros((height, width), np.uint8)
    size, mask = picture.size or (height, width), None
    if size == (height, width):  # else nothing is drawn: a size that is only said may need any memory
        try:
            mask = asked.mask(height, width)
        except ValueError as error:
            raise ValueError(f"{asked.where}: {error}") from error
        size = mask.shape
    if size != (height, width):
        raise ValueError(f"{asked.where}: the mask is {size[0]} high and {size[1]} wide, but {picture.path} is "
                         f"{height} and {width} (turned, if its EXIF data say so)")  # fmt: skip
    return mask


def _visible(
    picture: Picture, asked: Sequence[Question], height: int, width: int
) -> tuple[list[Question], np.ndarray]:
    """(questions, masks (M, H, W)), one a question, without what should be there and has no pixel."""
    masks = [question_mask(picture, one, height, width) for one in asked]
    kept = [i for i, one in enumerate(asked) if not one.exists or (masks[i] == 1).any()]
    return [asked[i] for i in kept], np.array([masks[i] for i in kept], np.uint8).reshape(-1, height, width)


def _sample(
    picture: Picture, image: np.ndarray, asked: list[Question], masks: np.ndarray, turns: list, **meta: str
) -> Sample:
    return Sample(
        image_path=str(picture.path),
        image=image,
        conversations=turns,
        masks=masks,
        exists=[one.exists for one in asked],
        questions=[one.text for one in asked],
        meta={
            **meta,
            "is_sentence": [one.is_sentence for one in asked],
            "references": [None if one.exists else one.correction or one.answer for one in asked],
        },
    )
