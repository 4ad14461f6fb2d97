"""CUDA graphs: what a GPU is told to do, recorded once and replayed with one launch.

    recorder = Recorder()
    with recorder.recorded():
        features = recorder("SAM", encoder, encoder, images)         encoder(images), recorded at the second call

Where kernels are shorter than the time in which Python asks for them, the GPU waits for Python: SAM's encoder takes 26 ms for a
picture, of which its kernels take 17; a step of decoding 29, of which they take 8 (ViT-H and 7B in bf16 on an H200). A recording
is the same kernels on the same numbers. It holds the memory it works in, and reads weights and constants where they were: what
it reads must live as long, so no constant in there may come from a cache that forgets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def recordable(module: nn.Module) -> bool:
    """On a GPU, with plain weights that are all here: not quantised, nor split by ZeRO-3."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.is_cuda and p.is_floating_point() and not hasattr(p, "ds_id") for p in parameters)


def state_of(*modules: nn.Module) -> tuple:
    """What a recording depends on but for its inputs: where weights and buffers are, their dtypes, how modules are switched."""
    parts = [part for module in modules for part in module.modules()]
    weights = [(x.data_ptr(), x.dtype) for module in modules for x in (*module.parameters(), *module.buffers())]
    switches = [
        (tuple(part.merged_adapters), tuple(part.active_adapters), part.disable_adapters, tuple(part.scaling.items()))
        for part in parts
        if hasattr(part, "merged_adapters")  # a layer of PEFT's, which is not imported for that
    ]
    return *weights, *switches, *(part.training for part in parts)


def record(
    function: Callable[[], None], device: torch.device, pool: tuple[int, int] | None = None
) -> Callable[[], None] | None:
    """What repeats the function's work on a GPU, which is not done by recording it; None, with a warning, if that fails.

    The function must have run before, so that nothing is set up in it, and must not ask the GPU for anything. Recordings of one
    pool work in the same memory, so what one gives must be taken out of it before another is replayed.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            # What other threads do meanwhile, such as those that watch a process group, is not part of it.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("this GPU's work cannot be recorded, so it is asked for again each time: %s", error)
            return None
        finally:
            torch.cuda.set_stream(before)  # else one that failed would leave its own
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What recordings on a device are made on. One for all: libraries keep memory for each stream that they see."""
    return torch.cuda.Stream(device)


@dataclass
class Switched:
    """What records while it is on, and holds memory for that until it is told to forget."""

    on: bool = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records for the length of a block, and gives the memory back behind it."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before
            self.forget()

    def forget(self) -> None:
        """Gives all memory back."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {"on": self.on}  # a copy of a model records for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass
class _Recording:
    """Work on tensors that stay where they are."""

    inputs: tuple[torch.Tensor | None, ...]
    result: Result
    replay: Callable[[], None]


@dataclass
class Recorder(Switched):
    """Functions of tensors (or None) that give a tensor, or several, recorded for each shape of their inputs.

    For a block in which the model stays as it is: to look through it at each call would take as long as is gained.
    """

    _found: dict[tuple, _Recording | None] = field(default_factory=dict, repr=False)
    """None after a first call, and where recording failed."""
    _failed: set[tuple] = field(default_factory=set, repr=False)
    _able: dict[str, bool] = field(default_factory=dict, repr=False)
    """Name -> its work can be recorded at all."""
    _pool: tuple[int, int] | None = field(default=None, repr=False)

    def forget(self) -> None:
        """Gives all memory back."""
        self._found.clear()
        self._failed.clear()
        self._able.clear()
        self._pool = None

    def __call__(
        self, name: str, module: nn.Module, function: Callable[..., Result], *inputs: torch.Tensor | None
    ) -> Result:
        """`function(*inputs)`, which reads the weights of `module`; without a graph for gradients."""
        if not self.on or torch.is_grad_enabled():
            return function(*inputs)
        if name not in self._able:
            self._able[name] = recordable(module)
        if not self._able[name]:
            return function(*inputs)
        key = (name, *(x if x is None else (x.shape, x.dtype) for x in inputs))
        if key not in self._found:
            self._found[key] = None
            return function(*inputs)
        found = self._found[key]
        if found is None:
            if key in self._failed or (found := self._record(function, inputs)) is None:
                self._failed.add(key)
                return function(*inputs)
            self._found[key] = found
        for ours, given in zip(found.inputs, inputs, strict=True):
            if ours is not None:
                ours.copy_(given)
        found.replay()
        result = found.result
        return result.clone() if isinstance(result, torch.Tensor) else tuple(x.clone() for x in result)

    def _record(self, function: Callable[..., Result], inputs: tuple[torch.Tensor | None, ...]) -> _Recording | None:
        # Not in inference mode, whose tensors no one else may write to.
        with torch.inference_mode(False), torch.no_grad():
            ours = tuple(x if x is None else x.clone() for x in inputs)
        device, results = ours[0].device, []
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        replay = None
        try:
            replay = record(lambda: results.append(function(*ours)), device, self._pool)
        finally:
            if replay is None:
                self._pool = None  # it was left in the middle of a recording
        return None if replay is None else _Recording(ours, results[-1], replay)
