"""The evaluation loop, one for validation while training and for `test_read.py` (protocol §5).

    scores = evaluate(model, processor, dataset, protocol="forced")

In: a model, its processor and a sequence of Samples (`dataset.build_eval`), one picture with all its expressions each.
Out: a dict of scores (`utils.metrics`) with the protocol they belong to, and, if asked for, one JSON line an expression
(`utils.predictions`).

    forced    the prompt contains the answer with its [SEG]; nothing is generated (ReasonSeg, RefCOCO)
    generate  the model answers on its own; no [SEG] in the answer is a zero mask (FP-RefCOCO)

The two are not comparable. In both the first [SEG] of an answer counts; presence is judged only where it could be denied,
that is in `generate`: predicted present = [SEG] written and its mask not empty.

A picture goes once through CLIP, SAM's encoder and, with what its prompts begin with, the language model; its expressions
are then answered together over that shared cache. The next pictures are read meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools import mask as coco
from tqdm import tqdm

from utils.cli import check_answer_length
from utils.distributed import any_rank, gather_objects, shard
from utils.metrics import IGNORE_PIXEL, Expression, count, summarize
from utils.prediction_log import PredictionLog
from utils.predictions import encode_mask, expression
from utils.say import say_score
from utils.stopping import quiet_worker

if TYPE_CHECKING:
    from dataset.types import Batch, Sample
    from model import READForCausalLM, READProcessor, Segments

PROTOCOLS = ("forced", "generate")
COMPAT = ("correct", "released")
HOPELESS = 20
"""After as many failed pictures in a row, the fault is not in the pictures."""

log = logging.getLogger(__name__)


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
    confidence: float | None
    """SAM's own estimate of the mask's IoU; None without a [SEG]."""

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
    settings: dict[str, Any] | None = None,
    items: Sequence[str] | None = None,
    overwrite: bool = False,
    strict: bool = True,
    chunk: int = 16,
    workers: int = 0,
    progress: bool = True,
    collate: Callable[..., Batch] | None = None,
) -> dict[str, Any]:
    """Scores of a model on a data set; with several processes each takes a share and all get the whole result.

    Args:
        protocol: `forced` or `generate`; the samples' conversations must end with an answer, or without one.
        compat: `correct` gives every expression the result it would have alone. `released` repeats the original's
            generation: rows one at a time, each with the padding that its longest neighbour in the picture caused, which it
            attends to and counts positions from (§1, §8-25). Without padding on the left, so in `forced`, they agree.
        conv_type: wording of the system prompt; unless given, the one saved with the model.
        rank, world: this process and their number; shares are exact, no picture is counted twice.
        max_new_tokens: longest answer.
        predictions_path: JSON lines, one an expression, in the order of the data set whatever `world` is. What an earlier run
            left there, stopped or finished, is taken over, and the numbers are those of a run that nobody stopped.
        settings: what else decides the predictions (the checkpoint, the data set, SasP, ...): a run goes on under the same only.
        items: what is asked of which image, a name for each item (`utils.content.item_names`): an item that was measured and
            has another name now is not taken over, but refused.
        overwrite: what an earlier run left is thrown away.
        strict: a picture that cannot be read or answered stops the evaluation. Else it is tried once more, with fewer
            expressions at a time, and then named in the result.
        chunk: expressions that go through the model together.
        workers: processes that read pictures ahead; 0 reads them in this one.
        collate: makes a Batch of Samples; unless given, `dataset.collate`'s.

    Returns:
        The scores of `utils.metrics.summarize`, `seconds`, `protocol`, `compat`, `conv_type`, and `failed`: a list of
        {"image_index", "error"} of the pictures that are not in the scores.

    Raises:
        ValueError: wrong arguments, predictions of other settings, or no picture at all went well.
    """
    if protocol not in PROTOCOLS or compat not in COMPAT:
        raise ValueError(
            f"protocol must be one of {', '.join(PROTOCOLS)} and compat one of {', '.join(COMPAT)}, "
            f"found {protocol!r} and {compat!r}"
        )
    if collate is None:
        from dataset.collate import collate  # here, not above: of `utils`, this function alone looks at `dataset`
    conv_type = conv_type or model.config.conv_type
    room = model.config.llava.text_config.max_position_embeddings
    if protocol == "generate":
        check_answer_length(max_new_tokens, room, model.config.num_patches)
        room -= max_new_tokens
    begin, was_training = time.monotonic(), model.training
    model.eval()
    kept = None
    if predictions_path is not None:
        settings = {"protocol": protocol, "compat": compat, "conv_type": conv_type, **(settings or {})}
        kept = PredictionLog(predictions_path, settings, rank, overwrite, items)
    done = kept.done if kept else frozenset()
    if done and max(done) >= len(dataset):
        kept.abandon()
        raise ValueError(
            f"{predictions_path} holds image {max(done)}, and the data set has {len(dataset)}: choose another file, or throw it "
            "away with --overwrite"
        )
    open_ones = [index for index in range(len(dataset)) if index not in done]
    mine = [open_ones[i] for i in shard(len(open_ones), rank, world)]
    read = _Reader(dataset, mine, processor, protocol, conv_type, room, collate)
    # A generator of its own: validation must not move the random numbers of the training around it.
    loader = torch.utils.data.DataLoader(
        read,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator().manual_seed(0),
    )
    answer = _Answerer(model, processor, protocol, compat, max_new_tokens, chunk, strict)
    rows = [expression(record) for records in (kept.taken_over.values() if kept else ()) for record in records]
    failed: list[dict[str, Any]] = []
    in_a_row = 0
    # Not a terminal (a log file): one line now and then instead of a hundred.
    every = 0.5 if sys.stderr.isatty() else 15
    told = tqdm(loader, desc=protocol, unit="image", disable=not progress or rank > 0, mininterval=every)
    try:
        with model.recorded():
            for index, loaded in told:
                begun = time.monotonic()
                found = loaded if isinstance(loaded, str) else answer(index, loaded)
                if isinstance(found, str):
                    if strict:
                        raise ValueError(f"picture {index}: {found}")
                    log.warning("picture %d failed and is left out: %s", index, found)
                    failed.append({"image_index": index, "error": found})
                    in_a_row += 1
                    if in_a_row >= HOPELESS:
                        raise ValueError(f"{HOPELESS} pictures in a row failed, the last with: {found}")
                    continue
                in_a_row = 0
                seconds = (time.monotonic() - begun) / max(len(found), 1)
                sample = loaded.samples[0]
                counted = [_count(sample, index, n, prediction, protocol) for n, prediction in enumerate(found)]
                rows += counted
                if kept:
                    pairs = enumerate(zip(counted, found, strict=True))
                    kept.add(index, [_record(sample, n, row, prediction, seconds) for n, (row, prediction) in pairs])
            answer.finish(read.any)
    except BaseException:
        if kept:
            kept.abandon()
        raise
    finally:
        model.train(was_training)
    shares = gather_objects((rows, failed))
    rows = [row for share, _ in shares for row in share]
    failed = sorted((entry for _, share in shares for entry in share), key=lambda entry: entry["image_index"])
    if kept:
        kept.close(failed, images_asked=len(dataset))
    if failed and not rows:
        raise ValueError(f"all {len(failed)} pictures failed, the first with: {failed[0]['error']}")
    return {
        **summarize(rows, generated=protocol == "generate"),
        "failed": failed,
        "images_taken_over": len(done),
        "seconds": round(time.monotonic() - begin, 2),
        "protocol": protocol,
        "compat": compat,
        "conv_type": conv_type,
    }


# ------------------------------------------------------------------------------------------------ one picture


def predict(
    model: READForCausalLM,
    processor: READProcessor,
    batch: Batch,
    protocol: str,
    compat: str,
    max_new_tokens: int,
    chunk: int | None = None,
    share_prefix: bool = True,
) -> list[Prediction]:
    """Answers and masks of the N questions of a batch, at most `chunk` at a time, its pictures encoded once."""
    # The true masks are counted where they are; nothing needs them beside the model.
    inputs = dataclasses.replace(batch, masks=[]).to(model.device, model.dtype).model_inputs()
    asked = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "image_of_question")}
    images = model.encode_images(**inputs)
    given = [turns[-1][1] or "" for sample in batch.samples for turns in sample.conversations]
    alone = compat == "released" and protocol == "generate"
    chunk = 1 if alone else chunk or max(len(given), 1)
    found = []
    for first in range(0, len(given), chunk):
        part = {name: tensor[first : first + chunk] for name, tensor in asked.items()}
        if protocol == "forced":
            segments = model.segment_answers(images, **part, share_prefix=share_prefix)
            answers = given[first : first + chunk]
        else:
            out = model.generate_answers(
                images, **part, max_new_tokens=max_new_tokens, compat=compat, share_prefix=share_prefix
            )
            segments, answers = out.segments, [processor.decode(ids) for ids in out.answer_ids]
        sizes = [batch.original_sizes[int(image)] for image in part["image_of_question"]]
        found += _predictions(segments, answers, sizes)
    return found


def _predictions(segments: Segments, answers: list[str], sizes: list[tuple[int, int]]) -> list[Prediction]:
    """One Prediction an answer about a picture of that size (H, W)."""
    found = []
    for n, (answer, size) in enumerate(zip(answers, sizes, strict=True)):
        entries = segments.of_question(n)
        if entries:
            first = entries[0]
            mask = (segments.mask_logits[first] > 0).cpu()
            points, labels = segments.points[first].tolist(), segments.point_labels[first].tolist()
            confidence = float(segments.scores[first])
        else:
            mask, points, labels, confidence = torch.zeros(tuple(size), dtype=torch.bool), [], [], None
        found.append(Prediction(answer, len(entries), mask, points, labels, confidence))
    return found


class _Answerer:
    """A picture's batch -> the predictions of its expressions, or, unless strict, in words what went wrong twice."""

    def __init__(
        self,
        model: READForCausalLM,
        processor: READProcessor,
        protocol: str,
        compat: str,
        max_new_tokens: int,
        chunk: int,
        strict: bool,
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.protocol, self.compat, self.chunk, self.strict = protocol, compat, chunk, strict
        self.in_step = _InStep(split=any(hasattr(p, "ds_id") for p in model.parameters()))

    def __call__(self, index: int, batch: Batch) -> list[Prediction] | str:
        try:
            return self._predict(batch, self.chunk)
        except Exception as error:
            # Where processes must keep step, none may try again alone; a device in error answers nothing any more.
            if self.strict or self.in_step.split or "CUDA error" in str(error):
                raise
            log.warning("picture %d is tried once more: %s", index, _words(error))
        # Not inside `except`: there the error would still hold the memory it died of.
        self.model.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return self._predict(batch, max(min(self.chunk, len(batch.input_ids)) // 4, 1))
        except Exception as error:
            return _words(error)

    def _predict(self, batch: Batch, chunk: int) -> list[Prediction]:
        if not self.in_step.split:
            return predict(self.model, self.processor, batch, self.protocol, self.compat, self.max_new_tokens, chunk)
        found = []
        for part in _parts(batch, chunk):
            self.in_step.begin()
            found += self._alone(part)
        return found

    def _alone(self, batch: Batch) -> list[Prediction]:
        """One forward of each part of the model, whatever the batch, so that processes that split the weights keep step."""
        return predict(
            self.model, self.processor, batch, self.protocol, self.compat, self.max_new_tokens, share_prefix=False
        )

    def finish(self, any_batch: Callable[[], Batch]) -> None:
        """After the last picture of this process."""
        self.in_step.finish(lambda: self._alone(next(_parts(any_batch(), 1))))


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """A picture's batch in batches of at most `size` of its questions."""
    turns = [turns for sample in batch.samples for turns in sample.conversations]
    for first in range(0, len(turns), size):
        rows = slice(first, first + size)
        yield dataclasses.replace(
            batch,
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            image_of_question=batch.image_of_question[rows],
            masks=batch.masks[rows],
            exists=batch.exists[rows],
            samples=[dataclasses.replace(batch.samples[0], conversations=turns[rows])],
        )


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


# ------------------------------------------------------------------------------------------------ reading


class _Reader(torch.utils.data.Dataset):
    """(index in the data set, a batch of all its questions, or in words why there is none) of one process's pictures."""

    def __init__(
        self,
        dataset: Sequence[Sample],
        indices: Sequence[int],
        processor: READProcessor,
        protocol: str,
        conv_type: str,
        max_positions: int,
        collate: Callable[..., Batch],
    ) -> None:
        self.dataset, self.indices, self.processor, self.collate = dataset, indices, processor, collate
        self.conv_type, self.max_positions = conv_type, max_positions
        self.padding = "right" if protocol == "forced" else "left"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, Batch | str]:
        index = self.indices[i]
        try:
            try:
                return index, self._batch(self.dataset[index])
            except OSError:  # a file system may fail once
                return index, self._batch(self.dataset[index])
        except Exception as error:  # in words: from another process it would come without its own
            return index, _words(error)

    def any(self) -> Batch:
        """The first picture that has a question, whosever it is."""
        return next(self._batch(sample) for i in range(len(self.dataset)) if (sample := self.dataset[i]).conversations)

    def _batch(self, sample: Sample) -> Batch:
        return self.collate(
            [sample],
            self.processor,
            training=False,
            padding=self.padding,
            conv_type=self.conv_type,
            max_positions=self.max_positions,
        )


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:500]}"


# ------------------------------------------------------------------------------------------------ what is kept


def _count(sample: Sample, index: int, n: int, prediction: Prediction, protocol: str) -> Expression:
    """The pixels and verdicts of one expression."""
    reference = _reference(sample, n) if protocol == "generate" else None
    return count(
        prediction.mask,
        torch.as_tensor(sample.masks[n]),
        index,
        bool(sample.exists[n]),
        prediction.exists,
        sentence=_of_question(sample, "is_sentence", n),
        words=len(sample.questions[n].split()),
        say=None if reference is None else say_score(prediction.answer, reference, asked=sample.questions[n]),
    )


def _record(sample: Sample, n: int, row: Expression, prediction: Prediction, seconds: float) -> dict[str, Any]:
    """The JSON line of one expression, see `utils.predictions`."""
    target = np.asarray(sample.masks[n])
    mask = encode_mask(prediction.mask.numpy())
    record = {
        "image_index": row.image,
        "question_index": n,
        "image": sample.image_path,
        "question": sample.questions[n],
        "prompt": sample.conversations[n][-1][0],
        "answer": prediction.answer,
        "exists": bool(row.exists),
        "predicted_exists": prediction.exists,
        "num_seg": prediction.num_seg,
        "iou": row.iou,
        "intersection": row.intersection,
        "union": row.union,
        "mask": mask,
        "target": encode_mask(target == 1),
        "box": coco.toBbox(mask).tolist() if prediction.mask.any() else None,
        "confidence": prediction.confidence if math.isfinite(prediction.confidence or 0) else None,  # JSON knows no NaN
        "points": [[round(x, 2), round(y, 2)] for x, y in prediction.points],
        "point_labels": prediction.point_labels,
        "seconds": round(seconds, 4),
    }
    if (target == IGNORE_PIXEL).any():
        record["ignored"] = encode_mask(target == IGNORE_PIXEL)
    said = {
        "is_sentence": _of_question(sample, "is_sentence", n),
        "reference": _reference(sample, n),
        "say": None if math.isnan(row.say) else round(row.say, 6),
        "ref_id": _of_question(sample, "ref_ids", n),
        "sent_id": _of_question(sample, "sent_ids", n),
    }
    return record | {name: value for name, value in said.items() if value is not None}


def _reference(sample: Sample, n: int) -> str | None:
    """What the answer to a false premise should say instead."""
    return None if sample.exists[n] else _of_question(sample, "references", n)


def _of_question(sample: Sample, name: str, n: int) -> Any:
    """Question n's entry of a list in a sample's meta; None where the data set has none."""
    values = sample.meta.get(name)
    return values[n] if isinstance(values, list | tuple) and n < len(values) else None
