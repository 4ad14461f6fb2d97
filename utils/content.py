"""Names for content: what has another name has another content.

    content_name(value)      of plain values, arrays, functions with their arguments, and of the files that a `Path` in it names
    file_name(path)          of a file by name, size and time of modification, without reading it
    item_names(data)         of the items of an evaluation data set, from its `places()`

An evaluation data set has `places()`: one {"image": Path, "asked": value} an item, `asked` being all that decides its questions
and true masks. Files in it are paths, which are read here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PLAIN = {int, float, str, bool, type(None)}
"""Types whose values are shown whole."""


def content_name(value: Any) -> str:
    """32 digits for a value; a file that cannot be read has a name of its own."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, list) and PLAIN.issuperset(map(type, value)):  # thousands of numbers of polygons, at once
        yield f"{value!r};".encode("utf-8", "surrogatepass")
    elif isinstance(value, dict):
        yield b"{%d" % len(value)
        for key, entry in value.items():
            yield from _parts(key)
            yield from _parts(entry)
    elif isinstance(value, list | tuple):
        yield b"[%d" % len(value)
        for entry in value:
            yield from _parts(entry)
    elif isinstance(value, Path):
        try:
            yield b"file" + hashlib.blake2b(value.read_bytes()).digest()
        except OSError as error:
            yield f"no file: {type(error).__name__};".encode()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape};".encode() + value.tobytes()
    elif isinstance(value, functools.partial):
        yield f"{value.func.__module__}.{value.func.__qualname__};".encode()
        yield from _parts([value.args, value.keywords])
    else:
        yield f"{value!r};".encode("utf-8", "surrogatepass")


def file_name(path: Path) -> str:
    """32 digits for a file: its name, its size and its time of modification."""
    try:
        about = path.stat()
        return content_name([path.name, about.st_size, about.st_mtime_ns])
    except OSError as error:
        return content_name([path.name, type(error).__name__])


def item_names(data: Any) -> list[str]:
    """For each item of a data set its annotations (questions and true masks) and its image file, 16 digits each."""
    return [
        f"{content_name([place['image'].name, place['asked']])[:16]} {file_name(place['image'])[:16]}" for place in data.places()
    ]
