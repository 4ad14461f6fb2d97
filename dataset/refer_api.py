"""Reader of the REFER format: `refs(<splitBy>).p` beside `instances.json` (protocol §2, refer family).

A ref has expressions and an annotation, or a list of them, whose masks count together; -1 is none. A segmentation is a list of
polygons [x, y, x, y, ...] in pixels of the picture, an RLE or a list of them; an empty one, an RLE of zeros and a polygon of
one or two points are an empty mask. `dataset.check` names what is asked for as there and has an empty mask.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .reason_seg import FAR

SPLIT_BY = {
    "refclef": "unc",
    **dict.fromkeys(("refcoco", "refcoco+", "R-refcoco", "R-refcoco+"), "unc_exclude_unified"),
    **dict.fromkeys(("refcocog", "R-refcocog"), "umd_exclude_unified"),
    **dict.fromkeys(("fprefcoco", "fprefcoco+", "fprefcocog"), "berkeley_exclude_unified"),
}
"""Which file of splits each data set uses; `exclude_unified` has no training picture of any family's val or test."""


@dataclass
class ReferImage:
    """One picture and its expressions."""

    image_id: int
    file_name: str
    height: int
    width: int
    sentences: list[dict[str, Any]] = field(default_factory=list)
    """Each: sent, exists, gt_sent (or None), ref_id, sent_id, ann_id."""


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and strings; refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a list of refs has no need of code")


def read_pickle(file: Path) -> Any:
    """A pickle of plain data.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        return PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


class Refer:
    """One data set of the refer family.

    Raises:
        FileNotFoundError: a folder or file is missing; the message names it.
        ValueError: a file or field is not what the format says; the message names both.
    """

    def __init__(self, dataset_dir: str | Path, name: str) -> None:
        if name not in SPLIT_BY:
            raise ValueError(f"no data set {name!r} in the refer family; there are {', '.join(SPLIT_BY)}")
        root = Path(dataset_dir) / "refer_seg"
        self.name = name
        self.image_dir = root / ("images/saiapr_tc-12" if name == "refclef" else "images/mscoco/images/train2014")
        self.refs_file = root / name / f"refs({SPLIT_BY[name]}).p"
        self.instances_file = root / name / "instances.json"
        for file in (self.refs_file, self.instances_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist: data set {name} needs it (--dataset_dir {dataset_dir})")
        try:
            instances = json.loads(self.instances_file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.instances_file} is no JSON: {error}") from error
        self.images, self.annotations = (self._by_id(instances, part) for part in ("images", "annotations"))
        self.refs = read_pickle(self.refs_file)
        if not isinstance(self.refs, list):
            raise ValueError(f"{self.refs_file} must hold a list of refs, found a {type(self.refs).__name__}")

    def _by_id(self, instances: Any, part: str) -> dict[Any, dict[str, Any]]:
        if not isinstance(instances, dict) or part not in instances:
            raise ValueError(f"{self.instances_file} has no field {part!r}")
        try:
            return {record["id"]: record for record in instances[part]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.instances_file}: each of the {part} needs a field 'id': {error!r}") from error

    def of_split(self, split: str) -> list[ReferImage]:
        """Pictures of a split with all their expressions, in the order of the file; one without expressions is left out.

        testA, testB and testC match by the last letter of a ref's split, `test` by substring.

        Raises:
            ValueError: there is no such split, or a ref is broken; the message names the splits, or the ref and its field.
        """
        found: dict[int, ReferImage] = {}
        for number, ref in enumerate(self.refs):
            try:
                if not _in_split(ref["split"], split):
                    continue
                image = self.images[ref["image_id"]]
                entry = found.setdefault(
                    ref["image_id"], ReferImage(ref["image_id"], image["file_name"], image["height"], image["width"])
                )
                for sentence in ref["sentences"]:
                    if not isinstance(sentence["sent"], str):
                        raise TypeError(f"sent must be text, found {sentence['sent']!r}")
                    entry.sentences.append(
                        {
                            "sent": sentence["sent"],
                            "exists": _exists(sentence),
                            "gt_sent": sentence.get("gt_sent"),
                            "ref_id": ref["ref_id"],
                            "sent_id": sentence["sent_id"],
                            "ann_id": ref["ann_id"],
                        }
                    )
            except KeyError as field_name:
                raise ValueError(f"{self.refs_file}: ref {number} or its picture lacks {field_name}") from field_name
            except (TypeError, AttributeError) as error:
                raise ValueError(f"{self.refs_file}: ref {number} is broken: {error}") from error
        asked = [picture for picture in found.values() if picture.sentences]
        if not asked:
            splits = ", ".join(sorted({str(ref["split"]) for ref in self.refs})) or "none"
            raise ValueError(f"{self.refs_file} has no ref of split {split!r}; its splits are: {splits}")
        return asked

    def mask(self, ann_id: int | Sequence[int], height: int, width: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1} of one annotation, or of several together; an empty segmentation is an empty mask.

        Overlapping parts count once (the original added them up to 2, §8-15).

        Raises:
            ValueError: there is no such annotation, or it cannot be drawn; the message names file, annotation and field.
        """
        total = np.zeros((height, width), np.uint8)
        for single in ann_id if isinstance(ann_id, list | tuple) else [ann_id]:
            if single == -1:
                continue
            if single not in self.annotations:
                raise ValueError(f"{self.instances_file} has no annotation {single}, which {self.refs_file.name} names")
            where = f"{self.instances_file}, annotation {single}"
            if "segmentation" not in self.annotations[single]:
                raise ValueError(f"{where} lacks the field 'segmentation'")
            try:
                total |= draw_segmentation(self.annotations[single]["segmentation"], height, width)
            except ValueError as error:
                raise ValueError(f"{where}, segmentation: {error}") from error
        return total


def draw_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 in {0, 1} of a COCO segmentation, all its parts together (see the module's docstring).

    Raises:
        ValueError: it is none, or not for a picture of this size. The caller knows file and record.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation] if segmentation else []
    found = [encoded for part in parts if (encoded := _rle(part, height, width)) is not None]
    return coco_mask.decode(found).max(axis=2) if found else np.zeros((height, width), np.uint8)


def _rle(part: Any, height: int, width: int) -> dict[str, Any] | None:
    """Compressed RLE of a polygon, of an uncompressed RLE or of itself; None if it covers nothing.

    pycocotools trusts what it gets: a polygon with NaN takes all memory and ends the process, an RLE that is too short goes
    on with whatever lies in memory. So both are looked at first.
    """
    if isinstance(part, dict):
        try:
            size, counts = [int(side) for side in part["size"]], part["counts"]
            runs = [int(run) for run in counts] if isinstance(counts, list) else _runs(counts)
        except KeyError as name:
            raise ValueError(f"an RLE lacks the field {name}") from name
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"an RLE cannot be read: {error}") from error
        if size != [height, width]:
            raise ValueError(f"an RLE is for {' x '.join(map(str, size))} pixels, the picture has {height} x {width}")
        if min(runs, default=0) < 0 or sum(runs) != height * width:
            raise ValueError(f"an RLE is damaged: its runs have {sum(runs)} pixels, the picture {height} x {width}")
        return coco_mask.frPyObjects({"size": size, "counts": runs}, height, width)
    try:
        points = np.asarray(part, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon must be a list of numbers: {error}") from error
    if points.ndim != 1 or len(points) % 2:
        raise ValueError(f"a polygon must be a list of numbers x, y, x, y, ..., found the shape {points.shape}")
    if not (np.abs(points) <= FAR).all():  # NaN compares as false
        raise ValueError("a polygon has a point that is no place in or near a picture")
    if len(points) < 6:  # pycocotools would take 4 numbers for a box
        return None
    return coco_mask.merge(coco_mask.frPyObjects([points.tolist()], height, width))


def _runs(counts: str | bytes) -> list[int]:
    """Lengths of the runs in a compressed RLE: 5 bits a character, lowest first, each but the first three as the difference
    to the one before the last."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode("ascii") if isinstance(counts, str) else counts:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its last run is cut short")
    return runs


def _in_split(of_ref: str, wanted: str) -> bool:
    if wanted in ("testA", "testB", "testC"):
        return "test" in of_ref and of_ref[-1] == wanted[-1]
    return wanted in of_ref if wanted == "test" else of_ref == wanted


def _exists(sentence: dict[str, Any]) -> bool:
    """Truth of the premise: FP sets say `is_false_premise`, R- sets say `exist`, the rest is true."""
    if "is_false_premise" in sentence:
        return not bool(sentence["is_false_premise"])
    return bool(sentence.get("exist", True))
