"""What the benchmarks measure with: a clock on each part of the model, and what a machine is called."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model import READForCausalLM

MODEL_PARTS = ("CLIP", "language model", "SAM encoder", "SasP", "mask decoder")
"""Parts of the model that `watch_model` puts a clock on."""
RECORDED = {"CLIP": "CLIP", "SAM": "SAM encoder", "masks": "mask decoder"}
"""What `model.recording` knows a part by, within which nothing may be waited for."""
WHOLES = ("forward",)
"""Parts around others, which count all the same (`benchmarks/step_time.py` subtracts them)."""


class Stopwatch:
    """Seconds of parts that do not overlap: what happens inside another part counts to that, and nothing waits for it.

    So a part may hold what cannot be stopped, such as a CUDA graph that is being captured: there a GPU must not be waited for.
    The parts in `WHOLES` alone do not hide what is inside them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.depth = 0
        """Parts that are going on, one inside the other."""

    def now(self) -> float:
        """The time once everything that was asked of the device is done."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a part, unless another is going on or it fails."""
        if self.depth:
            yield
            return
        begin, hides = self.now(), name not in WHOLES
        self.depth += hides
        try:
            yield
        finally:
            self.depth -= hides
        self.seconds[name] += self.now() - begin

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, its calls counted to a part."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def watch(self, name: str, module: torch.nn.Module) -> None:
        """Counts the forward passes of a module to a part, as `part` does."""
        begin = 0.0

        def before(*_: Any) -> None:
            nonlocal begin
            if self.depth == 0:
                begin = self.now()
            self.depth += 1

        def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self.depth -= 1
            if self.depth == 0 and output is not None:  # None: it failed
                self.seconds[name] += self.now() - begin

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def take(self) -> Counter[str]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, Counter()
        return taken


def watch_model(watch: Stopwatch, model: READForCausalLM) -> None:
    """Puts clocks on the parts of a model, for the rest of this process.

    On a GPU, parts are recorded as CUDA graphs and replayed, when no hook is called: the clocks stand around that. A whole
    decode step is the language model's.
    """
    from model import decoding, recording, sam, sasp

    watch.watch("language model", model.llava.model.language_model)
    decoding.Decoder.step = watch.wrap("language model", decoding.Decoder.step)
    model.encode_sam_image = watch.wrap("SAM encoder", model.encode_sam_image)  # with its cache
    sam.upscale_logits = watch.wrap("mask decoder", sam.upscale_logits)
    for name in ("similarity", "select_points"):
        setattr(sasp, name, watch.wrap("SasP", getattr(sasp, name)))
    call = recording.Recorder.__call__

    @wraps(call)
    def timed(recorder: recording.Recorder, name: str, *args: Any) -> Any:
        with watch.part(RECORDED[name]):
            return call(recorder, name, *args)

    recording.Recorder.__call__ = timed


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on; `load` is what ran there in the minute before: the mean number of busy processes."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 1),
    }
