"""The DeepSpeed engine of a training run: its settings, and checkpoints that an interruption cannot spoil.

    engine = build_engine(args, model)              ZeRO-2 as published (protocol §3), or ZeRO-3, with or without offload
    tag = save_checkpoint(engine, folder, world)    written beside, renamed when whole, only then named in `latest`
    load_checkpoint(engine, folder, world)          the one that `latest` names
    prune(folder, keep, world)                      deletes the others

DeepSpeed is imported where it is used: validation alone does not need it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import distributed
from utils.files import read_text, write_json, write_text
from utils.outputs import remove

if TYPE_CHECKING:
    import torch

    from utils.args import TrainArgs
    from utils.distributed import World

LATEST = "latest"
"""The file beside the checkpoints that names the last one that is whole; DeepSpeed's own tools read it too."""


def build_engine(args: TrainArgs, model: torch.nn.Module, device: torch.device) -> Any:
    """The engine of a model; only what trains is handed to the optimiser.

    For ZeRO-3 the model comes in the host's memory: weight by weight goes to the device and is split there, so that no device
    ever holds all of it.
    """
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = deepspeed_config(args, sum(parameter.numel() for parameter in trained))
    if args.zero_stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    return engine


def deepspeed_config(args: TrainArgs, trained: int) -> dict[str, Any]:
    """ZeRO, AdamW and WarmupDecayLR as published (§3). `trained` elements: a larger bucket would be waste."""
    bucket = min(args.bucket_size, trained)
    zero = {
        "stage": args.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if args.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if args.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.grad_accumulation_steps,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": args.lr,
                "betas": (args.beta1, args.beta2),
                "weight_decay": 0.0,
                "torch_adam": True,  # the same numbers as DeepSpeed's own, which needs a compiler at run time
            },
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloaded states too
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": args.epochs * args.steps_per_epoch,
                "warmup_min_lr": 0,
                "warmup_max_lr": args.lr,
                "warmup_num_steps": args.warmup_steps,
                "warmup_type": "linear",
            },
        },
        "bf16": {"enabled": args.precision == "bf16"},
        "fp16": {"enabled": args.precision == "fp16"},
        "zero_optimization": zero,
        "steps_per_print": sys.maxsize,
    }


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    engine: Any, folder: Path, world: World, save_frozen: bool = False, beside: Mapping[str, Any] | None = None
) -> str:
    """Writes `folder/step<N>` and returns its name; whenever this is interrupted, `latest` names a whole checkpoint.

    Args:
        beside: file name -> what is kept in the checkpoint as JSON too.

    Raises:
        OSError: it cannot be written; the message says why, and which checkpoint is whole.
    """
    tag = f"step{engine.global_steps}"
    partial = folder / f"{tag}.partial"
    try:
        if world.is_main and partial.exists():
            remove(partial)
        distributed.barrier()
        engine.save_checkpoint(
            str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=not save_frozen
        )
        distributed.barrier()  # all ranks have written their shards
        if world.is_main:
            for name, value in (beside or {}).items():
                write_json(partial / name, value)
            if (folder / tag).exists():
                remove(folder / tag)
            partial.rename(folder / tag)
            write_text(folder / LATEST, tag)
    except (OSError, RuntimeError) as error:
        # torch tells a full disk and a file that is too large as a RuntimeError of its writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        with contextlib.suppress(OSError):
            remove(partial)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        whole = f"{folder / read_latest(folder)} is whole" if has_checkpoint(folder) else "there is no earlier one"
        free = shutil.disk_usage(folder.parent).free // 2**20
        raise OSError(
            f"the checkpoint {folder / tag} cannot be written ({why}; {free} MiB are free): {whole}; make room, then go on with "
            "--auto_resume"
        ) from error
    distributed.barrier()
    return tag


def prune(folder: Path, keep: set[str], world: World) -> None:
    """Deletes all checkpoints of a folder, half-written ones too, but those to `keep`; what has another name stays."""
    if world.is_main:
        for old in folder.glob("step*"):
            if re.fullmatch(r"step\d+(\.partial)?", old.name) and old.name not in keep:
                remove(old)
    distributed.barrier()


def read_latest(folder: Path) -> str:
    """The name of the last checkpoint that is whole."""
    return read_text(folder / LATEST).strip()


def has_checkpoint(folder: Path) -> bool:
    """True if there is a checkpoint to continue from."""
    return (folder / LATEST).is_file()


def load_checkpoint(engine: Any, folder: Path, world: World) -> str:
    """Weights, optimiser and step of the last checkpoint; returns its path.

    Raises:
        FileNotFoundError: there is none. ValueError: it does not fit the model, or was written by more or fewer processes.
    """
    if not has_checkpoint(folder):
        raise FileNotFoundError(f"nothing to resume in {folder}: it has no file `{LATEST}`")
    tag = (folder / LATEST).read_text().strip()
    shards = len(list((folder / tag).glob("*optim_states.pt")))
    if shards != world.size:
        raise ValueError(
            f"{folder / tag} was written by {shards} processes, this run has {world.size}: start as many "
            "again, or merge that run (merge_lora_weight.sh) and begin a new one from the result"
        )
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, custom_load_fn=load_trained)
    return path


def load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Loads a checkpoint that may leave out frozen weights, but not one that trains.

    Raises:
        ValueError: with the keys that are missing or unexpected.
    """
    missing, _ = dst.load_state_dict(src, strict=False)
    unexpected = src.keys() - dst.state_dict().keys()  # torch's own list has the scales of weights in few bits too
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(missing))
    if lost or unexpected:
        raise ValueError(f"the checkpoint does not fit this model; missing: {lost}; unexpected: {sorted(unexpected)}")
