"""Thin adapter on transformers' LLaVA: image tokens in, last hidden states out, and which state is `[SEG]`'s.

Legend: B pictures · N questions · T tokens (image tokens expanded) · P image tokens a picture · D hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from utils.conversation import IMAGE_TOKEN_INDEX


def build_llava(
    config: LlavaConfig, attn_implementation: str | None = None, projector: str = "mlp2x_gelu"
) -> LlavaForConditionalGeneration:
    """LLaVA with random weights; `attn_implementation` is eager, sdpa or flash_attention_2.

    `projector` is one of `config.PROJECTORS`; transformers knows LLaVA-1.5's alone, so `linear` puts LLaVA-1's in its place.
    """
    llava = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    if projector == "linear":
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        llava.model.multi_modal_projector = nn.Linear(*widths, dtype=llava.dtype)
    for module in llava.model.language_model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = FusedRMSNorm
    return llava


class FusedRMSNorm(LlamaRMSNorm):
    """transformers' norm, which takes eight kernels of its own, with torch's fused one: the same roundings in the same places."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.variance_epsilon)


def image_features(llava: LlavaForConditionalGeneration, clip_images_B3ss: torch.Tensor) -> torch.Tensor:
    """Projected CLIP patch features (B, P, D): the frozen tower once a picture, then the projector (§3)."""
    return torch.stack(list(llava.get_image_features(clip_images_B3ss, return_dict=True).pooler_output))


def embed_inputs(
    llava: LlavaForConditionalGeneration,
    input_ids_NT: torch.Tensor,
    features_BPD: torch.Tensor,
    image_of_question_N: torch.Tensor,
) -> torch.Tensor:
    """Token embeddings (N, T, D) with the image slots filled by the features of each question's picture."""
    is_image = input_ids_NT == IMAGE_TOKEN_INDEX
    counts = is_image.sum(dim=1)
    wrong = (counts != 0) & (counts != features_BPD.shape[1])
    if wrong.any():
        raise ValueError(
            f"a prompt has {counts[wrong][0].item()} image slots but the picture gives {features_BPD.shape[1]} tokens: "
            "each question takes one picture, expanded by the processor that belongs to this checkpoint"
        )
    embeddings = llava.get_input_embeddings()(input_ids_NT.masked_fill(is_image, 0))
    features = features_BPD[image_of_question_N[counts != 0]].to(embeddings.dtype)
    return embeddings.masked_scatter(is_image[..., None], features)


def seg_positions(input_ids_NT: torch.Tensor, seg_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(question (M,), position (M,)) of the state that stands for each `[SEG]`, by question, then by place.

    It is the state of the token *before* `[SEG]`, the one that predicts it: the original built its mask from
    `input_ids[:, 1:]`, and all published weights depend on it (§1).
    """
    question, position = (input_ids_NT[:, 1:] == seg_token_id).nonzero(as_tuple=True)
    return question, position


def image_states(
    hidden_NTD: torch.Tensor, input_ids_NT: torch.Tensor, question_M: torch.Tensor, released_rows: bool = False
) -> torch.Tensor:
    """Last hidden states (M, P, D) of the image tokens of each `[SEG]`'s own question.

    `released_rows` takes the place of the image from the first row of the batch for every row, as the original did
    (§8-9); it matters only where rows are padded on the left.
    """
    is_image = input_ids_NT == IMAGE_TOKEN_INDEX
    if released_rows:
        is_image = is_image[:1].expand_as(is_image)
    counts = is_image.sum(dim=1)
    if (counts[question_M] == 0).any():
        raise ValueError("a [SEG] stands in a conversation without a picture: there is nothing to segment")
    states = hidden_NTD[question_M][is_image[question_M]]
    return states.view(len(question_M), int(counts.max()), hidden_NTD.shape[-1])
