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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.stopping import end_with_launcher, exit_now, is_launched


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


def environment() -> tuple[int, int, int]:
    """(rank, size, local rank) of this process, from the variables that a launcher sets: RANK, WORLD_SIZE, LOCAL_RANK.

    Raises:
        ValueError: they contradict each other; the message names them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    fault = next((f"{name} is no whole number" for name, text in given.items() if not text.strip().isdecimal()), None)
    if fault is None:
        rank, size, local_rank = (int(given.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True))
        if "WORLD_SIZE" not in given and "RANK" in given:
            fault = "RANK needs WORLD_SIZE, the number of processes"
        elif size < 1:
            fault = "WORLD_SIZE must be at least 1"
        elif size > 1 and "RANK" not in given:
            fault = f"each of {size} processes needs its RANK"
        elif rank >= size:
            fault = f"RANK must be below WORLD_SIZE, which is {size}"
        elif local_rank >= size:
            fault = f"LOCAL_RANK must be below WORLD_SIZE, which is {size}"
        elif _on_gpu() and size > 1 and "LOCAL_RANK" not in given and torch.cuda.device_count() > 1:
            fault = "LOCAL_RANK must say which GPU of this machine is this process's"
        elif _on_gpu() and local_rank >= torch.cuda.device_count():
            fault = f"LOCAL_RANK names a GPU that is not there: this process sees {torch.cuda.device_count()}"
        else:
            return rank, size, local_rank
    told = ", ".join(f"{name}={given[name]!r}" if name in given else f"{name} unset" for name in names)
    raise ValueError(f"{told}: {fault}. A launcher sets all three; for one process alone unset them")


def start(engine: bool) -> World:
    """The world of this process, from the variables that a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        engine: a DeepSpeed engine will be built, which needs a process group even for one process.

    Raises:
        ValueError: the launcher's variables contradict each other.
        OSError: the other processes do not come, cannot be reached, or the port is taken.
    """
    choose_accelerator()
    rank, size, local_rank = environment()
    if size > 1 or is_launched():
        end_with_launcher()
    if _on_gpu():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if (engine or size > 1) and not dist.is_initialized():
        _start_group(rank, size, local_rank, engine)
    return World(rank, size, device)


def _start_group(rank: int, size: int, local_rank: int, engine: bool) -> None:
    limit = _rendezvous_limit()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if size == 1:  # nobody else has to know the port: any free one, so that two runs on a machine do not collide
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a batch script may have set one for other programs, which may not be reachable
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    address, port = os.environ["MASTER_ADDR"], os.environ.setdefault("MASTER_PORT", "29500")
    if not address.strip() or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"MASTER_ADDR={address!r}, MASTER_PORT={port!r}: must be a host and a port, the same for all processes")
    meeting = f"process {rank} of {size}, at MASTER_ADDR:MASTER_PORT {address}:{port}"
    failed = (
        f"the {size} processes did not meet within {limit.total_seconds():g} s (READ_RENDEZVOUS_S); this is {meeting}. Start "
        "all of them, or unset RANK and WORLD_SIZE for one alone. On several nodes, set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME to the network's name, in .deepspeed_env for the deepspeed launcher"
    )
    # Only the first says so at once; the others would repeat it at each start.
    waits = _later(5 * (rank > 0), lambda: _tell(f"waiting for {size} processes; this is {meeting}"))
    # torch waits for ever where something else than a peer answers.
    gives_up = _later(limit.total_seconds() + 15, lambda: (_tell(f"{Path(sys.argv[0]).name}: {failed}"), exit_now(2)))
    try:
        if size > 1:
            waits.start()
            gives_up.start()
            if rank > 0:
                _reach(address, int(port), limit)
            store = next(dist.rendezvous("env://", timeout=limit))  # noqa: F841  kept until the group is made, which finds it
        _make_group(engine, limit)
        barrier()
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise OSError(
                f"MASTER_PORT {port} is in use by another program on this machine: set the variable MASTER_PORT (with the "
                "deepspeed launcher: --master_port) to a free port"
            ) from error
        raise TimeoutError(f"{failed} ({str(error).splitlines()[0]})") from error
    finally:
        waits.cancel()
        gives_up.cancel()


def _later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    return timer


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rendezvous_limit() -> datetime.timedelta:
    """READ_RENDEZVOUS_S; unless it is set, 300 seconds, or 45 without MASTER_ADDR.

    A launcher sets MASTER_ADDR. Without it all processes were started by hand on this machine, if there are others at all.
    """
    text = os.environ.get("READ_RENDEZVOUS_S", "300" if "MASTER_ADDR" in os.environ else "45")
    try:
        limit = datetime.timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        limit = datetime.timedelta(0)
    if not limit > datetime.timedelta(0):
        raise ValueError(f"READ_RENDEZVOUS_S={text!r}: must be a number of seconds above 0")
    return limit


def _reach(address: str, port: int, limit: datetime.timedelta) -> None:
    """Waits until the first process listens; torch, which would wait as well, fills the screen meanwhile."""
    begin = time.monotonic()
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError:
            if time.monotonic() - begin > limit.total_seconds():
                raise
        time.sleep(0.5)


def _make_group(engine: bool, limit: datetime.timedelta) -> None:
    """A process group whose members find each other within `limit`, and then have more time for each other."""
    if engine:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.constants import default_pg_timeout as patience

        if get_accelerator().device_name() == "cpu":
            # Else DeepSpeed looks for compilers and builds, half a minute long, a shared-memory op for inference only.
            deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(verbose=False, timeout=limit)
    else:  # to evaluate, DeepSpeed need not be installed
        # Shares are equal in pictures, not in hours: who is done early waits for the others.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if _on_gpu() else "gloo", timeout=limit)
    # torch < 2.14 has it under a private name.
    (getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(patience)


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


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values, on every rank."""
    if _several():
        message = torch.tensor([value], device=device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        return int(message.item())
    return value


def main_first(world: World, action: Callable[[], None]) -> None:
    """Runs something on the main process alone; where it fails there, the other ranks end as well and print nothing.

    Raises:
        OSError, ValueError: on the main process, those of the action. SystemExit: on the others.
    """
    failure: Exception | None = None
    if world.is_main:
        try:
            action()
        except (OSError, ValueError) as error:
            failure = error
    if from_main(failure is not None, world.device):
        raise failure or SystemExit(2)


def is_lost_peer(error: BaseException) -> bool:
    """True of an error that says that another rank has ended."""
    return _several() and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


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
