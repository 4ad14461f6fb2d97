"""Reader of the REFER format: `refs(<splitBy>).p` beside `instances.json` (protocol §2, refer family).

A ref has expressions and an annotation, or a list of them, whose masks count together; -1 is none. A segmentation is a list of
polygons [x, y, x, y, ...] in pixels of the picture, an RLE or a list of them; an empty one, an RLE of zeros and a polygon of
one or two points are an empty mask. `dataset.check` names what is asked for as there and has an empty mask.

Image and annotation ids must each occur once. `ref_id` and `sent_id` may repeat: nothing is looked up by them. An expression
without text is left out and counted in a warning.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from utils.conversation import text_faults
from utils.files import read_bytes, read_object, shown, some_of, whole_number
from utils.rle import MAX_PIXELS, checked

from .reason_seg import FAR

log = logging.getLogger(__name__)

SPLIT_BY = {
    "refclef": "unc",
    **dict.fromkeys(("refcoco", "refcoco+", "R-refcoco", "R-refcoco+"), "unc_exclude_unified"),
    **dict.fromkeys(("refcocog", "R-refcocog"), "umd_exclude_unified"),
    **dict.fromkeys(("fprefcoco", "fprefcoco+", "fprefcocog"), "berkeley_exclude_unified"),
}
"""Which file of splits each data set uses; `exclude_unified` has no training picture of any family's val or test."""
MAX_OUTLINE = 2 * 10**6
"""Pixels. Drawing a polygon takes time and memory in proportion to its outline, also where it is outside of the image."""


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
    data = read_bytes(file)
    try:
        # Texts that Python 2 stored as bytes: as Latin-1, those in UTF-8 would become nonsense without an error.
        return PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{file} cannot be read: {error}") from error


def is_id(value: Any) -> bool:
    """Whether records can be told apart by `value`: text, or a whole number (1.0 is 1)."""
    return isinstance(value, str | int) and not isinstance(value, bool) or isinstance(value, float) and value.is_integer()


def id_faults(records: Sequence[Any], part: str) -> Iterator[str]:
    """What is wrong with the ids of COCO's images, categories or annotations: each record needs one of its own."""
    first: dict[Any, int] = {}
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            yield f"{part}[{number}] must be an object {{...}}, found {shown(record)}"
        elif "id" not in record:
            yield f"{part}[{number}] lacks the field 'id'"
        elif not is_id(record["id"]):
            yield f"{part}[{number}], id: must be a whole number or text, found {shown(record['id'])}"
        elif (before := first.setdefault(record["id"], number)) != number:
            yield f"{part}[{before}] and {part}[{number}] have the same id, {shown(record['id'])}: give each its own"


def image_size(image: dict[str, Any], name: str) -> tuple[int, int]:
    """(height, width) that a record of an image says.

    Raises:
        ValueError: they are no whole numbers, or too large; the message begins with `name`.
    """
    height, width = (whole_number(image.get(side), f"{name}, {side}") for side in ("height", "width"))
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name}, height and width: {height} x {width} are more than {MAX_PIXELS} pixels")
    return height, width


def image_name(image: dict[str, Any], name: str) -> str:
    """Path of an image below the folder of images, as its record says; Windows' backslashes are read as slashes.

    Raises:
        ValueError: it is no text, or empty; the message begins with `name`.
    """
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise ValueError(f"{name}, file_name: must be the name of an image file, found {shown(file_name)}")
    return file_name.replace("\\", "/")


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
        instances = read_object(self.instances_file)
        self.images, self.annotations = (self._by_id(instances, part) for part in ("images", "annotations"))
        self.refs = read_pickle(self.refs_file)
        if not isinstance(self.refs, list):
            raise ValueError(f"{self.refs_file} must hold a list of refs, found a {type(self.refs).__name__}")
        for number, ref in enumerate(self.refs):
            if not isinstance(ref, dict) or not isinstance(ref.get("split"), str):
                raise ValueError(f"{self.refs_file}: ref {number} is broken: it must be a dict with the name of a `split`, "
                                 f"found {shown(ref)}")  # fmt: skip

    def _by_id(self, instances: dict[str, Any], part: str) -> dict[Any, dict[str, Any]]:
        records = instances.get(part)
        if not isinstance(records, list):
            found = f"no field {part!r}" if part not in instances else f"no list in the field {part!r}"
            raise ValueError(f"{self.instances_file} has {found}")
        for fault in id_faults(records, part):
            raise ValueError(f"{self.instances_file}: each of the {part} needs a field 'id' of its own: {fault}")
        return {record["id"]: record for record in records}

    def of_split(self, split: str) -> list[ReferImage]:
        """Images of a split with all their expressions, in the order of the file; one without expressions is left out.

        testA, testB and testC match by the last letter of a ref's split, `test` by substring.

        Raises:
            ValueError: there is no such split, or a ref is broken; the message names the splits, or the ref and its field.
        """
        found: dict[Any, ReferImage] = {}
        empty: list[str] = []
        for number, ref in enumerate(self.refs):
            if _in_split(ref["split"], split):
                try:
                    self._add(ref, found, empty)
                except KeyError as name:
                    raise ValueError(f"{self.refs_file}: ref {number} lacks the field {name}") from name
                except ValueError as error:
                    raise ValueError(f"{self.refs_file}: ref {number} is broken: {error}") from error
        if empty:
            log.warning("%s, split %s: left out, as they have no text: %s", self.refs_file, split, some_of(empty, mark=", "))
        asked = [picture for picture in found.values() if picture.sentences]
        if not asked:
            splits = ", ".join(sorted({ref["split"] for ref in self.refs})) or "none"
            raise ValueError(f"{self.refs_file} has no ref of split {split!r}; its splits are: {splits}")
        return asked

    def _add(self, ref: dict[str, Any], found: dict[Any, ReferImage], empty: list[str]) -> None:
        """Adds the expressions of one ref to its image in `found`, and names those without text in `empty`.

        Raises:
            KeyError: a field is missing. ValueError: one is of the wrong kind, or names what is not there.
        """
        image_id, ann_id = ref["image_id"], ref["ann_id"]
        if not is_id(image_id) or image_id not in self.images:
            raise ValueError(f"image_id: {self.instances_file.name} has no image {shown(image_id)}")
        if not all(map(is_id, ann_id if isinstance(ann_id, list | tuple) else [ann_id])):
            raise ValueError(f"ann_id: must be the id of an annotation or a list of them, found {shown(ann_id)}")
        if not is_id(ref["ref_id"]):
            raise ValueError(f"ref_id: must be a whole number or text, found {shown(ref['ref_id'])}")
        if image_id not in found:
            where = f"its image in {self.instances_file.name}, {shown(image_id)}"
            if lacking := [name for name in ("file_name", "height", "width") if name not in self.images[image_id]]:
                raise ValueError(f"{where}: lacks the field {lacking[0]!r}")
            image = self.images[image_id]
            found[image_id] = ReferImage(image_id, image_name(image, where), *image_size(image, where))
        if not isinstance(ref["sentences"], list | tuple):
            raise ValueError(f"sentences: must be a list, found {shown(ref['sentences'])}")
        for place, sentence in enumerate(ref["sentences"]):
            if not isinstance(sentence, dict):
                raise ValueError(f"sentences[{place}]: must be a dict, found {shown(sentence)}")
            sent, sent_id, gt_sent = sentence["sent"], sentence["sent_id"], sentence.get("gt_sent")
            if not is_id(sent_id):
                raise ValueError(f"sentences[{place}], sent_id: must be a whole number or text, found {shown(sent_id)}")
            if isinstance(sent, str) and not sent.strip():
                empty.append(f"sent_id {sent_id}")
                continue
            exists = _exists(sentence, place)
            faults = [f"sent {fault}" for fault in text_faults(sent)]
            if isinstance(gt_sent, str) and not gt_sent.strip():
                gt_sent = None
            if not exists and gt_sent is not None:  # of what is there it says nothing
                faults += [f"gt_sent {fault}" for fault in text_faults(gt_sent)]
            if faults:
                raise ValueError(f"{faults[0]} (sentences[{place}])")
            found[image_id].sentences.append(
                {
                    "sent": sent,
                    "exists": exists,
                    "gt_sent": gt_sent,
                    "ref_id": ref["ref_id"],
                    "sent_id": sent_id,
                    "ann_id": ann_id,
                }
            )

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
    if not isinstance(segmentation, list | dict):
        raise ValueError(f"a polygon must be a list of numbers, an RLE an object {{...}}, found {shown(segmentation)}")
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    found = [encoded for part in parts if (encoded := _rle(part, height, width)) is not None]
    return coco_mask.decode(coco_mask.merge(found)) if found else np.zeros((height, width), np.uint8)


def _rle(part: Any, height: int, width: int) -> dict[str, Any] | None:
    """Compressed RLE of a polygon, of an uncompressed RLE or of itself; None if it covers nothing.

    pycocotools trusts what it gets: a polygon with NaN takes all memory and ends the process. So it is looked at first.
    """
    if isinstance(part, dict):
        return checked(part, (height, width))
    try:
        if isinstance(part, list) and not {str, bool}.isdisjoint(map(type, part)):  # NumPy would make numbers of "8" and true
            raise ValueError(f"found {shown(part)}")
        points = np.asarray(part, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:  # the last of a number like 10^400
        raise ValueError(f"a polygon must be a list of numbers: {error}") from error
    if points.ndim != 1 or len(points) % 2:
        raise ValueError(f"a polygon must be a list of numbers x, y, x, y, ..., found the shape {points.shape}")
    if not (np.abs(points) <= FAR).all():  # NaN compares as false
        raise ValueError("a polygon has a point that is no place in or near an image")
    if len(points) < 6:  # pycocotools would take 4 numbers for a box
        return None
    corners = points.reshape(-1, 2)
    outline = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        raise ValueError(f"a polygon has an outline of {outline:.0f} pixels: no more than {MAX_OUTLINE} are drawn")
    return coco_mask.merge(coco_mask.frPyObjects([points.tolist()], height, width))


def _in_split(of_ref: str, wanted: str) -> bool:
    if wanted in ("testA", "testB", "testC"):
        return "test" in of_ref and of_ref[-1] == wanted[-1]
    return wanted in of_ref if wanted == "test" else of_ref == wanted


def _exists(sentence: dict[str, Any], place: int) -> bool:
    """Truth of the premise: FP sets say `is_false_premise`, R- sets say `exist`, the rest is true.

    Raises:
        ValueError: it is neither true, false, 1 nor 0. The text "false" would count as true.
    """
    for name, true in (("is_false_premise", False), ("exist", True)):
        if name in sentence:
            said = sentence[name]
            if not isinstance(said, int) or said not in (0, 1):  # a bool is an int
                raise ValueError(f"sentences[{place}], {name}: must be true or false, found {shown(said)}")
            return bool(said) == true
    return True
