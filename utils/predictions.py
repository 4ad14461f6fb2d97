"""One line of JSON an expression: everything an evaluation found, enough to recompute every score (protocol §5).

    image_index, question_index   place of the picture in the data set, of the question among the picture's
    image                         path of the picture
    question, prompt, answer      the bare expression; the sentence that was asked; what the model said (or was made to say)
    exists, predicted_exists      what is asked for is there; the model wrote a [SEG] and its mask is not empty
    num_seg                       [SEG] tokens in the answer; the first one's mask counts
    iou, intersection, union      pixels, without the ignored ones
    mask, target, ignored         COCO RLE {"size": [H, W], "counts": str}: predicted, true, pixels that do not count (if any)
    box                           [x, y, width, height] of the predicted mask as COCO writes it; null if it is empty
    confidence                    SAM's own estimate of the mask's IoU; null without a mask
    points, point_labels          SasP's K points (x, y), pixels of the picture; 1 object, 0 background, -1 neutral
    seconds                       time of the picture's pass through the model, divided by its expressions
    is_sentence                   long question or short phrase, where the data set says so (ReasonSeg)
    reference                     what an answer to a false premise should say instead, where the data set says so
    say                           the answer's score against it (`utils.say`)
    ref_id, sent_id               of the refer family

The RLE loads in pycocotools as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco


def encode_mask(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a mask (H, W), anything but 0 being inside; `counts` is a str, so that JSON takes it."""
    rle = coco.encode(np.asfortranarray(mask_HW != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of a COCO RLE: 1 inside, 0 outside."""
    return coco.decode(rle)


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The records of a predictions file, in its order.

    Raises:
        FileNotFoundError: there is none. ValueError: a line is no record; the message names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `test_read.py --out FOLDER` writes predictions_*.jsonl")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        missing = [name for name in REQUIRED if name not in record] if isinstance(record, dict) else list(REQUIRED)
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}: not written by test_read.py, or by an older one")
        records.append(record)
    return records


REQUIRED = ("image_index", "question_index", "image", "question", "answer", "exists", "predicted_exists", "mask", "target")
"""Fields without which a line is no record."""
