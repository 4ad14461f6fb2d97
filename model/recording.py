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


def record(function: Callable[[], None]) -> Callable[[], None] | None:
    """What repeats the function's work on the GPU, which is not done by recording it; None, with a warning, if that fails.

    The function must have run before, so that nothing is set up in it, and must not ask the GPU for anything.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # What other threads do meanwhile, such as those that watch a process group, is not part of it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("this GPU's work cannot be recorded, so it is asked for again each time: %s", error)
        return None
    return graph.replay


@dataclass
class _Recording:
    """Work on tensors that stay where they are."""

    inputs: tuple[torch.Tensor, ...]
    result: torch.Tensor
    replay: Callable[[], None]


@dataclass
class Recorder:
    """Functions of tensors that give a tensor, recorded for each shape of their inputs."""

    on: bool = False
    _found: dict[tuple, _Recording | None] = field(default_factory=dict, repr=False)
    """None after a first call, and where recording failed."""
    _failed: set[tuple] = field(default_factory=set, repr=False)

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

    def __call__(
        self, name: str, module: nn.Module, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`function(*inputs)`, which reads the weights of `module`; without a graph for gradients."""
        if not self.on or torch.is_grad_enabled() or not recordable(module):
            return function(*inputs)
        key = (name, *((x.shape, x.dtype) for x in inputs), addresses(module))
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
            ours.copy_(given)
        found.replay()
        return found.result.clone()

    def _record(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> _Recording | None:
        ours = tuple(x.clone() for x in inputs)
        results: list[torch.Tensor] = []
        replay = record(lambda: results.append(function(*ours)))
        return None if replay is None else _Recording(ours, results[-1], replay)
