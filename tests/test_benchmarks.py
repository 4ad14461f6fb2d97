"""Benchmarks: each says what it does at once, and the tables of speeds are what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(file for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", ["docs/performance.md", "benchmarks/README.md"])
def test_the_documents_show_what_was_measured(file):
    """`python benchmarks/table.py --write` was run after the last benchmark."""
    from benchmarks.table import written

    assert written(ROOT / file) == (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_help_is_quick(script):
    """`--help` is answered before torch is imported, and shows how the script is called."""
    probe = (
        f"import sys, runpy; sys.argv = [{str(script)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{script.name}" in done.stdout


def test_the_rule_of_the_original_and_ours_agree():
    """The baseline of benchmarks/sasp.py is protocol §4: its points are ours."""
    import torch

    from benchmarks.sasp import original_points
    from model import SaspConfig, select_points

    values = torch.nn.functional.interpolate(
        torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)), (24, 24), mode="bicubic"
    ).flatten(1)
    found = select_points(values, (120, 200), SaspConfig(num_points=30))
    assert (original_points(values[0], found.cells[0], (120, 200)) - found.points[0]).abs().max() < 1e-3



# ------------------------------------------------------------------------------------------------ floors

TOPS = {"tflops": 700.0, "gb_per_second": 4000.0}


@pytest.fixture(scope="module")
def counts():
    from benchmarks import floors
    from model.memory import published_config

    return floors.count(published_config("7b"))


def test_counts_of_the_7b_are_the_known_ones(counts):
    near = {"rel": 0.05}
    assert counts.prefill_flops(640) / 640 == pytest.approx(13.5e9, **near)  # two FLOPs for each of 6.7e9 weights
    assert counts.decode_bytes(0, 2) == pytest.approx(13.5e9, **near)
    assert counts.decode_bytes(0, 2, bits=4) == pytest.approx(6.476e9 * 0.52 + 0.26e9, **near)
    assert counts.cache_bytes(1, 2) == 32 * 2 * 4096 * 2
    assert counts.sam_flops == pytest.approx(5.6e12, **near)
    assert counts.clip_flops == pytest.approx(0.4e12, **near)  # 23 of 24 layers, and the projector
    assert counts.attention_flops(1) == 32 * 4 * 4096


def test_a_row_in_two_passes_takes_what_it_takes_in_one(counts):
    assert counts.prefill_flops(600) + counts.prefill_flops(40, 600) == counts.prefill_flops(640)


def test_floor_of_an_evaluation(counts):
    """Prompts are bound by FLOPs, decode steps by the weights and caches that they read."""
    from benchmarks.floors import evaluation_floor

    given = {"chunk": 16, "itemsize": 2, "masks": 10, "pixels": 10 * 480 * 640}
    forced = evaluation_floor(counts, TOPS, 614, [30] * 10, **given)
    flops = counts.prefill_flops(614) + 10 * counts.prefill_flops(30, 614)
    assert forced["language model"] == pytest.approx(flops / 700e12)
    assert forced["SAM encoder"] == counts.sam_flops / 700e12 and "vocabulary head" not in forced
    assert forced["total"] == pytest.approx(sum(t for stage, t in forced.items() if stage != "total"))
    longest = evaluation_floor(counts, TOPS, 614, [30] * 10, **given, answers=[40] * 10)
    steps = sum(counts.decode_bytes(10 * (644 + step), 2) for step in range(1, 40)) / 4000e9
    assert longest["language model"] - forced["language model"] == pytest.approx(steps)
    one = evaluation_floor(counts, TOPS, 614, [30] * 10, **given, answers=[1] * 9 + [40])
    assert one["language model"] - forced["language model"] == pytest.approx(
        sum(counts.decode_bytes(644 + step, 2) for step in range(1, 40)) / 4000e9
    )
    halves = evaluation_floor(counts, TOPS, 614, [30] * 10, **given | {"chunk": 5}, answers=[40] * 10)
    assert halves["language model"] > longest["language model"]  # the weights are read twice as often
    assert "SAM encoder" not in evaluation_floor(counts, TOPS, 614, [30], chunk=16, itemsize=2)


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)])
def test_floor_of_a_training_step(counts, checkpointing, passes):
    """Frozen weights: forward and backward take two forward passes, and three where the forward pass is done again."""
    from benchmarks.floors import training_floor

    found = training_floor(
        counts, TOPS, {0: (614, [66] * 3), 1: (614, [70] * 3)}, itemsize=2, checkpointing=checkpointing, supervised=200,
        segmented=2, masks=6, pixels=6 * 480 * 640, trained_bytes=int(0.6e9),
    )  # fmt: skip
    assert (found["language model"] + found["backward"]) / found["language model"] == pytest.approx(passes, rel=0.05)
    tokens = 2 * 614 + 3 * 66 + 3 * 70
    assert found["language model"] == pytest.approx(counts.linear_flops(tokens) / 700e12, rel=0.03)
    assert found["total"] == pytest.approx(sum(t for part, t in found.items() if part != "total"))


def test_lengths_are_those_up_to_the_image_and_behind_it():
    from tiny import prompt, tiny_batch

    from benchmarks.floors import lengths

    batch = tiny_batch([prompt(5, 6), prompt(5), prompt(5, 6, 7)], image_of_question=[0, 0, 1])
    asked = {name: batch[name] for name in ("input_ids", "attention_mask", "image_of_question")}
    assert lengths(**asked) == {0: (19, [3, 2]), 1: (19, [4])}  # 3 words and 16 slots; a mark closes the image


def test_ceilings_are_measured(small_ceilings):
    import torch

    from benchmarks import floors

    tops = floors.ceilings(torch.device("cpu"), torch.float32)
    assert set(tops) == {"tflops", "gb_per_second"} and min(tops.values()) > 0
    assert floors.roofline(tops, tops["tflops"] * 2e12, tops["gb_per_second"] * 1e9) == pytest.approx(2)


# ------------------------------------------------------------------------------------------------ clocks


def counting():
    """A stopwatch whose time is how often it was read."""
    import torch

    from benchmarks.stopwatch import Stopwatch

    class Counting(Stopwatch):
        reads = 0

        def now(self) -> float:
            self.reads += 1
            return float(self.reads)

    return Counting(torch.device("cpu"))


def test_what_happens_inside_a_part_counts_to_it_and_reads_no_clock():
    """Else a GPU would be waited for while a CUDA graph is captured, which is an error."""
    import torch

    watch, module = counting(), torch.nn.Linear(2, 2)
    watch.watch("module", module)
    inner = watch.wrap("inner", lambda: module(torch.zeros(2)))
    with watch.part("outer"):
        inner()
        module(torch.zeros(2))
        assert watch.reads == 1
    assert watch.reads == 2 and watch.take() == {"outer": 1.0}
    inner()
    module(torch.zeros(2))
    assert watch.take() == {"inner": 1.0, "module": 1.0}
    outer = torch.nn.Sequential(module)
    watch.watch("sequence", outer)
    outer(torch.zeros(2))
    assert watch.take() == {"sequence": 1.0}


def test_a_forward_pass_as_a_whole_hides_nothing():
    """`benchmarks/step_time.py` subtracts its parts from it."""
    watch = counting()
    with watch.part("forward"), watch.part("inner"):
        pass
    assert watch.take() == {"forward": 3.0, "inner": 1.0}


def test_a_part_that_fails_is_left():
    import torch

    class Failing(torch.nn.Module):
        def forward(self) -> None:
            raise RuntimeError("no memory")

    watch, module = counting(), Failing()
    watch.watch("module", module)
    for name in ("forward", "outer"):
        with pytest.raises(RuntimeError, match="no memory"), watch.part(name):
            module()
        with pytest.raises(RuntimeError, match="no memory"):
            module()
        assert watch.depth == 0 and not watch.take()


# ------------------------------------------------------------------------------------------------ whole benchmarks


@pytest.fixture
def small_ceilings(monkeypatch):
    from benchmarks import floors

    monkeypatch.setattr(floors, "SIDE", {"cuda": 1024, "cpu": 128})
    monkeypatch.setattr(floors, "COPIED", {"cuda": 2**24, "cpu": 2**20})


@pytest.fixture
def clocks_off_afterwards(monkeypatch):
    """`watch_model` is for the rest of a process, which here goes on."""
    from model import decoding, recording, sam, sasp

    for owner, names in (
        (sasp, ("similarity", "select_points")), (sam, ("upscale_logits",)), (decoding.Decoder, ("step",)),
        (recording.Recorder, ("__call__",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from dataset.mini.write import write_all

    root = tmp_path_factory.mktemp("mini")
    write_all(root, seed=3, train=6, val=2, test=2)
    return root


def test_a_baseline_of_some_expressions(small_ceilings, clocks_off_afterwards, data, tmp_path, capsys):
    from benchmarks import evaluation

    out = tmp_path / "found.json"
    evaluation.main(
        ["--dataset_dir", str(data), "--images", "1", "--warmup", "0", "--expressions", "4", "--original_expressions", "2",
         "--chunk", "3", "--precision", "fp32", "--out", str(out)]
    )  # fmt: skip
    printed, record = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert "ran 2 of the 4 expressions" in printed and "of floor" in printed and "TFLOP/s in a product" in printed
    assert record["original_expressions"] == 2 and set(record["ceilings"]) == {"tflops", "gb_per_second"}
    found = record["results"]["generate"]
    assert found["agreement"]["answers"] == found["agreement"]["answers_of"] == 2
    assert found["agreement"]["masks"] == found["agreement"]["masks_of"]
    assert record["results"]["forced"]["agreement"]["masks_of"] == 4  # the option is not for given answers
    for result in record["results"].values():
        floor, seconds = result["floor_seconds"], result["seconds"]["together"]
        assert {"CLIP", "language model", "total"} <= set(floor) and set(floor) <= set(seconds)
        assert seconds["total"] == pytest.approx(sum(t for stage, t in seconds.items() if stage != "total"))
    assert found["seconds"]["together"]["vocabulary head"] < found["seconds"]["together"]["language model"]


def test_no_clock_is_read_while_a_gpu_is_recorded(small_ceilings, clocks_off_afterwards, data, monkeypatch, capsys):
    """It would have to be waited for, which ends the recording. Here one is played: what is recorded runs, and counts nothing."""
    from benchmarks import evaluation
    from benchmarks.stopwatch import MODEL_PARTS, Stopwatch
    from model import decoding, recording

    recorded, now = [], Stopwatch.now

    def record(function, device, pool=None):
        recorded.append(function)
        monkeypatch.setattr(Stopwatch, "now", lambda watch: pytest.fail("the clock was read"))
        with monkeypatch.context() as undone:
            undone.setattr(decoding, "_advance", lambda *_: None)  # a step that is recorded is not taken
            function()
        monkeypatch.setattr(Stopwatch, "now", now)

    for module in (decoding, recording):
        monkeypatch.setattr(module, "record", record)
        monkeypatch.setattr(module, "recordable", lambda module: True)
    evaluation.main(
        ["--dataset_dir", str(data), "--images", "1", "--warmup", "1", "--expressions", "3", "--together_only",
         "--precision", "fp32", "--protocols", "forced", "generate"]
    )  # fmt: skip
    assert len(recorded) > 3
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for part in MODEL_PARTS:
        found = [float(line[len(part.split())]) for line in lines if line[: len(part.split())] == part.split()]
        assert len(found) == 2 and min(found) > 0, part


def test_without_a_gpu_its_rows_are_refused():
    line, hidden = [sys.executable, ROOT / "benchmarks/gpu.py"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1 and done.stderr.startswith("gpu: there is no GPU here")


@pytest.mark.parametrize("wrong", ["0", "5"])
def test_a_baseline_of_more_expressions_than_there_are(wrong):
    from benchmarks import evaluation

    with pytest.raises(SystemExit, match="--original_expressions must be from 1 to --expressions 4"):
        evaluation.main(["--expressions", "4", "--original_expressions", wrong])


def test_the_baseline_s_expressions_are_spread_evenly():
    from benchmarks.evaluation import build_parser, chosen

    options = build_parser().parse_args(["--expressions", "10", "--original_expressions", "3"])
    assert chosen("generate", options) == [0, 3, 6] and chosen("forced", options) == list(range(10))


def test_the_plan_of_an_evaluation(capsys):
    from benchmarks import evaluation

    evaluation.main(["--size", "7b", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["bf16", "14.4"] for line in lines)
    assert any(line.startswith("SAM's encoder, a picture") and line.endswith("5.666 TFLOP") for line in lines)


def test_a_training_step_beside_its_floor(small_ceilings, clocks_off_afterwards, data, tmp_path, capsys):
    from benchmarks import training_step
    from benchmarks.stopwatch import MODEL_PARTS

    out = tmp_path / "found.json"
    training_step.main(
        ["--dataset_dir", str(data), "--pictures", "1", "--conversations", "2", "--steps", "1", "--warmup", "0",
         "--ways", "shared", "--precision", "fp32", "--out", str(out)]
    )  # fmt: skip
    record = json.loads(out.read_text(encoding="utf-8"))
    assert "of floor" in capsys.readouterr().out and set(record["ceilings"]) == {"tflops", "gb_per_second"}
    without, saved = (result["floor_seconds"] for result in record["results"].values())
    assert saved["backward"] > without["backward"] and saved["language model"] == without["language model"]
    seconds = record["results"]["with gradient checkpointing"]["seconds"]["shared"]
    assert set(without) <= set(seconds) and all(seconds[part] > 0 for part in MODEL_PARTS)
