"""Measures a READ checkpoint: one model, any number of data sets, one protocol -> a table, `results.json` and predictions.

    python test_read.py --version runs/mini/merged --data "ReasonSeg|val" "refcoco|val"              answers forced
    python test_read.py --version runs/mini/merged --data "fprefcoco|val" --protocol generate        answers generated
    python test_read.py --version runs/mini/merged --data "mydata|val"                               own data (dataset/own.py)
    python test_read.py --cmd metrics --predictions runs/test                                        scores of predictions alone
    python test_read.py --compare runs/before runs/after                                             two runs side by side

Under `torchrun` or `deepspeed` each process takes an exact share of the pictures. Stopped and started again, it goes on after
the last whole picture. The two protocols are not comparable: `forced` puts the answer with its [SEG] into the prompt,
`generate` lets the model answer (protocol §5).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import DEFAULT_MODEL, add_model_flags, load_model, one_line

if TYPE_CHECKING:
    from model import READForCausalLM

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
    parser.add_argument("--protocol", choices=("forced", "generate"), help="default: forced")
    parser.add_argument(
        "--templates", choices=("fixed", "random"), default="fixed",
        help="sentences around an expression: those of the published ReasonSeg numbers, or drawn from our training pools",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of random templates, and of absent things that own data ask for")
    parser.add_argument(
        "--compat", choices=("correct", "released"), default="correct",
        help="released: generation with the original's treatment of padding and its wording of the system prompt, which its "
        "FP-RefCOCO numbers contain",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=positive, default=512, help="longest answer (default: 512)")
    parser.add_argument("--chunk", type=positive, default=16, help="expressions that go through the model together (default: 16)")
    parser.add_argument("--workers", type=int, help="processes that read pictures ahead (default: by the number of cores)")
    parser.add_argument("--limit", type=positive, help="only the first pictures of each data set; the result says so")
    parser.add_argument(
        "--out", type=Path,
        help="folder of results.json and predictions (default: one for each model and settings, runs/eval/MODEL-...)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="throw away what --out holds of these data sets")
    parser.add_argument(
        "--strict", action="store_true",
        help="stop at a picture that cannot be read or answered; else it is tried twice, named in the result, and left out",
    )  # fmt: skip
    parser.add_argument("--cache_dir", help="keep SAM's features of every picture here, and take them from here the next time")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the deepspeed launcher
    other = parser.add_argument_group("without a model")
    other.add_argument("--cmd", choices=("inference", "metrics"), default="inference", help="metrics: scores of --predictions")
    other.add_argument(
        "--predictions", nargs="+", type=Path, metavar="PATH",
        help="predictions_*.jsonl, folders with them, or folders of the original's preds_*.json and .npz (default: --out)",
    )  # fmt: skip
    other.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"),
        help="two folders that this program wrote: differences with intervals, and B/compare.html with the expressions that "
        "changed most",
    )  # fmt: skip
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads, measures, prints, writes; or prints what was measured before."""
    options = build_parser().parse_args(argv)
    try:
        if options.compare:
            from utils.compare import compare_folders

            print(compare_folders(*options.compare, html=options.compare[1] / "compare.html"))
            return 0
        if options.cmd == "metrics":
            if not (options.predictions or options.out):
                raise ValueError("--cmd metrics needs --predictions, files or folders")
            print(metrics(options.predictions or [options.out], options.protocol))
            return 0
        options.protocol = options.protocol or "forced"
        return inference(options, [split_name(entry) for entry in options.data])
    except (OSError, ValueError) as error:  # CheckpointError is a ValueError
        raise SystemExit(f"test_read.py: {one_line(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit("test_read.py: stopped; the same command goes on after the last whole picture") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"test_read.py: {one_line(error)}; the same command goes on, --workers 0 reads without it") from error


def inference(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> int:
    """Measures the data sets (name, split) one after the other; each is on disk as soon as it is done."""
    import torch

    from dataset import build_eval
    from utils import distributed
    from utils.evaluate import evaluate
    from utils.predictions import predictions_name
    from utils.runlog import setup_logging
    from utils.scores import table

    if options.compat == "released" and options.protocol == "generate" and not (options.conv_type or options.preset):
        options.conv_type = RELEASED_WORDING
    files = [predictions_name(*pair) for pair in pairs]
    if doubled := [name for name in files if files.count(name) > 1]:
        raise ValueError(f"--data: two sets would both be written to {doubled[0]}: measure them into different --out folders")
    world = distributed.start(engine=False)
    setup_logging(world.is_main)
    options.version = options.version or DEFAULT_MODEL
    # Data first: a missing folder should be known before a large model is loaded.
    data = [
        build_eval(name, split, options.dataset_dir, protocol=options.protocol, templates=options.templates, seed=options.seed)
        for name, split in pairs
    ]
    model, processor = load_model(options, world.device)
    if options.cache_dir:
        model.cache_sam_features(options.cache_dir)
    settings = settings_of(options, model)
    options.out = options.out or Path("runs/eval") / f"{Path(options.version).resolve().name}-{name_of(settings)}"
    results = []
    for (name, split), file, samples in zip(pairs, files, data, strict=True):
        whole, about = len(samples), {"dataset": name, "split": split, "data": data_name(samples)}
        if options.limit is not None:
            samples = torch.utils.data.Subset(samples, range(min(options.limit, whole)))
        try:
            scores = evaluate(
                model, processor, samples, protocol=options.protocol, compat=options.compat, conv_type=options.conv_type,
                rank=world.rank, world=world.size, max_new_tokens=options.max_new_tokens, predictions_path=options.out / file,
                settings={**settings, **about, "images_in_split": whole}, overwrite=options.overwrite, strict=options.strict,
                chunk=options.chunk, workers=reading_processes() if options.workers is None else options.workers,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # a picture with --strict, or predictions of other settings
            raise ValueError(f"{name}|{split}: {error}") from error
        results.append({**about, "images_in_split": whole, **scores})
        if scores["images_taken_over"]:
            tell(world, f"{name}|{split}: {scores['images_taken_over']} pictures taken over from {options.out / file}")
        if world.is_main:  # written after each data set: what is measured is not lost
            write_results(options, settings, results)
    tell(world, "\n".join([heading(options, settings), table(results), *failures(results)]))
    tell(world, f"written: {options.out / 'results.json'}")
    distributed.stop()
    return 0


def metrics(paths: list[Path], protocol: str | None) -> str:
    """The table of predictions that exist already, with a warning where its rows may not be compared."""
    from utils.scores import differences, recompute, table

    lines, first = [], None
    for path in paths:
        results = recompute([path], protocol)
        lines.append(f"{path}")
        for protocol_here in sorted({result["protocol"] for result in results}):
            rows = [result for result in results if result["protocol"] == protocol_here]
            lines += [f"answers {'generated' if protocol_here == 'generate' else 'forced'}", table(rows)]
        lines += failures(results)
        for result in results:
            told = f"{result['dataset']} {result['split']}"
            if result.get("limit") is not None:
                lines.append(f"{told}: the first {result['limit']} of {result['images_in_split']} pictures only")
            if result["stored_differ"]:
                lines.append(f"WARNING: {told}: {result['stored_differ']} stored counts are not those of the masks")
            run = result.pop("settings", None) or {"protocol": result["protocol"]}
            first = first or (told, run)
            lines += [f"WARNING, {told} is not to be compared with {first[0]}: {words}" for words in differences(first[1], run)]
    return "\n".join(lines)


def split_name(entry: str) -> tuple[str, str]:
    """(name, split) of `NAME|SPLIT`."""
    name, bar, split = entry.partition("|")
    if not (name and bar and split):
        raise ValueError(f"--data takes NAME|SPLIT, for example 'ReasonSeg|val', found {entry!r}")
    return name, split


def positive(text: str) -> int:
    """A flag's value that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return value


def reading_processes() -> int:
    """As many that read ahead as this process's share of the machine's cores feeds, leaving one to the model."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def data_name(samples: Any) -> str:
    """A name for what a data set asks about which picture: other data have another."""
    return name_of(samples.places())


def name_of(value: Any) -> str:
    """A short name for a JSON value: others have others."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def settings_of(options: argparse.Namespace, model: READForCausalLM) -> dict[str, Any]:
    """All that decides a prediction: runs of the same settings go on from each other."""
    import dataclasses
    import platform

    from model.checkpoint import fingerprint
    from utils.runlog import package_versions
    from utils.say import signature

    generated = options.protocol == "generate"
    return {
        "checkpoint": fingerprint(options.version, options.vision_tower),
        "protocol": options.protocol,
        "compat": options.compat,
        "conv_type": options.conv_type or model.config.conv_type,
        "templates": options.templates,
        "seed": options.seed,
        "preset": options.preset,
        "sasp": dataclasses.asdict(model.config.sasp),
        "max_new_tokens": options.max_new_tokens if generated else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": options.bits,
        "attn_implementation": options.attn_implementation,
        "dataset_dir": str(options.dataset_dir),
        "say": signature() if generated else None,
        "limit": options.limit,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def write_results(options: argparse.Namespace, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """results.json: the scores, and everything needed to tell whether two results may be compared."""
    record = {
        "version": str(options.version),
        **settings,
        "command": shlex.join(["python", *sys.argv]),
        "results": results,
    }
    partial = options.out / "results.json.partial"
    partial.write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n")
    partial.replace(options.out / "results.json")


def plain(value: Any) -> Any:
    """A value as JSON knows it: a score that is not a number, since nothing was counted, becomes null."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def heading(options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What the table below it is about."""
    words = [
        str(options.version),
        f"answers {'generated' if options.protocol == 'generate' else 'forced'}",
        "fixed templates" if options.templates == "fixed" else f"random templates (ours), seed {options.seed}",
        f"prompt {settings['conv_type']}",
        f"SasP {'on' if settings['sasp']['enabled'] else 'off'}",
        settings["dtype"],
    ]
    if options.protocol == "generate":
        words.append("padding as released" if options.compat == "released" else "padding correct")
    if options.limit is not None:
        words.append(f"first {options.limit} pictures only")
    return " · ".join(words)


def failures(results: list[dict[str, Any]], shown: int = 5) -> list[str]:
    """Lines about the pictures that are not in the scores."""
    lines = []
    for result in results:
        if failed := result["failed"]:
            pictures = f"{len(failed)} picture{'s' * (len(failed) > 1)} of {result['images_in_split']}"
            lines.append(f"{result['dataset']}|{result['split']}: {pictures} FAILED and not in these scores:")
            lines += [f"  picture {entry['image_index']}: {entry['error']}" for entry in failed[:shown]]
            lines += [f"  ... and {len(failed) - shown} more, see results.json"] if len(failed) > shown else []
    return lines


def tell(world: Any, text: str) -> None:
    """Prints in the main process."""
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
