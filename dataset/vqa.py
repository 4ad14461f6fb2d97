"""LLaVA-Instruct: dialogues about a picture without any mask (protocol §2, VQA).

    llava_dataset/<name>.json    [{"id": ..., "image": "000000000001.jpg", "conversations": [{"from": "human", "value": "..."},
                                 {"from": "gpt", "value": "..."}, ...]}, ...], or JSON lines of such records (also <name>.jsonl)
    coco/train2017/<image>       `train2017/` or `coco/train2017/` may stand in front of the name, with / or \\

A dialogue is about one picture of that folder; `<image>` stands in its first question, or nowhere. Human and gpt take turns, and
gpt has the last word; a leading answer without a question is dropped. The turn with `<image>` is stripped of blanks when that is
taken out, all others stay as they are written.

LLaVA's mixtures hold other dialogues too: without a picture, or about one of another folder, of which an equal name here would be
a wrong picture. Such a dialogue, and one that is broken, is left out and named when the set is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.conversation import CONTROL, IMAGE_TOKEN, text_faults
from utils.files import parse_json, read_jsonl, read_text, shown, some_of
from utils.image import read_image

from .types import Sample

log = logging.getLogger(__name__)

FOLDERS = ([], ["train2017"], ["coco", "train2017"])
"""What may stand in front of a picture's name."""
LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""
SHOWN = 3
"""So many dialogues that are left out are told, the rest is counted."""


class Foreign(ValueError):
    """A dialogue that is whole, but of another kind: without a picture, with several, of another folder, with a system turn."""


@dataclass(slots=True)
class Dialogue:
    """One dialogue about one picture."""

    turns: list[tuple[str, str]]
    """(question, answer) pairs, the picture's mark taken out."""
    image: str
    """Name in coco/train2017."""
    number: Any
    """The record's id, or its place in the file."""


@dataclass
class Dialogues:
    """What a file holds."""

    usable: list[Dialogue] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Of each dialogue that is left out, where it is and why."""


def find_files(dataset_dir: str | Path, name: str) -> tuple[Path, Path]:
    """(file of dialogues, folder of pictures).

    Raises:
        FileNotFoundError: one is not there; the message names it.
    """
    file, image_dir = Path(dataset_dir) / "llava_dataset" / f"{name}.json", Path(dataset_dir) / "coco/train2017"
    if not file.exists() and (lines := file.with_name(f"{name}.jsonl")).is_file():
        file = lines
    for needed in (file, image_dir):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} does not exist: vqa needs it (--dataset_dir {dataset_dir})")
    return file, image_dir


def read_dialogues(file: Path) -> Dialogues:
    """All dialogues of a file.

    Raises:
        ValueError: it is no list of dialogues, or none of them can be used; the message names file, dialogue and field.
    """
    found = Dialogues()
    count = 0
    for number, where, record in _records(file):
        count += 1
        try:
            found.usable.append(_dialogue(record, number))
        except Foreign as error:
            found.foreign.append(f"{where}: {error}")
        except ValueError as error:
            found.broken.append(f"{where}: {error}")
    if not count:
        raise ValueError(f"{file} must be a list of dialogues, and not an empty one")
    if not found.usable:
        left_out = found.broken + found.foreign
        raise ValueError(f"{file}: none of its {count} dialogues can be used: {some_of(left_out, SHOWN)}")
    return found


def _records(file: Path) -> Iterator[tuple[int, str, Any]]:
    """(place, name for messages, record) of each dialogue."""
    text = read_text(file)
    if file.suffix == ".jsonl" or (text.lstrip().startswith("{") and len(text.split("\n", 2)) > 1):
        try:
            records = None if file.suffix == ".jsonl" else parse_json(text, str(file))
        except ValueError:  # several values, one a line
            records = None
        if records is None:
            yield from ((number, f"line {number}", record) for number, record in read_jsonl(file))
            return
    else:
        records = parse_json(text, str(file))
    if not isinstance(records, list):
        raise ValueError(f"{file} must be a list of dialogues, found {shown(records)}")
    yield from ((number, f"dialogue {number}", record) for number, record in enumerate(records))


def _dialogue(record: Any, number: int) -> Dialogue:
    """ValueError says what is wrong with a record; the caller knows which it is."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object {{...}}, found {shown(record)}")
    for name in ("image", "conversations"):
        if name not in record:
            fault = f"lacks the field {name!r}"
            raise Foreign(f"{fault}: it is about no image") if name == "image" else ValueError(fault)
    return Dialogue(_turns(record["conversations"]), _image(record["image"]), record.get("id", number))


def _image(image: Any) -> str:
    if image is None:
        raise Foreign("has the image null: it is about no image")
    if isinstance(image, list):
        raise Foreign(f"has a list of {len(image)} images, and one is wanted")
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"image: must be a file name, found {shown(image)}")
    *folders, name = image.removeprefix("./").replace("\\", "/").split("/")
    if folders not in FOLDERS:
        raise Foreign(f"has an image of another folder than coco/train2017: {shown(image)}")
    if name in ("", ".", "..") or CONTROL.search(name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"image: is no file name: {shown(image)}")
    return name


def _turns(said: Any) -> list[tuple[str, str]]:
    if not isinstance(said, list) or not said:
        raise ValueError(f"conversations: must be a list of turns, found {shown(said)}")
    speakers, texts = [], []
    for number, turn in enumerate(said):
        if not isinstance(turn, dict):
            raise ValueError(f"conversations[{number}]: must be an object {{...}}, found {shown(turn)}")
        for name in ("from", "value"):
            if name not in turn:
                raise ValueError(f"conversations[{number}] lacks the field {name!r}")
        if not isinstance(turn["value"], str):
            raise ValueError(f"conversations[{number}].value: must be text, found {shown(turn['value'])}")
        speakers.append(turn["from"])
        texts.append(turn["value"])
    if speakers[0] == "gpt":
        del speakers[0], texts[0]
    if speakers and speakers[0] == "system":
        raise Foreign("has a system turn, and READ's prompts have a system text of their own")
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        told = ", ".join(map(str, speakers[:6])) + ", ..." * (len(speakers) > 6)
        raise ValueError(f"conversations must alternate between human and gpt, found {shown(told)}")
    if any(IMAGE_TOKEN in text for text in texts[1:]):
        raise ValueError(f"conversations: {IMAGE_TOKEN} must stand in the first question alone")
    if IMAGE_TOKEN in texts[0]:
        texts[0] = texts[0].replace(IMAGE_TOKEN, "").strip()
    # All at once, which is quick; no mark goes beyond a line.
    if text_faults("\n".join(texts)) or not all(map(str.strip, texts)):
        for number, text in enumerate(texts, len(said) - len(texts)):
            if faults := text_faults(text):
                raise ValueError(f"conversations[{number}].value: {'; '.join(faults)}")
    return list(zip(texts[::2], texts[1::2], strict=True))


class VqaTraining:
    """Dialogues about pictures to learn from, each with all its turns. What cannot be used is told in one warning.

    Raises:
        FileNotFoundError: the set is not on disk. ValueError: no dialogue of it can be used; the message names the file.
    """

    def __init__(self, dataset_dir: str | Path, name: str = "llava_instruct_150k") -> None:
        self.name = name
        self.file, self.image_dir = find_files(dataset_dir, name)
        found = read_dialogues(self.file)
        self.dialogues = found.usable
        if left_out := found.broken + found.foreign:
            count = len(left_out) + len(self.dialogues)
            log.warning("%s: %d of %d dialogues are left out: %s", self.file, len(left_out), count, some_of(left_out, SHOWN))

    def __len__(self) -> int:
        return len(self.dialogues)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random dialogue as one conversation, without masks.

        Raises:
            FileNotFoundError, ValueError: its picture is not on disk, or damaged.
        """
        dialogue = self.dialogues[rng.integers(len(self.dialogues))]
        path = self.image_dir / dialogue.image
        image = read_image(path)
        return Sample(
            image_path=str(path),
            image=image,
            conversations=[list(dialogue.turns)],
            masks=np.zeros((0, *image.shape[:2]), np.uint8),
            exists=[False],
            questions=[dialogue.turns[0][0]],
            meta={"dataset": self.name, "split": "train", "id": dialogue.number},
        )
