"""A tiny READ with random weights, for tests: 4 x 4 image tokens, 64 px SAM, the mini vocabulary if there is one."""

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from model import READConfig, READForCausalLM, SamConfig, SaspConfig
from utils.conversation import IMAGE_TOKEN_INDEX

SEG, IM_START, IM_END, EOS = 60, 61, 62, 2


def tiny_config(**changes) -> READConfig:
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    fields = {
        "llava": LlavaConfig(vision_config=clip, text_config=text, image_token_index=IMAGE_TOKEN_INDEX),
        "sam": SamConfig(image_size=64, embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=2),
        "sasp": SaspConfig(num_points=5, down_sample=1),
        "seg_token_id": SEG,
        "im_start_id": IM_START,
        "im_end_id": IM_END,
    }
    return READConfig(**{**fields, **changes})


def tiny_read(seed: int = 0, **changes) -> READForCausalLM:
    torch.manual_seed(seed)
    return READForCausalLM(tiny_config(**changes)).eval()


def tiny_batch(rows, image_of_question=None, sizes=((40, 56), (48, 48)), seed=0):
    """Model inputs for rows of ids in which -200 stands for a whole picture (16 slots); right-padded."""
    images = len(sizes)
    generator = torch.Generator().manual_seed(seed)
    full = [sum(([i] * (16 if i == IMAGE_TOKEN_INDEX else 1) for i in row), []) for row in rows]
    length = max(map(len, full))
    ids = torch.zeros(len(full), length, dtype=torch.long)
    mask = torch.zeros(len(full), length, dtype=torch.bool)
    for i, row in enumerate(full):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return {
        "clip_images": torch.randn(images, 3, 56, 56, generator=generator),
        "sam_images": torch.randn(images, 3, 64, 64, generator=generator),
        "sam_sizes": [(int(h * 64 / max(h, w) + 0.5), int(w * 64 / max(h, w) + 0.5)) for h, w in sizes],
        "original_sizes": list(sizes),
        "input_ids": ids,
        "attention_mask": mask,
        "image_of_question": torch.tensor(image_of_question or [i % images for i in range(len(rows))]),
    }


def prompt(*tail) -> list[int]:
    """BOS, picture between its marks, then `tail`."""
    return [1, 7, IM_START, IMAGE_TOKEN_INDEX, IM_END, *tail]


def rectangle(size, box) -> torch.Tensor:
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return torch.from_numpy(mask)
