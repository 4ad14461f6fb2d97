"""SAM's image features kept on disk: the encoder never trains, so each picture has to go through it only once.

    model.cache_sam_features("runs/sam_features")      from here on `encode_sam_image` looks there first

An entry is FOLDER/<encoder>/<two digits>/<picture>.safetensors. <picture> is the SHA-256 of SAM's normalised square, hence of
the pixels and of all preprocessing; <encoder> that of the encoder's weights and of what else decides its numbers. So nothing
has to be cleared when pictures or weights change: what is old is not found. What is found is used only if its own checksum
agrees, else it is computed and written anew.

Cost for a 1024 x 1024 view, on one core of a small machine: its hash takes 10 ms in fp32 and 5 ms in bf16, a hit in all 25 ms
and 13 ms. An entry has 4 MB or 2 MB, and no entry is ever deleted. The weights are hashed once a process: 2 to 4 s for the
2.5 GB of ViT-H in fp32.

Legend: B pictures · S side of SAM's square · C = 256 channels · hw grid of the image embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from .sam_attention import arithmetic

log = logging.getLogger(__name__)

VERSIONS = {"torch": torch.__version__, "segment-anything": version("segment-anything")}


class SamFeatureCache:
    """Features of frozen image encoders in a folder that any number of processes may share.

    They are what the encoder gives for the picture alone, bit for bit on the same kind of processor with as many threads.

    Weights that are loaded, moved or replaced later are noticed: torch counts what is written to a tensor, and memory that was
    hashed is held until the next look, so that its address cannot come to hold others. Only what is written through
    `tensor.data` is counted nowhere: do not do that to a frozen encoder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hits = 0
        """Pictures whose features came from disk."""
        self.misses = 0
        """Pictures that went through the encoder."""
        self.bad = 0
        """Those of them that had an entry which was damaged."""
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}
        self._weights = ""
        self._writes = True
        self._told = False

    def __str__(self) -> str:
        return f"SAM features: {self.hits} from {self.folder}, {self.misses} computed ({self.bad} for damaged entries)"

    @torch.no_grad()
    def encode(self, encoder: nn.Module, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Features (B, C, h, w) of SAM's image encoder, dtype and device as it gives them.

        Pictures that are not on disk are encoded one by one: in a batch a picture's last bits depend on its neighbours, and
        an entry must not. Where there is an `obstacle`, nothing is cached.
        """
        if reason := obstacle(encoder):
            if not self._told:
                log.warning("SAM features are not cached: %s", reason)
            self._told = True
            return encoder(images_B3SS)
        folder = self.folder / self.fingerprint(encoder)
        return torch.stack([self._features(encoder, image, folder) for image in images_B3SS])

    def fingerprint(self, encoder: nn.Module) -> str:
        """Name of an encoder: changes with weights, dtype, versions, code, and the kind of processor and arithmetic.

        Sizes that are in no shape (heads, windows) follow from those that are, see `infer_sam_config`.
        """
        device = next(encoder.parameters()).device
        on_gpu = device.type == "cuda"
        settings = {
            "weights": self._hash_of_weights(encoder),
            "versions": VERSIONS,
            "blocks": arithmetic(encoder),
            "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "float32": _float32_arithmetic(),
            "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        }
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def _hash_of_weights(self, encoder: nn.Module) -> str:
        """Hash of all tensors by name, made again only when one was replaced, moved or written to."""
        tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
        if tensors.keys() != self._seen.keys() or any(_differs(t, *self._seen[name]) for name, t in tensors.items()):
            whole = hashlib.sha256()
            for name, tensor in tensors.items():
                _add(whole, name, tensor)
            self._weights = whole.hexdigest()
            # Holding the memory keeps its address from being given to other weights.
            self._seen = {name: (tensor.detach(), tensor._version) for name, tensor in tensors.items()}
        return self._weights

    def _features(self, encoder: nn.Module, image_3SS: torch.Tensor, folder: Path) -> torch.Tensor:
        """(C, h, w) of one picture, from disk or computed and put there."""
        whole = hashlib.sha256()
        _add(whole, "image", image_3SS)
        key = whole.hexdigest()
        file = folder / key[:2] / f"{key}.safetensors"
        features = self._read(file)
        if features is not None:
            self.hits += 1
            return features.to(image_3SS.device)
        self.misses += 1
        features = encoder(image_3SS[None])[0]
        self._write(file, features)
        return features

    def _read(self, file: Path) -> torch.Tensor | None:
        """The entry (C, h, w) on the CPU; None if there is none, or none that can be trusted."""
        try:
            # Read in one piece: a memory map of a file that is cut while it is mapped would end the process.
            entry = load(file.read_bytes())
            if torch.equal(entry["sha256"], _checksum(file, entry["features"])):
                return entry["features"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # a damaged file can fail in any way, and all of them mean the same
            log.debug("%s: %s", file, error)
        self.bad += 1
        return None

    def _write(self, file: Path, features: torch.Tensor) -> None:
        """Puts the entry (C, h, w) there in one move. The first failure is told, and nothing is written from then on."""
        if not self._writes:
            return
        features = features.cpu().contiguous()
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(save({"features": features, "sha256": _checksum(file, features)}))
            os.replace(partial, file)
        except OSError as error:
            self._writes = False
            log.warning("no more SAM features are put into %s, since that failed: %s", self.folder, error)
        finally:
            with contextlib.suppress(OSError):  # there is nothing to delete where all went well
                partial.unlink()


def obstacle(encoder: nn.Module) -> str | None:
    """Why the features of an encoder cannot be kept, None if they can."""
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            return "SAM's image encoder is not frozen (set_trainable(model) and model.requires_grad_(False) freeze it)"
        if hasattr(parameter, "ds_id"):
            # Outside of its forward each holds an empty shell, and one that skips it would let the others wait.
            return "the weights of SAM's image encoder are split among processes (ZeRO-3)"
    return None


def _float32_arithmetic() -> list[str]:
    """What products of float32 are rounded to (TF32, say), as far as this torch can tell."""
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return [torch.get_float32_matmul_precision(), str(backends.cudnn.allow_tf32)]
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [str(part.fp32_precision) for part in parts]


def _differs(tensor: torch.Tensor, seen: torch.Tensor, version: int) -> bool:
    """True unless `tensor` is the memory that was seen, not written to since."""
    return tensor.data_ptr() != seen.data_ptr() or tensor.dtype != seen.dtype or tensor._version != version


def _checksum(file: Path, features: torch.Tensor) -> torch.Tensor:
    """(32,) uint8 over the entry and its place: a file under another picture's or encoder's name is as bad as a torn one."""
    whole = hashlib.sha256()
    _add(whole, "/".join(file.parts[-3:]), features)
    return torch.frombuffer(bytearray(whole.digest()), dtype=torch.uint8)


def _add(whole: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """Adds name, dtype, shape and bytes of a tensor to a hash."""
    whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    # As bytes, since NumPy has no bfloat16.
    whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
