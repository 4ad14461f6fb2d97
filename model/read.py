"""READForCausalLM: LLaVA-1.5 reasons, SasP points, SAM draws.

    forward()            teacher-forced: training losses, and masks
    encode_images()      what depends on pictures alone, for any number of questions about them
    segment_answers()    teacher-forced evaluation: masks of given answers
    generate_answers()   the model writes its own answers, with the KV cache, and masks for them
    _segment()           what all share: [SEG] states -> similarity -> points -> masks

Legend: B pictures · N questions · T tokens (image tokens expanded) · P image tokens · D hidden width · C = 256 SAM width
· M [SEG] tokens · K points · (H, W) pixels of the original picture · S side of SAM's square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from . import checkpoint, llava, losses, sam, sasp
from .config import READConfig
from .decoding import Decoder
from .packing import CACHE, Prefix, attention_with_masks, pack, shared_beginning, takes_masks
from .recording import Recorder
from .sam_cache import SamFeatureCache, obstacle


@dataclasses.dataclass
class Segments:
    """What the model segmented: one entry a `[SEG]`, M in all, ordered by question, then by place in the answer."""

    question: torch.Tensor
    """(M,) int64, row of the batch."""
    image: torch.Tensor
    """(M,) int64, picture of that row."""
    similarity: torch.Tensor
    """(M, P) similarity of the [SEG] state with the image tokens, dtype of the model."""
    points: list[torch.Tensor]
    """M tensors (K, 2) float32, (x, y) in pixels of the original picture; (0, 2) with SasP off."""
    point_labels: list[torch.Tensor]
    """M tensors (K,) int64: 1, 0 or -1."""
    mask_logits: list[torch.Tensor]
    """M tensors (H, W) float32, pixels of the original picture; mask = logits > 0."""
    scores: torch.Tensor
    """(M,) SAM's own estimate of the mask's IoU."""

    def __len__(self) -> int:
        return len(self.mask_logits)

    def split(self, count: int) -> tuple[Segments, Segments]:
        """The first `count` entries, and the rest."""
        return tuple(
            Segments(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))
            for part in (slice(count), slice(count, None))
        )

    def of_question(self, row: int) -> list[int]:
        """Indices of the entries of one question, in the order of its [SEG] tokens."""
        return (self.question == row).nonzero().flatten().tolist()


@dataclasses.dataclass
class READOutput(ModelOutput):
    """Result of `READForCausalLM.forward`; the losses are float32 scalars, None where no labels were given."""

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    bce_loss: torch.Tensor | None = None
    dice_loss: torch.Tensor | None = None
    sim_loss: torch.Tensor | None = None
    segments: Segments | None = None


@dataclasses.dataclass
class EncodedImages:
    """What the model knows of B pictures before it is asked: made by `READForCausalLM.encode_images`, for any questions."""

    features: torch.Tensor
    """(B, P, D) projected CLIP features."""
    sam_images: torch.Tensor
    """(B, 3, S, S), SAM's squares."""
    sam_sizes: list[tuple[int, int]]
    """B pairs (h, w): the picture inside the square."""
    original_sizes: list[tuple[int, int]]
    """B pairs (H, W)."""
    sam_embeddings: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """SAM's (C, h, w) of the pictures in which something was segmented so far."""
    prefix: Prefix | None = None
    """The beginning that questions about them share, once there were several."""
    asked: bool = False
    """There was a question already."""

    def __len__(self) -> int:
        return len(self.features)


@dataclasses.dataclass
class READGeneration:
    """Result of `READForCausalLM.generate_answers`."""

    answer_ids: list[list[int]]
    """N answers, up to and including the end token where there is one."""
    segments: Segments
    """Of the [SEG] tokens in the answers (a question may have none, one or many)."""
    forced: list[bool]
    """N: the answer held no [SEG] and one was asked for all the same."""
    step_logits: list[torch.Tensor] | None = None
    """One (N, vocabulary) tensor a generated token, if asked for."""


class READForCausalLM(PreTrainedModel):
    """LLaVA-1.5 and SAM joined by the projected `[SEG]` state and by SasP's points."""

    config_class = READConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    even_calls = False
    """Set where processes split the weights among them: every training forward then calls each part equally often."""
    share_prefix = True
    """In training, what conversations about a picture begin with goes through the language model once, where it can."""

    def __init__(self, config: READConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.llava = llava.build_llava(config.llava, attn_implementation, config.projector)
        self.sam = sam.build_sam(config.sam)
        self.text_hidden_fcs = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.sam.out_dim), nn.Dropout(0.0))]
        )
        self.sam_cache: SamFeatureCache | None = None
        self.decoder = Decoder()
        self.recorder = Recorder()

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> READForCausalLM:
        """A model in evaluation mode from a folder or hub id, of ours or in the released layout of READ, SESAME, LISA, LLaVA.

        See `model.checkpoint.load` for the keyword arguments and the errors.
        """
        return checkpoint.load(cls, path, **kwargs)

    def save_pretrained(self, folder: str | Path, layout: str = "read", **kwargs: Any) -> None:
        """Writes weights and config; `layout` is `read` (complete) or `released` (the original's). See `model.checkpoint`."""
        checkpoint.save(self, folder, layout=layout, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.llava.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llava.get_output_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Recomputes the language model's activations in the backward pass."""
        name = "activation_checkpointing_enable"  # what later releases of transformers 5 call it
        enable = getattr(self.llava, name if hasattr(self.llava, name) else "gradient_checkpointing_enable")
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def cache_sam_features(self, folder: str | Path) -> None:
        """Takes SAM's image features from `folder` from now on, and puts them there. See `model.sam_cache`.

        Raises:
            ValueError: SAM's image encoder is not frozen, or split among processes.
        """
        if reason := obstacle(self.sam.image_encoder):
            raise ValueError(f"SAM features cannot be cached: {reason}")
        self.sam_cache = SamFeatureCache(folder)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """On a GPU, for the length of a block: work whose shapes come back is recorded and replayed (`model.recording`)."""
        with self.decoder.recorded(), self.recorder.recorded():
            yield

    def forget(self) -> None:
        """Gives back the memory of what was recorded; the next call begins anew."""
        self.decoder.forget()
        self.recorder.forget()

    # -------------------------------------------------------------------------------------------- teacher-forced

    def forward(
        self,
        clip_images: torch.Tensor,
        sam_images: torch.Tensor,
        sam_sizes: list[tuple[int, int]],
        original_sizes: list[tuple[int, int]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
        labels: torch.Tensor | None = None,
        masks: list[torch.Tensor] | None = None,
        compat: str = "correct",
    ) -> READOutput:
        """Masks of every `[SEG]` in given conversations, and the loss if `labels` (N, T) and `masks` are given.

        With labels, conversations about one picture share their beginning (`share_prefix`, see `model.packing`): loss and
        gradients are those of each conversation on its own, but for rounding. One thing differs: dropout in LoRA is drawn once
        for the shared beginning, not anew for each conversation; either way its mean is the same. Without labels every
        conversation goes through the language model on its own; `segment_answers` gives the same masks at less cost.

        Args:
            clip_images: (B, 3, s, s), CLIP's normalised centre crop.
            sam_images: (B, 3, S, S), SAM's normalised, resized and zero-padded square.
            sam_sizes: B pairs (h, w), the part of the square that is picture.
            original_sizes: B pairs (H, W), pixels of the original picture.
            input_ids: (N, T) int64, the image expanded into P slots.
            attention_mask: (N, T) bool. image_of_question: (N,) int64 in [0, B).
            labels: (N, T) int64, -100 where unsupervised.
            masks: M tensors (H, W), one a `[SEG]` in the order of the tokens; 1 object, 0 rest, 255 ignored.
            compat: `released` reproduces the original's treatment of left-padded rows (see `_released_mask`).

        Raises:
            ValueError: as many masks as `[SEG]` tokens are needed; every `[SEG]` needs a picture.
        """
        images = self.encode_images(clip_images, sam_images, sam_sizes, original_sizes)
        hidden = None
        if labels is not None and compat == "correct":
            hidden = self._shared_hidden_states(images, input_ids, attention_mask, image_of_question)
        if hidden is None:
            hidden = self._hidden_states(images, input_ids, attention_mask, image_of_question, compat)
        question, position = llava.seg_positions(input_ids, self.config.seg_token_id)
        count = len(question)
        if labels is not None:
            extra = self._stand_ins(question, image_of_question)
            question = torch.cat([question, extra])
            position = torch.cat([position, torch.full_like(extra, hidden.shape[1] - 1)])
        image_states = llava.image_states(hidden, input_ids, question, released_rows=compat == "released")
        segments, stand_ins = self._segment(
            images, hidden[question, position], image_states, question, image_of_question[question]
        ).split(count)
        output = READOutput(segments=segments)
        if labels is None:
            return output
        weights = self.config.loss
        output.ce_loss = losses.answer_loss(hidden, labels, self.llava.lm_head)
        found = losses.mask_losses(segments.mask_logits, masks)
        output.bce_loss, output.dice_loss = (loss.to(hidden.device) for loss in found)  # without masks they come from nowhere
        output.loss = weights.ce * output.ce_loss + weights.bce * output.bce_loss + weights.dice * output.dice_loss
        if weights.sim:
            output.sim_loss = losses.similarity_loss(
                segments.similarity, masks, self.config.hidden_size, self.config.clip_image_size
            )
            output.loss = output.loss + weights.sim * output.sim_loss
        for logits in stand_ins.mask_logits:
            output.loss = output.loss + 0 * logits.sum()
        return output

    def _stand_ins(self, question: torch.Tensor, image_of_question: torch.Tensor) -> torch.Tensor:
        """Questions (n,) in whose last state a mask is drawn that counts nothing, so that processes stay in step.

        Without any [SEG] in a batch the mask branch would get no gradient, and ZeRO's processes, which reduce gradients in
        the order in which they arrive, would wait for each other: then the first question stands in. Where weights are
        split (ZeRO-3, `even_calls`), all must call SAM equally often: then every picture without a [SEG] has a stand-in, and
        SAM's decoder is called once for each.
        """
        if self.even_calls:
            shown = set(image_of_question[question].tolist())
            first = {image: row for row, image in reversed(list(enumerate(image_of_question.tolist())))}
            rows = [row for image, row in sorted(first.items()) if image not in shown]
        else:
            rows = [0] if len(question) == 0 else []
        return torch.tensor(rows, dtype=torch.long, device=question.device)

    def _hidden_states(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
        compat: str = "correct",
    ) -> torch.Tensor:
        """Last hidden states (N, T, D) of whole conversations, each passed through the language model on its own."""
        embeddings = llava.embed_inputs(self.llava, input_ids, images.features, image_of_question)
        places = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if compat == "released":
            attention_mask = self._released_mask(attention_mask)
            places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.llava.model.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=places, use_cache=False
        ).last_hidden_state

    def _shared_hidden_states(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
    ) -> torch.Tensor | None:
        """What `_hidden_states` gives, with a graph, from one row a picture; None where that is impossible or saves nothing."""
        language_model = self.llava.model.language_model
        if not (self.share_prefix and takes_masks(language_model.config._attn_implementation)):
            return None
        packed = pack(input_ids, attention_mask, image_of_question)
        if packed is None:
            return None
        embeddings = llava.embed_inputs(self.llava, packed.ids, images.features, packed.image)
        hidden = language_model(
            inputs_embeds=embeddings, attention_mask=packed.bias(embeddings.dtype), position_ids=packed.places,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        return packed.unpack(hidden)

    # -------------------------------------------------------------------------------------------- evaluation

    def encode_images(
        self,
        clip_images: torch.Tensor,
        sam_images: torch.Tensor,
        sam_sizes: list[tuple[int, int]],
        original_sizes: list[tuple[int, int]],
    ) -> EncodedImages:
        """What depends on B pictures alone, arguments as in `forward`. SAM looks at a picture when a mask is first asked for."""
        model = self.llava.model
        features = self.recorder(
            "CLIP", nn.ModuleList([model.vision_tower, model.multi_modal_projector]),
            lambda views: llava.image_features(self.llava, views), clip_images.to(self.dtype),
        )  # fmt: skip
        return EncodedImages(features, sam_images, sam_sizes, original_sizes)

    @torch.no_grad()
    def segment_answers(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
        *,
        share_prefix: bool = True,
    ) -> Segments:
        """Masks of every `[SEG]` in N given conversations about encoded pictures: `forward` without losses, at less cost.

        Args:
            input_ids, attention_mask: (N, T), padded on either side. image_of_question: (N,) int64 in [0, B).
            share_prefix: what the prompts begin with goes through the language model once a picture. Off, each conversation
                goes through it whole; the results differ by rounding.
        """
        read = self._read_together(images, input_ids, attention_mask, image_of_question) if share_prefix else None
        hidden = read[0] if read else self._hidden_states(images, input_ids, attention_mask, image_of_question)
        question, position = llava.seg_positions(input_ids, self.config.seg_token_id)
        image_states = llava.image_states(hidden, input_ids, question)
        return self._segment(images, hidden[question, position], image_states, question, image_of_question[question])

    def _read_together(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
    ) -> tuple[torch.Tensor, Cache, torch.Tensor] | None:
        """(states, cache, where) of N conversations from one row a picture, whose beginning is kept in `images` for the next.

        states (N, T, D) are the last hidden ones, as if each had gone through the language model alone; the cache has r rows
        of t tokens; where (N, T) says at which of the r * t places each token stands. None where there is nothing to share:
        a first question about each picture, or none of it, or prompts that begin differently.
        """
        first, images.asked = not images.asked, True
        if first and len(input_ids) <= len(images):
            return None
        beginning = shared_beginning(input_ids, attention_mask)
        if beginning is None:
            return None
        prefix = images.prefix
        if prefix is not None and not torch.equal(prefix.ids, beginning):
            prefix = None
        language_model = self.llava.model.language_model
        packed = pack(input_ids, attention_mask, image_of_question, must_save=False)
        known = 0 if prefix is None else len(beginning)
        with attention_with_masks(language_model):
            out = language_model(
                inputs_embeds=llava.embed_inputs(self.llava, packed.ids[:, known:], images.features, packed.image),
                attention_mask=packed.bias(self.dtype)[:, :, known:],
                position_ids=packed.places[:, known:],
                use_cache=True,
                **{CACHE: DynamicCache() if prefix is None else prefix.cache(packed.image)},
            )
        states, cache = out.last_hidden_state, out[CACHE]
        if prefix is not None:
            states = torch.cat([prefix.hidden[packed.image], states], dim=1)
        elif len(packed.image) == len(images):  # each picture was asked about
            images.prefix = Prefix.of_rows(beginning, states, cache, packed.image.argsort())
        return packed.unpack(states), cache, packed.where

    def _read_apart(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
    ) -> tuple[torch.Tensor, Cache, torch.Tensor]:
        """As `_read_together`, each conversation in a row of its own."""
        out = self.llava.model.language_model(
            inputs_embeds=llava.embed_inputs(self.llava, input_ids, images.features, image_of_question),
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
        )
        where = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
        return out.last_hidden_state, out[CACHE], where

    def generate_segments(
        self,
        clip_images: torch.Tensor,
        sam_images: torch.Tensor,
        sam_sizes: list[tuple[int, int]],
        original_sizes: list[tuple[int, int]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
        **options: Any,
    ) -> READGeneration:
        """`encode_images` and `generate_answers` in one call, arguments as in `forward`."""
        with torch.no_grad():
            images = self.encode_images(clip_images, sam_images, sam_sizes, original_sizes)
        return self.generate_answers(images, input_ids, attention_mask, image_of_question, **options)

    @torch.no_grad()
    def generate_answers(
        self,
        images: EncodedImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of_question: torch.Tensor,
        *,
        max_new_tokens: int = 512,
        compat: str = "correct",
        share_prefix: bool = True,
        force_segment: bool = False,
        output_logits: bool = False,
        streamer: Any = None,
    ) -> READGeneration:
        """Greedy answers to N left-padded prompts, and a mask for every `[SEG]` the model wrote (§5, generative).

        The states of `[SEG]` are gathered while decoding with the cache.

        Args:
            images: `encode_images` of the B pictures asked about.
            input_ids, attention_mask: (N, T), padding on the left. image_of_question: (N,) int64 in [0, B).
            compat: `correct` gives the same as a prompt without padding; `released` reproduces the original, which counts
                positions from the padding on and attends to it. Its FP-RefCOCO numbers contain that.
            share_prefix: as in `segment_answers`; with `released`, whose padding stands before the picture, nothing is shared.
            force_segment: an answer without `[SEG]` gets the mask that a `[SEG]` at its end would have had.
            output_logits: keeps the logits of every step.
            streamer: of transformers, told each token.
        """
        eos = self.llava.config.text_config.eos_token_id
        read = None
        if compat == "released":
            attention_mask = torch.ones_like(attention_mask)
        elif share_prefix:
            read = self._read_together(images, input_ids, attention_mask, image_of_question)
        states, cache, where = read or self._read_apart(images, input_ids, attention_mask, image_of_question)
        decoded = self.decoder(
            self.llava, states[:, -1], cache, where, attention_mask,
            max_new_tokens=max_new_tokens, output_logits=output_logits, streamer=streamer,
        )  # fmt: skip
        answers, hidden = decoded.ids, torch.cat([states, decoded.hidden], dim=1)
        ended = (answers == eos).long().cumsum(dim=1)
        written = ended - (answers == eos).long() == 0  # up to and including the first end token
        question, position, forced = self._answer_segs(input_ids, answers, written, ended[:, -1] > 0, force_segment)
        image_states = llava.image_states(states, input_ids, question, released_rows=compat == "released")
        position = position.clamp(max=hidden.shape[1] - 1)  # of an answer cut at its last token
        segments = self._segment(
            images, hidden[question, position], image_states, question, image_of_question[question]
        )
        return READGeneration(
            answer_ids=[row[keep].tolist() for row, keep in zip(answers, written, strict=True)],
            segments=segments,
            forced=forced,
            step_logits=decoded.logits,
        )

    def _answer_segs(
        self,
        input_ids: torch.Tensor,
        answers: torch.Tensor,
        written: torch.Tensor,
        ended: torch.Tensor,
        force_segment: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """(question (M,), position (M,), forced (N,)) of the states that stand for [SEG] in N generated answers.

        Args:
            input_ids: (N, T) prompts, padding on the left. answers: (N, a) what was generated.
            written: (N, a) bool, the answer's own tokens. ended: (N,) bool, it has an end token.
        """
        prompt = input_ids.shape[1]
        ids = torch.cat([input_ids, answers.masked_fill(~written, 0)], dim=1)
        question, position = llava.seg_positions(ids, self.config.seg_token_id)
        of_answer = position >= prompt - 1
        question, position = question[of_answer], position[of_answer]
        if not force_segment:
            return question, position, [False] * len(ids)
        bare = [n for n in range(len(ids)) if not (question == n).any()]
        # The state before the end token, that is the one a [SEG] in its place would have been predicted from.
        ends = [prompt + int(written[n].sum()) - 2 + int(not ended[n]) for n in bare]
        question = torch.cat([question, question.new_tensor(bare)])
        position = torch.cat([position, position.new_tensor(ends)])
        order = question.argsort(stable=True)
        return question[order], position[order], [n in bare for n in range(len(ids))]

    def _released_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The attention mask of the original's forced pass, (N, T): the unexpanded prompt's behind P - 1 ones (§1, §8-25).

        With padding on the left it attends to the padding and hides as many image tokens; without, it is the same mask.
        (In generation the recordings show no mask at all, see `generate_answers`.)
        """
        patches = self.config.num_patches
        padding = attention_mask.long().argmax(dim=1)  # rows are False * n, then True
        padding = padding * (~attention_mask[:, 0]).long()
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        hidden = (place >= patches - 1) & (place < patches - 1 + padding[:, None])
        right = ~attention_mask & (place >= padding[:, None])
        return ~(hidden | right)

    # -------------------------------------------------------------------------------------------- shared

    def _segment(
        self,
        images: EncodedImages,
        seg_states: torch.Tensor,
        image_states: torch.Tensor,
        question: torch.Tensor,
        image: torch.Tensor,
    ) -> Segments:
        """Points and masks of M `[SEG]` states (M, D), given those of their image tokens (M, P, D), question and image (M,)."""
        similarity = sasp.similarity(image_states, seg_states)
        text = self.text_hidden_fcs[0](seg_states)[:, None]
        return self._draw(images, similarity, text, question, image)

    def _draw(
        self,
        images: EncodedImages,
        similarity: torch.Tensor,
        text: torch.Tensor,
        question: torch.Tensor,
        image: torch.Tensor,
    ) -> Segments:
        """Points and masks of M `[SEG]`: similarity (M, P), projected states (M, 1, C), question and image (M,)."""
        count, config, pictures = len(image), self.config, image.tolist()
        points: list[torch.Tensor] = [similarity.new_zeros(0, 2, dtype=torch.float32)] * count
        labels: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long, device=text.device)] * count
        places, mask_logits = list(points), list(points)
        scores = similarity.new_zeros(count)
        together: dict[int, list[int]] = {}
        for b in sorted(set(pictures)):
            rows = [m for m in range(count) if pictures[m] == b]
            if b not in images.sam_embeddings:
                images.sam_embeddings[b] = self.encode_sam_image(images.sam_images[b : b + 1])[0]
            if config.sasp.enabled:
                size = tuple(images.original_sizes[b])
                found = sasp.select_points(
                    _of_rows(similarity, rows), size, config.sasp, clip_image_size=config.clip_image_size
                )
                in_sam = sam.to_sam_frame(found.points, tuple(images.sam_sizes[b]), size)
                for i, m in enumerate(rows):
                    points[m], labels[m], places[m] = found.points[i], found.labels[i], in_sam[i]
            # A picture whose grid has fewer cells than `num_points` has fewer points.
            together.setdefault(b if self.even_calls else len(points[rows[0]]), []).extend(rows)

        # All masks with as many points together, as a rule those of the whole batch; only sizes are each picture's own.
        decoder = nn.ModuleList([self.sam.prompt_encoder, self.sam.mask_decoder])
        for rows in map(sorted, together.values()):
            shown = sorted({pictures[m] for m in rows})
            embedding = images.sam_embeddings[shown[0]]
            if len(shown) > 1:
                embedding = torch.stack([images.sam_embeddings[pictures[m]] for m in rows])
            prompts = [torch.stack([x[m] for m in rows]) if config.sasp.enabled else None for x in (places, labels)]
            low_res, estimates = self.recorder(
                "masks", decoder, lambda *prompt: sam.decode_masks(self.sam, *prompt),
                embedding, *prompts, _of_rows(text, rows),
            )  # fmt: skip
            scores[rows] = estimates.to(scores.dtype)
            for b in shown:
                own = [i for i, m in enumerate(rows) if pictures[m] == b]
                sizes = tuple(images.sam_sizes[b]), tuple(images.original_sizes[b])
                logits = sam.upscale_logits(_of_rows(low_res, own), config.sam.image_size, *sizes)
                for i, place in enumerate(own):
                    mask_logits[rows[place]] = logits[i]
        return Segments(question, image, similarity, points, labels, mask_logits, scores)

    def encode_sam_image(self, sam_images: torch.Tensor) -> torch.Tensor:
        """SAM image embeddings (B, C, h, w) of (B, 3, S, S); without a graph, since the encoder never trains (§3)."""
        encoder = self.sam.image_encoder
        sam_images = sam_images.to(encoder.pos_embed.dtype)
        if self.sam_cache is not None:
            return self.sam_cache.encode(encoder, sam_images)
        with torch.no_grad():
            return self.recorder("SAM", encoder, encoder, sam_images)


def _of_rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, in ascending order, of a tensor; all of them as they are, for which a GPU need not be told which."""
    return x if len(rows) == len(x) else x[rows]
