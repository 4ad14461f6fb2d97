"""The page: ask pictures in a browser, see the answer, its masks, the points that prompted them, and the similarity behind those.

    python app.py                                     READ-mini, at http://localhost:7860, for this machine alone
    python app.py --version MODEL --port 8000         another model, another port
    python app.py --host 0.0.0.0                      for everybody who can reach this machine: there is no password

It answers under the machine's own names and addresses alone; --allowed_hosts adds that of a proxy in front of it.

A picture stays in the server's memory while it is asked about, and is dropped a minute after the tab was closed, after
--idle_minutes without a question, or when --sessions others were opened since. No picture is written to disk, and the page
fetches nothing from elsewhere. It is in `utils/page/`; Gradio, which it stands on, comes with requirements-app.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.cli import (
    DEFAULT_MODEL,
    add_model_flags,
    check_max_new_tokens,
    limit_images,
    load_model,
    plain_errors,
    positive,
)

if TYPE_CHECKING:
    from utils.page.desk import Limits
    from utils.page.layout import Example

EXAMPLES = (
    (309, (
        "Which red thing often has a band's name printed on the front?",
        "What thing would you put on when the heating fails?",
        "Which footwear lets the toes breathe?",
    )),
    (259, (
        "What yellow thing here is not worn but carried by a handle?",
        "the thing that covers the ankle",
        "Which thing would a Roman have worn on the foot?",
    )),
    (231, (
        "The evening is cold: which thing would keep your arms and chest warm?",
        "the orange footwear for mud and rain",
        "Which thing carries your books?",
    )),
)  # fmt: skip
"""Seeds of mini-world scenes, and what may be asked about each; what the last question asks for is not there."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
HEAD_S = 15.0
"""How long the head of a request may take to arrive."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=port, default=7860, help="port to listen on, 0 for any that is free (default: 7860)")
    parser.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="NAME",
        help="further names under which the page is asked for, for example of a proxy in front of it (others get an error)",
    )  # fmt: skip
    group = parser.add_argument_group("limits")
    group.add_argument("--max_upload_mib", type=positive, default=10, help="largest file that is taken (default: 10)")
    group.add_argument("--max_megapixels", type=positive, default=16, help="largest image that is taken (default: 16)")
    group.add_argument("--max_question", type=positive, default=500, help="longest question, characters (default: 500)")
    group.add_argument("--max_new_tokens", type=positive, default=256, help="longest answer (default: 256)")
    group.add_argument("--sessions", type=positive, default=8, help="pictures that are kept at a time (default: 8)")
    group.add_argument("--idle_minutes", type=positive, default=15, help="how long one is kept unasked (default: 15)")
    add_model_flags(parser)
    return parser


def port(text: str) -> int:
    """A port, for argparse."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, found {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Loads the model and serves the page until Ctrl-C."""
    options = build_parser().parse_args(argv)  # `--help` ends here, before anything heavy is imported
    with plain_errors("app.py"), tempfile.TemporaryDirectory(prefix="read-app-") as folder:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way the temporary folder goes
        # Read when Gradio and OpenCV are imported: nothing is reported, and no decoder allocates more than an image may have.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(options.max_megapixels * 1_000_000)
        limit_images(options.max_megapixels)
        try:
            listener = listen(options.host, options.port)
        except OSError as error:
            raise ValueError(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}") from error
        with listener:
            try:
                app = build(options)
            except ImportError as error:
                if error.name not in ("gradio", "fastapi", "uvicorn"):
                    raise
                raise ValueError(
                    f"the page needs {error.name}, which a plain installation leaves out: "
                    "`make app`, or `pip install -r requirements-app.txt`"
                ) from error
            serve(app, listener, options.host)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; first of all, since it is quick and loading a model is not.

    Raises:
        OSError: the port is taken, or the address is not ours.
        ValueError: the host is empty, which would mean every address of this machine.
    """
    if not host.strip():
        raise ValueError("--host is empty: give an address, 0.0.0.0 for all of this machine")
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def build(options: argparse.Namespace) -> Any:
    """The ASGI app: a model at its desk, Gradio's page around it, the gate before that.

    Raises:
        ImportError: Gradio is missing. OSError, ValueError: the model cannot be loaded.
    """
    import fastapi
    import gradio
    import torch

    from model import READPredictor
    from utils.page.desk import Desk
    from utils.page.gate import Gate, Tickets
    from utils.page.layout import build as build_page
    from utils.page.layout import style, takes, theme

    hosts = host_names(options.host, options.allowed_hosts)  # quick, unlike what follows
    check_max_new_tokens(
        DEFAULT_MODEL if options.version is None else options.version, options.max_new_tokens, options.vision_tower
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = READPredictor(*load_model(options, device), options.conv_type)
    room = predictor.model.config.llava.text_config.max_position_embeddings - predictor.processor.num_patches
    if options.max_new_tokens > room:
        raise ValueError(f"--max_new_tokens {options.max_new_tokens}: behind an image the model holds at most {room}")
    limits, examples = limits_of(options), make_examples()
    tickets = Tickets(limits)
    desk = Desk(predictor, limits)
    page = build_page(desk, tickets, examples, os.path.basename(os.path.normpath(options.version or DEFAULT_MODEL)))
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), page, path="/", theme=theme(), css=style(examples), footer_links=[], show_error=False,
        max_file_size=1, run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip
    threading.Thread(target=sweep, args=(desk.sessions, tickets), daemon=True).start()
    return Gate(
        app, limits, tickets,
        hosts=hosts, any_address=options.host in EVERYWHERE,
        takes=functools.partial(takes, page), knows=lambda session: session in page._queue.pending_messages_per_session,
    )  # fmt: skip


def host_names(host: str, more: Sequence[str] = ()) -> list[str]:
    """Names and addresses under which the page may be asked for: where it listens, and what the user adds.

    Raises:
        ValueError: an added one is no name.
    """
    names = [*LOOPBACK, *more]
    if host not in LOOPBACK:
        names += [host, socket.gethostname(), socket.getfqdn(), f"{socket.gethostname()}.local"]
    for name in more:
        if not re.fullmatch(r"[^\s/@:*]+|[0-9a-fA-F:.]+", name):
            raise ValueError(f"--allowed_hosts {name}: must be a name or an address, without port, scheme or *")
    return [f"[{name}]" if ":" in name else name for name in names]


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that the flags mean."""
    from utils.page.desk import Limits

    return Limits(
        upload_bytes=options.max_upload_mib * 2**20,
        pixels=options.max_megapixels * 1_000_000,
        question=options.max_question,
        new_tokens=options.max_new_tokens,
        sessions=options.sessions,
        idle_s=60.0 * options.idle_minutes,
    )


def make_examples() -> list[Example]:
    """Pictures of the mini world, made on the spot, so that nothing needs to lie about."""
    import numpy as np

    from dataset.mini import world
    from utils.page.layout import Example

    return [
        Example(world.make_scene(np.random.default_rng(seed), "test").image, f"example_{n}.jpg", questions)
        for n, (seed, questions) in enumerate(EXAMPLES, 1)
    ]


def sweep(*shelves: Any, every_s: float = 15.0) -> None:
    """Lets go, for ever, of what nobody asked about for too long."""
    while True:
        time.sleep(every_s)
        for shelf in shelves:
            shelf.sweep()


def serve(app: Any, listener: socket.socket, host: str) -> None:
    """Serves until Ctrl-C, or until it is terminated."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from utils.page.gate import in_time

    port = listener.getsockname()[1]
    where = "localhost" if host in LOOPBACK else host
    print(f"READ is at http://{f'[{where}]' if ':' in where else where}:{port}/ (Ctrl-C ends it)", flush=True)
    if host not in LOOPBACK:
        print("Everybody who can reach this address can ask, and there is no password.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=3, http=in_time(H11Protocol, HEAD_S), server_header=False
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
