"""What an evaluation has found so far, on disk: killed at any moment and started again, it goes on after the last whole image.

    log = PredictionLog(path, settings, rank)
    log.done                                     places of the images that an earlier run with the same settings has measured
    log.add(place, records)                      one line an image, written at once
    log.close(failed)                            the first process joins all lines into `path`, one line an expression
    records, about = read_finished(path)         what is joined, if it is still what was written

While it runs each process has a file `<path>.part<rank>`: the settings in its first line, then one line an image with a check
over its content and the settings, so that a line cut by a kill costs one image, and a line of another evaluation is noticed.
Another number of processes goes on from the same files. When all is joined, `<path>.settings.json` beside it says under which
settings, which images failed (what failed is tried at the next start), how many lines there are, and their hash.

Processes on several machines need one folder that all of them see. One evaluation at a time may write it
(`utils.outputs.OutputFolder.lock`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.files import as_object, parse_json, read_object, read_text, shown, whole_file, write_json
from utils.predictions import check_records, hash_of_lines, is_count, prediction_lines, read_records

Record = dict[str, Any]
AGAIN = "put the file back as it was, or measure again with --overwrite"


class PredictionLog:
    """The records of one data set. Every process makes one; `path` is the same for all."""

    def __init__(
        self, path: str | Path, settings: dict[str, Any], rank: int = 0, overwrite: bool = False,
        items: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Reads what is there, then opens this process's file.

        Args:
            path: the predictions file to be made.
            settings: JSON values that decide what an image's records are; two runs go together if theirs are equal.
            overwrite: what is there is thrown away, finished or not.
            items: names of the data set's items (`utils.content.item_names`). Those that have been measured must be as they
                were; others may have changed since, an image that was mended for one.

        Raises:
            ValueError: what is there is of other settings or items, or damaged; the message names what differs, or file and line.
        """
        self.path, self.rank = Path(path), rank
        self.settings = json.loads(json.dumps(settings))
        self._settings_name = _name_of(self.settings)
        self._items = items
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.path, settings_file(self.path), *self._parts()):
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise ValueError(f"{file} is a folder or a link, where predictions are to be written: move it away")
        found: dict[int, list[Record]] = {}
        self._replaces: dict[str, Any] | None = None
        if not overwrite:
            found = self._finished()
            self._add_parts(found)
        _barrier()  # nobody writes before all have read
        if rank == 0:
            for file in self._leftovers():
                file.unlink()
            for file in (self.path, settings_file(self.path), *self._parts()) if overwrite else ():
                file.unlink(missing_ok=True)
        _barrier()
        self.done = frozenset(found)
        self.taken_over = found if rank == 0 else {}
        """Records of those images, in the first process alone."""
        mine = self._part(rank)
        if mine.is_file():
            _cut_torn_line(mine)
        fresh = not mine.is_file()
        self._file = mine.open("a", encoding="utf-8")
        if fresh:
            self._write({"settings": self.settings})

    def add(self, image_index: int, records: Sequence[Record]) -> None:
        """The records of a whole image."""
        content = {"image_index": image_index, "item": self._item(image_index), "records": list(records)}
        self._write(content | {"check": _check_of(self._settings_name, **content)})

    def close(self, failed: Sequence[dict[str, Any]] = (), images_asked: int | None = None) -> None:
        """Joins the files of all processes into `path`, in the order of the data set; it appears only when whole.

        Args:
            failed: {"image_index", "error"} of images without records, of all processes; kept beside `path`.
            images_asked: images of the data set; unless given, up to the last one that is known.
        """
        self._file.close()
        _barrier()
        if self.rank == 0:
            found = dict(self.taken_over)
            self._add_parts(found)
            lines = [json.dumps(record) for _, group in sorted(found.items()) for record in group]
            if images_asked is None:
                images_asked = 1 + max([*found, *(entry["image_index"] for entry in failed)], default=-1)
            beside = {
                "settings": self.settings,
                "failed": list(failed),
                "images_asked": images_asked,
                "records": len(lines),
                "hash": hash_of_lines(lines),
                "without_questions": sorted(index for index, group in found.items() if not group),
                "items": {index: self._item(index) for index in sorted(found)},
                "replaces": self._replaces,
            }
            # Before the predictions: killed in between, it names those that are there as the ones to be replaced.
            write_json(settings_file(self.path), beside, indent=1)
            with whole_file(self.path) as file:
                file.writelines(f"{line}\n" for line in lines)
            for part in self._parts():
                part.unlink()
        _barrier()

    def abandon(self) -> None:
        """Leaves the files as they are, for the next start."""
        with contextlib.suppress(OSError):  # a full disk, which was told when the line was written
            self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the same command goes on", str(self._file.name)) from error

    def _finished(self) -> dict[int, list[Record]]:
        """{place: records} of `path`, if an evaluation finished."""
        about = read_settings(self.path)
        if about is None:
            if self.path.exists():
                raise ValueError(
                    f"{self.path} has no {settings_file(self.path).name} beside it that says how it was made: move it away, or "
                    "throw it away with --overwrite"
                )
            return {}
        check_settings(settings_file(self.path), about["settings"], self.settings)
        if "hash" not in about:
            raise ValueError(f"{settings_file(self.path)} is damaged: it does not say what was written; {AGAIN}")
        records, _, self._replaces = _read(self.path, resuming=True)
        found: dict[int, list[Record]] = {index: [] for index in about["without_questions"]}
        for record in records:
            found.setdefault(record["image_index"], []).append(record)
        for index in found:
            self._check_item(settings_file(self.path), index, about["items"].get(str(index)))
        return found

    def _item(self, index: int) -> str | None:
        return self._items[index] if self._items is not None and index < len(self._items) else None

    def _check_item(self, where: Path | str, index: int, before: str | None) -> None:
        """Refuses records of an item that has changed since: ValueError begins with `where`."""
        now = self._item(index)
        if None in (before, now) or before == now:
            return
        kinds = ("the annotations (its questions or true masks)", "the image file (its size or time of modification)")
        told = [kind for kind, a, b in zip(kinds, before.split(), now.split(), strict=False) if a != b]
        raise ValueError(
            f"{where} is of an evaluation of other data: choose another --out, or throw it away with --overwrite. Of "
            f"{_data_of(self.settings)}, image {index}, {' and '.join(told)} changed"
        )

    def _add_parts(self, found: dict[int, list[Record]]) -> None:
        """Adds to `found` what lies in the files of all processes."""
        place: dict[int, str] = {}
        for part in self._parts():
            for number, index, item, records in _read_part(part, self.settings, self._settings_name):
                where = f"{part}, line {number}"
                self._check_item(where, index, item)
                if index in place:
                    raise ValueError(f"{where}: image {index} is there twice (before in {place[index]}); {AGAIN}")
                if found.setdefault(index, records) != records:  # killed while it joined the files, they are equal
                    raise ValueError(f"{where}: image {index} is already in {self.path}, with other records; {AGAIN}")
                place[index] = where

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def _parts(self) -> list[Path]:
        return self._beside(r"\.part\d+")

    def _leftovers(self) -> list[Path]:
        """What a process that was killed had begun to write (`utils.files.whole_file`)."""
        return self._beside(r"(\.settings\.json)?\.\d+\.partial")

    def _beside(self, ending: str) -> list[Path]:
        pattern = re.compile(re.escape(self.path.name) + ending)
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))


# ------------------------------------------------------------------------------------------------ what is finished


def read_finished(path: str | Path) -> tuple[list[Record], dict[str, Any] | None]:
    """The records of a predictions file, and what stands beside it of how it was made (None if nothing does).

    Where that says what was written, every expression is there once, and the file is what it was.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no record, the file is not what was written, or what stands beside it is damaged.
    """
    return _read(Path(path))[:2]


def _read(path: Path, resuming: bool = False) -> tuple[list[Record], dict[str, Any] | None, dict[str, Any]]:
    """As `read_finished`, and number and hash of the lines.

    `resuming` takes a file that was to be replaced when its evaluation was killed.
    """
    lines = prediction_lines(path)
    about = read_settings(path)
    records = read_records(path, lines)
    wrote = {"records": len(records), "hash": hash_of_lines(text for _, text in lines)}
    if about is None or "hash" not in about:
        return records, about, wrote
    if wrote == about["replaces"] and wrote["hash"] != about["hash"]:
        if not resuming:
            raise ValueError(f"{path} is not finished: its evaluation was stopped; the same command goes on")
        return records, about, wrote
    if fault := _missing(records, lines, about):
        raise ValueError(f"{path}{fault}; {AGAIN}")
    if wrote["hash"] != about["hash"]:
        raise ValueError(f"{path} is not what its evaluation wrote: it was changed, or is of another one; {AGAIN}")
    return records, about, wrote


def _missing(records: list[Record], lines: list[tuple[int, str]], about: dict[str, Any]) -> str | None:
    """Which expression is missing, or too many; it stands behind the file's name."""
    without = {entry["image_index"] for entry in about["failed"]} | set(about["without_questions"])
    expected = dict.fromkeys((index for index in range(about["images_asked"]) if index not in without), 0)
    for (number, _), record in zip(lines, records, strict=True):
        index, question = record["image_index"], record["question_index"]
        if index not in expected:
            kind = "has no records in this evaluation" if index < about["images_asked"] else "is beyond the last image"
            return f", line {number}: image {index} {kind} ({about['images_asked']} images)"
        if question != expected[index]:
            return f", line {number}: image {index} lacks question {expected[index]}, or its lines are not in order"
        expected[index] += 1
    if missing := [index for index, count in expected.items() if not count]:
        return f": {len(missing)} image{'s' * (len(missing) > 1)} missing, the first one is image {missing[0]}"
    if len(records) != about["records"]:
        return f" has {len(records)} expressions, and its evaluation wrote {about['records']}"
    return None


def settings_file(path: Path) -> Path:
    """The file that says under which settings a predictions file was made."""
    return path.with_name(f"{path.name}.settings.json")


def _are_failures(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and is_count(entry.get("image_index")) and isinstance(entry.get("error"), str) for entry in value
    )


def _is_written(value: Any) -> bool:
    return isinstance(value, dict) and is_count(value.get("records")) and isinstance(value.get("hash"), str)


BESIDE: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "failed": _are_failures,
    "images_asked": is_count,
    "records": is_count,
    "hash": lambda value: isinstance(value, str),
    "without_questions": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "items": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "replaces": lambda value: value is None or _is_written(value),
}
"""What stands beside a finished predictions file. Older ones have the first two alone."""


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


SETTINGS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("dataset", "split", "protocol", "compat", "conv_type", "templates"), _is_text),
    **dict.fromkeys(("images_in_split", "limit"), lambda value: value is None or is_count(value)),
    "sasp": lambda value: value is None or isinstance(value, dict),
}
"""Settings that are read again, and what they may be."""


def read_settings(path: Path) -> dict[str, Any] | None:
    """{"settings", "failed", ...} of a finished predictions file; None if it is not there, or nothing says how it was made.

    Raises:
        ValueError: the file beside it is damaged.
    """
    beside = settings_file(path)
    if not (path.is_file() and beside.exists()):
        return None
    try:
        about = read_object(beside)
        known = BESIDE if "hash" in about else {name: BESIDE[name] for name in ("settings", "failed")}
        wrong = [name for name, is_right in known.items() if name not in about or not is_right(about[name])]
        wrong += [f"settings.{name}" for name in wrong_settings(about["settings"])] if not wrong else []
    except ValueError as error:
        raise ValueError(f"{beside} is damaged ({error}): --overwrite measures again") from None
    if wrong:
        raise ValueError(f"{beside} is damaged ({', '.join(wrong)}: missing, or not what it must be): --overwrite measures again")
    return about


def wrong_settings(settings: dict[str, Any]) -> list[str]:
    """Names of settings that are not what they may be."""
    return [name for name, is_right in SETTINGS.items() if not is_right(settings.get(name))]


# ------------------------------------------------------------------------------------------------ settings


IN_WORDS = {
    "checkpoint": "the weights changed",
    "processor": "the processor or the tokenizer changed",
    "config": "the config.json of the model changed",
}
"""Settings that are hashes, and what it means if they differ."""


def differing(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between two settings, in words; None if they are equal."""
    told = [
        IN_WORDS[name] if name in IN_WORDS and name in before else
        f"{name} {before.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]  # fmt: skip
    return ", ".join(told) or None


def check_settings(file: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuses what `file` holds if it was made under other settings: ValueError names what differs."""
    if told := differing(before, settings):
        raise ValueError(
            f"{file} is of an evaluation under other settings: choose another --out, or throw it away with --overwrite. "
            f"Settings that differ: {told}"
        )


def _data_of(settings: dict[str, Any]) -> str:
    return "|".join(str(settings[name]) for name in ("dataset", "split") if name in settings) or "the data set"


# ------------------------------------------------------------------------------------------------ files of the processes


def _barrier() -> None:
    from utils.distributed import barrier  # here, not above: who reads a finished file needs no torch

    barrier()


def _name_of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _check_of(settings_name: str, image_index: int, item: str | None, records: list[Record]) -> str:
    """A name for what a line says, and for the evaluation that says it."""
    return _name_of([settings_name, image_index, item, records])


def _read_part(
    part: Path, settings: dict[str, Any], settings_name: str
) -> Iterator[tuple[int, int, str | None, list[Record]]]:
    """(line, place, item, records) of one process's file; a last line without its end is passed over, and so is a file cut in
    its first line."""
    if part.stat().st_size == 0:
        return
    lines = read_text(part).split("\n")[:-1]  # what follows the last newline is a torn line
    for number, line in enumerate(lines, 1):
        where = f"{part}, line {number}"
        if number > 1 and not line.strip():
            continue
        try:
            entry = as_object(parse_json(line, where), where)
        except ValueError as error:
            raise ValueError(f"{where} is damaged ({error}): {AGAIN}") from None
        if number == 1:
            check_settings(part, as_object(entry.get("settings"), f"{where}, settings"), settings)
            continue
        index, item, records = entry.get("image_index"), entry.get("item"), entry.get("records")
        if not is_count(index) or not isinstance(records, list) or not _is_text(item):
            raise ValueError(f"{where}: must be {{'image_index': ..., 'records': [...]}}, found {shown(entry)}; {AGAIN}")
        check_records(records, [f"{where}, record {n}" for n in range(len(records))])
        places = [(record["image_index"], record["question_index"]) for record in records]
        in_order = places == [(index, n) for n in range(len(records))]
        if not in_order or entry.get("check") != _check_of(settings_name, index, item, records):
            raise ValueError(f"{where} is not what this evaluation wrote: it was changed, or is of another one; {AGAIN}")
        yield number, index, item, records


def _cut_torn_line(part: Path) -> None:
    """Takes away what follows the last newline, so that the next line starts on its own."""
    data = part.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == 0:
        part.unlink()  # not even its settings were written
    elif whole < len(data):
        with part.open("r+b") as file:
            file.truncate(whole)
