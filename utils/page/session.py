"""What the page keeps: pictures with what was asked about them, a bounded number of them, for a bounded time.

    shelf = Shelf(limit=8, idle_s=900)
    shelf.put(key, Session(picture, name, images))
    session = shelf.get(key)                          None once it was idle too long, or had to make room
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import numpy as np

    from model import Answer, EncodedImages, KeptAnswer

T = TypeVar("T")


@dataclasses.dataclass
class Turn:
    """One question about a picture, and what came of it."""

    question: str
    text: str = ""
    """The answer as far as it is written."""
    note: str = ""
    """Why there is no more than that, for the visitor."""
    kept: KeptAnswer | None = None
    """What SAM is prompted from again; None while the answer is written, and if it never ended."""
    anyway: bool = False
    """The visitor wants the mask although the answer holds no [SEG]."""

    @property
    def ended(self) -> bool:
        return self.kept is not None or bool(self.note)


@dataclasses.dataclass
class Session:
    """One visitor's picture and the conversation about it."""

    picture: np.ndarray
    """(H, W, 3) uint8 RGB."""
    name: str
    """Of its file, without a folder; harmless in any file name. Downloads are named after it."""
    images: EncodedImages
    """What the model knows of the picture: made once, for all questions."""
    turns: list[Turn] = dataclasses.field(default_factory=list)
    shown: int = -1
    """Which of the turns is on display; -1 before the first question."""
    answer: Answer | None = None
    """Of the turn on display, the one answer whose masks are kept: those of others are drawn again when they are shown."""
    suggestions: tuple[str, ...] = ()
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set to end the answer that is being written."""

    @property
    def turn(self) -> Turn | None:
        """The turn on display."""
        return self.turns[self.shown] if 0 <= self.shown < len(self.turns) else None

    def visible(self) -> Answer | None:
        """The answer on display if its masks are to be seen: its [SEG] were written, or a mask was asked for all the same."""
        if self.answer is None or self.turn is None or (self.answer.forced and not self.turn.anyway):
            return None
        return self.answer


class Shelf(Generic[T]):
    """Things by key, the least recently used of which go first: when there are too many, and when nobody asked for long."""

    def __init__(self, limit: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.idle_s, self.clock = limit, idle_s, clock
        self._things: OrderedDict[str, tuple[float, T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._things)

    def put(self, key: str, thing: T) -> None:
        """Keeps a thing instead of what was there under that key; the oldest makes room."""
        with self._lock:
            self._things[key] = (self.clock(), thing)
            self._things.move_to_end(key)
            while len(self._things) > self.limit:
                self._things.popitem(last=False)

    def get(self, key: str) -> T | None:
        """The thing, which thereby is used; None if it is not kept (any more)."""
        self.sweep()
        with self._lock:
            if key not in self._things:
                return None
            thing = self._things[key][1]
            self._things[key] = (self.clock(), thing)
            self._things.move_to_end(key)
            return thing

    def pop(self, key: str) -> T | None:
        """Takes a thing away."""
        self.sweep()
        with self._lock:
            return self._things.pop(key, (0.0, None))[1]

    def fade(self, key: str, left_s: float) -> None:
        """Keeps a thing for no longer than `left_s` from now, unless it is used again."""
        with self._lock:
            if key in self._things:
                used, thing = self._things[key]
                self._things[key] = (min(used, self.clock() - self.idle_s + left_s), thing)

    def sweep(self) -> None:
        """Drops what was idle too long. Call it now and then, so that memory comes back although nobody asks."""
        with self._lock:
            for key in [key for key, (used, _) in self._things.items() if self.clock() - used >= self.idle_s]:
                del self._things[key]
