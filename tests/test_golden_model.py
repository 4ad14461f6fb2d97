"""The whole model against the recordings of the original: losses, gradients, forced masks, generated answers and masks.

Driven by the files a golden folder holds. The recordings count `<image>` as one slot (-200); ours expands it, hence
`expand`. QUIRK cases are compared with the fixed behaviour where the recording carries it, else reproduced by
`compat="released"`.
"""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs

from model import READForCausalLM, READProcessor, add_lora, merge_lora, set_trainable
from utils.conversation import IMAGE_TOKEN_INDEX
from utils.image import read_image


@lru_cache
def load(folder):
    ckpt = folder / "ckpt"
    model = READForCausalLM.from_pretrained(
        ckpt / "read_tiny", vision_tower=ckpt / "clip_tiny", attn_implementation="eager"
    )
    return model, READProcessor.from_pretrained(ckpt / "read_tiny", vision_tower=ckpt / "clip_tiny")


def expand(ids, patches, fill=IMAGE_TOKEN_INDEX):
    """(N, L) with one image slot a row -> (N, L + P - 1); `fill` tells what the slot becomes."""
    rows = []
    for row, slots in zip(ids.tolist(), fill_of(ids), strict=True):
        out = []
        for value, is_slot in zip(row, slots, strict=True):
            out += [fill if fill is not None else value] * patches if is_slot else [value]
        rows.append(out)
    return torch.tensor(rows)


def fill_of(ids):
    return (ids == IMAGE_TOKEN_INDEX).tolist()


def expand_like(values, ids, patches, fill):
    rows = []
    for row, slots in zip(values.tolist(), fill_of(ids), strict=True):
        out = []
        for value, is_slot in zip(row, slots, strict=True):
            out += [fill] * patches if is_slot else [value]
        rows.append(out)
    return torch.tensor(rows)


def inputs(folder, images, input_ids, attention, offset):
    """Keyword arguments of `forward` from recorded ids and the golden pictures."""
    model, processor = load(folder)
    views = [processor.views(read_image(folder / "images" / f"{name}.png")) for name in images]
    ids = torch.from_numpy(input_ids)
    patches = model.config.num_patches
    counts = np.diff(offset)
    return {
        "clip_images": torch.stack([v.clip for v in views]),
        "sam_images": torch.stack([v.sam for v in views]),
        "sam_sizes": [v.sam_size for v in views],
        "original_sizes": [v.original_size for v in views],
        "input_ids": expand(ids, patches),
        "attention_mask": expand_like(torch.from_numpy(attention), ids, patches, True),
        "image_of_question": torch.repeat_interleave(torch.arange(len(images)), torch.from_numpy(counts)),
    }


def cases(part):
    for folder in golden_dirs():
        file = folder / part / "cases.json"
        if not file.is_file() or not (folder / "ckpt/read_tiny/config.json").is_file():
            continue
        table = json.loads(file.read_text())
        table = table.get("cases", table)
        for name, case in table.items():
            if (folder / part / f"{name}.npz").is_file():
                yield pytest.param(folder, name, case, id=f"{folder.name}-{name}")


def check_points(segments, arrays, rows=None):
    for m in range(len(segments)):
        if f"sasp{m}_points" not in arrays:
            continue
        assert torch.equal(segments.point_labels[m], torch.from_numpy(arrays[f"sasp{m}_labels"]))
        assert (segments.points[m] - torch.from_numpy(arrays[f"sasp{m}_points"])).abs().max() <= 3e-4


def check_losses(out, case):
    expected, weights = case.get("losses_if_image_size_indexing_is_fixed", case["losses"]), case["loss_weights"]
    ours = {
        "loss": out.loss,
        "ce_loss": weights["ce"] * out.ce_loss,
        "mask_bce_loss": weights["bce"] * out.bce_loss,
        "mask_dice_loss": weights["dice"] * out.dice_loss,
    }
    for key, value in ours.items():
        assert value.item() == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def check_masks(segments, expected, first=0):
    for m, want in enumerate(expected, start=first):
        ours, want = segments.mask_logits[m], torch.from_numpy(want)
        assert (ours - want).abs().max() <= 2e-3
        assert ((ours > 0) == (want > 0)).float().mean() >= 0.9999


@pytest.mark.parametrize(("folder", "name", "case"), list(cases("forward_train")))
def test_training_losses_masks_and_gradients(folder, name, case):
    arrays = np.load(folder / f"forward_train/{name}.npz")
    model, _ = load(folder)
    set_trainable(model)
    model.zero_grad()
    batch = inputs(folder, case["images"], arrays["input_ids"], arrays["attention_masks"], arrays["offset"])
    ids = torch.from_numpy(arrays["input_ids"])
    labels = expand_like(torch.from_numpy(arrays["labels"]), ids, model.config.num_patches, -100)
    masks = [torch.from_numpy(m) for b in range(len(case["images"])) for m in arrays[f"gt_masks{b}"]]
    out = model(**batch, labels=labels, masks=masks)

    quirk = "losses_if_image_size_indexing_is_fixed" in case
    check_losses(out, case)
    if not quirk:  # the recorded points and gradients are those of the wrong picture's size there
        check_points(out.segments, arrays)
        recorded = [m for b in range(len(case["images"])) for m in arrays[f"pred_mask_logits{b}"]]
        check_masks(out.segments, recorded)
    out.loss.backward()
    if not quirk:
        check_gradients(model, arrays, case.get("grad_norms", {}))


RELEASED_NAMES = (
    ("model.visual_model.", "sam."),
    ("model.text_hidden_fcs.", "text_hidden_fcs."),
    ("model.mm_projector.0.", "llava.model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "llava.model.multi_modal_projector.linear_2."),
    ("lm_head.", "llava.lm_head."),
    ("model.", "llava.model.language_model."),
)


def our_name(key):
    key = key.removeprefix("base_model.model.")
    return next(ours + key.removeprefix(theirs) for theirs, ours in RELEASED_NAMES if key.startswith(theirs))


def check_gradients(model, arrays, norms):
    parameters = dict(model.named_parameters())
    compared = 0
    for key, norm in norms.items():
        parameter = parameters.get(our_name(key))
        if parameter is not None and parameter.requires_grad:
            grad = parameter.grad.norm().item() if parameter.grad is not None else 0.0
            assert grad == pytest.approx(norm, rel=1e-3, abs=1e-5), key
            compared += 1
    for key in arrays.files:
        if key.startswith("grad::"):
            parameter = parameters.get(our_name(key.removeprefix("grad::")))
            if parameter is not None and parameter.requires_grad:
                recorded = torch.from_numpy(arrays[key])
                grad = parameter.grad
                if grad.shape != recorded.shape:  # a strided slice of a large one
                    continue
                assert (grad - recorded).abs().max() <= 1e-3 * recorded.abs().max() + 1e-12, key
                compared += 1
    assert compared or not norms


@pytest.mark.parametrize("folder", [f for f in golden_dirs() if (f / "forward_train/lora.npz").is_file()])
def test_lora_losses_gradients_trainables_and_merge(folder):
    arrays = np.load(folder / "forward_train/lora.npz")
    table = json.loads((folder / "forward_train/lora.json").read_text())
    case = json.loads((folder / "forward_train/cases.json").read_text())["main"]
    main = np.load(folder / "forward_train/main.npz")
    ckpt = folder / "ckpt"
    model = READForCausalLM.from_pretrained(ckpt / "read_tiny", vision_tower=ckpt / "clip_tiny")
    add_lora(model, r=8, alpha=16, dropout=0.0)
    set_trainable(model)
    parameters = dict(model.named_parameters())
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    assert trainable == {our_name(key) for key in table["trainable"]}
    with torch.no_grad():
        for key in arrays.files:
            if key.startswith("lora::"):
                parameters[our_name(key.removeprefix("lora::"))].copy_(torch.from_numpy(arrays[key]))
    batch = inputs(folder, case["images"], main["input_ids"], main["attention_masks"], main["offset"])
    ids = torch.from_numpy(main["input_ids"])
    labels = expand_like(torch.from_numpy(main["labels"]), ids, model.config.num_patches, -100)
    masks = [torch.from_numpy(m) for b in range(len(case["images"])) for m in main[f"gt_masks{b}"]]
    out = model(**batch, labels=labels, masks=masks)
    assert out.loss.item() == pytest.approx(table["losses"]["loss"], rel=1e-4)
    out.loss.backward()
    for key in arrays.files:
        if key.startswith("grad::"):
            recorded = torch.from_numpy(arrays[key])
            grad = parameters[our_name(key.removeprefix("grad::"))].grad
            torch.testing.assert_close(grad, recorded, rtol=1e-2, atol=1e-3 * recorded.abs().max().item())
    merge_lora(model)
    merged = dict(model.named_parameters())
    for key in arrays.files:
        if key.startswith("merged::"):
            ours = merged[our_name(key.removeprefix("merged::"))]
            assert (ours - torch.from_numpy(arrays[key])).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(model)


@pytest.mark.parametrize(("folder", "name", "case"), list(cases("forward_infer")))
@torch.no_grad()
def test_forced_masks(folder, name, case):
    arrays = np.load(folder / f"forward_infer/{name}.npz")
    model, _ = load(folder)
    batch = inputs(folder, [case["image"]], arrays["input_ids"], arrays["attention_masks"], arrays["offset"])
    left = case.get("padding") == "left"
    out = model(**batch, compat="released" if left else "correct")
    found = [out.segments]
    if not left:  # the same, the prefix of each picture's prompts passed through the language model once
        asked = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "image_of_question")}
        found.append(model.segment_answers(model.encode_images(**batch), **asked))
    for segments in found:
        assert len(segments) == len(arrays["pred_masks"])
        check_points(segments, arrays)
        check_masks(segments, arrays["pred_masks"])


@pytest.mark.parametrize(("folder", "name", "case"), list(cases("evaluate")))
def test_generated_answers_and_masks(folder, name, case):
    arrays = np.load(folder / f"evaluate/{name}.npz")
    model, processor = load(folder)
    ids = arrays["input_ids"]
    count = len(ids)
    batch = inputs(folder, [case["image"]], ids, ids != 0, np.array([0, count]))
    released = "QUIRK" in name
    out = model.generate_segments(
        **batch, max_new_tokens=case["max_new_tokens"], compat="released" if released else "correct", output_logits=True
    )
    recorded = arrays["output_ids"][:, ids.shape[1] :]
    for answer, want in zip(out.answer_ids, recorded.tolist(), strict=True):
        end = want.index(2) + 1 if 2 in want else len(want)
        assert answer == want[:end]
    for step, logits in enumerate(out.step_logits):
        values = torch.from_numpy(arrays["step_top5_values"][step])
        assert (logits.topk(5).values - values).abs().max() <= 1e-3
    for row, present in enumerate(case["object_presence"]):
        found = out.segments.of_question(row)
        assert bool(found) == present
        mask = torch.from_numpy(arrays[f"mask{row}"])
        ours = (out.segments.mask_logits[found[0]] > 0).int() if found else torch.zeros_like(mask)
        assert (ours == mask).float().mean() >= 0.9999
    check_points(out.segments, arrays)
    check_masks(out.segments, [arrays[k] for k in sorted(k for k in arrays.files if k.startswith("mask_logits"))])


@pytest.mark.parametrize(
    ("folder", "name", "case"), [p for p in cases("evaluate") if "QUIRK" in p.id and "left_padded" in p.id]
)
def test_left_padding_changes_nothing_when_correct(folder, name, case):
    """Rows padded on the left answer as they do alone (the original masks image tokens instead, protocol §8-25)."""
    arrays = np.load(folder / f"evaluate/{name}.npz")
    model, _ = load(folder)
    ids = arrays["input_ids"]
    together = model.generate_segments(
        **inputs(folder, [case["image"]], ids, ids != 0, np.array([0, len(ids)])), max_new_tokens=20
    )
    for row in range(len(ids)):
        bare = ids[row][ids[row] != 0][None]
        alone = model.generate_segments(
            **inputs(folder, [case["image"]], bare, bare != 0, np.array([0, 1])), max_new_tokens=20
        )
        assert alone.answer_ids[0] == together.answer_ids[row]
        for m, found in enumerate(together.segments.of_question(row)):
            difference = together.segments.mask_logits[found] - alone.segments.mask_logits[m]
            assert difference.abs().max() <= 2e-3
