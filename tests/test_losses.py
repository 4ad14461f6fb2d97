"""Mask losses against the recordings of the original, and what ours adds: ignored pixels, the similarity map."""

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs

from model.losses import answer_loss, bce_loss, dice_loss, mask_losses, mask_on_token_grid, similarity_loss


@pytest.mark.parametrize(
    "file", [f / "metrics/mask_losses.npz" for f in golden_dirs() if (f / "metrics/mask_losses.npz").is_file()], ids=str
)
def test_mask_losses_equal_the_recorded(file):
    arrays = np.load(file)
    logits, masks = (torch.from_numpy(arrays[name]) for name in ("inputs", "targets"))
    bce, dice = mask_losses(list(logits), list(masks))
    assert bce.item() == pytest.approx(float(arrays["bce_3"]), rel=1e-5)
    assert dice.item() == pytest.approx(float(arrays["dice_3"]), rel=1e-5)
    # The recording with num_masks = 1 is the sum over masks.
    assert sum(bce_loss(x, t).item() for x, t in zip(logits, masks, strict=True)) == pytest.approx(
        float(arrays["bce_1"]), rel=1e-5
    )
    assert sum(dice_loss(x, t).item() for x, t in zip(logits, masks, strict=True)) == pytest.approx(
        float(arrays["dice_1"]), rel=1e-5
    )
    empty = mask_losses([], [])
    assert empty[0] == float(arrays["bce_empty"]) == 0 and empty[1] == float(arrays["dice_empty"]) == 0


def test_ignored_pixels_do_not_count():
    logits = torch.randn(6, 7, requires_grad=True)
    mask = torch.randint(0, 2, (6, 7), dtype=torch.uint8)
    hidden = mask.clone()
    hidden[:, 3:] = 255
    torch.testing.assert_close(bce_loss(logits, hidden), bce_loss(logits[:, :3], mask[:, :3]))
    torch.testing.assert_close(dice_loss(logits, hidden), dice_loss(logits[:, :3], mask[:, :3]))
    nothing = bce_loss(logits, torch.full((6, 7), 255, dtype=torch.uint8))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


def test_answer_loss_is_the_mean_over_supervised_tokens():
    head = torch.nn.Linear(8, 11, bias=False)
    hidden, labels = torch.randn(2, 5, 8), torch.randint(0, 11, (2, 5))
    labels[0, :3] = -100
    expected = torch.nn.functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(answer_loss(hidden, labels, head), expected)
    assert answer_loss(hidden, torch.full_like(labels, -100), head) == 0


def test_masks_fall_on_the_tokens_that_see_them():
    """The token grid covers CLIP's centre square: in a wide picture the sides are seen by no token."""
    mask = torch.zeros(40, 80, dtype=torch.uint8)
    mask[:, 20:40] = 1  # left half of the centre square
    grid = mask_on_token_grid(mask, 4, 56).view(4, 4)
    assert (grid[:, :2] > 0.95).all() and (grid[:, 2:] < 0.05).all()
    mask[:] = 0
    mask[:, :10] = 1
    assert mask_on_token_grid(mask, 4, 56).sum() == 0


def test_similarity_loss_wants_the_map_on_the_object():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:20] = 1
    right = torch.where(mask_on_token_grid(mask, 4, 56) > 0.5, 20.0, -20.0)[None]
    assert similarity_loss(right, [mask], 16, 56) < 0.2 < 3 < similarity_loss(-right, [mask], 16, 56)
    assert similarity_loss(torch.zeros(0, 16), [], 16, 56) == 0
