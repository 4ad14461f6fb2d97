"""Checkpoints: one two-way key map, strict loading, and the released layout (protocol §6).

On disk every READ uses the released names (`model.layers.…`, `model.visual_model.…`), whatever transformers calls its
modules today. Two kinds of folder differ only in what lies beside the weights:

    read      ours: complete (CLIP tower included), safetensors, our `config.json`, tokenizer and processor
    released  the original's: without the CLIP tower, a `config.json` of LLaVA's fields; also SESAME and LLaVA-1.5 bases, and
              LISA, whose LLaVA-1 has a CLIP of 224 pixels and a single layer as its projector

Nothing is loaded on trust: every key that is missing, unexpected or of another shape is listed in one error. A part may be
newly initialised only where a base cannot have it, decided from the missing keys, and it is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from utils.conversation import IMAGE_TOKEN_INDEX
from utils.tokenizer import add_read_tokens, load_tokenizer

from .config import READConfig, SamConfig, SaspConfig
from .presets import get_preset
from .sam import infer_sam_config

if TYPE_CHECKING:
    from .read import READForCausalLM

log = logging.getLogger(__name__)

VISION_TOWER = "model.vision_tower.vision_tower.vision_model."
KEY_MAP = {
    # on disk                       in READForCausalLM
    "model.embed_tokens.": "llava.model.language_model.embed_tokens.",
    "model.layers.": "llava.model.language_model.layers.",
    "model.norm.": "llava.model.language_model.norm.",
    "lm_head.": "llava.lm_head.",
    "model.mm_projector.0.": "llava.model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "llava.model.multi_modal_projector.linear_2.",
    "model.mm_projector.": "llava.model.multi_modal_projector.",  # LLaVA-1's single layer
    "model.visual_model.": "sam.",
    "model.text_hidden_fcs.": "text_hidden_fcs.",
    VISION_TOWER: "llava.model.vision_tower.",
}
"""Prefixes, both ways. transformers has named CLIP's modules with and without `vision_model.`; see `to_module_key`."""

UNREADABLE = (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
"""What torch and safetensors raise for a file that is damaged or something else (a pointer of Git LFS, say)."""
DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Tensors of old checkpoints that are computed today."""

CLIP_OTHER = re.compile(r"^(text_model|text_projection|visual_projection|logit_scale)")
"""What a full CLIP has beside its vision tower."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, with every reason found."""


def to_module_key(key: str) -> str | None:
    """Name in `READForCausalLM` of a tensor on disk, None if READ has no such tensor."""
    for disk, module in KEY_MAP.items():
        if key.startswith(disk):
            return module + key.removeprefix(disk)
    return None


def to_disk_key(key: str) -> str:
    """Name on disk of a tensor of `READForCausalLM`."""
    key = key.replace("llava.model.vision_tower.vision_model.", "llava.model.vision_tower.")
    for disk, module in KEY_MAP.items():
        if key.startswith(module):
            return disk + key.removeprefix(module)
    raise KeyError(key)


# ------------------------------------------------------------------------------------------------ reading


def resolve_folder(path: str | Path) -> Path:
    """A local folder as it is, or the snapshot of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if len(folder.parts) > 2 or str(path).startswith((".", "/")):
        raise CheckpointError(f"checkpoint folder {path} does not exist")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a folder here nor a repository that the hub gave us ({type(error).__name__}: {error})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before .bin, one file or the shards that the index names."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder} is incomplete: {index.name} names {', '.join(missing)}, not there")
            return [folder / name for name in names]
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise CheckpointError(
        f"{folder} is incomplete: no model.safetensors, pytorch_model.bin or an index of shards in it"
    )


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of every tensor, file by file, mapped from disk. No code in the files is ever run."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():
                        yield key, tensors.get_tensor(key)
            else:
                yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        except UNREADABLE as error:
            raise CheckpointError(f"{file} cannot be read as weights: {error}") from error


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, without loading the values of safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
            except UNREADABLE as error:
                raise CheckpointError(f"{file} cannot be read as weights: {error}") from error
        else:
            shapes |= {key: tuple(tensor.shape) for key, tensor in read_tensors([file])}
    return shapes


FINGERPRINT_VALUES = 64
"""Values of each tensor that a fingerprint looks at, evenly spread."""


def fingerprint(version: str, vision_tower: str | None = None, sam_checkpoint: str | None = None) -> str:
    """A name for the weights of a base with the tower and the SAM file given beside it: over keys, shapes and some values.

    Quick even for a large base, and another for one that was trained further, whatever its folder is called.
    """
    files = weight_files(resolve_folder(version))
    if vision_tower is not None:
        files += weight_files(_tower_folder(vision_tower, resolve_folder(version)))
    if sam_checkpoint is not None:
        files.append(Path(sam_checkpoint))
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(read_tensors(files), key=lambda item: item[0]):
        step = max(tensor.numel() // FINGERPRINT_VALUES, 1)
        values = tensor.flatten()[::step][:FINGERPRINT_VALUES].float()
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def check_base(run: Path, args: Any) -> None:
    """Refuses a base whose weights are no longer those that a run's config.json names.

    Raises:
        ValueError: with what to do.
    """
    before = json.loads((run / "config.json").read_text()).get("base")
    if before is not None and fingerprint(args.version, args.vision_tower, args.vision_pretrained) != before:
        raise ValueError(
            f"{args.version} does not hold the weights that {run} was trained from: LoRA fits its own base alone. Put that "
            f"base back in its place (its fingerprint is {before})"
        )


def load(
    cls: type[READForCausalLM],
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    vision_tower: str | Path | None = None,
    sam_checkpoint: str | Path | None = None,
    preset: str | None = None,
) -> READForCausalLM:
    """A model in evaluation mode with all its weights, from our own or the released layout.

    Args:
        path: folder or hub id.
        dtype: of all parameters.
        vision_tower: CLIP folder or hub id; overrides the config's. Needed unless the checkpoint carries its tower.
        sam_checkpoint: SAM `.pth`, for a base without SAM (LLaVA-1.5). A checkpoint that has a SAM keeps its own.
        preset: takes SasP, loss and conversation type from this preset instead of the checkpoint's config.

    Raises:
        CheckpointError: anything missing, unexpected or misshapen, all of it listed.
    """
    folder = resolve_folder(path)
    files = weight_files(folder)
    shapes = {key: shape for key, shape in read_shapes(files).items() if not DERIVED.search(key)}
    config = read_config(folder, shapes, sam_shapes_of(shapes, sam_checkpoint), vision_tower)
    if preset is not None:
        chosen = get_preset(preset)
        config.sasp, config.loss, config.conv_type = chosen.sasp, chosen.loss, chosen.conv_type
    with init_empty_weights(include_buffers=False):
        model = cls(config, attn_implementation=attn_implementation)

    state: dict[str, torch.Tensor] = {}
    unexpected = []
    target = {_canonical(key): key for key in model.state_dict()}
    for key, tensor in read_tensors(files):
        if DERIVED.search(key):
            continue
        module_key = to_module_key(key)
        if module_key in target:
            state[target[module_key]] = tensor.to(dtype)
        else:
            unexpected.append(key)
    missing = sorted(set(target.values()) - set(state))
    missing = _complete_vision_tower(state, missing, target, config, vision_tower, folder, dtype)
    missing = _complete_sam(state, missing, sam_checkpoint, dtype)
    missing = _complete_projection(model, state, missing, dtype)
    _extend_vocabulary(state, config, dtype)
    unexpected += sorted(set(state) - set(target.values()))  # of a SAM file
    _check(model, state, missing, unexpected, folder)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def read_config(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    sam_shapes: dict[str, tuple[int, ...]],
    vision_tower: str | Path | None = None,
) -> READConfig:
    """Our config as it was saved, or one made from the released fields, the tower's config and the tensors' shapes."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is incomplete: no config.json in it")
    fields = json.loads(file.read_text())
    if fields.get("model_type") == READConfig.model_type:
        return READConfig.from_dict(fields)

    tokenizer = load_tokenizer(folder)
    seg, im_start, im_end = add_read_tokens(tokenizer)
    names = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    text = LlamaConfig(**{k: v for k, v in fields.items() if k in names and v is not None})
    text.vocab_size = len(tokenizer)
    text.use_cache = True
    tower = str(vision_tower or fields.get("mm_vision_tower") or fields.get("vision_tower") or "")
    llava = LlavaConfig(
        vision_config=_clip_config(tower, folder, shapes, explicit=vision_tower is not None),
        text_config=text,
        image_token_index=IMAGE_TOKEN_INDEX,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
    )
    return READConfig(
        llava=llava,
        sam=infer_sam_config(sam_shapes),
        sasp=SaspConfig(enabled=trained_as(fields) != "LISA"),
        projector="linear" if "model.mm_projector.weight" in shapes else "mlp2x_gelu",
        seg_token_id=seg,
        im_start_id=im_start,
        im_end_id=im_end,
        vision_tower=tower,
        conv_type="llava_v1",
    )


def trained_as(fields: dict[str, Any]) -> str:
    """The model that a `config.json` in the released layout names, such as READ, SESAME or LISA."""
    return (fields.get("architectures") or ["?"])[0].removesuffix("ForCausalLM")


def note_on_points(path: str | Path, config: READConfig) -> str | None:
    """What to know of SasP in a checkpoint that is asked as it comes, None where nothing is unusual.

    LISA has no points. SESAME has none either, but READ's own weights may carry its name, since READ grew from its code; they
    need SasP, so that the name decides nothing there.
    """
    fields = json.loads((resolve_folder(path) / "config.json").read_text())
    if not config.sasp.enabled:
        return "SasP is off, as this model was trained; --sasp turns it on"
    if trained_as(fields) == "SESAME":
        return "SasP is on. If this is SESAME itself, and not a READ under its name: --no-sasp is its own path"
    return None


def sam_shapes_of(
    shapes: dict[str, tuple[int, ...]], sam_checkpoint: str | Path | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the SAM in a checkpoint, keyed as in a SAM file; those of the file where the checkpoint has none.

    Raises:
        CheckpointError: there is neither.
    """
    prefix = "model.visual_model."
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if own:
        return own
    if sam_checkpoint is None:
        raise CheckpointError(
            "this base has no SAM (no model.visual_model.* tensors): give a SAM file with --vision_pretrained"
        )
    return {key: tuple(tensor.shape) for key, tensor in _read_sam(sam_checkpoint).items()}


def _clip_config(
    tower: str, folder: Path, shapes: dict[str, tuple[int, ...]], explicit: bool = False
) -> CLIPVisionConfig:
    """Config of the CLIP tower: that of `tower`, or, if the checkpoint carries a tower, that of its shapes."""
    own = {key.removeprefix(VISION_TOWER): shape for key, shape in shapes.items() if key.startswith(VISION_TOWER)}
    if own and not explicit:
        width, _, _, patch = own["embeddings.patch_embedding.weight"]
        places = own["embeddings.position_embedding.weight"][0]
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=own["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=1 + max(int(m[1]) for k in own if (m := re.match(r"encoder\.layers\.(\d+)\.", k))),
            num_attention_heads=max(width // 64, 1),
            image_size=round((places - 1) ** 0.5) * patch,
            patch_size=patch,
            projection_dim=768,
        )
    if not tower:
        raise CheckpointError(f"{folder}/config.json names no vision tower: give one with --vision_tower")
    return CLIPVisionConfig.from_pretrained(_tower_folder(tower, folder))


def _tower_folder(tower: str, folder: Path) -> Path:
    """The CLIP tower's folder: as given, beside the checkpoint, or from the hub."""
    for candidate in (Path(tower), folder / tower, folder.parent / tower):
        if candidate.is_dir():
            return candidate
    try:
        return resolve_folder(tower)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. It is the vision tower of {folder}: give one with --vision_tower") from error


def tower_of(folder: Path, vision_tower: str | Path | None = None) -> Path:
    """Folder of the CLIP tower of a checkpoint: `vision_tower`, or what its config names."""
    fields = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    tower = vision_tower or fields.get("mm_vision_tower") or fields.get("vision_tower")
    if not tower:
        raise CheckpointError(f"{folder} names no vision tower: give one with --vision_tower")
    return _tower_folder(str(tower), folder)


def clip_patch_size(folder: Path, vision_tower: str | Path | None = None) -> int:
    """Pixels of a patch of the CLIP tower: of `vision_tower`, of the tower that the folder carries, or of the one it names."""
    shapes = {} if vision_tower is not None else read_shapes(weight_files(folder))
    own = shapes.get(f"{VISION_TOWER}embeddings.patch_embedding.weight")
    return own[-1] if own else CLIPVisionConfig.from_pretrained(tower_of(folder, vision_tower)).patch_size


def sam_image_size(folder: Path) -> int:
    """Side of SAM's square in a checkpoint folder: from its tensors, or that of the published models for a base."""
    shapes = read_shapes(weight_files(folder))
    prefix = "model.visual_model."
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return infer_sam_config(own).image_size if own else SamConfig().image_size


# ------------------------------------------------------------------------------------------------ completing a base


def _canonical(key: str) -> str:
    return key.replace("llava.model.vision_tower.vision_model.", "llava.model.vision_tower.")


def _read_sam(file: str | Path) -> dict[str, torch.Tensor]:
    if not Path(file).is_file():
        raise CheckpointError(f"SAM file {file} does not exist")
    return dict(read_tensors([Path(file)]))


def _complete_vision_tower(
    state: dict[str, torch.Tensor],
    missing: list[str],
    target: dict[str, str],
    config: READConfig,
    vision_tower: str | Path | None,
    folder: Path,
    dtype: torch.dtype,
) -> list[str]:
    prefix = "llava.model.vision_tower."
    wanted = [key for key in missing if key.startswith(prefix)]
    if not wanted and vision_tower is None:
        return missing
    if wanted and len(wanted) < sum(key.startswith(prefix) for key in target):
        return missing  # a tower with holes is an error, not a reason to mix two
    tower = _tower_folder(str(vision_tower or config.vision_tower or ""), folder)
    for key, tensor in read_tensors(weight_files(tower)):
        name = prefix + key.removeprefix("vision_model.")
        if name in target:
            state[target[name]] = tensor.to(dtype)
        elif not CLIP_OTHER.match(key) and not DERIVED.search(key):
            raise CheckpointError(f"unexpected tensor {key} in the vision tower {tower}")
    log.info("vision tower: %s", tower)
    return sorted(set(missing) - set(state))


def _complete_sam(
    state: dict[str, torch.Tensor], missing: list[str], sam_checkpoint: str | Path | None, dtype: torch.dtype
) -> list[str]:
    wanted = [key for key in missing if key.startswith("sam.")]
    if any(key.startswith("sam.") for key in state):
        if sam_checkpoint is not None and not wanted:
            log.info("the checkpoint carries its own (tuned) SAM: %s is not needed and not used", sam_checkpoint)
        return missing
    state |= {f"sam.{key}": tensor.to(dtype) for key, tensor in _read_sam(sam_checkpoint).items()}
    log.info("SAM: %s (the base has none)", sam_checkpoint)
    return sorted(set(missing) - set(state))


def _complete_projection(
    model: READForCausalLM, state: dict[str, torch.Tensor], missing: list[str], dtype: torch.dtype
) -> list[str]:
    prefix = "text_hidden_fcs."
    wanted = [key for key in missing if key.startswith(prefix)]
    if not wanted or any(key.startswith(prefix) for key in state):
        return missing
    fresh = nn.ModuleList(
        nn.Sequential(*(type(part)(part.in_features, part.out_features) if isinstance(part, nn.Linear) else part for part in row))
        for row in model.text_hidden_fcs
    )  # fmt: skip
    state |= {prefix + key: tensor.to(dtype) for key, tensor in fresh.state_dict().items()}
    log.info("newly initialised, since the base has none: %s", ", ".join(wanted))
    return sorted(set(missing) - set(state))


def _extend_vocabulary(state: dict[str, torch.Tensor], config: READConfig, dtype: torch.dtype) -> None:
    """Rows for added tokens that the base's tokenizer did not have, N(0, initializer_range) as in the original."""
    text = config.llava.text_config
    for key in ("llava.model.language_model.embed_tokens.weight", "llava.lm_head.weight"):
        rows = state.get(key)
        if rows is not None and rows.shape[0] < text.vocab_size and rows.shape[1] == text.hidden_size:
            new = torch.randn(text.vocab_size - len(rows), text.hidden_size) * text.initializer_range
            state[key] = torch.cat([rows, new.to(dtype)])
            log.info("newly initialised: %d rows of %s for added tokens", len(new), key)


def _check(
    model: READForCausalLM, state: dict[str, torch.Tensor], missing: list[str], unexpected: list[str], folder: Path
) -> None:
    wrong = [
        f"{to_disk_key(key)}: {tuple(state[key].shape)} in the file, {tuple(tensor.shape)} in the model"
        for key, tensor in model.state_dict().items()
        if key in state and state[key].shape != tensor.shape
    ]
    complaints = []
    for title, keys in (
        ("missing", [to_disk_key(key) for key in missing]),
        ("unexpected", unexpected),
        ("of another shape", wrong),
    ):
        if keys:
            complaints.append(f"{len(keys)} {title}:\n  " + "\n  ".join(keys))
    if complaints:
        raise CheckpointError(f"{folder} does not fit READ; nothing was loaded.\n" + "\n".join(complaints))


# ------------------------------------------------------------------------------------------------ writing


def save(
    model: READForCausalLM,
    folder: str | Path,
    *,
    layout: str = "read",
    processor: Any = None,
    max_shard_size: str = "5GB",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder in the layout `read` or `released`; with `processor` it can be loaded on its own.

    Raises:
        ValueError: an unknown layout, or LoRA layers that have not been merged.
    """
    if layout not in ("read", "released"):
        raise ValueError(f"layout must be 'read' or 'released', found {layout!r}")
    state = state_dict if state_dict is not None else model.state_dict()
    if any("lora_" in key for key in state):
        raise ValueError("the model still has LoRA layers: merge them first (model.merge_lora), then save")
    tensors = {to_disk_key(key): tensor.detach().contiguous() for key, tensor in state.items()}
    if layout == "released":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(VISION_TOWER)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    if layout == "read":
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(released_config(model.config), indent=2) + "\n")
    if processor is not None:
        processor.save_pretrained(folder)


def released_config(config: READConfig) -> dict[str, Any]:
    """The original's `config.json` (§6) of a model."""
    text = config.llava.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "vocab_size")  # fmt: skip
    return {
        "architectures": ["READForCausalLM" if config.sasp.enabled or config.projector != "linear" else "LISAForCausalLM"],
        "model_type": "llava",
        **{name: getattr(text, name) for name in names},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "train_mask_decoder": True,
        "out_dim": config.sam.out_dim,
        "vision_tower": config.vision_tower,
        "mm_vision_tower": config.vision_tower,
        "mm_hidden_size": config.llava.vision_config.hidden_size,
        "mm_projector_type": config.projector,
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.llava.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "square",
        "tie_word_embeddings": False,
        "use_cache": False,
    }


PROCESSOR_FILES = (
    "tokenizer.model", "tokenizer.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
    "preprocessor_config.json", "read_processor.json",
)  # fmt: skip
"""What tokenizer and processor are read from."""


def processor_fingerprint(version: str, vision_tower: str | None = None) -> str:
    """A name for the files of tokenizer and processor of a checkpoint, with those of the tower that is given beside it."""
    folder = resolve_folder(version)
    folders = [folder]
    if vision_tower is not None or not (folder / "preprocessor_config.json").is_file():
        folders.append(tower_of(folder, vision_tower))
    digest = hashlib.blake2b(digest_size=16)
    for file in (folder / name for folder in folders for name in PROCESSOR_FILES):
        digest.update(f"{file.name} ".encode() + (file.read_bytes() if file.is_file() else b"is not there"))
    return digest.hexdigest()
