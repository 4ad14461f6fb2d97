"""Makes the base weights of READ-mini: a small CLIP-type tower, LLaMA and SAM that know the mini world.

Real READ starts from a pretrained LLaVA and SAM; so does READ-mini, and this script is where its base comes from. Scenes are
drawn without end from the training photographs, so no sample is seen twice and the written data sets are never touched.

    python scripts/pretrain_mini.py tokenizer --out runs/base        # SentencePiece vocabulary and an untrained model
    python scripts/pretrain_mini.py sam       --out runs/base        # SAM alone: points and boxes -> masks
    python scripts/pretrain_mini.py clip      --out runs/base        # CLIP-type tower alone: each patch names what it shows
    python scripts/pretrain_mini.py sight     --out runs/base        # tower + LLaMA: words, places, similarity map
    python scripts/pretrain_mini.py seg       --out runs/base        # joined through [SEG]; SAM's encoder stays frozen
    python scripts/pretrain_mini.py export    --out runs/base        # fp16 folder assets/read-mini-base

`sam` shares no weights with `clip` and `sight` and may run beside them; `sight` goes on from `clip`, `seg` from all. A stage
that is run again goes on from itself, with --start from a whole model. Needs torch 2.9 or newer (Muon). On several cores,
`torchrun --nproc_per_node 2 -- scripts/pretrain_mini.py ...` with one thread each beats two threads: gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig  # noqa: E402

from dataset import templates  # noqa: E402
from dataset.mini import phrases, world  # noqa: E402
from model import (  # noqa: E402
    LossConfig,
    READConfig,
    READForCausalLM,
    READProcessor,
    SamConfig,
    get_preset,
    losses,  # noqa: E402
)
from model import llava as llava_adapter  # noqa: E402
from model.sam import upscale_logits  # noqa: E402
from utils import distributed  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, with_image  # noqa: E402
from utils.files import whole_number  # noqa: E402
from utils.tokenizer import add_read_tokens, load_tokenizer  # noqa: E402

CLIP_SIZE, PATCH, SAM_SIZE = 168, 14, 256
NAMED_REASONS = (
    "You would take the {name}, it is [SEG].",
    "The {name} fits that, it is [SEG].",
    "That would be the {name}: [SEG].",
    "For this there is the {name}, [SEG].",
)


# ------------------------------------------------------------------------------------------------ dialogues


@dataclass(frozen=True)
class Talk:
    """What the conversations are made of."""

    turns: int = 5
    """Questions a scene."""
    places: float = 0.25
    """Share of the turns that ask for an extreme or, as often, for a relation, where the scene has one."""
    brief: float = 0.35
    """Share of the turns in the short sentences of evaluation; the rest are worded as training's."""
    absent: float = 0.15
    """Share of the turns that ask for what is not there."""
    hardness: float = 1.0
    """Share of relations, extremes and sizes that is let in: places are learnt after kinds and colours."""


def dialogue(scene: world.Scene, rng: np.random.Generator, talk: Talk) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """A conversation about one scene and the mask of each of its [SEG] tokens, in order."""
    pools: dict[str, list[tuple[str, str, np.ndarray | None]]] = {"plain": [], "extreme": [], "relation": []}
    for found in world.expressions(scene, rng):
        if found.kind not in ("name", "colour+name") and rng.random() > talk.hardness:
            continue
        pool = pools[found.kind if found.kind in pools else "plain"]
        pool.append((*_referring(found.text, rng, talk.brief), scene.things[found.target].mask))
    pools["reason"] = [(*_reasoning(found, rng), _union(scene, found.targets)) for found in world.reasoning(scene, rng)]
    pools["absent"] = [(*_absent(found, rng), None) for found in world.false_premises(scene, rng)]
    pools["absent"] += [
        (_long(query, sentence, rng), answer, None) for query, sentence, answer in world.false_reasoning(scene, rng)
    ]
    shares = {"extreme": talk.places / 2, "relation": talk.places / 2, "reason": 0.2, "absent": talk.absent, "caption": 0.05}
    shares["plain"] = max(1 - sum(shares.values()), 0)
    odds = np.array(list(shares.values())) / sum(shares.values())
    chosen: list[tuple[str, str, np.ndarray | None]] = []
    for _ in range(talk.turns):
        kind = list(shares)[rng.choice(len(odds), p=odds)]
        if kind == "caption":
            chosen.append((_pick(phrases.CAPTION_QUESTIONS, rng), world.caption(scene, rng), None))
        elif pool := pools[kind] or pools["plain"]:
            chosen.append(pool.pop(rng.integers(len(pool))))
    return [(question, answer) for question, answer, _ in chosen], [mask for *_, mask in chosen if mask is not None]


def _pick(options, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def _referring(text: str, rng: np.random.Generator, brief: float) -> tuple[str, str]:
    question = templates.EVAL_SHORT_QUESTION if rng.random() < brief else _pick(templates.SHORT_QUESTION, rng)
    answer = templates.EVAL_ANSWER if rng.random() < brief else _pick(templates.SHORT_ANSWER, rng)
    return question.format(class_name=text), answer.format(class_name=text)


def _long(text: str, is_sentence: bool, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        template = templates.EVAL_LONG_QUESTION if is_sentence else templates.EVAL_SHORT_QUESTION
    else:
        template = _pick(templates.LONG_QUESTION if is_sentence else templates.SHORT_QUESTION, rng)
    return template.format(sent=text, class_name=text)


def _reasoning(found: world.Reasoning, rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.35:
        answer = templates.EVAL_ANSWER
    elif kind < 0.65:
        answer = _pick(NAMED_REASONS, rng).format(name=found.answer_name)
    else:
        answer = _pick(templates.LONG_ANSWER, rng)
    return _long(found.text, found.is_sentence, rng), answer


def _absent(found: world.FalsePremise, rng: np.random.Generator) -> tuple[str, str]:
    question = templates.EVAL_SHORT_QUESTION if rng.random() < 0.35 else _pick(templates.SHORT_QUESTION, rng)
    answer = _pick(templates.CORRECT_ANSWER, rng)
    return question.format(class_name=found.text), answer.format(class_name=found.text, gt_name=found.correction)


def _union(scene: world.Scene, targets: list[int]) -> np.ndarray:
    return np.logical_or.reduce([scene.things[t].mask for t in targets])


def make_batch(
    processor: READProcessor, rng: np.random.Generator, size: int, talk: Talk
) -> tuple[dict, list[world.Scene]]:
    """Keyword arguments of `READForCausalLM.forward` for `size` fresh scenes of one multi-turn dialogue each."""
    views, rows, masks, scenes = [], [], [], []
    while len(rows) < size:
        scene = world.make_scene(rng, "train")
        turns, found = dialogue(scene, rng, talk)
        if not turns:
            continue
        rows.append(processor.encode([(with_image(turns[0][0]), turns[0][1]), *turns[1:]]))
        views.append(processor.views(scene.image))
        scenes.append(scene)
        masks += [torch.from_numpy(mask.astype(np.uint8)) for mask in found]
    return collate_rows(views, rows, masks), scenes


def collate_rows(views: list, rows: list[tuple[list[int], list[int]]], masks: list[torch.Tensor]) -> dict:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(target)
    mask = torch.arange(length) < torch.tensor([len(row) for row, _ in rows])[:, None]
    return {
        "clip_images": torch.stack([v.clip for v in views]),
        "sam_images": torch.stack([v.sam for v in views]),
        "sam_sizes": [v.sam_size for v in views],
        "original_sizes": [v.original_size for v in views],
        "input_ids": ids,
        "attention_mask": mask,
        "image_of_question": torch.arange(len(rows)),
        "labels": labels,
        "masks": masks,
    }


# ------------------------------------------------------------------------------------------------ model


def build_tokenizer(folder: Path, seed: int) -> None:
    """Trains the SentencePiece vocabulary on what the mini world and the templates say."""
    import sentencepiece

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    with corpus.open("w", encoding="utf-8") as file:
        for _ in range(3000):
            scene = world.make_scene(rng, "train")
            for question, answer in dialogue(scene, rng, Talk(turns=8))[0]:
                file.write(f"{question}\n{answer.replace('[SEG]', ' ')}\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=2000, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()


def build_model(folder: Path) -> tuple[READForCausalLM, READProcessor]:
    """READ-mini with random weights, and its processor."""
    from transformers import CLIPImageProcessorPil

    tokenizer = load_tokenizer(folder)
    seg, im_start, im_end = add_read_tokens(tokenizer)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=640, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=160, intermediate_size=512, num_hidden_layers=5, num_attention_heads=5, image_size=CLIP_SIZE,
        patch_size=PATCH, projection_dim=160,
    )  # fmt: skip
    preset = get_preset("mini")
    config = READConfig(
        llava=LlavaConfig(vision_config=clip, text_config=text, image_token_index=IMAGE_TOKEN_INDEX),
        sam=SamConfig(
            image_size=SAM_SIZE, patch_size=16, embed_dim=144, depth=4, num_heads=4, global_attn_indexes=(1, 3),
            window_size=8,
        ),
        sasp=preset.sasp, loss=LossConfig(sim=1.0), seg_token_id=seg, im_start_id=im_start, im_end_id=im_end,
        conv_type=preset.conv_type,
    )  # fmt: skip
    clip_processor = CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}
    )
    processor = READProcessor(tokenizer, clip_processor, SAM_SIZE, config.num_patches, conv_type=preset.conv_type)
    return READForCausalLM(config), processor


def load_parts(model: READForCausalLM, folder: Path, start: Path | None = None) -> None:
    """Weights of the stages that have run, over the random ones or over those of a whole model."""
    if start is not None:
        model.load_state_dict(READForCausalLM.from_pretrained(start).state_dict())
    for part in STAGE_PREFIXES:
        file = folder / f"{part}.pt"
        if file.is_file():
            model.load_state_dict(torch.load(file, weights_only=True), strict=False)
            print(f"loaded {file}")


STAGE_PREFIXES = {
    "sam": ("sam.image_encoder.", "sam.mask_decoder.", "sam.prompt_encoder."),
    "clip": ("llava.model.vision_tower.",),
    "sight": ("llava.",),
    "seg": ("llava.", "sam.mask_decoder.", "text_hidden_fcs."),
}


# ------------------------------------------------------------------------------------------------ stages


def sam_step(model: READForCausalLM, rng: np.random.Generator, processor: READProcessor, size: int) -> dict:
    """SAM's own task: a few points, or a box, to the mask of the thing they lie on; its IoU head learns too."""
    total = {"bce": 0.0, "dice": 0.0, "iou": 0.0, "score": 0.0}
    count = 0
    sam = model.sam
    views, scenes = [], []
    for _ in range(size):
        scenes.append(world.make_scene(rng, "train"))
        views.append(processor.views(scenes[-1].image))
    embeddings = sam.image_encoder(torch.stack([v.sam for v in views]))
    for scene, view, embedding in zip(scenes, views, embeddings, strict=True):
        masks = torch.from_numpy(np.stack([thing.mask for thing in scene.things]))
        scale = torch.tensor([view.sam_size[1] / view.original_size[1], view.sam_size[0] / view.original_size[0]])
        if rng.random() < 0.75:
            count_in, count_out = int(rng.integers(1, 8)), int(rng.integers(0, 6))
            places, labels = [], []
            for mask in masks.numpy():
                inside, outside = np.argwhere(mask), np.argwhere(~mask)
                xy = np.concatenate([inside[rng.integers(len(inside), size=count_in)],
                                     outside[rng.integers(len(outside), size=count_out)]])[:, ::-1]  # fmt: skip
                places.append(torch.from_numpy(xy.astype(np.float32)))
                labels.append(torch.tensor([1] * count_in + [0] * count_out))
            prompt = {"points": (torch.stack(places) * scale, torch.stack(labels)), "boxes": None}
        else:
            boxes = []
            for mask in masks.numpy():
                ys, xs = np.nonzero(mask)
                box = np.array([xs.min(), ys.min(), xs.max(), ys.max()], np.float32)
                boxes.append(torch.from_numpy(box + rng.normal(0, 3, 4).astype(np.float32)))
            prompt = {"points": None, "boxes": torch.stack(boxes) * scale.repeat(2)}
        sparse, dense = sam.prompt_encoder(masks=None, **prompt)
        low_res, predicted = sam.mask_decoder(
            image_embeddings=embedding[None], image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False,
        )  # fmt: skip
        logits = upscale_logits(low_res[:, 0], SAM_SIZE, view.sam_size, view.original_size)
        for logit, mask, guess in zip(logits, masks, predicted[:, 0], strict=True):
            hit = logit.detach() > 0
            iou = (hit & mask).sum() / (hit | mask).sum().clamp(min=1)
            total["bce"] = total["bce"] + losses.bce_loss(logit, mask.byte())
            total["dice"] = total["dice"] + losses.dice_loss(logit, mask.byte())
            total["score"] = total["score"] + (guess - iou) ** 2
            total["iou"] = total["iou"] + iou.item()
            count += 1
    total = {key: value / count for key, value in total.items()}
    total["loss"] = 5 * total["bce"] + total["dice"] + 0.5 * total["score"]
    return total


def clip_step(
    model: READForCausalLM, rng: np.random.Generator, processor: READProcessor, size: int, heads: torch.nn.ModuleDict
) -> dict:
    """The tower's own task: each patch tells kind, colour and size of what it shows, and whether it shows a thing."""
    scenes = [world.make_scene(rng, "train") for _ in range(size)]
    images = torch.stack(
        [torch.from_numpy(processor.clip_processor(scene.image, return_tensors="np")["pixel_values"][0]) for scene in scenes]
    )
    layer = model.config.llava.vision_feature_layer
    states = model.llava.model.vision_tower(images, output_hidden_states=True).hidden_states[layer][:, 1:]
    grid = math.isqrt(processor.num_patches)
    values = {"name": list(world.NAMES), "colour": list(world.COLOURS), "size": list(world.EXTENT)}
    target = {key: torch.full(states.shape[:2], IGNORE_INDEX) for key in values}
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            share = losses.mask_on_token_grid(torch.from_numpy(thing.mask.astype(np.uint8)), grid, CLIP_SIZE)
            for key, known in values.items():
                target[key][b, share > 0.5] = known.index(getattr(thing, key))
    thing_here = target["name"] != IGNORE_INDEX
    out: dict = {}
    for key in values:
        logits = heads[key](states[thing_here]).float()
        out[key] = torch.nn.functional.cross_entropy(logits, target[key][thing_here])
        out[f"{key}_acc"] = (logits.argmax(-1) == target[key][thing_here]).float().mean()
    seen = heads["thing"](states)[..., 0].float()
    out["thing"] = torch.nn.functional.binary_cross_entropy_with_logits(seen, thing_here.float())
    out["loss"] = 2 * out["name"] + out["colour"] + 0.5 * out["size"] + out["thing"]
    return out


def dense_words(scenes: list[world.Scene], processor: READProcessor) -> torch.Tensor:
    """(B, P, 5) ids of the words for kind, colour, size and place of what each image token shows; -100 on the ground."""
    grid = math.isqrt(processor.num_patches)
    words = torch.full((len(scenes), processor.num_patches, 5), IGNORE_INDEX)
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            share = losses.mask_on_token_grid(torch.from_numpy(thing.mask.astype(np.uint8)), grid, CLIP_SIZE)
            place = world.place(scene, thing)
            said = [processor.tokenizer.encode(word)[1] for word in (thing.name, thing.colour, thing.size, *place)]
            words[b, share > 0.5] = torch.tensor(said)
    return words


def dense_loss(hidden: torch.Tensor, batch: dict, words: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
    """Each image token's state names kind, colour, size and place of what it shows: sight, before anything is asked."""
    states = hidden[batch["input_ids"] == IMAGE_TOKEN_INDEX].view(len(words), -1, hidden.shape[-1])
    known = words[..., 0] != IGNORE_INDEX
    log_probs = lm_head(states[known]).float().log_softmax(-1)
    return -log_probs.gather(1, words[known]).mean()


def sight_step(model: READForCausalLM, batch: dict, words: torch.Tensor) -> dict:
    """Language and sight without SAM: the answer's tokens, the words of each image token, the similarity map of [SEG]."""
    features = llava_adapter.image_features(model.llava, batch["clip_images"])
    embeddings = llava_adapter.embed_inputs(model.llava, batch["input_ids"], features, batch["image_of_question"])
    hidden = model.llava.model.language_model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    question, position = llava_adapter.seg_positions(batch["input_ids"], model.config.seg_token_id)
    states = llava_adapter.image_states(hidden, batch["input_ids"], question)
    similarity = (states * hidden[question, position][:, None]).sum(-1)
    ce = losses.answer_loss(hidden, batch["labels"], model.llava.lm_head)
    sim = losses.similarity_loss(similarity, batch["masks"], model.config.hidden_size, CLIP_SIZE)
    dense = dense_loss(hidden, batch, words, model.llava.lm_head)
    return {"loss": ce + 2 * sim + 0.5 * dense, "ce": ce, "sim": sim, "dense": dense, **map_scores(similarity, batch["masks"])}


def map_scores(similarity: torch.Tensor, masks: list[torch.Tensor]) -> dict:
    """IoU of the thresholded similarity map on the token grid, and how often its peak lies on the object."""
    grid = math.isqrt(similarity.shape[1])
    target = torch.stack([losses.mask_on_token_grid(mask, grid, CLIP_SIZE) for mask in masks])
    on, want = similarity.detach() > 0, target > 0.5
    iou = (on & want).sum().item() / max((on | want).sum().item(), 1)
    peak = target.gather(1, similarity.detach().argmax(1, keepdim=True)) > 0.3
    return {"map_iou": iou, "peak": peak.float().mean().item()}


def seg_step(model: READForCausalLM, batch: dict, rng: np.random.Generator) -> dict:
    """The whole model. SasP is on in half of the steps, so that the base favours neither path."""
    on = model.config.sasp
    if rng.random() < 0.5:
        model.config.sasp = type(on)(enabled=False)
    try:
        out = model(**batch)
    finally:
        model.config.sasp = on
    inter = union = 0
    for logit, mask in zip(out.segments.mask_logits, batch["masks"], strict=True):
        inter += ((logit > 0) & (mask == 1)).sum().item()
        union += ((logit > 0) | (mask == 1)).sum().item()
    return {"loss": out.loss, "ce": out.ce_loss, "bce": out.bce_loss, "dice": out.dice_loss, "sim": out.sim_loss,
            "ciou": inter / max(union, 1), **map_scores(out.segments.similarity, batch["masks"])}  # fmt: skip


def build_optimizers(trained: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside transformer layers, AdamW for the rest (embeddings, heads, norms, convolutions)."""
    inner = re.compile(r"(layers|blocks|final_attn_token_to_image)\.")
    matrices = [p for name, p in trained.items() if p.ndim == 2 and inner.search(name) and "rel_pos" not in name]
    inside = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train(args: argparse.Namespace) -> None:
    """One stage, for `--minutes` of wall clock; the learning rate follows the clock, so a busy machine ends it well too."""
    peers = distributed.start(engine=False)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([args.seed, list(STAGE_PREFIXES).index(args.stage), peers.rank])
    model, processor = build_model(args.start or args.out)
    load_parts(model, args.out, args.start)
    model.train()
    prefixes = STAGE_PREFIXES[args.stage]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    width = model.config.llava.vision_config.hidden_size
    heads = torch.nn.ModuleDict(
        {key: torch.nn.Linear(width, n) for key, n in (("name", 8), ("colour", 8), ("size", 2), ("thing", 1))}
    )  # of the clip stage, thrown away after it
    trained = [p for p in [*model.parameters(), *heads.parameters()] if p.requires_grad]
    optimizers = build_optimizers({n: p for n, p in [*model.named_parameters(), *heads.named_parameters()] if p.requires_grad})
    log = (args.out / f"{args.stage}.jsonl").open("a", encoding="utf-8")
    start, step, sums, last_save = time.time(), 0, {}, time.time()
    while (progress := distributed.from_main((time.time() - start) / (60 * args.minutes), peers.device)) < 1:
        rate = args.lr * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * progress)) * 0.98 + 0.02)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            if args.stage == "sam":
                out = sam_step(model, rng, processor, args.batch_size)
            elif args.stage == "clip":
                out = clip_step(model, rng, processor, args.batch_size, heads)
            else:
                hardness = min(1.0, progress / args.ramp) if args.ramp else 1.0
                talk = Talk(args.turns, args.places, args.brief, args.absent, hardness)
                batch, scenes = make_batch(processor, rng, args.batch_size, talk)
                if args.stage == "sight":
                    out = sight_step(model, batch, dense_words(scenes, processor))
                else:
                    out = seg_step(model, batch, rng)
        model.zero_grad()
        heads.zero_grad()
        out["loss"].backward()
        average_gradients(trained, peers.size)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for key, value in out.items():
            sums.setdefault(key, []).append(float(value.detach() if isinstance(value, torch.Tensor) else value))
        if peers.is_main and step % 20 == 0:
            row = {"step": step, "minutes": round((time.time() - start) / 60, 2), "lr": round(rate, 6)}
            row |= {key: round(float(np.mean(values)), 4) for key, values in sums.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            sums = {}
        if peers.is_main and time.time() - last_save > 120:
            save_stage(model, args.out, args.stage)
            last_save = time.time()
    if peers.is_main:
        save_stage(model, args.out, args.stage)
    distributed.stop()


def average_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """The mean over the processes; a parameter that one of them did not use counts as zero there."""
    if processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    flat = distributed.sum_over_ranks(flat) / processes
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def save_stage(model: READForCausalLM, folder: Path, stage: str) -> None:
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if k.startswith(STAGE_PREFIXES[stage])}
    torch.save(state, folder / f"{stage}.tmp")
    (folder / f"{stage}.tmp").replace(folder / f"{stage}.pt")


def export(args: argparse.Namespace) -> None:
    """The base as a folder of fp16 safetensors, loadable on its own, and how it was learnt, in curve.jsonl.

    Raises:
        ValueError: the folder to write holds something else.
    """
    if args.to.is_dir() and any(args.to.iterdir()) and not (args.to / "curve.jsonl").is_file():
        raise ValueError(f"--to {args.to} holds something that no export wrote (it has no curve.jsonl): choose another folder")
    model, processor = build_model(args.start or args.out)
    load_parts(model, args.out, args.start)
    if args.average is not None:
        other = READForCausalLM.from_pretrained(args.average).state_dict()
        model.load_state_dict({name: (tensor + other[name]) / 2 for name, tensor in model.state_dict().items()})
    model.config.loss = get_preset("mini").loss
    model.half().save_pretrained(args.to, processor=processor)
    with (args.to / "curve.jsonl").open("w", encoding="utf-8") as curve:
        for stage in STAGE_PREFIXES:
            file = args.out / f"{stage}.jsonl"
            for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
                curve.write(json.dumps({"stage": stage} | json.loads(line)) + "\n")
    print(f"wrote {args.to}: {sum(f.stat().st_size for f in Path(args.to).iterdir()) / 1e6:.1f} MB")


@plain_errors("pretrain_mini.py")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tokenizer", *STAGE_PREFIXES, "export"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/base", help="folder of the stages' weights and logs")
    parser.add_argument("--to", type=Path, default=ROOT / "assets/read-mini-base", help="folder that `export` writes")
    parser.add_argument("--start", type=Path, help="goes on from this whole model, e.g. assets/read-mini-base")
    parser.add_argument("--average", type=Path, help="export: the mean with the weights of this whole model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=8, help="scenes a step")
    parser.add_argument("--turns", type=int, default=5, help="questions a scene")
    parser.add_argument("--places", type=float, default=0.25, help="share of turns about relations and extremes")
    parser.add_argument("--absent", type=float, default=0.15, help="share of turns about what is not there")
    parser.add_argument("--brief", type=float, default=0.35, help="share of turns in the short sentences of evaluation")
    parser.add_argument("--ramp", type=float, default=0.0, help="share of the time in which relations and sizes are let in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast; half as fast on CPUs without AMX"
    )
    args = parser.parse_args(argv)
    for name in ("batch_size", "turns", "threads"):
        whole_number(getattr(args, name), f"--{name}")
    if not (args.minutes > 0 and args.lr > 0 and args.seed >= 0):
        raise ValueError(f"--minutes {args.minutes:g} --lr {args.lr:g} must be positive and --seed {args.seed} 0 or more")
    torch.set_num_threads(args.threads)
    if args.stage == "tokenizer":
        build_tokenizer(args.out, args.seed)
    elif args.stage == "export":
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
