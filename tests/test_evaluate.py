"""test_read.py from end to end on a tiny model: stopped and resumed, failing pictures, chunks, processes, what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from tiny_training import CKPT, ROOT, needs_ckpt, write_reason_seg

import test_read
from dataset import build_eval
from dataset.mini.write import write_all
from model import READForCausalLM, READProcessor
from utils import evaluate as evaluation
from utils.evaluate import evaluate
from utils.outputs import OutputFolder
from utils.prediction_log import PredictionLog
from utils.predictions import encode_mask

pytestmark = needs_ckpt
GENERATE = ("--protocol", "generate", "--max_new_tokens", "12", "--data", "fprefcoco|val", "ReasonSeg|val")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini world, four val pictures a set, several expressions each."""
    root = tmp_path_factory.mktemp("data")
    write_all(root, seed=3, train=2, val=4, test=2)
    return root


@pytest.fixture(scope="module")
def tiny() -> tuple[READForCausalLM, READProcessor]:
    """A tiny random model and its processor."""
    folder, tower = CKPT / "read_tiny", CKPT / "clip_tiny"
    return (
        READForCausalLM.from_pretrained(folder, vision_tower=tower).requires_grad_(False),
        READProcessor.from_pretrained(folder, vision_tower=tower),
    )


def line(data: Path, out: Path, *more: str) -> list[str]:
    """A command line of test_read.py."""
    model = ("--version", str(CKPT / "read_tiny"), "--vision_tower", str(CKPT / "clip_tiny"))
    return [*model, "--dataset_dir", str(data), "--out", str(out), "--workers", "0", *more]


class Places(list):
    """A list that knows when to stop."""

    stop = math.inf


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Places:
    """Places of the pictures that the model is asked about."""
    places = Places()
    real = evaluation._Answerer.__call__

    def call(self, index, batch):
        if len(places) == places.stop:
            raise KeyboardInterrupt
        places.append(index)
        return real(self, index, batch)

    monkeypatch.setattr(evaluation._Answerer, "__call__", call)
    return places


def found(out: Path) -> tuple[list[dict], dict[str, list[dict]]]:
    """(results, records by file) of a folder, without times."""
    results = json.loads((out / "results.json").read_text())["results"]
    files = {f.name: [json.loads(text) for text in f.read_text().splitlines()] for f in sorted(out.glob("*.jsonl"))}
    for entry in [*results, *(record for records in files.values() for record in records)]:
        entry.pop("seconds")
        entry.pop("images_taken_over", None)
        entry.pop("command", None)
    return results, files


def equal(one: object, other: object) -> bool:
    """Equality in which NaN equals NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert test_read.main(line(data, out, *GENERATE)) == 0
    return out


# ------------------------------------------------------------------------------------------------ what it writes


def test_records_say_what_was_found(whole: Path) -> None:
    """Every field of a record agrees with its mask; the lines stand in the data set's order; nothing else is left behind."""
    results, files = found(whole)
    beside = [f"{name}.settings.json" for name in files]
    hidden = [".read-lock", ".read-output.json"]
    assert sorted(file.name for file in whole.iterdir()) == sorted([*files, *beside, *hidden, "results.json"])
    records = files["predictions_fprefcoco_val.jsonl"]
    places = [(record["image_index"], record["question_index"]) for record in records]
    assert places == sorted(places) and len(set(places)) == len(places) == results[0]["expressions"]
    assert {record["num_seg"] > 0 for record in records} == {True, False}, "a model that always says the same shows little"
    for record in records:
        mask, target = coco.decode(record["mask"]), coco.decode(record["target"])
        assert record["intersection"] == int((mask & target).sum())
        assert record["union"] == int((mask | target).sum())
        assert record["predicted_exists"] == (record["num_seg"] > 0 and bool(mask.any()))
        assert (record["confidence"] is None) == (record["num_seg"] == 0)
        assert len(record["points"]) == len(record["point_labels"])
        assert bool(target.any()) == record["exists"]
        if mask.any():
            ys, xs = np.nonzero(mask)
            assert record["box"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        else:
            assert record["box"] is None
        assert ("reference" in record) == (not record["exists"])
        assert 0 <= record.get("say", 0) <= 1


def test_the_result_names_what_it_depends_on(whole: Path) -> None:
    """Enough to say whether two results may be compared."""
    record = json.loads((whole / "results.json").read_text())
    assert record["protocol"] == "generate" and record["compat"] == "correct" and record["templates"] == "fixed"
    assert record["checkpoint"] and record["versions"]["torch"] and record["sasp"]["enabled"] and record["conv_type"]
    assert record["say"].startswith("chrF2")
    assert [result["dataset"] for result in record["results"]] == ["fprefcoco", "ReasonSeg"]
    for result in record["results"]:
        assert result["images"] == result["images_in_split"] == 4 and result["failed"] == []
        assert result["see"] is not None and result["say"] is not None and result["interval"]["giou"]
        assert {"present", "false premise"} <= set(result["subsets"])


def test_scores_come_back_from_predictions_alone(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--cmd metrics` needs neither model nor pictures, and recounts every pixel to the same scores."""
    from utils.scores import recompute

    results, _ = found(whole)
    again = {result["dataset"]: result for result in recompute([whole])}
    for result in results:
        for name, value in result.items():
            if name in again[result["dataset"]]:
                assert equal(again[result["dataset"]][name], value), name
        assert again[result["dataset"]]["stored_differ"] == 0
    assert test_read.main(["--cmd", "metrics", "--predictions", str(whole)]) == 0
    assert "fprefcoco val" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ together and alone


@pytest.mark.parametrize("protocol", ["forced", "generate"])
def test_together_is_as_alone(
    data: Path, tiny: tuple, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expression alone with nothing shared, then seven or all of a picture on one prefix: same answers and masks.

    A pixel whose logit is nothing but rounding may fall on either side.
    """
    model, processor = tiny
    samples = torch.utils.data.Subset(build_eval("fprefcoco", "val", data, protocol=protocol), range(2))
    kept, real, shared = [], model._read_together, []

    def share(*args):
        shared.append(real(*args))
        return shared[-1]

    for chunk, prefix in ((1, lambda *_: None), (7, share), (100, share)):
        monkeypatch.setattr(model, "_read_together", prefix)
        path = tmp_path / f"{chunk}.jsonl"
        evaluate(
            model, processor, samples, protocol=protocol, max_new_tokens=12, predictions_path=path, chunk=chunk,
            progress=False,
        )  # fmt: skip
        kept.append([json.loads(text) for text in path.read_text().splitlines()])
    assert any(part is not None for part in shared)
    assert len(kept[0]) > 3 * len(samples)
    same = ("image_index", "question_index", "answer", "num_seg", "predicted_exists", "point_labels", "target", "say")
    for alone, *others in zip(*kept, strict=True):
        for other in others:
            assert {name: alone.get(name) for name in same} == {name: other.get(name) for name in same}
            np.testing.assert_allclose(alone["points"], other["points"], atol=0.02)
            assert (coco.decode(alone["mask"]) != coco.decode(other["mask"])).mean() <= 1e-4


# ------------------------------------------------------------------------------------------------ stopped and resumed


def test_goes_on_after_the_last_whole_picture(data: Path, whole: Path, tmp_path: Path, asked: Places) -> None:
    """Stopped in the third picture of the second data set, then its file torn: the rest is done, and the result is the same."""
    asked.stop = 6
    with pytest.raises(SystemExit, match="the same command goes on") as stopped:
        test_read.main(line(data, tmp_path, *GENERATE))
    assert stopped.value.code == 130
    part = tmp_path / "predictions_ReasonSeg_val.jsonl.part0"
    assert len(part.read_text().splitlines()) == 1 + 2
    part.write_bytes(part.read_bytes()[:-40])  # the second picture's line was not written whole
    assert (tmp_path / "predictions_fprefcoco_val.jsonl").is_file()

    asked.clear()
    asked.stop = math.inf
    assert test_read.main(line(data, tmp_path, *GENERATE)) == 0
    assert asked == [1, 2, 3]  # of ReasonSeg; the first data set was taken over whole
    assert equal(found(tmp_path), found(whole))
    assert not list(tmp_path.glob("*.part*"))

    asked.clear()
    (tmp_path / "results.json").unlink()  # as if killed between the predictions and their scores
    assert test_read.main(line(data, tmp_path, *GENERATE)) == 0 and asked == []
    assert equal(found(tmp_path), found(whole))

    asked.stop = 1
    with pytest.raises(SystemExit):
        test_read.main(line(data, tmp_path, *GENERATE, "--overwrite"))
    asked.clear()
    asked.stop = math.inf
    assert test_read.main(line(data, tmp_path, *GENERATE)) == 0
    assert asked == [1, 2, 3]  # of the set that was thrown away and begun; the other had not been reached
    assert equal(found(tmp_path), found(whole))


def test_killed_then_finished_by_two_processes(data: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; two processes take over what one has done, without DeepSpeed: the numbers of an unstopped run."""
    program = [str(ROOT / "test_read.py"), *line(data, tmp_path, *GENERATE[:-1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    first = subprocess.Popen([sys.executable, *program], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    part = tmp_path / "predictions_fprefcoco_val.jsonl.part0"
    while not (part.is_file() and part.read_text().count("\n") >= 3):
        assert first.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert part.is_file() and not (tmp_path / "results.json").is_file()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/deepspeed.py").write_text("raise ImportError('not needed to evaluate')")
    environment["PYTHONPATH"] = str(tmp_path / "lib")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"]
    subprocess.run([sys.executable, *launcher, *program], cwd=ROOT, env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert result["images_taken_over"] >= 2
    (results, files), (all_results, all_files) = found(tmp_path), found(whole)
    assert equal(results, all_results[:1])
    assert equal(list(files.values()), [all_files["predictions_fprefcoco_val.jsonl"]])


def test_other_settings_do_not_mix(data: Path, tmp_path: Path) -> None:
    """What another SasP has begun is neither continued nor thrown away without being asked."""
    OutputFolder(tmp_path, "evaluate").mark()
    path = tmp_path / "predictions_ReasonSeg_val.jsonl"
    settings = {"protocol": "forced", "sasp": {"num_points": 30}}
    log = PredictionLog(path, settings)
    log.add(0, [])
    log.abandon()
    with pytest.raises(ValueError, match="part0 is of an .*other settings.*--overwrite.*sasp .*30.* then, .*60.* now"):
        PredictionLog(path, settings | {"sasp": {"num_points": 60}})
    with pytest.raises(SystemExit, match="under other settings"):
        test_read.main(line(data, tmp_path, "--data", "ReasonSeg|val"))
    assert PredictionLog(path, settings).done == {0}  # still there
    assert test_read.main(line(data, tmp_path, "--data", "ReasonSeg|val", "--overwrite", "--limit", "2")) == 0
    assert [file.name for file in tmp_path.glob("predictions*")] and not path.with_name(path.name + ".part0").exists()
    for other in (("--limit", "1"), ("--no-sasp", "--limit", "2"), ("--seed", "1", "--limit", "2")):  # finished ones neither
        with pytest.raises(SystemExit, match="under other settings"):
            test_read.main(line(data, tmp_path, "--data", "ReasonSeg|val", *other))


def test_other_pictures_do_not_mix(tmp_path: Path, asked: Places) -> None:
    """A picture fewer moves the places of those behind it: nothing is taken over from what was measured before."""
    write_reason_seg(tmp_path / "data", {"val": 3})
    assert test_read.main(line(tmp_path / "data", tmp_path / "out")) == 0
    for name in ("1.jpg", "1.json"):
        (tmp_path / "data/reason_seg/ReasonSeg/val" / name).unlink()
    with pytest.raises(SystemExit, match="other settings.*images_in_split 3 then, 2 now"):
        test_read.main(line(tmp_path / "data", tmp_path / "out"))
    with pytest.raises(SystemExit, match="two sets would both be written to predictions_ReasonSeg_val.jsonl"):
        test_read.main([*line(tmp_path / "data", tmp_path / "out"), "--data", "ReasonSeg|val", "ReasonSeg|val"])
    assert asked == [0, 1, 2]


def copies(tmp_path: Path) -> tuple[list[str], Path, Path]:
    """(command line, model folder, data folder) of an evaluation whose every input is a copy that may be changed."""
    model, tower, data = tmp_path / "model", tmp_path / "tower", tmp_path / "data"
    shutil.copytree(CKPT / "read_tiny", model)
    shutil.copytree(CKPT / "clip_tiny", tower)
    write_reason_seg(data, {"val": 1})
    paths = {"--version": model, "--vision_tower": tower, "--dataset_dir": data, "--out": tmp_path / "out"}
    return [*(str(part) for pair in paths.items() for part in pair), "--workers", "0"], model, data / "reason_seg/ReasonSeg/val"


def change_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def change_weights(model: Path) -> None:
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"].mul_(1.5)
    torch.save(weights, model / "pytorch_model.bin")


INPUTS = {
    "a question": (lambda model, val: change_json(val / "0.json", text=["the dark thing"]), "ReasonSeg.val, image 0, the anno"),
    "a mask": (
        lambda model, val: change_json(val / "0.json", shapes=[{"label": "x", "points": [[1, 1], [9, 1], [9, 9]]}]),
        "image 0, the annotations .its questions or true masks. changed",
    ),
    "a false premise": (lambda model, val: change_json(val / "0.json", false_premise_QA=[]), "image 0, the annotations"),
    "an image": (lambda model, val: Image.new("RGB", (64, 48)).save(val / "0.jpg"), "the image file .its size or time of"),
    "the tokenizer": (lambda model, val: change_json(model / "tokenizer_config.json", extra=1), "the tokenizer changed"),
    "the processor": (
        lambda model, val: change_json(model.parent / "tower/preprocessor_config.json", image_mean=[0, 0, 0]), "the processor or",
    ),
    "the weights": (lambda model, val: change_weights(model), "the weights changed"),
    "the config": (lambda model, val: change_json(model / "config.json", rms_norm_eps=0.1), "the config.json of the model"),
}  # fmt: skip


def test_what_decides_a_prediction_and_changed_is_named(tmp_path: Path, asked: Places) -> None:
    """The scores of before would be printed for it."""
    command, model, val = copies(tmp_path)
    assert test_read.main(command) == 0
    assert test_read.main(command) == 0 and asked == [0]
    kept = {folder: tmp_path / f"kept_{folder.name}" for folder in (model, val, tmp_path / "tower")}
    for folder, copy in kept.items():
        shutil.copytree(folder, copy)
    for name, (change, words) in INPUTS.items():
        change(model, val)
        with pytest.raises(SystemExit, match=f"is of an evaluation .*other .*{words}") as error:
            test_read.main(command)
        assert error.value.code == 2, name
        for folder, copy in kept.items():
            shutil.copytree(copy, folder, dirs_exist_ok=True)
    assert test_read.main(command) == 0 and asked == [0]  # all is as it was, and nothing was lost


def test_results_of_other_data_sets_stay(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the same settings stand together; --overwrite measures its own anew; under other settings nothing is dropped."""
    def rows() -> list[str]:
        return [row["dataset"] for row in json.loads((tmp_path / "results.json").read_text())["results"]]

    few = ("--limit", "1")
    assert test_read.main(line(data, tmp_path, "--data", "refcoco|val", *few)) == 0
    assert test_read.main(line(data, tmp_path, "--data", "ReasonSeg|val", *few)) == 0
    assert rows() == ["refcoco", "ReasonSeg"]
    assert "(beside refcoco|val of an earlier command)" in capsys.readouterr().out
    assert test_read.main(line(data, tmp_path, "--data", "refcoco|val", *few, "--overwrite")) == 0
    assert rows() == ["ReasonSeg", "refcoco"] and (tmp_path / "predictions_ReasonSeg_val.jsonl").exists()
    before = (tmp_path / "results.json").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match=r"holds ReasonSeg\|val under other settings: choose .*limit 1 then, 2 now"):
            test_read.main(line(data, tmp_path, "--data", "refcoco|val", "--limit", "2", *more))
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text('{"mine": 1}')
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="results.json is no result of test_read.py.*move it away"):
            test_read.main(line(data, tmp_path, "--data", "refcoco|val", *few, *more))
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the model is loaded."""
    monkeypatch.setattr(test_read, "load_model", lambda *_: pytest.fail("the model was loaded"))


def in_the_way(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (--out, words): what is there and is not this program's."""
    thesis, file, link = tmp_path / "thesis", tmp_path / "file", tmp_path / "link"
    thesis.mkdir()
    (thesis / "results.json").write_text('{"mine": 1}')
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    OutputFolder(tmp_path / "run", "train").mark()
    (tmp_path / "run/log.jsonl").write_text("mine")
    return {
        "a foreign folder": (thesis, r"thesis holds something that this command did not write \(results.json\)"),
        "a training run": (tmp_path / "run", "run holds something that this command did not write"),
        "a file": (file, "file is a file: choose a folder"),
        "below a file": (file / "x", "file is a file, so that .*file/x cannot be made"),
        "a dangling link": (link, "link is a link to .*nowhere, which does not exist"),
        "no place": (Path("/proc/nowhere"), "--out /proc/nowhere cannot be made"),
        "a long name": (tmp_path / ("x" * 300), "too long"),
        "the data": (tmp_path / "data", "data holds something that this command did not write|which --dataset_dir reads"),
        "above the data": (tmp_path, "which --dataset_dir reads"),
    }


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_out_that_is_not_this_programs_is_refused_and_stays(tmp_path: Path, no_model: None, more: list[str]) -> None:
    write_reason_seg(tmp_path / "data", {"val": 1})
    for out, words in in_the_way(tmp_path).values():
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=words) as error:
            test_read.main([*line(tmp_path / "data", out), *more])
        assert error.value.code == 2 and "\n" not in str(error.value)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "thesis/results.json").read_text() == '{"mine": 1}' and (tmp_path / "file").read_text() == "mine"


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, no_model: None) -> None:
    write_reason_seg(tmp_path / "data", {"val": 1})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="--cache_dir .*file cannot be made .File exists.: choose another folder"):
        test_read.main([*line(tmp_path / "data", tmp_path / "out"), "--cache_dir", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("4096", "--max_new_tokens 4096 leaves no room for a question: the model holds"),
        ("100000", "--max_new_tokens 100000 leaves no room for a question: the model holds"),
    ],
)
def test_answers_beyond_the_positions_are_refused_before_anything_is_read(
    tmp_path: Path, no_model: None, tokens: str, words: str
) -> None:
    """Not even the data, which is not there."""
    with pytest.raises(SystemExit, match=words) as error:
        test_read.main([*line(tmp_path / "nowhere", tmp_path / "out"), "--protocol", "generate", "--max_new_tokens", tokens])
    assert error.value.code == 2 and not (tmp_path / "out").exists()


def test_answers_beyond_the_positions_are_refused_by_evaluate(tiny: tuple) -> None:
    """What an image takes is known there, whatever the layout of the checkpoint."""
    model, processor = tiny
    positions, patches = model.config.llava.text_config.max_position_embeddings, model.config.num_patches
    with pytest.raises(ValueError, match=f"give less than {positions - patches}"):
        evaluate(model, processor, [], protocol="generate", max_new_tokens=positions - patches)


def test_sigterm_ends_with_one_line_and_what_is_measured_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reason_seg(tmp_path / "data", {"val": 3})
    real, calls = evaluation._Answerer.__call__, []

    def call(self, index, batch):
        calls.append(index)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, index, batch)

    monkeypatch.setattr(evaluation._Answerer, "__call__", call)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        test_read.main(line(tmp_path / "data", tmp_path / "out"))
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "test_read.py: stopped; the same command goes on after the last whole image" in capsys.readouterr().err
    assert test_read.main(line(tmp_path / "data", tmp_path / "out")) == 0
    assert calls == [0, 1, 1, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_evaluation_into_the_same_folder_is_told_who_holds_it(tmp_path: Path, processes: int) -> None:
    """At once, on all its processes, with one line; the holder, this process, is not disturbed."""
    write_reason_seg(tmp_path / "data", {"val": 1})
    command = [str(ROOT / "test_read.py"), *line(tmp_path / "data", tmp_path / "out")]
    if processes > 1:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29719"]
        command = ["-m", *launcher, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with OutputFolder(tmp_path / "out", "evaluate").lock():
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    told = [text for text in done.stderr.splitlines() if text.startswith("test_read.py:")]
    assert len(told) == 1 and f"is being written by another process (process {os.getpid()} on" in told[0]
    assert done.returncode == (2 if processes == 1 else 1)  # torchrun has a status of its own
    assert "model loaded" not in done.stdout and not (tmp_path / "out/results.json").exists()
    assert test_read.main(line(tmp_path / "data", tmp_path / "out")) == 0


def entry(image: int, question: int, **more: object) -> dict:
    """A record with the fields that it must have."""
    mask = encode_mask(np.eye(3))
    return {
        "image_index": image, "question_index": question, "image": f"{image}.jpg", "question": "a", "answer": "[SEG]",
        "exists": True, "predicted_exists": True, "mask": mask, "target": mask, **more,
    }  # fmt: skip


def test_log_of_any_number_of_processes(tmp_path: Path) -> None:
    """Lines of three processes, one with a torn end, are joined in order, a picture once."""
    path, settings = tmp_path / "p.jsonl", {"a": [1, 2]}
    logs = [PredictionLog(path, settings, rank) for rank in (0, 1, 2)]
    for image in (5, 1, 3):
        logs[image % 3].add(image, [entry(image, q) for q in (0, 1)])
    for log in logs:
        log.abandon()
    with (tmp_path / "p.jsonl.part1").open("a") as file:
        file.write('{"image_index": 9, "records": [{"image_ind')
    (tmp_path / "p.jsonl.part2").write_bytes((tmp_path / "p.jsonl.part2").read_bytes()[:10])  # killed in its first line
    last = PredictionLog(path, {"a": (1, 2)}, 1)
    assert sorted(last.done) == [1, 3]
    last.add(0, [entry(0, 0)])
    last.add(2, [])  # an image without questions
    last.rank = 0  # the first process joins
    last.close([{"image_index": 4, "error": "torn"}], images_asked=5)
    assert [(r["image_index"], r["question_index"]) for r in map(json.loads, path.read_text().splitlines())] == [
        (0, 0), (1, 0), (1, 1), (3, 0), (3, 1),
    ]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.settings.json"]
    again = PredictionLog(path, settings)
    assert again.done == {0, 1, 2, 3} and len(again.taken_over[3]) == 2
    again.add(4, [entry(4, 0)])
    again.close()
    assert [json.loads(text)["image_index"] for text in path.read_text().splitlines()] == [0, 1, 1, 3, 3, 4]
    path.with_name("p.jsonl.part7").write_text('{"settings": {"a": [1, 2]}}\n{"image_in\n')
    with pytest.raises(ValueError, match="p.jsonl.part7, line 2 is damaged"):
        PredictionLog(path, settings)


# ------------------------------------------------------------------------------------------------ failing pictures


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A ReasonSeg tree in which one picture of four is no picture."""
    write_reason_seg(tmp_path / "data", {"val": 4})
    (tmp_path / "data/reason_seg/ReasonSeg/val/2.jpg").write_bytes(b"no picture")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_named_and_left_out(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    """The run goes on; the summary says which picture is missing and why; mended, it alone is asked at the next start."""
    out = tmp_path / "out"
    assert test_read.main([*line(broken, out), "--workers", workers]) == 0
    result = json.loads((out / "results.json").read_text())["results"][0]
    assert result["images"] == 3 and [entry["image_index"] for entry in result["failed"]] == [2]
    assert "2.jpg" in result["failed"][0]["error"]
    assert "1 picture of 4 FAILED" in capsys.readouterr().out
    assert test_read.main(["--cmd", "metrics", "--predictions", str(out)]) == 0
    assert "1 picture of 4 FAILED" in capsys.readouterr().out
    picture = broken / "reason_seg/ReasonSeg/val/2.jpg"
    picture.write_bytes((broken / "reason_seg/ReasonSeg/val/1.jpg").read_bytes())
    assert test_read.main(line(broken, out)) == 0
    result = json.loads((out / "results.json").read_text())["results"][0]
    assert result["images"] == 4 and result["failed"] == [] and result["images_taken_over"] == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_strict_stops_at_a_broken_picture(broken: Path, tmp_path: Path, workers: str) -> None:
    with pytest.raises(SystemExit, match=r"ReasonSeg\|val: picture 2: .*2\.jpg"):
        test_read.main(line(broken, tmp_path / "out", "--strict", "--workers", workers))


def test_a_fault_that_is_not_the_pictures_stops(
    tmp_path: Path, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty pictures in a row, or a device in error: going on would only make a list of failures."""
    model, processor = tiny
    write_reason_seg(tmp_path, {"val": 24})
    samples, calls = build_eval("ReasonSeg", "val", tmp_path), []
    real = model.segment_answers

    def segment(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError(message)
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "segment_answers", segment)
    message = "something is wrong"
    with pytest.raises(ValueError, match="20 pictures in a row failed, the last with: RuntimeError: something is wrong"):
        evaluate(model, processor, samples, progress=False, strict=False)
    message = "CUDA error: device-side assert triggered"
    calls.clear()
    with pytest.raises(RuntimeError, match="CUDA error"):
        evaluate(model, processor, samples, progress=False, strict=False)
    assert len(calls) == 3


def first_three(sample) -> dict:
    """The fields of a sample that has its first three expressions alone."""
    parts = {name: getattr(sample, name)[:3] for name in ("conversations", "masks", "exists", "questions")}
    return {**parts, "meta": {}}


def test_too_little_memory_is_met_with_smaller_chunks(
    data: Path, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory with all expressions of a picture: once more with a quarter as many; out again: failed, and it goes on."""
    model, processor = tiny
    samples = build_eval("fprefcoco", "val", data)
    sizes: list[int] = []
    real = model.segment_answers
    room = 4

    def segment(images, input_ids, *args, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images, input_ids, *args, **kwargs)

    expected = evaluate(model, processor, samples, chunk=16, progress=False)
    monkeypatch.setattr(model, "segment_answers", segment)
    forgotten: list[int] = []
    monkeypatch.setattr(model, "forget", lambda: forgotten.append(len(sizes)))
    scores = evaluate(model, processor, samples, chunk=16, progress=False, strict=False)
    assert forgotten and [sizes[n - 1] > room for n in forgotten] == [True] * len(forgotten)  # what was recorded makes room
    assert max(sizes) > room and scores["failed"] == []
    assert scores["ciou"] == pytest.approx(expected["ciou"], rel=1e-3) and scores["expressions"] == expected["expressions"]

    few = [dataclasses.replace(samples[0], **first_three(samples[0]))]
    room = 2
    assert evaluate(model, processor, few, progress=False, strict=False)["failed"] == []  # 3 at once are tried as 1 at a time
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, processor, samples, progress=False)
    room = 0
    with pytest.raises(ValueError, match="all 4 pictures failed, the first with: OutOfMemoryError"):
        evaluate(model, processor, samples, progress=False, strict=False)


def test_a_prompt_that_does_not_fit_is_a_failed_picture(tmp_path: Path, tiny: tuple) -> None:
    """A question of more words than the model has positions is named with what fits; the other pictures are measured."""
    model, processor = tiny
    room = model.config.llava.text_config.max_position_embeddings
    write_reason_seg(tmp_path, {"val": 2})
    file = tmp_path / "reason_seg/ReasonSeg/val/0.json"
    content = json.loads(file.read_text())
    content["text"] = ["thing " * room]
    file.write_text(json.dumps(content))
    scores = evaluate(model, processor, build_eval("ReasonSeg", "val", tmp_path), progress=False, strict=False)
    assert scores["images"] == 1 and len(scores["failed"]) == 1
    assert "0.jpg" in scores["failed"][0]["error"] and str(room) in scores["failed"][0]["error"]


def test_an_empty_split_of_nothing_is_no_score(tiny: tuple) -> None:
    model, processor = tiny
    assert math.isnan(evaluate(model, processor, [], progress=False)["giou"])


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5"])
def test_a_number_of_processes_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE"):
        test_read.reading_processes()
