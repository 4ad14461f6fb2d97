"""The card of a model folder: filled from the run, readable for the hub, true about the scores."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard
from tiny_training import ROOT

from model import READConfig
from model.checkpoint import fingerprint
from utils.args import TrainArgs
from utils.metrics import summarize
from utils.model_card import main
from utils.predictions import encode_mask, expressions

BASE = ROOT / "assets/read-mini-base"
WEIGHTS = fingerprint(str(BASE))
TRAIN = {"preset": "read-7b-val", "dataset": "refer_seg||reason_seg", "sample_rates": "3, 1,", "batch_size": 4,
         "grad_accumulation_steps": 5, "lora_r": 16, "lora_alpha": 8, "epochs": 2, "steps_per_epoch": 30, "lr": 2e-4,
         "warmup_steps": 10}  # fmt: skip
SASP = dataclasses.asdict(READConfig.from_pretrained(BASE).sasp)


@pytest.fixture
def model(tmp_path):
    """A model folder and the run that it says it is from."""
    folder, run = tmp_path / "cups", tmp_path / "run"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("README.md"))
    run.mkdir()
    TrainArgs(**TRAIN).save(run / "config.json", world_size=2, versions={"torch": "2.9", "peft": "0.1"})
    best = {"tag": "step60", "ciou": 0.715, "giou": 0.602, "val_dataset": "ReasonSeg|val"}
    (run / "best.json").write_text(json.dumps(best))
    record = {"run": str(run), "checkpoint": f"{run}/ckpt_model/step60", "base": "someone/llava", "preset": "read-7b-val"}
    (folder / "merged_from.json").write_text(json.dumps(record))
    return folder


def evaluation(folder, weights=WEIGHTS, **changes):
    folder.mkdir()
    result = {"dataset": "refcoco", "split": "testA", "giou": 0.76543, "ciou": 0.7, "see": None, "failed": []}
    found = {
        "version": "cups", "checkpoint": weights, "protocol": "forced", "compat": "correct", "limit": None,
        "templates": "fixed", "conv_type": "llava_v1", "sasp": SASP, "bits": None,
        "command": "python test_read.py --version cups", "results": [result], **changes,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    return str(folder)


def test_a_card_says_where_the_weights_come_from(model):
    main([str(model)])
    text = (model / "README.md").read_text()
    assert "$" not in text
    for words in (
        "# cups", "| base | `someone/llava` |", "| checkpoint | step60 |", "refer_seg 3, reason_seg 1",
        "LoRA of rank 16, alpha 8 on q_proj,v_proj", "at most 2 x 30, 40 pictures each", "0.0002, 10 steps of warm-up",
        "144 image tokens", "10 points, t_pos 0.8", "ReasonSeg|val with the answers forced: gIoU 60.2, cIoU 71.5",
    ):  # fmt: skip
        assert words in text
    assert ModelCard.load(model / "README.md").data.base_model == "someone/llava"


def test_measured_scores_are_in_the_table_and_in_the_front_matter(model, tmp_path):
    generated = {
        "protocol": "generate", "compat": "released", "limit": 9, "templates": "random", "conv_type": "vicuna_v1", "bits": 4,
        "sasp": {**SASP, "num_points": 3},
    }  # fmt: skip
    departs = "padding as released, random templates, prompt vicuna_v1, num_points 3, blocks in 4 bits, first 9 pictures"
    off = {"sasp": {**SASP, "enabled": False}}
    folders = [evaluation(tmp_path / "one"), evaluation(tmp_path / "two", **generated), evaluation(tmp_path / "three", **off)]
    main([str(model), "--results", *folders, "--name", "me/cups"])
    text = (model / "README.md").read_text()
    assert "| refcoco testA | answers forced | 76.5 | 70.0 |" in text
    assert f"| refcoco testA | answers generated, {departs} | 76.5 | 70.0 |" in text
    assert "| refcoco testA | answers forced, SasP off | 76.5 | 70.0 |" in text
    assert "    python test_read.py --version cups" in text and "While it was trained" not in text
    found = ModelCard.load(model / "README.md").data.eval_results
    assert [(one.metric_name, one.metric_value) for one in found] == [("gIoU", 76.54), ("cIoU", 70.0)] * 3
    assert found[0].dataset_config == "answers forced" != found[2].dataset_config


def test_pictures_that_failed_are_not_hidden(model, tmp_path):
    result = {"dataset": "refcoco", "split": "val", "giou": 0.5, "ciou": 0.4, "see": None, "failed": [{"image_index": 3}] * 2}
    main([str(model), "--results", evaluation(tmp_path / "one", results=[result])])
    assert "| refcoco val, 2 images failed and left out | answers forced | 50.0 | 40.0 |" in (model / "README.md").read_text()


def test_scores_of_other_weights_are_refused(model, tmp_path):
    with pytest.raises(SystemExit, match="other weights"):
        main([str(model), "--results", evaluation(tmp_path / "one", weights="0" * 32)])
    assert not (model / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-30], r"line 2 is no JSON"),
        (lambda text: text + text, r"line 3: image 0, question 0 is there twice"),
        (lambda text: text.splitlines()[0] + "\n", "does not give the scores of refcoco.testA"),
        (lambda text: text.replace('"counts": "', '"counts": "o'), "line 1, mask: an RLE is damaged"),
    ],
    ids=["torn", "doubled", "short", "a mask"],
)
def test_predictions_that_do_not_give_the_scores_are_named(model, tmp_path, change, words):
    masks = [encode_mask(np.eye(4)), encode_mask(np.ones((4, 4)))]
    records = [
        {"image_index": n, "question_index": 0, "image": "a", "question": "a", "answer": "a", "exists": True,
         "predicted_exists": True, "mask": masks[n], "target": masks[1]}
        for n in (0, 1)
    ]  # fmt: skip
    scores = summarize(expressions(records), generated=False, resamples=0)
    row = {"dataset": "refcoco", "split": "testA", "giou": scores["giou"], "ciou": scores["ciou"], "see": None, "failed": []}
    folder = evaluation(tmp_path / "one", results=[row])
    file = tmp_path / "one/predictions_refcoco_testA.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    main([str(model), "--results", folder])
    file.write_text(change(file.read_text()))
    with pytest.raises(SystemExit, match=rf"predictions_refcoco_testA.jsonl.*{words}"):
        main([str(model), "--results", folder, "--overwrite"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"run": 5}', '{"run": "x", "checkpoint": "x", "base": null}'])
def test_a_damaged_record_of_merging_is_named(model, content):
    (model / "merged_from.json").write_text(content)
    with pytest.raises(SystemExit, match="merged_from.json"):
        main([str(model)])


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"model_type": 3}'])
def test_a_damaged_config_is_named(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="config.json"):
        main([str(model)])


@pytest.mark.parametrize("missing", ["version", "checkpoint", "protocol", "command", "templates"])
def test_results_that_do_not_say_how_they_were_made_are_named(model, tmp_path, missing):
    folder = evaluation(tmp_path / "one", **{missing: None})
    with pytest.raises(SystemExit, match=f"results.json lacks {missing}"):
        main([str(model), "--results", folder])


def test_a_card_of_this_program_stays_unless_asked(model):
    main([str(model), "--name", "first"])
    with pytest.raises(SystemExit, match="--overwrite"):
        main([str(model)])
    assert "# first" in (model / "README.md").read_text()
    main([str(model), "--overwrite"])
    assert "# cups" in (model / "README.md").read_text()


def test_a_card_of_somebody_else_stays(model):
    (model / "README.md").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="README.md exists and was not made by this command: move it"):
            main([str(model), *more])
    assert (model / "README.md").read_text() == "mine"


def test_little_is_known_of_a_folder_alone(tmp_path):
    """No record of a run: the card says so. No model: no card."""
    folder = tmp_path / "cups"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("README.md"))
    main([str(folder)])
    text = (folder / "README.md").read_text()
    assert "Not recorded with this folder." in text and "Not measured yet." in text
    assert ModelCard.load(folder / "README.md").data.base_model is None
    with pytest.raises(SystemExit, match="own layout"):
        main([str(tmp_path)])
