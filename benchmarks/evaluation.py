"""What an evaluation costs: all expressions of a picture together, against the original's schedule, stage by stage.

    python benchmarks/evaluation.py                                 READ-mini on this machine, 10 expressions a picture
    python benchmarks/evaluation.py --size 7b                       a full-size READ with random weights; wants a GPU
    python benchmarks/evaluation.py --size 7b --precision bf16 --protocols forced --together_only --images 1 --warmup 0
                                                                    what it takes of a machine without one
    python benchmarks/evaluation.py --size 7b --original_expressions 1      a baseline of minutes
    python benchmarks/evaluation.py --size 13b --plan               GiB of weights in every precision, FLOPs and bytes that the
                                                                    floors are made of; measures nothing

Both schedules are run by one model on the same pictures and questions, in turns of who is first. In fp32 they must agree, or
the benchmark fails; in bf16 rounding tips words, with random weights in most answers, and the table says in how many.

    together  what `utils.evaluate` does: CLIP and SAM's encoder once a picture, its expressions (--chunk at a time) in one row
              behind the beginning that they share, answers written with a KV cache, masks in one batch
    original  `generate`: each expression alone; SAM's encoder for each; every token of an answer takes CLIP, the whole
              sequence and the vocabulary head over all of it once more, since no KV cache is kept (recorded from the
              original: for 6 answers of 7 tokens, 42 calls of CLIP and 6 of SAM's encoder)
              `forced`: the expressions of a picture in one batch of whole conversations, CLIP for each, SAM's encoder once

Seconds are means a picture, after warm-up. A GPU is waited for before and after each stage. Reading pictures is left out, which
goes on in other processes meanwhile, and so is counting and writing what was found, alike in both. With random weights (--size)
answers are as long as --max_new_tokens, and a [SEG] is forced at their end. What happens inside a stage counts to it: a decode
step counts to the language model with all that it does, its vocabulary head included, since it may be replayed as one CUDA
graph; "vocabulary head" is what is outside of decode steps, and in the original's schedule all of it (for generated answers, take
the two stages together to compare).

The floor is what our schedule takes at least for the answers it gave: FLOPs and bytes counted from the model's sizes
(benchmarks/floors.py), over the speed of a large product and of a large copy, measured in the same run. "of floor" is how many
times longer `together` takes. SasP and the rest have none.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model import READForCausalLM, Segments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import floors  # noqa: E402
from benchmarks.loading import memory as memory_field  # noqa: E402
from benchmarks.random_read import (  # noqa: E402
    SIZES,
    random_beginning,
    random_model,
    random_views,
    random_words,
)
from benchmarks.stopwatch import MODEL_PARTS, Stopwatch, hardware, watch_model  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

HEAD, REST = "vocabulary head", "rest"
STAGES = (*MODEL_PARTS, HEAD, REST, "total")
SCHEDULES = ("original", "together")
PROCESS = Path("/proc/self")

Answer = list[int]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--version", default="assets/read-mini-base", metavar="MODEL", help="checkpoint (default: READ-mini's base)"
    )
    parser.add_argument("--size", choices=SIZES, help="random weights of this size instead of a checkpoint")
    parser.add_argument("--dataset_dir", default="data/mini", help="where the pictures are (default: data/mini)")
    parser.add_argument(
        "--data", default="fprefcoco|val", metavar="NAME|SPLIT", help="of which data set (default: fprefcoco|val)"
    )
    parser.add_argument("--protocols", nargs="+", choices=("forced", "generate"), default=["forced", "generate"])
    parser.add_argument("--expressions", type=int, default=10, help="questions a picture (default: 10)")
    parser.add_argument(
        "--original_expressions", type=int, metavar="N",
        help="the original's schedule generates N of the answers of a picture, its seconds are scaled to all (default: all)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=6, help="pictures that count (default: 6)")
    parser.add_argument("--warmup", type=int, default=1, help="pictures before them (default: 1)")
    parser.add_argument(
        "--chunk", type=int, default=16, help="expressions that go through the model together (default: 16)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=40, help="longest answer (default: 40)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="with --size: the language model's blocks in so many bits")
    parser.add_argument("--plan", action="store_true", help="with --size: counts weights, FLOPs and bytes, runs nothing")
    parser.add_argument("--attn_implementation", choices=("eager", "sdpa", "flash_attention_2"), default="sdpa")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument(
        "--together_only", action="store_true", help="leaves the original's schedule out, for throughput alone"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    return parser


# ------------------------------------------------------------------------------------------------ schedules


def together(
    model: READForCausalLM, views: dict, asked: dict, protocol: str, options: argparse.Namespace
) -> tuple[list[Answer], list[Segments]]:
    """Our schedule for one picture: answers' ids, and the segments of each chunk."""
    images = model.encode_images(**views)
    answers, segments = [], []
    for first in range(0, len(asked["input_ids"]), options.chunk):
        part = {name: tensor[first : first + options.chunk] for name, tensor in asked.items()}
        if protocol == "forced":
            segments.append(model.segment_answers(images, **part))
        else:
            out = model.generate_answers(
                images, **part, max_new_tokens=options.max_new_tokens, force_segment=options.size is not None
            )
            answers += out.answer_ids
            segments.append(out.segments)
    return answers, segments


def original(
    model: READForCausalLM, views: dict, asked: dict, protocol: str, options: argparse.Namespace
) -> tuple[list[Answer], list[Segments]]:
    """The original's schedule for one picture; of its answers, it writes those of `chosen`."""
    if protocol == "forced":
        for _ in range(len(asked["input_ids"]) - 1):  # CLIP once a conversation; the last time below
            model.encode_images(**views)
        images = model.encode_images(**views)
        return [], [model.segment_answers(images, **asked, share_prefix=False)]
    answers, segments = [], []
    for row in chosen(protocol, options):
        ids, mask = asked["input_ids"][row], asked["attention_mask"][row]
        answer, found = _original_answer(model, views, ids[mask][None], options)
        answers.append(answer)
        segments.append(found)
    return answers, segments


def chosen(protocol: str, options: argparse.Namespace) -> list[int]:
    """The expressions of a picture that the original's schedule goes through: all, or some spread evenly among them."""
    count = options.original_expressions if protocol == "generate" else None
    count = options.expressions if count is None else count
    return [number * options.expressions // count for number in range(count)]


def _original_answer(
    model: READForCausalLM, views: dict, ids: torch.Tensor, options: argparse.Namespace
) -> tuple[Answer, Segments]:
    """Greedy decoding without a cache; the segments come from the states of the last pass, which hold all before it."""
    import torch

    from model import llava

    eos, prompt = model.llava.config.text_config.eos_token_id, ids.shape[1]
    zero = torch.zeros(1, dtype=torch.long, device=ids.device)
    for _ in range(options.max_new_tokens):
        images = model.encode_images(**views)
        hidden = model._hidden_states(images, ids, torch.ones_like(ids, dtype=torch.bool), zero)
        word = model.llava.lm_head(hidden)[:, -1:].argmax(-1)
        ids = torch.cat([ids, word], dim=1)
        if word.item() == eos:
            break
    question, position = llava.seg_positions(ids, model.config.seg_token_id)
    if options.size is not None and len(question) == 0:
        question, position = zero, zero + hidden.shape[1] - 1
    image_states = llava.image_states(hidden, ids[:, : hidden.shape[1]], question)
    found = model._segment(images, hidden[question, position], image_states, question, question * 0)
    return ids[0, prompt:].tolist(), found


# ------------------------------------------------------------------------------------------------ what is asked


def pictures(options: argparse.Namespace, processor: Any, protocol: str) -> list[tuple[dict, dict]]:
    """(arguments of `encode_images`, of the questions) of each picture: a data set's, asked its expressions over and over."""
    import dataclasses

    import numpy as np

    from dataset import build_eval
    from dataset.collate import collate

    name, _, split = options.data.partition("|")
    data = build_eval(name, split, options.dataset_dir, protocol=protocol)
    if len(data) < options.warmup + options.images:
        raise ValueError(f"{options.data} has {len(data)} pictures, asked for {options.warmup} + {options.images}")
    found = []
    for index in range(options.warmup + options.images):
        sample = data[index]
        again = np.arange(options.expressions) % len(sample.conversations)
        sample = dataclasses.replace(
            sample,
            conversations=[sample.conversations[i] for i in again],
            masks=sample.masks[again],
            exists=[sample.exists[i] for i in again],
            questions=[sample.questions[i] for i in again],
        )
        batch = collate([sample], processor, training=False, padding="right" if protocol == "forced" else "left")
        inputs = batch.model_inputs()
        asked = {key: inputs.pop(key) for key in ("input_ids", "attention_mask", "image_of_question")}
        found.append((inputs, asked))
    return found


def random_pictures(options: argparse.Namespace, model: READForCausalLM, protocol: str) -> list[tuple[dict, dict]]:
    """As `pictures`, with noise for pictures of 480 x 640 and random words: 38 before the image, 20 to 30 after it."""
    import torch

    from model.packing import pad_rows

    config, generator = model.config, torch.Generator().manual_seed(0)
    found = []
    for _ in range(options.warmup + options.images):
        head = random_beginning(config, generator)
        tails = [random_words(20 + i % 11, generator) for i in range(options.expressions)]
        if protocol == "forced":
            tails = [torch.cat([tail, torch.tensor([config.seg_token_id, 2])]) for tail in tails]
        ids, mask = pad_rows([torch.cat([head, tail]) for tail in tails], "right" if protocol == "forced" else "left")
        questions = {
            "input_ids": ids, "attention_mask": mask, "image_of_question": torch.zeros(len(ids), dtype=torch.long)
        }  # fmt: skip
        found.append((random_views(config, 1, generator), questions))
    return found


# ------------------------------------------------------------------------------------------------ measuring


def measure(
    model: READForCausalLM,
    asked: list[tuple[dict, dict]],
    protocol: str,
    options: argparse.Namespace,
    counts: floors.Counts,
    tops: dict[str, float],
) -> dict[str, Any]:
    """Seconds a picture of each stage, by schedule, their ratios and floors, and how far the two agree."""
    import torch

    run = {"original": original, "together": together}
    names = ["together"] if options.together_only else list(SCHEDULES)
    watch: Stopwatch = model.watch
    total: dict[str, Counter[str]] = {name: Counter() for name in names}
    floor: Counter[str] = Counter()
    rows = chosen(protocol, options)
    same = {"answers": 0, "answers_of": 0, "masks": 0, "masks_of": 0, "pixels": 0.0}
    for number, (views, questions) in enumerate(asked):
        ((beginning, tails),) = floors.lengths(**questions).values()
        views = {
            key: value.to(model.device, model.dtype) if isinstance(value, torch.Tensor) else value
            for key, value in views.items()
        }
        questions = {key: value.to(model.device) for key, value in questions.items()}
        found = {}
        for name in names if number % 2 else reversed(names):
            watch.take()
            begin = watch.now()
            with torch.no_grad():
                found[name] = run[name](model, views, questions, protocol, options)
            whole = watch.now() - begin
            times = watch.take()
            times[REST] = whole - sum(times.values())
            times["total"] = whole
            if name == "original":
                times = Counter({stage: t * options.expressions / len(rows) for stage, t in times.items()})
            if number >= options.warmup:
                total[name].update(times)
        if len(names) == 2 and number >= options.warmup:
            _compare(found, same, rows, options.chunk)
        if number >= options.warmup:
            answers, segments = found["together"]
            masks = [logits for part in segments for logits in part.mask_logits]
            floor.update(
                floors.evaluation_floor(
                    counts, tops, beginning, tails, chunk=options.chunk, itemsize=model.dtype.itemsize, bits=options.bits,
                    answers=[len(answer) for answer in answers] if protocol == "generate" else None,
                    masks=len(masks), pixels=sum(logits.numel() for logits in masks),
                )
            )  # fmt: skip
        print(f"\r{protocol}: picture {number + 1} of {len(asked)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    count = len(asked) - options.warmup
    seconds = {name: {stage: times[stage] / count for stage in STAGES} for name, times in total.items()}
    result: dict[str, Any] = {
        "seconds": seconds,
        "images_per_second": {name: 1 / s["total"] for name, s in seconds.items()},
        "floor_seconds": {stage: floor[stage] / count for stage in STAGES if floor[stage] > 0},
    }
    if len(names) == 2:
        ours, theirs = seconds["together"], seconds["original"]
        result["ratios"] = {stage: theirs[stage] / ours[stage] for stage in STAGES if ours[stage] > 0}
        result["agreement"] = same
    return result


def plan(size: str) -> str:
    """GiB of the weights of a published size, and what its floors are made of, counted on PyTorch's meta device."""
    import torch

    from model import memory

    lines = [f"READ-{size}, GiB of weights"]
    config = memory.published_config(size)
    for name, dtype, bits in (
        ("fp32", torch.float32, None), ("bf16", torch.bfloat16, None),
        ("bf16, blocks in 8 bits", torch.bfloat16, 8), ("bf16, blocks in 4 bits", torch.bfloat16, 4),
    ):  # fmt: skip
        lines.append(f"{name:<26}{memory.weight_bytes(memory.on_meta(config, dtype), bits) / memory.GIB:>6.1f}")
    return "\n".join([*lines, "", "at least", floors.counted(floors.count(config))])


def forget_peak(device: torch.device) -> None:
    """What was held before does not count; a system without /proc has no peak."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (PROCESS / "clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> float | None:
    """GiB: the GPU's, or without one those of this process; None where the system does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return memory_field("VmHWM") / 2**30 if PROCESS.is_dir() else None


def _compare(found: dict[str, tuple], same: dict[str, Any], rows: list[int], chunk: int) -> None:
    """Adds up in how much the two schedules agree about one picture, over the expressions that both went through."""
    (answers, segments), (other_answers, other_segments) = found["together"], found["original"]
    answers = [answers[row] for row in rows] if answers else []
    masks = [
        logits > 0
        for number, part in enumerate(segments)
        for question, logits in zip(part.question.tolist(), part.mask_logits, strict=True)
        if number * chunk + question in rows
    ]
    others = [logits > 0 for part in other_segments for logits in part.mask_logits]
    same["answers"] += sum(a == b for a, b in zip(answers, other_answers, strict=True))
    same["answers_of"] += len(answers)
    same["masks_of"] += len(others)
    if len(masks) == len(others):
        differing = [(ours != theirs).float().mean().item() for ours, theirs in zip(masks, others, strict=True)]
        same["masks"] += sum(share == 0 for share in differing)
        same["pixels"] = max(same["pixels"], *differing) if differing else same["pixels"]


def table(protocol: str, result: dict[str, Any]) -> str:
    """A row a stage: seconds a picture of each schedule, how many times less ours takes, its floor, and how far it is from it."""
    seconds, ratios, floor = result["seconds"], result.get("ratios", {}), result["floor_seconds"]
    names = "".join(f"{name:>14}" for name in seconds) + (f"{'ratio':>10}" if ratios else "")
    lines = [f"{protocol:<20}{names}{'floor':>14}{'of floor':>10}"]
    for stage in STAGES:
        cells = "".join(f"{times[stage]:>12.4f} s" for times in seconds.values())
        if ratios:
            cells += f"{ratios[stage]:>9.1f}x" if stage in ratios else " " * 10
        if stage in floor:
            cells += f"{floor[stage]:>12.4f} s{seconds['together'][stage] / floor[stage]:>9.1f}x"
        lines.append(f"{stage:<20}{cells}".rstrip())
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in result["images_per_second"].items())
    lines.append(f"pictures a second: {rates}")
    if "agreement" in result:
        same = result["agreement"]
        lines.append(
            (f"same answers {same['answers']} of {same['answers_of']}, " if same["answers_of"] else "")
            + f"same masks {same['masks']} of {same['masks_of']}, "
            f"at most {100 * same['pixels']:.3f} % of a mask's pixels differ"
        )
    return "\n".join(lines)


@plain_errors("evaluation")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    import torch

    from model import READForCausalLM, READProcessor, quantize_language_model
    from utils import distributed
    from utils.cli import torch_dtype
    from utils.runlog import package_versions

    if options.size is None and (options.plan or options.bits):
        raise ValueError("--plan and --bits are for random weights of a --size")
    if options.plan:
        print(plan(options.size))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = distributed.start(engine=False).device
    dtype = torch_dtype(options.precision, device.type == "cuda")
    results = {}
    if options.original_expressions is not None and not 1 <= options.original_expressions <= options.expressions:
        raise ValueError(
            f"--original_expressions must be from 1 to --expressions {options.expressions}, "
            f"found {options.original_expressions}"
        )
    if options.size:
        model = random_model(options.size, dtype, device, options.attn_implementation)
        if options.bits:
            quantize_language_model(model, options.bits, device)
    else:
        model = READForCausalLM.from_pretrained(
            options.version, dtype=dtype, attn_implementation=options.attn_implementation
        )
        model.requires_grad_(False).to(device)
        processor = READProcessor.from_pretrained(options.version)
    machine = hardware(device)
    counts, tops = floors.count(model.config), floors.ceilings(device, dtype)
    forget_peak(device)  # loading has a benchmark of its own, and ceilings take memory of their own
    model.watch = Stopwatch(device)
    watch_model(model.watch, model)
    model.watch.watch(HEAD, model.llava.lm_head)
    for protocol in options.protocols:
        asked = (
            random_pictures(options, model, protocol) if options.size else pictures(options, processor, protocol)
        )
        with model.recorded():  # as `utils.evaluate` does: on a GPU, decode steps are CUDA graphs
            results[protocol] = measure(model, asked, protocol, options, counts, tops)
    peak = peak_memory(device)
    bits = f", blocks in {options.bits} bits" if options.bits else ""
    what = f"READ-{options.size}, random weights{bits}" if options.size else options.version
    print(f"{what}, {str(dtype).removeprefix('torch.')}, {options.expressions} expressions a picture, {options.images} pictures; "
          f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, load {machine['load']}")  # fmt: skip
    print(floors.text(tops, device))
    for protocol, result in results.items():
        print("\n" + table(protocol, result))
        run = len(chosen(protocol, options))
        if run < options.expressions and not options.together_only:
            print(f"original: ran {run} of the {options.expressions} expressions of each picture, its seconds are scaled to all; "
                  f"answers and masks are compared for those alone")  # fmt: skip
    if peak is not None:
        print(f"\npeak memory{' of the GPU' if device.type == 'cuda' else ''}, once loaded: {peak:.1f} GiB")
    agreed = [result["agreement"] for result in results.values() if "agreement" in result]
    if dtype == torch.float32 and not options.bits and any(a["answers"] < a["answers_of"] or a["pixels"] > 1e-3 for a in agreed):
        raise SystemExit("evaluation: the schedules disagree, so their times say nothing")
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/evaluation.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": machine,
            "versions": {"python": platform.python_version(), **package_versions()},
            "model": what,
            "dtype": str(dtype).removeprefix("torch."),
            "expressions": options.expressions,
            "original_expressions": options.original_expressions,
            "images": options.images,
            "max_new_tokens": options.max_new_tokens,
            "peak_gib": peak,
            "ceilings": tops,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
