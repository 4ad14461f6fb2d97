"""COCO's run-length encoded masks from files, checked before pycocotools sees them.

    checked(rle)            one mask, as pycocotools takes it
    check_all(rles)         many masks in compressed form, quickly; RleError says which one is wrong

pycocotools trusts what it gets. Runs that are damaged make it read memory that is not its own, loop for minutes, end the
process, or count wrong pixels without an error. So each run is looked at here first.

A mask is {"size": [H, W], "counts": ...}: lengths of runs of 0 and 1 in turn, beginning with 0, down one column after the
other. Compressed counts are text: 5 bits a character, lowest first, bit 5 says that more follow, and each run but the first
three is the difference to the one before the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from utils.files import shown

MAX_PIXELS = 2**30
"""Of a mask: as many as OpenCV reads of an image."""
MOST_CHARACTERS = 7
"""Of one compressed run: 35 bits, so that sums are exact in 64 bits. pycocotools writes no more."""
AT_ONCE = 2**16
"""Characters of counts that `check_all` looks at together: what it makes of them stays in the processor's cache."""


class RleError(ValueError):
    """A mask that is no RLE; `index` is its place among those that were given."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index


def checked(rle: Any, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """A COCO RLE in compressed form, `counts` being bytes or text, that pycocotools can take.

    Args:
        rle: {"size": [H, W], "counts": text, bytes, or a list of whole numbers}.
        size: (H, W) that it must have.

    Raises:
        RleError: it is none, is damaged, or has another size. The caller knows file and record.
    """
    height, width = _size(rle)
    if size is not None and (height, width) != tuple(size):
        raise RleError(f"an RLE is for {height} x {width} pixels (height x width), not for {size[0]} x {size[1]}")
    counts = rle["counts"]
    if isinstance(counts, list):
        if not all(_is_whole(run) and 0 <= run <= MAX_PIXELS for run in counts):
            raise RleError("an RLE is damaged: its counts must be whole numbers, 0 or more")
        if (pixels := int(sum(counts))) != height * width:
            raise RleError(f"an RLE is damaged: its runs have {pixels} pixels, its size {height * width}")
        return coco.frPyObjects({"size": [height, width], "counts": [int(run) for run in counts]}, height, width)
    check_all([rle])
    return {"size": [height, width], "counts": counts}


def check_all(rles: Sequence[Any]) -> None:
    """Checks masks in compressed form.

    Raises:
        RleError: one is none, or is damaged; `index` says which.
    """
    joined, sizes, first, length = [], [], 0, 0
    for index, rle in enumerate(rles):
        height, width = _size(rle, index)
        counts = rle["counts"]
        try:
            counts = counts.encode("ascii") if isinstance(counts, str) else counts
        except UnicodeEncodeError:
            raise RleError("an RLE is damaged: its counts hold letters that are no part of it", index) from None
        if not isinstance(counts, bytes) or not counts:
            raise RleError(f"an RLE's counts must be text that is not empty, found {shown(rle['counts'])}", index)
        joined.append(counts)
        sizes.append(height * width)
        length += len(counts)
        if length > AT_ONCE:
            _check_runs(joined, sizes, first)
            joined, sizes, first, length = [], [], index + 1, 0
    if joined:
        _check_runs(joined, sizes, first)


def _size(rle: Any, index: int = 0) -> tuple[int, int]:
    """(H, W) of something that must be an RLE."""
    if not isinstance(rle, dict):
        raise RleError(f"must be an RLE {{'size': [height, width], 'counts': ...}}, found {shown(rle)}", index)
    for name in ("size", "counts"):
        if name not in rle:
            raise RleError(f"an RLE lacks the field '{name}'", index)
    size = rle["size"]
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(_is_whole(side) and side > 0 for side in size)):
        raise RleError(f"an RLE's size must be [height, width], whole numbers of pixels, found {shown(size)}", index)
    if size[0] * size[1] > MAX_PIXELS:
        raise RleError(f"an RLE's size is {shown(size)}: more pixels than any image has that can be read", index)
    return int(size[0]), int(size[1])


def _is_whole(value: Any) -> bool:
    """True for a number without a fraction; a truth value is none."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _check_runs(all_counts: list[bytes], sizes: list[int], first: int) -> None:
    """Checks the runs of several masks together; `first` is the index of the first one.

    Legend: C characters of all masks · R runs of all masks · M masks.
    """
    end_M = np.cumsum([len(counts) for counts in all_counts])
    code_C = np.frombuffer(b"".join(all_counts), np.uint8) - np.uint8(48)  # wraps: what is below 48 becomes large
    _raise_where(code_C > 63, end_M, first, "holds a letter that is no part of it")
    ends_R = np.flatnonzero(code_C < 32)
    _raise_where(code_C[end_M - 1] >= 32, np.arange(1, len(end_M) + 1), first, "its last run is cut short")
    until_M = np.searchsorted(ends_R, end_M)  # runs up to the end of each mask
    length_R = ends_R.copy()
    length_R[1:] -= ends_R[:-1]
    length_R[0] += 1
    longest = int(length_R.max())
    if longest > MOST_CHARACTERS:
        _raise_where(length_R > MOST_CHARACTERS, until_M, first, "a run is too long")
    bits_C = code_C & np.uint8(31)
    run_R = bits_C[ends_R].astype(np.int64)  # the last character has the highest bits, and the sign
    run_R -= (run_R & 16) << 1
    for back in range(1, longest):
        of = np.flatnonzero(length_R > back)
        run_R[of] = (run_R[of] << 5) | bits_C[ends_R[of] - back]
    # Runs 1, 3, 5, ... of a mask add up, and so do runs 2, 4, 6, ...; run 0 stands alone.
    begin_M = until_M - np.diff(until_M, prepend=0)
    for begin, end in zip(begin_M.tolist(), until_M.tolist(), strict=True):
        np.cumsum(run_R[begin + 1 : end : 2], out=run_R[begin + 1 : end : 2])
        np.cumsum(run_R[begin + 2 : end : 2], out=run_R[begin + 2 : end : 2])
    if run_R.min() < 0:
        _raise_where(run_R < 0, until_M, first, "a run is negative")
    if run_R.max() > MAX_PIXELS:
        _raise_where(run_R > MAX_PIXELS, until_M, first, "a run is too long")
    pixels_M = np.add.reduceat(run_R, begin_M)
    if (wrong := np.flatnonzero(pixels_M != sizes)).size:
        n = int(wrong[0])
        raise RleError(f"an RLE is damaged: its runs have {pixels_M[n]} pixels, its size {sizes[n]}", first + n)


def _raise_where(bad: np.ndarray, end_M: np.ndarray, first: int, what: str) -> None:
    """RleError of the mask in which the first True lies; `end_M` are the places behind each mask's last."""
    if bad.any():
        mask = int(np.searchsorted(end_M, int(np.argmax(bad)), side="right"))
        raise RleError(f"an RLE is damaged: {what}", first + mask)
