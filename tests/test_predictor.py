"""READ as a library: one picture or many, typed results, and the formats they are given on in."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from tiny_training import CKPT, needs_ckpt

from dataset.mini import world
from dataset.reason_seg import draw_mask
from model import Answer, READPredictor, SaspConfig

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


def test_what_does_not_fit_is_said(predictor: READPredictor, pictures: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="2 pictures for 3 questions"):
        predictor.ask(pictures[:2], QUESTIONS)
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB"):
        predictor.ask(pictures[0].astype(float), QUESTIONS[0])
    with pytest.raises(ValueError, match="<image>"):
        predictor.ask(pictures[0], "what is <image>?")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predictor.ask("nowhere.jpg", "what?")


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
