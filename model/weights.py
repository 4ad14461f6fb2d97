"""Weight files from anywhere: which files a folder has, their tensors under plain names, and a name for all that is in them.

    files = weight_files(resolve_folder(path))    safetensors or .bin, one file or shards
    for name, tensor in read_tensors(files): ...  mapped from disk; no code in the files is ever run
    digest(files)                                 of every byte of the tensors, kept beside the files

What training scripts put around weights is taken off where it can mean one thing only: a dictionary such as
`{"state_dict": ...}`, and the names of wrappers in front of every key (`module.`, `_orig_mod.`, `base_model.model.`). Whatever
else a file holds is named in one `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from utils.files import not_content, read_object, shown, write_json

log = logging.getLogger(__name__)

DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Tensors of old checkpoints that are computed today."""
HOLDERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the weights among other things."""
PREFIXES = ("module.", "base_model.model.")
"""What DataParallel, DeepSpeed and PEFT put in front of every name."""
INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointing put into names; READ has no module that is called so."""
LORA = re.compile(r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save)\.")
CACHE = ".read-fingerprint.json"
"""The file beside weights that keeps their digest."""
SETTLED_S = 2.0
"""A file that was changed less than so many seconds ago may change again within one tick of its file system's clock."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, with every reason found."""


# ------------------------------------------------------------------------------------------------ folders


def resolve_folder(path: str | Path) -> Path:
    """A local folder as it is, or the snapshot of a hub id.

    Raises:
        CheckpointError: it is a file, or there is no such folder or repository.
    """
    if not str(path).strip():
        raise CheckpointError("the name of a model (--version) or tower (--vision_tower) is empty: give its folder or hub id")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{path} is a file: a model is a folder with config.json and its weights (a SAM file is given with "
            "--vision_pretrained)"
        )
    if len(folder.parts) > 2 or str(path).startswith((".", "/")):
        raise CheckpointError(f"checkpoint folder {path} does not exist")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a folder here nor a repository that the hub gave us ({type(error).__name__}: {error})"
        ) from error


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing, no JSON object, or holds a number that is NaN or infinite.
    """
    try:
        fields = read_object(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if found := _not_finite(fields):
        raise CheckpointError(f"{file}: {found} is no finite number")
    return fields


def _not_finite(value: Any, name: str = "") -> str | None:
    """Where a JSON value holds NaN or infinity."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return next((found for key, entry in items if (found := _not_finite(entry, f"{name}.{key}"))), None)
    return name.removeprefix(".") if isinstance(value, float) and not math.isfinite(value) else None


def refuse_other_folders(folder: Path) -> None:
    """Refuses a folder of another kind that people take for a model.

    Raises:
        CheckpointError: a training run, or an adapter; with what to do.
    """
    if (folder / "ckpt_model").is_dir() and (folder / "config.json").is_file() and "train" in read_fields(folder / "config.json"):
        raise CheckpointError(f"{folder} is a training run, not a model: merge it first: bash merge_lora_weight.sh {folder} OUT")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model: peft loads it over its base, and merge_lora_weight.sh RUN OUT makes a "
            "model of the run it is from"
        )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before .bin, one file or the shards that the index names.

    Raises:
        CheckpointError: there are none, some are missing, or the index is unusable.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return shards(index)
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    refuse_other_folders(folder)
    raise CheckpointError(
        f"{folder} is incomplete: no model.safetensors, pytorch_model.bin or an index of shards in it"
    )


def shards(index: Path) -> list[Path]:
    """The files that an index names, all in its own folder.

    Raises:
        CheckpointError: the index has no table of names, names a place elsewhere, or a file that is not there.
    """
    names = read_fields(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map must be an object that names a file for each tensor, found {shown(names)}")
    for key, name in names.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name) or len(name.encode()) > 255:
            raise CheckpointError(f"{index}: {key} must be in a file of the same folder, found {shown(name)}")
    files = [index.parent / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        told = shown(", ".join(missing), limit=300)
        raise CheckpointError(f"{index.parent} is incomplete: {index.name} names files that are not there: {told}")
    return files


# ------------------------------------------------------------------------------------------------ tensors


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor, file by file, mapped from disk. No code in the files is ever run.

    Raises:
        CheckpointError: a file is damaged, something else, or holds what is no weight.
    """
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            with _opened(file) as tensors:
                for key, name in plain_names(tensors.keys(), file).items():
                    with _parsing(file):
                        tensor = tensors.get_tensor(key)
                    yield name, tensor
        else:
            state = _read_pickle(file)
            for key, name in plain_names(state, file).items():
                yield name, state[key].detach()


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, without loading the values of safetensors.

    Raises:
        CheckpointError: as `read_tensors`, or two files hold tensors of one name and different shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            with _opened(file) as tensors, _parsing(file):
                names = plain_names(tensors.keys(), file)
                found = {name: tuple(tensors.get_slice(key).get_shape()) for key, name in names.items()}
        else:
            found = {name: tuple(tensor.shape) for name, tensor in read_tensors([file])}
        for name in found.keys() & shapes.keys():
            if found[name] != shapes[name]:
                raise CheckpointError(f"{file} holds {name} as {found[name]}, another file of this checkpoint as {shapes[name]}")
        shapes |= found
    return shapes


@contextlib.contextmanager
def _parsing(file: Path) -> Iterator[None]:
    """Names the file in whatever its parser raises."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # for bytes that are no weights, parsers of pickles raise any error there is
        raise CheckpointError(f"{file} cannot be read as weights: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """A parser's error in one sentence, without torch's advice to load the file with its code."""
    again = "copy or download it again"
    text = (str(error).splitlines() or [""])[0]
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it asks for {found[1]}, which is code, and no code of a file is run here; weights are plain tensors, as "
            "torch.save(model.state_dict(), ...) writes them"
        )
    if "TorchScript" in text:
        return "it is a TorchScript program, not weights: have its state_dict() saved"
    if "Weights only load failed" in text or not isinstance(error, OSError | RuntimeError | SafetensorError):
        return f"it is damaged, or no file that torch.save wrote: {again}"
    text = text.removeprefix("Error while deserializing header: ").partition(". This is an internal")[0].rstrip(".")
    return text if isinstance(error, OSError) else f"{text}: {again}"


def _check_head(file: Path) -> bytes:
    """The first bytes of a file that is there and holds something."""
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, not a file of weights")
    with _parsing(file), file.open("rb") as opened:
        head = opened.read(512)
    if fault := not_content(head):
        raise CheckpointError(f"{file} cannot be read as weights: it {fault}")
    return head


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped."""
    _check_head(file)
    with _parsing(file):
        tensors = safe_open(file, framework="pt")
    with tensors:
        yield tensors


def load_pickle(file: Path) -> Any:
    """What is in a file of torch.save, mapped if it can be; only tensors and plain values, no code is run.

    Raises:
        CheckpointError: it is damaged, or something else.
    """
    zipped = _check_head(file).startswith(b"PK\x03\x04")  # torch < 1.6 wrote another format, which cannot be mapped
    with _parsing(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd files, which the error says better
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, by the names they have in it."""
    found = load_pickle(file)
    for _ in range(len(HOLDERS)):
        holders = [key for key in HOLDERS if isinstance(found, dict) and isinstance(found.get(key), dict)]
        if len(holders) > 1:
            raise CheckpointError(f"{file} holds {' and '.join(holders)}, and weights may be in either: save those alone")
        if not holders:
            break
        _note(f"{file}: the weights are taken from its field {holders[0]!r}")
        found = found[holders[0]]
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {_kind(found)}, not tensors by name: save model.state_dict()")
    if {"state", "param_groups"} <= found.keys():
        raise CheckpointError(f"{file} holds the state of an optimizer, not weights")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file} holds {_kind(value)} under {shown(key)}, not only tensors: save model.state_dict()")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{file}: {key} is a tensor without plain values ({value.layout}, {value.device.type})")
    return found


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def plain_names(keys: Iterable[str], file: Path) -> dict[str, str]:
    """Key in the file -> name of the tensor without the names of wrappers.

    Raises:
        CheckpointError: there are no tensors, only some have a wrapper's name in front, or two have one name.
    """
    names = {key: INSERTED.sub("", key) for key in keys}
    if not names:
        raise CheckpointError(f"{file} holds no tensors")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    if odd := [name for name in names.values() if name.startswith(PREFIXES)]:
        raise CheckpointError(
            f"{file}: {len(odd)} of {len(names)} names have a wrapper's name in front ({odd[0]}), the others have not: save the "
            "weights of one model"
        )
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        raise CheckpointError(f"{file} holds {twice[0]} twice, with and without a wrapper's name in it")
    key, name = next(iter(names.items()))
    if key != name:
        _note(f"{file}: names of wrappers are taken off, {key} is read as {name}")
    return names


@functools.cache
def _note(message: str) -> None:
    """Logs a message once, however often the file is read."""
    log.info("%s", message)


# ------------------------------------------------------------------------------------------------ a name for the content


def digest(files: list[Path]) -> str:
    """A name for tensors: of all their names, dtypes, shapes and bytes, however they are spread over files, and in which format.

    It is kept beside the files with their names, sizes and times of change, so that it is computed once. A file whose bytes were
    changed with the same size and time of change is not noticed.
    """
    state = [[file.name, stat.st_size, stat.st_mtime_ns] for file in files for stat in [os.stat(file)]]
    cache = files[0].parent / CACHE
    name = ", ".join(file.name for file in files)
    try:
        kept = read_object(cache)
    except (OSError, ValueError):
        kept = {}
    entry = kept.get(name)
    if isinstance(entry, dict) and entry.get("files") == state and isinstance(entry.get("digest"), str):
        return entry["digest"]
    log.info("reading all of %s once, to give the weights a name", files[0].parent)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = sorted(pool.map(_tensor_digest, read_tensors(files)))
    whole = hashlib.blake2b(b"".join(digests), digest_size=20).hexdigest()
    if max(changed for *_, changed in state) < (time.time() - SETTLED_S) * 1e9:
        with contextlib.suppress(OSError):  # a folder that cannot be written is read in full every time
            write_json(cache, kept | {name: {"files": state, "digest": whole}})
    return whole


def _tensor_digest(item: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = item
    if DERIVED.search(name):
        return b""
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())  # processors have instructions for it
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.digest()


def digest_of_values(*values: Any) -> str:
    """A name for bytes and JSON values, the same however the JSON was spaced or ordered."""
    whole = hashlib.blake2b(digest_size=20)
    for value in values:
        part = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        whole.update(f"{len(part)} ".encode() + part)
    return whole.hexdigest()
