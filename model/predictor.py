"""READ as a library: pictures and questions in, answers with masks as arrays out.

    predictor = READPredictor.from_pretrained("assets/read-mini-base")
    answer = predictor.ask("street.jpg", "Which of these can carry my shopping?")
    answer.text, answer.masks, answer.boxes, answer.scores, answer.to_rle()

    predictor.ask(["a.jpg", "b.jpg"], ["the red cup", "Where does one sit?"])      a question each, batched
    predictor.ask("a.jpg", ["the red cup", "the blue one"])                        several about one picture, looked at once

A conversation about a picture, word by word, whose masks can be drawn anew with other points:

    images = predictor.encode([picture])
    answer, kept = predictor.answer(images, [("the red cup", None)], tell=print)
    answer = predictor.prompt_again(kept, SaspConfig(num_points=10))               SAM alone; nothing is reasoned again

Legend: M [SEG] tokens in an answer · (H, W) pixels of the picture · K points · G side of the grid of image tokens · P = G x G
image tokens · C = 256 SAM width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.conversation import Turns, with_image
from utils.image import read_image

from .config import SaspConfig
from .processing import READProcessor
from .read import EncodedImages, READForCausalLM, READGeneration, Segments

Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Answer:
    """What the model says to one question, and what it means by each [SEG] in its answer (M may be 0)."""

    text: str
    masks: np.ndarray
    """(M, H, W) bool."""
    scores: np.ndarray
    """(M,) float32, SAM's own estimate of each mask's IoU."""
    points: np.ndarray
    """(M, K, 2) float32, (x, y) in pixels of the picture; K is 0 with SasP off."""
    point_labels: np.ndarray
    """(M, K) int64: 1 object, 0 background, -1 neutral."""
    similarity: np.ndarray
    """(M, G, G) float32 over CLIP's view, the centre square of the picture."""
    forced: bool = False
    """The answer held no [SEG], and a mask was asked for all the same."""

    @property
    def boxes(self) -> np.ndarray:
        """(M, 4) float32, [x, y, width, height] of each mask as COCO writes it; zeros where a mask is empty."""
        from pycocotools import mask as coco

        found = [coco.toBbox(coco.encode(np.asfortranarray(mask, dtype=np.uint8))) for mask in self.masks]
        return np.array(found, dtype=np.float32).reshape(-1, 4)

    def to_rle(self) -> list[dict[str, Any]]:
        """A COCO RLE {"size": [H, W], "counts": str} of each mask, as pycocotools and JSON take it."""
        from utils.predictions import encode_mask

        return [encode_mask(mask) for mask in self.masks]

    def to_labelme(self, image_path: str, question: str) -> dict[str, Any]:
        """A LabelMe file's content, in ReasonSeg's form: the outline of every part of every mask under the label `target`.

        Holes are lost, as LabelMe's polygons have none; single pixels and lines are left out, as they enclose nothing.
        """
        import cv2

        shapes = []
        for mask in self.masks:
            outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            shapes += [
                {"label": "target", "points": outline[:, 0].tolist(), "shape_type": "polygon", "group_id": None, "flags": {}}
                for outline in outlines
                if len(outline) >= 3
            ]
        height, width = self.masks.shape[1:]
        return {
            "version": "5.0.0",
            "flags": {},
            "text": [question],
            "is_sentence": question.rstrip().endswith("?"),
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }


@dataclass(frozen=True)
class KeptAnswer:
    """What an answer leaves behind so that SAM can be prompted again: a few kilobytes, and the picture's encoding."""

    images: EncodedImages
    """Of the one picture that was asked about, with SAM's embedding of it."""
    similarity: torch.Tensor
    """(M, P) similarity of each [SEG] with the image tokens, dtype of the model."""
    prompts: torch.Tensor
    """(M, C) the projected state of each [SEG], dtype of the model."""
    text: str
    forced: bool


class READPredictor:
    """A model and its processor, asked in words. Pictures asked about again are not looked at again, as long as they are kept."""

    def __init__(self, model: READForCausalLM, processor: READProcessor, conv_type: str | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        self.conv_type = conv_type or model.config.conv_type
        self.model.decoder.on = True  # one question after another, all of one shape

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> READPredictor:
        """From a checkpoint folder or hub id; a GPU and bf16 if there is one, else the CPU and fp32.

        `options` as for `READForCausalLM.from_pretrained`, whose errors it raises.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = READForCausalLM.from_pretrained(path, dtype=dtype, **options).requires_grad_(False).to(device)
        processor = READProcessor.from_pretrained(path, vision_tower=options.get("vision_tower"))
        processor.check(model.config, path)
        return cls(model, processor)

    def ask(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 512,
        force_segment: bool = False,
        batch_size: int = 8,
    ) -> Answer | list[Answer]:
        """Answers to questions; one Answer where one question was given, else a list.

        Args:
            images: a file, a PIL image or an array (H, W, 3) uint8 RGB; or as many of them as questions.
            questions: a question, or several, about the one picture or about a picture each.
            max_new_tokens: longest answer.
            force_segment: an answer without [SEG] gets the mask that a [SEG] at its end would have had.
            batch_size: questions that go through the model together.

        Raises:
            FileNotFoundError, ValueError: a picture cannot be read, numbers do not fit, or a question holds a mark of the
                prompt format.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        one_picture = isinstance(images, str | Path | Image.Image | np.ndarray)
        shown = [images] if one_picture else list(images)
        if not one_picture and len(shown) != len(asked):
            raise ValueError(f"{len(shown)} pictures for {len(asked)} questions: give one picture, or one a question")
        answers: list[Answer] = []
        pictures = [to_array(picture) for picture in shown] if one_picture else None
        encoded = self.encode(pictures) if pictures else None
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            known = encoded or self.encode([to_array(picture) for picture in shown[first : first + batch_size]])
            of_question = [0] * len(part) if encoded else list(range(len(part)))
            turns: list[Turns] = [[(question, None)] for question in part]
            out = self.generate(known, turns, of_question, max_new_tokens=max_new_tokens, force_segment=force_segment)
            answers += self.answers(out, [known.original_sizes[image] for image in of_question])
        return answers[0] if isinstance(questions, str) else answers

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray]) -> EncodedImages:
        """What the model knows of pictures (H, W, 3) uint8 RGB before it is asked."""
        views = [self.processor.views(picture) for picture in pictures]
        device, dtype = self.model.device, self.model.dtype
        return self.model.encode_images(
            clip_images=torch.stack([view.clip for view in views]).to(device, dtype),
            sam_images=torch.stack([view.sam for view in views]).to(device, dtype),
            sam_sizes=[view.sam_size for view in views],
            original_sizes=[view.original_size for view in views],
        )

    def generate(
        self, images: EncodedImages, conversations: Sequence[Turns], of_question: Sequence[int], **options: Any
    ) -> READGeneration:
        """The model's answers to conversations whose last answer is None, each about picture `of_question[n]` of `images`.

        `options` as for `READForCausalLM.generate_answers`.
        """
        rows = []
        for turns in conversations:
            for question, _ in turns:
                if "<image>" in question:
                    raise ValueError("a question must not contain <image>: the picture is put in front of it by itself")
            (question, answer), *rest = turns
            rows.append(self.processor.encode([(with_image(question), answer), *rest], self.conv_type)[0])
        length = max(map(len, rows))
        room = self.model.config.llava.text_config.max_position_embeddings
        if length > room:
            raise ValueError(f"the conversation has {length} tokens with its picture, and the model holds {room}: ask shorter")
        device = self.model.device
        ids = torch.tensor([[self.processor.pad_token_id] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
        return self.model.generate_answers(images, ids, mask, torch.tensor(of_question, device=device), **options)

    def answer(
        self,
        images: EncodedImages,
        turns: Turns,
        *,
        sasp: SaspConfig | None = None,
        tell: Callable[[str], None] | None = None,
        **options: Any,
    ) -> tuple[Answer, KeptAnswer]:
        """The answer to the last question of a conversation about one picture, and what is kept of it for `prompt_again`.

        One thread at a time: `sasp` is put into the model for the length of the call.

        Args:
            images: `encode` of that one picture.
            turns: earlier questions with their answers, then the question with None.
            sasp: how points are chosen; unless given, as the model's config has it.
            tell: told the text so far whenever a token was written. What it raises ends the answer and comes out of here.
            options: as for `READForCausalLM.generate_answers`.

        Raises:
            ValueError: more than one picture, or as `ask`.
        """
        if len(images) != 1:
            raise ValueError(f"a conversation is about one picture, found {len(images)}")
        streamer = _Teller(self.processor, tell) if tell else None
        with self._points_by(sasp), self._projected_states() as prompts:
            out = self.generate(images, [turns], [0], streamer=streamer, **options)
        answer = self.answers(out, images.original_sizes)[0]
        return answer, KeptAnswer(images, out.segments.similarity, prompts[0], answer.text, answer.forced)

    @torch.no_grad()
    def prompt_again(self, kept: KeptAnswer, sasp: SaspConfig | None = None) -> Answer:
        """The answer with its masks as a run with other points would have drawn them; SAM's decoder alone runs.

        One thread at a time, as `answer`.
        """
        images, row = kept.images, torch.zeros(len(kept.prompts), dtype=torch.long, device=kept.prompts.device)
        with self._points_by(sasp):
            segments = self.model._draw(images, kept.similarity, kept.prompts[:, None], row, row)
        return _answer(segments, 0, kept.text, images.original_sizes[0], kept.forced)

    @contextmanager
    def _points_by(self, sasp: SaspConfig | None) -> Iterator[None]:
        """The model chooses points by `sasp` for the length of a block."""
        config = self.model.config
        before = config.sasp
        config.sasp = sasp or before
        try:
            yield
        finally:
            config.sasp = before

    @contextmanager
    def _projected_states(self) -> Iterator[list[torch.Tensor]]:
        """Collects what the model prompts SAM with besides points: the projected [SEG] states (M, C) of every pass."""
        states: list[torch.Tensor] = []
        hook = self.model.text_hidden_fcs[0].register_forward_hook(lambda module, args, output: states.append(output))
        try:
            yield states
        finally:
            hook.remove()

    def answers(self, out: READGeneration, sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """The Answers of a generation; `sizes` are the (H, W) of each question's picture."""
        return [
            _answer(out.segments, n, self.processor.decode(ids), size, forced)
            for n, (ids, size, forced) in enumerate(zip(out.answer_ids, sizes, out.forced, strict=True))
        ]


class _Teller:
    """A streamer, in transformers' sense, of one answer: tells its text so far, as people read it, at every token."""

    def __init__(self, processor: READProcessor, tell: Callable[[str], None]) -> None:
        self.processor, self.tell = processor, tell
        self.ids: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        """Takes (1,) new ids; of a prompt given as embeddings there are none."""
        if ids.numel():
            self.ids += ids.flatten().tolist()
            self.tell(self.processor.decode(self.ids))

    def end(self) -> None:
        """The answer is whole; there is nothing to flush, since each token was told with all before it."""


def to_array(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file, a PIL image or such an array.

    Raises:
        FileNotFoundError, ValueError: no such file, no image, or an array of another form.
    """
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is (H, W, 3) uint8 RGB, found {picture.shape} {picture.dtype}")
    return picture


def _answer(segments: Segments, n: int, text: str, size: tuple[int, int], forced: bool) -> Answer:
    return Answer(text=text, forced=forced, **dict(_arrays(segments, segments.of_question(n), size)))


def _arrays(segments: Segments, entries: list[int], size: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The fields of an Answer for some entries of `segments`."""
    side = round(segments.similarity.shape[-1] ** 0.5)
    similarity = segments.similarity[entries].float().cpu().numpy()
    yield "similarity", similarity.reshape(-1, side, side)
    yield "scores", segments.scores[entries].float().cpu().numpy()
    masks = [(segments.mask_logits[m] > 0).cpu().numpy() for m in entries]
    yield "masks", np.stack(masks) if masks else np.zeros((0, *size), bool)
    points = [segments.points[m].float().cpu().numpy() for m in entries]
    yield "points", np.stack(points) if points else np.zeros((0, 0, 2), np.float32)
    labels = [segments.point_labels[m].cpu().numpy() for m in entries]
    yield "point_labels", np.stack(labels) if labels else np.zeros((0, 0), np.int64)
