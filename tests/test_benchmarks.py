"""Benchmarks: each says what it does at once, and the README's table of speeds is what they wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(file for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text())


def test_the_readme_shows_what_was_measured():
    """`python benchmarks/table.py --write` was run after the last benchmark."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.table import written

    readme = (ROOT / "README.md").read_text()
    assert written(readme) == readme


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_help_is_quick(script):
    """`--help` is answered before torch is imported, and shows how the script is called."""
    probe = (
        f"import sys, runpy; sys.argv = [{str(script)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{script.name}" in done.stdout


def test_the_rule_of_the_original_and_ours_agree():
    """The baseline of benchmarks/sasp.py is protocol §4: its points are ours."""
    import torch

    from benchmarks.sasp import original_points
    from model import SaspConfig, select_points

    values = torch.nn.functional.interpolate(
        torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)), (24, 24), mode="bicubic"
    ).flatten(1)
    found = select_points(values, (120, 200), SaspConfig(num_points=30))
    assert (original_points(values[0], found.cells[0], (120, 200)) - found.points[0]).abs().max() < 1e-3

