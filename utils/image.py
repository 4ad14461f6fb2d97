"""Images: from a file to the two views the model takes (protocol §2, Common). The home of SAM's mean and std.

CLIP sees the centre square of the image, SAM all of it in the upper left of a padded square; `ImageViews` keeps the sizes
that lead from one frame to another.

A file is judged before it is decoded: of what kind it is, how many pixels it claims, whether it is whole, and whether its
numbers have one meaning as colours. Decoders do not judge: they fill what is missing with grey, clip what does not fit, and
allocate what a header asks for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from utils.cli import IMAGE_LIMIT, MAX_MEGAPIXELS
from utils.files import not_content, whole_number

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)

log = logging.getLogger(__name__)

DARK = 64
"""Of 255. An image of 16 bits without a brighter pixel is said to be dark: it may hold 12 bits or 14."""
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
    """(H, W, 3) uint8 RGB of an image file, as OpenCV reads it, which is how the original read its images.

    Grey becomes three equal channels. Alpha is dropped, not blended: colours under what is transparent show. Of 16 bits the
    upper 8 are kept, nothing is clipped or stretched. CMYK is converted as Adobe stores it. The first frame of several counts.
    An image that is turned by its EXIF data is turned: masks and annotations belong to it as it is seen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, no image, damaged, cut short or too large, or its numbers have no one meaning as colours
            (floating point, 32 bits, five bands); the message names it.
    """
    return decode_image(_content(path), f"image {path}")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """What `read_image` gives, of the bytes of an image file; `name` stands in messages.

    Raises:
        ValueError: as `read_image`.
    """
    header = read_header(data, name)
    if header.by_pillow:
        with _pillow(data, name, header.kind) as image:
            return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image))[..., :3])
    try:
        with _silent_opencv():
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more than 2^20 pixels a side, for one
        raise ValueError(f"{name} cannot be read: {error.err or error}") from error
    if image is None:
        raise ValueError(f"{name} cannot be read: it is damaged, or a {header.kind} of a kind to convert to JPEG or PNG first")
    if sorted(image.shape[:2]) != sorted((header.width, header.height)):
        raise ValueError(f"{name} is damaged: it has {image.shape[1]} x {image.shape[0]} pixels, its header says {header.size}")
    if header.deep and image.max() < DARK:
        _warn_of_the_dark(name, int(image.max()))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@functools.lru_cache(maxsize=4096)  # once for each image
def _warn_of_the_dark(name: str, brightest: int) -> None:
    log.warning(
        "%s has 16 bits and is nearly black, its brightest value is %d of 255: if its numbers end at 4095 or so, as those of "
        "many cameras do, stretch them to 65535 first", name, brightest,
    )  # fmt: skip


@contextlib.contextmanager
def open_stored(path: str | Path) -> Iterator[Image.Image]:
    """A PIL image of the numbers that a file stores, for masks and label maps: of a palette the indices, all bits, not turned.

    Raises:
        FileNotFoundError, ValueError: as `read_image`; but numbers without a meaning as colours are given.
    """
    data, name = _content(path), f"image {path}"
    with _pillow(data, name, read_header(data, name, colours=False).kind) as image:
        yield image


def _content(path: str | Path) -> bytes:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"image {path} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return path.read_bytes()


@contextlib.contextmanager
def _silent_opencv() -> Iterator[None]:
    """OpenCV's log is off for the length of a block: what it says of a file is said here, in one line with the file's name."""
    set_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # OpenCV 4, 5
    before = set_level(0)
    try:
        yield
    finally:
        set_level(before)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow's warnings are off for the length of a block, as OpenCV's are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _pillow(data: bytes, name: str, kind: str) -> Iterator[Image.Image]:
    """An image decoded by Pillow, after `read_header`."""
    try:
        with _no_warnings():
            image = Image.open(io.BytesIO(data), formats=[kind])
            image.load()
    except Exception as error:  # a decoder raises whatever it stumbles over
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error
    with image:
        yield image


# ------------------------------------------------------------------------------------------------ before a file is decoded

KINDS = {
    "JPEG": rb"\xff\xd8\xff", "PNG": rb"\x89PNG\r\n\x1a\n", "WEBP": rb"RIFF....WEBP", "GIF": rb"GIF8[79]a", "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]", "PPM": rb"P[1-6][\s#]", "SUN": rb"Y\xa6j\x95", "AVIF": rb"....ftypavi[fs]",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
}  # fmt: skip
"""How files begin that are read, as regular expressions, under Pillow's names of their kinds."""
NOT_READ = {
    "it holds floating-point light (HDR, PFM, EXR), which has no fixed white": rb"#\?R|P[Ff]\s|v/1\x01",
    "it is HEIC": rb"....ftyp(?:hei|hev|mif1|msf1)",
    "it is a drawing (SVG)": rb"\s*<(?:svg|!--)",
    "it is a document": rb"%PDF",
}
"""How files begin that are taken for images that can be read, and what they are."""
SPACE = rb"(?:\s|#[^\n]*\n)+"
PPM_HEADER = re.compile(rb"P(.)" + SPACE + rb"(\d{1,9})" + SPACE + rb"(\d{1,9})(?:" + SPACE + rb"(\d{1,9}))?")
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
SIZES_IN = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
"""Codes of JPEG segments that begin with the size."""
HARMLESS = "(?i)colo|subsampl|precision|progression|Invalid SOS parameters"
"""Words of libjpeg's messages about files that are odd, not damaged; if it cannot decode them, OpenCV's cannot either."""
PADDING = 64
"""Bytes without meaning that may stand in front of a JPEG's end mark."""
STACK = re.compile(r'\{"shape": \[\d+, \d+, (\d+)\]')
"""How the description of a TIFF by tifffile begins that holds a three-dimensional array, a page for each of its first indices."""
TIFF_BANDS = {0: 2, 1: 2, 2: 4, 3: 1, 5: 4, 6: 3}
"""How many bands a TIFF may have, by its photometric interpretation: grey from white, grey, RGB, palette, CMYK, YCbCr."""


@dataclass(frozen=True)
class Header:
    """What an image file says of itself; nothing of it was decoded."""

    kind: str
    """One of `KINDS`."""
    width: int
    """Pixels, as they are stored: EXIF data may turn them."""
    height: int
    no_colours: str = ""
    """Why its numbers have no one meaning as colours, if so."""
    deep: bool = False
    """It has 16 bits a number."""
    by_pillow: bool = False
    """OpenCV's pixels would be wrong: it does not turn AVIF, and blends TIFF with black where it is transparent."""

    @property
    def size(self) -> str:
        return f"{self.width} x {self.height}"


def max_pixels() -> int:
    """How many pixels an image may have: what READ_MAX_MEGAPIXELS says, which DataLoader workers inherit, else 178 million.

    Raises:
        ValueError: the variable holds no whole number from 1 on.
    """
    text = os.environ.get(IMAGE_LIMIT, str(MAX_MEGAPIXELS))
    return 1_000_000 * whole_number(int(text) if re.fullmatch("[0-9]{1,9}", text) else text, IMAGE_LIMIT)


def read_header(data: bytes, name: str, colours: bool = True) -> Header:
    """The header of an image file that may be decoded: not too large, whole as far as that can be told, and with colours.

    Args:
        colours: its numbers must have one meaning as colours.

    Raises:
        ValueError: it may not; the message begins with `name`.
    """
    if fault := not_content(data[:512]):
        raise ValueError(f"{name} {fault}")
    if (kind := _kind(data, KINDS)) is None:
        what = _kind(data, NOT_READ) or "it is not an image, or of a kind that is not read"
        raise ValueError(f"{name} cannot be read: {what}; convert it to JPEG or PNG")
    limit = max_pixels()
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)  # one limit, and no warning of Pillow below it
    try:
        with _no_warnings():
            header = _look(data, kind)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, at most {limit // 10**6} megapixels are read: {error}") from error
    except Exception as error:  # Pillow raises whatever it stumbles over
        raise ValueError(f"{name} is cut short or damaged in its header: copy or download it again") from error
    if header.width < 1 or header.height < 1:
        raise ValueError(f"{name} is damaged: its header says {header.size} pixels")
    if header.width * header.height > limit:
        raise ValueError(
            f"{name} has {header.size} pixels, {header.width * header.height / 1e6:.0f} megapixels; at most {limit // 10**6} "
            f"are read: make it smaller, or raise --max_megapixels (environment variable {IMAGE_LIMIT})"
        )
    if colours and header.no_colours:
        raise ValueError(f"{name} {header.no_colours}: save it as grey or RGB of 8 or 16 bits")
    if kind in DAMAGE and (damage := DAMAGE[kind](data)):
        raise ValueError(f"{name} {damage}: copy or download it again")
    return header


def _kind(data: bytes, kinds: dict[str, bytes]) -> str | None:
    return next((kind for kind, begin in kinds.items() if re.match(begin, data[:512], re.DOTALL)), None)


def _look(data: bytes, kind: str) -> Header:
    """The header of a file of that kind; IndexError, struct.error or what Pillow raises if there is none."""
    match kind:
        case "JPEG":
            return Header(kind, *_jpeg_parts(data)[0])
        case "PNG":
            return Header(kind, *struct.unpack_from(">II", data, 16), deep=data[24] == 16)
        case "GIF":
            return Header(kind, *struct.unpack_from("<HH", data, 6))
        case "SUN":
            return Header(kind, *struct.unpack_from(">II", data, 4))
        case "WEBP" if data[12:16] == b"VP8X":
            return Header(kind, *(1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27)))
        case "WEBP" if data[12:16] == b"VP8L":
            sides = struct.unpack_from("<I", data, 21)[0]
            return Header(kind, 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF))
        case "WEBP":
            return Header(kind, *(side & 0x3FFF for side in struct.unpack_from("<HH", data, 26)))
        case "BMP":
            old = struct.unpack_from("<I", data, 14)[0] == 12
            width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
            return Header(kind, width, abs(height))  # below 0 from the top down
        case "PPM":
            number, width, height, most = PPM_HEADER.match(data).groups()
            odd = number in b"2356" and int(most) not in (255, 65535)
            fault = f"has a maximum of {int(most)} instead of 255 or 65535" if odd else ""
            return Header(kind, int(width), int(height), fault, deep=most == b"65535")
        case "JPEG2000":
            place = data.index(b"\xff\x4f\xff\x51")  # what its box says does not count, this is decoded
            right, below, left, above = struct.unpack_from(">IIII", data, place + 8)
            signed = data[place + 42] & 0x80
            return Header(kind, right - left, below - above, "has signed numbers" if signed else "")
        case "TIFF":
            return _look_at_tiff(data)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:  # AVIF
        return Header(kind, *image.size, by_pillow=True)


def _look_at_tiff(data: bytes) -> Header:
    """Of the first image in the file. Its tags say what its numbers are; decoders ignore them."""
    tags, file = ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" or data[3:4] == b"+" else 8]), io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    meaning, bands, extra = tags.get(262, 1), tags.get(277, 1), tags.get(338, ())
    bits, numbers = set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    found = f"is a TIFF of {bands} band{'s'[:bands > 1]} of {'/'.join(map(str, sorted(bits)))} bits"
    fault = ""
    if numbers - {1, 4}:
        fault = f"{found}, {'signed' if numbers == {2} else 'floating-point or complex'} numbers, which have no one white"
    elif not bits <= {1, 8, 16}:
        fault = f"{found}, of which it is not known where white is"
    elif bands > TIFF_BANDS.get(meaning, 0):
        fault = f"{found} whose tags do not say that they are grey, RGB, CMYK or YCbCr (photometric interpretation {meaning})"
    elif tags.get(254, 0) & 1:
        fault = "begins with a preview, as raw files of cameras do"
    elif (stack := STACK.match(str(tags.get(270, "")))) and int(stack[1]) == tags[256] < 16 and bands == 1:
        fault = f"stores the bands of an array, {stack[0]}, along its rows"
    return Header("TIFF", tags[256], tags[257], fault, deep=bits == {16}, by_pillow=2 in extra and meaning == 2)


# ------------------------------------------------------------------------------------------------ whole or not


def _jpeg_parts(data: bytes) -> tuple[tuple[int, int], bytes, int]:
    """((width, height), the segments that decoding needs, the place where the first scan's data begin) of a JPEG.

    Markers are found as libjpeg finds them, with anything between segments. Left out are APPn and comments: previews have end
    marks of their own, and an odd colour profile is no damage.
    """
    size, one_pass, needed, place = None, False, [b"\xff\xd8"], 2
    while marker := JPEG_MARKER.search(data, place):
        begin, place = marker.start(), marker.end()
        if (code := data[begin + 1]) == 0xD9:
            break
        if code in (0x01, 0xD8) or 0xD0 <= code <= 0xD7:
            continue  # these have no content
        place += max(struct.unpack_from(">H", data, place)[0], 2)
        if code == 0xDA:
            if size is None:
                break
            # Phones write other numbers than these, which mean nothing here, and libjpeg's warning would hide a later one.
            scan = data[begin : place - 3] + b"\0\x3f\0" if one_pass else data[begin:place]
            return size, b"".join([*needed, scan]), place
        if code in SIZES_IN and size is None:
            height, width = struct.unpack_from(">HH", data, begin + 5)
            size, one_pass = (width, height), code in (0xC0, 0xC1)
        if not (0xE0 <= code <= 0xEF or code == 0xFE):
            needed.append(data[begin:place])
    raise IndexError("a JPEG without pixels")


def _jpeg_damage(data: bytes) -> str:
    """What is missing or wrong within the pixels of a JPEG, of which libjpeg makes grey or shifted ones and goes on."""
    _, head, pixels = _jpeg_parts(data)
    if (end := data.find(b"\xff\xd9", pixels)) < 0:  # a mark that cannot occur within pixels
        return "is cut short, its end is missing"
    try:
        simplejpeg.decode_jpeg(head + data[pixels:], "GRAY", fastdct=True, min_height=1, min_width=1)
    except ValueError as error:
        if not re.search(HARMLESS, str(error)) and not _padding(str(error), data[:end]):
            return f"is damaged within its pixels ({error})"
    return ""


def _padding(warning: str, before_end: bytes) -> bool:
    """Whether the warning is about bytes between the last pixel and the end mark that mean nothing, as some cameras add."""
    extra = re.search(r"(\d+) extraneous bytes before marker 0xd9", warning)
    return extra is not None and not before_end[-min(int(extra[1]), PADDING + 1) :].strip(b"\0\xff") and int(extra[1]) <= PADDING


def _png_damage(data: bytes) -> str:
    """What is missing or wrong in a PNG, by the checksums of the parts that decoding needs."""
    place = 8
    while len(head := data[place : place + 8]) == 8:
        length, name = struct.unpack(">I4s", head)
        end = place + 12 + length
        if end > len(data):
            break
        if name[:1].isupper() and zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return f"is damaged (checksum of {name.decode('latin-1')!a})"
        if name == b"IEND":
            return ""
        place = end
    return "is cut short, its end is missing"


def _tiff_damage(data: bytes) -> str:
    """What Pillow finds wrong in a TIFF. OpenCV makes strips that cannot be unpacked black, and goes on."""
    try:
        with _no_warnings():
            image = Image.open(io.BytesIO(data), formats=["TIFF"])
    except Exception:  # 16 bits of RGB, for one, are not known to Pillow
        return ""
    with image:
        try:
            with _no_warnings():
                image.load()
        except Exception as error:  # it raises whatever it stumbles over
            return f"is damaged ({error})"
    return ""


DAMAGE = {"JPEG": _jpeg_damage, "PNG": _png_damage, "TIFF": _tiff_damage}
"""How damage is found that OpenCV passes over."""


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
