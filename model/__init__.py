"""READ: LLaVA-1.5 reasons, SasP turns what `[SEG]` attends to into points, SAM draws the mask."""

from .config import LossConfig, READConfig, SamConfig, SaspConfig
from .lora import add_lora, merge_lora, set_trainable
from .presets import PRESETS, Preset, get_preset
from .processing import READProcessor
from .read import READForCausalLM, READGeneration, READOutput, Segments
from .sasp import select_points

__all__ = [
    "PRESETS",
    "LossConfig",
    "Preset",
    "READConfig",
    "READForCausalLM",
    "READGeneration",
    "READOutput",
    "READProcessor",
    "SamConfig",
    "SaspConfig",
    "Segments",
    "add_lora",
    "get_preset",
    "merge_lora",
    "select_points",
    "set_trainable",
]
