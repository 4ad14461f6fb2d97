"""Bad input: each case has one outcome, an error that names file and field or a result that is written down.

What is wrong with a whole data set is told when it is opened, what is wrong with one picture when that picture is asked for, so
that an evaluation can go on with the next one.
"""

import json
import pickle
import resource
import time
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from tiny import tiny_config
from transformers import CLIPImageProcessorPil

from dataset import build_eval, build_train
from dataset.check import main as check
from dataset.collate import collate
from dataset.reason_seg import FAR, ReasonTraining, draw_mask, read_annotation
from dataset.refer_api import Refer, draw_segmentation
from dataset.types import Sample
from model import READForCausalLM, READProcessor, SaspConfig, losses, select_points
from model.losses import mask_on_token_grid
from model.sasp import fine_map_matrices
from utils.image import SLIM, image_views, read_image
from utils.tokenizer import load_tokenizer

BASE = Path(__file__).resolve().parents[1] / "assets/read-mini-base"
SIZES = [(1, 1), (1, 2), (3, 5), (5, 3), (1, 20000), (20000, 1), (30, 20000), (20000, 30)]
"""(height, width) of odd pictures."""


@pytest.fixture(scope="module")
def tiny():
    """A tiny READ with random weights and the mini vocabulary, which holds 4096 positions, like the 7B."""
    square = {"height": 56, "width": 56}
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    processor = READProcessor(load_tokenizer(BASE), clip, sam_image_size=64, num_patches=16)
    ids = {"seg_token_id": processor.seg_token_id, "im_start_id": processor.im_start_id, "im_end_id": processor.im_end_id}
    config = tiny_config(**ids)
    config.llava.text_config.vocab_size = len(processor.tokenizer)
    config.llava.text_config.max_position_embeddings = 4096
    torch.manual_seed(0)
    return READForCausalLM(config).eval(), processor


def smooth(height, width, seed=0):
    """A picture (H, W, 3) without edges, which a JPEG keeps."""
    cells = np.random.default_rng(seed).integers(20, 235, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_LINEAR)


def sample(image, question="the cup", answer="It is [SEG].", **more):
    masks = np.zeros((1, *image.shape[:2]), np.uint8)
    masks[0, image.shape[0] // 2 :, image.shape[1] // 2 :] = 1
    return Sample("a.jpg", image, [[(question, answer)]], masks, [True], [question], **more)


def memory():
    """MB that this process ever took."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------ picture files

RGB = smooth(40, 50)
GREY = np.repeat(RGB[..., :1], 3, axis=2)
ALPHA = np.tile(np.linspace(0, 255, 50).astype(np.uint8), (40, 1))
DEEP = RGB.astype(np.uint16) * 256 + np.random.default_rng(1).integers(0, 256, RGB.shape, dtype=np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)


def pil(array, mode=None, **options):
    return lambda file: (array if isinstance(array, Image.Image) else Image.fromarray(array, mode)).save(file, **options)


def deep(array):
    return lambda file: cv2.imwrite(str(file), array[..., ::-1] if array.ndim == 3 else array)


@pytest.mark.parametrize(
    ("name", "write", "expected", "tolerance"),
    [
        ("grey.png", pil(RGB[..., 0]), GREY, 0),
        ("grey.jpg", pil(RGB[..., 0], quality=95), GREY, 3),
        ("bits.png", pil(RGB[..., 0] > 100), (GREY > 100) * 255, 0),
        ("grey_alpha.png", pil(np.dstack([RGB[..., 0], ALPHA])), GREY, 0),
        ("alpha.png", pil(np.dstack([RGB, ALPHA])), RGB, 0),  # dropped: blended with black, the left edge would be black
        ("palette.png", pil(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
        ("palette_transparent.png", pil(PALETTE, transparency=0), np.asarray(PALETTE.convert("RGB")), 0),
        ("deep_grey.png", deep(DEEP[..., 0]), GREY, 0),  # scaled to 8 bits: clipped, all would be 255
        ("deep.png", deep(DEEP), RGB, 0),
        ("deep.tif", deep(DEEP), RGB, 1),
        ("camera_12_bits.png", deep(DEEP >> 4), RGB >> 4, 0),  # by what the file can hold, not by what it does
        ("cmyk.jpg", pil(Image.fromarray(RGB).convert("CMYK"), quality=95), RGB, 6),
        ("a_png_named.jpg", pil(RGB, format="PNG"), RGB, 0),
        ("lossless.webp", pil(RGB, lossless=True), RGB, 0),
        ("1x1.png", pil(RGB[:1, :1]), RGB[:1, :1], 0),
    ],
)  # fmt: skip
def test_kinds_of_picture_files_have_the_right_pixels(tmp_path, name, write, expected, tolerance):
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == seen.shape == ((40, 50, 3) if orientation < 5 else (50, 40, 3))
    assert np.abs(image.astype(int) - seen).max() <= 2


def bomb(file):
    """A PNG that says it has 10^10 pixels."""
    Image.fromarray(RGB).save(file)
    data = bytearray(file.read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


def cut(share, **options):
    def write(file):
        Image.fromarray(smooth(300, 400)).save(file, **options)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return write


def preview(file):
    """A JPEG with a whole JPEG in its EXIF data, as cameras write it, and then cut short."""
    cut(1)(file)
    whole = file.read_bytes()
    small = b"Exif\0\0" + whole[:2000] + b"\xff\xd9"
    file.write_bytes(whole[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + whole[2:-500])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: file.write_bytes(b""), "is an empty file"),
        (lambda file: file.write_text("no picture\n" * 20), "cannot be read"),
        (lambda file: file.mkdir(), "is a folder"),
        (bomb, "cannot be read"),
        (cut(0.02), "is cut short"),
        (cut(0.9), "is cut short"),
        (cut(0.5, progressive=True), "is cut short"),
        (cut(0.5, format="PNG"), "cannot be read"),
        (lambda file: (cut(0.5)(file), file.write_bytes(file.read_bytes() + bytes(5000))), "is cut short"),
        (preview, "is cut short"),
    ],
    ids=["empty", "text", "folder", "bomb", "head", "most", "progressive", "png", "zeros", "preview"],
)  # fmt: skip
def test_files_that_are_no_whole_picture_are_named(tmp_path, write, words):
    """Of a JPEG that is cut short OpenCV makes a picture whose rest is grey, and the original measured that."""
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=f"a.jpg {words}"):
        read_image(tmp_path / "a.jpg")


def test_what_stands_behind_a_whole_picture_does_not_matter(tmp_path):
    cut(1)(tmp_path / "a.jpg")
    whole = read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"a film of the moment" * 50)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), whole)


# ------------------------------------------------------------------------------------------------ odd sizes


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_any_shape_are_segmented(tiny, size):
    """1 x 20000 used to need gigabytes: 336 x 6720000 pixels for CLIP, 24 x 6720000 cells for SasP."""
    model, processor = tiny
    begun, before = time.monotonic(), memory()
    image = smooth(*size)
    for geometry in ("released", "exact"):
        model.config.sasp = replace(model.config.sasp, geometry=geometry)
        with torch.no_grad():
            segments = model(**collate([sample(image)], processor, training=True).model_inputs()).segments
        (logits,), (points,) = segments.mask_logits, segments.points
        assert logits.shape == size and logits.isfinite().all()
        assert len(points) == 5 and (points >= 0).all() and (points <= torch.tensor([size[1], size[0]])).all()
    left = collate([sample(image, answer=None)], processor, training=False, padding="left")
    found = model.generate_segments(**left.model_inputs(), max_new_tokens=2, force_segment=True)
    assert found.segments.mask_logits[0].shape == size
    assert memory() - before < 400 and time.monotonic() - begun < 20


@pytest.mark.parametrize("size", [(2, 3 * SLIM), (200 * SLIM, 150), (3, 3 * SLIM + 1), (7 * SLIM, 6)], ids=str)
def test_clips_view_of_a_slim_picture_is_that_of_its_whole(size):
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    image = np.random.default_rng(0).integers(90, 160, (*size, 3), dtype=np.uint8)
    whole = torch.from_numpy(clip(Image.fromarray(image), return_tensors="np")["pixel_values"][0])
    assert (image_views(image, clip, 64).clip - whole).abs().max() < 2.1 / 255 / 0.26  # two grey levels, from rounding


def test_views_of_the_smallest_pictures():
    """(3, 5, 3) might be taken for a picture with its channels in front."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    mean, std = (torch.tensor(values)[:, None, None] for values in (clip.image_mean, clip.image_std))
    for height, width in ((1, 1), (3, 3), (3, 5), (5, 3), (1, 3), (3, 1)):
        image = np.empty((height, width, 3), np.uint8)
        image[:] = (200, 100, 50)
        views = image_views(image, clip, 64)
        assert ((views.clip * std + mean) * 255 - torch.tensor([200.0, 100, 50])[:, None, None]).abs().max() < 0.01
        assert max(views.sam_size) == 64 and min(views.sam_size) >= 1


@pytest.mark.parametrize("size", [(10, 10 * SLIM), (10, 10 * SLIM + 1), (640 * SLIM // 8, 20), (12, 700)], ids=str)
def test_sasp_of_a_slim_picture_is_that_of_the_padded_map(monkeypatch, size):
    from model import sasp

    values = torch.rand(2, 576, generator=torch.Generator().manual_seed(0))
    found = []
    for slim in (1, 10**9):
        monkeypatch.setattr(sasp, "SLIM", slim)
        sasp._fine_map_matrices.cache_clear()
        rows, columns = fine_map_matrices(size, 24, 336, "released", values.device)
        found.append((rows, columns, select_points(values, size, SaspConfig(num_points=20)).points))
    sasp._fine_map_matrices.cache_clear()
    for ours, padded in zip(*found, strict=True):
        assert (ours - padded).abs().max() < 2e-3


def test_the_similarity_loss_of_a_slim_picture_looks_at_its_middle(monkeypatch):
    before = memory()
    mask = torch.zeros(1, 20000, dtype=torch.uint8)
    mask[:, 10000:] = 1
    for of in (mask, mask.T):
        share = mask_on_token_grid(of, 24, 336).view(24, 24)
        share = share if of is mask else share.T
        assert share.mean() == pytest.approx(0.5, abs=1e-3) and (share.diff(dim=1) >= 0).all()
    assert memory() - before < 100
    for shape in ((10, 30 * SLIM), (11, 400), (500, 12)):
        mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
        ours = mask_on_token_grid(mask, 24, 336)
        with monkeypatch.context() as patched:
            patched.setattr(losses, "SLIM", 10**9)
            assert (mask_on_token_grid(mask, 24, 336) - ours).abs().mean() < 0.02


# ------------------------------------------------------------------------------------------------ ReasonSeg

SQUARE = [[3, 2], [9, 2], [9, 8], [3, 8]]
NAN = float("nan")


def reason(root, split="val", name="a", picture=True, note=True, **fields):
    """One picture of ReasonSeg, 24 x 32, and its annotation."""
    folder = root / "reason_seg/ReasonSeg" / split
    folder.mkdir(parents=True, exist_ok=True)
    if picture:
        Image.fromarray(smooth(24, 32)).save(folder / f"{name}.jpg")
    if note:
        record = {"text": ["the cup"], "is_sentence": False, "shapes": [{"label": "target", "points": SQUARE}], **fields}
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder / f"{name}.json"


def shape(*points, label="target"):
    return {"label": label, "points": list(points)}


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path):
    reason(tmp_path, "train"), reason(tmp_path, "val")
    (tmp_path / "reason_seg/ReasonSeg/explanatory").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ReasonSeg/test has no pictures: .*There are the splits train, val$"):
        build_eval("ReasonSeg", "test", tmp_path)
    with pytest.raises(FileNotFoundError, match="There are no splits in .*nosuch/reason_seg/ReasonSeg$"):
        build_eval("ReasonSeg", "val", tmp_path / "nosuch")
    with pytest.raises(FileNotFoundError, match=r"reason_seg, ReasonSeg\|test: .*the splits train, val"):
        build_train(["reason_seg"], [1], tmp_path, reason_seg_data="ReasonSeg|test")
    refer(tmp_path)
    with pytest.raises(ValueError, match="refs.*p has no ref of split 'testA'; its splits are: train, val$"):
        build_eval("refcoco", "testA", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/questions.csv").write_text("image,mask,question\nb.jpg,,cup\n")
    Image.fromarray(RGB).save(tmp_path / "own/b.jpg")
    with pytest.raises(ValueError, match="own has no split 'val', only train"):
        build_eval(str(tmp_path / "own"), "val", tmp_path)


def test_a_file_that_is_missing_fails_its_own_picture_alone(tmp_path, capsys):
    """The original looked for pictures only: one that was missing made the split smaller, and nobody knew."""
    for name in "abc":
        reason(tmp_path, name=name, picture=name != "a", note=name != "b")
    (tmp_path / "reason_seg/ReasonSeg/val/._c.jpg").write_bytes(b"left there by an archive")
    data = build_eval("ReasonSeg", "val", tmp_path)
    assert len(data) == 3 and data[2].masks.any()
    with pytest.raises(FileNotFoundError, match="a.jpg does not exist"):
        data[0]
    with pytest.raises(FileNotFoundError, match="b.json does not exist"):
        data[1]
    with pytest.raises(FileNotFoundError, match="val/a.jpg, .*val/b.json: does not exist"):  # training wants all of it at once
        ReasonTraining(tmp_path, "ReasonSeg|val")
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 2
    told = capsys.readouterr().out
    assert "a.jpg does not exist" in told and "b.json does not exist" in told and told.count("broken") == 2


@pytest.mark.parametrize("shapes", [[], [shape([1, 1], [9, 1], [9, 9], label="Flag")]], ids=["none", "flag"])
def test_a_file_without_polygons_has_an_empty_target_and_counts(tmp_path, capsys, shapes):
    """Two of ReasonSeg's 779 test files are such. The original evaluates them, so the published numbers have them in."""
    reason(tmp_path, shapes=shapes), reason(tmp_path, "train", shapes=shapes)
    data = build_eval("ReasonSeg", "val", tmp_path)
    assert len(data) == 1 and data[0].exists == [True]
    assert data[0].masks.shape == (1, 24, 32) and not data[0].masks.any()
    assert not ReasonTraining(tmp_path).draw(np.random.default_rng(0)).masks.any()
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 0
    told = capsys.readouterr().out
    assert told.count("a.json: it has no shapes, so its target is empty") == 2 and "trains   reason_seg: ReasonSeg" in told


@pytest.mark.parametrize(
    ("shapes", "pixels", "note"),
    [
        ([shape([4, 5])], 1, "a shape of 1 points is drawn as a dot"),
        ([shape([4, 5], [10, 5])], 7, "a shape of 2 points is drawn as a line"),
        ([shape([-9, -9], [99, -9], [99, 99], [-9, 99])], 24 * 32, None),
        ([shape([50, 50], [60, 50], [60, 60])], 0, "its shapes cover nothing of the picture"),
        ([shape([-FAR, -FAR], [FAR, -FAR], [FAR, FAR], [-FAR, FAR])], 24 * 32, None),
        ([shape([1.9, 1.9], [3.9, 1.9], [3.9, 3.9], [1.9, 3.9])], 9, None),
        ([shape(*SQUARE, label="the mug")], 49, "a shape with the label 'the mug' counts as the target"),
        ([shape(*SQUARE, label="ignore this")], 0, "its shapes cover nothing of the picture"),
    ],
    ids=["dot", "line", "over", "outside", "far", "fraction", "label", "ignored"],
)
def test_odd_shapes_are_drawn_as_the_original_drew_them(tmp_path, capsys, shapes, pixels, note):
    reason(tmp_path, shapes=shapes), reason(tmp_path, "train")
    begun = time.monotonic()
    assert (build_eval("ReasonSeg", "val", tmp_path)[0].masks == 1).sum() == pixels
    assert time.monotonic() - begun < 5
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("note", "broken"))]
    assert [note in line for line in told] == [True] * len(told) and len(told) == (note is not None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shapes": [shape(*SQUARE), shape([NAN, 1], [5, 5], [9, 1])]}, r", shapes\[1\]: points: \[nan, 1.0\] is no place"),
        ({"shapes": [shape([None, 1], [5, 5], [9, 1])]}, r", shapes\[0\]: points: \[nan, 1.0\] is no place"),
        ({"shapes": [shape([float("inf"), 1], [5, 5], [9, 1])]}, r", shapes\[0\]: points: \[inf, 1.0\] is no place"),
        ({"shapes": [shape([3e9, 0], [5, 5], [9, 1])]}, r", shapes\[0\]: points: .* is no place in or near a picture"),
        ({"shapes": [shape()]}, r", shapes\[0\]: points: is empty"),
        ({"shapes": [shape([1, 2, 3], [4, 5, 6])]}, r", shapes\[0\]: points: must be pairs"),
        ({"shapes": [shape([1, 2], [4])]}, r", shapes\[0\]: points: must be pairs"),
        ({"shapes": [{"label": "target"}]}, r", shapes\[0\] lacks the field 'points'"),
        ({"shapes": [{"label": None, "points": SQUARE}]}, r", shapes\[0\]: "),
        ({"shapes": None}, " is no ReasonSeg file"),
        ({"text": []}, r", text: must be a question, or a list of them, found \[\]"),
        ({"text": ["cup", " "]}, ", text: must be a question"),
        ({"text": [7]}, ", text: must be a question"),
        ({"is_sentence": "false"}, ", is_sentence: must be true or false, found 'false'"),
        ({"false_premise_QA": [["a kite", False]]}, ", false_premise_QA: "),
    ],
)
def test_broken_annotations_fail_their_picture_and_name_the_field(tmp_path, capsys, fields, words):
    """OpenCV does not come back from a polygon with NaN."""
    file = reason(tmp_path, **fields)
    reason(tmp_path, name="b")
    data = build_eval("ReasonSeg", "val", tmp_path)
    with pytest.raises(ValueError, match=f"val/a.json{words}"):
        data[0]
    assert data[1].masks.any()
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 2
    assert str(file) in capsys.readouterr().out


def test_annotations_of_a_turned_picture_are_drawn_as_it_is_seen(tmp_path):
    file = reason(tmp_path, shapes=[shape([1, 29], [4, 29], [4, 31], [1, 31])])
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(smooth(24, 32)).save(file.with_suffix(".jpg"), exif=exif)
    item = build_eval("ReasonSeg", "val", tmp_path)[0]
    assert item.image.shape == (32, 24, 3) and item.masks.shape == (1, 32, 24) and item.masks.sum() == 12


def test_shapes_of_the_smallest_picture():
    assert draw_mask([shape(*SQUARE)], 1, 1).sum() == 0 and draw_mask([shape([0, 0], [5, 0], [5, 5])], 1, 1).sum() == 1
    assert draw_mask([shape([0, 0], [20000, 0], [20000, 9])], 1, 20000).all()


# ------------------------------------------------------------------------------------------------ the refer family


def refer(root, segmentation=((3.0, 2, 9, 2, 9, 8, 3, 8),), ann_id=5, sentences=({"sent": "cup", "sent_id": 1},), size=(24, 32)):
    """refcoco with two pictures in val, the first of which is given, and one in train."""
    folder, images = root / "refer_seg/refcoco", root / "refer_seg/images/mscoco/images/train2014"
    folder.mkdir(parents=True, exist_ok=True), images.mkdir(parents=True, exist_ok=True)
    for name in "abc":
        Image.fromarray(smooth(24, 32)).save(images / f"{name}.jpg")
    sizes = [size, (24, 32), (24, 32)]
    good = [[3.0, 2, 9, 2, 9, 8, 3, 8]]
    content = {
        "images": [{"id": i, "file_name": f"{'abc'[i]}.jpg", "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "annotations": [{"id": 5, "segmentation": segmentation}, {"id": 6, "segmentation": good}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    refs = [{"ref_id": i, "ann_id": 6, "image_id": i, "split": "val", "sentences": [{"sent": "bag", "sent_id": 10 + i}]}
            for i in range(3)]  # fmt: skip
    refs[0] |= {"ann_id": ann_id, "sentences": list(sentences)}
    refs[2]["split"] = "train"
    (folder / "refs(unc_exclude_unified).p").write_bytes(pickle.dumps(refs))
    return folder


def compressed(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "ann_id", "pixels"),
    [
        ([], 5, 0),
        ([[]], 5, 0),
        ({"size": [24, 32], "counts": [768]}, 5, 0),
        ({"size": [24, 32], "counts": compressed(np.zeros((24, 32)))}, 5, 0),
        ([[3.0, 4.0]], 5, 0),
        ([[3.0, 4.0, 9.0, 4.0]], 5, 0),  # pycocotools would take it for a box
        ([[50.0, 50, 60, 50, 60, 60]], 5, 0),
        ([], -1, 0),
        ([], [5, 6], 36),
        ([], (5, -1, 6), 36),
        ([[3.0, 2, 9, 2, 9, 8, 3, 8], [3.0, 4]], 5, 36),
        ([{"size": [24, 32], "counts": [0, 24, 744]}], 5, 24),
        ({"size": [24.0, 32.0], "counts": [0.0, 24, 744]}, 5, 24),
        ([[3, 2, 9, 2, 9, 8, 3, 8]] * 3, 5.0, 36),
        ([[-50.0, -50, 99, -50, 99, 99, -50, 99]], 5, 24 * 32),
    ],
)
def test_empty_masks_are_empty_targets_and_noted(tmp_path, capsys, segmentation, ann_id, pixels):
    refer(tmp_path, segmentation, ann_id)
    data = build_eval("refcoco", "val", tmp_path)
    assert len(data) == 2 and data[0].exists == [True] and data[0].masks.sum() == pixels
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 0
    told = capsys.readouterr().out
    assert ("is asked for, and empty" in told) == (pixels == 0) and "broken" not in told


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[NAN, 4, 9, 4, 9, 9]], "a polygon has a point that is no place"),
        ([[None, 4, 9, 4, 9, 9]], "a polygon has a point that is no place"),
        ([[1e9, 4, 9, 4, 9, 9]], "a polygon has a point that is no place"),
        ([[3.0, 4, 9, 4, 9, 9, 3]], "a polygon must be a list of numbers x, y"),
        ([[[3, 4], [9, 4], [9, 9]]], "a polygon must be a list of numbers x, y"),
        ([["a", 4, 9, 4, 9, 9]], "a polygon must be a list of numbers"),
        ([3.0, 4, 9, 4, 9, 9], "a polygon must be a list of numbers x, y"),
        ({"size": [12, 12], "counts": [144]}, "an RLE is for 12 x 12 pixels, the picture has 24 x 32"),
        ({"size": [24, 32], "counts": [0, 5]}, "an RLE is damaged: its runs have 5 pixels"),
        ({"size": [24, 32], "counts": []}, "an RLE is damaged"),
        ({"size": [24, 32], "counts": [-8, 776]}, "an RLE is damaged"),
        ({"size": [24, 32], "counts": "zzzz"}, "an RLE "),
        ({"size": [24, 32], "counts": compressed(np.ones((24, 16)))}, "an RLE is damaged: its runs have 384 pixels"),
        ({"size": [24, 32], "counts": None}, "an RLE cannot be read"),
        ({"size": [24, 32]}, "an RLE lacks the field 'counts'"),
        ({"counts": [768]}, "an RLE lacks the field 'size'"),
        ("abc", "a polygon must be a list of numbers"),
        *((value, "a polygon must be a list of numbers, an RLE an object") for value in (None, 5, True, "")),
        *(([[value, 2, 9, 2, 9, 8]], "a polygon must be a list of numbers") for value in ("3", True, 10**400, [3], {})),
        *(([[value, 2, 9, 2, 9, 8]], "a polygon has a point that is no place") for value in (1e300, float("inf"))),
        ([[10**6 * (-1) ** n for n in (0, 0, 1, 0, 1, 1, 0, 1)]], "a polygon has an outline of 8000000 pixels"),
        *(({"size": size, "counts": [768]}, "an RLE cannot be read: size")
          for size in (["24", "32"], [24.5, 32], [True, 32], [24], [24, 32, 3], "24", None, {}, [NAN, 32], [10**400, 32])),
        *(({"size": [24, 32], "counts": counts}, "an RLE cannot be read: counts")
          for counts in (["768"], [767.5, 0.5], [True, 767], [None], [[768]], [10**400], 768, {}, [NAN])),
        *(({"size": [24, 32], "counts": counts}, "an RLE cannot be read: ") for counts in ("o" * 10**6, "\x80", "é", "~", " ")),
        ({}, "an RLE lacks the field 'size'"),
    ],
)  # fmt: skip
def test_segmentations_that_cannot_be_drawn_are_named(tmp_path, capsys, segmentation, words):
    """pycocotools ends the process on a polygon with NaN, and fills a short RLE up with what lies in memory."""
    refer(tmp_path, segmentation)
    data = build_eval("refcoco", "val", tmp_path)
    with pytest.raises(ValueError, match=f"instances.json, annotation 5, segmentation: {words}"):
        data[0]
    assert data[1].masks.sum() == 36
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2
    assert f"annotation 5, segmentation: {words.split(':')[0]}" in capsys.readouterr().out


def test_runs_of_any_compressed_mask_are_understood():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (60, 90), (1, 5000)):
        for share in (0, 0.02, 0.5, 1):
            mask = cv2.blur((rng.random((height, width)) < share).astype(np.uint8) * 255, (3, 3)) > 90
            for counts in (compressed(mask), compressed(mask).encode()):
                assert np.array_equal(draw_segmentation({"size": [height, width], "counts": counts}, height, width), mask)


def test_pictures_of_the_refer_family_that_are_missing_or_of_another_size(tmp_path, capsys):
    refer(tmp_path, size=(32, 24))
    (tmp_path / "refer_seg/images/mscoco/images/train2014/b.jpg").unlink()
    data = build_eval("refcoco", "val", tmp_path)
    with pytest.raises(ValueError, match=r"a.jpg has 24 x 32 pixels .*instances.json, image 0, height and width: 32 x 24"):
        data[0]
    with pytest.raises(FileNotFoundError, match="b.jpg does not exist"):
        data[1]
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco", "--pictures"]) == 2
    told = capsys.readouterr().out
    assert "b.jpg does not exist" in told and "a.jpg has 24 x 32 pixels" in told


def test_records_of_the_refer_family_that_are_broken(tmp_path):
    folder = refer(tmp_path, sentences=())
    assert len(build_eval("refcoco", "val", tmp_path)) == 1  # without expressions there is nothing to measure
    refer(tmp_path, sentences=({"sent": None, "sent_id": 1},))
    with pytest.raises(ValueError, match="ref 0 is broken: sent must be text, found None"):
        build_eval("refcoco", "val", tmp_path)
    refer(tmp_path, ann_id=9)
    with pytest.raises(ValueError, match="has no annotation 9"):
        build_eval("refcoco", "val", tmp_path)[0]
    content = json.loads((folder / "instances.json").read_text())
    for broken, words in (
        ("{", "instances.json is no JSON"),
        ("[]", "instances.json: must be a JSON object"),
        ("{}", "instances.json has no field 'images'"),
        (json.dumps({**content, "images": [{"file_name": "a.jpg"}]}), "each of the images needs a field 'id'"),
        (json.dumps({**content, "images": None}), "has no list in the field 'images'"),
    ):
        (folder / "instances.json").write_text(broken)
        with pytest.raises(ValueError, match=words):
            Refer(tmp_path, "refcoco")
    (folder / "instances.json").write_text(json.dumps(content))
    for broken, words in (({}, "must hold a list of refs, found a dict"), ([5], "ref 0 is broken")):
        (folder / "refs(unc_exclude_unified).p").write_bytes(pickle.dumps(broken))
        with pytest.raises(ValueError, match=words):
            build_eval("refcoco", "val", tmp_path)


@pytest.mark.parametrize("part", ["images", "annotations"])
@pytest.mark.parametrize(("value", "words"), [("first", "have the same id"), (None, "must be a whole number or text"),
                                              (True, "must be a whole number"), ([1], "must be a whole number")])  # fmt: skip
def test_ids_that_are_doubled_or_none_are_named(tmp_path, capsys, part, value, words):
    """The last of two records used to win: its mask was drawn for the expressions of both."""
    file = refer(tmp_path) / "instances.json"
    content = json.loads(file.read_text())
    content[part][1]["id"] = content[part][0]["id"] if value == "first" else value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances.json: each of the {part} needs a field 'id' of its own: {part}\[.*{words}"):
        Refer(tmp_path, "refcoco")
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2
    assert "broken   refcoco: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *((side, value, f"{side}: must be a whole number from 1 to")
          for side in ("height", "width") for value in ("24", None, 24.5, [24], True, 0, -1, NAN)),
        ("height", 10**9, "height and width: 1000000000 x 32 are more than"),
        *(("file_name", value, "file_name: must be the name of an image file") for value in (None, 5, "", ["a.jpg"])),
    ],
)  # fmt: skip
def test_fields_of_an_image_of_the_refer_family_are_checked(tmp_path, field, value, words):
    file = refer(tmp_path) / "instances.json"
    content = json.loads(file.read_text())
    content["images"][0][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"ref 0 is broken: its image in instances.json, 0, {words}"):
        build_eval("refcoco", "val", tmp_path)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2
    del content["images"][0][field]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"ref 0 is broken: its image in instances.json, 0: lacks the field '{field}'"):
        build_eval("refcoco", "val", tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *(("split", value, "it must be a dict with the name of a `split`") for value in (None, 5, ["val"])),
        *(("image_id", value, "image_id: instances.json has no image ") for value in (None, 9, "0", [0], True, NAN)),
        *(("ann_id", value, "ann_id: must be the id of an annotation or a list") for value in (None, True, {}, [None], 1.5)),
        *(("ref_id", value, "ref_id: must be a whole number or text") for value in (None, [1], False)),
        *(("sentences", value, "sentences: must be a list") for value in (None, "cup", 5, {})),
        *(("sentences", [value], r"sentences\[0\]: must be a dict") for value in (None, "cup", 5, [])),
    ],
)  # fmt: skip
def test_fields_of_a_ref_are_checked(tmp_path, field, value, words):
    file = refer(tmp_path) / "refs(unc_exclude_unified).p"
    refs = pickle.loads(file.read_bytes())
    refs[0][field] = value
    file.write_bytes(pickle.dumps(refs))
    with pytest.raises(ValueError, match=f"ref 0 is broken: {words}"):
        build_eval("refcoco", "val", tmp_path)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(({name: value}, f"{name}: must be true or false, found ")
          for name in ("is_false_premise", "exist") for value in ("false", "", None, 2, 0.0, [], "0")),
        *(({"sent": value}, "sent must be text, found ") for value in (None, 5, ["cup"], True)),
        *(({"sent": value}, "sent must not contain ")
          for value in ("a </s> b", "the <image>", "[seg] cup", "<im_start>", "a ASSISTANT: b", "<unk>", "a\0b", "\ud800")),
        *(({"exist": False, "gt_sent": value}, "gt_sent must ") for value in (5, ["cup"], "a </s> b", "[SEG]")),
        *(({"sent_id": value}, "sent_id: must be a whole number or text") for value in (None, [1], True)),
    ],
)  # fmt: skip
def test_fields_of_a_sentence_are_checked(tmp_path, fields, words):
    """The text "false" would count as true, and a mark of the conversation would stop the training at a random step."""
    refer(tmp_path, sentences=({"sent": "cup", "sent_id": 1}, {"sent": "bag", "sent_id": 2, **fields}))
    with pytest.raises(ValueError, match=f"refs.*ref 0 is broken: .*{words}") as error:
        build_eval("refcoco", "val", tmp_path)
    assert "sentences[1]" in str(error.value)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2


@pytest.mark.parametrize(("fields", "exists"), [({"exist": 0}, False), ({"exist": 1}, True), ({"is_false_premise": 1}, False),
                                                ({"is_false_premise": 0}, True), ({"exist": True}, True)])  # fmt: skip
def test_truths_may_be_numbers(tmp_path, fields, exists):
    refer(tmp_path, sentences=({"sent": "cup", "sent_id": 1, **fields},))
    assert build_eval("refcoco", "val", tmp_path)[0].exists == [exists]


def test_expressions_without_text_are_left_out_and_told(tmp_path, caplog):
    refer(tmp_path, sentences=({"sent": " ", "sent_id": 7}, {"sent": "cup", "sent_id": 1}, {"sent": "", "sent_id": 8}))
    assert build_eval("refcoco", "val", tmp_path)[0].questions == ["cup"]
    assert "split val: left out, as they have no text: sent_id 7, sent_id 8" in caplog.text


def test_false_premises_that_cannot_be_corrected_are_left_out_of_training(tmp_path, caplog):
    """They used to stop the training at a random step."""
    false = [{"sent": f"no {n}", "sent_id": n, "is_false_premise": True, "gt_sent": said}
             for n, said in enumerate(["", None, " "])]  # fmt: skip
    refer(tmp_path, sentences=[{"sent": "cup", "sent_id": 9}, *false])
    root = tmp_path / "refer_seg"
    (root / "refcoco").rename(root / "fprefcoco")
    file = (root / "fprefcoco/refs(unc_exclude_unified).p").rename(root / "fprefcoco/refs(berkeley_exclude_unified).p")
    refs = pickle.loads(file.read_bytes())
    assert len(build_eval("fprefcoco", "val", tmp_path)[0].questions) == 4
    file.write_bytes(pickle.dumps([{**ref, "split": "train"} for ref in refs]))
    mixture = build_train(["correct_refer_seg"], [1], tmp_path, correct_refer_seg_data="fprefcoco", num_classes_per_sample=4)
    assert {text for i in range(20) for text in mixture.sample(0, i).questions} == {"cup", "bag"}
    assert "3 false premises have no gt_sent and are left out" in caplog.text
    file.write_bytes(pickle.dumps([{**refs[0], "split": "train", "sentences": false}]))
    with pytest.raises(ValueError, match="false premises alone, and none has a gt_sent"):
        build_train(["correct_refer_seg"], [1], tmp_path, correct_refer_seg_data="fprefcoco")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_instances_in_unicode_and_names_of_windows_are_read(tmp_path, encoding):
    file = refer(tmp_path) / "instances.json"
    content = json.loads(file.read_text())
    images = tmp_path / "refer_seg/images/mscoco/images/train2014"
    (images / "größe").mkdir()
    (images / "a.jpg").rename(images / "größe/a.jpg")
    content["images"][0]["file_name"] = "größe\\a.jpg"
    file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert build_eval("refcoco", "val", tmp_path)[0].image_path.endswith("größe/a.jpg")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("instances.json", b"", "is empty"),
        ("instances.json", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("instances.json", b"[" * 99999, "nested too deeply"),
        ("instances.json", '{"images": "größe"}'.encode("cp1252"), "line 1: is no UTF-8 text"),
        ("instances.json", b'{"images": {}, "annotations": []}', "has no list in the field 'images'"),
        ("instances.json", b'{"images": [5], "annotations": []}', r"images\[0\] must be an object"),
        ("refs(unc_exclude_unified).p", b"", "is empty"),
        ("refs(unc_exclude_unified).p", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("refs(unc_exclude_unified).p", b"<html>", "is a web page"),
        ("refs(unc_exclude_unified).p", b"S'caf\\xe9'\n.", "cannot be read: .*utf-8"),
        ("refs(unc_exclude_unified).p", pickle.dumps([1, 2, 3])[:-4], "cannot be read"),
    ],
)
def test_files_of_the_refer_family_that_are_no_content_are_named(tmp_path, name, content, words):
    (refer(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name.split('(')[0]}.*{words}"):
        build_eval("refcoco", "val", tmp_path)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "refcoco"]) == 2


# ------------------------------------------------------------------------------------------------ own data, parts


def own_coco(root, segmentation):
    image = {"id": 0, "file_name": "a.jpg", "height": 24, "width": 32}
    root.mkdir(exist_ok=True)
    Image.fromarray(smooth(24, 32)).save(root / "a.jpg")
    notes = [{"id": 7, "image_id": 0, "category_id": 1, "segmentation": segmentation}]
    (root / "x.json").write_text(
        json.dumps({"images": [image], "annotations": notes, "categories": [{"id": 1, "name": "cup"}]})
    )
    return str(root)


def test_own_data_refuse_what_the_others_refuse(tmp_path):
    for segmentation in ([[NAN, 4, 9, 4, 9, 9]], {"size": [24, 32], "counts": [0, 5]}):
        with pytest.raises(ValueError, match="x.json, image 0, category 'cup': annotation 7 does not fit 24 x 32 pixels: a"):
            build_eval(own_coco(tmp_path / "coco", segmentation), "train", ".")[0]
    (tmp_path / "me").mkdir()
    Image.fromarray(smooth(24, 32)).save(tmp_path / "me/a.jpg")
    (tmp_path / "me/a.json").write_text(json.dumps({"shapes": [shape([NAN, 1], [5, 5], [9, 1], label="cup")]}))
    with pytest.raises(ValueError, match=r"a.json, shapes\[0\]: points: \[nan, 1.0\] is no place"):
        build_eval(str(tmp_path / "me"), "train", ".")
    (tmp_path / "coco/a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg is an empty file"):
        build_eval(own_coco(tmp_path / "other", [[3.0, 2, 9, 2, 9, 8]]), "train", "."), read_image(tmp_path / "coco/a.jpg")


def test_a_picture_whose_things_cover_no_pixel_is_asked_nothing(tmp_path, tiny):
    """Own data leave such things out; what remains is a batch without rows, which counts nothing."""
    item = build_eval(own_coco(tmp_path, [[50.0, 50, 60, 50, 60, 60]]), "train", ".")[0]
    assert item.questions == []
    batch = collate([item], tiny[1], training=False)
    assert batch.input_ids.shape[0] == len(batch.image_of_question) == 0 and batch.clip_images.shape[0] == 1


def test_parts_that_cannot_be_drawn_are_named(tmp_path):
    from dataset.sem_seg import Parts

    own_coco(tmp_path, [[NAN, 4, 9, 4, 9, 9]])
    ((_, mask),) = Parts(tmp_path / "x.json", tmp_path).content(0, np.random.default_rng(0)).present
    with pytest.raises(ValueError, match="x.json, annotation 7, segmentation: a polygon has a point"):
        mask()


# ------------------------------------------------------------------------------------------------ questions


def words(count):
    return " ".join(("the small blue bag on the left of the red shirt".split() * (count // 11 + 1))[:count])


def test_a_question_of_2000_words_works_within_the_limit(tiny, tmp_path):
    model, processor = tiny
    image = smooth(24, 32)
    room = model.config.llava.text_config.max_position_embeddings - 4
    batch = collate([sample(image, words(2000), answer=None)], processor, training=False, padding="left", max_positions=room)
    assert 2000 < batch.input_ids.shape[1] <= room
    found = model.generate_segments(**batch.model_inputs(), max_new_tokens=4, force_segment=True)
    assert found.segments.mask_logits[0].shape == (24, 32) and found.segments.mask_logits[0].isfinite().all()
    reason(tmp_path, text=[words(2000)])
    item = build_eval("ReasonSeg", "val", tmp_path)[0]
    batch = collate([item], processor, training=False, max_positions=4096)
    with torch.no_grad():
        assert model(**batch.model_inputs()).segments.mask_logits[0].isfinite().all()


def test_a_question_beyond_the_limit_is_named_with_both_numbers(tiny):
    processor = tiny[1]
    asked = sample(smooth(24, 32), "the cup", answer=None)
    asked = replace(asked, conversations=[*asked.conversations, [(words(5000), None)]], masks=np.repeat(asked.masks, 2, axis=0),
                    exists=[True, True], questions=["the cup", "much"])  # fmt: skip
    with pytest.raises(ValueError, match=r"a.jpg, question 2: its prompt has \d{4} tokens, 16 .* at most 3584"):
        collate([asked], processor, training=False, max_positions=4096 - 512)
    exact = len(collate([sample(smooth(24, 32))], processor, training=False).input_ids[0])
    collate([sample(smooth(24, 32))], processor, training=False, max_positions=exact)
    with pytest.raises(ValueError, match=f"has {exact} tokens, .* at most {exact - 1}"):
        collate([sample(smooth(24, 32))], processor, training=False, max_positions=exact - 1)


def test_training_cuts_a_long_question_with_its_answer_and_mask(tiny):
    """Nothing of the answer is left: the picture teaches nothing in this step, and breaks nothing."""
    model, processor = tiny
    both = [sample(smooth(24, 32), words(2000)), sample(smooth(24, 32))]
    batch = collate(both, processor, training=True, model_max_length=300)
    assert batch.input_ids.shape == (2, 300) and len(batch.masks) == 1
    assert (batch.labels[0] == -100).all() and (batch.labels[1] != -100).any()
    loss = model(**batch.model_inputs()).loss
    assert loss.isfinite()
    alone = model(**collate(both[:1], processor, training=True, model_max_length=300).model_inputs()).loss
    assert alone.isfinite()


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("the [SEG] cup", r"question 1: must not contain \[SEG\], a token of the model"),
        ("the <image> cup", "question 1: must not contain <image>"),
        ("the </s> cup", "question 1: .*contains a mark of the conversation format"),
        ("USER: a ASSISTANT: b", "question 1: .*contains a mark of the conversation format"),
    ],
)
def test_tokens_of_the_model_in_a_question_are_refused(tiny, question, told):
    """A [SEG] in the question would be the first of the conversation, so its mask would count."""
    for training in (False, True):
        with pytest.raises(ValueError, match=f"a.jpg, {told}"):
            collate([sample(smooth(24, 32), question)], tiny[1], training=training)


def test_a_broken_picture_stops_no_other(tmp_path):
    """What the evaluation relies on: asking again gives the same fault, and the other items are as they were."""
    for name in "abcd":
        reason(tmp_path, name=name)
    folder = tmp_path / "reason_seg/ReasonSeg/val"
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "b.json").write_text("{")
    (folder / "c.jpg").unlink()
    data = build_eval("ReasonSeg", "val", tmp_path)
    for _ in range(2):
        for index, kind in enumerate((ValueError, ValueError, FileNotFoundError)):
            with pytest.raises(kind, match=f"{'abc'[index]}[.]j"):
                data[index]
    assert data[3].masks.sum() == 49
    assert read_annotation(folder / "d.json").texts == ["the cup"]
