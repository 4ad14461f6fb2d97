"""How the page reads: a session in, fragments of HTML out. Every word that comes from a visitor or a model is escaped.

    stage(session, layers, chosen)   the picture with its layers, and what their colours mean
    talk(session)                    questions and answers, the newest first; `[SEG]` in the colour of its mask
    downloads(session)               links that hold the files themselves: mask PNG, RLE JSON, LabelMe JSON
    notice(words)                    what cannot be done, and why
    drop_zone(limits), header(model) what stands there from the beginning

Pictures and downloads are data within the page, so the server keeps no file that anybody could ask for.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Collection
from html import escape
from pathlib import PurePath

from PIL import Image

from utils import visualize
from utils.conversation import SEG_TOKEN

from .desk import Limits
from .session import Session, Turn

LAYERS = {"mask": "Mask", "points": "Points", "similarity": "Similarity"}
"""The layers of `visualize.layers_image`, and what they are called."""
ALL = "all"
POINTS = (
    '<p class="read-help">The similarity of [SEG] with the picture becomes points, and SAM draws the mask from them and from '
    "[SEG] itself. Whatever is moved here prompts SAM again; the language model does not run.</p>"
)


def header(model: str) -> str:
    """The head of the page."""
    return (
        '<div class="read-head"><h1>READ</h1><p>Ask a picture a question. It reasons, answers, and shows what it means.</p>'
        f'<span class="read-model" title="the model that answers">{escape(model)}</span></div>'
    )


def drop_zone(limits: Limits) -> str:
    """Where pictures are put in; zone.js listens to it."""
    size = f"up to {limits.upload_bytes / 2**20:.0f} MiB, {limits.pixels / 1e6:.3g} megapixels"
    return (
        f'<label class="read-zone" data-bytes="{limits.upload_bytes}">'
        '<input type="file" accept="image/jpeg,image/png,image/webp,image/bmp,image/gif" aria-label="Choose a picture">'
        '<span class="read-zone-icon" aria-hidden="true">&#8593;</span>'
        f"<span><b>Choose a picture</b>, drop or paste it<small>{size}</small></span>"
        '</label><p class="read-zone-said" role="alert"></p>'
    )


def notice(words: str) -> str:
    """A message; nothing for no words."""
    return f'<p class="read-notice" role="alert">{escape(words)}</p>' if words else ""


# ------------------------------------------------------------------------------------------------ the picture


def stage(session: Session | None, layers: Collection[str], chosen: str = ALL) -> str:
    """The picture with those of the LAYERS that are named, of all masks or of the one that is `chosen` ("1", "2", ...)."""
    if session is None:
        return (
            '<div class="read-empty"><p>Choose a picture or an example above.</p>'
            "<p>The answer comes with a mask for every [SEG] in it, the points that prompted SAM, and the similarity they come "
            "from.</p></div>"
        )
    answer, first = session.visible(), 0
    segments = visualize.segments_of(answer) if answer is not None else []
    if chosen.isdecimal() and 1 <= int(chosen) <= len(segments) > 1:
        first = int(chosen) - 1
        segments = segments[first : first + 1]
    picture = visualize.layers_image(session.picture, segments, layers, first)
    busy = session.turn is not None and not session.turn.ended
    shown = ", ".join(LAYERS[layer].lower() for layer in LAYERS if layer in layers) if segments else ""
    alt = f"The picture {session.name}" + (f" with {shown} of the answer" if shown else "")
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<img src="{_as_data(_jpeg(picture), "image/jpeg")}" alt="{escape(alt)}" {size}>'
    kind, legend = "read-stage busy" if busy else "read-stage", _legend(session, segments, layers, first)
    return f'<figure class="{kind}"><div class="frame">{image}</div>{legend}</figure>'


def _legend(session: Session, segments: list[visualize.Segment], layers: Collection[str], first: int) -> str:
    entries = []
    many = session.answer is not None and len(session.answer.masks) > 1
    for k, segment in enumerate(segments):
        if "mask" in layers:
            name = f"mask {first + k + 1}" if many else "mask"
            words = f"{name} {100 * segment.mask.mean():.1f} %, score {session.answer.scores[first + k]:.2f}"
            entries.append(f'<span><i class="square" style="{_tint(first + k)}"></i>{words}</span>')
    if "points" in layers and any(len(segment.labels) for segment in segments):
        for label, kind, colour in ((1, "object", visualize.POSITIVE), (0, "background", visualize.NEGATIVE)):
            count = sum(int((segment.labels == label).sum()) for segment in segments)
            entries.append(
                f'<span><i class="dot" style="background:rgb{colour}"></i>{count} {kind} point{"" if count == 1 else "s"}</span>'
            )
    if "similarity" in layers and segments:
        entries.append('<span><i class="ramp"></i>similarity with [SEG], low to high</span>')
    return f"<figcaption>{''.join(entries)}</figcaption>" if entries else ""


def masks_of(session: Session | None) -> list[str]:
    """What can be chosen among: ["all", "1", "2", ...] where several masks are on display, else ["all"]."""
    answer = session.visible() if session is not None else None
    count = len(answer.masks) if answer is not None else 0
    return [ALL, *map(str, range(1, count + 1))] if count > 1 else [ALL]


# ------------------------------------------------------------------------------------------------ the conversation


def talk(session: Session | None) -> str:
    """The turns as cards, the newest on top. One that is not on display is opened by its button; talk.js listens."""
    if session is None or not session.turns:
        return ""
    cards = [_card(session, n, turn) for n, turn in enumerate(session.turns)]
    return f'<ol class="read-talk" aria-live="polite">{"".join(reversed(cards))}</ol>'


def _card(session: Session, number: int, turn: Turn) -> str:
    shown = number == session.shown
    parts = [
        f'<button type="button" class="question" data-turn="{number}" aria-pressed="{str(shown).lower()}" '
        f'title="show this answer">{escape(turn.question)}</button>'
    ]
    if turn.text or not turn.ended:
        cursor = "" if turn.ended else '<span class="cursor" aria-hidden="true"></span>'
        parts.append(f'<p class="answer">{_with_pills(turn.text)}{cursor}</p>')
    parts += [f'<p class="note">{escape(note)}</p>' for note in _notes(session, turn, shown)]
    if turn.kept is not None and turn.kept.forced and not turn.anyway:
        parts.append(f'<button type="button" class="anyway" data-turn="{number}" data-anyway>Segment anyway</button>')
    return f'<li class="{"shown" if shown else ""}">{"".join(parts)}</li>'


def _notes(session: Session, turn: Turn, shown: bool) -> list[str]:
    """What is to be said about an answer besides its words."""
    notes = [turn.note] if turn.note else []
    if turn.kept is not None and turn.kept.forced:
        notes.append(
            "No [SEG] in this answer: the mask is that of a [SEG] at its end."
            if turn.anyway
            else "No [SEG] in this answer: the model points at nothing in the picture."
        )
    answer = session.visible() if shown else None
    if answer is not None and not all(mask.any() for mask in answer.masks):
        notes.append("A [SEG] was written, but its mask is empty.")
    return notes


def _with_pills(text: str) -> str:
    """Escaped words, each `[SEG]` a pill with the colour of its mask."""
    words, count = [], 0
    for part in re.split(f"({re.escape(SEG_TOKEN)})", text):
        if part == SEG_TOKEN:
            words.append(f'<span class="seg" style="{_tint(count)}">SEG</span>')
            count += 1
        else:
            words.append(escape(part))
    return "".join(words)


def _tint(index: int) -> str:
    return f"--tint:rgb{visualize.TINTS[index % len(visualize.TINTS)]}"


# ------------------------------------------------------------------------------------------------ downloads


def downloads(session: Session | None) -> str:
    """Links to the masks on display; nothing where there are none."""
    answer = session.visible() if session is not None else None
    if answer is None or not len(answer.masks) or session.turn is None:
        return ""
    stem, question = PurePath(session.name).stem, session.turn.question
    links = []
    for k, segment in enumerate(visualize.segments_of(answer)):
        number = f"_{k + 1}" if len(answer.masks) > 1 else ""
        words = f"PNG {k + 1}" if number else "PNG"
        buffer = io.BytesIO()
        visualize.mask_image(segment).save(buffer, "PNG")
        links.append(_link(f"{stem}_mask{number}.png", words, buffer.getvalue(), "image/png"))
    segments = zip(answer.to_rle(), answer.boxes, answer.scores, strict=True)
    rle = {
        "image": session.name,
        "question": question,
        "answer": answer.text,
        "masks": [{"rle": rle, "box": box.tolist(), "score": float(score)} for rle, box, score in segments],
    }
    for kind, content in (("RLE", rle), ("LabelMe", answer.to_labelme(session.name, question))):
        data = json.dumps(content, ensure_ascii=False).encode()
        links.append(_link(f"{stem}_{kind.lower()}.json", kind, data, "application/json"))
    return f'<div class="read-files" aria-label="Downloads">{"".join(links)}</div>'


def _link(name: str, words: str, data: bytes, kind: str) -> str:
    arrow = '<span aria-hidden="true">&#8595;</span>'
    return f'<a download="{escape(name)}" title="{escape(name)}" href="{_as_data(data, kind)}">{arrow} {escape(words)}</a>'


def _as_data(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def thumbnail(picture: Image.Image, side: int = 96) -> str:
    """A small square of a picture as a data URI."""
    shortest = min(picture.size)
    left, top = (picture.width - shortest) // 2, (picture.height - shortest) // 2
    small = picture.crop((left, top, left + shortest, top + shortest)).resize((side, side), Image.Resampling.LANCZOS)
    return _as_data(_jpeg(small), "image/jpeg")
