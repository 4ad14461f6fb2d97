"""Pictures: from a file to the two views the model takes (protocol §2, Common). The home of SAM's mean and std.

CLIP sees the centre square of the picture, SAM all of it in the upper left of a padded square; `ImageViews` keeps the sizes
that lead from one frame to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ImageViews:
    """One picture as the model takes it."""

    clip: torch.Tensor
    """(3, s, s) float32, CLIP's normalised centre crop."""
    sam: torch.Tensor
    """(3, S, S) float32, normalised, resized, zero-padded right and below."""
    sam_size: tuple[int, int]
    """(h, w) of the picture inside the square."""
    original_size: tuple[int, int]
    """(H, W) of the picture."""


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file; grey, alpha and 16-bit files are converted, EXIF rotation is applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"image {path} cannot be read: not an image, or damaged")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def sam_view(image: np.ndarray, size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """((3, S, S) float32, (h, w)): the longest side becomes `size` (PIL bilinear), then normalised and padded."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.astype(np.float32)).permute(2, 0, 1)
    pixels = (pixels - torch.tensor(SAM_PIXEL_MEAN)[:, None, None]) / torch.tensor(SAM_PIXEL_STD)[:, None, None]
    return torch.nn.functional.pad(pixels, (0, size - new_width, 0, size - new_height)), (new_height, new_width)


def image_views(image: np.ndarray, clip_processor: CLIPImageProcessorPil, sam_image_size: int) -> ImageViews:
    """Both views of an (H, W, 3) uint8 RGB picture."""
    clip = torch.from_numpy(np.asarray(clip_processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]))
    sam, sam_size = sam_view(image, sam_image_size)
    return ImageViews(clip.float(), sam, sam_size, image.shape[:2])
