"""Turns a training run into a model: `python -m utils.merge_lora RUN OUT [--tag best|last|step<N>]`.

DeepSpeed's shards of the chosen checkpoint become float32 weights; these are loaded strictly over the base that the run
was trained from; LoRA is folded in; OUT receives weights, config, tokenizer, processor and a card (utils/model_card.py),
and so stands on its own, here and on the hub (in the layout `released` without card and CLIP tower). Base, LoRA rank, alpha
and targets come from RUN/config.json; a base whose weights are no longer those is refused. Where the run kept its base in 4
or 8 bits, LoRA is folded into the rounded weights, those that it was trained on. The shards stay, unless --delete_shards
asks otherwise and the folder just written has been loaded again. OUT is written beside and then renamed; --overwrite
replaces the result of an earlier merge, never anything else.

With --layout adapter nothing is merged: OUT becomes a PEFT adapter, small, that `peft` loads onto the base.

This is an entry script: it may know the model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.args import TrainArgs
from utils.cli import plain_errors, torch_dtype
from utils.files import read_object, shown, write_json, write_text
from utils.model_card import CARD, MERGED_FROM, model_card
from utils.model_card import MARK as CARD_MARK
from utils.outputs import MARKER, NotOursError, OutputFolder, check_file, remove

if TYPE_CHECKING:
    import torch

    from model import READForCausalLM

log = logging.getLogger("utils.merge_lora")  # __name__ is __main__ here

SHARDS = "ckpt_model"
"""The folder of DeepSpeed's checkpoints in a run."""


NO_FOLDER = ("", ".", "..")
"""Names that mean no checkpoint, but ckpt_model itself or the run."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.merge_lora", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run (config.json, ckpt_model)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--tag", default="best", help="checkpoint: best, last, or a folder name of RUN/ckpt_model")
    parser.add_argument("--fp32", type=Path, help="weights converted by zero_to_fp32.py (file, or folder of shards)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the weights in OUT (default: the run's)"
    )
    parser.add_argument(
        "--layout", choices=("read", "released", "adapter"), default="read",
        help="ours, the original's, or a PEFT adapter of what was trained",
    )  # fmt: skip
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace an earlier result")
    parser.add_argument(
        "--delete_shards", action=argparse.BooleanOptionalAction, default=False,
        help="delete the checkpoints in RUN/ckpt_model once OUT has been written and loaded again",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Merges; see the module's docstring."""
    options = build_parser().parse_args(argv)
    with plain_errors("merge_lora"):
        merge(options)


def merge(options: argparse.Namespace) -> None:
    """What the command line asks for; nothing is deleted before what replaces it is whole."""
    from utils.runlog import setup_logging

    setup_logging()
    logging.getLogger("model.lora").setLevel(logging.WARNING)  # what trained was said when it was trained
    args = load_run(options.run)
    if options.layout == "adapter" and args.lora_r == 0:
        raise ValueError(f"{options.run} trained the whole language model, which is no adapter: merge it into a model")
    out = output_folder(options, args)
    out.check(options.overwrite)
    check_file(options.out / CARD, "OUT", CARD_MARK)  # a card written by hand is not ours to replace

    import torch

    from model import READForCausalLM, READProcessor, merge_lora, save_adapter
    from model.checkpoint import check_base

    deletes = options.delete_shards and may_delete_shards(options)
    # The lock keeps a training from going on from shards that are about to be deleted.
    with OutputFolder(options.run, "train").lock() if deletes else contextlib.nullcontext():
        source = options.fp32 or checkpoint_folder(options.run, options.tag)
        with out.replacement() as new:  # first, so that a place which cannot be written is known before minutes of loading
            trained = read_fp32(options.fp32) if options.fp32 else read_shards(source)
            check_base(options.run, args)
            model = build_trained_model(args, trained)
            dtype = torch_dtype(options.dtype or args.precision)
            if args.lora_r > 0 and options.layout != "adapter":
                merge_lora(model)
            model.to(dtype)
            if options.layout == "adapter":
                named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
                save_adapter(named, new, args.version, **args.lora())
            else:
                model.save_pretrained(new, layout=options.layout)
                READProcessor.from_pretrained(args.version, **args.processor(model.config)).save_pretrained(new)
            record = {"run": str(options.run), "checkpoint": str(source), "base": args.version, "preset": args.preset}
            write_json(new / MERGED_FROM, record)
            if options.layout == "read":
                try:
                    write_text(new / CARD, model_card(new, options.out.resolve().name))
                except (OSError, ValueError, KeyError) as error:  # the model is worth more than its card
                    log.warning("no card was written (python -m utils.model_card %s): %r", options.out, error)
            out.check(options.overwrite)  # another process may have written there meanwhile
        done = "adapter of %s for %s in %s" if options.layout == "adapter" else "merged %s over %s into %s"
        log.info(done, source, args.version, options.out)

        if deletes:
            tower = args.vision_tower if options.layout == "released" else None  # our own layout carries it
            again = READForCausalLM.from_pretrained(options.out, dtype=model.dtype, vision_tower=tower)
            written = model.state_dict()
            differing = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, written[name])]
            if differing:
                raise OSError(f"{options.out} does not read back as written ({', '.join(differing)}): the shards were kept")
            delete_shards(options.run)


def output_folder(options: argparse.Namespace, args: TrainArgs) -> OutputFolder:
    """OUT, and what it must neither be nor hold.

    Raises:
        NotOursError: OUT is, or lies in, something that belongs to the run itself.
    """
    own, run = options.out.resolve(), options.run.resolve()
    if own.is_relative_to(run) and own != run:  # RUN/merged is a usual place, RUN/ckpt_model/x is not
        first = own.relative_to(run).parts[0]
        if first == SHARDS or OutputFolder(run, "train").owns(first):
            raise NotOursError(f"{options.out} is or lies in {options.run / first}, which belongs to the run: choose another OUT")
    inputs = {
        "RUN": options.run,
        "--fp32": options.fp32,
        "the run's --version": args.version,
        "the run's --vision_tower": args.vision_tower,
        "the run's --vision_pretrained": args.vision_pretrained,
    }
    return OutputFolder(options.out, "merge", inputs)


def may_delete_shards(options: argparse.Namespace) -> bool:
    """True if --delete_shards can be followed; else it is said why the shards stay."""
    if options.layout == "adapter":
        log.warning("the shards are kept: an adapter alone is not worth them")
    elif not OutputFolder(options.run, "train").is_own():
        log.warning(
            "the shards are kept: %s lacks the mark that training leaves in its folders (%s; older versions left none). "
            "Delete %s yourself", options.run, MARKER, options.run / SHARDS,
        )  # fmt: skip
    else:
        return True
    return False


def delete_shards(run: Path) -> None:
    """Deletes the checkpoints that training wrote into RUN/ckpt_model, and the folder if nothing else is left in it."""
    folder = run / SHARDS
    for entry in OutputFolder(run, "train").own_entries():
        if entry.parent == folder:
            remove(entry)
    left = sorted(entry.name for entry in folder.iterdir())
    if left:
        log.info("deleted the checkpoints in %s; what else lies there was kept: %s", folder, ", ".join(left))
    else:
        folder.rmdir()
        log.info("deleted %s", folder)


def load_run(run: Path) -> TrainArgs:
    """The settings of a run.

    Raises:
        ValueError: it has been merged already. FileNotFoundError: it is no run.
    """
    if (run / MERGED_FROM).is_file():
        raise ValueError(f"{run} is the result of a merge, and merging it twice would add LoRA twice: name the run itself")
    return TrainArgs.load(run)


def checkpoint_folder(run: Path, tag: str) -> Path:
    """The DeepSpeed checkpoint that a tag means: best and last by the run's own records, else by name.

    Raises:
        FileNotFoundError: there is none; the message lists those there are. ValueError: a record of the run is unusable.
    """
    from utils.engine import has_checkpoint, latest_tag

    root = run / "ckpt_model"
    name: Any = tag
    if tag == "best":
        name = read_object(run / "best.json").get("tag", "") if (run / "best.json").is_file() else None
        if name is not None and (not isinstance(name, str) or name in NO_FOLDER or Path(name).name != name):
            raise ValueError(f"{run / 'best.json'}: tag must name a folder of {root}, found {shown(name)}")
    elif tag == "last":
        name = latest_tag(root) if has_checkpoint(root) else None
    if name in (None, *NO_FOLDER) or Path(name).name != name or not (root / name).is_dir():
        there = sorted(p.name for p in root.glob("*") if p.is_dir()) or ["none"]
        raise FileNotFoundError(f"{run} has no checkpoint {tag!r}; in {root} there are: {', '.join(there)}")
    return root / name


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Float32 weights of a ZeRO checkpoint by module name: what trained, and what else it holds.

    In memory, by DeepSpeed's own function: that its converter writes shards since 0.15.2 is no matter here.

    Raises:
        ValueError: a shard is damaged, foreign, or would run code; the message names it.
    """
    from utils.engine import reading_shards

    with reading_shards(folder), contextlib.redirect_stdout(io.StringIO()):  # it tells its life to stdout
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def read_fp32(path: Path) -> dict[str, torch.Tensor]:
    """Weights that DeepSpeed's zero_to_fp32.py wrote: one file, or a folder with one file or with shards and index.

    Raises:
        FileNotFoundError: there are none. CheckpointError: a file cannot be read as weights; the message names it.
    """
    from model.weights import read_tensors, shards

    files = [path]
    if path.is_dir():
        index = next(iter(sorted(path.glob("*.index.json"))), None)
        files = shards(index) if index is not None else sorted(path.glob("*.bin")) + sorted(path.glob("*.safetensors"))
        if index is None and len(files) != 1:
            raise FileNotFoundError(f"{path} holds {len(files)} weight files and no index: one of either is needed")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    return dict(read_tensors(files))


def build_trained_model(args: TrainArgs, trained: dict[str, torch.Tensor]) -> READForCausalLM:
    """The run's model in float32, LoRA still on: the base with everything that trained replaced.

    Raises:
        ValueError: a tensor that trained is missing, or one is unexpected or of another shape; all are listed.
    """
    import torch

    from model import (
        READForCausalLM,
        add_lora,
        dequantize_language_model,
        quantize_language_model,
        set_trainable,
    )
    # Rounded from the same numbers as in training, that is from those of its dtype.
    dtype = torch_dtype(args.precision) if args.quantized else torch.float32
    model = READForCausalLM.from_pretrained(
        args.version, dtype=dtype, vision_tower=args.vision_tower, sam_checkpoint=args.vision_pretrained
    )
    if args.quantized:
        dequantize_language_model(quantize_language_model(model, args.quantized, "cpu")).float()
    args.configure(model.config)
    add_lora(model, **args.lora())
    set_trainable(model, args.train_mask_decoder)
    own = model.state_dict()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if args.quantized:  # with --save_frozen the checkpoint has the base's packed bits too, which are no weights
        trained = {name: tensor for name, tensor in trained.items() if name in wanted}
    complaints = [f"missing: {name}" for name in sorted(wanted - set(trained))]
    complaints += [f"unexpected: {name}" for name in sorted(set(trained) - set(own))]
    complaints += [
        f"{name}: {tuple(tensor.shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
        for name, tensor in trained.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if complaints:
        raise ValueError("the checkpoint does not fit the settings of its run:\n" + "\n".join(complaints))
    model.load_state_dict({**own, **trained}, strict=True)
    return model


if __name__ == "__main__":
    sys.exit(main())
