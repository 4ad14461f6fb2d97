"""What all questions about a picture begin with, passed through the language model once: system prompt and image tokens.

    prefix_ids, tails = split_prompts(input_ids, attention_mask)     T tokens a question -> L shared ones and its own
    prefix = encode_prefix(llava, prefix_ids, features)              keys, values, states of B pictures
    prefix.cache(image_of_question)                                  a KV cache of N questions, to go on from

The image stands at the head of a prompt, so of 600 tokens a question shares all but its last twenty with its neighbours.

Legend: B pictures · N questions · L tokens of the prefix · t tokens of the longest tail · P image tokens · D hidden width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, LlamaModel, LlavaForConditionalGeneration

from utils.conversation import IMAGE_TOKEN_INDEX

from . import llava as llava_adapter

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The name of the KV cache among transformers' arguments and outputs, which changed within 5.x."""


@dataclass
class Prefix:
    """The shared beginning of the prompts about B pictures, as the language model left it."""

    ids: torch.Tensor
    """(L,) int64, up to the last image token."""
    hidden: torch.Tensor
    """(B, L, D) last hidden states."""
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, (B, heads, L, head width)."""

    @classmethod
    def of_cache(
        cls, ids_L: torch.Tensor, hidden_BtD: torch.Tensor, cache: Cache, rows: torch.Tensor | None = None
    ) -> Prefix:
        """From what the language model gave for rows that begin with it, one a picture; `rows` (B,) are those of the pictures."""
        length = len(ids_L)

        def of_pictures(x: torch.Tensor) -> torch.Tensor:
            return x if rows is None or len(rows) == 1 else x[rows]

        layers = [tuple(of_pictures(x[:, :, :length]) for x in (layer.keys, layer.values)) for layer in cache.layers]
        return cls(ids_L, of_pictures(hidden_BtD[:, :length]), layers)

    def cache(self, image_of_question: torch.Tensor) -> Cache:
        """A cache of N questions (their pictures: (N,) int64) that may grow; the prefix itself stays as it is."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[image_of_question], values[image_of_question], index)
        return cache

    def image_states(self) -> torch.Tensor:
        """Last hidden states (B, P, D) of the image tokens: nothing after an image changes them."""
        return self.hidden[:, self.ids == IMAGE_TOKEN_INDEX]


def split_prompts(
    input_ids_NT: torch.Tensor, attention_mask_NT: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
    """(prefix (L,), N tails) of padded prompts: what stands up to the last image token, and what follows.

    None where the prompts have nothing to share: one has no image, or they differ before its end.
    """
    rows = [row[keep] for row, keep in zip(input_ids_NT, attention_mask_NT.bool(), strict=True)]
    slots = (rows[0] == IMAGE_TOKEN_INDEX).nonzero()
    if len(slots) == 0:
        return None
    prefix = rows[0][: int(slots[-1]) + 1]
    length = len(prefix)
    tails = [row[length:] for row in rows]
    same = all(torch.equal(row[:length], prefix) for row in rows)
    if not same or any(len(tail) == 0 or bool((tail == IMAGE_TOKEN_INDEX).any()) for tail in tails):
        return None
    return prefix, tails


def pad_tails(tails: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (N, t) int64, mask (N, t) bool) of tails, padded on the `right` or the `left`."""
    ids = pad_sequence(tails, batch_first=True, padding_side=side)
    mask = pad_sequence(
        [torch.ones_like(tail, dtype=torch.bool) for tail in tails], batch_first=True, padding_side=side
    )
    return ids, mask


@torch.no_grad()
def encode_prefix(llava: LlavaForConditionalGeneration, ids_L: torch.Tensor, features_BPD: torch.Tensor) -> Prefix:
    """Passes the prefix of B pictures (features (B, P, D)) through the language model."""
    count = len(features_BPD)
    rows = torch.arange(count, device=ids_L.device)
    embeddings = llava_adapter.embed_inputs(llava, ids_L.expand(count, -1), features_BPD, rows)
    out = llava.model.language_model(inputs_embeds=embeddings, use_cache=True)
    return Prefix.of_cache(ids_L, out.last_hidden_state, out[CACHE])
