"""One model on data sets: a `Row` of numbers an expression, and its pictures on disk as soon as it is looked at.

    study = run(model, processor, parts, options)        parts: [(name, samples), ...]

The language model and SAM's encoder see a picture once, its expressions follow as a batch; whatever prompts are tried afterwards
run in SAM's decoder alone. The numbers are defined in the package's docstring.

Legend: M [SEG] tokens · K points · L thresholds · (H, W) pixels of the original picture.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.collate import collate
from model.packing import pad_rows
from utils import visualize
from utils.files import short_name
from utils.metrics import IGNORE_PIXEL, Expression, Overlap, count, overlap

from . import maps as picture_maps
from .maps import PictureMap
from .probe import LAYER_SEG, Seen, look, watch
from .prompts import Setting, Untouched, View, choose, draw, settings_of

if TYPE_CHECKING:
    from dataset.types import Sample
    from model import EncodedImages, READForCausalLM, READProcessor
    from model.sasp import PointPrompts

MAPS = {"clip": "before the LM", "llava": "after the LM", "sam": "in SAM's decoder"}
PAIRS = (("clip", "llava"), ("clip", "sam"), ("llava", "sam"))
PROMPTS = {"points": "points", "untouched": "points, untouched SAM", "embedding": "[SEG]", "both": "[SEG] and points"}
TINTS = {
    "points": visualize.TINTS[2], "untouched": visualize.TINTS[4], "embedding": visualize.TINTS[1], "both": visualize.TINTS[0]
}  # fmt: skip
SWEPT = ("points", "both")
"""Prompts in which a sweep changes something."""
SIDE, SIDE_OF_STRIP, SIDE_OF_SHEET = 320, 128, 232
"""Longest side of the pictures of an expression, of those in the strip of layers, and of those that the sheet shrinks, pixels."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is looked at; one for all models of a report."""

    protocol: str = "forced"
    """`forced` or `generate`, as in `utils.evaluate`."""
    max_new_tokens: int = 512
    conv_type: str | None = None
    chunk: int = 16
    """Expressions that go through the model together."""
    layers: tuple[int, ...] | None = ()
    """Layers of the language model; None is all of them."""
    layer_seg: str = "same"
    """Of `LAYER_SEG`, the kind that the strip shows; the numbers have both."""
    sam_token: str = "seg"
    sweep: bool = False
    cards: int = 200
    """Expressions of the report, counted over all data sets, of which pictures are drawn."""
    figure: int = 0
    """Expressions of which the small tiles of one sheet are kept, one a picture."""
    out: Path | None = None
    """Folder of the report; None draws nothing."""


@dataclasses.dataclass
class Picture:
    """A picture of an expression on disk."""

    name: str
    """Of MAPS or PROMPTS, or `truth`, `dots`, `layers`."""
    file: str
    """Relative to the report."""
    size: tuple[int, int]
    """(width, height)."""
    words: str
    """For those who cannot see it."""


@dataclasses.dataclass
class Row:
    """The numbers of one expression."""

    part: str
    """Data set and split."""
    image_index: int
    question_index: int
    image: str
    question: str
    answer: str
    exists: bool
    num_seg: int
    share: float
    """Of the picture's pixels that are the object's."""
    masks: dict[str, Expression]
    """Prompt -> counted pixels."""
    own: str
    """The prompt that the model itself uses."""
    confidence: float | None = None
    """SAM's own estimate of the IoU of the model's mask."""
    points: tuple[int, int, int] = (0, 0, 0)
    """Object, background and neutral points."""
    levels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Map -> (L, 2) of `maps.overlaps`; empty without a [SEG] or where the object has no pixels. Likewise the next three."""
    peaks: dict[str, bool] = dataclasses.field(default_factory=dict)
    layers: dict[tuple[str, int], tuple[float, bool]] = dataclasses.field(default_factory=dict)
    """(kind, layer) -> S_IoU, peak on the object."""
    agreement: dict[tuple[str, str], tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Pair of maps -> (r, IoU); wherever there is a [SEG]."""
    sweep: dict[str, list[Overlap]] = dataclasses.field(default_factory=dict)
    """Prompt -> one a setting."""
    sweep_points: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """As `points`, one a setting."""
    pictures: list[Picture] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        """Place in the report, the same for all models."""
        return self.part, self.image_index, self.question_index

    @property
    def measured(self) -> bool:
        """There is a map, and an object to measure it against."""
        return bool(self.levels)

    def s_iou(self, name: str, level: float = picture_maps.HEADLINE) -> float:
        """S_IoU of a map at a threshold; NaN where it was not measured."""
        if not self.levels:
            return float("nan")
        return float(picture_maps.s_iou(self.levels[name])[picture_maps.LEVELS.index(level)])


@dataclasses.dataclass(eq=False)
class Study:
    """One model on all data sets. Each is itself alone: `tables` remembers what it summed up."""

    name: str
    settings: dict[str, Any]
    """What the numbers depend on."""
    prompts: tuple[str, ...]
    """Of PROMPTS, those that were tried."""
    layers: tuple[int, ...]
    sweep: list[Setting]
    rows: list[Row] = dataclasses.field(default_factory=list)
    failed: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    """(data set and split, picture, what went wrong)."""
    sheet: list[tuple[str, list[Image.Image]]] = dataclasses.field(default_factory=list)
    """Question and tiles, as `visualize.sheet_image` takes them."""

    def of(self, part: str) -> list[Row]:
        """The rows of one data set."""
        return [row for row in self.rows if row.part == part]


def run(
    model: READForCausalLM,
    processor: READProcessor,
    parts: Sequence[tuple[str, Sequence[Sample]]],
    options: Options,
    *,
    name: str = "model",
    number: int = 0,
    settings: dict[str, Any] | None = None,
    untouched: Untouched | None = None,
) -> Study:
    """Looks at every expression of the data sets.

    Args:
        parts: (name, samples of `dataset.build_eval` with the protocol of `options`).
        name, number: of the model, in words and among the models of the report.
        settings: what the report says about the model.
        untouched: a SAM for the points, beside the checkpoint's own.

    Returns:
        The rows; pictures that could not be read or asked about are named in `failed`.
    """
    blocks = model.config.llava.text_config.num_hidden_layers
    layers = tuple(range(blocks + 1)) if options.layers is None else tuple(sorted(set(options.layers)))
    study = Study(
        name=name,
        settings=settings or {},
        prompts=tuple(prompt for prompt in PROMPTS if prompt != "untouched" or untouched),
        layers=layers,
        sweep=settings_of(model.config.sasp) if options.sweep else [],
    )
    looker = _Looker(model, processor, options, study, number, untouched)
    before = 0
    for part, samples in parts:
        places = tqdm(
            range(len(samples)), desc=f"{name}, {part}", unit="image", mininterval=0.5 if sys.stderr.isatty() else 15
        )
        for index in places:
            try:
                looker.picture(part, index, before + index, samples[index])
            except (OSError, ValueError) as error:
                log.warning("%s, picture %d is left out: %s", part, index, error)
                study.failed.append((part, index, str(error)))
        before += len(samples)
    return study


class _Shown(NamedTuple):
    """A picture that is being asked about."""

    part: str
    index: int
    number: int
    """Counted over all data sets."""
    sample: Sample
    images: EncodedImages
    bare: View | None
    """As the untouched SAM has it."""

    @property
    def size(self) -> tuple[int, int]:
        return self.sample.image.shape[:2]


class _Tried(NamedTuple):
    """One setting of a sweep on M [SEG] tokens."""

    masks: dict[str, np.ndarray]
    """Prompt -> (M, H, W) bool."""
    points: list[tuple[int, int, int]]


class _Looker:
    """A picture at a time -> rows of a study."""

    def __init__(
        self,
        model: READForCausalLM,
        processor: READProcessor,
        options: Options,
        study: Study,
        number: int,
        untouched: Untouched | None,
    ) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.study, self.number, self.untouched = study, number, untouched
        room = options.max_new_tokens if options.protocol == "generate" else 0
        self.max_positions = model.config.llava.text_config.max_position_embeddings - room

    @torch.no_grad()
    def picture(self, part: str, index: int, number: int, sample: Sample) -> None:
        """All expressions of a picture; `number` counts it over all data sets."""
        generate = self.options.protocol == "generate"
        batch = collate(
            [sample], self.processor, training=False, padding="left" if generate else "right",
            conv_type=self.options.conv_type, max_positions=self.max_positions,
        )  # fmt: skip
        inputs = batch.to(self.model.device, self.model.dtype).model_inputs()
        asked = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "image_of_question")}
        rows: list[Row] = []
        with watch(self.model, self.study.layers) as tape:
            images = self.model.encode_images(**inputs)
            bare = self.untouched.view(sample.image) if self.untouched else None
            shown = _Shown(part, index, number, sample, images, bare)
            for first in range(0, len(asked["input_ids"]), self.options.chunk):
                ids, mask, nobody = (tensor[first : first + self.options.chunk] for tensor in asked.values())
                answers = [turns[-1][1] or "" for turns in sample.conversations[first : first + len(ids)]]
                if generate:
                    ids, mask, answers = self._generated(images, ids, mask, nobody)
                seen = look(self.model, tape, images, ids, mask, self.options.sam_token)
                rows += self._rows(shown, first, answers, seen)
        self.study.rows += rows

    def _generated(
        self, images: EncodedImages, ids: torch.Tensor, mask: torch.Tensor, nobody: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """(ids (N, T), mask (N, T), N answers): the conversations with the model's own answers, padded on the right."""
        used = mask.any(dim=0)  # a first question alone is read as it is, and its row must begin as all do (`probe`)
        ids, mask = ids[:, used], mask[:, used]
        out = self.model.generate_answers(images, ids, mask, nobody, max_new_tokens=self.options.max_new_tokens)
        whole = [
            torch.cat([row[keep], row.new_tensor(answer)])
            for row, keep, answer in zip(ids, mask, out.answer_ids, strict=True)
        ]
        return *pad_rows(whole, "right"), [self.processor.decode(answer) for answer in out.answer_ids]

    def _rows(self, shown: _Shown, first: int, answers: list[str], seen: Seen) -> Iterator[Row]:
        """Of the questions from `first` on, as many as there are answers."""
        segments, own = seen.segments, "both" if self.model.config.sasp.enabled else "embedding"
        points, logits, tried = None, {}, []
        if len(segments):
            view = View(shown.images.sam_embeddings[0], tuple(shown.images.sam_sizes[0]), shown.size)
            points = choose(self.model, seen.llava, shown.size, self.model.config.sasp)
            logits = self._draw(view, seen.texts[:, None], points)
            logits[own] = segments.mask_logits  # the model's own, not one like it
            if shown.bare is not None:
                logits["untouched"] = self.untouched.draw(shown.bare, points)
            tried = self._try(view, seen)
        for n, answer in enumerate(answers, start=first):
            target = np.asarray(shown.sample.masks[n])
            entries = segments.of_question(n - first)
            entry = entries[0] if entries else None  # the first [SEG] counts, as in the scores
            masks = {
                prompt: np.zeros(shown.size, bool) if entry is None else (logits[prompt][entry] > 0).cpu().numpy()
                for prompt in self.study.prompts
            }
            row = self._row(shown, n, answer, len(entries), masks, own)
            segment = visualize.Segment(masks[own], None, np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
            laid: dict[str, PictureMap] = {}
            strip: dict[int, PictureMap] = {}
            if entry is not None:
                row.confidence, row.points = float(segments.scores[entry]), _kinds(points.labels[entry])
                place = points.points[entry].float().cpu().numpy()
                segment = dataclasses.replace(segment, points=place, labels=points.labels[entry].cpu().numpy())
                laid = self._laid(seen, entry, shown)
                strip = self._layers(row, seen, entry, shown.size, target)
                _measure(row, laid, target)
            if self.study.sweep:
                _sweep(row, tried, len(self.study.sweep), entry, target)
            self._pictures(row, shown.sample.image, target, masks, laid, strip, segment)
            yield row

    def _row(self, shown: _Shown, n: int, answer: str, num_seg: int, masks: dict[str, np.ndarray], own: str) -> Row:
        """What is known of question n without its maps and points."""
        sample = shown.sample
        target, exists = np.asarray(sample.masks[n]), bool(sample.exists[n])
        counted = {
            prompt: count(mask, target, shown.number, exists, num_seg > 0 and bool(mask.any()))
            for prompt, mask in masks.items()
        }
        return Row(
            part=shown.part, image_index=shown.index, question_index=n, image=sample.image_path,
            question=sample.questions[n], answer=answer, exists=exists, num_seg=num_seg,
            share=counted[own].target / target.size, masks=counted, own=own,
        )  # fmt: skip

    def _draw(self, view: View, texts: torch.Tensor, points: PointPrompts) -> dict[str, Any]:
        """Prompt -> (M, H, W) logits, of the checkpoint's decoder; texts (M, 1, C)."""
        return {
            "points": draw(self.model, view, texts[:, :0], points),
            "embedding": draw(self.model, view, texts, None),
            "both": draw(self.model, view, texts, points),
        }

    def _try(self, view: View, seen: Seen) -> list[_Tried]:
        """One a setting of the sweep; points that were had before are not drawn again."""
        tried: list[_Tried] = []
        known: list[tuple[PointPrompts, _Tried]] = []
        for setting in self.study.sweep:
            points = choose(self.model, seen.llava, view.original_size, setting.sasp)
            found = next((drawn for earlier, drawn in known if _same(earlier, points)), None)
            if found is None:
                texts = {"points": seen.texts[:, None][:, :0], "both": seen.texts[:, None]}
                masks = {prompt: (draw(self.model, view, texts[prompt], points) > 0).cpu().numpy() for prompt in SWEPT}
                found = _Tried(masks, [_kinds(labels) for labels in points.labels])
                known.append((points, found))
            tried.append(found)
        return tried

    def _laid(self, seen: Seen, entry: int, shown: _Shown) -> dict[str, PictureMap]:
        """The three maps over the picture."""
        config, sam_size = self.model.config, tuple(shown.images.sam_sizes[0])
        return {
            "clip": picture_maps.token_map(_grid(seen.clip[entry]), shown.size, config.clip_image_size),
            "llava": picture_maps.token_map(_grid(seen.llava[entry]), shown.size, config.clip_image_size),
            "sam": picture_maps.decoder_map(seen.sam[entry], config.sam.image_size, sam_size, shown.size),
        }

    def _layers(
        self, row: Row, seen: Seen, entry: int, size: tuple[int, int], target: np.ndarray
    ) -> dict[int, PictureMap]:
        """Numbers of the layers asked for; the maps of the kind that the strip shows."""
        shown = {}
        for layer in self.study.layers:
            for kind in LAYER_SEG:
                grid = _grid(seen.layers[kind, layer][entry])
                laid = picture_maps.token_map(grid, size, self.model.config.clip_image_size)
                if (target == 1).any():
                    levels = picture_maps.s_iou(picture_maps.overlaps(laid.heat, target))
                    at = picture_maps.LEVELS.index(picture_maps.HEADLINE)
                    row.layers[kind, layer] = float(levels[at]), picture_maps.peak_on_object(laid, target)
                if kind == self.options.layer_seg:
                    shown[layer] = laid
        return shown

    # ---- pictures

    def _pictures(
        self,
        row: Row,
        image: np.ndarray,
        target: np.ndarray,
        masks: dict[str, np.ndarray],
        laid: dict[str, PictureMap],
        strip: dict[int, PictureMap],
        segment: visualize.Segment,
    ) -> None:
        """Draws what the report and the sheet show of an expression."""
        done = len(self.study.rows) + row.question_index
        if self.options.out is not None and done < self.options.cards:
            tiles = _tiles(row, image, target, masks, laid, segment, SIDE)
            if strip:
                small = [
                    visualize.map_image(image, m.heat, m.seen, picture_maps.HEADLINE, SIDE_OF_STRIP)
                    for m in strip.values()
                ]
                words = f"Maps of the layers {', '.join(map(str, strip))} of the language model"
                tiles.append(("layers", visualize.strip_image(small, [str(layer) for layer in strip]), words))
            row.pictures = [self._save(row, *tile) for tile in tiles]
        if len(self.study.sheet) < self.options.figure and row.question_index == 0 and laid:
            tiles = _tiles(row, image, target, masks, laid, segment, SIDE_OF_SHEET)
            before, after, inside = (f"{100 * row.s_iou(name):.0f}" for name in MAPS)
            numbers = f"IoU {100 * row.masks[row.own].iou:.0f} · S_IoU {before} before the LM, {after} after, {inside} in SAM"
            words = f"{row.question}   {numbers}"
            self.study.sheet.append((words, [tile for _, tile, _ in tiles]))

    def _save(self, row: Row, name: str, picture: Image.Image, words: str) -> Picture:
        # What does not depend on the model is drawn once: the first model's file serves all.
        whose = "" if name == "truth" else f"_{self.number}"
        file = f"pictures/{slug_of(row.part)}_{row.image_index:05d}_{row.question_index:02d}{whose}_{name}.jpg"
        path = self.options.out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.number == 0 or name != "truth" or not path.is_file():
            picture.save(path, quality=85)
        return Picture(name, file, picture.size, words)


def slug_of(part: str) -> str:
    """A data set and its split, or the path of one's own data, as a part of file names."""
    return short_name("".join(c if c.isalnum() else "-" for c in part).strip("-"))


def _grid(values_P: torch.Tensor) -> torch.Tensor:
    side = round(len(values_P) ** 0.5)
    return values_P.unflatten(0, (side, side))


def _same(a: PointPrompts, b: PointPrompts) -> bool:
    return torch.equal(a.points, b.points) and torch.equal(a.labels, b.labels)


def _kinds(labels_K: torch.Tensor) -> tuple[int, int, int]:
    return tuple(int((labels_K == kind).sum()) for kind in (1, 0, -1))


def _sweep(row: Row, tried: list[_Tried], settings: int, entry: int | None, target: np.ndarray) -> None:
    """Counts the masks of a sweep; without a [SEG] all are empty."""
    if entry is None:
        empty = overlap(np.zeros_like(target), target)
        row.sweep = {prompt: [empty] * settings for prompt in SWEPT}
        row.sweep_points = [(0, 0, 0)] * settings
    else:
        row.sweep = {prompt: [overlap(one.masks[prompt][entry], target) for one in tried] for prompt in SWEPT}
        row.sweep_points = [one.points[entry] for one in tried]


def _measure(row: Row, laid: dict[str, PictureMap], target: np.ndarray) -> None:
    """S_IoU, peaks and agreement of the maps."""
    row.agreement = {(a, b): picture_maps.agreement(laid[a], laid[b], target) for a, b in PAIRS}
    if (target == 1).any():
        row.levels = {name: picture_maps.overlaps(found.heat, target) for name, found in laid.items()}
        row.peaks = {name: picture_maps.peak_on_object(found, target) for name, found in laid.items()}


def _tiles(
    row: Row,
    image: np.ndarray,
    target: np.ndarray,
    masks: dict[str, np.ndarray],
    laid: dict[str, PictureMap],
    segment: visualize.Segment,
    side: int,
) -> list[tuple[str, Image.Image, str]]:
    """(name, picture, words) of what is drawn of an expression: truth, maps, points, masks."""
    there = f"The picture with the outline of: {row.question}" if row.exists else f"The picture, without: {row.question}"
    tiles = [("truth", visualize.truth_image(image, target == 1, target == IGNORE_PIXEL, side), there)]
    for name, found in laid.items():
        level = picture_maps.HEADLINE
        drawn = visualize.map_image(image, found.heat, found.seen, level, side)
        measured = f", S_IoU {100 * row.s_iou(name):.1f} %" if row.measured else ""
        tiles.append((name, drawn, f"Similarity map {MAPS[name]}{measured}"))
    if laid:
        positive, negative, neutral = row.points
        words = f"{positive} object, {negative} background and {neutral} neutral points"
        tiles.append(("dots", visualize.points_image(image, segment, side), words))
    none = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    for prompt, mask in masks.items():
        drawn = visualize.answer_image(image, visualize.Segment(mask, None, *none), TINTS[prompt], side)
        tiles.append((prompt, drawn, f"Mask from {PROMPTS[prompt]}, IoU {100 * row.masks[prompt].iou:.1f} %"))
    return tiles
