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

import json
import math
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from utils.metrics import IGNORE_PIXEL, UNKNOWN, Expression, Overlap
from utils.say import say_score

RELEASED_NAME = re.compile(r"preds_(?P<dataset>.+)_(?P<process>\d+)_of_(?P<world>\d+)\.json")


def encode_mask(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a mask (H, W), anything but 0 being inside; `counts` is a str, so that JSON takes it."""
    rle = coco.encode(np.asfortranarray(mask_HW != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of a COCO RLE: 1 inside, 0 outside."""
    return coco.decode(rle)


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The records of a predictions file, in its order.

    Raises:
        FileNotFoundError: there is none. ValueError: a line is no record; the message names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `test_read.py --out FOLDER` writes predictions_*.jsonl")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        missing = [name for name in REQUIRED if name not in record] if isinstance(record, dict) else list(REQUIRED)
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}: not written by test_read.py, or by an older one")
        records.append(record)
    return records


REQUIRED = ("image_index", "question_index", "image", "question", "answer", "exists", "predicted_exists", "mask", "target")
"""Fields without which a line is no record."""


def predictions_name(dataset: str, split: str) -> str:
    """Name of the predictions file of a data set; the name of own data is a path, of which letters and digits stay."""
    plain = re.sub(r"[^\w.+-]+", "_", dataset).strip("_")
    return f"predictions_{plain}_{split}.jsonl"


# ------------------------------------------------------------------------------------------------ records -> rows


def expression(record: dict[str, Any]) -> Expression:
    """The row of a record for `utils.metrics`: pixels counted from the masks, Say from the words, not taken from the record.

    Raises:
        ValueError: masks of different sizes; the message names the record and the field.
    """
    size, ignored = record["mask"]["size"], record.get("ignored")
    for name in ("target", "ignored"):
        if record.get(name) is not None and record[name]["size"] != size:
            raise ValueError(f"{_where(record)}: mask is {_by(size)}, {name} {_by(record[name]['size'])}: they must agree")
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
    try:
        entries = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(entries, _Pairs):
        raise ValueError(f"{file}: found a {type(entries).__name__}, not an object with an entry a picture")
    return [(image, dict(entry) if isinstance(entry, _Pairs) else entry) for image, entry in entries]


class _Pairs(list):
    """A JSON object with all its pairs."""


def _released_records(file: Path, image: str, entry: Any, index: int) -> list[dict[str, Any]]:
    where = f"{file}, {image}"
    needed = ("conversation_list", "pred_sent", "gt_exists", "pred_exists", "segmentation_path")
    missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    count = len(entry["conversation_list"])
    lists = {name: entry[name] for name in ("pred_sent", "gt_exists", "pred_exists")}
    for name in ("ref_ids", "sent_ids"):  # one list a picture in a list of one
        if entry.get(name):
            lists[name] = entry[name][0] if isinstance(entry[name][0], list) else entry[name]
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"{where}: {name} has {len(values)} entries, conversation_list {count}")
    masks, targets = _read_masks(file.parent / entry["segmentation_path"], where, count)
    records = []
    for n, (mask, target) in enumerate(zip(masks, targets, strict=True)):
        rle, ignored = encode_mask(mask), target == IGNORE_PIXEL
        record = {
            "image_index": index,
            "question_index": n,
            "image": image,
            "question": entry["conversation_list"][n],
            "prompt": entry["conversation_list"][n],
            "answer": entry["pred_sent"][n],
            "exists": bool(entry["gt_exists"][n]),
            "predicted_exists": bool(entry["pred_exists"][n]),
            "num_seg": entry["pred_sent"][n].count("[SEG]"),
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
        with np.load(path) as arrays:
            masks, targets = arrays["pred"], arrays["gt"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no archive of pred and gt: {error}") from error
    for name, array in (("pred", masks), ("gt", targets)):
        if array.ndim != 3 or len(array) != count:
            raise ValueError(f"{path}: {name} is {array.shape}, but {where} has {count} questions, hence ({count}, H, W)")
    if masks.shape != targets.shape:
        raise ValueError(f"{path}: pred is {masks.shape}, gt {targets.shape}: they must agree")
    return masks, targets
