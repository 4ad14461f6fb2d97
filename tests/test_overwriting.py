"""No command deletes or overwrites what it did not write: merge, READ-mini's data, analysis, curves.

`utils.outputs` has the rules (tests/test_outputs.py); here the commands themselves meet folders of other people.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import ROOT, flags, needs_ckpt

import utils.analysis.__main__ as analysis
from dataset.mini import __main__ as mini
from utils import merge_lora as merge
from utils import plot
from utils.args import TrainArgs, parse_flags
from utils.outputs import OWN_FILES, OutputFolder


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with a finished run, and with what it was trained from."""
    for name in ("base/config.json", "base/clip/config.json", "sam.pth", "data/coco/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious", encoding="utf-8")
    settings = {"version": tmp_path / "base", "vision_tower": tmp_path / "base/clip", "vision_pretrained": tmp_path / "sam.pth"}
    make_run(tmp_path / "run", flags(tmp_path / "data", tmp_path, "run", **settings))
    return tmp_path


def make_run(run: Path, line: list[str]) -> Path:
    """The folder that training leaves, without real weights in its checkpoints."""
    OutputFolder(run, "train").mark()
    TrainArgs.resolve(parse_flags(line)).save(run / "config.json", world_size=1, versions={})
    for name in ("step2", "step4", "step4_keep"):
        (run / "ckpt_model" / name).mkdir(parents=True)
        (run / "ckpt_model" / name / "weights.pt").write_text("weights", encoding="utf-8")
    (run / "ckpt_model/latest").write_text("step4", encoding="utf-8")
    return run


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file, link and folder below a folder."""
    return {
        path.relative_to(folder).as_posix(): f"-> {path.readlink()}" if path.is_symlink()
        else path.read_bytes() if path.is_file() else "a folder"
        for path in folder.rglob("*")
    }  # fmt: skip


COMMANDS = {
    "merge": lambda root, out: merge.main([str(root / "run"), str(out), "--overwrite", "--delete_shards"]),
    "mini": lambda root, out: mini.main(["--out", str(out)]),
    "analysis": lambda root, out: analysis.main(
        ["--version", str(root / "base"), "--vision_tower", str(root / "base/clip"), "--sam", str(root / "sam.pth"),
         "--dataset_dir", str(root / "data"), "--out", str(out)]
    ),
}  # fmt: skip


def thesis(root: Path, command: str) -> Path:
    (root / "thesis").mkdir()
    (root / "thesis/chapter.tex").write_text("years", encoding="utf-8")
    return root / "thesis"


def with_a_name_of_ours(root: Path, command: str) -> Path:
    (root / "mine").mkdir()
    for name in ("config.json", "analysis.json", "index.html", "instances.json", "README.md", ".read-mini.json"):
        (root / "mine" / name).write_text("{}", encoding="utf-8")
    return root / "mine"


def of_another_command(root: Path, command: str) -> Path:
    OutputFolder(root / "other", next(name for name in OWN_FILES if name != command)).mark()
    (root / "other/config.json").write_text("{}", encoding="utf-8")
    return root / "other"


def behind_a_link(root: Path, command: str) -> Path:
    (root / "link").symlink_to(thesis(root, command))
    return root / "link"


def link_to_nothing(root: Path, command: str) -> Path:
    (root / "link").symlink_to(root / "gone")
    return root / "link"


def a_file(root: Path, command: str) -> Path:
    (root / "file").write_text("text", encoding="utf-8")
    return root / "file"


def marked_parent(root: Path, command: str) -> Path:
    """Ours, but everything that is read lies in it."""
    OutputFolder(root, command).mark()
    return root


def marked_data(root: Path, command: str) -> Path:
    """Earlier output of this command that is now an input of it; of `mini`, which reads nothing, foreign data."""
    if command == "mini":
        return root / "data"
    OutputFolder(root / "base", command).mark()
    return root / "base"


PLACES = (thesis, with_a_name_of_ours, of_another_command, behind_a_link, link_to_nothing, a_file, marked_parent, marked_data)


@pytest.mark.parametrize(
    ("command", "place"),
    # READ-mini's data are made from nothing, so that no input can lie in their folder.
    [(command, place) for command in COMMANDS for place in PLACES if (command, place) != ("mini", marked_parent)],
)
def test_what_a_command_did_not_write_stays(places: Path, command: str, place) -> None:
    out = place(places, command)
    before = content(places)
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command](places, out)
    assert stopped.value.code == 2 and str(out) in str(stopped.value) and "\n" not in str(stopped.value)
    assert content(places) == before


@pytest.mark.parametrize(
    "out",
    ["run", "run/ckpt_model", "run/ckpt_model/merged", "run/ckpt_model/step4", "run/wandb", "run/../run", "base/clip", "."],
)
def test_merging_writes_nothing_where_the_run_keeps_its_own(places: Path, out: str) -> None:
    before = content(places)
    with pytest.raises(SystemExit, match="which RUN reads|belongs to the run|did not write|reads"):
        COMMANDS["merge"](places, places / out)
    assert content(places) == before


# ------------------------------------------------------------------------------------------------ merge, for real


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without training: its checkpoints are empty, its weights lie in weights.pt as float32."""
    from model import READForCausalLM, add_lora, set_trainable

    root = tmp_path_factory.mktemp("runs")
    run = make_run(root / "run", flags(root, root, "run"))
    args = TrainArgs.load(run)
    model = READForCausalLM.from_pretrained(args.version, vision_tower=args.vision_tower)
    add_lora(model, **args.lora())
    set_trainable(model)
    torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, root / "weights.pt")
    return run


def merged(run: Path, out: Path, *more: str) -> None:
    merge.main([str(run), str(out), "--fp32", str(run.parent / "weights.pt"), *more])


@needs_ckpt
@pytest.mark.parametrize("layout", ["read", "released", "adapter"])
def test_an_earlier_merge_is_replaced_and_all_else_in_it_stays(run: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "merged"
    merged(run, out, "--layout", layout)
    written = sorted(path.name for path in out.iterdir())
    folder = OutputFolder(out, "merge")
    assert {path.name for path in folder.own_entries()} | {".read-output.json"} == set(written), "every file is known as ours"
    (out / "notes").mkdir()
    (out / "notes/thesis.md").write_text("years", encoding="utf-8")
    (out / "config.json").write_text("old", encoding="utf-8")
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial/foreign").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match="earlier result.*--overwrite"):
        merged(run, out, "--layout", layout)
    merged(run, out, "--layout", layout, "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == sorted([*written, "notes"])
    assert (out / "notes/thesis.md").read_text(encoding="utf-8") == "years"
    assert not (out / "config.json").is_file() or (out / "config.json").read_text(encoding="utf-8") != "old"
    assert content(tmp_path / "merged.partial") == {"foreign": b"x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.partial"]


@needs_ckpt
def test_a_merge_that_fails_leaves_the_earlier_one(run: Path, tmp_path: Path) -> None:
    merged(run, tmp_path / "merged")
    before = content(tmp_path)
    torch.save({"nobody.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="does not fit the settings of its run: missing: "):
        merge.main([str(run), str(tmp_path / "merged"), "--overwrite", "--fp32", str(tmp_path / "other.pt")])
    (tmp_path / "other.pt").unlink()
    assert content(tmp_path) == before


@needs_ckpt
def test_a_merge_to_where_another_wrote_meanwhile_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = merge.build_trained_model
    monkeypatch.setattr(merge, "build_trained_model", lambda *given: (other(), build(*given))[1])

    def other() -> None:
        OutputFolder(tmp_path / "merged", "merge").mark()
        (tmp_path / "merged/config.json").write_text("of the other", encoding="utf-8")

    with pytest.raises(SystemExit, match="earlier result"):
        merged(run, tmp_path / "merged")
    assert (tmp_path / "merged/config.json").read_text(encoding="utf-8") == "of the other"


@needs_ckpt
def test_only_the_checkpoints_of_the_run_are_deleted(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "run", flags(tmp_path, tmp_path, "run"))
    (again / "ckpt_model/mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "weights.pt").symlink_to(run.parent / "weights.pt")
    merged(again, again / "merged", "--delete_shards")
    left = {path.relative_to(again / "ckpt_model").as_posix() for path in (again / "ckpt_model").rglob("*")}
    assert left == {"step4_keep", "step4_keep/weights.pt", "mine.txt"}
    assert (again / "merged/model.safetensors").is_file()


@needs_ckpt
@pytest.mark.parametrize("why", ["no mark", "adapter"])
def test_checkpoints_that_cannot_be_deleted_are_kept_and_it_is_said(run: Path, tmp_path: Path, why: str, caplog) -> None:
    again = make_run(tmp_path / "run", flags(tmp_path, tmp_path, "run"))
    (tmp_path / "weights.pt").symlink_to(run.parent / "weights.pt")
    if why == "no mark":
        (again / ".read-output.json").unlink()
    before = content(again / "ckpt_model")
    merged(again, tmp_path / "out", "--delete_shards", *(["--layout", "adapter"] if why == "adapter" else []))
    assert content(again / "ckpt_model") == before
    assert "the shards are kept" in caplog.text


HOLD = """
import sys, time
from utils.outputs import OutputFolder
with OutputFolder(sys.argv[1], "train").lock():
    print("held", flush=True)
    time.sleep(60)
"""


@needs_ckpt
def test_shards_are_not_deleted_under_a_training(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "run", flags(tmp_path, tmp_path, "run"))
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(again)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=f"being written by another process .process {process.pid} "):
            merge.main([str(again), str(tmp_path / "out"), "--fp32", str(run.parent / "weights.pt"), "--delete_shards"])
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists() and (again / "ckpt_model/latest").is_file()


# ------------------------------------------------------------------------------------------------ READ-mini's data

SMALL = ("--val", "1", "--test", "2")


def test_mini_data_are_replaced_by_smaller_ones_and_foreign_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "mini"
    assert mini.main(["--out", str(out), "--train", "4", *SMALL]) == 0
    first = content(out)
    for name in ("notes.txt", "own/mine/questions.csv", "reason_seg/ReasonSeg/train/mine.jpg"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine", encoding="utf-8")
    assert mini.main(["--out", str(out), "--train", "4", *SMALL]) == 0
    again = content(out)
    assert {name: value for name, value in again.items() if name in first} == first, "the same bytes"
    assert mini.main(["--out", str(out), "--train", "2", *SMALL]) == 0
    train = {path.name for path in (out / "reason_seg/ReasonSeg/train").iterdir()}
    assert train == {"mini_train_0000.jpg", "mini_train_0000.json", "mine.jpg"}, "what is no longer part of the data is gone"
    assert all((out / name).read_text(encoding="utf-8") == "mine" for name in ("own/mine/questions.csv", "notes.txt"))


def test_mini_data_that_fail_leave_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mini"
    mini.main(["--out", str(out), "--train", "2", *SMALL])
    before = content(out)

    def full(root: Path, **_: int) -> None:
        root.mkdir()
        (root / "half.jpg").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device", str(root / "half.jpg"))

    monkeypatch.setattr(mini, "write_all", full)
    with pytest.raises(SystemExit, match="No space left"):
        mini.main(["--out", str(out)])
    assert content(out) == before


def test_mini_data_are_not_written_through_a_link(tmp_path: Path) -> None:
    out, real = tmp_path / "mini", tmp_path / "coco"
    mini.main(["--out", str(out), "--train", "6", *SMALL])
    (out / "coco").rename(real)
    (out / "coco").symlink_to(real)
    before = content(real)
    with pytest.raises(SystemExit, match="coco is a link to another folder"):
        mini.main(["--out", str(out), "--train", "2", *SMALL])
    assert content(real) == before


def test_a_foreign_file_in_the_way_of_mini_data_is_named(tmp_path: Path) -> None:
    out = tmp_path / "mini"
    OutputFolder(out, "mini").mark()
    (out / "llava_dataset").mkdir()
    (out / "llava_dataset/llava_instruct_150k.json").write_text("real", encoding="utf-8")
    with pytest.raises(SystemExit, match="llava_instruct_150k.json was not written by this command"):
        mini.main(["--out", str(out), "--train", "2", *SMALL])
    assert (out / "llava_dataset/llava_instruct_150k.json").read_text(encoding="utf-8") == "real"
    assert not (out / "coco").exists()


def test_mini_data_of_an_older_version_are_refused_with_advice(tmp_path: Path) -> None:
    file = tmp_path / "mini/reason_seg/ReasonSeg/val/mini_val_0000.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="older versions wrote it: delete it yourself, or choose another --out"):
        mini.main(["--out", str(tmp_path / "mini")])


@pytest.mark.parametrize("files", [None, 3, ["../thesis"], ["/etc/passwd"], [1], "coco", {}])
def test_a_damaged_record_of_mini_data_deletes_nothing(tmp_path: Path, files: object) -> None:
    (tmp_path / "thesis").write_text("years", encoding="utf-8")
    out = tmp_path / "mini"
    OutputFolder(out, "mini").mark()
    (out / ".read-mini.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    with pytest.raises(SystemExit, match="field files: must list paths"):
        mini.main(["--out", str(out), "--train", "2", *SMALL])
    assert (tmp_path / "thesis").read_text(encoding="utf-8") == "years"


@pytest.mark.parametrize(
    "flag", [("--train", "0"), ("--train", "-5"), ("--val", "0"), ("--test", "-1"), ("--seed", "-1"), ("--train", "1" + "0" * 30)]
)
def test_numbers_of_images_that_make_no_sense_are_named(tmp_path: Path, flag: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match=f"{flag[0]}: must be a whole number") as stopped:
        mini.main(["--out", str(tmp_path / "mini"), *flag])
    assert stopped.value.code == 2 and not (tmp_path / "mini").exists()


# ------------------------------------------------------------------------------------------------ single images


def test_curves_replace_only_curves(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n', encoding="utf-8")
    for name in ("curves.png", "curves.svg", "curves.pdf"):
        for _ in range(2):
            assert plot.main([str(tmp_path), "--out", str(tmp_path / name)]) == 0
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.png")
    for name in ("photo.png", "log.jsonl", "."):
        before = content(tmp_path)
        with pytest.raises(SystemExit, match="was not made by this command|is a folder"):
            plot.main([str(tmp_path), "--out", str(tmp_path / name)])
        assert content(tmp_path) == before


@needs_ckpt
def test_a_card_that_the_user_wrote_survives_a_second_merge(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OutputFolder(places / "merged", "merge").mark()
    (places / "merged/README.md").write_text("by hand", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        merge.main([str(places / "run"), str(places / "merged"), "--overwrite"])
    assert end.value.code == 2
    assert "README.md exists and was not made by this command" in capsys.readouterr().err
    assert (places / "merged/README.md").read_text(encoding="utf-8") == "by hand"
