"""Training with conversations of one picture in one row: loss, masks and gradients are those of each on its own."""

from __future__ import annotations

import pytest
import torch
from tiny import EOS, SEG, prompt, rectangle, tiny_batch, tiny_read

from model import LossConfig, add_lora, set_trainable
from model.memory import StepShape
from model.packing import BEGINNING, PADDING, pack, takes_masks
from utils.conversation import IMAGE_TOKEN_INDEX

SIZES = ((40, 56), (48, 48))
ROWS = (
    prompt(9, 10, 11, SEG, EOS),
    prompt(12, EOS),
    prompt(13, SEG, 14, 15, 16, 17, SEG, EOS, 18, 19, 20, SEG, EOS),
    prompt(21, 22, SEG, EOS),
    prompt(23, 24, 25, 26, 27, SEG, 28, EOS),
)
"""None, one and many [SEG]; unequal ends; the third has two turns."""
IMAGES = [0, 1, 0, 1, 0]
NO_SEG = (prompt(9, 10, EOS), prompt(12, EOS), prompt(9, 13, 14, EOS))
NO_PICTURE = [1, 7, 30, 31, 32, EOS]


def training_batch(rows=ROWS, images=IMAGES, side="right", cut=None) -> dict:
    """What `forward` takes to train. All words but the first are supervised; `cut` is --model_max_length."""
    batch = tiny_batch(rows, images, sizes=SIZES)
    if cut is not None:
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :cut], batch["attention_mask"][:, :cut]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if side == "left":
        shifts = [ids.shape[1] - int(n) for n in mask.sum(1)]
        ids, mask = (torch.stack([r.roll(n) for r, n in zip(x, shifts, strict=True)]) for x in (ids, mask))
    labels = ids.masked_fill((ids == IMAGE_TOKEN_INDEX) | (ids == 1) | ~mask, -100)
    question = (ids[:, 1:] == SEG).nonzero()[:, 0]
    masks = [
        rectangle(SIZES[images[n]], (3 + k, 5, 25 + 2 * k, 20 + k)) for k, n in enumerate(question.tolist())
    ]
    return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels, "masks": masks}


def step(batch: dict, share: bool, lora=0, checkpointing=False, even_calls=False, attention="sdpa"):
    """(output, gradients by name, tokens that went through the language model) of one training step in float32."""
    model = tiny_read(loss=LossConfig(sim=0.5))
    model.llava.set_attn_implementation(attention)
    if lora:
        add_lora(model, r=lora, dropout=0.0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: then lora_A would get no gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    set_trainable(model)
    model.train()
    model.share_prefix, model.even_calls = share, even_calls
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = []
    model.llava.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    out = model(**batch)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(tokens)


def assert_same(ours, theirs) -> None:
    """Loss terms and gradients within 1e-5, logits of masks within 1e-4; the same questions have masks."""
    (out, gradients, _), (expected, wanted, _) = ours, theirs
    for name in ("loss", "ce_loss", "bce_loss", "dice_loss", "sim_loss"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), atol=1e-5, rtol=0, msg=name)
    assert torch.equal(out.segments.question, expected.segments.question)
    for logits, other in zip(out.segments.mask_logits, expected.segments.mask_logits, strict=True):
        torch.testing.assert_close(logits, other, atol=1e-4, rtol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_each_conversation_on_its_own(lora, checkpointing, attention):
    batch = training_batch()
    shared = step(batch, True, lora, checkpointing, attention=attention)
    alone = step(batch, False, lora, checkpointing, attention=attention)
    assert_same(shared, alone)
    assert len(shared[0].segments) == 6
    beginning = len(prompt()) - 2 + 16  # the picture's one place becomes 16, and the mark behind it is no longer shared
    longest = beginning + sum(len(row) - 4 for n, row in enumerate(ROWS) if IMAGES[n] == 0)
    assert shared[2] == 2 * longest and alone[2] == 5 * (len(ROWS[2]) + 15)


@pytest.mark.parametrize(
    "rows, images, more",
    [
        (NO_SEG, [0, 1, 0], {}),
        (NO_SEG, [0, 1, 0], {"even_calls": True}),
        ((*ROWS, NO_PICTURE), [*IMAGES, 1], {}),
        (([1, 8, *ROWS[0][2:]], *ROWS[1:]), IMAGES, {}),
        ((ROWS[0], ROWS[0], ROWS[0]), [0, 0, 0], {"even_calls": True}),
    ],
    ids=["no SEG", "no SEG, stand-ins", "one without a picture", "one begins differently", "a picture nobody asks about"],
)
def test_batches_of_every_kind(rows, images, more):
    batch = training_batch(rows, images)
    shared, alone = step(batch, True, lora=4, **more), step(batch, False, lora=4, **more)
    assert_same(shared, alone)
    assert shared[2] < alone[2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("cut", [None, 30, 24, 19])
def test_padding_on_either_side_and_conversations_that_were_cut(side, cut):
    """--model_max_length may take a conversation's end, and at worst all that follows its picture."""
    batch = training_batch(side=side, cut=cut)
    shared, alone = step(batch, True), step(batch, False)
    assert_same(shared, alone)
    assert shared[2] < alone[2]


def test_nothing_is_shared_where_nothing_is_saved_or_the_attention_takes_no_mask(monkeypatch):
    ids = training_batch()
    asked = [ids[name] for name in ("input_ids", "attention_mask", "image_of_question")]
    assert pack(*asked) is not None
    assert pack(*(tensor[:2] for tensor in asked)) is None  # two pictures
    assert pack(*(tensor[:1] for tensor in asked)) is None
    # A long conversation beside two short ones: the rows would be longer than what they replace.
    long = tiny_batch([[1, *range(3, 40)], prompt(9), prompt(10)], [0, 1, 1])
    assert pack(long["input_ids"], long["attention_mask"], long["image_of_question"]) is not None
    assert pack(long["input_ids"], long["attention_mask"], long["image_of_question"], multiple=64) is None
    assert [takes_masks(name) for name in ("eager", "sdpa", "flash_attention_2", None)] == [True, True, False, False]

    monkeypatch.setattr("model.read.takes_masks", lambda name: False)
    flash, alone = step(ids, True), step(ids, False)
    assert flash[2] == alone[2] and torch.equal(flash[0].loss, alone[0].loss)


@torch.no_grad()
def test_without_labels_and_as_released_each_goes_alone():
    """The first is what the shared evaluation is compared with; the second counts positions from the padding on."""
    model = tiny_read()
    tokens = []
    model.llava.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    batch = training_batch()
    model(**batch, compat="released")
    model(**{name: value for name, value in batch.items() if name not in ("labels", "masks")})
    assert tokens == [5, 5]


def test_rows_hold_what_they_promise():
    """Ids, positions that start again, parts, and what a token sees; a multiple of 8 long."""
    two, image = [1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX], torch.tensor([0, 0, 1])
    rows = [[*two, 5, 6], [*two, 7], [*two, 8, 9, 10, 11, 12, 13]]
    ids = torch.zeros(3, 9, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    mask = torch.tensor([[k < len(row) for k in range(9)] for row in rows])
    packed = pack(ids, mask, image, multiple=4)
    assert packed.ids[0].tolist() == [*two, 5, 6, 7, *[0] * 6]
    assert packed.places[0].tolist() == [0, 1, 2, 3, 4, 3, *[0] * 6]
    assert packed.part[0].tolist() == [BEGINNING] * 3 + [1, 1, 2] + [PADDING] * 6
    assert packed.image.tolist() == [0, 1]
    seen = packed.bias(torch.float32)[0, 0] == 0
    assert seen[4, :6].tolist() == [True, True, True, True, True, False]
    assert seen[5, :6].tolist() == [True, True, True, False, False, True]
    assert not seen.triu(1).any() and seen.any(dim=-1).all()
    back = packed.unpack(packed.ids[..., None])[..., 0]
    assert [row[keep].tolist() for row, keep in zip(back, mask, strict=True)] == rows
    assert back[1, 4:].tolist() == [7] * 5  # padding stands for the conversation's last token


def test_dropout_is_drawn_once_for_what_is_shared_and_repeats():
    """Not what each conversation on its own draws, but the same again from the same seed: exact resume needs that."""
    model = add_lora(tiny_read(), r=4, dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    set_trainable(model)
    model.train()
    losses = []
    for share in (True, True, False):
        model.share_prefix = share
        torch.manual_seed(5)
        losses.append(model(**training_batch()).ce_loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_the_memory_plan_counts_the_rows():
    assert StepShape(pictures=2, questions=6, tokens=700).rows == (6, 700)
    assert StepShape(pictures=2, questions=6, tokens=700, shared=600).rows == (2, 900)
