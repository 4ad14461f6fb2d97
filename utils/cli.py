"""What `test_read.py`, `demo.py` and `app.py` have in common on the command line: which model, how it is loaded, how errors read.

Nothing heavy is imported here, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from utils.args import check_sasp, configure_sasp

if TYPE_CHECKING:
    from model import READForCausalLM, READProcessor

log = logging.getLogger(__name__)

DEFAULT_MODEL = "assets/read-mini-base"
IMAGE_LIMIT, MAX_MEGAPIXELS = "READ_MAX_MEGAPIXELS", 178
"""The environment variable that says how large an image may be, and what holds without it: Pillow's limit."""
LARGEST = 10**9
"""No count that a flag says is larger: it would overflow where it is used."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a model and how it is loaded. All default to None: the checkpoint decides."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--version", "--pretrained_model_path", dest="version", metavar="MODEL",
        help=f"folder or hub id of a READ, SESAME or LISA checkpoint (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    group.add_argument("--vision_tower", metavar="CLIP", help="CLIP folder or hub id; overrides the checkpoint's")
    group.add_argument("--preset", help="SasP and wording of a preset of model/presets.py instead of the checkpoint's")
    group.add_argument("--precision", choices=tuple(DTYPES), help="dtype (default: bf16 on a GPU, fp32 without)")
    bits = group.add_mutually_exclusive_group()
    for count in (8, 4):
        bits.add_argument(
            f"--load_in_{count}bit", dest="bits", action="store_const", const=count,
            help=f"keep the language model's blocks in {count} bits, for a smaller card",
        )  # fmt: skip
    group.add_argument("--attn_implementation", choices=("eager", "sdpa", "flash_attention_2"), default="sdpa")
    group.add_argument("--conv_type", choices=("llava_v1", "vicuna_v1"), help="wording of the system prompt")
    sasp = parser.add_argument_group("SasP: unless given, as the checkpoint was trained")
    sasp.add_argument("--sasp", action=argparse.BooleanOptionalAction, help="off: the [SEG] token alone, SESAME's path")
    sasp.add_argument("--num_points", type=positive, help="K, points a mask")
    sasp.add_argument("--t_pos", type=float, help="similarity from which on a point is foreground")
    sasp.add_argument("--t_neg", type=float, help="similarity up to which a point is background")
    sasp.add_argument("--down_sample", type=positive, help="averaging of the token grid before points are chosen")
    sasp.add_argument("--geometry", choices=("released", "exact"), help="place of the points")


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """The flag for the largest image that is read. It holds as soon as it is parsed, and for worker processes too."""
    parser.add_argument(
        "--max_megapixels", type=positive, action=_SetImageLimit, metavar="N",
        help=f"largest image that is read (default: {MAX_MEGAPIXELS}, or the environment variable {IMAGE_LIMIT})",
    )  # fmt: skip


def limit_images(megapixels: int) -> None:
    """Images of more than so many million pixels are not read, here and in processes that are started from now on."""
    os.environ[IMAGE_LIMIT] = str(megapixels)


def positive(text: str) -> int:
    """A whole number from 1 to a billion, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST}, found {text!r}")
    return number


def split_name(entry: str) -> tuple[str, str]:
    """(name, split) of an entry of --data, NAME|SPLIT; the name may be a path that holds a | itself."""
    name, _, split = entry.rpartition("|")
    if not name or not split:
        raise ValueError(f"--data takes NAME|SPLIT, for example 'ReasonSeg|val', found {entry!r}")
    return name, split


class _SetImageLimit(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        limit_images(values)


def load_model(options: argparse.Namespace, device: Any) -> tuple[READForCausalLM, READProcessor]:
    """The model and the processor that the flags of `add_model_flags` mean, on a torch device, in evaluation mode.

    Raises:
        OSError, ValueError: the checkpoint cannot be loaded; the message says why.
    """
    from model import READForCausalLM, READProcessor, quantize_language_model
    from model.checkpoint import note_on_points

    version = DEFAULT_MODEL if options.version is None else options.version  # "" is a mistake, not the default
    check_sasp(options)
    processor = READProcessor.from_pretrained(version, vision_tower=options.vision_tower)
    model = READForCausalLM.from_pretrained(
        version,
        dtype=torch_dtype(options.precision, device.type == "cuda"),
        attn_implementation=options.attn_implementation,
        vision_tower=options.vision_tower,
        preset=options.preset,
    )
    processor.check(model.config, version)
    configure_sasp(model.config, options)
    if options.preset is None and options.sasp is None and (note := note_on_points(version, model.config)):
        log.warning("%s: %s", version, note)
    if options.bits:
        quantize_language_model(model, options.bits, device)
    return model.requires_grad_(False).to(device), processor


def check_max_new_tokens(version: str, max_new_tokens: int, vision_tower: str | None = None) -> None:
    """Refuses answers for which the language model has no positions, from the checkpoint's config.json, before its weights load.

    A config that does not say its sizes passes: loading names what is wrong with it.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: `max_new_tokens` is no whole number from 1 to the positions that the image leaves.
    """
    from model.checkpoint import resolve_folder, tower_of
    from utils.files import read_object, whole_number

    whole_number(max_new_tokens, "--max_new_tokens")
    folder = resolve_folder(version)
    try:
        fields = read_object(folder / "config.json")
        text, vision = fields, {}
        if isinstance(llava := fields.get("llava"), dict):
            text, vision = llava["text_config"], llava["vision_config"]
        positions = whole_number(text.get("max_position_embeddings", 2048), "")  # LLaMA's number where the config has none
        if vision_tower or not vision:
            tower = read_object(tower_of(folder, vision_tower) / "config.json")
            vision = tower.get("vision_config", tower)
        patches = (whole_number(vision["image_size"], "") // whole_number(vision["patch_size"], "")) ** 2
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    check_answer_length(max_new_tokens, positions, patches)


def check_answer_length(max_new_tokens: int, positions: int, patches: int) -> None:
    """Refuses answers that leave no room for a question.

    Args:
        positions: most tokens of the language model, those of image, question and answer together.
        patches: tokens of an image.

    Raises:
        ValueError: with the longest answer that leaves room.
    """
    if max_new_tokens >= positions - patches:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a question: the model holds {positions} tokens, {patches} of "
            f"them for an image; give less than {positions - patches}, by as many as a question has"
        )


def torch_dtype(precision: str | None, on_gpu: bool = False) -> Any:
    """The dtype that --precision means; unless it is given, bf16 on a GPU and fp32 without."""
    import torch

    return getattr(torch, DTYPES[precision or ("bf16" if on_gpu else "fp32")])


class InputFault(SystemExit):
    """The end of a command whose input is at fault: exit status 2, and one line that says what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """The funnel that every entry script runs in: one line on stderr where the input is at fault, a traceback for our bugs.

    An OSError or a ValueError (CheckpointError is one) says what was found, what is wanted and what to do, and ends the program
    with status 2. Ctrl-C ends it with 130. With READ_DEBUG=1 every error keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows escapes, and stops nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # of `... | head`, which has ended
        sys.stderr.close()
        os._exit(141)
    except (OSError, ValueError) as error:
        if os.environ.get("READ_DEBUG") == "1":
            raise
        message = f"{program}: {one_line(error)}"
        print(message, file=sys.stderr, flush=True)
        raise InputFault(message) from error
    except KeyboardInterrupt:
        if os.environ.get("READ_DEBUG") == "1":
            raise
        print(f"{program}: stopped", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def one_line(error: BaseException, limit: int = 600) -> str:
    """An error as one line, for people who need no traceback; a list of a thousand keys is cut."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"  # not "[Errno 28] ..."
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = "; ".join(lines).replace(":; ", ": ") or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ... (READ_DEBUG=1 shows all)"
