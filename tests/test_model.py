"""READForCausalLM on tiny random weights: which state is [SEG]'s, any number of [SEG], what trains, SasP off."""

import pytest
import torch
from segment_anything.modeling import Sam
from tiny import EOS, SEG, prompt, rectangle, tiny_batch, tiny_read

from model import LossConfig, SaspConfig, add_lora, set_trainable
from model.llava import image_states, seg_positions
from model.sam import decode_masks
from utils.conversation import IMAGE_TOKEN_INDEX


def test_the_seg_state_is_that_of_the_token_before():
    """Every published weight depends on it: the original built its mask from input_ids[:, 1:] (protocol §1)."""
    ids = torch.tensor([[1, 5, SEG, 9, SEG], [1, 5, 6, 7, 8]])
    question, position = seg_positions(ids, SEG)
    assert question.tolist() == [0, 0] and position.tolist() == [1, 3]


def test_image_states_are_those_of_the_slots():
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 5], [1, 4, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX]])
    hidden = torch.arange(8.0).view(2, 4, 1)
    assert image_states(hidden, ids, torch.tensor([1, 0]))[..., 0].tolist() == [[6, 7], [1, 2]]
    assert image_states(hidden, ids, torch.tensor([1]), released_rows=True)[..., 0].tolist() == [[5, 6]]


@torch.no_grad()
def test_none_one_many_seg_in_one_batch_equal_each_alone():
    """Rows with none, one and two [SEG] about two pictures: each mask is what the row gives alone (§8-3, §8-4)."""
    model = tiny_read()
    rows = [prompt(9, 10), prompt(11, SEG, 12), prompt(13, SEG, 14, 15, SEG, EOS), prompt(16, 17, 18, SEG)]
    images = [0, 0, 1, 1]
    together = model(**tiny_batch(rows, images)).segments
    assert together.question.tolist() == [1, 2, 2, 3]
    assert together.image.tolist() == [0, 1, 1, 1]
    assert [len(together.of_question(n)) for n in range(4)] == [0, 1, 2, 1]
    for n, row in enumerate(rows):
        alone = model(**tiny_batch([row], [images[n]])).segments
        for k, m in enumerate(together.of_question(n)):
            torch.testing.assert_close(together.mask_logits[m], alone.mask_logits[k], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together.points[m], alone.points[k], atol=1e-3, rtol=0)
            assert together.mask_logits[m].shape == ((40, 56), (48, 48))[images[n]]


@torch.no_grad()
def test_generation_gathers_the_states_that_forcing_gives():
    """Masks of a generated answer equal those of the same answer forced: the states gathered with the cache are right."""
    model = tiny_read(seed=3)
    with torch.no_grad():  # a head that always says [SEG], now and then something else
        model.llava.lm_head.weight.zero_()
        model.llava.lm_head.weight[SEG] = model.llava.lm_head.weight[SEG] + 0.02
    rows = [prompt(9, 10, 11), prompt(12, 13)]
    batch = tiny_batch(rows)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(1), mask[1].roll(1)  # pad on the left
    out = model.generate_segments(**{**batch, "input_ids": ids, "attention_mask": mask}, max_new_tokens=3)
    assert any(SEG in answer for answer in out.answer_ids)
    for n, answer in enumerate(out.answer_ids):
        forced = model(**tiny_batch([rows[n] + answer], [n])).segments
        found = out.segments.of_question(n)
        assert len(found) == len(forced) == answer.count(SEG)
        for k, m in enumerate(found):
            torch.testing.assert_close(out.segments.mask_logits[m], forced.mask_logits[k], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_force_segment_gives_the_mask_of_a_seg_at_the_end():
    model = tiny_read(seed=1)
    model.llava.lm_head.weight.zero_()
    model.llava.lm_head.weight[20] += 0.02
    row = prompt(9, 10, 11)
    plain = model.generate_segments(**tiny_batch([row], [0]), max_new_tokens=2)
    assert len(plain.segments) == 0 and plain.forced == [False]
    forced = model.generate_segments(**tiny_batch([row], [0]), max_new_tokens=2, force_segment=True)
    assert forced.forced == [True] and len(forced.segments) == 1
    text = row + [i for i in forced.answer_ids[0] if i != EOS]
    expected = model(**tiny_batch([[*text[:-1], SEG]], [0])).segments
    torch.testing.assert_close(forced.segments.mask_logits[0], expected.mask_logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sasp_off_is_the_text_token_alone():
    """SESAME's path: SAM is prompted with the projected [SEG] state and nothing else, no padding point (§4-8)."""
    model = tiny_read(sasp=SaspConfig(enabled=False))
    batch = tiny_batch([prompt(11, SEG)], [0])
    seen = []
    hook = model.sam.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["sparse_prompt_embeddings"]), with_kwargs=True
    )
    segments = model(**batch).segments
    hook.remove()
    assert seen[0].shape == (1, 1, 256)
    assert segments.points[0].shape == (0, 2) and segments.point_labels[0].shape == (0,)
    embedding = model.encode_sam_image(batch["sam_images"][:1])[0]
    low_res, _ = decode_masks(model.sam, embedding, None, None, seen[0])
    assert low_res.shape == (1, 16, 16)


@torch.no_grad()
def test_prompt_embeddings_equal_the_packages():
    """Points go through the parts of the package's prompt encoder one by one; its own entry gives the same in float32."""
    from model.sam import dense_position_encoding, embed_prompts

    model = tiny_read()
    points, labels = torch.rand(2, 6, 2) * 60, torch.tensor([[1, 0, -1, 1, 0, -1]] * 2)
    text = torch.randn(2, 1, 256)
    assert isinstance(model.sam, Sam)
    sparse, dense = embed_prompts(model.sam, points, labels, text)
    theirs, their_dense = model.sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    torch.testing.assert_close(sparse[:, :-1], theirs)
    torch.testing.assert_close(sparse[:, -1:], text)
    torch.testing.assert_close(dense, their_dense)
    torch.testing.assert_close(dense_position_encoding(model.sam), model.sam.prompt_encoder.get_dense_pe())


def training_batch(rows=None):
    rows = rows or [prompt(11, SEG, EOS), prompt(13, SEG, 14, SEG, EOS)]
    batch = tiny_batch(rows)
    labels = batch["input_ids"].clone()
    labels[:, :20] = -100
    labels[~batch["attention_mask"]] = -100
    masks = [rectangle((40, 56), (5, 5, 30, 20)), rectangle((48, 48), (0, 0, 20, 20)), rectangle((48, 48), (9, 9, 40, 30))]
    return {**batch, "labels": labels, "masks": masks[: sum(row.count(SEG) for row in rows)]}


@pytest.mark.parametrize("lora", [0, 4])
def test_nothing_else_moves_in_a_step(lora):
    model = add_lora(tiny_read(loss=LossConfig(sim=1.0)), r=lora)
    set_trainable(model)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**training_batch()).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    for part in ("llava.lm_head.", "embed_tokens.", "sam.mask_decoder.", "text_hidden_fcs."):
        assert any(part in name for name in moved), part
    for frozen in ("vision_tower", "multi_modal_projector", "sam.image_encoder", "sam.prompt_encoder"):
        assert not any(frozen in name for name in trained), frozen
    if lora:
        assert any("lora_" in name for name in moved)
        inside = {name for name in trained if "language_model.layers" in name}
        assert inside and all("lora_" in name for name in inside)


def test_a_batch_without_seg_gives_the_mask_branch_gradients_of_zero():
    """None at all, and ranks of a ZeRO run that see no mask would wait for those that do; their order: test_train.py."""
    model = tiny_read()
    set_trainable(model)
    model.train()
    out = model(**training_batch([prompt(9, 10, EOS), prompt(12, 13, EOS)]))
    assert out.bce_loss == 0 and out.dice_loss == 0 and len(out.segments) == 0
    assert out.loss == out.ce_loss
    out.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all("iou_prediction_head" in name for name in without), "SAM's own score is in no loss, with or without [SEG]"
    branch = [p for name, p in model.named_parameters() if name.startswith(("text_hidden_fcs", "sam.mask_decoder"))]
    assert all(not p.grad.any() for p in branch if p.grad is not None)


def test_similarity_loss_reaches_the_language_model_and_is_off_by_default():
    model = tiny_read()
    assert model(**training_batch()).sim_loss is None
    model.config.loss = LossConfig(ce=0, bce=0, dice=0, sim=1.0)
    out = model(**training_batch())
    assert out.loss == out.sim_loss
    out.loss.backward()
    assert model.llava.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_wrong_counts_are_errors():
    model = tiny_read()
    batch = training_batch()
    with pytest.raises(ValueError, match="3 \\[SEG\\] tokens but 2 masks"):
        model(**{**batch, "masks": batch["masks"][:2]})
    with pytest.raises(ValueError, match="without a picture"):
        model(**tiny_batch([[1, 5, SEG]], [0]))
    short = tiny_batch([prompt(5)], [0])
    short["input_ids"] = short["input_ids"][:, :8]
    short["attention_mask"] = short["attention_mask"][:, :8]
    with pytest.raises(ValueError, match="image slots"):
        model(**short)


@torch.no_grad()
def test_bfloat16_runs_and_stays_close():
    model = tiny_read()
    batch = tiny_batch([prompt(11, SEG, 12)], [0])
    full = model(**batch).segments.mask_logits[0]
    half = model.to(torch.bfloat16)(**batch).segments.mask_logits[0]
    assert half.dtype == torch.float32 and (half - full).abs().mean() < 0.1 * full.abs().mean() + 0.05


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny_read()
        set_trainable(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**training_batch()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)
