"""Questions about a picture share what their prompts begin with: the results are those of one expression at a time."""

import pytest
import torch
from tiny import EOS, SEG, prompt, tiny_batch, tiny_read

from model.packing import pad_rows, shared_beginning
from utils.conversation import IMAGE_TOKEN_INDEX

TAILS = ([9, 10, 11], [12], [13, 14, 15, 16, 17, 18], [19, 20], [21, 22, 23, 24], [25, 26, 27], [28, 9, 30, 31, 32, 33, 34])
ANSWERS = ([SEG, EOS], [40, 41, SEG, 42], [43, EOS], [SEG, 44, SEG], [45, 46], [47, SEG, EOS], [48, 49, SEG])


def left_padded(batch):
    lengths = batch["attention_mask"].sum(1)
    total = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.stack([r.roll(total - int(n)) for r, n in zip(batch[name], lengths, strict=True)])
    return batch


def split(batch):
    """(encode_images arguments, question arguments) of a batch."""
    asked = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "image_of_question")}
    return batch, asked


def talkative(seed=2):
    """A tiny model whose head writes [SEG] in some answers and not in others, and ends some of them early."""
    model = tiny_read(seed)
    generator = torch.Generator().manual_seed(1)
    weight = model.llava.lm_head.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        weight[SEG] *= 2
        weight[EOS] *= 3
    return model


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_forced_answers_equal_each_alone(count, padding):
    """Unequal lengths, no, one and two [SEG]: every mask, point and score is that of the expression alone."""
    model = tiny_read()
    rows = [prompt(*tail, *answer) for tail, answer in zip(TAILS[:count], ANSWERS[:count], strict=True)]
    batch = tiny_batch(rows, [0] * count, sizes=((40, 56),))
    views, asked = split(left_padded(batch) if padding == "left" else batch)
    images = model.encode_images(**views)
    together = model.segment_answers(images, **asked)
    assert (images.prefix is not None) == (count > 1)
    assert len(together) == sum(answer.count(SEG) for answer in ANSWERS[:count])
    for n, row in enumerate(rows):
        alone = model(**tiny_batch([row], [0], sizes=((40, 56),))).segments
        found = together.of_question(n)
        assert len(found) == len(alone)
        for k, m in enumerate(found):
            torch.testing.assert_close(together.similarity[m], alone.similarity[k], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.mask_logits[m], alone.mask_logits[k], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.points[m], alone.points[k], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.scores[m], alone.scores[k], atol=1e-4, rtol=0)
            assert torch.equal(together.point_labels[m], alone.point_labels[k])


@pytest.mark.parametrize("count", [1, 2, 7])
@torch.no_grad()
def test_generated_answers_equal_each_alone(count):
    """Same ids, logits within 1e-4, same masks, whether a question is asked with six others or alone."""
    model = talkative()
    rows = [prompt(*tail) for tail in TAILS[:count]]
    views, asked = split(left_padded(tiny_batch(rows, [0] * count, sizes=((40, 56),))))
    images = model.encode_images(**views)
    together = model.generate_answers(images, **asked, max_new_tokens=6, output_logits=True)
    assert (images.prefix is not None) == (count > 1)
    if count == 7:  # else this would show little
        assert {SEG in answer for answer in together.answer_ids} == {True, False}
        assert len({len(answer) for answer in together.answer_ids}) > 2
    for n, row in enumerate(rows):
        alone = model.generate_segments(
            **tiny_batch([row], [0], sizes=((40, 56),)), max_new_tokens=6, output_logits=True
        )
        assert alone.answer_ids[0] == together.answer_ids[n]
        for step in range(len(alone.answer_ids[0])):
            torch.testing.assert_close(
                together.step_logits[step][n], alone.step_logits[step][0], atol=1e-4, rtol=0
            )
        found = together.segments.of_question(n)
        assert len(found) == len(alone.segments) == alone.answer_ids[0].count(SEG)
        for k, m in enumerate(found):
            torch.testing.assert_close(together.segments.mask_logits[m], alone.segments.mask_logits[k], atol=1e-4, rtol=0)


@torch.no_grad()
def test_pictures_of_one_batch_share_within_each():
    """Two pictures, questions in mixed order: one prefix a picture, each question goes on from its own."""
    model = tiny_read()
    rows = [prompt(*tail, *answer) for tail, answer in zip(TAILS[:4], ANSWERS[:4], strict=True)]
    views, asked = split(tiny_batch(rows, [1, 0, 1, 1]))
    images = model.encode_images(**views)
    together = model.segment_answers(images, **asked)
    assert images.prefix.hidden.shape[0] == 2
    apart = model(**views, **asked).segments
    assert together.image.tolist() == apart.image.tolist() == [1, 0, 1, 1]
    for ours, theirs in zip(together.mask_logits, apart.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_is_encoded_is_not_encoded_again():
    """CLIP, SAM's encoder and the prefix run once a picture, however many batches of questions follow."""
    model = tiny_read()
    calls = {"clip": 0, "sam": 0, "tokens": 0}

    def counted(name, amount=lambda args, kwargs: 1):
        def hook(module, args, kwargs):
            calls[name] += amount(args, kwargs)

        return hook

    model.llava.model.vision_tower.register_forward_pre_hook(counted("clip"), with_kwargs=True)
    model.sam.image_encoder.register_forward_pre_hook(counted("sam"), with_kwargs=True)
    model.llava.model.language_model.register_forward_pre_hook(
        counted("tokens", lambda args, kwargs: kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    rows = [prompt(*tail, SEG, EOS) for tail in TAILS]
    views, asked = split(tiny_batch(rows, [0] * 7, sizes=((40, 56),)))
    images = model.encode_images(**views)
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        assert len(model.segment_answers(images, **{name: value[part] for name, value in asked.items()})) == len(
            range(7)[part]
        )
    assert calls["clip"] == calls["sam"] == 1
    prefix = len(prompt()) - 2 + 16  # the picture's one place becomes 16, and what follows it is not shared
    assert calls["tokens"] == prefix + sum(len(tail) + 3 for tail in TAILS)


def test_prompts_that_share_nothing_are_left_whole():
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5], [1, IMAGE_TOKEN_INDEX, 6], [2, IMAGE_TOKEN_INDEX, 7], [1, 4, 5]])
    mask = torch.ones_like(ids)
    assert shared_beginning(ids[:2], mask[:2]).tolist() == [1, IMAGE_TOKEN_INDEX]
    assert shared_beginning(ids[1:3], mask[1:3]) is None  # they begin differently
    assert shared_beginning(ids[[0, 3]], mask[[0, 3]]) is None and shared_beginning(ids[3:], mask[3:]) is None  # no image


def test_rows_are_padded_on_either_side():
    rows = [torch.tensor([5]), torch.tensor([6, 7])]
    assert pad_rows(rows, "right")[0].tolist() == [[5, 0], [6, 7]]
    ids, mask = pad_rows(rows, "left")
    assert ids.tolist() == [[0, 5], [6, 7]] and mask.tolist() == [[False, True], [True, True]]


@torch.no_grad()
def test_the_next_question_about_a_picture_goes_on_from_the_prefix():
    """One question after another, as in a chat: the first goes through whole, the prefix is there from the second on."""
    model = tiny_read()
    views, _ = split(tiny_batch([prompt(9)], [0], sizes=((40, 56),)))
    images = model.encode_images(**views)
    for n, (tail, answer) in enumerate(zip(TAILS[3:6], ANSWERS[3:6], strict=True)):
        batch = tiny_batch([prompt(*tail, *answer)], [0], sizes=((40, 56),))
        alone = model(**batch).segments
        found = model.segment_answers(images, **split(batch)[1])
        assert (images.prefix is not None) == (n > 0)
        for ours, theirs in zip(found.mask_logits, alone.mask_logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("even_calls", [False, True])
@torch.no_grad()
def test_pictures_whose_grids_have_unequal_numbers_of_points_are_drawn_in_one_batch(even_calls):
    """A side of 49 pixels has a cell less in `released` geometry: four points instead of five. Questions in mixed order."""
    model = tiny_read()
    model.even_calls = even_calls
    sizes = ((48, 48), (49, 49), (40, 56))
    rows = [prompt(*tail, *answer) for tail, answer in zip(TAILS[:6], ANSWERS[:6], strict=True)]
    of = [1, 0, 2, 1, 0, 1]
    batch = tiny_batch(rows, of, sizes=sizes)
    together = model(**batch).segments
    assert {len(points) for points in together.points} == {4, 5}
    for n, row in enumerate(rows):
        alone = model(**{**tiny_batch([row], [of[n]], sizes=sizes)}).segments
        found = together.of_question(n)
        assert len(found) == len(alone)
        for k, m in enumerate(found):
            assert together.mask_logits[m].shape == sizes[of[n]]
            torch.testing.assert_close(together.mask_logits[m], alone.mask_logits[k], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.points[m], alone.points[k], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.scores[m], alone.scores[k], atol=1e-4, rtol=0)
            assert torch.equal(together.point_labels[m], alone.point_labels[k])
