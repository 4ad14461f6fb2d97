"""Checkpoints: the key map at full size, round trips of both layouts, strictness, bases without SAM or added tokens."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from golden_dir import golden_dirs
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig

from model import READConfig, READForCausalLM, READPredictor, READProcessor, SamConfig, SaspConfig, add_lora, weights
from model.checkpoint import (
    DERIVED,
    VISION_TOWER,
    CheckpointError,
    check_base,
    fingerprint,
    note_on_points,
    processor_fingerprint,
    sampled_fingerprint,
    to_disk_key,
    to_module_key,
)
from model.llava import image_features
from model.sam import infer_sam_config
from utils import cli
from utils.tokenizer import load_tokenizer

GOLDEN = [f for f in golden_dirs() if (f / "ckpt/read_tiny/config.json").is_file()]
SIZES = {"read_7b": (4096, 11008, 32, 32), "read_13b": (5120, 13824, 40, 40)}


def load(folder, **kwargs):
    return READForCausalLM.from_pretrained(folder, **kwargs)


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def key_lists(names):
    return [f / f"full_size_keys/{n}.json" for f in golden_dirs() for n in names if (f / f"full_size_keys/{n}.json").is_file()]


@pytest.mark.parametrize("file", key_lists(SIZES), ids=lambda f: f.stem)
def test_full_size_keys_map_both_ways(file):
    recorded = recorded_shapes(file)
    model = full_size(file.stem, clip_size=336, projector="mlp2x_gelu")
    assert shapes_on_disk(model) == recorded
    assert model.config.num_patches == 576


@pytest.mark.parametrize("file", key_lists(SIZES), ids=lambda f: f.stem.replace("read", "lisa"))
def test_full_size_keys_of_lisa_map_both_ways(file):
    """LISA has READ's tensors, but for LLaVA-1's projector: one layer from CLIP's width to the language model's."""
    recorded = recorded_shapes(file)
    for key in [key for key in recorded if key.startswith("model.mm_projector.")]:
        recorded.pop(key)
    width = SIZES[file.stem][0]
    recorded |= {"model.mm_projector.weight": (width, 1024), "model.mm_projector.bias": (width,)}
    model = full_size(file.stem, clip_size=224, projector="linear")
    assert shapes_on_disk(model) == recorded
    assert model.config.num_patches == 256


def recorded_shapes(file):
    return {key: tuple(shape) for key, shape in json.loads(file.read_text()).items() if not DERIVED.search(key)}


def full_size(name, clip_size, projector):
    width, inner, layers, heads = SIZES[name]
    text = LlamaConfig(
        vocab_size=32003, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=clip_size,
        patch_size=14,
    )  # fmt: skip
    llava = LlavaConfig(vision_config=clip, text_config=text)
    with init_empty_weights(include_buffers=False):
        return READForCausalLM(READConfig(llava=llava, sam=SamConfig(), projector=projector))


def shapes_on_disk(model):
    """Names and shapes in the released layout, once every name has been mapped there and back."""
    ours = {to_disk_key(key): tuple(t.shape) for key, t in model.state_dict().items()}
    modules = {key.replace("vision_tower.vision_model.", "vision_tower.") for key in model.state_dict()}
    assert {to_module_key(key) for key in ours} == modules
    return {key: shape for key, shape in ours.items() if not key.startswith(VISION_TOWER)}


SAM_SIZES = {
    "sam_vit_b": SamConfig(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "sam_vit_l": SamConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "sam_vit_h": SamConfig(),
}


@pytest.mark.parametrize("file", key_lists(SAM_SIZES), ids=lambda f: f.stem)
def test_sam_sizes_are_read_from_shapes(file):
    shapes = json.loads(file.read_text())
    assert infer_sam_config({key: tuple(shape) for key, shape in shapes.items()}) == SAM_SIZES[file.stem]


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda f: f.name)
def released(request):
    """(folder, CLIP folder, SAM file) of the tiny recorded checkpoint in the released layout."""
    ckpt = request.param / "ckpt"
    return ckpt / "read_tiny", ckpt / "clip_tiny", ckpt / "sam_tiny.pth"


@pytest.fixture(scope="module")
def loaded(released):
    return load(released[0], vision_tower=released[1])


def test_our_layout_reloads_on_its_own(released, loaded, tmp_path):
    processor = READProcessor.from_pretrained(released[0], vision_tower=released[1])
    loaded.save_pretrained(tmp_path, processor=processor)
    again = load(tmp_path)
    assert same_weights(loaded, again)
    assert again.config.sasp == loaded.config.sasp and again.config.sam == loaded.config.sam
    text = [("<image>\nCan you segment the dog?", "Sure, it is [SEG].")]
    assert READProcessor.from_pretrained(tmp_path).encode(text) == processor.encode(text)


def test_released_layout_round_trip(released, loaded, tmp_path):
    processor = READProcessor.from_pretrained(released[0], vision_tower=released[1])
    loaded.save_pretrained(tmp_path, layout="released", processor=processor)
    assert not any(key.startswith(VISION_TOWER) for key in load_file(tmp_path / "model.safetensors"))
    assert same_weights(loaded, load(tmp_path, vision_tower=released[1]))


def test_sharded_and_bin_files_load(released, loaded, tmp_path):
    processor = READProcessor.from_pretrained(released[0], vision_tower=released[1])
    loaded.save_pretrained(tmp_path, processor=processor, max_shard_size="10MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_weights(loaded, load(tmp_path))
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load(tmp_path)


def edit(loaded, released, tmp_path, change):
    processor = READProcessor.from_pretrained(released[0], vision_tower=released[1])
    loaded.save_pretrained(tmp_path, layout="released", processor=processor)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["missing", "model.norm.weight"]),
        (lambda t: t.update(stranger=torch.zeros(2)), ["unexpected", "stranger"]),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), ["another shape", r"model.norm.weight"]),
        (lambda t: t.pop("model.text_hidden_fcs.0.0.bias"), ["missing", "text_hidden_fcs.0.0.bias"]),
        (lambda t: t.pop("model.visual_model.mask_decoder.iou_token.weight"), ["missing", "iou_token"]),
    ],
    ids=["missing", "unexpected", "misshapen", "half a projection", "half a SAM"],
)
def test_every_misfit_is_listed(loaded, released, tmp_path, change, words):
    edit(loaded, released, tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, vision_tower=released[1])
    for word in words:
        assert word in str(error.value)


def llava_base(loaded, released, folder):
    """A LLaVA-1.5 base: no SAM, no projection, a vocabulary without the added tokens."""

    def strip(tensors):
        for key in [k for k in tensors if k.startswith(("model.visual_model.", "model.text_hidden_fcs."))]:
            tensors.pop(key)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:32000].clone()

    edit(loaded, released, folder, strip)
    for name in folder.iterdir():
        if name.suffix != ".safetensors":
            name.unlink()
    base = released[0].parent / "tokenizer_base"
    if not base.is_dir():
        pytest.skip("this golden folder has no base tokenizer")
    for file in base.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((released[0] / "config.json").read_text())
    for key in ("train_mask_decoder", "out_dim"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))


def test_llava_base_gets_sam_projection_and_tokens(loaded, released, tmp_path, caplog):
    """The released code left these tensors uninitialised unless told otherwise: NaN in the first step (protocol §6)."""
    llava_base(loaded, released, tmp_path)
    with pytest.raises(CheckpointError, match="vision_pretrained"):
        load(tmp_path, vision_tower=released[1])
    if not released[2].is_file():
        sam = {k.removeprefix("sam."): v for k, v in loaded.state_dict().items() if k.startswith("sam.")}
        torch.save(sam, tmp_path / "sam.pth")
        released = (*released[:2], tmp_path / "sam.pth")
    with caplog.at_level("INFO"):
        model = load(tmp_path, vision_tower=released[1], sam_checkpoint=released[2])
    assert "newly initialised" in caplog.text and "text_hidden_fcs" in caplog.text
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.text_hidden_fcs[0][0].weight.std() > 0
    assert model.get_input_embeddings().weight.shape[0] == 32003
    assert (model.config.seg_token_id, model.config.im_start_id, model.config.im_end_id) == (32000, 32001, 32002)
    assert torch.equal(model.sam.mask_decoder.iou_token.weight, loaded.sam.mask_decoder.iou_token.weight)


def test_sam_file_of_wrong_size(loaded, released, tmp_path):
    llava_base(loaded, released, tmp_path)
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 4, 4, 8)}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="no SAM weights"):
        load(tmp_path, vision_tower=released[1], sam_checkpoint=tmp_path / "sam.pth")


def test_a_base_with_its_own_vision_tower_keeps_it(loaded, released, tmp_path):
    processor = READProcessor.from_pretrained(released[0], vision_tower=released[1])
    loaded.save_pretrained(tmp_path, processor=processor)
    (tmp_path / "config.json").write_text((released[0] / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(k for k in tensors if k.startswith(VISION_TOWER) and k.endswith("class_embedding"))
    tensors[key] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    own = next(v for k, v in model.state_dict().items() if k.endswith("class_embedding"))
    assert torch.equal(own, tensors[key])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_named(loaded, tmp_path, name):
    """What an interrupted download leaves, or a pointer of Git LFS."""
    loaded.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights"):
        READForCausalLM.from_pretrained(tmp_path)


def test_missing_folder_and_missing_tower(released, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="incomplete"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="vision_tower"):
        load(released[0], vision_tower=tmp_path / "no_tower")


def test_unmerged_lora_is_not_saved(released, tmp_path):
    model = add_lora(load(released[0], vision_tower=released[1]), r=2)
    with pytest.raises(ValueError, match="merge"):
        model.save_pretrained(tmp_path)


@pytest.fixture
def lisa(loaded, released, tmp_path):
    """A checkpoint as LISA released its own, from a LLaVA-1 whose tokenizer had image tokens before [SEG] was added."""

    def change(tensors):
        generator = torch.Generator().manual_seed(7)
        width, seen = tensors.pop("model.mm_projector.0.weight").shape
        for rest in ("0.bias", "2.weight", "2.bias"):
            tensors.pop(f"model.mm_projector.{rest}")
        tensors["model.mm_projector.weight"] = torch.randn(width, seen, generator=generator)
        tensors["model.mm_projector.bias"] = torch.randn(width, generator=generator)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], tensors[key][-1:]])

    edit(loaded, released, tmp_path, change)
    config = json.loads((released[0] / "config.json").read_text())
    config.pop("mm_projector_type")  # LLaVA-1 knew one kind and did not name it
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LISAForCausalLM"], "vocab_size": 32004}))
    added = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002, "[SEG]": 32003}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    return tmp_path


def test_who_was_trained_without_points(lisa, released, loaded):
    """LISA's name says so; SESAME's does not, as READ's weights may carry it; of READ there is nothing to say."""
    assert note_on_points(released[0], loaded.config) is None
    config = json.loads((lisa / "config.json").read_text())
    for name, enabled, words in (("LISA", False, "--sasp turns it on"), ("SESAME", True, "--no-sasp is its own path")):
        (lisa / "config.json").write_text(json.dumps({**config, "architectures": [f"{name}ForCausalLM"]}))
        model = load(lisa, vision_tower=released[1])
        assert model.config.sasp.enabled == enabled and words in note_on_points(lisa, model.config)


def test_lisa_loads_with_its_own_projector_tokens_and_path(lisa, released):
    model = load(lisa, vision_tower=released[1])
    assert not model.config.sasp.enabled
    assert (model.config.seg_token_id, model.config.im_start_id, model.config.im_end_id) == (32003, 32001, 32002)
    tensors = load_file(lisa / "model.safetensors")
    pictures = torch.randn(2, 3, *[model.config.clip_image_size] * 2, generator=torch.Generator().manual_seed(0))
    states = model.llava.model.vision_tower(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = states @ tensors["model.mm_projector.weight"].T + tensors["model.mm_projector.bias"]
    torch.testing.assert_close(image_features(model.llava, pictures), expected)
    assert load(lisa, vision_tower=released[1], preset="read-7b-val").config.sasp.enabled


def test_lisa_answers_with_and_without_points(lisa, released):
    """Forced and generated, through everything a user has: the SasP switch is the one difference."""
    predictor = READPredictor.from_pretrained(lisa, vision_tower=released[1], device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    answers = {}
    for enabled in (False, True):
        predictor.model.config.sasp = SaspConfig(enabled=enabled, num_points=4, down_sample=1)
        answers[enabled] = predictor.ask(picture, "the red cup", max_new_tokens=4, force_segment=True)
        assert len(answers[enabled].masks) >= 1 and answers[enabled].points.shape[1] == (4 if enabled else 0)
    assert np.array_equal(answers[False].similarity, answers[True].similarity)


def test_lisa_is_written_back_in_both_layouts(lisa, released, tmp_path):
    model = load(lisa, vision_tower=released[1])
    processor = READProcessor.from_pretrained(lisa, vision_tower=released[1])
    for layout in ("read", "released"):
        model.save_pretrained(tmp_path / layout, layout=layout, processor=processor)
        again = load(tmp_path / layout, vision_tower=released[1] if layout == "released" else None)
        assert same_weights(model, again) and not again.config.sasp.enabled
        assert again.config.projector == "linear"


# ------------------------------------------------------------------------------------------------ files from anywhere


BASE = Path(__file__).resolve().parents[1] / "assets/read-mini-base"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model with random weights and the mini vocabulary, in our own layout, and what loads from it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = READProcessor(load_tokenizer(BASE), clip, sam_image_size=64, num_patches=16)
    config = tiny_config(
        seg_token_id=processor.seg_token_id, im_start_id=processor.im_start_id, im_end_id=processor.im_end_id
    )
    config.llava.text_config.vocab_size = len(processor.tokenizer)
    torch.manual_seed(0)
    READForCausalLM(config).save_pretrained(folder, processor=processor)
    return folder, load(folder)


@pytest.fixture
def copied(original, tmp_path):
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(original[0], tmp_path / "model"))


def open_both(folder):
    """The model as the demo, the page and the evaluation load it."""
    flags = dict.fromkeys(("vision_tower", "preset", "bits", "conv_type", "sasp", "num_points", "t_pos", "t_neg", "down_sample",
                           "geometry"))  # fmt: skip
    options = argparse.Namespace(version=str(folder), precision="fp32", attn_implementation="sdpa", **flags)
    return cli.load_model(options, torch.device("cpu"))


def change_fields(file, changes):
    """Sets fields of a JSON file, named `part.field`; None is a value, `...` deletes."""
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split(".")
        part = fields
        for key in path:
            part = part[key]
        if value is ...:
            del part[last]
        else:
            part[last] = value
    file.write_text(json.dumps(fields))


def refused(folder):
    """The one line with which a folder is refused."""
    with pytest.raises((OSError, ValueError)) as error:
        open_both(folder)
    return cli.one_line(error.value)


JSON_FILES = ("config.json", "added_tokens.json", "tokenizer_config.json", "preprocessor_config.json", "read_processor.json",
              "model.safetensors.index.json")  # fmt: skip


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.model", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [POINTER, b"<!DOCTYPE html><html></html>", b"", b"[]", b"null", b"3", b'{"cut', b"[" * 20_000, b'{"a": "\xe9"}'],
    ids=["pointer", "web page", "empty", "list", "null", "number", "cut", "deep", "no UTF-8"],
)  # fmt: skip
def test_files_that_are_something_else_are_named(copied, name, content):
    (copied / name).write_bytes(content)
    assert str(copied / name) in refused(copied)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(original, copied, name, encoding):
    text = (copied / name).read_text() if (copied / name).is_file() else '{"weight_map": {"a": "model.safetensors"}}'
    (copied / name).write_text(text, encoding=encoding)
    model, processor = open_both(copied)
    assert same_weights(model, original[1]) and processor.views(np.zeros((40, 50, 3), np.uint8)).clip.shape[-1] == 56


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("config.json", {"seg_token_id": 2001, "im_start_id": 2000}, ["added_tokens.json", "[SEG] is 2001 in config.json"]),
        ("config.json", {"seg_token_id": 2001}, ["each token needs an id of its own"]),
        ("config.json", {"seg_token_id": "2000"}, ["seg_token_id must be", "'2000'"]),
        ("config.json", {"seg_token_id": 2000.0}, ["whole number"]),
        ("config.json", {"im_end_id": True}, ["im_end_id must be", "True"]),
        ("config.json", {"im_end_id": None}, ["im_end_id must be"]),
        ("config.json", {"im_end_id": ...}, ["im_end_id must be"]),
        ("config.json", {"im_start_id": -1}, ["whole number"]),
        ("config.json", {"im_start_id": 1999}, ["<im_start> is 1999 in config.json and 2001 in the tokenizer"]),
        ("config.json", {"im_start_id": 5000}, ["<im_start> is 5000 in config.json and 2001"]),
        ("added_tokens.json", {"[SEG]": 2001, "<im_start>": 2000}, ["config.json", "[SEG] is 2000 in config.json and 2001"]),
        ("added_tokens.json", {"[SEG]": 2001}, ["<im_start> has the id 2001, which [SEG] has"]),
        ("added_tokens.json", {"[SEG]": 5}, ["'<0x02>' in tokenizer.model"]),
        ("added_tokens.json", {"[SEG]": "2000"}, ["whole number", "'2000'"]),
        ("added_tokens.json", {"[SEG]": 2000.0}, ["whole number"]),
        ("added_tokens.json", {"[SEG]": None}, ["whole number"]),
        ("added_tokens.json", {"[SEG]": True}, ["whole number"]),
        ("added_tokens.json", {"[SEG]": -3}, ["whole number"]),
        ("added_tokens.json", {"[SEG]": ...}, ["<im_start> has the id 2001, but none has 2000"]),
        ("added_tokens.json", {"<im_end>": ...}, ["tokenizer without <im_end>"]),
        ("added_tokens.json", {"<im_end>": 2003}, ["none has 2002"]),
        ("added_tokens.json", {"<x>": 2003}, ["makes 2004 tokens", "2003 rows, none for <x>"]),
        ("added_tokens.json", {"": 2003}, ["a token must be text"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2001": {"content": "[SEG]"}}}, ["2001 in tokenizer_config.json"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2000": {"content": "[seg]"}}}, ["which [seg] has"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, ["whole number, found 'x'"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2000": "[SEG]"}}, ["must be a JSON object"]),
    ],
)
def test_ids_of_tokens_that_do_not_agree_are_named_with_their_files(copied, name, changes, words):
    """Swapped ids loaded without a word: the mask was made from the state of another token."""
    change_fields(copied / name, changes)
    told = refused(copied)
    assert name in told and all(word in told for word in words), told


def test_ids_are_checked_against_the_embedding_where_there_is_no_tokenizer(copied):
    (copied / "tokenizer.model").unlink()
    assert load(copied).config.seg_token_id == 2000
    change_fields(copied / "config.json", {"seg_token_id": 2003})
    with pytest.raises(CheckpointError, match=r"seg_token_id is 2003, but the embedding has 2003 rows"):
        load(copied)


def test_added_tokens_that_newer_tools_write_are_read(original, copied):
    """Newer transformers list them in tokenizer_config.json, with the control tokens, which are pieces here."""
    added = json.loads((copied / "added_tokens.json").read_text())
    decoder = {"0": {"content": "<unk>"}, "2": {"content": "</s>"}} | {str(i): {"content": token} for token, i in added.items()}
    change_fields(copied / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    (copied / "added_tokens.json").unlink()
    text = "USER: <im_start> Is it [SEG] . </s> ?"
    assert load_tokenizer(copied).encode(text) == load_tokenizer(original[0]).encode(text)
    assert same_weights(open_both(copied)[0], original[1])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("config.json", {"llava.text_config.hidden_size": "32"}, "hidden_size"),
        ("config.json", {"llava.text_config.num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, in the weights 2"),
        ("config.json", {"llava.text_config.num_attention_heads": 0}, "cannot be used"),
        ("config.json", {"llava.text_config.vocab_size": 10**15}, "vocab_size is 1000000000000000, in the weights 2003"),
        ("config.json", {"llava.text_config.model_type": "bert"}, "must be a llama"),
        ("config.json", {"llava.text_config.rms_norm_eps": float("nan")}, "rms_norm_eps is no finite number"),
        ("config.json", {"llava.text_config.max_position_embeddings": -1}, "max_position_embeddings"),
        ("config.json", {"llava.vision_config.num_hidden_layers": 10**9}, "vision tower is 1000000000, in the weights 2"),
        ("config.json", {"llava.vision_config.patch_size": 0}, "cannot be used"),
        ("config.json", {"llava.vision_feature_layer": -9}, "from -3 to 2, found -9"),
        ("config.json", {"llava": []}, "llava: must be a JSON object"),
        ("config.json", {"llava": "x"}, "llava: must be a JSON object"),
        ("config.json", {"sam.depth": "2"}, "sam.depth: must be a value like 32"),
        ("config.json", {"sam.depth": 10**9}, "depth of SAM is 1000000000, in the weights 2"),
        ("config.json", {"sam.patch": 2}, "sam: unknown field 'patch'"),
        ("config.json", {"sam.global_attn_indexes": "1"}, "sam.global_attn_indexes"),
        ("config.json", {"sasp": 3}, "sasp: must be a JSON object"),
        ("config.json", {"sasp.enabled": "false"}, "sasp.enabled: must be a value like True"),
        ("config.json", {"sasp.num_points": True}, "sasp.num_points"),
        ("config.json", {"loss.bce": None}, "loss.bce"),
        ("config.json", {"conv_type": None}, "conv_type must be one of"),
        ("config.json", {"conv_type": ["llava_v1"]}, "conv_type must be one of"),
        ("config.json", {"vision_tower": 3}, "vision_tower must be"),
        ("config.json", {"model_type": None}, "are of different models"),
        ("read_processor.json", {"sam_image_size": "64"}, "sam_image_size: must be a whole number"),
        ("read_processor.json", {"sam_image_size": None}, "sam_image_size: must be a whole number"),
        ("read_processor.json", {"sam_image_size": 128}, "sam_image_size (read_processor.json) is 128, the model"),
        ("read_processor.json", {"num_patches": 64}, "num_patches (read_processor.json) is 64, the model"),
        ("read_processor.json", {"num_patches": True}, "num_patches: must be a whole number"),
        ("read_processor.json", {"conv_type": {}}, "conv_type must be one of"),
        ("read_processor.json", {"patch": 3}, "unknown field patch"),
        ("preprocessor_config.json", {"crop_size": 224}, "crop_size (preprocessor_config.json) is 224, the model"),
        ("preprocessor_config.json", {"crop_size": {"height": 56, "width": 40}}, "crop_size must be a square"),
        ("preprocessor_config.json", {"crop_size": "56"}, "cannot be used"),
        ("preprocessor_config.json", {"size": {"height": 56, "width": 56}}, "size must be the length of the shortest_edge"),
        ("preprocessor_config.json", {"size": None}, "size must be the length of the shortest_edge"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std must be three numbers other than 0"),
        ("preprocessor_config.json", {"image_mean": "0.5"}, "image_mean must be three numbers"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop must be true"),
        ("preprocessor_config.json", {"do_normalize": "yes"}, "do_normalize must be true or false"),
        ("preprocessor_config.json", {"resample": 99}, "resample must be a number from 0 to 5"),
        ("preprocessor_config.json", {"rescale_factor": float("inf")}, "rescale_factor is no finite number"),
    ],
)
def test_fields_of_other_kinds_are_named(copied, name, changes, words):
    change_fields(copied / name, changes)
    told = refused(copied)
    assert words in told and name in told, told


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "weight_map must be an object"), ([], "weight_map must be an object"), ({}, "weight_map must be an object"),
        ({"a": 3}, "found 3"), ({"a": None}, "found None"), ({"a": "../x"}, "same folder"), ({"a": "/x"}, "same folder"),
        ({"a": ".."}, "same folder"), ({"a": "c:\\x"}, "same folder"), ({"a": "x" * 256}, "same folder"),
        ({"a": "gone.bin"}, "names files that are not there: 'gone.bin'"),
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder(copied, weight_map, words):
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert words in (told := refused(copied)) and "model.safetensors.index.json" in told


# ---- weights in odd files


def prefixed(prefix):
    return lambda tensors, folder: save_file({prefix + key: t for key, t in tensors.items()}, folder / "model.safetensors")


def pickled(wrap, **how):
    return lambda tensors, folder: torch.save(wrap(tensors), folder / "pytorch_model.bin", **how)


def written(wrap):
    return lambda tensors, folder: save_file(wrap(tensors), folder / "model.safetensors")


def in_words(data, name="model.safetensors"):
    return lambda tensors, folder: (folder / name).write_bytes(data)


def with_rows(more, tensors):
    """Embedding and head with rows of zeros behind, or fewer rows."""
    keys = ("model.embed_tokens.weight", "lm_head.weight")
    return tensors | {
        key: torch.cat([tensors[key], torch.zeros(more, 32)]) if more > 0 else tensors[key][:more].clone() for key in keys
    }


def rewrite(copied, write):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    write(tensors, copied)


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    "write",
    [
        pickled(dict), pickled(dict, **OLD), pickled(lambda t: {"state_dict": t, "epoch": 3}),
        pickled(lambda t: {"model": t}, **OLD), pickled(lambda t: {"module": t, "optimizer": {"state": {}}}),
        pickled(lambda t: {"state_dict": {"model": t}}),
        pickled(lambda t: {key: torch.nn.Parameter(value) for key, value in t.items()}),
        pickled(lambda t: {"state_dict": {f"module.{key}": value for key, value in t.items()}}),
        prefixed("module."), prefixed("_orig_mod."), prefixed("base_model.model."), prefixed("module._orig_mod."),
        prefixed("_orig_mod.module.module."), prefixed("_orig_mod.base_model.model._fsdp_wrapped_module."),
        written(lambda t: {key.replace("model.layers.", "model.layers._orig_mod."): value for key, value in t.items()}),
        written(lambda t: with_rows(45, t)), written(lambda t: {key: value.double() for key, value in t.items()}),
    ],
)  # fmt: skip
def test_weights_in_what_tools_put_around_them_are_the_same(original, copied, write):
    rewrite(copied, write)
    model, _ = open_both(copied)
    assert same_weights(model, original[1])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (pickled(lambda t: [1, 2]), "holds a list, not tensors by name"),
        (pickled(lambda t: None), "holds a NoneType"),
        (pickled(lambda t: {}), "holds no tensors"),
        (pickled(lambda t: torch.nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear, which is code"),
        (pickled(lambda t: torch.nn.Linear(2, 2), **OLD), "asks for torch.nn.modules.linear.Linear, which is code"),
        (pickled(lambda t: torch.optim.SGD([torch.nn.Parameter(t["lm_head.weight"])]).state_dict()), "state of an optimizer"),
        (pickled(lambda t: {"optimizer": {}, "epoch": 3}), "holds a dict under 'optimizer'"),
        (pickled(lambda t: {**t, "epoch": 3}), "holds an int under 'epoch'"),
        (pickled(lambda t: {"state_dict": t, "model": t}), "state_dict and model"),
        (pickled(lambda t: {"ema": t}), "holds a dict under 'ema'"),
        (pickled(lambda t: {**t, "lm_head.weight": t["lm_head.weight"].to_sparse()}), "lm_head.weight is a tensor without plain"),
        (pickled(lambda t: {**t, "lm_head.weight": t["lm_head.weight"].to(torch.int8)}), "lm_head.weight is torch.int8"),
        (in_words(b"hello " * 99, "pytorch_model.bin"), "damaged, or no file that torch.save wrote"),
        (in_words(b"\x80\x04K\x03.", "pytorch_model.bin"), "copy or download it again"),
        (in_words(b"PK\x03\x04" + b"x" * 99, "pytorch_model.bin"), "copy or download it again"),
        (in_words(b"hello"), "copy or download it again"),
        (in_words(b"PK\x03\x04" + b"x" * 99), "copy or download it again"),
        (lambda t, folder: (save_file(t, folder / "model.safetensors"), os.truncate(folder / "model.safetensors", 90_000)),
         "copy or download it again"),
        (written(lambda t: {}), "holds no tensors"),
        (prefixed("net."), "no model.layers.* among"),
        (written(lambda t: {f"module.{key}" if "layers" in key else key: value for key, value in t.items()}), "wrapper's name"),
        (written(lambda t: t | {f"_orig_mod.{key}": value.clone() for key, value in t.items()}), "twice"),
        (written(lambda t: t | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)}),
         "merge the run first: bash merge_lora_weight.sh"),
        (written(lambda t: {key.removeprefix("model.visual_model."): value for key, value in t.items() if "visual_model" in key}),
         "holds a SAM alone"),
        (written(lambda t: {key.removeprefix(VISION_TOWER): value for key, value in t.items() if VISION_TOWER in key}),
         "no model.layers.*"),
        (written(lambda t: {f"vision_model.{key.removeprefix(VISION_TOWER)}": value for key, value in t.items()
                            if VISION_TOWER in key}), "holds a CLIP alone"),
        (written(lambda t: {key: value for key, value in t.items() if key.startswith(("model.layers.", "lm_head."))}),
         "without LLaVA's projector"),
        (written(lambda t: {to_module_key(key): value for key, value in t.items()}), "by the names of the classes"),
        (written(lambda t: {key: value for key, value in t.items() if "visual_model" not in key}), "a part is missing"),
        (written(lambda t: {key: value for key, value in t.items() if VISION_TOWER not in key}), "names no vision tower"),
        (written(lambda t: {key: value for key, value in t.items() if key != "lm_head.weight"}), "1 missing"),
        (written(lambda t: with_rows(-2, t)), "2001 rows, none for <im_start>, <im_end>"),
        (written(lambda t: t | {"model.embed_tokens.weight": torch.tensor(3.0)}), "in the weights 0"),
    ],
)  # fmt: skip
def test_files_that_hold_no_weights_of_a_read_are_named(copied, write, words):
    """One line that names file or folder; a SAM file is asked for only where a LLaVA base lacks one."""
    rewrite(copied, write)
    told = refused(copied)
    assert words in told and str(copied) in told and "vision_pretrained sam" not in told, told


def test_folders_of_another_kind_are_told_what_they_are(copied, tmp_path):
    (tmp_path / "run/ckpt_model").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"train": {}}')
    assert "is a training run, not a model: merge it first: bash merge_lora_weight.sh" in refused(tmp_path / "run")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert "is a LoRA adapter, not a model" in refused(tmp_path / "adapter")
    assert "is a file: a model is a folder" in refused(copied / "model.safetensors")


def test_two_shards_with_one_tensor_must_hold_the_same(original, copied):
    tensors = load_file(copied / "model.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, copied / "more.safetensors")
    assert same_weights(load(copied), original[1])
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, copied / "more.safetensors")
    assert "two files hold model.norm.weight with different values" in refused(copied)


def test_a_generated_row_without_a_token_is_decoded_as_unknown(copied):
    """config.json may say that the vocabulary is padded; the rows stay, and an id among them breaks nothing."""
    rewrite(copied, written(lambda tensors: with_rows(45, tensors)))
    change_fields(copied / "config.json", {"llava.text_config.vocab_size": 2048})
    model, processor = open_both(copied)
    assert len(model.get_input_embeddings().weight) == 2048
    assert processor.tokenizer.decode([2040, 2000]) == processor.tokenizer.decode([0, 2000])


# ---- the released layout


def in_released_layout(loaded, released, folder, change=lambda tensors: None):
    """The recorded checkpoint in the released layout, changed."""
    folder.mkdir()
    edit(loaded, released, folder, change)
    return folder


def test_swapped_ids_of_a_released_checkpoint_are_its_tokenizers(loaded, released, tmp_path):
    """Its config has no ids: the tokenizer alone says which row is which, and the model takes that."""
    folder = in_released_layout(loaded, released, tmp_path / "model")
    change_fields(folder / "added_tokens.json", {"[SEG]": 32001, "<im_start>": 32000})
    model = load(folder, vision_tower=released[1])
    assert (model.config.seg_token_id, model.config.im_start_id, model.config.im_end_id) == (32001, 32000, 32002)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"[SEG]": 32005}, "none has 32000"), ({"<x>": 32003}, "32003 rows, none for <x>"), ({"<im_end>": 32001}, "needs its own")],
)
def test_ids_of_a_released_checkpoint_lie_within_its_embedding(loaded, released, tmp_path, change, words):
    folder = in_released_layout(loaded, released, tmp_path / "model")
    change_fields(folder / "added_tokens.json", change)
    with pytest.raises(ValueError, match=words):
        load(folder, vision_tower=released[1])


def test_a_trained_model_without_its_tokens_is_refused_as_a_base(loaded, released, tmp_path):
    """Its rows would be given to tokens in another order."""
    folder = in_released_layout(loaded, released, tmp_path / "model")
    (folder / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"a trained READ, but its tokenizer lacks \[SEG\]"):
        load(folder, vision_tower=released[1])


def test_rows_beyond_the_last_token_of_a_released_checkpoint_are_left_out(loaded, released, tmp_path):
    """As the original does, which resizes the embedding to the length of the tokenizer."""

    def pad(tensors):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], torch.ones(61, tensors[key].shape[1])])

    folder = in_released_layout(loaded, released, tmp_path / "model", pad)
    assert same_weights(load(folder, vision_tower=released[1]), loaded)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("[]", "must be a JSON object"), ('{"model_type": "siglip"}', "must be a CLIP"),
     ('{"model_type": "clip", "vision_config": 3}', "must be a JSON object"), ('{"patch_size": "14"}', "patch_size")],
)  # fmt: skip
def test_the_config_of_a_vision_tower_is_named(released, tmp_path, content, words):
    tower = Path(shutil.copytree(released[1], tmp_path / "tower"))
    (tower / "config.json").unlink()
    (tower / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as error:
        load(released[0], vision_tower=tower)
    assert str(tower / "config.json") in str(error.value)


def test_a_sam_file_that_is_none_is_named(loaded, released, tmp_path):
    llava_base(loaded, released, tmp_path)
    tries = (({"a": torch.zeros(2)}, "holds no whole SAM"), ([1], "holds a list"), ({"model": {}}, "holds no tensors"))
    for content, words in tries:
        torch.save(content, tmp_path / "sam.pth")
        with pytest.raises(CheckpointError, match=words) as error:
            load(tmp_path, vision_tower=released[1], sam_checkpoint=tmp_path / "sam.pth")
        assert "sam.pth" in str(error.value)


# ------------------------------------------------------------------------------------------------ names for the content


def old(folder):
    """Files as they are when nobody has just written them."""
    for file in folder.iterdir():
        os.utime(file, ns=(10**18, 10**18))
    return str(folder)


@pytest.mark.parametrize(
    "write",
    [pickled(dict), pickled(dict, **OLD), pickled(lambda t: {"state_dict": t}), prefixed("module."),
     written(lambda t: dict(reversed(t.items()))), written(lambda t: t | {"model.layers.0.rotary_emb.inv_freq": torch.ones(3)})],
)  # fmt: skip
def test_a_fingerprint_is_that_of_the_tensors_not_of_their_files(original, copied, write):
    rewrite(copied, write)
    assert fingerprint(old(copied)) == fingerprint(str(original[0]))


def test_a_fingerprint_does_not_depend_on_sharding(original, tmp_path):
    original[1].save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(str(tmp_path)) == fingerprint(str(original[0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model.embed_tokens.weight"][1234].__setitem__(17, 0.125),  # one value that a sample would miss
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}),
        lambda t: t.update({"model.norm.weights": t.pop("model.norm.weight")}),
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].reshape(32, -1)}),
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"], "model.embed_tokens.weight": t["lm_head.weight"]}),
    ],
    ids=["a value", "a dtype", "a name", "a shape", "two exchanged"],
)
def test_a_fingerprint_covers_all_of_the_weights(original, copied, change):
    def write(tensors, folder):
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    rewrite(copied, write)
    assert fingerprint(str(copied)) != fingerprint(str(original[0]))


def test_a_fingerprint_is_computed_once(copied, monkeypatch):
    """It is kept beside the files by name, size and time of change, unless they were written just now."""
    read = []
    whole = weights._tensor_digest
    monkeypatch.setattr(weights, "_tensor_digest", lambda item: (read.append(item[0]), whole(item))[1])
    (copied / weights.CACHE).unlink(missing_ok=True)
    os.utime(copied / "model.safetensors")
    first = fingerprint(str(copied))
    assert read and not (copied / weights.CACHE).exists()  # written a moment ago
    old(copied)
    assert fingerprint(str(copied)) == first and (copied / weights.CACHE).exists()
    read.clear()
    assert fingerprint(str(copied)) == first and not read
    os.utime(copied / "model.safetensors", ns=(10**18, 10**18 + 1))
    assert fingerprint(str(copied)) == first and read
    for content in ("", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"files": 3}}'):
        read.clear()
        (copied / weights.CACHE).write_text(content)
        assert fingerprint(str(copied)) == first and read


def test_a_fingerprint_needs_no_folder_that_can_be_written(copied, monkeypatch):
    monkeypatch.setattr(weights, "write_json", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert fingerprint(old(copied)) == fingerprint(str(copied))


def test_a_fingerprint_covers_the_tower_that_a_checkpoint_names(released, tmp_path):
    tower = Path(shutil.copytree(released[1], tmp_path / "tower"))
    before = fingerprint(str(released[0]), str(tower))
    file = tower / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    key = next(key for key in state if key.endswith("class_embedding"))
    torch.save(state | {key: state[key] + 1}, file)
    assert fingerprint(str(released[0]), str(tower)) != before


def test_the_name_that_older_runs_recorded_is_still_compared(original, copied, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"base": sampled_fingerprint(str(original[0]))}))
    args = argparse.Namespace(version=str(copied), vision_tower=None, vision_pretrained=None)
    check_base(tmp_path, args)
    rewrite(copied, written(lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}))
    with pytest.raises(ValueError, match="does not hold the weights"):
        check_base(tmp_path, args)


@pytest.mark.parametrize("name", ["config.json", "added_tokens.json", "tokenizer_config.json", "preprocessor_config.json",
                                  "read_processor.json"])  # fmt: skip
def test_what_a_processor_is_made_of_has_a_name(original, copied, name):
    before = processor_fingerprint(str(original[0]))
    fields = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(dict(reversed(fields.items())), indent=7))
    assert processor_fingerprint(str(copied)) == before  # the same, written otherwise
    (copied / name).write_text(json.dumps({**fields, "more": 3}))
    assert processor_fingerprint(str(copied)) != before


def test_the_name_of_a_processor_covers_the_pieces_and_the_tower(original, copied, released):
    before = processor_fingerprint(str(original[0]))
    with (copied / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    assert processor_fingerprint(str(copied)) != before
    assert processor_fingerprint(str(original[0]), str(released[1])) != before
