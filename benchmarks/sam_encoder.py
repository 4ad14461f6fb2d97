"""SAM's image encoder: the `segment-anything` package as installed against ours (`model/sam_attention.py`), in one run.

    python benchmarks/sam_encoder.py                                  ViT-B, one picture of 1024 px, fp32 without a GPU
    python benchmarks/sam_encoder.py --size vit_h --compile --peak_tflops 790 --out RESULT.json      on an H200
    python benchmarks/sam_encoder.py --size vit_h --ways folded tiled biased flex      which way to attend is best there

All variants have the same random weights and see the same pictures, in turns of who is first. Seconds are medians after
warm-up, ratios medians of the pairs: package / variant, in the same precision, and against the package in fp32, which is how
it is installed. A GPU is waited for after each pass.

    package            the package's blocks, eager
    ours               what `build_sam` makes, eager
    ours, compiled     with `compile_blocks` (--compile; in half precision)
    ours, WAY          ours with one way to attend everywhere (--ways): `tiled`, `folded`, `biased` of ours, and `flex`, which
                       no device uses so far: FlexAttention adds the relative positions to the scores; it needs torch.compile

The floor is the time that all products, those of padding left out, would take at the speed of the encoder's largest one, which
is measured in the same turns, and (--peak_tflops) at the speed that the maker states. `error` is the difference from the package
in fp32 on the first picture: the largest, and the mean, each relative to that of the features.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from segment_anything.modeling import ImageEncoderViT

    from model import SamConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.stopwatch import Stopwatch, hardware  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

SIZES = {
    "mini": {"image_size": 256, "embed_dim": 144, "depth": 4, "num_heads": 4, "global_attn_indexes": (1, 3), "window_size": 8},
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}
"""Fields of `SamConfig`; `mini` is READ-mini's."""
WAYS = ("tiled", "folded", "biased", "flex")
PACKAGE, OURS, COMPILED, PRODUCT = "package", "ours", "ours, compiled", "largest product"
REL_POS = 0.1
"""Spread of the random relative positions: makes their part of the scores about as large as that of the products."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="vit_b", help="of the encoder (default: vit_b)")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: fp32 and bf16 on a GPU, fp32 without"
    )
    parser.add_argument(
        "--batch_size", nargs="+", type=int, help="pictures at a time, one or several (default: 1 and 8 on a GPU, 1 without)"
    )
    parser.add_argument("--compile", action="store_true", help="measures our blocks compiled too, in half precision")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[], help="measures these ways to attend too")
    parser.add_argument("--repeats", type=int, default=5, help="passes that count (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="passes before them (default: 1)")
    parser.add_argument("--peak_tflops", type=float, help="what the maker states for half precision (H200: 790 to 990)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    return parser


# ------------------------------------------------------------------------------------------------ variants


def random_encoder(config: SamConfig, device: torch.device) -> ImageEncoderViT:
    """The package's encoder in fp32, frozen. Places, which it would start at zero, are random too."""
    import torch

    from model.sam import build_sam

    torch.manual_seed(0)
    with device:
        encoder = build_sam(config, fast_attention=False).image_encoder
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=REL_POS)
    return encoder.eval().requires_grad_(False)


def variants(encoder: ImageEncoderViT, options: argparse.Namespace) -> dict[str, ImageEncoderViT]:
    """The encoder in each variant; all share its weights."""
    from model import sam_attention

    def shared() -> ImageEncoderViT:
        return copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})

    found = {PACKAGE: shared(), OURS: sam_attention.use_fast_attention(shared())}
    if options.compile and encoder.pos_embed.element_size() == 2:
        found[COMPILED] = sam_attention.compile_blocks(sam_attention.use_fast_attention(shared()))
    for name in options.ways:
        found[f"ours, {name}"] = with_way(sam_attention.use_fast_attention(shared()), name)
    return found


def with_way(encoder: ImageEncoderViT, name: str) -> ImageEncoderViT:
    """Our encoder, in place, with one way to attend on all devices."""
    from model import sam_attention

    way = flex if name == "flex" else getattr(sam_attention, name)

    class Other(sam_attention.FastAttention):
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            return way(q, k, v, size, self.rel_pos_h, self.rel_pos_w, self.scale)

    for block in encoder.blocks:
        block.attn.__class__ = Other
    return encoder


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int],
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `sam_attention.folded`: FlexAttention adds the terms to each score."""
    from model.sam_attention import relative_terms

    terms = relative_terms(q.flatten(0, 1), size, rel_pos_h, rel_pos_w)
    by_row, by_column = (x.flatten(1, 2).unflatten(0, q.shape[:2]) for x in terms)
    width = size[1]

    def score(product: torch.Tensor, n: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return product + by_row[n, head, i, j // width] + by_column[n, head, i, j % width]

    return _compiled_flex()(q, k, v, score_mod=score, scale=scale)


@functools.cache
def _compiled_flex() -> Callable:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# ------------------------------------------------------------------------------------------------ measuring


def count_flops(config: SamConfig) -> tuple[int, int]:
    """Floating-point operations for one picture: of the package's products, and without those of padding in linear layers.

    Counted from its own forward pass, on a device that has no numbers.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    meta = torch.device("meta")
    encoder = random_encoder(config, meta)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.empty(1, 3, config.image_size, config.image_size, device=meta))
    windows, places = config.depth - len(config.global_attn_indexes), -(-config.grid_size // config.window_size)
    padding = (places * config.window_size) ** 2 - config.grid_size**2
    return counter.get_total_flops(), counter.get_total_flops() - windows * padding * 2 * 4 * config.embed_dim**2


def measure_all(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """What the encoder takes in all precisions and batch sizes.

    Raises:
        ValueError: numbers of passes or pictures below 1.
    """
    import torch

    from model import SamConfig
    from utils.cli import torch_dtype

    on_gpu = device.type == "cuda"
    precisions = options.precision or (["fp32", "bf16"] if on_gpu else ["fp32"])
    batches = options.batch_size or ([1, 8] if on_gpu else [1])
    if min(options.repeats, options.warmup, *batches) < 1:
        raise ValueError("--repeats, --warmup and --batch_size must be 1 or more")
    config = SamConfig(**SIZES[options.size])
    flops, needed = count_flops(config)
    encoder = random_encoder(config, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(batches), 3, config.image_size, config.image_size, generator=generator).to(device)
    exact = encoder(images[:1])
    results = []
    for precision in precisions:
        typed = copy.deepcopy(encoder).to(torch_dtype(precision))
        for batch in batches:
            print(f"{options.size}, {precision}, {batch} at a time", file=sys.stderr)
            results.append(measure(typed, images[:batch].to(typed.pos_embed.dtype), exact, options))
    add_floors(results, needed, options.peak_tflops)
    return {
        "image_size": config.image_size,
        "tflop_a_picture": {"package": flops / 1e12, "without padding": needed / 1e12},
        "results": results,
    }


def measure(
    encoder: ImageEncoderViT, images: torch.Tensor, exact: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """What one precision and batch size take: speed of the largest product, and the numbers of each variant.

    Args:
        encoder: the package's, in this precision. images: (B, 3, S, S). exact: (1, C, h, w), features of the first picture.
    """
    import torch

    torch.compiler.reset()  # else a second batch size would be compiled for all
    encoders = variants(encoder, options)
    width = encoder.neck[0].in_channels
    tokens, device = images.shape[0] * encoder.pos_embed[0, ..., 0].numel(), images.device
    left, right = (torch.randn(n, m, device=device).to(images.dtype) for n, m in ((tokens, width), (width, 4 * width)))
    runs: dict[str, Callable[[], torch.Tensor]] = {name: lambda e=e: e(images) for name, e in encoders.items()}
    runs[PRODUCT] = lambda: left @ right
    watch, times, found = Stopwatch(device), {name: [] for name in runs}, {name: {} for name in encoders}
    for number in range(options.warmup + options.repeats):
        first = number % len(times)
        for name in (list(times)[first:] + list(times)[:first]):
            if name not in runs:
                continue
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            held, begin = _memory(device), watch.now()
            try:
                out = runs[name]()
            except RuntimeError as error:  # no memory, say: the others go on
                found[name] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
                del runs[name]
                continue
            times[name].append(watch.now() - begin)
            if number == 0 and name != PRODUCT:
                found[name] = _error(out[:1], exact)
                if images.is_cuda:
                    found[name]["gib"] = (torch.cuda.max_memory_allocated(device) - held) / 2**30
            del out
        print(f"\rpass {number + 1} of {options.warmup + options.repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    counted = {name: times[name][options.warmup :] for name in runs}
    for name in encoders:
        if name in runs:
            found[name]["seconds"] = statistics.median(counted[name])
            if PACKAGE in runs:
                pairs = zip(counted[PACKAGE], counted[name], strict=True)
                found[name]["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    product = 2 * left.numel() * 4 * width
    return {
        "precision": str(images.dtype).removeprefix("torch."),
        "batch_size": len(images),
        "product_tflops": product / statistics.median(counted[PRODUCT]) / 1e12,
        "variants": found,
    }


def _memory(device: torch.device) -> int:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _error(features: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Largest and mean difference, each relative to that of the features."""
    difference, size = (features.float() - exact).abs(), exact.abs()
    return {
        "max_error": (difference.max() / size.max()).item(),
        "mean_error": (difference.mean() / size.mean()).item(),
    }


def add_floors(results: list[dict[str, Any]], needed: int, peak_tflops: float | None) -> None:
    """Adds to each setting the floors in seconds, and to each variant its ratio to the package in fp32 with as many pictures."""
    plain = {r["batch_size"]: r["variants"][PACKAGE].get("seconds") for r in results if r["precision"] == "float32"}
    for result in results:
        tflop = needed * result["batch_size"] / 1e12
        result["floor"] = tflop / result["product_tflops"]
        if peak_tflops is not None and result["precision"] != "float32":
            result["stated_floor"] = tflop / peak_tflops
        for numbers in result["variants"].values():
            if "seconds" in numbers and plain.get(result["batch_size"]):
                numbers["ratio_to_fp32"] = plain[result["batch_size"]] / numbers["seconds"]


def table(result: dict[str, Any]) -> str:
    """A row a variant: seconds a batch, pictures a second, ratios, error, and memory on a GPU."""
    lines = [
        f"{result['precision']}, {result['batch_size']} at a time: the largest product runs at {result['product_tflops']:.3g} "
        f"TFLOP/s, floor {result['floor']:.4f} s"
        + (f", as stated {result['stated_floor']:.4f} s" if "stated_floor" in result else ""),
        f"{'':<18}{'s a batch':>11}{'pictures/s':>12}{'ratio':>8}{'to fp32':>9}{'max error':>11}{'mean error':>12}{'GiB':>7}",
    ]
    for name, numbers in result["variants"].items():
        if "failed" in numbers:
            lines.append(f"{name:<18} {numbers['failed']}")
            continue
        speed = f"{numbers['seconds']:>11.4f}{result['batch_size'] / numbers['seconds']:>12.3f}"
        ratios = "".join(
            f"{numbers[key]:>{width - 1}.2f}x" if key in numbers else f"{'-':>{width}}"
            for key, width in (("ratio", 8), ("ratio_to_fp32", 9))
        )
        error = f"{numbers['max_error']:>11.1e}{numbers['mean_error']:>12.1e}"
        lines.append(f"{name:<18}{speed}{ratios}{error}" + (f"{numbers['gib']:>7.2f}" if "gib" in numbers else f"{'-':>7}"))
    return "\n".join(lines)


@plain_errors("sam_encoder")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    import torch

    from utils import distributed
    from utils.runlog import package_versions

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = distributed.start(engine=False).device
    with torch.no_grad():
        machine = hardware(device)
        found = measure_all(device, options)
    flops = found["tflop_a_picture"]
    print(f"SAM {options.size}, random weights, {found['image_size']} px; a picture takes {flops['package']:.3g} TFLOP in the "
          f"package, {flops['without padding']:.3g} without padding; {machine['gpu'] or machine['cpu']}, "
          f"{machine['threads']} threads, load {machine['load']}")  # fmt: skip
    for result in found["results"]:
        print("\n" + table(result))
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/sam_encoder.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": machine,
            "versions": {"python": platform.python_version(), **package_versions()},
            "size": options.size,
            "repeats": options.repeats,
            "peak_tflops": options.peak_tflops,
            **found,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(_rounded(record), indent=1) + "\n")
        print(f"written: {options.out}")


def _rounded(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
