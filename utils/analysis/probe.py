"""Where `[SEG]` looks: the states behind the three similarity maps, read off an unmodified model by hooks.

    with watch(model, layers) as tape:
        seen = look(model, tape, images, input_ids, attention_mask)

In: the encoded picture and whole conversations about it, answers included. Out: `Seen`, with what the model drew and the grids of
the maps. The hooks stand outside the model's forward, change nothing in it, and are gone after the `with`.

Legend: N questions · M [SEG] tokens · T tokens · P image tokens · D hidden width · C SAM width · (h, w) SAM's grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model import llava, sasp
from model.packing import pack

if TYPE_CHECKING:
    from model import EncodedImages, READForCausalLM, Segments

LAYER_SEG = ("same", "last")
"""Of which layer the [SEG] state is whose similarity with a layer's image tokens is taken."""
SAM_TOKENS = {"seg": -1, "released": -2}
"""Place of the token whose map is taken in SAM's decoder: [SEG] stands at the end; the released code drew the one before."""


@dataclass
class Tape:
    """What the hooks of `watch` recorded, the latest call last."""

    layers: tuple[int, ...]
    """Of transformers' `hidden_states`, the last one always among them."""
    hidden: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Layer -> its (n, t, D) of each call of the language model."""
    seg_states: list[torch.Tensor] = field(default_factory=list)
    """(M, D), what goes into the projection to SAM."""
    texts: list[torch.Tensor] = field(default_factory=list)
    """(M, C), what comes out of it."""
    decoder: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Tokens (M, tokens, C) and image embedding (M, h * w, C) after the two-way transformer of SAM's decoder."""


@contextmanager
def watch(model: READForCausalLM, layers: Sequence[int] = ()) -> Iterator[Tape]:
    """Records, from here to the end of the `with`, what passes through a model.

    Args:
        layers: of the language model's `hidden_states`, counted from 0 (its input) to the number of its blocks.

    Raises:
        ValueError: there is no such layer.
    """
    language_model = model.llava.model.language_model
    last = len(language_model.layers)
    if wrong := [layer for layer in layers if not 0 <= layer <= last]:
        raise ValueError(f"no layer {wrong[0]}: the language model has {last} blocks, hence layers 0 (its input) to {last}")
    tape = Tape(tuple(sorted({*layers, last})))

    def keep_input(layer: int):
        def hook(module, args, kwargs):
            tape.hidden[layer].append(args[0] if args else kwargs["hidden_states"])

        return hook

    def keep_last(module, args, output):
        tape.hidden[last].append(output.last_hidden_state)

    def keep_projection(module, args, output):
        tape.seg_states.append(args[0])
        tape.texts.append(output)

    def keep_decoder(module, args, output):
        tape.decoder.append(output)

    handles = []
    try:
        for layer in tape.layers[:-1]:
            block = language_model.layers[layer]
            handles.append(block.register_forward_pre_hook(keep_input(layer), with_kwargs=True))
        handles.append(language_model.register_forward_hook(keep_last))
        handles.append(model.text_hidden_fcs[0].register_forward_hook(keep_projection))
        handles.append(model.sam.mask_decoder.transformer.register_forward_hook(keep_decoder))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """What the model drew for M `[SEG]` tokens of questions about one picture, and where they looked."""

    segments: Segments
    texts: torch.Tensor
    """(M, C) projected [SEG] states."""
    clip: torch.Tensor
    """(M, P) similarity with the projected CLIP features."""
    llava: torch.Tensor
    """(M, P) similarity with the image tokens of the last layer."""
    sam: torch.Tensor
    """(M, h, w) similarity inside SAM's decoder, over its padded square."""
    layers: dict[tuple[str, int], torch.Tensor]
    """(kind of `LAYER_SEG`, layer) -> (M, P), for the layers asked for."""


@torch.no_grad()
def look(
    model: READForCausalLM,
    tape: Tape,
    images: EncodedImages,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sam_token: str = "seg",
) -> Seen:
    """Segments N conversations about the one picture of `images`, and reads the maps off `tape`.

    Args:
        tape: of a `watch` that began before the picture's first question.
        input_ids, attention_mask: (N, T), padded on the right, answers included.
        sam_token: `seg`, or `released`; see the package.
    """
    if len(images) != 1:
        raise ValueError(f"one picture at a time, found {len(images)}")
    nobody = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    drawings = len(tape.decoder)
    segments = model.segment_answers(images, input_ids, attention_mask, nobody)
    seg = tape.seg_states[-1]
    features = images.features.expand(len(seg), -1, -1)
    question, position = llava.seg_positions(input_ids, model.config.seg_token_id)
    maps: dict[tuple[str, int], torch.Tensor] = {}
    for layer in tape.layers:
        image_states, states = _states(tape.hidden[layer], input_ids, attention_mask, question, position)
        maps["same", layer] = sasp.similarity(image_states, states)
        maps["last", layer] = sasp.similarity(image_states, seg)
    side = model.config.sam.grid_size
    if len(tape.decoder) > drawings:
        tokens, embedding = tape.decoder[-1]
        inside = sasp.similarity(embedding, tokens[:, SAM_TOKENS[sam_token]])
    else:  # no [SEG], nothing was drawn
        inside = seg.new_zeros(0, side * side)
    return Seen(
        segments=segments,
        texts=tape.texts[-1],
        clip=sasp.similarity(features, seg),
        llava=maps["same", tape.layers[-1]],
        sam=inside.unflatten(1, (side, side)),
        layers=maps,
    )


def _states(
    calls: list[torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    question: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """((M, P, D) of the image tokens, (M, D) of [SEG]) in one layer, from the calls of the language model.

    The last call is that of the conversations, in one row where they share their picture. It may lack what they begin with,
    which the first call about the picture began with too.
    """
    states = calls[-1]
    if states.shape[:2] != input_ids.shape:
        packed = pack(input_ids, attention_mask, torch.zeros_like(input_ids[:, 0]), must_save=False)
        before = packed.ids.shape[1] - states.shape[1]
        states = packed.unpack(torch.cat([calls[0][:1, :before], states], dim=1))
    return llava.image_states(states, input_ids, question), states[question, position]
