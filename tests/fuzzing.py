"""Damaged files for tests/test_fuzz.py: seeded mutations of bytes and of JSON values, and a child process that reads the results.

A mutation is a function of (seed, number), so a failing case is repeated by its number.
"""

import copy
import faulthandler
import json
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CASES = int(os.environ.get("READ_FUZZ_CASES", "200"))
"""Mutations a reader; `READ_FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py` tries more."""
SEED = int(os.environ.get("READ_FUZZ_SEED", "0"))
TIME_LIMIT_S = 30
GROWTH_LIMIT_MIB = 600

ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 255, 10**9, 10**18, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"),
    "", " ", "x", "0", "1", "false", "[SEG]", "a </s> b", "<image>", "x ASSISTANT: y", "\x00", "caf\u00e9 \u84dd", "x" * 5000,
    "../../etc/passwd", "/etc/passwd", "C:\\a\\b.jpg",
    [], {}, [[]], [None], [1, 2, 3], {"a": 1}, [[0, 0], [10, 0], [10, 10]], [[[[[[1]]]]]],
    {"size": [4, 4], "counts": "04"}, {"size": [48, 64], "counts": [-5, 3077]}, {"size": [48, 64], "counts": "\u00ff"},
)  # fmt: skip


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Cuts, overwrites, doubles, or puts something in front of the content of a file."""
    kind = rng.integers(8)
    place, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 64))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(length) + data[place + length :]
    if kind == 2:
        return data[:place] + rng.bytes(length) + data[place + length :]
    if kind == 3:
        return data[:place] + rng.bytes(length) + data[place:]
    if kind == 4:
        return data[:place] + data[place + length :]
    if kind == 5:
        return data[:place] + data[max(place - length, 0) : place] * int(rng.integers(1, 4)) + data[place:]
    if kind == 6:
        return (b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\n", b"<!DOCTYPE html>", b"PK\x03\x04")[rng.integers(6)] + data
    flipped = bytearray(data)
    for index in rng.integers(len(data), size=min(length, 8)):
        flipped[index] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def mutate_value(value: Any, rng: np.random.Generator) -> Any:
    """One to three changes anywhere in a JSON value: another kind, a field or entry gone, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        nodes = list(_nodes([value]))
        holder, key = nodes[rng.integers(len(nodes))]
        kind = rng.integers(6)
        if kind <= 2 or (kind == 4 and not isinstance(holder, dict)):
            holder[key] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
        elif kind == 3 and holder is not nodes[0][0]:
            del holder[key]
        elif kind == 4:
            holder[f"{key}_"] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        value = nodes[0][0][0] if nodes[0][0] else None
    return value


def _nodes(holder: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dict, key) of every value in a JSON value that is wrapped in a list."""
    keys = range(len(holder)) if isinstance(holder, list) else list(holder)
    for key in keys:
        yield holder, key
        if isinstance(holder[key], list | dict):
            yield from _nodes(holder[key])


def damaged(content: bytes, number: int, structured: bool) -> bytes:
    """Case `number` of a file: of a JSON file two in three cases change a value, else bytes change."""
    rng = np.random.default_rng([SEED, number])
    if structured and number % 3:
        return json.dumps(mutate_value(json.loads(content), rng)).encode()
    return mutate_bytes(content, rng)


# ------------------------------------------------------------------------------------------------ the child process


def failures(read: Callable[[int], str | None], cases: int) -> list[str]:
    """What `read(number)` says is wrong with each case, all in one child process; so is a crash, a hang and a large growth."""
    parent, child = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_read_all, args=(read, cases, child))
    process.start()
    child.close()
    found, last = [], -1
    while True:
        try:
            last, wrong = parent.recv()
        except EOFError:
            break
        found += [f"case {last}: {wrong}"] if wrong else []
    process.join()
    if process.exitcode:
        found.append(f"case {last + 1}: ended the process with {process.exitcode} (a crash, or more than {TIME_LIMIT_S} s)")
    return found


def _read_all(read: Callable[[int], str | None], cases: int, pipe: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    log = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for number in range(cases):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True, file=log)
        try:
            wrong = read(number)
        except BaseException:
            wrong = traceback.format_exc(limit=-4)
        faulthandler.cancel_dump_traceback_later()
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if growth > GROWTH_LIMIT_MIB:
            wrong = f"{wrong or ''} memory grew by {growth:.0f} MiB"
        pipe.send((number, wrong))
    pipe.close()
    os._exit(0)


def outcome(read: Callable[[], Any], oracle: Callable[[], Any], names: tuple[str, ...]) -> str | None:
    """None if reading gave what the oracle gives, or one line that contains one of `names`; else what is wrong."""
    from utils.cli import one_line

    try:
        value = read()
    except (ValueError, OSError) as error:
        line = one_line(error)
        if "\n" in line:
            return f"a message of several lines: {line!r}"
        return None if any(name in line for name in names) else f"the message names no file: {line!r}"
    expected = oracle()
    return None if value == expected else f"accepted as {value!r:.300}, which the oracle reads as {expected!r:.300}"


def write(path: Path, content: bytes) -> None:
    """Replaces a file."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
