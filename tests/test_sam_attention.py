"""SAM's encoder as `build_sam` makes it against the package's own: same features and gradients, same names, in all shapes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, Block

from benchmarks import sam_encoder
from model import SamConfig, sam_attention
from model.sam import build_sam
from model.sam_attention import (
    FastAttention,
    FastBlock,
    compile_blocks,
    use_fast_attention,
    use_package_attention,
)
from model.sam_cache import SamFeatureCache

CONFIGS = {
    "windows fit": SamConfig(image_size=128, embed_dim=24, depth=2, num_heads=3, global_attn_indexes=(1,), window_size=4),
    "windows reach over the edge": SamConfig(
        image_size=160, embed_dim=32, depth=3, num_heads=2, global_attn_indexes=(1,), window_size=7
    ),
    "a window larger than the picture": SamConfig(
        image_size=64, embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(), window_size=6
    ),
    "no windows": SamConfig(image_size=96, embed_dim=16, depth=1, num_heads=1, global_attn_indexes=(0,), window_size=0),
}


def package_encoder(config: SamConfig, seed: int = 0) -> torch.nn.Module:
    """The package's encoder with random weights, places among them."""
    torch.manual_seed(seed)
    encoder = build_sam(config, fast_attention=False).image_encoder.eval()
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def fast_copy(encoder: torch.nn.Module) -> torch.nn.Module:
    return use_fast_attention(copy.deepcopy(encoder))


def pictures(config: SamConfig, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=["tiled", "folded"])
def way(request, monkeypatch):
    """Both ways to attend on the CPU; `tiled` in tiles so small that it has to split windows, heads and queries."""

    def attend(self, q, k, v, size):
        return getattr(sam_attention, request.param)(q, k, v, size, self.rel_pos_h, self.rel_pos_w, self.scale)

    monkeypatch.setattr(FastAttention, "attend", attend)
    return request.param


@pytest.mark.parametrize("tile, band", [(2**9, 1), (2**15, 2**6), (2**22, 2**10)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_the_packages(name, way, tile, band, dtype, bound, monkeypatch):
    monkeypatch.setattr(sam_attention, "TILE", tile)
    monkeypatch.setattr(sam_attention, "BAND", band)
    encoder, images = package_encoder(CONFIGS[name]).to(dtype), pictures(CONFIGS[name]).to(dtype)
    with torch.no_grad():
        assert difference(fast_copy(encoder)(images), encoder(images)) < bound


@pytest.mark.parametrize("name", ["windows reach over the edge", "no windows"])
def test_gradients_are_the_packages(name, way, monkeypatch):
    monkeypatch.setattr(sam_attention, "TILE", 2**10)
    monkeypatch.setattr(sam_attention, "BAND", 2**5)
    encoder, images = package_encoder(CONFIGS[name]).double(), pictures(CONFIGS[name]).double()
    fast = fast_copy(encoder)
    weights = torch.randn(encoder(images).shape, generator=torch.Generator().manual_seed(2))
    for one in (encoder, fast):
        (one(images) * weights).sum().backward()
    theirs = dict(encoder.named_parameters())
    for key, parameter in fast.named_parameters():
        assert difference(parameter.grad, theirs[key].grad) < 1e-10, key


@torch.no_grad()
def test_attention_alone_takes_what_the_packages_takes(way):
    """Another size than it was made for: the package interpolates its relative positions, and windows may be oblong."""
    torch.manual_seed(0)
    theirs = Attention(24, num_heads=3, use_rel_pos=True, input_size=(5, 5))
    for parameter in (theirs.rel_pos_h, theirs.rel_pos_w):
        torch.nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    ours.__class__ = FastAttention
    for shape in ((2, 5, 5, 24), (1, 8, 3, 24), (1, 1, 4, 24)):
        x = torch.randn(shape)
        assert difference(ours(x), theirs(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1.2), (torch.float16, 1.2)])
def test_half_precision_is_as_near_to_fp32_as_the_packages(way, dtype, bound):
    config = SamConfig(image_size=160, embed_dim=128, depth=4, num_heads=2, global_attn_indexes=(1, 3), window_size=7)
    encoder, images = package_encoder(config), pictures(config)
    exact = encoder(images)
    half = images.to(dtype)
    ours, theirs = (
        (one.to(dtype)(half).float() - exact).abs().mean() / exact.abs().mean() for one in (fast_copy(encoder), encoder)
    )
    assert ours < bound * theirs and ours < 0.02


def test_built_fast_unless_asked_otherwise_and_back_again():
    config = CONFIGS["windows reach over the edge"]
    plain, fast = build_sam(config, fast_attention=False), build_sam(config)
    plain.image_encoder = package_encoder(config)
    assert {type(block) for block in plain.image_encoder.blocks} == {Block}
    assert {type(block) for block in fast.image_encoder.blocks} == {FastBlock}
    assert {type(block.attn) for block in fast.image_encoder.blocks} == {FastAttention}
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert dict(fast.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    encoder = use_fast_attention(use_fast_attention(plain.image_encoder))
    images = pictures(config)
    with torch.no_grad():
        ours = encoder(images)
        theirs = use_package_attention(encoder)(images)
    assert {type(block.attn) for block in encoder.blocks} == {Attention}
    assert not torch.equal(ours, theirs), "then this test would compare nothing"
    assert difference(ours, theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_and_pickles_compute_the_same(how):
    config = CONFIGS["windows reach over the edge"]
    encoder, images = fast_copy(package_encoder(config)), pictures(config)
    before = encoder(images)
    other = how(encoder)
    assert torch.equal(other(images), before)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(encoder(images), before)


def test_what_was_kept_without_gradients_serves_training():
    config = SamConfig(image_size=144, embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=5)
    encoder, images = fast_copy(package_encoder(config)), pictures(config)
    with torch.inference_mode():
        encoder(images)
    encoder(images).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@torch.no_grad()
def test_parts_are_read_in_their_own_forward_only(monkeypatch):
    """ZeRO-3 brings a module's weights together in that module's forward alone: outside they are empty."""
    config = CONFIGS["windows reach over the edge"]
    encoder, images = fast_copy(package_encoder(config)), pictures(config)
    wanted = encoder(images)
    for module in encoder.modules():
        own = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        if not own or module is encoder:
            continue

        def show(module, _, own=own):
            for name, data in own.items():
                getattr(module, name).data = data

        def hide(module, *_, own=own):
            for name in own:
                getattr(module, name).data = torch.empty(0)

        module.register_forward_pre_hook(show)
        module.register_forward_hook(hide)
        hide(module)
    assert torch.equal(encoder(images), wanted)


def test_strides_stay_inside_of_the_product():
    """`relative_terms` sets them by hand, for oblong windows too."""
    for size in ((1, 1), (1, 6), (5, 3), (4, 4)):
        q, rel_pos = torch.randn(2, size[0] * size[1], 8), [torch.randn(2 * side - 1, 8) for side in size]
        terms = sam_attention.relative_terms(q, size, *rel_pos)
        for term in terms:
            last = term.storage_offset() + sum((n - 1) * s for n, s in zip(term.shape, term.stride(), strict=True))
            assert 0 <= term.storage_offset() and last < term.untyped_storage().nbytes() // 4


def test_the_cache_of_features_tells_the_two_apart(tmp_path):
    """Their last bits differ, and what is on disk must be what would be computed."""
    encoder, cache = package_encoder(CONFIGS["windows fit"]).requires_grad_(False), SamFeatureCache(tmp_path)
    package = cache.fingerprint(encoder)
    fast = cache.fingerprint(use_fast_attention(encoder))
    assert package != fast != cache.fingerprint(compile_blocks(copy.deepcopy(encoder))) != package
    assert cache.fingerprint(use_package_attention(encoder)) == package


def test_the_benchmark_runs(tmp_path, capsys):
    file = tmp_path / "out.json"
    sam_encoder.main(
        ["--size", "mini", "--repeats", "1", "--batch_size", "1", "2", "--ways", "folded", "biased", "--out", str(file)]
    )
    record = json.loads(file.read_text())
    assert record["size"] == "mini" and [result["batch_size"] for result in record["results"]] == [1, 2]
    for result in record["results"]:
        assert list(result["variants"]) == ["package", "ours", "ours, folded", "ours, biased"]
        assert all(numbers["max_error"] < 1e-4 and numbers["ratio"] > 0 for numbers in result["variants"].values())
    assert "without padding" in capsys.readouterr().out
