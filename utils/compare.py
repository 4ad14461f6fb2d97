"""Results of `test_read.py` side by side: `python -m utils.compare BEFORE AFTER` (folders with a results.json)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SCORES = ("giou", "ciou")
SAME = ("protocol", "compat", "conv_type", "templates", "limit")
"""What two results must have in common to be comparable."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    options = build_parser().parse_args(argv)
    try:
        print(compare(*(json.loads((folder / "results.json").read_text()) for folder in (options.before, options.after))))
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare: {error}") from error
    return 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A row for each data set that both have, scores in percent.

    Raises:
        ValueError: the two were not measured in the same way.
    """
    differing = [
        f"{name} {before.get(name)!r} and {after.get(name)!r}" for name in SAME if before.get(name) != after.get(name)
    ]
    if differing:
        raise ValueError(f"these results are not comparable: {', '.join(differing)}")
    rows = {(row["dataset"], row["split"]): row for row in before["results"]}
    lines = [
        f"{'answers ' + after['protocol']:<24}" + "".join(f"{name + ' before':>14}{'after':>9}" for name in SCORES)
    ]
    for row in after["results"]:
        old = rows.get((row["dataset"], row["split"]))
        if old is not None:
            numbers = "".join(f"{100 * old[name]:>14.2f}{100 * row[name]:>9.2f}" for name in SCORES)
            lines.append(f"{row['dataset'] + '|' + row['split']:<24}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
