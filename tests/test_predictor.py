"""READ as a library: one picture or many, typed results, and the formats they are given on in."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco
from tiny_training import CKPT, needs_ckpt

from dataset.mini import world
from dataset.reason_seg import draw_mask
from model import Answer, READPredictor, SaspConfig
from model.predictor import to_array
from utils.image import read_image

pytestmark = needs_ckpt
QUESTIONS = ["the red bag", "Which of these can one drink from?", "sneaker on the left"]


@pytest.fixture(scope="module")
def predictor() -> READPredictor:
    return READPredictor.from_pretrained(CKPT / "read_tiny", vision_tower=CKPT / "clip_tiny", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Three pictures of different sizes."""
    scenes = [world.make_scene(np.random.default_rng(seed), "test").image for seed in (4, 5, 6)]
    return [scenes[0], scenes[1][:-40], scenes[2][:, :-30]]


def same(one: Answer, other: Answer) -> None:
    assert one.text == other.text and one.forced == other.forced
    for name in ("masks", "point_labels"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    for name in ("scores", "points", "similarity"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-4)


def test_an_answer_is_made_of_arrays(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    answer = predictor.ask(pictures[0], QUESTIONS[0], max_new_tokens=8, force_segment=True)
    count, size = len(answer.masks), pictures[0].shape[:2]
    assert count >= 1 and answer.masks.shape == (count, *size) and answer.masks.dtype == bool
    points = predictor.model.config.sasp.num_points
    assert answer.points.shape == (count, points, 2) and answer.point_labels.shape == (count, points)
    side = round(predictor.processor.num_patches**0.5)
    assert answer.similarity.shape == (count, side, side)
    assert answer.scores.shape == (count,) and answer.boxes.shape == (count, 4)
    for mask, (x, y, width, height) in zip(answer.masks, answer.boxes, strict=True):
        ys, xs = np.nonzero(mask)
        assert (x, y, width, height) == (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min())


def test_no_seg_is_no_mask(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    """One token is no [SEG] here: arrays of the right form, with nothing in them."""
    answer = predictor.ask(pictures[0], QUESTIONS[0], max_new_tokens=1)
    assert answer.masks.shape == (0, *pictures[0].shape[:2]) and answer.boxes.shape == (0, 4)
    assert answer.to_rle() == [] and len(answer.scores) == len(answer.points) == 0


def test_lists_are_as_one_by_one(predictor: READPredictor, pictures: list[np.ndarray], tmp_path: Path) -> None:
    """A picture a question in batches of two, files, PIL images and arrays alike; several questions about one picture."""
    options = {"max_new_tokens": 6, "force_segment": True}
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", Image.fromarray(pictures[1]), pictures[2]]
    alone = [predictor.ask(p, q, **options) for p, q in zip(pictures, QUESTIONS, strict=True)]
    for one, other in zip(predictor.ask(mixed, QUESTIONS, batch_size=2, **options), alone, strict=True):
        same(one, other)
    of_one = predictor.ask(pictures[0], QUESTIONS, batch_size=2, **options)
    for one, question in zip(of_one, QUESTIONS, strict=True):
        same(one, predictor.ask(pictures[0], question, **options))


def test_masks_are_given_on(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    """The RLE loads in pycocotools; the LabelMe outline, drawn as ReasonSeg is, gives back the mask where it has no holes."""
    mask = np.zeros((40, 60), bool)
    mask[5:20, 10:30] = mask[25:35, 40:55] = True
    answer = Answer("", mask[None], np.ones(1), np.zeros((1, 0, 2)), np.zeros((1, 0)), np.zeros((1, 4, 4)))
    (rle,) = answer.to_rle()
    assert np.array_equal(coco.decode(rle).astype(bool), mask)
    content = answer.to_labelme("a.jpg", "Where does one sit?")
    assert content["is_sentence"] and len(content["shapes"]) == 2
    assert np.array_equal(draw_mask(content["shapes"], 40, 60) == 1, mask)


# ------------------------------------------------------------------------------------------------ images and questions as given

COLOURS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (30, 40, 1), dtype=np.uint8)
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
DEEP = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (30, 40), dtype=np.uint16))
RGB = Image.fromarray(COLOURS)
KINDS = [
    ("rgb.png", RGB, {}), ("grey.png", RGB.convert("L"), {}), ("bits.png", RGB.convert("1"), {}), ("deep.png", DEEP, {}),
    ("deep.tif", DEEP, {}), ("grey_alpha.png", Image.fromarray(np.dstack([COLOURS[..., :1], ALPHA])), {}),
    ("alpha.png", RGBA, {}), ("alpha.tif", RGBA, {}), ("alpha.webp", RGBA, {"lossless": True, "exact": True}),
    ("palette.png", RGB.quantize(16), {}), ("palette.gif", RGB.quantize(16), {}), ("palette.tif", RGB.quantize(16), {}),
    ("transparent.png", RGB.quantize(16), {"transparency": 3}),
    ("half_transparent.png", RGB.quantize(16), {"transparency": bytes(range(0, 160, 10))}),
    ("cmyk.tif", RGB.convert("CMYK"), {}), ("rgb.bmp", RGB, {}), ("rgb.tif", RGB, {}), ("rgb.jp2", RGB, {}),
    ("deep.jp2", DEEP, {}),
    ("animated.gif", RGB.quantize(16), {"save_all": True, "append_images": [RGB.convert("L").quantize(16)]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "image", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_pil_image_gives_what_its_file_gives(tmp_path: Path, recwarn, name: str, image: Image.Image, options: dict) -> None:
    image.save(tmp_path / name, **options)
    expected = read_image(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        found = to_array(opened)
    assert found.dtype == np.uint8 and np.array_equal(found, expected) and not recwarn.list
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image", [RGB, DEEP], ids=["rgb", "deep"])
def test_a_pil_image_is_turned_as_its_file_is(tmp_path: Path, image: Image.Image, orientation: int) -> None:
    """Also after `convert`, which keeps the EXIF data; not after it was turned once, which drops them."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    expected = read_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        given = [opened, ImageOps.exif_transpose(opened)] + ([opened.convert("RGB")] if image is RGB else [])
        for each in given:
            assert np.array_equal(to_array(each), expected)


def test_16_bits_without_a_file_are_the_upper_8() -> None:
    upper = np.asarray(DEEP) >> 8
    for image in (DEEP, Image.frombytes("I;16B", DEEP.size, np.asarray(DEEP).astype(">u2").tobytes())):
        assert np.array_equal(to_array(image), np.stack([upper] * 3, axis=2))


def unreadable(tmp_path: Path) -> Image.Image:
    RGB.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1500])
    return Image.open(tmp_path / "cut.png")


NO_IMAGES = {
    "PIL float": (RGB.convert("F"), "mode F"),
    "PIL 32 bits": (RGB.convert("I"), "mode I,"),
    "PIL Lab": (Image.new("LAB", (4, 4)), "mode LAB"),
    "PIL premultiplied": (Image.new("RGBa", (4, 4)), "mode RGBa"),
    "PIL without pixels": (Image.new("RGB", (0, 4)), "has 0 x 4 pixels"),
    "PIL of a cut file": (unreadable, "cannot be read"),
    "grey array": (COLOURS[..., 0], r"\(30, 40\) uint8: make three equal channels"),
    "float array": (COLOURS / 255.0, "float64: convert values 0 to 1"),
    "16 bit array": (COLOURS.astype(np.uint16), "uint16"),
    "bool array": (COLOURS > 9, "bool"),
    "alpha array": (np.dstack([COLOURS, ALPHA]), "drop alpha"),
    "channels first": (COLOURS.transpose(2, 0, 1), "channels come last"),
    "one channel": (COLOURS[..., :1], r"\(30, 40, 1\)"),
    "a batch": (COLOURS[None], "give a list"),
    "an empty array": (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
    "an array of nothing": (np.array(None), r"found \(\) object"),
    "a tensor": (torch.zeros(3, 8, 8), "found a tensor"),
    "bytes": (b"\x89PNG", "found bytes: give Image.open"),
    "a bytearray": (bytearray(b"\x89PNG"), "found bytes"),
    "a buffer": (io.BytesIO(b"\x89PNG"), "found an open file: give Image.open"),
    "an open file": (lambda folder: (folder / "a").open("wb"), "found an open file"),
    "nothing": (None, "found None"),
    "a number": (5, "found 5"),
    "a dictionary": ({"bytes": b"", "path": "a.jpg"}, "found {'bytes'"),
    "a set": ({"a.jpg"}, "found {'a.jpg'}"),
    "an address": ("https://example.org/a.jpg", "the address https://example.org/a.jpg: download it first"),
    "an address as a path": (Path("s3://bucket/a.jpg"), "the address s3:/bucket"),
    "an empty path": ("", "found an empty one"),
    "a blank path": (" ", "found an empty one"),
    "no path": (Path(), "is a folder"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_said_in_one_sentence(predictor: READPredictor, tmp_path: Path, name: str) -> None:
    given, words = NO_IMAGES[name]
    given = given(tmp_path) if callable(given) else given
    for images in (given, [given]):
        questions = QUESTIONS[0] if images is given else QUESTIONS[:1]
        with pytest.raises(ValueError, match=words) as error:
            predictor.ask(images, questions)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_pil_image_has_the_limit_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READ_MAX_MEGAPIXELS", "1")
    with pytest.raises(ValueError, match="has 1200 x 1000 pixels.*READ_MAX_MEGAPIXELS"):
        to_array(Image.new("L", (1200, 1000)))


def test_a_path_from_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    RGB.save(tmp_path / "a.png")
    assert np.array_equal(to_array("~/a.png"), COLOURS)
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        to_array("~/nowhere.png")


NO_QUESTIONS = {
    "none": (None, "found None"),
    "a number": (5, "found 5"),
    "bytes": (b"what?", "found b'what"),
    "a dictionary": ({"question": "what?"}, "found {"),
    "empty": ("", "the question is empty"),
    "blank": (" \n\t", "the question is empty"),
    "none among several": (["what?", None], "question 2 of 2 must be text, found None"),
    "a list in a list": ([["what?"]], "must be text, found "),
    "an empty one among several": (("what?", "", "who?"), "question 2 of 3 is empty"),
    **{mark: (f"what is {mark}?", "must not contain") for mark in
       ("<image>", "<IMAGE>", "[SEG]", "[seg]", "<im_start>", "<im_end>", "</s>", "<s>", "<unk>", " ASSISTANT: ")},
    "half a character": ("what \ud800?", "must not contain"),
    "a zero byte": ("what\0?", "must not contain"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_QUESTIONS)
def test_a_question_that_cannot_be_asked_is_refused_before_an_image_is_read(predictor: READPredictor, name: str) -> None:
    questions, words = NO_QUESTIONS[name]
    with pytest.raises(ValueError, match=words):
        predictor.ask("nowhere.jpg", questions)


@pytest.mark.parametrize("option", ["max_new_tokens", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, None, "8", 2.5, True, float("nan"), float("inf"), 10**400])
def test_numbers_out_of_range_are_refused_before_an_image_is_read(predictor: READPredictor, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}: must be a whole number"):
        predictor.ask("nowhere.jpg", QUESTIONS[:2], **{option: value})


def test_an_answer_longer_than_the_model_holds_is_refused_before_an_image_is_read(predictor: READPredictor) -> None:
    room = predictor.model.config.llava.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"max_new_tokens: {room} do not fit .* the model holds {room}: at most "):
        predictor.ask("nowhere.jpg", QUESTIONS[0], max_new_tokens=room)


def test_no_answer_goes_on_beyond_what_the_model_holds(
    predictor: READPredictor, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits behind an image need not fit behind the whole prompt."""
    asked: dict = {}

    def generate(images: object, ids: torch.Tensor, mask: object, of_question: object, **options: int) -> None:
        asked.update(options, prompt=ids.shape[1])
        raise KeyError("enough")

    monkeypatch.setattr(predictor.model, "generate_answers", generate)
    room = predictor.model.config.llava.text_config.max_position_embeddings
    with pytest.raises(KeyError, match="enough"):
        predictor.ask(pictures[0], QUESTIONS[0], max_new_tokens=room - predictor.processor.num_patches)
    assert asked["max_new_tokens"] == room - asked["prompt"] > 0


def test_numbers_of_images_and_questions_must_fit(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    for images, questions, words in (
        (pictures[:2], QUESTIONS, "2 images for 3 questions"), ([], QUESTIONS, "0 images for 3"),
        (pictures, QUESTIONS[0], "3 images for 1"), ((image for image in pictures), QUESTIONS[:2], "3 images for 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            predictor.ask(images, questions)
    assert predictor.ask(pictures[0], []) == predictor.ask([], []) == []
    with pytest.raises(ValueError, match="image 2 of 2 must be"):
        predictor.ask([pictures[0], None], QUESTIONS[:2])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predictor.ask("nowhere.jpg", "what?")


def test_tuples_and_generators_are_as_lists(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    options = {"max_new_tokens": 3, "force_segment": True}
    expected = predictor.ask(pictures[:2], QUESTIONS[:2], **options)
    for images, questions in (
        (tuple(pictures[:2]), tuple(QUESTIONS[:2])),
        (iter(pictures[:2]), iter(QUESTIONS[:2])),
        (pictures[:2], np.array(QUESTIONS[:2])),
    ):
        for one, other in zip(predictor.ask(images, questions, **options), expected, strict=True):
            same(one, other)


# ------------------------------------------------------------------------------------------------ a conversation


def test_the_text_is_told_while_it_is_written(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    """Once a token, each time with all before it; the last is the answer's."""
    told: list[str] = []
    answer, _ = predictor.answer(predictor.encode(pictures[:1]), [(QUESTIONS[0], None)], tell=told.append, max_new_tokens=6)
    assert 1 < len(told) <= 6 and told[-1] == answer.text
    assert all(longer.startswith(text) for text, longer in zip(told, told[1:], strict=False))
    same(answer, predictor.ask(pictures[0], QUESTIONS[0], max_new_tokens=6))


def test_who_is_told_may_end_the_answer(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    """What it raises comes out, and the model is as it was: no hook is left, and the points are chosen as before."""
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        raise KeyError("enough")

    before, images = predictor.model.config.sasp, predictor.encode(pictures[:1])
    turns = [(QUESTIONS[0], None)]
    with pytest.raises(KeyError, match="enough"):
        predictor.answer(images, turns, sasp=SaspConfig(num_points=2), tell=stop, max_new_tokens=6)
    assert len(told) == 1 and predictor.model.config.sasp is before
    assert not predictor.model.text_hidden_fcs[0]._forward_hooks
    same(predictor.answer(images, turns, max_new_tokens=6)[0], predictor.ask(pictures[0], QUESTIONS[0], max_new_tokens=6))


OTHER_POINTS = [
    SaspConfig(num_points=3, down_sample=1),
    SaspConfig(num_points=7, t_pos=0.5, t_neg=0.4),
    SaspConfig(num_points=7, geometry="exact"),
    SaspConfig(enabled=False),
]


@pytest.mark.parametrize("sasp", OTHER_POINTS, ids=str)
def test_prompting_again_is_a_fresh_run(predictor: READPredictor, pictures: list[np.ndarray], sasp: SaspConfig) -> None:
    """Bit for bit what a run with those points draws, and no module but SAM's decoder is called for it."""
    turns = [(QUESTIONS[1], "It is [SEG]."), (QUESTIONS[0], None)]
    options = {"max_new_tokens": 4, "force_segment": True}
    _, kept = predictor.answer(predictor.encode(pictures[1:2]), turns, **options)
    called: list[str] = []
    model = predictor.model
    parts = {"language model": model.llava.model.language_model, "CLIP": model.llava.model.vision_tower,
             "SAM's encoder": model.sam.image_encoder, "SAM's decoder": model.sam.mask_decoder}  # fmt: skip
    hooks = [part.register_forward_hook(lambda *_, name=name: called.append(name)) for name, part in parts.items()]
    again = predictor.prompt_again(kept, sasp)
    for hook in hooks:
        hook.remove()
    assert called == ["SAM's decoder"]
    fresh, _ = predictor.answer(predictor.encode(pictures[1:2]), turns, sasp=sasp, **options)
    for field in dataclasses.fields(Answer):
        assert np.array_equal(getattr(again, field.name), getattr(fresh, field.name)), field.name
    assert again.points.shape[1] == (sasp.num_points if sasp.enabled else 0)


def test_nothing_to_prompt_again_is_no_mask(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    answer, kept = predictor.answer(predictor.encode(pictures[:1]), [(QUESTIONS[0], None)], max_new_tokens=1)
    same(predictor.prompt_again(kept, OTHER_POINTS[0]), answer)
    assert len(answer.masks) == 0
    with pytest.raises(ValueError, match="one picture, found 2"):
        predictor.answer(predictor.encode([pictures[0]] * 2), [(QUESTIONS[0], None)])
