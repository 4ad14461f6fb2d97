"""Where things stand on the page, and what happens when they are touched: Gradio's components and events around a `Desk`.

    blocks = build(desk, tickets, examples, model)      Gradio's Blocks, to be mounted behind the gate

Gradio is imported when `build` is called and not before, since it is an extra. Handlers get a request, whose session hash names
the visitor, and plain values; whatever fails becomes a notice. All that runs the model shares one place in Gradio's queue.
"""

# No `from __future__ import annotations` here: Gradio finds the request by the annotations of handlers within a function.
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from utils.files import read_text

from . import markup
from .desk import Desk, Refused, choose_points, open_picture
from .gate import Tickets
from .session import Session

HERE = Path(__file__).resolve().parent
SUGGESTIONS = 3
CHOSEN = "chosen"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to begin with."""

    picture: np.ndarray
    """(H, W, 3) uint8 RGB."""
    name: str
    questions: tuple[str, ...]
    """What may be asked about it; the first three become buttons."""


def build(desk: Desk, tickets: Tickets, examples: Sequence[Example], model: str) -> Any:
    """The page as Gradio's Blocks; `tickets` are the gate's pictures, `model` is the name that is shown.

    Raises:
        ImportError: Gradio is not installed.
    """
    import gradio as gr

    with gr.Blocks(title="READ", analytics_enabled=False, fill_width=True) as page:
        parts = _place(desk, examples, model)
        _connect_pictures(parts, desk, tickets, examples)
        _connect_questions(parts, desk)
        _connect_display(parts, desk)

        def on_leave(request: gr.Request) -> None:
            desk.leave(request.session_hash)

        page.unload(on_leave)
    return page.queue(max_size=64, api_open=False)


def takes(page: Any, index: int, values: Sequence[Any]) -> bool:
    """Whether the page has a function of that index, and each of the values is one that its component can have.

    Gradio asks the components too, but leaves a traceback behind if they say no.
    """
    function = page.fns.get(index)
    if function is None or len(function.inputs) != len(values):
        return False
    for component, value in zip(function.inputs, values, strict=True):
        if component.elem_id == CHOSEN:  # what can be chosen depends on the answer
            if not isinstance(value, str):
                return False
            continue
        try:
            component.preprocess(value)
        except Exception:  # each raises what it stumbles over
            return False
    return True


def style(examples: Sequence[Example]) -> str:
    """The page's CSS, with the examples' thumbnails in it."""
    thumbs = [
        f".read-pick-{n}::before {{ background-image: url({markup.thumbnail(Image.fromarray(example.picture))}); }}"
        for n, example in enumerate(examples)
    ]
    return "\n".join([read_text(HERE / "style.css"), *thumbs])


def theme() -> Any:
    """Gradio's theme in our colours and the visitor's own fonts: nothing is fetched from elsewhere."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.sky, neutral_hue=gr.themes.colors.slate, radius_size=gr.themes.sizes.radius_lg,
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    ).set(  # the theme's own colours are too pale to be read by all
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ components


def _place(desk: Desk, examples: Sequence[Example], model: str) -> SimpleNamespace:
    """All components, by name; `settings` are those of SasP by the names of its fields."""
    import gradio as gr

    parts = SimpleNamespace()
    plain: dict[str, Any] = {"apply_default_css": False, "js_on_load": None}
    bare: dict[str, Any] = {"container": False, "show_label": False}
    gr.HTML(markup.header(model), **plain)
    with gr.Row(elem_classes="read-start", equal_height=True):
        parts.zone = gr.HTML(markup.drop_zone(desk.limits), apply_default_css=False, js_on_load=_script("zone"))
        parts.picks = [
            gr.Button(example.questions[0], elem_classes=f"read-pick read-pick-{n}", min_width=150)
            for n, example in enumerate(examples)
        ]
    parts.notice = gr.HTML("", **plain)
    with gr.Row(elem_classes="read-main"):
        with gr.Column(scale=3, min_width=300):
            parts.stage = gr.HTML(markup.stage(None, ()), **plain)
            with gr.Row(elem_classes="read-layers"):
                layers = [(words, layer) for layer, words in markup.LAYERS.items()]
                parts.layers = gr.CheckboxGroup(layers, value=["mask", "points"], label="Layers", elem_id="layers", **bare)
                parts.chosen = gr.Radio(
                    [markup.ALL], value=markup.ALL, label="Masks", elem_id=CHOSEN, visible=False, **bare
                )
                parts.files = gr.HTML("", **plain)
        with gr.Column(scale=2, min_width=300):
            parts.question = gr.Textbox(
                label="Question", placeholder="Which of these can carry my books?", elem_id="question",
                lines=1, max_lines=4, max_length=desk.limits.question, **bare,  # with one line, Enter asks
            )  # fmt: skip
            with gr.Row(elem_classes="read-ask"):
                parts.follow_up = gr.Checkbox(
                    False, label="With earlier turns", container=False, elem_id="follow-up", min_width=120
                )
                parts.ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                parts.stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, min_width=90)
            with gr.Row(elem_classes="read-hints"):
                parts.hints = [
                    gr.Button("", visible=False, size="sm", elem_classes="read-hint", min_width=120)
                    for _ in range(SUGGESTIONS)
                ]
            parts.talk = gr.HTML("", apply_default_css=False, js_on_load=_script("talk"))
            with gr.Accordion("Points: how SAM is prompted", open=False, elem_id="points"):
                gr.HTML(markup.POINTS, **plain)
                parts.settings = _place_settings(desk)
                parts.reset = gr.Button("As trained", size="sm", elem_id="reset")
    parts.view = [parts.notice, parts.stage, parts.talk, parts.files, parts.chosen]
    parts.fields = list(parts.settings.values())
    return parts


def _place_settings(desk: Desk) -> dict[str, Any]:
    import gradio as gr

    sasp, most = desk.sasp, desk.tokens

    def slider(name: str, low: int, high: int, words: str, step: float = 1) -> gr.Slider:
        return gr.Slider(low, high, getattr(sasp, name), step=step, label=words, elem_id=name)

    return {
        "enabled": gr.Checkbox(sasp.enabled, label="Points on (off: [SEG] alone)", elem_id="enabled"),
        "num_points": slider("num_points", 1, most, "K: points a mask"),
        "t_pos": slider("t_pos", 0, 1, "t_pos: object from here on", 0.01),
        "t_neg": slider("t_neg", 0, 1, "t_neg: background up to here", 0.01),
        "down_sample": slider("down_sample", 1, max(4, sasp.down_sample), "down_sample: tokens along a cell"),
        "geometry": gr.Radio(
            ["released", "exact"], value=sasp.geometry, label="geometry: where points are put", elem_id="geometry"
        ),
    }


# ------------------------------------------------------------------------------------------------ events

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
WITH_MODEL = {**QUIET, "concurrency_id": "model", "concurrency_limit": 1}


def _connect_pictures(
    parts: SimpleNamespace, desk: Desk, tickets: Tickets, examples: Sequence[Example]
) -> None:
    """An upload or an example begins a conversation."""
    import gradio as gr

    outputs = [*parts.view, *parts.hints]

    def begin(session: Session, shown: Any) -> list[Any]:
        said = session.suggestions[:SUGGESTIONS]
        unused = [gr.update(visible=False)] * (SUGGESTIONS - len(said))
        return [*_view(session, shown), *(gr.update(value=text, visible=True) for text in said), *unused]

    @_guarded(outputs)
    def on_upload(request: gr.Request, event: gr.EventData, shown: Any) -> list[Any]:
        found = tickets.pop(str(_said(event).get("ticket")))
        if found is None:
            raise Refused("This picture did not arrive; send it again.")
        return begin(desk.look(request.session_hash, open_picture(found[0], desk.limits), found[1]), shown)

    def on_pick(example: Example) -> Callable[..., list[Any]]:
        @_guarded(outputs)
        def pick(request: gr.Request, shown: Any) -> list[Any]:
            return begin(desk.look(request.session_hash, example.picture, example.name, example.questions), shown)

        return pick

    parts.zone.upload(on_upload, parts.layers, outputs, **WITH_MODEL)
    for button, example in zip(parts.picks, examples, strict=True):
        button.click(on_pick(example), parts.layers, outputs, **WITH_MODEL)


def _connect_questions(parts: SimpleNamespace, desk: Desk) -> None:
    """A question is typed or picked; the answer grows; it can be stopped."""
    import gradio as gr

    inputs, outputs = [parts.follow_up, parts.layers, *parts.fields], [*parts.view, parts.ask, parts.stop, parts.question]

    def answering(key: str, words: Any, values: Sequence[Any], clear: bool) -> Iterator[list[Any]]:
        """Values of `outputs`, time and again."""
        later, shown, *settled = values
        begins = True
        try:
            for session in desk.ask(key, words, _points(desk, parts, settled), bool(later)):
                if begins or session.turn is None or session.turn.ended:
                    drawn = _view(session, shown)
                else:  # the words alone have changed
                    drawn = [gr.skip(), gr.skip(), markup.talk(session), gr.skip(), gr.skip()]
                box = gr.update(value="") if clear and begins else gr.skip()
                yield [*drawn, gr.update(visible=False), gr.update(visible=True), box]
                begins = False
        except Exception as error:
            yield _refuse(error, len(outputs))
        yield [*[gr.skip()] * len(parts.view), gr.update(visible=True), gr.update(visible=False), gr.skip()]

    def on_ask(request: gr.Request, words: Any, *values: Any) -> Iterator[list[Any]]:
        yield from answering(request.session_hash, words, values, clear=True)

    def on_hint(number: int) -> Callable[..., Iterator[list[Any]]]:
        def hint(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
            session = desk.sessions.get(request.session_hash)
            said = session.suggestions[number] if session is not None and number < len(session.suggestions) else ""
            yield from answering(request.session_hash, said, values, clear=False)

        return hint

    def on_stop(request: gr.Request) -> None:
        desk.stop(request.session_hash)

    gr.on([parts.question.submit, parts.ask.click], on_ask, [parts.question, *inputs], outputs, **WITH_MODEL)
    for number, button in enumerate(parts.hints):
        button.click(on_hint(number), inputs, outputs, **WITH_MODEL)
    # In the queue, beside the model: what goes past the queue goes by a route that the gate does not open.
    parts.stop.click(on_stop, None, None, concurrency_limit=None, **QUIET)


def _connect_display(parts: SimpleNamespace, desk: Desk) -> None:
    """Another turn, other layers, other points."""
    import gradio as gr

    redrawn = [parts.notice, parts.stage, parts.talk, parts.files]

    @_guarded(parts.view)
    def on_select(request: gr.Request, event: gr.EventData, shown: Any, *settled: Any) -> list[Any]:
        said = _said(event)
        change = desk.show_anyway if said.get("anyway") else desk.show
        return _view(change(request.session_hash, said.get("turn"), _points(desk, parts, settled)), shown)

    @_guarded([parts.notice, parts.stage])
    def on_layers(request: gr.Request, shown: Any, which: Any) -> list[Any]:
        return ["", markup.stage(desk.sessions.get(request.session_hash), _layers(shown), str(which))]

    @_guarded(redrawn)
    def on_points(request: gr.Request, shown: Any, which: Any, *settled: Any) -> list[Any]:
        points = _points(desk, parts, settled)
        if desk.sessions.get(request.session_hash) is None:  # settings may be chosen before a picture is
            return ["", *[gr.skip()] * 3]
        session = desk.prompt_again(request.session_hash, points)
        return ["", markup.stage(session, _layers(shown), str(which)), markup.talk(session), markup.downloads(session)]

    def on_reset() -> list[Any]:
        return [getattr(desk.sasp, name) for name in parts.settings]

    again: dict[str, Any] = {"fn": on_points, "inputs": [parts.layers, parts.chosen, *parts.fields], "outputs": redrawn}
    # Of the many positions of a slider on its way, the last counts.
    newest: dict[str, Any] = {"trigger_mode": "always_last"}
    parts.talk.select(on_select, [parts.layers, *parts.fields], parts.view, **WITH_MODEL)
    gr.on(
        [parts.layers.input, parts.chosen.input], on_layers, [parts.layers, parts.chosen], [parts.notice, parts.stage],
        **newest, **QUIET,
    )  # fmt: skip
    gr.on([field.input for field in parts.fields], **again, **newest, **WITH_MODEL)
    parts.reset.click(on_reset, None, parts.fields, **QUIET).then(**again, **WITH_MODEL)


# ------------------------------------------------------------------------------------------------ parts of handlers


def _view(session: Session | None, shown: Any) -> list[Any]:
    """Values of the components in `view`, all masks chosen."""
    import gradio as gr

    choices = markup.masks_of(session)
    named = [("All masks" if which == markup.ALL else f"Mask {which}", which) for which in choices]
    return [
        "",
        markup.stage(session, _layers(shown)),
        markup.talk(session),
        markup.downloads(session),
        gr.update(choices=named, value=markup.ALL, visible=len(choices) > 1),
    ]


def _points(desk: Desk, parts: SimpleNamespace, settled: Sequence[Any]) -> Any:
    """The SaspConfig that the settings mean."""
    return choose_points(desk.sasp, dict(zip(parts.settings, settled, strict=True)))


def _guarded(outputs: Sequence[Any]) -> Callable[[Callable[..., list[Any]]], Callable[..., list[Any]]]:
    """A handler whose failures become a notice, the first of its `outputs`."""

    def wrap(handler: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @functools.wraps(handler)
        def run(*args: Any) -> list[Any]:
            try:
                return handler(*args)
            except Exception as error:
                return _refuse(error, len(outputs))

        return run

    return wrap


def _refuse(error: Exception, outputs: int) -> list[Any]:
    """A notice, and everything else as it was."""
    import gradio as gr

    if not isinstance(error, Refused):
        logger.error("the page failed", exc_info=error)
    words = str(error) if isinstance(error, Refused) else "Something went wrong here; the server's log says what."
    return [markup.notice(words), *[gr.skip()] * (outputs - 1)]


def _said(event: Any) -> dict[str, Any]:
    """What a script of ours told with an event; from another client it may be anything."""
    return event._data if isinstance(event._data, dict) else {}


def _layers(shown: Any) -> list[str]:
    return [layer for layer in markup.LAYERS if layer in shown] if isinstance(shown, list) else []


def _script(name: str) -> str:
    return read_text(HERE / f"{name}.js")
