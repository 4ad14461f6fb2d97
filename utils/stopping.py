"""Signals that ask a program to stop, and processes that must not outlive the one that started them.

    with Stopping("train_read.py") as stopping:     from here on a signal ends the program with one line, not with a traceback
        with stopping.gently(): ...                 the first one only sets `stopping.asked`; one more ends the program
    DataLoader(..., worker_init_fn=quiet_worker)    workers leave signals to their process, and end with it
    end_with_launcher()                             a rank whose launcher was killed ends too

SIGINT is Ctrl-C, SIGTERM what `kill` and schedulers send, SIGUSR1 what SLURM sends when time runs short (--signal=USR1@120).
The exit status is 128 + the signal's number: 130, 143, 138.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ONE_REQUEST_S = 0.5
"""What comes again within so many seconds is the same request, which `timeout` or a launcher passed on as well."""
UNWIND_S = 5.0
"""So long may the main thread take to end by itself; it may be waiting for another rank in code that handles no signal."""
ORPHAN_S = 30.0
"""So long may a rank take to save after its launcher has gone."""
LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torchrun", "torch.distributed.run")
PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """The end of a program that a signal stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def name_of(number: int) -> str:
    """SIGINT, SIGTERM, ..."""
    return signal.Signals(number).name


class Stopping:
    """What signals ask of this program, between entering and leaving a `with` block."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.asked = 0
        """The signal that asks for a gentle end; 0 while there is none."""
        self._gentle = self._told = False
        self._handlers: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._launched = "LOCAL_RANK" in os.environ

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals reach the main thread alone
        heard: dict[int, float] = {}
        self._handlers = {number: signal.signal(number, lambda got, _: self._handle(got, heard)) for number in SIGNALS}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread, which closes the other end
        if self._timer is not None:
            self._timer.cancel()

    @contextlib.contextmanager
    def gently(self, gentle: bool = True) -> Iterator[None]:
        """While the block runs, the first signal only sets `asked`; with False it ends the program, as outside."""
        before, self._gentle = self._gentle, gentle
        try:
            yield
        finally:
            self._gentle = before

    def _handle(self, number: int, heard: dict[int, float]) -> None:
        """In the main thread: asks, or ends the program by an exception."""
        what = self._meaning(number, heard)
        if what == "ask":
            self.asked = self.asked or number
            _say(f"\n{self.program}: {name_of(number)}: finishes this step and saves; once more stops at once")
        elif what == "end":
            self._told = True
            _say(f"\n{self.program}: stopped by {name_of(number)}")
            raise Stopped(number)

    def _watch(self, pipe: int) -> None:
        """In a thread: hears each signal at once, and ends a program whose main thread cannot."""
        heard: dict[int, float] = {}
        with open(pipe, "rb", buffering=0) as signals:
            while got := signals.read(1):
                if got[0] in SIGNALS and self._meaning(got[0], heard) == "end" and self._timer is None:
                    self._timer = threading.Timer(UNWIND_S, self._end, got)
                    self._timer.daemon = True
                    self._timer.start()

    def _meaning(self, number: int, heard: dict[int, float]) -> str:
        """`ask`, `end`, or `again` for what is no new request; `heard` has the first time of each kind that was heard."""
        now = time.monotonic()
        if 0 in heard:  # it is ending
            return "again"
        if not self._gentle:
            heard[0] = now
            return "end"
        if not heard:
            heard[number] = now
            return "ask"
        # A launcher answers Ctrl-C with SIGTERM, to one rank after the other: another kind than the first is no second request.
        first = heard.setdefault(number, now) if self._launched else min(heard.values())
        if now - first <= ONE_REQUEST_S:
            return "again"
        heard[0] = now
        return "end"

    def _end(self, number: int) -> None:
        if not self._told:
            _say(f"\n{self.program}: stopped by {name_of(number)}")
        exit_now(128 + number)


def exit_now(status: int) -> None:
    """Ends this process and its workers, whatever its main thread waits for."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _say(text: str) -> None:
    """A line on stderr, also from within a signal handler; of several ranks only the first writes it."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


# ------------------------------------------------------------------------------------------------ processes that must end too


def quiet_worker(_: int = 0) -> None:
    """For a DataLoader's `worker_init_fn`: a worker ends when its process says so, or has ended; until then a step can go on."""
    parent = os.getppid()
    signal.set_wakeup_fd(-1)
    for number in set(SIGNALS) - {signal.SIGTERM}:  # a terminal sends them to all processes
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    # DeepSpeed's launcher sends SIGTERM to workers too. From the process itself it ends them, as torch expects.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def end_with_launcher() -> None:
    """Watches the launcher that started this rank, from a thread.

    When it is gone, the rank gets SIGTERM, and ends `ORPHAN_S` later at the latest.
    Of DeepSpeed's launcher, which is two processes, both are watched. A rank that was started by hand under nohup is left alone.
    """
    import psutil

    parents = psutil.Process().parents()
    watched = [parents[0]] if parents and (_launches(parents[0]) or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN) else []
    for above in parents[1:]:
        if not (watched and _launches(above)):
            break
        watched.append(above)

    def watch() -> None:
        while all(_lives(process) for process in watched):
            time.sleep(1)
        _say("\nthe launcher of this run is gone: it ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_S)
        exit_now(128 + signal.SIGTERM)

    if watched:
        threading.Thread(target=watch, daemon=True).start()


def is_launched() -> bool:
    """True if a launcher of ranks started this process."""
    import psutil

    parent = psutil.Process().parent()
    return parent is not None and _launches(parent)


def _launches(process: Any) -> bool:
    """True of DeepSpeed's launcher and torchrun."""
    import psutil

    try:
        return any(word in LAUNCHERS or Path(word).name in LAUNCHERS for word in process.cmdline())
    except psutil.Error:
        return False


def _lives(process: Any) -> bool:
    """False for a process that has ended, also where nobody has taken notice yet."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
