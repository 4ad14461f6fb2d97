"""Reader of the REFER format: `refs(<splitBy>).p` beside `instances.json` (protocol §2, refer family)."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

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
        instances = json.loads(self.instances_file.read_text())
        for part in ("images", "annotations"):
            if part not in instances:
                raise ValueError(f"{self.instances_file} has no field {part!r}")
        self.images = {image["id"]: image for image in instances["images"]}
        self.annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        self.refs = read_pickle(self.refs_file)

    def of_split(self, split: str) -> list[ReferImage]:
        """Pictures of a split with all their expressions, in the order of the file.

        testA, testB and testC match by the last letter of a ref's split, `test` by substring.
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
        if not found:
            raise ValueError(f"{self.refs_file} has no ref of split {split!r}")
        return list(found.values())

    def mask(self, ann_id: int | list[int], height: int, width: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1} of one annotation, or of several together; an empty segmentation is an empty mask.

        Overlapping parts count once (the original added them up to 2, §8-15).
        """
        total = np.zeros((height, width), np.uint8)
        for single in ann_id if isinstance(ann_id, list) else [ann_id]:
            if single == -1:
                continue
            if single not in self.annotations:
                raise ValueError(f"{self.instances_file} has no annotation {single}, which {self.refs_file.name} names")
            segmentation = self.annotations[single]["segmentation"]
            if not segmentation:
                continue
            parts = segmentation if isinstance(segmentation, list) else [segmentation]
            total |= coco_mask.decode([rle(part, height, width) for part in parts]).max(axis=2).astype(np.uint8)
        return total


def rle(part: list[float] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of a polygon, of an uncompressed RLE or of itself."""
    if isinstance(part, list):
        return coco_mask.merge(coco_mask.frPyObjects([part], height, width))
    return coco_mask.frPyObjects(part, height, width) if isinstance(part["counts"], list) else part


def _in_split(of_ref: str, wanted: str) -> bool:
    if wanted in ("testA", "testB", "testC"):
        return "test" in of_ref and of_ref[-1] == wanted[-1]
    return wanted in of_ref if wanted == "test" else of_ref == wanted


def _exists(sentence: dict[str, Any]) -> bool:
    """Truth of the premise: FP sets say `is_false_premise`, R- sets say `exist`, the rest is true."""
    if "is_false_premise" in sentence:
        return not bool(sentence["is_false_premise"])
    return bool(sentence.get("exist", True))
