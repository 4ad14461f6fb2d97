"""gIoU, cIoU, See accuracy against the recordings of the original's two scorers; every other score against its definition."""

import json
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs

from utils import metrics
from utils.metrics import Expression, count, overlap, summarize

METRICS = [f / "metrics" for f in golden_dirs() if (f / "metrics").is_dir()]


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_areas_equal_the_recorded(folder):
    arrays = np.load(folder / "intersection_union.npz")
    for key in (k for k in arrays.files if k.endswith("_output")):
        name = key.removesuffix("_output")
        predicted, target = arrays[key], arrays[f"{name}_target"]
        found = []
        for kind in range(2):  # the recording has background and object; one counts the object alone
            truth = np.where(target == 255, 255, target == kind)
            found.append(count(predicted == kind, truth, image=0)[1:4])
        assert np.array_equal(np.transpose(found), arrays[f"{name}_result"])


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_validation_scores_equal_the_recorded(folder):
    arrays = np.load(folder / "validate.npz")
    for name, case in json.loads((folder / "validate.json").read_text()).items():
        rows = []
        for k in case["batches"]:
            for logits, target in zip(arrays[f"b{k}_logits"], arrays[f"b{k}_gt"], strict=True):
                rows.append(count(logits > 0, target, image=len(rows)))
        scores = summarize(rows, generated=False)
        # The original divides by the count plus 1e-5 when it sums over processes.
        assert scores["giou"] == pytest.approx(case["giou"], abs=1e-5), name
        assert scores["ciou"] == pytest.approx(case["ciou"], abs=1e-5), name


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_generative_scores_equal_the_recorded(folder):
    arrays = np.load(folder / "run_eval.npz")
    table = json.loads((folder / "run_eval.json").read_text())
    for case in table["results"].values():
        rows = []
        for image in case["images"]:
            entry, key = table["preds"][image], image.removesuffix(".jpg")
            masks = zip(arrays[f"{key}_pred"], arrays[f"{key}_gt"], strict=True)
            for (prediction, target), exists, predicted in zip(
                masks, entry["gt_exists"], entry["pred_exists"], strict=True
            ):
                rows.append(count(prediction, target, len(rows), exists, predicted))
        scores = summarize(rows, generated=True)
        assert (scores["intersection"], scores["union"]) == (case["intersection"][1], case["union"][1])
        assert scores["ciou"] == pytest.approx(case["cIoU"], abs=1e-6)
        assert scores["see"] == pytest.approx(case["see_accuracy"], abs=1e-6)


def test_an_empty_mask_of_nothing_is_right():
    empty, full = torch.zeros(3, 3, dtype=torch.uint8), torch.ones(3, 3, dtype=torch.uint8)
    assert overlap(empty, empty).iou == 1
    assert overlap(full, empty) == (0, 9) and overlap(full, empty).iou == 0
    assert overlap(full, torch.full((3, 3), 255, dtype=torch.uint8)) == (0, 0)


def test_inputs_are_not_changed():
    """The original's scorer overwrote its prediction where the target was ignored."""
    prediction, target = torch.ones(2, 2, dtype=torch.uint8), torch.tensor([[1, 255], [0, 1]], dtype=torch.uint8)
    before = prediction.clone()
    overlap(prediction, target)
    assert torch.equal(prediction, before)


def test_processes_add_up_exactly():
    rng = np.random.default_rng(0)
    rows = [count(*rng.integers(0, 2, (2, 5, 4)), i // 2, True, i % 2 == 0) for i in range(9)]
    assert summarize(rows[1::2] + rows[::2], generated=True) == summarize(rows, generated=True)


def test_nothing_counted_is_no_score():
    scores = summarize([], generated=True)
    assert math.isnan(scores["giou"]) and math.isnan(scores["ciou"]) and scores["see"] is None


def test_masks_of_different_sizes_are_an_error():
    with pytest.raises(ValueError, match="must agree"):
        overlap(np.zeros((3, 4)), np.zeros((4, 3)))


# ------------------------------------------------------------------------------------------------ rows and summaries


def row(image=0, intersection=50, union=100, target=100, pixels=1000, exists=1, predicted_exists=1, **more):
    return Expression(image, intersection, union, target, pixels, exists, predicted_exists, **more)


def random_rows(images=30, seed=0):
    """1 to 6 expressions a picture, those of a picture alike."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        good = rng.random()
        for _ in range(rng.integers(1, 7)):
            union = int(rng.integers(1, 5000))
            exists, right = rng.random() < 0.6, rng.random() < good
            rows.append(
                row(image, round(union * good * rng.random()), union, int(rng.integers(0, 3000)), 10_000, int(exists),
                    int(exists == right), words=int(rng.integers(1, 9)), say=math.nan if exists else float(rng.random()))
            )  # fmt: skip
    return rows


def test_a_row_is_counted_once_for_all():
    prediction = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    target = torch.tensor([[1, 255, 1], [0, 1, 0]], dtype=torch.uint8)
    found = count(prediction, target, 7, True, False, sentence=False, words=3)
    assert found[:-1] == (7, 1, 4, 3, 6, 1, 0, 0, 3) and math.isnan(found.say)
    assert found.iou == overlap(prediction, target).iou == 1 / (4 + 1e-5)
    assert count(prediction, target, 0)[5:8] == (-1, -1, -1)


def test_presence_and_say():
    nan = math.nan
    rows = [
        row(exists=1, predicted_exists=1), row(exists=1, predicted_exists=0), row(exists=1, predicted_exists=1, say=0.2),
        row(exists=0, predicted_exists=0, say=0.5), row(exists=0, predicted_exists=1, say=0.9),
        row(exists=0, predicted_exists=0, say=nan), row(exists=0, predicted_exists=0, say=0.7),
    ]  # fmt: skip
    scores = summarize(rows, generated=True)
    assert (scores["see"], scores["n_acc"], scores["t_acc"]) == (5 / 7, 3 / 4, 2 / 3)
    assert scores["say"] == pytest.approx((0.5 + 0.0 + 0.7) / 3)  # one affirmed, one has no reference, one was true
    subsets = scores["subsets"]
    assert list(subsets) == ["present", "false premise", "mask > 10 %"]
    assert (subsets["present"]["n_acc"], subsets["present"]["t_acc"], subsets["present"]["say"]) == (None, 2 / 3, None)
    assert (subsets["false premise"]["n_acc"], subsets["false premise"]["t_acc"]) == (3 / 4, None)
    assert subsets["false premise"]["say"] == scores["say"]


def test_forced_answers_cannot_deny():
    rows = random_rows()
    scores = summarize(rows, generated=False)
    for part in (scores, *scores["subsets"].values()):
        assert part["see"] is part["n_acc"] is part["t_acc"] is part["say"] is None
    assert scores["interval"]["see"] is None and scores["interval"]["giou"] is not None
    free = summarize(rows, generated=True)
    assert {"present", "false premise"} <= set(scores["subsets"]) == set(free["subsets"])
    assert scores["ciou"] == free["ciou"]


def test_subsets():
    sized = [row(target=t) for t in (0, 9, 10, 99, 100, 1000)] + [row(target=5, exists=0)]
    parts = {name: part["expressions"] for name, part in summarize(sized, generated=True)["subsets"].items()}
    assert parts == {"present": 6, "false premise": 1, "mask < 1 %": 1, "mask 1-10 %": 2, "mask > 10 %": 2}
    worded = [row(words=w, target=0) for w in (0, 1, 2, 3, 5, 6, 40)]
    parts = {name: part["expressions"] for name, part in summarize(worded, generated=True)["subsets"].items()}
    assert parts == {"1-2 words": 2, "3-5 words": 2, "6+ words": 2}
    asked = [row(image=s, words=3 * s, sentence=s, target=0) for s in (0, 1, 1)]
    parts = {name: (part["expressions"], part["images"]) for name, part in summarize(asked, generated=True)["subsets"].items()}
    assert parts == {"short": (1, 1), "long": (2, 1)}
    assert summarize([row()] * 3, generated=True)["subsets"] == {}


def test_order_and_processes_change_no_bit():
    rows = random_rows()
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    assert json.dumps(summarize(shuffled, generated=True)) == json.dumps(summarize(rows, generated=True))


def test_subsets_add_up():
    scores = summarize(random_rows(), generated=True)
    parts = [scores["subsets"][name] for name in ("present", "false premise")]
    for key in ("intersection", "union", "expressions"):
        assert sum(part[key] for part in parts) == scores[key]
    assert sum(part["giou"] * part["expressions"] for part in parts) == pytest.approx(scores["giou"] * scores["expressions"])


@pytest.mark.parametrize("at_once", [1, 70, 10**6])
def test_interval_equals_a_plain_loop(at_once, monkeypatch):
    """The same pictures drawn by hand, the scores of each draw computed from its expressions."""
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", at_once)
    rows = [r._replace(image=3 * r.image + 5) for r in random_rows(12)]  # places may have gaps: a --limit, a share
    images = sorted({r.image for r in rows})
    of_image = [[r for r in rows if r.image == image] for image in images]
    rng, scores = np.random.default_rng(3), []
    for _ in range(200):
        drawn = [r for k in rng.integers(len(images), size=len(images)) for r in of_image[k]]
        scores.append((
            sum(r.intersection / (r.union + 1e-5) for r in drawn) / len(drawn),
            sum(r.intersection for r in drawn) / sum(r.union for r in drawn),
            sum(r.exists == r.predicted_exists for r in drawn) / len(drawn),
        ))  # fmt: skip
    found = summarize(rows, generated=True, resamples=200, seed=3)["interval"]
    for k, name in enumerate(("giou", "ciou", "see")):
        values = sorted(score[k] for score in scores)
        # Percentiles of 200 values, linear between neighbours: 199 * 0.025 = 4.975, 199 * 0.975 = 194.025.
        low, high = values[4] + 0.975 * (values[5] - values[4]), values[194] + 0.025 * (values[195] - values[194])
        assert found[name] == pytest.approx([low, high], abs=1e-9)


def test_pictures_are_drawn_not_expressions():
    """Asking everything ten times tells nothing new about pictures, so the interval must not shrink."""
    rows = random_rows()
    once, often = (summarize(rows * k, generated=True)["interval"] for k in (1, 10))
    assert all(often[name] == pytest.approx(once[name], abs=1e-9) for name in ("giou", "ciou", "see"))
    alone = [r._replace(image=k) for k, r in enumerate(rows)]
    narrow, wide = summarize(alone, generated=True)["interval"]["giou"], once["giou"]
    assert wide[1] - wide[0] > 1.2 * (narrow[1] - narrow[0])


def test_interval_covers_the_truth():
    """Of 300 data sets of 40 pictures whose gIoU is 0.5 by construction, about 95 % have it between their bounds."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        rows = [
            row(image, int(1000 * iou), 1000) for image, mean in enumerate(rng.uniform(0.2, 0.8, 40))
            for iou in rng.uniform(mean - 0.2, mean + 0.2, 3)
        ]  # fmt: skip
        low, high = summarize(rows, generated=True, resamples=300)["interval"]["giou"]
        covered += low <= 0.4995 <= high  # 0.5, less what int() cuts off
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_of_nothing_and_of_one_picture():
    none = {"giou": None, "ciou": None, "see": None}
    for rows in ([], [row(), row(intersection=3)]):
        assert summarize(rows, generated=True)["interval"] == none
    assert summarize(random_rows(), generated=True, resamples=0)["interval"] == none
    empty = summarize([], generated=True)
    assert math.isnan(empty["giou"]) and empty["images"] == 0 and empty["say"] is None and empty["subsets"] == {}
    same = summarize([row(image) for image in range(5)], generated=True)
    assert same["interval"]["ciou"] == pytest.approx([0.5, 0.5], abs=1e-9)


def test_interval_in_little_memory():
    rows = [row(image) for image in range(10_000)]
    table = metrics._per_image(rows, True)
    tracemalloc.start()
    metrics.resampled_sums(table, 500, 0)  # at once it would take 120 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("at_once", [3000, 21_000, 10**9])
def test_the_block_of_resamples_does_not_matter(at_once, monkeypatch):
    """They are drawn a block at a time so that memory stays small; the numbers are those of one large draw."""
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", at_once)
    per_image = np.random.default_rng(0).integers(0, 100, (3000, 2)).astype(float)
    drawn = np.random.default_rng(3).integers(3000, size=(900, 3000))
    np.testing.assert_array_equal(metrics.resampled_sums(per_image, 900, 3), [per_image[row].sum(axis=0) for row in drawn])
