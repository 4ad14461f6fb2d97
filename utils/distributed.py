"""Processes and devices: who am I, how many are we, and the few sums and messages that ranks exchange.

One process without a launcher is the common case and needs no process group; `start()` makes one only where several
processes were launched or where an engine asks for it. Everything here works on CPU (gloo) and on GPUs (nccl).
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
import socket
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0


def choose_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, to use the CPU where there is no GPU. A choice made outside wins."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(engine: bool) -> World:
    """The world of this process, from the variables that a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        engine: a DeepSpeed engine will be built, which needs a process group even for one process.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    choose_accelerator()
    if _on_gpu():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if (engine or size > 1) and not dist.is_initialized():
        _start_group(rank, size, local_rank, engine)
    return World(rank, size, device)


def _start_group(rank: int, size: int, local_rank: int, engine: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if size == 1:  # nobody else has to know the port: any free one, so that two runs on a machine do not collide
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_PORT", "29500")
    if not engine:  # to evaluate, DeepSpeed need not be installed
        # Shares are equal in pictures, not in hours: who is done early waits for the others.
        dist.init_process_group("nccl" if _on_gpu() else "gloo", timeout=datetime.timedelta(days=1))
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # Else DeepSpeed looks for compilers and builds, half a minute long, a shared-memory op for inference only.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(verbose=False)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def stop() -> None:
    """Leaves the process group, if there is one, so that another run may start in this process."""
    if not dist.is_initialized():
        return
    if "deepspeed" in sys.modules:
        import deepspeed

        if deepspeed.comm.is_initialized():  # it remembers the group as well
            deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and makes cuDNN repeat itself (§3)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def shard(count: int, rank: int, size: int) -> range:
    """Indices of [0, count) that are this rank's: exact, no item twice, none left out."""
    return range(rank, count, size)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, on every rank; the dtype is kept (int64 counts stay exact)."""
    if _several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if it is on one."""
    return any(gather_objects(flag))


def from_main(value: Any, device: torch.device) -> Any:
    """The main process's value of a float, on every rank."""
    if _several():
        message = torch.tensor([float(value)], dtype=torch.float64, device=device)
        dist.broadcast(message, src=0)
        return message.item()
    return value


def gather_objects(value: Any) -> list[Any]:
    """Every rank's (picklable) value, in the order of ranks, on every rank."""
    if _several():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
    return [value]


def barrier() -> None:
    """Waits for all ranks."""
    if _several():
        dist.barrier()
