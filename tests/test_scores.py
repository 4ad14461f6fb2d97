"""The table of results, whether two may be compared, and the scores of predictions that exist already."""

import copy
import json

import numpy as np
import pytest
from test_metrics import random_rows, row
from test_predictions import record, two_shares, write_released

from utils.metrics import summarize
from utils.predictions import encode_mask, expressions, read_released
from utils.scores import differences, read_results, recompute, table

# ------------------------------------------------------------------------------------------------ table


def results():
    free, forced = random_rows(12), [row(k, 40 + k, sentence=k % 2) for k in range(10)]
    return [
        {"dataset": "fprefcoco+", "split": "val", **summarize(free, generated=True)},
        {"dataset": "ReasonSeg", "split": "test", **summarize(forced, generated=False)},
    ]


def cells(line):
    """A line's columns, the interval being none of them."""
    return [cell.split(" [")[0].strip() for cell in line.split("  ") if cell.strip()]


def test_table_has_all_scores_in_few_columns():
    free, forced = results()
    lines = table([free, forced]).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["images", "expr.", "gIoU", "cIoU", "P@.5", "P@.9", "N-acc", "T-acc", "See", "Say"]
    assert [line[:16].strip() for line in lines[1:]] == [
        "fprefcoco+ val", *free["subsets"], "ReasonSeg test", *forced["subsets"],
    ]  # fmt: skip
    low, high = (f"{100 * bound:.1f}" for bound in free["interval"]["giou"])
    assert f" {100 * free['giou']:.1f} [{low}, {high}]  " in lines[1]
    keys = ("giou", "ciou", "p@0.5", "p@0.9", "n_acc", "t_acc", "see", "say")
    percent = [f"{100 * free[key]:.1f}" for key in keys]
    assert cells(lines[1]) == ["fprefcoco+ val", "12", str(free["expressions"]), *percent]
    assert cells(lines[-3])[-4:] == ["-"] * 4  # forced answers deny nothing
    # A column's cells end below each other.
    ends = [lines[0].index(head) + len(head) for head in ("expr.", "P@.5", "T-acc")]
    assert all(line[end - 1] != " " and line[end] == " " for line in lines for end in ends)


def test_empty_columns_are_left_out():
    _, forced = results()
    lines = table([forced]).splitlines()
    assert lines[0].split() == ["images", "expr.", "gIoU", "cIoU", "P@.5", "P@.6", "P@.7", "P@.8", "P@.9"]
    assert cells(lines[1])[1:3] == ["10", "10"] and cells(lines[2])[0] == "short"
    nothing = {"dataset": "own", "split": "val", **summarize([], generated=True)}
    assert table([nothing]).splitlines()[0].split() == ["images", "expr."]


# ------------------------------------------------------------------------------------------------ comparing


SETTINGS = {
    "version": "runs/a", "protocol": "forced", "templates": "fixed", "seed": None, "compat": "correct", "conv_type": "llava_v1",
    "preset": None, "sasp": {"num_points": 30, "t_pos": 0.8}, "dtype": "float32", "bits": None, "limit": None,
    "results": [
        {"dataset": "ReasonSeg", "split": "val", "images": 200, "expressions": 200, "conv_type": "llava_v1"},
        {"dataset": "refcoco", "split": "val", "images": 1500, "expressions": 10834, "conv_type": "llava_v1"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "change, told",
    [
        ({"version": "runs/b", "command": "other", "versions": {}}, []),
        ({"protocol": "generate"}, ["protocol: forced against generate; scores of different protocols are never comparable"]),
        ({"compat": "released"}, ["treatment of padding (compat): correct against released"]),
        ({"templates": "random", "seed": 3}, ["sentences (templates): fixed against random",
                                              "seed of the sentences: none against 3"]),
        ({"sasp": {"num_points": 10, "t_pos": 0.8}}, ["SasP's num_points: 30 against 10"]),
        ({"sasp": None}, ["SasP's num_points: 30 against none", "SasP's t_pos: 0.8 against none"]),
        ({"preset": "read-7b-test", "limit": 40}, ["limit of pictures: none against 40", "preset: none against read-7b-test"]),
        ({"bits": 4}, ["bits of the language model: none against 4"]),
    ],
)  # fmt: skip
def test_settings_that_differ_are_told(change, told):
    assert differences(SETTINGS, SETTINGS | change) == told


def test_data_that_differ_are_told():
    other = copy.deepcopy(SETTINGS)
    other["results"][0].update(images=40, expressions=40)
    other["results"][1].update(dataset="refcoco+", conv_type="llava_v1")
    assert differences(SETTINGS, other) == [
        "ReasonSeg|val: 200 pictures against 40",
        "ReasonSeg|val: 200 expressions against 40",
        "refcoco|val: only in the first",
        "refcoco+|val: only in the second",
    ]
    other = copy.deepcopy(SETTINGS)
    other["results"][1]["conv_type"] = "vicuna_v1"
    (told,) = differences(SETTINGS, other)
    assert told == "refcoco|val: wording of the system prompt (conv_type): llava_v1 against vicuna_v1"


# ------------------------------------------------------------------------------------------------ recomputing


def beside(folder):
    return folder / "predictions_data_own_val.jsonl.settings.json"


def own_folder(folder, protocol="generate", dataset="data/own", split="val"):
    """A folder as test_read.py leaves it, with two pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for image in range(2):
        mask, target = (rng.integers(0, 2, (8, 9), dtype=np.uint8) for _ in range(2))
        made = record(mask, target, image_index=image, question_index=0)
        pixels = expressions([made])[0]
        records.append(made | {"intersection": pixels.intersection, "union": pixels.union})
    (folder / "predictions_data_own_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = {
        "protocol": protocol, "dataset": dataset, "split": split, "images_in_split": 7, "compat": "correct",
        "conv_type": "llava_v1",
    }  # fmt: skip
    beside(folder).write_text(json.dumps({"settings": settings, "failed": []}))
    return records


def test_own_predictions_are_counted_again(tmp_path):
    records = own_folder(tmp_path / "run")
    (result,) = recompute([tmp_path / "run"])
    about = {key: result.pop(key) for key in ("dataset", "split", "protocol", "path", "stored_differ", "images_in_split")}
    assert about == {
        "dataset": "data/own", "split": "val", "protocol": "generate", "stored_differ": 0, "images_in_split": 7,
        "path": str(tmp_path / "run/predictions_data_own_val.jsonl"),
    }  # fmt: skip
    assert (result.pop("compat"), result.pop("conv_type")) == ("correct", "llava_v1")
    assert (result.pop("failed"), result.pop("settings")["dataset"]) == ([], "data/own")
    assert result.pop("completeness_known") is False  # what stands beside it does not say how much was written
    assert result == summarize(expressions(records), generated=True)
    records[0]["union"] += 1
    (tmp_path / "run/predictions_data_own_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert recompute([tmp_path / "run"])[0]["stored_differ"] == 1


def test_the_protocol_is_known_or_asked_for(tmp_path):
    own_folder(tmp_path / "run", protocol="forced")
    assert recompute([tmp_path / "run"], protocol="forced")[0]["see"] is None
    with pytest.raises(ValueError, match="its answers are of protocol forced, not generate"):
        recompute([tmp_path / "run"], protocol="generate")
    beside(tmp_path / "run").unlink()
    file = tmp_path / "run/predictions_data_own_val.jsonl"
    with pytest.raises(ValueError, match="names its protocol: say --protocol"):
        recompute([file])
    (result,) = recompute([file], protocol="generate")
    assert (result["dataset"], result["split"], result["see"]) == ("data_own", "val", 1)
    beside(tmp_path / "run").write_text("[1]")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        recompute([file])


def test_released_folders_are_counted(tmp_path):
    write_released(tmp_path / "a", two_shares())
    (result,) = recompute([tmp_path / "a"])
    scores = summarize(expressions(read_released(tmp_path / "a")), generated=True)
    assert {**result, **scores} == result
    assert (result["dataset"], result["split"], result["protocol"]) == ("fprefcoco", "val", "generate")
    assert "N-acc" in table([result])
    # The files themselves, with our own beside them; and never as forced.
    own_folder(tmp_path / "b")
    both = recompute([*sorted((tmp_path / "a").glob("preds_*.json")), tmp_path / "b"])
    assert [r["dataset"] for r in both] == ["data/own", "fprefcoco"] and both[1] == result
    with pytest.raises(ValueError, match="protocol generate, not forced"):
        recompute([tmp_path / "a"], protocol="forced")


def test_nothing_to_count(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        recompute([tmp_path])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        recompute([tmp_path / "predictions_x_val.jsonl"])
    mask = np.ones((3, 3), np.uint8)
    (tmp_path / "predictions_x_val.jsonl").write_text(json.dumps(record(mask, mask) | {"target": encode_mask(mask[:2])}))
    with pytest.raises(ValueError, match="target 2 x 3"):
        recompute([tmp_path / "predictions_x_val.jsonl"], protocol="forced")


# ------------------------------------------------------------------------------------------------ results.json


ROW = {"dataset": "refcoco", "split": "val", "giou": 0.5, "ciou": 0.4, "see": None, "images": 3, "failed": []}
WRONG_RESULTS = {
    "a list": ([], "must be a JSON object"),
    "no results": ({"protocol": "forced"}, "results: must be a list, found None"),
    "results an object": ({"results": {"a": 1}}, "results: must be a list"),
    "a row of text": ({"results": ["refcoco"]}, r"results\[0\]: must be a JSON object"),
    "a row null": ({"results": [ROW, None]}, r"results\[1\]: must be a JSON object"),
    "no split": ({"results": [{"dataset": "refcoco"}]}, r"results\[0\], split: must be text, found None"),
    "a dataset of numbers": ({"results": [ROW | {"dataset": 5}]}, r"results\[0\], dataset: must be text, found 5"),
    "a score as text": ({"results": [ROW | {"giou": "0.5"}]}, r"results\[0\], giou: must be a number from 0 to 1"),
    "a score of 50": ({"results": [ROW | {"ciou": 50}]}, r"ciou: must be a number from 0 to 1"),
    "a score NaN": ({"results": [ROW | {"giou": float("nan")}]}, r"giou: must be a number"),
    "a score true": ({"results": [ROW | {"see": True}]}, r"see: must be a number"),
    "images as text": ({"results": [ROW | {"images": "3"}]}, r"images: must be a number"),
    "failures a number": ({"results": [ROW | {"failed": 2}]}, r"failed: must be a list"),
    "a row twice": ({"results": [ROW, ROW]}, r"results\[1\]: refcoco\|val is there twice"),
    "sasp a list": ({"results": [ROW], "sasp": [1]}, r"sasp: found \[1\]"),
    "protocol a number": ({"results": [ROW], "protocol": 1}, "protocol: found 1"),
    "limit as text": ({"results": [ROW], "limit": "4"}, "limit: found '4'"),
    "version a list": ({"results": [ROW], "version": ["a"]}, "version: found"),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_results_of_another_kind_are_named(tmp_path, case):
    content, words = WRONG_RESULTS[case]
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"results\.json is no result of test_read\.py: .*{words}"):
        read_results(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"<html>", b"[" * 10**5])
def test_results_that_are_no_json_are_named(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.json is no result of test_read\.py"):
        read_results(tmp_path)


def test_an_empty_file_has_no_scores(tmp_path):
    (tmp_path / "predictions_x_val.jsonl").touch()
    with pytest.raises(ValueError, match="predictions_x_val.jsonl is empty"):
        recompute([tmp_path], protocol="forced")
