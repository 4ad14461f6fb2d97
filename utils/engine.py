"""The DeepSpeed engine of a training run: its settings, and checkpoints that an interruption cannot spoil.

    engine = build_engine(args, model)              ZeRO-2 as published (protocol §3), or ZeRO-3, with or without offload
    tag = save_checkpoint(engine, folder, world)    written beside, renamed when whole, only then named in `latest`
    load_checkpoint(engine, folder, world)          the one that `latest` names
    prune(folder, keep, world)                      deletes the others

DeepSpeed is imported where it is used: validation alone does not need it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import distributed
from utils.files import read_text, shown, write_json, write_text
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
        whole = f"{folder / latest_tag(folder)} is whole" if has_checkpoint(folder) else "there is no earlier one"
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


def has_checkpoint(folder: Path) -> bool:
    """True if there is a checkpoint to continue from."""
    return (folder / LATEST).is_file()


def latest_tag(folder: Path) -> str:
    """The checkpoint that `latest` names.

    Raises:
        FileNotFoundError: there is none. ValueError: the file is unusable, or names a place elsewhere.
    """
    if not has_checkpoint(folder):
        raise FileNotFoundError(f"nothing to resume in {folder}: it has no file `{LATEST}`")
    tag = read_text(folder / LATEST).strip()
    if tag in (".", "..") or "/" in tag or "\\" in tag or not tag.isprintable():
        raise ValueError(f"{folder / LATEST} must name a folder beside it, found {shown(tag)}")
    if not (folder / tag).is_dir():
        there = sorted(path.name for path in folder.glob("step*") if path.is_dir()) or ["none"]
        raise FileNotFoundError(f"{folder / LATEST} names {tag}, which is not there; there are: {', '.join(there)}")
    return tag


def load_checkpoint(engine: Any, folder: Path, world: World) -> str:
    """Weights, optimiser and step of the last checkpoint; returns its path.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not fit the model, was written by more or fewer processes, or is damaged or foreign.
    """
    tag = latest_tag(folder)
    shards = len(list((folder / tag).glob("*optim_states.pt")))
    if shards != world.size:
        raise ValueError(
            f"{folder / tag} was written by {shards} processes, this run has {world.size}: start as many "
            "again, or merge that run (merge_lora_weight.sh) and begin a new one from the result"
        )
    with reading_shards(folder / tag):
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, custom_load_fn=load_trained)
    if path is None:
        raise ValueError(f"{folder / tag} holds no checkpoint that DeepSpeed can load: its files are not whole")
    return path


def load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Loads a checkpoint that may leave out frozen weights, but not one that trains.

    Raises:
        ValueError: with the keys that are missing, unexpected or of another shape.
    """
    try:
        missing, _ = dst.load_state_dict(src, strict=False)
    except RuntimeError as error:  # torch lists the shapes
        raise ValueError(f"the checkpoint does not fit this model; {error}") from error
    unexpected = src.keys() - dst.state_dict().keys()  # torch's own list has the scales of weights in few bits too
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(missing))
    if lost or unexpected:
        raise ValueError(f"the checkpoint does not fit this model; missing: {lost}; unexpected: {sorted(unexpected)}")


@contextlib.contextmanager
def reading_shards(folder: Path) -> Iterator[None]:
    """Within the block, what DeepSpeed reads of a checkpoint's folder is data: no code in the files is run.

    A pickle can name any function to be called. DeepSpeed allows it (`weights_only=False`), since its shards hold three small
    classes of its own. Here these are allowed by name, and a switch of torch refuses everything else, whatever the caller asks.

    Raises:
        ValueError: a shard is damaged or something else; the message names it.
    """
    import torch

    distributed.choose_accelerator()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from model.weights import load_pickle

    switches = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            if not list(folder.glob("*model_states.pt")):
                raise ValueError(f"{folder} is not whole: it has no file *model_states.pt; copy it again, or take another")
            for file in sorted(folder.glob("*.pt")):  # every process looks at every file, so that all of them stop
                content = load_pickle(file)
                field = "optimizer_state_dict" if file.name.endswith("optim_states.pt") else "module"
                if not isinstance(content, dict) or field not in content:
                    raise ValueError(f"{file} is no part of a DeepSpeed checkpoint: it has no {field}")
            yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # What DeepSpeed raises for files that it did not write. Errors of devices and groups are subclasses of RuntimeError.
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        raise ValueError(f"{folder} cannot be read: {error or type(error).__name__}") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
