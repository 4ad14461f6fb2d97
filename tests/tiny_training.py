"""A training run on tiny things, for tests: a ReasonSeg tree, a command line, and how to read what the run logged."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_dir import golden_dirs
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CKPT = next((f / "ckpt" for f in golden_dirs() if (f / "ckpt/read_tiny/config.json").is_file()), None)
needs_ckpt = pytest.mark.skipif(CKPT is None, reason="no tiny checkpoint in the golden folder")


def write_reason_seg(root: Path, splits: dict[str, int]) -> None:
    """A ReasonSeg tree in the real format: noise with one bright rectangle, which is the target."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        folder = root / "reason_seg" / "ReasonSeg" / split
        folder.mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 120, (48, 64, 3), dtype=np.uint8)
            left, top = int(rng.integers(2, 30)), int(rng.integers(2, 20))
            picture[top : top + 20, left : left + 25] = 230
            Image.fromarray(picture).save(folder / f"{i}.jpg")
            corners = [[left, top], [left + 25, top], [left + 25, top + 20], [left, top + 20]]
            record = {
                "text": ["the bright thing", "bright rectangle"],
                "is_sentence": False,
                "shapes": [{"label": "target", "points": corners}],
                "false_premise_QA": [["a green dog", False, "There is no dog here."]],
            }
            (folder / f"{i}.json").write_text(json.dumps(record), encoding="utf-8")


def flags(data: Path, runs: Path, name: str, **changed: object) -> list[str]:
    """A command line for a few steps of training."""
    values = {
        "version": CKPT / "read_tiny", "vision_tower": CKPT / "clip_tiny", "precision": "fp32", "lora_r": 4,
        "lora_dropout": 0.0, "num_points": 5, "down_sample": 1, "dataset": "reason_seg", "sample_rates": "1",
        "dataset_dir": data, "log_base_dir": runs, "exp_name": name, "epochs": 2, "steps_per_epoch": 2, "batch_size": 2,
        "lr": 0.01, "warmup_steps": 1, "workers": 0, "print_freq": 1, "seed": 3,
    } | changed  # fmt: skip
    line = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return [*line, "--no-gradient_checkpointing"]


def records(run: Path, kind: str) -> list[dict]:
    """What a run logged of one kind."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]
