"""The command line: every command that the scripts, the Makefile, the README and the docs show parses against its own parser."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import pytest_terminal_summary

from utils.args import REMOVED, TrainArgs, parse_flags
from utils.cli import add_model_flags, check_max_new_tokens, load_model, positive, split_name
from utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.sh"))

ENTRIES = {
    "train_read.py": "train_read",
    "test_read.py": "test_read",
    "demo.py": "demo",
    "app.py": "app",
    "utils.merge_lora": "utils.merge_lora",
    "dataset.mini": "dataset.mini.__main__",
    "utils.compare": "utils.compare",
    "dataset.check": "dataset.check",
    "utils.plot": "utils.plot",
    "utils.model_card": "utils.model_card",
    "utils.analysis": "utils.analysis.__main__",
    **{f"benchmarks/{file.name}": f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("*.py")},
}
"""What a command may run -> the module whose `main` parses it."""


class _Parsed(Exception):
    """Ends an entry as soon as it has parsed its command line."""


def parse(entry: str, arguments: list[str]) -> None:
    """Parses a command line with the parser of that entry, which goes no further. Exits as argparse does."""
    main = importlib.import_module(ENTRIES[entry]).main
    real = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: argparse.ArgumentParser, *_: object) -> None:
        _, unknown = real(self, arguments)
        if unknown:
            self.error(f"unrecognized: {' '.join(unknown)}")
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_and_stop), contextlib.suppress(_Parsed):
        main()


def entry_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(entry, its arguments) of a command that runs one of ours, else None."""
    for i, word in enumerate(words):
        if word in ENTRIES:
            return word, words[i + 1 :]
    return None


def through_script(words: list[str]) -> list[str]:
    """`bash x.sh A --b c` as the command that x.sh runs: its live command with its parameters filled in."""
    for i, word in enumerate(words):
        if word.endswith(".sh") and (ROOT / word).is_file():
            names = dict(re.findall(r"^(\w+)=\$\{(\d)", (ROOT / word).read_text(encoding="utf-8"), flags=re.MULTILINE))
            given = words[i + 1 :]
            return [part for token in live_command(ROOT / word) for part in _fill(token, given, names)]
    return words


def _fill(token: str, given: list[str], names: dict[str, str]) -> list[str]:
    """A word of a script with "$@", "${@:2}", "$1" or a variable that was set to one of them replaced."""
    if token == "$@":
        return given
    if match := re.fullmatch(r"\$\{@:(\d+)\}", token):
        return given[int(match[1]) - 1 :]
    if match := re.fullmatch(r"\$\{?(\w+)(?::\?.*)?\}?", token):
        place = names.get(match[1], match[1])
        return given[int(place) - 1 : int(place)] if place.isdigit() else [token]
    return [token]


def live_command(script: Path) -> list[str]:
    """Words of the last command of a script, the one that runs Python."""
    text = re.sub(r"\\\n\s*", " ", script.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return shlex.split([line for line in lines if any(entry in line for entry in ENTRIES)][-1])


def shown_commands() -> list[tuple[str, list[str]]]:
    """(where, words) of the commands of ours that the Makefile's demo runs and that README and docs show."""
    commands = []
    made = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [("Makefile", re.sub(r"\\\n\s*", " ", made))]
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text(encoding="utf-8").replace("\\|", "|")  # a bar in a table is escaped
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        spans = re.findall(r"`((?:bash|python) [^`\n]+)`", text)
        shown = [block for language, block in blocks if language in ("", "bash", "sh", "shell")] + spans
        sources.append((document.name, re.sub(r"\\\n\s*", " ", "\n".join(shown))))
    for where, text in sources:
        for line in text.splitlines():
            if line.lstrip().startswith("#"):
                continue
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue
            if any(word in ENTRIES or word.endswith(".sh") for word in words):
                commands.append((where, words))
    return commands


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_script_is_sound(script: Path) -> None:
    """Usage in the first lines, strict mode, valid bash."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_has_one_live_command_and_passes_arguments_on(script: Path) -> None:
    """The original overwrote its own arguments and kept whole commands as comments."""
    text = script.read_text(encoding="utf-8")
    live = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert sum(any(entry in line for entry in ENTRIES) for line in live) == 1
    assert '"$@"' in text or '"${@:' in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_command_of_script_parses(script: Path) -> None:
    """Every flag that a script types is one of the entry it runs, with a value it takes."""
    text = script.read_text(encoding="utf-8")
    positional = ["RUN", "OUT"] if "$2" in text or "${2" in text else ["NAME"]
    entry, words = entry_of(through_script([script.name, *positional]))
    parse(entry, [word for word in words if "$" not in word])


LAUNCHER = "-m deepspeed.launcher.runner --master_port 29500"


@pytest.mark.parametrize(
    "given, launched",
    [
        ({}, "train_read.py"),
        ({"NUM_PROCS": "2"}, f"{LAUNCHER} --num_gpus 2 train_read.py"),
        ({"HOSTFILE": "hosts"}, f"{LAUNCHER} --hostfile hosts train_read.py"),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, f"on 3,5: {LAUNCHER} train_read.py"),
    ],
    ids=str,
)
def test_train_script_starts_one_process_or_many(tmp_path: Path, given: dict[str, str], launched: str) -> None:
    """What train_read.sh runs, with a python in its way that only repeats it."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "${CUDA_VISIBLE_DEVICES:+on $CUDA_VISIBLE_DEVICES: }$*"\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **given}
    done = subprocess.run(
        ["bash", "train_read.sh", "mini", "--lr", "1"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{launched} --preset mini --lr 1"


@pytest.mark.parametrize("where, words", shown_commands(), ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else v)
def test_shown_command_parses(where: str, words: list[str]) -> None:
    """The commands that people will copy are parsed for real, values and all."""
    found = entry_of(through_script(words))
    assert found is not None, f"{where}: {' '.join(words)} runs nothing that is known here"
    entry, arguments = found
    parse(entry, [word for word in arguments if "$" not in word and word != "--help"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone of git")
def test_a_clone_on_windows_keeps_what_is_read_byte_by_byte() -> None:
    """With core.autocrlf=true bash stopped at the first line of all four scripts, and golden text had other digests."""
    listed = subprocess.run(["git", "ls-files", "-z", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    attributes = {path: head.split()[2:] for head, path in (line.split("\t") for line in listed.split("\0") if line)}
    for path, found in attributes.items():
        if path.endswith(".sh") or path in (".ci/run", "Makefile"):
            assert found == ["attr/text", "eol=lf"], path
        elif path.startswith(("tests/golden/", "assets/")) or Path(path).suffix in (".png", ".npz", ".model", ".safetensors"):
            assert found == ["attr/-text"], path


@pytest.mark.parametrize("name, value", [("lr", "nan"), ("t_pos", "inf"), ("time_limit_s", "nan"), ("seed", "-1")])
def test_numbers_that_nothing_can_be_computed_with_are_refused(name: str, value: str) -> None:
    """Before they reach a loss or the record of a run, which JSON could not hold."""
    with pytest.raises(ValueError, match=f"--{name} must .* found {value}"):
        TrainArgs.resolve(parse_flags([f"--{name}", value]))


# ------------------------------------------------------------------------------------------------ the flags


def test_booleans_switch_both_ways() -> None:
    """Four flags of the original were True and could not be turned off; the README's `=False` was rejected."""
    assert parse_flags(["--no-gradient_checkpointing", "--no-train_mask_decoder"]) == {
        "gradient_checkpointing": False,
        "train_mask_decoder": False,
    }
    assert parse_flags(["--sasp", "--no_eval", "--auto_resume"]) == {"sasp": True, "no_eval": True, "auto_resume": True}


@pytest.mark.parametrize("name", REMOVED)
def test_removed_flags_say_why(name: str, capsys: pytest.CaptureFixture) -> None:
    """Who comes from the original learns what became of a flag."""
    with pytest.raises(SystemExit):
        parse_flags([f"--{name}", "1"] if name.endswith("size") else [f"--{name}"])
    assert REMOVED[name] in capsys.readouterr().err


def test_typed_flags_win_over_the_preset_and_the_preset_over_the_defaults() -> None:
    """Also when the typed value is the default's, and for the parts of a preset that belong to the model."""
    sasp = SimpleNamespace(enabled=True, num_points=7, t_pos=0.6, t_neg=0.1, down_sample=1, geometry="exact")
    loss = SimpleNamespace(ce=1.0, bce=2.0, dice=4.0, sim=0.0)
    preset = SimpleNamespace(name="toy", sasp=sasp, loss=loss, conv_type="vicuna_v1", train={"lr": 1e-4, "lora_r": 64})
    args = TrainArgs.resolve({"preset": "toy", "lora_r": 8, "t_pos": 0.7}, preset)
    assert (args.lr, args.lora_r, args.t_pos, args.num_points, args.geometry) == (1e-4, 8, 0.7, 7, "exact")
    assert (args.dice_loss_weight, args.conv_type, args.epochs, args.exp_name) == (4.0, "llava_v1", 20, "toy")


def test_every_preset_resolves() -> None:
    """Each published recipe is a complete set of flags."""
    from model import PRESETS

    for name, preset in PRESETS.items():
        args = TrainArgs.resolve({"preset": name}, preset)
        assert args.mixture()
        assert args.num_points == preset.sasp.num_points
        assert args.dice_loss_weight == preset.train.get("dice_loss_weight", preset.loss.dice)


def test_a_preset_cannot_set_what_is_no_flag() -> None:
    """A typing error in a recipe is found, not ignored."""
    from model import PRESETS

    preset = SimpleNamespace(**{**vars(PRESETS["mini"]), "train": {"learning_rate": 1.0}})
    with pytest.raises(ValueError, match="learning_rate"):
        TrainArgs.resolve({}, preset)


def test_rates_must_match_the_data_sets() -> None:
    """The original's own default, three rates for four data sets, died deep inside NumPy."""
    with pytest.raises(ValueError, match="4 data sets .* 3 rates"):
        TrainArgs(sample_rates="9,3,3")
    assert TrainArgs(dataset="reason_seg||refer_seg", sample_rates="10,1").mixture() == [
        ("reason_seg", 10.0),
        ("refer_seg", 1.0),
    ]


def test_all_complaints_come_at_once() -> None:
    """One run of the command shows everything that is wrong with it."""
    with pytest.raises(ValueError) as error:
        TrainArgs(precision="int8", batch_size=0, conv_type="alpaca", sample_rates="x")
    for word in ("--precision", "--batch_size", "--conv_type", "--sample_rates"):
        assert word in str(error.value)


def test_settings_survive_the_round_trip_through_json(tmp_path: Path) -> None:
    """What a run saved is what merging and evaluation read."""
    args = TrainArgs(lora_r=64, sasp=False, t_pos=0.6, time_limit_s=12.5, exp_name="x")
    args.save(tmp_path / "config.json", command=["train_read.py"])
    assert TrainArgs.load(tmp_path) == args
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["command"] == ["train_read.py"]
    with pytest.raises(FileNotFoundError, match="not a training run"):
        TrainArgs.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "command", [["train_read.py"], ["-m", "utils.merge_lora"], ["test_read.py"], ["demo.py"], ["app.py"], ["-m", "utils.compare"]]
)
def test_help_is_quick(command: list[str]) -> None:
    """`--help` is answered before torch is imported."""
    probe = (
        "import sys, runpy; sys.argv = {argv}\n"
        "try:\n    {run}\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    target = command[-1]
    run = (
        f"runpy.run_module({target!r}, run_name='__main__')"
        if "-m" in command
        else f"runpy.run_path({target!r}, run_name='__main__')"
    )
    code = probe.format(argv=[target, "--help"], run=run)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


# ------------------------------------------------------------------------------------------------ CI


def ci(tmp_path: Path, *there: str, user: int = 0, apt: str = "exit 0") -> tuple[subprocess.CompletedProcess, list[str]]:
    """(how .ci/run ended, what it called) where only some commands exist; `apt` is what apt-get does."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "bash"):
        (tools / name).symlink_to(shutil.which(name))
    scripts = {"id": f"echo {user}", "timeout": 'shift; exec "$@"', "make": "exit 0", "apt-get": apt}
    scripts |= dict.fromkeys(there, "exit 0")
    for name, does in scripts.items():
        log = f'echo "{name} $*" >> {tmp_path}/called\n' if name in ("make", "apt-get") else ""
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{log}{does}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    done = subprocess.run([ROOT / ".ci/run"], env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    called = [re.sub(r" -o \S+", "", line) for line in (tmp_path / "called").read_text(encoding="utf-8").splitlines()]
    return done, called


UPDATE, INSTALL, TEST = "apt-get -qq update", "apt-get -qq install -y --no-install-recommends chromium", "make test"


def test_ci_installs_a_browser_where_there_is_none(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    apt = f"[[ $* != *install* ]] || {shutil.which('cp')} {tools}/make {tools}/chromium"
    done, called = ci(tmp_path, apt=apt)
    assert called == [UPDATE, INSTALL, TEST] and (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("apt, tried", [("exit 100", [UPDATE]), ("[[ $* == *update* ]]", [UPDATE, INSTALL])])
def test_ci_goes_on_without_a_browser_and_says_so(tmp_path: Path, apt: str, tried: list[str]) -> None:
    done, called = ci(tmp_path, apt=apt)
    assert called == [*tried, TEST] and done.returncode == 0
    assert done.stderr == "Chromium could not be installed: the tests that open the page in a browser are skipped\n"


@pytest.mark.parametrize("there, user", [(["chromium"], 0), (["google-chrome"], 0), ([], 1000)])
def test_ci_leaves_the_machine_alone(tmp_path: Path, there: list[str], user: int) -> None:
    done, called = ci(tmp_path, *there, user=user)
    assert called == [TEST] and done.returncode == 0


def test_skipped_tests_are_counted_by_reason(tmp_path: Path) -> None:
    lines: list[str] = []
    reports = [SimpleNamespace(longrepr=("a.py", 1, f"Skipped: {why}")) for why in ("no GPU", "no Chromium", "no GPU")]
    pytest_terminal_summary(SimpleNamespace(stats={"skipped": reports}, write_line=lines.append))
    pytest_terminal_summary(SimpleNamespace(stats={}, write_line=lines.append))
    assert lines == ["2 skipped: no GPU", "1 skipped: no Chromium"]


@pytest.mark.parametrize("entry, pair", [("ReasonSeg|val", ("ReasonSeg", "val")), ("a|b|val", ("a|b", "val"))])
def test_the_split_stands_behind_the_last_bar(entry: str, pair: tuple[str, str]) -> None:
    assert split_name(entry) == pair


@pytest.mark.parametrize("entry", ["ReasonSeg", "|val", "ReasonSeg|", ""])
def test_an_entry_without_name_or_split_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="NAME.SPLIT, for example"):
        split_name(entry)


# ------------------------------------------------------------------------------------------------ answers that cannot fit


def in_our_layout(folder: Path) -> Path:
    """A checkpoint folder with nothing but its config: 2048 positions, 24 x 24 image tokens."""
    text = {"max_position_embeddings": 2048}
    write_json(folder / "config.json", {"llava": {"text_config": text, "vision_config": {"image_size": 336, "patch_size": 14}}})
    return folder


def in_released_layout(folder: Path) -> Path:
    """The same in the original's layout, with the CLIP tower's folder beside it."""
    (folder / "clip").mkdir()
    write_json(folder / "config.json", {"mm_vision_tower": str(folder / "clip"), "max_position_embeddings": 2048})
    write_json(folder / "clip/config.json", {"vision_config": {"image_size": 336, "patch_size": 14}})
    return folder


@pytest.mark.parametrize("layout", [in_our_layout, in_released_layout])
@pytest.mark.parametrize("tokens", [2048 - 576, 5000, 0, -3, 10**12])
def test_answers_beyond_the_positions_are_refused_from_the_config(tmp_path: Path, layout: Callable, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"--max_new_tokens.*{tokens}"):
        check_max_new_tokens(str(layout(tmp_path)), tokens)
    check_max_new_tokens(str(tmp_path), 2048 - 576 - 1)


@pytest.mark.parametrize("positions", [None, "2048", [], float("nan"), True])
def test_a_config_without_usable_sizes_is_left_to_loading(tmp_path: Path, positions: object) -> None:
    folder = tmp_path
    (folder / "config.json").write_text(
        json.dumps({"llava": {"text_config": {"max_position_embeddings": positions}, "vision_config": {}}}), encoding="utf-8"
    )
    check_max_new_tokens(str(folder), 10**6)


SASP_THAT_FITS_NO_MODEL = [
    ["--num_points", "0"], ["--num_points", "-1"], ["--num_points", "1" + "0" * 20], ["--down_sample", "0"],
    ["--t_pos", "nan"], ["--t_pos", "1.5"], ["--t_pos", "0"], ["--t_neg", "-1"], ["--t_neg", "1"], ["--t_neg", "inf"],
    ["--t_pos", "0.2", "--t_neg", "0.8"],
]  # fmt: skip


@pytest.mark.parametrize("flags", SASP_THAT_FITS_NO_MODEL)
def test_sasp_flags_that_fit_no_model_are_refused_before_one_is_loaded(flags: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    with pytest.raises((SystemExit, ValueError), match="2|SasP needs"):
        load_model(parser.parse_args([*flags, "--version", "/no/such/model"]), device=None)  # which would be a CheckpointError


@pytest.mark.parametrize("flag", [
    "--ce_loss_weight=-1", "--num_points=0", "--t_neg=nan", "--t_pos=2", "--max_megapixels=10000000000", "--seed=4294967296",
    "--lr=-1", "--lora_dropout=1", "--lora_alpha=0", "--beta1=1", "--max_steps=0", "--time_limit_s=-1", "--preset=",
])  # fmt: skip
def test_training_refuses_such_flags_before_it_opens_anything(flag: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    main = importlib.import_module("train_read").main
    with pytest.raises(SystemExit) as end:
        main([flag, "--version", str(tmp_path), "--dataset_dir", str(tmp_path), "--log_base_dir", str(tmp_path / "runs")])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1, said
    assert str(tmp_path) not in said[0]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "", "1.5", "1" + "0" * 20])
def test_a_count_must_be_a_whole_number_that_nothing_overflows(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 1 to"):
        positive(text)


@pytest.mark.parametrize(
    ("entry", "words", "told"),
    [
        ("test_read", ["--version", ""], "--version"),
        ("test_read", ["--compare", "a", "b", "--cmd", "metrics"], "exclude each other"),
        ("app", ["--host", ""], "--host is empty"),
    ],
)
def test_flags_that_say_nothing_or_two_things_are_refused(
    entry: str, words: list[str], told: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(entry).main([*words, *(["--out", str(tmp_path / "out")] if entry == "test_read" else [])])
    assert end.value.code == 2
    assert told in capsys.readouterr().err
