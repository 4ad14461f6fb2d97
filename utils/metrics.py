"""Scores of predicted masks: counted in int64 an expression, divided once at the end (protocol §5).

    meter = SegmentationMeter()
    meter.update(prediction_HW, target_HW, exists=True, predicted_exists=True)     once an expression
    meter.merge(state_of_another_process)                                          int64 rows: nothing is lost
    meter.compute()                                                                {"giou", "ciou", "see", ...}

The one definition of gIoU, cIoU and See accuracy, for validation while training and for `test_read.py`:

    gIoU   mean over expressions of I / (U + 1e-5), and 1 where U = 0
    cIoU   sum of I / (sum of U + 1e-10), every expression counted, those that ask for what is not there too
    See    share of expressions whose predicted presence is the true one
    P@x    share of expressions with an IoU of at least x

Legend: (H, W) pixels of the original picture · E expressions counted so far.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

IGNORE_PIXEL = 255
"""Pixels of a target that count neither for nor against (ReasonSeg's `ignore` shapes)."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
UNKNOWN = -1


class Overlap(NamedTuple):
    """Pixels of one expression."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """I / (U + 1e-5); an empty prediction of an empty target is right, hence 1."""
        return self.intersection / (self.union + 1e-5) if self.union else 1.0


def class_areas(
    prediction: torch.Tensor, target: torch.Tensor, classes: int = 2, ignore: int = IGNORE_PIXEL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(intersection, union, target), each (classes,) int64: pixels of each class where `target` is not `ignore`.

    Args:
        prediction, target: same shape, any integer or bool dtype. Neither is changed (the original's prediction was).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}: they must agree")
    counted = target != ignore
    rows = []
    for c in range(classes):
        predicted, true = (prediction == c) & counted, (target == c) & counted
        both, ours, theirs = (predicted & true).sum(), predicted.sum(), true.sum()
        rows.append(torch.stack([both, ours + theirs - both, theirs]))
    intersection, union, area = torch.stack(rows, dim=1)
    return intersection, union, area


def overlap(prediction: torch.Tensor, target: torch.Tensor) -> Overlap:
    """Intersection and union of the object, (H, W) each: `prediction` bool or 0 / 1, `target` 0 / 1 / 255."""
    intersection, union, _ = class_areas(prediction.to(torch.uint8), target)
    return Overlap(int(intersection[1]), int(union[1]))


class SegmentationMeter:
    """Counts of every expression, and the scores that follow from them."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def update(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        exists: bool | None = None,
        predicted_exists: bool | None = None,
    ) -> Overlap:
        """Counts one expression: masks (H, W) as in `overlap`; presence only where the model was free to deny it."""
        found = overlap(prediction, target)
        self.add(found, exists, predicted_exists)
        return found

    def add(self, found: Overlap, exists: bool | None = None, predicted_exists: bool | None = None) -> None:
        """Counts one expression whose pixels are counted already."""
        presence = [UNKNOWN if value is None else int(value) for value in (exists, predicted_exists)]
        self._rows.append((found.intersection, found.union, *presence))

    def state(self) -> np.ndarray:
        """(E, 4) int64: intersection, union, exists, predicted_exists (-1: not asked). What processes exchange."""
        return np.array(self._rows, dtype=np.int64).reshape(-1, 4)

    def merge(self, state: np.ndarray) -> SegmentationMeter:
        """Adds the expressions of another meter's state; returns self."""
        self._rows += [tuple(row) for row in state.tolist()]
        return self

    def compute(self) -> dict[str, float | int | None]:
        """The scores; NaN where nothing was counted, `see` None where presence was never asked.

        Sums are exact, so the order of expressions, and the number of processes, changes no bit.
        """
        overlaps = [Overlap(intersection, union) for intersection, union, _, _ in self._rows]
        ious = [found.iou for found in overlaps]
        asked = [(exists, predicted) for _, _, exists, predicted in self._rows if UNKNOWN not in (exists, predicted)]
        intersection, union = sum(o.intersection for o in overlaps), sum(o.union for o in overlaps)
        return {
            "giou": _share(math.fsum(ious), len(ious)),
            "ciou": intersection / (union + 1e-10) if overlaps else math.nan,
            "see": _share(sum(exists == predicted for exists, predicted in asked), len(asked)) if asked else None,
            **{f"p@{x}": _share(sum(iou >= x for iou in ious), len(ious)) for x in THRESHOLDS},
            "expressions": len(overlaps),
            "intersection": intersection,
            "union": union,
        }


def _share(part: float, count: int) -> float:
    return part / count if count else math.nan
