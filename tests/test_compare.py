"""Two runs side by side: the pairs, the paired interval against plain Python, and the page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import frPyObjects

from utils import visualize
from utils.compare import (
    Comparison,
    as_text,
    compare_folders,
    main,
    paired_bootstrap,
    read_run,
    scores_of,
)
from utils.predictions import encode_mask, hash_of_lines

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 40, 60


def square(x: int, width: int = 20) -> np.ndarray:
    """A mask of 20 rows and `width` columns from column x on; no column is no mask."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, x : x + width] = 1
    return mask


def record(
    image: int, question: int, mask: np.ndarray, target: np.ndarray, /, *, path: str | None = None, **more: object
) -> dict:
    """A line of a predictions file as `utils.predictions` describes it."""
    intersection, union = int((mask & target).sum()), int((mask | target).sum())
    found = {
        "image_index": image, "question_index": question, "image": path or f"data/images/{image}.png",
        "question": f"thing {question}", "prompt": "Where?", "answer": "Sure, [SEG] ." if mask.any() else "There is none.",
        "exists": bool(target.any()), "predicted_exists": bool(mask.any()), "num_seg": int(mask.any()),
        "iou": intersection / (union + 1e-5) if union else 1.0, "intersection": intersection, "union": union,
        "mask": encode_mask(mask), "target": encode_mask(target),
        "box": None, "confidence": 0.5, "points": [[15.0, 20.0], [50.0, 5.0]], "point_labels": [1, 0], "seconds": 0.1,
    }  # fmt: skip
    return found | more


def write_run(folder: Path, sets: dict[str, list[dict]], protocol: str = "forced", predictions: bool = True, **settings) -> Path:
    """A folder as test_read.py leaves it: {"name|split": records}."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, records in sets.items():
        dataset, split = name.split("|")
        scores = scores_of(records, judged=protocol == "generate")
        images = len({r["image_index"] for r in records})
        rows.append({"dataset": dataset, "split": split, "images_in_split": 9, **scores, "images": images, "protocol": protocol})
        if predictions:
            lines = "".join(json.dumps(r) + "\n" for r in records)
            (folder / f"predictions_{dataset}_{split}.jsonl").write_text(lines)
    result = {
        "version": "some/model", "protocol": protocol, "templates": "fixed", "seed": None, "compat": "correct",
        "conv_type": "llava_v1", "sasp": {"num_points": 30, "t_pos": 0.8}, "dtype": "float32", "dataset_dir": "data",
        "limit": None, "versions": {"python": "3"}, "command": "test_read.py", **settings, "results": rows,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(result))
    return folder


def some_records(seed: int, images: int = 7) -> list[dict]:
    """One to three expressions a picture, masks off by some columns, some denied, some asked for in vain."""
    random = np.random.default_rng(seed)
    records = []
    for image in range(images):
        for question in range(1 + image % 3):
            target = square(10 + 3 * question, 0 if (image + question) % 4 == 3 else 20)
            mask = square(int(random.integers(0, 35)), 0 if random.random() < 0.2 else 20)
            records.append(record(image, question, mask, target))
    return records


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ, answers generated, their pictures missing."""
    return tuple(write_run(tmp_path / name, {"fprefcoco|val": some_records(n)}, "generate") for n, name in enumerate("ab"))


class Page(HTMLParser):
    """The tags of a page, every one closed in its turn."""

    VOID = {"meta", "img", "path", "rect", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.words = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str, kind: str | None = None) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag and kind in (None, attrs.get("class"))]

    def pictures(self) -> list[np.ndarray]:
        prefix = "data:image/jpeg;base64,"
        sources = [attrs["src"] for attrs in self.all("img")]
        assert all(source.startswith(prefix) for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.removeprefix(prefix))))).astype(int) for s in sources]


# ------------------------------------------------------------------------------------------------ numbers


def quantile(values: list[float], share: float) -> float:
    """Linear between the neighbours."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_the_paired_interval_is_that_of_plain_python():
    """Whole pictures are drawn, the same for both runs; each resample is scored from its records, one by one."""
    a, b = some_records(1), some_records(2)
    images = max(r["image_index"] for r in a) + 1
    scores = {
        "giou": lambda rs: sum(r["iou"] for r in rs) / len(rs),
        "ciou": lambda rs: sum(r["intersection"] for r in rs) / (sum(r["union"] for r in rs) + 1e-10),
        "see": lambda rs: sum(r["exists"] == r["predicted_exists"] for r in rs) / len(rs),
    }
    drawn = np.random.default_rng(5).integers(images, size=(400, images)).tolist()
    of_image = [[[r for r in run if r["image_index"] == image] for image in range(images)] for run in (a, b)]
    found = paired_bootstrap(np.array([r["image_index"] for r in a]), a, b, True, resamples=400, seed=5)
    assert [score.name for score in found] == ["giou", "ciou", "see"]
    for score in found:
        rule = scores[score.name]
        assert (score.a, score.b) == pytest.approx((rule(a), rule(b)))
        changes = []
        for resample in drawn:
            one, other = ([r for image in resample for r in run[image]] for run in of_image)
            changes.append(rule(other) - rule(one))
        assert score.interval == pytest.approx((quantile(changes, 0.025), quantile(changes, 0.975)), abs=1e-8)
        assert score.not_better == pytest.approx(sum(change <= 1e-12 for change in changes) / 400)
        assert score.interval[0] < score.value < score.interval[1]


def test_the_pictures_are_drawn_and_not_the_expressions():
    """A picture with many expressions that all gained is one piece of luck, not many."""
    a = [record(0, n, square(40), square(10)) for n in range(30)] + [record(m, 0, square(10), square(10)) for m in range(1, 6)]
    b = [record(r["image_index"], r["question_index"], square(10), square(10)) for r in a]
    giou = paired_bootstrap(np.array([r["image_index"] for r in a]), a, b, False)[0]
    assert giou.value == pytest.approx(30 / 35, abs=1e-6)
    assert giou.interval[0] == 0, "in some resamples the one picture does not occur"
    assert giou.not_better == pytest.approx((5 / 6) ** 6, abs=0.03)


def test_a_run_against_itself_differs_by_nothing(runs):
    comparison = Comparison.of(read_run(runs[0]), read_run(runs[0]))
    (part,) = comparison.sets
    assert [(s.value, s.interval, s.not_better) for s in part.scores] == [(0.0, (0.0, 0.0), 1.0)] * 3
    assert part.counts() == (0, len(part.pairs), 0)
    assert comparison.most_changed(20) == [] and comparison.warnings == [] and part.notes == []
    assert "[0.00, 0.00]" in as_text(comparison) and "-0.00" not in as_text(comparison)


def test_a_known_difference_is_found(tmp_path: Path):
    """Every expression gains the same, so every resample does: an interval without width."""
    targets = [record(m, 0, square(10), square(10)) for m in range(5)]
    worse = [record(m, 0, square(20), square(10)) for m in range(5)]  # half of it: I / U = 200 / 600
    a, b = write_run(tmp_path / "a", {"refcoco|val": worse}), write_run(tmp_path / "b", {"refcoco|val": targets})
    text = compare_folders(a, b)
    assert re.search(r"refcoco\|val +gIoU +33\.33 +100\.00 +\+66\.67 +\[\+66\.67, \+66\.67\] +0\.000", text)
    assert re.search(r"cIoU +33\.33 +100\.00 +\+66\.67 +\[\+66\.67, \+66\.67\] +0\.000", text)
    assert "5 expressions of 5 pictures: B better on 5, the same on 0, worse on 0" in text
    assert "See" not in text and "WARNING" not in text
    assert "-66.67" in compare_folders(b, a) and "1.000" in compare_folders(b, a)


def test_see_is_compared_where_both_judged_it(runs, tmp_path: Path):
    forced = write_run(tmp_path / "forced", {"fprefcoco|val": some_records(0)})
    assert " See " in compare_folders(*runs)
    assert " See " not in compare_folders(runs[0], forced)


def test_a_single_picture_has_no_interval(tmp_path: Path):
    a, b = (write_run(tmp_path / n, {"refcoco|val": [record(0, 0, square(x), square(10))]}) for n, x in (("a", 15), ("b", 11)))
    (part,) = Comparison.of(read_run(a), read_run(b)).sets
    assert all(score.interval is None and score.not_better is None for score in part.scores)
    assert part.scores[0].value > 0
    compare_folders(a, b, tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------ pairs


def test_what_only_one_run_has_is_counted_and_left_out(tmp_path: Path):
    """Also from the scores, so that B - A is what the columns say; a changed question is no pair."""
    a = some_records(1)
    b = [dict(r) for r in a if r["image_index"] != 6]  # its one expression
    b[0]["question"] = "something else"
    one, two = write_run(tmp_path / "a", {"refcoco|val": a}), write_run(tmp_path / "b", {"refcoco|val": b})
    (part,) = Comparison.of(read_run(one), read_run(two)).sets
    assert len(part.pairs) == len(a) - 2
    assert [note.split(":")[0] for note in part.notes] == ["2 expressions only in A", "1 expression only in B"]
    assert all(score.value == 0 for score in part.scores)
    text = compare_folders(one, two)
    assert "2 expressions only in A" in text and "WARNING" in text
    assert f"{len(a)} expressions against {len(b)}" in text


def test_runs_that_share_no_expression_say_so(tmp_path: Path):
    a = some_records(1)
    b = [dict(r, question="other") for r in a]
    text = compare_folders(*(write_run(tmp_path / n, {"refcoco|val": r}) for n, r in (("a", a), ("b", b))))
    assert "share no expression" in text and f"{len(a)} expressions only in A" in text and "gIoU" in text


def test_pictures_are_known_by_their_path_below_the_data_folder(tmp_path: Path):
    """Two machines keep their data in two places; and one more picture at the front parts nothing that follows."""
    a = some_records(1)
    b = [dict(r, image=f"/elsewhere/images/{r['image_index']}.png", image_index=r["image_index"] + 1) for r in a]
    b.insert(0, record(0, 0, square(10), square(10), path="/elsewhere/images/new.png"))
    one = write_run(tmp_path / "a", {"refcoco|val": a})
    two = write_run(tmp_path / "b", {"refcoco|val": b}, dataset_dir="/elsewhere")
    (part,) = Comparison.of(read_run(one), read_run(two)).sets
    assert len(part.pairs) == len(a) and part.counts() == (0, len(a), 0)
    assert part.notes == ["1 expression only in B: left out, also from the scores here"]
    assert "limit" not in compare_folders(one, two)


def test_entries_that_show_the_same_picture_stay_apart(tmp_path: Path):
    a = [record(m, 0, square(10 + m), square(10), path="data/same.png") for m in range(3)]
    one = write_run(tmp_path / "a", {"refcoco|val": a})
    (part,) = Comparison.of(read_run(one), read_run(one)).sets
    assert part.images == 3 and [pair.a["image_index"] for pair in part.pairs] == [0, 1, 2]


@pytest.mark.parametrize(
    "settings", [{"templates": "random"}, {"limit": 40}, {"compat": "released"}, {"conv_type": "v"}, {"seed": 1}], ids=str
)
def test_runs_that_were_measured_otherwise_get_a_warning(runs, tmp_path: Path, settings):
    """A warning at the top of text and page, and the table all the same."""
    other = write_run(tmp_path / "c", {"fprefcoco|val": some_records(2)}, "generate", **settings)
    text = compare_folders(runs[0], other, tmp_path / "page.html")
    lines = text.splitlines()
    assert lines[3].startswith("WARNING: the runs were not measured in the same way")
    (name,) = settings
    assert name in lines[4] and text.index("WARNING") < text.index("gIoU")
    page = (tmp_path / "page.html").read_text()
    assert Page(page).all("div", "warning") and page.index('class="warning"') < page.index("<table")
    assert "WARNING" not in compare_folders(*runs, tmp_path / "page.html")
    assert not Page((tmp_path / "page.html").read_text()).all("div", "warning")


def test_protocols_are_not_tabulated_together_in_silence(runs, tmp_path: Path):
    """A forced score beside a generated one is no comparison of models."""
    forced = write_run(tmp_path / "forced", {"fprefcoco|val": some_records(0), "refcoco|val": some_records(0)})
    text = compare_folders(runs[0], forced)
    assert re.search(r"WARNING.*\n  - protocol: generate against forced", text)
    assert "refcoco|val: only in the second" in text and "\nrefcoco|val " not in text


def test_truths_that_changed_and_scores_of_another_run_are_said(runs, tmp_path: Path):
    changed = some_records(0)
    changed[0]["target"] = encode_mask(square(0))
    other = write_run(tmp_path / "c", {"fprefcoco|val": changed}, "generate")
    assert "the truth of 1 expression differs" in compare_folders(runs[0], other)
    (other / "predictions_fprefcoco_val.jsonl").write_text((runs[1] / "predictions_fprefcoco_val.jsonl").read_text())
    assert "the predictions of B do not give the scores in its results.json" in compare_folders(runs[0], other)


def test_without_predictions_the_scores_are_compared_alone(runs, tmp_path: Path):
    bare = write_run(tmp_path / "bare", {"fprefcoco|val": some_records(0)}, "generate", predictions=False)
    text = compare_folders(bare, runs[1], tmp_path / "page.html")
    assert re.search(r"no predictions of A, hence no intervals: .*predictions_fprefcoco_val.jsonl does not exist", text)
    found, wanted = (Comparison.of(read_run(a), read_run(runs[1])).sets[0].scores for a in (bare, runs[0]))
    assert [(s.name, s.a, s.b) for s in found] == [(s.name, s.a, s.b) for s in wanted]
    assert all(s.interval is None and s.not_better is None for s in found) and "resamples" not in text
    page = Page((tmp_path / "page.html").read_text())
    assert not page.all("article") and "only with the predictions of both runs" in page.words


@pytest.mark.parametrize("line", ["{", "{}", '{"image_index": 0}'])
def test_damaged_predictions_are_said_with_their_line(runs, line):
    file = runs[1] / "predictions_fprefcoco_val.jsonl"
    file.write_text(file.read_text() + line + "\n")
    assert re.search(r"no predictions of B, .*line \d+", compare_folders(*runs))


def test_two_runs_in_one_file_are_refused(runs):
    file = runs[1] / "predictions_fprefcoco_val.jsonl"
    file.write_text(2 * file.read_text())
    assert "is there twice" in compare_folders(*runs)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_what_changed_most(runs, tmp_path: Path):
    """`top` cards, greatest change first, three pictures each, with answers and what was taken for present."""
    out = tmp_path / "new" / "page.html"
    text = compare_folders(*runs, out, top=4)
    assert text.endswith(f"written: {out}")
    source = out.read_text()
    page = Page(source)
    assert len(page.all("article")) == 4 and len(page.all("img")) == 12
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert not page.all("script") and not page.all("link") and "http" not in source.replace("http-equiv", "")
    changes = [abs(float(change)) for change in re.findall(r'<span class="change [ab]">([+-][\d.]+)', source)]
    assert changes == sorted(changes, reverse=True)
    (part,) = Comparison.of(read_run(runs[0]), read_run(runs[1])).sets
    assert changes[0] == pytest.approx(100 * max(abs(pair.change) for pair in part.pairs), abs=0.05)
    assert len(page.all("figure", "histogram")) == 1 and len(page.all("svg", "interval")) == 3
    for words in ("Truth: it is", "takes it", ": right", "says", "some/model", "30", "SAM's own estimate of the IoU: 50.0"):
        assert words in page.words
    assert all(picture.shape == (160, 240, 3) for picture in page.pictures()), "four times 40 x 60"


def test_every_change_is_shown_if_there_are_fewer(runs, tmp_path: Path):
    compare_folders(*runs, tmp_path / "page.html", top=500)
    comparison = Comparison.of(read_run(runs[0]), read_run(runs[1]))
    changed = sum(bool(pair.change) for pair in comparison.sets[0].pairs)
    assert 0 < changed < len(comparison.sets[0].pairs)
    assert len(Page((tmp_path / "page.html").read_text()).all("article")) == changed
    compare_folders(runs[0], runs[0], tmp_path / "page.html")
    assert "No expression changed" in (tmp_path / "page.html").read_text()
    compare_folders(*runs, tmp_path / "page.html", top=0)
    assert not Page((tmp_path / "page.html").read_text()).all("article")


def test_pictures_and_masks_are_drawn(tmp_path: Path):
    """The picture itself, the true outline in white, A's mask orange and B's blue, points on top."""
    file = tmp_path / "0.png"
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), (90, 60, 120), np.uint8)).save(file)
    sides = [[record(0, 0, square(x), square(10), path=str(file))] for x in (35, 10)]
    compare_folders(
        *(write_run(tmp_path / n, {"refcoco|val": r}) for n, r in zip("ab", sides, strict=True)), tmp_path / "page.html"
    )
    source = (tmp_path / "page.html").read_text()
    assert "drawn on grey" not in source
    truth, a, b = Page(source).pictures()
    middle = {"in the target": (60, 80), "in A's mask": (80, 190)}  # of the picture four times as large
    assert np.abs(truth[middle["in the target"]] - (90, 60, 120)).max() < 12, "only its outline is drawn"
    assert truth.max() > 230
    orange, blue = (np.array(visualize.TINTS[n]) for n in (2, 0))
    assert np.abs(a[middle["in A's mask"]] - orange).sum() < np.abs(a[middle["in A's mask"]] - blue).sum()
    assert np.abs(b[middle["in the target"]] - blue).sum() < np.abs(b[middle["in the target"]] - orange).sum()
    assert a[middle["in the target"]].max() < 130, "A has no mask there"
    for drawn in (a, b):
        assert np.abs(drawn[82, 62] - visualize.POSITIVE).max() < 60 and np.abs(drawn[22, 202] - visualize.NEGATIVE).max() < 60


def test_pixels_that_do_not_count_are_hatched(tmp_path: Path):
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    drawn = np.asarray(visualize.truth_image(image, square(0, 0), square(30)))
    assert drawn[44:116, 124:196].min() < 120 and drawn[44:116, 124:196].max() == 200
    assert (drawn[:, :100] == 200).all()


@pytest.mark.parametrize("state, words", [("gone", "is not there"), ("torn", "cannot be read"), ("other", "is 8 x 6 now")])
def test_missing_pictures_leave_the_masks_on_grey(tmp_path: Path, state, words):
    file = tmp_path / "0.png"
    if state == "torn":
        file.write_bytes(b"no picture")
    if state == "other":
        Image.new("RGB", (8, 6)).save(file)
    sides = [[record(0, 0, square(x), square(10), path=str(file))] for x in (35, 10)]
    folders = [write_run(tmp_path / n, {"refcoco|val": r}) for n, r in zip("ab", sides, strict=True)]
    compare_folders(*folders, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert words in page.words and "on grey" in page.words
    truth, _, _ = page.pictures()
    assert np.ptp(truth[5:20, 5:20]) < 8 and abs(int(truth[5, 5, 0]) - 150) < 8


def test_whatever_comes_from_a_file_is_escaped(tmp_path: Path):
    evil = '<script>alert("1")</script>&\' onerror="x'
    more = {"question": evil, "answer": evil, "reference": evil, "confidence": None}
    sides = [[record(0, 0, square(x), square(10), path=evil, **more)] for x in (35, 10)]
    folders = [
        write_run(tmp_path / f"{n}<b>", {"refcoco|val": r}, "generate", version=evil, preset=evil, templates=n + evil)
        for n, r in zip("ab", sides, strict=True)
    ]
    compare_folders(*folders, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    assert "<script" not in source and not page.all("script") and not page.all("b")
    assert evil in page.words and any(evil in attrs["alt"] for attrs in page.all("img"))
    assert {name for tag, attrs in page.found if tag == "img" for name in attrs} == {"src", "alt", "width", "height"}


def test_old_records_with_fewer_fields_are_drawn(tmp_path: Path):
    needed = (
        "image_index", "question_index", "image", "question", "answer", "exists", "predicted_exists", "mask", "target",
        "intersection", "union",
    )  # fmt: skip
    sides = [[{name: r[name] for name in needed} for r in some_records(n)] for n in (0, 1)]
    folders = [write_run(tmp_path / n, {"refcoco|val": r}) for n, r in zip("ab", sides, strict=True)]
    compare_folders(*folders, tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text()).all("article")


def test_ties_are_broken_by_the_place_in_the_data_set(tmp_path: Path):
    """Sets in which many masks appeared as a whole take turns, the same turns every time."""
    a = [record(m, 0, square(0, 0), square(10)) for m in range(4)]
    b = [record(m, 0, square(10), square(10)) for m in range(4)]
    folders = [write_run(tmp_path / n, {"x|val": r, "y|val": r}) for n, r in (("a", a), ("b", b))]
    found = Comparison.of(*map(read_run, folders)).most_changed(5)
    assert [(p.dataset, p.a["image_index"]) for p in found] == [("x", 0), ("y", 0), ("x", 1), ("y", 1), ("x", 2)]


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_and_writes_the_same_each_time(runs, tmp_path: Path):
    command = [sys.executable, "-m", "utils.compare", *map(str, runs), "--top", "3", "--resamples", "200", "--html"]
    printed, pages = [], []
    for name in ("one.html", "two.html"):
        done = subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, check=True)
        printed.append(done.stdout.replace(name, ""))
        pages.append((tmp_path / name).read_bytes())
    assert printed[0] == printed[1] and pages[0] == pages[1]
    assert "200 resamples" in printed[0] and "fprefcoco|val" in printed[0]


@pytest.mark.parametrize(
    "more, words",
    [(["--top", "-1"], "--top"), (["--resamples", "0"], "--resamples"), (["--resamples", "9" * 9], "1000000"),
     (["--html", "{a}"], "is a folder: --html")],
)
def test_errors_are_one_line(runs, more, words):
    with pytest.raises(SystemExit, match=words) as error:
        main([*map(str, runs), *(part.replace("{a}", str(runs[0])) for part in more)])
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_results_are_named(runs, tmp_path: Path):
    with pytest.raises(SystemExit, match="results.json does not exist"):
        main([str(runs[0]), str(tmp_path / "nowhere")])
    for text in ("{", "[]", "{}", '{"results": 3}', '{"results": [{"dataset": "x"}]}'):
        (runs[1] / "results.json").write_text(text)
        with pytest.raises(SystemExit, match="results.json is no result of test_read.py"):
            main([*map(str, runs)])
    other = write_run(tmp_path / "other", {"refcoco|val": some_records(0)})
    with pytest.raises(SystemExit, match=r"no data set in common: fprefcoco\|val in A, refcoco\|val in B"):
        main([str(runs[0]), str(other)])


@pytest.mark.parametrize("content", ["<html>mine</html>", "", "notes"])
def test_a_page_of_somebody_else_stays(runs, tmp_path: Path, content):
    (tmp_path / "page.html").write_text(content)
    with pytest.raises(SystemExit, match="page.html exists and was not made by this command"):
        main([*map(str, runs), "--html", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text() == content


def test_a_page_of_this_program_is_replaced(runs, tmp_path: Path):
    for top in (1, 2):
        compare_folders(*runs, tmp_path / "page.html", top=top)
    assert len(Page((tmp_path / "page.html").read_text()).all("article")) == 2


def finish(folder: Path, dataset: str) -> Path:
    """Puts what test_read.py writes beside predictions that are whole."""
    file = folder / "predictions_fprefcoco_val.jsonl"
    lines = file.read_text().splitlines()
    images = 1 + max(json.loads(line)["image_index"] for line in lines)
    about = {
        "settings": {"dataset": dataset, "split": "val"}, "failed": [], "images_asked": images, "records": len(lines),
        "hash": hash_of_lines(lines), "without_questions": [], "items": {}, "replaces": None,
    }  # fmt: skip
    Path(f"{file}.settings.json").write_text(json.dumps(about), encoding="utf-8")
    return file


def test_predictions_that_are_not_those_of_the_run_are_said(runs):
    file = finish(runs[1], "fprefcoco")
    assert "no predictions" not in compare_folders(*runs)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert re.search(r"no predictions of B, .*predictions_fprefcoco_val.jsonl: 1 image missing", compare_folders(*runs))
    file.write_text("".join(lines))
    finish(runs[1], "refcoco")
    assert re.search(r"no predictions of B, .*jsonl is of refcoco\|val, not of fprefcoco\|val", compare_folders(*runs))


def test_stored_counts_that_are_not_those_of_the_masks_are_said(tmp_path: Path):
    good = [record(m, 0, square(10), square(10)) for m in range(3)]
    bad = [dict(r, mask=encode_mask(square(20))) for r in good]
    text = compare_folders(*(write_run(tmp_path / n, {"refcoco|val": r}) for n, r in (("a", good), ("b", bad))))
    assert "the stored counts of 3 expressions of B are not those of the masks" in text and "of A are not" not in text


def test_presence_that_is_not_known_is_not_judged(tmp_path: Path):
    records = [dict(r, exists=None, predicted_exists=None) for r in some_records(0)]
    one = write_run(tmp_path / "a", {"refcoco|val": records})
    assert "gIoU" in compare_folders(one, one)


def test_masks_that_would_fill_the_memory_are_not_drawn(tmp_path: Path):
    """A few letters stand for a mask of a thousand million pixels."""
    side, pixels = 2**15, 2**30
    runs = {"none": [pixels], "all": [0, pixels]}
    rles = {name: frPyObjects({"size": [side, side], "counts": counts}, side, side) for name, counts in runs.items()}
    masks = {name: rle | {"counts": rle["counts"].decode()} for name, rle in rles.items()}
    made = record(0, 0, square(10), square(10)) | {"target": masks["all"], "union": pixels}
    sides = [made | {"mask": masks["none"], "intersection": 0}, made | {"mask": masks["all"], "intersection": pixels}]
    folders = [write_run(tmp_path / n, {"refcoco|val": [r]}) for n, r in zip("ab", sides, strict=True)]
    compare_folders(*folders, tmp_path / "page.html")
    assert "are not drawn" in Page((tmp_path / "page.html").read_text()).words
