"""Training end to end: a tiny random model, a few ReasonSeg pictures, DeepSpeed on a CPU, one process and two."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CKPT, ROOT, flags, needs_ckpt, records, write_reason_seg

import train_read
from dataset.mixture import Batches, EpochSampler, Mixture
from model import READForCausalLM, READProcessor, add_lora, merge_lora, set_trainable
from train_read import check_finite
from utils import merge_lora as merge
from utils.args import TrainArgs
from utils.distributed import World
from utils.engine import deepspeed_config, prune
from utils.outputs import OutputFolder
from utils.runlog import Averages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a tiny ReasonSeg tree."""
    root = tmp_path_factory.mktemp("data")
    write_reason_seg(root, {"train": 4, "val": 2})
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of two steps, in this process."""
    runs = tmp_path_factory.mktemp("runs")
    train_read.main(flags(data, runs, "tiny"))
    return runs / "tiny"


# ------------------------------------------------------------------------------------------------ end to end


@needs_ckpt
def test_run_leaves_what_it_promises(run: Path) -> None:
    """Settings, log, curves, and only the last and the best checkpoint."""
    assert TrainArgs.load(run).lora_r == 4
    assert [line["step"] for line in records(run, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in records(run, "val")] == [2, 4]
    assert all(math.isfinite(line["loss"]) for line in records(run, "train"))
    best = json.loads((run / "best.json").read_text())
    assert best["ciou"] == max(line["ciou"] for line in records(run, "val"))
    there = {folder.name for folder in (run / "ckpt_model").glob("step*")}
    assert there == {"step4", best["tag"]}
    assert (run / "ckpt_model" / "latest").read_text() == "step4"
    assert list(run.glob("events*"))
    assert "SAM mask decoder" in (run / "trainable.txt").read_text()


@needs_ckpt
def test_only_what_trains_moves(run: Path) -> None:
    """LoRA, embeddings, head, projection and mask decoder move; everything else is bit for bit the base."""
    args = TrainArgs.load(run)
    trained = merge.read_shards(run / "ckpt_model" / "step4")
    base = READForCausalLM.from_pretrained(args.version, vision_tower=args.vision_tower)
    add_lora(base, **args.lora())
    set_trainable(base)
    wanted = {name for name, p in base.named_parameters() if p.requires_grad}
    assert {name for name in trained if name in dict(base.named_parameters())} == wanted, "frozen weights are not saved"
    moved = {name for name in wanted if not torch.equal(trained[name], base.state_dict()[name])}
    parts = ("lora_B", "embed_tokens", "lm_head", "text_hidden_fcs", "sam.mask_decoder")
    assert all(any(part in name for name in moved) for part in parts)
    # Read by nobody: SAM's other mask tokens have no loss, and its IoU head none either (§4-8 takes the first mask).
    still = {name for name in wanted - moved if "iou_prediction_head" not in name and "hypernetworks_mlps" not in name}
    assert not still

    model = merge.build_trained_model(args, trained)
    for name, parameter in model.named_parameters():
        if name not in wanted:
            assert torch.equal(parameter, base.state_dict()[name]), name


@needs_ckpt
def test_merged_model_answers_as_the_trained_one(run: Path, tmp_path: Path) -> None:
    """Shards -> folder -> model: hidden states as with LoRA on. Whatever stands in OUT is never written over."""
    out = tmp_path / "merged"
    merge.main([str(run), str(out), "--tag", "last"])
    assert (run / "ckpt_model" / "latest").is_file(), "the shards are kept"
    merged = READForCausalLM.from_pretrained(out)
    assert merged.config.sasp.num_points == 5
    args = TrainArgs.load(run)
    with_lora = merge.build_trained_model(args, merge.read_shards(run / "ckpt_model" / "step4")).eval()
    assert any("lora_" in name for name in with_lora.state_dict())
    assert not any("lora_" in name for name in merged.state_dict())
    ids = torch.tensor([[1, 5, 9, 32000, 7]])
    with torch.no_grad():
        a, b = (m.llava.model.language_model(input_ids=ids).last_hidden_state for m in (with_lora, merged))
    assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_lora(merged)
    assert READProcessor.from_pretrained(out).sam_image_size == merged.config.sam.image_size

    with pytest.raises(SystemExit, match="earlier result.*--overwrite"):
        merge.main([str(run), str(out)])
    merge.main([str(run), str(out), "--overwrite", "--dtype", "bf16"])
    assert READForCausalLM.from_pretrained(out, dtype=torch.bfloat16).dtype == torch.bfloat16
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="did not write"):
        merge.main([str(run), str(half)])
    with pytest.raises(SystemExit, match="which RUN reads"):
        merge.main([str(run), str(run), "--overwrite"])
    with pytest.raises(SystemExit, match="step9.*there are: .*step4"):
        merge.main([str(run), str(tmp_path / "new"), "--tag", "step9"])


@needs_ckpt
def test_shards_are_deleted_only_when_asked_and_all_went_well(run: Path, tmp_path: Path) -> None:
    """The original's script deleted the float32 file even after a failure."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    broken = json.loads((copy / "config.json").read_text())
    broken["train"]["lora_r"] = 2
    (copy / "config.json").write_text(json.dumps(broken))
    with pytest.raises(SystemExit, match="does not fit"):
        merge.main([str(copy), str(tmp_path / "out"), "--delete_shards"])
    assert (copy / "ckpt_model" / "latest").is_file() and not (tmp_path / "out").exists()
    (copy / "config.json").write_text((run / "config.json").read_text())
    OutputFolder(copy, "train").mark()
    merge.main([str(copy), str(tmp_path / "out"), "--delete_shards"])
    assert not (copy / "ckpt_model").exists()
    assert READForCausalLM.from_pretrained(tmp_path / "out").config.sasp.num_points == 5


@needs_ckpt
@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_weights_that_deepspeed_converted_merge_too(run: Path, tmp_path: Path, shard: str) -> None:
    """DeepSpeed > 0.15.2 writes shards and an index where it wrote one file; the original's merge fails on them."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    folder = tmp_path / "fp32"
    convert_zero_checkpoint_to_fp32_state_dict(str(run / "ckpt_model"), str(folder), max_shard_size=shard, tag="step4")
    assert (len(list(folder.glob("*.bin"))) > 1) == (shard == "2MB")
    whole = merge.read_fp32(folder)
    direct = merge.read_shards(run / "ckpt_model" / "step4")
    assert whole.keys() == direct.keys()
    assert all(torch.equal(whole[name], direct[name]) for name in whole)


@needs_ckpt
def test_incomplete_shards_are_refused(run: Path) -> None:
    """All that is wrong is listed: a tensor that trained and is missing, an unknown one, one of another shape."""
    trained = merge.read_shards(run / "ckpt_model" / "step4")
    lost = next(name for name in trained if "lora_A" in name)
    del trained[lost]
    trained["nobody.weight"] = torch.zeros(1)
    trained["llava.lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError) as error:
        merge.build_trained_model(TrainArgs.load(run), trained)
    for part in (f"missing: {lost}", "unexpected: nobody.weight", "llava.lm_head.weight: (3, 3)"):
        assert part in str(error.value)


@needs_ckpt
def test_resuming_continues_as_if_never_stopped(data: Path, run: Path, tmp_path: Path) -> None:
    """Stopped in mid-epoch by --max_steps and resumed, a run ends with the weights of one that went through."""
    train_read.main([*flags(data, tmp_path, "tiny"), "--max_steps", "1", "--no_eval"])
    assert (tmp_path / "tiny" / "ckpt_model" / "latest").read_text() == "step1"
    with pytest.raises(SystemExit, match="--auto_resume"):
        train_read.main(flags(data, tmp_path, "tiny"))
    with pytest.raises(SystemExit, match="lora_r was 4, is 8"):
        train_read.main([*flags(data, tmp_path, "tiny", lora_r=8), "--auto_resume"])
    train_read.main([*flags(data, tmp_path, "tiny"), "--auto_resume"])
    with pytest.raises(SystemExit, match="--overwrite would delete"):
        train_read.main([*flags(data, tmp_path, "tiny"), "--auto_resume", "--overwrite"])
    (tmp_path / "tiny/merged").mkdir()
    with pytest.raises(SystemExit, match="holds .*tiny/merged, which --version reads"):
        train_read.main([*flags(data, tmp_path, "tiny", version=str(tmp_path / "tiny/merged")), "--overwrite"])
    with pytest.raises(SystemExit, match="--eval_only measures --version"):
        train_read.main([*flags(data, tmp_path, "tiny"), "--eval_only", "--auto_resume"])
    resumed = merge.read_shards(tmp_path / "tiny" / "ckpt_model" / "step4")
    through = merge.read_shards(run / "ckpt_model" / "step4")
    assert resumed.keys() == through.keys()
    for name, tensor in through.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@needs_ckpt
def test_a_new_run_continues_from_another(data: Path, run: Path, tmp_path: Path) -> None:
    """--resume takes weights, optimiser and step of another run, and leaves that run alone."""
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    line = [*flags(data, tmp_path, "next", epochs=3), "--max_steps", "5", "--no_eval", "--resume", str(run)]
    with pytest.raises(SystemExit, match="--epochs was 2, is 3"):
        train_read.main(line)
    train_read.main([*line, "--resume_with_changes"])
    assert json.loads((tmp_path / "next/config.json").read_text())["changes"] == [
        {"after_step": 4, "flags": {"epochs": [2, 3]}, "data": []}
    ]
    assert [line["step"] for line in records(tmp_path / "next", "train")] == [5]
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    with pytest.raises(SystemExit, match="not a training run"):
        train_read.main([*flags(data, tmp_path, "other"), "--resume", str(tmp_path / "nowhere")])


@needs_ckpt
def test_what_is_missing_shows_before_a_model_is_loaded(data: Path, tmp_path: Path) -> None:
    """A data folder that is not there stops the run at once, and leaves no run folder behind."""
    for changed in ({"val_split": "test"}, {"dataset": "refer_seg"}):
        with pytest.raises(SystemExit, match=str(data)):
            train_read.main(flags(data, tmp_path, "missing", version="nowhere", **changed))
    assert not (tmp_path / "missing").exists()


@needs_ckpt
def test_time_limit_stops_and_saves(data: Path, tmp_path: Path) -> None:
    """After the first step the time is over: it is saved, and the learning rate has come down with the clock."""
    train_read.main([*flags(data, tmp_path, "short", steps_per_epoch=50), "--time_limit_s", "0.001", "--no_eval"])
    assert (tmp_path / "short" / "ckpt_model" / "latest").read_text() == "step1"
    train_read.main([*flags(data, tmp_path, "long", steps_per_epoch=500), "--time_limit_s", "3", "--no_eval"])
    steps = records(tmp_path / "long", "train")
    assert 0 < len(steps) < 1000
    assert steps[-1]["lr"] == 0
    assert json.loads((tmp_path / "long" / "best.json").read_text())["step"] == steps[-1]["step"]


@needs_ckpt
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """Two ranks with one picture each do what one process does that accumulates two: the shards' sums agree."""
    one = flags(data, tmp_path, "one", batch_size=1, grad_accumulation_steps=2)
    train_read.main([*one, "--max_steps", "2", "--no_eval"])
    two = flags(data, tmp_path, "two", batch_size=1)
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29611"]
    subprocess.run(
        [*launch, "train_read.py", *two, "--max_steps", "2"],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert len(list((tmp_path / "two" / "ckpt_model" / "step2").glob("*optim_states.pt"))) == 2
    a = merge.read_shards(tmp_path / "one" / "ckpt_model" / "step2")
    b = merge.read_shards(tmp_path / "two" / "ckpt_model" / "step2")
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    losses = [[line["loss"] for line in records(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "logged losses are means over ranks"
    assert records(tmp_path / "two", "val")[0]["ciou"] >= 0


@needs_ckpt
def test_eval_only_needs_neither_training_data_nor_deepspeed(tmp_path: Path) -> None:
    """The original built all training sets and the optimiser before it validated (§8-22)."""
    write_reason_seg(tmp_path / "data", {"val": 2})
    command = [*flags(tmp_path / "data", tmp_path, "eval"), "--eval_only"]
    probe = "import sys, train_read; train_read.main(sys.argv[1:]); assert 'deepspeed' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cIoU" in done.stdout
    assert not (tmp_path / "eval" / "ckpt_model").exists()


# ------------------------------------------------------------------------------------------------ what is not its own


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder of runs among other things of the user."""
    (tmp_path / "runs/thesis").mkdir(parents=True)
    (tmp_path / "runs/thesis/chapter.tex").write_text("years of work")
    (tmp_path / "runs/afile").write_text("x")
    (tmp_path / "runs/link").symlink_to("thesis")
    (tmp_path / "runs/lost").symlink_to("nowhere")
    shutil.copytree(CKPT / "clip_tiny", tmp_path / "runs/model")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/photo.jpg").write_bytes(b"x")
    return tmp_path / "runs"


@needs_ckpt
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--auto_resume"]], ids=" ".join)
@pytest.mark.parametrize(
    "name, why",
    [
        ("thesis", "did not write .chapter.tex"), ("link", "did not write .chapter.tex"), ("model", "did not write"),
        ("afile", "is a file"), ("lost", "does not exist"), ("../x", "name within --log_base_dir"), (".", "name within"),
        ("thesis/../../x", "name within"), ("afile/x", "is a file, so that .* cannot be made"), ("n" * 300, "name too long"),
    ],
)  # fmt: skip
def test_a_run_takes_no_place_of_something_else(data: Path, places: Path, name: str, why: str, more: list[str]) -> None:
    """With --overwrite it would have been deleted, without it its config.json replaced."""
    before = {file: file.read_bytes() for file in places.parent.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match=why) as ended:
        train_read.main([*flags(data, places, name), *more])
    assert ended.value.code == 2
    left = {file: file.read_bytes() for file in places.parent.rglob("*") if file.is_file()}
    assert left == before


@needs_ckpt
@pytest.mark.parametrize(
    "flag", ["version", "vision_tower", "vision_pretrained", "dataset_dir", "own_data", "resume", "cache_dir"]
)
def test_what_a_run_reads_is_not_overwritten_by_it(data: Path, tmp_path: Path, flag: str) -> None:
    """Not even in a run's own folder."""
    OutputFolder(tmp_path / "mine", "train").mark()
    (tmp_path / "mine/ckpt_model/step1").mkdir(parents=True)
    more = {"dataset": "own"} if flag == "own_data" else {}
    with pytest.raises(SystemExit, match=f"which --{flag}.* reads"):
        train_read.main([*flags(data, tmp_path, "mine", **{flag: tmp_path / "mine/ckpt_model"}, **more), "--overwrite"])
    assert (tmp_path / "mine/ckpt_model/step1").is_dir()


def test_pruning_knows_its_own_checkpoints(tmp_path: Path) -> None:
    """A checkpoint that somebody put aside stays."""
    for name in ("step2", "step3.partial", "step4", "step4_keep", "step5.bak", "steps"):
        (tmp_path / name).mkdir()
    prune(tmp_path, {"step4"}, World(0, 1, torch.device("cpu")))
    assert {path.name for path in tmp_path.iterdir()} == {"step4", "step4_keep", "step5.bak", "steps"}


@needs_ckpt
def test_a_second_training_of_one_name_stops_at_once(data: Path, tmp_path: Path) -> None:
    """Before a model is loaded, with the name of who is in the folder; --overwrite deletes nothing under it."""
    with OutputFolder(tmp_path / "run", "train").lock():
        OutputFolder(tmp_path / "run", "train").mark()
        (tmp_path / "run/log.jsonl").write_text("{}")
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match=f"another process .process {os.getpid()} on"):
                train_read.main([*flags(data, tmp_path, "run", version="nowhere"), *more])
        assert (tmp_path / "run/log.jsonl").read_text() == "{}"


# ------------------------------------------------------------------------------------------------ resuming as another run


@needs_ckpt
@pytest.mark.parametrize(
    "flag, value, told",
    [
        ("seed", 4, "--seed was 3, is 4"), ("batch_size", 1, "--batch_size was 2, is 1"), ("lr", 0.02, "--lr was 0.01, is 0.02"),
        ("num_points", 4, "--num_points was 5, is 4"), ("bce_loss_weight", 1.0, "--bce_loss_weight was 2.0, is 1.0"),
        ("epochs", 3, "--epochs was 2, is 3"), ("steps_per_epoch", 3, "--steps_per_epoch was 2"),
        ("num_classes_per_sample", 2, "--num_classes_per_sample was 1"), ("grad_accumulation_steps", 2, "_steps was 1, is 2"),
        ("reason_seg_ignore", "ignored", "--reason_seg_ignore was 'background'"), ("t_pos", 0.7, "--t_pos was None, is 0.7"),
        ("attn_implementation", "eager", "--attn_implementation was 'sdpa'"), ("val_split", "train", "--val_split was 'val'"),
        ("lora_r", 8, "does not fit.*--lora_r was 4, is 8"), ("zero_stage", 3, "does not fit.*--zero_stage was 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["--auto_resume", "--resume"])
def test_a_run_goes_on_as_what_it_was(
    data: Path, run: Path, tmp_path: Path, way: str, flag: str, value: object, told: str
) -> None:
    """Other numbers under one curve are refused, with each difference."""
    name, more = (run.name, ["--auto_resume"]) if way == "--auto_resume" else ("next", ["--resume", str(run)])
    runs = run.parent if way == "--auto_resume" else tmp_path
    before = (run / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=told):
        train_read.main([*flags(data, runs, name, **{flag: value}), *more])
    assert (run / "config.json").read_bytes() == before


@needs_ckpt
def test_changed_data_is_named_and_recorded_if_it_is_meant(data: Path, run: Path, tmp_path: Path) -> None:
    """The same flags over other annotations or images are another run. Where the data lies does not count."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(run, tmp_path / "tiny")
    line = [*flags(tmp_path / "data", tmp_path, "tiny"), "--auto_resume"]
    train_read.main(line)
    image = tmp_path / "data/reason_seg/ReasonSeg/train/0.jpg"
    os.utime(image, ns=(1, 1))
    with pytest.raises(SystemExit, match="the data of reason_seg changed since"):
        train_read.main(line)
    shutil.copystat(data / image.relative_to(tmp_path / "data"), image)
    note = image.with_suffix(".json")
    stat = note.stat()
    note.write_text(note.read_text().replace("bright", "dimmed"))
    os.utime(note, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SystemExit, match="the data of reason_seg changed since.*--resume_with_changes"):
        train_read.main(line)
    train_read.main([*line, "--resume_with_changes"])
    changes = json.loads((tmp_path / "tiny/config.json").read_text())["changes"]
    assert changes == [{"after_step": 4, "flags": {}, "data": ["reason_seg"]}]
    train_read.main(line)
    assert json.loads((tmp_path / "tiny/config.json").read_text())["changes"] == changes


@needs_ckpt
def test_changes_of_the_optimiser_take_effect(data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states in a checkpoint hold its old settings, which would win in silence."""
    shutil.copytree(run, tmp_path / "tiny")
    found: dict = {}

    def look(args, engine, *_):
        found.update(engine.optimizer.param_groups[0])
        return 0

    monkeypatch.setattr(train_read, "train", look)
    line = [*flags(data, tmp_path, "tiny", epochs=8, lr=0.5, beta1=0.7), "--auto_resume", "--resume_with_changes"]
    train_read.main(line)
    assert found["betas"] == (0.7, 0.95)
    assert found["lr"] == pytest.approx(0.5 * (16 - 3) / (16 - 2))


def test_every_family_of_data_has_a_digest_of_what_it_reads(tmp_path: Path) -> None:
    """One byte in any annotation file, one image more or less, changes it; nothing else does."""
    from dataset import build_train
    from dataset.fingerprint import files_of, fingerprint
    from dataset.mini.write import write_all

    write_all(tmp_path, seed=3, train=12, val=1, test=2)
    names = ["refer_seg", "vqa", "reason_seg", "sem_seg", "own"]
    own = "||".join(str(path) for path in sorted((tmp_path / "own").iterdir()) if path.is_dir())

    def opened():
        return build_train(names, [1] * len(names), tmp_path, refer_seg_data="refcoco", own_data=own)

    mixture = opened()
    first = fingerprint(mixture)
    assert fingerprint(opened()) == first and len(set(first.values())) == len(names)
    for name, members in zip(mixture.names, mixture.sets, strict=True):
        for member in members.members:
            files = list(files_of(member))
            assert files and all(file.is_file() for file in files), name
            for file in (files[0], files[-1]):
                stat = file.stat()
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
                changed = {n for n, digest in fingerprint(mixture).items() if digest != first[n]}
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
                assert (name in changed) == (file.suffix not in (".json", ".jsonl", ".csv", ".p"))


# ------------------------------------------------------------------------------------------------ broken samples


class Numbers:
    """A training set that draws numbers; those of `broken` cannot be read."""

    def __init__(self, count: int, broken: dict[int, Exception]) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def draw(self, rng):
        number = int(rng.integers(self.count))
        if number in self.broken:
            raise self.broken[number]
        return SimpleNamespace(number=number, meta={})


def numbers(batch) -> list[int]:
    return [sample.number for sample in batch]


def test_a_broken_sample_is_replaced_by_a_draw_that_its_key_decides() -> None:
    """The other samples are those of sound data; the same keys give the same batch again, and in any grouping."""
    keys = [(2, i) for i in range(40)]
    sound = Batches(Mixture([Numbers(10, {})], [1], seed=5), list)
    fault = Batches(Mixture([Numbers(10, {3: ValueError("3 is cut"), 4: OSError("4 is lost")})], [1], seed=5), list)
    expected, found = numbers(sound.__getitems__(keys)), fault.__getitems__(keys)
    assert [a for a, b in zip(expected, numbers(found), strict=True) if a != b] == [n for n in expected if n in (3, 4)]
    assert not {3, 4} & set(numbers(found))
    skipped = [why for sample in found for why in sample.meta.get("skipped", ())]
    assert {"3 is cut", "4 is lost"} == set(skipped) and len(skipped) >= sum(n in (3, 4) for n in expected)
    assert numbers(fault.__getitems__(keys[:7])) + numbers(fault.__getitems__(keys[7:])) == numbers(found)


def test_a_replacement_keeps_the_share_of_its_set() -> None:
    """A set whose half is broken is drawn as often as asked."""
    half = Numbers(10, {n: ValueError("broken") for n in range(5)})
    batch = Batches(Mixture([half, Numbers(1, {})], [1, 1], seed=0), list).__getitems__([(0, i) for i in range(400)])
    assert 150 < sum(number >= 5 for number in numbers(batch)) < 250


def test_what_only_collating_finds_is_skipped_too() -> None:
    """Marks in a text, masks that do not fit: the tokeniser sees them."""

    def collate(samples):
        if any(sample.number == 3 for sample in samples):
            raise ValueError("3 has marks")
        return samples

    batch = Batches(Mixture([Numbers(5, {})], [1]), collate).__getitems__([(0, i) for i in range(20)])
    assert 3 not in numbers(batch)
    assert {why for sample in batch for why in sample.meta.get("skipped", ())} == {"3 has marks"}


def test_broken_data_ends_a_run_where_nothing_can_take_its_place() -> None:
    """--strict, or nothing sound in a hundred draws; a bug of ours is no broken sample."""
    broken = Numbers(2, dict.fromkeys((0, 1), ValueError("it is cut")))
    strict = Batches(Mixture([broken], [1]), list, strict=True).__getitems__([(0, 0)])
    assert isinstance(strict, ValueError) and str(strict).startswith("it is cut (--strict")
    lost = Batches(Mixture([broken], [1]), list).__getitems__([(0, 0)])
    assert isinstance(lost, ValueError) and "100 samples in a row are broken; the last: it is cut" in str(lost)
    with pytest.raises(TypeError):
        Batches(Mixture([Numbers(1, {0: TypeError("a bug")})], [1]), list).__getitems__([(0, 0)])


@needs_ckpt
def test_a_run_counts_what_it_skips(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """By name, once on the screen and at the end, and again after it was resumed; --strict ends with one line."""
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data/reason_seg/ReasonSeg/train/0.jpg"
    image.write_bytes(image.read_bytes()[:300])
    line = [*flags(tmp_path / "data", tmp_path, "tiny", batch_size=4, workers=1, epochs=1, steps_per_epoch=3), "--no_eval"]
    train_read.main(line)
    lines = [json.loads(line) for line in (tmp_path / "tiny/skipped.jsonl").read_text().splitlines()]
    assert lines and all("0.jpg" in line["why"] for line in lines)
    said = capfd.readouterr().out
    assert said.count("a broken sample is skipped: ") == 1
    assert f"{len(lines)} broken samples were skipped:" in said and f"{len(lines)} x image {image}" in said
    train_read.main([*line, "--overwrite", "--max_steps", "1"])
    train_read.main([*line, "--auto_resume"])
    assert [json.loads(line) for line in (tmp_path / "tiny/skipped.jsonl").read_text().splitlines()] == lines
    capfd.readouterr()
    with pytest.raises(SystemExit, match="0.jpg.*--strict") as ended:
        train_read.main([*line, "--overwrite", "--strict"])
    assert ended.value.code == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told and [line for line in told.splitlines() if "0.jpg" in line and "train_read.py: " in line]


# ------------------------------------------------------------------------------------------------ the parts


@needs_ckpt
def test_gradients_become_ready_in_one_order_whatever_a_batch_holds() -> None:
    """ZeRO-2 adds up gradients across ranks in the order in which they become ready.

    A rank whose batch holds no `[SEG]` (denials, VQA) must therefore ready the same tensors in the same order as one
    whose batch has one, or several in several pictures: else the sums mix tensors, or the ranks wait for each other.
    """
    model = READForCausalLM.from_pretrained(CKPT / "read_tiny", vision_tower=CKPT / "clip_tiny")
    add_lora(model, 4, 8, 0.0)
    set_trainable(model)
    patches, side, size = model.config.num_patches, model.config.clip_image_size, model.config.sam.image_size
    seg, start, end = model.config.seg_token_id, model.config.im_start_id, model.config.im_end_id

    def order(*segs: int) -> list[str]:
        """Names in the order of their gradients, for as many questions and pictures as there are numbers of [SEG]."""
        seen: list[str] = []
        hooks = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
        ids = torch.tensor([[1, start, *[-200] * patches, end, 5, *[seg] * n, *[7] * (3 - n), 2] for n in segs])
        labels = ids.clone()
        labels[:, : patches + 3] = -100
        count = len(segs)
        output = model(
            torch.randn(count, 3, side, side), torch.randn(count, 3, size, size), [(size, size // 2)] * count,
            [(40, 20)] * count, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(count), labels,
            [torch.ones(40, 20)] * sum(segs),
        )  # fmt: skip
        output.loss.backward()
        model.zero_grad()
        for hook in hooks:
            hook.remove()
        return seen

    one = order(1)
    assert order(0) == one
    assert order(0, 2) == one
    assert order(1, 1) == one


def test_ranks_share_each_epoch_without_overlap_and_resume_in_the_middle() -> None:
    """The original drew the same samples on every rank (§8-19)."""
    ranks = [EpochSampler(batches=3, batch_size=2, rank=r, size=2) for r in range(2)]
    keys = [list(sampler) for sampler in ranks]
    assert sorted(keys[0] + keys[1]) == [(0, i) for i in range(12)]
    ranks[1].start_at(epoch=4, batches_done=1)
    assert list(ranks[1]) == [(4, i) for _, i in keys[1][2:]]
    assert len(ranks[1]) == 4


def test_deepspeed_settings_are_the_published_ones() -> None:
    """ZeRO-2, AdamW, clipping and schedule of §3; a bucket is never larger than what trains."""
    args = TrainArgs(batch_size=2, grad_accumulation_steps=10, epochs=20, steps_per_epoch=500, lr=3e-4)
    config = deepspeed_config(args, trained=300_000_000)
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer"]["params"].items() >= {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}.items()
    assert config["scheduler"]["type"] == "WarmupDecayLR"
    assert config["scheduler"]["params"] == {
        "total_num_steps": 10_000, "warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 100,
        "warmup_type": "linear",
    }  # fmt: skip
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 300_000_000
    assert deepspeed_config(args, trained=10**10)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_loss_that_is_not_finite_stops_with_term_and_samples() -> None:
    """Who trains learns which term broke, on which pictures."""
    ok, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    output = SimpleNamespace(loss=nan, ce_loss=ok, bce_loss=ok, dice_loss=nan, sim_loss=None)
    batch = SimpleNamespace(samples=[SimpleNamespace(image_path="a/b.jpg", questions=["the cup"])])
    with pytest.raises(FloatingPointError, match=r"(?s)step 7: loss = nan, dice_loss = nan.*a/b.jpg: \['the cup'\]"):
        check_finite(output, batch, step=7)
    output.loss = output.dice_loss = ok
    assert check_finite(output, batch, step=7)["sim_loss"] is None


def test_averages_are_over_all_steps_and_ranks() -> None:
    """The original reset its meters every step, so that a logged average was the last step's value (§8-21)."""
    first, second = Averages(("a", "b")), Averages(("a", "b"))
    first.add({"a": 1.0, "b": None})
    first.add({"a": 2.0, "b": 4.0})
    second.add({"a": 6.0, "b": None})
    totals = [x + y for x, y in zip(first.totals(), second.totals(), strict=True)]
    assert first.means(totals) == {"a": 3.0, "b": 4.0}
