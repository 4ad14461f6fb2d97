"""Pictures: from a file to the two views the model takes (protocol §2, Common). The home of SAM's mean and std.

CLIP sees the centre square of the picture, SAM all of it in the upper left of a padded square; `ImageViews` keeps the sizes
that lead from one frame to another.
"""

from __future__ import annotations

import math
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

SLIM = 32
"""A picture is slim if one side is more than this many times the other: then only what CLIP sees of it is enlarged, here, for
SasP's map and for the similarity loss. Of all others every number is the original's."""


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
    """(H, W, 3) uint8 RGB of an image file, as OpenCV reads it, which is how the original read its pictures.

    Grey becomes three equal channels. Alpha is dropped, not blended: colours under what is transparent show. Of 16 bits the
    upper 8 are kept, nothing is clipped or stretched. CMYK is converted as Adobe stores it. The first frame of several counts.
    A picture that is turned by its EXIF data is turned: masks and annotations belong to it as it is seen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, damaged, cut short, too large or no image; the message names it. Of a JPEG that was
            cut short the rest would be grey, and nothing would tell.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"image {path} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return decode_image(path.read_bytes(), f"image {path}")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """What `read_image` gives, of the bytes of an image file; `name` stands in messages.

    Raises:
        ValueError: as `read_image`.
    """
    if not data:
        raise ValueError(f"{name} is an empty file: copy or download it again")
    if _cut_short(data):
        raise ValueError(f"{name} is cut short, its end is missing: copy or download it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more than 2^30 pixels, for one
        raise ValueError(f"{name} cannot be read: {error.err or error}") from error
    if image is None:
        raise ValueError(f"{name} cannot be read: not an image, damaged, or of a kind to convert to JPEG or PNG first")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _cut_short(data: bytes) -> bool:
    """A JPEG without its end mark, which cannot occur within the pixels: decoders fill up with grey and go on."""
    if data[:2] != b"\xff\xd8":
        return False
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        # Segments with their lengths come first; a preview in one of them has an end mark of its own.
        fill = data[place + 1 : place + 2] == b"\xff"
        place += 1 if fill else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data.find(b"\xff\xd9", place) < 0


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
    clip = clip_processor(_for_clip(image, clip_processor), return_tensors="np")["pixel_values"][0]
    sam, sam_size = sam_view(image, sam_image_size)
    return ImageViews(torch.from_numpy(np.asarray(clip)).float(), sam, sam_size, image.shape[:2])


def _for_clip(image: np.ndarray, clip_processor: CLIPImageProcessorPil) -> Image.Image:
    """The picture; of a slim one what CLIP's crop will hold, already in CLIP's scale.

    The processor enlarges the shortest side to its size and then crops: 1 x 20000 pixels would become 336 x 6720000. Resizing
    the part that is kept gives the same pixels, but for rounding.
    """
    long = int(image.shape[1] > image.shape[0])  # 0 height, 1 width
    length, shortest = image.shape[long], image.shape[1 - long]
    if length <= SLIM * shortest:
        return Image.fromarray(image)
    size, crop = clip_processor.size["shortest_edge"], clip_processor.crop_size["height"]
    resized = int(size * length / shortest)
    begin, end = ((place + (resized - crop) // 2) * length / resized for place in (0, crop))
    reach = math.ceil(2 * max(shortest / size, 1)) + 1  # of the bicubic filter, in pixels of the picture
    first, last = math.floor(begin) - reach, math.ceil(end) + reach
    part = image[:, first:last] if long else image[first:last]
    begin, end = begin - first, end - first
    return Image.fromarray(np.ascontiguousarray(part)).resize(
        (crop, size) if long else (size, crop),
        clip_processor.resample,
        box=(begin, 0, end, shortest) if long else (0, begin, shortest, end),
    )
