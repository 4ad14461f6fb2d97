"""Two runs of `test_read.py` side by side, expression by expression, with the uncertainty of every difference.

    python -m utils.compare A B                              the table
    python -m utils.compare A B --html compare.html          and a page with the expressions that changed most, in pictures

In go two folders with a results.json and, for intervals and pictures, the predictions_*.jsonl of the same evaluation. Out come
a text and one HTML file that needs nothing else. Expressions are paired by data set, split, picture, place and question; what
only one run has is counted and left out. Runs that were not measured in the same way are compared under a warning.

    B - A         of gIoU, cIoU and, where presence was judged, See; the scores' definitions are those of `utils.metrics`
    95 % interval between the 2.5 % and 97.5 % quantiles of B - A over resamples of the pictures, drawn with replacement. The
                  expressions of a picture stay together, and a resample is the same for both runs: a paired cluster bootstrap
    not better    share of the resamples in which B - A is 0 or less. Near 0: B is better; near 1: it is worse or the same

Legend: E paired expressions of a data set · M their pictures · R resamples · I, U pixels of intersection and union.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import sys
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from utils.cli import plain_errors
from utils.files import write_text
from utils.metrics import UNKNOWN, Expression, Overlap, resampled_sums, summarize
from utils.outputs import check_file
from utils.prediction_log import read_finished
from utils.predictions import expression, predictions_name
from utils.scores import differences, read_results

RESAMPLES = 2000
MOST_RESAMPLES = 10**6
GENERATOR = '<meta name="generator" content="READ, utils.compare">'
"""In each page, so that it is known as ours when it is to be replaced."""
TOP = 20
CONFIDENCE = 0.95
NAMES = {"giou": "gIoU", "ciou": "cIoU", "see": "See"}

Record = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("a", type=Path, metavar="A", help="folder that test_read.py wrote: the run before")
    parser.add_argument("b", type=Path, metavar="B", help="likewise: the run after")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a page with the expressions that changed most")
    parser.add_argument("--top", type=int, default=TOP, help=f"expressions on the page (default: {TOP})")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help=f"of the pictures, for the intervals (default: {RESAMPLES})"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the table, writes the page."""
    options = build_parser().parse_args(argv)
    with plain_errors("compare"):
        print(compare_folders(options.a, options.b, options.html, options.top, options.resamples))
    return 0


def compare_folders(
    a: str | Path, b: str | Path, html: str | Path | None = None, top: int = TOP, resamples: int = RESAMPLES, seed: int = 0
) -> str:
    """The text that compares two folders of `test_read.py`; with `html` it writes the page there too.

    Args:
        top: expressions that the page shows, at most.
        resamples, seed: of the bootstrap; the same seed gives the same intervals on every machine.

    Raises:
        FileNotFoundError: a folder without results.json. IsADirectoryError: `html` is a folder.
        ValueError: a damaged results.json, no data set in common, bad numbers, or `html` is there and is no page of ours.
    """
    if top < 0 or not 1 <= resamples <= MOST_RESAMPLES:
        raise ValueError(
            f"--top must be 0 or more and --resamples from 1 to {MOST_RESAMPLES}, found {top} and {resamples}"
        )
    if html is not None:
        check_file(Path(html), "--html", GENERATOR)
    comparison = Comparison.of(read_run(Path(a)), read_run(Path(b)), resamples, seed)
    text = as_text(comparison)
    if html is not None:
        from utils.compare_page import page  # draws, so it is imported only where a page is wanted

        Path(html).parent.mkdir(parents=True, exist_ok=True)
        write_text(html, page(comparison, top))
        text += f"\nwritten: {html}"
    return text


# ------------------------------------------------------------------------------------------------ what is compared


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that test_read.py wrote."""

    folder: Path
    settings: dict[str, Any]
    """results.json without its scores."""
    rows: dict[tuple[str, str], dict[str, Any]]
    """(data set, split) -> its scores."""

    def predictions(self, dataset: str, split: str) -> list[Record]:
        """The records of a data set, every one with its pixels.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, of another data set, or an older test_read.py wrote them.
        """
        path = self.folder / predictions_name(dataset, split)
        records, about = read_finished(path)
        settings = about["settings"] if about else {}
        of = settings.get("dataset", dataset), settings.get("split", split)
        if of != (dataset, split):
            raise ValueError(f"{path} is of {'|'.join(map(str, of))}, not of {dataset}|{split}")
        for number, record in enumerate(records, 1):
            if record.get("intersection") is None or record.get("union") is None:
                raise ValueError(f"{path}, record {number} lacks intersection and union, whole numbers of pixels")
        return records


@dataclasses.dataclass(frozen=True)
class Pair:
    """One expression in both runs."""

    dataset: str
    split: str
    a: Record
    b: Record

    @property
    def ious(self) -> tuple[float, float]:
        """IoU of A's mask and of B's."""
        return iou_of(self.a), iou_of(self.b)

    @property
    def change(self) -> float:
        """IoU of B minus IoU of A."""
        return iou_of(self.b) - iou_of(self.a)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One score of both runs on the same expressions."""

    name: str
    """giou, ciou or see."""
    a: float
    b: float
    interval: tuple[float, float] | None = None
    """Of B - A; None without predictions, or with a single picture."""
    not_better: float | None = None
    """Share of resamples in which B - A is 0 or less."""

    @property
    def value(self) -> float:
        return self.b - self.a


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that both runs measured."""

    dataset: str
    split: str
    scores: list[Difference]
    pairs: list[Pair]
    """In the data set's order; empty without predictions."""
    images: int
    judged: tuple[bool, bool]
    """Presence was judged in A, in B."""
    notes: list[str]
    """What keeps it from being compared in full."""

    @property
    def name(self) -> str:
        return f"{self.dataset}|{self.split}"

    def counts(self) -> tuple[int, int, int]:
        """Expressions whose IoU is higher in B, the same, lower: by any amount."""
        changes = [pair.change for pair in self.pairs]
        return sum(c > 0 for c in changes), sum(c == 0 for c in changes), sum(c < 0 for c in changes)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that text and page say."""

    a: Run
    b: Run
    warnings: list[str]
    """In what the runs were not measured alike."""
    sets: list[DataSet]
    resamples: int

    @classmethod
    def of(cls, a: Run, b: Run, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
        """Compares the data sets that both runs have, in A's order."""
        both = [key for key in a.rows if key in b.rows]
        if not both:
            raise ValueError(
                f"{a.folder} and {b.folder} have no data set in common: {_names(a.rows)} in A, {_names(b.rows)} in B"
            )
        records = [{**run.settings, "results": list(run.rows.values())} for run in (a, b)]
        return cls(a, b, differences(*records), [compare_set(a, b, *key, resamples, seed) for key in both], resamples)

    def most_changed(self, top: int) -> list[Pair]:
        """The `top` expressions whose IoU changed most, either way; those that did not change are never among them.

        Of equal changes the one that comes earlier in its data set goes first: data sets take turns, where many masks
        appeared or vanished as a whole.
        """
        pairs = [(n, pair) for part in self.sets for n, pair in enumerate(part.pairs) if pair.change]
        return [pair for _, pair in sorted(pairs, key=lambda entry: (-abs(entry[1].change), entry[0]))[:top]]


def read_run(folder: Path) -> Run:
    """Reads a results.json.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged; the message says how.
    """
    settings = read_results(folder)
    rows = {(row["dataset"], row["split"]): row for row in settings.pop("results")}
    return Run(folder, settings, rows)


# ------------------------------------------------------------------------------------------------ pairs


def compare_set(a: Run, b: Run, dataset: str, split: str, resamples: int, seed: int) -> DataSet:
    """One data set: from the predictions of both, or from the scores alone where there are none."""
    rows = [run.rows[dataset, split] for run in (a, b)]
    judged = tuple(row.get("see") is not None for row in rows)
    notes, records = [], []
    for run, letter in ((a, "A"), (b, "B")):
        try:
            records.append(_placed(run.predictions(dataset, split), dataset, run.settings.get("dataset_dir")))
        except (OSError, ValueError) as error:
            notes.append(f"no predictions of {letter}, hence no intervals: {error}")
    keys = []
    if len(records) == 2:
        keys = [key for key in records[0] if key in records[1]]
        for own, letter in zip(records, "AB", strict=True):
            if alone := len(own) - len(keys):
                left_out = ": left out, also from the scores here" if keys else ""
                notes.append(f"{_count(alone, 'expression')} only in {letter}{left_out}")
        if not keys:
            notes.append("the runs share no expression, hence no intervals; the scores are those of results.json")
    if not keys:
        scores = [
            Difference(name, *(_score(row, name) for row in rows)) for name in NAMES if name != "see" or all(judged)
        ]
        return DataSet(dataset, split, scores, [], 0, judged, notes)

    pairs = [Pair(dataset, split, records[0][key], records[1][key]) for key in keys]
    if retargeted := sum(_truth(pair.a) != _truth(pair.b) for pair in pairs):
        notes.append(f"the truth of {_count(retargeted, 'expression')} differs: the data were changed in between")
    for row, found, letter in zip(rows, records, "AB", strict=True):
        if not _agrees(row, list(found.values())):
            notes.append(f"the predictions of {letter} do not give the scores in its results.json: another run's?")
        if differing := sum(_pixels(record) != expression(record)[1:3] for record in found.values()):
            notes.append(f"the stored counts of {_count(differing, 'expression')} of {letter} are not those of the masks")
    places = [key[:2] for key in keys]
    number = {place: m for m, place in enumerate(dict.fromkeys(places))}
    image_of_E = np.array([number[place] for place in places])
    scores = paired_bootstrap(image_of_E, [p.a for p in pairs], [p.b for p in pairs], all(judged), resamples, seed)
    return DataSet(dataset, split, scores, pairs, len(number), judged, notes)


def _placed(records: list[Record], dataset: str, folder: str | None) -> dict[tuple[Any, ...], Record]:
    """(picture, how often it came before, place of the question, question) -> record, in the data set's order.

    A picture is known by its path below the data folder, so that runs on two machines meet. Its index is not part of the
    key, or one more picture in the folder would part all that follow; it tells entries apart that show the same picture.
    """
    records = sorted(records, key=lambda record: (record["image_index"], record["question_index"]))
    entries: dict[str, list[int]] = collections.defaultdict(list)
    placed = {}
    for record in records:
        picture = _below(record["image"], dataset, folder)
        indices = entries[picture]
        if record["image_index"] not in indices:
            indices.append(record["image_index"])
        key = (picture, indices.index(record["image_index"]), record["question_index"], record["question"])
        if key in placed:
            raise ValueError(f"image {key[0]}, question {key[2]} is there twice: predictions of two runs in one file?")
        placed[key] = record
    return placed


def _pixels(record: Record) -> tuple[int, int]:
    return record["intersection"], record["union"]


def _truth(record: Record) -> tuple[Any, ...]:
    """What a mask is measured against."""
    return record["target"], record.get("ignored"), record["exists"]


def _below(path: str, *folders: str | None) -> str:
    """A path without the first of the folders that it is in."""
    for folder in folders:
        if folder and PurePath(path).is_relative_to(folder):
            return PurePath(path).relative_to(folder).as_posix()
    return path


# ------------------------------------------------------------------------------------------------ scores


def iou_of(record: Record) -> float:
    """The IoU that its pixels give."""
    return Overlap(record["intersection"], record["union"]).iou


def scores_of(records: list[Record], judged: bool) -> dict[str, Any]:
    """What `utils.metrics` makes of the stored pixels and, if presence was `judged`, of the presence."""
    rows = [
        Expression(0, *_pixels(r), 0, 0, *(UNKNOWN if r[n] is None else int(r[n]) for n in ("exists", "predicted_exists")))
        for r in records
    ]
    return summarize(rows, generated=judged, resamples=0)


FINE = 2**30
"""Differences of IoU are summed in units of 1 / FINE: such sums are exact, whatever order a machine adds in."""


def paired_bootstrap(
    image_of_E: np.ndarray, a: list[Record], b: list[Record], judged: bool, resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """Scores of two runs on the same E expressions, with the interval of their difference.

    Args:
        image_of_E: (E,) int, the picture of each expression, numbered 0 to M - 1.
        a, b: E records each, in the same order.
        judged: presence was judged in both.
        resamples, seed: `numpy.random.default_rng(seed).integers(M, size=(resamples, M))` are the pictures of each resample.

    Returns:
        Of giou, ciou and, if presence was judged, see; without interval of a single picture, which a resample cannot vary.
    """
    names = [name for name in NAMES if name != "see" or judged]
    scores_a, scores_b = scores_of(a, judged), scores_of(b, judged)
    images = int(image_of_E.max()) + 1
    if images < 2:
        return [Difference(name, scores_a[name], scores_b[name]) for name in names]
    columns = {
        "count": np.ones(len(a)),
        "giou": np.rint([FINE * (iou_of(y) - iou_of(x)) for x, y in zip(a, b, strict=True)]) / FINE,
        "see": [_right(y) - _right(x) for x, y in zip(a, b, strict=True)],
        **{f"{kind} {run}": [r[kind] for r in rs] for run, rs in (("a", a), ("b", b)) for kind in ("intersection", "union")},
    }
    per_image = np.stack([np.bincount(image_of_E, values, images) for values in columns.values()], axis=1)
    sums = dict(zip(columns, resampled_sums(per_image, resamples, seed).T, strict=True))
    of_resample = {
        "giou": sums["giou"] / sums["count"],
        "ciou": sums["intersection b"] / (sums["union b"] + 1e-10) - sums["intersection a"] / (sums["union a"] + 1e-10),
        "see": sums["see"] / sums["count"],
    }
    found = []
    for name in names:
        low, high = np.quantile(of_resample[name], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
        not_better = float((of_resample[name] <= 0).mean())
        found.append(Difference(name, scores_a[name], scores_b[name], (low, high), not_better))
    return found


def _right(record: Record) -> int:
    """1 where the predicted presence is the true one."""
    return int(record["exists"] == record["predicted_exists"])


def _score(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def _agrees(row: dict[str, Any], records: list[Record]) -> bool:
    """The records give the scores that results.json holds."""
    found = scores_of(records, judged=False)
    return all(math.isclose(_score(row, name), found[name], abs_tol=1e-6) for name in ("giou", "ciou"))


# ------------------------------------------------------------------------------------------------ text


def as_text(comparison: Comparison) -> str:
    """The table, scores and differences in percent, under what must be known to read it."""
    lines = [f"{letter}  {run.folder}  ({summary(run)})" for letter, run in (("A", comparison.a), ("B", comparison.b))]
    if comparison.warnings:
        lines += ["", f"WARNING: {ALIKE}", *(f"  - {warning}" for warning in comparison.warnings)]
    width = max(len(part.name) for part in comparison.sets) + 2
    lines += ["", f"{'percent':<{width}}{'':<5}{'A':>8}{'B':>8}{'B - A':>9}   {'95 % interval':<18}{'B not better':>13}"]
    for part in comparison.sets:
        for n, score in enumerate(part.scores):
            cells = cells_of(score)
            lines.append(
                f"{part.name if n == 0 else '':<{width}}{NAMES[score.name]:<5}{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}   "
                f"{cells[3]:<18}{cells[4]:>13}".rstrip()
            )
        lines += [f"{'':<{width}}{line}" for line in ([counted(part)] if part.pairs else []) + part.notes]
    if explained := how(comparison):
        lines += ["", *explained]
    return "\n".join(lines)


ALIKE = "the runs were not measured in the same way, so a difference may come from that instead of the models."


def how(comparison: Comparison) -> list[str]:
    """What interval and share are, a line each; nothing where there are none."""
    if not any(part.pairs for part in comparison.sets):
        return []
    return [
        f"95 % interval: of B - A over {comparison.resamples} resamples of the pictures, the same for both runs.",
        "B not better: share of these resamples in which B - A is 0 or less.",
    ]


def summary(run: Run) -> str:
    """The model and how it was measured, in a line."""
    settings = run.settings
    words = [
        str(settings.get("version", "unknown model")),
        f"answers {'forced' if settings.get('protocol') == 'forced' else 'generated'}" if settings.get("protocol") else "",
        f"{settings['templates']} templates" if settings.get("templates") else "",
        str(settings.get("compat") or ""),
        f"first {settings['limit']} pictures" if settings.get("limit") is not None else "",
    ]
    return " · ".join(word for word in words if word)


def counted(part: DataSet) -> str:
    """How much was paired, and how many expressions changed which way."""
    better, same, worse = part.counts()
    return (
        f"{_count(len(part.pairs), 'expression')} of {_count(part.images, 'picture')}: "
        f"B better on {better}, the same on {same}, worse on {worse}"
    )


def cells_of(score: Difference) -> tuple[str, str, str, str, str]:
    """A, B, B - A, interval, share: percent with two digits, the share as it is; `-` for what is not known."""
    interval = "-" if score.interval is None else "[{}, {}]".format(*map(_signed, score.interval))
    share = "-" if score.not_better is None else f"{score.not_better:.3f}"
    return _percent(score.a), _percent(score.b), _signed(score.value), interval, share


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    """With its sign, which 0 does not have."""
    rounded = round(100 * value, 2)
    return "-" if math.isnan(value) else f"{rounded:+.2f}" if rounded else "0.00"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _names(keys: Iterable[tuple[str, str]]) -> str:
    return ", ".join("|".join(key) for key in keys) or "none"


if __name__ == "__main__":
    sys.exit(main())
