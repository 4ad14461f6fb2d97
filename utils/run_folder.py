"""The folder of a training run: who may start in it, what it holds before the first step, and its best checkpoint.

train_read.py says which files a run has.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.args import CONFIG_NAME, FIXED, TrainArgs
from utils.files import read_object, shown, whole_number, write_json, write_text
from utils.outputs import MARKER, OutputFolder, remove

if TYPE_CHECKING:
    from model import READForCausalLM
    from utils.distributed import World

STALE = ("log.jsonl", "skipped.jsonl", "events.out.tfevents.*", "best.json")
"""What a run that ended before its first checkpoint left, and its successor would add to."""


def source_of(args: TrainArgs) -> Path | None:
    """The run that is continued: --resume's, or with --auto_resume this one if it has a checkpoint; None for a new run."""
    from utils.engine import has_checkpoint

    if args.resume:
        return Path(args.resume)
    return args.run_dir if args.auto_resume and has_checkpoint(args.run_dir / "ckpt_model") else None


def output(args: TrainArgs) -> OutputFolder:
    """The run's folder, with all paths that the run reads."""
    places = args.places()
    if args.resume and Path(args.resume).resolve() == args.run_dir.resolve():
        del places["--resume"]
    return OutputFolder(args.run_dir, "train", places)


def check(args: TrainArgs) -> None:
    """Refuses to destroy what is no run, to mix two runs in one folder, and to continue with another model or another base.

    Raises:
        OSError, ValueError: the message says why not.
    """
    from model.checkpoint import check_base
    from utils.engine import has_checkpoint

    found = has_checkpoint(args.run_dir / "ckpt_model")
    source = source_of(args)
    continued = args.auto_resume or (source is not None and source.resolve() == args.run_dir.resolve())
    if continued and args.overwrite:
        raise ValueError(f"--overwrite would delete {args.run_dir}, which is to be continued: give one of the two")
    if not (continued and found and _looks_like_a_run(args.run_dir)):
        output(args).check(overwrite=True)
        if found and not args.overwrite:
            raise FileExistsError(
                f"{args.run_dir} holds an earlier run: continue it with --auto_resume, delete it with --overwrite, "
                "or give this one another --exp_name"
            )
    if source is not None:
        changed = {name: pair for name, pair in args.changes(TrainArgs.load(source)).items() if name in FIXED}
        if changed:
            raise ValueError(f"the checkpoint of {source} does not fit these settings:\n" + "\n".join(told(changed)))
        check_base(source, args)


def _looks_like_a_run(folder: Path) -> bool:
    """True of a run's folder, also of one from before there were markers."""
    if (folder / MARKER).exists():
        return OutputFolder(folder, "train").is_own()
    try:
        return isinstance(read_object(folder / CONFIG_NAME).get("train"), dict)
    except (OSError, ValueError):
        return False


def told(changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """Differences, one a line."""
    return [f"--{name} was {was!r}, is {now!r}" for name, (was, now) in changed.items()]


def check_changes(args: TrainArgs, data: dict[str, str]) -> dict[str, Any]:
    """What differs from the run that is continued: flags that decide the numbers (`flags`) and names of sets (`data`).

    Args:
        data: digest of each training set, of `dataset.fingerprint`.

    Raises:
        ValueError: something does, and --resume_with_changes is not given.
    """
    source = source_of(args)
    if source is None:
        return {}
    flags = args.changes(TrainArgs.load(source))
    before = read_object(source / CONFIG_NAME).get("data")
    before = before if isinstance(before, dict) else {}  # a run from before it was recorded
    sets = [name for name, digest in data.items() if before.get(name, digest) != digest]
    if not (flags or sets):
        return {}
    if not args.resume_with_changes:
        lines = told(flags)
        if sets:
            lines.append(f"the data of {', '.join(sets)} changed since (annotations count by content, images by size and time)")
        raise ValueError(
            f"{source} would go on as another run than it was:\n" + "\n".join(lines) + "\ngive what it had, or record "
            "the changes and go on with --resume_with_changes"
        )
    return {"flags": {name: list(pair) for name, pair in flags.items()}, "data": sets}


@contextlib.contextmanager
def hold(args: TrainArgs) -> Iterator[None]:
    """Keeps every other training out of the run's folder, as long as this process lives.

    Raises:
        OSError: another one is in it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(output(args).lock())
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(
                f"the run's folder {args.run_dir} cannot be written ({error.strerror or error}): choose another --log_base_dir "
                "or --exp_name"
            ) from error
        check(args)  # once more: another run may have ended here in the meantime
        yield


def prepare(args: TrainArgs, world: World) -> None:
    """The run's folder; a run that is not continued leaves nothing behind."""
    from utils import distributed
    from utils.engine import has_checkpoint

    if world.is_main:
        folder = output(args)
        if args.overwrite:
            folder.clear()
        if not has_checkpoint(args.run_dir / "ckpt_model"):
            for stale in [file for name in STALE for file in args.run_dir.glob(name)]:
                remove(stale)
        folder.mark()
    distributed.barrier()


def write_settings(args: TrainArgs, model: READForCausalLM, world: World, step: int, record: dict[str, Any]) -> None:
    """config.json and trainable.txt of a run that can start; one that cannot be resumed keeps those it had.

    Args:
        record: of the main process: `data`, a digest of each training set, and `changed`, of `check_changes`, which is kept with
            the step from which on it holds.
    """
    from model.checkpoint import fingerprint
    from model.lora import trainable_report
    from utils.runlog import package_versions

    if world.is_main:
        source = source_of(args)
        changes = read_object(source / CONFIG_NAME).get("changes", []) if source is not None else []
        if record["changed"]:
            changes = [*changes, {"after_step": step, **record["changed"]}]
        base = fingerprint(args.version, args.vision_tower, args.vision_pretrained)  # merging refuses another
        beside = {"command": sys.argv, "world_size": world.size, "versions": package_versions(), "base": base}
        args.save(args.run_dir / CONFIG_NAME, **beside, data=record["data"], **({"changes": changes} if changes else {}))
        write_text(args.run_dir / "trainable.txt", trainable_report(model) + "\n")


def read_best(run: Path) -> dict[str, Any] | None:
    """The record of the best checkpoint so far.

    Raises:
        ValueError: the file is damaged.
    """
    file = run / "best.json"
    if not file.is_file():
        return None
    record = read_object(file)
    ciou = record.get("ciou")
    if not isinstance(record.get("tag"), str) or not (ciou is None or type(ciou) in (int, float)):
        raise ValueError(f"{file} must hold the tag of a checkpoint, and as ciou a number or null, found {shown(record)}: "
                         "delete it, then go on")  # fmt: skip
    whole_number(record.get("measured_step", 0), f"{file}: measured_step", at_least=0)
    return record


def write_best(run: Path, record: dict[str, Any]) -> None:
    """Replaces the record of the best checkpoint."""
    write_json(run / "best.json", record)
