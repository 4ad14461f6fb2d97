"""The tokenizer of READ: SentencePiece, with the whitespace behaviour the published weights were trained with (protocol §1).

transformers >= 4.34 tokenises around added tokens differently from 4.31, which changes the token *before* `[SEG]` and with it
the state that becomes the mask. Hence this thin class around the `sentencepiece` package: an added token swallows the blanks
and line breaks on both sides of it, and the text behind it begins afresh.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from .conversation import IM_END, IM_START, SEG_TOKEN

READ_TOKENS = (SEG_TOKEN, IM_START, IM_END)
MODEL_FILE, ADDED_FILE, CONFIG_FILE = "tokenizer.model", "added_tokens.json", "tokenizer_config.json"


class ReadTokenizer:
    """A SentencePiece model and tokens added to it; padding is the unknown token, id 0."""

    def __init__(self, model_file: str | Path, added: dict[str, int] | None = None) -> None:
        self.model_file = Path(model_file)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.added: dict[str, int] = {}
        self.bos_token_id, self.eos_token_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.pad_token_id = self.pieces.unk_id()
        self._set_added(added or {})

    def _set_added(self, added: dict[str, int]) -> None:
        self.added = dict(sorted(added.items(), key=lambda item: item[1]))
        self.added_names = {index: token for token, index in self.added.items()}
        control = {self.pieces.id_to_piece(i): i for i in (self.bos_token_id, self.eos_token_id, self.pad_token_id)}
        self.whole = {**control, **self.added}
        added_pattern = "|".join(rf"\s*{re.escape(token)}\s*" for token in self.added)
        control_pattern = "|".join(re.escape(token) for token in control)
        self.split = re.compile("(" + "|".join(p for p in (added_pattern, control_pattern) if p) + ")")

    def __len__(self) -> int:
        return max([self.pieces.get_piece_size() - 1, *self.added.values()]) + 1

    def add_tokens(self, tokens: Iterable[str]) -> int:
        """Appends those that are new, in order; returns how many."""
        new = [token for token in tokens if token not in self.added]
        self._set_added(self.added | {token: len(self) + i for i, token in enumerate(new)})
        return len(new)

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a token by name; that of the unknown token if there is none."""
        return self.whole.get(token, self.pieces.piece_to_id(token))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, beginning with BOS unless told otherwise."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self.split.split(text):
            token = part.strip() if part.strip() in self.whole else part
            if token in self.whole:
                ids.append(self.whole[token])
            elif part:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, added tokens set off by blanks; `[SEG]` and its kind are no special tokens and stay."""
        parts: list[str] = []
        run: list[int] = []
        special = {self.bos_token_id, self.eos_token_id, self.pad_token_id}

        def flush() -> None:
            if run:
                parts.append(self._decode_run(run))
                run.clear()

        for index in map(int, ids):
            if index in self.added_names:
                flush()
                parts.append(self.added_names[index])
            elif index >= 0 and not (skip_special_tokens and index in special):
                run.append(index)
        flush()
        return " ".join(parts)

    def _decode_run(self, ids: list[int]) -> str:
        """Pieces between added tokens; control tokens are printed by name, the first blank of the text is dropped."""
        special = {self.bos_token_id, self.eos_token_id, self.pad_token_id}
        out, text = "", []
        for index in [*ids, None]:
            if index is None or index in special:
                out += self.pieces.decode(text) if text else ""
                out += self.pieces.id_to_piece(index) if index is not None else ""
                text = []
            else:
                text.append(index)
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model, the added tokens and a config in the released layout."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MODEL_FILE).resolve() != self.model_file.resolve():
            shutil.copyfile(self.model_file, folder / MODEL_FILE)
        (folder / ADDED_FILE).write_text(json.dumps(self.added, indent=2) + "\n")
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
                  "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> ReadTokenizer:
    """The tokenizer of a checkpoint folder (`tokenizer.model`, and `added_tokens.json` where tokens were added).

    Raises:
        FileNotFoundError: the folder has no `tokenizer.model`.
    """
    folder = Path(folder)
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL_FILE}: READ needs the SentencePiece model of its base beside it")
    added = json.loads((folder / ADDED_FILE).read_text()) if (folder / ADDED_FILE).is_file() else {}
    return ReadTokenizer(folder / MODEL_FILE, added)


def add_read_tokens(tokenizer: ReadTokenizer) -> tuple[int, int, int]:
    """Adds what is missing of `[SEG]`, `<im_start>`, `<im_end>`, in this order; returns their ids by name."""
    tokenizer.add_tokens(READ_TOKENS)
    return read_token_ids(tokenizer)


def read_token_ids(tokenizer: ReadTokenizer) -> tuple[int, int, int]:
    """Ids of `[SEG]`, `<im_start>`, `<im_end>`.

    Raises:
        ValueError: the tokenizer lacks one of them.
    """
    missing = [token for token in READ_TOKENS if token not in tokenizer.added]
    if missing:
        raise ValueError(
            f"tokenizer without {', '.join(missing)} ({tokenizer.model_file.parent}): this is no READ checkpoint; train one "
            "from this base with train_read.py, or take the tokenizer that was saved with the weights"
        )
    return tuple(tokenizer.added[token] for token in READ_TOKENS)
