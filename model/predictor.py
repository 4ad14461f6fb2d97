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

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.conversation import Turns, text_faults, with_image
from utils.files import shown, whole_number
from utils.image import decode_image, max_pixels, read_image

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
            images: a file, a PIL image or an array (H, W, 3) uint8 RGB; or as many of them as questions, in a list, a tuple or a
                generator. A PIL image gives what its file would: turned by its EXIF data, 16 bits as their upper 8.
            questions: a question, or several, about the one image or about an image each.
            max_new_tokens: longest answer.
            force_segment: an answer without [SEG] gets the mask that a [SEG] at its end would have had.
            batch_size: questions that go through the model together.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read, numbers do not fit, or a question is empty, no text, or
                holds a mark of the prompt format. What is wrong with the arguments is told before anything is computed.
        """
        asked = _questions(questions)
        whole_number(batch_size, "batch_size")
        room, patches = self.model.config.llava.text_config.max_position_embeddings, self.processor.num_patches
        if whole_number(max_new_tokens, "max_new_tokens") > room - patches:
            raise ValueError(
                f"max_new_tokens: {max_new_tokens} do not fit behind the {patches} tokens of an image, since the model holds "
                f"{room}: at most {room - patches}"
            )
        if several := _is_several(images):
            images = list(images)
            if len(images) != len(asked):
                raise ValueError(f"{len(images)} images for {len(asked)} questions: give one image, or one a question")
        answers: list[Answer] = []
        encoded = None if several or not asked else self.encode([to_array(images)])
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            known = encoded or self.encode([
                to_array(image, f"image {first + n} of {len(asked)}")
                for n, image in enumerate(images[first : first + batch_size], 1)
            ])  # fmt: skip
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
                if faults := text_faults(question):
                    raise ValueError(f"the question {faults[0]}")
            (question, answer), *rest = turns
            rows.append(self.processor.encode([(with_image(question), answer), *rest], self.conv_type)[0])
        length = max(map(len, rows))
        room = self.model.config.llava.text_config.max_position_embeddings
        if length >= room:
            raise ValueError(f"the conversation has {length} tokens with its image, and the model holds {room}: ask shorter")
        longest = whole_number(options.pop("max_new_tokens", 512), "max_new_tokens")
        device = self.model.device
        ids = torch.tensor([[self.processor.pad_token_id] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
        of_question = torch.tensor(of_question, device=device)
        # No answer goes on beyond what the model holds: its words would mean nothing.
        return self.model.generate_answers(images, ids, mask, of_question, max_new_tokens=min(longest, room - length), **options)

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


def to_array(image: Picture, name: str = "the image") -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file, a PIL image or such an array; `name` stands in messages.

    A PIL image gives the pixels that `read_image` gives of the same image in a file.

    Raises:
        FileNotFoundError, ValueError: no such file, no image, or something else; the message says what to give.
    """
    if isinstance(image, str | Path):
        return read_image(_local(str(image), name))
    if isinstance(image, Image.Image):
        return _of_pil(image, name)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"{name} must be an array (H, W, 3) uint8 RGB, found {image.shape} {image.dtype}{_advice(image)}")
        if not image.size:
            raise ValueError(f"{name} has no pixels: its shape is {image.shape}")
        return np.ascontiguousarray(image)
    kinds = {bytes: "bytes", bytearray: "bytes", memoryview: "bytes", io.IOBase: "an open file", torch.Tensor: "a tensor"}
    found = next((words for kind, words in kinds.items() if isinstance(image, kind)), shown(image))
    how = {"bytes": "Image.open(io.BytesIO(data))", "an open file": "Image.open(file)", "a tensor": "its array (H, W, 3) uint8"}
    raise ValueError(f"{name} must be a path, a PIL image or an array (H, W, 3) uint8 RGB, found {found}"
                     + (f": give {how[found]}" if found in how else ""))  # fmt: skip


def _local(path: str, name: str) -> Path:
    """A path as it is meant; ValueError if it is none."""
    if not path.strip():
        raise ValueError(f"{name} must be a path, found an empty one")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", path):  # Path makes one slash of two
        raise ValueError(f"{name} must be a local file, found the address {path}: download it first")
    return Path(os.path.expanduser(path)) if path.startswith("~") and not Path(path).exists() else Path(path)


def _advice(array: np.ndarray) -> str:
    """What to do with an array of another form, after its shape; empty if that is not clear."""
    if array.ndim == 2:
        return ": make three equal channels of grey, np.stack([grey] * 3, axis=2), of values 0 to 255"
    if array.ndim == 4:
        return ": of a batch give a list, list(batch)"
    if array.ndim == 3 and array.shape[2] == 4:
        return ": drop alpha, array[..., :3]"
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] != 3:
        return ": channels come last, array.transpose(1, 2, 0)"
    return ": convert values 0 to 1 with (array * 255).round().astype(np.uint8)" if array.dtype.kind == "f" else ""


def _of_pil(image: Image.Image, name: str) -> np.ndarray:
    """The pixels that a file of the image would give."""
    if min(image.size) < 1 or image.width * image.height > max_pixels():
        raise ValueError(f"{name} has {image.width} x {image.height} pixels: 1 to {max_pixels()} are taken (READ_MAX_MEGAPIXELS)")
    kind = image.format  # is lost on the way
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a decoder raises whatever it stumbles over: the file may be read only now
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error
    mode = image.mode
    if mode in ("RGB", "RGBX", "RGBA"):
        return np.asarray(image)[..., :3].copy()
    if mode in ("1", "L", "LA", "P", "PA"):
        return np.asarray(image.convert("RGBA"))[..., :3].copy()
    if mode in ("YCbCr", "HSV"):
        return np.asarray(image.convert("RGB"))
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):  # of these, Pillow calls 16 bits `I`
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    elif mode != "CMYK":
        raise ValueError(
            f"{name} is a PIL image of mode {mode}, whose numbers have no one meaning as colours: convert it to RGB or L, of "
            "values 0 to 255"
        )
    # Converted as in a file, by way of one: there is more than one rule.
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" or kind == "TIFF" else "PNG")
    return decode_image(buffer.getvalue(), name)


def _is_several(images: Any) -> bool:
    """Whether several images were given: a list, a tuple, a generator, or a column of a table."""
    one = str | Path | Image.Image | np.ndarray | bytes | bytearray | memoryview | io.IOBase | torch.Tensor | Mapping | Set
    return not isinstance(images, one) and hasattr(images, "__iter__")


def _questions(questions: Any) -> list[str]:
    """The questions that were given, in a list.

    Raises:
        ValueError: one is no usable text; the message says which.
    """
    if isinstance(questions, str):
        asked = [questions]
    elif isinstance(questions, bytes | bytearray | Mapping | Set) or not hasattr(questions, "__iter__"):
        raise ValueError(f"a question must be text, or several a list of texts, found {shown(questions)}")
    else:
        asked = list(questions)
    for number, question in enumerate(asked, 1):
        if faults := text_faults(question):
            raise ValueError(f"{'the question' if len(asked) == 1 else f'question {number} of {len(asked)}'} {faults[0]}")
    return asked


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
