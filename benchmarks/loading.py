"""How much host memory loading a checkpoint takes, and how long: ours against reading all of it into a model that exists.

    python benchmarks/loading.py --layers 4                             1.8 billion parameters, quick
    python benchmarks/loading.py --out benchmarks/results/loading_cpu.json  READ-7B's shapes: 15 GB on disk, as much memory

Random bf16 weights are written in the released layout, in shards of 2 GB, into --folder (kept: the second time takes no time),
then loaded in fresh processes:

    ours    `READForCausalLM.from_pretrained`: tensors are mapped from disk and put into a model that was built without any
    usual   a model with weights of its own, then a dict of all shards copied into it: what `load_state_dict` is used for most

`peak` is the greatest resident memory (VmHWM) less that of the process before loading, as a multiple of the bytes on disk;
pages of mapped files count as long as they are resident, and the system drops them where memory is short, so that it may be
below 1. `private` is what no file stands behind (RssAnon, sampled), and so
what the machine must really have. Target: a peak of at most 1.15.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

SHARD = 2 * 10**9
TOKENIZER = ROOT / "assets/read-mini-base"
"""Its vocabulary stands in for LLaMA's, whose files are not ours to ship; the rest has READ-7B's shapes."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default: 32, READ-7B's)")
    parser.add_argument("--layouts", nargs="+", choices=("safetensors", "bin"), default=["safetensors", "bin"])
    parser.add_argument("--ways", nargs="+", choices=("ours", "usual"), default=["ours", "usual"])
    parser.add_argument("--device", default="cpu", help="where the model ends up (default: cpu)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/loading", help="where checkpoints are written")
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # (way, checkpoint): what a fresh process does
    return parser


# ------------------------------------------------------------------------------------------------ a checkpoint


def write_checkpoint(folder: Path, layers: int, layout: str, device: str = "cpu") -> None:
    """A released-layout folder with random weights, shard by shard, so that it never stands in memory whole.

    The numbers come from `device`: a GPU draws seven billion in a second.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    from model import READForCausalLM, READProcessor
    from model.checkpoint import VISION_TOWER, released_config, to_disk_key
    from model.memory import published_config

    if (folder / "config.json").is_file():
        return
    processor = READProcessor.from_pretrained(TOKENIZER)
    config = published_config("7b")
    text = config.llava.text_config
    text.num_hidden_layers, text.vocab_size = layers, len(processor.tokenizer)
    tower = folder.with_name("tower")
    if not tower.is_dir():
        config.llava.vision_config.save_pretrained(tower)
    config.vision_tower = str(tower)
    with init_empty_weights(include_buffers=False):
        shapes = READForCausalLM(config).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    stem = "model" if layout == "safetensors" else "pytorch_model"
    entries = [(to_disk_key(key), tensor.shape) for key, tensor in shapes.items()]
    for place, (key, shape) in enumerate(entries):
        # The tower is part of it, as of a base that carries its own: released ones lie beside it.
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        shard[key] = drawn.cpu()
        size += shard[key].numel() * 2
        if size >= SHARD or place == len(entries) - 1:
            name = f"{stem}-{number:05d}.{layout}"
            if layout == "safetensors":
                save_file(shard, folder / name)
            else:
                torch.save(shard, folder / name)
            weight_map |= dict.fromkeys(shard, name)
            shard, size, number = {}, 0, number + 1
    assert any(key.startswith(VISION_TOWER) for key in weight_map)
    (folder / f"{stem}.{layout}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    processor.save_pretrained(folder)
    # Last: it says that the folder is whole.
    (folder / "config.json").write_text(json.dumps(released_config(config)), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ a fresh process


def memory(name: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Highest(threading.Thread):
    """Samples the memory that no file stands behind, and keeps the greatest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.stopped = memory("RssAnon"), threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.value = max(self.value, memory("RssAnon"))


def child(way: str, folder: Path, device: str) -> dict[str, float]:
    """Loads a checkpoint in this process, which does nothing else."""
    import torch
    from safetensors.torch import load_file

    from model import READForCausalLM
    from model.checkpoint import read_config, read_shapes, sam_shapes_of, to_module_key, weight_files

    before, private = memory("VmRSS"), memory("RssAnon")
    highest = Highest()
    highest.start()
    begin = time.perf_counter()
    if way == "ours":
        model = READForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        files = weight_files(folder)
        shapes = read_shapes(files)
        torch.set_default_dtype(torch.bfloat16)
        model = READForCausalLM(read_config(folder, shapes, sam_shapes_of(shapes, None)))
        state: dict[str, torch.Tensor] = {}
        for file in files:
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        keys = {key.replace("vision_model.", ""): key for key in model.state_dict()}
        model.load_state_dict({keys[to_module_key(key).replace("vision_model.", "")]: t for key, t in state.items()})
    model = model.to(device)
    total = sum(float(parameter.sum()) for parameter in model.parameters())  # every page is touched
    seconds = time.perf_counter() - begin
    highest.stopped.set()
    highest.join()
    size = sum(file.stat().st_size for file in weight_files(folder))
    return {
        "seconds": seconds,
        "bytes": size,
        "peak": (memory("VmHWM") - before) / size,
        "private": (highest.value - private) / size,
        "checksum": total,
    }


@plain_errors("loading")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), options.device)))
        return
    import torch

    from benchmarks.stopwatch import hardware
    from utils.runlog import package_versions

    machine = hardware(torch.device(options.device))
    results: dict[str, dict[str, Any]] = {}
    print(f"{'layout':<14}{'way':<8}{'on disk':>10}{'seconds':>10}{'peak':>8}{'private':>10}")
    for layout in options.layouts:
        folder = options.folder / f"{layout}-{options.layers}"
        write_checkpoint(folder, options.layers, layout, options.device)
        for way in options.ways:
            line = [sys.executable, __file__, "--device", options.device, "--child", way, str(folder)]
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"loading: {way} of {layout} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            found = results.setdefault(layout, {})[way] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{layout:<14}{way:<8}{found['bytes'] / 1e9:>7.1f} GB{found['seconds']:>10.1f}{found['peak']:>8.2f}"
                f"{found['private']:>10.2f}",
                flush=True,
            )
    sums = {found["checksum"] for ways in results.values() for found in ways.values()}
    if len(sums) > 1:
        raise SystemExit(f"loading: the models differ, their weights add up to {sorted(sums)}")
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/loading.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": machine,
            "versions": {"python": platform.python_version(), **package_versions()},
            "layers": options.layers,
            "device": options.device,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
