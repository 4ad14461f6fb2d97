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
    LabelMe   a folder of .json files beside their pictures; one that has a field `text` is read as ReasonSeg's

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

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.content import content_name
from utils.image import read_image

from . import templates
from .draw import choose, pick
from .reason_seg import TRUE_SHARE, draw_mask, outline, question, read_annotation
from .refer_api import draw_segmentation
from .sem_seg import MODE_SHARES
from .types import Sample

FORMS = "own data is a folder with questions.csv or questions.jsonl, a COCO .json, or a folder of LabelMe .json beside pictures"
TABLES = ("questions.csv", "questions.jsonl")
REQUIRED = ("image", "mask", "question")
COLUMNS = (*REQUIRED, "answer", "is_sentence", "split", "exists", "correction")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What folders, files and cells may be called, and the split that it means."""
NAMED_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test)\d*$", re.IGNORECASE)
"""The end of a COCO file's name: instances_train, instances_val2017."""
TRUTH = {"": None, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")
PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
COCO_FIELDS = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"),
               "annotations": ("id", "image_id", "category_id", "segmentation")}  # fmt: skip
SEG, APPENDED = "[SEG]", "The segmentation result is [SEG]."
RESERVED = ("<image>", "<im_start>", "<im_end>")
"""Tokens of the model besides [SEG], which no text may contain."""
UNNAMED = "such thing"
"""Stands for a whole sentence where a denial would name the thing."""
CORRECTED = MODE_SHARES[2] / (MODE_SHARES[1] + MODE_SHARES[2])
SHOWN = 20
"""So many faults are told, the rest is counted."""


class OwnDataError(ValueError):
    """Everything that is wrong with one table, file or folder."""

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.faults = [fault if fault.startswith(f"{path}{os.sep}") else f"{path}: {fault}" for fault in faults]
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        super().__init__("\n  ".join([f"{path} cannot be used:", *faults[:SHOWN], *more]))


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
    text = _decode(file)
    if file.suffix.lower() == ".jsonl":
        for line, words in enumerate(text.split("\n"), start=1):
            try:
                record = {name.strip().lower(): value for name, value in json.loads(words.strip() or "{}").items()}
            except (ValueError, AttributeError) as error:
                faults.append(f"line {line}: no JSON object: {error}")
                continue
            wrong = _column_faults(list(record)) if words.strip() else []
            wrong += [f"{name}: must be text" for name, value in record.items() if isinstance(value, list | dict)]
            faults += [f"line {line}, {fault}" for fault in wrong]
            if record and not wrong:
                yield line, {name: _text(record.get(name)) for name in COLUMNS}
        return
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    # strict: a quote that is never closed would swallow the rest of the table without a word
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        faults += [f"line 1, {fault}" for fault in _column_faults(reader.fieldnames)]
        for record in reader if not faults else ():
            if None in record:
                faults.append(f"line {reader.line_num}: more cells than columns: text that contains {delimiter!r} needs quotes")
            elif any(map(_text, record.values())):
                yield reader.line_num, {name: _text(record.get(name)) for name in COLUMNS}
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error}: is a quote not closed, or not doubled inside of quotes?")


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def _column_faults(names: Sequence[str]) -> list[str]:
    found = [f"{name!r}: no such column; there are {', '.join(COLUMNS)}" for name in names if name not in COLUMNS]
    found += [f"{name}: is lacking (what is not there has an empty mask)" for name in REQUIRED if name not in names]
    return found + [f"{name}: is there twice" for name, count in Counter(names).items() if count > 1]


def _faults(row: dict[str, str], image: Path, mask: Path) -> list[str]:
    """What is wrong with one row, each with its column."""
    found = [f"{name}: is empty" for name in ("image", "question") if not row[name]]
    found += [f"{name}: {path} does not exist" for name, path in (("image", image), ("mask", mask))
              if row[name] and not path.is_file()]  # fmt: skip
    if row["mask"] and mask.suffix.lower() not in LOSSLESS:
        found.append(f"mask: must be one of {', '.join(LOSSLESS)}, found {row['mask']!r}: a JPEG blurs its edges")
    for name in ("is_sentence", "exists"):
        if row[name].lower() not in TRUTH:
            found.append(f"{name}: must be true, false or empty, found {row[name]!r}")
    if row["split"] and row["split"].lower() not in SPLITS:
        found.append(f"split: must be train, val, test or empty, found {row['split']!r}")
    exists = TRUTH.get(row["exists"].lower())
    if exists is not None and exists != bool(row["mask"]):
        found.append("exists: true, but there is no mask" if exists else "exists: false, so the mask must be left empty")
    if row["correction"] and row["mask"]:
        found.append("correction: is for what is not there, and here is a mask")
    return found + _said_faults(row["question"], row["answer"], row["correction"], bool(row["mask"]))


def _said_faults(text: str, answer: str, correction: str, exists: bool) -> list[str]:
    """What is wrong with the words of one question: tokens of the model would be taken for pictures and masks."""
    found = [
        f"{name}: must not contain {token}, a token of the model"
        for name, said, tokens in (("question", text, (SEG, *RESERVED)), ("correction", correction, (SEG, *RESERVED)),
                                   ("answer", answer, RESERVED))
        for token in tokens
        if token.lower() in said.lower()
    ]  # fmt: skip
    if answer.lower().count(SEG.lower()) > exists or answer.count(SEG) < answer.lower().count(SEG.lower()):
        found.append(f"answer: {'one [SEG] in capitals at most' if exists else 'no [SEG], as there is no mask'}: {answer!r}")
    return found


def read_mask(file: Path, height: int = 0, width: int = 0) -> np.ndarray:
    """(H, W) uint8 of a mask file, 1 where it is not 0. It has its own size, so the picture's is not looked at here.

    Raises:
        ValueError: it cannot be read, or is 0 everywhere; the message names it.
    """
    try:
        with Image.open(file) as image:
            stored, alpha = np.asarray(image), image.getbands()[-1] == "A"  # of a palette, the numbers
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a mask: {error}") from error
    solid = stored[..., -1] != 0 if alpha else True
    if stored.ndim == 3:
        stored = stored[..., : stored.shape[2] - alpha].any(axis=2)
    mask = ((stored != 0) & solid).astype(np.uint8)
    if not mask.any():
        raise ValueError(f"{file} is 0 everywhere: leave the cell `mask` empty if the thing is not there")
    return mask


# ------------------------------------------------------------------------------------------------ COCO


def read_coco(file: Path, content: Any = None) -> OwnSplit:
    """A COCO file; `content` is what it holds, if that is known. OwnDataError has all faults of all records."""
    content = read_json(file) if content is None else content
    if not _is_coco(content):
        raise ValueError(f"{file} is no COCO file: it needs the lists {', '.join(COCO_FIELDS)} and has {_fields(content)} (of "
                         "LabelMe files give the folder)")  # fmt: skip
    faults = [
        f"{part}[{number}] lacks the field {name!r}"
        for part, names in COCO_FIELDS.items()
        for number, record in enumerate(content[part])
        for name in names
        if not isinstance(record, dict) or name not in record
    ]
    if faults:
        raise OwnDataError(file, faults)
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: _phrase(category["name"]) for category in content["categories"]}
    notes: dict[Any, dict[str, list[dict]]] = {number: {} for number in images}
    for note in content["annotations"]:
        for key, known in (("image_id", images), ("category_id", names)):
            if note[key] not in known:
                faults.append(f"annotation {note['id']}, {key}: there is no {note[key]!r}")
        if not note["segmentation"]:
            faults.append(f"annotation {note['id']}, segmentation: is empty, and a box alone is no mask")
        elif note["image_id"] in images and note["category_id"] in names:
            notes[note["image_id"]].setdefault(names[note["category_id"]], []).append(note)
    named = NAMED_SPLIT.search(file.stem)
    places = ("", "images", *((named[0], f"images/{named[0]}") if named else ()))
    roots = [base / place for base in (file.parent, file.parent.parent) for place in places]
    pictures = []
    for number, of_name in notes.items():
        image = images[number]
        path = next((path for path in (root / image["file_name"] for root in roots) if path.is_file()), None)
        if of_name and path is None:
            faults.append(f"image {number}, file_name: {image['file_name']} is neither beside the file nor in `images` there")
        elif of_name:
            asked = [Question(name, mask=partial(draw_coco, of), where=f"{file}, image {number}, category {name!r}")
                     for name, of in of_name.items()]  # fmt: skip
            pictures.append(Picture(path, asked, (image["height"], image["width"])))
    if faults or not pictures:
        raise OwnDataError(file, faults or ["it has no annotations"])
    return OwnSplit(pictures, names=sorted({asked.text for picture in pictures for asked in picture.questions}))


def draw_coco(notes: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of annotations together: polygons, RLE or compressed RLE. ValueError names one that cannot be drawn."""
    mask = np.zeros((height, width), np.uint8)
    for note in notes:
        try:
            mask |= draw_segmentation(note["segmentation"], height, width)
        except ValueError as error:
            raise ValueError(f"annotation {note['id']} does not fit {height} x {width} pixels: {error}") from error
    return mask


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(part), list) for part in COCO_FIELDS)


# ------------------------------------------------------------------------------------------------ LabelMe, ReasonSeg


def read_labelme(folder: Path) -> OwnSplit:
    """LabelMe's files of a folder, and ReasonSeg's. OwnDataError has the first fault of every file."""
    pictures, faults = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            pictures.append(_labelme(file))
        except ValueError as error:
            faults.append(str(error))
    pictures = [picture for picture in pictures if picture.questions]
    if faults or not pictures:
        raise OwnDataError(folder, faults or ["no file has a labelled shape"])
    return OwnSplit(pictures)


def _labelme(file: Path) -> Picture:
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{file} is no LabelMe file: `shapes` must be a list, and it has {_fields(content)}")
    named = str(content.get("imagePath") or "").replace("\\", "/")
    # The path may be one of another computer: then the name alone, beside the file.
    tried = [file.parent / name for name in (named, Path(named).name) if name]
    path = next((p for p in [*tried, *(file.with_suffix(suffix) for suffix in PICTURES)] if p.is_file()), None)
    if path is None:
        raise ValueError(f"{file}, imagePath: neither {named!r} nor {file.stem}.jpg, .jpeg or .png is there")
    if "text" in content:
        note = read_annotation(file)
        mask = partial(draw_mask, _outlines(file, note.shapes))
        asked = [Question(_text(text), note.is_sentence, mask, where=f"{file}, text") for text in note.texts]
        asked += [Question(_text(text), is_sentence, None, answer, where=f"{file}, false_premise_QA")
                  for text, is_sentence, answer in note.false_premises]  # fmt: skip
    else:
        shapes = _outlines(file, content["shapes"])
        labels = {_phrase(shape["label"]): [] for shape in shapes if "ignore" not in shape["label"].lower()}
        for label, shown in labels.items():
            shown += [shape for shape in shapes if _phrase(shape["label"]) == label or "ignore" in shape["label"].lower()]
        asked = [Question(label, mask=partial(draw_mask, shown), where=f"{file}, label {label!r}")
                 for label, shown in labels.items()]  # fmt: skip
    for one in asked:
        for fault in _said_faults(one.text, one.answer or "", "", one.exists) + ["is empty"] * (not one.text):
            raise ValueError(f"{one.where}: {fault}")
    size = (content.get("imageHeight"), content.get("imageWidth"))
    return Picture(path, asked, size if all(size) else None)


def _outlines(file: Path, shapes: Sequence[Any]) -> list[dict[str, Any]]:
    """Shapes as `draw_mask` takes them: a label, and the points (n, 2) of the outline, (x, y) in pixels."""
    found = []
    for number, shape in enumerate(shapes):
        try:
            label, points = shape["label"].strip(), outline(shape["points"])
            kind = shape.get("shape_type") or "polygon"
            if kind == "rectangle" and len(points) == 2:  # two corners
                points = np.stack([points[[0, 1, 1, 0], 0], points[[0, 0, 1, 1], 1]], axis=1)
            elif kind == "circle" and len(points) == 2:  # its centre and a point of it
                angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
                points = points[0] + np.hypot(*(points[1] - points[0])) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            elif kind not in ("polygon", "rectangle") or len(points) == 0:
                raise ValueError(f"a {kind} of {len(points)} points has no area: use polygons, rectangles or circles")
        except KeyError as name:
            raise ValueError(f"{file}, shapes[{number}] lacks the field {name}") from name
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, shapes[{number}]: {error}") from error
        found.append({"label": label, "points": points})
    return found


# ------------------------------------------------------------------------------------------------ which form, which splits


def open_splits(path: str | Path) -> dict[str, Callable[[], OwnSplit]]:
    """Each split of own data, and what reads it.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is none of the forms, or several at once, or a broken table; the message says what was found.
    """
    path = Path(path).expanduser()
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
    noted = sorted(path.glob("instances_*.json")) or sorted(path.glob("*.json"))  # COCO's folder has captions too
    return [path / name for name in TABLES if (path / name).is_file()] + noted


def _open(path: Path, files: list[Path], within: str | None = None) -> dict[str, Callable[[], OwnSplit]]:
    if not files:
        entries = path.iterdir() if path.is_dir() else [path]
        kinds = Counter("folder" if entry.is_dir() else entry.suffix or "without suffix" for entry in entries)
        raise ValueError(f"{path} has {', '.join(f'{n} {kind}' for kind, n in kinds.most_common(5)) or 'no files'}: {FORMS}")
    if files[0].suffix.lower() != ".json":
        if len(files) > 1:
            raise ValueError(f"{path} holds {files[0].name} and {files[1].name}: give the path of the file that is meant")
        return {split: lambda data=data: data for split, data in read_table(files[0], within).items()}
    content = read_json(files[0])
    if not _is_coco(content) and path.is_dir():
        return {within or "train": partial(read_labelme, path)}
    found: dict[str, Callable[[], OwnSplit]] = {}
    for file in files:
        named = NAMED_SPLIT.search(file.stem)
        split = within or (SPLITS[named[1].lower()] if named else "train")
        if split in found or (len(files) > 1 and not named):
            told = ", ".join(f.name for f in files[:5])
            raise ValueError(f"{path} holds {len(files)} files ({told}): give the path of one, or let the names of COCO files "
                             "end with train, val and test, one each")  # fmt: skip
        found[split] = partial(read_coco, file, content if file == files[0] else None)
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


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")  # Excel puts a mark in front
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def read_json(file: Path) -> Any:
    """What a JSON file holds. ValueError names one that is none."""
    try:
        return json.loads(_decode(file))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


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
            raise ValueError(f"{self.name}: 100 pictures in a row have shapes that cover no pixel")
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
    try:
        mask = asked.mask(*(picture.size or (height, width)))
    except ValueError as error:
        raise ValueError(f"{asked.where}: {error}") from error
    if mask.shape != (height, width):
        raise ValueError(f"{asked.where}: the mask is {mask.shape[0]} high and {mask.shape[1]} wide, but {picture.path} is "
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
