"""utils.analysis: maps, prompts and sweeps against the model's own results and independent computations; the report as a page."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from tiny_training import CKPT, ROOT, needs_ckpt, write_reason_seg

from dataset import build_eval
from dataset.collate import collate
from dataset.mini.write import write_all
from dataset.types import Sample
from model import READForCausalLM, READProcessor, SamConfig, SaspConfig, llava, sasp
from model.sam import build_sam
from utils.analysis import __main__ as command
from utils.analysis import maps, probe, prompts, study, tables
from utils.analysis.page import SCRIPT
from utils.evaluate import evaluate

pytestmark = needs_ckpt
HOSTILE = '<script>alert("x")</script> & \'"></article>'


@pytest.fixture(scope="module")
def tiny() -> tuple[READForCausalLM, READProcessor]:
    """The tiny checkpoint and its processor, with a random SAM of 64 pixels in place of its own of 1024, which takes long."""
    folder, tower = CKPT / "read_tiny", CKPT / "clip_tiny"
    model = READForCausalLM.from_pretrained(folder, vision_tower=tower)
    model.config.sasp = SaspConfig(num_points=5, t_pos=0.7, t_neg=0.3, down_sample=1)
    model.config.sam = SamConfig(image_size=64, embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=2)
    torch.manual_seed(0)
    model.sam = build_sam(model.config.sam)
    processor = READProcessor.from_pretrained(folder, vision_tower=tower, sam_image_size=64)
    return model.requires_grad_(False).eval(), processor


@pytest.fixture(scope="module")
def folder(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint on disk."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny[0].save_pretrained(path, processor=tiny[1])
    torch.save(tiny[0].sam.state_dict(), path.with_name("sam.pth"))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of noise with a rectangle."""
    root = tmp_path_factory.mktemp("data")
    write_reason_seg(root, {"val": 3})
    return root


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two pictures with several expressions each."""
    root = tmp_path_factory.mktemp("mini")
    write_all(root, seed=3, train=2, val=2, test=2)
    samples = build_eval("fprefcoco", "val", root, protocol="forced")
    return [samples[0], samples[1]]


def asked(tiny: tuple, sample: Sample) -> tuple:
    """(encoded picture, ids, mask) of a sample's conversations."""
    model, processor = tiny
    batch = collate([sample], processor, training=False)
    inputs = batch.model_inputs()
    ids, mask, _ = (inputs.pop(name) for name in ("input_ids", "attention_mask", "image_of_question"))
    return model.encode_images(**inputs), ids, mask


def studied(tiny: tuple, samples, **options) -> study.Study:
    """A study of samples under the name `part`."""
    return study.run(*tiny, [("part", samples)], study.Options(**options))


def seen_in(tiny: tuple, sample: Sample, **options) -> probe.Seen:
    layers = options.pop("layers", ())
    with torch.no_grad(), probe.watch(tiny[0], layers) as tape:
        return probe.look(tiny[0], tape, *asked(tiny, sample), **options)


# ------------------------------------------------------------------------------------------------ hooks and maps


@pytest.mark.parametrize("count", [1, 4], ids=["alone", "sharing the picture"])
def test_the_maps_are_those_of_the_states_that_transformers_gives(tiny: tuple, several: list[Sample], count: int) -> None:
    """The map after the language model is `Segments.similarity` to the bit; every layer is that of `hidden_states`."""
    model, _ = tiny
    sample = dataclasses.replace(several[0], conversations=several[0].conversations[:count], masks=several[0].masks[:count])
    blocks = model.config.llava.text_config.num_hidden_layers
    seen = seen_in(tiny, sample, layers=range(blocks + 1))
    assert len(seen.segments) == count and torch.equal(seen.llava, seen.segments.similarity)

    images, ids, mask = asked(tiny, sample)
    embedded = llava.embed_inputs(model.llava, ids, images.features, torch.zeros(count, dtype=torch.long))
    with torch.no_grad():
        hidden = model.llava.model.language_model(
            inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True
        ).hidden_states
    question, position = llava.seg_positions(ids, model.config.seg_token_id)
    for layer, states in enumerate(hidden):
        image = llava.image_states(states, ids, question)
        for kind, seg in (("same", states), ("last", hidden[-1])):
            wanted = (image * seg[question, position][:, None]).sum(-1)
            torch.testing.assert_close(seen.layers[kind, layer], wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(seen.clip, seen.layers["last", 0], atol=2e-4, rtol=1e-4)  # the input of the language model


def test_the_map_in_sam_is_that_of_its_last_token(tiny: tuple, data: Path) -> None:
    """[SEG] is the last token of SAM's decoder, the released code drew the one before; tokens and image after the transformer."""
    model, _ = tiny
    sample = build_eval("ReasonSeg", "val", data)[0]
    caught = []
    handle = model.sam.mask_decoder.transformer.register_forward_hook(lambda module, args, out: caught.append((args, out)))
    try:
        seen = seen_in(tiny, sample)
        released = seen_in(tiny, sample, sam_token="released")
    finally:
        handle.remove()
    (_, _, tokens), (after, image) = caught[0]
    assert torch.equal(tokens[:, -1], seen.texts), "what goes in last is the projected [SEG]"
    side = model.config.sam.grid_size
    torch.testing.assert_close(seen.sam, torch.einsum("mpc,mc->mp", image, after[:, -1]).view(1, side, side))
    torch.testing.assert_close(released.sam, torch.einsum("mpc,mc->mp", image, after[:, -2]).view(1, side, side))


def test_hooks_change_nothing_and_go(tiny: tuple, several: list[Sample]) -> None:
    """Under the hooks the model's result is the same to the bit; afterwards no hook is left, after an error neither."""
    model, _ = tiny
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    before = [len(getattr(module, name)) for module in model.modules() for name in hooks]
    images, ids, mask = asked(tiny, several[0])
    plain = model.segment_answers(images, ids, mask, torch.zeros(len(ids), dtype=torch.long))
    seen = seen_in(tiny, several[0], layers=(0, 1, 2))
    for field in dataclasses.fields(plain):
        one, other = getattr(plain, field.name), getattr(seen.segments, field.name)
        assert all(map(torch.equal, one, other)) if isinstance(one, list) else torch.equal(one, other), field.name
    with pytest.raises(RuntimeError, match="in between"), probe.watch(model, (0,)):
        raise RuntimeError("in between")
    with pytest.raises(ValueError, match="no layer 99"), probe.watch(model, (0, 99)):
        pass
    assert [len(getattr(module, name)) for module in model.modules() for name in hooks] == before


def test_a_map_lies_where_its_tokens_are() -> None:
    """Token maps as SasP lays them; SAM's map keeps its padding out, and its cells where they are."""
    grid = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for size in ((90, 60), (60, 100), (48, 48)):
        found = maps.token_map(grid, size, 84)
        wanted = sasp.similarity_map(grid.flatten()[None], size, clip_image_size=84, geometry="exact")[0]
        np.testing.assert_allclose(found.heat, wanted.numpy(), atol=1e-6)
        assert found.seen.mean() == pytest.approx(min(size) / max(size), abs=0.02) and not found.heat[~found.seen].any()
    square = torch.full((8, 8), 50.0)  # what the decoder makes of the padding is greater than all of the picture
    square[:4] = torch.arange(32.0).view(4, 8) / 10
    found = maps.decoder_map(square, 64, (32, 64), (100, 200))
    assert found.seen.all() and found.heat.min() == 0 and found.heat.max() == pytest.approx(1)
    assert np.unravel_index(found.heat.argmax(), (100, 200)) >= (87, 187), "the last cell that shows the picture"
    assert (np.diff(found.heat.mean(axis=0)) >= -1e-6).all() and (np.diff(found.heat.mean(axis=1)) >= -1e-6).all()
    for flat in (torch.zeros(6, 6), torch.full((6, 6), math.nan), grid.clone().index_fill_(0, torch.tensor([2]), math.inf)):
        assert not maps.token_map(flat, (60, 60), 84).heat.any()


def test_s_iou_by_hand() -> None:
    """Intersection and union at each threshold, ignored pixels left out, by plain loops; the peak; agreement."""
    rng = np.random.default_rng(1)
    heat = rng.random((13, 17)).astype(np.float32)
    heat[0, :3] = 0.5, 0.25, 1.0  # on a threshold is in
    target = rng.choice(np.array([0, 1, 255], np.uint8), (13, 17))
    target[0, 2] = 1
    found = maps.overlaps(heat, target)
    for level, (intersection, union) in zip(maps.LEVELS, found, strict=True):
        both = either = 0
        for value, true in zip(heat.flat, target.flat, strict=True):
            if true != 255:
                both += value >= np.float32(level) and true == 1
                either += value >= np.float32(level) or true == 1
        assert (intersection, union) == (both, either), level
    np.testing.assert_allclose(maps.s_iou(found), found[:, 0] / (found[:, 1] + 1e-5))
    seen = maps.PictureMap(heat, np.ones_like(heat, bool))
    assert maps.peak_on_object(seen, target)
    assert not maps.peak_on_object(seen, np.where(target == 1, 0, target))
    assert not maps.peak_on_object(maps.PictureMap(0 * heat, seen.seen), target)
    other = maps.PictureMap(rng.random(heat.shape).astype(np.float32), seen.seen & (np.arange(17) < 9))
    r, iou = maps.agreement(seen, other, target)
    common = other.seen & (target != 255)
    x, y = heat[common], other.heat[common]
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert iou == pytest.approx(((x >= 0.5) & (y >= 0.5)).sum() / ((x >= 0.5) | (y >= 0.5)).sum(), abs=1e-4)
    assert maps.agreement(seen, seen, target) == (pytest.approx(1), pytest.approx(1, abs=1e-4))


# ------------------------------------------------------------------------------------------------ prompts


def test_both_is_the_models_own_mask_and_embedding_is_sasp_off(tiny: tuple, several: list[Sample]) -> None:
    """SAM prompted anew with what the model prompts it with draws what the model drew, to the bit, with SasP on and off."""
    model, _ = tiny
    images, ids, mask = asked(tiny, several[0])
    nobody = torch.zeros(len(ids), dtype=torch.long)
    with torch.no_grad(), probe.watch(model) as tape:
        seen = probe.look(model, tape, images, ids, mask)
        size = images.original_sizes[0]
        view = prompts.View(images.sam_embeddings[0], images.sam_sizes[0], size)
        points = prompts.choose(model, seen.llava, size, model.config.sasp)
        texts = seen.texts[:, None]
        both, alone, no_text = (
            prompts.draw(model, view, *prompt) for prompt in ((texts, points), (texts, None), (texts[:, :0], points))
        )
    assert all(map(torch.equal, both, seen.segments.mask_logits))
    assert all(map(torch.equal, points.points, seen.segments.points))
    assert not torch.equal(both, no_text)
    values = model.config.sasp
    model.config.sasp = dataclasses.replace(values, enabled=False)
    try:
        off = model.segment_answers(images, ids, mask, nobody)
    finally:
        model.config.sasp = values
    assert all(map(torch.equal, alone, off.mask_logits))


def test_untouched_sam_does_what_its_package_does(tiny: tuple, data: Path, tmp_path: Path) -> None:
    """The same points in `SamPredictor`, the best of three masks; a file that is no SAM is refused."""
    torch.save(tiny[0].sam.state_dict(), tmp_path / "sam.pth")
    untouched = prompts.Untouched.load(tmp_path / "sam.pth", torch.device("cpu"))
    image = build_eval("ReasonSeg", "val", data)[0].image
    points = torch.tensor([[[20.0, 11.0], [40.5, 30.25], [3.0, 40.0]]])
    found = sasp.PointPrompts(points, torch.tensor([[1, 0, -1]]), points.long())
    drawn = untouched.draw(untouched.view(image), found)[0] > 0
    predictor = SamPredictor(untouched.parts)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(points[0].numpy(), np.array([1, 0, -1]), multimask_output=True)
    assert 0 < drawn.float().mean() < 1
    assert (drawn.numpy() != masks[scores.argmax()]).mean() < 0.01
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no SAM weights"):
        prompts.Untouched.load(tmp_path / "other.pth", torch.device("cpu"))


def test_a_sweep_meets_the_models_own_scores(tiny: tuple, several: list[Sample]) -> None:
    """At the checkpoint's values every axis gives the model's own pixels; `utils.evaluate` finds the same gIoU and cIoU."""
    few = [
        dataclasses.replace(sample, conversations=sample.conversations[:3], masks=sample.masks[:3]) for sample in several
    ]
    found = studied(tiny, few, sweep=True)
    scores = evaluate(*tiny, few, progress=False)
    summary = tables.summary_of(found, "part")
    for name in ("giou", "ciou"):
        assert summary["masks"]["both"][name] == pytest.approx(scores[name], abs=1e-12)
    axes = {setting.axis for setting in found.sweep if setting.own}
    assert axes == set(prompts.AXES)
    for n, setting in enumerate(found.sweep):
        if setting.axis != "recipe":
            assert setting.sasp == dataclasses.replace(tiny[0].config.sasp, **{setting.axis: setting.value})
        if setting.own:
            for row in found.rows:
                for prompt in study.SWEPT:
                    assert row.sweep[prompt][n] == (row.masks[prompt].intersection, row.masks[prompt].union)
    table = tables.sweep_table(found, "part")
    own = [row for row in table if row["own"]]
    assert own and all(row["ciou_difference"] == 0 and row["giou_interval"] == (0, 0) for row in own)
    differs = [row for row in table if row["axis"] == "num_points" and row["prompt"] == "points"]
    assert len({row["ciou"] for row in differs}) > 1, "other points, other masks"
    marked = {(s.axis, s.value): s.paper for s in found.sweep}
    assert marked["num_points", 30] == ("READ-7B",) and marked["num_points", 60] == ("READ-13B",)
    assert marked["t_neg", 0.2] == ("READ-7B", "READ-13B") and marked["recipe", "READ-7B"] == ("READ-7B",)


def test_a_model_without_points_has_the_embedding_as_its_own(tiny: tuple, data: Path) -> None:
    """SESAME's path: the own mask is that of [SEG]; points are tried all the same."""
    model, processor = tiny
    values = model.config.sasp
    model.config.sasp = dataclasses.replace(values, enabled=False)
    try:
        samples = build_eval("ReasonSeg", "val", data)
        off = studied(tiny, samples)
        scores = evaluate(model, processor, samples, progress=False)
    finally:
        model.config.sasp = values
    on = studied(tiny, samples)
    assert tables.summary_of(off, "part")["masks"]["embedding"]["ciou"] == pytest.approx(scores["ciou"], abs=1e-12)
    for one, other in zip(off.rows, on.rows, strict=True):
        assert (one.own, other.own) == ("embedding", "both")
        assert one.masks == other.masks and np.array_equal(one.levels["llava"], other.levels["llava"])
        assert not np.array_equal(one.levels["sam"], other.levels["sam"]), "the decoder saw no points"


def test_generated_answers_are_those_of_the_evaluation(
    tiny: tuple, several: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[SEG] is the model's own: same answers, same masks; an answer without [SEG] has no map and an empty mask."""
    free = [
        dataclasses.replace(sample, conversations=[[(turns[0][0], None)] for turns in sample.conversations])
        for sample in several
    ]
    monkeypatch.setattr(prompts, "AXES", {"num_points": (2,)})
    found = studied(tiny, free, protocol="generate", max_new_tokens=12, layers=None, sweep=True, chunk=5)
    evaluate(
        *tiny, free, protocol="generate", max_new_tokens=12, predictions_path=tmp_path / "p.jsonl", progress=False
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(found.rows) and {record["num_seg"] > 0 for record in records} == {True, False}
    for row, record in zip(found.rows, records, strict=True):
        assert (row.answer, row.num_seg) == (record["answer"], record["num_seg"])
        assert row.masks["both"].iou == pytest.approx(record["iou"], abs=0.01)
        if not row.num_seg:
            assert not row.measured and math.isnan(row.s_iou("llava")) and not row.agreement
            assert all(pixels.intersection == 0 for pixels in (*row.masks.values(), *row.sweep["both"]))
    summary = tables.summary_of(found, "part")
    assert summary["without_seg"] == sum(record["num_seg"] == 0 for record in records)
    # One at a time, with what a longer neighbour padded it with: the same maps, hence points, hence masks.
    alone = studied(tiny, free, protocol="generate", max_new_tokens=12, layers=None, sweep=False, chunk=1)
    for row, other in zip(found.rows, alone.rows, strict=True):
        for name, pixels in row.masks.items():
            assert other.masks[name].union == pytest.approx(pixels.union, abs=5), name


# ------------------------------------------------------------------------------------------------ the report


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and whether tags close in order."""

    VOID = {"meta", "img", "input", "source", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


def line(folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    """A command line."""
    return ["--version", str(folder), "--dataset_dir", str(data), "--out", str(out), *more]


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, sheet) of two models side by side on three pictures, the first with a hostile question; cards of two."""
    root = tmp_path_factory.mktemp("hostile")
    write_reason_seg(root, {"val": 3})
    file = root / "reason_seg/ReasonSeg/val/0.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(record | {"text": [HOSTILE], "is_sentence": True}), encoding="utf-8")
    out, sheet = root / "report", root / "sheet.png"
    more = ("--layers", "all", "--sweep", "--cards", "2", "--figure", str(sheet), "--sam", str(folder.with_name("sam.pth")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prompts.AXES, "num_points", (1, 30))  # all would take longer and show no more
        patch.setitem(prompts.AXES, "t_pos", (0.8,))
        patch.setitem(prompts.AXES, "t_neg", (0.2,))
        assert command.main([*line(folder, root, out, *more), "--version", str(folder), f"{folder}:no-sasp"]) == 0
    return out, sheet


def test_the_page_holds_every_card_and_nothing_hostile(report: tuple[Path, Path]) -> None:
    """It parses; every expression has its card or row, every picture its file, words and lazy loading; text stays text."""
    out, _ = report
    text = (out / "index.html").read_text(encoding="utf-8")
    found = Page(text)
    cards = [attrs for attrs in found.all("article") if attrs.get("class") == "card"]
    assert [card["id"] for card in cards] == ["e1", "e2"]
    assert len([attrs for attrs in found.all("tr") if "data-scores" in attrs]) == 3
    pictures = found.all("img")
    names = ("truth", "clip", "llava", "sam", "dots", "points", "untouched", "embedding", "both", "layers")
    for n in range(2):
        for name in names:
            whose = "" if name == "truth" else "_1"
            assert any(attrs["src"].endswith(f"{n:05d}_00{whose}_{name}.jpg") for attrs in pictures), name
    for attrs in pictures:
        assert attrs["alt"] and attrs["loading"] == "lazy" and (out / attrs["src"]).is_file(), attrs
        assert int(attrs["width"]) > 0 and not attrs["src"].startswith(("/", "http"))
    for attrs in found.all("source"):
        assert (out / attrs["srcset"]).is_file()
    assert HOSTILE in found.text and HOSTILE not in text
    assert any(HOSTILE in attrs["alt"] for attrs in pictures)
    assert len(found.all("script")) == 1, "the page's own"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    (policy,) = (attrs["content"] for attrs in found.all("meta") if "http-equiv" in attrs)
    assert f"script-src 'sha256-{digest}'" in policy
    for attrs in (*cards, *(attrs for attrs in found.all("tr") if "data-scores" in attrs)):
        scores = json.loads(attrs["data-scores"])
        assert {"m0-both", "m0-llava", "m1-embedding", "m1-sam"} <= set(scores)
    options = {attrs["value"] for attrs in found.all("option")}
    heads = {attrs["data-key"] for attrs in found.all("th") if attrs.get("data-key")}
    assert heads < options and "m1-points" in heads


def test_the_tables_hold_what_was_measured(report: tuple[Path, Path]) -> None:
    """A row an expression and model; both models drew the same masks, since they are one checkpoint."""
    out, sheet = report
    rows = list(csv.DictReader((out / "expressions.csv").open(encoding="utf-8")))
    assert [row["model"] for row in rows] == ["tiny"] * 3 + ["tiny:no-sasp"] * 3
    assert rows[0]["question"] == HOSTILE
    for one, other in zip(rows[:3], rows[3:], strict=True):
        assert all(one[f"iou_{prompt}"] == other[f"iou_{prompt}"] for prompt in study.PROMPTS)
        assert one["s_iou_clip"] == other["s_iou_clip"]
        assert 0 <= float(one["s_iou_llava"]) <= 1 and one["peak_llava"] in "01"
    for name in ("summary", "thresholds", "layers", "sweep"):
        assert {row["model"] for row in csv.DictReader((out / f"{name}.csv").open(encoding="utf-8"))} == {"tiny", "tiny:no-sasp"}
    thresholds = [row for row in csv.DictReader((out / "thresholds.csv").open(encoding="utf-8")) if row["model"] == "tiny"]
    (half,) = [row for row in thresholds if row["map"] == "llava" and float(row["t"]) == 0.5]
    assert float(half["s_iou"]) == pytest.approx(np.mean([float(row["s_iou_llava"]) for row in rows[:3]]), abs=1e-5)
    from PIL import Image

    with Image.open(sheet) as picture:
        assert picture.width > 500 and picture.getcolors(256) is not None
    record = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert record["models"]["tiny:no-sasp"]["sasp"]["enabled"] is False and record["protocol"] == "forced"


def test_one_report_replaces_another_but_nothing_else(folder: Path, data: Path, tmp_path: Path) -> None:
    """A second run leaves no image of the first and keeps what the user put there; another folder is left alone."""
    out = tmp_path / "out"
    assert command.main(line(folder, data, out, "--limit", "2")) == 0
    assert len(list((out / "pictures").glob("ReasonSeg-val_*.jpg"))) == 2 * 8
    mine = ("mine.png", "layers_mine.png", "notes.md", "pictures/mine.jpg", "pictures/mine/ReasonSeg.jpg")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name, encoding="utf-8")
    assert command.main(line(folder, data, out, "--limit", "1")) == 0
    assert len(list((out / "pictures").glob("ReasonSeg-val_*.jpg"))) == 8 and not (out / "sweep.csv").exists()
    assert all((out / name).read_text(encoding="utf-8") == name for name in mine)
    with pytest.raises(SystemExit, match="nowhere"):
        command.main(line(folder, data, out, "--limit", "1", "--version", str(tmp_path / "nowhere")))
    assert len(list((out / "pictures").glob("ReasonSeg-val_*.jpg"))) == 8, "a report that fails replaces none"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit, match="did not write"):
        command.main(line(folder, data, tmp_path / "mine"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--version", "x:nonsense"), "no preset 'nonsense'"),
        (("--data", "ReasonSeg"), "NAME|SPLIT"),
        (("--layers", "first"), "--layers takes numbers or all"),
        (("--sam", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--layers", "77"), "no layer 77"),
    ],
)
def test_errors_are_one_line(folder: Path, data: Path, tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    """What the user can mend is named."""
    with pytest.raises(SystemExit, match=re.escape(words)) as stopped:
        command.main(line(folder, data, tmp_path / "out", *more))
    assert "\n" not in str(stopped.value)


def test_help_is_quick() -> None:
    """It imports neither torch nor matplotlib."""
    code = "import sys; import utils.analysis.__main__ as m; m.build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "utils.analysis.__main__" in loaded and not loaded & {"torch", "numpy", "matplotlib", "transformers"}
