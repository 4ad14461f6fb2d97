"""The tables of speeds, made from what the benchmarks wrote: `python benchmarks/table.py --write`.

Each file in `benchmarks/results` that has rows here gives them; the baseline of each was measured in the same run. Nothing is
typed by hand: all rows stand in `benchmarks/README.md` and the headlines among them in `docs/performance.md`, each between two
marks, and a test compares them with what this makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import plain_errors  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
HEADLINES, ALL = ROOT / "docs/performance.md", ROOT / "benchmarks/README.md"
BEGIN, END = "<!-- speeds: begin (benchmarks/table.py) -->", "<!-- speeds: end -->"
HEAD = ("what", "on", "baseline", "ratio", "of the floor", "command")
MEMORY = {"kept": "kept for backward", "peak": "peak memory", "step": "memory above what was there"}


@dataclass(frozen=True)
class Row:
    """A line of the table, without where it was measured and by what command."""

    what: str
    baseline: str
    ratio: str
    of_floor: str = ""
    headline: bool = True


def sasp(record: dict[str, Any]) -> list[Row]:
    """Points against the original's rule; on a GPU, whose baseline is quick too, they are no headline."""
    return [
        Row(
            f"points of a mask, K = {record['points']}, {size}",
            "a weight for every pixel and point",
            _times(found["ratios"]["ours"]),
            headline=not record["hardware"]["gpu"],
        )
        for size, found in record["results"].items()
    ]


def evaluation(record: dict[str, Any]) -> list[Row]:
    """A picture's expressions together against the original's schedule."""
    words = {"forced": "answers forced", "generate": "answers generated"}
    return [
        Row(
            f"evaluation of {_model(record)}, {record['expressions']} expressions a picture, {words[protocol]}",
            "the original's schedule",
            _times(found["ratios"]["total"]),
            _of_floor(found["seconds"]["together"], found),
        )
        for protocol, found in record["results"].items()
        if "ratios" in found
    ]


def training_step(record: dict[str, Any]) -> list[Row]:
    """A training step that shares prefixes against whole conversations with eager attention."""
    rows = []
    for how, found in record["results"].items():
        ratio = found["ratios"]["original / shared"]
        what = f"training of {_model(record)}, {record['pictures']} x {record['conversations']} conversations, {how}"
        base, first = "whole conversations, eager attention", how.startswith("without")
        if "seconds" in ratio:
            floor = _of_floor(found["seconds"]["shared"], found)
            rows.append(Row(f"{what}: time", base, _times(ratio["seconds"]["total"]), floor, headline=first))
        for key, words in MEMORY.items():
            if key in ratio.get("memory", {}):
                headline = first and key == "peak"
                rows.append(Row(f"{what}: {words}", base, _times(ratio["memory"][key]), headline=headline))
    return rows


def loading(record: dict[str, Any]) -> list[Row]:
    """Peak memory of loading, as a multiple of the bytes on disk."""
    rows = []
    for layout, ways in record["results"].items():
        size = f"{ways['ours']['bytes'] / 1e9:.0f} GB"
        usual = f"a model with weights of its own: {ways['usual']['peak']:.2f}" if "usual" in ways else "bytes on disk"
        what = f"loading {size} of {layout}: peak memory as a multiple of it"
        rows.append(Row(what, usual, f"{ways['ours']['peak']:.2f}", headline="usual" not in ways))
    return rows


def sam_encoder(record: dict[str, Any]) -> list[Row]:
    """SAM's encoder against the package in the same precision, and as it is installed."""
    rows = []
    for result in record["results"]:
        ours, many, precision = result["variants"]["ours"], result["batch_size"], result["precision"]
        what = f"SAM's image encoder, {record['size']}, {precision}, {many} at a time"
        slower = ours.get("seconds", 0) / result["floor"]
        floor = f"{slower:.1f}x" if slower >= 1 else ""  # below 1 the large product was not the quickest one
        full = record["size"] == "vit_h"
        if "ratio" in ours:
            headline = full and not record["hardware"]["gpu"]
            rows.append(Row(what, "segment-anything, eager", _times(ours["ratio"]), floor, headline))
        if "ratio_to_fp32" in ours and precision != "float32":
            rows.append(Row(what, "segment-anything as installed, float32", _times(ours["ratio_to_fp32"]), floor, full))
    return rows


KINDS = {
    "sasp_[cg]pu*": sasp,
    "evaluation_*": evaluation,
    "sam_encoder_*": sam_encoder,
    "training_step_*": training_step,
    "loading_*": loading,
}
"""Name of the files -> their rows, in the order of the table."""


def table(headlines: bool) -> str:
    """The table in Markdown, with where and when each row was measured."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    notes: list[str] = []
    for name, rows in KINDS.items():
        for file in sorted(RESULTS.glob(f"{name}.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            place, words = _place(record["hardware"])
            for row in rows(record):
                if headlines and not row.headline:
                    continue
                command = f"`{record['command'].split(' --out')[0]}`"
                lines.append(f"| {' | '.join((row.what, place, row.baseline, row.ratio, row.of_floor, command))} |")
                note = f"{record['date']}, {words}, torch {record['versions']['torch']}"
                notes += [note] * (note not in notes)
    return "\n".join([
        *lines, "",
        f"Measured {'; '.join(notes)}.",
        "The ratio is how many times less ours takes; of the floor, how many times more than counted FLOPs and bytes would take",
        "at the speed of a large product and a large copy (of SAM: of its own largest product).",
    ])  # fmt: skip


def _place(machine: dict[str, Any] | None) -> tuple[str, str]:
    """A word for where something was measured, and more of them."""
    if machine is None:
        return "counted", "counted on PyTorch's meta device"
    if machine["gpu"]:
        return machine["gpu"].removeprefix("NVIDIA "), machine["gpu"]
    return "CPU", f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _of_floor(seconds: dict[str, float], found: dict[str, Any]) -> str:
    """How many times longer it takes than counted FLOPs and bytes do at measured speeds."""
    return f"{seconds['total'] / found['floor_seconds']['total']:.1f}x" if "floor_seconds" in found else ""


def _model(record: dict[str, Any]) -> str:
    return "READ-mini" if "read-mini" in record["model"] else record["model"].split(",")[0]


def written(file: Path) -> str:
    """A document with the table between its marks replaced."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{file} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table(headlines=file == HEADLINES)}\n{END}{after}"


@plain_errors("table")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="puts them into both documents; without it all rows are printed")
    options = parser.parse_args(argv)
    if options.write:
        for file in (HEADLINES, ALL):
            file.write_text(written(file), encoding="utf-8")
    else:
        print(table(headlines=False))


if __name__ == "__main__":
    sys.exit(main())
