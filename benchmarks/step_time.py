"""Where the time of a training step goes, part by part, and what SasP and cached SAM features make of it.

    python benchmarks/step_time.py                                    READ-mini on this machine
    python benchmarks/step_time.py --cache_dir runs/sam_features      SAM features from disk as a third variant
    python benchmarks/step_time.py --preset read-7b-val --dataset_dir data      bf16, if there is a GPU

The model, its settings, what trains, and the batches are those of `train_read.py`; one process, without DeepSpeed: the
optimiser is torch's AdamW on the weights as they are (no fp32 copy), after clipping, once a forward pass. Its learning rate is
0, so that all variants see the same weights. Each batch goes through all variants, in turns of who is first. Seconds are
medians over the steps after warm-up, ratios the medians of the pairs. A GPU is waited for before and after each part, so a
step takes a little longer than in training. `data` is reading, preprocessing and collating in this process; the --workers of
a training run hide it behind the rest.

    SasP on     as the preset says
    SasP off    the [SEG] token alone prompts SAM; the similarity map is still made, since the output holds it
    SAM cached  SasP on, and features of all pictures on disk, as from the second epoch on
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dataset.types import Batch
    from model import READForCausalLM
    from utils.args import TrainArgs
    from utils.distributed import World

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.stopwatch import MODEL_PARTS, Stopwatch, hardware, watch_model  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

PARTS = ("data", *MODEL_PARTS, "losses, rest of forward", "backward", "optimiser", "total")
COMPARED = (("SasP on", "SasP off"), ("SAM cached", "SasP on"))
"""Variants and their baselines."""

Times = dict[str, float]


def build_parser() -> argparse.ArgumentParser:
    """The command line. What is not given is the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", help="of model/presets.py (default: mini)")
    parser.add_argument("--version", metavar="MODEL", help="base: folder or hub id")
    parser.add_argument("--vision_pretrained", metavar="SAM", help="SAM .pth file, for a base without SAM")
    parser.add_argument("--dataset_dir", help="data folder")
    parser.add_argument("--batch_size", type=int, help="pictures a forward pass")
    parser.add_argument("--questions", type=int, help="questions about a picture (num_classes_per_sample)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--steps", type=int, default=20, help="steps that count (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--cache_dir", type=Path, help="folder of SAM features: measures them too")
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    return parser


def measure(options: argparse.Namespace, args: TrainArgs, world: World) -> dict[str, list[Times]]:
    """Seconds of each part in every step after warm-up, by variant; the steps of all variants are of the same batches."""
    import torch

    from train_read import build_loader, build_model, open_data
    from utils import distributed
    from utils.cli import torch_dtype
    from utils.runlog import RunLog

    mixture, _ = open_data(args)
    distributed.seed_everything(args.seed)
    model, processor = build_model(args, world, RunLog(None))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(args.beta1, args.beta2), weight_decay=0.0)

    watch = Stopwatch(world.device)
    plain_encode = model.encode_sam_image
    watch_model(watch, model)
    on, off = (dataclasses.replace(model.config.sasp, enabled=enabled) for enabled in (True, False))
    variants = {"SasP on": (on, None), "SasP off": (off, None)}
    if options.cache_dir is not None:
        model.cache_sam_features(options.cache_dir)
        variants["SAM cached"] = (on, model.sam_cache)

    loader = iter(build_loader(args, mixture, processor, world))
    found: dict[str, list[Times]] = {name: [] for name in variants}
    for number in range(options.warmup + options.steps):
        with watch.part("data"):
            batch = next(loader).to(world.device, torch_dtype(args.precision))
        data = watch.take()["data"]
        names = list(variants)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            model.config.sasp, model.sam_cache = variants[name]
            if model.sam_cache is not None:
                plain_encode(batch.sam_images)  # puts them on disk, if this is their first time
            times = step(model, batch, optimizer, trained, watch)
            found[name].append({part: times[part] for part in PARTS} | {"data": data, "total": times["total"] + data})
        print(f"\rstep {number + 1} of {options.warmup + options.steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: steps[options.warmup :] for name, steps in found.items()}


def step(
    model: READForCausalLM, batch: Batch, optimizer: Any, trained: list[torch.nn.Parameter], watch: Stopwatch
) -> Times:
    """One training step on a batch that is on the device: its times without `data`."""
    import torch

    with watch.part("forward"):
        output = model(**batch.model_inputs())
    with watch.part("backward"):
        output.loss.backward()
    with watch.part("optimiser"):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    times = watch.take()
    times["losses, rest of forward"] = times.pop("forward") - sum(times[name] for name in MODEL_PARTS)
    times["total"] = sum(times.values())
    return times


def medians(found: dict[str, list[Times]]) -> dict[str, Times]:
    """Seconds of each part, by variant."""
    return {name: {part: statistics.median(t[part] for t in steps) for part in PARTS} for name, steps in found.items()}


def ratios(found: dict[str, list[Times]]) -> dict[str, Times]:
    """Time of each part as a multiple of the baseline's on the same batch, where the baseline has any."""
    return {
        f"{name} / {base}": {
            part: statistics.median(t[part] / b[part] for t, b in zip(found[name], found[base], strict=True))
            for part in PARTS
            if part != "SasP" and all(b[part] > 0 for b in found[base])  # with SasP off there is nothing to compare with
        }
        for name, base in COMPARED
        if name in found
    }


def table(variants: dict[str, Times], compared: dict[str, Times]) -> str:
    """A row a part: seconds and share of the step of each variant, then the ratios."""
    lines = [
        f"{'':<24}" + "".join(f"{name:>12}{'share':>8}" for name in variants) + "".join(f"{name:>24}" for name in compared)
    ]
    for part in PARTS:
        cells = "".join(f"{t[part]:>10.4f} s{100 * t[part] / t['total']:>6.1f} %" for t in variants.values())
        cells += "".join(f"{r[part]:>24.2f}" if part in r else f"{'-':>24}" for r in compared.values())
        lines.append(f"{part:<24}{cells}")
    return "\n".join(lines)


@plain_errors("step_time")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    import torch

    from model import get_preset
    from utils import distributed
    from utils.args import TrainArgs
    from utils.runlog import package_versions

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    world = distributed.start(engine=False)
    names = ("preset", "version", "vision_pretrained", "dataset_dir", "batch_size")
    given = {name: getattr(options, name) for name in names} | {"num_classes_per_sample": options.questions}
    given = {name: value for name, value in given.items() if value is not None} | {
        "precision": options.precision or ("bf16" if world.device.type == "cuda" else "fp32"),
        "workers": 0,
        "no_eval": True,
        "steps_per_epoch": options.warmup + options.steps,
    }
    if options.steps < 1 or options.warmup < 0:
        raise ValueError(f"--steps must be 1 or more and --warmup 0 or more, found {options.steps}, {options.warmup}")
    args = TrainArgs.resolve(given, get_preset(options.preset))
    machine = hardware(world.device)
    found = measure(options, args, world)
    seconds, compared = medians(found), ratios(found)
    kept = ("preset", "version", "dataset_dir", "precision", "batch_size", "num_classes_per_sample", "gradient_checkpointing",
            "lora_r", "seed")  # fmt: skip
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/step_time.py", *(sys.argv[1:] if argv is None else argv)]),
        "hardware": machine,
        "versions": {"python": platform.python_version(), **package_versions()},
        "settings": {name: getattr(args, name) for name in kept},
        "steps": options.steps,
        "warmup": options.warmup,
        "seconds": {name: {part: round(t, 5) for part, t in times.items()} for name, times in seconds.items()},
        "ratios": {name: {part: round(r, 3) for part, r in parts.items()} for name, parts in compared.items()},
    }
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    print(f"{settings}; {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, load {machine['load']}")
    print(table(seconds, compared))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
