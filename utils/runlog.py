"""What a run says: lines on the screen, curves for TensorBoard (and W&B), and one JSON object a record in RUN/log.jsonl.

Only the main process speaks; on other ranks every call does nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.args import CONFIG_NAME
from utils.files import read_jsonl, read_object, shown, write_text

SHOWN = 20
"""So many kinds of broken samples are told at the end, the rest is counted."""


class _TqdmHandler(logging.Handler):
    """Prints log lines without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(speaks: bool = True) -> None:
    """Sends this project's log lines to the screen (only warnings on ranks that do not speak) and calms DeepSpeed."""
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _TqdmHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in ("model", "dataset", "utils", "read"):
        logging.getLogger(name).setLevel(logging.INFO if speaks else logging.WARNING)
    calm = logging.getLogger("DeepSpeed")
    calm.setLevel(logging.WARNING)
    calm.propagate = False
    # Its scheduler says so each time it is made, and is right to start from 0.
    calm.addFilter(lambda record: "before it has started" not in record.getMessage())


class RunLog:
    """The voice of one run. With `folder` None (or on another rank than 0) nothing is written."""

    def __init__(
        self, folder: Path | None, is_main: bool = True, after_step: int = 0, measured_step: int = 0,
        wandb_name: str | None = None,
    ) -> None:  # fmt: skip
        """`after_step`: the step that a run goes on from; what it logged later, before it was cut off, is forgotten, and so
        is a validation after `measured_step`, which will be done again.

        `wandb_name` sends the curves to Weights & Biases too, under this name (with WANDB_MODE=offline to RUN/wandb).

        Raises:
            ModuleNotFoundError: W&B is asked for and not installed.
        """
        self.is_main = is_main
        self._logger = logging.getLogger("read")
        self._lines = self._curves = self._wandb = self._broken = None
        self.skipped: Counter[str] = Counter()
        """Broken samples of this run, of all ranks, by what is wrong with them."""
        if folder is None or not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "skipped.jsonl"):
            drop_records(folder / name, after_step, measured_step)
        self._lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._broken = folder / "skipped.jsonl"
        if self._broken.is_file() and self._broken.stat().st_size:
            self.skipped.update(record["why"] for _, record in read_jsonl(self._broken))
        self._curves = SummaryWriter(str(folder), flush_secs=30, purge_step=after_step + 1)
        if wandb_name is not None:
            import wandb

            self._wandb = wandb.init(
                project="READ", name=wandb_name, id=wandb_id(folder), dir=str(folder), resume="allow",
                config=read_object(folder / CONFIG_NAME),
            )  # fmt: skip

    def say(self, text: str) -> None:
        """One line (or more) on the screen."""
        if self.is_main:
            self._logger.info("%s", text)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Keeps the numbers of one moment: `kind` is train, val, ...; `step` counts optimiser steps."""
        if self._lines is None:
            return
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in values.items()}
        try:
            self._lines.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 1), **clean}) + "\n")
            self._lines.flush()
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._curves.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:  # a full disk: it names no file by itself
            raise OSError(f"{self._lines.name} cannot be written: {error.strerror or error}") from error
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def skip(self, broken: Sequence[dict[str, Any]]) -> None:
        """Counts broken samples, each a `step` and `why`; what is new is said, and all are kept in RUN/skipped.jsonl."""
        for record in broken:
            if record["why"] not in self.skipped:
                self.say(f"a broken sample is skipped: {record['why']}")
            self.skipped[record["why"]] += 1
        if broken and self._broken is not None:
            with self._broken.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"kind": "skipped", **record}) + "\n" for record in broken)

    def say_skipped(self) -> None:
        """What was skipped in the whole run, if anything was."""
        if self.skipped:
            told = [f"{count} x {why}" for why, count in self.skipped.most_common(SHOWN)]
            more = [f"and {len(self.skipped) - SHOWN} more, in {self._broken}"] if len(self.skipped) > SHOWN else []
            self.say("\n  ".join([f"{self.skipped.total()} broken samples were skipped:", *told, *more]))

    def close(self) -> None:
        """Flushes curves and lines."""
        if self._lines is not None:
            self._lines.close()
            self._curves.close()
            self._lines = self._curves = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers, as far as it is installed: to evaluate, DeepSpeed need not be."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "deepspeed", "segment-anything", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def drop_records(file: Path, after_step: int, measured_step: int) -> None:
    """Removes from a log.jsonl what was logged after a step, validations after another, and half a line at the end."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] > (measured_step if record["kind"] == "val" else after_step):
                continue
        except (ValueError, KeyError, TypeError):  # cut off while it was written
            continue
        kept.append(line + "\n")
    write_text(file, "".join(kept))


def wandb_id(folder: Path) -> str:
    """Drawn once a run and kept with it, so that what is resumed goes on in one curve."""
    file = folder / "wandb_id"
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


class Averages:
    """Means of named values over the steps since the last reset; the sums can be added up over ranks.

    A value that does not occur in a step (a loss term that is off) does not count into its mean.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = dict.fromkeys(self.names, 0.0)
        self._counts = dict.fromkeys(self.names, 0)

    def add(self, values: dict[str, float | None]) -> None:
        """Counts one step."""
        for name, value in values.items():
            if value is not None:
                self._sums[name] += value
                self._counts[name] += 1

    def totals(self) -> list[float]:
        """Sums, then counts: what ranks add up."""
        return [*self._sums.values(), *map(float, self._counts.values())]

    def restore(self, totals: Any, where: str) -> None:
        """Takes up what `totals` gave in a run that was cut off.

        Raises:
            ValueError: it is something else; the message begins with `where`.
        """
        wanted = 2 * len(self.names)
        are_numbers = isinstance(totals, list) and all(type(n) in (int, float) and math.isfinite(n) for n in totals)
        if not are_numbers or len(totals) != wanted:
            raise ValueError(f"{where}: must be a list of {wanted} numbers, found {shown(totals)}: delete the file, then go on")
        self._sums = dict(zip(self.names, totals[: len(self.names)], strict=True))
        self._counts = {name: int(n) for name, n in zip(self.names, totals[len(self.names) :], strict=True)}

    def means(self, totals: list[float]) -> dict[str, float]:
        """Mean of each value that occurred, from totals added up over ranks."""
        sums, counts = totals[: len(self.names)], totals[len(self.names) :]
        return {name: s / c for name, s, c in zip(self.names, sums, counts, strict=True) if c}
