"""Similarity as Points: where `[SEG]` looks, turned into prompts for SAM (paper, section 4; protocol §4).

    similarity()      [SEG] state against image tokens           -> s, one value a token
    select_points()   s as a coarse map, thresholded             -> points with labels
    refine_points()   a soft-argmax in the fine map near a point -> points, differentiable in s

Pure functions of tensors. Legend: M masks (one a [SEG]) · P image tokens (g x g) · D hidden width · K points · (H, W)
pixels of the original picture. Coordinates are (x, y), pixels of the original picture, a pixel's index being its centre.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.image import SLIM

from .config import SaspConfig

POSITIVE, NEGATIVE, NEUTRAL = 1, 0, -1

REFINE_RADIUS = 5
"""Half width of the refinement's window. The weight exp(-r^2) outside is below 1e-15 of the centre's."""


class PointPrompts(NamedTuple):
    """Points of M masks over pictures of one size; K is `num_points`, or all cells of a smaller grid."""

    points: torch.Tensor
    """(M, K, 2) float32, (x, y) in pixels of the original picture; carries gradient into the similarity."""
    labels: torch.Tensor
    """(M, K) int64: 1 foreground, 0 background, -1 neither (SAM ignores the place of such a point)."""
    cells: torch.Tensor
    """(M, K, 2) int64, the integer pixels (x, y) before refinement."""


def similarity(image_states_MPD: torch.Tensor, seg_state_MD: torch.Tensor) -> torch.Tensor:
    """Plain dot product of each image token's last hidden state with the `[SEG]` state: (M, P), dtype of the inputs.

    The class re-weighting of CLIP-Surgery is identically 1 for a single text vector, hence absent (§4-1). The product is
    rounded to the model's dtype before the sum, as in the original.
    """
    return (image_states_MPD * seg_state_MD[:, None, :]).sum(dim=-1)


def select_points(
    similarity_MP: torch.Tensor,
    image_size: tuple[int, int],
    config: SaspConfig = SaspConfig(),
    *,
    clip_image_size: int = 336,
) -> PointPrompts:
    """Points and labels of M similarity maps over one picture of `image_size` = (H, W) (§4-2 to §4-6).

    Cells at or above `t_pos` come first (highest value first, label 1), then those at or below `t_neg` (lowest first,
    label 0), then the rest in raster order (label -1); the first `num_points` are kept, fewer if the grid has fewer
    cells. Equal values keep raster order. A map without contrast (constant, or with a value that is not finite) says
    nothing about place: all its points are neutral, so the `[SEG]` embedding alone decides.

    `config.enabled` is the caller's business. Image tokens are taken to cover CLIP's view of the picture: the centre
    square, `clip_image_size` pixels wide once the picture is resized.

    Raises:
        ValueError: P is no square number.
    """
    t_pos, t_neg, geometry = config.t_pos, config.t_neg, config.geometry
    grid = math.isqrt(similarity_MP.shape[1])
    if grid * grid != similarity_MP.shape[1]:
        raise ValueError(f"SasP needs a square token grid, found {similarity_MP.shape[1]} tokens")
    coarse = max(grid // config.down_sample, 1)
    values = _resize(similarity_MP.detach().float(), grid, coarse)
    values, has_contrast = _minmax(values)
    values = torch.where(has_contrast, values, (t_pos + t_neg) / 2)

    x, y, index = _grid_cells(tuple(image_size), coarse, clip_image_size, geometry, values.device)
    values = values[:, index]
    positive, negative = values >= t_pos, values <= t_neg
    # One ascending key: foreground in [-1, -t_pos], background in [0, t_neg], neutral 2 (a stable sort keeps raster order).
    key = torch.where(positive, -values, torch.where(negative, values, 2.0))
    chosen = key.argsort(dim=1, stable=True)[:, : config.num_points]
    label = torch.where(positive, POSITIVE, torch.where(negative, NEGATIVE, NEUTRAL)).gather(1, chosen)
    pixels = torch.stack([x[chosen], y[chosen]], dim=-1)
    points = refine_points(pixels, similarity_MP, image_size, clip_image_size=clip_image_size, geometry=geometry)
    return PointPrompts(points, label, pixels)


def refine_points(
    pixels_MK2: torch.Tensor,
    similarity_MP: torch.Tensor,
    image_size: tuple[int, int],
    *,
    clip_image_size: int = 336,
    geometry: str = "released",
) -> torch.Tensor:
    """Weighted mean of the pixels around each point, weights exp(fine map) * exp(-distance^2): (M, K, 2) float32 (§4-6).

    The original sums over the whole picture, once a point; weights fall so fast that a window of a few pixels gives the
    same number. The fine map is a separable interpolation of the token grid, so only the window is ever built:
    rows x grid x columns. Gradient flows to the similarity through the fine map.
    """
    height, width = image_size
    grid = math.isqrt(similarity_MP.shape[1])
    # §4-2: min-max in the model's dtype, and only then fp32.
    fine = _minmax(similarity_MP)[0].float().unflatten(1, (grid, grid))
    rows, columns = fine_map_matrices(image_size, grid, clip_image_size, geometry, fine.device)
    offset, distance = _window(fine.device)
    xs, ys = pixels_MK2[..., 0, None] + offset, pixels_MK2[..., 1, None] + offset
    near_xs, near_ys = xs.clamp(0, width - 1), ys.clamp(0, height - 1)
    across = rows[near_ys].flatten(1, 2) @ fine
    window = across.unflatten(1, ys.shape[1:]) @ columns[near_xs].mT
    inside = (ys == near_ys)[..., :, None] & (xs == near_xs)[..., None, :]
    weight = torch.where(inside, torch.exp(window - distance), 0.0)
    of_column, of_row = weight.sum(dim=-2), weight.sum(dim=-1)
    total = of_row.sum(dim=-1)
    shift = torch.stack([(of_column * offset).sum(-1) / total, (of_row * offset).sum(-1) / total], dim=-1)
    return pixels_MK2 + shift


def similarity_map(
    similarity_MP: torch.Tensor, image_size: tuple[int, int], *, clip_image_size: int = 336, geometry: str = "released"
) -> torch.Tensor:
    """The fine map over the whole picture, (M, H, W) float32 in [0, 1], 0 where CLIP saw nothing. For pictures of it."""
    grid = math.isqrt(similarity_MP.shape[1])
    fine = _minmax(similarity_MP)[0].float().unflatten(1, (grid, grid))
    rows, columns = fine_map_matrices(image_size, grid, clip_image_size, geometry, fine.device)
    return rows @ fine @ columns.T


def fine_map_matrices(
    image_size: tuple[int, int], grid: int, clip_image_size: int, geometry: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolation matrices (H, g) and (W, g): fine map = rows @ map @ columns^T, zero outside CLIP's crop (§4-2)."""
    return _fine_map_matrices(tuple(image_size), grid, clip_image_size, geometry, device)


# What follows depends on sizes alone, and is kept on its device: to send it there each time, a GPU would be waited for.


@lru_cache
@torch.inference_mode(False)  # so that gradients can pass later, whoever asked first
def _window(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (r,) of a window's rows and columns from its point, and the squares of the distances (r, r), r = 2 * radius + 1."""
    offset = torch.arange(-REFINE_RADIUS, REFINE_RADIUS + 1, device=device)
    return offset, offset[:, None] ** 2 + offset[None, :] ** 2


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _fine_map_matrices(
    image_size: tuple[int, int], grid: int, clip_image_size: int, geometry: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    identity = torch.eye(grid, dtype=torch.float32)[None]
    view = F.interpolate(identity, size=clip_image_size, mode="linear", align_corners=False)
    matrices = []
    for length in image_size:
        if geometry == "released":
            pad = _released_pad(length, min(image_size), clip_image_size)
            if length > SLIM * min(image_size):  # 1 x 20000 pixels would be padded to 6.7 million cells
                axis = _interpolate_padded(view[0].T, pad, length)
            else:
                axis = F.interpolate(F.pad(view, (pad, pad)), size=length, mode="linear", align_corners=False)[0].T
        else:
            resized, start = _clip_crop(length, min(image_size), clip_image_size)
            centre = (torch.arange(length, dtype=torch.float64) + 0.5) * resized / length - start
            inside = (centre >= 0) & (centre <= clip_image_size)
            place = (centre * grid / clip_image_size - 0.5).clamp(0, grid - 1)
            low = place.floor().long().clamp(max=max(grid - 2, 0))
            share = (place - low).float()
            axis = torch.zeros(length, grid, dtype=torch.float32)
            axis[torch.arange(length), low] = 1 - share
            axis[torch.arange(length), (low + 1).clamp(max=grid - 1)] += share
            axis *= inside[:, None]
        matrices.append(axis.contiguous().to(device))
    return matrices[0], matrices[1]


def _interpolate_padded(view: torch.Tensor, pad: int, length: int) -> torch.Tensor:
    """(length, g): view (s, g), `pad` zero rows on each side of it, linearly interpolated; the zeros are never made."""
    size = len(view)
    padded = F.pad(view, (0, 0, 1, 1))  # one zero row on each side stands for all
    place = ((torch.arange(length, dtype=torch.float64) + 0.5) * (size + 2 * pad) / length - 0.5).clamp(min=0)
    low = place.floor().long()
    share = (place - low).float()[:, None]
    first, second = (padded[(index - pad + 1).clamp(0, size + 1)] for index in (low, low + 1))
    return (1 - share) * first + share * second


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _grid_cells(
    image_size: tuple[int, int], coarse: int, clip_image_size: int, geometry: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y (integer pixels) and index in the coarse map of every cell that may become a point, in raster order (§4-3, -5)."""
    axes = []
    for length in image_size:
        cells = []
        if geometry == "released":
            pad = _released_pad(length, min(image_size), coarse)
            centres = _released_centres(length, coarse + 2 * pad)
            cells += [(centres[i], i - pad) for i in range(max(pad, 0), min(pad + coarse, coarse + 2 * pad))]
        else:
            resized, start = _clip_crop(length, min(image_size), clip_image_size)
            for i in range(coarse):
                place = ((i + 0.5) * clip_image_size / coarse + start) * length / resized
                cells.append((min(max(int(place), 0), length - 1), i))
        axes.append(cells)
    raster = [(x, y, i * coarse + j) for y, i in axes[0] for x, j in axes[1]]
    if not raster:  # a picture so narrow that the released rounding crops the whole grid away
        raster = [(image_size[1] // 2, image_size[0] // 2, (coarse // 2) * coarse + coarse // 2)]
    return tuple(torch.tensor(values, device=device) for values in zip(*raster, strict=True))


def _released_centres(length: int, cells: int) -> list[int]:
    """Pixel of the centre of each cell, where `cells` of them cover an axis of `length` pixels (§4-5).

    In float32, as the original computes it. Where the exact centre is a whole pixel, float32 may fall just below it, and the
    pixel before is taken: 7.5 * (200 / 12) gives 124, and 125 in float64.
    """
    centres = (torch.arange(cells) + 0.5) * (length / cells)
    return centres.clamp(max=length - 1).long().tolist()


def _released_pad(length: int, shortest: int, cells: int) -> int:
    """Cells the original adds on each side of an axis; its float rounding makes some of them -1 (§8-5, kept)."""
    return math.floor((int(length * (cells / shortest)) - cells) / 2)


def _clip_crop(length: int, shortest: int, clip_image_size: int) -> tuple[int, int]:
    """(resized length, first pixel of the centre crop) of one axis in CLIP's preprocessing (§2)."""
    resized = int(clip_image_size * length / shortest)
    return resized, (resized - clip_image_size) // 2


def _resize(values_MP: torch.Tensor, grid: int, size: int) -> torch.Tensor:
    """Bilinear g x g -> size x size, flattened."""
    if size == grid:
        return values_MP
    maps = values_MP.unflatten(1, (1, grid, grid))
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False).flatten(1)


def _minmax(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values to [0, 1] a row, in the dtype given; (M, 1) bool, the row has contrast).

    A row without contrast, that is with all values equal or with NaN or infinity in it, becomes zeros.
    """
    # min and max by index, not amin and amax: among equal extremes one alone carries the gradient, as in the original.
    low, high = values.min(dim=1, keepdim=True).values, values.max(dim=1, keepdim=True).values
    usable = (low < high) & (low > -torch.inf) & (high < torch.inf)  # false for NaN, which both hand on
    span = torch.where(usable, high - low, 1.0)
    scaled = (torch.where(usable, values, 0.0) - torch.where(usable, low, 0.0)) / span
    return torch.where(usable, scaled, 0.0), usable
