"""Checkpoints: the key map at full size, round trips of both layouts, strictness, bases without SAM or added tokens."""

import json
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from golden_dir import golden_dirs
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from model import READConfig, READForCausalLM, READProcessor, SamConfig, add_lora
from model.checkpoint import DERIVED, VISION_TOWER, CheckpointError, to_disk_key, to_module_key
from model.sam import infer_sam_config

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
    recorded = {
        key: tuple(shape) for key, shape in json.loads(file.read_text()).items() if not DERIVED.search(key)
    }
    width, inner, layers, heads = SIZES[file.stem]
    text = LlamaConfig(
        vocab_size=32003, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    with init_empty_weights(include_buffers=False):
        model = READForCausalLM(READConfig(llava=LlavaConfig(vision_config=clip, text_config=text), sam=SamConfig()))
    ours = {to_disk_key(key): tuple(t.shape) for key, t in model.state_dict().items()}
    released = {key: shape for key, shape in ours.items() if not key.startswith(VISION_TOWER)}
    assert released == recorded
    modules = {key.replace("vision_tower.vision_model.", "vision_tower.") for key in model.state_dict()}
    assert {to_module_key(key) for key in ours} == modules
    assert model.config.num_patches == 576


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
