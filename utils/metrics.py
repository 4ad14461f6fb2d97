"""Scores of predicted masks: counted in whole pixels an expression, divided once at the end (protocol §5).

    row = count(prediction_HW, target_HW, image=3, exists=True, predicted_exists=True)     an Expression, plain numbers
    summarize(rows, generated=True)                                   {"giou", "ciou", "see", ..., "interval", "subsets"}

In: rows of every process, in any order: sums are exact, so neither order nor number of processes changes a bit.
The one definition of every score, for validation while training and for `test_read.py`:

    gIoU    mean over expressions of I / (U + 1e-5), and 1 where U = 0
    cIoU    sum of I / (sum of U + 1e-10), every expression counted, those that ask for what is not there too
    P@x     share of expressions with an IoU of at least x
    See     share of expressions whose predicted presence is the true one
    N-acc   share of the false premises that were denied, and
    T-acc   share of the true premises that were affirmed, by the names of gRefCOCO and GSVA
    Say     mean of `utils.say` over the false premises that have a reference; 0 where the model affirmed with a mask

See, N-acc, T-acc and Say need a model that was free to deny: they are None where answers were forced.

Legend: (H, W) pixels of the original picture · E expressions · M pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

IGNORE_PIXEL = 255
"""Pixels of a target that count neither for nor against (ReasonSeg's `ignore` shapes)."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
UNKNOWN = -1

MASK_SIZES = (("mask < 1 %", 0.0, 0.01), ("mask 1-10 %", 0.01, 0.1), ("mask > 10 %", 0.1, math.inf))
"""Name, least share of the picture (included), and the share from which on the next one begins."""

WORDS = (("1-2 words", 1, 2), ("3-5 words", 3, 5), ("6+ words", 6, math.inf))
"""Name, fewest and most words of the bare expression."""

RESAMPLED_AT_ONCE = 1_000_000
"""Pictures drawn in one go by the bootstrap: some 20 MB, whatever the size of the data set."""


class Overlap(NamedTuple):
    """Pixels of one expression."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """I / (U + 1e-5); an empty prediction of an empty target is right, hence 1."""
        return self.intersection / (self.union + 1e-5) if self.union else 1.0


class Expression(NamedTuple):
    """One expression, counted. Plain numbers, so that processes can exchange it."""

    image: int
    """Place of its picture in the data set."""
    intersection: int
    union: int
    target: int
    """Pixels of the object asked for, without the ignored ones."""
    pixels: int
    """H * W; 0 if not known."""
    exists: int
    """The premise is true, whatever the protocol: 1, 0, or -1 if not known."""
    predicted_exists: int
    """The model affirmed it: 1, 0, or -1 if it was not asked."""
    sentence: int = UNKNOWN
    """1 long question, 0 short phrase, -1 if the data set does not say."""
    words: int = 0
    """Of the bare expression; 0 if not known."""
    say: float = math.nan
    """`utils.say.say_score` of the answer to a false premise; NaN where there is nothing to score."""

    @property
    def iou(self) -> float:
        """As `Overlap.iou`."""
        return Overlap(self.intersection, self.union).iou


def _pixels(prediction: Any, target: Any) -> tuple[int, int, int]:
    """(intersection, union, target) of the object where `target` is not to be ignored; nothing is changed."""
    inside, truth = np.asarray(prediction) != 0, np.asarray(target)
    if inside.shape != truth.shape:
        raise ValueError(f"prediction is {inside.shape}, target {truth.shape}: they must agree")
    there = truth == 1
    counted = inside & (truth != IGNORE_PIXEL)
    intersection, area, predicted = (int(np.count_nonzero(part)) for part in (inside & there, there, counted))
    return intersection, predicted + area - intersection, area


def overlap(prediction: Any, target: Any) -> Overlap:
    """Intersection and union of the object, arrays or CPU tensors (H, W): `prediction` bool or 0 / 1, `target` 0 / 1 / 255."""
    return Overlap(*_pixels(prediction, target)[:2])


def count(
    prediction: Any,
    target: Any,
    image: int,
    exists: bool | None = None,
    predicted_exists: bool | None = None,
    *,
    sentence: bool | None = None,
    words: int = 0,
    say: float | None = None,
) -> Expression:
    """The row of one expression: masks (H, W) as in `overlap`, the rest as in `Expression`, with None for what is not known."""
    return Expression(
        image, *_pixels(prediction, target), np.asarray(target).size, _flag(exists), _flag(predicted_exists),
        _flag(sentence), words, math.nan if say is None else say,
    )  # fmt: skip


def summarize(rows: Sequence[Expression], *, generated: bool, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The scores of a data set, as shares of 1; NaN where nothing was counted, None where there is no such thing.

    Args:
        rows: every expression once, in any order.
        generated: the model answered freely, so that presence was judged. If not, `see`, `n_acc`, `t_acc` and `say` are None.
        resamples: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap; equal rows and seed give equal intervals.

    Returns:
        giou, ciou, see, n_acc, t_acc, say, p@0.5 ... p@0.9; expressions, images, intersection, union; and

        interval: [low, high] of giou, ciou and see, between which 95 % of the resampled scores lie. Pictures are drawn, not
            expressions, since those of one picture succeed and fail together. None below two pictures: one says nothing
            about others. What is covered is the choice of pictures, not the seed of a training.
        subsets: name -> the same without interval, of the parts that are neither empty nor everything:
            "present", "false premise"   truth of the premise
            "short", "long"              phrase or whole question, where the data set says so;
            "1-2 words", ...             where it does not, words of the expression (`WORDS`)
            "mask < 1 %", ...            share of the picture that the object takes (`MASK_SIZES`), where there is one
    """
    rows = sorted(rows, key=lambda row: row.image)
    subsets = {name: _whole(part, generated) for name, part in _subsets(rows) if 0 < len(part) < len(rows)}
    return {**_whole(rows, generated), "interval": _intervals(rows, generated, resamples, seed), "subsets": subsets}


# ------------------------------------------------------------------------------------------------ what they are made of


def _flag(value: bool | None) -> int:
    return UNKNOWN if value is None else int(value)


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _mean(values: Sequence[float]) -> float | None:
    """Exact mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def _scores(rows: Sequence[Expression], generated: bool) -> dict[str, Any]:
    ious = [row.iou for row in rows]
    intersection, union = sum(row.intersection for row in rows), sum(row.union for row in rows)
    judged = [row for row in rows if generated and UNKNOWN not in (row.exists, row.predicted_exists)]
    scored = [row for row in rows if generated and row.exists == 0 and not math.isnan(row.say)]
    return {
        "giou": _share(math.fsum(ious), len(ious)),
        "ciou": intersection / (union + 1e-10) if rows else math.nan,
        "see": _mean([row.exists == row.predicted_exists for row in judged]),
        "n_acc": _mean([row.predicted_exists == 0 for row in judged if row.exists == 0]),
        "t_acc": _mean([row.predicted_exists == 1 for row in judged if row.exists == 1]),
        # Words that correct beside a mask that affirms are no correction.
        "say": _mean([0.0 if row.predicted_exists == 1 else row.say for row in scored]),
        **{f"p@{x}": _share(sum(iou >= x for iou in ious), len(ious)) for x in THRESHOLDS},
        "expressions": len(rows),
        "intersection": intersection,
        "union": union,
    }


def _whole(rows: Sequence[Expression], generated: bool) -> dict[str, Any]:
    return {**_scores(rows, generated), "images": len({row.image for row in rows})}


def _subsets(rows: Sequence[Expression]) -> list[tuple[str, list[Expression]]]:
    parts = [("present", [row for row in rows if row.exists == 1])]
    parts += [("false premise", [row for row in rows if row.exists == 0])]
    if any(row.sentence != UNKNOWN for row in rows):
        parts += [(name, [row for row in rows if row.sentence == kind]) for name, kind in (("short", 0), ("long", 1))]
    else:
        parts += [(name, [row for row in rows if low <= row.words <= high]) for name, low, high in WORDS]
    sized = [row for row in rows if row.exists == 1 and row.target]
    parts += [
        (name, [row for row in sized if low * row.pixels <= row.target < high * row.pixels])
        for name, low, high in MASK_SIZES
    ]
    return parts


# ------------------------------------------------------------------------------------------------ bootstrap


def _intervals(rows: Sequence[Expression], generated: bool, resamples: int, seed: int) -> dict[str, list[float] | None]:
    """95 % percentile intervals; see `summarize`."""
    table = _per_image(rows, generated)
    if len(table) < 2 or resamples < 1:
        return {"giou": None, "ciou": None, "see": None}
    iou, expressions, intersection, union, right, judged = resampled_sums(table, resamples, seed).T
    shares = {
        "giou": iou / _ONE / expressions,
        "ciou": intersection / (union + 1e-10),
        "see": right[judged > 0] / judged[judged > 0],
    }
    return {
        name: np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None for name, values in shares.items()
    }


_ONE = 1 << 40
"""IoUs are summed in units of 2^-40: integers add up to the same bits in any order and on any machine."""


def _per_image(rows: Sequence[Expression], generated: bool) -> np.ndarray:
    """(M, 6) int64, by place of the picture: IoU in units of `_ONE`, expressions, I, U, presence right, presence judged."""
    places = np.unique([row.image for row in rows], return_inverse=True)[1] if rows else np.zeros(0, int)
    table = np.zeros((int(places.max(initial=-1)) + 1, 6), np.int64)
    for place, row in zip(places, rows, strict=True):
        judged = generated and UNKNOWN not in (row.exists, row.predicted_exists)
        right = judged and row.exists == row.predicted_exists
        table[place] += (round(row.iou * _ONE), 1, row.intersection, row.union, right, judged)
    return table


def resampled_sums(table: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, columns), dtype of the table: sums of as many of its rows as it has, drawn with replacement.

    Counts how often each row was drawn, some resamples at a time: memory does not grow with their number.
    """
    rng, count = np.random.default_rng(seed), len(table)
    at_once = max(1, RESAMPLED_AT_ONCE // count)
    sums = []
    for begin in range(0, resamples, at_once):
        some = min(at_once, resamples - begin)
        drawn = rng.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        sums.append(times.astype(table.dtype) @ table)
    return np.concatenate(sums)
