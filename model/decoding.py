"""Greedy answers, token by token: the loop behind `generate_answers`.

    found = Decoder()(llava, states, cache, where, mask, max_new_tokens=512)
    found.ids, found.hidden                                      what was written, and the states [SEG] is looked up in

Keys and values stay in memory whose place does not change, so a step on a GPU can be recorded once (`model.recording`) and
replayed: one launch instead of some 1100 for a 7B model. A recording costs a fraction of a second and memory for as long as it
is kept, so who decodes much asks for it:

    with model.recorded(): ...

Legend: N questions · T tokens of the longest prompt · a tokens of the longest answer · D hidden width · R room, the places for
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, LlavaForConditionalGeneration

from .packing import CACHE, attention_with_masks
from .recording import Switched, record, recordable, state_of

PLACES = 64
"""Room grows by as many places; attention kernels want a multiple of 16."""


@dataclass
class Decoded:
    """What `Decoder` found for N questions."""

    ids: torch.Tensor
    """(N, a) int64 of the answers, 0 behind an end token; every question has an end token, or a is `max_new_tokens`."""
    hidden: torch.Tensor
    """(N, a - 1, D) last hidden states of all that was written but the last token."""
    logits: list[torch.Tensor] | None
    """a tensors (N, vocabulary), if asked for."""


class FixedCache:
    """Keys and values of some rows, each layer (N, R, heads, head width), written at `place`: a cache to transformers' layers."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = keys, values
        self.place = torch.zeros(1, dtype=torch.long, device=keys[0].device)
        """(1,) int64: where the next token goes."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """All keys and values of a layer (N, heads, R, head width), the given ones (N, heads, 1, head width) among them."""
        for held, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            held.index_copy_(1, self.place, new.transpose(1, 2))
        return self.keys[layer_idx].transpose(1, 2), self.values[layer_idx].transpose(1, 2)

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
    tried: bool = False
    """Recording was tried: it may fail, and would again."""


@dataclass
class Decoder(Switched):
    """Answers N questions together; what it keeps between calls is memory and recorded steps, never anything of a question.

    Recorded or not, a step is the same kernels on the same numbers. Each number of questions has a recording of its own; all
    share the memory for keys and values, so that room may be left, which is hidden from the attention. Quantised weights, and
    those that ZeRO-3 splits, go step by step, whether it is on or not.
    """

    _keys: list[torch.Tensor] = field(default_factory=list, repr=False)
    _values: list[torch.Tensor] = field(default_factory=list, repr=False)
    _recorded: dict[int, _Rows] = field(default_factory=dict, repr=False)
    _made_for: tuple = field(default=(), repr=False)

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
        states: torch.Tensor,
        cache: Cache,
        where: torch.Tensor,
        mask: torch.Tensor,
        *,
        max_new_tokens: int,
        output_logits: bool = False,
        streamer: Any = None,
    ) -> Decoded:
        """Greedy answers to N prompts that the language model has read.

        Args:
            states: (N, D) last hidden state of each prompt's last token.
            cache: keys and values of r rows of t tokens, which are taken out of it. where: (N, T) int64, at which of the r * t
                places each token of a prompt stands; rows may hold several prompts.
            mask: (N, T) bool, False for padding, which is on the left.
            streamer: of transformers, told each token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
        recorded = self.on and recordable(llava)
        if not recorded:
            self.forget()
        done = False
        try:
            with attention_with_masks(llava.model.language_model):
                rows = self._rows(llava, *where.shape, min(max_new_tokens, PLACES), states, recorded)
                _take_over(rows, cache, where)
                found = self._decode(llava, rows, states, mask.bool(), max_new_tokens, output_logits, streamer, recorded)
            done = True
            return found
        finally:
            if not (done and recorded):  # an error may leave half a recording, or hold the memory that the next try needs
                self.forget()

    def _decode(
        self,
        llava: LlavaForConditionalGeneration,
        rows: _Rows,
        states: torch.Tensor,
        seen: torch.Tensor,
        max_new_tokens: int,
        output_logits: bool,
        streamer: Any,
        recorded: bool,
    ) -> Decoded:
        logits = llava.lm_head(states)
        first = logits.argmax(dim=-1, keepdim=True)
        _begin(rows, first, seen, llava.config.text_config.eos_token_id)
        written, hidden, kept = [first], [], [logits]
        used = seen.shape[1]
        if streamer is not None:
            streamer.put(first.new_zeros(len(first), 0).cpu())  # the prompt, which transformers' own may skip
            streamer.put(first.flatten().cpu())
        while len(written) < max_new_tokens and not bool(rows.finished.all()):
            if used + 1 >= rows.bias.shape[-1]:  # the step writes at place `used`, and opens the next
                rows = self._grown(llava, rows, recorded)
            self.step(llava, rows, recorded)
            used += 1
            written.append(rows.ids.clone())
            hidden.append(rows.hidden.clone())
            if output_logits:
                kept.append(rows.logits.clone())
            if streamer is not None:
                streamer.put(written[-1].flatten().cpu())
        if streamer is not None:
            streamer.end()
        nothing = states.new_zeros(len(states), 0, states.shape[1])
        return Decoded(torch.cat(written, dim=1), torch.cat([nothing, *hidden], dim=1), kept if output_logits else None)

    # -------------------------------------------------------------------------------------------- steps

    def step(self, llava: LlavaForConditionalGeneration, rows: _Rows, recorded: bool) -> None:
        """One more token of each row: the first time as it stands, then recorded if asked for, from then on replayed."""
        if rows.replay is not None:
            rows.replay()
            return
        _advance(llava, rows)
        if recorded and not rows.tried:
            rows.tried = True
            rows.replay = record(lambda: _advance(llava, rows), rows.hidden.device)

    def _rows(
        self,
        llava: LlavaForConditionalGeneration,
        count: int,
        used: int,
        more: int,
        like: torch.Tensor,
        recorded: bool,
    ) -> _Rows:
        """Rows for `count` questions with `used` places taken and `more` to come; recorded ones are taken up again."""
        text, room = llava.config.text_config, -(-(used + more + 1) // PLACES) * PLACES
        if recorded:
            made_for = _read_by_a_step(llava)
            if made_for != self._made_for:
                self.forget()
                self._made_for = made_for
        held = 1 << (count - 1).bit_length() if recorded else count  # else each larger number would drop all recordings
        if self._keys:
            rows_held, room_held = self._keys[0].shape[:2]
            if count > rows_held or room > room_held:
                self._drop()
                held, room = max(held, rows_held), max(room, room_held)
        # Not in inference mode, whose tensors no one else may write to.
        with torch.inference_mode(False):
            if not self._keys:
                heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
                width = getattr(text, "head_dim", None) or width
                shape = (held, room, heads, width)
                self._keys = [like.new_zeros(shape) for _ in range(text.num_hidden_layers)]
                self._values = [like.new_zeros(shape) for _ in range(text.num_hidden_layers)]
            if count in self._recorded:
                return self._recorded[count]
            room = self._keys[0].shape[1]
            rows = _Rows(
                cache=FixedCache([x[:count] for x in self._keys], [x[:count] for x in self._values]),
                ids=torch.zeros(count, 1, dtype=torch.long, device=like.device),
                position=torch.zeros(count, 1, dtype=torch.long, device=like.device),
                bias=like.new_zeros(count, 1, 1, room),
                finished=torch.zeros(count, 1, dtype=torch.bool, device=like.device),
                hidden=like.new_zeros(count, 1, text.hidden_size),
                logits=like.new_zeros(count, text.vocab_size),
            )
            if recorded:
                self._recorded[count] = rows
            return rows

    def _grown(self, llava: LlavaForConditionalGeneration, rows: _Rows, recorded: bool) -> _Rows:
        """The same rows where there is more room."""
        (count, room), (keys, values) = rows.bias.shape[::3], (rows.cache.keys, rows.cache.values)
        self._drop()
        more = self._rows(llava, count, room, PLACES - 1, rows.hidden, recorded)
        for old, new in zip([*keys, *values], [*more.cache.keys, *more.cache.values], strict=True):
            new[:, :room] = old
        for name in ("ids", "position", "finished"):
            getattr(more, name).copy_(getattr(rows, name))
        more.cache.place.copy_(rows.cache.place)
        more.bias.fill_(torch.finfo(more.bias.dtype).min)
        more.bias[..., :room] = rows.bias
        return more


def _take_over(rows: _Rows, cache: Cache, where: torch.Tensor) -> None:
    """Puts the keys and values of prompts, of which `where` says the places, in front, and takes them out of their cache."""
    length = where.shape[1]
    for layer, keys, values in zip(cache.layers, rows.cache.keys, rows.cache.values, strict=True):
        for held, given in ((keys, layer.keys), (values, layer.values)):
            held[:, :length] = given.transpose(1, 2).flatten(0, 1)[where]
            held[:, length:] = 0  # hidden from the attention, but zero times what an earlier question left may be NaN
        layer.keys = layer.values = None


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
    """What decides a recorded step."""
    language_model, text = llava.model.language_model, llava.config.text_config
    return language_model.config._attn_implementation, text.eos_token_id, state_of(language_model, llava.lm_head)


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
