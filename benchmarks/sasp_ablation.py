"""SasP on and off after equal training, over several seeds: the paper's ablation on READ-mini.

    python benchmarks/sasp_ablation.py --seeds 0 1 2

Each run fine-tunes the base for the same number of steps with the same data, merges LoRA, and is measured on RefCOCO val and
ReasonSeg val, answers forced. Prints mean and spread, and the difference of the pairs; writes runs/ablation/results.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import plain_errors  # noqa: E402
from utils.files import read_object, write_json  # noqa: E402

VARIANTS = {"SasP on": "--sasp", "SasP off": "--no-sasp"}
SETS = ("refcoco|val", "ReasonSeg|val")


def run(environment: dict[str, str], *command: str) -> None:
    """One command of the project, as a user types it, with this interpreter first on the path.

    Raises:
        OSError: it failed, and said why.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PATH": path, **environment})
    if done.returncode:
        raise OSError(f"ended with status {done.returncode}: {' '.join(command)}")


def measure(folder: Path, variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """cIoU and gIoU of one seed and variant, in percent."""
    name = f"{'on' if variant == 'SasP on' else 'off'}_{seed}"
    switch = VARIANTS[variant]
    number = list(VARIANTS).index(variant) * 100 + seed
    own = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // options.jobs, 1)), "MASTER_PORT": str(29_600 + number)}
    run(own, "bash", "train_read.sh", "mini", "--log_base_dir", str(folder), "--exp_name", name, "--overwrite", "--no_eval",
        "--seed", str(seed), "--steps_per_epoch", str(options.steps), "--dataset_dir", options.dataset_dir, switch)  # fmt: skip
    run(own, "bash", "merge_lora_weight.sh", str(folder / name), str(folder / name / "merged"), "--overwrite")
    run(own, "bash", "val_read.sh", str(folder / name / "merged"), "--dataset_dir", options.dataset_dir, "--data", *SETS,
        "--out", str(folder / name / "val"), switch)  # fmt: skip
    scores = {}
    for result in read_object(folder / name / "val/results.json")["results"]:
        for score in ("ciou", "giou"):
            scores[f"{result['dataset']} {result['split']} {score}"] = 100 * result[score]
    return scores


@plain_errors("sasp_ablation")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of each run")
    parser.add_argument("--dataset_dir", default="data/mini")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {v: [pool.submit(measure, options.out, v, seed, options) for seed in options.seeds] for v in VARIANTS}
        found = {v: [run.result() for run in runs] for v, runs in waiting.items()}
    write_json(options.out / "results.json", {"steps": options.steps, "scores": found})
    print(f"{options.steps} steps, seeds {options.seeds}: mean (lowest to highest)")
    for key in found["SasP on"][0]:
        cells = []
        for runs in found.values():
            values = [scores[key] for scores in runs]
            cells.append(f"{statistics.mean(values):5.1f} ({min(values):.1f} to {max(values):.1f})")
        pairs = [a[key] - b[key] for a, b in zip(found["SasP on"], found["SasP off"], strict=True)]
        print(f"{key:<22} on {cells[0]}   off {cells[1]}   on - off {statistics.mean(pairs):+.1f}")


if __name__ == "__main__":
    main()
