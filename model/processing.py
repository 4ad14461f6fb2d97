"""READProcessor: everything that stands between a picture with a question and the tensors of the model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import CLIPImageProcessorPil

from utils.conversation import SYSTEM, Turns, build_prompt, mask_labels, tokenize_prompt
from utils.image import ImageViews, image_views
from utils.tokenizer import ReadTokenizer, add_read_tokens, load_tokenizer, read_token_ids

PROCESSOR_FILE = "read_processor.json"
SIZES = {"sam_image_size", "num_patches"}


class READProcessor:
    """Tokenizer, CLIP preprocessing and SAM preprocessing of one checkpoint."""

    def __init__(
        self,
        tokenizer: ReadTokenizer,
        clip_processor: CLIPImageProcessorPil,
        sam_image_size: int = 1024,
        num_patches: int = 576,
        conv_type: str = "llava_v1",
    ) -> None:
        if conv_type not in SYSTEM:
            raise ValueError(f"conv_type must be one of {', '.join(SYSTEM)}, found {conv_type!r}")
        self.tokenizer = tokenizer
        self.clip_processor = clip_processor
        self.sam_image_size = sam_image_size
        self.num_patches = num_patches
        self.conv_type = conv_type
        self.seg_token_id, self.im_start_id, self.im_end_id = read_token_ids(tokenizer)
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    @classmethod
    def from_pretrained(
        cls, path: str | Path, vision_tower: str | Path | None = None, base: bool = False, **overrides: object
    ) -> READProcessor:
        """The processor of a checkpoint folder or hub id; `vision_tower` as for `READForCausalLM.from_pretrained`.

        `base` allows a LLaVA base, whose tokenizer does not have READ's tokens yet: they are added.
        """
        from .checkpoint import resolve_folder, tower_of

        folder = resolve_folder(path)
        tokenizer = load_tokenizer(folder)
        if base:
            add_read_tokens(tokenizer)
        saved = json.loads((folder / PROCESSOR_FILE).read_text()) if (folder / PROCESSOR_FILE).is_file() else {}
        if vision_tower is None and (folder / "preprocessor_config.json").is_file():
            clip = CLIPImageProcessorPil.from_pretrained(folder)
        else:
            clip = CLIPImageProcessorPil.from_pretrained(tower_of(folder, vision_tower))
        sizes = {} if saved.keys() >= SIZES else _sizes(folder, clip, vision_tower)
        return cls(tokenizer, clip, **{**sizes, **saved, **overrides})

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, `preprocessor_config.json` and `read_processor.json`."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.clip_processor.save_pretrained(folder)
        fields = {"sam_image_size": self.sam_image_size, "num_patches": self.num_patches, "conv_type": self.conv_type}
        (folder / PROCESSOR_FILE).write_text(json.dumps(fields, indent=2) + "\n")

    def views(self, image: np.ndarray) -> ImageViews:
        """The two views of an (H, W, 3) uint8 RGB picture."""
        return image_views(image, self.clip_processor, self.sam_image_size)

    def encode(self, turns: Turns, conv_type: str | None = None) -> tuple[list[int], list[int]]:
        """(input ids, labels) of a conversation whose first question begins with `<image>`; see `utils.conversation`.

        Without a last answer it is a prompt for generation, and nothing is supervised in its last turn.
        """
        prompt = build_prompt(turns, SYSTEM[conv_type or self.conv_type])
        ids = tokenize_prompt(prompt, self.tokenizer, self.num_patches)
        if turns[-1][1] is None:
            return ids, [-100] * len(ids)
        return ids, mask_labels(prompt, ids, self.tokenizer, self.num_patches)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer, for people: image marks and special tokens left out, no blank before a full stop."""
        hidden = {self.im_start_id, self.im_end_id}
        text = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=True).strip()
        for mark in ".,!?;:":
            text = text.replace(f"[SEG] {mark}", f"[SEG]{mark}")
        return text


def _sizes(folder: Path, clip: CLIPImageProcessorPil, vision_tower: str | Path | None) -> dict[str, int]:
    """SAM's image size and the number of CLIP patches of a folder in the released layout, which does not say them."""
    from .checkpoint import clip_patch_size, sam_image_size

    side = clip.crop_size["height"] // clip_patch_size(folder, vision_tower)
    return {"sam_image_size": sam_image_size(folder), "num_patches": side**2}
