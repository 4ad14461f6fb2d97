# ruff: noqa: E402
"""READ: LLaVA-1.5 reasons, SasP turns what `[SEG]` attends to into points, SAM draws the mask."""

import logging

# PEFT imports bitsandbytes, which advises some CPUs to install kernels that are for 4-bit inference alone.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .config import LossConfig, READConfig, SamConfig, SaspConfig
from .lora import add_lora, merge_lora, save_adapter, set_trainable
from .predictor import Answer, KeptAnswer, READPredictor
from .presets import PRESETS, Preset, get_preset
from .processing import READProcessor
from .quantize import dequantize_language_model, quantize_language_model
from .read import EncodedImages, READForCausalLM, READGeneration, READOutput, Segments
from .sasp import select_points

__all__ = [
    "PRESETS",
    "Answer",
    "EncodedImages",
    "KeptAnswer",
    "LossConfig",
    "Preset",
    "READConfig",
    "READForCausalLM",
    "READGeneration",
    "READOutput",
    "READPredictor",
    "READProcessor",
    "SamConfig",
    "SaspConfig",
    "Segments",
    "add_lora",
    "dequantize_language_model",
    "get_preset",
    "merge_lora",
    "quantize_language_model",
    "save_adapter",
    "select_points",
    "set_trainable",
]
