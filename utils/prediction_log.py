"""What an evaluation has found so far, on disk: killed at any moment and started again, it goes on after the last whole picture.

    log = PredictionLog(path, settings, rank)
    log.done                                     places of the pictures that an earlier run with the same settings has measured
    log.add(place, records)                      one line a picture, written at once
    log.close(failed)                            the first process joins all lines into `path`, one line an expression

While it runs each process has a file `<path>.part<rank>`: the settings in its first line, then one line a picture, so that
a line cut by a kill costs one picture. Another number of processes goes on from the same files. When all is joined,
`<path>.settings.json` beside it says under which settings, and which pictures failed: what failed is tried at the next start.

Processes on several machines need one folder that all of them see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class PredictionLog:
    """The records of one data set. Every process makes one; `path` is the same for all."""

    def __init__(self, path: str | Path, settings: dict[str, Any], rank: int = 0, overwrite: bool = False) -> None:
        """Reads what is there, then opens this process's file.

        Args:
            path: the predictions file to be made.
            settings: JSON values that decide what a picture's records are; two runs go together if theirs are equal.
            overwrite: what is there is thrown away, finished or not.

        Raises:
            ValueError: what is there is of other settings, or damaged; the message names what differs, or file and line.
        """
        self.path, self.rank = Path(path), rank
        self.settings = json.loads(json.dumps(settings))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[int, list[Record]] = {}
        if not overwrite:
            about = read_settings(self.path)
            if about is not None:
                _check(settings_file(self.path), about["settings"], self.settings)
                for _, record in _lines(self.path):
                    found.setdefault(record["image_index"], []).append(record)
            for part in self._parts():
                found.update(_read_part(part, self.settings))
        _barrier()  # nobody writes before all have read
        if overwrite and rank == 0:
            for file in (*self._parts(), settings_file(self.path), self.path):
                file.unlink(missing_ok=True)
        _barrier()
        self.done = frozenset(found)
        self.taken_over = found if rank == 0 else {}
        """Records of those pictures, in the first process alone."""
        mine = self._part(rank)
        if mine.is_file():
            _cut_torn_line(mine)
        fresh = not mine.is_file()
        self._file = mine.open("a")
        if fresh:
            self._write({"settings": self.settings})

    def add(self, image_index: int, records: Sequence[Record]) -> None:
        """The records of a whole picture."""
        self._write({"image_index": image_index, "records": list(records)})

    def close(self, failed: Sequence[dict[str, Any]] = (), **about: Any) -> None:
        """Joins the files of all processes into `path`, in the order of the data set; it appears only when whole.

        Args:
            failed: pictures without records, of all processes; kept beside `path` with what else is `about` the run.
        """
        self._file.close()
        _barrier()
        if self.rank == 0:
            found = dict(self.taken_over)
            parts = self._parts()
            for part in parts:
                found.update(_read_part(part, self.settings))
            records = (json.dumps(record) + "\n" for _, group in sorted(found.items()) for record in group)
            _replace(self.path, records)
            _replace(
                settings_file(self.path),
                [json.dumps({"settings": self.settings, "failed": list(failed), **about}, indent=1) + "\n"],
            )
            for part in parts:
                part.unlink()
        _barrier()

    def abandon(self) -> None:
        """Leaves the files as they are, for the next start."""
        self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(f"{self.path.name}.part*")
        return sorted(file for file in found if file.name.removeprefix(f"{self.path.name}.part").isdigit())


def settings_file(path: Path) -> Path:
    """The file that says under which settings a predictions file was made."""
    return path.with_name(f"{path.name}.settings.json")


def read_settings(path: Path) -> dict[str, Any] | None:
    """{"settings", "failed", ...} of a finished predictions file; None if it is not there, or nothing says how it was made.

    Raises:
        ValueError: the file beside it is damaged.
    """
    beside = settings_file(path)
    if not (path.is_file() and beside.is_file()):
        return None
    try:
        about = json.loads(beside.read_text())
        if isinstance(about["settings"], dict) and isinstance(about["failed"], list):
            return about
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{beside} is damaged: --overwrite measures again")


def _barrier() -> None:
    from utils.distributed import barrier  # here, not above: who reads a finished file needs no torch

    barrier()


def _replace(path: Path, lines: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.writelines(lines)
    partial.replace(path)


def _check(file: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    if before == settings:
        return
    told = ", ".join(
        f"{name} {before.get(name)!r} then, {settings.get(name)!r} now"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    )
    raise ValueError(
        f"{file} is of an evaluation under other settings: choose another --out, or throw it away with --overwrite. Settings "
        f"that differ: {told}"
    )


def _lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, content) of every line that was written whole."""
    found = []
    for number, line in enumerate(file.read_text("utf-8").split("\n")[:-1], 1):  # what follows the last newline is a torn line
        try:
            found.append((number, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged ({error}): --overwrite measures again") from error
    return found


def _read_part(part: Path, settings: dict[str, Any]) -> dict[int, list[Record]]:
    """{place: records} of one process's file; a last line without its end, or a file cut in its first, is passed over."""
    lines = _lines(part)
    if not lines:
        return {}
    _check(part, lines[0][1]["settings"], settings)
    return {entry["image_index"]: entry["records"] for _, entry in lines[1:]}


def _cut_torn_line(part: Path) -> None:
    """Takes away what follows the last newline, so that the next line starts on its own."""
    data = part.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == 0:
        part.unlink()  # not even its settings were written
    elif whole < len(data):
        with part.open("r+b") as file:
            file.truncate(whole)
