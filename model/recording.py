"""CUDA graphs: what a GPU is told to do, recorded once and replayed with one launch.

    recorder = Recorder()
    with recorder.recorded():
        features = recorder("SAM", encoder, encoder, images)         encoder(images), recorded at the second call

Where kernels are shorter than the time in which Python asks for them, the GPU waits for Python: SAM's encoder takes 31 ms for a
picture, of which its kernels take 24; a step of decoding 30, of which they take 8 (ViT-H and 7B in bf16 on an H200). A recording
is the same kernels on the same numbers. It holds the memory it works in, and reads weights where they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

log = logging.getLogger(__name__)


def recordable(module: nn.Module) -> bool:
    """On a GPU, with plain weights that are all here: not quantised, nor split by ZeRO-3."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.is_cuda and p.is_floating_point() and not hasattr(p, "ds_id") for p in parameters)


def addresses(*modules: nn.Module) -> tuple[int, ...]:
    """Where the weights are that a recording reads: with others it would be another one."""
    return tuple(parameter.data_ptr() for module in modules for parameter in module.parameters())


def record(function: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None] | None:
    """What repeats the function's work on the GPU, which is not done by recording it; None, with a warning, if that fails.

    The function must have run before, so that nothing is set up in it, and must not ask the GPU for anything. Recordings of one
    pool work in the same memory, so what one gives must be taken out of it before another is replayed.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # What other threads do meanwhile, such as those that watch a process group, is not part of it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("this GPU's work cannot be recorded, so it is asked for again each time: %s", error)
        return None
    return graph.replay


Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass
class _Recording:
    """Work on tensors that stay where they are."""

    inputs: tuple[torch.Tensor | None, ...]
    result: Result
    replay: Callable[[], None]


@dataclass
class Recorder:
    """Functions of tensors (or None) that give a tensor, or several, recorded for each shape of their inputs."""

    on: bool = False
    _found: dict[tuple, _Recording | None] = field(default_factory=dict, repr=False)
    """None after a first call, and where recording failed."""
    _failed: set[tuple] = field(default_factory=set, repr=False)
    _pool: tuple[int, int] | None = field(default=None, repr=False)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records for the length of a block, and gives the memory back behind it."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before
            self._found.clear()
            self._failed.clear()
            self._pool = None

    def __call__(
        self, name: str, module: nn.Module, function: Callable[..., Result], *inputs: torch.Tensor | None
    ) -> Result:
        """`function(*inputs)`, which reads the weights of `module`; without a graph for gradients."""
        if not self.on or torch.is_grad_enabled() or not recordable(module):
            return function(*inputs)
        key = (name, *(x if x is None else (x.shape, x.dtype) for x in inputs), addresses(module))
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
        ours = tuple(x if x is None else x.clone() for x in inputs)
        results: list[Result] = []
        if self._pool is None and ours[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        replay = record(lambda: results.append(function(*ours)), self._pool)
        if replay is None:
            self._pool = None  # which is left in the middle of a recording
            return None
        return _Recording(ours, results[-1], replay)
