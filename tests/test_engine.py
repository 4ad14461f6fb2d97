"""What training promises beyond the published recipe: exact resume, ZeRO-3, offload, a base in few bits, adapters, plans."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from tiny import SEG, prompt, tiny_batch, tiny_read
from tiny_training import CKPT, ROOT, flags, needs_ckpt, records, write_reason_seg

import train_read
from model import (
    READForCausalLM,
    READProcessor,
    SaspConfig,
    add_lora,
    dequantize_language_model,
    memory,
    quantize_language_model,
    set_trainable,
)
from utils import distributed, run_folder, stopping
from utils import merge_lora as merge
from utils.args import TrainArgs
from utils.conversation import IMAGE_TOKEN_INDEX
from utils.distributed import World
from utils.engine import load_checkpoint, reading_shards
from utils.runlog import Averages, RunLog, drop_records

pytestmark = needs_ckpt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a tiny ReasonSeg tree."""
    root = tmp_path_factory.mktemp("data")
    write_reason_seg(root, {"train": 4, "val": 3})
    return root


def command(data: Path, runs: Path, name: str, *more: str, **changed: object) -> list[str]:
    """A command line with dropout on, so that random numbers matter."""
    values = {"lora_dropout": 0.2, "save_every": 1, "grad_accumulation_steps": 2, "workers": 1, "print_freq": 2} | changed
    return [*flags(data, runs, name, **values), *more]


@pytest.fixture(scope="module")
def through(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of two steps that nothing interrupts."""
    runs = tmp_path_factory.mktemp("through")
    train_read.main(command(data, runs, "tiny"))
    return runs / "tiny"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, this process is never ended because a training in it unwinds slowly."""
    monkeypatch.setattr(stopping, "UNWIND_S", 3600.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimiser steps that were done before each forward pass of a training in this process."""
    steps: list[int] = []
    original = train_read.check_finite
    monkeypatch.setattr(train_read, "check_finite", lambda *args: (steps.append(args[2]), original(*args))[1])
    return steps


def weights(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """What trained, of a step's checkpoint."""
    return merge.read_shards(run / "ckpt_model" / f"step{step}")


def timeless(run: Path, kind: str) -> list[dict]:
    """Records without what a clock put into them."""
    return [{k: v for k, v in line.items() if k not in ("time", "s_per_step", "seconds")} for line in records(run, kind)]


# ------------------------------------------------------------------------------------------------ exact resume


class Killed(BaseException):
    """Nobody catches it."""


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    data: Path, through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    """Losses, scores, best checkpoint and final weights are bit for bit those of the uninterrupted run.

    Two forward passes a step; the batches come from a worker process.
    """
    line = command(data, tmp_path, "tiny", "--auto_resume")
    checkpoints = tmp_path / "tiny" / "ckpt_model"

    # The process vanishes while the first checkpoint is on its way: written, but not yet in its place.
    probe = (
        "import os, sys, pathlib, train_read;"
        "pathlib.Path.rename = lambda *_: os._exit(9);"
        "train_read.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", probe, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert [p.name for p in checkpoints.glob("[sl]*")] == ["step1.partial"]

    # Then in the third forward pass, the second being saved and measured ...
    def third(output, batch, step):
        if step == 2:
            raise Killed
        return original(output, batch, step)

    original = train_read.check_finite
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_read, "check_finite", third)
        train_read.main(line)
    assert (checkpoints / "latest").read_text() == "step2" and seen == [0, 0, 1, 1]
    seen.clear()
    # ... and at last between the saving of the fourth and its measuring.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_read, "validate", lambda *_: (_ for _ in ()).throw(Killed()))
        train_read.main(line)
    assert json.loads((tmp_path / "tiny/best.json").read_text())["measured_step"] == 2
    assert (checkpoints / "latest").read_text() == "step4" and seen == [2, 2, 3, 3]
    seen.clear()
    train_read.main(line)
    assert seen == []

    for kind in ("train", "val"):
        assert timeless(tmp_path / "tiny", kind) == timeless(through, kind)
    assert (tmp_path / "tiny/best.json").read_text() == (through / "best.json").read_text()
    expected, found = weights(through), weights(tmp_path / "tiny")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {p.name for p in checkpoints.iterdir()} == {p.name for p in (through / "ckpt_model").iterdir()}


def test_resuming_needs_as_many_processes(data: Path, through: Path, tmp_path: Path) -> None:
    """DeepSpeed splits the optimiser's states by their number."""
    shutil.copytree(through, tmp_path / "tiny")
    shards = sorted((tmp_path / "tiny/ckpt_model/step4").glob("*optim_states.pt"))
    shutil.copy(shards[0], shards[0].with_name("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    settings = (tmp_path / "tiny/config.json").read_text()
    with pytest.raises(SystemExit, match="written by 2 processes, this run has 1"):
        train_read.main(command(data, tmp_path, "tiny", "--auto_resume"))
    assert (tmp_path / "tiny/config.json").read_text() == settings, "what merging reads stays as it was"


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """Else a resumed run's curve would run twice over the same steps."""
    file = tmp_path / "log.jsonl"
    lines = [f'{{"kind": "{kind}", "step": {step}}}\n' for kind, step in (("train", 1), ("val", 1), ("train", 3), ("train", 2))]
    file.write_text("".join(lines) + '{"kind": "val", "step": 2}\n{"kind": "train", "st')
    drop_records(file, after_step=2, measured_step=1)
    assert file.read_text() == "".join([lines[0], lines[1], lines[3]])


# ------------------------------------------------------------------------------------------------ signals


def signalled(number: int, when: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """This process gets a signal in the forward pass `when`, counted from 0, of the next training."""
    original, calls = train_read.check_finite, []

    def check(*args):
        calls.append(1)
        if len(calls) == when + 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(2 * stopping.ONE_REQUEST_S * (times > 1))
        return original(*args)

    monkeypatch.setattr(train_read, "check_finite", check)


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=stopping.name_of)
def test_a_signal_ends_a_run_after_its_step(
    number: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, seen: list[int]
) -> None:
    """Saved, with exit status 128 + its number and a line that says how to go on; its workers have ended."""
    line = command(data, tmp_path, "tiny", "--overwrite", save_every=50)
    with pytest.raises(SystemExit) as ended:
        signalled(number, 0, monkeypatch)
        train_read.main(line)
    assert ended.value.code == 128 + number and seen == [0, 0], "the step is finished"
    said = capfd.readouterr()
    assert "step1. The same command with --auto_resume in place of --overwrite goes on" in said.out
    assert "Traceback" not in said.err
    assert (tmp_path / "tiny/ckpt_model/latest").read_text() == "step1"
    assert not multiprocessing.active_children()


def test_after_signals_a_run_goes_on_as_if_they_had_not_come(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    """One in the first of two forward passes of a step, whose log line is not due yet; one in a validation."""
    number = signal.SIGTERM
    rare = {"save_every": 50, "print_freq": 2, "steps_per_epoch": 3}
    train_read.main(command(data, tmp_path, "through", **rare))
    seen.clear()
    line = command(data, tmp_path, "tiny", "--auto_resume", **rare)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signalled(number, 0, patch)
        train_read.main(line)
    assert ended.value.code == 143 and seen == [0, 0]
    assert (tmp_path / "tiny/ckpt_model/latest").read_text() == "step1"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_read, "validate", lambda *_: os.kill(os.getpid(), number))
        train_read.main(line)
    assert ended.value.code == 128 + number
    assert (tmp_path / "tiny/ckpt_model/latest").read_text() == "step3"
    train_read.main(line)
    for kind in ("train", "val"):
        assert timeless(tmp_path / "tiny", kind) == timeless(tmp_path / "through", kind)
    assert (tmp_path / "tiny/best.json").read_text() == (tmp_path / "through/best.json").read_text()
    expected, found = weights(tmp_path / "through", 6), weights(tmp_path / "tiny", 6)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_second_signal_stops_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Before the step is over; nothing is saved."""
    signalled(signal.SIGINT, 0, monkeypatch, times=2)
    with pytest.raises(SystemExit) as ended:
        train_read.main(command(data, tmp_path, "tiny"))
    assert ended.value.code == 130 and seen == [] and not (tmp_path / "tiny/ckpt_model/latest").exists()


def test_a_signal_before_training_ends_with_one_line(data: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """While a model is loaded, say."""
    monkeypatch.setattr(train_read, "build_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train_read.main(command(data, tmp_path, "tiny"))
    assert ended.value.code == 143
    assert capfd.readouterr().err.split("\n")[-2:] == ["train_read.py: stopped by SIGTERM", ""]


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's answers Ctrl-C, which its ranks hear too, with SIGTERM; `timeout` sends its signal twice."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(stopping, "ONE_REQUEST_S", 2.0)
    with stopping.Stopping("x") as stop, stop.gently():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(2 * stopping.ONE_REQUEST_S)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == signal.SIGINT
        with pytest.raises(stopping.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_code_that_hears_no_signal_is_ended() -> None:
    """A rank that waits for another in a library, as in a rendezvous."""
    probe = (
        "import hashlib; from utils import stopping; stopping.UNWIND_S = 0.2\n"
        "with stopping.Stopping('x'):\n    print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    with subprocess.Popen([sys.executable, "-c", probe], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143 and process.stderr.read() == b"\nx: stopped by SIGTERM\n"


class Slow(torch.utils.data.Dataset):
    """Yields the id of the worker's process."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_leave_signals_to_their_process() -> None:
    """A terminal and a launcher send them to all processes; the step that is to be finished needs its batches."""
    loader = torch.utils.data.DataLoader(Slow(), num_workers=1, worker_init_fn=stopping.quiet_worker, persistent_workers=True)
    batches = iter(loader)
    worker = int(next(batches))
    sender = "import os, sys\nfor number in sys.argv[2:]: os.kill(int(sys.argv[1]), int(number))"
    subprocess.run([sys.executable, "-c", sender, str(worker), *map(str, map(int, stopping.SIGNALS))], check=True)
    assert [int(batch) for batch in batches] == [worker] * 7
    (child,) = (child for child in multiprocessing.active_children() if child.pid == worker)
    child.terminate()  # from its own process
    child.join(30)
    assert child.exitcode == 0
    with contextlib.suppress(RuntimeError):
        del batches, loader


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("killed", ["runner", "launch"])
def test_whoever_is_launched_ends_with_its_launcher(tmp_path: Path, killed: str) -> None:
    """DeepSpeed's is two processes, one above the other, of which `kill -9` may hit either."""
    parts = {name: tmp_path / "deepspeed" / name for name in ("runner", "launch")}
    for file in parts.values():
        file.mkdir(parents=True)
        (file / "deepspeed").write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
    rank = (
        "import os, time; from utils import stopping\n"
        "stopping.end_with_launcher(); print(os.getpid(), flush=True); time.sleep(99)"
    )
    line = [sys.executable, str(parts["runner"] / "deepspeed"), sys.executable, str(parts["launch"] / "deepspeed")]
    line += [sys.executable, "-c", rank]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as runner:
        pid = int(runner.stdout.readline())
        (psutil.Process(runner.pid) if killed == "runner" else psutil.Process(pid).parent()).kill()
        wait_for(lambda: not alive(pid), 60)


def test_ranks_save_when_their_launcher_is_gone(data: Path, tmp_path: Path) -> None:
    """They trained on, and nobody could see or stop them."""
    part = "deepspeed.launcher.runner"
    line = command(data, tmp_path, "tiny", "--no_eval", steps_per_epoch=5000, grad_accumulation_steps=1, batch_size=1)
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29623"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said.txt").open("w") as said:
        runner = subprocess.Popen([*launch, "train_read.py", *line], cwd=ROOT, env=environment, stdout=said, stderr=said)
    below: list[psutil.Process] = []
    try:
        wait_for((tmp_path / "tiny/ckpt_model/latest").is_file, 400)
        below = psutil.Process(runner.pid).children(recursive=True)
        ranks = [one for one in below if "train_read.py" in one.cmdline() and part not in one.cmdline()]
        assert len(ranks) >= 2
        killed = next(one for one in [psutil.Process(runner.pid), *below] if part in one.cmdline())
        killed.kill()
        wait_for(lambda: not any(alive(one.pid) for one in below), 100)
        text = (tmp_path / "said.txt").read_text()
        assert "the launcher of this run is gone" in text and "stopped by SIGTERM after step" in text, text[-2000:]
        tag = (tmp_path / "tiny/ckpt_model/latest").read_text()
        assert f"ckpt_model/{tag}. The same command" in text
    finally:
        runner.kill()
        runner.wait()
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def wait_for(there, seconds: float) -> None:
    """Until something is so; AssertionError after that many seconds."""
    begin = time.monotonic()
    while not there():
        assert time.monotonic() - begin < seconds
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        OSError(30, "Read-only file system"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(
    error: Exception, data: Path, through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """One line that names it; with room again the run ends as if nothing had been."""
    original = torch.save

    def save(value, file, *args, **kwargs):
        if "step2" in str(getattr(file, "name", file)):
            raise error
        return original(value, file, *args, **kwargs)

    line = command(data, tmp_path, "tiny", "--auto_resume")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="step2 cannot be written.*step1 is whole") as ended:
        patch.setattr(torch, "save", save)
        train_read.main(line)
    assert ended.value.code == 2 and "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "tiny/ckpt_model").glob("step*")] == ["step1"]
    if isinstance(error, RuntimeError):
        train_read.main(line)
        expected, found = weights(through), weights(tmp_path / "tiny")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_is_not_finite_ends_with_one_line(data: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Term and sample are in it."""

    def explode(*_):
        raise FloatingPointError("after step 0: loss = nan. The samples of the batch:\n  a.jpg: ['the cup']")

    monkeypatch.setattr(train_read, "check_finite", explode)
    with pytest.raises(SystemExit, match="loss = nan.*a.jpg") as ended:
        train_read.main(command(data, tmp_path, "tiny"))
    assert ended.value.code == 2 and "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ the launcher's variables


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "1"}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "1", "RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "-1"}, {"WORLD_SIZE": "1.0"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "5"}, {"WORLD_SIZE": "nan", "RANK": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_variables_of_a_launcher_that_cannot_be_are_named(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK=1 alone measured half the data."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if name in given:
            monkeypatch.setenv(name, given[name])
    with pytest.raises(ValueError, match=f"{next(iter(given))}='{next(iter(given.values()))}'.*unset them"):
        distributed.start(engine=False)


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "did not meet within 0.5 s .*process 0 of 2.*GLOO_SOCKET_IFNAME"),
        ({"RANK": "1"}, "did not meet within 0.5 s .*process 1 of 2"),
        ({"RANK": "1", "MASTER_ADDR": "nowhere.invalid"}, "did not meet .*nowhere.invalid"),
        ({"MASTER_PORT": "taken"}, "MASTER_PORT .* is in use by another program"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"), ({"MASTER_PORT": ""}, "MASTER_PORT=''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
        ({"READ_RENDEZVOUS_S": "soon"}, "READ_RENDEZVOUS_S='soon'"), ({"READ_RENDEZVOUS_S": "nan"}, "READ_RENDEZVOUS_S='nan'"),
        ({"READ_RENDEZVOUS_S": "1e300"}, "READ_RENDEZVOUS_S='1e300'"),
    ],
    ids=str,
)  # fmt: skip
def test_processes_that_do_not_come_are_not_waited_for_long(
    given: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """WORLD_SIZE=2 around a single process waited for a day, in silence."""
    monkeypatch.setattr(distributed, "end_with_launcher", lambda: None)
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
        probe.close()
        values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free,
                  "READ_RENDEZVOUS_S": "0.5"} | given  # fmt: skip
        if given.get("MASTER_PORT") == "taken":
            values["MASTER_PORT"] = str(taken.getsockname()[1])
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises((OSError, ValueError), match=told):
            distributed.start(engine=False)
    if "did not meet" in told and values["RANK"] == "0":
        said = capfd.readouterr().err
        assert f"waiting for 2 processes; this is process 0 of 2, at MASTER_ADDR:MASTER_PORT 127.0.0.1:{free}" in said


# ------------------------------------------------------------------------------------------------ ZeRO-3 and offload


@pytest.mark.parametrize(
    "ways",
    [["--offload", "optimizer"], ["--zero_stage", "3", "--offload", "all", "--gradient_checkpointing"]],
    ids=" ".join,
)
def test_offload_changes_no_number(data: Path, through: Path, tmp_path: Path, ways: list[str]) -> None:
    """Where states and weights rest decides memory, not results."""
    train_read.main(command(data, tmp_path, "tiny", *ways, save_every=10, print_freq=1))
    expected, found = weights(through), weights(tmp_path / "tiny")
    assert expected.keys() == found.keys()
    before = READForCausalLM.from_pretrained(CKPT / "read_tiny", vision_tower=CKPT / "clip_tiny").state_dict()
    for name, tensor in expected.items():
        # Weight by weight Adam blows up the rounding of gradients that are nearly zero; what was learnt, as a whole, agrees.
        if name in before and not name.endswith("k_proj.bias"):  # whose gradient is zero: softmax cancels it
            moved = (tensor - before[name]).norm()
            assert (found[name] - tensor).norm() <= 0.02 * moved, name
    losses = [[line["loss"] for line in records(folder, "train")] for folder in (through, tmp_path / "tiny")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert [line["ciou"] for line in records(tmp_path / "tiny", "val")] == [
        line["ciou"] for line in records(through, "val")
    ]


def test_two_processes_of_zero3_train_as_one_and_resume(data: Path, tmp_path: Path) -> None:
    """Three pictures for two processes: one of them must go along while the other measures the last."""
    one = flags(data, tmp_path, "one", batch_size=1, grad_accumulation_steps=2)
    train_read.main([*one, "--max_steps", "2"])
    two = flags(data, tmp_path, "two", batch_size=1, zero_stage=3)
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29617"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for steps in ("1", "2"):
        done = subprocess.run(
            [*launch, "train_read.py", *two, "--max_steps", steps, "--auto_resume"],
            cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("after step 1" in done.stdout and "resumed" in done.stdout) == (steps == "2")
    expected, found = weights(tmp_path / "one", 2), weights(tmp_path / "two", 2)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    scores = [records(tmp_path / name, "val")[-1] for name in ("one", "two")]
    assert scores[0]["images"] == scores[1]["images"] == 3
    assert scores[0]["ciou"] == pytest.approx(scores[1]["ciou"], abs=1e-3)


def test_where_weights_are_split_all_processes_call_sam_equally_often() -> None:
    """A picture without a [SEG] is drawn for nothing, in ZeRO-3 alone; loss and gradients stay what they were."""
    batch = tiny_batch([prompt(5, SEG, 2), prompt(9, 2)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 0, -100)
    batch["masks"] = [torch.ones(40, 56, dtype=torch.uint8)]
    found = {}
    for even in (False, True):
        model = tiny_read().train()
        add_lora(model, dropout=0.0)
        set_trainable(model)
        model.even_calls = even
        calls = []
        model.sam.image_encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(**batch).loss
        loss.backward()
        found[even] = (len(calls), loss.item(), model.llava.lm_head.weight.grad)
    assert (found[False][0], found[True][0]) == (1, 2)
    assert found[False][1] == found[True][1]
    torch.testing.assert_close(found[False][2], found[True][2])


# ------------------------------------------------------------------------------------------------ few bits, adapters


@pytest.mark.parametrize("bits, more", [(4, []), (8, ["--save_frozen"])], ids=str)
def test_a_base_in_few_bits_trains_resumes_and_merges(
    data: Path, tmp_path: Path, bits: int, more: list[str], seen: list[int]
) -> None:
    """The merged model answers as the trained one, whose frozen weights were rounded; other layers were not."""
    line = command(data, tmp_path, "tiny", f"--load_in_{bits}bit", "--auto_resume", "--no_eval", *more, lora_dropout=0.0)
    train_read.main([*line, "--max_steps", "1"])
    train_read.main([*line, "--max_steps", "2"])
    assert seen == [0, 0, 1, 1]
    merge.main([str(tmp_path / "tiny"), str(tmp_path / "merged")])

    args = TrainArgs.load(tmp_path / "tiny")
    trained = READForCausalLM.from_pretrained(args.version, vision_tower=args.vision_tower)
    quantize_language_model(trained, bits, "cpu")
    args.configure(trained.config)
    add_lora(trained, **args.lora())
    converted = sum(p.dtype in (torch.uint8, torch.int8) for p in trained.parameters())
    assert converted == 7 * len(trained.llava.model.language_model.layers), "four of attention, three of the MLP"
    set_trainable(trained)
    wanted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in weights(tmp_path / "tiny", 2).items() if name in wanted}
    assert state.keys() == wanted
    trained.load_state_dict(state, strict=False)
    merged = READForCausalLM.from_pretrained(tmp_path / "merged")
    batch = batch_of(args, data)
    for model in (merged, trained.eval()):
        model.config.sasp = SaspConfig(enabled=False)  # points are chosen, and choices jump
    ours, theirs = (model(**batch).segments.mask_logits[0] for model in (merged, trained))
    # In 8 bits the layers round their inputs too, which no weights can show.
    torch.testing.assert_close(ours, theirs, rtol=0, atol={4: 1e-4, 8: 5e-2}[bits] * theirs.abs().max().item())


def batch_of(args: TrainArgs, data: Path) -> dict:
    """The first validation picture as the model takes it."""
    from dataset import build_eval
    from dataset.collate import collate

    processor = READProcessor.from_pretrained(args.version, vision_tower=args.vision_tower)
    sample = build_eval("ReasonSeg", "val", data, protocol="forced")[0]
    return collate([sample], processor, training=False).model_inputs()


def test_rounding_stays_when_the_bits_are_undone() -> None:
    """Merging adds LoRA to the weights it was trained on: rounded, in plain layers."""
    batch = tiny_batch([prompt(5, SEG, 6)])
    model = quantize_language_model(tiny_read(), 4, "cpu")
    rounded = model(**batch).segments.mask_logits[0]
    plain = dequantize_language_model(model)(**batch).segments.mask_logits[0]
    torch.testing.assert_close(plain, rounded)
    assert not torch.allclose(plain, tiny_read()(**batch).segments.mask_logits[0])
    with pytest.raises(ValueError, match="8 or 4 bits, found 3"):
        quantize_language_model(tiny_read(), 3, "cpu")


def test_adapter_is_one_that_peft_loads(data: Path, through: Path, tmp_path: Path) -> None:
    """`peft` puts LoRA and all else that trained onto the base: the result answers as the merged model."""
    merge.main([str(through), str(tmp_path / "adapter"), "--layout", "adapter", "--tag", "last"])
    merge.main([str(through), str(tmp_path / "merged"), "--tag", "last"])
    merged = READForCausalLM.from_pretrained(tmp_path / "merged")
    args = TrainArgs.load(through)
    base = READForCausalLM.from_pretrained(args.version, vision_tower=args.vision_tower)
    args.configure(base.config)
    batch = batch_of(args, data)
    before = base(**batch).segments.mask_logits[0]
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours, theirs = (model(**batch).segments.mask_logits[0] for model in (merged, adapted))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, ours, atol=1e-2)
    size = sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    assert size < sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())


def test_merging_twice_or_with_another_base_is_refused(data: Path, through: Path, tmp_path: Path) -> None:
    """LoRA fits one base, once; a run goes on from its own base alone."""
    merge.main([str(through), str(tmp_path / "merged")])
    assert f"| base | `{CKPT / 'read_tiny'}` |" in (tmp_path / "merged/README.md").read_text()
    with pytest.raises(SystemExit, match="result of a merge"):
        merge.main([str(tmp_path / "merged"), str(tmp_path / "again")])
    shutil.copytree(through, tmp_path / "run")
    shutil.copytree(CKPT / "read_tiny", tmp_path / "base")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["train"]["version"] = str(tmp_path / "base")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    # The same weights in another place.
    merge.main([str(tmp_path / "run"), str(tmp_path / "same"), "--layout", "released"])
    assert not (tmp_path / "same/README.md").exists()  # that layout cannot say what a card says
    file = tmp_path / "base/pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    torch.save(state, file)
    with pytest.raises(SystemExit, match="does not hold the weights that .* was trained from"):
        merge.main([str(tmp_path / "run"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    changed = command(data, tmp_path, "run", "--auto_resume", version=tmp_path / "base")
    with pytest.raises(SystemExit, match="does not hold the weights that .* was trained from"):
        train_read.main(changed)


# ------------------------------------------------------------------------------------------------ plans and logs


def test_dry_run_says_all_and_does_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Settings, what trains, data, memory; no run folder, no process group."""
    train_read.main(command(data, tmp_path, "dry", "--dry_run"))
    said = capsys.readouterr().out
    for part in ('"lora_r": 4', "SAM mask decoder", "reason_seg ", "4 pictures", "ZeRO-2, --load_in_4bit", "with 2 questions"):
        assert part in said
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "dry").exists()


def test_a_plan_for_7b_needs_none_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The base is not on this machine and neither is the data; both are said."""
    train_read.main(["--preset", "read-7b-test", "--dataset_dir", str(tmp_path), "--dry_run"])
    said = capsys.readouterr().out
    assert "the published size of liuhaotian/llava-v1.5-7b" in said
    assert "this would not start: not on disk" in said
    row = next(line for line in said.splitlines() if line.startswith("* ZeRO-2  ")).removeprefix("* ").split()
    parameters = 7_063_430_000 + 641_090_000  # LLaVA-1.5-7B with CLIP-L, and SAM ViT-H
    assert float(row[1]) == pytest.approx(parameters * 2 / 2**30, rel=0.03)


def planned(model: READForCausalLM, **ways: object) -> memory.Needs:
    return memory.needs(model, 0.0, **ways)


def test_plan_counts_what_a_run_holds(through: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and optimiser states of the plan are, byte for byte, those of a real engine."""
    held = {}

    def look(args, engine, *_):
        states = engine.optimizer.optimizer.state.values()
        held["states"] = sum(t.nbytes for s in states for t in s.values() if t.ndim)
        held["copies"] = sum(p.nbytes for p in engine.optimizer.single_partition_of_fp32_groups)
        held["weights"] = sum(p.nbytes for p in engine.module.parameters())
        held["trained"] = sum(p.nbytes for p in engine.module.parameters() if p.requires_grad)

    monkeypatch.setattr(train_read, "measure", look)
    train_read.main(command(data, tmp_path, "tiny", "--max_steps", "1"))
    args = TrainArgs.load(tmp_path / "tiny")
    config, _ = memory.base_config(args.version, args.vision_tower)
    model = memory.on_meta(config, torch.float32)
    add_lora(model, **args.lora())
    set_trainable(model)
    plan = planned(model)
    assert plan.weights * memory.GIB == pytest.approx(held["weights"])
    assert plan.gradients * memory.GIB == pytest.approx(3 * held["trained"])  # and two buckets as large as all that trains
    assert plan.optimizer * memory.GIB == pytest.approx(held["states"] + held["copies"], rel=1e-3)  # padding of partitions
    assert planned(model, bits=4).weights < planned(model, bits=8).weights < plan.weights
    assert planned(model, offload="optimizer").optimizer == 0
    assert planned(model, processes=8).optimizer == pytest.approx(plan.optimizer / 8)


@pytest.mark.parametrize("checkpointing, share", [(False, True), (True, True), (True, False)])
def test_planned_activations_are_those_of_a_training_step(checkpointing: bool, share: bool, tmp_path: Path) -> None:
    """What is counted without memory is what autograd keeps of a real batch of READ-mini, within a fifth."""
    from dataset import build_train
    from dataset.collate import collate
    from dataset.mini.write import write_all

    write_all(tmp_path, seed=3, train=8, val=1, test=2)
    mixture = build_train(["refer_seg"], [1], tmp_path, refer_seg_data="refcoco", num_classes_per_sample=2)
    processor = READProcessor.from_pretrained(ROOT / "assets/read-mini-base")
    batch = collate([mixture.sample(0, i) for i in range(3)], processor, training=True)
    real = READForCausalLM.from_pretrained(ROOT / "assets/read-mini-base").train()
    meta = memory.on_meta(real.config, torch.float32)
    for model in (real, meta):
        add_lora(model, r=16)
        set_trainable(model)
    real.share_prefix = share
    if checkpointing:
        real.gradient_checkpointing_enable()
    held = memory.kept_for_backward(lambda: real(**batch.model_inputs()), real)
    shared = int((batch.input_ids[0] == IMAGE_TOKEN_INDEX).nonzero()[-1]) + 1
    shape = memory.StepShape(
        pictures=3, questions=len(batch.input_ids), tokens=batch.input_ids.shape[1], shared=shared if share else 0
    )
    planned = memory.activation_bytes(meta, shape, checkpointing)
    if checkpointing:  # the block that is computed again, which the forward pass alone does not keep
        planned -= memory.activation_bytes(meta, shape, False) // real.config.llava.text_config.num_hidden_layers
        assert held < memory.activation_bytes(meta, shape, False)
    assert planned == pytest.approx(held, rel=0.2)


def test_a_package_that_a_flag_needs_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after minutes of loading."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        train_read.main(command(tmp_path, tmp_path, "tiny", "--use_wandb"))


def test_curves_go_to_wandb_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of W&B for one run of ours, under the same id when it is resumed; the package itself is not needed here."""
    seen: list = []

    class Stub:
        def init(self, **given):
            seen.append(given)
            return self

        def log(self, values, step):
            seen.append((step, values))

        def finish(self):
            seen.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Stub())
    (tmp_path / "config.json").write_text('{"train": {"lr": 1}}')
    for _ in range(2):
        log = RunLog(tmp_path, after_step=4, wandb_name="mine")
        log.record("train", 5, {"loss": 2.0})
        log.close()
    assert seen[1:3] == [(5, {"train/loss": 2.0}), "finished"]
    assert seen[0] == seen[3]
    assert seen[0]["name"] == "mine" and seen[0]["config"] == {"train": {"lr": 1}}


# ------------------------------------------------------------------------------------------------ runs that were sent to us


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple:
        return open, (self.file, "w")


def spoil(run: Path, to: Path, pattern: str, change) -> Path:
    """A copy of a run in which `change` was done to one file of its last checkpoint; returns the file."""
    shutil.copytree(run, to)
    file = next((to / "ckpt_model/step4").glob(pattern))
    change(file)
    return file


@pytest.mark.parametrize("pattern", ["*optim_states.pt", "*model_states.pt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_code_in_shards_is_refused_and_not_run(
    data: Path, through: Path, tmp_path: Path, pattern: str, zipped: bool
) -> None:
    """Merging and resuming run no code of a run folder that was sent to somebody."""
    trapped = tmp_path / "trapped"

    def add(file: Path) -> None:
        content = torch.load(file, weights_only=False)
        torch.save({**content, "extra": Trap(trapped)}, file, _use_new_zipfile_serialization=zipped)

    file = spoil(through, tmp_path / "run", pattern, add)
    with pytest.raises(SystemExit, match=f"{file.name} .*is code, and no code of a file is run"):
        merge.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--tag", "last"])
    with pytest.raises(ValueError, match=f"{file.name} .*is code, and no code of a file is run"):
        load_checkpoint(None, tmp_path / "run/ckpt_model", World(0, 1, torch.device("cpu")))
    assert not trapped.exists()
    torch.load(file, weights_only=False)
    assert trapped.exists(), "the trap works where code is allowed"


def test_resuming_reads_shards_without_code(
    data: Path, tmp_path: Path, through: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that DeepSpeed itself loads in resuming is forced to be data, and the switch is off again afterwards."""
    seen = []
    original = torch.serialization._load
    monkeypatch.setattr(torch.serialization, "_load", lambda *args, **more: (seen.append(more["weights_only"]),
                                                                              original(*args, **more))[1])  # fmt: skip
    shutil.copytree(through, tmp_path / "tiny")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    train_read.main(command(data, tmp_path, "tiny", "--auto_resume"))
    assert len(seen) >= 4 and all(seen)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("pattern", "change", "words"),
    [
        ("*optim_states.pt", lambda file: file.write_bytes(b""), "is empty"),
        ("*model_states.pt", lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        ("*optim_states.pt", lambda file: os.truncate(file, file.stat().st_size // 2), "copy or download it again"),
        ("*model_states.pt", lambda file: torch.save([1], file), "no part of a DeepSpeed checkpoint: it has no module"),
        ("*optim_states.pt", lambda file: torch.save({"module": {}}, file), "it has no optimizer_state_dict"),
        ("*optim_states.pt", lambda file: torch.save({"optimizer_state_dict": None}, file), "step4 cannot be read"),
        ("*model_states.pt", lambda file: torch.save({"module": {}, "buffer_names": 3}, file), "step4 cannot be read"),
    ],
)
def test_damaged_shards_are_named(through: Path, tmp_path: Path, pattern: str, change, words: str) -> None:
    spoil(through, tmp_path / "run", pattern, change)
    with pytest.raises(ValueError, match=words):
        merge.read_shards(tmp_path / "run/ckpt_model/step4")


@pytest.mark.parametrize(
    ("content", "words"),
    [("step9", "names step9, which is not there"), ("../../other", "must name a folder beside it"), ("", "is empty")],
)
def test_a_file_latest_that_names_no_checkpoint(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "ckpt_model/step4").mkdir(parents=True)
    (tmp_path / "ckpt_model/latest").write_text(content)
    with pytest.raises((OSError, ValueError), match=words):
        load_checkpoint(None, tmp_path / "ckpt_model", World(0, 1, torch.device("cpu")))
    with pytest.raises((OSError, ValueError), match=words):
        merge.checkpoint_folder(tmp_path, "last")


@pytest.mark.parametrize("best", ["[]", "{", '{"tag": 3}', '{"tag": "../../other"}', ""])
def test_a_record_of_the_best_checkpoint_that_is_unusable(tmp_path: Path, best: str) -> None:
    (tmp_path / "best.json").write_text(best)
    with pytest.raises(ValueError, match=r"best\.json"):
        merge.checkpoint_folder(tmp_path, "best")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"), ("[]", "must be a JSON object"), ('{"model_type": "read"}', "no settings of one"),
        ('{"train": []}', "train: must be a JSON object"), ('{"train": {"lora_rank": 3}}', "unknown setting 'lora_rank'"),
        ('{"train": {"lora_r": "8"}}', "lora_r must be int, found '8'"), ('{"train": {"lora_r": true}}', "lora_r must be int"),
        ('{"train": {"lr": NaN}}', "lr must be float"), ('{"train": {"version": null}}', "version must be str"),
        ('{"train": {"epochs": 0}}', "epochs must be at least 1"), ('{"train": {"sasp": "no"}}', "sasp must be bool or NoneType"),
    ],
)  # fmt: skip
def test_settings_of_a_run_that_are_damaged_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        TrainArgs.load(tmp_path)
    assert "config.json" in str(error.value)


def test_settings_of_a_run_are_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    TrainArgs(lr=1, lora_r=4).save(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert TrainArgs.load(tmp_path) == TrainArgs(lr=1, lora_r=4)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"tag": 3}', '{"tag": "step1", "ciou": "x"}', '{"tag": "step1", "measured_step": "2"}']
)
def test_a_damaged_record_of_the_best_checkpoint_stops_training_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "best.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"best\.json"):
        run_folder.read_best(tmp_path)


@pytest.mark.parametrize("totals", [None, 3, [], ["a", 1], [1], [1, True], [1, float("nan")], {"ce_loss": 1}])
def test_sums_that_are_no_numbers_are_refused_with_their_file(totals: object) -> None:
    with pytest.raises(ValueError, match=r"^averages\.json: recent: must be a list of 2 numbers"):
        Averages(("loss",)).restore(totals, "averages.json: recent")


def test_a_checkpoint_without_its_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "step1").mkdir()
    with pytest.raises(ValueError, match=r"step1 is not whole: it has no file \*model_states\.pt"), reading_shards(
        tmp_path / "step1"
    ):
        pass


def test_one_process_alone_needs_no_address_that_a_batch_script_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that they are put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setattr(distributed, "_make_group", lambda *_: None)
    distributed._start_group(0, 1, 0, engine=True)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(("given", "seconds"), [({}, 45), ({"MASTER_ADDR": "node1"}, 300), ({"READ_RENDEZVOUS_S": "7"}, 7)])
def test_processes_wait_longer_where_a_launcher_says_where_to_meet(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], seconds: int
) -> None:
    for name in ("MASTER_ADDR", "READ_RENDEZVOUS_S"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert distributed._rendezvous_limit().total_seconds() == seconds
