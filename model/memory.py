"""How much memory a training step takes on each GPU, before anything is loaded: the memory plan of `--dry_run`.

Weights, gradients and optimiser states are counted from the model's own tensors. Activations are measured, not guessed: the
parts that train run forward on PyTorch's meta device, which has shapes and no memory, and what autograd would keep for the
backward pass is added up. What the allocator and CUDA itself need comes on top (`RESERVE`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from . import sam, sasp
from .checkpoint import CheckpointError, read_config, read_shapes, resolve_folder, sam_shapes_of, weight_files
from .config import READConfig, SamConfig
from .read import READForCausalLM

GIB = 2**30
CARDS = (16, 24, 40, 48, 80, 141)
"""Sizes of common cards, GiB."""
RESERVE = 1.5
"""GiB for CUDA's context, its libraries' workspaces and fragmentation."""
TOKENS_BESIDE_IMAGE = 120
"""System prompt, question and answer of a usual training conversation."""
TOKENS_BEFORE_IMAGE = 38
"""Those of them that stand before the image: the system prompt."""
ANSWER_TOKENS = 30
SIDE = 640
"""Longest side of the usual picture; mask losses are taken in its pixels."""
LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""
STORED = {8: 1 + 4 / 4096, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight takes in 8 bits (a float32 scale a row) and in NF4 (an 8-bit scale a 64 weights, themselves rescaled)."""

LLAVA_SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}
"""Width, inner width, layers and heads of the published language models."""
PUBLISHED = {
    "liuhaotian/llava-v1.5-7b": "7b",
    "liuhaotian/llava-v1.5-13b": "13b",
    "tsunghanwu/SESAME": "7b",
    "runs/read-13b-stage1/merged": "13b",
}
"""Sizes of the presets' bases, so that a plan needs none of their files."""


@dataclasses.dataclass(frozen=True)
class StepShape:
    """One forward pass on one GPU."""

    pictures: int
    questions: int
    tokens: int
    """T, of a conversation, the picture's included."""
    shared: int = 0
    """Those of T that the conversations about a picture have in common and pass through the language model once."""

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, tokens of each) of the language model."""
        if self.shared == 0:
            return self.questions, self.tokens
        per_picture = -(-self.questions // self.pictures)
        return self.pictures, self.shared + per_picture * (self.tokens - self.shared)


@dataclasses.dataclass(frozen=True)
class Needs:
    """GiB on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    sam_encoder: float

    @property
    def total(self) -> float:
        """With the reserve. SAM's encoder runs before anything is kept for the backward pass of the decoder, beside the rest."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.sam_encoder + RESERVE


def base_config(
    version: str, vision_tower: str | None = None, sam_checkpoint: str | None = None
) -> tuple[READConfig, str]:
    """(config, where it comes from) of a base: from its folder, or the published size of one that is not here.

    Raises:
        CheckpointError: the base is neither here nor one of the published.
    """
    if not Path(version).is_dir() and version in PUBLISHED:
        return published_config(PUBLISHED[version]), f"the published size of {version}, which is not on this machine"
    folder = resolve_folder(version)
    shapes = read_shapes(weight_files(folder))
    try:
        return read_config(folder, shapes, sam_shapes_of(shapes, sam_checkpoint), vision_tower), str(folder)
    except CheckpointError as error:
        raise CheckpointError(f"no plan without the sizes of all parts: {error}") from error


def published_config(size: str) -> READConfig:
    """READ of LLaVA-1.5-7B or -13B with CLIP-L/336 and SAM ViT-H."""
    width, inner, layers, heads = LLAVA_SIZES[size]
    text = LlamaConfig(
        vocab_size=32003, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    return READConfig(llava=LlavaConfig(vision_config=clip, text_config=text), sam=SamConfig())


def on_meta(config: READConfig, dtype: torch.dtype, attn_implementation: str = "sdpa") -> READForCausalLM:
    """The model with shapes and no memory, in training mode."""
    with torch.device("meta"):
        return READForCausalLM(config, attn_implementation=attn_implementation).to(dtype).train()


# ------------------------------------------------------------------------------------------------ counting


def needs(
    model: READForCausalLM,
    activations: float,
    *,
    bits: int | None = None,
    zero_stage: int = 2,
    offload: str = "none",
    processes: int = 1,
    bucket_size: int = 500_000_000,
) -> Needs:
    """What one GPU holds, for a model (LoRA on, frozen and freed) and the GiB of its `activations`."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stored = weight_bytes(model, bits)
    size = model.dtype.itemsize
    bucket = min(bucket_size, trained)
    if zero_stage == 3:
        stored = (0 if offload == "all" else stored / processes) + min(LIVE_ELEMENTS, whole) * size
    gradients = (trained / processes + 2 * bucket) * size  # a share, and two buckets on their way to the others
    states = 0 if offload != "none" else 12 * trained / processes  # float32 copy, and AdamW's two moments
    return Needs(stored / GIB, gradients / GIB, states / GIB, activations, sam_encoder_peak(model) / GIB)


def weight_bytes(model: READForCausalLM, bits: int | None = None) -> float:
    """Bytes of all weights in the model's dtype, the language model's blocks in 8 or 4 bits if asked (`model.quantize`)."""
    blocks = "llava.model.language_model.layers."
    total = 0.0
    for name, parameter in model.named_parameters():
        convert = bits is not None and name.startswith(blocks) and parameter.ndim == 2 and "lora_" not in name
        total += parameter.numel() * (STORED[bits] if convert else parameter.element_size())
    return total


def sam_encoder_peak(model: READForCausalLM) -> int:
    """Bytes of SAM's largest attention, global over its grid: product, with relative positions added, softmax."""
    config = model.config.sam
    return 3 * config.num_heads * config.grid_size**4 * model.dtype.itemsize


def kept_for_backward(forward: Callable[[], Any], model: nn.Module, leave_out: tuple[int, int] | None = None) -> int:
    """Bytes that autograd keeps of a forward pass: every storage once, without parameters and buffers.

    `leave_out`: floating tensors that end in this shape do not count.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    alive: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        left_out = tensor.is_floating_point() and tuple(tensor.shape[-2:]) == leave_out
        if storage._cdata not in own and not left_out:
            alive[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in alive.values())
    del result
    return total


def activation_bytes(model: READForCausalLM, shape: StepShape, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of one step, on the device that the model is on (the meta device costs nothing).

    With checkpointing each block keeps its input, and at a time one block is computed again.
    """
    config, device, dtype = model.config, model.device, model.dtype
    count, width = shape.questions, config.hidden_size
    rows, length = shape.rows
    language_model, head = model.llava.model.language_model, model.llava.lm_head

    def language(layers: int) -> Any:
        states = torch.zeros(rows, length, width, device=device, dtype=dtype).requires_grad_()
        mask = torch.ones(rows, 1, length, length, device=device, dtype=torch.bool).tril()
        blocks, language_model.layers = language_model.layers, language_model.layers[:layers]
        configured, language_model.config.num_hidden_layers = language_model.config.num_hidden_layers, layers
        try:
            return language_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            language_model.layers, language_model.config.num_hidden_layers = blocks, configured

    def rest() -> Any:
        states = torch.zeros(count, ANSWER_TOKENS, width, device=device, dtype=dtype).requires_grad_()
        logits = head(states).float()
        kept = [torch.nn.functional.cross_entropy(logits.flatten(0, 1), logits.new_zeros(logits[..., 0].numel()).long())]
        image_states = torch.zeros(count, config.num_patches, width, device=device, dtype=dtype).requires_grad_()
        kept.append(sasp.similarity(image_states, states[:, 0]))
        text = model.text_hidden_fcs[0](states[:, 0])[:, None]
        side = config.sam.image_size
        size = (SIDE * 3 // 4, SIDE)
        fitted = (side * 3 // 4, side)
        per_picture = -(-count // shape.pictures)
        for first in range(0, count, per_picture):
            prompts = text[first : first + per_picture]
            embedding = torch.zeros(config.sam.out_dim, config.sam.grid_size, config.sam.grid_size, device=device, dtype=dtype)
            points = labels = None
            if config.sasp.enabled:
                points = torch.zeros(len(prompts), config.sasp.num_points, 2, device=device)
                labels = torch.ones(len(prompts), config.sasp.num_points, device=device, dtype=torch.long)
            low_res, _ = sam.decode_masks(model.sam, embedding, points, labels, prompts)
            masks = sam.upscale_logits(low_res, side, fitted, size)
            target = torch.zeros_like(masks)
            kept.append(torch.nn.functional.binary_cross_entropy_with_logits(masks, target))
            kept.append((masks.sigmoid() * target).sum())
        return kept

    # The meta device knows only plain attention, which keeps its (T, T) weights; the fused kernels of real devices do not.
    fused = None if language_model.config._attn_implementation == "eager" else (length, length)
    one, two = (kept_for_backward(lambda n=n: language(n), model, fused) for n in (1, 2))
    block, ends = two - one, 2 * one - two
    layers = config.llava.text_config.num_hidden_layers
    block_input = rows * length * width * dtype.itemsize
    inside = layers * block_input + block if checkpointing else layers * block
    return ends + inside + kept_for_backward(rest, model)


# ------------------------------------------------------------------------------------------------ the plan

WAYS = (
    ("ZeRO-2", 2, "none", None),
    ("ZeRO-2, --offload optimizer", 2, "optimizer", None),
    ("ZeRO-3", 3, "none", None),
    ("ZeRO-3, --offload optimizer", 3, "optimizer", None),
    ("ZeRO-3, --offload all", 3, "all", None),
    ("ZeRO-2, --load_in_8bit", 2, "none", 8),
    ("ZeRO-2, --load_in_4bit", 2, "none", 4),
    ("ZeRO-2, 8 bits, --offload optimizer", 2, "optimizer", 8),
    ("ZeRO-2, 4 bits, --offload optimizer", 2, "optimizer", 4),
)


def table(
    model: READForCausalLM,
    shape: StepShape,
    asked: tuple[int, str, int | None],
    bucket_size: int,
    card: float | None = None,
) -> str:
    """The memory plan: GiB on each GPU for every way to train, and the smallest card that takes it.

    Args:
        asked: ZeRO stage, offload and bits of the run; its row is marked. card: GiB of the card at hand, if there is one.
    """
    rows, length = shape.rows
    packed = f" in {rows} rows of {length}" if shape.shared else ""
    lines = [
        f"memory plan, GiB on each GPU, for {shape.pictures} pictures with {shape.questions} questions of {shape.tokens} "
        f"tokens{packed} a forward pass, {str(model.dtype).removeprefix('torch.')}; {RESERVE} GiB of each total are CUDA's own; "
        "* as asked for",
        f"{'with gradient checkpointing':<38}{'weights':>8}{'grads':>7}{'optim.':>8}{'activ.':>8}{'SAM':>6}{'total':>8}"
        f"{'card':>6}{'on 8':>8}{'card':>6}{'without':>9}",
    ]
    saved, kept = (activation_bytes(model, shape, checkpointing) / GIB for checkpointing in (True, False))
    for name, stage, offload, way_bits in WAYS:
        ways = {"bits": way_bits, "zero_stage": stage, "offload": offload, "bucket_size": bucket_size}
        one, eight = (needs(model, saved, **ways, processes=n) for n in (1, 8))
        without = needs(model, kept, **ways)
        mark = "* " if (stage, offload, way_bits) == asked else "  "
        lines.append(
            f"{mark + name:<38}{one.weights:>8.1f}{one.gradients:>7.1f}{one.optimizer:>8.1f}{one.activations:>8.1f}"
            f"{one.sam_encoder:>6.1f}{one.total:>8.1f}{smallest_card(one.total):>6}{eight.total:>8.1f}"
            f"{smallest_card(eight.total):>6}{without.total:>9.1f}"
        )
    if card is not None:
        lines.append(f"the card here has {card:.0f} GiB")
    return "\n".join(lines)


def smallest_card(total: float) -> str:
    """GiB of the smallest common card that takes so much."""
    return next((f"{size}" for size in CARDS if total <= 0.97 * size), "-")
