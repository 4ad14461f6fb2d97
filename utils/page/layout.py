"""Where things stand on the page, and what happens when they are touched: Gradio's components and events around a `Desk`.

    blocks = build(desk, gate_tickets, examples, model)      Gradio's Blocks, to be mounted behind the gate

Gradio is imported when `build` is called and not before, since it is an extra. Handlers get a request, whose session hash names
the visitor, and plain values; whatever fails becomes a notice. All that runs the model shares one place in Gradio's queue.
"""

# No `from __future__ import annotations` here: Gradio finds the request by the annotations of handlers within a function.
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import markup
from .desk import Desk, Refused, choose_points, open_picture
from .session import Session, Shelf

HERE = Path(__file__).resolve().parent
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to begin with."""

    picture: np.ndarray
    """(H, W, 3) uint8 RGB."""
    name: str
    questions: tuple[str, ...]
    """What may be asked about it; the first three become buttons."""


SUGGESTIONS = 3


def build(desk: Desk, tickets: Shelf[tuple[bytes, str]], examples: Sequence[Example], model: str) -> Any:
    """The page as Gradio's Blocks; `tickets` are the gate's pictures, `model` is the name that is shown.

    Raises:
        ImportError: Gradio is not installed.
    """
    import gradio as gr

    limits, sasp = desk.limits, desk.sasp
    plain: dict[str, Any] = {"apply_default_css": False, "js_on_load": None}
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with_model = {**quiet, "concurrency_id": "model", "concurrency_limit": 1}

    with gr.Blocks(title="READ", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(markup.header(model), **plain)
        with gr.Row(elem_classes="read-start", equal_height=True):
            zone = gr.HTML(
                markup.drop_zone(limits), apply_default_css=False, js_on_load=_script("zone"), min_width=280, scale=2
            )
            picks = [
                gr.Button(example.questions[0], elem_classes=f"read-pick read-pick-{n}", min_width=150, scale=1)
                for n, example in enumerate(examples)
            ]
        notice = gr.HTML("", **plain)
        with gr.Row(elem_classes="read-main"):
            with gr.Column(scale=3, min_width=300):
                stage = gr.HTML(markup.stage(None, ()), **plain)
                with gr.Row(elem_classes="read-layers"):
                    layers = gr.CheckboxGroup(
                        [(words, layer) for layer, words in markup.LAYERS.items()], value=["mask", "points"], label="Layers",
                        container=False, show_label=False, elem_id="layers", min_width=200,
                    )  # fmt: skip
                    chosen = gr.Radio(
                        [markup.ALL], value=markup.ALL, label="Masks", container=False, show_label=False, visible=False,
                        elem_id="chosen", min_width=100,
                    )  # fmt: skip
                    files = gr.HTML("", **plain)
            with gr.Column(scale=2, min_width=300):
                question = gr.Textbox(
                    label="Question", show_label=False, placeholder="Which of these can carry my books?", lines=2, max_lines=4,
                    max_length=limits.question, container=False, elem_id="question",
                )  # fmt: skip
                with gr.Row(elem_classes="read-ask"):
                    follow_up = gr.Checkbox(
                        False, label="With earlier turns", container=False, elem_id="follow-up", scale=3,
                        min_width=180,
                    )  # fmt: skip
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=90)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=1, min_width=90)
                with gr.Row(elem_classes="read-hints"):
                    hint = {"visible": False, "size": "sm", "elem_classes": "read-hint", "min_width": 120}
                    hints = [gr.Button("", **hint) for _ in range(SUGGESTIONS)]
                talk = gr.HTML("", apply_default_css=False, js_on_load=_script("talk"))
                with gr.Accordion("Points: how SAM is prompted", open=False, elem_id="points"):
                    gr.HTML(markup.POINTS, **plain)
                    top = desk.tokens
                    settings = {
                        "enabled": gr.Checkbox(sasp.enabled, label="Points on (off: [SEG] alone)", elem_id="enabled"),
                        "num_points": gr.Slider(1, top, sasp.num_points, step=1, label="K: points a mask", elem_id="num_points"),
                        "t_pos": gr.Slider(0, 1, sasp.t_pos, step=0.01, label="t_pos: object from here on", elem_id="t_pos"),
                        "t_neg": gr.Slider(0, 1, sasp.t_neg, step=0.01, label="t_neg: background up to here", elem_id="t_neg"),
                        "down_sample": gr.Slider(
                            1, 4, sasp.down_sample, step=1, label="down_sample: tokens along a cell", elem_id="down_sample"
                        ),
                        "geometry": gr.Radio(
                            ["released", "exact"], value=sasp.geometry, label="geometry: where points are put", elem_id="geometry"
                        ),
                    }
                    reset = gr.Button("As trained", size="sm", elem_id="reset")

        names, fields = tuple(settings), list(settings.values())
        view = [notice, stage, talk, files, chosen]

        def points(values: Sequence[Any]) -> Any:
            return choose_points(sasp, dict(zip(names, values, strict=True)))

        def show(session: Session | None, shown: Any, words: str = "") -> list[Any]:
            """Values of `view`, all masks chosen."""
            choices = markup.masks_of(session)
            return [
                markup.notice(words),
                markup.stage(session, _layers(shown)),
                markup.talk(session),
                markup.downloads(session),
                gr.update(choices=[(_choice(c), c) for c in choices], value=markup.ALL, visible=len(choices) > 1),
            ]

        def refuse(error: Exception, outputs: int) -> list[Any]:
            """A notice, and everything else as it was."""
            if not isinstance(error, Refused):
                logger.error("the page failed", exc_info=error)
            words = str(error) if isinstance(error, Refused) else "Something went wrong here; the server's log says what."
            return [markup.notice(words), *[gr.skip()] * (outputs - 1)]

        def guarded(outputs: Sequence[Any]) -> Callable[[Callable[..., list[Any]]], Callable[..., list[Any]]]:
            """A handler whose failures become a notice, the first of its `outputs`."""

            def wrap(handler: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
                @functools.wraps(handler)
                def run(*args: Any) -> list[Any]:
                    try:
                        return handler(*args)
                    except Exception as error:
                        return refuse(error, len(outputs))

                return run

            return wrap

        # ---------------------------------------------------------------------------------------- pictures

        begun = [*view, *hints]

        def begin(session: Session, shown: Any) -> list[Any]:
            said = session.suggestions[:SUGGESTIONS]
            unused = [gr.update(visible=False)] * (SUGGESTIONS - len(said))
            return [*show(session, shown), *(gr.update(value=text, visible=True) for text in said), *unused]

        @guarded(begun)
        def on_upload(request: gr.Request, event: gr.EventData, shown: Any) -> list[Any]:
            ticket = event._data.get("ticket") if isinstance(event._data, dict) else None
            found = tickets.pop(ticket) if isinstance(ticket, str) else None
            if found is None:
                raise Refused("This picture did not arrive; send it again.")
            return begin(desk.look(request.session_hash, open_picture(found[0], limits), found[1]), shown)

        def on_pick(example: Example) -> Callable[..., list[Any]]:
            @guarded(begun)
            def pick(request: gr.Request, shown: Any) -> list[Any]:
                return begin(desk.look(request.session_hash, example.picture, example.name, example.questions), shown)

            return pick

        zone.upload(on_upload, layers, begun, **with_model)
        for button, example in zip(picks, examples, strict=True):
            button.click(on_pick(example), layers, begun, **with_model)

        # ---------------------------------------------------------------------------------------- questions

        asked, answered = [follow_up, layers, *fields], [*view, ask, stop, question]

        def answering(key: str, words: Any, values: Sequence[Any], clear: bool) -> Iterator[list[Any]]:
            """Values of `answered` while an answer is written."""
            later, shown, *settled = values
            begins = True
            try:
                for session in desk.ask(key, words, points(settled), bool(later)):
                    if begins or session.turn is None or session.turn.ended:
                        drawn = show(session, shown)
                    else:  # the words alone have changed
                        drawn = [gr.skip(), gr.skip(), markup.talk(session), gr.skip(), gr.skip()]
                    box = gr.update(value="") if clear and begins else gr.skip()
                    yield [*drawn, gr.update(visible=False), gr.update(visible=True), box]
                    begins = False
            except Exception as error:
                yield refuse(error, len(answered))
            yield [*[gr.skip()] * len(view), gr.update(visible=True), gr.update(visible=False), gr.skip()]

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

        gr.on([question.submit, ask.click], on_ask, [question, *asked], answered, **with_model)
        for number, button in enumerate(hints):
            button.click(on_hint(number), asked, answered, **with_model)
        stop.click(on_stop, None, None, queue=False, **quiet)

        # ---------------------------------------------------------------------------------------- what is on display

        @guarded(view)
        def on_select(request: gr.Request, event: gr.EventData, shown: Any, *settled: Any) -> list[Any]:
            said = event._data if isinstance(event._data, dict) else {}
            change = desk.show_anyway if said.get("anyway") else desk.show
            return show(change(request.session_hash, said.get("turn"), points(settled)), shown)

        @guarded([stage])
        def on_layers(request: gr.Request, shown: Any, which: Any) -> list[Any]:
            return [markup.stage(desk.sessions.get(request.session_hash), _layers(shown), str(which))]

        redrawn = [notice, stage, talk, files]

        @guarded(redrawn)
        def on_points(request: gr.Request, shown: Any, which: Any, *settled: Any) -> list[Any]:
            if desk.sessions.get(request.session_hash) is None:  # settings may be chosen before a picture is
                return ["", *[gr.skip()] * 3]
            session = desk.prompt_again(request.session_hash, points(settled))
            return ["", markup.stage(session, _layers(shown), str(which)), markup.talk(session), markup.downloads(session)]

        def on_reset() -> list[Any]:
            return [getattr(sasp, name) for name in names]

        talk.select(on_select, [layers, *fields], view, **with_model)
        gr.on([layers.input, chosen.input], on_layers, [layers, chosen], [stage], trigger_mode="always_last", **quiet)
        again = {"fn": on_points, "inputs": [layers, chosen, *fields], "outputs": redrawn, **with_model}
        gr.on([field.input for field in fields], trigger_mode="always_last", **again)
        reset.click(on_reset, None, fields, **quiet).then(**again)

        def on_leave(request: gr.Request) -> None:
            desk.leave(request.session_hash)

        page.unload(on_leave)
    return page.queue(max_size=64, api_open=False)


def style(examples: Sequence[Example]) -> str:
    """The page's CSS, with the examples' thumbnails in it."""
    thumbs = [
        f".read-pick-{n}::before {{ background-image: url({markup.thumbnail(Image.fromarray(example.picture))}); }}"
        for n, example in enumerate(examples)
    ]
    return "\n".join([(HERE / "style.css").read_text(), *thumbs])


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


def _layers(shown: Any) -> list[str]:
    return [layer for layer in markup.LAYERS if layer in shown] if isinstance(shown, list) else []


def _choice(which: str) -> str:
    return "All masks" if which == markup.ALL else f"Mask {which}"


def _script(name: str) -> str:
    return (HERE / f"{name}.js").read_text()
