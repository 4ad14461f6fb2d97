"""Records of an evaluation: their masks in pycocotools, their rows, and the files of the original's test_read.py as records."""

import contextlib
import io
import json
import math
import re
import zipfile

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs
from pycocotools.coco import COCO

from utils.metrics import count, overlap, summarize
from utils.predictions import (
    decode_mask,
    encode_mask,
    expression,
    expressions,
    predictions_name,
    read_predictions,
    read_released,
    released_files,
)
from utils.say import say_score


def record(mask, target, **more):
    """A record of masks (H, W); 255 in the target is ignored."""
    made = {
        "image_index": 4, "question_index": 1, "image": "a.jpg", "question": "the red cup", "prompt": "Is there the red cup?",
        "answer": "It is [SEG].", "exists": True, "predicted_exists": True, "mask": encode_mask(mask),
        "target": encode_mask(target == 1),
    }  # fmt: skip
    if (target == 255).any():
        made["ignored"] = encode_mask(target == 255)
    return made | more


def random_masks(seed, size=(23, 31)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, size, dtype=np.uint8), rng.choice(np.array([0, 1, 255], np.uint8), size)


# ------------------------------------------------------------------------------------------------ masks and rows


def test_coco_loads_the_masks_unchanged(tmp_path):
    """As detections that came in a JSON file, the way COCO's own results do."""
    masks = [random_masks(seed)[0] for seed in range(3)] + [np.zeros((23, 31), np.uint8), np.ones((23, 31), bool)]
    found = [
        {"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": encode_mask(mask)} for mask in masks
    ]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {}, "images": [{"id": 1, "height": 23, "width": 31}], "categories": [{"id": 1}], "annotations": [],
        }  # fmt: skip
        truth.createIndex()
        loaded = truth.loadRes(str(tmp_path / "found.json"))
    for mask, annotation in zip(masks, loaded.loadAnns(loaded.getAnnIds()), strict=True):
        assert annotation["segmentation"] == encode_mask(mask) and annotation["area"] == mask.sum()
        assert np.array_equal(loaded.annToMask(annotation), mask) and np.array_equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize("seed", range(4))
def test_pixels_equal_those_of_the_masks(seed):
    mask, target = random_masks(seed)
    if seed == 3:
        target[target == 255] = 0
    counted = count(torch.from_numpy(mask), torch.from_numpy(target), 4, True, True, words=3)
    assert expression(record(mask, target))[:-1] == counted[:-1]
    # What the record says of itself is not believed.
    assert expression(record(mask, target, iou=2.0, intersection=0, union=1))[:-1] == counted[:-1]


def test_a_target_with_ignored_pixels_inside_is_cut():
    mask = np.ones((4, 4), np.uint8)
    made = record(mask, np.ones((4, 4), np.uint8))
    made["ignored"] = encode_mask(np.arange(16).reshape(4, 4) < 6)
    assert expression(made)[1:5] == (10, 10, 10, 16)


def test_what_else_a_row_takes_from_its_record():
    mask, target = random_masks(0)
    made = expression(record(mask, target, is_sentence=True, predicted_exists=False))
    assert (made.exists, made.predicted_exists, made.sentence, made.words) == (1, 0, 1, 3) and math.isnan(made.say)
    # The bare expression is not known where `question` is the whole prompt.
    assert expression(record(mask, target, question="Is there the red cup?")).words == 0

    said = {"answer": "No red cup, but a blue cup.", "reference": "a blue cup", "question": "red cup", "say": 0.123}
    assert math.isnan(expression(record(mask, target, **said)).say)  # a true premise needs no correction
    false = expression(record(mask, np.zeros_like(target), exists=False, **said))
    assert (false.exists, false.sentence, false.words) == (0, -1, 2)
    assert false.say == say_score(said["answer"], "a blue cup", asked="red cup") > 0.5


def test_masks_must_fit_and_expressions_stand_once():
    mask, target = random_masks(0)
    small = encode_mask(np.zeros((5, 6)))
    for name in ("target", "ignored"):
        with pytest.raises(ValueError, match=rf"picture 4, question 1 \(a.jpg\): mask is 23 x 31, {name} 5 x 6"):
            expression(record(mask, target) | {name: small})
    assert len(expressions([record(mask, target), record(mask, target, question_index=2)])) == 2
    with pytest.raises(ValueError, match="picture 4, question 1 .*twice"):
        expressions([record(mask, target), record(mask, target)])


def test_reading_names_what_is_wrong(tmp_path):
    file = tmp_path / predictions_name("data/own set", "val")
    assert file.name == "predictions_data_own_set_val.jsonl"
    with pytest.raises(FileNotFoundError, match="test_read.py --out"):
        read_predictions(file)
    good = record(*random_masks(0))
    file.write_text(json.dumps(good) + "\n")
    assert read_predictions(file) == [good]
    for line, complaint in (('{"image": ', "line 2 is no JSON"), ('{"image": 1}', "line 2 lacks image_index, .*target")):
        file.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(ValueError, match=complaint):
            read_predictions(file)


def test_names_of_files_stay_short_and_apart():
    assert predictions_name("refcoco+", "testA") == "predictions_refcoco+_testA.jsonl"
    long = [predictions_name(f"{'蓝' * 200}{n}", "val") for n in range(2)]
    assert long[0] != long[1] and max(len(name.encode()) for name in long) < 200
    assert "/" not in predictions_name("ReasonSeg", "../val")


def full_record():
    mask, target = random_masks(0)
    return record(
        mask, target, num_seg=1, iou=0.5, intersection=3, union=9, box=[0.0, 1.0, 2.0, 3.0], confidence=0.9,
        points=[[1.5, 2.0], [3, 4]], point_labels=[1, -1], seconds=0.1, is_sentence=False, reference="a cup", say=0.5, ref_id=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\n\n" + text.replace(b"\n", b"\n  \n"),
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.rstrip(),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "UTF-16", "no last newline"],
)
def test_the_same_records_however_a_file_was_saved(tmp_path, change):
    records = [full_record() | {"question_index": n} for n in range(3)]
    (tmp_path / "p.jsonl").write_bytes(change("".join(json.dumps(r) + "\n" for r in records).encode()))
    assert read_predictions(tmp_path / "p.jsonl") == records


def test_a_list_of_runs_is_compressed(tmp_path):
    made = full_record()
    made["mask"] = {"size": [23, 31], "counts": [100, 13, 600]}
    (tmp_path / "p.jsonl").write_text(json.dumps(made))
    (found,) = read_predictions(tmp_path / "p.jsonl")
    assert decode_mask(found["mask"]).ravel(order="F").nonzero()[0].tolist() == list(range(100, 113))
    json.dumps(found)


WRONG = {
    "image_index": [None, "4", -1, 1.0, True, [4], 10**30, math.nan],
    "question_index": [None, "0", -1, 0.5, False, {}],
    "image": [None, 3, ["a.jpg"]],
    "question": [None, 3, ["a"], {}],
    "answer": [None, 0, ["Sure"]],
    "exists": ["true", 1, 0, []],
    "predicted_exists": ["false", 1, {}],
    "prompt": [3, ["a"]],
    "num_seg": ["1", -1, 1.5],
    "iou": ["0.5", math.nan, math.inf, True, [0.5], 10**400],
    "intersection": ["3", -1, 2.5, True, 10**12],
    "union": ["9", -9, 2.5],
    "mask": [None, "PPYo1", [], {}, {"size": [23, 31]}, {"size": [23, 31], "counts": "PPYo1"}, {"size": "23", "counts": ""}],
    "target": [None, 1, {"size": [23, 31], "counts": [1, 2]}, {"size": [23, 31], "counts": ["713"]}],
    "ignored": ["x", 0, [1, 2, 3], {"size": [23, 31], "counts": 5}],
    "box": ["x", [1, 2, 3], [1, 2, 3, None], [1, 2, 3, math.nan]],
    "confidence": ["0.9", math.nan, True],
    "points": ["ab", [[10**400, 1], [3, 4]], [[1, 2, 3], [4]], [[1, "2"], [3, 4]], [[1, math.nan], [3, 4]], [1, 2], {"a": "bc"}],
    "point_labels": ["ab", [1], [1, 2], [1, "0"], [1, None], [[1], [0]], 5],
    "seconds": ["1", [], math.inf],
    "is_sentence": ["no", 1],
    "reference": [5, ["a"]],
    "say": ["0.5", 1.5, -0.1, math.nan],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in WRONG for v in WRONG[name]], ids=lambda v: repr(v)[:9])
def test_a_field_of_another_kind_is_named_with_its_line(tmp_path, name, value):
    good = full_record()
    lines = [json.dumps(good), json.dumps(good | {"question_index": 2, name: value})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2.*{name}"):
        read_predictions(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["exists", "predicted_exists", "iou", "box", "confidence", "seconds", "reference", "ignored"])
def test_what_may_be_unknown_may_be_null(tmp_path, name):
    (tmp_path / "p.jsonl").write_text(json.dumps(full_record() | {name: None}))
    assert len(expressions(read_predictions(tmp_path / "p.jsonl"))) == 1


BROKEN_LINES = {
    "torn": (lambda lines: [*lines[:2], lines[2][:-40]], "line 3 is no JSON.*the file is cut short"),
    "doubled": (lambda lines: [*lines, lines[1]], "line 4: image 4, question 1 is there twice .line 2"),
    "a list": (lambda lines: [lines[0], "[1]"], r"line 2: must be a JSON object \{...\}, found \[1\]"),
    "null": (lambda lines: ["null", *lines], "line 1: must be a JSON object"),
    "settings": (lambda lines: ['{"settings": {}}', *lines], "line 1 lacks image_index"),
    "nested": (lambda lines: [lines[0], "[" * 10**5], "line 2 .*nested too deeply"),
    "huge number": (lambda lines: [lines[0], f'{{"image_index": {"9" * 5000}}}'], "line 2 is no JSON"),
    "more inside": (lambda lines: [lines[0].replace('"intersection": 3', '"intersection": 10')], "line 1, intersection: .*10"),
    "points alone": (lambda lines: [lines[0].replace('"point_labels": [1, -1], ', "")], "line 1, point_labels: .*0 and 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_broken_lines_are_named(tmp_path, case):
    change, words = BROKEN_LINES[case]
    (tmp_path / "p.jsonl").write_text("\n".join(change([json.dumps(full_record() | {"question_index": n}) for n in range(3)])))
    with pytest.raises(ValueError, match=rf"p\.jsonl, {words}"):
        read_predictions(tmp_path / "p.jsonl")


@pytest.mark.parametrize("content", [b"\xff\xd8\xff", b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1", b" \n"])
def test_what_is_no_predictions_file_is_named(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.jsonl"):
        read_predictions(tmp_path / "p.jsonl")


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(ValueError, match="p.jsonl is a folder"):
        read_predictions(tmp_path / "p.jsonl")


# ------------------------------------------------------------------------------------------------ the original's layout


def write_released(folder, shares, dataset="fprefcoco"):
    """preds_*.json and masks of [{image: [(mask, target, exists, predicted)]} of each process], as the original saves them."""
    (folder / "segmentation_mask").mkdir(parents=True)
    for process, images in enumerate(shares):
        content = {}
        for place, (image, found) in enumerate(images.items(), 1):
            path = f"segmentation_mask/{process}_{place:04d}.npz"
            pred, gt = (np.stack([entry[k] for entry in found]).astype(np.int32) for k in (0, 1))
            np.savez_compressed(folder / path, pred=pred, gt=gt)
            content[image] = {
                "conversation_list": [f"Is there thing {n}? If so, segment it." for n in range(len(found))],
                "pred_sent": ["Yes [SEG] ." if entry[3] else "Sorry no" for entry in found],
                "gt_exists": [entry[2] for entry in found],
                "ref_ids": [[10 + n for n in range(len(found))]],
                "sent_ids": [[n for n in range(len(found))]],
                "pred_exists": [entry[3] for entry in found],
                "segmentation_path": path,
            }
        (folder / f"preds_{dataset}_{process}_of_{len(shares)}.json").write_text(json.dumps(content))


def two_shares():
    """Three pictures of different sizes, ignored pixels in one, false premises in all."""
    shares, seed = [{}, {}], 0
    for process, image, size in ((0, "b.jpg", (7, 9)), (0, "c.jpg", (9, 7)), (1, "a.jpg", (6, 6))):
        found = []
        for n in range(3):
            mask, target = random_masks(seed := seed + 1, size)
            if image != "c.jpg":
                target[target == 255] = 0
            exists = n < 2
            found.append((mask * (n != 1), target * exists, exists, n != 1))
        shares[process][image] = found
    return shares


def test_released_files_become_records(tmp_path):
    shares = two_shares()
    write_released(tmp_path, shares)
    records = read_released(tmp_path)
    everything = [(image, entry) for share in shares for image, found in share.items() for entry in found]
    assert [r["image"] for r in records] == [image for image, _ in everything]
    assert [(r["image_index"], r["question_index"]) for r in records] == [(i, n) for i in range(3) for n in range(3)]
    rows = []
    for (_, (mask, target, exists, predicted)), found in zip(everything, records, strict=True):
        pixels = overlap(mask, target)
        rows.append(count(mask, target, found["image_index"], exists, predicted))
        assert (found["intersection"], found["union"]) == pixels and found["iou"] == pixels.iou
        assert np.array_equal(decode_mask(found["mask"]), mask)
        assert ("ignored" in found) == (255 in target) and (found["box"] is None) == (not mask.any())
    scores = summarize(expressions(records), generated=True)
    assert scores["images"] == 3 and summarize(rows, generated=True)["ciou"] == scores["ciou"]
    assert not any("words" in name for name in scores["subsets"])
    first = {key: records[4][key] for key in ("answer", "num_seg", "exists", "predicted_exists", "ref_id", "sent_id", "points")}
    assert first == {
        "answer": "Sorry no", "num_seg": 0, "exists": True, "predicted_exists": False, "ref_id": 11, "sent_id": 1, "points": [],
    }  # fmt: skip
    # Records of our own kind: they can be written, read, and counted like any other.
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_predictions(tmp_path / "ours.jsonl") == records
    # In any order, as a shell lists them.
    assert read_released(released_files(tmp_path)["fprefcoco"][::-1]) == records


def test_overlapping_polygons_are_inside():
    """The original adds up polygons; where two overlap its target is 2, which its scorer took for background (§8-15)."""
    record = {"pred_sent": ["[SEG]"], "conversation_list": ["?"], "gt_exists": [True], "pred_exists": [True]}
    from utils import predictions

    target = np.array([[[0, 1], [2, 255]]])
    mask = np.array([[[0, 1], [1, 1]]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "_read_masks", lambda *_: (mask, target))
        (found,) = predictions._released_records(predictions.Path("x.json"), "a.jpg", {**record, "segmentation_path": ""}, 0)
    assert (found["intersection"], found["union"]) == (2, 2)


def change(folder, process, edit):
    file = folder / f"preds_fprefcoco_{process}_of_2.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def resave(folder, name, **arrays):
    np.savez(folder / "segmentation_mask" / name, **arrays)


BROKEN = {
    "share missing": (
        lambda f: (f / "preds_fprefcoco_1_of_2.json").unlink(), FileNotFoundError, "of 2 processes, preds_fprefcoco_1_of_2.json",
    ),
    "two runs": (
        lambda f: (f / "preds_fprefcoco_0_of_1.json").write_text("{}"), ValueError, "not the shares of one run",
    ),
    "part of another run": (
        lambda f: (f / "preds_fprefcoco_2_of_3.json").write_text("{}"), ValueError, "not the shares of one run",
    ),
    "share too many": (
        lambda f: (f / "preds_fprefcoco_2_of_2.json").write_text("{}"), ValueError, "preds_fprefcoco_2_of_2.json is beyond",
    ),
    "picture in both": (
        lambda f: change(f, 1, lambda c: c.update({"b.jpg": c["a.jpg"]})), ValueError, "b.jpg is in .*0_of_2.json and again",
    ),
    "picture twice": (
        lambda f: (f / "preds_fprefcoco_1_of_2.json").write_text(
            re.sub(r"^\{(.*)\}$", r"{\1, \1}", (f / "preds_fprefcoco_1_of_2.json").read_text())
        ), ValueError, "a.jpg is in .*1_of_2.json and again in .*1_of_2.json",
    ),
    "no JSON": (lambda f: (f / "preds_fprefcoco_1_of_2.json").write_text("{"), ValueError, "1_of_2.json is no JSON"),
    "a list": (lambda f: (f / "preds_fprefcoco_1_of_2.json").write_text("[]"), ValueError, "found a list"),
    "field missing": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].pop("gt_exists")), ValueError, "1_of_2.json, a.jpg lacks gt_exists",
    ),
    "field too short": (
        lambda f: change(f, 1, lambda c: c["a.jpg"]["pred_exists"].pop()), ValueError, "a.jpg: pred_exists has 2 entries",
    ),
    "ids too short": (
        lambda f: change(f, 1, lambda c: c["a.jpg"]["ref_ids"][0].pop()), ValueError, "a.jpg: ref_ids has 2 entries",
    ),
    "masks missing": (
        lambda f: (f / "segmentation_mask/1_0001.npz").unlink(), FileNotFoundError, "a.jpg: segmentation_path .*1_0001.npz",
    ),
    "masks broken": (
        lambda f: (f / "segmentation_mask/1_0001.npz").write_bytes(b"PK"), ValueError, "1_0001.npz is no archive of pred and gt",
    ),
    "no gt": (lambda f: resave(f, "1_0001.npz", pred=np.zeros((3, 6, 6))), ValueError, "1_0001.npz is no archive .*gt"),
    "too few masks": (
        lambda f: resave(f, "1_0001.npz", pred=np.zeros((2, 6, 6)), gt=np.zeros((3, 6, 6))), ValueError, r"pred is \(2, 6, 6\)",
    ),
    "other size": (
        lambda f: resave(f, "1_0001.npz", pred=np.zeros((3, 6, 6)), gt=np.zeros((3, 6, 5))), ValueError, r"gt \(3, 6, 5\): they",
    ),
    "text for a list": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(pred_sent="Yes")), ValueError, "a.jpg, pred_sent: must be a list",
    ),
    "an object for a list": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(pred_sent={"0": "a"})), ValueError, "pred_sent: must be a list",
    ),
    "text for a truth value": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(gt_exists=["false"] * 3)), ValueError, "gt_exists: must be true or",
    ),
    "null for an answer": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(pred_sent=[None] * 3)), ValueError, "pred_sent: must be text",
    ),
    "null for ids": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(ref_ids=5)), ValueError, "a.jpg, ref_ids: must be a list",
    ),
    "a list for an entry": (lambda f: change(f, 1, lambda c: c.update({"a.jpg": [1]})), ValueError, "a.jpg lacks conv"),
    "masks elsewhere": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(segmentation_path="segmentation_mask/../../x.npz")), ValueError,
        "segmentation_path: must be a path inside the folder",
    ),
    "masks at the root": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(segmentation_path="/etc/x.npz")), ValueError, "inside the folder",
    ),
    "no path": (
        lambda f: change(f, 1, lambda c: c["a.jpg"].update(segmentation_path=None)), ValueError, "segmentation_path: must be",
    ),
    "objects for masks": (
        lambda f: resave(f, "1_0001.npz", pred=np.array([{}], object), gt=np.zeros((3, 6, 6))), ValueError, "pred must hold num",
    ),
    "text for masks": (
        lambda f: resave(f, "1_0001.npz", pred=np.full((3, 6, 6), "x"), gt=np.zeros((3, 6, 6))), ValueError, "pred must hold",
    ),
    "NaN in a mask": (
        lambda f: resave(f, "1_0001.npz", pred=np.full((3, 6, 6), np.nan), gt=np.zeros((3, 6, 6))), ValueError, "from 0 to 255",
    ),
    "less than 0": (
        lambda f: resave(f, "1_0001.npz", pred=np.zeros((3, 6, 6)), gt=np.full((3, 6, 6), -1)), ValueError, "gt must hold num",
    ),
    "a field twice": (
        lambda f: (f / "preds_fprefcoco_1_of_2.json").write_text(
            (f / "preds_fprefcoco_1_of_2.json").read_text().replace('"pred_sent"', '"gt_exists": [true, true, true], "pred_sent"')
        ), ValueError, "a.jpg: a field is there twice",
    ),
    "two data sets": (
        lambda f: (f / "preds_refcoco_0_of_1.json").write_text("{}"), ValueError, r"several data sets \(fprefcoco, refcoco\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_released_files_that_do_not_fit(case, tmp_path):
    breaks, error, complaint = BROKEN[case]
    write_released(tmp_path, two_shares())
    breaks(tmp_path)
    with pytest.raises(error, match=complaint):
        read_released(tmp_path)


def test_masks_that_would_fill_the_memory_are_refused_before_they_are_loaded(tmp_path):
    """A few kilobytes of zip may stand for gigabytes."""
    write_released(tmp_path, two_shares())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (3, 30000, 30000)})
    with zipfile.ZipFile(tmp_path / "segmentation_mask/1_0001.npz", "w") as archive:
        for name in ("pred.npy", "gt.npy"):
            archive.writestr(name, header.getvalue())
    with pytest.raises(ValueError, match=r"1_0001.npz: pred is \(3, 30000, 30000\) of int64: larger than any masks"):
        read_released(tmp_path)


def test_a_folder_without_released_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no preds_"):
        read_released(tmp_path)


@pytest.mark.parametrize("folder", [f for f in golden_dirs() if (f / "e2e/fprefcoco.json").is_file()], ids=lambda f: f.name)
def test_recorded_files_give_the_printed_scores(folder):
    printed = json.loads((folder / "e2e/fprefcoco.json").read_text())["metrics_printed"]
    ciou, see = (float(x) for x in re.search(r"cIoU: ([\d.]+) \| See Accuracy: ([\d.]+)", printed).groups())
    scores = summarize(expressions(read_released(folder / "e2e/expected_fprefcoco")), generated=True)
    assert (round(scores["ciou"], 4), round(scores["see"], 4)) == (ciou, see)


@pytest.mark.parametrize("folder", [f for f in golden_dirs() if (f / "metrics/run_eval.npz").is_file()], ids=lambda f: f.name)
@pytest.mark.parametrize("case", ["all", "first_two", "only_im2"])
def test_recorded_masks_give_the_recorded_scores(folder, case, tmp_path):
    """With ignored pixels, through the files, a picture a process."""
    table, arrays = json.loads((folder / "metrics/run_eval.json").read_text()), np.load(folder / "metrics/run_eval.npz")
    expected, shares = table["results"][case], []
    for image in expected["images"]:
        key, entry = image.removesuffix(".jpg"), table["preds"][image]
        columns = arrays[f"{key}_pred"], arrays[f"{key}_gt"], entry["gt_exists"], entry["pred_exists"]
        shares.append({image: list(zip(*columns, strict=True))})
    write_released(tmp_path, shares)
    scores = summarize(expressions(read_released(tmp_path)), generated=True)
    assert (scores["intersection"], scores["union"]) == (expected["intersection"][1], expected["union"][1])
    assert scores["see"] == pytest.approx(expected["see_accuracy"], abs=1e-12)
