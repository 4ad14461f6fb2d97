"""Figures of studies, light and dark: thresholds, the link of map and mask, layers, sweeps.

    write_figures(studies, parts, folder)     PNG files -> [Figure]; each as NAME.png and, for dark pages, pictures/NAME_dark.png

One colour a map or prompt, one kind of line a model, one figure a data set.

Legend: L thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.plot import LINES

from .maps import HEADLINE, LEVELS, correlation
from .prompts import AXES, PAPER
from .study import LAYER_SEG, MAPS, PROMPTS, SWEPT, TINTS, Study, slug_of
from .tables import layer_rows, percent, summary_of, sweep_table, thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

MAP_COLOURS = {"clip": "#CC79A7", "llava": "#D55E00", "sam": "#0072B2"}
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
PROMPT_COLOURS = {prompt: f"#{red:02x}{green:02x}{blue:02x}" for prompt, (red, green, blue) in TINTS.items()}
"""As in the pictures."""
PAPER_MARKS = {"READ-7B": "v", "READ-13B": "^"}
INK = {False: ("#1c2026", "#5a626d", "#ffffff"), True: ("#e8eaed", "#a3abb6", "#1d2127")}
"""dark -> ink, soft ink, paper."""


@dataclass(frozen=True)
class Figure:
    """A figure on disk."""

    title: str
    part: str
    light: str
    dark: str
    """Files, relative to the report."""
    words: str
    """For those who cannot see it."""
    size: tuple[int, int]
    """(width, height) at which it is shown."""


def write_figures(studies: Sequence[Study], parts: Sequence[str], folder: Path) -> list[Figure]:
    """Draws everything there are numbers for."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    written = []
    for part in parts:
        for name, title, draw, size in (
            ("thresholds", "S_IoU and where a map is cut", draw_thresholds, (5.2, 3.6)),
            ("link", "Does a better map make a better mask?", draw_link, (5.2, 3.6)),
            ("layers", "Layers of the language model", draw_layers, (10.6, 3.6)),
            ("sweep", "SasP's values, one at a time", draw_sweep, (10.6, 6.4)),
        ):
            slug = name if len(parts) == 1 else f"{name}_{slug_of(part)}"
            files = {False: f"{slug}.png", True: f"pictures/{slug}_dark.png"}
            words = None
            for dark, file in files.items():
                with matplotlib.rc_context(style(dark)):
                    figure = Drawing(figsize=size, dpi=160, layout="constrained")
                    words = draw(figure, studies, part)
                    if words is not None:
                        figure.savefig(folder / file)
            if words is not None:
                written.append(Figure(title, part, *files.values(), words, tuple(round(100 * side) for side in size)))
    return written


def style(dark: bool) -> dict[str, Any]:
    """matplotlib's settings for a light or a dark page."""
    ink, soft, paper = INK[dark]
    return {
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper, "text.color": ink,
        "axes.labelcolor": ink, "axes.edgecolor": soft, "xtick.color": soft, "ytick.color": soft, "axes.titlecolor": ink,
        "grid.color": soft, "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.grid": True, "axes.spines.top": False,
        "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "legend.fontsize": 8,
    }  # fmt: skip


def draw_thresholds(figure: Drawing, studies: Sequence[Study], part: str) -> str | None:
    """S_IoU over the threshold, a line a map and model."""
    axes = figure.subplots()
    heights = []
    for study, line in zip(studies, LINES, strict=False):
        measured = [row for row in study.of(part) if row.measured]
        if measured:
            for name, colour in MAP_COLOURS.items():
                mean, _ = thresholds(measured, name)
                axes.plot(LEVELS, 100 * mean, color=colour, linestyle=line, label=f"{study.name} {name}")
                heights.append(f"{study.name}, {MAPS[name]}: {percent(mean[LEVELS.index(HEADLINE)])} at .5")
    if not heights:
        return None
    axes.axvline(HEADLINE, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="threshold t of the map", ylabel="S_IoU, %", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    _legend(axes, {words: MAP_COLOURS[name] for name, words in MAPS.items()}, studies)
    return "S_IoU over the threshold. " + "; ".join(heights)


def draw_link(figure: Drawing, studies: Sequence[Study], part: str) -> str | None:
    """A point an expression: S_IoU of the map after the language model, IoU of the model's mask."""
    axes = figure.subplots()
    told = []
    for study, marker in zip(studies, "os^DPX", strict=False):
        measured = [row for row in study.of(part) if row.measured]
        if len(measured) > 2:
            x = np.array([row.s_iou("llava") for row in measured])
            y = np.array([row.masks[row.own].iou for row in measured])
            axes.plot(
                100 * x, 100 * y, marker, color=PROMPT_COLOURS[measured[0].own], alpha=0.45, markersize=4.5,
                markeredgewidth=0, label=f"{study.name}, r = {correlation(x, y):.2f}",
            )  # fmt: skip
            told.append(f"{study.name}: r = {correlation(x, y):.2f} over {len(measured)} expressions")
    if not told:
        return None
    axes.set(xlabel="S_IoU of the map after the LM, %", ylabel="IoU of the model's mask, %", xlim=(-2, 102), ylim=(-3, 103))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handletextpad=0.2, borderpad=0)
    return "IoU of the mask against S_IoU of the map after the language model. " + "; ".join(told)


def draw_layers(figure: Drawing, studies: Sequence[Study], part: str) -> str | None:
    """S_IoU and peak over the layers."""
    found = {study.name: layer_rows(study, part) for study in studies}
    if not any(found.values()):
        return None
    colours = dict(zip(LAYER_SEG, (MAP_COLOURS["llava"], MAP_COLOURS["sam"]), strict=True))
    told = []
    for axes, (key, label) in zip(
        figure.subplots(1, 2), {"s_iou": "S_IoU, %", "peak": "peak on the object, %"}.items(), strict=True
    ):
        for study, line in zip(studies, LINES, strict=False):
            for kind, colour in colours.items():
                rows = [row for row in found[study.name] if row["seg"] == kind]
                if rows:
                    values = [100 * row[key] for row in rows]
                    axes.plot([row["layer"] for row in rows], values, color=colour, linestyle=line, marker="o", markersize=4)
                    if key == "s_iou":
                        told.append(f"{study.name}, [SEG] of {kind}: " + " ".join(f"{value:.0f}" for value in values))
        axes.set(xlabel="layer of the image tokens (0: before the LM)", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    names = {"same": "[SEG] of the same layer", "last": "[SEG] of the last layer"}
    _legend(axes, {names[kind]: colour for kind, colour in colours.items()}, studies)
    return "S_IoU in percent by layer. " + "; ".join(told)


def draw_sweep(figure: Drawing, studies: Sequence[Study], part: str) -> str | None:
    """gIoU and cIoU over each of SasP's values: of both prompts, of points alone; [SEG] alone as a flat line."""
    swept = {study.name: sweep_table(study, part) for study in studies}
    if not any(swept.values()):
        return None
    names = {
        "num_points": "K, points", "t_pos": "t_pos", "t_neg": "t_neg", "down_sample": "down_sample", "geometry": "geometry"
    }  # fmt: skip
    panels = figure.subplots(2, len(names), sharey="row", sharex="col", width_ratios=(1.5, 1, 1, 1, 0.6))
    told = []
    for line_of_axes, score, label in zip(panels, ("giou", "ciou"), ("gIoU, %", "cIoU, %"), strict=True):
        line_of_axes[0].set_ylabel(label)
        for axes, axis in zip(line_of_axes, names, strict=True):
            for study, line in zip(studies, LINES, strict=False):
                table = [row for row in swept[study.name] if row["axis"] == axis]
                if not table:
                    continue
                flat = 100 * summary_of(study, part)["masks"]["embedding"][score]
                axes.axhline(flat, color=PROMPT_COLOURS["embedding"], linestyle=line, linewidth=1.2)
                for prompt in SWEPT:
                    rows = [row for row in table if row["prompt"] == prompt]
                    place = _places(axis, [row["value"] for row in rows])
                    values = [100 * row[score] for row in rows]
                    axes.plot(
                        place, values, color=PROMPT_COLOURS[prompt], linestyle=line, marker="o", markersize=3,
                        label=f"{study.name} {prompt}",
                    )  # fmt: skip
                    own = [n for n, row in enumerate(rows) if row["own"]]
                    axes.plot(
                        [place[n] for n in own], [values[n] for n in own], "o", markersize=8, markerfacecolor="none",
                        color=PROMPT_COLOURS[prompt],
                    )  # fmt: skip
                    if prompt == "both" and score == "ciou":
                        told.append(
                            f"{study.name}, {names[axis]}: "
                            + " ".join(f"{row['value']} {value:.1f}" for row, value in zip(rows, values, strict=True))
                        )
            if axis == "num_points":
                axes.set_xscale("log")
                axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
                axes.minorticks_off()
            if axis == "geometry":
                axes.set_xticks(range(len(AXES[axis])), AXES[axis], rotation=20)
                axes.set_xlim(-0.5, len(AXES[axis]) - 0.5)
            for recipe, values in PAPER.items():
                (place,) = _places(axis, [getattr(values, axis)])
                axes.plot(
                    [place], [0.03 if recipe == "READ-7B" else 0.09], PAPER_MARKS[recipe], color="grey", markersize=6,
                    transform=axes.get_xaxis_transform(), clip_on=False,
                )  # fmt: skip
    for axes, name in zip(panels[-1], names.values(), strict=True):
        axes.set_xlabel(name)
    colours = {f"mask from {PROMPTS[prompt]}": PROMPT_COLOURS[prompt] for prompt in ("both", "points", "embedding")}
    figure.legend(handles=_handles(colours, studies, marks=True), loc="outside lower center", ncols=4)
    return "cIoU in percent over SasP's values, [SEG] and points. " + "; ".join(told)


def _places(axis: str, values: Sequence[Any]) -> list[float]:
    return [float(AXES[axis].index(value)) if isinstance(value, str) else float(value) for value in values]


def _handles(colours: dict[str, str], studies: Sequence[Study], marks: bool = False) -> list[Any]:
    """A colour for each name, a kind of line for each of several models, the marks of a sweep."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if len(studies) > 1:
        handles += [
            Line2D([], [], color="grey", linestyle=line, label=study.name)
            for study, line in zip(studies, LINES, strict=False)
        ]
    if marks:
        plain = {"linestyle": "none", "color": "grey"}
        handles.append(Line2D([], [], marker="o", markersize=8, markerfacecolor="none", label="the checkpoint's own", **plain))
        handles += [Line2D([], [], marker=mark, label=f"{name}, paper", **plain) for name, mark in PAPER_MARKS.items()]
    return handles


def _legend(axes: Axes, colours: dict[str, str], studies: Sequence[Study]) -> None:
    axes.legend(handles=_handles(colours, studies), loc="best")
