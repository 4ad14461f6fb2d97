"""One picture, one question: READ answers in words, and with a mask for every [SEG] it writes.

    python demo.py --version runs/mini/merged --image photo.jpg --prompt "Which of these carries your books?"
    python demo.py --version runs/mini/merged                               asks for a picture, then for questions

Prints what the model sees, says and segments. Every answer gets a folder of its own,
VIS_SAVE_PATH/<picture>-<hash of its path>/<number>-<question>, so that nothing is ever overwritten:

    mask.png         0 / 255, size of the picture; mask_2.png, ... if the answer has several [SEG]
    similarity.png   what the [SEG] is similar to, as heat over the picture; similarity_2.png, ...
    overlay.png      masks and the points that prompted them, with a legend
    panel.png        all of it side by side, under question and answer
    answer.json      the answer, presence, points and scores
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import (
    DEFAULT_MODEL,
    add_image_flags,
    add_model_flags,
    check_max_new_tokens,
    load_model,
    one_line,
    plain_errors,
)
from utils.conversation import text_faults
from utils.files import short_name, write_json
from utils.outputs import check_writable

if TYPE_CHECKING:
    import numpy as np

    from model import Answer, EncodedImages
    from utils.conversation import Turns

QUIT = ("quit", "exit", "q")
LONGEST_NAME = 255
"""Bytes of a file name."""
SURROGATE = re.compile(r"[\ud800-\udfff]")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--image", help="picture to ask about; unless given, you are asked for one")
    parser.add_argument("--prompt", action="append", help="question; may be repeated; unless given, you are asked")
    parser.add_argument("--vis_save_path", default="runs/demo", help="where pictures and answers go (default: runs/demo)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--force_segment", action=argparse.BooleanOptionalAction, default=False,
        help="segment even if the answer has no [SEG], as if one stood at its end",
    )  # fmt: skip
    parser.add_argument(
        "--history", action=argparse.BooleanOptionalAction, default=False,
        help="later questions about a picture see the earlier ones (segmentation is trained on single questions)",
    )  # fmt: skip
    add_image_flags(parser)
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Asks, or is asked; see the module's docstring."""
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    with plain_errors("demo.py"):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Everything after the command line. What can be refused is refused first: it is quick, and loading a model is not."""
    from utils.image import read_image

    prompts = [decoded(prompt) for prompt in options.prompt or []]
    for prompt in prompts:
        check_question(prompt, "--prompt: ")
    image = read_image(options.image) if options.image is not None else None
    check_writable(Path(options.vis_save_path), "--vis_save_path")
    version = DEFAULT_MODEL if options.version is None else options.version
    check_max_new_tokens(version, options.max_new_tokens, options.vision_tower)
    demo = Demo(options)
    if image is None or not prompts:
        return chat(demo, options.image, image, prompts)
    for prompt in prompts:
        demo.ask(options.image, image, prompt)
    return 0


def chat(demo: Demo, path: str | None, picture: np.ndarray | None, prompts: list[str]) -> int:
    """Reads pictures and questions until there are no more. An empty question goes on to the next picture."""
    from utils.image import read_image

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text end nothing; `check_question` names them
    print("An empty question asks for another picture; `quit` ends.")
    while True:
        while picture is None:
            path = listen("picture> ")
            if path is None:
                return 0
            try:
                picture = read_image(os.path.expanduser(path))
            except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
                print(one_line(error))
        demo.forget()
        while prompt := (prompts.pop(0) if prompts else listen("question> ")):
            try:
                check_question(prompt)
                demo.ask(path, picture, prompt)
            except (OSError, ValueError) as error:
                print(one_line(error))
        if prompt is None:
            return 0
        picture = None


def listen(prompt: str) -> str | None:
    """What was typed, stripped; None at the end of the input or on `quit`."""
    try:
        text = decoded(input(prompt)).strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        raise
    return None if text.lower() in QUIT else text


def decoded(text: str) -> str:
    """Text that was typed. Where the locale knows ASCII alone, other bytes come as halves of surrogate pairs: these are UTF-8."""
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8") if SURROGATE.search(text) else text
    except UnicodeError:
        return text


def check_question(text: str, where: str = "") -> None:
    """Refuses a question that is empty or holds a mark of the prompt format.

    Raises:
        ValueError: beginning with `where`.
    """
    if faults := text_faults(text):
        raise ValueError(f"{where}the question {faults[0]}")


class Demo:
    """A loaded model that answers, prints and draws."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from model import READPredictor

        self.options = options
        self.version = DEFAULT_MODEL if options.version is None else options.version
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.predictor = READPredictor(*load_model(options, device), options.conv_type)
        self.turns: Turns = []
        self.shown: tuple[np.ndarray, EncodedImages] | None = None
        """The picture asked about last, and what the model knows of it."""

    def forget(self) -> None:
        """Begins a new conversation."""
        self.turns = []

    def ask(self, path: str, picture: np.ndarray, prompt: str) -> Path:
        """Answers one question about a picture (H, W, 3) uint8 RGB; prints, writes, returns the folder written.

        Raises:
            ValueError: the conversation is too long. OSError: the answer, which was printed, could not be written.
        """
        answer = self.answer(picture, prompt)
        if self.options.history:
            self.turns.append((prompt, answer.text))
        folder = new_folder(Path(self.options.vis_save_path), path, prompt)
        try:
            record = self.write(folder, path, picture, prompt, answer)
        except OSError:  # a full disk, say: the answer itself is not lost
            print(f"Say:     {answer.text}")
            raise
        print_answer(record, folder)
        return folder

    def answer(self, picture: np.ndarray, prompt: str) -> Answer:
        """The model's own answer to one question; a picture asked about again is not looked at again."""
        if self.shown is None or self.shown[0] is not picture:
            self.shown = (picture, self.predictor.encode([picture]))
        out = self.predictor.generate(
            self.shown[1], [[*self.turns, (prompt, None)]], [0], max_new_tokens=self.options.max_new_tokens,
            force_segment=self.options.force_segment,
        )  # fmt: skip
        return self.predictor.answers(out, [picture.shape[:2]])[0]

    def write(self, folder: Path, path: str, picture: np.ndarray, prompt: str, answer: Answer) -> dict[str, Any]:
        """Pictures and answer.json; returns what the latter holds."""
        from utils import visualize

        segments = visualize.segments_of(answer)
        entries = []
        for m, segment in enumerate(segments):
            suffix = "" if m == 0 else f"_{m + 1}"
            visualize.mask_image(segment).save(folder / f"mask{suffix}.png")
            visualize.similarity_image(picture, segment).save(folder / f"similarity{suffix}.png")
            entries.append(
                {
                    "mask": f"mask{suffix}.png",
                    "similarity": f"similarity{suffix}.png",
                    "pixels": int(segment.mask.sum()),
                    "share": float(segment.mask.mean()),
                    "score": float(answer.scores[m]),
                    "points": segment.points.round(3).tolist(),
                    "point_labels": segment.labels.tolist(),
                }
            )
        if segments:
            visualize.overlay_image(picture, segments).save(folder / "overlay.png")
        visualize.panel_image(picture, prompt, answer.text, segments).save(folder / "panel.png")
        record = {
            "image": str(Path(path).resolve()),
            "prompt": prompt,
            "answer": answer.text,
            # Presence as evaluation counts it: [SEG] was written, and the mask of the first is not empty.
            "exists": bool(entries) and not answer.forced and entries[0]["pixels"] > 0,
            "forced": answer.forced,
            "segments": entries,
            "model": self.version,
            "conv_type": self.predictor.conv_type,
            "sasp": dataclasses.asdict(self.predictor.model.config.sasp),
        }
        write_json(folder / "answer.json", record)
        return record


def print_answer(record: dict[str, Any], folder: Path) -> None:
    """The See, Say and Segment lines."""
    if record["exists"]:
        see = "yes"
    elif record["segments"] and not record["forced"]:
        see = "no, [SEG] was written but its mask is empty"
    else:
        see = "no"
    print(f"See:     {see}")
    print(f"Say:     {record['answer']}")
    if not record["segments"]:
        print("Segment: no [SEG] was produced; --force_segment asks for a mask anyway")
    elif record["forced"]:
        print("Segment: no [SEG] was produced; the mask is that of a [SEG] at the end of the answer (--force_segment)")
    for entry in record["segments"]:
        labels = entry["point_labels"]
        points = (
            f"{len(labels)} points ({labels.count(1)} object, {labels.count(0)} background, {labels.count(-1)} neutral)"
            if labels
            else "no points (SasP is off)"
        )
        print(f"Segment: {entry['mask']}, {100 * entry['share']:.1f} % of the picture, {points}")
    print(f"Written: {folder}")


def new_folder(root: Path, image: str, prompt: str) -> Path:
    """A folder that did not exist before, for one answer about one picture.

    Two pictures of one name are told apart by the hash of their absolute paths, two answers by their number.
    """
    absolute = Path(os.path.expanduser(image)).resolve()
    digest = hashlib.sha1(str(absolute).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    parent = root / f"{short_name(absolute.name, LONGEST_NAME - 9)}-{digest}"
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "question"
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for entry in parent.iterdir() if (m := re.match(r"(\d+)-", entry.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / f"{number:02d}-{words}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another process was quicker
            number += 1


if __name__ == "__main__":
    sys.exit(main())
