"""The evaluation loop, one for validation while training and for `test_read.py` (protocol §5).

    scores = evaluate(model, processor, dataset, protocol="forced")

In: a model, its processor and a sequence of Samples (`dataset.build_eval`), one picture with all its expressions each.
Out: a dict of scores (`utils.metrics`) with the protocol they belong to, and, if asked for, one JSON line an expression.

    forced    the prompt contains the answer with its [SEG]; nothing is generated (ReasonSeg, RefCOCO)
    generate  the model answers on its own; no [SEG] in the answer is a zero mask (FP-RefCOCO)

The two are not comparable. In both the first [SEG] of an answer counts; presence is judged only where it could be denied,
that is in `generate`: predicted present = [SEG] written and its mask not empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from utils.distributed import any_rank, barrier, gather_objects, shard
from utils.metrics import Overlap, SegmentationMeter, overlap

if TYPE_CHECKING:
    from dataset.types import Batch, Sample
    from model import READForCausalLM, READProcessor, Segments

PROTOCOLS = ("forced", "generate")
COMPAT = ("correct", "released")


@dataclasses.dataclass
class Prediction:
    """What the model said and drew for one expression."""

    answer: str
    num_seg: int
    """[SEG] tokens in the answer."""
    mask: torch.Tensor
    """(H, W) bool on the CPU, pixels of the original picture: that of the first [SEG], or zeros."""
    points: list[list[float]]
    """K pairs (x, y), pixels of the original picture."""
    point_labels: list[int]
    """K of 1 object, 0 background, -1 neutral."""

    @property
    def exists(self) -> bool:
        """Predicted presence (§5)."""
        return self.num_seg > 0 and bool(self.mask.any())


@torch.no_grad()
def evaluate(
    model: READForCausalLM,
    processor: READProcessor,
    dataset: Sequence[Sample],
    *,
    protocol: str = "forced",
    compat: str = "correct",
    conv_type: str | None = None,
    rank: int = 0,
    world: int = 1,
    max_new_tokens: int = 512,
    predictions_path: str | Path | None = None,
    chunk: int = 16,
    workers: int = 0,
    progress: bool = True,
    collate: Callable[..., Batch] | None = None,
) -> dict[str, Any]:
    """Scores of a model on a data set; with several processes each takes a share and all get the whole result.

    Args:
        protocol: `forced` or `generate`; the samples' conversations must end with an answer, or without one.
        compat: `correct` gives every expression the result it would have alone. `released` repeats the original's
            generation: rows one at a time, each with the padding that its longest neighbour in the picture caused and
            with the attention mask that this shifts (§1, §8-25). Without padding on the left, so in `forced`, they agree.
        conv_type: wording of the system prompt; unless given, the one saved with the model.
        rank, world: this process and their number; shares are exact, no picture is counted twice.
        max_new_tokens: longest answer.
        predictions_path: JSON lines, one an expression, in the order of the data set whatever `world` is.
        chunk: questions that go through the model together.
        workers: processes that read pictures ahead; 0 reads them in this one.
        collate: makes a Batch of Samples; unless given, `dataset.collate`'s.

    Returns:
        The scores of `SegmentationMeter.compute`, `images`, `seconds`, `protocol`, `compat`, `conv_type`, and `subsets`:
        the same scores for short and long questions, true and false premises, where the data set has both.
    """
    if protocol not in PROTOCOLS or compat not in COMPAT:
        raise ValueError(
            f"protocol must be one of {', '.join(PROTOCOLS)} and compat one of {', '.join(COMPAT)}, "
            f"found {protocol!r} and {compat!r}"
        )
    if collate is None:
        from dataset.collate import collate  # here, not above: of `utils`, this function alone looks at `dataset`
    conv_type = conv_type or model.config.conv_type
    batches = _Batches(dataset, shard(len(dataset), rank, world), processor, protocol, compat, conv_type, chunk, collate)
    # A generator of its own: validation must not move the random numbers of the training around it.
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    meters: dict[str, SegmentationMeter] = {"all": SegmentationMeter()}
    images, begin, was_training = 0, time.monotonic(), model.training
    model.eval()
    in_step = _InStep(split=any(hasattr(p, "ds_id") for p in model.parameters()))
    with _PredictionFile(predictions_path, rank, world) as file:
        # Not a terminal (a log file): one line now and then instead of a hundred.
        every = 0.5 if sys.stderr.isatty() else 15
        for index, parts in tqdm(loader, desc=protocol, unit="image", disable=not progress or rank > 0, mininterval=every):
            images += 1
            row = 0
            for batch in parts:
                in_step.begin()
                found = predict(model, processor, batch, protocol, compat, max_new_tokens)
                sample = batch.samples[0]
                for n, prediction in enumerate(found):
                    pixels = overlap(prediction.mask, torch.as_tensor(sample.masks[n]))
                    presence = (bool(sample.exists[n]), prediction.exists) if protocol == "generate" else (None, None)
                    for name in ("all", *_subsets(sample, n, row + n)):
                        meters.setdefault(name, SegmentationMeter()).add(pixels, *presence)
                    file.write(index, row + n, lambda s=sample, n=n, p=prediction, o=pixels: _record(s, n, p, o))
                row += len(found)
        in_step.finish(lambda: predict(model, processor, batches.any(), protocol, compat, max_new_tokens))
    model.train(was_training)

    total: dict[str, SegmentationMeter] = {"all": SegmentationMeter()}
    shares = gather_objects(({name: meter.state() for name, meter in meters.items()}, images))
    for states, _ in shares:
        for name, state in states.items():
            total.setdefault(name, SegmentationMeter()).merge(state)
    subsets = {name: meter.compute() for name, meter in sorted(total.items()) if 0 < len(meter) < len(total["all"])}
    return {
        **total["all"].compute(),
        "images": sum(count for _, count in shares),
        "seconds": round(time.monotonic() - begin, 2),
        "protocol": protocol,
        "compat": compat,
        "conv_type": conv_type,
        "subsets": subsets,
    }


def predict(
    model: READForCausalLM, processor: READProcessor, batch: Batch, protocol: str, compat: str, max_new_tokens: int
) -> list[Prediction]:
    """Answers and masks of the N questions of a batch."""
    inputs = batch.to(model.device, model.dtype).model_inputs()
    if protocol == "forced":
        answers = [turns[-1][1] or "" for sample in batch.samples for turns in sample.conversations]
        return _predictions(model(**inputs).segments, answers, batch)
    answers = []
    if compat == "released":
        found = []
        for n in range(len(batch.input_ids)):
            alone = _row(inputs, n)
            out = model.generate_segments(**alone, max_new_tokens=max_new_tokens, compat=compat)
            found += _predictions(out.segments, [processor.decode(out.answer_ids[0])], batch, first=n)
        return found
    out = model.generate_segments(**inputs, max_new_tokens=max_new_tokens, compat=compat)
    return _predictions(out.segments, [processor.decode(ids) for ids in out.answer_ids], batch)


def _row(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """The arguments of one question with its padding, and its picture alone."""
    image = int(inputs["image_of_question"][n])
    of_image = {name: inputs[name][image : image + 1] for name in ("clip_images", "sam_images")}
    sizes = {name: [inputs[name][image]] for name in ("sam_sizes", "original_sizes")}
    rows = {name: inputs[name][n : n + 1] for name in ("input_ids", "attention_mask")}
    return {**of_image, **sizes, **rows, "image_of_question": torch.zeros_like(inputs["image_of_question"][n : n + 1])}


def _predictions(segments: Segments, answers: list[str], batch: Batch, first: int = 0) -> list[Prediction]:
    """One Prediction an answer; `first` is the place in the batch of the first of them."""
    found = []
    for n, answer in enumerate(answers):
        entries = segments.of_question(n)
        if entries:
            mask = (segments.mask_logits[entries[0]] > 0).cpu()
            points = segments.points[entries[0]].tolist()
            labels = segments.point_labels[entries[0]].tolist()
        else:
            size = batch.original_sizes[int(batch.image_of_question[first + n])]
            mask, points, labels = torch.zeros(tuple(size), dtype=torch.bool), [], []
        found.append(Prediction(answer, len(entries), mask, points, labels))
    return found


# ------------------------------------------------------------------------------------------------ batches


class _Batches(torch.utils.data.Dataset):
    """(index in the data set, batches of its questions) of the pictures of one process."""

    def __init__(
        self,
        dataset: Sequence[Sample],
        indices: Sequence[int],
        processor: READProcessor,
        protocol: str,
        compat: str,
        conv_type: str,
        chunk: int,
        collate: Callable[..., Batch],
    ) -> None:
        self.dataset, self.indices, self.processor, self.collate = dataset, indices, processor, collate
        self.conv_type = conv_type
        self.padding = "right" if protocol == "forced" else "left"
        # The original pads all questions of a picture to the longest of them: `released` must see them together.
        self.chunk = chunk if compat == "correct" or protocol == "forced" else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, list[Batch]]:
        index = self.indices[i]
        return index, [self._batch(part) for part in chunks(self.dataset[index], self.chunk)]

    def any(self) -> Batch:
        """One question of the first picture that has one, whosever it is."""
        parts = (part for i in range(len(self.dataset)) for part in chunks(self.dataset[i], 1))
        return self._batch(next(parts))

    def _batch(self, part: Sample) -> Batch:
        return self.collate([part], self.processor, training=False, padding=self.padding, conv_type=self.conv_type)


class _InStep:
    """Under ZeRO-3 a forward needs all processes, but their shares differ: who is done goes along until all are."""

    def __init__(self, split: bool) -> None:
        self.split = split
        """The weights are split among the processes."""

    def begin(self) -> None:
        """Before a forward of one's own."""
        if self.split:
            any_rank(True)

    def finish(self, forward: Callable[[], Any]) -> None:
        """After the last of one's own: `forward`, whose result is thrown away, as often as others still need it."""
        while self.split and any_rank(False):
            forward()


def chunks(sample: Sample, size: int | None) -> Iterator[Sample]:
    """A sample in parts of at most `size` questions; None keeps it whole."""
    count = len(sample.conversations)
    size = size or max(count, 1)
    for a in range(0, count, size):
        part = slice(a, a + size)
        yield dataclasses.replace(
            sample,
            conversations=sample.conversations[part],
            masks=sample.masks[part],
            exists=sample.exists[part],
            questions=sample.questions[part],
            meta={name: _part(value, part, count) for name, value in sample.meta.items()},
        )


def _part(value: Any, part: slice, count: int) -> Any:
    """The part of a meta value that has one entry a question; anything else as it is."""
    return value[part] if isinstance(value, list | tuple) and len(value) == count else value


# ------------------------------------------------------------------------------------------------ what is kept


def _subsets(sample: Sample, n: int, place: int) -> list[str]:
    """Names of the groups that question n of a (part of a) sample belongs to."""
    names = ["present" if sample.exists[n] else "false premise"]
    sentence = sample.meta.get("is_sentence")
    if isinstance(sentence, list | tuple):
        sentence = sentence[n] if n < len(sentence) else None
    if sentence is not None:
        names.append("long" if sentence else "short")
    return names


def _record(sample: Sample, n: int, prediction: Prediction, pixels: Overlap) -> dict[str, Any]:
    """The JSON line of one expression."""
    from pycocotools import mask as coco

    rle = coco.encode(prediction.mask.numpy().astype("uint8", order="F"))
    record = {
        "image": sample.image_path,
        "question": sample.questions[n],
        "prompt": sample.conversations[n][-1][0],
        "answer": prediction.answer,
        "exists": bool(sample.exists[n]),
        "predicted_exists": prediction.exists,
        "num_seg": prediction.num_seg,
        "iou": pixels.iou,
        "intersection": pixels.intersection,
        "union": pixels.union,
        "mask": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "points": [[round(x, 2), round(y, 2)] for x, y in prediction.points],
        "point_labels": prediction.point_labels,
    }
    for name, key in (("ref_ids", "ref_id"), ("sent_ids", "sent_id")):
        values = sample.meta.get(name)
        if isinstance(values, list | tuple) and n < len(values):
            record[key] = values[n]
    return record


class _PredictionFile(contextlib.AbstractContextManager):
    """Writes records as they come, a file a process; at the end the first process joins them in the data set's order."""

    def __init__(self, path: str | Path | None, rank: int, world: int) -> None:
        self.path = Path(path) if path is not None else None
        self.rank, self.world, self.lines = rank, world, None

    def _share(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def __enter__(self) -> _PredictionFile:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = self._share(self.rank).open("w")
        return self

    def write(self, image: int, question: int, record: Callable[[], dict[str, Any]]) -> None:
        """Writes a record, made only if there is a file, under its place in the data set."""
        if self.lines is not None:
            self.lines.write(json.dumps({"image_index": image, "question_index": question, **record()}) + "\n")

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self.lines is None:
            return
        self.lines.close()
        if failed is not None:
            return
        barrier()
        if self.rank == 0:
            shares = [self._share(rank) for rank in range(self.world) if self._share(rank).is_file()]
            lines = [line for share in shares for line in share.read_text().splitlines()]
            places = [(record["image_index"], record["question_index"]) for record in map(json.loads, lines)]
            ordered = [line for _, line in sorted(zip(places, lines, strict=True))]
            self.path.write_text("".join(line + "\n" for line in ordered))
            for share in shares:
                share.unlink()
