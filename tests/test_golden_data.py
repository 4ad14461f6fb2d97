"""Tokens, labels, padding and picture views against the recordings of the original."""

import json

import cv2
import numpy as np
import pytest
import torch
from golden_dir import golden_dirs
from transformers import CLIPImageProcessorPil

from utils.conversation import END_OF_TURN, IGNORE_INDEX, mask_labels, tokenize_prompt
from utils.image import image_views, read_image
from utils.tokenizer import load_tokenizer

GOLDEN = golden_dirs()


@pytest.mark.parametrize("folder", [f for f in GOLDEN if (f / "data/tokenizer.json").is_file()], ids=lambda f: f.name)
def test_token_ids_and_text(folder):
    tokenizer = load_tokenizer(folder / "ckpt/read_tiny")
    table = json.loads((folder / "data/tokenizer.json").read_text())
    for name, token in (("SEG", "[SEG]"), ("im_start", "<im_start>"), ("im_end", "<im_end>")):
        assert tokenizer.convert_tokens_to_ids(token) == table["special"][name]
    assert len(tokenizer) == table["special"]["len"]
    for probe in table["probes"]:
        assert tokenizer.encode(probe["text"]) == probe["input_ids"], probe["text"]
        assert tokenizer.encode(probe["text"], add_special_tokens=False) == probe["no_special"]
        assert tokenizer.decode(probe["input_ids"], skip_special_tokens=True) == probe["decode_skip_special"]
    for probe in table["image_probes"]:
        assert tokenize_prompt(probe["text"].replace("<im_start><image><im_end>", "<image>"), tokenizer, 1) == (
            probe["input_ids"]
        ) or "<im_start>" not in probe["text"]
    for probe in table["decode_probes"]:
        assert tokenizer.decode(probe["ids"], skip_special_tokens=True) == probe["skip_special"]


def collate_cases():
    for folder in GOLDEN:
        if (folder / "data/collate.json").is_file():
            arrays = np.load(folder / "data/collate.npz")
            for name, case in json.loads((folder / "data/collate.json").read_text()).items():
                if f"{name}/input_ids" in arrays:
                    yield pytest.param(folder, name, case, id=f"{folder.name}-{name}")


@pytest.mark.parametrize(("folder", "name", "case"), list(collate_cases()))
def test_ids_labels_and_masks(folder, name, case):
    tokenizer = load_tokenizer(folder / "ckpt/read_tiny")
    arrays = np.load(folder / "data/collate.npz")
    ids, attention = arrays[f"{name}/input_ids"], arrays[f"{name}/attention_masks"]
    labels = arrays[f"{name}/labels"] if f"{name}/labels" in arrays else None
    marked = any("<im_start>" in text for text in case["conversation_list"])
    left = case.get("padding") == "left"
    for row, text in enumerate(case["source_conversations"]):
        # Patches of 1: the recordings count a picture as one slot.
        ours = tokenize_prompt(text, tokenizer, 1, mark=marked)
        kept = ours[: ids.shape[1]]  # the truncated case keeps max_length - 255 columns
        place = slice(ids.shape[1] - len(kept), None) if left else slice(0, len(kept))
        assert ids[row, place].tolist() == kept
        assert attention[row, place].all() and attention[row].sum() == len(kept)
        if labels is not None and "ASSISTANT:" in text:  # the Llama-2 layout is not one of READ's
            masked = mask_labels(text, ours, tokenizer, 1, mark=marked)[: len(kept)]
            assert labels[row, place].tolist() == masked
            assert (labels[row][~attention[row]] == IGNORE_INDEX).all()
            supervised = tokenizer.decode([i for i in masked if i != IGNORE_INDEX])
            assert len(kept) < len(ours) or supervised.endswith(END_OF_TURN)


@pytest.mark.parametrize(
    "file", [p for f in GOLDEN for p in sorted((f / "images").glob("*_preprocessed.npz"))], ids=lambda p: p.stem
)
def test_picture_views(file):
    folder = file.parents[1]
    arrays = np.load(file)
    image = read_image(file.parent / f"{file.stem.removesuffix('_preprocessed')}.png")
    views = image_views(image, CLIPImageProcessorPil.from_pretrained(folder / "ckpt/clip_tiny"), 1024)
    sub = torch.from_numpy(arrays["sam_tensor_sub16"])
    assert (views.sam[:, ::16, ::16] - sub).abs().max() <= 1e-5
    assert views.sam.double().sum().item() == pytest.approx(float(arrays["sam_tensor_sum"][0]), rel=1e-5, abs=1e-2)
    pixels = views.sam[:, : views.sam_size[0], : views.sam_size[1]].permute(1, 2, 0).numpy()
    resized = np.rint(pixels * [58.395, 57.12, 57.375] + [123.675, 116.28, 103.53]).astype(np.uint8)
    recorded = arrays["sam_resized_uint8"]
    step = 4 if recorded.shape[0] < resized.shape[0] else 1
    assert np.array_equal(resized[::step, ::step], recorded)
    assert np.abs(views.clip.numpy() - arrays["clip_pixel_values"]).max() <= 1e-5
    assert views.original_size == image.shape[:2]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grey.png", lambda rgb: rgb[..., 0]),
        ("alpha.png", lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 128, np.uint8)])),
        ("deep.png", lambda rgb: rgb.astype(np.uint16) * 257),
    ],
)
def test_odd_files_become_rgb(tmp_path, name, make):
    rgb = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / name), make(rgb))
    image = read_image(tmp_path / name)
    assert image.shape == (9, 7, 3) and image.dtype == np.uint8


def test_missing_and_damaged_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        read_image(tmp_path / "nowhere.jpg")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(ValueError, match="torn.jpg"):
        read_image(tmp_path / "torn.jpg")
