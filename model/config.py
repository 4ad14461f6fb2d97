"""Configuration of READ: what the four parts are made of, saved with every checkpoint.

`READConfig` nests the configuration of LLaVA (transformers' own), of SAM, of SasP and of the loss. The three of ours are
plain dataclasses with a sentence under each field and their checks in `__post_init__`; on disk they are JSON objects.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformers import LlavaConfig, PretrainedConfig

from utils.conversation import SYSTEM
from utils.files import as_object, shown


@dataclasses.dataclass(frozen=True)
class SaspConfig:
    """Similarity as Points (protocol §4; paper, section 4). The defaults are the published 7B values."""

    enabled: bool = True
    """False prompts SAM with the projected [SEG] state alone: exactly SESAME's path, without SAM's padding point."""
    num_points: int = 30
    """K, points a mask; a grid with fewer cells gives as many as it has."""
    t_pos: float = 0.8
    """Cells whose min-max normalised similarity is at least this become foreground points."""
    t_neg: float = 0.2
    """Cells at or below this become background points; those between are prompts without a position."""
    down_sample: int = 2
    """The token grid is averaged by this factor before points are chosen (1 keeps every token)."""
    geometry: str = "released"
    """`released`: the grid the published numbers were made with, whose points drift outwards along the long side of a
    picture (§8-5). `exact`: the true places of the tokens in the picture."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_neg < self.t_pos <= 1.0:
            raise ValueError(f"SasP needs 0 <= t_neg < t_pos <= 1, found t_neg={self.t_neg}, t_pos={self.t_pos}")
        if self.num_points < 1 or self.down_sample < 1:
            raise ValueError(
                f"SasP needs num_points >= 1 and down_sample >= 1, found {self.num_points} and {self.down_sample}"
            )
        if self.geometry not in ("released", "exact"):
            raise ValueError(f"SasP geometry must be 'released' or 'exact', found {self.geometry!r}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (protocol §3)."""

    ce: float = 1.0
    """Cross-entropy of the answer tokens."""
    bce: float = 2.0
    """Binary cross-entropy of the mask, at the resolution of the original picture."""
    dice: float = 0.5
    """Dice loss of the mask (READ-7B test was trained with 4)."""
    sim: float = 0.0
    """Supervision of the similarity map itself by the mask on the token grid. Ours, not the paper's: 0 is faithful."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise ValueError(f"loss weight {name} must not be negative, found {value}")


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM of the `segment-anything` package. The defaults are ViT-H."""

    image_size: int = 1024
    """Side of the padded square that the image encoder sees, pixels."""
    patch_size: int = 16
    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    global_attn_indexes: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 14
    mlp_ratio: float = 4.0
    out_dim: int = 256
    """C, channels of image embedding, prompt embedding and mask decoder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))
        if self.image_size % self.patch_size:
            raise ValueError(f"SAM image_size {self.image_size} is no multiple of patch_size {self.patch_size}")

    @property
    def grid_size(self) -> int:
        """Side of the image embedding."""
        return self.image_size // self.patch_size


def _part(value: Any, kind: type, name: str) -> Any:
    """A dataclass from itself, from the JSON object it was saved as, or from nothing.

    Raises:
        ValueError: a field is unknown, or of another kind than its default; the message begins with `name`.
    """
    if value is None or isinstance(value, kind):
        return value or kind()
    fields = dict(as_object(value, name))
    defaults = dataclasses.asdict(kind())
    if unknown := sorted(set(fields) - set(defaults)):
        raise ValueError(f"{name}: unknown field {', '.join(map(shown, unknown))}; there are {', '.join(defaults)}")
    for key, found in fields.items():
        if not _same_kind(found, defaults[key]):
            raise ValueError(f"{name}.{key}: must be a value like {shown(defaults[key])}, found {shown(found)}")
    return kind(**fields)


def _same_kind(value: Any, default: Any) -> bool:
    """True if a JSON value may stand where a setting has this default."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_same_kind(entry, default[0]) for entry in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(default)


PROJECTORS = ("mlp2x_gelu", "linear")
"""What leads CLIP's features into the language model: LLaVA-1.5's two layers, or the one of LLaVA-1, on which LISA was built."""


class READConfig(PretrainedConfig):
    """Everything `READForCausalLM` is built from.

    Token ids are those of the tokenizer that travels with the checkpoint; they are looked up there by name and kept
    here so that the model needs no tokenizer. `projector` is one of `PROJECTORS`.

    Raises:
        ValueError: another projector or wording, or a part with unknown fields or values of another kind.
    """

    model_type = "read"
    sub_configs = {"llava": LlavaConfig}

    def __init__(
        self,
        llava: LlavaConfig | dict | None = None,
        sam: SamConfig | dict | None = None,
        sasp: SaspConfig | dict | None = None,
        loss: LossConfig | dict | None = None,
        seg_token_id: int | None = None,
        im_start_id: int | None = None,
        im_end_id: int | None = None,
        vision_tower: str | None = None,
        conv_type: str = "llava_v1",
        projector: str = "mlp2x_gelu",
        **kwargs: Any,
    ) -> None:
        if projector not in PROJECTORS:
            raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}, found {projector!r}")
        if conv_type not in list(SYSTEM):
            raise ValueError(f"conv_type must be one of {', '.join(SYSTEM)}, found {conv_type!r}")
        if vision_tower is not None and not isinstance(vision_tower, str):
            raise ValueError(f"vision_tower must be a folder or a hub id, found {shown(vision_tower)}")
        if not isinstance(llava, LlavaConfig):
            llava = LlavaConfig(**as_object({} if llava is None else llava, "llava"))
        for part, kind in ((llava.text_config, "llama"), (llava.vision_config, "clip_vision_model")):
            if part.model_type != kind:
                raise ValueError(f"llava: its parts must be a llama and a clip_vision_model, found {shown(part.model_type)}")
        if llava.text_config.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, found {llava.text_config.max_position_embeddings}")
        self.llava = llava
        self.sam = _part(sam, SamConfig, "sam")
        self.sasp = _part(sasp, SaspConfig, "sasp")
        self.loss = _part(loss, LossConfig, "loss")
        self.seg_token_id = seg_token_id
        self.im_start_id = im_start_id
        self.im_end_id = im_end_id
        self.vision_tower = vision_tower
        self.conv_type = conv_type
        self.projector = projector
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def clip_image_size(self) -> int:
        """Side of the square that the CLIP tower sees, pixels."""
        return self.llava.vision_config.image_size

    @property
    def patch_grid(self) -> int:
        """Patches along one side of that square."""
        return self.clip_image_size // self.llava.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """P, the tokens that `<image>` is expanded into."""
        return self.patch_grid**2

    @property
    def hidden_size(self) -> int:
        """D, width of the language model's hidden states."""
        return self.llava.text_config.hidden_size

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        for name in ("sam", "sasp", "loss"):
            value = getattr(self, name)
            out[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        return out
