"""What the page does, without a word of Gradio: it looks at pictures, asks the model, prompts SAM again, and refuses.

    desk = Desk(predictor, Limits())
    desk.look(key, open_picture(data, limits), "street")          a picture, encoded once
    for _ in desk.ask(key, "the red cup"): ...                    the session's last turn grows with the answer
    desk.prompt_again(key, choose_points(desk.sasp, {"num_points": 10}))      SAM's decoder alone

Everything that a visitor can cause and may be told is a `Refused`. `key` names a visitor. The model serves one call at a time;
whoever comes meanwhile waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from utils.cli import one_line
from utils.conversation import SEG_TOKEN, Turns
from utils.image import decode_image

from .session import Session, Shelf, Turn

if TYPE_CHECKING:
    from model import READPredictor, SaspConfig

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is opened. Other decoders of PIL and OpenCV are seldom used and seldom tested, so nobody gets to feed them."""
MAX_SIDE = 16384
"""Pixels. SasP's interpolation matrices grow with the longest side, so the number of pixels alone is no bound."""
LEFT_S = 60.0
"""How long a picture is kept after its page was left."""
STOPPED = "Stopped."


class Refused(ValueError):
    """Something that does not work and why, in words for the visitor."""


class _Stopped(Exception):
    """Ends an answer that nobody waits for any more."""


@dataclasses.dataclass(frozen=True)
class _Writing:
    """A turn while its answer is written, between the thread that writes and the one that shows."""

    session: Session
    turn: Turn
    stop: threading.Event
    news: threading.Event = dataclasses.field(default_factory=threading.Event)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one visitor, and all together, can ask for."""

    upload_bytes: int = 10 * 2**20
    pixels: int = 16_000_000
    question: int = 500
    """Characters."""
    new_tokens: int = 256
    segments: int = 8
    """[SEG] in one answer. Each costs a float32 map of the picture, so a model made to repeat itself would fill the memory."""
    turns: int = 20
    """Questions about a picture that are remembered."""
    sessions: int = 8
    """Pictures that are remembered. Of a 7B model each holds a third of a GiB: keys and values of the image tokens."""
    idle_s: float = 900.0
    upload_s: float = 60.0
    """How long an image may take to arrive, once its request has begun; another request's body has `body_s`."""
    body_s: float = 15.0


def open_picture(data: bytes, limits: Limits) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the bytes that a visitor sent; how large it is, is read before it is decoded.

    Raises:
        Refused: too many bytes or pixels, damaged, or not one of FORMATS.
    """
    if len(data) > limits.upload_bytes:
        raise Refused(f"This file has {len(data) / 2**20:.1f} MiB; at most {limits.upload_bytes / 2**20:.0f} MiB are taken.")
    known = ", ".join(FORMATS[:-1]) + f" or {FORMATS[-1]}"
    most = f"at most {limits.pixels / 1e6:.3g} million are taken, {MAX_SIDE} a side. Make it smaller, and send it again."
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise Refused(f"This picture has far too many pixels; {most}") from None
    except Exception as error:  # a decoder raises whatever it stumbles over, and that is for the log
        logger.info("refused a picture: %r", error)
        raise Refused(f"This file cannot be opened as a picture. Send a {known} file that is whole.") from None
    if width * height > limits.pixels or max(width, height) > MAX_SIDE:
        raise Refused(f"This picture has {width} x {height} pixels; {most}")
    try:
        picture = decode_image(data, "This picture")
    except ValueError as error:
        raise Refused(one_line(error)) from None
    # The two decoders may disagree about a crafted file.
    if picture.shape[0] * picture.shape[1] > limits.pixels or max(picture.shape) > MAX_SIDE:
        raise Refused("This picture is not what its header says. Send another.")
    return picture


def plain_name(name: object) -> str:
    """A visitor's file name without folder, of letters, digits, and . - _ within: for the names of downloads, not a path."""
    last = re.split(r"[\\/]", str(name))[-1]
    return re.sub(r"[^\w.-]+", "_", last).strip("._")[-60:] or "picture"


def clean_question(question: object, limits: Limits) -> str:
    """The question on one line, without control characters.

    Raises:
        Refused: nothing, or too much.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(question or "")).split())
    if not text:
        raise Refused("Write a question first.")
    if len(text) > limits.question:
        raise Refused(f"This question has {len(text)} characters; at most {limits.question} are taken.")
    return text


def choose_points(sasp: SaspConfig, given: Mapping[str, Any]) -> SaspConfig:
    """`sasp` with the fields that a visitor set: enabled, num_points, t_pos, t_neg, down_sample, geometry.

    Raises:
        Refused: a value is out of range.
    """
    kinds = {"enabled": bool, "num_points": int, "t_pos": float, "t_neg": float, "down_sample": int, "geometry": str}
    try:
        fields = {name: kinds[name](value) for name, value in given.items()}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Refused("These settings cannot be read.") from None
    try:
        return dataclasses.replace(sasp, **fields)
    except ValueError as error:
        raise Refused(f"{one_line(error)}. The masks stay as they are.") from None


class Desk:
    """A model, the pictures that visitors put before it, and what they ask."""

    def __init__(self, predictor: READPredictor, limits: Limits | None = None) -> None:
        self.predictor, self.limits = predictor, limits or Limits()
        self.sasp: SaspConfig = predictor.model.config.sasp
        """How points are chosen unless a visitor says otherwise."""
        self.sessions: Shelf[Session] = Shelf(self.limits.sessions, self.limits.idle_s)
        self._model = threading.Lock()

    @property
    def tokens(self) -> int:
        """P, image tokens of a picture: there cannot be more points."""
        return self.predictor.processor.num_patches

    def session(self, key: str) -> Session:
        """The visitor's session.

        Raises:
            Refused: there is none (any more).
        """
        if (session := self.sessions.get(key)) is None:
            minutes = self.limits.idle_s / 60
            raise Refused(
                "There is no picture to ask about. Choose one first; after "
                f"{minutes:.0f} minutes without a question, or when others need the room, it is put away."
            )
        return session

    def look(self, key: str, picture: np.ndarray, name: str, suggestions: tuple[str, ...] = ()) -> Session:
        """Encodes a picture (H, W, 3) uint8 RGB and begins a conversation about it; the visitor's last one is forgotten.

        Raises:
            Refused: there is not enough memory for it.
        """
        with self._model, _enough_memory():
            images = self.predictor.encode([picture])
        # More questions will come: with this the first one already leaves the encoded beginning of its prompt behind.
        images.asked = True
        session = Session(picture, name, images, suggestions=suggestions)
        self.sessions.put(key, session)
        return session

    def leave(self, key: str) -> None:
        """The visitor's page is gone. A phone that slept comes back within a minute and finds everything; else it is dropped."""
        self.sessions.fade(key, LEFT_S)

    def ask(self, key: str, question: object, sasp: SaspConfig | None = None, follow_up: bool = False) -> Iterator[Session]:
        """Asks about the visitor's picture; the session, time and again, while its last turn grows, and at last with masks.

        A question that fails leaves its turn behind, with a note. Who stops iterating ends the answer.

        Args:
            follow_up: the model sees the earlier questions and answers too.

        Raises:
            Refused: no picture, or no question; nothing has changed then.
        """
        session = self.session(key)
        turn = Turn(clean_question(question, self.limits))
        earlier: Turns = [(t.question, t.text) for t in session.turns if t.kept is not None] if follow_up else []
        session.turns = [*session.turns, turn][-self.limits.turns :]
        session.shown, session.answer, session.stop = len(session.turns) - 1, None, threading.Event()
        writing = _Writing(session, turn, session.stop)
        worker = threading.Thread(target=self._answer, args=(writing, earlier, sasp), daemon=True)
        try:
            yield session
            worker.start()
            ended = False
            while not ended:
                writing.news.wait()
                writing.news.clear()
                # Looked up before the text is shown: what comes meanwhile, the end too, is shown next, in one piece.
                ended = writing.done.is_set()
                yield session
        finally:
            writing.stop.set()
            if worker.ident is not None:
                worker.join()
            elif not turn.ended:
                turn.note = STOPPED

    def _answer(self, writing: _Writing, earlier: Turns, sasp: SaspConfig | None) -> None:
        """Runs in a thread of its own; what becomes of the turn is left in it."""
        session, turn = writing.session, writing.turn

        def tell(text: str) -> None:
            if writing.stop.is_set():
                raise _Stopped
            if text.count(SEG_TOKEN) > self.limits.segments:
                raise Refused(f"More than {self.limits.segments} {SEG_TOKEN} in one answer are not drawn.")
            turn.text = text
            writing.news.set()

        try:
            with self._model, _enough_memory():
                tell("")  # whoever gave up while others were served costs nothing
                answer, kept = self.predictor.answer(
                    session.images, [*earlier, (turn.question, None)], sasp=sasp or self.sasp, tell=tell,
                    max_new_tokens=self.limits.new_tokens,
                    force_segment=True,  # a mask that is wanted anyway is there at once, and the language model ran once
                )  # fmt: skip
            turn.text, turn.kept = answer.text, kept
            if session.turn is turn:
                session.answer = answer
        except _Stopped:
            turn.note = STOPPED
        except ValueError as error:  # a question that holds a mark of the prompt format, or is too long with all before it
            turn.note = one_line(error)
        except Exception:
            logger.exception("an answer failed")
            turn.note = "Something went wrong here; the server's log says what."
        finally:
            writing.done.set()
            writing.news.set()

    def stop(self, key: str) -> None:
        """Ends the answer that is being written, if there is one."""
        if (session := self.sessions.get(key)) is not None:
            session.stop.set()

    def show(self, key: str, shown: object, sasp: SaspConfig | None = None) -> Session:
        """Puts the turn number `shown` on display, and draws its masks again.

        Raises:
            Refused: no picture, or no such turn.
        """
        session = self.session(key)
        if not isinstance(shown, int) or not 0 <= shown < len(session.turns):
            raise Refused("There is no such question.")
        session.shown = shown
        return self.prompt_again(key, sasp)

    def show_anyway(self, key: str, shown: object, sasp: SaspConfig | None = None) -> Session:
        """As `show`, with the mask of an answer without [SEG]."""
        session = self.show(key, shown, sasp)
        session.turns[session.shown].anyway = True
        return session

    def prompt_again(self, key: str, sasp: SaspConfig | None = None) -> Session:
        """Draws the masks of the turn on display with other points; the language model does not run.

        Raises:
            Refused: no picture, or not enough memory.
        """
        session = self.session(key)
        turn = session.turn
        if turn is not None and turn.kept is not None:
            with self._model, _enough_memory():
                session.answer = self.predictor.prompt_again(turn.kept, sasp or self.sasp)
        elif turn is None or turn.ended:
            session.answer = None
        return session


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Turns a lack of memory, on a GPU or off it, into words."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        logger.exception("out of memory")
        raise Refused("There is not enough memory for this picture here. Try a smaller one.") from None
