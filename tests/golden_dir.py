"""Where the recordings of the original are: `READ_GOLDEN_DIR`, else the full set beside the clone, else the lean copy here."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def golden_dirs() -> list[Path]:
    """Folders to test against; parity tests run whatever files they find there."""
    named = os.environ.get("READ_GOLDEN_DIR")
    if named:
        return [Path(named)]
    full, lean = ROOT.parent / "shared/golden", ROOT / "tests/golden"
    return [folder for folder in (full, lean) if folder.is_dir()][:1]
