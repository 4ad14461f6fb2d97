"""What a training step costs with several conversations a picture: shared beginnings against each conversation on its own.

    python benchmarks/training_step.py                      READ-mini on this machine, 2 pictures with 3 conversations each
    python benchmarks/training_step.py --size 7b            a full-size READ with random weights; wants a GPU with 80 GB
    python benchmarks/training_step.py --size 7b --plan     its activations alone, counted on PyTorch's meta device

One model takes the same batches in every way, in turns of who is first, and the ways must agree in loss and gradients.

    original  each conversation through the language model on its own, plain (eager) attention
    repeated  likewise, fused attention (sdpa)
    shared    what `train_read.py` does: what conversations about a picture begin with once (model/packing.py), fused attention

A step is forward, backward, clipping and torch's AdamW on what READ trains, LoRA of rank 8 included; the learning rate is 0, so
that every way sees the same weights, and LoRA's dropout 0, which would be drawn differently. All ways take SAM's encoder without
a graph, the head at supervised places and the last hidden state alone. Seconds are medians over the steps after warm-up, ratios
medians of the pairs. Memory is on a GPU the peak of PyTorch's allocator, in all and above what was there before the step; on a
CPU the bytes that autograd keeps of a forward pass, of an extra pass that is not timed (with gradient checkpointing the block
that is computed again comes on top). Each is measured with and without gradient checkpointing.

The floor is what the shared form takes at least: FLOPs and bytes counted from the model's sizes (benchmarks/floors.py), over the
speed of a large product and of a large copy, measured in the same run. "of floor" is how many times longer `shared` takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dataset.types import Batch
    from model import READForCausalLM
    from utils.distributed import World

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import floors  # noqa: E402
from benchmarks.random_read import PICTURE, SIZES, random_beginning, random_model, random_views, random_words  # noqa: E402
from benchmarks.step_time import PARTS, step  # noqa: E402
from benchmarks.stopwatch import Stopwatch, hardware, watch_model  # noqa: E402
from utils.cli import plain_errors  # noqa: E402
from utils.files import write_text  # noqa: E402

WAYS = {"original": (False, "eager"), "repeated": (False, "sdpa"), "shared": (True, "sdpa")}
"""(share_prefix, attention of the language model)."""
OURS, BASELINES = "shared", ("original", "repeated")
CHECKPOINTING = {"without gradient checkpointing": False, "with gradient checkpointing": True}
"""In this order, since a model is never told to stop."""
LORA_RANK = 8
TAIL = 66
"""Words of a random conversation behind its picture, or some few less or more; half of them are supervised."""
TIMED = tuple(part for part in PARTS if part != "data")
GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--version", default="assets/read-mini-base", metavar="MODEL", help="checkpoint (default: READ-mini's base)"
    )
    parser.add_argument("--size", choices=SIZES, help="random weights of this size instead of a checkpoint")
    parser.add_argument("--plan", action="store_true", help="activations alone, without memory or weights; needs --size")
    parser.add_argument("--dataset_dir", default="data/mini", help="where the pictures are (default: data/mini)")
    parser.add_argument("--refer_seg_data", default="refcoco", help="which of its sets is learnt (default: refcoco)")
    parser.add_argument("--pictures", type=int, default=2, help="pictures a step (default: 2)")
    parser.add_argument("--conversations", type=int, default=3, help="conversations a picture (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default: 1)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, metavar="JSON", help="writes the numbers, with what they were measured on")
    return parser


# ------------------------------------------------------------------------------------------------ what is learnt


def batches(options: argparse.Namespace) -> list[Batch]:
    """Training batches of a data set: pictures with as many expressions as asked for."""
    from dataset import build_train
    from dataset.collate import collate
    from model import READProcessor

    mixture = build_train(
        ["refer_seg"], [1], options.dataset_dir, refer_seg_data=options.refer_seg_data, seed=0,
        num_classes_per_sample=options.conversations,
    )  # fmt: skip
    processor = READProcessor.from_pretrained(options.version)
    wanted, found = options.pictures * (options.warmup + options.steps), []
    for number in range(100 * wanted):
        sample = mixture.sample(0, number)
        if len(sample.conversations) == options.conversations:
            found.append(sample)
        if len(found) == wanted:
            break
    else:
        raise ValueError(
            f"{options.dataset_dir}: too few pictures of {options.refer_seg_data} have {options.conversations} expressions"
        )
    return [
        collate(found[first : first + options.pictures], processor, training=True, model_max_length=2048)
        for first in range(0, wanted, options.pictures)
    ]


def random_batches(options: argparse.Namespace, model: READForCausalLM) -> list[Batch]:
    """As `batches`, noise and random words; every conversation has a [SEG], whose mask is a rectangle."""
    import torch

    from dataset.types import Batch
    from model.losses import IGNORE_INDEX
    from model.packing import pad_rows

    config, generator = model.config, torch.Generator().manual_seed(0)
    seg, found = torch.tensor([config.seg_token_id, 2]), []
    count = options.pictures * options.conversations
    for _ in range(options.warmup + options.steps):
        rows, labels = [], []
        for n in range(count):
            if n % options.conversations == 0:
                beginning = random_beginning(config, generator)
            words = random_words(TAIL - 6 + 4 * (n % 4) - len(seg), generator)
            row = torch.cat([beginning, words, seg])
            asked = len(beginning) + len(words) // 2
            rows.append(row)
            labels.append(torch.cat([torch.full((asked,), IGNORE_INDEX), row[asked:]]))
        ids, mask = pad_rows(rows, "right")
        mask_of = torch.zeros(PICTURE, dtype=torch.uint8)
        mask_of[100:300, 200:400] = 1
        found.append(
            Batch(
                **random_views(config, options.pictures, generator),
                input_ids=ids,
                attention_mask=mask,
                image_of_question=torch.arange(options.pictures).repeat_interleave(options.conversations),
                labels=pad_rows(labels, "right")[0].masked_fill(~mask, IGNORE_INDEX),
                masks=[mask_of] * count,
                exists=[True] * count,
                samples=[],
            )
        )
    return found


def build_model(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> READForCausalLM:
    """The model as it is trained, with LoRA on."""
    import torch

    from model import READForCausalLM, add_lora, set_trainable

    if options.size:
        model = random_model(options.size, dtype, device, "sdpa")
    else:
        model = READForCausalLM.from_pretrained(options.version, dtype=dtype).to(device)
    torch.manual_seed(0)
    add_lora(model, r=LORA_RANK, dropout=0.0)
    set_trainable(model)
    return model.to(device, dtype).train()


def choose(model: READForCausalLM, way: str) -> None:
    """Sets how conversations go through the language model."""
    model.share_prefix, model.llava.model.language_model.config._attn_implementation = WAYS[way]


# ------------------------------------------------------------------------------------------------ measuring


class Measured:
    """One model's steps: seconds, memory, tokens, agreement."""

    def __init__(self, model: READForCausalLM, found: list[Batch], options: argparse.Namespace, world: World) -> None:
        import torch

        self.counts, self.ceilings = floors.count(model.config), floors.ceilings(world.device, model.dtype)

        self.model, self.batches, self.options, self.device = model, found, options, world.device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)
        self.watch = Stopwatch(world.device)
        watch_model(self.watch, model)
        self.tokens = 0
        model.llava.model.language_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.tokens = kwargs["inputs_embeds"].shape[:2].numel()

    def run(self, checkpointing: bool) -> dict[str, Any]:
        """Everything about the ways, with or without gradient checkpointing."""
        options, ways = self.options, self.options.ways
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        seconds: dict[str, list] = {way: [] for way in ways}
        memory: dict[str, dict] = {way: {} for way in ways}
        tokens = {}
        for number, batch in enumerate(self.batches):
            on_device = batch.to(self.device, self.model.dtype)
            first = number % len(ways)
            for way in [*ways[first:], *ways[:first]]:
                if memory[way] is None:
                    continue
                choose(self.model, way)
                held = self._step(on_device)
                if held is None:
                    memory[way] = None
                    continue
                times, peak, above = held
                tokens[way] = self.tokens
                if number >= options.warmup:
                    seconds[way].append(times)
                    if self.device.type == "cuda":
                        for name, value in (("peak", peak), ("step", above)):
                            memory[way][name] = max(memory[way].get(name, 0), value)
            print(f"\rstep {number + 1} of {len(self.batches)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        fits = [way for way in ways if memory[way] is not None]
        last = self.batches[-1].to(self.device, self.model.dtype)
        if self.device.type != "cuda":
            for way in fits:
                choose(self.model, way)
                memory[way] = {"kept": self._kept(last)}
        result = {
            "tokens": {way: tokens[way] for way in fits},
            "seconds": {way: {p: statistics.median(t[p] for t in seconds[way]) for p in TIMED} for way in fits},
            "memory_bytes": {way: memory[way] for way in ways},
            "ratios": {},
        }
        if OURS in fits:
            bounds = [self._floor(batch, checkpointing) for batch in self.batches[options.warmup :]]
            result["floor_seconds"] = {p: statistics.median(bound[p] for bound in bounds) for p in bounds[0]}
        for base in BASELINES:
            if OURS in fits and base in fits:
                pairs = list(zip(seconds[base], seconds[OURS], strict=True))
                result["ratios"][f"{base} / {OURS}"] = {
                    "seconds": {p: statistics.median(b[p] / o[p] for b, o in pairs) for p in TIMED},
                    "memory": {name: memory[base][name] / memory[OURS][name] for name in memory[OURS]},
                    **self._agreement(last, base),
                }
        return result

    def _floor(self, batch: Batch, checkpointing: bool) -> dict[str, float]:
        """Seconds of each part that our way takes at least for a batch."""
        from model.losses import IGNORE_INDEX

        segmented = (batch.input_ids == self.model.config.seg_token_id).any(dim=1)
        return floors.training_floor(
            self.counts,
            self.ceilings,
            floors.lengths(batch.input_ids, batch.attention_mask, batch.image_of_question),
            itemsize=self.model.dtype.itemsize,
            checkpointing=checkpointing,
            supervised=int((batch.labels[:, 1:] != IGNORE_INDEX).sum()),
            segmented=len(batch.image_of_question[segmented].unique()),
            masks=len(batch.masks),
            pixels=sum(mask.numel() for mask in batch.masks),
            trained_bytes=sum(parameter.numel() * parameter.element_size() for parameter in self.trained),
        )

    def _step(self, batch: Batch) -> tuple[dict, int, int] | None:
        """(seconds of each part, peak bytes, peak above what was there) of a step; None if it does not fit the GPU."""
        import torch

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        try:
            times = step(self.model, batch, self.optimizer, self.trained, self.watch)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self.watch.take()
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else 0
        return times, peak, peak - before if cuda else 0

    def _kept(self, batch: Batch) -> int:
        from model.memory import kept_for_backward

        kept = kept_for_backward(lambda: self.model(**batch.model_inputs()), self.model)
        self.watch.take()  # this pass is not timed
        return kept

    def _agreement(self, batch: Batch, base: str) -> dict[str, float]:
        """How far ours is from a baseline on one batch: loss, and all gradients as one vector, relative to its length."""
        import torch

        found = []
        for way in (base, OURS):
            choose(self.model, way)
            loss = self.model(**batch.model_inputs()).loss
            loss.backward()
            found.append((loss.item(), [None if p.grad is None else p.grad.float().cpu() for p in self.trained]))
            self.optimizer.zero_grad()
        self.watch.take()
        (theirs, wanted), (ours, gradients) = found
        pairs = [(a, b) for a, b in zip(wanted, gradients, strict=True) if a is not None]
        apart = torch.stack([(a - b).norm() for a, b in pairs]).norm() / torch.stack([a.norm() for a, _ in pairs]).norm()
        return {"loss": theirs, "loss_difference": abs(ours - theirs), "gradient_difference": apart.item()}


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that a step keeps for the backward pass, by way, of a size whose weights are never made."""
    from model import add_lora, memory, set_trainable
    from utils.cli import torch_dtype

    result: dict[str, Any] = {}
    config = memory.published_config(options.size)
    shared = config.num_patches + memory.TOKENS_BEFORE_IMAGE
    for name, checkpointing in CHECKPOINTING.items():
        kept = {}
        for way in options.ways:
            share, attention = WAYS[way]
            model = memory.on_meta(config, torch_dtype(options.precision or "bf16"), attention)
            add_lora(model, r=LORA_RANK, dropout=0.0)
            set_trainable(model)
            shape = memory.StepShape(
                options.pictures, options.pictures * options.conversations, shared + TAIL, shared if share else 0
            )
            kept[way] = {"kept": memory.activation_bytes(model, shape, checkpointing)}
        ratios = {
            f"{base} / {OURS}": {"memory": {"kept": kept[base]["kept"] / kept[OURS]["kept"]}}
            for base in BASELINES
            if OURS in kept and base in kept
        }
        result[name] = {"memory_bytes": kept, "ratios": ratios}
    return result


def table(name: str, result: dict[str, Any]) -> str:
    """A row a part: each way, how many times ours it takes, the floor, and how far ours is from it."""
    ways, ratios, floor = list(result["memory_bytes"]), result["ratios"], result.get("floor_seconds", {})
    lines = []

    def row(label: str, cells: list[str], found: list[str], bound: tuple[str, ...] = ()) -> None:
        parts = [*(f"{cell:>12}" for cell in cells), *(f"{cell:>20}" for cell in found), *(f"{cell:>12}" for cell in bound)]
        lines.append(f"{label:<34}{''.join(parts)}".rstrip())

    row(name, ways, list(ratios), ("floor", "of floor") if floor else ())

    if "seconds" in result:
        row("tokens of the language model", [str(result["tokens"].get(way, "-")) for way in ways], [""] * len(ratios))
        for part in TIMED:
            cells = [f"{result['seconds'][way][part]:.4f} s" if way in result["seconds"] else "-" for way in ways]
            bound = (f"{floor[part]:.4f} s", f"{result['seconds'][OURS][part] / floor[part]:.1f}x") if floor.get(part) else ()
            row(part, cells, [f"{r['seconds'][part]:.2f}x" for r in ratios.values()], bound)
    labels = {"peak": "peak memory, GiB", "step": "above what was there, GiB", "kept": "kept for backward, GiB"}
    for key, label in labels.items():
        memory = result["memory_bytes"]
        if any(key in (memory[way] or {}) for way in ways):
            cells = ["no room" if memory[way] is None else f"{memory[way][key] / GIB:.3f}" for way in ways]
            row(label, cells, [f"{r['memory'][key]:.2f}x" for r in ratios.values()])
    for pair, r in ratios.items():
        if "loss" in r:
            lines.append(
                f"{pair}: loss {r['loss']:.6f}, apart {r['loss_difference']:.1e}; gradients apart {r['gradient_difference']:.1e}"
            )
    return "\n".join(lines)


@plain_errors("training_step")
def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    import torch

    from utils import distributed
    from utils.cli import torch_dtype
    from utils.runlog import package_versions

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    world = distributed.start(engine=False)
    machine = hardware(world.device)
    if options.plan:
        if not options.size:
            raise ValueError("--plan counts the activations of a published size: name it with --size")
        dtype, results = torch_dtype(options.precision or "bf16"), plan(options)
    else:
        dtype = torch_dtype(options.precision, world.device.type == "cuda")
        model = build_model(options, dtype, world.device)
        found = random_batches(options, model) if options.size else batches(options)
        measured = Measured(model, found, options, world)
        results = {name: measured.run(checkpointing) for name, checkpointing in CHECKPOINTING.items()}
    what = f"READ-{options.size}, random weights" if options.size else options.version
    where = "counted on the meta device" if options.plan else (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, load {machine['load']}"
    )  # fmt: skip
    print(f"{what}, {str(dtype).removeprefix('torch.')}, {options.pictures} pictures with {options.conversations} conversations "
          f"each; {where}")  # fmt: skip
    if not options.plan:
        print(floors.text(measured.ceilings, world.device))
    for name, result in results.items():
        print("\n" + table(name, result))
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/training_step.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": None if options.plan else machine,
            "versions": {"python": platform.python_version(), **package_versions()},
            "model": what,
            "dtype": str(dtype).removeprefix("torch."),
            "pictures": options.pictures,
            "conversations": options.conversations,
            "steps": options.steps,
            "memory": "kept_for_backward" if options.plan or world.device.type != "cuda" else "max_memory_allocated",
            "ceilings": None if options.plan else measured.ceilings,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
