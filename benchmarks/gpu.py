"""All rows that want a GPU, one after another, into `benchmarks/results`; some three minutes on an H200.

    python benchmarks/gpu.py                        everything
    python benchmarks/gpu.py --only sam training    some of it
    python benchmarks/table.py --write              the tables from what was found

Each benchmark is a process of its own, so that none holds memory while another runs, and all are forked from this one, which
imports what they need once. One that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import plain_errors  # noqa: E402

ROWS = {
    "evaluation": ("evaluation", "evaluation_7b_gpu", "--size 7b --images 5 --warmup 3 --original_expressions 2"),
    "training": ("training_step", "training_step_7b_gpu", "--size 7b --steps 4"),
    "sasp": ("sasp", "sasp_gpu", ""),
    "sam": ("sam_encoder", "sam_encoder_vit_h_gpu", "--size vit_h --compile --repeats 5 --warmup 2"),
    "loading": ("loading", "loading_7b_gpu", "--device cuda --layouts safetensors --ways ours"),
}
"""Name -> (benchmark, its result, its arguments)."""
IMPORTS = ("torch", "transformers.models.llava.modeling_llava", "transformers.models.clip.modeling_clip", "model", "dataset")
"""What takes long to import and touches no GPU yet: a process that has, cannot be forked."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    return parser


def forked(function: Callable, *args: Any) -> bool:
    """True if a function ends well in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode == 0


def look_for_gpu() -> None:
    """Not in the parent process, which must not touch it."""
    import torch

    sys.exit(not torch.cuda.is_available())


def run(name: str, out: Path) -> None:
    """One benchmark."""
    benchmark, result, arguments = ROWS[name]
    module = importlib.import_module(f"benchmarks.{benchmark}")
    module.main([*arguments.split(), "--out", str(out / f"{result}.json")])


@plain_errors("gpu")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    for name in IMPORTS:
        importlib.import_module(name)
    if not forked(look_for_gpu):
        raise SystemExit("gpu: there is no GPU here; benchmarks/README.md says which benchmarks run without one")
    failed = []
    for name in options.only:
        print(f"\n== {name}: benchmarks/{ROWS[name][0]}.py {ROWS[name][2]}", flush=True)
        begin = time.perf_counter()
        failed += [name] * (not forked(run, name, options.out))
        print(f"== {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"gpu: {', '.join(failed)} failed, see above")


if __name__ == "__main__":
    main()
