"""Names for content: what has another name has another content.

    content_name(value)      of plain values, arrays, functions with their arguments, and of the files that a `Path` in it names
    files_name(paths)        of many files by name, size and time of modification, without reading them
    annotations_name(data), images_name(data)      of an evaluation data set, from its `places()`

An evaluation data set has `places()`: one {"image": Path, "asked": value} an item, `asked` being all that decides its questions
and true masks. Files in it are paths, which are read here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
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


def files_name(paths: Iterable[str | Path]) -> str:
    """32 digits for files: the name of each, its size and its time of modification."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        try:
            about = path.stat()
            told = f"{about.st_size} {about.st_mtime_ns}"
        except OSError as error:
            told = type(error).__name__
        digest.update(f"{path.name} {told};".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def annotations_name(data: Any) -> str:
    """For the questions and true masks of a data set, and for the names of its images."""
    return content_name([(place["image"].name, place["asked"]) for place in data.places()])


def images_name(data: Any) -> str:
    """For the image files of a data set."""
    return files_name(place["image"] for place in data.places())
