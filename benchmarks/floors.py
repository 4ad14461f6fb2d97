"""What a READ must take at least on a machine: operations and bytes counted, over ceilings measured in the same run.

    tops = ceilings(device, dtype)                    what this machine does: TFLOP/s of a large product, GB/s of a large copy
    counts = count(model.config)                      what this READ needs: FLOPs a picture, token and mask, weights
    evaluation_floor(counts, tops, ...)               seconds a stage of `benchmarks/evaluation.py`, of our schedule
    training_floor(counts, tops, ...)                 seconds a part of `benchmarks/training_step.py`, of the shared form

A pass through a part takes at least as long as its products at the speed of the large one, and as reading its weights at the
speed of the copy: the longer of the two counts (`roofline`). So a prefill, where many tokens share a reading of the weights,
is bound by FLOPs, and a decode step of few rows by bytes. A FLOP is one multiplication or one addition. Only products count:
norms, activations, SasP and the host's time are what lies between a floor and the measured time, with all that is done twice.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.stopwatch import Stopwatch
    from model import READConfig

SIDE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the large product's matrices."""
COPIED = {"cuda": 4 * 2**30, "cpu": 256 * 2**20}
"""Bytes of the large copy: far more than caches hold."""
WARMUP, RUNS = 3, 10
WARM_SECONDS, LONGEST_SECONDS = 0.2, 1.2
"""A GPU that was idle needs a moment for its clock to rise; a slow machine does fewer runs."""

Lengths = dict[int, tuple[int, list[int]]]
"""Picture -> (L tokens that its conversations begin with, the tokens of each behind them)."""


# ------------------------------------------------------------------------------------------------ the machine


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`tflops` (10^12 FLOP/s) of a large square product in this dtype, and `gb_per_second` (10^9) of a large copy.

    Bytes read and bytes written both count. Measured, since what makers state is not reached by any kernel. What is taken
    for it is given back, so that it does not count to a benchmark's memory (a peak must be reset afterwards).
    """
    import torch

    from benchmarks.stopwatch import Stopwatch

    watch, kind = Stopwatch(device), "cuda" if device.type == "cuda" else "cpu"
    side, size = SIDE[kind], COPIED[kind]
    multiplied = _product_seconds(watch, side, dtype)
    if kind == "cuda":
        torch.cuda.empty_cache()  # of the product's matrices
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)  # the model is there already
    copied = _copy_seconds(watch, size)
    if kind == "cuda":
        torch.cuda.empty_cache()
    return {"tflops": 2 * side**3 / multiplied / 1e12, "gb_per_second": 2 * size / copied / 1e9}


def _product_seconds(watch: Stopwatch, side: int, dtype: torch.dtype) -> float:
    import torch

    generator = torch.Generator(watch.device).manual_seed(0)  # its own: what comes after draws as without it
    left, right = (torch.randn(side, side, device=watch.device, dtype=dtype, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    return _median(watch, lambda: torch.mm(left, right, out=product))


def _copy_seconds(watch: Stopwatch, size: int) -> float:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=watch.device)  # written: pages never touched are read from nowhere
    target = torch.empty_like(source)
    return _median(watch, lambda: target.copy_(source))


def _median(watch: Stopwatch, work: Callable[[], object]) -> float:
    """Seconds of one run after warm-up."""
    begin = end = watch.now()
    warm = 0
    while warm == 0 or (end - begin < LONGEST_SECONDS / 2 and (warm < WARMUP or end - begin < WARM_SECONDS)):
        work()
        warm, end = warm + 1, watch.now()
    times: list[float] = []
    while not times or (len(times) < RUNS and end - begin < LONGEST_SECONDS):
        last = end
        work()
        end = watch.now()
        times.append(end - last)
    return statistics.median(times)


def roofline(tops: dict[str, float], flops: float, read: float = 0.0) -> float:
    """Seconds of a pass at least: its FLOPs or its bytes, whichever takes longer, since a device does both at once."""
    return max(flops / (tops["tflops"] * 1e12), read / (tops["gb_per_second"] * 1e9))


def text(tops: dict[str, float], device: torch.device) -> str:
    """The ceilings in a line."""
    side = SIDE["cuda" if device.type == "cuda" else "cpu"]
    return (
        f"ceilings, measured in this run: {tops['tflops']:.4g} TFLOP/s in a product of {side} x {side} matrices, "
        f"{tops['gb_per_second']:.4g} GB/s in a copy"
    )


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Counts:
    """What a READ needs, from its sizes alone: FLOPs, and numbers of weights, from which bytes follow in any dtype."""

    clip_flops: int
    """A picture: CLIP up to the layer whose states are taken, and the projector."""
    clip_weights: int
    sam_flops: int
    """A picture: SAM's image encoder, without what its windows are padded with."""
    sam_weights: int
    mask_flops: int
    """A mask: SAM's prompt encoder and mask decoder."""
    block_weights: int
    """Of the linear layers in the language model's blocks: each token takes all of them, two FLOPs a weight."""
    head_weights: int
    """Of the vocabulary head."""
    layers: int
    attention_width: int
    """Heads x their width: of queries, and of what attention gives."""
    cache_width: int
    """The same of keys, and of values."""

    def linear_flops(self, tokens: int) -> int:
        """Of the language model's blocks without attention."""
        return 2 * self.block_weights * tokens

    def attention_flops(self, pairs: int) -> int:
        """Of so many (query, key) pairs in every layer: a product for the score, and one for the value."""
        return 4 * self.attention_width * self.layers * pairs

    def prefill_flops(self, tokens: int, before: int = 0) -> int:
        """Of the blocks for a row of tokens behind `before` others that are cached; the causal half of attention alone."""
        return self.linear_flops(tokens) + self.attention_flops(causal_pairs(tokens, before))

    def block_bytes(self, itemsize: int, bits: int | None = None) -> float:
        """Of the blocks' weights: `itemsize` bytes each, or in 8 or 4 bits with their scales."""
        from model.memory import STORED

        return self.block_weights * (STORED[bits] if bits else itemsize)

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Of keys and values of so many tokens."""
        return 2 * self.layers * self.cache_width * tokens * itemsize

    def decode_bytes(self, cached: int, itemsize: int, bits: int | None = None) -> float:
        """That a decode step reads: weights of blocks and head once, and the cache, `cached` tokens of all rows together."""
        return self.block_bytes(itemsize, bits) + self.head_weights * itemsize + self.cache_bytes(cached, itemsize)


def causal_pairs(tokens: int, before: int = 0) -> int:
    """(query, key) pairs of a row of tokens, each of which sees itself, those in front of it and `before` others."""
    return tokens * before + tokens * (tokens + 1) // 2


def count(config: READConfig) -> Counts:
    """What a READ of these sizes needs, counted on PyTorch's meta device: nothing is allocated or computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import sam_encoder
    from model import llava, memory, sam

    config = copy.deepcopy(config)
    vision, text = config.llava.vision_config, config.llava.text_config
    taken = config.llava.vision_feature_layer
    depths = [depth % (vision.num_hidden_layers + 1) for depth in ([taken] if isinstance(taken, int) else taken)]
    vision.num_hidden_layers, config.llava.vision_feature_layer = max(depths), -1  # what lies behind is never looked at
    model = memory.on_meta(config, torch.float32, "eager").eval().requires_grad_(False)
    language, meta = model.llava.model, torch.device("meta")
    with FlopCounterMode(display=False) as clip:
        llava.image_features(model.llava, torch.empty(1, 3, vision.image_size, vision.image_size, device=meta))
    width, side, points, labels = config.sam.out_dim, config.sam.grid_size, None, None
    if config.sasp.enabled:
        points = torch.empty(1, config.sasp.num_points, 2, device=meta)
        labels = torch.empty(1, config.sasp.num_points, device=meta, dtype=torch.long)
    with FlopCounterMode(display=False) as mask:
        prompt = torch.empty(1, 1, width, device=meta)
        sam.decode_masks(model.sam, torch.empty(width, side, side, device=meta), points, labels, prompt)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Counts(
        clip_flops=clip.get_total_flops(),
        clip_weights=_weights([*language.vision_tower.parameters(), *language.multi_modal_projector.parameters()]),
        sam_flops=sam_encoder.count_flops(config.sam)[1],
        sam_weights=_weights(model.sam.image_encoder.parameters()),
        mask_flops=mask.get_total_flops(),
        block_weights=_weights(
            module.weight for module in language.language_model.layers.modules() if isinstance(module, torch.nn.Linear)
        ),
        head_weights=model.llava.lm_head.weight.numel(),
        layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * head_width,
        cache_width=(text.num_key_value_heads or text.num_attention_heads) * head_width,
    )


def _weights(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def counted(counts: Counts) -> str:
    """The counts in a few lines, for a plan."""
    return "\n".join(
        f"{name:<44}{value:>8.4g} {unit}"
        for name, value, unit in (
            ("CLIP and projector, a picture", counts.clip_flops / 1e12, "TFLOP"),
            ("SAM's encoder, a picture, without padding", counts.sam_flops / 1e12, "TFLOP"),
            ("SAM's decoder, a mask", counts.mask_flops / 1e12, "TFLOP"),
            ("language model's linear layers, a token", counts.linear_flops(1) / 1e9, "GFLOP"),
            ("its attention, a token that sees 1000", counts.attention_flops(1000) / 1e9, "GFLOP"),
            ("a decode step in bf16, weights alone", counts.decode_bytes(0, 2) / 1e9, "GB"),
            ("and for 1000 tokens in the cache", counts.cache_bytes(1000, 2) / 1e9, "GB"),
        )
    )


# ------------------------------------------------------------------------------------------------ floors


def lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor, image_of_question: torch.Tensor) -> Lengths:
    """How long conversations (N, T) are up to their last image token and behind it; those of a picture must begin alike."""
    from utils.conversation import IMAGE_TOKEN_INDEX

    found: Lengths = {}
    rows = zip(input_ids.cpu(), attention_mask.cpu().bool(), image_of_question.tolist(), strict=True)
    for ids, mask, image in rows:
        ids = ids[mask]
        slots = (ids == IMAGE_TOKEN_INDEX).nonzero()
        beginning = int(slots[-1]) + 1 if len(slots) else 0
        found.setdefault(image, (beginning, []))[1].append(len(ids) - beginning)
    return found


def evaluation_floor(
    counts: Counts,
    tops: dict[str, float],
    beginning: int,
    tails: list[int],
    *,
    chunk: int,
    itemsize: int,
    bits: int | None = None,
    answers: list[int] | None = None,
    masks: int = 0,
    pixels: int = 0,
) -> dict[str, float]:
    """Seconds of each stage, and in `total`, that a picture takes at least in our schedule.

    CLIP once and SAM's encoder once (if there is a mask), the beginning of the prompts once with the first `chunk` of the
    rests behind it, and then as many at a time: FLOPs at the product's speed, as they are many for each weight. With answers
    to write, a chunk takes the vocabulary head once for its rows' last places, and then decode steps until its longest answer
    has all but its first token, which the prompt gave. A step reads the weights once for all rows, which is why it is bound
    by bytes, and the cache of every row that is still being written: each holds the beginning for itself, as attention reads
    it for itself. The head of a decode step counts to the language model.

    Args:
        beginning, tails: tokens, see `lengths`. itemsize: bytes of a number in the run's dtype. bits: of the blocks' weights.
        answers: tokens of each written answer, its end included; None if all are given. masks: drawn in the picture, of
        `pixels` in all, which are written as float32.
    """
    seconds: Counter[str] = Counter()
    weights, head = counts.block_bytes(itemsize, bits), counts.head_weights
    seconds["CLIP"] = roofline(tops, counts.clip_flops, counts.clip_weights * itemsize)
    for first in range(0, len(tails), chunk):
        rows = tails[first : first + chunk]
        flops = sum(counts.prefill_flops(tail, beginning) for tail in rows)
        if first == 0:
            flops += counts.prefill_flops(beginning)
        seconds["language model"] += roofline(tops, flops, weights)
        if answers is None:
            continue
        seconds["vocabulary head"] += roofline(tops, 2 * head * len(rows), head * itemsize)
        written = answers[first : first + chunk]
        for step in range(1, max(written)):
            cached = [beginning + tail + step for tail, length in zip(rows, written, strict=True) if length > step]
            flops = counts.linear_flops(len(cached)) + counts.attention_flops(sum(cached)) + 2 * head * len(cached)
            seconds["language model"] += roofline(tops, flops, counts.decode_bytes(sum(cached), itemsize, bits))
    if masks:
        seconds["SAM encoder"] = roofline(tops, counts.sam_flops, counts.sam_weights * itemsize)
        seconds["mask decoder"] = roofline(tops, counts.mask_flops * masks, 4 * pixels)
    return {**seconds, "total": sum(seconds.values())}


def training_floor(
    counts: Counts,
    tops: dict[str, float],
    conversations: Lengths,
    *,
    itemsize: int,
    checkpointing: bool,
    supervised: int,
    segmented: int,
    masks: int,
    pixels: int,
    trained_bytes: int,
) -> dict[str, float]:
    """Seconds of each part of a training step, and in `total`, that it takes at least with shared beginnings.

    Forward, each token of the packed rows goes once through the blocks; padding does not count. Backward, the blocks' weights
    are frozen and need no gradient: a linear layer takes one product more, for that of its input, and not two; each of
    attention's products takes two, as both its sides have a gradient. So forward and backward are about twice the forward
    pass, and three times with gradient checkpointing, which computes the blocks again. CLIP and SAM's encoder run forward
    alone. Head and mask decoder are trained, their backward is twice their forward. LoRA's own products are left out.
    AdamW reads weight, gradient and two moments, and writes all but the gradient.

    Args:
        conversations: of each picture, see `lengths`. itemsize: bytes of a number in the run's dtype. supervised: tokens that
        the head is trained on. segmented: pictures that SAM sees. masks: drawn, of `pixels` in all, written as float32.
        trained_bytes: of the weights that are trained.
    """
    tokens = sum(beginning + sum(tails) for beginning, tails in conversations.values())
    pairs = sum(
        causal_pairs(beginning) + sum(causal_pairs(tail, beginning) for tail in tails)
        for beginning, tails in conversations.values()
    )
    linear, attention = counts.linear_flops(tokens), counts.attention_flops(pairs)
    head, drawn = 2 * counts.head_weights * supervised, counts.mask_flops * masks
    weights = counts.block_bytes(itemsize)
    again = linear + attention if checkpointing else 0
    seconds = {
        "CLIP": roofline(tops, counts.clip_flops * len(conversations), counts.clip_weights * itemsize),
        "language model": roofline(tops, linear + attention, weights),
        "SAM encoder": roofline(tops, counts.sam_flops * segmented, counts.sam_weights * itemsize if segmented else 0),
        "mask decoder": roofline(tops, drawn, 4 * pixels),
        "losses, rest of forward": roofline(tops, head, counts.head_weights * itemsize),
        "backward": roofline(tops, again + linear + 2 * attention + 2 * (head + drawn), weights * (2 if again else 1)),
        "optimiser": roofline(tops, 0, 7 * trained_bytes),
    }
    return {**seconds, "total": sum(seconds.values())}
