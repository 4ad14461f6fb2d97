"""Curves of training runs, drawn from their log.jsonl: the loss terms and the validation scores over the steps.

    python -m utils.plot runs/mini                                  -> runs/mini/curves.png
    python -m utils.plot runs/on runs/off --out on_and_off.png      two runs in one figure, told apart by the kind of line

Where there are many points, a running mean is drawn over the faint line of what was logged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cli import plain_errors
from .files import as_object, parse_json, read_text, shown, whole_file, whole_number
from .outputs import FILE_MARK, check_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {
    # in the log      name and colour in the figure (Okabe and Ito's palette, which colour-blind readers can tell apart)
    "loss": ("weighted sum", "#000000"),
    "ce_loss": ("answer, cross-entropy", "#0072B2"),
    "bce_loss": ("mask, BCE", "#D55E00"),
    "dice_loss": ("mask, Dice", "#009E73"),
    "sim_loss": ("similarity map", "#CC79A7"),
}
SCORES = {"giou": ("gIoU", "#56B4E9"), "ciou": ("cIoU", "#E69F00")}
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
"""Kinds of line, one a run."""
MANY = 100
"""Points from which on a curve is smoothed."""

Records = list[dict[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the figure (default: curves.png in the first run)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Reads, draws, writes."""
    options = build_parser().parse_args(argv)
    out = options.out or options.runs[0] / "curves.png"
    with plain_errors("plot"):
        names = [run.resolve().name for run in options.runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in options.runs]
        if len(set(names)) < len(names):
            raise ValueError(f"{' '.join(names)}: a run is named twice")
        check_file(out, "--out")
        save(draw({name: read_log(run) for name, run in zip(names, options.runs, strict=True)}), out)
    print(f"written: {out}")
    return 0


def save(figure: Figure, out: Path) -> None:
    """Writes a figure, whole or not at all, in the format of its suffix and with our mark.

    Raises:
        ValueError: matplotlib does not write this format.
    """
    kind = out.suffix.removeprefix(".").lower() or "png"
    kinds = figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ValueError(f"--out {out}: must end in one of .{', .'.join(sorted(kinds))}")
    mark = {"png": {"Software": FILE_MARK}}.get(kind, {"Creator": FILE_MARK} if kind in ("pdf", "ps", "eps", "svg") else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out, "wb") as file:
        figure.savefig(file, format=kind, metadata=mark)


def read_log(run: Path) -> Records:
    """The records of kind train and val of a run. A last line without its end is passed over: it is being written, or was cut.

    Raises:
        FileNotFoundError: the folder has no log. ValueError: there is nothing to draw in it, or it is damaged.
    """
    file = run / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no log.jsonl: give the folder of a training run")
    nothing = f"{file} has no record of training or validation yet"
    if file.stat().st_size == 0:
        raise ValueError(nothing)
    records = []
    lines = read_text(file).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = parse_json(line, where)
        except ValueError:
            if number == len(lines):
                break
            raise
        record = as_object(record, where)
        if record.get("kind") in ("train", "val"):
            check_record(record, where)
            records.append(record)
    if not records:
        raise ValueError(nothing)
    return records


def check_record(record: dict[str, Any], where: str) -> None:
    """Refuses a record that cannot be drawn.

    Raises:
        ValueError: the step is no whole number, or a value no number; "nan" and "inf" are numbers here, as they are logged.
    """
    whole_number(record.get("step"), f"{where}, field step", at_least=0)
    for name in (*LOSSES, *SCORES):
        value = record.get(name)
        number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**15)
        if not (value is None or number or value in ("nan", "inf", "-inf")):
            raise ValueError(f"{where}, field {name}: must be a number, found {shown(value)}")


def curve(records: Records, kind: str, name: str) -> Curve | None:
    """(steps, values) float64 of one value, None if it never occurs; of a step logged twice, the last."""
    found = {r["step"]: float(r[name]) for r in records if r["kind"] == kind and r.get(name) is not None}
    if not found:
        return None
    steps = sorted(found)
    return np.array(steps, dtype=float), np.array([found[step] for step in steps])


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve, narrower at its ends; NaN and infinity (logged as such) do not count."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    count = np.convolve(finite, window, mode="same")
    return np.convolve(np.where(finite, values, 0.0), window, mode="same") / np.where(count > 0, count, np.nan)


def draw(runs: dict[str, Records]) -> Figure:
    """A figure of two panels over the steps: loss terms (logarithmic) and gIoU and cIoU in percent.

    Raises:
        ValueError: more runs than there are kinds of line.
    """
    from matplotlib.figure import Figure  # not pyplot, which would keep the figure and may look for a screen
    from matplotlib.ticker import LogLocator, NullLocator

    if len(runs) > len(LINES):
        raise ValueError(f"{len(runs)} runs in one figure cannot be told apart: give {len(LINES)} at most")
    figure = Figure(figsize=(9, 7.5), dpi=130, layout="constrained")
    losses, scores = figure.subplots(2, 1, height_ratios=(3, 2), sharex=True)
    for (name, records), line in zip(runs.items(), LINES, strict=False):
        for key, (_, colour) in LOSSES.items():
            found = curve(records, "train", key)
            if found is not None:
                _draw_loss(losses, *found, label=f"{name} {key}", color=colour, linestyle=line)
        for key, (_, colour) in SCORES.items():
            found = curve(records, "val", key)
            if found is not None:
                steps, values = found
                style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4}
                scores.plot(steps, 100 * values, label=f"{name} {key}", **style)
    if all((line.get_ydata() > 0).any() and not (line.get_ydata() <= 0).any() for line in losses.lines):
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter("{x:g}")
        losses.yaxis.set_minor_locator(NullLocator())
    losses.set_ylabel("loss terms")
    scores.set_ylabel("validation, %")
    scores.set_xlabel("optimiser step")
    for axes, named in ((losses, LOSSES), (scores, SCORES)):
        _finish(axes, named, runs)
    figure.suptitle(" · ".join(runs))
    return figure


def _draw_loss(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """One loss term; the line that carries the label is what was logged, faint if the running mean lies over it."""
    if len(steps) < MANY:
        axes.plot(steps, values, **style)
    else:
        axes.plot(steps, values, **{**style, "linewidth": 0.7, "alpha": 0.25, "linestyle": "-"})
        axes.plot(steps, smooth(values), linewidth=1.7, **{**style, "label": "_mean"})  # `_`: in no legend


def _finish(axes: Axes, named: dict[str, tuple[str, str]], runs: dict[str, Records]) -> None:
    """Grid and legend: a colour for each value that occurs, and, of several runs, a kind of line for each."""
    from matplotlib.lines import Line2D

    axes.grid(alpha=0.4, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    drawn = {line.get_color() for line in axes.lines}
    handles = [Line2D([], [], color=colour, label=name) for name, colour in named.values() if colour in drawn]
    if len(runs) > 1:
        handles += [Line2D([], [], color="grey", linestyle=line, label=name) for name, line in zip(runs, LINES, strict=False)]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
