"""Checkpoints: the key map at full size, round trips of both layouts, strictness, bases without SAM or added tokens."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from golden_dir import golden_dirs
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from model import READConfig, READForCausalLM, READPredictor, READProcessor, SamConfig, SaspConfig, add_lora
from model.checkpoint import DERIVED, VISION_TOWER, CheckpointError, note_on_points, to_disk_key, to_module_key
from model.llava import image_features
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
