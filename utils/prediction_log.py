"""What an evaluation has found so far, on disk: killed at any moment and started again, it goes on after the last whole picture.

    log = PredictionLog(path, settings, rank)
    log.done                                     {picture's place: its records} of a run that was stopped, with the same settings
    log.add(place, records)                      one line a picture, written at once
    log.close()                                  the first process joins all lines into `path`, one line an expression

While it runs each process has a file `<path>.part<rank>`: the settings in its first line, then one line a picture, so that
a line cut by a kill costs one picture. Another number of processes goes on from the same files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.distributed import barrier

Record = dict[str, Any]


class PredictionLog:
    """The records of one data set. Every process makes one; `path` is the same for all."""

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        rank: int = 0,
        *,
        known: Sequence[Record] = (),
        overwrite: bool = False,
    ) -> None:
        """Reads what is there, then opens this process's file.

        Args:
            path: the predictions file to be made.
            settings: JSON values that decide what a picture's records are; two runs go together if theirs are equal.
            known: records of a finished run with the same settings, in which pictures had failed.
            overwrite: what an unfinished run left is thrown away.

        Raises:
            ValueError: `path` has an unfinished run of other settings beside it; the message names what differs.
        """
        self.path, self.rank = Path(path), rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))
        parts = [] if overwrite else self._parts()
        self.done: dict[int, list[Record]] = {}
        for record in known:
            self.done.setdefault(record["image_index"], []).append(record)
        before = dict(self.done)
        for part in parts:
            self.done.update(_read_part(part, settings))
        barrier()  # nobody writes before all have read
        if overwrite and rank == 0:
            for part in self._parts():
                part.unlink()
        barrier()
        mine = self._part(rank)
        if mine.is_file():
            _cut_torn_line(mine)
        fresh = not mine.is_file()
        self._file = mine.open("a")
        if fresh:
            self._write({"settings": settings})
        if rank == 0:
            for image_index, records in before.items():
                self.add(image_index, records)

    def add(self, image_index: int, records: Sequence[Record]) -> None:
        """The records of a whole picture."""
        self._write({"image_index": image_index, "records": list(records)})

    def close(self) -> None:
        """Joins the files of all processes into `path`, in the order of the data set; `path` appears only when whole."""
        self._file.close()
        barrier()
        if self.rank == 0:
            found: dict[int, list[Record]] = {}
            parts = self._parts()
            for part in parts:
                found.update(_read_part(part, None))
            partial = self.path.with_name(self.path.name + ".partial")
            with partial.open("w") as file:
                for _, records in sorted(found.items()):
                    file.writelines(json.dumps(record) + "\n" for record in records)
            partial.replace(self.path)
            for part in parts:
                part.unlink()
        barrier()

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


def _read_part(part: Path, settings: dict[str, Any] | None) -> dict[int, list[Record]]:
    """{place: records} of one process's file; a last line without its end, or a file cut in its first, is passed over."""
    lines = part.read_text().split("\n")[:-1]  # what follows the last newline was not written whole
    if not lines:
        return {}
    before = json.loads(lines[0])["settings"]
    if settings is not None and before != settings:
        told = ", ".join(
            f"{name} {before.get(name)!r} then, {settings.get(name)!r} now"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        )
        raise ValueError(
            f"{part} is of an unfinished evaluation under other settings: finish it as it was begun, choose another --out, or "
            f"throw it away with --overwrite. Settings that differ: {told}"
        )
    return {entry["image_index"]: entry["records"] for entry in map(json.loads, lines[1:])}


def _cut_torn_line(part: Path) -> None:
    """Takes away what follows the last newline, so that the next line starts on its own."""
    data = part.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == 0:
        part.unlink()  # not even its settings were written
    elif whole < len(data):
        with part.open("r+b") as file:
            file.truncate(whole)
