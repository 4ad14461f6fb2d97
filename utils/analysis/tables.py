"""The numbers of studies: a summary a data set and model, tables as CSV, and what is printed.

    summary_of(study, part)                     one dict of plain numbers
    write_tables(studies, parts, folder)        expressions.csv, summary.csv, thresholds.csv, layers.csv, sweep.csv
    as_text(studies, parts)                     what the command prints

Shares of 1 in the files, percent in what is printed; the definitions stand in the package's docstring. An empty cell is a number
that there is not.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.compare import paired_bootstrap
from utils.files import whole_file
from utils.metrics import Overlap, summarize

from .maps import HEADLINE, LEVELS, correlation, s_iou
from .study import MAPS, PAIRS, PROMPTS, SWEPT, Row, Study

# ------------------------------------------------------------------------------------------------ summary


@functools.lru_cache(maxsize=64)
def summary_of(study: Study, part: str) -> dict[str, Any]:
    """What the expressions of one data set say together, summed up once, when the study is complete.

    Returns:
        expressions, measured, images, without_seg; and

        maps: map -> s_iou, s_iou_cumulative (at t = .5), best, best_level, peak, link
        agreement: "clip llava", ... -> r, iou
        masks: prompt -> giou, ciou, interval {giou, ciou}
        points: mean numbers of object, background and neutral points
    """
    rows = study.of(part)
    measured = [row for row in rows if row.measured]
    with_seg = [row for row in rows if row.num_seg]
    return {
        "expressions": len(rows),
        "images": len({row.image_index for row in rows}),
        "measured": len(measured),
        "without_seg": len(rows) - len(with_seg),
        "maps": {name: _of_map(measured, name) for name in MAPS},
        "agreement": {
            f"{a} {b}": {
                "r": _mean([row.agreement[a, b][0] for row in with_seg]),
                "iou": _mean([row.agreement[a, b][1] for row in with_seg]),
            }
            for a, b in PAIRS
        },
        "masks": {prompt: _of_masks(rows, prompt) for prompt in study.prompts},
        "points": dict(
            zip(
                ("object", "background", "neutral"),
                (_mean([row.points[kind] for row in with_seg]) for kind in range(3)),
                strict=True,
            )
        ),
    }


def _of_map(measured: Sequence[Row], name: str) -> dict[str, float]:
    mean, cumulative = thresholds(measured, name)
    at = LEVELS.index(HEADLINE)
    best = int(np.argmax(mean)) if measured else at
    own = np.array([row.masks[row.own].iou for row in measured])
    return {
        "s_iou": float(mean[at]),
        "s_iou_cumulative": float(cumulative[at]),
        "best": float(mean[best]),
        "best_level": LEVELS[best],
        "peak": _mean([row.peaks[name] for row in measured]),
        "link": correlation(np.array([row.s_iou(name) for row in measured]), own),
    }


def thresholds(measured: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean, cumulative) S_IoU of a map, (L,) each, NaN of nothing."""
    if not measured:
        return np.full(len(LEVELS), np.nan), np.full(len(LEVELS), np.nan)
    levels = np.stack([row.levels[name] for row in measured])
    total = levels.sum(axis=0)
    return np.mean([s_iou(one) for one in levels], axis=0), total[:, 0] / (total[:, 1] + 1e-10)


def _of_masks(rows: Sequence[Row], prompt: str) -> dict[str, Any]:
    found = summarize([row.masks[prompt] for row in rows], generated=False)
    return {"giou": found["giou"], "ciou": found["ciou"], "interval": found["interval"]}


def _mean(values: Sequence[float]) -> float:
    finite = [float(value) for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


# ------------------------------------------------------------------------------------------------ sweep


@functools.lru_cache(maxsize=64)
def sweep_table(study: Study, part: str) -> list[dict[str, Any]]:
    """A row a setting and prompt: scores, their difference from the checkpoint's own values, mean numbers of points.

    As `summary_of` it sums a study up once: table, figures and page all ask for it.
    """
    rows = study.of(part)
    if not study.sweep or not rows:
        return []
    places = {index: n for n, index in enumerate(dict.fromkeys(row.image_index for row in rows))}
    image_of_row = np.array([places[row.image_index] for row in rows])
    own = next(n for n, setting in enumerate(study.sweep) if setting.own)
    table = []
    for n, setting in enumerate(study.sweep):
        points = [_mean([row.sweep_points[n][kind] for row in rows if row.num_seg]) for kind in range(3)]
        for prompt in SWEPT:
            before, after = ([_record(row, row.sweep[prompt][k]) for row in rows] for k in (own, n))
            found = {score.name: score for score in paired_bootstrap(image_of_row, before, after, judged=False)}
            table.append(
                {
                    "axis": setting.axis, "value": setting.value, "own": setting.own, "paper": " ".join(setting.paper),
                    "prompt": prompt, "points": points,
                    **{name: score.b for name, score in found.items()},
                    **{f"{name}_difference": score.value for name, score in found.items()},
                    **{f"{name}_interval": score.interval for name, score in found.items()},
                }
            )  # fmt: skip
    return table


def _record(row: Row, pixels: Overlap) -> dict[str, Any]:
    """An expression as `utils.compare` takes it."""
    return {**pixels._asdict(), "exists": row.exists, "predicted_exists": row.num_seg > 0}


# ------------------------------------------------------------------------------------------------ files


def write_tables(studies: Sequence[Study], parts: Sequence[str], folder: Path) -> list[Path]:
    """Writes every table that has rows; returns the files."""
    tables = {
        "expressions": expression_rows(studies),
        "summary": [row for study in studies for part in parts for row in _summary_rows(study, part)],
        "thresholds": [row for study in studies for part in parts for row in _threshold_rows(study, part)],
        "layers": [row for study in studies for part in parts for row in layer_rows(study, part)],
        "sweep": [row for study in studies for part in parts for row in _sweep_rows(study, part)],
    }
    written = []
    for name, rows in tables.items():
        path = folder / f"{name}.csv"
        if not rows:
            continue
        with whole_file(path) as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        written.append(path)
    return written


def expression_rows(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """A row an expression and model."""
    return [
        {
            "model": study.name, "data": row.part, "image_index": row.image_index, "question_index": row.question_index,
            "image": row.image, "question": row.question, "answer": row.answer, "exists": int(row.exists),
            "num_seg": row.num_seg, "object_share": row.share, "confidence": row.confidence,
            **{f"iou_{prompt}": pixels.iou for prompt, pixels in row.masks.items()},
            **{f"{kind}_{prompt}": getattr(pixels, kind) for prompt, pixels in row.masks.items()
               for kind in ("intersection", "union")},
            **{f"s_iou_{name}": row.s_iou(name) for name in MAPS},
            **{f"peak_{name}": int(row.peaks[name]) if row.measured else None for name in MAPS},
            **{f"{kind}_{a}_{b}": row.agreement[a, b][k] if row.agreement else None
               for a, b in PAIRS for k, kind in enumerate(("r", "map_iou"))},
            **dict(zip(("object_points", "background_points", "neutral_points"), row.points, strict=True)),
        }
        for study in studies
        for row in study.rows
    ]  # fmt: skip


def _summary_rows(study: Study, part: str) -> list[dict[str, Any]]:
    """Long: a row a number."""
    found = summary_of(study, part)
    head = {"model": study.name, "data": part}
    rows = [
        {**head, "of": name, "number": number, "value": value}
        for group in ("maps", "agreement")
        for name, numbers in found[group].items()
        for number, value in numbers.items()
    ]
    for prompt, scores in found["masks"].items():
        for number in ("giou", "ciou"):
            low, high = scores["interval"][number] or (None, None)
            rows.append({**head, "of": prompt, "number": number, "value": scores[number], "low": low, "high": high})
    counts = ("expressions", "images", "measured", "without_seg")
    rows += [{**head, "of": "data", "number": number, "value": found[number]} for number in counts]
    rows += [{**head, "of": "points", "number": kind, "value": value} for kind, value in found["points"].items()]
    return rows


def _threshold_rows(study: Study, part: str) -> list[dict[str, Any]]:
    measured = [row for row in study.of(part) if row.measured]
    curves = {name: thresholds(measured, name) for name in MAPS}
    return [
        {"model": study.name, "data": part, "map": name, "t": level, "s_iou": mean[n], "s_iou_cumulative": cumulative[n]}
        for name, (mean, cumulative) in curves.items()
        for n, level in enumerate(LEVELS)
        if measured
    ]


def layer_rows(study: Study, part: str) -> list[dict[str, Any]]:
    """A row a layer and kind of [SEG] state."""
    rows = [row for row in study.of(part) if row.layers]
    return [
        {
            "model": study.name, "data": part, "layer": layer, "seg": kind,
            "s_iou": _mean([row.layers[kind, layer][0] for row in rows]),
            "peak": _mean([row.layers[kind, layer][1] for row in rows]),
        }
        for kind, layer in (rows[0].layers if rows else ())
    ]  # fmt: skip


def _sweep_rows(study: Study, part: str) -> list[dict[str, Any]]:
    rows = []
    for entry in sweep_table(study, part):
        row = {"model": study.name, "data": part, **{key: entry[key] for key in ("axis", "value", "own", "paper", "prompt")}}
        row["own"] = int(row["own"])
        for name in ("giou", "ciou"):
            low, high = entry[f"{name}_interval"] or (None, None)
            row |= {name: entry[name], f"{name}_difference": entry[f"{name}_difference"]}
            row |= {f"{name}_difference_low": low, f"{name}_difference_high": high}
        kinds = ("object_points", "background_points", "neutral_points")
        rows.append(row | dict(zip(kinds, entry["points"], strict=True)))
    return rows


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------ text


def as_text(studies: Sequence[Study], parts: Sequence[str]) -> str:
    """The summary in percent, a block a model and data set."""
    return "\n\n".join(_block(study, part) for study in studies for part in parts)


def _block(study: Study, part: str) -> str:
    found = summary_of(study, part)
    lines = [
        f"{study.name} · {part}: {found['expressions']} expressions about {found['images']} pictures, "
        f"{found['measured']} with an object and a [SEG]"
    ]
    lines.append(f"  {'where [SEG] looks':<36}{'S_IoU':>7}{'best':>7}{'at t':>6}{'peak':>7}{'link r':>8}")
    for name, words in MAPS.items():
        m = found["maps"][name]
        lines.append(
            f"    {words:<34}{percent(m['s_iou']):>7}{percent(m['best']):>7}{m['best_level']:>6.2f}"
            f"{percent(m['peak']):>7}{number(m['link']):>8}"
        )
    lines.append(f"  {'agreement of maps':<36}{'r':>7}{'IoU':>7}")
    for pair, values in found["agreement"].items():
        a, b = pair.split()
        lines.append(f"    {MAPS[a] + ' / ' + MAPS[b]:<34}{number(values['r']):>7}{percent(values['iou']):>7}")
    lines.append(f"  {'masks from':<36}{'gIoU':>7}{'':16}{'cIoU':>7}")
    for prompt, scores in found["masks"].items():
        cells = "".join(f"{percent(scores[name]):>7}{_interval(scores, name):<16}" for name in ("giou", "ciou"))
        lines.append(f"    {PROMPTS[prompt]:<34}{cells}".rstrip())
    lines += [f"  {line}" for line in sweep_lines(study, part)]
    if study.failed:
        lines.append(f"  {len(study.failed)} pictures FAILED and are left out, the first: {study.failed[0][2]}")
    return "\n".join(lines)


def sweep_lines(study: Study, part: str) -> list[str]:
    """For each of SasP's values the best tried, and what it gains on the checkpoint's own."""
    table = sweep_table(study, part)
    lines = []
    for axis in dict.fromkeys(entry["axis"] for entry in table):
        tried = [entry for entry in table if entry["axis"] == axis and entry["prompt"] == "both"]
        best = max(tried, key=lambda entry: entry["ciou"])
        least = min(tried, key=lambda entry: entry["ciou"])
        gain = "none beats the own value"
        if best["ciou_difference"] > 0:
            gain = f"best - own {100 * best['ciou_difference']:+.1f}{_interval(best, 'ciou', 'ciou_interval')}"
        lines.append(
            f"  {axis:<14}cIoU {percent(least['ciou'])} ({least['value']}) to {percent(best['ciou'])} ({best['value']}); {gain}"
        )
    return ["sweep, [SEG] and points", *lines] if lines else []


def _interval(scores: dict[str, Any], name: str, key: str = "interval") -> str:
    bounds = scores[key] if key != "interval" else scores[key][name]
    return f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""


def percent(value: float) -> str:
    """A share in percent, `-` where there is none."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def number(value: float) -> str:
    """Two places, `-` where there is none."""
    return f"{value:.2f}" if math.isfinite(value) else "-"
