"""The folder of a training run: who may start in it, what it holds before the first step, and its best checkpoint.

train_read.py says which files a run has.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.args import CONFIG_NAME, TrainArgs

if TYPE_CHECKING:
    from model import READForCausalLM
    from utils.distributed import World


def check(args: TrainArgs) -> None:
    """Refuses to mix two runs in one folder, and to continue with a model of another shape or onto another base."""
    from model.checkpoint import check_base
    from utils.engine import has_checkpoint

    if args.eval_only:
        return
    found = has_checkpoint(args.run_dir / "ckpt_model")
    source = Path(args.resume) if args.resume else args.run_dir
    continued = args.auto_resume or (args.resume is not None and source.resolve() == args.run_dir.resolve())
    if found and not (args.overwrite or continued):
        raise FileExistsError(
            f"{args.run_dir} holds an earlier run: continue it with --auto_resume, delete it with --overwrite, "
            "or give this one another --exp_name"
        )
    if continued and args.overwrite:
        raise ValueError(f"--overwrite would delete {args.run_dir}, which is to be continued: give one of the two")
    if args.overwrite:
        run, kept = args.run_dir.resolve(), (args.version, args.vision_tower, args.vision_pretrained)
        inside = [path for path in kept if path and Path(path).resolve().is_relative_to(run)]
        if inside or Path(args.log_base_dir).resolve().is_relative_to(run):
            raise ValueError(
                f"--overwrite would delete {run}, and with it {inside[0] if inside else 'other runs'}: choose another --exp_name"
            )
    if args.resume or (args.auto_resume and found):
        before = TrainArgs.load(source)
        names = (
            "version", "vision_tower", "vision_pretrained", "precision", "load_in_4bit", "load_in_8bit", "zero_stage",
            "lora_r", "lora_alpha",
            "lora_target_modules", "train_mask_decoder",
        )  # fmt: skip
        changed = [
            f"--{name} was {getattr(before, name)!r}, is {getattr(args, name)!r}"
            for name in names
            if getattr(before, name) != getattr(args, name)
        ]
        if changed:
            raise ValueError(f"the checkpoint of {source} does not fit these settings:\n" + "\n".join(changed))
        check_base(source, args)


def prepare(args: TrainArgs, world: World) -> None:
    """The run's folder; a run that is not continued leaves nothing behind."""
    from utils import distributed
    from utils.engine import has_checkpoint

    run = args.run_dir
    distributed.barrier()  # all ranks have looked at the folder before the first one changes it
    if world.is_main:
        if args.overwrite and run.exists():
            shutil.rmtree(run)
        if not has_checkpoint(run / "ckpt_model"):
            for stale in [*run.glob("log.jsonl"), *run.glob("events.*"), *run.glob("best.json")]:
                stale.unlink()  # of a run that ended before its first checkpoint
        run.mkdir(parents=True, exist_ok=True)
    distributed.barrier()


def write_settings(args: TrainArgs, model: READForCausalLM, world: World) -> None:
    """config.json and trainable.txt of a run that can start; one that cannot be resumed keeps those it had."""
    from model.checkpoint import fingerprint
    from model.lora import trainable_report
    from utils.runlog import package_versions

    if world.is_main:
        base = fingerprint(args.version, args.vision_tower, args.vision_pretrained)  # merging refuses another
        beside = {"command": sys.argv, "world_size": world.size, "versions": package_versions(), "base": base}
        args.save(args.run_dir / CONFIG_NAME, **beside)
        (args.run_dir / "trainable.txt").write_text(trainable_report(model) + "\n")


def read_best(run: Path) -> dict[str, Any] | None:
    """The record of the best checkpoint so far."""
    file = run / "best.json"
    return json.loads(file.read_text()) if file.is_file() else None


def write_best(run: Path, record: dict[str, Any]) -> None:
    """Replaces the record of the best checkpoint."""
    partial = run / "best.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(run / "best.json")
