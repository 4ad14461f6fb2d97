"""One line of JSON an expression: everything an evaluation found, enough to recompute every score (protocol §5).

    image_index, question_index   place of the picture in the data set, of the question among the picture's
    image                         path of the picture
    question, prompt, answer      the bare expression; the sentence that was asked; what the model said (or was made to say)
    exists, predicted_exists      what is asked for is there; the model wrote a [SEG] and its mask is not empty
    num_seg                       [SEG] tokens in the answer; the first one's mask counts
    iou, intersection, union      pixels, without the ignored ones
    mask, target, ignored         COCO RLE {"size": [H, W], "counts": str}: predicted, true, pixels that do not count (if any)
    box                           [x, y, width, height] of the predicted mask as COCO writes it; null if it is empty
    confidence                    SAM's own estimate of the mask's IoU; null without a mask
    points, point_labels          SasP's K points (x, y), pixels of the picture; 1 object, 0 background, -1 neutral
    seconds                       time of the picture's pass through the model, divided by its expressions
    is_sentence                   long question or short phrase, where the data set says so (ReasonSeg)
    reference                     what an answer to a false premise should say instead, where the data set says so
    say                           the answer's score against it (`utils.say`)
    ref_id, sent_id               of the refer family

The RLE loads in pycocotools as it is.

    expressions(read_predictions(path))           rows for `utils.metrics.summarize`, counted anew from the masks
    expressions(read_released(folder))            the same of what the original's test_read.py wrote
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from pycocotools import mask as coco

from utils.files import parse_json, read_text, short_name, shown
from utils.metrics import IGNORE_PIXEL, UNKNOWN, Expression, Overlap
from utils.rle import MAX_PIXELS, RleError, check_all, checked
from utils.say import say_score

RELEASED_NAME = re.compile(r"preds_(?P<dataset>.+)_(?P<process>\d+)_of_(?P<world>\d+)\.json")


def encode_mask(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a mask (H, W), anything but 0 being inside; `counts` is a str, so that JSON takes it."""
    rle = coco.encode(np.asfortranarray(mask_HW != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of a COCO RLE: 1 inside, 0 outside."""
    return coco.decode(rle)


# ------------------------------------------------------------------------------------------------ reading


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The records of a predictions file, in its order. A byte order mark, CRLF and blank lines are passed over.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no record, or an expression is there twice; the message names file, line and field.
    """
    return read_records(path, prediction_lines(path))


def prediction_lines(path: str | Path) -> list[tuple[int, str]]:
    """(line number, text without blanks around it) of the lines that are not blank.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `test_read.py --out FOLDER` writes predictions_*.jsonl")
    if path.is_file() and path.stat().st_size == 0:
        return []  # of an evaluation in which every image failed
    return [(number, text) for number, line in enumerate(read_text(path).split("\n"), 1) if (text := line.strip())]


def hash_of_lines(lines: Iterable[str]) -> str:
    """A name for the lines of a predictions file, whatever its line ends are."""
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.strip().encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def read_records(path: str | Path, lines: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """The records of the lines of `path` that `prediction_lines` gave; errors as `read_predictions`."""
    records = []
    for number, text in lines:
        try:
            records.append(parse_json(text, f"{path}, line {number}"))
        except ValueError as error:
            cut = number == lines[-1][0] and number > 1
            raise ValueError(f"{error}{': the file is cut short' if cut else ''}") from None
    check_records(records, [f"{path}, line {number}" for number, _ in lines])
    first_line: dict[tuple[int, int], int] = {}
    for (number, _), record in zip(lines, records, strict=True):
        place = (record["image_index"], record["question_index"])
        if (before := first_line.setdefault(place, number)) != number:
            raise ValueError(f"{path}, line {number}: image {place[0]}, question {place[1]} is there twice (line {before})")
    return records


# ------------------------------------------------------------------------------------------------ what a record is


def is_count(value: Any) -> bool:
    """True for a whole number of pixels, images or lines as JSON has it."""
    return type(value) is int and 0 <= value <= MAX_PIXELS


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN compares as false


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _are_points(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    try:  # thirty in each record: no loop in Python
        flat = list(chain.from_iterable(value))
        return not value or (set(map(len, value)) == {2} and sum(map(abs, flat)) <= FAR * len(flat))  # NaN compares as false
    except (TypeError, OverflowError):
        return False


def _are_labels(value: Any) -> bool:
    try:
        return isinstance(value, list) and set(value) <= {-1, 0, 1}
    except TypeError:
        return False


FAR = 10**6
"""Pixels; the points of a mask lie less far out on average."""
COUNT, TEXT, TRUTH = (is_count, "a whole number, 0 or more"), (_is_text, "text"), (_is_truth, "true, false or null")
NUMBER = (_is_number, "a number or null")
REQUIRED = {
    "image_index": COUNT, "question_index": COUNT, "image": TEXT, "question": TEXT, "answer": TEXT, "exists": TRUTH,
    "predicted_exists": TRUTH, "mask": None, "target": None,
}  # fmt: skip
"""Fields without which a line is no record, and what they must be; None is an RLE. Of them, a TRUTH alone may be null."""
OPTIONAL = {
    "prompt": TEXT, "num_seg": COUNT, "iou": NUMBER, "intersection": COUNT, "union": COUNT, "ignored": None,
    "box": (_is_box, "four numbers [x, y, width, height] or null"), "confidence": NUMBER,
    "points": (_are_points, "a list of pairs [x, y] in or near the image"),
    "point_labels": (_are_labels, "a list of 1, 0 and -1"), "seconds": NUMBER, "is_sentence": TRUTH, "reference": TEXT,
    "say": (_is_share, "a number from 0 to 1, or null"),
}  # fmt: skip
"""Fields that may be missing or null."""
RLES = ("mask", "target", "ignored")


def check_records(records: Sequence[Any], where: Sequence[str]) -> None:
    """Checks every field of records, and every mask before pycocotools sees it; masks with a list of counts are compressed.

    Args:
        records: what should be records.
        where: file and line of each, with which messages begin.

    Raises:
        ValueError: one is none; the message says where, and names the field.
    """
    rles: list[Any] = []
    places: list[tuple[int, str]] = []
    for number, record in enumerate(records):
        if fault := _fault(record):
            raise ValueError(f"{where[number]}{fault}")
        for name in RLES:
            rle = record.get(name)
            if rle is not None or name in REQUIRED:
                try:
                    if isinstance(rle, dict) and isinstance(rle.get("counts"), list):
                        rle = checked(rle)
                        record[name] = rle = rle | {"counts": rle["counts"].decode("ascii")}
                except RleError as error:
                    raise ValueError(f"{where[number]}, {name}: {error}") from None
                rles.append(rle)
                places.append((number, name))
    try:
        check_all(rles)
    except RleError as error:
        number, name = places[error.index]
        raise ValueError(f"{where[number]}, {name}: {error}") from None
    for number, record in enumerate(records):
        if fault := _sizes_fault(record):
            raise ValueError(f"{where[number]}: {fault}")


def _fault(record: Any) -> str | None:
    """What is wrong with the fields of a record, its masks excepted; it stands behind the record's place."""
    if not isinstance(record, dict):
        return f": must be a JSON object {{...}}, found {shown(record)}"
    if missing := [name for name in REQUIRED if name not in record]:
        return f" lacks {', '.join(missing)}: not written by test_read.py, or by an older one"
    for name, kind in REQUIRED.items():
        if kind is not None and not kind[0](record[name]) and not (kind is TRUTH and record[name] is None):
            return f", {name}: must be {kind[1]}, found {shown(record[name])}"
    for name, kind in OPTIONAL.items():
        value = record.get(name)
        if value is not None and kind is not None and not kind[0](value):
            return f", {name}: must be {kind[1]}, found {shown(value)}"
    pixels = record.get("intersection"), record.get("union")
    if None not in pixels and pixels[0] > pixels[1]:
        return f", intersection: must be no more than union, found {pixels[0]} and {pixels[1]}"
    points, labels = record.get("points") or [], record.get("point_labels") or []
    if len(points) != len(labels):
        return f", point_labels: must be as many as points, found {len(labels)} and {len(points)}"
    return None


def _sizes_fault(record: dict[str, Any]) -> str | None:
    size = list(record["mask"]["size"])
    for name in ("target", "ignored"):
        if record.get(name) is not None and list(record[name]["size"]) != size:
            return f"mask is {_by(size)}, {name} {_by(record[name]['size'])}: they must agree"
    return None


def predictions_name(dataset: str, split: str) -> str:
    """Name of the predictions file of a data set; the name of own data is a path, of which letters and digits stay."""
    plain, split = (re.sub(r"[^\w.+-]+", "_", text).strip("_") for text in (dataset, split))
    return f"predictions_{short_name(f'{plain}_{split}', LONGEST_NAME)}.jsonl"


LONGEST_NAME = 160
"""Bytes of a data set's name in a file name, of 255 that a file system takes: there is more around it."""


# ------------------------------------------------------------------------------------------------ records -> rows


def expression(record: dict[str, Any]) -> Expression:
    """The row of a record for `utils.metrics`: pixels counted from the masks, Say from the words, not taken from the record.

    The record must have passed `check_records`, as those of `read_predictions` have.

    Raises:
        ValueError: masks of different sizes; the message names the record and the field.
    """
    size, ignored = record["mask"]["size"], record.get("ignored")
    if fault := _sizes_fault(record):
        raise ValueError(f"{_where(record)}: {fault}")
    both = coco.merge([record["mask"], record["target"]], intersect=True)
    intersection, mask, target = (_area(rle, ignored) for rle in (both, record["mask"], record["target"]))
    exists, reference = _flag(record["exists"]), record.get("reference")
    say = math.nan
    if reference is not None and exists == 0:
        say = say_score(record["answer"], reference, asked=record["question"])
    # The original's files hold no bare expression: there, `question` is the whole prompt.
    bare = "" if record["question"] == record.get("prompt") else record["question"]
    return Expression(
        image=record["image_index"],
        intersection=intersection,
        union=mask + target - intersection,
        target=target,
        pixels=size[0] * size[1],
        exists=exists,
        predicted_exists=_flag(record["predicted_exists"]),
        sentence=_flag(record.get("is_sentence")),
        words=len(bare.split()),
        say=say,
    )


def expressions(records: Iterable[dict[str, Any]]) -> list[Expression]:
    """The rows of many records.

    Raises:
        ValueError: as `expression`, or an expression stands there twice.
    """
    rows, seen = [], set()
    for record in records:
        place = (record["image_index"], record["question_index"])
        if place in seen:
            raise ValueError(f"{_where(record)}: stands there twice, and would be counted twice")
        seen.add(place)
        rows.append(expression(record))
    return rows


def _area(rle: dict[str, Any], ignored: dict[str, Any] | None) -> int:
    """Pixels of a mask that are not ignored. Runs are counted, no mask is decoded: that takes a hundredth of the time."""
    return int(coco.area(rle)) - (int(coco.area(coco.merge([rle, ignored], intersect=True))) if ignored else 0)


def _flag(value: bool | None) -> int:
    return UNKNOWN if value is None else int(value)


def _where(record: dict[str, Any]) -> str:
    return f"picture {record['image_index']}, question {record['question_index']} ({record['image']})"


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


# ------------------------------------------------------------------------------------------------ the original's files


def released_files(folder: str | Path) -> dict[str, list[Path]]:
    """{data set: its preds_*_of_*.json} of a folder, each in the order of the processes; empty if there are none."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in Path(folder).glob("preds_*_of_*.json"):
        if match := RELEASED_NAME.fullmatch(file.name):
            found.setdefault(match["dataset"], []).append((int(match["process"]), file))
    return {name: [file for _, file in sorted(files)] for name, files in sorted(found.items())}


def read_released(source: str | Path | Sequence[str | Path]) -> list[dict[str, Any]]:
    """The records of what the original's test_read.py wrote for one data set, all processes together (protocol §5).

    Args:
        source: the folder with `preds_{data set}_{process}_of_{world}.json` and `segmentation_mask`, or those json files.

    Its files hold neither points nor confidence nor time, and of the question only the whole prompt. A target of 255 is
    ignored and 1 is inside, as in its scorer; so is 2, where polygons of one object overlap, which its scorer lost (§8-15).

    Raises:
        FileNotFoundError: no such files, or a share or the masks are missing.
        ValueError: something does not fit together. Either names the file and the field.
    """
    if isinstance(source, str | Path):
        sets = released_files(source)
        if not sets:
            raise FileNotFoundError(f"{source} holds no preds_*_of_*.json of the original's test_read.py")
        if len(sets) > 1:
            raise ValueError(f"{source} holds several data sets ({', '.join(sets)}): name the files of one")
        (files,) = sets.values()
    else:
        files = [Path(file) for file in source]
    files = _all_shares(files)
    records: list[dict[str, Any]] = []
    come_from: dict[str, Path] = {}
    for file in files:
        for image, entry in _read_share(file):
            if image in come_from:
                # The original merged by this name and so lost one of the two.
                raise ValueError(f"{image} is in {come_from[image]} and again in {file}")
            records += _released_records(file, image, entry, len(come_from))
            come_from[image] = file
    return records


def _all_shares(files: Sequence[Path]) -> list[Path]:
    """The files in the order of the processes, if they are the files of all processes of one run."""
    shares: dict[int, Path] = {}
    runs = set()
    for file in files:
        match = RELEASED_NAME.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file} is not named preds_DATASET_PROCESS_of_WORLD.json")
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist")
        shares[int(match["process"])] = file
        runs.add((match["dataset"], int(match["world"])))
    if len(runs) != 1 or len(shares) != len(files):
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{names or 'no files'}: not the shares of one run, each once; take away what is of another run")
    dataset, world = runs.pop()
    missing = [f"preds_{dataset}_{process}_of_{world}.json" for process in range(world) if process not in shares]
    if missing:
        raise FileNotFoundError(f"{files[0].parent}: of {world} processes, {', '.join(missing)} is missing")
    if surplus := [shares[process].name for process in shares if process >= world]:
        raise ValueError(f"{files[0].parent}: {', '.join(surplus)} is beyond the last of {world} processes")
    return [shares[process] for process in range(world)]


def _read_share(file: Path) -> list[tuple[str, Any]]:
    """(image, entry) of one process's json; a name that is there twice stays there twice."""
    entries = parse_json(read_text(file), str(file), object_pairs_hook=_Pairs)
    if not isinstance(entries, _Pairs):
        raise ValueError(f"{file}: found a {type(entries).__name__}, not an object with an entry for each image")
    return list(entries)


class _Pairs(list):
    """A JSON object with all its pairs."""


RELEASED_LISTS = {
    "conversation_list": (_is_text, "text"), "pred_sent": (_is_text, "text"),
    "gt_exists": (lambda value: value in (0, 1), "true or false"),  # the original saves truth values, which 1 and 0 equal
    "pred_exists": (lambda value: value in (0, 1), "true or false"),
}  # fmt: skip
"""Lists of an entry with a value for each question, and what the values must be."""


def _released_lists(where: str, entry: Any) -> dict[str, list[Any]]:
    """The lists of an entry, each with a value for each question."""
    fields = dict(entry) if isinstance(entry, _Pairs | dict) else {}
    if missing := [name for name in (*RELEASED_LISTS, "segmentation_path") if name not in fields]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if len(fields) != len(entry):
        raise ValueError(f"{where}: a field is there twice ({', '.join(name for name, _ in entry)})")
    lists = {name: fields[name] for name in RELEASED_LISTS}
    for name in ("ref_ids", "sent_ids"):  # one list an image in a list of one
        if ids := fields.get(name):
            lists[name] = ids[0] if isinstance(ids, list) and isinstance(ids[0], list) else ids
    for name, values in lists.items():
        if type(values) is not list:
            raise ValueError(f"{where}, {name}: must be a list, found {shown(values)}")
        is_right, words = RELEASED_LISTS.get(name, (lambda _: True, ""))
        if wrong := [value for value in values if not is_right(value)]:
            raise ValueError(f"{where}, {name}: must be {words} for each question, found {shown(wrong[0])}")
        if len(values) != len(lists["conversation_list"]):
            raise ValueError(
                f"{where}: {name} has {len(values)} entries, conversation_list {len(lists['conversation_list'])}"
            )
    path = fields["segmentation_path"]
    if not isinstance(path, str) or os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == "..":
        raise ValueError(f"{where}, segmentation_path: must be a path inside the folder of the file, found {shown(path)}")
    return lists | {"segmentation_path": path}


def _released_records(file: Path, image: str, entry: Any, index: int) -> list[dict[str, Any]]:
    where = f"{file}, {image}"
    lists = _released_lists(where, entry)
    path, count = lists.pop("segmentation_path"), len(lists["conversation_list"])
    masks, targets = _read_masks(file.parent / path, where, count)
    records = []
    for n, (mask, target) in enumerate(zip(masks, targets, strict=True)):
        rle, ignored = encode_mask(mask), target == IGNORE_PIXEL
        record = {
            "image_index": index,
            "question_index": n,
            "image": image,
            "question": lists["conversation_list"][n],
            "prompt": lists["conversation_list"][n],
            "answer": lists["pred_sent"][n],
            "exists": bool(lists["gt_exists"][n]),
            "predicted_exists": bool(lists["pred_exists"][n]),
            "num_seg": lists["pred_sent"][n].count("[SEG]"),
            "mask": rle,
            "target": encode_mask((target != 0) & ~ignored),
            "box": [float(side) for side in coco.toBbox(rle)] if mask.any() else None,
            "confidence": None,
            "points": [],
            "point_labels": [],
            "seconds": None,
        }
        if ignored.any():
            record["ignored"] = encode_mask(ignored)
        record |= {key: lists[name][n] for name, key in (("ref_ids", "ref_id"), ("sent_ids", "sent_id")) if name in lists}
        row = expression(record)
        pixels = Overlap(row.intersection, row.union)
        records.append(record | {"iou": pixels.iou, "intersection": row.intersection, "union": row.union})
    return records


def _read_masks(path: Path, where: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(pred, gt), each (count, H, W) as the original saved them."""
    if not path.is_file():
        raise FileNotFoundError(f"{where}: segmentation_path {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in ("pred", "gt"):
                with archive.open(f"{name}.npy") as member:
                    _check_header(member, f"{path}: {name}", where, count)
        with np.load(path, allow_pickle=False) as arrays:
            masks, targets = arrays["pred"], arrays["gt"]
    except _HeaderError as error:
        raise ValueError(str(error)) from None
    except (KeyError, ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no archive of pred and gt: {error}") from error
    if masks.shape != targets.shape:
        raise ValueError(f"{path}: pred is {masks.shape}, gt {targets.shape}: they must agree")
    for name, array in (("pred", masks), ("gt", targets)):
        # NaN compares as false.
        if array.size and not ((array >= 0) & (array <= IGNORE_PIXEL)).all():
            raise ValueError(f"{path}: {name} must hold numbers from 0 to {IGNORE_PIXEL}")
    return masks, targets


class _HeaderError(ValueError):
    """An array of the wrong shape or kind, known before it is loaded."""


def _check_header(member: IO[bytes], name: str, where: str, count: int) -> None:
    """Reads what an array is from the beginning of its file: a few bytes of zip may stand for more than memory holds."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.kind not in "biuf":
        raise _HeaderError(f"{name} must hold numbers, found {dtype}")
    if len(shape) != 3 or shape[0] != count:
        raise _HeaderError(f"{name} is {shape}, but {where} has {count} questions, hence ({count}, H, W)")
    if shape[1] * shape[2] > MAX_PIXELS or math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise _HeaderError(f"{name} is {shape} of {dtype}: larger than any masks of the original")


MAX_BYTES = 2**32
"""Of the masks of one image."""
