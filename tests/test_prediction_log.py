"""Predictions on disk: what was finished is what was written, and what a killed process left is taken over or named."""

import json
import os

import numpy as np
import pytest

from utils import prediction_log
from utils.prediction_log import PredictionLog, read_finished, settings_file
from utils.predictions import encode_mask
from utils.scores import recompute

SETTINGS = {
    "protocol": "forced", "dataset": "refcoco", "split": "val", "images_in_split": 5, "checkpoint": "a", "processor": "p",
}  # fmt: skip
FAILED = [{"image_index": 2, "error": "torn"}]


def entry(image, question, **more):
    """A record with the fields that it must have."""
    mask = encode_mask(np.eye(3))
    return {
        "image_index": image, "question_index": question, "image": f"{image}.jpg", "question": "a", "answer": "[SEG]",
        "exists": True, "predicted_exists": True, "mask": mask, "target": mask, **more,
    }  # fmt: skip


def begin(path, images=(0, 1, 3, 4), settings=SETTINGS, items=None):
    """A log in which image 4 has no question and the others two."""
    log = PredictionLog(path, settings, items=items)
    for image in images:
        log.add(image, [entry(image, q) for q in range(2 * (image != 4))])
    return log


@pytest.fixture
def finished(tmp_path):
    """Image 2 of five failed."""
    path = tmp_path / "predictions_refcoco_val.jsonl"
    begin(path).close(FAILED, images_asked=5)
    return path


@pytest.fixture
def stopped(tmp_path):
    """The file of a process that was stopped after four images."""
    begin(tmp_path / "predictions_refcoco_val.jsonl").abandon()
    return tmp_path / "predictions_refcoco_val.jsonl.part0"


def edit(file, change):
    """Changes the lines of a file."""
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


# ------------------------------------------------------------------------------------------------ finished


def test_what_is_whole_is_read_and_taken_over(finished):
    records, about = read_finished(finished)
    assert len(records) == 6 and about["records"] == 6 and about["without_questions"] == [4]
    log = PredictionLog(finished, SETTINGS)
    assert log.done == {0, 1, 3, 4} and log.taken_over[4] == []
    assert recompute([finished])[0]["completeness_known"]


@pytest.mark.parametrize("change", [lambda data: data.replace(b"\n", b"\r\n"), lambda data: b"\xef\xbb\xbf" + data + b"\n\n"])
def test_line_ends_and_marks_of_windows_change_nothing(finished, change):
    finished.write_bytes(change(finished.read_bytes()))
    assert PredictionLog(finished, SETTINGS).done == {0, 1, 3, 4}


def swap(lines):
    return [lines[1], lines[0], *lines[2:]]


CHANGED = {
    "torn": (lambda lines: [*lines[:-1], lines[-1][:-30]], "line 6 is no JSON"),
    "the last line lost": (lambda lines: lines[:-1], "has 5 expressions, and its evaluation wrote 6"),
    "the last image lost": (lambda lines: lines[:-2], "1 image missing, the first one is image 3"),
    "half lost": (lambda lines: lines[:2], "2 images missing, the first one is image 1"),
    "all lost": (lambda lines: [], "3 images missing, the first one is image 0"),
    "the first line lost": (lambda lines: lines[1:], "line 1: image 0 lacks question 0"),
    "a line doubled": (lambda lines: [*lines, lines[0]], r"line 7: image 0, question 0 is there twice \(line 1\)"),
    "all doubled": (lambda lines: lines * 2, "line 7: image 0, question 0 is there twice"),
    "an expression more": (lambda lines: [*lines, json.dumps(entry(3, 2))], "has 7 expressions, and its evaluation wrote 6"),
    "a failed image": (lambda lines: [*lines, json.dumps(entry(2, 0))], "line 7: image 2 has no records in this evaluation"),
    "an image without questions": (lambda lines: [*lines, json.dumps(entry(4, 0))], "line 7: image 4 has no records in this"),
    "an image beyond": (lambda lines: [*lines, json.dumps(entry(5, 0))], "line 7: image 5 is beyond the last image"),
    "out of order": (swap, "line 1: image 0 lacks question 0, or its lines are not in order"),
    "another answer": (lambda lines: [lines[0].replace("[SEG]", "no"), *lines[1:]], "is not what its evaluation wrote"),
    "another mask": (
        lambda lines: [json.dumps(entry(0, 0, mask=encode_mask(np.ones((3, 3))))), *lines[1:]], "is not what its evaluation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_a_finished_file_that_was_changed_is_named(finished, case):
    change, words = CHANGED[case]
    edit(finished, change)
    for read in (lambda: PredictionLog(finished, SETTINGS), lambda: recompute([finished]), lambda: read_finished(finished)):
        with pytest.raises(ValueError, match=rf"predictions_refcoco_val\.jsonl.*{words}"):
            read()
    assert PredictionLog(finished, SETTINGS, overwrite=True).done == frozenset()


def test_predictions_of_another_evaluation_are_named(finished, tmp_path):
    other = tmp_path / "other" / finished.name
    begin(other, settings=SETTINGS | {"checkpoint": "b"}).close(FAILED, images_asked=5)
    edit(other, lambda lines: [line.replace("[SEG]", "Sure, [SEG]") for line in lines])
    finished.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="is not what its evaluation wrote: it was changed, or is of another one"):
        PredictionLog(finished, SETTINGS)


def test_predictions_that_nothing_explains_are_not_replaced(finished):
    """They would be at the end of the evaluation."""
    settings_file(finished).unlink()
    with pytest.raises(ValueError, match="has no predictions_refcoco_val.jsonl.settings.json beside it.*--overwrite"):
        PredictionLog(finished, SETTINGS)
    (result,) = recompute([finished], protocol="forced")
    assert result["expressions"] == 6 and not result["completeness_known"]


WHOLE = {
    "settings": {}, "failed": [], "hash": "x", "records": 6, "images_asked": 5, "without_questions": [], "items": {},
    "replaces": None,
}  # fmt: skip
BESIDE = {
    "empty": "", "no JSON": "{", "a list": "[1]", "null": "null", "nothing": "{}", "no failures": '{"settings": {}}',
    "settings a list": '{"settings": [], "failed": []}', "failures an object": '{"settings": {}, "failed": {}}',
    "failures of text": '{"settings": {}, "failed": ["a"]}', "a dataset of numbers": '{"settings": {"dataset": 3}, "failed": []}',
    "sasp a list": '{"settings": {"sasp": [1]}, "failed": []}', "limit as text": '{"settings": {"limit": "3"}, "failed": []}',
    "no items": json.dumps({name: value for name, value in WHOLE.items() if name != "items"}),
    "a hash alone": '{"settings": {}, "failed": [], "hash": "x"}',
    "records as text": json.dumps(WHOLE | {"records": "6"}), "images null": json.dumps(WHOLE | {"images_asked": None}),
    "items a list": json.dumps(WHOLE | {"items": ["a"]}), "an item a number": json.dumps(WHOLE | {"items": {"0": 1}}),
    "replaces text": json.dumps(WHOLE | {"replaces": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_damaged_settings_beside_predictions_are_named(finished, case):
    settings_file(finished).write_text(BESIDE[case])
    for read in (lambda: PredictionLog(finished, SETTINGS), lambda: recompute([finished], "forced")):
        with pytest.raises(ValueError, match="predictions_refcoco_val.jsonl.settings.json is damaged"):
            read()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint", "the weights changed"),
        ("processor", "the processor or the tokenizer changed"),
        ("images_in_split", "images_in_split 5 then, 6 now"),
    ],
)
def test_settings_that_differ_are_named_in_words(finished, name, words):
    with pytest.raises(ValueError, match=f"under other settings.*{words}"):
        PredictionLog(finished, SETTINGS | {name: 6})


ITEMS = ["a0 f0", "a1 f1", "a2 f2", "a3 f3", "a4 f4"]


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "begun"])
@pytest.mark.parametrize(
    ("index", "item", "words"),
    [
        (0, "b0 f0", r"Of refcoco\|val, image 0, the annotations \(its questions or true masks\) changed"),
        (4, "a4 g4", r"image 4, the image file \(its size or time of modification\) changed"),
        (3, "b3 g3", r"image 3, the annotations .* and the image file .* changed"),
        (2, "b2 g2", None),
    ],
)
def test_an_item_that_was_measured_must_be_as_it_was(tmp_path, is_finished, index, item, words):
    """Image 2 failed, or was not reached: it may have been mended."""
    path = tmp_path / "p.jsonl"
    log = begin(path, items=ITEMS)
    if is_finished:
        log.close(FAILED, images_asked=5)
    else:
        log.abandon()
    assert PredictionLog(path, SETTINGS, items=ITEMS).done == {0, 1, 3, 4}
    changed = [*ITEMS[:index], item, *ITEMS[index + 1 :]]
    if words is None:
        assert PredictionLog(path, SETTINGS, items=changed).done == {0, 1, 3, 4}
    else:
        with pytest.raises(ValueError, match=f"is of an evaluation of other data.*--overwrite. .*{words}"):
            PredictionLog(path, SETTINGS, items=changed)


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize("ending", ["", ".settings.json", ".part0"])
def test_folders_and_links_in_the_way_are_named(tmp_path, kind, ending):
    path = tmp_path / "p.jsonl"
    place = path.with_name(path.name + ending)
    if kind == "folder":
        place.mkdir()
    else:
        (tmp_path / "thesis.tex").write_text("mine")
        place.symlink_to(tmp_path / "thesis.tex")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"{place.name} is a folder or a link"):
            PredictionLog(path, SETTINGS, overwrite=overwrite)
    assert kind == "folder" or (tmp_path / "thesis.tex").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ begun


CHANGED_PART = {
    "an image doubled": (lambda lines: [*lines, lines[1]], r"line 6: image 0 is there twice \(before in .*line 2\)"),
    "no JSON": (lambda lines: [lines[0], lines[1][:-9], *lines[2:]], "line 2 is damaged"),
    "null": (lambda lines: [lines[0], "null"], "line 2 is damaged"),
    "the settings again": (lambda lines: [*lines, lines[0]], "line 6: must be {'image_index'"),
    "no settings": (lambda lines: lines[1:], "line 1, settings: must be a JSON object"),
    "other settings": (lambda lines: ['{"settings": {"protocol": "generate"}}', *lines[1:]], "under other settings"),
    "an image as text": (lambda lines: [lines[0], lines[1].replace('"image_index": 0', '"image_index": "0"')], "line 2"),
    "records an object": (lambda lines: [lines[0], '{"image_index": 0, "records": {}, "check": ""}'], "line 2: must be"),
    "another answer": (lambda lines: [lines[0], lines[1].replace("[SEG]", "no")], "line 2 is not what this evaluation wrote"),
    "no check": (lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {"check": None})], "line 2 is not what this"),
    "a torn mask": (lambda lines: [lines[0], lines[1].replace('"counts": "', '"counts": "o')], "line 2, record 0, mask: an RLE"),
    "a record less": (
        lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {"records": [entry(0, 1)]})], "line 2 is not what this",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_PART)
def test_a_begun_file_that_was_changed_is_named(stopped, case):
    change, words = CHANGED_PART[case]
    edit(stopped, change)
    with pytest.raises(ValueError, match=rf"predictions_refcoco_val\.jsonl\.part0.*{words}"):
        PredictionLog(stopped.with_name(stopped.name.removesuffix(".part0")), SETTINGS)


def test_lines_of_another_evaluation_are_named(stopped, tmp_path):
    begin(tmp_path / "other/p.jsonl", settings=SETTINGS | {"checkpoint": "b"}).abandon()
    foreign = (tmp_path / "other/p.jsonl.part0").read_text().splitlines()[1]
    edit(stopped, lambda lines: [lines[0], foreign])
    with pytest.raises(ValueError, match="part0, line 2 is not what this evaluation wrote"):
        PredictionLog(tmp_path / "predictions_refcoco_val.jsonl", SETTINGS)


def test_an_image_in_two_files_is_named(stopped, tmp_path):
    stopped.with_name(stopped.name[:-1] + "1").write_bytes(stopped.read_bytes())
    with pytest.raises(ValueError, match=r"part1, line 2: image 0 is there twice \(before in .*part0, line 2\)"):
        PredictionLog(tmp_path / "predictions_refcoco_val.jsonl", SETTINGS)


@pytest.mark.parametrize("cut", [1, 40, 10**9])
def test_a_torn_last_line_costs_one_image(stopped, tmp_path, cut):
    data = stopped.read_bytes()
    stopped.write_bytes(data[: -min(cut, len(data) - 3)])
    log = PredictionLog(tmp_path / "predictions_refcoco_val.jsonl", SETTINGS)
    assert log.done == ({0, 1, 3} if cut < 10**9 else frozenset())


# ------------------------------------------------------------------------------------------------ killed while it joins


class Killed(BaseException):
    """What nothing but a test catches."""


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("earlier", [False, True], ids=["the first time", "over a finished file"])
def test_killed_at_any_moment_of_joining_nothing_is_lost(tmp_path, monkeypatch, earlier, after):
    """Killed after so many files took their names or were deleted; started again, the result is that of one that was not."""
    def run(path, images):
        log = PredictionLog(path, SETTINGS)
        for image in images:
            if image not in log.done:
                log.add(image, [entry(image, q) for q in range(2 * (image != 4))])
        return log

    def close(log):
        log.close((), images_asked=5)

    whole, path = tmp_path / "whole/p.jsonl", tmp_path / "cut/p.jsonl"
    close(run(whole, range(5)))
    if earlier:
        run(path, (0, 1, 3, 4)).close(FAILED, images_asked=5)
    log = run(path, range(5))
    steps = []

    def step(real):
        def counted(*args, **kwargs):
            if len(steps) == after:
                raise Killed
            steps.append(1)
            return real(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(prediction_log.Path, "replace", step(prediction_log.Path.replace))
        patch.setattr(prediction_log.Path, "unlink", step(prediction_log.Path.unlink))
        try:
            close(log)
        except Killed:
            pass
    if after == 1 and earlier:
        with pytest.raises(ValueError, match="is not finished: its evaluation was stopped; the same command goes on"):
            recompute([path])
    again = PredictionLog(path, SETTINGS)
    assert again.done == {0, 1, 2, 3, 4}
    close(again)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["p.jsonl", "p.jsonl.settings.json"]
    assert PredictionLog(path, SETTINGS).done == {0, 1, 2, 3, 4}


def test_a_full_disk_is_named_with_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    log = PredictionLog(tmp_path / "p.jsonl", SETTINGS)
    log._file.close()
    log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device; the same command goes on") as error:
        log.add(0, [entry(0, 0)])
    assert error.value.filename == "/dev/full"
    log.abandon()
