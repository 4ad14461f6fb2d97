"""SAM features on disk: the same bits as computed, found only for the same picture and weights, and never trusted damaged."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SEG, prompt, rectangle, tiny_batch, tiny_read

from model import READForCausalLM, set_trainable


def frozen_read(folder: Path, seed: int = 0) -> READForCausalLM:
    model = tiny_read(seed)
    set_trainable(model)
    model.cache_sam_features(folder)
    return model


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def counts(model: READForCausalLM) -> tuple[int, int, int]:
    return model.sam_cache.hits, model.sam_cache.misses, model.sam_cache.bad


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def training_batch() -> dict:
    batch = tiny_batch([prompt(11, SEG, 2), prompt(13, SEG, 2)])
    labels = batch["input_ids"].masked_fill(~batch["attention_mask"], -100)
    labels[:, :20] = -100
    masks = [rectangle((40, 56), (5, 5, 30, 20)), rectangle((48, 48), (0, 0, 20, 20))]
    return {**batch, "labels": labels, "masks": masks}


def test_a_hit_has_the_bits_of_a_miss_and_of_no_cache(tmp_path):
    image = pictures(1)
    plain = tiny_read().encode_sam_image(image)
    model = frozen_read(tmp_path)
    miss, hit = model.encode_sam_image(image), model.encode_sam_image(image)
    assert counts(model) == (1, 1, 0) and len(entries(tmp_path)) == 1
    assert torch.equal(miss, plain) and torch.equal(hit, plain) and hit.dtype == plain.dtype
    again = frozen_read(tmp_path)  # another process, say
    assert torch.equal(again.encode_sam_image(image), plain) and counts(again) == (1, 0, 0)
    assert str(again.sam_cache) == f"SAM features: 1 from {tmp_path}, 0 computed (0 for damaged entries)"


def test_of_two_pictures_one_is_there(tmp_path):
    """In a batch the tiny encoder gives a picture other last bits than alone, so a miss must be encoded alone."""
    model, images = frozen_read(tmp_path), pictures(3)
    alone = torch.cat([tiny_read().encode_sam_image(image[None]) for image in images])
    model.encode_sam_image(images[1:2])
    assert torch.equal(model.encode_sam_image(images[:2]), alone[:2])
    assert counts(model) == (1, 2, 0)
    assert torch.equal(model.encode_sam_image(images), alone)


def test_each_dtype_has_its_own_entries_and_rounded_weights_too(tmp_path):
    model, image = frozen_read(tmp_path), pictures(1)
    model.encode_sam_image(image)
    half = model.to(torch.bfloat16)
    miss, hit = half.encode_sam_image(image), half.encode_sam_image(image.bfloat16())
    assert counts(model) == (1, 2, 0)
    assert hit.dtype == torch.bfloat16 and torch.equal(miss, hit)
    model.float()  # the weights are rounded now: not those of the first entry, though their type is
    model.encode_sam_image(image)
    assert counts(model) == (1, 3, 0)


@torch.no_grad()
@pytest.mark.parametrize("how", ["copied", "assigned", "replaced"])
def test_other_weights_are_noticed(tmp_path, how):
    model, other, image = frozen_read(tmp_path), tiny_read(seed=1).requires_grad_(False), pictures(1)
    model.encode_sam_image(image)
    if how == "copied":
        model.load_state_dict(other.state_dict())
    elif how == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.sam.image_encoder = other.sam.image_encoder
    assert torch.equal(model.encode_sam_image(image), other.encode_sam_image(image))
    assert counts(model) == (0, 2, 0)
    back = frozen_read(tmp_path)
    back.encode_sam_image(image)
    assert counts(back) == (1, 0, 0)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # of 16 KB of features; header and checksum are small
    file.write_bytes(content)


def _change_the_dtype(file: Path) -> None:
    entry = load_file(file)
    save_file({**entry, "features": entry["features"].half()}, file)


def _change_the_shape(file: Path) -> None:
    entry = load_file(file)
    save_file({**entry, "features": entry["features"].flatten()}, file)


def _put_code(file: Path) -> None:
    """What a reader of pickles would run."""

    class Harm:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(file.parents[2] / "harm"),))

    torch.save({"features": Harm()}, file)


def _put_another_picture(file: Path) -> None:
    model = tiny_read().requires_grad_(False)
    model.cache_sam_features(file.parents[2])
    model.encode_sam_image(pictures(2)[1:])
    other = next(path for path in entries(file.parents[2]) if path != file)
    os.replace(other, file)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip_a_bit, _change_the_dtype, _change_the_shape, _put_another_picture, _put_code,
     lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
     lambda file: save_file({"x": torch.zeros(1)}, file)],
    ids=["truncated", "bit flipped", "dtype", "shape", "other picture", "code", "empty", "text", "other tensors"],
)  # fmt: skip
def test_a_damaged_entry_is_computed_and_repaired(tmp_path, damage):
    model, image = frozen_read(tmp_path), pictures(1)
    good = model.encode_sam_image(image)
    (file,) = entries(tmp_path)
    content = file.read_bytes()
    damage(file)
    assert file.read_bytes() != content
    assert torch.equal(model.encode_sam_image(image), good) and counts(model) == (0, 2, 1)
    assert file.read_bytes() == content
    assert torch.equal(model.encode_sam_image(image), good) and counts(model) == (1, 2, 1)
    assert not (tmp_path / "harm").exists()


def test_two_processes_may_write_one_entry(tmp_path, monkeypatch):
    one, other, image = frozen_read(tmp_path), frozen_read(tmp_path), pictures(1)
    replace = os.replace

    def while_the_other_writes(source, target):
        monkeypatch.setattr(os, "replace", replace)
        assert torch.equal(other.encode_sam_image(image), good)
        replace(source, target)

    good = tiny_read().encode_sam_image(image)
    monkeypatch.setattr(os, "replace", while_the_other_writes)
    assert torch.equal(one.encode_sam_image(image), good)
    assert len(entries(tmp_path)) == 1 and counts(one) == counts(other) == (0, 1, 0)
    assert torch.equal(one.encode_sam_image(image), good) and counts(one) == (1, 1, 0)


def test_a_stop_while_an_entry_is_written_leaves_nothing_behind(tmp_path, monkeypatch):
    model = frozen_read(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.encode_sam_image(pictures(1))
    assert entries(tmp_path) == []


def test_a_file_in_place_of_the_folder_ends_nothing(tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder", encoding="utf-8")
    model, image = frozen_read(tmp_path / "cache"), pictures(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(model.encode_sam_image(image), tiny_read().encode_sam_image(image))
    assert len([r for r in caplog.records if "no more SAM features" in r.getMessage()]) == 1
    assert counts(model) == (0, 3, 0)


def test_a_full_disk_ends_nothing_and_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    model, images = frozen_read(tmp_path), pictures(2)
    model.encode_sam_image(images[:1])
    kept = entries(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        model.encode_sam_image(images)
        model.encode_sam_image(images)
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1
    assert entries(tmp_path) == kept and counts(model) == (2, 3, 0), "what is there is still read"


@pytest.mark.parametrize("lora", [0, 4])
def test_training_learns_the_same_with_the_cache_on(tmp_path, lora):
    """The first pass fills the cache, the second reads it; gradients reach the decoder and the words in both alike."""
    from model import add_lora

    def gradients(model: READForCausalLM) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**training_batch()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = add_lora(tiny_read(), r=lora, dropout=0.0)
    set_trainable(model)
    model.train()
    plain = gradients(model)
    model.cache_sam_features(tmp_path)
    first, second = gradients(model), gradients(model)
    assert counts(model) == (2, 2, 0)
    assert any(name.startswith("sam.mask_decoder.") and grad.any() for name, grad in second.items())
    assert plain.keys() == first.keys() == second.keys()
    assert all(torch.equal(plain[name], first[name]) and torch.equal(plain[name], second[name]) for name in plain)


def test_an_encoder_that_trains_or_is_split_is_refused_or_passed_by(tmp_path, caplog):
    model, image = tiny_read(), pictures(1)
    with pytest.raises(ValueError, match="not frozen"):
        model.cache_sam_features(tmp_path)
    assert model.sam_cache is None
    model.requires_grad_(False)
    model.cache_sam_features(tmp_path)
    weight = model.sam.image_encoder.neck[0].weight
    weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        assert not model.encode_sam_image(image).requires_grad
        model.encode_sam_image(image)
    assert len([r for r in caplog.records if "not cached" in r.getMessage()]) == 1
    weight.requires_grad_(False).ds_id = 0  # what DeepSpeed marks the parameters of ZeRO-3 with
    model.encode_sam_image(image)
    assert counts(model) == (0, 0, 0) and not entries(tmp_path)
    with pytest.raises(ValueError, match="split among processes"):
        model.cache_sam_features(tmp_path)


def test_the_model_on_disk_knows_nothing_of_the_cache(tmp_path):
    model = frozen_read(tmp_path / "cache")
    model.encode_sam_image(pictures(1))
    assert model.state_dict().keys() == tiny_read().state_dict().keys()
    assert model.config.to_dict() == tiny_read().config.to_dict()
    model.save_pretrained(tmp_path / "model")
    assert READForCausalLM.from_pretrained(tmp_path / "model").sam_cache is None
