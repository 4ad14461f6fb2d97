"""LLaVA-Instruct: dialogues about a picture without any mask (protocol §2, VQA)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from utils.conversation import IMAGE_TOKEN
from utils.image import read_image

from .types import Sample


class VqaTraining:
    """Dialogues of `llava_dataset/<name>.json` about pictures of `coco/train2017`, each with all its turns."""

    def __init__(self, dataset_dir: str | Path, name: str = "llava_instruct_150k") -> None:
        self.file = Path(dataset_dir) / "llava_dataset" / f"{name}.json"
        self.image_dir = Path(dataset_dir) / "coco/train2017"
        for needed in (self.file, self.image_dir):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} does not exist: vqa needs it (--dataset_dir {dataset_dir})")
        try:
            self.items: list[dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.file} is no JSON: {error}") from error
        if not isinstance(self.items, list) or not self.items:
            raise ValueError(f"{self.file} must be a list of dialogues, and not an empty one")
        self.name = name

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, rng: np.random.Generator) -> Sample:
        """A random dialogue as one conversation, without masks.

        Raises:
            ValueError: a dialogue is not of the format; the message names the file, its number and the field.
            FileNotFoundError: its picture is not on disk.
        """
        number = int(rng.integers(len(self.items)))
        turns, path = self.turns(number), self.picture(number)
        image = read_image(path)
        return Sample(
            image_path=str(path),
            image=image,
            conversations=[turns],
            masks=np.zeros((0, *image.shape[:2]), np.uint8),
            exists=[False],
            questions=[turns[0][0]],
            meta={"dataset": self.name, "split": "train", "id": self.items[number].get("id", number)},
        )

    def picture(self, number: int) -> Path:
        """Where the picture of a dialogue is; some releases write coco/train2017/ in front of its name."""
        return self.image_dir / Path(self.items[number]["image"]).name

    def turns(self, number: int) -> list[tuple[str, str | None]]:
        """(question, answer) pairs; a leading answer without a question is dropped, the picture's mark taken out."""
        where = f"{self.file}, dialogue {number}"
        try:
            said = [
                (turn["from"], turn["value"].replace(IMAGE_TOKEN, "").strip())
                for turn in self.items[number]["conversations"]
            ]
            self.items[number]["image"].split()
        except KeyError as field:
            raise ValueError(f"{where} lacks the field {field}") from field
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no LLaVA-Instruct dialogue: {error}") from error
        if said and said[0][0] != "human":
            said = said[1:]
        speakers = [speaker for speaker, _ in said]
        if not said or len(said) % 2 or speakers != ["human", "gpt"] * (len(said) // 2):
            raise ValueError(
                f"{where}: conversations must alternate between human and gpt, found {', '.join(speakers) or 'none'}"
            )
        texts = [text for _, text in said]
        return list(zip(texts[::2], texts[1::2], strict=True))
