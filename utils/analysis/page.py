"""The report: one HTML file beside its pictures, which opens from disk, needs no network, and can be moved with its folder.

    page(studies, parts, figures, record)        in goes what was measured, out comes the text of the file

Above what all expressions say, below a table and a card for each expression. A small script sorts, filters and goes from card to
card; without it everything is there all the same. Pictures are files that load when they come into view, so that hundreds of
cards stay light. Whatever comes from data or a model is escaped, and no script but this one runs.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .maps import HEADLINE
from .plots import Figure
from .prompts import PAPER
from .study import MAPS, PAIRS, PROMPTS, TINTS, Row, Study
from .tables import number, percent, summary_of, sweep_table

NEW_LINE = "\n"


@dataclass(frozen=True)
class Score:
    """A number of an expression that the report sorts and filters by."""

    key: str
    group: str
    """Model."""
    name: str

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def page(studies: Sequence[Study], parts: Sequence[str], figures: Sequence[Figure], record: dict[str, Any]) -> str:
    """The file's text.

    Args:
        parts: the data sets.
        figures: of `plots.write_figures`.
        record: how the report was made, shown at its end.
    """
    rows = _together(studies)
    scores = scores_of(studies)
    shown = [number for number, found in enumerate(rows) if any(row.pictures for row in found.values())]
    sections = [
        _section("What all expressions say", *(_summary(studies, part) for part in parts)),
        _section("Curves", f'<div class="figures">{"".join(map(_figure, figures))}</div>') if figures else "",
        _sweep(studies, parts),
        _section("Expressions", _lead(len(shown), len(rows)), _tools(scores), _table(studies, rows, scores, shown)),
        _legend(studies),
        f'<div id="cards">{"".join(_card(n, rows[n], studies, record) for n in shown)}</div>',
        '<p id="none" hidden>No expression fits the filter.</p>',
        _section("How this was made", _record(record)),
    ]
    names = ", ".join(study.name for study in studies)
    policy = (
        f"script-src 'sha256-{_digest(SCRIPT)}'; style-src 'unsafe-inline'; object-src 'none'; frame-src 'none'; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Where [SEG] looks: {_e(names)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Where <span class="seg">SEG</span> looks, and what its points are worth</h1>
<p class="soft">{_e(names)} · {_e(", ".join(parts))} · answers {"generated" if record["protocol"] == "generate" else "forced"}</p>
</header>
<main>
{NEW_LINE.join(section for section in sections if section)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def scores_of(studies: Sequence[Study]) -> list[Score]:
    """What the report sorts by: of each model the IoU of every mask and the S_IoU of every map."""
    return [
        score
        for n, study in enumerate(studies)
        for score in (
            *(Score(f"m{n}-{prompt}", study.name, f"IoU {PROMPTS[prompt]}") for prompt in reversed(study.prompts)),
            *(Score(f"m{n}-{name}", study.name, f"S_IoU {words}") for name, words in MAPS.items()),
        )
    ]


def _together(studies: Sequence[Study]) -> list[dict[int, Row]]:
    """A dict an expression: number of the model -> its row; in the order of the data sets."""
    found: dict[Any, dict[int, Row]] = {}
    for n, study in enumerate(studies):
        for row in study.rows:
            found.setdefault(row.key, {})[n] = row
    return list(found.values())


def _values(found: dict[int, Row], studies: Sequence[Study]) -> dict[str, float]:
    """Key of a Score -> the value; NaN where there is none."""
    values = {}
    for n, row in found.items():
        values |= {f"m{n}-{prompt}": row.masks[prompt].iou for prompt in studies[n].prompts}
        values |= {f"m{n}-{name}": row.s_iou(name) for name in MAPS}
    return values


def _section(title: str, *content: str) -> str:
    return NEW_LINE.join([f"<section>\n<h2>{_e(title)}</h2>", *(part for part in content if part), "</section>"])


# ------------------------------------------------------------------------------------------------ all expressions


def _summary(studies: Sequence[Study], part: str) -> str:
    """Maps and masks of every model on one data set."""
    blocks = []
    for study in studies:
        found = summary_of(study, part)
        maps = "".join(
            f'<tr><th scope="row">{_e(words)}</th><td>{_bar(m["s_iou"], "map")}<strong>{percent(m["s_iou"])}</strong></td>'
            f'<td>{percent(m["s_iou_cumulative"])}</td><td>{percent(m["best"])} <small>t {m["best_level"]:.2f}</small></td>'
            f'<td>{percent(m["peak"])}</td><td>{number(m["link"])}</td></tr>'
            for words, m in ((MAPS[name], found["maps"][name]) for name in MAPS)
        )
        pairs = "".join(
            f'<tr><th scope="row">{_e(MAPS[a])} / {_e(MAPS[b])}</th><td>{number(values["r"])}</td>'
            f"<td>{percent(values['iou'])}</td></tr>"
            for a, b in PAIRS
            for values in (found["agreement"][f"{a} {b}"],)
        )
        masks = "".join(_mask_row(study, prompt, scores) for prompt, scores in found["masks"].items())
        points = found["points"]
        counts = ", ".join(f"{points[kind]:.1f} {kind}" for kind in points if math.isfinite(points[kind]))
        told = [
            f"{found['expressions']} expressions about {found['images']} pictures",
            f"{found['measured']} with an object and a [SEG], on which maps are measured",
            f"points an expression: {counts}" if counts else "",
        ]
        if study.failed:
            told.append(f"{len(study.failed)} pictures failed and are left out")
        blocks.append(
            f'<article class="summary"><h3>{_e(study.name)} <small>{_e(part)}</small></h3>'
            f'<p class="soft">{_e(" · ".join(text for text in told if text))}</p><div class="tables">'
            f'<div class="wide"><table><thead><tr><th scope="col">where [SEG] looks</th><th scope="col">S_IoU</th>'
            f'<th scope="col">cumulative</th><th scope="col">best</th><th scope="col">peak</th>'
            f'<th scope="col">link r</th></tr></thead><tbody>{maps}</tbody></table></div>'
            f'<div class="wide"><table><thead><tr><th scope="col">mask from</th><th scope="col">gIoU</th>'
            f'<th scope="col">cIoU</th></tr></thead><tbody>{masks}</tbody></table></div>'
            f'<div class="wide"><table><thead><tr><th scope="col">maps that agree</th><th scope="col">r</th>'
            f'<th scope="col">IoU</th></tr></thead><tbody>{pairs}</tbody></table></div></div></article>'
        )
    return "".join(blocks) + f'<p class="soft">{_e(DEFINITIONS)}</p>'


DEFINITIONS = (
    f"Percent. S_IoU: IoU of the map, min-max normalised and cut at t = {HEADLINE:g}, with the true mask, mean over the "
    "expressions; cumulative: sum of intersections by sum of unions; best: the mean at the threshold that suits these "
    "expressions best. Peak: the map's greatest pixel lies on the object. Link: correlation of S_IoU with the IoU of the model's "
    "own mask (●). Small: 95 % intervals, bootstrapped over pictures."
)


def _mask_row(study: Study, prompt: str, scores: dict[str, Any]) -> str:
    own = any(row.own == prompt for row in study.rows)
    mark = ' <span class="own" title="the model\'s own mask">●</span>' if own else ""
    cells = ""
    for name in ("giou", "ciou"):
        bounds = scores["interval"][name]
        between = f" <small>{percent(bounds[0])} to {percent(bounds[1])}</small>" if bounds else ""
        bar = _bar(scores[name], prompt) if name == "giou" else ""
        cells += f"<td>{bar}<strong>{percent(scores[name])}</strong>{between}</td>"
    return f'<tr><th scope="row">{_e(PROMPTS[prompt])}{mark}</th>{cells}</tr>'


def _bar(value: float, kind: str) -> str:
    """A length for the eye; the number stands beside it."""
    width = 0 if not math.isfinite(value) else 100 * min(max(value, 0), 1)
    return f'<span class="bar" aria-hidden="true"><span class="{kind}" style="width:{width:.1f}%"></span></span>'


def _figure(figure: Figure) -> str:
    width, height = figure.size
    kind = "plot broad" if width > 800 else "plot"
    return (
        f'<figure class="{kind}"><figcaption>{_e(figure.title)} <small>{_e(figure.part)}</small></figcaption>'
        f'<picture><source srcset="{_e(figure.dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{_e(figure.light)}" width="{width}" height="{height}" loading="lazy" '
        f'alt="{_e(figure.words)}"></picture></figure>'
    )


def _sweep(studies: Sequence[Study], parts: Sequence[str]) -> str:
    """The table behind the figure of the sweep."""
    tables = []
    for study in studies:
        for part in parts:
            rows = [row for row in sweep_table(study, part) if row["prompt"] == "both"]
            alone = {(row["axis"], row["value"]): row for row in sweep_table(study, part) if row["prompt"] == "points"}
            if not rows:
                continue
            cells = []
            for n, row in enumerate(rows):
                new = n == 0 or rows[n - 1]["axis"] != row["axis"]
                count = sum(other["axis"] == row["axis"] for other in rows)
                head = f'<th scope="rowgroup" rowspan="{count}">{_e(row["axis"])}</th>' if new else ""
                marks = "mine" if row["own"] else ""
                paper = row["paper"] if row["axis"] != "recipe" else ""
                other = alone[row["axis"], row["value"]]
                object_points, background_points, _ = row["points"]
                cells.append(
                    f'<tr class="{"first" if new else ""} {marks}">{head}<th scope="row">{_e(row["value"])}'
                    f'{" ●" if row["own"] else ""} <small>{_e(paper)}</small></th>'
                    f"<td>{_with_difference(row, 'giou')}</td><td>{_with_difference(row, 'ciou')}</td>"
                    f"<td>{percent(other['giou'])}</td><td>{percent(other['ciou'])}</td>"
                    f"<td>{object_points:.1f} / {background_points:.1f}</td></tr>"
                )
            tables.append(
                f"<details><summary>{_e(study.name)} <small>{_e(part)}</small></summary>"
                '<div class="wide"><table class="sweep"><thead><tr><th scope="col">varied</th><th scope="col">value</th>'
                '<th scope="col">gIoU, [SEG] and points</th><th scope="col">cIoU</th><th scope="col">gIoU, points</th>'
                '<th scope="col">cIoU</th><th scope="col">object / background points</th></tr></thead>'
                f"<tbody>{''.join(cells)}</tbody></table></div></details>"
            )
    if not tables:
        return ""
    recipes = "; ".join(
        f"{name}: K {values.num_points}, t_pos {values.t_pos:g}, t_neg {values.t_neg:g}, down_sample {values.down_sample}, "
        f"geometry {values.geometry}"
        for name, values in PAPER.items()
    )
    words = (
        "Each value alone, the others as the checkpoint has them (●), SAM's decoder prompted anew. In brackets the 95 % "
        f"interval of the difference from the checkpoint's own. The paper's values: {recipes}; a recipe takes all of them."
    )
    return _section("SasP's values, in numbers", f'<p class="soft">{_e(words)}</p>', *tables)


def _with_difference(row: dict[str, Any], name: str) -> str:
    bounds = row[f"{name}_interval"]
    if row["own"] or not bounds:
        return f"<strong>{percent(row[name])}</strong>"
    clear = "clear" if bounds[0] > 0 or bounds[1] < 0 else "open"
    change = f"{100 * row[f'{name}_difference']:+.1f} [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]"
    return f'<strong>{percent(row[name])}</strong> <small class="{clear}">{_e(change)}</small>'


# ------------------------------------------------------------------------------------------------ expressions


def _lead(shown: int, rows: int) -> str:
    kept = "all of them" if shown == rows else f"the first {shown}, as pictures; the table and expressions.csv have all"
    return (
        f'<p class="soft">{rows} expressions, {kept}. Keys: <kbd>j</kbd> <kbd>k</kbd> or <kbd>→</kbd> <kbd>←</kbd> next and '
        "previous card, <kbd>/</kbd> search.</p>"
    )


def _tools(scores: Sequence[Score]) -> str:
    groups = []
    for group in dict.fromkeys(score.group for score in scores):
        options = "".join(
            f'<option value="{_e(score.key)}">{_e(score.name)}</option>' for score in scores if score.group == group
        )
        groups.append(f'<optgroup label="{_e(group)}">{options}</optgroup>')
    return (
        '<form id="tools" autocomplete="off">'
        f'<label>score <select id="score">{"".join(groups)}</select></label>'
        '<label>order <select id="order"><option value="">as in the data</option><option value="1">lowest first</option>'
        '<option value="-1">highest first</option></select></label>'
        '<span class="range"><label>from <input id="low" type="number" min="0" max="100" step="5" value="0"></label>'
        '<label>to <input id="high" type="number" min="0" max="100" step="5" value="100"> %</label></span>'
        '<label class="search">words <input id="words" type="search" placeholder="in question or answer"></label>'
        '<output id="count"></output></form>'
    )


def _table(studies: Sequence[Study], rows: Sequence[dict[int, Row]], scores: Sequence[Score], shown: Sequence[int]) -> str:
    """A row an expression: its scores, a link to its card where there is one."""
    heads = "".join(
        f'<th scope="col" data-key="{_e(score.key)}"><button type="button" title="{_e(score)}">'
        f"{f'<small>{_e(score.group)}</small> ' if len(studies) > 1 else ''}{_e(score.name)}</button></th>"
        for score in scores
    )
    cards = set(shown)
    lines = []
    for n, found in enumerate(rows):
        row = next(iter(found.values()))
        values = _values(found, studies)
        question = _e(row.question)
        name = f'<a href="#e{n + 1}">{question}</a>' if n in cards else question
        cells = "".join(f"<td>{percent(values.get(score.key, math.nan))}</td>" for score in scores)
        lines.append(f'<tr data-n="{n}" {_data(found, values)}><td>{n + 1}</td><th scope="row">{name}</th>{cells}</tr>')
    return (
        f'<details id="all"><summary>Table of all {len(rows)} expressions</summary><div class="wide tall"><table id="table">'
        '<thead><tr><th scope="col" data-key=""><button type="button">#</button></th><th scope="col">expression</th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _data(found: dict[int, Row], values: dict[str, float]) -> str:
    """Attributes that the script sorts and filters by."""
    known = {key: round(100 * value, 2) for key, value in values.items() if math.isfinite(value)}
    words = " ".join([next(iter(found.values())).question, *(row.answer for row in found.values())]).lower()
    return f'data-scores="{_e(json.dumps(known))}" data-words="{_e(words)}"'


def _legend(studies: Sequence[Study]) -> str:
    """What the colours in the pictures mean."""
    prompts = [prompt for prompt in PROMPTS if any(prompt in study.prompts for study in studies)]
    keys = [
        '<span><span class="key truth"></span>what is meant</span>',
        f'<span><span class="key heat"></span>map, outlined where at least {HEADLINE:g}</span>',
        '<span><span class="key dot object"></span>object point</span>',
        '<span><span class="key dot background"></span>background point</span>',
        *(f'<span><span class="key {prompt}"></span>mask from {_e(PROMPTS[prompt])}</span>' for prompt in prompts),
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def _card(n: int, found: dict[int, Row], studies: Sequence[Study], record: dict[str, Any]) -> str:
    """One expression: a row of pictures a model."""
    row = next(iter(found.values()))
    values = _values(found, studies)
    there = "" if row.exists else ' · <span class="wrong">not in the picture</span>'
    models = "".join(_model(studies[m], one, len(studies) > 1, record) for m, one in found.items())
    percent_of = f"{100 * row.share:.1f} % of the picture"
    return (
        f'<article class="card" id="e{n + 1}" tabindex="-1" data-n="{n}" {_data(found, values)} aria-labelledby="h{n + 1}">'
        f'<header><h3 id="h{n + 1}"><a href="#e{n + 1}">{n + 1}</a> {_e(row.question)}</h3>'
        f'<p class="soft">{_e(row.part)} · {_e(row.image)} · {percent_of}{there}</p></header>{models}</article>'
    )


def _model(study: Study, row: Row, named: bool, record: dict[str, Any]) -> str:
    """The pictures of one model, and its answer where that is its own."""
    name = f"<h4>{_e(study.name)}</h4>" if named else ""
    answer = _e(row.answer).replace("[SEG]", '<span class="seg">SEG</span>')
    said = f'<p class="answer soft"><q>{answer}</q></p>' if record["protocol"] == "generate" else ""
    gone = '<p class="wrong">No [SEG] in the answer: nothing to look at, all masks are empty.</p>' if not row.num_seg else ""
    tiles, strip = [], ""
    for picture in row.pictures:
        width, height = picture.size
        image = (
            f'<a href="{_e(picture.file)}"><img src="{_e(picture.file)}" width="{width}" height="{height}" loading="lazy" '
            f'decoding="async" alt="{_e(picture.words)}"></a>'
        )
        if picture.name == "layers":
            words = f"image tokens of a layer of the language model, [SEG] of the {record['layer_seg']} layer"
            strip = f'<figure class="strip"><figcaption>{_e(words)}</figcaption><div>{image}</div></figure>'
        else:
            tiles.append(f'<figure>{image}<figcaption>{_caption(picture.name, row)}</figcaption></figure>')
    return f'<div class="model">{name}{said}{gone}<div class="tiles">{"".join(tiles)}</div>{strip}</div>'


def _caption(name: str, row: Row) -> str:
    """What a tile shows, and its number."""
    if name == "truth":
        return "what is meant" if row.exists else "the picture"
    if name == "dots":
        positive, negative, neutral = row.points
        return f"points <small>{positive} object, {negative} background, {neutral} neutral</small>"
    if name in MAPS:
        value = row.s_iou(name)
        return f"{_e(MAPS[name])} <small>S_IoU</small> <strong>{percent(value)}</strong>"
    own = ' <span class="own" title="the model\'s own mask">●</span>' if name == row.own else ""
    return f"mask from {_e(PROMPTS[name])}{own} <small>IoU</small> <strong>{percent(row.masks[name].iou)}</strong>"


# ------------------------------------------------------------------------------------------------ how it was made


def _record(record: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td>{_e(_plain(value))}</td></tr>' for name, value in record.items()
    )
    return (
        '<p class="soft">Definitions of all numbers: <code>utils/analysis/__init__.py</code>. Tables beside this page: '
        "<code>expressions.csv</code>, <code>summary.csv</code>, <code>thresholds.csv</code>.</p>"
        f'<div class="wide"><table class="record"><tbody>{rows}</tbody></table></div>'
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_plain(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value) or "-"
    return "-" if value is None else str(value)


def _e(value: object) -> str:
    """Text for HTML, between tags or in an attribute."""
    return html.escape(str(value))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# ------------------------------------------------------------------------------------------------ what it does

SCRIPT = """
"use strict";
const cards = document.getElementById("cards");
const body = document.querySelector("#table tbody");
const input = id => document.getElementById(id);
for (const item of [...cards.children, ...body.children]) item.scores = JSON.parse(item.dataset.scores);

function update() {
  const key = input("score").value, order = Number(input("order").value), words = input("words").value.trim().toLowerCase();
  const low = Number(input("low").value || 0), high = Number(input("high").value || 100);
  const narrowed = low > 0 || high < 100;
  for (const list of [cards, body]) {
    const items = [...list.children];
    items.sort((a, b) => {
      const one = a.scores[key], other = b.scores[key];
      if (order && (one === undefined) !== (other === undefined)) return one === undefined ? 1 : -1;  // no score: at the end
      return order && one !== other && one !== undefined ? order * (one - other) : a.dataset.n - b.dataset.n;
    });
    let shown = 0;
    for (const item of items) {
      const score = item.scores[key];
      const fits = !narrowed || (score !== undefined && score >= low && score <= high);
      item.hidden = !(fits && (!words || item.dataset.words.includes(words)));
      shown += !item.hidden;
    }
    list.append(...items);
    if (list === cards) {
      input("count").textContent = shown + " of " + items.length + " cards";
      input("none").hidden = shown > 0 || !items.length;
    }
  }
  for (const head of document.querySelectorAll("#table th[data-key]")) {
    const sorted = order ? head.dataset.key === key : head.dataset.key === "";
    head.setAttribute("aria-sort", !sorted ? "none" : order === -1 ? "descending" : "ascending");
  }
}

function go(step) {
  const visible = [...cards.children].filter(card => !card.hidden);
  if (!visible.length) return;
  const here = document.activeElement.closest(".card");
  let place = visible.indexOf(here);
  if (place >= 0) place += step;
  else {  // from where the page stands: the first card below its upper edge, or the one above it
    place = visible.findIndex(card => card.getBoundingClientRect().top > 8);
    if (place < 0) place = visible.length;
    if (step < 0) place -= 1;
  }
  const card = visible[Math.min(Math.max(place, 0), visible.length - 1)];
  card.focus({preventScroll: true});
  card.scrollIntoView({block: "start"});
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const step = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1}[event.key];
  if (step) go(step);
  else if (event.key === "/") input("words").focus();
  else return;
  event.preventDefault();
});
input("tools").addEventListener("input", update);
input("tools").addEventListener("submit", event => event.preventDefault());
document.querySelector("#table thead").addEventListener("click", event => {
  const head = event.target.closest("th[data-key]");
  if (!head) return;
  const key = head.dataset.key;
  if (!key) input("order").value = "";
  else {
    const again = input("score").value === key && input("order").value === "1";
    input("score").value = key;
    input("order").value = again ? "-1" : "1";
  }
  update();
});
update();
"""

# ------------------------------------------------------------------------------------------------ its look

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f6f8; --ink: #1c2026; --soft: #5a626d; --line: #d9dde3; --focus: #0072b2;
  --wrong: #b3261e; --map: #d55e00;
""" + "".join(f"  --{prompt}: rgb{colour};\n" for prompt, colour in TINTS.items()) + """}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1d2127; --ink: #e8eaed; --soft: #a3abb6; --line: #363c45; --focus: #56b4e9;
    --wrong: #ff9a92; --map: #e8833a;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
h4 { font-size: .9rem; margin: .8rem 0 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .15em; }
small, .soft { color: var(--soft); font-weight: 400; }
small { font-size: .82em; }
.soft { font-size: .88rem; }
.clear { color: var(--ink); }
kbd { padding: 0 .35em; border: 1px solid var(--line); border-radius: .3em; font: inherit; font-size: .85em; }
code { font-size: .9em; }
.seg { padding: .05em .5em; border-radius: .6em; background: var(--both); color: #14171b; font-size: .75em; font-weight: 700;
  vertical-align: .1em; }
.own { color: var(--both); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
td { white-space: nowrap; }
thead th { font-size: .82rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
.summary { padding: 1rem; margin: .8rem 0; border-radius: .8rem; background: var(--panel); border: 1px solid var(--line); }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.4rem; margin-top: .5rem; }
.tables .wide { max-width: 100%; }
.bar { display: inline-block; width: 4.5rem; height: .6rem; margin-right: .5rem; border-radius: .3rem; background: var(--line);
  overflow: hidden; }
.bar span { display: block; height: 100%; }
.bar .map { background: var(--map); }
""" + "".join(f".key.{prompt}, .bar .{prompt} {{ background: var(--{prompt}); }}\n" for prompt in TINTS) + """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
.plot { padding: .8rem; border-radius: .8rem; background: var(--panel); border: 1px solid var(--line); }
.plot.broad { grid-column: 1 / -1; }
.plot picture { display: block; overflow-x: auto; }
.plot.broad img { min-width: 46rem; }
.plot img { display: block; width: 100%; height: auto; border-radius: .3rem; }
.plot figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .4rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.sweep tr.first > * { border-top: 1px solid var(--line); }
.sweep tr.mine > td, .sweep tr.mine > th[scope=row] { background: color-mix(in srgb, var(--both) 14%, transparent); }
#tools { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.1rem; padding: .6rem .8rem; margin: .6rem 0;
  border-radius: .6rem; background: var(--panel); border: 1px solid var(--line); font-size: .9rem; }
#tools label { color: var(--soft); }
#tools select, #tools input { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: .35rem; padding: .15rem .35rem; max-width: 16rem; }
#tools input[type=number] { width: 4.2rem; }
#tools .range { display: inline-flex; gap: .6rem; }
#count { margin-left: auto; color: var(--soft); }
.tall { max-height: 26rem; overflow-y: auto; border: 1px solid var(--line); border-radius: .5rem; margin-top: .5rem; }
#table { font-size: .85rem; }
#table th, #table td { padding: .25rem .6rem; }
#table thead th { position: sticky; top: 0; background: var(--panel); vertical-align: bottom; }
#table tbody th { min-width: 13rem; }
#table button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: left; cursor: pointer; }
#table [aria-sort=ascending] button::after { content: " ↑"; }
#table [aria-sort=descending] button::after { content: " ↓"; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem 1.1rem; font-size: .88rem; color: var(--soft); }
.legend > span { display: inline-flex; align-items: center; gap: .4rem; }
.key { display: inline-block; width: 1rem; height: 1rem; border-radius: .25rem; flex: none; }
.key.truth { background: #8a929c; border: 3px solid #ffffff; outline: 1px solid #1c2026; }
.key.heat { background: linear-gradient(90deg, #781c6d, #ed6925, #fcffa4); }
.key.dot { width: .8rem; height: .8rem; border-radius: 50%; border: 2px solid #ffffff; outline: 1px solid #8a929c; }
.key.object { background: #26d06c; }
.key.background { background: #f03e3e; }
.card { margin: 1rem 0; padding: .9rem 1rem 1rem; border-radius: .8rem; background: var(--panel); border: 1px solid var(--line);
  scroll-margin-top: .6rem; break-inside: avoid; content-visibility: auto; contain-intrinsic-size: auto 22rem; }
.card:focus, .card:target { outline: 2px solid var(--focus); outline-offset: 2px; }
.card h3 a { color: var(--soft); text-decoration: none; font-weight: 500; margin-right: .3rem; }
.answer { margin: .2rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .7rem .6rem; margin-top: .6rem; }
.tiles img, .strip img { display: block; height: auto; border-radius: .35rem; }
.tiles img { width: 100%; }
figcaption { font-size: .84rem; line-height: 1.35; padding-top: .25rem; }
.strip { margin-top: .7rem; }
.strip figcaption { color: var(--soft); padding: 0 0 .2rem; }
.strip div { overflow-x: auto; }
.record { font-size: .85rem; }
.record td { white-space: normal; overflow-wrap: anywhere; }
.record tr > * { border-bottom: 1px solid var(--line); }
.wrong { color: var(--wrong); }
@media (max-width: 40rem) {
  body { padding: 1rem .7rem 3rem; }
  h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); }
  #count { margin-left: 0; }
  .search, .search input { width: 100%; max-width: none !important; }
}
@media print { #tools, #all { display: none; } .card { content-visibility: visible; } }
"""
