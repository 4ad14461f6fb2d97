"""LoRA on the language model, and the one place that decides what trains (protocol §3).

PEFT is imported where it is used: with what it draws in, it takes longer to import than all the rest, and answers need none.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from .read import READForCausalLM

log = logging.getLogger(__name__)


def add_lora(
    model: READForCausalLM,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
) -> READForCausalLM:
    """Puts PEFT's LoRA layers into the language model only (CLIP has a q_proj and a v_proj too). Returns the model.

    r = 0 leaves it as it is: then the language model trains in full.
    """
    if r > 0:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), bias="none")
        inject_adapter_in_model(config, model.llava.model.language_model)
    return model


def set_trainable(model: READForCausalLM, train_mask_decoder: bool = True) -> str:
    """Freezes everything, then frees what READ trains; returns, and logs, a table of it.

    Trained: LoRA (or without LoRA the whole language model), `lm_head`, `embed_tokens`, SAM's mask decoder (unless told
    otherwise) and the projection `text_hidden_fcs`. Frozen: CLIP, the projector, SAM's image and prompt encoders.
    """
    lora = any("lora_" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        in_language_model = name.startswith("llava.model.language_model.")
        parameter.requires_grad_(
            name.startswith(("llava.lm_head.", "text_hidden_fcs.", "llava.model.language_model.embed_tokens."))
            or (name.startswith("sam.mask_decoder.") and train_mask_decoder)
            or (in_language_model and ("lora_" in name if lora else True))
        )
    report = trainable_report(model)
    log.info("%s", report)
    return report


def trainable_report(model: READForCausalLM) -> str:
    """Parameters trained and frozen by part: counts and percent."""
    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = "LoRA" if "lora_" in name else _part(name)
        # ZeRO-3 leaves empty shells behind, 4 bits are packed by two: their own counts are the true ones.
        packed = getattr(parameter, "quant_state", None)
        count = packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
        total[part] += count
        trained[part] += count * parameter.requires_grad
    lines = [f"{'part':<22}{'trained':>14}{'of':>14}"]
    lines += [f"{part:<22}{trained[part]:>14,}{count:>14,}" for part, count in total.items()]
    share = 100 * sum(trained.values()) / sum(total.values())
    lines.append(f"{'all':<22}{sum(trained.values()):>14,}{sum(total.values()):>14,}  ({share:.2f} %)")
    return "\n".join(lines)


def _part(name: str) -> str:
    parts = {
        "llava.model.vision_tower.": "CLIP",
        "llava.model.multi_modal_projector.": "projector",
        "llava.model.language_model.embed_tokens.": "embed_tokens",
        "llava.model.language_model.": "language model",
        "llava.lm_head.": "lm_head",
        "sam.image_encoder.": "SAM image encoder",
        "sam.prompt_encoder.": "SAM prompt encoder",
        "sam.mask_decoder.": "SAM mask decoder",
        "text_hidden_fcs.": "text_hidden_fcs",
    }
    return next(part for prefix, part in parts.items() if name.startswith(prefix))


def merge_lora(model: READForCausalLM) -> READForCausalLM:
    """Folds the LoRA layers into the weights they sit on, in place, and removes them. Returns the model.

    Raises:
        ValueError: the model has no LoRA layers (merged already, or never had any).
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("nothing to merge: this model has no LoRA layers")
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    language_model = model.llava.model.language_model
    if hasattr(language_model, "peft_config"):
        del language_model.peft_config
    return model


def save_adapter(
    trained: dict[str, torch.Tensor],
    folder: str | Path,
    base: str,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: tuple[str, ...],
) -> None:
    """Everything that trained as a PEFT adapter: `PeftModel.from_pretrained(READForCausalLM of the base, folder)` applies it.

    Args:
        trained: tensors by their names in the model with LoRA on.
        base: what the adapter belongs to, written into its config.
        r, alpha, dropout, target_modules: as `add_lora` was given them.
    """
    from peft import LoraConfig

    whole = sorted({next(part for part in WHOLE if name.startswith(f"{part}.")) for name in trained if "lora_" not in name})
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Only in the language model: CLIP has layers of the same names.
        target_modules=rf"llava\.model\.language_model\..*\.({'|'.join(target_modules)})",
        modules_to_save=whole,
        bias="none",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in trained.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


WHOLE = ("llava.model.language_model.embed_tokens", "llava.lm_head", "sam.mask_decoder", "text_hidden_fcs.0")
"""What trains in full beside LoRA, by module (PEFT wraps no ModuleList, hence the one row of the projection)."""
