"""`demo.py` and `test_read.py` as a user runs them, on the embedded base: files, repeated questions, errors in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import demo
import test_read
from dataset.mini import world
from dataset.mini.write import write_all
from model.checkpoint import weight_files
from utils.cli import DEFAULT_MODEL
from utils.image import read_image
from utils.predictions import predictions_name


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "scene.png"
    cv2.imwrite(str(file), world.make_scene(np.random.default_rng(4), "test").image[..., ::-1])
    return file


def ask(picture, out, *more):
    return demo.main(["--image", str(picture), "--vis_save_path", str(out), "--max_new_tokens", "24", *more])


def test_answers_are_written_and_never_overwritten(picture, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        assert ask(picture, out, "--force_segment", "--prompt", "What is the red bag in this image?") == 0
    printed = capsys.readouterr().out
    assert "See:" in printed and "Say:" in printed and "Segment:" in printed
    (folder,) = out.iterdir()
    answers = sorted(folder.iterdir())
    assert len(answers) == 2
    for answer in answers:
        record = json.loads((answer / "answer.json").read_text(encoding="utf-8"))
        assert record["segments"], "--force_segment gives a mask whatever the answer"
        size = read_image(picture).shape
        mask = read_image(answer / "mask.png")
        assert mask.shape == size and set(np.unique(mask)) <= {0, 255}
        assert (mask[..., 0] > 0).sum() == record["segments"][0]["pixels"]
        for name in ("overlay.png", "similarity.png", "panel.png"):
            assert read_image(answer / name).std() > 0


def test_two_pictures_of_one_name_are_kept_apart(picture, tmp_path):
    other = tmp_path / "elsewhere" / picture.name
    other.parent.mkdir()
    other.write_bytes(picture.read_bytes())
    out = tmp_path / "out"
    assert demo.new_folder(out, str(picture), "Where?").parent != demo.new_folder(out, str(other), "Where?").parent


@pytest.mark.parametrize(
    ("image", "words"), [("nowhere.jpg", "does not exist"), ("torn.jpg", "cannot be read")], ids=["missing", "damaged"]
)
def test_bad_pictures_are_one_line(tmp_path, image, words):
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=words) as error:
        ask(tmp_path / image, tmp_path, "--prompt", "What?")
    assert "\n" not in str(error.value) and image in str(error.value)


def test_incomplete_checkpoints_are_one_line(picture, tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", str(tmp_path / "no_model"))
    with pytest.raises(SystemExit, match="--version.* is empty"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", "")  # an unset variable of a shell is not the default
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="tokenizer.model|incomplete"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", str(tmp_path / "model"))


def test_a_tokenizer_without_seg_is_said(picture, tmp_path):
    from shutil import copytree

    base = copytree(Path(demo.__file__).parent / DEFAULT_MODEL, tmp_path / "model")
    (base / "added_tokens.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"tokenizer without \[SEG\]"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", str(base))
    assert weight_files(base)


# ------------------------------------------------------------------------------------------------ before a model is loaded


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "is empty"), (" \t\n", "is empty"), ("the [SEG]", r"must not contain \[SEG\]"), ("a\0b", ".*no character of a text"),
        ("<image> cup", "must not contain <image>"), ("a</s>b", "must not contain </s>"), ("\ud83d", ".*no character of a text"),
        ("x ASSISTANT: y", "must not contain ASSISTANT:"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_image", [True, False])
def test_questions_that_cannot_be_asked_are_refused(picture, tmp_path, unloaded, prompt, words, with_image):
    image = ["--image", str(picture)] if with_image else []
    with pytest.raises(SystemExit, match=f"demo.py: --prompt: the question {words}") as stopped:
        demo.main([*image, "--vis_save_path", str(tmp_path / "out"), "--prompt", "fine", "--prompt", prompt])
    assert stopped.value.code == 2 and "\n" not in str(stopped.value)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere", "link", "name" * 80, "/dev/null"])
def test_places_that_cannot_be_written_are_refused(picture, tmp_path, unloaded, where):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(SystemExit, match="--vis_save_path .*(is no folder|cannot be written: )") as stopped:
        ask(picture, tmp_path / where, "--prompt", "What?")
    assert stopped.value.code == 2 and (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("tokens", ["0", "-1", "2000", "1904", "999999999999"])
def test_answers_that_cannot_fit_are_refused(picture, tmp_path, unloaded, tokens):
    with pytest.raises(SystemExit, match="--max_new_tokens") as stopped:
        demo.main(["--image", str(picture), "--prompt", "What?", "--vis_save_path", str(tmp_path), "--max_new_tokens", tokens])
    assert stopped.value.code == 2


def test_ctrl_c_is_one_line(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        ask(picture, tmp_path / "out", "--prompt", "What?")
    assert stopped.value.code == 130 and capsys.readouterr().err == "demo.py: stopped\n"


# ------------------------------------------------------------------------------------------------ names, texts, many questions


@pytest.mark.parametrize(
    "name", ["shirt-" * 41 + "a.jpg", "\u7167\u7247" * 41 + ".jpg", "\u00e9" * 125 + ".jpg", "\U0001f600" * 62 + ".jpg"],
    ids=["latin", "chinese", "accents", "emoji"],
)
def test_answers_about_images_of_long_names_have_folders(tmp_path, name):
    assert 249 < len(name.encode()) < 256
    (tmp_path / name).write_bytes(b"")
    folder = demo.new_folder(tmp_path / "out", str(tmp_path / name), "Where?")
    assert folder.is_dir() and folder.parent.name.startswith(name[:50]) and len(folder.parent.name.encode()) <= 255
    other = demo.new_folder(tmp_path / "out", str(tmp_path / "elsewhere" / name), "Where?")
    assert other.parent != folder.parent


def test_what_was_answered_stays_when_a_later_question_fails(picture, tmp_path):
    with pytest.raises(SystemExit, match="the conversation has"):
        ask(picture, tmp_path / "out", "--prompt", "What is red?", "--prompt", "red " * 3000)
    (answer,) = (tmp_path / "out").rglob("answer.json")
    assert json.loads(answer.read_text(encoding="utf-8"))["prompt"] == "What is red?"


def test_an_answer_that_cannot_be_written_is_printed(picture, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "answer.json")

    monkeypatch.setattr(demo, "write_json", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        ask(picture, tmp_path / "out", "--prompt", "What is red?")
    assert "Say:     " in capsys.readouterr().out


def test_a_chat_goes_on_after_bad_input(picture, tmp_path, monkeypatch, capsys):
    images = ["nowhere.png", str(tmp_path), "~nobody-of-this-name/a.png", str(picture)]
    typed = iter([*images, "a [SEG]", "red " * 3000, "What is red?", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert demo.main(["--vis_save_path", str(tmp_path / "out"), "--max_new_tokens", "24"]) == 0
    printed = capsys.readouterr().out
    for words in ("does not exist", "is a folder", "must not contain [SEG]", "the conversation has", "Written: "):
        assert words in printed
    assert len(list((tmp_path / "out").rglob("answer.json"))) == 1


def test_ctrl_c_ends_a_chat_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(demo, "Demo", lambda options: None)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--vis_save_path", str(tmp_path / "out")])
    assert stopped.value.code == 130 and capsys.readouterr().err == "demo.py: stopped\n"


def test_any_locale_will_do(picture, tmp_path):
    """Python decodes arguments and opens files as ASCII here, and prints in an encoding of Windows."""
    question, name = "Wo ist das \u84dd\u8272 caf\u00e9?", "\u84dd.png"
    (tmp_path / name).write_bytes(picture.read_bytes())
    command = [sys.executable, "demo.py", "--image", tmp_path / name, "--prompt", question, "--max_new_tokens", "8",
               "--vis_save_path", tmp_path / "out"]  # fmt: skip
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}
    root = Path(demo.__file__).parent
    done = subprocess.run(command, cwd=root, env={**os.environ, **locale}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = (tmp_path / "out").rglob("answer.json")
    assert json.loads(answer.read_text(encoding="utf-8"))["prompt"] == question
    assert answer.parent.parent.name.startswith("\u84dd.png-")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_all(root, seed=3, train=2, val=3, test=2)
    return root


@pytest.mark.parametrize("protocol", ["forced", "generate"])
def test_results_name_their_protocol_and_count_everything(data, tmp_path, protocol):
    command = ["--data", "ReasonSeg|val", "fprefcoco|val", "--dataset_dir", str(data), "--protocol", protocol,
               "--max_new_tokens", "16", "--workers", "0", "--out", str(tmp_path)]  # fmt: skip
    assert test_read.main(command) == 0
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["protocol"] == protocol and record["templates"] == "fixed" and record["sasp"]["enabled"]
    for result in record["results"]:
        assert result["images"] == 3
        lines = (tmp_path / f"predictions_{result['dataset']}_{result['split']}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == result["expressions"]
        assert 0 <= result["ciou"] <= 1 and (result["see"] is None) == (protocol == "forced")


def test_missing_data_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(SystemExit, match="ReasonSeg/val"):
        test_read.main(["--dataset_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"NAME\|SPLIT"):
        test_read.main(["--data", "ReasonSeg"])


def test_few_bits_cached_features_and_own_data(data, tmp_path):
    """The second pass takes SAM's features from disk and counts the same; own data is measured by its path."""
    own = data / "own/table"
    command = ["--data", "refcoco|val", f"{own}|val", "--dataset_dir", str(data), "--load_in_8bit", "--workers", "0",
               "--cache_dir", str(tmp_path / "features"), "--limit", "2"]  # fmt: skip
    results = []
    for name in ("first", "second"):
        assert test_read.main([*command, "--out", str(tmp_path / name)]) == 0
        record = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        assert record["bits"] == 8
        assert (tmp_path / name / predictions_name(str(own), "val")).is_file()
        results.append([{k: v for k, v in result.items() if k != "seconds"} for result in record["results"]])
    assert results[0] == results[1]
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 4
