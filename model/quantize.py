"""The frozen language model in 8 or 4 bits, so that LoRA fits on a smaller card.

bitsandbytes does it, for three reasons: PEFT puts LoRA on its layers by itself, its NF4 is the format of QLoRA, and it runs on
CPUs too, so that tests reach this path. Only the linear layers inside the transformer blocks are converted; embeddings,
`lm_head`, CLIP, projector and SAM stay as they are, since they train or are small.
"""

from __future__ import annotations

import torch
from torch import nn

from .read import READForCausalLM

OUTLIER = 6.0
"""From here on LLM.int8() keeps an input feature out of the 8 bits; large models need that (transformers' default too)."""


def quantize_language_model(model: READForCausalLM, bits: int, device: torch.device | str) -> READForCausalLM:
    """Converts the blocks of the language model, in place, on `device` (a model moved later keeps its numbers).

    Layers compute in the dtype that the weights have now. Call it before `add_lora`. Returns the model.

    Raises:
        ValueError: bits is neither 8 nor 4. ModuleNotFoundError: bitsandbytes is not installed.
    """
    if bits not in (4, 8):
        raise ValueError(f"the language model can be kept in 8 or 4 bits, found {bits}")
    language_model = model.llava.model.language_model
    for parent, name, linear in _linears(language_model, nn.Linear):
        setattr(parent, name, _quantized(linear, bits).to(device))
    language_model.is_loaded_in_4bit, language_model.is_loaded_in_8bit = bits == 4, bits == 8  # PEFT asks
    return model


def dequantize_language_model(model: READForCausalLM) -> READForCausalLM:
    """Undoes the conversion, but for its rounding, in place: what LoRA was trained on, as plain layers. Returns the model."""
    import bitsandbytes
    from peft.utils.integrations import dequantize_module_weight

    language_model = model.llava.model.language_model
    for parent, name, linear in _linears(language_model, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantize_module_weight(linear).to(model.dtype), requires_grad=False)
        plain.bias = linear.bias
        setattr(parent, name, plain)
    del language_model.is_loaded_in_4bit, language_model.is_loaded_in_8bit
    return model


def _linears(language_model: nn.Module, kind: type | tuple[type, ...]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of the blocks' layers of a kind."""
    return [
        (parent, name, child)
        for parent in language_model.layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


def _quantized(linear: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes

    size = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": linear.bias is not None}
    weight = linear.weight.detach()
    if bits == 4:
        layer = bitsandbytes.nn.Linear4bit(**size, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(**size, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer
