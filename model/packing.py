"""Conversations about one picture in one row, so that what they begin with is computed once, exactly.

    packed = pack(input_ids, attention_mask, image_of_question)     N conversations -> R rows, or None where nothing is saved
    packed.ids, packed.places, packed.bias(dtype)                   what the language model takes
    packed.unpack(hidden)                                           (R, t, D) -> (N, T, D), as if each had gone through alone
    Prefix                                                          the beginning of such rows, kept for the next questions

A row is [beginning | rest 1 | rest 2 | ...]. The beginning ends with the last image token. Each rest counts its positions from
there on and attends to the beginning and to itself, as if the others were not there. Of 680 tokens a conversation shares some
610: three about one picture take 820 instead of 2040. Training and evaluation both do so; in training, loss and gradients are
those of each conversation on its own, but for rounding.

Legend: N conversations of up to T tokens · R rows of up to t tokens · B pictures · L tokens of a beginning · D hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, LlamaModel, PreTrainedModel

from utils.conversation import IMAGE_TOKEN_INDEX

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The name of the KV cache among transformers' arguments and outputs, which changed within 5.x."""

PADDING, BEGINNING = -1, 0
"""Parts of a row that are no conversation's rest; the rests count from 1 on."""


def takes_masks(attn_implementation: str | None) -> bool:
    """True if the attention can be told which token sees which; flash_attention_2 cannot, so nothing is packed for it."""
    return attn_implementation in ("eager", "sdpa")


@contextmanager
def attention_with_masks(language_model: PreTrainedModel) -> Iterator[None]:
    """An attention that takes masks, for the length of a block; sdpa where the model has another one."""
    config = language_model.config
    before = config._attn_implementation
    if not takes_masks(before):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass
class PackedRows:
    """N conversations in R rows of t tokens."""

    ids: torch.Tensor
    """(R, t) int64, 0 behind the end."""
    image: torch.Tensor
    """(R,) int64, the picture of a row."""
    places: torch.Tensor
    """(R, t) int64, position of each token in its own conversation."""
    part: torch.Tensor
    """(R, t) int64: `BEGINNING`, the number of a rest, or `PADDING`."""
    where: torch.Tensor
    """(N, T) int64: at which of the R * t places a conversation's token stands; for padding, where its last token does."""

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """(R, 1, t, t) to be added to attention scores: 0 where a token is seen, else the dtype's lowest number.

        A number, since `eager` adds what it is given; padding sees something too, or its softmax would be NaN.
        """
        asks, asked = self.part[:, None, :, None], self.part[:, None, None, :]
        seen = ((asks == asked) | (asked == BEGINNING)).tril()
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def unpack(self, hidden_RtD: torch.Tensor) -> torch.Tensor:
        """States (N, T, D) of the conversations."""
        return hidden_RtD.flatten(0, 1)[self.where]


def pack(
    input_ids_NT: torch.Tensor,
    attention_mask_NT: torch.Tensor,
    image_of_question_N: torch.Tensor,
    *,
    must_save: bool = True,
    multiple: int | None = None,
) -> PackedRows | None:
    """Conversations, padded on either side, with those that begin alike with the same picture in one row.

    One without a picture, or whose beginning differs, has a row of its own. None (with `must_save`) where no two belong
    together, or the rows would hold no fewer tokens than the conversations do, padding included. The rows' length is a multiple
    of `multiple`: unless given, on CUDA of 16, as its attention copies a mask in every layer whose rows are not aligned.
    """
    multiple = multiple or (16 if input_ids_NT.is_cuda else 1)
    # Planned in the host's memory: row by row on a GPU, each question about a length would wait for it.
    ids_NT, mask_NT, images = input_ids_NT.cpu(), attention_mask_NT.cpu().bool(), image_of_question_N.tolist()
    count, longest = ids_NT.shape
    conversations = [ids[mask] for ids, mask in zip(ids_NT, mask_NT, strict=True)]
    together: dict[tuple, list[int]] = {}
    lengths = []
    for n, ids in enumerate(conversations):
        slots = (ids == IMAGE_TOKEN_INDEX).nonzero()
        lengths.append(int(slots[-1]) + 1 if len(slots) else 0)
        key = (images[n], *ids[: lengths[n]].tolist()) if lengths[n] else (n, "alone")
        together.setdefault(key, []).append(n)
    if must_save and len(together) == count:
        return None

    rows, places, parts, starts = [], [], [], {}
    for r, members in enumerate(together.values()):
        length = lengths[members[0]]
        pieces = [conversations[members[0]][:length], *(conversations[n][length:] for n in members)]
        rows.append(torch.cat(pieces))
        parts.append(torch.cat([torch.full_like(piece, number) for number, piece in enumerate(pieces, start=BEGINNING)]))
        places.append(torch.cat([torch.arange(len(piece)) + length * (k > 0) for k, piece in enumerate(pieces)]))
        start = length
        for n, rest in zip(members, pieces[1:], strict=True):
            starts[n] = (r, start)
            start += len(rest)
    width = -(-max(map(len, rows)) // multiple) * multiple
    if must_save and len(rows) * width >= count * longest:
        return None

    where = torch.zeros_like(ids_NT)
    for n, ids in enumerate(conversations):
        r, start = starts[n]
        place = torch.arange(len(ids))
        place[lengths[n] :] += start - lengths[n]
        where[n] = r * width + place[-1]
        where[n, mask_NT[n]] = r * width + place

    def padded(pieces: list[torch.Tensor], value: int) -> torch.Tensor:
        joined = pad_sequence(pieces, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(joined, (0, width - joined.shape[1]), value=value).to(input_ids_NT.device)

    return PackedRows(
        ids=padded(rows, 0),
        image=image_of_question_N[[members[0] for members in together.values()]],
        places=padded(places, 0),
        part=padded(parts, PADDING),
        where=where.to(input_ids_NT.device),
    )


def pad_rows(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (N, T) int64, mask (N, T) bool) of N rows of ids, padded on the `right` or the `left`."""
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


# ------------------------------------------------------------------------------------------------ kept for the next questions


@dataclass
class Prefix:
    """What all questions about B pictures begin with, as the language model left it."""

    ids: torch.Tensor
    """(L,) int64, up to the last image token; in the host's memory."""
    hidden: torch.Tensor
    """(B, L, D) last hidden states."""
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, (B, heads, L, head width)."""

    @classmethod
    def of_rows(cls, ids_L: torch.Tensor, hidden_BtD: torch.Tensor, cache: Cache, row_of_image: torch.Tensor) -> Prefix:
        """From what the language model gave for rows that begin with it, one a picture (its row: (B,) int64)."""
        length = len(ids_L)

        def of_pictures(x: torch.Tensor) -> torch.Tensor:
            return x if len(row_of_image) == 1 else x[row_of_image]

        layers = [tuple(of_pictures(x[:, :, :length]) for x in (layer.keys, layer.values)) for layer in cache.layers]
        return cls(ids_L, of_pictures(hidden_BtD[:, :length]), layers)

    def cache(self, image_of_row: torch.Tensor) -> Cache:
        """A cache of R rows (their pictures: (R,) int64) that may grow; the prefix itself stays as it is."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[image_of_row], values[image_of_row], index)
        return cache


def shared_beginning(input_ids_NT: torch.Tensor, attention_mask_NT: torch.Tensor) -> torch.Tensor | None:
    """(L,) ids that padded prompts all begin with, up to their last image token; None if one has no image, or they differ.

    In the host's memory, as in `pack`: a GPU would be waited for at every row.
    """
    rows = [row[keep] for row, keep in zip(input_ids_NT.cpu(), attention_mask_NT.cpu().bool(), strict=True)]
    slots = (rows[0] == IMAGE_TOKEN_INDEX).nonzero()
    if len(slots) == 0:
        return None
    beginning = rows[0][: int(slots[-1]) + 1]
    length = len(beginning)
    same = all(torch.equal(row[:length], beginning) for row in rows)
    whole = all(len(row) > length and not bool((row[length:] == IMAGE_TOKEN_INDEX).any()) for row in rows)
    return beginning if same and whole else None
