"""Pictures of an answer: the only file that draws.

    mask_image(segment)                  what the model segmented, 0 / 255, pixels of the original picture
    similarity_image(image, segment)     the similarity map as heat over the dimmed picture
    overlay_image(image, segments)       masks tinted, the points that prompted them, a legend
    panel_image(image, q, a, segments)   all of it side by side under question and answer
    truth_image(image, mask, ignored)    the picture with the outline of what is meant
    answer_image(image, segment, tint)   one answer's mask and points; beside truth_image in a comparison
    map_image(image, heat, seen)         a map that lies over the picture already, and where it passes a threshold
    points_image(image, segment)         the points alone
    strip_image(tiles, labels)           tiles in a row
    sheet_image(rows, columns)           tiles in rows and columns, each row under its own words
    layers_image(image, segments, which) picture, map, masks, points one above the other, each to be left out

In go a picture (H, W, 3) uint8 RGB and `Segment`s, out come PIL images; nothing is written here.

Legend: (H, W) pixels of the original picture · G side of the grid of image tokens · K points, (x, y) in pixels of the original.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from model import Answer

Colour = tuple[int, int, int]

TINTS: tuple[Colour, ...] = ((0, 176, 240), (213, 54, 232), (255, 150, 0), (92, 84, 255), (240, 205, 0))
"""Masks, in the order of their [SEG]; none is near the points' green and red."""
POSITIVE, NEGATIVE = (38, 208, 108), (240, 62, 62)
INK, SOFT, PAPER = (28, 32, 38), (96, 104, 114), (255, 255, 255)
SHORT_SIDE_OF_TILE = 300
LONG_SIDE_IN_PAGE = 480
"""Pixels of the pictures that go into a page: enough to see an outline, little enough for sixty of them in one file."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """One `[SEG]` as it is drawn."""

    mask: np.ndarray
    """(H, W) bool."""
    similarity: np.ndarray | None
    """(G, G) float32 over CLIP's view, the centre square of the picture; None where it was not kept (predictions files)."""
    points: np.ndarray
    """(K, 2) float32, (x, y) in pixels of the original picture."""
    labels: np.ndarray
    """(K,) int64: 1 object, 0 background, -1 neutral. Neutral points carry no position in SAM, so they are not drawn."""


def segments_of(answer: Answer) -> list[Segment]:
    """What there is to draw of an answer, a Segment a [SEG]."""
    parts = zip(answer.masks, answer.similarity, answer.points, answer.point_labels, strict=True)
    return [Segment(*part) for part in parts]


# ------------------------------------------------------------------------------------------------ single pictures


def mask_image(segment: Segment) -> Image.Image:
    """The mask, 0 or 255, in the size of the original picture."""
    return Image.fromarray(segment.mask.astype(np.uint8) * 255)


def similarity_image(image: np.ndarray, segment: Segment) -> Image.Image:
    """The similarity map, stretched between its least and greatest value, over the dimmed picture in its own size.

    The map covers what CLIP saw; what its crop cut off stays dark.
    """
    return Image.fromarray(_heated(image, *_heat(segment.similarity, *image.shape[:2])))


def overlay_image(image: np.ndarray, segments: list[Segment]) -> Image.Image:
    """Masks and points on the picture, with a legend below. Small pictures are enlarged so that points can be told apart."""
    scale = float(np.clip(768 / max(image.shape[:2]), 1, 4))
    picture = _with_points(_with_masks(image, segments, scale), segments, scale)
    return _with_legend(picture, segments)


# ------------------------------------------------------------------------------------------------ side by side in a page


def truth_image(
    image: np.ndarray, mask: np.ndarray, ignored: np.ndarray | None = None, side: int = LONG_SIDE_IN_PAGE
) -> Image.Image:
    """The picture with the true mask (H, W) outlined in white; hatched where `ignored` (H, W), which does not count.

    The longest side becomes `side`; small pictures are enlarged four times at most.
    """
    scale = _scale_in_page(image, side)
    picture = _resized(image, scale)
    canvas = np.array(picture)
    if ignored is not None and ignored.any():
        hatch = np.add.outer(np.arange(picture.height), np.arange(picture.width)) % 10 < 4
        hatch &= _enlarged(ignored != 0, picture.size, scale)
        canvas[hatch] = (0.35 * canvas[hatch] + 0.65 * np.array(INK)).astype(np.uint8)
    if mask.any():
        _outline(canvas, _enlarged(mask != 0, picture.size, scale), PAPER, edge=INK, wider=1)
    return Image.fromarray(canvas)


def answer_image(image: np.ndarray, segment: Segment, tint: Colour, side: int = LONG_SIDE_IN_PAGE) -> Image.Image:
    """The picture with one mask in the colour `tint` and the points that prompted it, in the size of `truth_image`."""
    scale = _scale_in_page(image, side)
    return _with_points(_with_masks(image, [segment], scale, tint=tint), [segment], scale)


def map_image(
    image: np.ndarray, heat: np.ndarray, seen: np.ndarray, level: float | None = None, side: int = LONG_SIDE_IN_PAGE
) -> Image.Image:
    """A map (H, W) in [0, 1] as heat over the dimmed picture, darker where not `seen` (H, W), in the size of `truth_image`.

    With `level` the places where the map is at least that are outlined.
    """
    scale = _scale_in_page(image, side)
    picture = _resized(image, scale)
    fine = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    covered = np.asarray(Image.fromarray(seen).resize(picture.size, Image.Resampling.NEAREST))
    canvas = _heated(np.asarray(picture), fine.clip(0, 1), covered)
    if level is not None and (heat >= level).any():
        _outline(canvas, (fine >= level) & covered, PAPER, edge=INK)
    return Image.fromarray(canvas)


def points_image(image: np.ndarray, segment: Segment, side: int = LONG_SIDE_IN_PAGE) -> Image.Image:
    """The points on the dimmed picture, in the size of `truth_image`."""
    scale = _scale_in_page(image, side)
    dimmed = (np.asarray(_resized(image, scale)) * 0.72 + 255 * 0.06).astype(np.uint8)
    return _with_points(Image.fromarray(dimmed), [segment], scale, 0.022)


def layers_image(
    image: np.ndarray, segments: list[Segment], layers: Collection[str], first_tint: int = 0, side: int = 2 * LONG_SIDE_IN_PAGE
) -> Image.Image:
    """The picture with those of its `layers` that are named: `similarity`, on it `mask`, on it `points`.

    Over a map masks are mere outlines, so that it is seen; of several segments it shows the greatest value. The longest side
    becomes `side`; small pictures are enlarged four times at most. Masks take the tints from `first_tint` on.
    """
    scale = _scale_in_page(image, side)
    maps = [segment.similarity for segment in segments if segment.similarity is not None] if "similarity" in layers else []
    if maps:
        picture = _resized(image, scale)
        heats = [_heat(one, picture.height, picture.width) for one in maps]
        canvas = _heated(np.asarray(picture), np.max([heat for heat, _ in heats], axis=0), heats[0][1])
        for k, segment in enumerate(segments if "mask" in layers else []):
            _outline(canvas, _enlarged(segment.mask, picture.size, scale), _tint(first_tint + k))
        picture = Image.fromarray(canvas)
    else:
        picture = _with_masks(image, segments if "mask" in layers else [], scale, first_tint)
    return _with_points(picture, segments, scale) if "points" in layers else picture


def strip_image(tiles: list[Image.Image], labels: list[str]) -> Image.Image:
    """Tiles of one size in a row, a short label in the corner of each."""
    gap, font = 4, _font(13)
    width, height = tiles[0].size
    strip = Image.new("RGB", (len(tiles) * (width + gap) - gap, height), INK)
    draw = ImageDraw.Draw(strip)
    for n, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x = n * (width + gap)
        strip.paste(tile, (x, 0))
        strip.paste(INK, (x + 4, 4), _rounded((int(font.getlength(label)) + 12, 20), 10))
        draw.text((x + 10, 6), label, font=font, fill=PAPER)
    return strip


def sheet_image(rows: list[tuple[str, list[Image.Image]]], columns: list[str], tile: int = 116) -> Image.Image:
    """A sheet of small tiles under the names of their columns; above each row its words, cut where they are too long.

    Tiles keep their shape, the longest side is `tile`; a palette of 256 colours keeps the file small.
    """
    gap, words, margin, head = 6, 22, 14, 44
    font, bold = _font(12), _font(12, bold=True)
    heights = [max(picture.height * tile // max(picture.size) for picture in pictures) for _, pictures in rows]
    width = 2 * margin + len(columns) * (tile + gap) - gap
    sheet = Image.new("RGB", (width, head + sum(heights) + len(rows) * (words + gap) + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, name in enumerate(columns):
        middle = margin + n * (tile + gap) + tile / 2
        draw.multiline_text((middle, head - 8), name, font=bold, fill=INK, anchor="md", align="center", spacing=2)
    y = head
    for (text, pictures), height in zip(rows, heights, strict=True):
        while font.getlength(text) > width - 2 * margin:
            text = text[:-2].rstrip(" …") + "…"
        draw.text((margin, y + 3), text, font=font, fill=SOFT)
        for n, picture in enumerate(pictures):
            small = picture.copy()
            small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
            left = margin + n * (tile + gap) + (tile - small.width) // 2
            sheet.paste(small, (left, y + words + (height - small.height) // 2))
        y += words + height + gap
    return _with_palette(sheet, (POSITIVE, NEGATIVE, PAPER, INK, SOFT))


def _with_palette(picture: Image.Image, kept: tuple[Colour, ...]) -> Image.Image:
    """With 256 colours, `kept` among them as they are: few pixels have them, and a palette by frequency would lose them."""
    found = picture.quantize(256 - len(kept), method=Image.Quantize.MEDIANCUT, kmeans=2).getpalette()[: 3 * (256 - len(kept))]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*found, *(value for colour in kept for value in colour)])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def _scale_in_page(image: np.ndarray, side: int) -> float:
    return min(side / max(image.shape[:2]), 4.0)


# ------------------------------------------------------------------------------------------------ the panel


def panel_image(image: np.ndarray, question: str, answer: str, segments: list[Segment]) -> Image.Image:
    """Question and answer above a row a [SEG]: picture, similarity map, points, mask. Without [SEG]: the picture alone.

    The size depends on the shape of the picture alone, not on its pixels.
    """
    height, width = image.shape[:2]
    scale = SHORT_SIDE_OF_TILE / min(height, width)
    scale = min(scale, 2.2 * SHORT_SIDE_OF_TILE / max(height, width))
    tile = (round(width * scale), round(height * scale))
    rows = [_tiles(image, segments, k, scale) for k in range(len(segments))] or [[("picture", _resized(image, scale))]]

    margin, gap, label_height = 36, 18, 42
    columns = max(len(row) for row in rows)
    body = max(columns * tile[0] + (columns - 1) * gap, 560)
    caption = _Caption(question, answer, body)
    total = (body + 2 * margin, margin + caption.height + 22 + len(rows) * (tile[1] + label_height) + margin - 18)
    sheet = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(sheet)
    caption.draw(sheet, margin, margin)
    y = margin + caption.height + 22
    for k, row in enumerate(rows):
        for column, (name, picture) in enumerate(row):
            x = margin + column * (tile[0] + gap)
            sheet.paste(picture.resize(tile), (x, y), _rounded(tile, 10))
            _label(draw, sheet, x, y + tile[1] + 9, name, segments[k] if segments else None)
        y += tile[1] + label_height
    return sheet


def _tiles(image: np.ndarray, segments: list[Segment], k: int, scale: float) -> list[tuple[str, Image.Image]]:
    """(name, picture) of each column for the k-th segment; without points (SasP off) that column is left out."""
    one, tint = segments[k], k
    large = np.asarray(_resized(image, scale))
    tiles = [("picture", Image.fromarray(large)), ("similarity", similarity_image(large, one))]
    if len(one.points):
        dimmed = Image.fromarray((large * 0.72 + 255 * 0.06).astype(np.uint8))
        tiles.append(("points", _with_points(dimmed, [one], scale, 0.020)))
    return [*tiles, ("mask", _with_masks(image, [one], scale, tint))]


def _label(draw: ImageDraw.ImageDraw, sheet: Image.Image, x: int, y: int, name: str, segment: Segment | None) -> None:
    """What a column shows; the points' column is its own legend."""
    font = _font(15)
    draw.text((x, y), name, font=font, fill=SOFT)
    if name != "points" or segment is None:
        return
    x += int(font.getlength(name)) + 14
    for colour, count, word in _counts(segment):
        _dot(sheet, x + 6, y + 10, 5.5, colour)
        text = f"{count} {word}"
        draw.text((x + 17, y), text, font=font, fill=SOFT)
        x += 17 + int(font.getlength(text)) + 12


class _Caption:
    """Question and answer, wrapped to a width; `[SEG]` becomes a pill in the colour of its mask."""

    def __init__(self, question: str, answer: str, width: int) -> None:
        self.lines: list[tuple[int, list[tuple[int, str, ImageFont.FreeTypeFont, Colour, Colour | None]]]] = []
        self.y = 0
        self._add(question, _font(23, bold=True), INK, width, 33)
        self.y += 5
        self._add(answer, _font(20), SOFT, width, 31)

    @property
    def height(self) -> int:
        return self.y

    def _add(self, text: str, font: ImageFont.FreeTypeFont, fill: Colour, width: int, step: int) -> None:
        x, line, count = 0, [], 0
        for word in text.replace("[SEG]", " [SEG] ").split():
            is_seg = word == "[SEG]"
            pill = _tint(count) if is_seg else None
            count += is_seg
            face, shown = (_font(15, bold=True), "SEG") if is_seg else (font, word)
            length = int(face.getlength(shown)) + (22 if is_seg else 0)
            closing = word in {".", ",", ";", ":", "!", "?"}  # stays with the word before it
            x += 0 if not line or closing else int(font.getlength(" "))
            if line and not closing and x + length > width:
                self.lines.append((self.y, line))
                self.y, x, line = self.y + step, 0, []
            line.append((x, shown, face, fill, pill))
            x += length
        self.lines.append((self.y, line))
        self.y += step

    def draw(self, sheet: Image.Image, left: int, top: int) -> None:
        draw = ImageDraw.Draw(sheet)
        for y, line in self.lines:
            for x, word, font, fill, pill in line:
                if pill is None:
                    draw.text((left + x, top + y), word, font=font, fill=fill)
                else:
                    size = (int(font.getlength(word)) + 20, 24)
                    sheet.paste(pill, (left + x, top + y), _rounded(size, 12))
                    draw.text((left + x + 10, top + y + 3), word, font=font, fill=PAPER)


# ------------------------------------------------------------------------------------------------ parts


def _heat(similarity: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(map in [0, 1], seen) of (height, width): the (G, G) grid laid over the centre square that CLIP's crop keeps."""
    low, high = float(np.nanmin(similarity)), float(np.nanmax(similarity))
    flat = not np.isfinite(high - low) or high == low  # a constant map has no hot place
    grid = np.zeros_like(similarity) if flat else np.nan_to_num((similarity - low) / (high - low))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    heat, seen = np.zeros((height, width), np.float32), np.zeros((height, width), bool)
    square = cv2.resize(grid.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    heat[top : top + side, left : left + side] = square
    seen[top : top + side, left : left + side] = True
    return heat, seen


def _heated(image: np.ndarray, heat: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8: heat (h, w) in [0, 1] over the grey, dimmed picture; what is not `seen` (h, w) stays dark."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None] * 0.7
    strength = (0.12 + 0.72 * heat[..., None]) * seen[..., None]
    mixed = grey * np.where(seen[..., None], 1.0, 0.4) * (1 - strength) + _colours(heat) * strength
    return np.ascontiguousarray(mixed.clip(0, 255).astype(np.uint8))


@functools.lru_cache
def _colour_table() -> np.ndarray:
    """(256, 3) float32 of the inferno map without its black end, which would only darken the picture."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.linspace(0.18, 1, 256))[:, :3] * 255).astype(np.float32)


def _colours(heat: np.ndarray) -> np.ndarray:
    return _colour_table()[(heat * 255).astype(np.uint8)]


def _resized(image: np.ndarray, scale: float) -> Image.Image:
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)


def _enlarged(mask: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    """A mask in the size of the enlarged picture, its stairs smoothed: for the eye only."""
    soft = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC))
    return (cv2.GaussianBlur(soft, (0, 0), 0.6 * scale) if scale > 1 else soft) > 127


def _tint(index: int) -> Colour:
    return TINTS[index % len(TINTS)]


def _with_masks(
    image: np.ndarray, segments: list[Segment], scale: float, first_tint: int = 0, tint: Colour | None = None
) -> Image.Image:
    """The enlarged picture with each mask tinted and outlined; the rest is a little paler so that the object stands out.

    Masks take the TINTS in turn, from the one numbered `first_tint` on; or all take `tint`.
    """
    picture = _resized(image, scale)
    tints = [tint or _tint(first_tint + k) for k in range(len(segments))]
    size = picture.size
    masks = [_enlarged(s.mask, size, scale) for s in segments]
    pixels = np.asarray(picture).astype(np.float32)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    if masks:
        rest = ~np.any(masks, axis=0)
        pixels[rest] = 0.78 * pixels[rest] + 0.18 * grey[rest]
    for mask, colour in zip(masks, tints, strict=True):
        # Over grey, not over the picture's colour: else blue on yellow would be a third colour that no legend names.
        pixels[mask] = 0.12 * pixels[mask] + 0.43 * grey[mask] + 0.45 * np.array(colour, np.float32)
    canvas = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
    for mask, colour in zip(masks, tints, strict=True):
        _outline(canvas, mask, colour)
    return Image.fromarray(canvas)


def _outline(canvas: np.ndarray, mask: np.ndarray, colour: Colour, edge: Colour = PAPER, wider: int = 0) -> None:
    """Draws the outline of a bool mask on a canvas of its size, in place: `colour` with an `edge` on both sides."""
    line = max(1, round(max(canvas.shape[:2]) / 400)) + wider
    outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outline, -1, edge, line + 2, cv2.LINE_AA)
    cv2.drawContours(canvas, outline, -1, colour, line, cv2.LINE_AA)


def _with_points(picture: Image.Image, segments: list[Segment], scale: float, size: float = 0.013) -> Image.Image:
    """Dots at the positive and negative points, the positive on top; radius as a share of the shorter side."""
    picture = picture.copy()
    radius = max(3.0, size * min(picture.size))
    for label, colour in ((0, NEGATIVE), (1, POSITIVE)):
        for segment in segments:
            for x, y in segment.points[segment.labels == label]:
                # Pixel centres: the middle of the pixel x lies at (x + .5) in the enlarged picture.
                _dot(picture, (x + 0.5) * scale, (y + 0.5) * scale, radius, colour)
    return picture


def _dot(picture: Image.Image, x: float, y: float, radius: float, colour: Colour) -> None:
    """A smooth dot with a white rim and a faint shadow, drawn at four times its size."""
    reach, fine = int(radius + 4), 4
    left, top = round(x) - reach, round(y) - reach
    side = (2 * reach + 1) * fine
    centre = ((x - left) * fine, (y - top) * fine)
    for r, fill, strength in ((radius + 2, (0, 0, 0), 70), (radius + 1, PAPER, 255), (radius - 0.6, colour, 255)):
        stamp = Image.new("L", (side, side), 0)
        box = (centre[0] - r * fine, centre[1] - r * fine, centre[0] + r * fine, centre[1] + r * fine)
        ImageDraw.Draw(stamp).ellipse(box, fill=strength)
        picture.paste(fill, (left, top), stamp.resize((side // fine, side // fine), Image.Resampling.BOX))


def _counts(segment: Segment) -> list[tuple[Colour, int, str]]:
    return [
        (POSITIVE, int((segment.labels == 1).sum()), "object"),
        (NEGATIVE, int((segment.labels == 0).sum()), "background"),
    ]


def _with_legend(picture: Image.Image, segments: list[Segment]) -> Image.Image:
    """A bar below the picture that says what colours mean, wrapped where the picture is narrow."""
    font, step, pad = _font(15), 28, 14
    entries: list[tuple[str, Colour, str]] = []
    for k, segment in enumerate(segments):
        name = "mask" if len(segments) == 1 else f"mask {k + 1}"
        share = 100 * segment.mask.mean()
        entries.append(("square", _tint(k), f"{name}, {share:.1f} % of the picture"))
    if any(len(segment.points) for segment in segments):
        totals = zip(*(_counts(segment) for segment in segments), strict=True)
        for same in totals:
            colour, _, word = same[0]
            count = sum(number for _, number, _ in same)
            entries.append(("dot", colour, f"{count} {word} point{'' if count == 1 else 's'}"))
    places, x, y = [], pad, 0
    for kind, colour, text in entries:
        length = 22 + int(font.getlength(text))
        if x > pad and x + length > picture.width - pad:
            x, y = pad, y + step
        places.append((x, y, kind, colour, text))
        x += length + 20
    sheet = Image.new("RGB", (picture.width, picture.height + y + step + 14), PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for x, y, kind, colour, text in places:
        y += picture.height + 11
        if kind == "dot":
            _dot(sheet, x + 7, y + 10, 6, colour)
        else:
            sheet.paste(colour, (x, y + 3), _rounded((15, 15), 4))
        draw.text((x + 22, y), text, font=font, fill=INK)
    return sheet


@functools.lru_cache(maxsize=64)
def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    """A mask (L) of a rectangle with smooth round corners."""
    fine = 4
    large = Image.new("L", (size[0] * fine, size[1] * fine), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, size[0] * fine - 1, size[1] * fine - 1), radius * fine, fill=255)
    return large.resize(size, Image.Resampling.BOX)


@functools.lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same letters on every machine."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)
