"""Bad input: each case has one outcome, an error that names file and field or a result that is written down.

What is wrong with a whole data set is told when it is opened, what is wrong with one picture when that picture is asked for, so
that an evaluation can go on with the next one.
"""

import argparse
import contextlib
import io
import json
import pickle
import re
import resource
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFile, ImageOps, features
from pycocotools import mask as coco_mask
from tiny import tiny_config
from transformers import CLIPImageProcessorPil

from dataset import build_eval, build_train
from dataset.check import main as check
from dataset.collate import collate
from dataset.reason_seg import FAR, ReasonTraining, draw_mask, read_annotation
from dataset.refer_api import Refer, draw_segmentation
from dataset.sem_seg import SemSegTraining
from dataset.types import Sample
from dataset.vqa import VqaTraining
from model import READForCausalLM, READProcessor, SaspConfig, losses, select_points
from model.losses import mask_on_token_grid
from model.sasp import fine_map_matrices
from utils.cli import add_image_flags
from utils.image import SLIM, decode_image, image_views, open_stored, read_image
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
    Image.fromarray(RGB).save(file, format="PNG")
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
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_text("no picture\n" * 20), "cannot be read"),
        (lambda file: file.mkdir(), "is a folder"),
        (bomb, "has 100000 x 100000 pixels, 10000 megapixels; at most 178 are read"),
        (cut(0.02), "is cut short"),
        (cut(0.9), "is cut short"),
        (cut(0.5, progressive=True), "is cut short"),
        (cut(0.5, format="PNG"), "is cut short"),
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


# ------------------------------------------------------------------------------------------------ damage, size, meaning

PHOTO = np.clip(smooth(150, 200).astype(int) + np.random.default_rng(2).integers(-12, 12, (150, 200, 3)), 0, 255).astype(np.uint8)


def bytes_of(kind, array=PHOTO, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def after_headers(data, inserted):
    """A JPEG with bytes in front of its first quantisation table."""
    place = data.index(b"\xff\xdb")
    return data[:place] + inserted + data[place:]


def with_scan_numbers(data):
    """Spectral selection 0 to 0, as some phones write it."""
    place = data.index(b"\xff\xda") + 2 + 12 - 3
    return data[:place] + b"\0\0\0" + data[place + 3 :]


ODD_JPEGS = {
    "progressive": bytes_of("JPEG", progressive=True),
    "restart marks": bytes_of("JPEG", restart_marker_rows=1),
    "full colour": bytes_of("JPEG", subsampling=0),
    "grey": bytes_of("JPEG", mode="L"),
    "CMYK": bytes_of("JPEG", mode="CMYK"),
    "a colour profile that is none": bytes_of("JPEG", icc_profile=b"no profile" * 20),
    "several images": bytes_of("MPO", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
    "bytes behind": bytes_of("JPEG") + b"a film of the moment" * 50,
    "bytes between segments": after_headers(bytes_of("JPEG"), b"nonsense"),
    "fill bytes": after_headers(bytes_of("JPEG"), b"\xff" * 9),
    "padding": bytes_of("JPEG")[:-2] + b"\0" * 12 + b"\xff\xd9",
    "a phone's scan numbers": with_scan_numbers(bytes_of("JPEG")),
    "a comment with an end mark": after_headers(bytes_of("JPEG"), b"\xff\xfe\0\x08\xff\xd9ab\xff\xd9"),
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_odd_jpegs_that_are_whole_are_read_as_opencv_reads_them(name):
    data = ODD_JPEGS[name]
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(decode_image(data, "a.jpg"), expected)


def overwritten(data, place, rng, size):
    return data[:place] + rng.bytes(size) + data[place + size :]


def zeroed(data, place, rng, size):
    return data[:place] + bytes(size) + data[place + size :]


def missing(data, place, rng, size):
    return data[:place] + data[place + size :]


def doubled(data, place, rng, size):
    return data[: place + size] + data[place:]


@pytest.mark.parametrize("damage", [overwritten, zeroed, missing, doubled])
@pytest.mark.parametrize("name", ["full colour", "grey", "CMYK", "restart marks", "bytes behind", "a phone's scan numbers"])
def test_a_jpeg_that_is_damaged_within_its_pixels_is_named(capfd, name, damage):
    """libjpeg makes grey or shifted pixels of it and warns on stderr alone."""
    data, rng = ODD_JPEGS[name], np.random.default_rng(0)
    begin, end = data.index(b"\xff\xda") + 20, data.rindex(b"\xff\xd9")
    end = min(end, begin + len(bytes_of("JPEG")) - 700) if name == "bytes behind" else end
    for place in rng.integers(begin, end - 700, 12):
        with pytest.raises(ValueError, match="a.jpg is (damaged|cut short).*: copy or download it again"):
            decode_image(damage(data, int(place), rng, 600), "a.jpg")
    assert capfd.readouterr().err == ""


WHOLE = {
    "png": bytes_of("PNG"), "palette.png": bytes_of("PNG", mode="P"), "webp": bytes_of("WEBP", quality=90),
    "lossless.webp": bytes_of("WEBP", lossless=True), "gif": bytes_of("GIF"), "bmp": bytes_of("BMP"), "tif": bytes_of("TIFF"),
    "lzw.tif": bytes_of("TIFF", compression="tiff_lzw"), "deflate.tif": bytes_of("TIFF", compression="tiff_deflate"),
    "jp2": bytes_of("JPEG2000"), "ppm": bytes_of("PPM"), "jpg": bytes_of("JPEG"),
    "progressive.jpg": bytes_of("JPEG", progressive=True),
    "animated.gif": bytes_of("GIF", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
    "animated.webp": bytes_of("WEBP", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
    "pages.tif": bytes_of("TIFF", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
}  # fmt: skip
if features.check("avif"):
    WHOLE["avif"] = bytes_of("AVIF")


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_cut_is_named_or_read_whole(name, capfd, recwarn):
    """Never partly grey; the first image of several may be whole although others are cut."""
    data = WHOLE[name]
    whole = decode_image(data, "whole")
    shares = (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99)
    for kept in (*(int(len(data) * share) for share in shares), len(data) - 3, len(data) - 1):
        with contextlib.suppress(ValueError):
            assert np.array_equal(decode_image(data[:kept], f"cut.{name}"), whole), kept
    with pytest.raises(ValueError, match=f"^cut.{name} .*(cut short|damaged|cannot be read)"):
        decode_image(data[: len(data) // 3], f"cut.{name}")
    assert capfd.readouterr().err == "" and not recwarn.list


@pytest.mark.parametrize(
    ("name", "words"),
    [("png", "is damaged .checksum of 'IDAT'"), ("lzw.tif", "is damaged"), ("gif", "cannot be read: it is damaged")],
)
def test_overwritten_bytes_are_noticed_where_the_kind_allows(name, words):
    data = WHOLE[name]
    with pytest.raises(ValueError, match=words):
        decode_image(zeroed(data, len(data) // 2, None, 300), "a")


def claims(name, find, width, height, form, offset=0):
    """A file of 200 x 150 pixels whose header says something else."""
    data = bytearray(WHOLE[name])
    struct.pack_into(form, data, data.index(find) + offset, *((height, width) if "jpg" in name else (width, height)))
    return bytes(data)


BOMBS = {
    "jpg": claims("jpg", b"\xff\xc0", 65000, 65000, ">HH", 5),
    "progressive.jpg": claims("progressive.jpg", b"\xff\xc2", 65000, 65000, ">HH", 5),
    "filled.jpg": after_headers(claims("jpg", b"\xff\xc0", 65000, 65000, ">HH", 5), b"\xff" * 5 + b"\x01ab"),
    "png": claims("png", b"IHDR", 30000, 30000, ">II", 4),
    "gif": claims("gif", b"GIF", 60000, 60000, "<HH", 6),
    "bmp": claims("bmp", b"BM", 100000, -100000, "<ii", 18),
    "tif": WHOLE["tif"].replace(struct.pack("<HHII", 256, 4, 1, 200), struct.pack("<HHII", 256, 4, 1, 2000000)),
    "webp": claims("webp", b"VP8 ", 16383, 16383, "<HH", 14),
    "jp2": claims("jp2", b"\xff\x4f\xff\x51", 100000, 100000, ">II", 8),
    "ppm": b"P6 # a comment\n100000\t100000 255\n" + bytes(90),
    "pbm": b"P4\n100000 100000\n" + bytes(90),
    "ras": b"Y\xa6j\x95" + struct.pack(">7I", 100000, 100000, 24, 0, 1, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, name):
    def decode(*_, **__):
        raise AssertionError("a decoder was called")

    for module, function in ((cv2, "imdecode"), (simplejpeg, "decode_jpeg"), (ImageFile.ImageFile, "load")):
        monkeypatch.setattr(module, function, decode)
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=f"image .*{name} has .* megapixels; at most 178 are read: .*--max_megapixels"):
        read_image(tmp_path / name)
    with pytest.raises(ValueError, match="at most 178 are read"), open_stored(tmp_path / name):
        pass


def test_a_file_within_the_limit_that_holds_less_than_it_claims_takes_no_memory():
    """13 KB of JPEG claimed 65000 x 65000 pixels and took 5.3 GB; this one claims 65000 x 2700, which may be."""
    before = memory()
    with pytest.raises(ValueError, match="damaged within its pixels"):
        decode_image(claims("jpg", b"\xff\xc0", 65000, 2700, ">HH", 5), "a.jpg")
    assert memory() - before < 200


class Files(torch.utils.data.Dataset):
    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            return str(read_image(self.file).shape)
        except ValueError as error:
            return str(error)


def test_the_limit_is_a_flag_and_holds_in_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("READ_MAX_MEGAPIXELS", "178")
    Image.new("L", (1200, 1000)).save(tmp_path / "a.png")
    parser = argparse.ArgumentParser()
    add_image_flags(parser)
    for typed, words in ((["--max_megapixels", "1"], "at most 1 are read"), (["--max_megapixels", "2"], "(1000, 1200, 3)")):
        parser.parse_args(typed)
        (said,) = next(iter(torch.utils.data.DataLoader(Files(tmp_path / "a.png"), num_workers=1)))
        assert words in said
    for typed in ("0", "-3", "many", "1.5"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--max_megapixels", typed])
    for wrong in ("", "many", "0", "-1", "1e3", "9" * 5000):
        monkeypatch.setenv("READ_MAX_MEGAPIXELS", wrong)
        with pytest.raises(ValueError, match="READ_MAX_MEGAPIXELS: must be a whole number"):
            read_image(tmp_path / "a.png")


def tiff(array, bits=8, bands=1, meaning=1, numbers=1, **more):
    """An uncompressed TIFF of what `array` holds, with tags that say what it is."""
    height, width = array.shape[:2]
    place = 8 + 2 + 12 * (10 + len(more)) + 4
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: meaning, 273: place, 277: bands, 278: height, 279: array.nbytes,
            339: numbers, **{int(tag[1:]): value for tag, value in more.items()}}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + array.tobytes()


def stack(array):
    """A TIFF as tifffile writes an array (pages, height, bands): the first page, and a description."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", description=f'{{"shape": [300, {array.shape[0]}, {array.shape[1]}]}}')
    return buffer.getvalue()


NO_COLOURS = {
    "floating point": (tiff(PHOTO[..., 0].astype("<f4") / 255, 32, numbers=3), "TIFF of 1 band of 32 bits, floating-point"),
    "half floating point": (tiff(PHOTO[..., 0].astype("<f2") / 255, 16, numbers=3), "TIFF of 1 band of 16 bits, floating-point"),
    "signed": (tiff(PHOTO[..., 0].astype("<i2"), 16, numbers=2), "TIFF of 1 band of 16 bits, signed"),
    "signed bytes": (tiff((PHOTO[..., 0] // 2).astype("i1"), 8, numbers=2), "TIFF of 1 band of 8 bits, signed"),
    "32 bits": (tiff(PHOTO[..., 0].astype("<u4"), 32), "TIFF of 1 band of 32 bits"),
    "12 bits": (tiff(np.zeros((4, 12), np.uint8), 12), "TIFF of 1 band of 12 bits"),
    "five bands": (tiff(np.dstack([PHOTO, PHOTO[..., :2]]), bands=5, meaning=2), "TIFF of 5 bands of 8 bits"),
    "three bands that are no RGB": (tiff(PHOTO, bands=3), "TIFF of 3 bands of 8 bits whose tags do not say"),
    "Lab": (tiff(PHOTO, bands=3, meaning=8), "photometric interpretation 8"),
    "five bands along the rows": (stack(PHOTO[:, :5, 0]), "stores the bands of an array"),
    "a camera's raw file": (tiff(PHOTO, bands=3, meaning=2, _254=1), "begins with a preview"),
    "PIL's float": (bytes_of("TIFF", mode="F"), "TIFF of 1 band of 32 bits, floating-point"),
    "PIL's int": (bytes_of("TIFF", mode="I"), "TIFF of 1 band of 32 bits"),
    "PGM of a camera": (b"P5\n4 4\n1023\n" + bytes(32), "has a maximum of 1023"),
    "dark PGM": (b"P5\n4 4\n100\n" + bytes(16), "has a maximum of 100"),
    "PFM": (b"PF\n4 4\n-1.0\n" + bytes(192), "floating-point light"),
    "HDR": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4), "floating-point light"),
}


@pytest.mark.parametrize("name", NO_COLOURS)
def test_numbers_that_have_no_one_meaning_as_colours_are_refused_by_name(name):
    """Read all the same, they would be black, clipped, or the first band alone."""
    data, words = NO_COLOURS[name]
    with pytest.raises(ValueError, match=f"^image x .*{words}"):
        decode_image(data, "image x")


def test_tiff_of_usual_tags_is_read():
    """The helper above writes what OpenCV reads, so that the refusals are for the tags."""
    assert np.array_equal(decode_image(tiff(PHOTO, bands=3, meaning=2), "a"), PHOTO)
    grey = np.repeat(PHOTO[..., :1], 3, axis=2)
    assert np.array_equal(decode_image(tiff(PHOTO[..., 0]), "a"), grey)
    assert np.array_equal(decode_image(tiff(PHOTO[..., 0].astype("<u2") * 257, 16), "a"), grey)
    assert np.array_equal(decode_image(tiff(PHOTO[..., 0], meaning=0), "a"), 255 - grey)
    infrared = np.dstack([PHOTO, PHOTO[..., 0]])
    assert np.array_equal(decode_image(tiff(infrared, bands=4, meaning=2, _338=0), "a"), PHOTO)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_an_image_of_16_bits_that_is_nearly_black_is_said_to_be(tmp_path, caplog, kind):
    """12 bits in 16: the pixels stay as the original read them, but not without a word, and with one for each image."""
    deep(DEEP)(tmp_path / f"bright.{kind}")
    deep(DEEP >> 4)(tmp_path / f"dark.{kind}")
    for name in ("bright", "dark", "dark"):
        read_image(tmp_path / f"{name}.{kind}")
    assert [f"dark.{kind} has 16 bits and is nearly black" in record.message for record in caplog.records] == [True]


def test_alpha_of_a_tiff_is_dropped_too(tmp_path):
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), RGB)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_exif_turns_avif(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.avif", exif=exif, quality=98, subsampling="4:4:4")
    seen = {1: RGB, 2: RGB[:, ::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}[orientation]
    image = read_image(tmp_path / "a.avif")
    assert image.shape == seen.shape and np.abs(image.astype(int) - seen).max() <= 12


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html>403 Forbidden</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
        (b" \n\n", "is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read: it is a drawing"),
        (b"%PDF-1.7 ...", "cannot be read: it is a document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "cannot be read: it is HEIC"),
        (b"\xff\xd8\xff", "is cut short or damaged in its header"),
        (b"\x89PNG\r\n\x1a\n", "is cut short or damaged in its header"),
        (b"II*\0\xff\xff\xff\xff", "is cut short or damaged in its header"),
        (b"BM", "is cut short or damaged in its header"),
        (bytes(5000), "cannot be read: it is not an image"),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_image_is_said_to_be_what_it_is(tmp_path, data, words):
    (tmp_path / "a.jpg").write_bytes(data)
    for read in (read_image, lambda file: open_stored(file).__enter__()):
        with pytest.raises(ValueError, match=f"a.jpg {words}"):
            read(tmp_path / "a.jpg")


def test_stored_numbers_are_those_of_the_file(tmp_path):
    """For masks: indices of a palette, 16 bits, 32 bits; and a cut or damaged file is named here too."""
    deep = DEEP[..., 0]
    for name, write, numbers in (
        ("palette.png", pil(PALETTE), np.asarray(PALETTE)),
        ("deep.png", pil(deep), deep),
        ("wide.tif", pil(deep.astype(np.int32), "I"), deep),
    ):
        write(tmp_path / name)
        with open_stored(tmp_path / name) as image:
            assert np.array_equal(np.asarray(image), numbers), name
    (tmp_path / "cut.png").write_bytes(WHOLE["palette.png"][:-300])
    with pytest.raises(ValueError, match="cut.png is cut short"), open_stored(tmp_path / "cut.png"):
        pass

# ------------------------------------------------------------------------------------------------ odd sizes


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_any_shape_are_segmented(tiny, size):
    """1 x 20000 used to need gigabytes: 336 x 6720000 pixels for CLIP, 24 x 6720000 cells for SasP."""
    model, processor = tiny
    begun, before = time.process_time(), memory()
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
    assert memory() - before < 400 and time.process_time() - begun < 20


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
    begun = time.process_time()
    assert (build_eval("ReasonSeg", "val", tmp_path)[0].masks == 1).sum() == pixels
    assert time.process_time() - begun < 5
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("note", "broken"))]
    assert [note in line for line in told] == [True] * len(told) and len(told) == (note is not None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shapes": [shape(*SQUARE), shape([NAN, 1], [5, 5], [9, 1])]}, r", shapes\[1\]: points: \[nan, 1.0\] is no place"),
        ({"shapes": [shape([None, 1], [5, 5], [9, 1])]}, r", shapes\[0\]: points: must be pairs .* found \[None, 1\]"),
        ({"shapes": [shape([float("inf"), 1], [5, 5], [9, 1])]}, r", shapes\[0\]: points: \[inf, 1.0\] is no place"),
        ({"shapes": [shape([3e9, 0], [5, 5], [9, 1])]}, r", shapes\[0\]: points: .* is no place in or near an image"),
        ({"shapes": [shape()]}, r", shapes\[0\]: points: is empty"),
        ({"shapes": [shape([1, 2, 3], [4, 5, 6])]}, r", shapes\[0\]: points: must be pairs"),
        ({"shapes": [shape([1, 2], [4])]}, r", shapes\[0\]: points: must be pairs"),
        ({"shapes": [{"label": "target"}]}, r", shapes\[0\] lacks the field 'points'"),
        ({"shapes": [{"label": None, "points": SQUARE}]}, r", shapes\[0\]: "),
        ({"shapes": None}, ", shapes: must be a list of shapes, found None"),
        ({"text": []}, r", text: must be a question, or a list of them, found \[\]"),
        ({"text": ["cup", " "]}, r", text\[1\]: is empty"),
        ({"text": [7]}, r", text\[0\]: must be text, found 7"),
        ({"is_sentence": "false"}, ", is_sentence: must be true or false, found 'false'"),
        ({"false_premise_QA": [["a kite", False]]}, r", false_premise_QA\[0\]: must be a list \[question, is_"),
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


KITE = ["a kite", False, "There is none."]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": {"q": "where?"}}, "text: must be a question, or a list of them"),
        ({"text": None}, "text: must be a question, or a list of them, found None"),
        ({"text": ["the cup", "the </s> cup"]}, r"text\[1\]: must not contain </s>"),
        ({"text": "where is [seg]?"}, r"text\[0\]: must not contain \[SEG\]"),
        ({"text": ["the cup", ["b"]]}, r"text\[1\]: must be text"),
        ({"text": ["a \0 cup"]}, r"text\[0\]: must not contain '\\x00'"),
        ({"is_sentence": None}, "is_sentence: must be true or false, found None"),
        ({"is_sentence": 2}, "is_sentence: must be true or false, found 2"),
        ({"is_sentence": [True]}, "is_sentence: must be true or false"),
        ({"is_sentence": 1.0}, "is_sentence: must be true or false, found 1.0"),
        ({"false_premise_QA": "none"}, "false_premise_QA: must be a list of"),
        ({"false_premise_QA": {"abc": 1}}, "false_premise_QA: must be a list of"),
        ({"false_premise_QA": False}, "false_premise_QA: must be a list of"),
        ({"false_premise_QA": ["abc"]}, r"false_premise_QA\[0\]: must be a list \[question, is_sentence, answer\], found 'abc'"),
        ({"false_premise_QA": [KITE, {"question": 1, "b": 2, "c": 3}]}, r"false_premise_QA\[1\]: must be a list \[question"),
        ({"false_premise_QA": [[*KITE, "more"]]}, r"false_premise_QA\[0\]: must be a list \[question"),
        ({"false_premise_QA": [["a kite", "false", "No."]]}, r"false_premise_QA\[0\], is_sentence: must be .*found 'false'"),
        ({"false_premise_QA": [KITE, ["", True, "No."]]}, r"false_premise_QA\[1\], question: is empty"),
        ({"false_premise_QA": [[None, True, "No."]]}, r"false_premise_QA\[0\], question: must be text, found None"),
        ({"false_premise_QA": [["a kite", False, None]]}, r"false_premise_QA\[0\], answer: must be text, found None"),
        ({"false_premise_QA": [["a kite", False, "It is [SEG]."]]}, r"false_premise_QA\[0\], answer: must not contain \[SEG\]"),
        ({"shapes": {"label": "target", "points": []}}, "shapes: must be a list of shapes"),
        ({"shapes": [shape(*SQUARE), "x"]}, r"shapes\[1\]: must be a JSON object"),
        ({"shapes": [{"label": 7, "points": SQUARE}]}, r"shapes\[0\]: label: must be text, found 7"),
        ({"shapes": [shape({"x": 8, "y": 8})]}, r"shapes\[0\]: points: must be pairs \[x, y\] of numbers"),
        ({"shapes": [shape(["8", "8"])]}, r"shapes\[0\]: points: must be pairs \[x, y\] of numbers, found \['8', '8'\]"),
        ({"shapes": [shape([True, 8])]}, r"shapes\[0\]: points: must be pairs \[x, y\] of numbers, found \[True, 8\]"),
        ({"shapes": [{"label": "target", "points": {"0": [1, 2]}}]}, r"shapes\[0\]: points: must be pairs"),
        ({"shapes": [shape([10**400, 8])]}, r"shapes\[0\]: points: hold a number that is no place"),
        ({"shapes": [{**shape([9, 9], [9, 12]), "shape_type": "circle"}]}, r"shapes\[0\]: shape_type: a 'circle' of 2 points"),
        ({"shapes": [{**shape([3, 2], [9, 8]), "shape_type": "rectangle"}]}, r"shapes\[0\]: shape_type: a 'rectangle' of 2"),
        ({"shapes": [{**shape([3, 2], [9, 8]), "shape_type": "mask"}]}, r"shapes\[0\]: shape_type: a 'mask' of 2 points"),
        ({"shapes": [{**shape(*SQUARE), "shape_type": ["polygon"]}]}, r"shapes\[0\]: shape_type"),
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_told_when_the_set_is_opened(tmp_path, capsys, fields, words):
    """Objects asked their keys, three letters were a false premise, "false" was true, a circle was drawn as a line."""
    for split in ("train", "val"):
        reason(tmp_path, split, **fields), reason(tmp_path, split, name="b")
    with pytest.raises(ValueError, match=f"train/a.json, {words}"):
        build_train(["reason_seg"], [1], tmp_path)
    data = build_eval("ReasonSeg", "val", tmp_path)
    with pytest.raises(ValueError, match=f"val/a.json, {words}"):
        data[0]
    assert data[1].masks.any()  # the others are evaluated
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "ReasonSeg"]) == 2
    assert capsys.readouterr().out.count("a.json, ") == 2
    (tmp_path / "reason_seg/ReasonSeg/val/b.json").write_text("[]")
    with pytest.raises(ValueError, match=r"(?s)val/a.json, .*val/b.json: must be a JSON object"):
        build_eval("ReasonSeg", "val", tmp_path)


@pytest.mark.parametrize(
    ("kind", "points", "pixels"),
    [(None, SQUARE, 49), ("polygon", SQUARE, 49), ("rectangle", SQUARE, 49), ("rotation", SQUARE, 49), ("polygon", [[4, 5]], 1),
     ("point", [[4, 5]], 1), ("line", [[4, 5], [10, 5]], 7), ("linestrip", SQUARE, 49)],
)  # fmt: skip
def test_shapes_that_their_points_outline_are_drawn(tmp_path, kind, points, pixels):
    reason(tmp_path, shapes=[{"label": "target", "points": points, "shape_type": kind}], is_sentence=1, false_premise_QA=None)
    item = build_eval("ReasonSeg", "val", tmp_path, protocol="generate")[0]
    assert (item.masks == 1).sum() == pixels and item.meta["is_sentence"] == [True]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    reason(tmp_path, "train"), reason(tmp_path)
    for split in ("train", "val"):
        folder = tmp_path / "reason_seg/ReasonSeg" / split
        for name in ("._a.json", "._a.jpg", ".c.json"):
            (folder / name).write_bytes(b"\0\5\x16\7")
        (folder / "d.json").mkdir(), (folder / "e.jpg").mkdir()
    assert len(ReasonTraining(tmp_path)) == len(build_eval("ReasonSeg", "val", tmp_path)) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "gbk", "cp1251", "cp932"])
def test_encodings_of_annotations_are_read_or_named(tmp_path, encoding):
    text = {"gbk": "蓝色的杯子在哪里", "cp1251": "где синяя чашка", "cp932": "青いカップ"}.get(encoding, "the café – the cup’s")
    file = reason(tmp_path)
    content = {**json.loads(file.read_text()), "text": [text]}
    file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    if encoding in ("gbk", "cp1251", "cp932"):
        with pytest.raises(ValueError, match="a.json, line 1: is no UTF-8 text"):
            build_eval("ReasonSeg", "val", tmp_path)
    else:
        assert build_eval("ReasonSeg", "val", tmp_path)[0].questions == [text]


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


CUP = ({"sent": "cup", "sent_id": 1},)


def refer(root, segmentation=((3.0, 2, 9, 2, 9, 8, 3, 8),), ann_id=5, sentences=CUP, size=(24, 32)):
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
        ({"size": [12, 12], "counts": [144]}, "an RLE is for 12 x 12 pixels"),
        ({"size": [24, 32], "counts": [0, 5]}, "an RLE is damaged: its runs have 5 pixels"),
        ({"size": [24, 32], "counts": []}, "an RLE is damaged"),
        ({"size": [24, 32], "counts": [-8, 776]}, "an RLE is damaged"),
        ({"size": [24, 32], "counts": "zzzz"}, "an RLE "),
        ({"size": [24, 32], "counts": compressed(np.ones((24, 16)))}, "an RLE is damaged: its runs have 384 pixels"),
        ({"size": [24, 32], "counts": None}, "an RLE's counts must be text"),
        ({"size": [24, 32]}, "an RLE lacks the field 'counts'"),
        ({"counts": [768]}, "an RLE lacks the field 'size'"),
        ("abc", "a polygon must be a list of numbers"),
        *((value, "a polygon must be a list of numbers, an RLE an object") for value in (None, 5, True, "")),
        *(([[value, 2, 9, 2, 9, 8]], "a polygon must be a list of numbers") for value in ("3", True, 10**400, [3], {})),
        *(([[value, 2, 9, 2, 9, 8]], "a polygon has a point that is no place") for value in (1e300, float("inf"))),
        ([[10**6 * (-1) ** n for n in (0, 0, 1, 0, 1, 1, 0, 1)]], "a polygon has an outline of 8000000 pixels"),
        *(({"size": size, "counts": [768]}, "an RLE's size ")
          for size in (["24", "32"], [24.5, 32], [True, 32], [24], [24, 32, 3], "24", None, {}, [NAN, 32], [10**400, 32])),
        *(({"size": [24, 32], "counts": counts}, "an RLE")
          for counts in (["768"], [767.5, 0.5], [True, 767], [None], [[768]], [10**400], 768, {}, [NAN])),
        *(({"size": [24, 32], "counts": counts}, "an RLE is damaged: ") for counts in ("o" * 10**6, "\x80", "é", "~", " ")),
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


# ------------------------------------------------------------------------------------------------ LLaVA-Instruct


def said(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def vqa(root, *records, name="llava_instruct_150k.json"):
    """A file of dialogues, beside the pictures a.jpg and 1.jpg."""
    for folder in ("llava_dataset", "coco/train2017"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for picture in ("a.jpg", "1.jpg"):
        Image.fromarray(smooth(24, 32)).save(root / "coco/train2017" / picture)
    file = root / "llava_dataset" / name
    lines = file.suffix == ".jsonl" or name.startswith("lines")
    file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return file


GOOD = {"id": "good", "image": "a.jpg", "conversations": said("<image>\nWhat is it?", "A cup.")}


def turns_of(root):
    """All that is learnt from, by id."""
    data = VqaTraining(root)
    drawn = [data.draw(np.random.default_rng(seed)) for seed in range(8 * len(data))]
    return {sample.meta["id"]: (Path(sample.image_path).name, sample.conversations[0]) for sample in drawn}


@pytest.mark.parametrize(
    ("conversations", "turns"),
    [
        (said("<image>\nWhy? ", " Because. \n"), [("Why?", " Because. \n")]),
        (said(" Why?  \n<image>", "a", " and\n", "\tb "), [("Why?", "a"), (" and\n", "\tb ")]),
        (said(" Why? ", "a"), [(" Why? ", "a")]),
        ([{"from": "gpt", "value": "I see a cup."}, *said("Why?", "a")], [("Why?", "a")]),
    ],
    ids=["answer", "later turns", "no mark", "leading answer"],
)
def test_only_the_turn_with_the_image_is_stripped(tmp_path, tiny, conversations, turns):
    vqa(tmp_path, {**GOOD, "conversations": conversations})
    assert turns_of(tmp_path) == {"good": ("a.jpg", turns)}
    batch = collate([VqaTraining(tmp_path).draw(np.random.default_rng(0))], tiny[1], training=True)
    learnt = tiny[1].tokenizer.decode([i for i in batch.labels[0].tolist() if i >= 0])
    assert all(answer.strip() in learnt for _, answer in turns) and learnt.endswith("</s>")


@pytest.mark.parametrize("image", ["a.jpg", "./a.jpg", "train2017/a.jpg", "coco/train2017/a.jpg", "coco\\train2017\\a.jpg"])
@pytest.mark.parametrize("name", ["llava_instruct_150k.json", "llava_instruct_150k.jsonl"])
def test_names_of_pictures_and_lines_of_json(tmp_path, caplog, image, name):
    vqa(tmp_path, {**GOOD, "image": image}, {**GOOD, "id": "second"}, name=name)
    assert turns_of(tmp_path) == dict.fromkeys(("good", "second"), ("a.jpg", [("What is it?", "A cup.")]))
    (tmp_path / "llava_dataset" / name).rename(tmp_path / "llava_dataset/llava_instruct_150k.json")
    assert len(turns_of(tmp_path)) == 2 and not caplog.records


@pytest.mark.parametrize(
    ("fields", "words", "status"),
    [
        ({"image": None}, "has the image null: it is about no image", 0),
        ({"image": ["a.jpg", "1.jpg"]}, "has a list of 2 images", 0),
        ({"image": "gqa/images/1.jpg"}, "has an image of another folder than coco/train2017: 'gqa/images/1.jpg'", 0),
        ({"image": "/data/coco/train2017/1.jpg"}, "has an image of another folder", 0),
        ({"image": "../train2017/1.jpg"}, "has an image of another folder", 0),
        ({"image": "http://x.org/train2017/1.jpg"}, "has an image of another folder", 0),
        ({"conversations": [{"from": "system", "value": "Be kind."}, *GOOD["conversations"]]}, "has a system turn", 0),
        ({"image": ""}, "image: must be a file name, found ''", 2),
        ({"image": 7}, "image: must be a file name, found 7", 2),
        ({"image": "coco/train2017/.."}, "image: is no file name", 2),
        ({"image": "x" * 300}, "image: is no file name", 2),
        ({"image": "a\0.jpg"}, "image: is no file name", 2),
        ({"conversations": []}, "conversations: must be a list of turns", 2),
        ({"conversations": {"from": "human"}}, "conversations: must be a list of turns", 2),
        ({"conversations": ["Why?", "a"]}, r"conversations\[0\]: must be an object", 2),
        ({"conversations": [{"role": "user", "content": "Why?"}]}, r"conversations\[0\] lacks the field 'from'", 2),
        ({"conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "a"}]}, "found 'user, assist", 2),
        ({"conversations": said("Why?", "a", "And?")}, "must alternate between human and gpt, found 'human, gpt, human'", 2),
        ({"conversations": [{"from": None, "value": "Why?"}, *said("a")]}, "must alternate .* found 'None, human'", 2),
        ({"conversations": said(None, "a")}, r"conversations\[0\].value: must be text, found None", 2),
        ({"conversations": said("Why?", ["a"])}, r"conversations\[1\].value: must be text", 2),
        ({"conversations": said("<image>\n ", "a")}, r"conversations\[0\].value: is empty", 2),
        ({"conversations": said("Why?", "a", " ", "b")}, r"conversations\[2\].value: is empty", 2),
        ({"conversations": said("Why?", "It is [SEG].")}, r"conversations\[1\].value: must not contain \[SEG\]", 2),
        ({"conversations": said("Why?", "<s>Gone</s>")}, r"conversations\[1\].value: must not contain </s>", 2),
        ({"conversations": said("Why?", "a", "USER: b ASSISTANT: c", "d")}, r"conversations\[2\].value: .*ASSISTANT:", 2),
        ({"conversations": said("Why?", "a", "<image>\nAnd?", "d")}, "<image> must stand in the first question alone", 2),
    ],
)  # fmt: skip
def test_a_dialogue_that_cannot_be_used_is_left_out_by_name(tmp_path, caplog, capsys, fields, words, status):
    """It stopped the training on its way, or gave a picture of another folder that has the same name."""
    file = vqa(tmp_path, GOOD, {**GOOD, "id": "bad", **fields})
    assert set(turns_of(tmp_path)) == {"good"}
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith(f"{file}: 1 of 2 dialogues are left out: dialogue 1: ") and re.search(words, told)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "vqa"]) == status
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("note", "broken")))
    assert f"{file}, dialogue 1: " in line and re.search(words, line) and line.startswith("note" if status == 0 else "broken")


def test_left_out_dialogues_are_counted_and_the_first_named(tmp_path, caplog):
    vqa(tmp_path, 5, *[{**GOOD, "image": None}] * 7, {"image": "a.jpg"}, GOOD)
    assert len(VqaTraining(tmp_path)) == 1
    told = caplog.records[0].getMessage()
    assert "9 of 10 dialogues are left out: dialogue 0: must be an object" in told and told.endswith("; and 6 more")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "must be a list of dialogues, and not an empty one"),
        (b'{"data": []}', "must be a list of dialogues, found {'data'"),
        (b'{"a": 1}\n{"b": 2', ", line 2 is no JSON"),
        (b"null", "must be a list of dialogues, found None"),
        (b'[{"image": null}]', "none of its 1 dialogues can be used: dialogue 0: lacks the field 'conversations'"),
        (b"\xff\xfe\xff", "is no UTF-16 text"),
        ("[{'蓝色': 1}]".encode("gbk"), "line 1: is no UTF-8 text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"", "is empty"),
        (None, "is a folder"),
    ],
)
def test_files_of_dialogues_that_are_none(tmp_path, capsys, content, words):
    file = vqa(tmp_path)
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=f"llava_instruct_150k.*{words}"):
        build_train(["vqa"], [1], tmp_path)
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "vqa"]) == 2
    assert re.search(f"broken .*llava_instruct_150k.json.*{words}", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ semantic sets


def paco(root, change=lambda content: None, segmentation=((3.0, 2, 9, 2, 9, 8, 3, 8),), write=json.dumps):
    """Two pictures of PACO, 24 x 32, with one annotation each: the first is given, the other a square."""
    (root / "vlpart/paco/annotations").mkdir(parents=True, exist_ok=True), (root / "coco").mkdir(exist_ok=True)
    for name in "ab":
        Image.fromarray(smooth(24, 32)).save(root / f"coco/{name}.jpg")
    square = [[3.0, 2, 9, 2, 9, 8, 3, 8]]
    content = {
        "images": [{"id": i, "file_name": f"{name}.jpg", "height": 24, "width": 32} for i, name in enumerate("ab")],
        "annotations": [{"id": 10 + i, "image_id": i, "category_id": i + 1, "segmentation": (segmentation, square)[i]}
                        for i in range(2)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(("bag_(x):strap", "cup", "kite"))],
    }  # fmt: skip
    change(content)
    (root / "vlpart/paco/annotations/paco_lvis_v1_train.json").write_text(write(content))


@pytest.mark.parametrize(
    "segmentation",
    [[], None, "abc", 7, [[NAN, 4, 9, 4, 9, 9]], [[3.0, 4, 9, 4, 9]], {"size": [24, 32], "counts": [0, 5]},
     {"size": [12, 12], "counts": [144]}, {"size": [24, 32]}],
    ids=str,
)  # fmt: skip
def test_annotations_that_cannot_be_drawn_are_drawn_anew_and_counted(tmp_path, caplog, capsys, segmentation):
    paco(tmp_path, segmentation=segmentation)
    data = SemSegTraining(tmp_path, "paco_lvis")
    samples = [data.draw(np.random.default_rng(seed)) for seed in range(30)]
    true = [sample for sample in samples if sample.meta["mode"] == "true"]
    assert true and all(Path(sample.image_path).name == "b.jpg" and sample.masks.any() for sample in true)
    ((fault, count),) = data.redrawn.items()
    assert "paco_lvis_v1_train.json, annotation 10, segmentation: " in fault and count > 3
    assert sum((sample.meta.get("skipped", []) for sample in samples), []) == [fault] * count  # a run counts them by these
    assert [record.getMessage() for record in caplog.records] == [f"{fault}: another image is drawn instead"]
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "paco_lvis"]) == 2
    assert "annotation 10, segmentation: " in capsys.readouterr().out
    paco(tmp_path, lambda content: content["annotations"].pop(), segmentation)
    with pytest.raises(ValueError, match="paco_lvis: 100 images in a row"):
        for seed in range(9):
            SemSegTraining(tmp_path, "paco_lvis").draw(np.random.default_rng(seed))


def put(part, number, **fields):
    return lambda content: content[part][number].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("images"), "its field 'images' must be a list, and it lacks it"),
        (lambda c: c.update(categories={"1": "cup"}), "its field 'categories' must be a list, found"),
        (lambda c: c["images"].append("x"), r"images\[2\] must be an object .*found 'x'"),
        (lambda c: c["annotations"][0].pop("id"), r"annotations\[0\] lacks the field 'id'"),
        (lambda c: c.update(annotations=[]), "has no annotations of its 2 images"),
        (put("images", 1, id=0), r"images\[0\] and images\[1\] have the same id, 0"),
        (put("categories", 1, id=1), r"categories\[0\] and categories\[1\] have the same id, 1"),
        (put("annotations", 1, id=10), r"annotations\[0\] and annotations\[1\] have the same id, 10"),
        (put("images", 0, id=[0]), r"images\[0\], id: must be a whole number or text"),
        (put("images", 0, id=True), r"images\[0\], id: must be a whole number or text"),
        (put("images", 0, height="24"), "image 0, height: must be a whole number .*found '24'"),
        (put("images", 0, width=None), "image 0, width: must be a whole number"),
        (put("images", 0, width=NAN), "image 0, width: must be a whole number"),
        (put("images", 0, height=0.5), "image 0, height: must be a whole number"),
        (put("images", 0, height=10**8, width=10**8), "image 0, height and width: 100000000 x 100000000 are more than"),
        (put("images", 0, file_name=None), "image 0, file_name: must be the name of an image file, found None"),
        (put("annotations", 0, image_id=5), "annotation 10, image_id: there is no 5"),
        (put("annotations", 0, image_id="0"), "annotation 10, image_id: there is no '0'"),
        (put("annotations", 0, category_id=[1]), r"annotation 10, category_id: there is no \[1\]"),
        (lambda c: c["annotations"][0].pop("category_id"), "annotation 10, category_id: there is no None"),
        (put("categories", 0, name=None), "category 1, name: must be text, found None"),
        (put("categories", 0, name=" "), "category 1, name: is empty"),
        (put("categories", 0, name="a:b:c"), "category 1, name: must be an object or object:part"),
        (put("categories", 0, name="bag:"), "category 1, name: must be an object or object:part"),
        (put("categories", 0, name="the [SEG] bag"), r"category 1, name: must not contain \[SEG\]"),
    ],
)
def test_coco_records_of_parts_are_looked_at_when_they_are_opened(tmp_path, capsys, change, words):
    """pycocotools takes the last of two records with one id, and stops at a missing field with its name alone."""
    paco(tmp_path, change)
    with pytest.raises(ValueError, match=f"paco_lvis_v1_train.json.*{words}"):
        build_train(["sem_seg"], [1], tmp_path, sem_seg_data="paco_lvis")
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "paco_lvis"]) == 2
    assert re.search(f"broken .*{words}", capsys.readouterr().out)


def mapillary(root, labels=None, stored=None):
    """One picture of Mapillary, 24 x 32, whose classes are `labels` and whose label map is `stored`."""
    folder = root / "mapillary/training"
    for made in ("images", "v2.0/labels"):
        (folder / made).mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth(24, 32)).save(folder / "images/a.jpg")
    Image.fromarray(np.ones((24, 32), np.uint8) if stored is None else stored).save(folder / "v2.0/labels/a.png")
    config = {"labels": [{"readable": "Bird"}, {"readable": "Cup"}] if labels is None else labels}
    (root / "mapillary/config_v2.0.json").write_text(json.dumps(config))
    return folder / "v2.0/labels"


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], "labels: must be a list of classes"), ({"a": 1}, "labels: must be a list of classes"), ("x", "labels: must be a list"),
     (["bird"], r"labels\[0\]: must be a JSON object"), ([{}], r"labels\[0\], readable: must be text, found None"),
     ([{"readable": "Bird"}, {"readable": " "}], r"labels\[1\], readable: is empty"),
     ([{"readable": "a </s> bird"}], r"labels\[0\], readable: must not contain </s>")],
)  # fmt: skip
def test_names_of_classes_are_looked_at_when_they_are_opened(tmp_path, labels, words):
    mapillary(tmp_path, labels)
    with pytest.raises(ValueError, match=f"config_v2.0.json, {words}"):
        SemSegTraining(tmp_path, "mapillary")


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (np.full((24, 32), 2, np.uint8), "class number 2, but there are 2 classes"),
        (np.full((24, 32), 257, np.uint16), "class number 257, but there are 2 classes"),  # in 8 bits it was class 1
        (np.full((24, 32), 65535, np.uint16), "class number 65535"),
        (np.zeros((24, 32, 3), np.uint8), "is no label map: it has colours"),
    ],
    ids=["number", "16 bits", "most", "colours"],
)
def test_label_maps_that_are_none_are_named(tmp_path, capsys, stored, words):
    mapillary(tmp_path, stored=stored)
    with pytest.raises(ValueError, match=f"labels/a.png.*{words}"):
        SemSegTraining(tmp_path, "mapillary").draw(np.random.default_rng(0))
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "mapillary"]) == 2
    assert f"a.png: {words}" in capsys.readouterr().out.replace(" is no", ": is no")


def test_a_label_map_of_16_bits_and_another_size(tmp_path, capsys):
    folder = mapillary(tmp_path, stored=np.ones((24, 32), np.uint16))
    samples = [SemSegTraining(tmp_path, "mapillary").draw(np.random.default_rng(seed)) for seed in range(9)]
    assert {s.questions[0] for s in samples if s.masks.all() and len(s.masks)} == {"cup"}
    (folder / "._a.png").write_bytes(b"\0\5\x16\7"), (folder / "b.png").mkdir()
    assert len(SemSegTraining(tmp_path, "mapillary")) == 1
    mapillary(tmp_path, stored=np.ones((32, 24), np.uint8))
    for seed in range(9):  # also where the picture is asked for what it does not show
        with pytest.raises(ValueError, match=r"a.jpg has 24 x 32 pixels .*labels/a.png is for 32 x 24"):
            SemSegTraining(tmp_path, "mapillary").draw(np.random.default_rng(seed))
    assert check(["--dataset_dir", str(tmp_path), "--dataset", "mapillary", "--pictures"]) == 2
    assert "a.jpg has 24 x 32 pixels" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="a.jpg is empty"):
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
        ("the [SEG] cup", r"question 1: must not contain \[SEG\]"),
        ("the <image> cup", "question 1: must not contain <image>"),
        ("the </s> cup", "question 1: must not contain </s>"),
        ("USER: a ASSISTANT: b", "question 1: must not contain ASSISTANT:"),
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
