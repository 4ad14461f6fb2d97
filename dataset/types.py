"""What a data set yields and what the model takes: `Sample`, `Batch`.

Legend: B pictures · N questions in the batch · T tokens · M masks · (H, W) pixels of the original picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch


@dataclass
class Sample:
    """One picture with its questions."""

    image_path: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    conversations: list[list[tuple[str, str | None]]]
    """One a question: its turns (question, answer), the picture not yet in front; an answer of None is left to the model."""
    masks: np.ndarray
    """(M, H, W) uint8: 1 object, 0 rest, 255 ignored. Training: one a [SEG], in order. Evaluation: one a conversation."""
    exists: list[bool]
    """One a conversation: what it asks for is in the picture."""
    questions: list[str]
    """One a conversation: the bare expression or sentence."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Data set, split, ids; lists in it have one entry a conversation. In evaluation `references` holds what an answer to a
    false premise should say instead, None for a true one."""


@dataclass
class Batch:
    """Tensors of B samples with N questions in all."""

    clip_images: torch.Tensor
    """(B, 3, s, s) float, CLIP's normalised centre crop."""
    sam_images: torch.Tensor
    """(B, 3, S, S) float, SAM's normalised padded square."""
    sam_sizes: list[tuple[int, int]]
    """B pairs (h, w): the picture inside the square."""
    original_sizes: list[tuple[int, int]]
    """B pairs (H, W)."""
    input_ids: torch.Tensor
    """(N, T) int64, each image expanded into its slots; padding 0."""
    attention_mask: torch.Tensor
    """(N, T) bool."""
    image_of_question: torch.Tensor
    """(N,) int64 in [0, B)."""
    labels: torch.Tensor | None
    """(N, T) int64, -100 where unsupervised; None in evaluation."""
    masks: list[torch.Tensor]
    """(H, W) uint8 each. Training: one a [SEG], by question, then place. Evaluation: one a question."""
    exists: list[bool]
    """One a question."""
    samples: list[Sample]

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of `READForCausalLM.forward`."""
        names = ["clip_images", "sam_images", "sam_sizes", "original_sizes", "input_ids", "attention_mask", "image_of_question"]
        if self.labels is not None:
            names += ["labels", "masks"]
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on `device`; `dtype` is that of the two image tensors."""
        return replace(
            self,
            clip_images=self.clip_images.to(device, dtype),
            sam_images=self.sam_images.to(device, dtype),
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            image_of_question=self.image_of_question.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            masks=[mask.to(device) for mask in self.masks],
        )
