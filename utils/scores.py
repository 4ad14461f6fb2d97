"""Results as people read them: a table, whether two may be compared, and the scores of predictions that exist already.

    table(results)                          text in percent, a row a data set and a row each of its subsets
    differences(record_a, record_b)         sentences; none if the settings forbid no comparison
    recompute([path, ...])                  results of predictions files and of folders, the original's too
    read_results(folder)                    the record in a folder of test_read.py

A result is an entry of `results` in a results.json: `dataset`, `split` and what `utils.metrics.summarize` returns. A record is
the whole of that file. No model and no picture is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import as_object, read_object, shown
from utils.metrics import THRESHOLDS, summarize
from utils.prediction_log import read_finished, settings_file, wrong_settings
from utils.predictions import (
    RELEASED_NAME,
    expressions,
    read_released,
    released_files,
)

WIDTH = 120
"""Columns of a terminal: the table has all thresholds or, if that is too wide, the first and the last."""

# ------------------------------------------------------------------------------------------------ table


def table(results: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """The scores in percent, gIoU and cIoU with the 95 % interval of `utils.metrics` in brackets.

    `-` is a score that cannot be given; a column that has nothing else is left out.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for result in results:
        rows.append((f"{result['dataset']} {result['split']}", result))
        rows += [(f"  {name}", scores) for name, scores in result.get("subsets", {}).items()]
    lines = _lines(rows, THRESHOLDS)
    if max(map(len, lines)) > width:
        lines = _lines(rows, (THRESHOLDS[0], THRESHOLDS[-1]))
    return "\n".join(lines)


def _lines(rows: Sequence[tuple[str, dict[str, Any]]], thresholds: Sequence[float]) -> list[str]:
    scores = [scores for _, scores in rows]
    names = ["", *(name for name, _ in rows)]
    columns = [
        ["images", *(str(row.get("images", "-")) for row in scores)],
        ["expr.", *(str(row.get("expressions", "-")) for row in scores)],
        _with_interval("gIoU", "giou", scores),
        _with_interval("cIoU", "ciou", scores),
        *([f"P@{x}".replace("0.", "."), *(_percent(row.get(f"p@{x}")) for row in scores)] for x in thresholds),
    ]
    for head, key in (("N-acc", "n_acc"), ("T-acc", "t_acc"), ("See", "see"), ("Say", "say")):
        columns.append([head, *(_percent(row.get(key)) for row in scores)])
    columns = [column for column in columns if any(cell.strip() != "-" for cell in column[1:])]
    left = max(map(len, names))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join([name.ljust(left), *(cell.rjust(wide) for cell, wide in zip(cells, widths, strict=True))]).rstrip()
        for name, *cells in zip(names, *columns, strict=True)
    ]


def _with_interval(head: str, key: str, scores: Sequence[dict[str, Any]]) -> list[str]:
    """A column of scores; those with an interval have it behind, the others leave its place free."""
    values = [_percent(row.get(key)) for row in scores]
    bounds = [(row.get("interval") or {}).get(key) for row in scores]
    behind = [f" [{_percent(bound[0])}, {_percent(bound[1])}]" if bound else "" for bound in bounds]
    wide = max(map(len, [head, *values]))
    cells = [head.rjust(wide), *(value.rjust(wide) for value in values)]
    free = max(map(len, behind), default=0)
    return [cell + more.ljust(free) for cell, more in zip(cells, ["", *behind], strict=True)]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


# ------------------------------------------------------------------------------------------------ results.json

RESULTS = "results.json"
SCORES = ("giou", "ciou", "see", "n_acc", "t_acc", "say", *(f"p@{x}" for x in THRESHOLDS))
COUNTS = ("images", "expressions", "images_in_split", "intersection", "union")
TEXTS = ("version", "command", "checkpoint", "preset", "dtype", "dataset_dir")


def read_results(folder: str | Path) -> dict[str, Any]:
    """The content of a results.json: settings, and `results`, one for each data set and split.

    Raises:
        FileNotFoundError: the folder has none. ValueError: it is none; the message names file and field.
    """
    file = Path(folder) / RESULTS
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: give a folder that `test_read.py --out FOLDER` wrote")
    try:
        record = read_object(file)
        if wrong := wrong_settings(record) + [name for name in TEXTS if not isinstance(record.get(name), str | None)]:
            raise ValueError(f"{wrong[0]}: found {shown(record[wrong[0]])}")
        if not isinstance(record.get("results"), list):
            raise ValueError(f"results: must be a list, found {shown(record.get('results'))}")
        names = set()
        for number, row in enumerate(record["results"]):
            _check_row(as_object(row, f"results[{number}]"), f"results[{number}]")
            if (name := (row["dataset"], row["split"])) in names:
                raise ValueError(f"results[{number}]: {'|'.join(name)} is there twice")
            names.add(name)
    except ValueError as error:
        told = str(error).removeprefix(f"{file}").lstrip(":, ")
        raise ValueError(f"{file} is no result of test_read.py: {told}") from None
    return record


def _check_row(row: dict[str, Any], where: str) -> None:
    """Refuses a row whose names, counts or scores are of another kind: ValueError begins with `where`."""
    for name in ("dataset", "split"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}, {name}: must be text, found {shown(row.get(name))}")
    for name in (*SCORES, *COUNTS):
        value, limit = row.get(name), 1 if name in SCORES else math.inf
        if value is not None and not (type(value) in (int, float) and 0 <= value <= limit):  # NaN compares as false
            raise ValueError(f"{where}, {name}: must be a number from 0 to {limit} or null, found {shown(value)}")
    if wrong := wrong_settings(row):
        raise ValueError(f"{where}, {wrong[0]}: found {shown(row[wrong[0]])}")
    if not isinstance(row.get("failed", []), list):
        raise ValueError(f"{where}, failed: must be a list, found {shown(row['failed'])}")


# ------------------------------------------------------------------------------------------------ may they be compared?

SETTINGS = {
    "protocol": "protocol",
    "compat": "treatment of padding (compat)",
    "conv_type": "wording of the system prompt (conv_type)",
    "templates": "sentences (templates)",
    "seed": "seed of the sentences",
    "max_new_tokens": "longest answer (max_new_tokens)",
    "limit": "limit of pictures",
    "preset": "preset",
    "bits": "bits of the language model",
    "dtype": "dtype",
    "say": "Say",
}
"""Settings at the top of a results.json that move scores, in words. Which checkpoint is what a comparison is about."""


def differences(record_a: dict[str, Any], record_b: dict[str, Any]) -> list[str]:
    """Why two evaluations do not measure the same, a sentence each; empty if their settings say nothing against it.

    Args:
        record_a, record_b: two results.json. Their checkpoints, commands and versions may differ.
    """
    found = []
    for key, words in SETTINGS.items():
        a, b = record_a.get(key), record_b.get(key)
        if a != b:
            rule = "; scores of different protocols are never comparable" if key == "protocol" else ""
            found.append(f"{words}: {_said(a)} against {_said(b)}{rule}")
    a, b = record_a.get("sasp") or {}, record_b.get("sasp") or {}
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            found.append(f"SasP's {key}: {_said(a.get(key))} against {_said(b.get(key))}")
    return found + _other_data(record_a, record_b)


def _other_data(record_a: dict[str, Any], record_b: dict[str, Any]) -> list[str]:
    a, b = ({(r["dataset"], r["split"]): r for r in record.get("results", [])} for record in (record_a, record_b))
    found = []
    for name in [*a, *(name for name in b if name not in a)]:
        told = "|".join(name)
        if name not in a or name not in b:
            found.append(f"{told}: only in the {'first' if name in a else 'second'}")
            continue
        for key, words in (("images", "pictures"), ("expressions", "expressions")):
            if a[name].get(key) != b[name].get(key):
                found.append(f"{told}: {_said(a[name].get(key))} {words} against {_said(b[name].get(key))}")
        # Their wording can be that of the checkpoint, which the top of the file need not know.
        for key in ("protocol", "compat", "conv_type"):
            values = [a[name].get(key), b[name].get(key)]
            if None not in values and values[0] != values[1] and record_a.get(key) == record_b.get(key):
                found.append(f"{told}: {SETTINGS[key]}: {_said(values[0])} against {_said(values[1])}")
    return found


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ scores of old predictions


def recompute(paths: Sequence[str | Path], protocol: str | None = None) -> list[dict[str, Any]]:
    """Results from predictions, every pixel counted anew: one a data set.

    Args:
        paths: predictions_*.jsonl, folders of test_read.py (each file in it), folders of the original's test_read.py
            (`preds_*_of_*.json` with `segmentation_mask`), or those json files, all of one run.
        protocol: that of predictions that have no settings beside them. The original's are always "generate".

    Returns:
        What `summarize` returns, with `dataset`, `split`, `protocol`, `path`, and `stored_differ`: expressions whose stored
        I or U is not what their masks give. `settings`, `failed`, `images_in_split` and more are what stands beside our own;
        `completeness_known` is False where nothing says how much was written.

    Raises:
        FileNotFoundError, ValueError: nothing to read, something broken, or a protocol that is unknown or contradicted.
    """
    results = []
    released: dict[tuple[Path, str], list[Path]] = {}
    for path in map(Path, paths):
        match = RELEASED_NAME.fullmatch(path.name)
        if path.is_dir():
            own, original = sorted(path.glob("predictions_*.jsonl")), released_files(path)
            if not own and not original:
                raise FileNotFoundError(f"{path} holds neither predictions_*.jsonl nor the original's preds_*_of_*.json")
            results += [_own(file, protocol) for file in own]
            results += [_original(files, name, protocol) for name, files in original.items()]
        elif match:
            released.setdefault((path.parent, match["dataset"]), []).append(path)
        else:
            results.append(_own(path, protocol))
    return results + [_original(files, name, protocol) for (_, name), files in released.items()]


def _own(path: Path, protocol: str | None) -> dict[str, Any]:
    """The result of a predictions file of test_read.py; how it was made stands beside it."""
    records, about = read_finished(path)
    if not records and about is None:
        raise ValueError(f"{path} is empty: copy it again")
    known = about is not None and "hash" in about
    about = about or {"settings": {}, "failed": []}
    settings = about["settings"]
    if not settings and protocol is None:
        raise ValueError(f"{path} has no {settings_file(path).name} beside it that names its protocol: say --protocol")
    name, _, split = path.name.removeprefix("predictions_").removesuffix(".jsonl").rpartition("_")
    names = {"dataset": settings.get("dataset") or name or split, "split": settings.get("split") or (split if name else "")}
    kept = {key: settings[key] for key in ("compat", "conv_type", "images_in_split", "limit") if key in settings}
    scores = _scores(records, path, settings.get("protocol"), protocol)
    return {**names, **scores, **kept, "failed": about["failed"], "settings": settings, "completeness_known": known}


def _original(files: Sequence[Path], name: str, protocol: str | None) -> dict[str, Any]:
    """The result of a data set in the original's layout; it knows one split, val."""
    scores = _scores(read_released(files), files[0].parent, "generate", protocol)
    return {"dataset": name, "split": "val", **scores, "failed": [], "completeness_known": True}


def _scores(records: list[dict[str, Any]], path: Path, told: str | None, wanted: str | None) -> dict[str, Any]:
    if told is not None and wanted is not None and told != wanted:
        raise ValueError(f"{path}: its answers are of protocol {told}, not {wanted}")
    protocol = told or wanted
    if protocol not in ("forced", "generate"):
        raise ValueError(f"{path}: protocol {protocol!r} is neither forced nor generate")
    rows = expressions(records)
    stored = [(record.get("intersection"), record.get("union")) for record in records]
    differ = sum(
        None not in pair and pair != (row.intersection, row.union) for pair, row in zip(stored, rows, strict=True)
    )
    return {
        **summarize(rows, generated=protocol == "generate"),
        "protocol": protocol,
        "path": str(path),
        "stored_differ": differ,
    }
