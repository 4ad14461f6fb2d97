"""SAM asked anew: with the points alone, with `[SEG]` alone, with both, with other points, or as it was before READ.

    draw(model, view, texts, points)                  (M, H, W) logits of the checkpoint's decoder
    settings_of(model.config.sasp)                    what a sweep tries
    Untouched.load(file).draw(...)                    the same points in a SAM that READ never trained

The image embedding is there already: only SAM's prompt encoder and mask decoder run.

Legend: M [SEG] tokens of one picture · P image tokens · C SAM width · K points · (H, W) pixels of the original picture.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model import SaspConfig, get_preset, sam, sasp
from model.checkpoint import read_tensors
from utils.image import sam_view

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from model import READForCausalLM

AXES: dict[str, tuple[Any, ...]] = {
    "num_points": (1, 2, 3, 5, 8, 10, 15, 20, 30, 45, 60, 100),
    "t_pos": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "t_neg": (0.0, 0.1, 0.2, 0.3, 0.4),
    "down_sample": (1, 2, 3, 4, 6),
    "geometry": ("released", "exact"),
}
"""What a sweep tries of each of SasP's values; the checkpoint's own value is always among them."""
PAPER = {"READ-7B": get_preset("read-7b-test").sasp, "READ-13B": get_preset("read-13b-test").sasp}
"""The paper's values. Each set is also tried as a whole."""


@dataclass(frozen=True)
class View:
    """A picture as SAM has it."""

    embedding: torch.Tensor
    """(C, h, w)."""
    sam_size: tuple[int, int]
    """(h, w) of the picture inside SAM's square."""
    original_size: tuple[int, int]
    """(H, W)."""


def draw(
    model: READForCausalLM, view: View, texts: torch.Tensor, points: sasp.PointPrompts | None
) -> torch.Tensor:
    """(M, H, W) float32 logits for M prompts about one picture.

    Args:
        texts: (M, 1, C) projected [SEG], or (M, 0, C): the points alone.
        points: K points each, or None: [SEG] alone, without SAM's padding point (SasP off).
    """
    place = kind = None
    if points is not None:
        place, kind = sam.to_sam_frame(points.points, view.sam_size, view.original_size), points.labels
    low_res, _ = sam.decode_masks(model.sam, view.embedding, place, kind, texts)
    return sam.upscale_logits(low_res, model.config.sam.image_size, view.sam_size, view.original_size)


def choose(
    model: READForCausalLM, similarity_MP: torch.Tensor, image_size: tuple[int, int], values: SaspConfig
) -> sasp.PointPrompts:
    """The points that SasP with `values` makes of M maps over a picture of (H, W) pixels, whether it is on or off."""
    return sasp.select_points(similarity_MP, image_size, values, clip_image_size=model.config.clip_image_size)


# ------------------------------------------------------------------------------------------------ sweeps


@dataclass(frozen=True)
class Setting:
    """One point of a sweep."""

    axis: str
    """The value of SasP that is varied, or `recipe`: all of a published set at once."""
    value: Any
    sasp: SaspConfig
    own: bool
    """These are the checkpoint's own values."""
    paper: tuple[str, ...]
    """Published recipes with this value of the axis."""


def settings_of(own: SaspConfig) -> list[Setting]:
    """What a sweep around the checkpoint's own values tries: each value alone, then the published sets."""
    found = []
    for axis, values in AXES.items():
        mine = getattr(own, axis)
        values = values if isinstance(mine, str) else sorted({*values, mine})
        for value in values:
            try:
                tried = dataclasses.replace(own, **{axis: value})
            except ValueError:  # thresholds that cross
                continue
            paper = tuple(name for name, recipe in PAPER.items() if getattr(recipe, axis) == value)
            found.append(Setting(axis, value, tried, value == mine, paper))
    for name, recipe in PAPER.items():
        tried = dataclasses.replace(recipe, enabled=own.enabled)
        found.append(Setting("recipe", name, tried, tried == own, (name,)))
    return found


# ------------------------------------------------------------------------------------------------ untouched SAM


class Untouched:
    """A SAM as its authors released it, prompted with points in the way of its package: the best of three masks."""

    def __init__(self, parts: Sam, image_size: int) -> None:
        self.parts, self.image_size = parts, image_size

    @classmethod
    def load(cls, file: str | Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Untouched:
        """Reads a SAM `.pth` of any size.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds no SAM; the message says what is wrong.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"SAM file {file} does not exist")
        state = dict(read_tensors([file]))
        config = sam.infer_sam_config({key: tuple(tensor.shape) for key, tensor in state.items()})
        parts = sam.build_sam(config)
        try:
            parts.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit the SAM package: {error}") from error
        return cls(parts.requires_grad_(False).eval().to(device, dtype), config.image_size)

    @torch.no_grad()
    def view(self, image: np.ndarray) -> View:
        """A picture (H, W, 3) uint8 RGB, once through the image encoder."""
        square, size = sam_view(image, self.image_size)
        weights = self.parts.image_encoder.pos_embed
        return View(self.parts.image_encoder(square[None].to(weights))[0], size, image.shape[:2])

    @torch.no_grad()
    def draw(self, view: View, points: sasp.PointPrompts) -> torch.Tensor:
        """(M, H, W) float32 logits for M prompts of K points: of three masks the one that SAM itself rates highest."""
        parts = self.parts
        place = sam.to_sam_frame(points.points, view.sam_size, view.original_size)
        no_text = view.embedding.new_zeros(len(place), 0, len(view.embedding))
        sparse, dense = sam.embed_prompts(parts, place, points.labels, no_text)
        low_res, scores = parts.mask_decoder(
            image_embeddings=view.embedding[None],
            image_pe=sam.dense_position_encoding(parts),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        best = low_res[torch.arange(len(low_res), device=low_res.device), scores.argmax(dim=1)]
        return sam.upscale_logits(best, self.image_size, view.sam_size, view.original_size)
