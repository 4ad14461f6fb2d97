"""Measures a READ checkpoint: one model, any number of data sets, one protocol -> a table and `results.json`.

    python test_read.py --version runs/mini/merged --data "ReasonSeg|val" "refcoco|val"              answers forced
    python test_read.py --version runs/mini/merged --data "fprefcoco|val" --protocol generate        answers generated
    python test_read.py --version runs/mini/merged --data "mydata|val"                               own data (dataset/own.py)

Under `torchrun` or `deepspeed` each process takes an exact share of the pictures. The two protocols are not comparable:
`forced` puts the answer with its [SEG] into the prompt, `generate` lets the model answer (protocol §5).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

from utils.cli import DEFAULT_MODEL, add_model_flags, load_model, one_line

RELEASED_WORDING = "vicuna_v1"
"""What the original's generation said, unlike its training (§8-1)."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--data", nargs="+", default=["ReasonSeg|val"], metavar="NAME|SPLIT",
        help="data sets with their splits: ReasonSeg|val, refcoco|testA, fprefcoco|val, ..., or the path of own data for the "
        "name (default: ReasonSeg|val)",
    )  # fmt: skip
    parser.add_argument("--dataset_dir", default="data/mini", help="data folder (default: data/mini)")
    parser.add_argument("--protocol", choices=("forced", "generate"), default="forced")
    parser.add_argument("--templates", choices=("fixed", "random"), default="fixed", help="evaluation sentences")
    parser.add_argument("--seed", type=int, default=0, help="of random templates")
    parser.add_argument(
        "--compat", choices=("correct", "released"), default="correct",
        help="released: generation with the original's treatment of padding and its wording of the system prompt, which its "
        "FP-RefCOCO numbers contain",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--chunk", type=int, default=16, help="questions that go through the model together")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures ahead")
    parser.add_argument("--limit", type=int, help="only the first pictures of each data set; the result says so")
    parser.add_argument("--out", type=Path, default=Path("runs/test"), help="folder of results.json and predictions")
    parser.add_argument("--cache_dir", help="keep SAM's features of every picture here, and take them from here the next time")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the deepspeed launcher
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads, measures, prints, writes."""
    options = build_parser().parse_args(argv)
    try:
        pairs = [split_name(entry) for entry in options.data]
    except ValueError as error:
        raise SystemExit(f"test_read.py: {error}") from error
    import torch

    from dataset import build_eval
    from utils import distributed
    from utils.evaluate import evaluate

    if options.compat == "released" and options.protocol == "generate" and not (options.conv_type or options.preset):
        options.conv_type = RELEASED_WORDING
    world = distributed.start(engine=False)
    options.version = options.version or DEFAULT_MODEL
    try:
        # Data first: a missing folder should be known before a large model is loaded.
        data = [
            build_eval(name, split, options.dataset_dir, protocol=options.protocol, templates=options.templates,
                       seed=options.seed)
            for name, split in pairs
        ]  # fmt: skip
        model, processor = load_model(options, world.device)
        if options.cache_dir:
            model.cache_sam_features(options.cache_dir)
    except (OSError, ValueError) as error:  # CheckpointError is a ValueError
        raise SystemExit(f"test_read.py: {one_line(error)}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for (name, split), samples in zip(pairs, data, strict=True):
        whole = len(samples)
        if options.limit is not None:
            samples = torch.utils.data.Subset(samples, range(min(options.limit, whole)))
        try:
            scores = evaluate(
                model, processor, samples, protocol=options.protocol, compat=options.compat, conv_type=options.conv_type,
                rank=world.rank, world=world.size, max_new_tokens=options.max_new_tokens,
                predictions_path=options.out / f"predictions_{file_name(name)}_{split}.jsonl", chunk=options.chunk,
                workers=options.workers,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # a picture or an annotation that is missing or damaged
            raise SystemExit(f"test_read.py: {name}|{split}: {one_line(error)}") from error
        results.append({"dataset": name, "split": split, "images_in_split": whole, **scores})
        if world.is_main:  # written after each data set: what is measured is not lost
            write_results(options, model, results)
    if world.is_main:
        print(table(results, options))
        print(f"written: {options.out / 'results.json'}")
    distributed.stop()
    return 0


def file_name(name: str) -> str:
    """A data set's name as part of a file's; of own data it is a path."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")


def split_name(entry: str) -> tuple[str, str]:
    """(name, split) of `NAME|SPLIT`."""
    name, bar, split = entry.partition("|")
    if not (name and bar and split):
        raise ValueError(f"--data takes NAME|SPLIT, for example 'ReasonSeg|val', found {entry!r}")
    return name, split


def write_results(options: argparse.Namespace, model: Any, results: list[dict[str, Any]]) -> None:
    """results.json: the scores, and everything needed to tell whether two results may be compared."""
    import dataclasses

    import torch
    import transformers

    record = {
        "version": str(options.version),
        "protocol": options.protocol,
        "templates": options.templates,
        "seed": options.seed if options.templates == "random" else None,
        "compat": options.compat,
        "conv_type": options.conv_type or model.config.conv_type,
        "preset": options.preset,
        "sasp": dataclasses.asdict(model.config.sasp),
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": options.bits,
        "dataset_dir": str(options.dataset_dir),
        "limit": options.limit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(sys.argv),
        "results": results,
    }  # fmt: skip
    partial = options.out / "results.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(options.out / "results.json")


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The scores in percent, a row a data set and a row each of its subsets."""
    head = f"{'':<30}{'images':>7}{'expr.':>7}{'gIoU':>7}{'cIoU':>7}{'P@.5':>7}{'See':>7}"
    lines = [f"{options.version} · {options.protocol} · {options.templates} templates · {options.compat}", head]
    for result in results:
        lines.append(row(f"{result['dataset']} {result['split']}", result, result["images"]))
        lines += [row(f"  {name}", scores, None) for name, scores in result.get("subsets", {}).items()]
    return "\n".join(lines)


def row(name: str, scores: dict[str, Any], images: int | None) -> str:
    """One line of the table."""
    values = [scores.get(key) for key in ("giou", "ciou", "p@0.5", "see")]
    cells = ["-" if v is None or math.isnan(v) else f"{100 * v:.1f}" for v in values]
    return f"{name:<30}{images if images is not None else '':>7}{scores['expressions']:>7}" + "".join(
        f"{cell:>7}" for cell in cells
    )


if __name__ == "__main__":
    sys.exit(main())
