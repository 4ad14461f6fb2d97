"""How the [SEG] token works, for any checkpoint and data set: its three similarity maps, its points, what each prompt is worth.

    python -m utils.analysis --version runs/mini/merged --data "ReasonSeg|val" --out runs/analysis
    python -m utils.analysis --version runs/mini/merged --layers all --sweep                          per layer; SasP's values
    python -m utils.analysis --version MODEL tsunghanwu/SESAME:sesame-7b --sam sam_vit_h_4b8939.pth    models side by side

A model is a folder or a hub id; behind a colon may stand a preset of model/presets.py, or `no-sasp` for SESAME's path. Written to
--out, which can be moved as a whole:

    index.html         what all expressions say, then a card for each; sorts, filters; j and k go from card to card
    expressions.csv    a row an expression and model
    summary.csv, thresholds.csv; layers.csv with --layers, sweep.csv with --sweep
    analysis.json      the settings
    *.png, pictures/   figures, pictures of the cards

The definitions of all numbers: utils/analysis/__init__.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import (
    DEFAULT_MODEL,
    add_image_flags,
    add_model_flags,
    check_max_new_tokens,
    load_model,
    plain_errors,
    split_name,
)
from utils.files import whole_file, whole_number, write_json, write_text
from utils.outputs import FILE_MARK, OutputFolder, check_file, check_writable

if TYPE_CHECKING:
    from .study import Study

ALL = "all"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.analysis", description=__doc__.split("\n\n")[0], allow_abbrev=False, conflict_handler="resolve"
    )
    parser.add_argument(
        "--data", nargs="+", default=["ReasonSeg|val"], metavar="NAME|SPLIT",
        help="data sets with their splits, or the path of own data for the name (default: ReasonSeg|val)",
    )  # fmt: skip
    parser.add_argument("--dataset_dir", default="data/mini", help="data folder (default: data/mini)")
    parser.add_argument(
        "--protocol", choices=("forced", "generate"), default="forced",
        help="forced: the answer with its [SEG] is given (default); generate: [SEG] is the model's own",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest generated answer (default: 512)")
    parser.add_argument("--chunk", type=int, default=16, help="expressions that go through the model together (default: 16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first pictures of each data set")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"), help="folder of the report (default: runs/analysis)")
    parser.add_argument("--cards", type=int, default=200, metavar="N", help="expressions shown in pictures (default: 200)")
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="K",
        help="maps of these layers of the language model too, 0 being its input, or all",
    )  # fmt: skip
    parser.add_argument(
        "--layer_seg", choices=("same", "last"), default="same",
        help="the [SEG] state in the strip of layers: of the same layer (default) or of the last",
    )  # fmt: skip
    parser.add_argument(
        "--sam_token", choices=("seg", "released"), default="seg",
        help="token of the map in SAM's decoder; released: the one before [SEG], which the released code drew",
    )  # fmt: skip
    parser.add_argument("--sam", type=Path, metavar="PTH", help="a SAM as it was released, for masks from the points alone")
    parser.add_argument("--sweep", action="store_true", help="try other values of SasP, by prompting SAM's decoder anew")
    parser.add_argument(
        "--figure", type=Path, metavar="PNG", help="one small sheet of the first ten pictures, of the first model, as well"
    )
    add_image_flags(parser)
    add_model_flags(parser)
    parser.add_argument(
        "--version", "--pretrained_model_path", dest="version", nargs="+", default=[DEFAULT_MODEL], metavar="MODEL[:PRESET]",
        help=f"checkpoints, shown side by side (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Looks, writes, prints."""
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    with plain_errors("analysis"):
        return analyse(options)


def analyse(options: argparse.Namespace) -> int:
    """Everything after the command line."""
    import torch

    from dataset import build_eval
    from utils.runlog import setup_logging

    from . import tables
    from .study import slug_of

    setup_logging()
    check_numbers(options)
    models = [split_model(entry) for entry in options.version]
    names = model_names(options.version)
    out = output_folder(options, [version for version, _ in models])
    out.check(overwrite=True)  # an earlier report is replaced
    if options.figure:
        check_file(options.figure, "--figure")
        check_writable(options.figure.parent, "--figure")
    for version, _ in models:
        if options.protocol == "generate":
            check_max_new_tokens(version, options.max_new_tokens, options.vision_tower)
    parts = []  # data first: a missing folder should be known before a large model is loaded
    for entry in options.data:
        samples = build_eval(*split_name(entry), options.dataset_dir, protocol=options.protocol)
        if options.limit is not None:
            samples = torch.utils.data.Subset(samples, range(min(options.limit, len(samples))))
        parts.append((entry, samples))
    if len({slug_of(entry) for entry, _ in parts}) < len(parts):
        raise ValueError(f"--data {' '.join(options.data)}: two are the same, or differ in signs alone, and would share files")
    with out.replacement() as folder:
        studies = write_report(options, folder, models, names, parts)
    print(tables.as_text(studies, [entry for entry, _ in parts]))
    if options.figure:
        sheet(studies[0], options.figure)
        print(f"written: {options.figure}")
    print(f"written: {options.out / 'index.html'}")
    return 0


def write_report(
    options: argparse.Namespace,
    folder: Path,
    models: list[tuple[str, dict[str, Any]]],
    names: list[str],
    parts: list[tuple[str, Any]],
) -> list[Study]:
    """Looks at all data sets with every model, and writes what is found into an empty folder.

    Args:
        models: of `split_model`, called `names`.
        parts: (NAME|SPLIT, samples).
    """
    import torch

    from . import plots, study, tables
    from .page import page
    from .prompts import Untouched

    wanted = study.Options(
        protocol=options.protocol, max_new_tokens=options.max_new_tokens, conv_type=options.conv_type, chunk=options.chunk,
        layers=layers_of(options.layers), layer_seg=options.layer_seg, sam_token=options.sam_token, sweep=options.sweep,
        cards=options.cards, figure=10 if options.figure else 0, out=folder,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    untouched = Untouched.load(options.sam, device) if options.sam else None
    (folder / "pictures").mkdir()
    studies = []
    for number, ((version, changes), name) in enumerate(zip(models, names, strict=True)):
        flags = argparse.Namespace(**{**vars(options), "version": version, **changes})
        model, processor = load_model(flags, device)
        settings = {
            "version": version, "sasp": dataclasses.asdict(model.config.sasp), "protocol": options.protocol,
            "conv_type": options.conv_type or model.config.conv_type, "dtype": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip
        studies.append(
            study.run(
                model, processor, parts, dataclasses.replace(wanted, figure=wanted.figure if number == 0 else 0),
                name=name, number=number, settings=settings, untouched=untouched,
            )
        )  # fmt: skip
        del model, processor  # before the next one is loaded
    if not any(one.rows for one in studies):
        reasons = [reason for one in studies for _, _, reason in one.failed]
        raise ValueError(f"nothing was looked at: {reasons[0] if reasons else 'the data sets have no expression'}")
    part_names = [entry for entry, _ in parts]
    tables.write_tables(studies, part_names, folder)
    figures = plots.write_figures(studies, part_names, folder)
    record = record_of(options, studies)
    write_json(folder / "analysis.json", record)
    write_text(folder / "index.html", page(studies, part_names, figures, record))
    return studies


def check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers out of range before anything is opened.

    Raises:
        ValueError: with the flag.
    """
    for name, least in (("limit", 1), ("chunk", 1), ("cards", 0), ("max_new_tokens", 1)):
        if getattr(options, name) is not None:
            whole_number(getattr(options, name), f"--{name}", at_least=least)
    for layer in layers_of(options.layers) or ():
        whole_number(layer, "--layers", at_least=0)


def output_folder(options: argparse.Namespace, versions: list[str]) -> OutputFolder:
    """The folder of the report, and what it must not hold: all that is read."""
    inputs: dict[str, str | Path | None] = {
        "--dataset_dir": options.dataset_dir, "--sam": options.sam, "--vision_tower": options.vision_tower
    }  # fmt: skip
    inputs |= {f"--version ({number})": version for number, version in enumerate(versions, 1)}
    inputs |= {f"--data ({number})": entry.rpartition("|")[0] or None for number, entry in enumerate(options.data, 1)}
    return OutputFolder(options.out, "analysis", inputs)


def split_model(entry: str) -> tuple[str, dict[str, Any]]:
    """(checkpoint, flags that it changes) of one --version.

    Raises:
        ValueError: an unknown preset.
    """
    version, colon, change = entry.rpartition(":")
    if not colon or Path(entry).exists():
        return entry, {}
    if change == "no-sasp":
        return version, {"sasp": False}
    from model import get_preset

    return version, {"preset": get_preset(change).name}


def model_names(versions: list[str]) -> list[str]:
    """What the models are called in the report: the end of the path where that tells them apart, numbered if need be."""
    short = [Path(entry).name or entry for entry in versions]
    names = short if len(set(short)) == len(short) else list(versions)
    return [f"{name} ({n + 1})" if names.count(name) > 1 else name for n, name in enumerate(names)]


def layers_of(given: list[str]) -> tuple[int, ...] | None:
    """Layers as numbers; None is all of them."""
    if given == [ALL]:
        return None
    try:
        return tuple(int(layer) for layer in given)
    except ValueError:
        raise ValueError(f"--layers takes numbers or {ALL}, found {' '.join(given)!r}") from None


def record_of(options: argparse.Namespace, studies: list[Study]) -> dict[str, Any]:
    """What the report says about how it was made."""
    import torch
    import transformers

    return {
        "command": shlex.join(["python", "-m", "utils.analysis", *sys.argv[1:]]),
        "data": options.data,
        "dataset_dir": str(options.dataset_dir),
        "limit": options.limit,
        "protocol": options.protocol,
        "layers": options.layers,
        "layer_seg": options.layer_seg,
        "sam_token": options.sam_token,
        "sam": str(options.sam) if options.sam else None,
        "models": {one.name: one.settings for one in studies},
        "failed": {one.name: [list(entry) for entry in one.failed] for one in studies},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip


def sheet(one: Study, path: Path) -> None:
    """The small figure: a row an expression, a column a map or mask."""
    from PIL.PngImagePlugin import PngInfo

    from utils import visualize

    from .study import PROMPTS

    if not one.sheet:
        raise ValueError("--figure: no expression had a [SEG]")
    columns = ["what is meant", "[SEG] and image\nbefore the LM", "[SEG] and image\nafter the LM", "[SEG] and image\nin SAM"]
    columns += ["points", *(f"mask from\n{PROMPTS[prompt]}" for prompt in one.prompts)]
    check_file(path, "--figure")
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", FILE_MARK)
    with whole_file(path, "wb") as file:
        visualize.sheet_image(one.sheet, columns).save(file, "PNG", optimize=True, pnginfo=mark)


if __name__ == "__main__":
    sys.exit(main())
