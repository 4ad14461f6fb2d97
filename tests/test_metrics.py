"""gIoU, cIoU, See accuracy against the recordings of the original's two scorers, and their edge cases."""

import json
import math

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs

from utils.metrics import SegmentationMeter, class_areas, overlap

METRICS = [f / "metrics" for f in golden_dirs() if (f / "metrics").is_dir()]


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_areas_equal_the_recorded(folder):
    arrays = np.load(folder / "intersection_union.npz")
    for key in (k for k in arrays.files if k.endswith("_output")):
        name = key.removesuffix("_output")
        areas = class_areas(torch.from_numpy(arrays[key]), torch.from_numpy(arrays[f"{name}_target"]))
        assert np.array_equal(torch.stack(areas).numpy(), arrays[f"{name}_result"])


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_validation_scores_equal_the_recorded(folder):
    arrays = np.load(folder / "validate.npz")
    for name, case in json.loads((folder / "validate.json").read_text()).items():
        meter = SegmentationMeter()
        for k in case["batches"]:
            for logits, target in zip(arrays[f"b{k}_logits"], arrays[f"b{k}_gt"], strict=True):
                meter.update(torch.from_numpy(logits > 0), torch.from_numpy(target).to(torch.uint8))
        scores = meter.compute()
        # The original divides by the count plus 1e-5 when it sums over processes.
        assert scores["giou"] == pytest.approx(case["giou"], abs=1e-5), name
        assert scores["ciou"] == pytest.approx(case["ciou"], abs=1e-5), name


@pytest.mark.parametrize("folder", METRICS, ids=str)
def test_generative_scores_equal_the_recorded(folder):
    arrays = np.load(folder / "run_eval.npz")
    table = json.loads((folder / "run_eval.json").read_text())
    for case in table["results"].values():
        meter = SegmentationMeter()
        for image in case["images"]:
            entry, key = table["preds"][image], image.removesuffix(".jpg")
            masks = zip(arrays[f"{key}_pred"], arrays[f"{key}_gt"], strict=True)
            for (prediction, target), exists, predicted in zip(
                masks, entry["gt_exists"], entry["pred_exists"], strict=True
            ):
                meter.update(torch.from_numpy(prediction), torch.from_numpy(target), exists, predicted)
        scores = meter.compute()
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
    generator = torch.Generator().manual_seed(0)
    whole, parts = SegmentationMeter(), [SegmentationMeter(), SegmentationMeter()]
    for i in range(9):
        prediction, target = (torch.randint(0, 2, (5, 4), generator=generator, dtype=torch.uint8) for _ in range(2))
        whole.update(prediction, target, True, i % 2 == 0)
        parts[i % 2].update(prediction, target, True, i % 2 == 0)
    merged = SegmentationMeter().merge(parts[1].state()).merge(parts[0].state())
    assert merged.compute() == whole.compute()


def test_nothing_counted_is_no_score():
    scores = SegmentationMeter().compute()
    assert math.isnan(scores["giou"]) and math.isnan(scores["ciou"]) and scores["see"] is None
