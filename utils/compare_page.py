"""The page of a comparison: one HTML file with its pictures inside, which needs no network and no script.

    page(comparison, top)        in goes what `utils.compare` found, out comes the text of the file

Above are both runs' settings, warnings, the table and the histogram of the changes; below, a card for each of the `top`
expressions whose IoU changed most: what is meant, A's mask and B's mask on the picture. Whatever comes from a file is escaped.
The same two runs give the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from utils import visualize
from utils.compare import (
    ALIKE,
    GENERATOR,
    NAMES,
    Comparison,
    DataSet,
    Difference,
    Pair,
    Record,
    Run,
    cells_of,
    counted,
    how,
    summary,
)
from utils.image import read_image
from utils.predictions import decode_mask

TINTS = {"A": visualize.TINTS[2], "B": visualize.TINTS[0]}
"""Orange and blue: no kind of colour-blindness takes them for each other."""
GREY = 150
"""Shade of the canvas where a picture is gone."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Of the page's content: nothing is loaded and nothing runs, even if something slipped through the escaping."""
NEW_LINE = "\n"
DRAWN = 2**27
"""Most pixels of a mask that is drawn; a few letters of a file may stand for a mask that fills the memory."""
BINS = 20
"""Bars of the histogram, from -1 to 1."""


def page(comparison: Comparison, top: int) -> str:
    """The file's text: what all expressions say, then a card for each of the `top` that changed most."""
    pairs = comparison.most_changed(top)
    judged = {(part.dataset, part.split): part.judged for part in comparison.sets}
    cards = [_card(n, pair, judged[pair.dataset, pair.split]) for n, pair in enumerate(pairs, 1)]
    histograms = [_histogram(part) for part in comparison.sets if part.pairs]
    parts = [
        _warnings(comparison.warnings),
        _section("Scores", _table(comparison)),
        _section("Change of IoU, B - A", f'<div class="histograms">{"".join(histograms)}</div>') if histograms else "",
        _section("What changed most", f"<p>{_lead(comparison, len(pairs))}</p>", _legend() if pairs else "", *cards),
        _section("Settings", _settings(comparison.a, comparison.b)),
    ]
    a, b = _e(comparison.a.folder), _e(comparison.b.folder)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{a} and {b}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Two runs, expression by expression</h1>
<p class="run">{_chip("A")} {a} <span class="small">{_e(summary(comparison.a))}</span></p>
<p class="run">{_chip("B")} {b} <span class="small">{_e(summary(comparison.b))}</span></p>
</header>
<main>
{NEW_LINE.join(part for part in parts if part)}
</main>
</body>
</html>
"""


def _section(title: str, *content: str) -> str:
    return NEW_LINE.join([f"<section>\n<h2>{_e(title)}</h2>", *(part for part in content if part), "</section>"])


def _lead(comparison: Comparison, shown: int) -> str:
    """What the cards are, or why there are none."""
    if not any(part.pairs for part in comparison.sets):
        return "Single expressions can be shown only with the predictions of both runs."
    changed = sum(bool(pair.change) for part in comparison.sets for pair in part.pairs)
    if not changed:
        return "No expression changed its IoU."
    return f"{shown} of the {changed} expressions whose IoU changed, the greatest change first."


# ------------------------------------------------------------------------------------------------ all expressions


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_e(warning)}</li>" for warning in warnings)
    return f'<div class="warning" role="note"><p><strong>Warning:</strong> {_e(ALIKE)}</p><ul>{items}</ul></div>'


def _table(comparison: Comparison) -> str:
    """A group of rows a data set, a row a score, with the interval drawn on an axis that all rows share."""
    reach = [abs(end) for part in comparison.sets for score in part.scores for end in score.interval or ()]
    rows = []
    for part in comparison.sets:
        notes = [*([counted(part)] if part.pairs else []), *part.notes]
        below = "".join(f'<tr class="note"><td colspan="7">{_e(note)}</td></tr>' for note in notes)
        lines = []
        for n, score in enumerate(part.scores):
            a, b, difference, interval, share = map(_e, cells_of(score))
            head = f'<th scope="rowgroup" rowspan="{len(part.scores)}">{_e(part.name)}</th>' if n == 0 else ""
            bar = _interval_bar(score, max(reach, default=0))
            lines.append(
                f'<tr>{head}<th scope="row">{NAMES[score.name]}</th><td>{a}</td><td>{b}</td>'
                f"<td><strong>{difference}</strong></td><td>{bar} {interval}</td><td>{share}</td></tr>"
            )
        rows.append(f"<tbody>{''.join(lines)}{below}</tbody>")
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("data set, percent", "score", _chip("A"), _chip("B"), "B - A", "95 % interval", "B not better")
    )
    explained = "".join(f"<p>{_e(line)}</p>" for line in how(comparison))
    return (
        f'<div class="wide"><table class="scores"><thead><tr>{head}</tr></thead>{"".join(rows)}</table></div>'
        f'<div class="small">{explained}</div>'
    )


def _interval_bar(score: Difference, reach: float) -> str:
    """The interval as a bar about 0, grey where 0 is inside. For the eye only: the numbers stand beside it."""
    if score.interval is None or not reach:
        return ""
    low, value, high = (60 + 56 * end / reach for end in (score.interval[0], score.value, score.interval[1]))
    kind = "b" if score.interval[0] > 0 else "a" if score.interval[1] < 0 else "open"
    return (
        '<svg class="interval" width="120" height="14" viewBox="0 0 120 14" aria-hidden="true">'
        '<path class="axis" d="M60 0V14"/>'
        f'<rect class="{kind}" x="{low:.1f}" y="5" width="{max(high - low, 1):.1f}" height="4" rx="2"/>'
        f'<circle class="{kind}" cx="{value:.1f}" cy="7" r="4"/></svg>'
    )


def _histogram(part: DataSet) -> str:
    """How many expressions changed by how much; those that did not change are counted in words."""
    changes = np.array([pair.change for pair in part.pairs])
    heights, _ = np.histogram(changes[changes != 0], bins=np.arange(-BINS // 2, BINS // 2 + 1) / (BINS // 2))
    better, same, worse = part.counts()
    words = f"B better on {better}, the same on {same}, worse on {worse}"
    step, base, tall, left = 24, 124, 96, 20
    bars = []
    for n, height in enumerate(heights.tolist()):
        if height:
            size = max(tall * height / max(heights), 1.5)
            x, kind = left + n * step, "a" if n < BINS // 2 else "b"
            bars.append(f'<rect class="{kind}" x="{x + 1}" y="{base - size:.1f}" width="{step - 2}" height="{size:.1f}" rx="2"/>')
            bars.append(f'<text class="count" x="{x + step / 2:g}" y="{base - size - 4:.1f}">{height}</text>')
    for n in range(0, BINS + 1, BINS // 4):
        percent = f"{200 * n // BINS - 100:+d}" if n != BINS // 2 else "0"
        bars.append(f'<text x="{left + n * step}" y="{base + 16}">{percent}</text>')
    middle, right, name = left + BINS // 2 * step, left + BINS * step, _e(part.name)
    return (
        f'<figure class="histogram"><svg viewBox="0 0 {right + left} {base + 24}" role="img" aria-label="{name}: {words}">'
        f'<path class="axis" d="M{left} {base}H{right}M{middle} 8V{base}"/>{"".join(bars)}</svg>'
        f"<figcaption><strong>{name}</strong>: {words} (not drawn: the same). Points of IoU.</figcaption></figure>"
    )


def _settings(a: Run, b: Run) -> str:
    """Both results.json without the scores; rows that differ are marked."""
    rows = []
    for name in dict.fromkeys([*a.settings, *b.settings]):
        one, other = (_plain(run.settings.get(name)) for run in (a, b))
        mark = ' class="differs"' if one != other else ""
        rows.append(f'<tr{mark}><th scope="row">{_e(name)}</th><td>{_e(one)}</td><td>{_e(other)}</td></tr>')
    return (
        f'<div class="wide"><table class="settings"><thead><tr><th scope="col">setting</th><th scope="col">{_chip("A")}</th>'
        f'<th scope="col">{_chip("B")}</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _plain(value: Any) -> str:
    """A setting in words; the parts of a dict in a row."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)


def _legend() -> str:
    """What the colours in the pictures mean."""
    keys = (
        ("truth", "what is meant"), ("a", "A's mask"), ("b", "B's mask"), ("dot object", "object point"),
        ("dot background", "background point"), ("hatch", "does not count"),
    )  # fmt: skip
    entries = [f'<span><span class="key {key}"></span>{_e(words)}</span>' for key, words in keys]
    return f'<p class="legend">{"".join(entries)}</p>'


# ------------------------------------------------------------------------------------------------ one expression


def _card(number: int, pair: Pair, judged: tuple[bool, bool]) -> str:
    """One expression: three pictures with what was answered."""
    if math.prod(pair.a["target"]["size"]) > DRAWN or math.prod(pair.b["mask"]["size"]) > DRAWN:
        return (
            f'<article class="card" aria-labelledby="card-{number}"><h3 id="card-{number}">{number}. {_e(pair.a["question"])}'
            f'</h3><p class="problem">The masks have more than {DRAWN} pixels and are not drawn.</p></article>'
        )
    target = decode_mask(pair.a["target"])
    ignored = decode_mask(pair.a["ignored"]) if pair.a.get("ignored") else None
    picture, problem = _picture(pair, target.shape)
    figures = [_truth(pair.a, picture, target, ignored)]
    for record, iou, asked, letter in zip((pair.a, pair.b), pair.ious, judged, "AB", strict=True):
        figures.append(_answer(record, picture, iou, asked, letter))
    better = "B" if pair.change > 0 else "A"
    gone = f'<p class="problem">{_e(problem)}</p>' if problem else ""
    return (
        f'<article class="card" aria-labelledby="card-{number}">'
        f'<header><div><h3 id="card-{number}">{number}. {_e(pair.a["question"])}</h3>'
        f'<p class="small">{_e(pair.dataset)}|{_e(pair.split)} · {_e(pair.a["image"])}</p></div>'
        f'<span class="change {better.lower()}">{100 * pair.change:+.1f} <small>{better} better</small></span></header>'
        f'{gone}<div class="pictures">{"".join(figures)}</div></article>'
    )


def _picture(pair: Pair, size: tuple[int, int]) -> tuple[np.ndarray, str | None]:
    """((H, W, 3) uint8 RGB, what is wrong with it): grey where the picture is gone, unreadable or of another size."""
    for path in dict.fromkeys((pair.a["image"], pair.b["image"])):
        try:
            picture = read_image(path)
        except FileNotFoundError:
            problem = f"{path} is not there: the masks are drawn on grey."
        except (OSError, ValueError):
            problem = f"{path} cannot be read: the masks are drawn on grey."
        else:
            if picture.shape[:2] == size:
                return picture, None
            height, width = picture.shape[:2]
            problem = f"{path} is {width} x {height} now, the masks {size[1]} x {size[0]}: they are drawn on grey."
    return np.full((*size, 3), GREY, np.uint8), problem


def _truth(record: Record, picture: np.ndarray, target: np.ndarray, ignored: np.ndarray | None) -> str:
    """What is meant, outlined, and whether it is there at all."""
    question = record["question"]
    words = f"The picture with the outline of: {question}" if record["exists"] else f"The picture, without: {question}"
    caption = f"<p>Truth: it is {'' if record['exists'] else 'not '}in the picture</p>"
    return _figure(visualize.truth_image(picture, target, ignored), words, caption + _said(record.get("reference"), "should say"))


def _answer(record: Record, picture: np.ndarray, iou: float, judged: bool, letter: str) -> str:
    """One run's mask and points, its IoU and answer and, where it was free to deny, what it took for present."""
    labels = np.array(record.get("point_labels") or [], dtype=np.int64)
    points = np.array(record.get("points") or [], dtype=np.float32).reshape(-1, 2)
    mask = decode_mask(record["mask"]) != 0
    words = f"{letter}'s mask, {100 * mask.mean():.1f} % of the picture" if mask.any() else f"The picture; {letter} drew no mask"
    if len(labels):
        words += f", from {(labels == 1).sum()} object and {(labels == 0).sum()} background points"
    if mask.shape == picture.shape[:2]:
        drawn = visualize.answer_image(picture, visualize.Segment(mask, None, points, labels), TINTS[letter])
    else:  # the picture was exchanged between the runs
        drawn = Image.fromarray(np.full_like(picture, GREY))
        words += "; it has another size than the true mask and is not drawn"
    caption = [f"<p>{_chip(letter)} IoU <strong>{100 * iou:.1f}</strong></p>", _said(record["answer"], "says")]
    if judged:
        claim = "takes it to be there" if record["predicted_exists"] else "takes it not to be there"
        mark, word = ("✓", "right") if record["predicted_exists"] == record["exists"] else ("✗", "wrong")
        caption.append(f'<p class="{word}">{mark} {claim}: {word}</p>')
    details = []
    if record.get("confidence") is not None:
        details.append(f"SAM's own estimate of the IoU: {100 * record['confidence']:.1f}")
    if record.get("say") is not None:
        details.append(f"say: {_plain(record['say'])}")
    caption += [f'<p class="small">{_e(detail)}</p>' for detail in details]
    return _figure(drawn, words, "".join(caption))


def _said(text: str | None, verb: str) -> str:
    """An answer in quotation marks, its [SEG] as a pill; nothing for None or an empty one."""
    if not text:
        return ""
    shown = _e(text).replace("[SEG]", '<span class="seg">SEG</span>')
    return f"<p>{_e(verb)} <q>{shown}</q></p>"


def _figure(picture: Image.Image, words: str, caption: str) -> str:
    """A picture with its alternative text; `caption` is HTML."""
    return (
        f'<figure><img src="{_data_uri(picture)}" width="{picture.width}" height="{picture.height}" alt="{_e(words)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _chip(letter: str) -> str:
    return f'<span class="chip {letter.lower()}">{letter}</span>'


def _e(value: object) -> str:
    """Text for HTML, between tags or in an attribute."""
    return html.escape(str(value))


# ------------------------------------------------------------------------------------------------ its look

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f6f8; --ink: #1c2026; --soft: #5a626d; --line: #d9dde3;
  --a: #ff9600; --b: #00b0f0; --warn: #fff3d6; --warn-line: #e0a100; --right: #14713b; --wrong: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1d2127; --ink: #e8eaed; --soft: #a3abb6; --line: #363c45;
    --warn: #3a2f10; --warn-line: #c79a1c; --right: #6fd69a; --wrong: #ff9a92;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .7rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 0; }
p { margin: .3rem 0; }
.small { font-size: .85rem; color: var(--soft); }
.run { overflow-wrap: anywhere; }
.chip { display: inline-block; min-width: 1.5em; padding: 0 .35em; border-radius: .45em; text-align: center;
  font-weight: 700; font-size: .85em; color: #14171b; }
.chip.a { background: var(--a); }
.chip.b { background: var(--b); }
.warning { margin-top: 1.2rem; padding: .7rem 1rem; border-radius: .6rem;
  background: var(--warn); border-left: 5px solid var(--warn-line); }
.warning ul { margin: .3rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; }
thead th { font-size: .85rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; }
.scores { min-width: 46rem; }
.scores th, .scores td { white-space: nowrap; }
.scores .note td { white-space: normal; padding-top: 0; font-size: .85rem; color: var(--soft); }
.scores tbody + tbody > tr:first-child > * { border-top: 1px solid var(--line); }
.interval { vertical-align: -2px; margin-right: .4rem; }
.settings { font-size: .85rem; }
.settings td { overflow-wrap: anywhere; min-width: 10rem; }
.settings tr > * { border-bottom: 1px solid var(--line); }
.settings .differs td { font-weight: 700; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .a { fill: var(--a); }
svg .b { fill: var(--b); }
svg .open { fill: var(--soft); }
svg text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.histogram { padding: .8rem; max-width: 36rem; border-radius: .6rem; background: var(--panel); }
figure { margin: 0; }
figcaption { font-size: .9rem; padding-top: .3rem; }
.histogram figcaption { color: var(--soft); font-size: .85rem; }
.histogram svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem 1.1rem; font-size: .9rem; color: var(--soft); }
.legend > span { display: inline-flex; align-items: center; gap: .4rem; }
.key { display: inline-block; width: 1rem; height: 1rem; border-radius: .25rem; }
.key.truth { background: #8a929c; border: 3px solid #ffffff; outline: 1px solid #1c2026; }
.key.a { background: var(--a); }
.key.b { background: var(--b); }
.key.dot { width: .8rem; height: .8rem; border-radius: 50%; border: 2px solid #ffffff; outline: 1px solid #8a929c; }
.key.object { background: #26d06c; }
.key.background { background: #f03e3e; }
.key.hatch { background: repeating-linear-gradient(135deg, #1c2026 0 3px, #8a929c 3px 6px); }
.card { margin: 1rem 0; padding: 1rem; border-radius: .8rem; background: var(--panel);
  border: 1px solid var(--line); break-inside: avoid; }
.card > header { display: flex; justify-content: space-between; align-items: flex-start; gap: 1rem; }
.card > header > div { min-width: 0; overflow-wrap: anywhere; }
.change { flex: none; padding: .1rem .6rem; border-radius: 1rem; font-weight: 700; color: #14171b;
  font-variant-numeric: tabular-nums; }
.change.a { background: var(--a); }
.change.b { background: var(--b); }
.change small { font-weight: 500; }
.pictures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .8rem; margin-top: .7rem; }
.pictures img { display: block; max-width: 100%; height: auto; border-radius: .4rem; margin: 0 auto; }
.pictures figcaption { overflow-wrap: anywhere; }
.seg { padding: 0 .4em; border-radius: .6em; background: var(--soft); color: var(--paper); font-size: .8em; font-weight: 700; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.problem { color: var(--wrong); font-size: .9rem; }
@media (max-width: 40rem) { .pictures { grid-template-columns: 1fr; } }
"""
