"""The tokenizer of READ: SentencePiece, with the whitespace behaviour the published weights were trained with (protocol §1).

transformers >= 4.34 tokenises around added tokens differently from 4.31, which changes the token *before* `[SEG]` and with it
the state that becomes the mask. Hence this thin class around the `sentencepiece` package: an added token swallows the blanks
and line breaks on both sides of it, and the text behind it begins afresh.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from .conversation import IM_END, IM_START, SEG_TOKEN
from .files import as_object, read_bytes, read_object, shown, write_json

READ_TOKENS = (SEG_TOKEN, IM_START, IM_END)
MODEL_FILE, ADDED_FILE, CONFIG_FILE = "tokenizer.model", "added_tokens.json", "tokenizer_config.json"


class ReadTokenizer:
    """A SentencePiece model and tokens added to it; padding is the unknown token, id 0."""

    def __init__(self, model_file: str | Path, added: dict[str, int] | None = None) -> None:
        self.model_file = Path(model_file)
        self.pieces = _read_pieces(self.model_file)
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
                # A row of the embedding that stands for no token (a vocabulary padded to a multiple of 64) is unknown.
                run.append(index if index < self.pieces.get_piece_size() else self.pad_token_id)
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
        write_json(folder / ADDED_FILE, self.added)
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
                  "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}  # fmt: skip
        write_json(folder / CONFIG_FILE, config)


def load_tokenizer(folder: str | Path) -> ReadTokenizer:
    """The tokenizer of a checkpoint folder (`tokenizer.model`, and `added_tokens.json` where tokens were added).

    Raises:
        FileNotFoundError: the folder has no `tokenizer.model`.
        ValueError: a file is damaged or something else, or tokens have no id of their own; the message names it.
    """
    folder = Path(folder)
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL_FILE}: READ needs the SentencePiece model of its base beside it")
    tokenizer = ReadTokenizer(folder / MODEL_FILE)
    tokenizer._set_added(_read_added(folder, tokenizer.pieces))
    return tokenizer


def _read_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model in a file."""
    data = read_bytes(file)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"{file} is no SentencePiece model, or a part of one: copy or download it again") from error
    if min(pieces.bos_id(), pieces.eos_id(), pieces.unk_id()) < 0:
        raise ValueError(f"{file} lacks <s>, </s> or <unk>: it is the SentencePiece model of another kind of tokenizer")
    return pieces


def _read_added(folder: Path, pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Tokens that were added to the SentencePiece model: those of `added_tokens.json`, and what newer tools list beside it.

    Raises:
        ValueError: the two lists disagree, or ids are no whole numbers, shared, those of pieces, or not consecutive.
    """
    size = pieces.get_piece_size()
    added: dict[str, int] = {}
    source: dict[int, tuple[str, Path]] = {}
    for file, token, index in _listed(folder):
        if type(index) is not int or index < 0:
            raise ValueError(f"{file}: the id of {shown(token)} must be a whole number, found {shown(index)}")
        piece = pieces.id_to_piece(index) if index < size else token
        if piece != token:
            raise ValueError(
                f"{file}: {token} has the id {index}, which is {shown(piece)} in {MODEL_FILE}; tokens that are added come after "
                f"its {size} pieces"
            )
        if index < size and file.name == CONFIG_FILE:
            continue  # <unk>, <s>, </s>, which are pieces
        other, where = source.get(index, (token, file))
        if other != token:
            raise ValueError(f"{file}: {token} has the id {index}, which {other} has in {where.name}: each token needs its own")
        if added.get(token, index) != index:
            raise ValueError(f"{file}: {token} has the id {index}, but {added[token]} in {CONFIG_FILE}: they must agree")
        added[token], source[index] = index, (token, file)
    behind = sorted(index for index in added.values() if index >= size)
    for after, index in enumerate(behind, size):
        if index != after:
            token, file = source[index]
            raise ValueError(f"{file}: {token} has the id {index}, but none has {after}: ids must go on from {size} without gaps")
    return added


def _listed(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, token, id) of every added token that the two files list, `added_tokens_decoder` of the config first."""
    file = folder / CONFIG_FILE
    if file.is_file():
        name = f"{file}: added_tokens_decoder"
        for key, fields in as_object(read_object(file).get("added_tokens_decoder") or {}, name).items():
            index = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
            yield file, as_text(as_object(fields, f"{name}, {key}").get("content"), f"{name}, {key}: content"), index
    file = folder / ADDED_FILE
    if file.is_file():
        for token, index in read_object(file).items():
            yield file, as_text(token, f"{file}: a token"), index


def as_text(value: Any, name: str) -> str:
    """`value`, which must be text that is not empty; ValueError begins with `name`."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, found {shown(value)}")
    return value


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
            f"tokenizer without {', '.join(missing)} ({tokenizer.model_file.parent / ADDED_FILE}): this is no READ checkpoint; "
            "train one from this base with train_read.py, or take the tokenizer that was saved with the weights"
        )
    return tuple(tokenizer.added[token] for token in READ_TOKENS)
