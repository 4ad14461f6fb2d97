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
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.args import check_sasp
from utils.cli import (
    DEFAULT_MODEL,
    add_image_flags,
    add_model_flags,
    check_max_new_tokens,
    load_model,
    one_line,
    plain_errors,
    positive,
    split_name,
)
from utils.files import write_json
from utils.stopping import SIGNALS

if TYPE_CHECKING:
    from model import READForCausalLM
    from utils.distributed import World

RELEASED_WORDING = "vicuna_v1"
"""What the original's generation said, unlike its training (§8-1)."""
SHOWN = 5
"""So many failed images of a data set are printed, the rest is counted."""


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
    parser.add_argument("--seed", type=natural, default=0, help="of random templates, and of absent things that own data ask for")
    parser.add_argument(
        "--compat", choices=("correct", "released"), default="correct",
        help="released: generation with the original's treatment of padding and its wording of the system prompt, which its "
        "FP-RefCOCO numbers contain",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=positive, default=512, help="longest answer (default: 512)")
    parser.add_argument("--chunk", type=positive, default=16, help="expressions that go through the model together (default: 16)")
    parser.add_argument("--workers", type=natural, help="processes that read images ahead (default: by the number of cores)")
    parser.add_argument("--limit", type=positive, help="only the first pictures of each data set; the result says so")
    parser.add_argument(
        "--out", type=Path,
        help="folder of results.json and predictions (default: one for each model and settings, runs/eval/MODEL-...)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="throw away what --out holds of these data sets; what it holds of others stays"
    )
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
    add_image_flags(parser)
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads, measures, prints, writes; or prints what was measured before."""
    options = build_parser().parse_args(argv)
    try:
        with plain_errors("test_read.py"):
            return run(options)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # one line, however many processes there are
            print(f"test_read.py: {stop}", file=sys.stderr, flush=True)
        raise


class Stopped(SystemExit):
    """The end of an evaluation by Ctrl-C or SIGTERM; what was measured is on disk."""

    def __str__(self) -> str:
        return "stopped; the same command goes on after the last whole image"


def run(options: argparse.Namespace) -> int:
    """What the command line asks for."""
    if options.compare and (options.cmd == "metrics" or options.predictions):
        raise ValueError("--compare, and --cmd metrics with its --predictions, exclude each other: give one of the two")
    if options.compare:
        from utils.compare import compare_folders

        print(compare_folders(*options.compare, html=options.compare[1] / "compare.html"))
        return 0
    if options.cmd == "metrics":
        if not (options.predictions or options.out):
            raise ValueError("--cmd metrics needs --predictions, files or folders")
        print(metrics(options.predictions or [options.out], options.protocol))
        return 0
    if options.predictions:
        raise ValueError("--predictions are what --cmd metrics scores: add it, or leave --predictions out")
    options.protocol = options.protocol or "forced"
    with stopped_by_signals():
        try:
            return inference(options, [split_name(entry) for entry in options.data])
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(f"{one_line(error)}; the same command goes on, --workers 0 reads without it") from error


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 end the block with `Stopped`, exit status 128 + the signal's number, as a shell expects it.

    `READ_DEBUG=1` keeps the traceback.
    """

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    received: list[int] = []
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives either
        for number in set(SIGNALS) - {signal.SIGINT}:
            before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("READ_DEBUG") == "1":
            raise
        raise Stopped(128 + (received[0] if received else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def inference(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> int:
    """Measures the data sets (name, split) one after the other; each is on disk as soon as it is done."""
    if options.version is None:
        options.version = DEFAULT_MODEL
    elif not options.version.strip():  # an unset variable of a shell is not the default
        raise ValueError("--version is empty: give the folder or the hub id of a model")
    check_sasp(options)
    if options.protocol == "generate" and Path(options.version).is_dir():  # of the hub, it is known once the model is loaded
        check_max_new_tokens(options.version, options.max_new_tokens, options.vision_tower)
    import torch

    from dataset import build_eval
    from utils import distributed
    from utils.content import content_name, item_names
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
    # Data first: a missing folder should be known before a large model is loaded.
    data = [
        build_eval(name, split, options.dataset_dir, protocol=options.protocol, templates=options.templates, seed=options.seed)
        for name, split in pairs
    ]
    if options.cache_dir:
        make_folder(Path(options.cache_dir), "--cache_dir")
    with contextlib.ExitStack() as held:
        if options.out is None:
            make_folder(DEFAULT_OUT, "the folder of results")
        else:
            held.enter_context(only_writer(options, world))
        model, processor = load_model(options, world.device)
        if options.cache_dir:
            model.cache_sam_features(options.cache_dir)
        settings = settings_of(options, model)
        if options.out is None:
            options.out = DEFAULT_OUT / f"{Path(options.version).resolve().name}-{name_of(settings)}"
            held.enter_context(only_writer(options, world))
        earlier = earlier_rows(options.out, settings, pairs, options.overwrite)
        results, kept = [], []
        for (name, split), file, samples in zip(pairs, files, data, strict=True):
            whole, items, about = len(samples), item_names(samples), {"dataset": name, "split": split}
            contents = {
                "annotations": content_name([item.split()[0] for item in items]),
                "image_files": f"by size and time of modification: {content_name([item.split()[1] for item in items])}",
            }
            if options.limit is not None:
                samples = torch.utils.data.Subset(samples, range(min(options.limit, whole)))
            try:
                scores = evaluate(
                    model, processor, samples, protocol=options.protocol, compat=options.compat, conv_type=options.conv_type,
                    rank=world.rank, world=world.size, max_new_tokens=options.max_new_tokens, predictions_path=options.out / file,
                    settings={**settings, **about, "images_in_split": whole}, items=items, overwrite=options.overwrite,
                    strict=options.strict, chunk=options.chunk,
                    workers=reading_processes() if options.workers is None else options.workers,
                )  # fmt: skip
            except (OSError, ValueError) as error:  # an image with --strict, or predictions of other settings
                raise ValueError(f"{name}|{split}: {one_line(error)}") from error
            results.append({**about, **contents, "images_in_split": whole, **scores, "command": command()})
            if scores["images_taken_over"]:
                tell(world, f"{name}|{split}: {scores['images_taken_over']} images taken over from {options.out / file}")
            if world.is_main:  # written after each data set: what is measured is not lost
                kept = write_results(options, settings, earlier, results)
        tell(world, "\n".join([heading(options, settings), table(results), *failures(results)]))
        if world.is_main:
            beside = f" (beside {', '.join(kept)} of an earlier command)" if kept else ""
            tell(world, f"written: {options.out / 'results.json'}{beside}")
        distributed.stop()
    return 0


DEFAULT_OUT = Path("runs/eval")


@contextlib.contextmanager
def only_writer(options: argparse.Namespace, world: World) -> Iterator[None]:
    """Holds --out for this evaluation and its processes.

    Raises:
        OSError, ValueError: it is not this program's, cannot be written, or another evaluation holds it. The first process
            says so, the others end with the same exit status.
    """
    from utils import distributed
    from utils.outputs import OutputFolder

    own = {f"--data {entry}": split_name(entry)[0] for entry in options.data}
    inputs = {"--version": options.version, "--vision_tower": options.vision_tower, "--dataset_dir": options.dataset_dir, **own}
    folder = OutputFolder(options.out, "evaluate", inputs)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            folder.check(overwrite=True)
            make_folder(folder.path, "--out")
            held.enter_context(folder.lock())
            folder.mark()

        distributed.main_first(world, claim)
        yield


def make_folder(path: Path, flag: str) -> None:
    """Makes a folder, unless it is there; OSError names the flag."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be made ({error.strerror}): choose another folder") from error


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
            if not result["completeness_known"]:
                lines.append(f"{told}: whether it is complete is not known, since nothing beside it says how much was written")
            if result["stored_differ"]:
                lines.append(f"WARNING: {told}: {result['stored_differ']} stored counts are not those of the masks")
            run = result.pop("settings", None) or {"protocol": result["protocol"]}
            first = first or (told, run)
            lines += [f"WARNING, {told} is not to be compared with {first[0]}: {words}" for words in differences(first[1], run)]
    return "\n".join(lines)


def natural(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, found {text}")
    return value


def reading_processes() -> int:
    """As many that read ahead as this process's share of the machine's cores feeds, leaving one to the model."""
    return max(1, min(8, (os.cpu_count() or 1) // _local_processes() - 1))


def _local_processes() -> int:
    """Processes of this evaluation on this machine, from the variable that a launcher sets."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE={text!r}: must be the number of processes on this machine; for one alone unset it")
    return int(text)


def name_of(value: Any) -> str:
    """A short name for a JSON value: others have others."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


NOT_OF_PREDICTIONS = {
    "sasp", "conv_type", "loss", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "vision_tower", "architectures",
}  # fmt: skip
"""Fields of a model's config that are settings of their own, or decide no prediction."""


def settings_of(options: argparse.Namespace, model: READForCausalLM) -> dict[str, Any]:
    """All that decides a prediction: runs of the same settings go on from each other."""
    import dataclasses
    import platform

    from model.checkpoint import fingerprint, processor_fingerprint
    from utils.runlog import package_versions
    from utils.say import signature

    generated = options.protocol == "generate"
    return {
        "checkpoint": fingerprint(options.version, options.vision_tower),
        "processor": processor_fingerprint(options.version, options.vision_tower),
        "config": name_of({name: value for name, value in model.config.to_dict().items() if name not in NOT_OF_PREDICTIONS}),
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


def command() -> str:
    """This command, for a shell."""
    return shlex.join(["python", *sys.argv])


def earlier_rows(
    out: Path, settings: dict[str, Any], pairs: list[tuple[str, str]], overwrite: bool
) -> list[dict[str, Any]]:
    """The rows of a results.json that stay in it, until they are measured again.

    Raises:
        ValueError: it is none of this program's, or its rows are of other settings; the message names them.
    """
    from utils.prediction_log import check_settings, differing
    from utils.scores import read_results

    file = out / "results.json"
    if not file.exists():
        return []
    try:
        record = read_results(out)
    except ValueError as error:
        raise ValueError(f"{error}; move it away, or choose another --out") from None
    before, now = {name: record.get(name) for name in settings}, json.loads(json.dumps(settings))
    if (told := differing(before, now)) is None:
        return record["results"]
    others = [f"{row['dataset']}|{row['split']}" for row in record["results"] if (row["dataset"], row["split"]) not in pairs]
    if others:
        raise ValueError(
            f"{file} holds {', '.join(others)} under other settings: choose another --out. Settings that differ: {told}"
        )
    if not overwrite and record["results"]:
        check_settings(file, before, now)
    return []


def write_results(
    options: argparse.Namespace, settings: dict[str, Any], earlier: list[dict[str, Any]], results: list[dict[str, Any]]
) -> list[str]:
    """results.json: the scores, and everything needed to tell whether two results may be compared.

    Returns:
        Names of the rows of earlier commands that it still holds.
    """
    measured = {(row["dataset"], row["split"]) for row in results}
    kept = [row for row in earlier if (row["dataset"], row["split"]) not in measured]
    record = {"version": str(options.version), **settings, "command": command(), "results": [*kept, *results]}
    write_json(options.out / "results.json", plain(record))
    return [f"{row['dataset']}|{row['split']}" for row in kept]


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


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Lines about the pictures that are not in the scores."""
    lines = []
    for result in results:
        if failed := result["failed"]:
            pictures = f"{len(failed)} picture{'s' * (len(failed) > 1)} of {result.get('images_in_split', 'unknown number')}"
            lines.append(f"{result['dataset']}|{result['split']}: {pictures} FAILED and not in these scores:")
            lines += [f"  picture {entry['image_index']}: {entry['error']}" for entry in failed[:SHOWN]]
            lines += [f"  ... and {len(failed) - SHOWN} more, see results.json"] if len(failed) > SHOWN else []
    return lines


def tell(world: Any, text: str) -> None:
    """Prints in the main process."""
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
