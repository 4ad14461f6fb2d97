"""A similarity map as a mask: from its grid to the pixels of the picture, cut at thresholds, compared with what is true.

    token_map(grid, ...), decoder_map(grid, ...)   -> PictureMap: heat in [0, 1] and what it covers, pixels of the picture
    overlaps(map, target)                          -> intersection and union at every threshold
    peak_on_object(map, target), agreement(a, b)

The definitions stand in the package's docstring. Pure functions of arrays. Legend: (g, g) and (h, w) grids · (H, W) pixels of the
original picture · L thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from model import sam, sasp
from utils.metrics import IGNORE_PIXEL

LEVELS = tuple(step / 20 for step in range(1, 20))
"""Thresholds t of the sweep."""
HEADLINE = 0.5
"""The threshold of the S_IoU to quote."""


class PictureMap(NamedTuple):
    """A similarity map laid over the picture."""

    heat: np.ndarray
    """(H, W) float32 in [0, 1], 0 where the map does not reach."""
    seen: np.ndarray
    """(H, W) bool: pixels that the map covers."""


def token_map(grid_gg: torch.Tensor, image_size: tuple[int, int], clip_image_size: int) -> PictureMap:
    """The map (g, g) of CLIP's patches over a picture of (H, W) pixels, of which CLIP saw the centre square.

    The true places of the tokens (`geometry: exact`) whatever the checkpoint's points use, so that models can be compared.
    """
    rows, columns = sasp.fine_map_matrices(image_size, grid_gg.shape[0], clip_image_size, "exact", torch.device("cpu"))
    heat = rows @ normalised(grid_gg) @ columns.T
    seen = np.outer(rows.sum(dim=1).numpy() > 0, columns.sum(dim=1).numpy() > 0)
    return PictureMap(heat.numpy(), seen)


def decoder_map(
    grid_hw: torch.Tensor, sam_image_size: int, sam_size: tuple[int, int], image_size: tuple[int, int]
) -> PictureMap:
    """The map (h, w) of SAM's padded square over a picture of (H, W) pixels, which fills `sam_size` of the square."""
    # Only cells that show some of the picture count: what the decoder makes of the padding says nothing about it.
    height, width = (-(-size * cells // sam_image_size) for size, cells in zip(sam_size, grid_hw.shape, strict=True))
    whole = grid_hw.detach().float().cpu().clone()
    whole[:height, :width] = normalised(whole[:height, :width])
    # Beyond the picture the last row and column go on, so that interpolation does not mix the padding in.
    whole[height:, :width] = whole[height - 1, :width]
    whole[:, width:] = whole[:, width - 1 : width]
    heat = sam.upscale_logits(whole[None], sam_image_size, sam_size, image_size)[0]
    return PictureMap(heat.numpy(), np.ones(image_size, bool))


def normalised(grid: torch.Tensor) -> torch.Tensor:
    """Min-max to [0, 1], float32 on the CPU; zeros where there is no contrast or a value is not finite."""
    grid = grid.detach().float().cpu()
    low, high = grid.min(), grid.max()
    if not torch.isfinite(grid).all() or high <= low:
        return torch.zeros_like(grid)
    return (grid - low) / (high - low)


def overlaps(heat_HW: np.ndarray, target_HW: np.ndarray) -> np.ndarray:
    """(L, 2) int64: pixels of intersection and union of {heat >= t} and the target (1 object, 0 rest, 255 ignored)."""
    counted = target_HW != IGNORE_PIXEL
    passed = np.searchsorted(np.asarray(LEVELS, np.float32), heat_HW[counted], side="right")  # thresholds that are met
    on_object = target_HW[counted] == 1
    bins = len(LEVELS) + 1
    inside = np.bincount(passed[on_object], minlength=bins)[::-1].cumsum()[::-1][1:]
    outside = np.bincount(passed[~on_object], minlength=bins)[::-1].cumsum()[::-1][1:]
    return np.stack([inside, outside + on_object.sum()], axis=1)


def s_iou(overlaps_L2: np.ndarray) -> np.ndarray:
    """(L,) float64: I / (U + 1e-5) at every threshold."""
    return overlaps_L2[:, 0] / (overlaps_L2[:, 1] + 1e-5)


def peak_on_object(found: PictureMap, target_HW: np.ndarray) -> bool:
    """The greatest pixel of the map is one of the object's; a map without contrast has none."""
    heat = np.where(found.seen & (target_HW != IGNORE_PIXEL), found.heat, -1.0)
    place = np.unravel_index(heat.argmax(), heat.shape)
    return bool(heat[place] > 0 and target_HW[place] == 1)


def agreement(a: PictureMap, b: PictureMap, target_HW: np.ndarray) -> tuple[float, float]:
    """(Pearson's r, IoU at t = .5) of two maps over the pixels that both cover; r is NaN where one has no contrast there."""
    common = a.seen & b.seen & (target_HW != IGNORE_PIXEL)
    x, y = a.heat[common].astype(np.float64), b.heat[common].astype(np.float64)
    r = correlation(x, y)
    x, y = x >= HEADLINE, y >= HEADLINE
    union = (x | y).sum()
    return r, float((x & y).sum() / (union + 1e-5)) if union else 1.0


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of two series, NaN where one is constant or they have fewer than two values."""
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / size) if size > 1e-12 else float("nan")
