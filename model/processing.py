"""READProcessor: everything that stands between a picture with a question and the tensors of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import CLIPImageProcessorPil

from utils.conversation import SYSTEM, Turns, build_prompt, mask_labels, tokenize_prompt
from utils.files import shown, whole_number, write_json
from utils.image import ImageViews, image_views
from utils.tokenizer import ReadTokenizer, add_read_tokens, load_tokenizer, read_token_ids

PROCESSOR_FILE = "read_processor.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
SIZES = {"sam_image_size", "num_patches"}


if TYPE_CHECKING:
    from .config import READConfig


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

        Raises:
            OSError, ValueError: a file is missing, damaged, or does not fit the others; the message names it.
        """
        from .checkpoint import check_token_ids, read_fields, refuse_other_folders, resolve_folder, tower_of

        folder = resolve_folder(path)
        refuse_other_folders(folder)
        tokenizer = load_tokenizer(folder)
        if not base:
            read_token_ids(tokenizer)  # says what is missing
        config = read_fields(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config.get("model_type") == "read":
            check_token_ids(folder / "config.json", config, tokenizer)
        if base:
            add_read_tokens(tokenizer)
        saved = _saved_fields(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).is_file() else {}
        own = vision_tower is None and (folder / PREPROCESSOR_FILE).is_file()
        clip = read_clip_processor(folder if own else tower_of(folder, vision_tower, f"{PREPROCESSOR_FILE} is missing"))
        sizes = {} if saved.keys() >= SIZES else _sizes(folder, clip, vision_tower)
        return cls(tokenizer, clip, **{**sizes, **saved, **overrides})

    def check(self, config: READConfig, name: str | Path) -> None:
        """Refuses a model that was made for other ids or sizes than those which this processor gives it.

        Args:
            config: the model's.
            name: of the checkpoint, for the message.

        Raises:
            ValueError: naming the files and both values.
        """
        pairs = [
            ("the id of [SEG] (added_tokens.json)", self.seg_token_id, config.seg_token_id),
            ("the id of <im_start> (added_tokens.json)", self.im_start_id, config.im_start_id),
            ("the id of <im_end> (added_tokens.json)", self.im_end_id, config.im_end_id),
            (f"CLIP's crop_size ({PREPROCESSOR_FILE})", self.clip_processor.crop_size["height"], config.clip_image_size),
            (f"num_patches ({PROCESSOR_FILE})", self.num_patches, config.num_patches),
            (f"sam_image_size ({PROCESSOR_FILE})", self.sam_image_size, config.sam.image_size),
        ]
        wrong = [f"{what} is {given}, the model (config.json and weights) has {wanted}" for what, given, wanted in pairs
                 if given != wanted]  # fmt: skip
        if wrong:
            raise ValueError(f"{name}: processor and model do not fit each other: {'; '.join(wrong)}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, `preprocessor_config.json` and `read_processor.json`."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.clip_processor.save_pretrained(folder)
        fields = {"sam_image_size": self.sam_image_size, "num_patches": self.num_patches, "conv_type": self.conv_type}
        write_json(folder / PROCESSOR_FILE, fields)

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


def _saved_fields(file: Path) -> dict[str, Any]:
    """What `read_processor.json` says; a field that it leaves out is found elsewhere."""
    from .checkpoint import CheckpointError, read_fields

    fields = read_fields(file)
    if unknown := sorted(set(fields) - SIZES - {"conv_type"}):
        raise CheckpointError(f"{file}: unknown field {', '.join(unknown)}; there are {', '.join(sorted(SIZES))} and conv_type")
    for name in SIZES & fields.keys():
        fields[name] = whole_number(fields[name], f"{file}: {name}", at_most=10**5)
    if "conv_type" in fields and fields["conv_type"] not in list(SYSTEM):
        raise CheckpointError(f"{file}: conv_type must be one of {', '.join(SYSTEM)}, found {shown(fields['conv_type'])}")
    return fields


def read_clip_processor(folder: Path) -> CLIPImageProcessorPil:
    """CLIP's preprocessing as `preprocessor_config.json` of a folder has it.

    Raises:
        CheckpointError: the file is missing or damaged, or a field is not what CLIP's preprocessing has there.
    """
    from .checkpoint import CheckpointError, describing, read_fields

    file = folder / PREPROCESSOR_FILE
    fields = read_fields(file)
    with describing(file):
        clip = CLIPImageProcessorPil.from_dict(fields)

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def side(value: Any) -> bool:
        return type(value) is int and 1 <= value <= 10**5

    def three(values: Any) -> bool:
        return isinstance(values, list | tuple) and len(values) == 3 and all(map(number, values))

    size, crop = clip.size or {}, clip.crop_size or {}
    wanted = {
        "size": (side(size.get("shortest_edge")), "the length of the shortest_edge in pixels"),
        "crop_size": (side(crop.get("height")) and crop.get("height") == crop.get("width"), "a square in pixels"),
        "image_mean": (three(clip.image_mean), "three numbers"),
        "image_std": (three(clip.image_std) and all(clip.image_std), "three numbers other than 0"),
        "resample": (type(clip.resample) is not bool and clip.resample in range(6), "a number from 0 to 5"),
        "rescale_factor": (number(clip.rescale_factor) and clip.rescale_factor > 0, "a number above 0"),
    }
    for name in ("do_rescale", "do_normalize", "do_convert_rgb"):
        wanted[name] = (isinstance(getattr(clip, name), bool), "true or false")
    for name in ("do_resize", "do_center_crop"):  # the place of each image token is computed from both
        wanted[name] = (getattr(clip, name) is True, "true")
    for name, (fits, what) in wanted.items():
        if not fits:
            raise CheckpointError(f"{file}: {name} must be {what}, found {shown(getattr(clip, name))}")
    return clip


def _sizes(folder: Path, clip: CLIPImageProcessorPil, vision_tower: str | Path | None) -> dict[str, int]:
    """SAM's image size and the number of CLIP patches of a folder in the released layout, which does not say them."""
    from .checkpoint import clip_patch_size, sam_image_size

    side = clip.crop_size["height"] // clip_patch_size(folder, vision_tower)
    return {"sam_image_size": sam_image_size(folder), "num_patches": side**2}
