"""Trains READ: parse, seed, build, resume, loop, save.

    python train_read.py --preset mini                              one process, with or without a GPU
    deepspeed --num_gpus 8 train_read.py --preset read-7b-val ...   one process a GPU (on a CPU: processes over gloo)
    python train_read.py --preset mini --eval_only                  validation alone: no training data, no optimiser
    python train_read.py --preset mini --dry_run                    settings, what trains, data and memory; trains nothing

DeepSpeed with the published settings (ZeRO-2, protocol §3) unless flags say otherwise. A run lives in LOG_BASE_DIR/EXP_NAME:

    config.json    the resolved settings, which merging reads back; trainable.txt, what trains and what is frozen
    log.jsonl, events.*    losses and scores: as JSON lines, and for TensorBoard
    skipped.jsonl  broken samples that were replaced by others (--strict stops at the first)
    ckpt_model/    DeepSpeed checkpoints `step<N>`: the last and the best, no others
    best.json      which of them is the best (by cIoU), and its scores

Started again with --auto_resume, a run goes on from its last checkpoint and computes what one does that is never interrupted:
the order of the data is a function of (seed, epoch, index), dropout of (seed, forward pass, rank).

Ctrl-C, SIGTERM and SIGUSR1 end a run after the step it is in, with a checkpoint, and exit status 130, 143 and 138; one more ends
it at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import run_folder
from utils.args import TrainArgs, check_sasp, parse_flags
from utils.cli import limit_images, plain_errors, torch_dtype
from utils.stopping import Stopped, Stopping, name_of, quiet_worker

if TYPE_CHECKING:
    from model import READForCausalLM, READProcessor
    from utils.distributed import World
    from utils.runlog import Averages, RunLog

TERMS = ("loss", "ce_loss", "bce_loss", "dice_loss", "sim_loss")
"""Scalars of READOutput that are logged and watched."""
AVERAGES_NAME = "averages.json"
"""In a checkpoint: what was added up for the log, of each rank."""


def main(argv: list[str] | None = None) -> None:
    """The story; see the module's docstring."""
    given = parse_flags(argv)  # `--help` ends here, before anything heavy is imported
    with plain_errors("train_read.py"), Stopping("train_read.py") as stopping:
        from model import get_preset
        from utils import distributed

        args = TrainArgs.resolve(given, get_preset(given["preset"]) if "preset" in given else None)
        check_sasp(args)
        if args.max_megapixels is not None:
            limit_images(args.max_megapixels)
        if args.dry_run:
            if distributed.environment()[0] == 0:  # under a launcher only the first process prints
                dry_run(args)
            return
        try:
            run(args, stopping)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the loader, whose workers end with it
            if isinstance(error, FloatingPointError):
                raise ValueError(str(error)) from error
            if isinstance(error, RuntimeError) and distributed.is_lost_peer(error):
                raise ConnectionError(f"another process of this run has ended, so this one cannot go on ({error})") from error
            raise
        finally:
            distributed.stop()


def run(args: TrainArgs, stopping: Stopping) -> None:
    """One run, or one validation, from its first check to its last step."""
    from dataset.fingerprint import fingerprint
    from utils import distributed
    from utils.engine import build_engine
    from utils.runlog import RunLog, setup_logging

    world = distributed.start(engine=not args.eval_only)
    if args.precision == "fp16" and world.device.type == "cpu" and not args.eval_only:
        raise ValueError("DeepSpeed trains in fp16 on a GPU only; on this machine take --precision bf16 or fp32")
    setup_logging(world.is_main)
    with contextlib.ExitStack() as stack:
        log = RunLog(None, world.is_main)
        check_packages(args)
        if not args.eval_only:
            distributed.main_first(world, lambda: run_folder.check(args))
        train_data, val_data = open_data(args)  # what is missing on disk shows before minutes go into loading a model
        record: dict[str, Any] = {}
        if not args.eval_only:

            def claim() -> None:
                stack.enter_context(run_folder.hold(args))
                record["data"] = fingerprint(train_data)
                record["changed"] = run_folder.check_changes(args, record["data"])

            distributed.main_first(world, claim)
        distributed.seed_everything(args.seed)  # the same on all ranks: new weights must agree
        model, processor = build_model(args, world, log)
        if args.eval_only:
            validate(args, model, processor, val_data, world, log, step=0)
            return
        run_folder.prepare(args, world)
        engine = build_engine(args, model, world.device)
        averages = resume(args, engine, world, log)
        if record.get("changed"):
            log.say(f"--resume_with_changes: {json.dumps(record['changed'])}")
        run_folder.write_settings(args, engine.module, world, engine.global_steps, record)
        log = RunLog(
            args.run_dir, world.is_main, engine.global_steps, (run_folder.read_best(args.run_dir) or {}).get("measured_step", 0),
            wandb_name=args.exp_name if args.use_wandb else None,
        )  # fmt: skip
        stack.callback(log.close)
        with stopping.gently():
            loader = build_loader(args, train_data, processor, world)
            asked = train(args, engine, processor, loader, averages, val_data, world, log, stopping)
            del loader  # ends its workers
        log.say_skipped()
    if asked:
        raise Stopped(asked)


# ------------------------------------------------------------------------------------------------ build


def check_packages(args: TrainArgs) -> None:
    """Says at once that a package is missing which a flag needs and the run would import late."""
    needed = {"wandb": args.use_wandb, "bitsandbytes": bool(args.quantized)}
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"the flags given need the package {package}: pip install {package}")


def dry_run(args: TrainArgs) -> None:
    """Prints what a run would be: settings, what trains, data, memory. Loads no weights and needs no process group."""
    import torch

    from model import add_lora, memory, set_trainable
    from model.lora import trainable_report
    from model.packing import takes_masks

    print(json.dumps(dataclasses.asdict(args), indent=1))
    config, source = memory.base_config(args.version, args.vision_tower, args.vision_pretrained)
    args.configure(config)
    model = memory.on_meta(config, torch_dtype(args.precision), args.attn_implementation)
    add_lora(model, **args.lora())
    set_trainable(model, args.train_mask_decoder)
    print(f"\nwhat trains ({source})\n{trainable_report(model)}")
    shares = args.share_prefix and args.num_classes_per_sample > 1 and takes_masks(args.attn_implementation)
    tokens = min(args.model_max_length, config.num_patches + memory.TOKENS_BESIDE_IMAGE)
    shape = memory.StepShape(
        pictures=args.batch_size,
        questions=args.batch_size * args.num_classes_per_sample,
        tokens=tokens,
        shared=min(tokens, config.num_patches + memory.TOKENS_BEFORE_IMAGE) if shares else 0,
    )
    card = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
    asked = (args.zero_stage, args.offload, args.quantized)
    print(f"\n{memory.table(model, shape, asked, args.bucket_size, card)}")
    print("\ndata")
    try:
        mixture, val_data = open_data(args)
        rates = dict(args.mixture())
        for name, members in zip(mixture.names, mixture.sets, strict=True):
            print(f"{name:<22}{len(members):>9} pictures, rate {rates[name]:g}")
        if val_data is not None:
            print(f"{args.val_dataset + '|' + args.val_split:<22}{len(val_data):>9} pictures to validate on")
    except (OSError, ValueError) as error:  # what is missing is part of the answer, not the end of it
        print(f"this would not start: {error}")


def open_data(args: TrainArgs) -> tuple[Any, Any]:
    """(training mixture or None, validation set or None).

    Raises:
        FileNotFoundError, ValueError: something named in the flags is not there; the message says what.
    """
    from dataset import build_eval, build_train

    train_data = val_data = None
    if not args.eval_only:
        names, rates = zip(*args.mixture(), strict=True)
        train_data = build_train(
            list(names),
            list(rates),
            args.dataset_dir,
            seed=args.seed,
            num_classes_per_sample=args.num_classes_per_sample,
            sem_seg_data=args.sem_seg_data,
            refer_seg_data=args.refer_seg_data,
            neg_refer_seg_data=args.neg_refer_seg_data,
            correct_refer_seg_data=args.correct_refer_seg_data,
            vqa_data=args.vqa_data,
            reason_seg_data=args.reason_seg_data,
            reason_seg_ignore=args.reason_seg_ignore,
            own_data=args.own_data,
            allow_missing=args.allow_missing,
        )
    if args.eval_only or not args.no_eval:
        val_data = build_eval(args.val_dataset, args.val_split, args.dataset_dir, protocol="forced")
    return train_data, val_data


def build_model(args: TrainArgs, world: World, log: RunLog) -> tuple[READForCausalLM, READProcessor]:
    """The base with this run's SasP and loss; for training with LoRA on, frozen and freed parts reported."""
    from model import READForCausalLM, READProcessor, add_lora, quantize_language_model, set_trainable
    from model.packing import takes_masks

    model = READForCausalLM.from_pretrained(
        args.version,
        dtype=torch_dtype(args.precision),
        attn_implementation=args.attn_implementation,
        vision_tower=args.vision_tower,
        sam_checkpoint=args.vision_pretrained,
    )
    args.configure(model.config)
    processor = READProcessor.from_pretrained(args.version, **args.processor(model.config))
    processor.check(model.config, args.version)
    if args.model_max_length < model.config.num_patches + 100:
        raise ValueError(
            f"--model_max_length {args.model_max_length} is too short: system prompt and picture alone take "
            f"{model.config.num_patches + 60} tokens or so, so that answers would be cut off and not learnt"
        )
    log.say(f"base: {args.version}, {args.precision}, {model.config.sasp}")
    if args.quantized:
        quantize_language_model(model, args.quantized, world.device)
    model.even_calls = args.zero_stage == 3
    model.share_prefix = args.share_prefix
    if args.share_prefix and not takes_masks(args.attn_implementation):
        log.say(f"--attn_implementation {args.attn_implementation} takes no mask: conversations about a picture share nothing")
    if not args.eval_only:
        add_lora(model, **args.lora())
        set_trainable(model, args.train_mask_decoder)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
    else:
        model.requires_grad_(False)
    if args.cache_dir:
        model.cache_sam_features(args.cache_dir)
    if args.zero_stage == 3 and not args.eval_only:
        return model, processor  # the engine moves it to the device piece by piece
    return model.to(world.device), processor


def build_loader(args: TrainArgs, mixture: Any, processor: READProcessor, world: World) -> Any:
    """Batches of the training mixture for this rank."""
    from torch.utils.data import DataLoader

    from dataset.collate import collate
    from dataset.mixture import Batches, EpochSampler, as_is

    batches = args.steps_per_epoch * args.grad_accumulation_steps
    workers = min(args.workers, os.cpu_count() or 1)  # more than there are cores only get into each other's way
    collated = partial(
        collate,
        processor=processor,
        training=True,
        padding="right",
        model_max_length=args.model_max_length,
        conv_type=args.conv_type,
    )
    return DataLoader(
        Batches(mixture, collated, args.strict),
        batch_size=args.batch_size,
        sampler=EpochSampler(batches, args.batch_size, world.rank, world.size),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=as_is,
        worker_init_fn=quiet_worker,
    )


# ------------------------------------------------------------------------------------------------ loop


def train(
    args: TrainArgs, engine: Any, processor: READProcessor, loader: Any, averages: dict[str, Averages], val_data: Any,
    world: World, log: RunLog, stopping: Stopping,
) -> int:  # fmt: skip
    """Epochs of training, each followed by validation and a checkpoint, until the steps or the time are used up.

    Args:
        averages: of `resume`.

    Returns:
        The signal that ended it after some step, 0 if none did. Its checkpoint is whole then.
    """
    from utils import distributed

    budget, step = Budget(args, world), engine.global_steps
    there = (args.run_dir / "ckpt_model" / f"step{step}").is_dir()
    late = there and is_measured_after(args, step) and (run_folder.read_best(args.run_dir) or {}).get("measured_step") != step
    late = distributed.from_main(late, world.device)  # it was stopped between saving and measuring
    over, asked = budget.steps_spent(step), 0
    while late or not over:
        if not late:
            asked = train_epoch(args, engine, loader, averages, budget, world, log, stopping)
            over = budget.spent(engine.global_steps)
            save(args, engine, averages, world)  # before it is measured: a failing validation costs no epoch
        late = False
        asked = asked or distributed.largest(stopping.asked, world.device)
        if asked:
            break
        with stopping.gently(False):  # a validation that is cut off is made up for when the run goes on
            measure(args, engine, processor, val_data, world, log)
    best = run_folder.read_best(args.run_dir)
    if engine.module.sam_cache is not None:
        log.say(str(engine.module.sam_cache))
    if asked:
        spoiling = [flag for flag, given in (("--overwrite", args.overwrite), ("--resume", args.resume)) if given]
        log.say(
            f"stopped by {name_of(asked)} after step {engine.global_steps}; saved: {args.run_dir / 'ckpt_model'}/"
            f"step{engine.global_steps}. The same command with --auto_resume"
            + (f" in place of {' and '.join(spoiling)}" if spoiling else "") + " goes on from there"
        )  # fmt: skip
        return asked
    log.say(
        f"done: {engine.global_steps} steps in {budget.elapsed():.0f} s; best checkpoint {best['tag'] if best else '-'}"
    )
    return 0


def is_measured_after(args: TrainArgs, step: int) -> bool:
    """True where an epoch ends."""
    return step > 0 and step % args.steps_per_epoch == 0


class Budget:
    """How much of the run is left, in steps and by the clock. All ranks hear the main process's clock."""

    def __init__(self, args: TrainArgs, world: World) -> None:
        self.args, self.device = args, world.device
        self.begin = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the loop began, the same number on every rank."""
        from utils import distributed

        return distributed.from_main(time.monotonic() - self.begin, self.device)

    def steps_spent(self, step: int) -> bool:
        """True once all epochs are done, or --max_steps."""
        total = self.args.epochs * self.args.steps_per_epoch
        return step >= (total if self.args.max_steps is None else min(total, self.args.max_steps))

    def spent(self, step: int) -> bool:
        """True once the steps are done or --time_limit_s is over."""
        if self.steps_spent(step):
            return True
        return self.args.time_limit_s is not None and self.elapsed() >= self.args.time_limit_s

    def cap_learning_rate(self, optimizer: Any) -> None:
        """Under --time_limit_s the learning rate falls to 0 by the clock where that is sooner than by the steps.

        Else a slow machine would stop at a high rate and give a worse model than it could.
        """
        if self.args.time_limit_s is None:
            return
        left = max(0.0, 1 - self.elapsed() / self.args.time_limit_s)
        for group in optimizer.param_groups:
            group["lr"] = min(group["lr"], self.args.lr * left)


def train_epoch(
    args: TrainArgs, engine: Any, loader: Any, averages: dict[str, Averages], budget: Budget, world: World, log: RunLog,
    stopping: Stopping,
) -> int:  # fmt: skip
    """Trains to the end of the epoch that the engine is in, until the budget is spent, or to the step in which a signal came.

    Saves every --save_every steps. Returns the signal, the same on all ranks, or 0.

    Raises:
        ValueError: the data is broken, and --strict is given or nothing else is left.
    """
    import torch
    from tqdm import tqdm

    from utils import distributed

    epoch, done = divmod(engine.global_steps, args.steps_per_epoch)
    loader.sampler.start_at(epoch, done * args.grad_accumulation_steps)
    recent, whole = averages["recent"], averages["whole"]
    if not done:
        whole.reset()
    broken: list[dict[str, Any]] = []
    asked = 0
    dtype = torch_dtype(args.precision)
    since, since_step = time.monotonic(), engine.global_steps
    bar = tqdm(
        total=args.steps_per_epoch,
        initial=done,
        desc=f"epoch {epoch + 1}/{args.epochs}",
        unit="step",
        disable=not log.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    with contextlib.closing(bar):
        for number, batch in enumerate(loader, start=engine.global_steps * args.grad_accumulation_steps):
            if isinstance(batch, ValueError):
                raise batch
            # Dropout is a function of the forward pass and the rank, so it needs no state to be resumed.
            torch.manual_seed((args.seed * 1_000_003 + number) * world.size + world.rank)
            batch = batch.to(world.device, dtype)
            output = engine(**batch.model_inputs())
            values = check_finite(output, batch, engine.global_steps)
            recent.add(values)
            whole.add(values)
            reasons = [why for sample in batch.samples for why in sample.meta.get("skipped", ())]
            broken += [{"step": engine.global_steps + 1, "why": why} for why in reasons]
            engine.backward(output.loss)
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            if not boundary:
                continue
            step = engine.global_steps
            bar.update()
            budget.cap_learning_rate(engine.optimizer)
            saves = bool(args.save_every) and step % args.save_every == 0 and not is_measured_after(args, step)
            # What a checkpoint or an epoch ends is recorded before it, so that a resumed run's records are the same.
            if saves or step % args.print_freq == 0 or is_measured_after(args, step):
                means = mean_over_ranks(recent, world)
                speed = (time.monotonic() - since) / (step - since_step)
                since, since_step = time.monotonic(), step
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
                norm = engine.get_global_grad_norm()
                log.record(
                    "train",
                    step,
                    {**means, "lr": engine.get_lr()[0], "grad_norm": float(norm or 0), "s_per_step": speed},
                )
                recent.reset()
                skip_on_all_ranks(broken, world, log)
            asked = distributed.largest(stopping.asked, world.device)
            if asked or budget.spent(step):
                break
            if saves:
                save(args, engine, averages, world)
    skip_on_all_ranks(broken, world, log)
    means = mean_over_ranks(whole, world)
    log.say(f"step {engine.global_steps}: mean of the epoch " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
    return asked


def skip_on_all_ranks(broken: list[dict[str, Any]], world: World, log: RunLog) -> None:
    """Counts every rank's broken samples, and forgets them here."""
    from utils import distributed

    if distributed.largest(len(broken), world.device):
        log.skip([one for ranks in distributed.gather_objects(broken) for one in ranks])
    broken.clear()


def check_finite(output: Any, batch: Any, step: int) -> dict[str, float | None]:
    """The loss terms as numbers.

    Raises:
        FloatingPointError: one is NaN or infinite; the message names the term and the samples.
    """
    import torch

    present = [name for name in TERMS if getattr(output, name) is not None]
    numbers = torch.stack([getattr(output, name).detach().float() for name in present]).tolist()  # one wait for the GPU
    bad = [f"{name} = {value}" for name, value in zip(present, numbers, strict=True) if not math.isfinite(value)]
    if bad:
        samples = [f"  {sample.image_path}: {sample.questions}" for sample in batch.samples]
        raise FloatingPointError(
            f"after step {step}: {', '.join(bad)}. This has not reached the weights; the last checkpoint is "
            "good. With fp16 try bf16, else a lower --lr. The samples of the batch:\n" + "\n".join(samples)
        )
    return dict.fromkeys(TERMS) | dict(zip(present, numbers, strict=True))


def mean_over_ranks(averages: Any, world: World) -> dict[str, float]:
    """Means over the steps and ranks."""
    import torch

    from utils import distributed

    totals = torch.tensor(averages.totals(), dtype=torch.float64, device=world.device)
    return averages.means(distributed.sum_over_ranks(totals).tolist())


def validate(
    args: TrainArgs, model: READForCausalLM, processor: READProcessor, data: Any, world: World, log: RunLog, step: int
) -> dict[str, Any]:
    """gIoU and cIoU on --val_dataset with the answers forced (§5)."""
    from utils.evaluate import evaluate

    scores = evaluate(model, processor, data, protocol="forced", rank=world.rank, world=world.size)
    log.record("val", step, {name: value for name, value in scores.items() if isinstance(value, int | float)})
    log.say(
        f"{args.val_dataset}|{args.val_split}, answers forced, after step {step}: gIoU {100 * scores['giou']:.2f}, "
        f"cIoU {100 * scores['ciou']:.2f} ({scores['images']} pictures, {scores['seconds']:.0f} s)"
    )
    return scores


# ------------------------------------------------------------------------------------------------ save and resume


def save(args: TrainArgs, engine: Any, averages: dict[str, Averages], world: World) -> None:
    """A checkpoint of this step, with the sums that its log lines lack yet; of the older ones the best is kept."""
    from utils import distributed
    from utils.engine import prune, save_checkpoint

    folder, best = args.run_dir / "ckpt_model", run_folder.read_best(args.run_dir)
    ranks = distributed.gather_objects({name: one.totals() for name, one in averages.items()})
    tag = save_checkpoint(engine, folder, world, args.save_frozen, beside={AVERAGES_NAME: ranks})
    prune(folder, {tag, best["tag"] if best else tag}, world)


def measure(
    args: TrainArgs, engine: Any, processor: READProcessor, val_data: Any, world: World, log: RunLog
) -> None:
    """Validates the checkpoint of this step and points best.json to it if its cIoU is the best so far.

    Without validation the last is the best.
    """
    from utils.engine import prune

    step, best, folder = engine.global_steps, run_folder.read_best(args.run_dir), args.run_dir / "ckpt_model"
    scores = validate(args, engine.module, processor, val_data, world, log, step) if val_data is not None else {}
    ciou, tag = scores.get("ciou"), f"step{step}"
    if ciou is None or best is None or best["ciou"] is None or not ciou <= best["ciou"]:
        best = {
            "tag": tag,
            "step": step,
            "ciou": ciou,
            "giou": scores.get("giou"),
            "val_dataset": f"{args.val_dataset}|{args.val_split}" if scores else None,
            "protocol": "forced" if scores else None,
        }
        log.say(f"checkpoint {folder / tag}: the best so far" if scores else f"checkpoint {folder / tag}")
    if world.is_main:
        run_folder.write_best(args.run_dir, {**best, "measured_step": step})
    prune(folder, {tag, best["tag"]}, world)


def resume(args: TrainArgs, engine: Any, world: World, log: RunLog) -> dict[str, Averages]:
    """Continues from --resume's last checkpoint, or with --auto_resume from this run's own if there is one.

    Returns:
        Means that are not logged yet: `recent`, since the last log line, and `whole`, of the epoch.
    """
    from utils.engine import load_checkpoint
    from utils.files import as_object, read_json, shown
    from utils.runlog import Averages

    averages = {"recent": Averages(TERMS), "whole": Averages(TERMS)}
    source = run_folder.source_of(args)
    if source is not None:
        path = Path(load_checkpoint(engine, source / "ckpt_model", world))
        log.say(f"resumed {path} after step {engine.global_steps}")
        if args.resume_with_changes:  # the optimiser's settings come with its states, from before the changes
            for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_lr(), strict=True):
                group.update(lr=lr, betas=(args.beta1, args.beta2))
        if (file := source / "ckpt_model" / f"step{engine.global_steps}" / AVERAGES_NAME).is_file():
            ranks = read_json(file)
            if not isinstance(ranks, list) or len(ranks) != world.size:
                raise ValueError(f"{file} must list sums of {world.size} processes, found {shown(ranks)}: delete it, go on")
            for name, one in averages.items():
                one.restore(as_object(ranks[world.rank], str(file)).get(name), f"{file}: {name}")
    return averages


if __name__ == "__main__":
    main()
