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

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from utils.conversation import IMAGE_TOKEN_INDEX
from utils.files import as_object, read_bytes, shown, write_json
from utils.tokenizer import ADDED_FILE, MODEL_FILE, READ_TOKENS, ReadTokenizer, add_read_tokens, load_tokenizer

from .config import READConfig, SamConfig, SaspConfig
from .presets import get_preset
from .sam import infer_sam_config
from .weights import (
    DERIVED,
    LORA,
    CheckpointError,
    digest,
    digest_of_values,
    read_fields,
    read_shapes,
    read_tensors,
    refuse_other_folders,
    resolve_folder,
    weight_files,
)

if TYPE_CHECKING:
    from .read import READForCausalLM

log = logging.getLogger(__name__)

SAM = "model.visual_model."
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
    SAM: "sam.",
    "model.text_hidden_fcs.": "text_hidden_fcs.",
    VISION_TOWER: "llava.model.vision_tower.",
}
"""Prefixes, both ways. transformers has named CLIP's modules with and without `vision_model.`; see `to_module_key`."""

CLIP_OTHER = re.compile(r"^(text_model|text_projection|visual_projection|logit_scale)")
"""What a full CLIP has beside its vision tower."""


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


# ------------------------------------------------------------------------------------------------ what it was made from


def fingerprint(version: str, vision_tower: str | None = None, sam_checkpoint: str | None = None) -> str:
    """A name for all weights of a model: those of the folder, and of the tower and the SAM file where it does not carry its own.

    Over every byte, whatever the files are called and however they are split; kept beside the files (`weights.digest`).
    """
    folder = resolve_folder(version)
    files = weight_files(folder)
    names = read_shapes(files).keys()
    parts = {"model": digest(files)}
    if vision_tower is not None or not any(name.startswith(VISION_TOWER) for name in names):
        parts["tower"] = digest(weight_files(tower_of(folder, vision_tower)))
    if sam_checkpoint is not None and not any(name.startswith(SAM) for name in names):
        parts["sam"] = digest([_sam_file(sam_checkpoint)])
    return digest_of_values(parts)


def processor_fingerprint(version: str, vision_tower: str | None = None) -> str:
    """A name for all that turns images and questions into tensors, and answers into text, in the files beside the weights.

    Over the bytes of `tokenizer.model` and the fields of `added_tokens.json`, `tokenizer_config.json`, `read_processor.json` and
    `config.json`, and of `preprocessor_config.json` and `config.json` of the tower where the checkpoint leaves that to it.
    """
    folder = resolve_folder(version)
    own = folder / "preprocessor_config.json"
    names = ("config.json", "added_tokens.json", "tokenizer_config.json", "read_processor.json")
    places = {name: folder / name for name in names}
    if vision_tower is not None or not own.is_file():
        tower = tower_of(folder, vision_tower)
        places |= {"tower": tower / "config.json", "preprocessor": tower / own.name}
    else:
        places["preprocessor"] = own
    fields = {}
    for name, file in places.items():
        fields[name] = read_fields(file) if file.is_file() else None
        for volatile in ("transformers_version", "_name_or_path"):
            (fields[name] or {}).pop(volatile, None)
    return digest_of_values(read_bytes(folder / "tokenizer.model"), fields)


def check_base(run: Path, args: Any) -> None:
    """Refuses a base whose weights are no longer those that a run's config.json names.

    Raises:
        ValueError: with what to do.
    """
    before = read_fields(run / "config.json").get("base")
    if before is None:
        return
    name = sampled_fingerprint if isinstance(before, str) and len(before) == 32 else fingerprint
    if name(args.version, args.vision_tower, args.vision_pretrained) != before:
        raise ValueError(
            f"{args.version} does not hold the weights that {run} was trained from: LoRA fits its own base alone. Put that "
            f"base back in its place (its fingerprint is {before})"
        )


def sampled_fingerprint(version: str, vision_tower: str | None = None, sam_checkpoint: str | None = None) -> str:
    """The 32 digits that runs recorded before `fingerprint` looked at every byte: over 64 values of each tensor."""
    folder = resolve_folder(version)
    files = weight_files(folder)
    files += weight_files(_tower_folder(vision_tower, folder)) if vision_tower is not None else []
    files += [_sam_file(sam_checkpoint)] if sam_checkpoint is not None else []
    whole = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(read_tensors(files), key=lambda item: item[0]):
        values = tensor.flatten()[:: max(tensor.numel() // 64, 1)][:64].float()
        whole.update(f"{key}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return whole.hexdigest()


# ------------------------------------------------------------------------------------------------ loading


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
    refuse_other_folders(folder)
    files = weight_files(folder)
    shapes = {key: shape for key, shape in read_shapes(files).items() if not DERIVED.search(key)}
    if kind := other_weights(shapes):
        raise CheckpointError(f"{folder} holds {kind}")
    config = read_config(folder, shapes, sam_shapes_of(shapes, sam_checkpoint, folder), vision_tower)
    own = read_fields(folder / "config.json").get("model_type") == READConfig.model_type
    check_sizes(folder, config, shapes, own)
    if preset is not None:
        chosen = get_preset(preset)
        config.sasp, config.loss, config.conv_type = chosen.sasp, chosen.loss, chosen.conv_type
    with init_empty_weights(include_buffers=False), describing(folder / "config.json"):
        model = cls(config, attn_implementation=attn_implementation)

    state: dict[str, torch.Tensor] = {}
    unexpected = []
    target = {_canonical(key): key for key in model.state_dict()}
    for key, tensor in read_tensors(files):
        if DERIVED.search(key):
            continue
        module_key = to_module_key(key)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {key} is {tensor.dtype}; READ's weights are floating point (fp32, bf16 or fp16)")
        if module_key in target:
            if target[module_key] in state and not torch.equal(state[target[module_key]], tensor.to(dtype)):
                raise CheckpointError(f"{folder}: two files hold {key} with different values")
            state[target[module_key]] = tensor.to(dtype)
        else:
            unexpected.append(key)
    missing = sorted(set(target.values()) - set(state))
    missing = _complete_vision_tower(state, missing, target, config, vision_tower, folder, dtype)
    missing = _complete_sam(state, missing, sam_checkpoint, dtype)
    missing = _complete_projection(model, state, missing, dtype)
    _fit_vocabulary(state, config, dtype, folder, own)
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
    fields = read_fields(file)
    tokenizer = load_tokenizer(folder) if (folder / MODEL_FILE).is_file() else None
    rows = next(iter(shapes.get("model.embed_tokens.weight", ())), 0)
    if tokenizer is not None and rows and len(tokenizer) > rows:
        beyond = [token for token, index in tokenizer.added.items() if index >= rows] or ["its last pieces"]
        raise CheckpointError(
            f"{folder / (ADDED_FILE if tokenizer.added else MODEL_FILE)} makes {len(tokenizer)} tokens, but the embedding in "
            f"{weight_files(folder)[0].name} has {rows} rows, none for {', '.join(beyond)}: they are of different models"
        )
    if fields.get("model_type") == READConfig.model_type:
        check_token_ids(file, fields, tokenizer, rows)
        with describing(file):
            return READConfig.from_dict(fields)

    if tokenizer is None:
        load_tokenizer(folder)  # says what is missing
    if (lost := [token for token in READ_TOKENS if token not in tokenizer.added]) and any(
        key.startswith("model.text_hidden_fcs.") for key in shapes
    ):
        raise CheckpointError(
            f"{folder} holds a trained READ, but its tokenizer lacks {', '.join(lost)}: copy the {ADDED_FILE} that belongs to it"
        )
    seg, im_start, im_end = add_read_tokens(tokenizer)
    with describing(file):
        return _released(fields, folder, shapes, sam_shapes, vision_tower, len(tokenizer), seg, im_start, im_end)


def _released(
    fields: dict[str, Any],
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    sam_shapes: dict[str, tuple[int, ...]],
    vision_tower: str | Path | None,
    vocab_size: int,
    *read_tokens: int,
) -> READConfig:
    """Our config from the fields of the released layout."""
    seg, im_start, im_end = read_tokens
    names = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    text = LlamaConfig(**{k: v for k, v in fields.items() if k in names and v is not None})
    text.vocab_size = vocab_size
    text.use_cache = True
    tower = str(vision_tower or _named_tower(fields, folder))
    llava = LlavaConfig(
        vision_config=_clip_config(tower, folder, shapes, explicit=vision_tower is not None),
        text_config=text,
        image_token_index=IMAGE_TOKEN_INDEX,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
    )
    return READConfig(
        llava=llava,
        sam=sam_config(sam_shapes, folder),
        sasp=SaspConfig(enabled=trained_as(fields) != "LISA"),
        projector="linear" if "model.mm_projector.weight" in shapes else "mlp2x_gelu",
        seg_token_id=seg,
        im_start_id=im_start,
        im_end_id=im_end,
        vision_tower=tower,
        conv_type="llava_v1",
    )


@contextlib.contextmanager
def describing(file: Path) -> Iterator[None]:
    """Names the file in what the classes of a model raise for odd values in its config."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises any error there is, from KeyError to its own
        reason = str(error) if not isinstance(error, KeyError) else f"unknown value {error}"
        raise CheckpointError(f"{file} cannot be used: {reason or type(error).__name__}") from error


def check_token_ids(file: Path, fields: dict[str, Any], tokenizer: ReadTokenizer | None, rows: int | None = None) -> None:
    """Refuses a config whose ids of `[SEG]`, `<im_start>` and `<im_end>` are unusable, or not those of the tokenizer beside it.

    Args:
        file: the config.json in our own layout with these fields.
        tokenizer: None if there is none beside it.
        rows: of the embedding, None if it is not known.

    Raises:
        CheckpointError: naming both files and the ids.
    """
    names = dict(zip(("seg_token_id", "im_start_id", "im_end_id"), READ_TOKENS, strict=True))
    ids = {name: fields.get(name) for name in names}
    for name, index in ids.items():
        if type(index) is not int or index < 0:
            raise CheckpointError(f"{file}: {name} must be the id of {names[name]}, a whole number, found {shown(index)}")
        if rows and index >= rows:
            raise CheckpointError(f"{file}: {name} is {index}, but the embedding has {rows} rows (ids 0 to {rows - 1})")
    if len(set(ids.values())) < len(ids):
        raise CheckpointError(f"{file}: {', '.join(f'{k} {v}' for k, v in ids.items())}: each token needs an id of its own")
    if tokenizer is None:
        return
    wrong = [
        f"{names[name]} is {index} in config.json and {tokenizer.added.get(names[name], 'missing')} in the tokenizer"
        for name, index in ids.items()
        if tokenizer.added.get(names[name]) != index
    ]
    if wrong:
        raise CheckpointError(
            f"{file} and {file.parent / ADDED_FILE} do not fit each other: {', '.join(wrong)}. Take both from the folder that "
            "the weights are from"
        )


def check_sizes(folder: Path, config: READConfig, shapes: dict[str, tuple[int, ...]], own: bool) -> None:
    """Refuses a config of another size than the weights, before a model of that size is built.

    Args:
        own: the folder is in our own layout, where the embedding has a row for every token.

    Raises:
        CheckpointError: with both numbers.
    """
    text, vision = config.llava.text_config, config.llava.vision_config
    wanted = [
        ("num_hidden_layers", text.num_hidden_layers, _layers(shapes, "model.layers.")),
        ("hidden_size", text.hidden_size, next(iter(shapes.get("model.embed_tokens.weight", ())[1:]), 0)),
        ("intermediate_size", text.intermediate_size, next(iter(shapes.get("model.layers.0.mlp.gate_proj.weight", ())), 0)),
        ("num_hidden_layers of the vision tower", vision.num_hidden_layers, _layers(shapes, f"{VISION_TOWER}encoder.layers.")),
        ("depth of SAM", config.sam.depth, _layers(shapes, f"{SAM}image_encoder.blocks.")),
    ]
    wrong = [f"{name} is {said}, in the weights {found}" for name, said, found in wanted if found and said != found]
    rows = next(iter(shapes.get("model.embed_tokens.weight", ())), 0)
    if own and rows < text.vocab_size:
        wrong.append(f"vocab_size is {text.vocab_size}, in the weights {rows}")
    if wrong:
        raise CheckpointError(
            f"{folder}/config.json and the weights beside it are of different models, or shards are missing: {'; '.join(wrong)}"
        )
    layer, layers = config.llava.vision_feature_layer, vision.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise CheckpointError(
            f"{folder}/config.json: the layer of the vision tower whose states are used must be a whole number from "
            f"{-layers - 1} to {layers}, found {shown(layer)}"
        )


def _layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    """Number of layers whose names begin with `prefix`, by the highest number."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    return max((1 + int(found[1]) for key in shapes if (found := pattern.match(key))), default=0)


OTHER_WEIGHTS = {
    ("image_encoder.", "mask_decoder.", "prompt_encoder."):
        "a SAM alone: give its file with --vision_pretrained, and a READ or a LLaVA-1.5 with --version",
    ("vision_model.", "text_model.", "visual_projection", "logit_scale"):
        "a CLIP alone: give it with --vision_tower, and a READ or a LLaVA-1.5 with --version",
    ("language_model.", "model.language_model.", "model.multi_modal_projector.", "multi_modal_projector."):
        "a LLaVA by the names of the transformers library; READ reads the layout of LLaVA's authors (liuhaotian/llava-v1.5-7b)",
    ("llava.", "sam.", "text_hidden_fcs."):
        "weights by the names of the classes, as in a file of torch.save(model.state_dict()): write a model with "
        "model.save_pretrained(folder)",
}  # fmt: skip


def other_weights(names: Iterable[str]) -> str | None:
    """What weights are that can be neither a READ's nor a LLaVA base's, and what to do; None if they may be either."""
    names = list(names)
    if lora := next((name for name in names if LORA.search(name)), None):
        return f"LoRA layers that have not been merged ({lora}): merge the run first: bash merge_lora_weight.sh RUN OUT"
    if any(name.startswith("model.layers.") for name in names):
        if any(name.startswith(("model.mm_projector.", SAM)) for name in names):
            return None
        return (
            "a language model without LLaVA's projector (no model.mm_projector.*): the base of a READ is a LLaVA-1.5, such as "
            "liuhaotian/llava-v1.5-7b"
        )
    for prefixes, kind in OTHER_WEIGHTS.items():
        if any(name.startswith(prefixes) for name in names):
            return kind
    return f"no weights of a READ or a LLaVA-1.5: no model.layers.* among its {len(names)} tensors (the first is {names[0]})"


def trained_as(fields: dict[str, Any]) -> str:
    """The model that a `config.json` in the released layout names, such as READ, SESAME or LISA."""
    names = fields.get("architectures")
    return names[0].removesuffix("ForCausalLM") if isinstance(names, list) and names and isinstance(names[0], str) else "?"


def note_on_points(path: str | Path, config: READConfig) -> str | None:
    """What to know of SasP in a checkpoint that is asked as it comes, None where nothing is unusual.

    LISA has no points. SESAME has none either, but READ's own weights may carry its name, since READ grew from its code; they
    need SasP, so that the name decides nothing there.
    """
    fields = read_fields(resolve_folder(path) / "config.json")
    if not config.sasp.enabled:
        return "SasP is off, as this model was trained; --sasp turns it on"
    if trained_as(fields) == "SESAME":
        return "SasP is on. If this is SESAME itself, and not a READ under its name: --no-sasp is its own path"
    return None


def sam_shapes_of(
    shapes: dict[str, tuple[int, ...]], sam_checkpoint: str | Path | None, folder: str | Path = "this base"
) -> dict[str, tuple[int, ...]]:
    """Shapes of the SAM in a checkpoint, keyed as in a SAM file; those of the file where the checkpoint has none.

    Raises:
        CheckpointError: there is neither.
    """
    own = {key.removeprefix(SAM): shape for key, shape in shapes.items() if key.startswith(SAM)}
    if own:
        return own
    if sam_checkpoint is None:
        trained = any(key.startswith("model.text_hidden_fcs.") for key in shapes)
        raise CheckpointError(f"{folder} has no SAM (no {SAM}* tensors): " + (
            "it is a READ of which a part is missing; copy or download it again" if trained
            else "a READ is trained from it with a SAM file (train_read.py --vision_pretrained sam_vit_h_4b8939.pth)"
        ))  # fmt: skip
    found = read_shapes([_sam_file(sam_checkpoint)])
    sam_config(found, sam_checkpoint)
    return found


def sam_config(shapes: dict[str, tuple[int, ...]], place: str | Path) -> SamConfig:
    """The sizes of a SAM from its shapes, keyed as in a SAM file.

    Raises:
        CheckpointError: they are not those of a SAM; the message begins with `place`, a file or a checkpoint folder.
    """
    try:
        return infer_sam_config(shapes)
    except (ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{place} holds no whole SAM, as sam_vit_h_4b8939.pth is one: {error}") from error


def _clip_config(
    tower: str, folder: Path, shapes: dict[str, tuple[int, ...]], explicit: bool = False
) -> CLIPVisionConfig:
    """Config of the CLIP tower: that of `tower`, or, if the checkpoint carries a tower, that of its shapes."""
    own = {key.removeprefix(VISION_TOWER): shape for key, shape in shapes.items() if key.startswith(VISION_TOWER)}
    if own and not explicit:
        try:
            width, _, _, patch = own["embeddings.patch_embedding.weight"]
            places = own["embeddings.position_embedding.weight"][0]
            inner = own["encoder.layers.0.mlp.fc1.weight"][0]
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"the vision tower of {folder} is not whole: {error}") from error
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=_layers(own, "encoder.layers."),
            num_attention_heads=max(width // 64, 1),
            image_size=round((places - 1) ** 0.5) * patch,
            patch_size=patch,
            projection_dim=768,
        )
    if not tower:
        raise CheckpointError(f"{folder}/config.json names no vision tower: give one with --vision_tower")
    return read_clip_config(_tower_folder(tower, folder))


def read_clip_config(tower: Path) -> CLIPVisionConfig:
    """Config of a CLIP in a folder of its own.

    Raises:
        CheckpointError: it is missing, unusable, or that of another model.
    """
    file = tower / "config.json"
    fields = read_fields(file)
    kind = fields.get("model_type")
    if kind not in (None, "clip", "clip_vision_model"):
        raise CheckpointError(f"{file}: the vision tower must be a CLIP, found model_type {shown(kind)}")
    with describing(file):
        return CLIPVisionConfig.from_dict(as_object(fields.get("vision_config", fields), "vision_config"))


def _tower_folder(tower: str, folder: Path) -> Path:
    """The CLIP tower's folder: as given, beside the checkpoint, or from the hub."""
    if not tower:
        raise CheckpointError(f"{folder} names no vision tower, and its weights lack one: give one with --vision_tower")
    for candidate in (Path(tower), folder / tower, folder.parent / tower):
        if candidate.is_dir():
            return candidate
    try:
        return resolve_folder(tower)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. It is the vision tower of {folder}: give one with --vision_tower") from error


def tower_of(folder: Path, vision_tower: str | Path | None = None, why: str = "its weights lack one") -> Path:
    """Folder of the CLIP tower of a checkpoint: `vision_tower`, or what its config names; `why` it is needed."""
    file = folder / "config.json"
    tower = vision_tower or (_named_tower(read_fields(file), folder) if file.is_file() else None)
    if not tower:
        raise CheckpointError(f"{folder} names no vision tower, and {why}: give one with --vision_tower")
    return _tower_folder(str(tower), folder)


def _named_tower(fields: dict[str, Any], folder: Path) -> str:
    """The vision tower that the config of a folder names, empty if none."""
    tower = fields.get("mm_vision_tower") or fields.get("vision_tower") or ""
    if not isinstance(tower, str):
        raise CheckpointError(f"{folder}/config.json: mm_vision_tower must be a folder or a hub id, found {shown(tower)}")
    return tower


def clip_patch_size(folder: Path, vision_tower: str | Path | None = None) -> int:
    """Pixels of a patch of the CLIP tower: of `vision_tower`, of the tower that the folder carries, or of the one it names."""
    shapes = {} if vision_tower is not None else read_shapes(weight_files(folder))
    own = shapes.get(f"{VISION_TOWER}embeddings.patch_embedding.weight")
    return own[-1] if own else read_clip_config(tower_of(folder, vision_tower)).patch_size


def sam_image_size(folder: Path) -> int:
    """Side of SAM's square in a checkpoint folder: from its tensors, or that of the published models for a base."""
    shapes = read_shapes(weight_files(folder))
    own = {key.removeprefix(SAM): shape for key, shape in shapes.items() if key.startswith(SAM)}
    return sam_config(own, folder).image_size if own else SamConfig().image_size


# ------------------------------------------------------------------------------------------------ completing a base


def _canonical(key: str) -> str:
    return key.replace("llava.model.vision_tower.vision_model.", "llava.model.vision_tower.")


def _sam_file(file: str | Path) -> Path:
    if not Path(file).is_file():
        raise CheckpointError(f"SAM file {file} does not exist")
    return Path(file)


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
    state |= {f"sam.{key}": tensor.to(dtype) for key, tensor in read_tensors([_sam_file(sam_checkpoint)])}
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


def _fit_vocabulary(state: dict[str, torch.Tensor], config: READConfig, dtype: torch.dtype, folder: Path, own: bool) -> None:
    """Embedding and head get one row a token, as the original's `resize_token_embeddings(len(tokenizer))` does it.

    A base gets rows N(0, initializer_range) for the tokens that READ adds. Rows beyond the last token, which some tools add to
    reach a multiple of 64, are left out. In our own layout config.json says how many rows there are: none is made up.
    """
    text = config.llava.text_config
    tokenizer = load_tokenizer(folder) if (folder / MODEL_FILE).is_file() else None
    if tokenizer is not None:
        add_read_tokens(tokenizer)
    for key in ("llava.model.language_model.embed_tokens.weight", "llava.lm_head.weight"):
        rows = state.get(key)
        if rows is None or rows.dim() != 2 or rows.shape[1] != text.hidden_size:
            continue
        if rows.shape[0] < text.vocab_size and not own:
            new = torch.randn(text.vocab_size - len(rows), text.hidden_size) * text.initializer_range
            state[key] = torch.cat([rows, new.to(dtype)])
            log.info("newly initialised: %d rows of %s for added tokens", len(new), key)
        elif tokenizer is not None and rows.shape[0] > text.vocab_size >= len(tokenizer):
            log.info("left out: %d rows of %s beyond the last token", len(rows) - text.vocab_size, to_disk_key(key))
            state[key] = rows[: text.vocab_size].clone()


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
        write_json(folder / "config.json", released_config(model.config))
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
