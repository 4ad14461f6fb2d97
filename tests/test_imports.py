"""Every module imports on a machine without a GPU, and importing has no side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for pattern in ("*.py", "model/**/*.py", "dataset/**/*.py", "utils/**/*.py")
    for file in ROOT.glob(pattern)
    if file.name != "__main__.py"
)

PROBE = """
import importlib, json, sys
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
heavy = [name for name in ("deepspeed", "flash_attn", "matplotlib.pyplot") if name in sys.modules]
import torch
print(json.dumps({"failed": failed, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""


def test_all_modules_import_without_a_gpu() -> None:
    """One fresh process without a GPU imports them all; neither DeepSpeed nor a GPU-only package comes along."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(MODULES)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"failed": {}, "heavy": [], "cuda": False}


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("model", ("dataset", "train_read", "test_read", "demo")),
        ("dataset", ("model", "train_read", "test_read", "demo")),
    ],
)
def test_arrows(package: str, forbidden: tuple[str, ...]) -> None:
    """Entry scripts know everything; model and dataset do not know each other."""
    probe = f"import json, sys, {package}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not loaded & set(forbidden)
