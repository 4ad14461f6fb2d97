"""`python -m dataset.mini --out data/mini` writes READ-mini's data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.cli import plain_errors
from utils.files import read_object, whole_number, write_json
from utils.outputs import NotOursError, OutputFolder, remove

from .write import write_all

RECORD, PARTIAL = ".read-mini.json", ".read-mini.partial"
"""In the data folder: how it was made and which files were written, and a new data set before it takes its place."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dataset.mini", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/mini"), help="data folder, as --dataset_dir takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=600, help="training images of a referring set; others have a share of it")
    parser.add_argument("--val", type=int, default=80, help="images of val")
    parser.add_argument("--test", type=int, default=60, help="images of test (testA and testB: half each)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes, and says how much."""
    options = build_parser().parse_args(argv)
    with plain_errors("dataset.mini"):
        counts = {name: whole_number(getattr(options, name), f"--{name}", at_most=10**6) for name in ("train", "val", "test")}
        counts["seed"] = whole_number(options.seed, "--seed", at_least=0)
        files = replace(options.out, counts)
        images = sum(name.endswith(".jpg") for name in files)
        size = sum((options.out / name).stat().st_size for name in files) / 1e6
        print(
            f"wrote {options.out}: {images} images, {size:.0f} MB "
            "(ReasonSeg, RefCOCO, FP-RefCOCO, LLaVA-Instruct, semantic sets, own data)"
        )
    return 0


def replace(out: Path, counts: dict[str, int]) -> list[str]:
    """Writes the data sets into a folder that is new, empty, or holds earlier ones, which they replace.

    They are written aside first. Then every file takes its place in one move, and files of the earlier data sets that are not
    among the new ones are deleted. Files that somebody else put there stay.

    Args:
        counts: the arguments of `write_all`.

    Returns:
        The files written, relative to `out`.

    Raises:
        NotOursError: the folder holds something else, or there is something else where a file belongs.
    """
    folder, record, partial = OutputFolder(out, "mini"), out / RECORD, out / PARTIAL
    if not folder.is_own() and (out / "reason_seg/ReasonSeg/val/mini_val_0000.json").is_file():
        raise NotOursError(f"{out} holds data of READ-mini without the mark of this command, as older versions wrote it: "
                           "delete it yourself, or choose another --out")  # fmt: skip
    folder.check(overwrite=True)
    folder.mark()
    with folder.lock():
        before = earlier_files(record)
        if partial.is_dir():  # of a call that was killed
            remove(partial)
        try:
            write_all(partial, **counts)
            files = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
            check_places(out, files, before)
            # First both lists: whenever this is killed, the record names every file that is ours.
            write_json(record, counts | {"files": sorted({*files, *before})}, indent=None)
            for name in files:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).replace(out / name)
            for name in before - set(files):
                (out / name).unlink(missing_ok=True)
            write_json(record, counts | {"files": files}, indent=None)
        finally:
            if partial.is_dir():
                remove(partial)
    return files


def earlier_files(record: Path) -> set[str]:
    """The files that an earlier call wrote, relative to the data folder.

    Raises:
        ValueError: the record is damaged.
    """
    if not record.is_file():
        return set()
    files = read_object(record).get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) and is_inside(name) for name in files):
        raise ValueError(f"{record}, field files: must list paths inside this folder: delete the folder, then try again")
    return set(files)


def is_inside(name: str) -> bool:
    """True for a relative path that does not climb."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def check_places(out: Path, files: list[str], before: set[str]) -> None:
    """Refuses to write or delete through a link to another folder, and to overwrite a file that was not written here.

    Raises:
        NotOursError: with the path.
    """
    for parent in sorted({parent for name in {*files, *before} for parent in Path(name).parents}):
        if (out / parent).is_symlink() and parent != Path():
            raise NotOursError(f"{out / parent} is a link to another folder, in which nothing is written: delete the link")
    for name in files:
        if (out / name).exists() and name not in before:
            raise NotOursError(f"{out / name} was not written by this command: move it, or choose another --out")


if __name__ == "__main__":
    sys.exit(main())
