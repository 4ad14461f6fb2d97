"""RLE from files: what is sound passes unchanged, everything else is refused before pycocotools sees it."""

import numpy as np
import pytest
from pycocotools import mask as coco

from utils import rle as rle_module
from utils.predictions import encode_mask
from utils.rle import RleError, check_all, checked


def sound(seed, count=60):
    """RLE of noise, of empty and of full masks of many sizes."""
    rng = np.random.default_rng(seed)
    return [encode_mask(rng.random(rng.integers(1, 60, 2)) < rng.choice([0, 0.02, 0.5, 0.98, 1])) for _ in range(count)]


def runs_of(counts):
    """Lengths of runs, decoded one character after the other; None if there are none. The rule written out in plain Python."""
    runs, value, shift = [], 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def is_sound(rle):
    runs = runs_of(rle["counts"])
    return bool(runs) and min(runs) >= 0 and sum(runs) == rle["size"][0] * rle["size"][1]


@pytest.mark.parametrize("at_once", [1, 100, 2**16])
def test_sound_masks_pass(monkeypatch, at_once):
    monkeypatch.setattr(rle_module, "AT_ONCE", at_once)
    check_all([*sound(0), encode_mask(np.zeros((3000, 2000))), encode_mask(np.ones((3000, 2000)))])


def test_changed_counts_are_refused_unless_plain_python_finds_them_sound():
    rng, refused = np.random.default_rng(1), 0
    first, *others = sound(2)
    for rle in others * 25:
        counts = list(rle["counts"])
        place = int(rng.integers(len(counts)))
        match int(rng.integers(4)):
            case 0:
                counts[place] = chr(int(rng.integers(33, 126)))
            case 1:
                counts = counts[:place]
            case 2:
                counts[place:place] = counts[place : place + 3]
            case 3:
                counts[place] = chr(ord(counts[place]) ^ 1 << int(rng.integers(6)))
        changed = rle | {"counts": "".join(counts)}
        if is_sound(changed):
            check_all([first, changed, first])
        else:
            refused += 1
            with pytest.raises(RleError) as error:
                check_all([first, changed, first])
            assert error.value.index == 1
    assert refused > 1000


GOOD = encode_mask(np.eye(4))
BROKEN = {
    "null": (None, "must be an RLE"),
    "text": ("PPYo1", "must be an RLE"),
    "a polygon": ([1, 2, 3, 4, 5, 6], "must be an RLE"),
    "no size": ({"counts": GOOD["counts"]}, "lacks the field 'size'"),
    "no counts": ({"size": [4, 4]}, "lacks the field 'counts'"),
    "size null": (GOOD | {"size": None}, "size must be"),
    "size of one": (GOOD | {"size": [16]}, "size must be"),
    "size as text": (GOOD | {"size": ["4", "4"]}, "size must be"),
    "size of truth values": (GOOD | {"size": [True, True]}, "size must be"),
    "size negative": (GOOD | {"size": [-4, -4]}, "size must be"),
    "size zero": (GOOD | {"size": [0, 4]}, "size must be"),
    "size with NaN": (GOOD | {"size": [float("nan"), 4]}, "size must be"),
    "size of the universe": (GOOD | {"size": [10**9, 10**9]}, "more pixels than any image"),
    "size of 400 digits": (GOOD | {"size": [10**400, 1]}, "more pixels than any image"),
    "another size": (GOOD | {"size": [4, 5]}, "its runs have 16 pixels, its size 20"),
    "counts null": (GOOD | {"counts": None}, "counts must be text"),
    "counts empty": (GOOD | {"counts": ""}, "counts must be text that is not empty"),
    "counts a number": (GOOD | {"counts": 5}, "counts must be text"),
    "not ASCII": (GOOD | {"counts": "é0"}, "letters that are no part of it"),
    "a blank": (GOOD | {"counts": "0 1"}, "a letter that is no part of it"),
    "cut": (GOOD | {"counts": "00o"}, "cut short"),
    "a run without end": (GOOD | {"counts": "o" * 12 + "0"}, "a run is too long"),
    "negative": (GOOD | {"counts": "O0a0"}, "a run is negative"),
    "too short": (GOOD | {"counts": "5"}, "its runs have 5 pixels, its size 16"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_masks_are_refused(case):
    rle, words = BROKEN[case]
    for check in (lambda: check_all([GOOD, rle]), lambda: checked(rle)):
        with pytest.raises(RleError, match=words):
            check()


LISTS = {
    "short": ([0, 5], "its runs have 5 pixels"),
    "empty": ([], "its runs have 0 pixels"),
    "negative": ([-8, 24], "must be whole numbers, 0 or more"),
    "text": (["16"], "must be whole numbers"),
    "null": ([None, 16], "must be whole numbers"),
    "NaN": ([float("nan"), 16], "must be whole numbers"),
    "truth values": ([True, 15], "must be whole numbers"),
    "a fraction": ([0.5, 15.5], "must be whole numbers"),
    "huge": ([10**400], "must be whole numbers"),
    "a list": ([[16]], "must be whole numbers"),
}


@pytest.mark.parametrize("case", LISTS)
def test_broken_lists_of_runs_are_refused(case):
    counts, words = LISTS[case]
    with pytest.raises(RleError, match=words):
        checked({"size": [4, 4], "counts": counts})


@pytest.mark.parametrize("counts", [[5, 3, 8], [5.0, 3.0, 8.0], [0, 16], [16]])
def test_lists_of_runs_become_what_pycocotools_takes(counts):
    found = coco.decode(checked({"size": [4.0, 4], "counts": counts}))
    assert found.ravel(order="F").tolist() == [n % 2 for n, run in enumerate(counts) for _ in range(int(run))]


def test_bytes_and_text_are_the_same():
    assert np.array_equal(coco.decode(checked(GOOD | {"counts": GOOD["counts"].encode()})), np.eye(4))


def test_a_size_that_is_asked_for():
    assert checked(GOOD, (4, 4))["size"] == [4, 4]
    with pytest.raises(RleError, match="for 4 x 4 pixels .*, not for 4 x 5"):
        checked(GOOD, (4, 5))
