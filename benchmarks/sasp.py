"""What points cost: SasP's selection and windowed refinement against the rule as the original computes it.

    python benchmarks/sasp.py --out benchmarks/results/sasp_cpu.json

Baseline: protocol §4, word by word. The fine map in full resolution (24 x 24 to 336 x 336, zero-padded, to H x W), its softmax
over all pixels, and for each of K points a weight for every pixel, normalised, whose mean is the point. Softmax and pixel
indices are made once a map here, which favours the baseline; the selection of the points is ours in both.

Ours: only a window of 11 x 11 pixels around each point is ever interpolated, all points of all masks at once. Both run in the
same process, in turns. Seconds are medians over the repetitions; matrices that depend on the picture's size alone are cached
by ours, as in an evaluation: `first` is the time of a size that was not met before.

The floor is arithmetic alone: K windows of 121 pixels, each 2 x 24 x 24 multiply-adds unless separable (then 24 x 11 + 11 x 24 x
11 a window), at this machine's measured matmul rate: far below what starting a torch operation costs, of which ours has some
forty.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.stopwatch import Stopwatch, hardware  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

GRID, CLIP_SIZE = 24, 336


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["480x640", "1080x1920"],
        metavar="HxW",
        help="pictures (default: 480x640 1080x1920)",
    )
    parser.add_argument("--points", type=int, default=30, help="K (default: 30)")
    parser.add_argument("--expressions", type=int, default=10, help="masks a batch in the batched row (default: 10)")
    parser.add_argument(
        "--repeat", type=int, default=5, help="of the baseline; ours is repeated ten times as often (default: 5)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    return parser


def original_points(similarity_P: torch.Tensor, cells_K2: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(K, 2) refined points (x, y) of one map (P,), by a weight for every pixel of the picture and every point (§4-2, §4-6)."""
    import torch
    from torch.nn import functional as F

    height, width = size
    normal = (similarity_P - similarity_P.min()) / (similarity_P.max() - similarity_P.min())
    view = F.interpolate(normal.view(1, 1, GRID, GRID), (CLIP_SIZE, CLIP_SIZE), mode="bilinear", align_corners=False)
    pad_y, pad_x = (math.floor((int(side * CLIP_SIZE / min(size)) - CLIP_SIZE) / 2) for side in size)
    fine = F.interpolate(F.pad(view, (pad_x, pad_x, pad_y, pad_y)), size, mode="bilinear", align_corners=False)[0, 0]
    share = fine.flatten().softmax(0).view(size)
    ys, xs = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=fine.device),
        torch.arange(width, dtype=torch.float32, device=fine.device),
        indexing="ij",
    )
    found = []
    for x, y in cells_K2.tolist():
        weight = share * torch.exp(-((xs - x) ** 2 + (ys - y) ** 2))
        weight = weight / weight.sum()
        found.append(torch.stack([(weight * xs).sum(), (weight * ys).sum()]))
    return torch.stack(found)


def measure(size: tuple[int, int], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of both for one picture size, one mask and a batch, and how far the points lie apart."""
    import torch

    from model import SaspConfig, select_points

    watch = Stopwatch(device)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(options.expressions, 1, 6, 6, generator=generator)  # smooth, as similarity maps are
    maps = torch.nn.functional.interpolate(coarse, (GRID, GRID), mode="bicubic").flatten(1).to(device)

    def timed(function: Any, *args: Any) -> tuple[float, Any]:
        begin = watch.now()
        result = function(*args)
        return watch.now() - begin, result

    def ours(values: torch.Tensor) -> Any:
        return select_points(values, size, SaspConfig(num_points=options.points))

    first, found = timed(ours, maps[:1])
    times: dict[str, list[float]] = {"original": [], "ours": [], "ours, batch": []}
    furthest = 0.0
    for repetition in range(options.repeat):
        row = repetition % options.expressions
        found = ours(maps[row : row + 1])
        seconds, points = timed(original_points, maps[row], found.cells[0], size)
        times["original"].append(seconds)
        furthest = max(furthest, (points - found.points[0]).abs().max().item())
        for _ in range(10):
            times["ours"].append(timed(ours, maps[row : row + 1])[0])
            times["ours, batch"].append(timed(ours, maps)[0] / options.expressions)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": {**median, "ours, first": first},
        "ratios": {name: median["original"] / median[name] for name in ("ours", "ours, batch")},
        "furthest_px": furthest,
    }


@plain_errors("sasp")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    import torch

    from utils import distributed
    from utils.runlog import package_versions

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = distributed.start(engine=False).device
    machine = hardware(device)
    print(
        f"K = {options.points}; {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, load {machine['load']}"
    )
    batch = f"batch of {options.expressions}, each"
    print(f"{'picture':<12}{'original':>12}{'ours':>12}{'ratio':>9}{batch:>24}{'ratio':>9}{'apart':>14}")
    results = {}
    for text in options.sizes:
        height, _, width = text.partition("x")
        with torch.no_grad():
            result = results[text] = measure((int(height), int(width)), options, device)
        seconds, ratios = result["seconds"], result["ratios"]
        print(
            f"{text:<12}{seconds['original']:>10.4f} s{1e3 * seconds['ours']:>9.3f} ms{ratios['ours']:>8.0f}x"
            f"{1e3 * seconds['ours, batch']:>21.3f} ms{ratios['ours, batch']:>8.0f}x{result['furthest_px']:>11.6f} px"
        )
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/sasp.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": machine,
            "versions": {"python": platform.python_version(), **package_versions()},
            "points": options.points,
            "expressions": options.expressions,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
