"""README's table of speeds, made from what the benchmarks wrote: `python benchmarks/table.py --write`.

Each file in `benchmarks/results` that has a row here gives it; the baseline of each was measured in the same run. Nothing is
typed by hand: the table stands in the README between two marks, and a test compares it with what this makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
BEGIN, END = "<!-- speeds: begin (benchmarks/table.py) -->", "<!-- speeds: end -->"
HEAD = ("what", "baseline", "ratio", "of the floor", "command")

Row = tuple[str, str, str, str]


MEMORY = {"kept": "kept for backward", "peak": "peak memory", "step": "memory above what was there"}


def sasp(record: dict[str, Any]) -> list[Row]:
    """Points against the original's rule."""
    base = "a weight for every pixel and point"
    return [
        (f"points of a mask, K = {record['points']}, {size}", base, _times(found["ratios"]["ours"]), "")
        for size, found in record["results"].items()
    ]


def evaluation(record: dict[str, Any]) -> list[Row]:
    """A picture's expressions together against the original's schedule."""
    words = {"forced": "answers forced", "generate": "answers generated"}
    return [
        (f"evaluation of {_model(record)}, {record['expressions']} expressions a picture, {words[protocol]}",
         "the original's schedule", _times(found["ratios"]["total"]), _of_floor(found["seconds"]["together"], found))
        for protocol, found in record["results"].items()
        if "ratios" in found
    ]  # fmt: skip


def training_step(record: dict[str, Any]) -> list[Row]:
    """A training step that shares prefixes against whole conversations with eager attention."""
    rows = []
    for how, found in record["results"].items():
        ratio = found["ratios"]["original / shared"]
        what = f"training of {_model(record)}, {record['pictures']} x {record['conversations']} conversations, {how}"
        base = "whole conversations, eager attention"
        if "seconds" in ratio:
            rows.append((f"{what}: time", base, _times(ratio["seconds"]["total"]), _of_floor(found["seconds"]["shared"], found)))
        for key, words in MEMORY.items():
            if key in ratio.get("memory", {}):
                rows.append((f"{what}: {words}", base, _times(ratio["memory"][key]), ""))
    return rows


def loading(record: dict[str, Any]) -> list[Row]:
    """Peak memory of loading, as a multiple of the bytes on disk."""
    rows = []
    for layout, ways in record["results"].items():
        size = f"{ways['ours']['bytes'] / 1e9:.0f} GB"
        usual = f"a model with weights of its own: {ways['usual']['peak']:.2f}" if "usual" in ways else "bytes on disk"
        rows.append((f"loading {size} of {layout}: peak memory as a multiple of it", usual, f"{ways['ours']['peak']:.2f}", ""))
    return rows


def sam_encoder(record: dict[str, Any]) -> list[Row]:
    """SAM's encoder against the package in the same precision, and as it is installed."""
    rows = []
    for result in record["results"]:
        ours, many = result["variants"]["ours"], result["batch_size"]
        what = f"SAM's image encoder, {record['size']}, {result['precision']}, {many} at a time"
        floor = f"{ours['seconds'] / result['floor']:.1f}x" if "seconds" in ours else ""
        for key, base in (("ratio", "segment-anything, eager"), ("ratio_to_fp32", "segment-anything as installed, float32")):
            if key in ours and (key == "ratio" or result["precision"] != "float32"):
                rows.append((what, base, _times(ours[key]), floor))
    return rows


KINDS = {
    "sasp_[cg]pu*": sasp,
    "evaluation_*": evaluation,
    "sam_encoder_*": sam_encoder,
    "training_step_*": training_step,
    "loading_*": loading,
}
"""Name of the files -> their rows, in the order of the table."""


def table() -> str:
    """The table in Markdown, with where and when each row was measured."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    notes: list[str] = []
    for name, rows in KINDS.items():
        for file in sorted(RESULTS.glob(f"{name}.json")):
            record = json.loads(file.read_text())
            lines += [f"| {' | '.join(row)} | `{record['command'].split(' --out')[0]}` |" for row in rows(record)]
            machine = record["hardware"]
            if machine is None:
                place = "counted on PyTorch's meta device"
            else:
                place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
            note = f"{record['date']}, {place}, torch {record['versions']['torch']}"
            notes += [note] * (note not in notes)
    return "\n".join([*lines, "", f"Measured {'; '.join(notes)}. `x` is how many times less ours takes, and of the floor how many times more than counted "
                      "FLOPs and bytes take at the speed of a large product and copy."])


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _of_floor(seconds: dict[str, float], found: dict[str, Any]) -> str:
    """How many times longer it takes than counted FLOPs and bytes do at measured speeds."""
    return f"{seconds['total'] / found['floor_seconds']['total']:.1f}x" if "floor_seconds" in found else ""


def _model(record: dict[str, Any]) -> str:
    return "READ-mini" if "read-mini" in record["model"] else record["model"].split(",")[0]


def written(text: str) -> str:
    """A README with the table between its marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"table: the README has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="puts it into README.md; without it the table is printed")
    options = parser.parse_args(argv)
    if options.write:
        README.write_text(written(README.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    sys.exit(main())
