"""A full-size READ with random weights, and noise and random words to ask it: for benchmarks where no checkpoint is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model import READConfig, READForCausalLM

SIZES = ("7b", "13b")
PICTURE = (480, 640)
"""Height and width of a picture, pixels."""
WORDS_BEFORE = 38
"""Words in front of the image, as in the system prompt; one is behind it, which closes it."""


def random_model(size: str, dtype: torch.dtype, device: torch.device, attention: str) -> READForCausalLM:
    """READ of a published size, frozen, in evaluation mode; its random weights are made where they stay."""
    import torch

    from model import READForCausalLM
    from model.memory import published_config
    from utils.conversation import IMAGE_TOKEN_INDEX

    config = published_config(size)
    config.llava.image_token_index = IMAGE_TOKEN_INDEX
    config.seg_token_id, config.im_start_id, config.im_end_id = 32000, 32001, 32002
    text = config.llava.text_config
    text.max_position_embeddings, text.pad_token_id = 4096, 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = READForCausalLM(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False).to(device, dtype)


def random_views(config: READConfig, count: int, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `encode_images` for `count` pictures of noise."""
    import torch

    side, square = config.clip_image_size, config.sam.image_size
    height, width = PICTURE
    return {
        "clip_images": torch.randn(count, 3, side, side, generator=generator),
        "sam_images": torch.randn(count, 3, square, square, generator=generator),
        "sam_sizes": [(square * height // width, square)] * count,
        "original_sizes": [PICTURE] * count,
    }


def random_words(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) int64 ids."""
    import torch

    return torch.randint(1000, 30000, (count,), generator=generator)


def random_beginning(config: READConfig, generator: torch.Generator) -> torch.Tensor:
    """Ids that a prompt begins with: words, the image's slots, a word."""
    import torch

    from utils.conversation import IMAGE_TOKEN_INDEX

    slots = torch.full((config.num_patches,), IMAGE_TOKEN_INDEX)
    return torch.cat([random_words(WORDS_BEFORE, generator), slots, random_words(1, generator)])
