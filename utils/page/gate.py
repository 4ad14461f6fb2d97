"""What is let in: an ASGI layer before Gradio. Pictures come in here; what the page does not use is turned away.

Gradio serves far more than this page needs: files by path, fetching of addresses, uploads to disk, a proxy, recordings. Each has
guards of its own; a route that is not there needs none. In particular every value that a client sends to Gradio may be a
description of a file with a path or an address in it, which Gradio then opens or fetches. The page's own values are words,
numbers and lists of them, so anything else is refused before Gradio sees it.

    POST /picture      bytes of a picture, header X-Picture-Name its name -> {"ticket": …}, for one event of the page
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from .desk import Limits, plain_name
from .session import Shelf

Scope = Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = (
    "/", "/config", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css", "/gradio_api/app_id",
    "/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data",
)  # fmt: skip
OPEN_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
JOIN = "/gradio_api/queue/join"
MAX_BODY = 2**16
"""Bytes of any request but a picture: a question, some settings."""
MAX_TICKETS, TICKET_S = 8, 60.0

HEADERS = {
    # Gradio builds its page from scripts within it and from templates that it compiles, hence the two words `unsafe`.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def new_tickets() -> Shelf[tuple[bytes, str]]:
    """A shelf for (bytes, name) of pictures between their arrival and the event that asks for them."""
    return Shelf(MAX_TICKETS, TICKET_S)


class Gate:
    """The layer; `tickets` holds the pictures that came in and were not picked up yet."""

    def __init__(self, app: App, limits: Limits, tickets: Shelf[tuple[bytes, str]]) -> None:
        self.app, self.limits, self.tickets = app, limits, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if path == "/picture" and method == "POST":
            await self._take_picture(scope, receive, send)
            return
        if not (path in OPEN or path.startswith(OPEN_BELOW)):
            await _reply(send, 404, "There is no such page.")
            return
        if method in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, _with_headers(send))
            return
        body = await _read(receive, MAX_BODY)
        if body is None:
            await _reply(send, 413, "That is too much.")
        elif path == JOIN and not plain_values(body):
            await _reply(send, 400, "That is nothing this page sends.")
        else:
            await self.app(scope, _once(body, receive), _with_headers(send))

    async def _take_picture(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get("content-type") != "application/octet-stream":
            # Another site's form cannot send this type without asking first, and Gradio's CORS layer, not asked here, says no.
            await _reply(send, 415, "A picture is sent as application/octet-stream.")
            return
        data = await _read(receive, self.limits.upload_bytes)
        if data is None:
            await _reply(send, 413, f"This file is too large; at most {self.limits.upload_bytes / 2**20:.0f} MiB are taken.")
            return
        ticket = secrets.token_urlsafe(18)
        self.tickets.put(ticket, (data, plain_name(unquote(headers.get("x-picture-name", "")))))
        await _send_json(send, 200, {"ticket": ticket})


def plain_values(body: bytes) -> bool:
    """Whether an event's JSON holds nothing but words, numbers and lists of them, for components and in the event itself."""
    try:
        event = json.loads(body)
        values, extra = event["data"], event.get("event_data") or {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return (
        isinstance(values, list)
        and isinstance(extra, dict)
        and all(_plain(value) or (isinstance(value, list) and all(map(_plain, value))) for value in values)
        and all(map(_plain, extra.values()))
    )


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None as soon as it is longer than `limit`, or the client is gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _once(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _reply(send: Send, status: int, words: str) -> None:
    await _send_json(send, status, {"message": words})


async def _send_json(send: Send, status: int, content: dict[str, str]) -> None:
    send, body = _with_headers(send), json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
