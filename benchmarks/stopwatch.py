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


class Stopwatch:
    """Seconds of parts that do not overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()

    def now(self) -> float:
        """The time once everything that was asked of the device is done."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a part."""
        begin = self.now()
        yield
        self.seconds[name] += self.now() - begin

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, its calls counted to a part."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def watch(self, name: str, module: torch.nn.Module) -> None:
        """Counts the forward passes of a module to a part."""
        begin = 0.0

        def before(*_: Any) -> None:
            nonlocal begin
            begin = self.now()

        def after(*_: Any) -> None:
            self.seconds[name] += self.now() - begin

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def take(self) -> Counter[str]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, Counter()
        return taken


def watch_model(watch: Stopwatch, model: READForCausalLM) -> None:
    """Puts clocks on the parts of a model, for the rest of this process."""
    from model import sam, sasp

    watch.watch("CLIP", model.llava.model.vision_tower)
    watch.watch("CLIP", model.llava.model.multi_modal_projector)
    watch.watch("language model", model.llava.model.language_model)
    model.encode_sam_image = watch.wrap("SAM encoder", model.encode_sam_image)  # with its cache
    for name in ("similarity", "select_points"):
        setattr(sasp, name, watch.wrap("SasP", getattr(sasp, name)))
    for name in ("decode_masks", "upscale_logits"):
        setattr(sam, name, watch.wrap("mask decoder", getattr(sam, name)))


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on; `load` is what ran there in the minute before: the mean number of busy processes."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 1),
    }
