"""list[Sample] -> Batch: the only place that tokenises, cuts and pads (protocol §1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from utils.conversation import IGNORE_INDEX, SEG_TOKEN, text_faults, with_image

from .types import Batch, Sample

if TYPE_CHECKING:
    from model import READProcessor

def collate(
    samples: Sequence[Sample],
    processor: READProcessor,
    *,
    training: bool,
    padding: str = "right",
    model_max_length: int | None = None,
    max_positions: int | None = None,
    conv_type: str | None = None,
) -> Batch:
    """A batch of samples; without any question (a picture whose things cover no pixel) it has no rows.

    Args:
        training: makes labels; masks then belong to [SEG] tokens, else to questions.
        padding: side of the padding: `right` for forced passes, `left` for generation.
        model_max_length: longest conversation in training, counted after the image is expanded. What is longer is cut, and
            the masks of [SEG] tokens that fell off with it (the original kept them and stopped, §8-23).
        max_positions: longest prompt in evaluation, counted likewise: what the language model holds, less room for the answer
            where it is generated. A longer one would be answered from positions that the model never learnt.
        conv_type: wording of the system prompt; the processor's own by default.

    Raises:
        ValueError: masks and [SEG] tokens (or questions) do not match, a question or an answer is empty or holds a token of
            the model or a mark of the conversation format (an answer may hold [SEG]), or a prompt is longer than
            `max_positions`; the message names picture and question. The readers look for all this when they open a set.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding must be 'right' or 'left', found {padding!r}")
    rows: list[tuple[list[int], list[int]]] = []
    masks: list[torch.Tensor] = []
    image_of_question: list[int] = []
    for b, sample in enumerate(samples):
        found = iter(torch.from_numpy(sample.masks))
        wanted = 0
        for number, turns in enumerate(sample.conversations, start=1):
            ids, labels = _encode(turns, processor, conv_type, f"{sample.image_path}, question {number}")
            if max_positions is not None and len(ids) > max_positions:
                raise ValueError(
                    f"{sample.image_path}, question {number}: its prompt has {len(ids)} tokens, {processor.num_patches} of them "
                    f"the picture, and at most {max_positions} fit into the language model (where it answers itself, beside "
                    "the --max_new_tokens of an answer): shorten the question"
                )
            segs = ids.count(processor.seg_token_id)
            if training and model_max_length is not None:
                ids, labels = ids[:model_max_length], labels[:model_max_length]
            kept = ids.count(processor.seg_token_id)
            wanted += segs if training else 1
            mine = [next(found, None) for _ in range(segs if training else 1)]
            masks += [mask for mask in mine[: kept if training else 1] if mask is not None]
            rows.append((ids, labels))
            image_of_question.append(b)
        if wanted != len(sample.masks):
            what = "[SEG] tokens" if training else "questions"
            raise ValueError(f"{sample.image_path}: {len(sample.masks)} masks for {wanted} {what}")
    views = [processor.views(sample.image) for sample in samples]
    input_ids, attention_mask, labels = _pad(rows, processor.pad_token_id, padding)
    return Batch(
        clip_images=torch.stack([view.clip for view in views]),
        sam_images=torch.stack([view.sam for view in views]),
        sam_sizes=[view.sam_size for view in views],
        original_sizes=[view.original_size for view in views],
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_of_question=torch.tensor(image_of_question, dtype=torch.long),
        labels=labels if training else None,
        masks=masks,
        exists=[exists for sample in samples for exists in sample.exists],
        samples=list(samples),
    )


def _encode(
    turns: list[tuple[str, str | None]], processor: READProcessor, conv_type: str | None, where: str
) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a conversation, the picture put in front; ValueError says where it cannot be."""
    for asked, reply in turns:
        faults = text_faults(asked)
        if reply is not None:
            faults += [f"its answer {fault}" for fault in text_faults(reply, allowed=(SEG_TOKEN,))]
        if faults:
            raise ValueError(f"{where}: {'; '.join(faults)}")
    first, *rest = turns
    try:
        return processor.encode([(with_image(first[0]), first[1]), *rest], conv_type)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _pad(
    rows: list[tuple[list[int], list[int]]], pad_token_id: int, padding: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, attention mask, labels), each (N, T)."""
    length = max((len(ids) for ids, _ in rows), default=0)
    input_ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (ids, targets) in enumerate(rows):
        place = slice(0, len(ids)) if padding == "right" else slice(length - len(ids), length)
        input_ids[i, place] = torch.tensor(ids)
        labels[i, place] = torch.tensor(targets)
        attention_mask[i, place] = True
    return input_ids, attention_mask, labels
