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
import json
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
    parser.add_argument("--templates", choices=("fixed", "random"), default="fixed", help="evaluation sentences")
    parser.add_argument("--seed", type=int, default=0, help="of random templates")
    parser.add_argument(
        "--compat", choices=("correct", "released"), default="correct",
        help="released: generation with the original's treatment of padding and its wording of the system prompt, which its "
        "FP-RefCOCO numbers contain",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--chunk", type=int, default=16, help="expressions that go through the model together (default: 16)")
    parser.add_argument("--workers", type=int, help="processes that read pictures ahead (default: by the number of cores)")
    parser.add_argument("--limit", type=int, help="only the first pictures of each data set; the result says so")
    parser.add_argument("--out", type=Path, default=Path("runs/test"), help="folder of results.json and predictions")
    parser.add_argument("--overwrite", action="store_true", help="measure again what --out holds already, finished or not")
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
            print(metrics(options.predictions or [options.out], options.protocol))
            return 0
        options.protocol = options.protocol or "forced"
        return inference(options, [split_name(entry) for entry in options.data])
    except (OSError, ValueError) as error:  # CheckpointError is a ValueError
        raise SystemExit(f"test_read.py: {one_line(error)}") from error


def inference(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> int:
    """Measures the data sets (name, split) one after the other; each is on disk as soon as it is done."""
    import torch

    from dataset import build_eval
    from utils import distributed
    from utils.evaluate import evaluate
    from utils.predictions import predictions_name, read_predictions
    from utils.runlog import setup_logging
    from utils.scores import table

    if options.compat == "released" and options.protocol == "generate" and not (options.conv_type or options.preset):
        options.conv_type = RELEASED_WORDING
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
    options.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options, model)
    before = {} if options.overwrite else finished(options, settings)
    distributed.barrier()  # all have read results.json before it is written again
    results = []
    for (name, split), samples in zip(pairs, data, strict=True):
        path = options.out / predictions_name(name, split)
        old = before.get((name, split))
        if old and not old["failed"]:
            tell(world, f"{name}|{split} was measured with these settings already: taken over (--overwrite measures it again)")
            results.append(old)
        else:
            whole = len(samples)
            if options.limit is not None:
                samples = torch.utils.data.Subset(samples, range(min(options.limit, whole)))
            try:
                scores = evaluate(
                    model, processor, samples, protocol=options.protocol, compat=options.compat, conv_type=options.conv_type,
                    rank=world.rank, world=world.size, max_new_tokens=options.max_new_tokens, predictions_path=path,
                    settings=settings, known=read_predictions(path) if old and path.is_file() else (),
                    overwrite=options.overwrite, strict=options.strict, chunk=options.chunk,
                    workers=reading_processes(world.size) if options.workers is None else options.workers,
                )  # fmt: skip
            except (OSError, ValueError) as error:  # a picture or an annotation, with --strict
                raise ValueError(f"{name}|{split}: {error}") from error
            results.append({"dataset": name, "split": split, "images_in_split": whole, **scores})
        if world.is_main:  # written after each data set: what is measured is not lost
            write_results(options, settings, results)
    tell(world, "\n".join([heading(options, settings), table(results), *failures(results)]))
    tell(world, f"written: {options.out / 'results.json'}")
    distributed.stop()
    return 0


def metrics(paths: list[Path], protocol: str | None) -> str:
    """The table of predictions that exist already, a part a path, with a warning where the parts may not be compared."""
    from utils.scores import differences, recompute, table

    lines, first = [], None
    for path in paths:
        results = recompute([path], protocol)
        beside = (path if path.is_dir() else path.parent) / "results.json"
        run = json.loads(beside.read_text()) if beside.is_file() else {"protocol": results[0]["protocol"]}
        run["results"] = results
        first = first or run
        lines += [f"{path} · {results[0]['protocol']}", table(results)]
        lines += [f"WARNING, not to be compared with {paths[0]}: {words}" for words in differences(first, run)]
        lines += [
            f"WARNING: {result['dataset']} {result['split']}: {result['stored_differ']} stored counts are not those of the masks"
            for result in results
            if result["stored_differ"]
        ]
    return "\n".join(lines)


def split_name(entry: str) -> tuple[str, str]:
    """(name, split) of `NAME|SPLIT`."""
    name, bar, split = entry.partition("|")
    if not (name and bar and split):
        raise ValueError(f"--data takes NAME|SPLIT, for example 'ReasonSeg|val', found {entry!r}")
    return name, split


def reading_processes(processes: int) -> int:
    """As many that read ahead as this process's share of the cores feeds, leaving one to the model."""
    return max(1, min(8, (os.cpu_count() or 1) // processes - 1))


def settings_of(options: argparse.Namespace, model: READForCausalLM) -> dict[str, Any]:
    """All that decides a prediction: two runs with the same settings may be joined, and compared."""
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
        "seed": options.seed if options.templates == "random" else None,
        "preset": options.preset,
        "sasp": dataclasses.asdict(model.config.sasp),
        "max_new_tokens": options.max_new_tokens if generated else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": options.bits,
        "attn_implementation": options.attn_implementation,
        "dataset_dir": str(options.dataset_dir),
        "say": signature() if generated else None,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def finished(options: argparse.Namespace, settings: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(name, split): result} of what --out holds under the same settings."""
    file = options.out / "results.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
        same = {name: record.get(name) for name in settings} == json.loads(json.dumps(settings))
        if not same or record.get("limit") != options.limit:
            return {}
        return {(result["dataset"], result["split"]): result for result in record["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): --overwrite measures everything again") from error


def write_results(options: argparse.Namespace, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """results.json: the scores, and everything needed to tell whether two results may be compared."""
    record = {
        "version": str(options.version),
        **settings,
        "limit": options.limit,
        "command": shlex.join(["python", *sys.argv]),
        "results": results,
    }
    partial = options.out / "results.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(options.out / "results.json")


def heading(options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What the table below it is about."""
    words = [
        str(options.version),
        f"answers {'generated' if options.protocol == 'generate' else 'forced'}",
        f"{options.templates} templates",
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
            lines.append(f"{result['dataset']}|{result['split']}: {len(failed)} pictures FAILED and are not in these scores:")
            lines += [f"  picture {entry['image_index']}: {entry['error']}" for entry in failed[:shown]]
            lines += [f"  ... and {len(failed) - shown} more, see results.json"] if len(failed) > shown else []
    return lines


def tell(world: Any, text: str) -> None:
    """Prints in the main process."""
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
