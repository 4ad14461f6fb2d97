"""The settings of a training run: one dataclass, from which the command line is made and which is saved with the run.

    given = parse_flags(argv)                     what was typed, nothing else (`--help` imports no torch)
    args = TrainArgs.resolve(given, preset)       flag typed > preset > default
    args.save(run / "config.json")                `TrainArgs.load(run)` reads it back: merging types no number again

Flags have the names and the defaults of the original where they still mean the same (protocol §3).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

from utils.files import write_json

CONFIG_NAME = "config.json"
LARGEST = 2**32
"""Above all whole numbers of flags. NumPy takes no larger seed."""

REMOVED = {
    "use_mm_start_end": "<im_start> and <im_end> belong to every READ checkpoint and are always used",
    "use_released_param": "what has to be newly initialised is decided from the keys that --version lacks",
    "image_size": "it is read from the checkpoint or from the SAM file",
    "out_dim": "it is read from the checkpoint or from the SAM file",
    "start_epoch": "it is read from the checkpoint that is resumed",
    "val_batch_size": "validation takes one picture with all its questions at a time, as the original asserted",
}
"""Flags of the original that are gone, and why: said to those who type them."""


def flag(default: Any, help: str, choices: tuple[str | int, ...] | None = None) -> Any:
    """A field of a settings dataclass with its sentence and its choices."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class TrainArgs:
    """Everything a training run is made of."""

    preset: str | None = flag(None, "named recipe of model/presets.py; flags that are typed win over it")
    exp_name: str | None = flag(None, "name of the run; unless given, the preset's, else read_referseg")
    log_base_dir: str = flag("./runs", "the run is kept in LOG_BASE_DIR/EXP_NAME")

    # ---- model
    version: str = flag("liuhaotian/llava-v1.5-7b", "base: folder or hub id of a READ, SESAME, LISA or LLaVA-1.5 checkpoint")
    vision_tower: str | None = flag(None, "CLIP folder or hub id; unless given, the one that the base names or carries")
    vision_pretrained: str | None = flag(None, "SAM .pth file, for a base without SAM (LLaVA-1.5)")
    precision: str = flag("bf16", "dtype of weights and activations", ("bf16", "fp16", "fp32"))
    attn_implementation: str = flag("sdpa", "attention of the language model", ("eager", "sdpa", "flash_attention_2"))
    load_in_8bit: bool = flag(False, "keep the frozen language model in 8 bits (bitsandbytes): LoRA on a smaller card")
    load_in_4bit: bool = flag(False, "keep the frozen language model in 4 bits (bitsandbytes NF4): on a still smaller one")
    gradient_checkpointing: bool = flag(True, "recompute the language model's activations: slower, much less memory")
    share_prefix: bool = flag(
        True, "in training, what conversations about a picture begin with goes through the language model once: same loss and "
        "gradients at less cost; flash_attention_2 cannot"
    )  # fmt: skip
    # The original's default is 512, less than the 576 tokens of a picture; its script passes 2048.
    model_max_length: int = flag(2048, "longest training conversation, tokens, the picture's included")
    conv_type: str = flag("llava_v1", "wording of the system prompt (utils/conversation.py)")

    # ---- what trains
    lora_r: int = flag(8, "LoRA rank; 0 trains the whole language model")
    lora_alpha: int = flag(16, "LoRA is scaled by alpha / r")
    lora_dropout: float = flag(0.05, "dropout in front of LoRA")
    lora_target_modules: str = flag("q_proj,v_proj", "layers of the language model that get LoRA, by comma")
    train_mask_decoder: bool = flag(True, "train SAM's mask decoder too")

    # ---- SasP: unless given, as the preset says, else as the base was trained
    sasp: bool | None = flag(None, "prompt SAM with points as well; --no-sasp is SESAME's path, the [SEG] token alone")
    num_points: int | None = flag(None, "K, points a mask")
    t_pos: float | None = flag(None, "similarity from which on a point is foreground")
    t_neg: float | None = flag(None, "similarity up to which a point is background")
    down_sample: int | None = flag(None, "factor by which the token grid is averaged before points are chosen")
    geometry: str | None = flag(None, "place of the points: as published, or exact", ("released", "exact"))

    # ---- loss
    ce_loss_weight: float = flag(1.0, "weight of the cross-entropy of the answers")
    bce_loss_weight: float = flag(2.0, "weight of the masks' binary cross-entropy")
    dice_loss_weight: float = flag(0.5, "weight of the masks' Dice loss")
    sim_loss_weight: float = flag(0.0, "weight of the loss on the similarity map; ours, 0 is the paper's training")

    # ---- data
    dataset_dir: str = flag("./data", "root of all image data, laid out as the README says")
    dataset: str = flag("refer_seg||correct_refer_seg||vqa||neg_refer_seg", "data sets to mix, joined by ||")
    # The original's default has three rates for these four and stops with an error; these are its ReferSeg script's.
    sample_rates: str = flag("12,2,2,1", "how often each is drawn, by comma, in the same order")
    sem_seg_data: str = flag("ade20k||cocostuff||pascal_part||paco_lvis||mapillary", "sources of sem_seg")
    refer_seg_data: str = flag("refclef||refcoco||refcoco+||refcocog", "sources of refer_seg")
    neg_refer_seg_data: str = flag("R-refcocog||R-refcoco||R-refcoco+", "sources of neg_refer_seg")
    correct_refer_seg_data: str = flag("fprefcocog||fprefcoco||fprefcoco+", "sources of correct_refer_seg")
    vqa_data: str = flag("llava_instruct_150k", "source of vqa")
    reason_seg_data: str = flag("ReasonSeg|train", "source of reason_seg: name|splits, several splits joined by _")
    reason_seg_ignore: str = flag(
        "background", "regions that ReasonSeg marks to be ignored: background, as the original trains, or really ignored",
        ("background", "ignored"),
    )
    own_data: str = flag("", "sources of own: paths of your own data (dataset/own.py), joined by ||")
    max_megapixels: int | None = flag(None, "largest image that is read (default: 178, or READ_MAX_MEGAPIXELS)")
    cache_dir: str | None = flag(None, "keep SAM's features of every picture here, and take them from here the next time")
    allow_missing: bool = flag(False, "name the data sets that are not on disk and train on the rest")
    strict: bool = flag(False, "stop at the first broken sample, which is else skipped and counted")
    num_classes_per_sample: int = flag(1, "questions about one picture in a training sample")
    workers: int = flag(4, "processes that load data; 0 loads in the training process")

    # ---- validation
    val_dataset: str = flag("ReasonSeg", "validated after each epoch, answers forced: ReasonSeg, refcoco, ...")
    val_split: str = flag("val", "split of val_dataset")
    no_eval: bool = flag(False, "train without validating; the last checkpoint counts as the best")
    eval_only: bool = flag(False, "validate --version and stop: no training data, no optimiser")

    # ---- optimisation
    epochs: int = flag(20, "epochs; the learning rate falls to 0 at epochs x steps_per_epoch")
    steps_per_epoch: int = flag(500, "optimiser steps an epoch")
    batch_size: int = flag(12, "pictures a forward pass on each device")
    grad_accumulation_steps: int = flag(1, "forward passes an optimiser step")
    lr: float = flag(3e-4, "highest learning rate")
    warmup_steps: int = flag(100, "steps in which the learning rate rises from 0")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.95, "AdamW")
    max_steps: int | None = flag(None, "stop, save and validate after this many optimiser steps in all")
    time_limit_s: float | None = flag(
        None,
        "stop, save and validate after so many seconds; the learning rate reaches 0 by the clock if that is sooner",
    )
    seed: int = flag(42, "of initialisation, dropout and the order of the data")
    zero_stage: int = flag(2, "what DeepSpeed splits over processes: 2 gradients and optimiser, 3 weights too", (2, 3))
    offload: str = flag(
        "none", "what rests in the host's memory: the optimiser's states, or with ZeRO-3 all weights",
        ("none", "optimizer", "all"),
    )
    bucket_size: int = flag(500_000_000, "elements of DeepSpeed's reduce and gather buckets; less saves memory")

    # ---- logging, checkpoints, processes
    print_freq: int = flag(3, "steps over which a logged value is averaged")
    resume: str | None = flag(None, "run to continue from (a folder with config.json and ckpt_model)")
    auto_resume: bool = flag(False, "continue from this run's own last checkpoint, if it has one")
    resume_with_changes: bool = flag(
        False, "resume with other data, seed, batch size, loss, ... than the run had; config.json records the changes"
    )
    overwrite: bool = flag(False, "delete what an earlier run of this name left")
    save_every: int | None = flag(None, "save every so many steps within an epoch too, for runs that may be cut off")
    use_wandb: bool = flag(False, "curves to Weights & Biases too (pip install wandb; WANDB_MODE=offline keeps them here)")
    dry_run: bool = flag(False, "print settings, what trains, data and a memory plan; load and train nothing")
    save_frozen: bool = flag(False, "put the frozen weights into checkpoints too; they are those of --version")
    local_rank: int = flag(0, "set by the deepspeed launcher")

    def __post_init__(self) -> None:
        """Gathers every complaint before raising."""
        from utils.conversation import SYSTEM

        if self.exp_name is None:
            self.exp_name = self.preset or "read_referseg"
        complaints = []
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value is not None and value not in choices:
                complaints.append(f"--{field.name} must be one of {', '.join(map(str, choices))}, found {value!r}")
        for name in ("epochs", "steps_per_epoch", "batch_size", "grad_accumulation_steps", "warmup_steps", "print_freq",
                     "model_max_length", "num_classes_per_sample", "bucket_size"):  # fmt: skip
            if getattr(self, name) < 1:
                complaints.append(f"--{name} must be at least 1, found {getattr(self, name)}")
        if self.max_megapixels is not None and self.max_megapixels < 1:
            complaints.append(f"--max_megapixels must be at least 1, found {self.max_megapixels}")
        if self.save_every is not None and self.save_every < 1:
            complaints.append(f"--save_every must be at least 1, found {self.save_every}")
        if self.load_in_4bit and self.load_in_8bit:
            complaints.append("--load_in_4bit and --load_in_8bit exclude each other")
        if self.quantized and self.lora_r == 0:
            complaints.append("a base in 4 or 8 bits cannot train in full: give LoRA a rank (--lora_r)")
        if self.quantized and self.zero_stage == 3:
            complaints.append("ZeRO-3 cannot split weights of 4 or 8 bits: take --zero_stage 2")
        if self.offload == "all" and self.zero_stage != 3:
            complaints.append("--offload all rests weights in the host's memory, which --zero_stage 3 can do")
        if self.cache_dir and self.zero_stage == 3:
            complaints.append("--cache_dir needs --zero_stage 2: in ZeRO-3 all processes must run SAM's encoder together")
        if self.lora_r < 0 or self.workers < 0:
            complaints.append(f"--lora_r and --workers must not be negative, found {self.lora_r} and {self.workers}")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                complaints.append(f"--{name} must be a finite number, found {value}")
        for name in ("lr", *(f"{name}_loss_weight" for name in LOSS_FLAGS)):
            if getattr(self, name) < 0:
                complaints.append(f"--{name} must not be negative, found {getattr(self, name)}")
        for name in ("lora_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                complaints.append(f"--{name} must be 0 or more and less than 1, found {getattr(self, name)}")
        for name in ("max_steps", "time_limit_s"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                complaints.append(f"--{name} must be above 0, found {getattr(self, name)}")
        if self.lora_alpha < 1:
            complaints.append(f"--lora_alpha must be at least 1, found {self.lora_alpha}: LoRA would learn nothing")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value >= LARGEST:  # it would overflow where it is used, long after the start
                complaints.append(f"--{name} must be less than {LARGEST}, found {value}")
        if self.seed < 0:
            complaints.append(f"--seed must not be negative, found {self.seed}")
        name = os.path.normpath(self.exp_name)
        if not self.exp_name or name == os.curdir or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            complaints.append(f"--exp_name must be a name within --log_base_dir, found {self.exp_name!r}")
        if self.conv_type not in SYSTEM:
            complaints.append(f"--conv_type must be one of {', '.join(SYSTEM)}, found {self.conv_type!r}")
        if self.resume and self.auto_resume:
            complaints.append("--resume names the run to continue, --auto_resume means this one: give one of the two")
        if self.resume_with_changes and not (self.resume or self.auto_resume):
            complaints.append("--resume_with_changes needs --auto_resume or --resume")
        if self.eval_only and (self.resume or self.auto_resume):
            complaints.append("--eval_only measures --version: merge the run first (merge_lora_weight.sh), then name that")
        try:
            self.mixture()
        except ValueError as error:
            complaints.append(str(error))
        if complaints:
            raise ValueError("\n".join(complaints))

    # ---- views

    @property
    def run_dir(self) -> Path:
        """Where the run keeps config, log, curves and checkpoints."""
        return Path(self.log_base_dir) / self.exp_name

    @property
    def quantized(self) -> int | None:
        """Bits of the frozen language model's weights, None for those of --precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def places(self) -> dict[str, str | None]:
        """Flag -> path of everything that this run reads, where it is a path."""
        own = {f"--own_data {path}": path for path in self.own_data.split("||") if path}
        names = ("version", "vision_tower", "vision_pretrained", "dataset_dir", "val_dataset", "resume", "cache_dir")
        return {f"--{name}": getattr(self, name) for name in names} | own

    def changes(self, before: TrainArgs) -> dict[str, tuple[Any, Any]]:
        """Flags that decide the numbers of a run and differ from those it had: name -> (was, is)."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in SAME_NUMBERS]
        values = {name: (getattr(before, name), getattr(self, name)) for name in names}
        return {name: (was, now) for name, (was, now) in values.items() if was != now}

    def mixture(self) -> list[tuple[str, float]]:
        """(data set, rate) pairs of --dataset and --sample_rates."""
        names = [name.strip() for name in self.dataset.split("||") if name.strip()]
        try:
            rates = [float(rate) for rate in self.sample_rates.split(",") if rate.strip()]
        except ValueError as error:
            raise ValueError(f"--sample_rates must be numbers joined by commas, found {self.sample_rates!r}") from error
        if len(names) != len(rates):
            raise ValueError(
                f"--dataset names {len(names)} data sets ({', '.join(names)}) but --sample_rates has {len(rates)} "
                f"rates ({self.sample_rates}): give one rate for each, in the same order"
            )
        if not names or min(rates) < 0 or sum(rates) == 0:
            raise ValueError(f"--sample_rates must be 0 or more with one above 0, found {self.sample_rates!r}")
        return list(zip(names, rates, strict=True))

    def configure(self, config: Any) -> None:
        """Puts this run's SasP, loss and wording into a model's READConfig, with which it will be saved."""
        configure_sasp(config, self)
        weights = {name: getattr(self, f"{name}_loss_weight") for name in LOSS_FLAGS}
        config.loss = dataclasses.replace(config.loss, **weights)
        config.conv_type = self.conv_type

    def lora(self) -> dict[str, Any]:
        """Keyword arguments of `model.add_lora`."""
        targets = tuple(name.strip() for name in self.lora_target_modules.split(","))
        return {
            "r": self.lora_r, "alpha": self.lora_alpha, "dropout": self.lora_dropout, "target_modules": targets
        }  # fmt: skip

    def processor(self, config: Any) -> dict[str, Any]:
        """Keyword arguments of `READProcessor.from_pretrained`, for a model's READConfig."""
        return {
            "vision_tower": self.vision_tower,
            "base": not self.eval_only,  # training may start from a base that lacks READ's tokens, measuring may not
            "sam_image_size": config.sam.image_size,
            "num_patches": config.num_patches,
            "conv_type": self.conv_type,
        }

    # ---- from flags, to and from JSON

    @classmethod
    def resolve(cls, given: dict[str, Any], preset: Any = None) -> TrainArgs:
        """Settings from the flags that were typed, over those of a `model.Preset`, over the defaults."""
        values: dict[str, Any] = {}
        if preset is not None:
            # Not its conv_type: that is how a model is asked; the original trained all of them as llava_v1 (§1).
            values |= {"sasp": preset.sasp.enabled} | {name: getattr(preset.sasp, name) for name in SASP_FLAGS}
            values |= {f"{name}_loss_weight": getattr(preset.loss, name) for name in LOSS_FLAGS}
            values |= preset.train
        values |= given
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"preset {preset.name} sets what is no flag: {', '.join(sorted(unknown))}")
        return cls(**values)

    def save(self, file: str | Path, **beside: Any) -> None:
        """Writes JSON: the settings under `train`, and what else belongs to the record of a run beside them."""
        write_json(file, {"train": dataclasses.asdict(self), **beside})

    @classmethod
    def load(cls, run: str | Path) -> TrainArgs:
        """Settings of the run in a folder.

        Raises:
            FileNotFoundError: the folder is no run. ValueError: the file is damaged, or settings are unknown or of another kind.
        """
        from utils.files import as_object, read_object, shown

        file = Path(run) / CONFIG_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{run} is not a training run: it has no {CONFIG_NAME} (train_read.py writes one)")
        fields = read_object(file)
        if "train" not in fields:
            raise ValueError(f"{run} is not a training run: {file} has no settings of one (field train)")
        values, kinds = as_object(fields["train"], f"{file}: train"), typing.get_type_hints(cls)
        if unknown := sorted(set(values) - set(kinds)):
            raise ValueError(f"{file}: train has the unknown setting {', '.join(map(shown, unknown))}: it is of another version")
        for name, value in values.items():
            kind = kinds[name] if not isinstance(kinds[name], types.UnionType) else typing.get_args(kinds[name])
            allowed = kind if isinstance(kind, tuple) else (kind,)
            if type(value) not in (*allowed, *([int] if float in allowed else [])) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"{file}: train.{name} must be {' or '.join(k.__name__ for k in allowed)}, found {shown(value)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


SAME_NUMBERS = frozenset({
    "preset", "exp_name", "log_base_dir", "dataset_dir", "cache_dir", "allow_missing", "strict", "workers", "no_eval",
    "eval_only", "max_steps", "print_freq", "resume", "auto_resume", "resume_with_changes", "overwrite", "save_every",
    "use_wandb", "dry_run", "save_frozen", "local_rank",
})  # fmt: skip
"""Flags that a run may change when it is resumed, and still computes the same. Of the data, the content counts, not the place."""
FIXED = (
    "version", "vision_tower", "vision_pretrained", "precision", "load_in_4bit", "load_in_8bit", "zero_stage", "lora_r",
    "lora_alpha", "lora_target_modules", "train_mask_decoder",
)  # fmt: skip
"""Flags that a checkpoint fits; no run can change them."""

SASP_FLAGS = ("num_points", "t_pos", "t_neg", "down_sample", "geometry")
LOSS_FLAGS = ("ce", "bce", "dice", "sim")


def configure_sasp(config: Any, flags: Any) -> None:
    """Puts the SasP flags that were given, attributes of `flags`, into a model's READConfig."""
    given = {"enabled": flags.sasp} | {name: getattr(flags, name) for name in SASP_FLAGS}
    config.sasp = dataclasses.replace(config.sasp, **{k: v for k, v in given.items() if v is not None})


def check_sasp(flags: Any) -> None:
    """Refuses SasP flags that fit no model, before one is loaded; thresholds that only the model's own contradicts come later.

    Raises:
        ValueError: a value is out of range, or `t_neg` is not below `t_pos`.
    """
    from model.config import SaspConfig

    given = {name: getattr(flags, name) for name in SASP_FLAGS if getattr(flags, name) is not None}
    SaspConfig(**{"t_pos": 1.0, "t_neg": 0.0, **given})


def build_parser(settings: type, description: str) -> argparse.ArgumentParser:
    """A parser with one flag a field. What is not typed is left out of the result, so that a preset can fill it."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = kinds[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default: {field.default})"
        if kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = field.metadata["choices"]
            parser.add_argument(f"--{field.name}", type=kind, help=text, choices=choices, metavar=kind.__name__.upper())
    return parser


def parse_flags(argv: list[str] | None = None) -> dict[str, Any]:
    """The flags of `train_read.py` that were typed. Exits with a message on flags that do not exist (any more)."""
    parser = build_parser(TrainArgs, "Train READ with DeepSpeed and LoRA, or validate it (--eval_only).")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        complaints = []
        for word in unknown:
            name = word.removeprefix("--").removeprefix("no-").split("=")[0]
            complaints.append(f"{word}: no longer a flag, {REMOVED[name]}" if name in REMOVED else f"unknown: {word}")
        parser.error("; ".join(complaints))
    return vars(given)
