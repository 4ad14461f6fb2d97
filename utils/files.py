"""Files that people hand us, and files that we write.

Reading: every reader names the file in its error, and says what was found, what is wanted and what to do.

    read_text(path)         UTF-8, with or without a byte order mark; UTF-16 where a byte order mark says so
    read_json(path)         one JSON value;  read_object(path): one JSON object
    read_jsonl(path)        (line number, value) of JSON lines

Writing: a file appears under its name only when it is whole, always in UTF-8 whatever the locale.

    write_text(path, text)  write_json(path, value)  with whole_file(path) as file: ...
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
CP1252_SIGNS = frozenset("‘’“”–—…•€™´°½¼¾×©®£§«»\xa0")
"""What western texts of Windows hold beside letters."""

# ------------------------------------------------------------------------------------------------ reading


def read_bytes(path: str | Path) -> bytes:
    """The content of a file that must hold something.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, a pointer of Git LFS, or a web page.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()
    if fault := not_content(data[:512]):
        raise ValueError(f"{path} {fault}")
    return data


def not_content(head: bytes) -> str | None:
    """What a file is whose first bytes are `head`, if it is no content at all: empty, a Git LFS pointer, a web page."""
    if not head.strip():
        return "is empty: copy or download it again"
    if head.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository, or download it again"
    if HTML.match(head):
        return "is a web page: the download failed; download it again"
    return None


def read_text(path: str | Path, cp1252: bool = False) -> str:
    """The text of a file, without its byte order mark; line ends stay as they are.

    Args:
        cp1252: western texts of Windows are accepted too, where nothing speaks for another encoding (`decode_text`).

    Raises:
        FileNotFoundError, ValueError: as `read_bytes`, or it is no UTF-8.
    """
    return decode_text(read_bytes(path), str(path), cp1252)


def decode_text(data: bytes, name: str, cp1252: bool = False) -> str:
    """Text of bytes; `name` stands in the error.

    With `cp1252`, bytes that are no UTF-8 are read as Windows' western encoding, as the original read some files of
    ReasonSeg. GBK, Shift-JIS or cp1251 read so would become nonsense without an error. They have runs of bytes above 127,
    where western text has single letters and quotation marks; runs are therefore refused.

    Raises:
        ValueError: the text is in another encoding; the message names the line and the byte.
    """
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if cp1252 and encoding == "utf-8" and (text := _western(data)) is not None:
            return text
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}, line {line}: is no {encoding.removesuffix('-sig').upper()} text (byte 0x{data[error.start]:02X}); "
            "save it as UTF-8 (Excel: CSV UTF-8)"
        ) from None


def _western(data: bytes) -> str | None:
    """Text of cp1252 bytes if every byte above 127 stands alone and is a western letter or sign."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    for run in re.findall(r"[^\x00-\x7f]+", text):
        if len(run) > 1 or not (run in CP1252_SIGNS or "À" <= run <= "ÿ"):
            return None
    return text


def read_json(path: str | Path, cp1252: bool = False) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError, ValueError: as `read_text`, or it is no JSON.
    """
    return parse_json(read_text(path, cp1252), str(path))


def parse_json(text: str, name: str, **options: Any) -> Any:
    """The value of a JSON text; `name` stands in the error, for example `file, line 3`. `options` as for `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"{name} is no usable JSON: its lists and objects are nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and int's limit on digits
        raise ValueError(f"{name} is no JSON: {error}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The fields of a JSON file that must hold an object.

    Raises:
        FileNotFoundError, ValueError: as `read_json`, or it holds something else.
    """
    return as_object(read_json(path), str(path))


def as_object(value: Any, name: str) -> dict[str, Any]:
    """`value`, which must be a JSON object; ValueError begins with `name`."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a JSON object {{...}}, found {shown(value)}")
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file of JSON lines; blank lines are passed over.

    Raises:
        FileNotFoundError, ValueError: as `read_text`, or a line is no JSON; the message names file and line.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def shown(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it: its kind and its beginning.

    No more is made of it than is shown. `repr` of a small pickle, whose lists hold each other many times over, has no end, and
    that of deep lists is a RecursionError.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > limit:
            return f"{text[:limit]}... ({type(value).__name__})"
    return text


def _pieces(value: Any) -> Iterator[str]:
    """`repr` of a value from left to right."""
    kind = type(value)
    if kind in (list, tuple, dict):
        start, end = {list: "[]", tuple: "()", dict: "{}"}[kind]
        yield start
        for number, entry in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(entry)
            if kind is dict:
                yield ": "
                yield from _pieces(value[entry])
        yield f",{end}" if kind is tuple and len(value) == 1 else end
    elif kind is str:
        yield repr(value) if value.isprintable() else ascii(value)
    elif kind is int and value.bit_length() > 10_000:  # `repr` refuses more than 4300 digits
        yield f"a number of {value.bit_length()} bits"
    else:
        yield repr(value)


def some_of(texts: Sequence[str], most: int = 5, mark: str = "; ") -> str:
    """The first of many texts for a message, and how many more there are."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return mark.join([*texts[:most], *more])


def whole_number(value: Any, name: str, at_least: int = 1, at_most: int = 10**9) -> int:
    """An int of a JSON number without a fraction.

    Raises:
        ValueError: it is text, a truth value, a fraction, or out of range; the message begins with `name`.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not at_least <= value <= at_most or value != int(value):  # NaN fails the comparison
        raise ValueError(f"{name}: must be a whole number from {at_least} to {at_most}, found {shown(value)}")
    return int(value)


# ------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file opened beside `path` that takes its name when the block ends well; else nothing of it stays.

    Args:
        mode: `w` for text, in UTF-8 with line ends as written, or `wb`.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    # Half a surrogate pair, as a file name in an odd locale has, is written as \udcXX, which JSON reads back.
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    try:
        with partial.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def short_name(text: str, limit: int = 120) -> str:
    """A part of a file name of at most `limit` bytes; a longer text is cut and ends in a hash of the whole.

    Names of files have at most 255 bytes. A Chinese character takes 3 of them.
    """
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= limit:
        return text
    return f"{data[: limit - 9].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")
