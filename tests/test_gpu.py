"""What only a GPU can show: the recordings and the equalities of the other tests there, in float32 and in bfloat16.

All of it is skipped on a machine without one.
"""

import contextlib
import copy
import importlib.util

import numpy as np
import pytest
import torch
from test_decoding import asked
from test_golden_model import cases, check_losses, check_masks, check_points, expand_like, inputs, load
from test_golden_sasp import sasp_cases
from test_prefix import talkative
from test_sam_attention import difference, package_encoder, pictures
from tiny import SEG, prompt, tiny_batch, tiny_read

from model import SamConfig, SaspConfig
from model.sam_attention import compile_blocks, use_fast_attention
from model.sasp import select_points

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ATTENTIONS = ["eager", "sdpa", *["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)]
ONE_HEAD_OF_VIT_H = SamConfig(image_size=1024, embed_dim=80, depth=2, num_heads=1, global_attn_indexes=(1,), window_size=14)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """By default PyTorch lets a GPU round what goes into float32 convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(batch, dtype=torch.float32):
    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to("cuda", dtype if value.is_floating_point() else None)
        return value

    return {name: moved(value) for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------ recordings


@pytest.mark.parametrize(("folder", "name", "case"), list(cases("forward_train")))
def test_recorded_losses(folder, name, case):
    arrays = np.load(folder / f"forward_train/{name}.npz")
    model = copy.deepcopy(load(folder)[0]).cuda()
    model.llava.model.language_model.config._attn_implementation = "sdpa"  # as in training, beginnings shared
    batch = inputs(folder, case["images"], arrays["input_ids"], arrays["attention_masks"], arrays["offset"])
    ids = torch.from_numpy(arrays["input_ids"])
    labels = expand_like(torch.from_numpy(arrays["labels"]), ids, model.config.num_patches, -100)
    masks = [torch.from_numpy(m).cuda() for b in range(len(case["images"])) for m in arrays[f"gt_masks{b}"]]
    out = model(**on_gpu({**batch, "labels": labels}), masks=masks)
    check_losses(out, case)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(("folder", "name", "case"), list(cases("evaluate")))
def test_recorded_answers_and_masks(folder, name, case, record):
    arrays = np.load(folder / f"evaluate/{name}.npz")
    model = copy.deepcopy(load(folder)[0]).cuda()
    ids = arrays["input_ids"]
    batch = inputs(folder, [case["image"]], ids, ids != 0, np.array([0, len(ids)]))
    asked = {"max_new_tokens": case["max_new_tokens"], "compat": "released" if "QUIRK" in name else "correct"}
    with model.recorded() if record else contextlib.nullcontext():
        for _ in range(3 if record else 1):  # as it is, while it is recorded, replayed
            out = model.generate_segments(**on_gpu(batch), **asked)
    for answer, want in zip(out.answer_ids, arrays["output_ids"][:, ids.shape[1] :].tolist(), strict=True):
        assert answer == want[: want.index(2) + 1 if 2 in want else None]
    found = out.segments
    found.points, found.point_labels, found.mask_logits = (
        [x.cpu() for x in part] for part in (found.points, found.point_labels, found.mask_logits)
    )
    check_points(found, arrays)
    check_masks(found, [arrays[k] for k in sorted(k for k in arrays.files if k.startswith("mask_logits"))])


@pytest.mark.parametrize(("folder", "case"), list(sasp_cases()))
def test_recorded_points(folder, case):
    """Those of the same map on a CPU, which are compared with the recordings elsewhere."""
    arrays = np.load(folder / "sasp/cases.npz")
    values, size = torch.from_numpy(arrays[f"{case['key']}_sm"])[None], tuple(case["shape_hw"])
    config = SaspConfig(**{name: case[name] for name in ("num_points", "t_pos", "t_neg", "down_sample")})
    here, there = select_points(values, size, config), select_points(values.cuda(), size, config)
    if not case["name"].startswith("ties_"):
        assert torch.equal(here.labels, there.labels.cpu()) and torch.equal(here.cells, there.cells.cpu())
        assert (here.points - there.points.cpu()).abs().max() <= 1e-3


# ------------------------------------------------------------------------------------------------ equalities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_recorded_steps_are_the_same_steps(dtype):
    """Every logit is the same number, over all of a growing answer."""
    model = talkative().to("cuda", dtype)
    model.llava.lm_head.weight[2] = 0
    views, questions = _views_again(dtype), on_gpu(asked(4, talkative())[1])
    plain = model.generate_answers(model.encode_images(**views), **questions, max_new_tokens=90, output_logits=True)
    with model.decoder.recorded():
        for _ in range(2):
            again = model.generate_answers(model.encode_images(**views), **questions, max_new_tokens=90, output_logits=True)
            assert all(len(answer) == 90 for answer in again.answer_ids)
            assert again.answer_ids == plain.answer_ids
            for ours, theirs in zip(again.step_logits, plain.step_logits, strict=True):
                assert torch.equal(ours, theirs)
    assert not model.decoder._keys


def _views_again(dtype):
    batch = tiny_batch([prompt(9)], [0], sizes=((40, 56),))
    names = ("clip_images", "sam_images", "sam_sizes", "original_sizes")
    return on_gpu({name: batch[name] for name in names}, dtype)


def test_points_need_no_word_from_the_gpu():
    """All expressions of a picture at once, without waiting for the device once sizes are known to it."""
    values = torch.randn(10, 576, device="cuda")
    select_points(values, (480, 640), SaspConfig())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = select_points(values + 1, (480, 640), SaspConfig())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.points.shape == (10, 30, 2)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_sam_encoder_is_the_packages(compiled):
    encoder = package_encoder(ONE_HEAD_OF_VIT_H).cuda()
    views = pictures(ONE_HEAD_OF_VIT_H).cuda()
    exact, fast = encoder(views), use_fast_attention(copy.deepcopy(encoder))
    if compiled:
        compile_blocks(fast)
    assert difference(fast(views), exact) <= 1e-4
    half, theirs = fast.bfloat16()(views.bfloat16()).float(), encoder.bfloat16()(views.bfloat16()).float()
    ours, package = ((x - exact).abs().mean() / exact.abs().mean() for x in (half, theirs))
    assert ours <= 1.5 * package + 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_ways_to_attend_agree(attention, dtype, tolerance):
    """Masks of each, forced, with and without shared beginnings, against those of float32 on the CPU."""
    if attention == "flash_attention_2" and dtype == torch.float32:
        pytest.skip("flash attention knows half precision alone")
    model = tiny_read()
    rows = [prompt(*tail, SEG, 2) for tail in ([9, 10, 11], [12], [13, 14, 15, 16])]
    batch = tiny_batch(rows, [0] * 3, sizes=((40, 56),))
    exact = model(**batch).segments
    model = model.to("cuda", dtype)
    model.llava.model.language_model.config._attn_implementation = attention
    batch = on_gpu(batch, dtype)
    questions = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "image_of_question")}
    for share in (True, False):
        found = model.segment_answers(model.encode_images(**batch), **questions, share_prefix=share)
        for ours, theirs in zip(found.similarity.float().cpu(), exact.similarity, strict=True):
            assert difference(ours, theirs) <= tolerance


def test_shared_beginnings_change_neither_loss_nor_gradients():
    model = tiny_read().cuda().train()
    rows = [prompt(*tail, SEG, 2) for tail in ([9, 10, 11], [12], [13, 14, 15, 16])]
    batch = on_gpu(tiny_batch(rows, [0] * 3, sizes=((40, 56),)))
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids < 0) | ~batch["attention_mask"], -100)
    masks = [torch.zeros(40, 56, dtype=torch.uint8, device="cuda") for _ in rows]
    for mask in masks:
        mask[5:20, 10:30] = 1
    found = []
    for share in (False, True):
        model.share_prefix = share
        model.zero_grad()
        loss = model(**batch, labels=labels, masks=masks).loss
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, gradient), (shared_loss, shared_gradient) = found
    assert abs(loss - shared_loss) <= 1e-5 * loss
    assert (gradient - shared_gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_recorded_pictures_are_the_same_pictures(dtype):
    """CLIP and SAM's encoder as they are, while they are recorded, and replayed, of one picture after another."""
    model = tiny_read().to("cuda", dtype)
    views = [on_gpu(tiny_batch([prompt(9)], [0], sizes=((40, 56),), seed=seed), dtype) for seed in range(4)]
    names = ("clip_images", "sam_images", "sam_sizes", "original_sizes")

    def looked_at(batch):
        images = model.encode_images(**{name: batch[name] for name in names})
        return images.features, model.encode_sam_image(images.sam_images)

    plain = [looked_at(batch) for batch in views]
    with model.recorded():
        found = [looked_at(batch) for batch in views]
        assert [recording is not None for recording in model.recorder._found.values()] == [True, True]
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
