"""What a command may replace or delete: only what it wrote itself. One place for all commands.

    folder = OutputFolder(out, "merge", inputs={"--version": base, "RUN": run})
    folder.check(overwrite)           before anything is computed: refuses what is not this command's, and inputs
    folder.clear()                    deletes this command's own files, and nothing else
    folder.mark()                     from now on the folder is this command's
    with folder.lock(): ...           one writer at a time
    with folder.replacement() as new: ...      a folder built beside, which takes the old one's place when it is whole
    check_file(path, "--out")         the same for a single image

A folder belongs to a command if it holds the marker `.read-output.json` with the command's name. Within it, own files are those
that `OWN_FILES` lists. A file of the user in such a folder stays where it is.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from utils.files import read_object, write_json

MARKER = ".read-output.json"
LOCK, HOLDER = ".read-lock", ".read-lock.json"
WORKERS_END_S = 20
FILE_MARK = "READ made this file and may replace it"
"""In the metadata of single images that commands write."""

OWN_FILES: dict[str, tuple[str, ...]] = {
    "train": (
        r"config\.json", r"trainable\.txt", r"log\.jsonl", r"events\.out\.tfevents\..*", r"best\.json", r"skipped\.jsonl",
        r"wandb(_id)?", r"curves\.png", r"ckpt_model/step\d+", r"ckpt_model/step\d+\.partial", r"ckpt_model/latest",
        r"ckpt_model/zero_to_\w+\.py",  # DeepSpeed puts it there
    ),
    "merge": (
        r"config\.json", r"generation_config\.json", r"model(-\d+-of-\d+)?\.safetensors", r"model\.safetensors\.index\.json",
        r"adapter_(config\.json|model\.safetensors)", r"tokenizer\.model", r"added_tokens\.json", r"tokenizer_config\.json",
        r"preprocessor_config\.json", r"read_processor\.json", r"merged_from\.json", r"README\.md", r"\.read-fingerprint\.json",
    ),
    "evaluate": (
        r"results\.json", r"compare\.html", r"predictions_.*\.jsonl(\.part\d+|\.settings\.json)?",
    ),
    "mini": (r"\.read-mini\.json", r"\.read-mini\.partial"),  # the former lists the files, see `dataset.mini`
    "analysis": (
        r"index\.html", r"analysis\.json", r"(expressions|summary|thresholds|layers|sweep)\.csv",
        r"(thresholds|link|layers|sweep)(_[\w-]+-[\w-]+)?\.png",
        r"pictures/(thresholds|link|layers|sweep)(_[\w-]+-[\w-]+)?_dark\.png",
        r"pictures/[\w-]+_\d{5,}_\d{2,}(_\d+)?_[a-z]+\.jpg",
    ),
}  # fmt: skip
"""Patterns of the paths, relative to the folder, that a command writes: files, or folders that are wholly its own."""


class NotOursError(ValueError):
    """Something that a command would have to delete or overwrite and did not write."""


@dataclass
class OutputFolder:
    """The folder that one command writes."""

    path: Path
    command: str
    """A key of `OWN_FILES`."""
    inputs: Mapping[str, str | Path | None] = field(default_factory=dict)
    """Flag -> path that this call reads; what is a Hub id or None is passed over."""

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    # ---- before anything is computed

    def is_own(self) -> bool:
        """True if this command made the folder."""
        try:
            return read_object(self.path / MARKER).get("made_by") == self.command
        except (OSError, ValueError):
            return False

    def check(self, overwrite: bool) -> None:
        """Refuses a place where this command would destroy something.

        Args:
            overwrite: results of this command may be replaced.

        Raises:
            NotOursError: the folder, or what it is in the way of, is not this command's; or it holds an input.
            FileExistsError: it is this command's, and is not to be overwritten.
            NotADirectoryError: a file has this name.
        """
        self.check_inputs()
        if self.path.is_symlink() and not self.path.exists():
            raise NotOursError(f"{self.path} is a link to {os.readlink(self.path)}, which does not exist: choose another folder")
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file: choose a folder for the output")
        if in_the_way := next((parent for parent in self.path.parents if parent.exists() and not parent.is_dir()), None):
            raise NotADirectoryError(f"{in_the_way} is a file, so that {self.path} cannot be made: choose another folder")
        if not self.path.is_dir() or not _entries(self.path):
            return
        if not self.is_own():
            told = ", ".join(sorted(_entries(self.path))[:3])
            raise NotOursError(
                f"{self.path} holds something that this command did not write ({told}): choose another folder, or empty it "
                "yourself"
            )
        if not overwrite:
            raise FileExistsError(f"{self.path} holds an earlier result: choose another folder, or replace it with --overwrite")

    def check_inputs(self) -> None:
        """Refuses a folder that is an input of this call, or holds one.

        Raises:
            NotOursError: with the flag.
        """
        own = self.path.resolve()
        for flag, given in self.inputs.items():
            if given is None or not os.path.exists(os.path.expanduser(given)):  # nor ~ of an unknown user
                continue
            source = Path(os.path.expanduser(given)).resolve()
            if source == own or source.is_relative_to(own):
                raise NotOursError(f"{self.path} is or holds {given}, which {flag} reads: choose another folder for the output")

    # ---- changing it

    def mark(self) -> None:
        """Makes the folder, with the marker of this command."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.is_own():
            write_json(self.path / MARKER, self._marker())

    def owns(self, name: str) -> bool:
        """True if this command writes a file or folder of that name, a path relative to the folder."""
        return any(re.fullmatch(pattern, name) for pattern in OWN_FILES[self.command])

    def own_entries(self) -> list[Path]:
        """The files and folders in it that this command writes; links are entries themselves and are never followed."""
        depth = 1 + max(pattern.count("/") for pattern in OWN_FILES[self.command])
        found: list[Path] = []

        def look(folder: Path, level: int) -> None:
            for entry in sorted(folder.iterdir()):
                if self.owns(entry.relative_to(self.path).as_posix()):
                    found.append(entry)
                elif level < depth and entry.is_dir() and not entry.is_symlink():
                    look(entry, level + 1)

        if self.path.is_dir():
            look(self.path, 1)
        return found

    def clear(self) -> None:
        """Deletes this command's files; whatever else lies there stays.

        Raises:
            NotOursError: the folder is not this command's.
        """
        if not self.path.is_dir() or not _entries(self.path):
            return
        if not self.is_own():
            raise NotOursError(f"{self.path} was not written by this command, so nothing in it is deleted")
        for entry in self.own_entries():
            remove(entry)

    @contextlib.contextmanager
    def replacement(self) -> Iterator[Path]:
        """A new empty folder beside this one, which becomes it when the block ends well; else it is deleted.

        What else lies in the old folder moves into the new one.
        """
        target = Path(os.path.realpath(self.path))  # a link stays a link
        if os.path.ismount(target):  # known before hours of work, not after
            raise OSError(f"{self.path} is where a file system is mounted, so that no other folder can take its place: choose "
                          "a new folder in it")  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        new, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("partial", "old"))
        new.mkdir()
        try:
            yield new
            write_json(new / MARKER, self._marker())
            if target.is_dir():
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if old.is_dir():
                    old.rename(target)
                raise
        finally:
            if new.exists():
                shutil.rmtree(new)
        if old.is_dir():  # from here on nothing can be lost: what cannot be moved or deleted stays in `old`
            OutputFolder(old, self.command).clear()
            for name in (MARKER, LOCK, HOLDER):
                (old / name).unlink(missing_ok=True)
            _move_into(old, target)

    def _marker(self) -> dict[str, str]:
        return {"made_by": self.command, "note": "READ replaces only folders that it made itself; this file says so."}

    # ---- one writer

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock ends with the process, however it ends.

        Raises:
            BlockingIOError: another process holds it; the message says which.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            # Workers of a process that was killed hold its lock for some seconds, until they notice.
            lock.acquire(timeout=0 if self._holder_lives() else WORKERS_END_S)
        except Timeout:
            raise BlockingIOError(f"{self.path} is being written by another process ({self._holder()}): wait for it, or choose "
                                  "another folder") from None  # fmt: skip
        try:
            write_json(self.path / HOLDER, {
                "pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv),
                "since": datetime.datetime.now().isoformat(timespec="seconds"),
            })  # fmt: skip
            yield
        finally:
            (self.path / HOLDER).unlink(missing_ok=True)
            lock.release()
            # The lock file itself stays: deleting it would let a third process lock another file of that name.

    def _holder_lives(self) -> bool:
        """False if the lock's holder is known to be a process of this machine that has ended."""
        try:
            record = read_object(self.path / HOLDER)
            if record["host"] != socket.gethostname():
                return True
            os.kill(record["pid"], 0)
        except ProcessLookupError:
            return False
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            pass
        return True

    def _holder(self) -> str:
        try:
            record = read_object(self.path / HOLDER)
            return f"process {record['pid']} on {record['host']} since {record['since']}: {record['command']}"
        except (OSError, ValueError, KeyError):
            return "it does not say which"


def _entries(folder: Path) -> list[str]:
    """What lies in a folder beside our lock."""
    return [entry.name for entry in folder.iterdir() if entry.name not in (LOCK, HOLDER)]


def _move_into(old: Path, new: Path) -> None:
    """Moves what lies in one folder into another, which keeps its own files, and deletes the emptied folder.

    Raises:
        FileExistsError: both have a file of one name; that of `old` stays where it is.
    """
    for entry in list(old.iterdir()):
        place = new / entry.name
        if not os.path.lexists(place):
            entry.rename(place)
        elif entry.is_dir() and place.is_dir() and not entry.is_symlink() and not place.is_symlink():
            _move_into(entry, place)
        else:
            raise FileExistsError(f"{entry} could not be moved to {place}, which exists: it was kept")
    old.rmdir()


def check_file(path: Path, flag: str, mark: str = FILE_MARK) -> None:
    """Refuses to overwrite a file that lacks our mark; PNG, PDF and SVG files can carry the default.

    Raises:
        NotOursError, IsADirectoryError: with the flag that names the file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: {flag} takes the name of a file")
    if os.path.lexists(path) and not (path.is_file() and mark.encode() in path.read_bytes()):
        raise NotOursError(f"{path} exists and was not made by this command: move it, or give {flag} another name")


def check_writable(folder: Path, flag: str) -> None:
    """Makes a folder, and a file in it for a moment, to know before anything is computed that results can be written there.

    Raises:
        OSError: beginning with the flag that names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(f"{flag} {folder} is no folder: choose another name") from None
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be written: {error.strerror or error}") from None


def remove(entry: Path) -> None:
    """Deletes a file, a link (not what it points to) or a folder."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
