"""Greedy answers, token by token: the loop behind `generate_answers`.

    found = Decoder()(llava, embeddings, mask, prefix, image_of_question, max_new_tokens=512)
    found.ids, found.hidden                                      what was written, and the states [SEG] is looked up in

Keys and values stay in memory whose place does not change, so a step on a GPU can be recorded once (a CUDA graph) and replayed:
one launch instead of some 1500 for a 7B model, whose kernels are shorter than it takes Python to ask for them. A recording costs
a fraction of a second and memory for as long as it is kept, so who decodes much asks for it:

    with model.decoder.recorded(): ...

Legend: N questions · L tokens of the prefix · t tokens of the longest prompt behind it · a tokens of the longest answer
· D hidden width · R room, the places for keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from .packing import attention_with_masks
from .prefix import CACHE, Prefix
from .recording import addresses, record, recordable

PLACES = 64
"""Room grows by as many places; attention kernels want a multiple of 16."""


@dataclass
class Decoded:
    """What `Decoder` found for N questions."""

    ids: torch.Tensor
    """(N, a) int64 of the answers, 0 behind an end token; every question has an end token, or a is `max_new_tokens`."""
    hidden: torch.Tensor
    """(N, t + a - 1, D) last hidden states of the prompts behind the prefix and of all that was written but the last token."""
    logits: list[torch.Tensor] | None
    """a tensors (N, vocabulary), if asked for."""


class FixedCache:
    """Keys and values of some rows, each layer (N, heads, R, head width), written at `place`: a cache to transformers' layers."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], place: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.place = place
        """(n,) int64: where the next n tokens go."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """All keys and values of a layer, the given ones (N, heads, n, head width) among them."""
        self.keys[layer_idx].index_copy_(2, self.place, keys)
        self.values[layer_idx].index_copy_(2, self.place, values)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked for where positions or masks are not given; here both are."""
        return 0


@dataclass
class _Rows:
    """N questions while they are answered. All tensors stay where they are; a step changes what is in them."""

    cache: FixedCache
    ids: torch.Tensor
    """(N, 1) int64, written last; goes into the language model next."""
    position: torch.Tensor
    """(N, 1) int64, of that token."""
    bias: torch.Tensor
    """(N, 1, 1, R), added to attention scores: 0 where there is something to see, else the dtype's lowest number."""
    finished: torch.Tensor
    """(N, 1) bool: the answer has its end token."""
    hidden: torch.Tensor
    """(N, 1, D), of the last step."""
    logits: torch.Tensor
    """(N, vocabulary), of the last step."""
    replay: Callable[[], None] | None = None
    """The recorded step."""
    tries: int = 0
    """Recordings that were tried: one may fail, and the next would."""


@dataclass
class Decoder:
    """Answers N questions together; what it keeps between calls is memory and recorded steps, never anything of a question.

    Recorded or not, a step is the same kernels on the same numbers. Each number of questions has a recording of its own; all
    share the memory for keys and values, so that room may be left, which is hidden from the attention.
    """

    record: bool = False
    """Steps on a GPU are recorded and kept. Not for quantised weights, or those that ZeRO-3 splits: these go step by step."""
    _keys: list[torch.Tensor] = field(default_factory=list, repr=False)
    _values: list[torch.Tensor] = field(default_factory=list, repr=False)
    _recorded: dict[int, _Rows] = field(default_factory=dict, repr=False)
    _made_for: tuple = field(default=(), repr=False)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records steps for the length of a block, and gives their memory back behind it."""
        before, self.record = self.record, True
        try:
            yield
        finally:
            self.record = before
            self.forget()

    def forget(self) -> None:
        """Gives all memory back."""
        self._drop()
        self._made_for = ()

    def _drop(self) -> None:
        self._recorded.clear()  # first: recorded steps read what follows
        self._keys, self._values = [], []

    @torch.no_grad()
    def __call__(
        self,
        llava: LlavaForConditionalGeneration,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        prefix: Prefix | None = None,
        image_of_question: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        output_logits: bool = False,
        streamer: Any = None,
    ) -> Decoded:
        """Greedy answers to N prompts, padded on the left.

        Args:
            embeddings: (N, t, D) of the prompts, or of what follows the prefix. mask: (N, t) bool, False for padding; at
                least the last token of a row is True.
            prefix: what all prompts about a picture begin with. image_of_question: (N,) int64, whose prefix a row has.
            streamer: of transformers, told each token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
        recorded = self.record and recordable(llava)
        done = False
        try:
            with attention_with_masks(llava.model.language_model):
                found = self._decode(
                    llava, embeddings, mask, prefix, image_of_question, max_new_tokens, output_logits, streamer, recorded
                )
            done = True
            return found
        finally:
            if not (done and recorded):  # an error may leave half a recording, or hold the memory that the next try needs
                self.forget()

    def _decode(
        self,
        llava: LlavaForConditionalGeneration,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        prefix: Prefix | None,
        image_of_question: torch.Tensor | None,
        max_new_tokens: int,
        output_logits: bool,
        streamer: Any,
        recorded: bool,
    ) -> Decoded:
        count, length = mask.shape
        shared = 0 if prefix is None else len(prefix.ids)
        used = shared + length
        rows = self._rows(llava, count, used + min(max_new_tokens, PLACES), embeddings, recorded)
        seen = torch.cat([mask.new_ones(count, shared), mask.bool()], dim=1)
        if prefix is not None:
            for number, (keys, values) in enumerate(prefix.layers):
                rows.cache.keys[number][:, :, :shared] = keys[image_of_question]
                rows.cache.values[number][:, :, :shared] = values[image_of_question]
        hidden, logits = self._read_prompts(llava, rows, embeddings, seen, shared)
        first = logits.argmax(dim=-1, keepdim=True)
        eos = llava.config.text_config.eos_token_id
        _begin(rows, first, seen, eos)
        states, kept = [hidden], [logits]
        written = [first]
        if streamer is not None:
            streamer.put(first.flatten().cpu())
        while len(written) < max_new_tokens and not bool(rows.finished.all()):
            # The step writes at place `used`, and opens the next.
            if used + 1 >= rows.bias.shape[-1]:
                rows = self._grown(llava, rows, count, recorded)
            self.step(llava, rows, recorded)
            used += 1
            written.append(rows.ids.clone())
            states.append(rows.hidden.clone())
            if output_logits:
                kept.append(rows.logits.clone())
            if streamer is not None:
                streamer.put(written[-1].flatten().cpu())
        if streamer is not None:
            streamer.end()
        return Decoded(torch.cat(written, dim=1), torch.cat(states, dim=1), kept if output_logits else None)

    def _read_prompts(
        self,
        llava: LlavaForConditionalGeneration,
        rows: _Rows,
        embeddings: torch.Tensor,
        seen: torch.Tensor,
        shared: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden (N, t, D), logits (N, vocabulary) of the last) of prompts; keys and values go behind the prefix's."""
        length = embeddings.shape[1]
        room, device, dtype = rows.bias.shape[-1], embeddings.device, embeddings.dtype
        place = torch.arange(shared, shared + length, device=device)
        visible = torch.nn.functional.pad(seen, (0, room - shared - length))[:, None, None, :]
        visible = visible & (torch.arange(room, device=device) <= place[:, None])
        cache = FixedCache(rows.cache.keys, rows.cache.values, place)
        hidden = llava.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(
                ~visible, torch.finfo(dtype).min
            ),
            position_ids=(seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, shared:],
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state
        return hidden, llava.lm_head(hidden[:, -1:])[:, 0]

    # -------------------------------------------------------------------------------------------- steps

    def step(self, llava: LlavaForConditionalGeneration, rows: _Rows, recorded: bool) -> None:
        """One more token of each row: the first time as it stands, then recorded if asked for, from then on replayed."""
        if rows.replay is not None:
            rows.replay()
            return
        _advance(llava, rows)
        if recorded and rows.tries == 0:
            rows.tries = 1
            rows.replay = record(lambda: _advance(llava, rows))

    def _rows(
        self, llava: LlavaForConditionalGeneration, count: int, room: int, like: torch.Tensor, recorded: bool
    ) -> _Rows:
        """Rows for `count` questions with at least `room` places, one to spare; recorded ones are taken up again."""
        text, room = llava.config.text_config, -(-(room + 1) // PLACES) * PLACES
        if recorded:
            made_for = _read_by_a_step(llava)
            if made_for != self._made_for:
                self.forget()
                self._made_for = made_for
        held = 1 << (count - 1).bit_length() if recorded else count  # else each larger number would drop all recordings
        if self._keys:
            rows_held, _, room_held, _ = self._keys[0].shape
            if count > rows_held or room > room_held:
                self._drop()
                held, room = max(held, rows_held), max(room, room_held)
        # Not in inference mode, whose tensors no one else may write to.
        with torch.inference_mode(False):
            if not self._keys:
                heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
                width = getattr(text, "head_dim", None) or width
                shape = (held, heads, room, width)
                self._keys = [like.new_zeros(shape) for _ in range(text.num_hidden_layers)]
                self._values = [like.new_zeros(shape) for _ in range(text.num_hidden_layers)]
            if count in self._recorded:
                return self._recorded[count]
            room = self._keys[0].shape[2]
            place = torch.zeros(1, dtype=torch.long, device=like.device)
            whole = place.new_zeros(count, 1)
            rows = _Rows(
                cache=FixedCache([x[:count] for x in self._keys], [x[:count] for x in self._values], place),
                ids=whole,
                position=whole.clone(),
                bias=like.new_zeros(count, 1, 1, room),
                finished=torch.zeros(count, 1, dtype=torch.bool, device=like.device),
                hidden=like.new_zeros(count, 1, text.hidden_size),
                logits=like.new_zeros(count, text.vocab_size),
            )
            if recorded:
                self._recorded[count] = rows
            return rows

    def _grown(self, llava: LlavaForConditionalGeneration, rows: _Rows, count: int, recorded: bool) -> _Rows:
        """The same rows where there is more room."""
        room = rows.bias.shape[-1]
        keys, values = rows.cache.keys, rows.cache.values
        self._drop()
        more = self._rows(llava, count, room + PLACES, rows.hidden, recorded)
        for old, new in zip([*keys, *values], [*more.cache.keys, *more.cache.values], strict=True):
            new[:, :, :room] = old
        for name in ("ids", "position", "finished"):
            getattr(more, name).copy_(getattr(rows, name))
        more.cache.place.copy_(rows.cache.place)
        more.bias.fill_(torch.finfo(more.bias.dtype).min)
        more.bias[..., :room] = rows.bias
        return more


def _begin(rows: _Rows, first: torch.Tensor, seen: torch.Tensor, eos: int) -> None:
    """Puts the first tokens (N, 1) behind prompts whose tokens (N, L + t) are `seen`."""
    used = seen.shape[1]
    rows.ids.copy_(first)
    rows.position.copy_(seen.sum(dim=1, keepdim=True))
    rows.finished.copy_(first == eos)
    rows.cache.place.fill_(used)
    rows.bias.fill_(torch.finfo(rows.bias.dtype).min)
    rows.bias[:, 0, 0, :used].masked_fill_(seen, 0)
    rows.bias[..., used] = 0


def _read_by_a_step(llava: LlavaForConditionalGeneration) -> tuple:
    """What decides a recorded step: how it attends, and where the weights are."""
    language_model = llava.model.language_model
    return language_model.config._attn_implementation, *addresses(language_model, llava.lm_head)


def _advance(llava: LlavaForConditionalGeneration, rows: _Rows) -> None:
    """One step, in place and without a question to the device, so that it can be recorded."""
    hidden = llava.model.language_model(
        inputs_embeds=llava.get_input_embeddings()(rows.ids),
        attention_mask=rows.bias,
        position_ids=rows.position,
        use_cache=True,
        **{CACHE: rows.cache},
    ).last_hidden_state
    logits = llava.lm_head(hidden)[:, -1]
    rows.hidden.copy_(hidden)
    rows.logits.copy_(logits)
    rows.ids.copy_(logits.argmax(dim=-1, keepdim=True).masked_fill(rows.finished, 0))
    rows.finished |= rows.ids == llava.config.text_config.eos_token_id
    rows.position += 1
    rows.cache.place += 1
    rows.bias.index_fill_(3, rows.cache.place, 0)
