"""`demo.py` and `test_read.py` as a user runs them, on the embedded base: files, repeated questions, errors in one line."""

import json

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
        record = json.loads((answer / "answer.json").read_text())
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
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="tokenizer.model|incomplete"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", str(tmp_path / "model"))


def test_a_tokenizer_without_seg_is_said(picture, tmp_path):
    from pathlib import Path
    from shutil import copytree

    base = copytree(Path(demo.__file__).parent / DEFAULT_MODEL, tmp_path / "model")
    (base / "added_tokens.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"tokenizer without \[SEG\]"):
        ask(picture, tmp_path, "--prompt", "What?", "--version", str(base))
    assert weight_files(base)


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
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["protocol"] == protocol and record["templates"] == "fixed" and record["sasp"]["enabled"]
    for result in record["results"]:
        assert result["images"] == 3
        lines = (tmp_path / f"predictions_{result['dataset']}_{result['split']}.jsonl").read_text().splitlines()
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
        record = json.loads((tmp_path / name / "results.json").read_text())
        assert record["bits"] == 8
        assert (tmp_path / name / predictions_name(str(own), "val")).is_file()
        results.append([{k: v for k, v in result.items() if k != "seconds"} for result in record["results"]])
    assert results[0] == results[1]
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 4
