"""The two evaluations of the original, end to end on its own tiny data sets: ReasonSeg forced, FP-RefCOCO generated."""

import dataclasses
import json
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs

from dataset import build_eval
from dataset.collate import collate
from model import READForCausalLM, READProcessor
from utils.evaluate import evaluate, predict
from utils.metrics import count, summarize

FOLDERS = [f for f in golden_dirs() if (f / "e2e/dataset").is_dir() and (f / "ckpt/read_tiny/config.json").is_file()]


@lru_cache
def load(folder):
    ckpt = folder / "ckpt"
    model = READForCausalLM.from_pretrained(ckpt / "read_tiny", vision_tower=ckpt / "clip_tiny")
    return model, READProcessor.from_pretrained(ckpt / "read_tiny", vision_tower=ckpt / "clip_tiny")


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "e2e/reasonseg.npz").is_file()], ids=lambda f: f.name)
def test_reason_seg_forced(folder):
    model, processor = load(folder)
    table = json.loads((folder / "e2e/reasonseg.json").read_text())
    arrays = np.load(folder / "e2e/reasonseg.npz")
    data = build_eval("ReasonSeg", "val", folder / "e2e/dataset", protocol="forced")
    scores = evaluate(model, processor, data, protocol="forced", conv_type="vicuna_v1", progress=False)
    assert scores["giou"] == pytest.approx(table["giou"], abs=5e-4)
    assert scores["ciou"] == pytest.approx(table["ciou"], abs=5e-4)
    for i in range(len(data)):
        batch = collate([data[i]], processor, training=False, conv_type="vicuna_v1")
        with torch.no_grad():
            logits = model(**batch.model_inputs()).segments.mask_logits[0]
        assert np.abs(logits.numpy() - arrays[f"im{i}_pred_logits"][0].astype(np.float32)).max() <= 2e-2


def recorded_batches(folder, processor):
    """(batch, recorded entry) of each picture, with the questions that the original happened to draw."""
    table = json.loads((folder / "e2e/fprefcoco.json").read_text())
    expected = json.loads(next((folder / "e2e/expected_fprefcoco").glob("preds_*.json")).read_text())
    data = build_eval("fprefcoco", "val", folder / "e2e/dataset", protocol="generate")
    inputs = np.load(folder / "e2e/fprefcoco_inputs.npz")
    for i, (talk, entry) in enumerate(zip(table["conversations"], expected.values(), strict=True)):
        asked = [re.search(r"<im_end>\n(.*) ASSISTANT:$", text, re.S)[1] for text in talk["full_prompts"]]
        sample = dataclasses.replace(data[i], conversations=[[(question, None)] for question in asked])
        batch = collate([sample], processor, training=False, padding="left", conv_type="vicuna_v1")
        bare = [[v for j, v in enumerate(row) if v != -200 or row[j - 1] != -200] for row in batch.input_ids.tolist()]
        assert bare == inputs[f"im{i}_input_ids"].tolist()
        yield batch, entry


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "e2e/fprefcoco.json").is_file()], ids=lambda f: f.name)
@torch.no_grad()
def test_fprefcoco_generated_as_released(folder):
    """The original's padding is part of its numbers: `released` repeats answers, presence, masks and both scores."""
    model, processor = load(folder)
    printed = json.loads((folder / "e2e/fprefcoco.json").read_text())["metrics_printed"]
    ciou, see = (float(x) for x in re.search(r"cIoU: ([\d.]+) \| See Accuracy: ([\d.]+)", printed).groups())
    rows = []
    for batch, entry in recorded_batches(folder, processor):
        masks = np.load(folder / "e2e/expected_fprefcoco" / entry["segmentation_path"])["pred"]
        found = predict(model, processor, batch, "generate", "released", 20)
        assert [p.answer for p in found] == [text.replace(" .", ".") for text in entry["pred_sent"]]
        assert [p.exists for p in found] == entry["pred_exists"]
        for prediction, mask, target, exists in zip(found, masks, batch.masks, batch.exists, strict=True):
            assert (prediction.mask.numpy() == (mask > 0)).mean() >= 0.999
            rows.append(count(prediction.mask, target, len(rows), exists, prediction.exists))
    scores = summarize(rows, generated=True)
    assert scores["ciou"] == pytest.approx(ciou, abs=5e-4)
    assert scores["see"] == pytest.approx(see, abs=5e-4)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "e2e/fprefcoco_unpadded.npz").is_file()], ids=lambda f: f.name)
@torch.no_grad()
def test_fprefcoco_generated_correctly(folder):
    """All questions of a picture in one padded batch give what each gives alone, without padding."""
    if not (folder / "e2e/fprefcoco.json").is_file():
        pytest.skip("this golden folder does not hold the recorded questions")
    model, processor = load(folder)
    masks = np.load(folder / "e2e/fprefcoco_unpadded.npz")
    table = {(row["image"], row["row"]): row for row in json.loads((folder / "e2e/fprefcoco_unpadded.json").read_text())}
    for i, (batch, _) in enumerate(recorded_batches(folder, processor)):
        for n, prediction in enumerate(predict(model, processor, batch, "generate", "correct", 20)):
            assert prediction.answer == table[i, n]["text"].replace(" .", ".")
            assert prediction.exists == table[i, n]["presence"]
            assert (prediction.mask.numpy() == (masks[f"im{i}_row{n}_mask"] > 0)).mean() >= 0.999
