"""The loss of READ (protocol §3): cross-entropy of the answer, BCE and Dice of the masks, and, ours, of the similarity map.

Legend: M masks · N questions · T tokens · D hidden width · P image tokens (g x g) · (H, W) pixels of the original picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from utils.image import SLIM

IGNORE_INDEX = -100
IGNORE_PIXEL = 255
DICE_SCALE, DICE_EPS, MASK_EPS = 1000.0, 1e-6, 1e-8


def answer_loss(hidden_NTD: torch.Tensor, labels_NT: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
    """Mean cross-entropy over the supervised tokens of the batch; 0 when there is none. Float32 scalar.

    Only the supervised positions reach the vocabulary projection: the result equals that over all positions.
    """
    supervised = labels_NT[:, 1:] != IGNORE_INDEX
    logits = lm_head(hidden_NTD[:, :-1][supervised]).float()
    if len(logits) == 0:
        return logits.sum()
    return F.cross_entropy(logits, labels_NT[:, 1:][supervised])


def mask_losses(logits: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(BCE, Dice) of M masks, each a mean over masks of per-picture values at original resolution (§3). Float32 scalars.

    Pixels of value 255 are left out of both. M may be 0: then both are zeros without gradient.
    """
    if len(logits) != len(masks):
        raise ValueError(
            f"{len(logits)} [SEG] tokens but {len(masks)} masks in the batch: every [SEG] of an answer needs its own mask"
        )
    bce = dice = logits[0].new_zeros(()) if logits else torch.zeros(())
    for logit, mask in zip(logits, masks, strict=True):
        if logit.shape != mask.shape:
            raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit its picture of {tuple(logit.shape)}")
        bce = bce + bce_loss(logit, mask)
        dice = dice + dice_loss(logit, mask)
    return bce / (len(logits) + MASK_EPS), dice / (len(logits) + MASK_EPS)


def bce_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy over the pixels that are not ignored; logits and mask (...) of one shape."""
    valid = mask != IGNORE_PIXEL
    if not valid.any():
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[valid].float(), mask[valid].float())


def dice_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum(pt)/1000 + 1e-6) / (sum(p)/1000 + sum(t)/1000 + 1e-6) over the pixels that are not ignored."""
    valid = mask != IGNORE_PIXEL
    prob, target = logits.float().sigmoid() * valid, mask.float() * valid
    overlap = 2 * (prob / DICE_SCALE * target).sum()
    return 1 - (overlap + DICE_EPS) / ((prob / DICE_SCALE).sum() + (target / DICE_SCALE).sum() + DICE_EPS)


def similarity_loss(
    similarity_MP: torch.Tensor, masks: list[torch.Tensor], hidden_size: int, clip_image_size: int
) -> torch.Tensor:
    """BCE + Dice of the similarity map against the mask averaged onto the token grid. Float32 scalar; 0 for M = 0.

    Not in the paper, which lets the map emerge; it teaches a small model where to look. The dot product is scaled by
    1/sqrt(D) to a logit.
    """
    if len(masks) == 0:
        return similarity_MP.sum().float() * 0
    grid = math.isqrt(similarity_MP.shape[1])
    target = torch.stack([mask_on_token_grid(mask, grid, clip_image_size) for mask in masks])
    logits = similarity_MP.float() / math.sqrt(hidden_size)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * target).sum(1) + 1) / (prob.sum(1) + target.sum(1) + 1)
    return bce + dice.mean()


def mask_on_token_grid(mask: torch.Tensor, grid: int, clip_image_size: int) -> torch.Tensor:
    """(P,) float32 in [0, 1]: share of each image token covered by the mask (H, W), in CLIP's centre crop (§2)."""
    short = min(mask.shape)
    for axis, length in enumerate(mask.shape):
        if length > SLIM * short:  # enlarge no more of it than three times what the crop holds, as much on each side
            rest = length - 3 * short
            mask = mask.narrow(axis, rest // 2, length - rest // 2 * 2)
    height, width = mask.shape
    scale = clip_image_size / short
    size = (max(round(height * scale), clip_image_size), max(round(width * scale), clip_image_size))
    resized = F.interpolate((mask == 1).float()[None, None], size, mode="bilinear", align_corners=False)
    top, left = ((length - clip_image_size) // 2 for length in size)
    crop = resized[..., top : top + clip_image_size, left : left + clip_image_size]
    return F.adaptive_avg_pool2d(crop, grid).flatten()
