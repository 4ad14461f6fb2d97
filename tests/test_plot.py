"""Curves of runs: what is drawn is what was logged, and bad input ends in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.plot import LINES, MANY, curve, draw, main, read_log, smooth


def records(steps: int, scale: float = 1.0) -> list[dict]:
    train = [
        {"kind": "train", "step": s, "loss": scale * (3 + 1 / s), "ce_loss": scale / s, "bce_loss": scale * 0.1, "lr": 1e-4}
        for s in range(1, steps + 1)
    ]
    val = [{"kind": "val", "step": s, "giou": 0.1 * s, "ciou": 0.05 * s, "images": 8} for s in (1, 2, 4)]
    return [*train, *val]


def write(folder: Path, entries: list[dict]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return folder


def test_the_axes_hold_the_records():
    runs = {"on": records(5), "off": records(4, scale=2.0)}
    losses, scores = draw(runs).axes
    lines = {line.get_label(): line for line in [*losses.lines, *scores.lines]}
    for run, entries in runs.items():
        assert {f"{run} {name}" for name in ("loss", "ce_loss", "bce_loss", "giou", "ciou")} <= set(lines)
        for kind, name, unit in (("train", "loss", 1), ("train", "ce_loss", 1), ("val", "giou", 100), ("val", "ciou", 100)):
            wanted = [(e["step"], unit * e[name]) for e in entries if e["kind"] == kind]
            np.testing.assert_allclose(lines[f"{run} {name}"].get_xydata(), wanted)
    assert len(lines) == 10, "sim_loss was not logged, lr is no loss"
    legend = [text.get_text() for text in losses.get_legend().get_texts()]
    assert legend == ["weighted sum", "answer, cross-entropy", "mask, BCE", "on", "off"]
    assert lines["on loss"].get_linestyle() != lines["off loss"].get_linestyle()


def test_many_points_are_smoothed_over_what_was_logged():
    losses = draw({"run": records(MANY)}).axes[0]
    raw, mean = losses.lines[:2]
    assert len(raw.get_xdata()) == MANY and raw.get_alpha() < 0.5
    np.testing.assert_allclose(mean.get_ydata(), smooth(raw.get_ydata()))
    values = np.arange(300.0)
    np.testing.assert_allclose(smooth(values)[3:-3], values[3:-3])
    np.testing.assert_allclose(smooth(np.array([*[1.0] * 150, np.nan, *[1.0] * 150])), 1.0)


def test_values_that_are_off_not_finite_or_zero():
    entries = [
        {"kind": "train", "step": 3, "loss": "nan", "sim_loss": None}, {"kind": "train", "step": 6, "loss": 1.0},
        {"kind": "train", "step": 6, "loss": 0.0},
    ]  # fmt: skip
    steps, values = curve(entries, "train", "loss")
    assert steps.tolist() == [3, 6] and np.isnan(values[0]) and values[1] == 0.0
    assert curve(entries, "train", "sim_loss") is None
    losses, scores = draw({"run": entries}).axes
    assert losses.get_yscale() == "linear" and not scores.lines


def test_the_command_writes_a_picture(tmp_path, capsys):
    one, two = write(tmp_path / "one", records(20)), write(tmp_path / "two", records(MANY))
    assert main([str(one)]) == 0
    with Image.open(one / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 800
    out = tmp_path / "both.png"
    main([str(one), str(two), "--out", str(out)])
    assert out.stat().st_size > 10_000 and str(out) in capsys.readouterr().out


def test_a_log_being_written_is_read_to_its_last_whole_line(tmp_path):
    run = write(tmp_path / "run", [{"kind": "other", "step": 1}, *records(2)])
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    assert read_log(run) == records(2)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "has no log.jsonl"), ("", "no record"), ('{"kind": "test", "step": 1}\n', "no record"), ("\n \n", "is empty"),
        ("{\n{}\n", "line 1 is no JSON"), ("[]\n{}\n", "line 1: must be a JSON object"), ("null\n", "line 1: must be a JSON"),
        ("[" * 100_000 + "\n{}\n", "line 1 is no usable JSON"), ("\0\0\0\n{}\n", "line 1 is no JSON"),
        *((json.dumps({"kind": "train", "step": 1, "loss": 1.0} | wrong) + "\n", f"line 1, field {field}: must be")
          for field, values in (("step", (None, "1", -1, 1.5, True, [])), ("loss", ("1", [1], {}, True, 10**400)))
          for wrong in ({field: value} for value in values)),
        ('{"kind": "val", "giou": 0.5}\n', "line 1, field step"), ('{"kind": "val", "step": 1, "giou": "a"}\n', "field giou"),
        ("<html>not found</html>", "is a web page"), ("caf\u00e9".encode("latin-1"), "line 1: is no UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=message) as error:
        main([str(tmp_path)])
    assert "\n" not in str(error.value) and error.value.code == 2 and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("inf"), 0, 1e30, None])
def test_every_value_that_training_logs_is_drawn(tmp_path, value):
    run = write(tmp_path / "run", [{"kind": "train", "step": 1, "loss": value}, {"kind": "val", "step": 1, "giou": 0.5}])
    assert main([str(run)]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "{}/x.jsonl"], "must end in one of .*.png"), (["--out", "{}"], "is a folder: --out takes"),
        (["{}"], "named twice"), (["{}/log.jsonl"], "has no log"),
        (["--out", "{}/log.jsonl/x.png"], "Not a directory|File exists"),
    ],
)  # fmt: skip
def test_odd_arguments_are_one_line(tmp_path, more, words):
    run = write(tmp_path / "run", records(2))
    with pytest.raises(SystemExit, match=words) as error:
        main([str(run), *(part.format(run) for part in more)])
    assert error.value.code == 2 and [path.name for path in run.iterdir()] == ["log.jsonl"]


def test_more_runs_than_kinds_of_line_are_refused():
    with pytest.raises(ValueError, match="told apart"):
        draw({str(i): records(2) for i in range(len(LINES) + 1)})
