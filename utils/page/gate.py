"""What is let in: an ASGI layer before Gradio. Images come in here; what the page does not use is turned away.

Gradio serves far more than this page needs: files by path, fetching of addresses, uploads to disk, a proxy, recordings. Each has
guards of its own; a route that is not there needs none. In particular every value that a client sends to Gradio may be a
description of a file with a path or an address in it, which Gradio then opens or fetches. The page's own values are words,
numbers and lists of them, so anything else is refused before Gradio sees it. So are a function and a session that do not exist:
Gradio answers them with a traceback.

    POST /picture      bytes of an image, header X-Picture-Name its name -> {"ticket": …}, for one event of the page

Requests are for a host that is ours: a page elsewhere may have its own name resolved to this machine (DNS rebinding), and would
then read what visitors ask, past the browser's rule of one origin. Bodies come within a time, and all images that wait for their
event have a bounded number of bytes; who comes when there is no room is told to try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote

from .desk import Limits, plain_name

Scope = Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = (
    "/", "/config", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css", "/gradio_api/app_id",
    "/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data",
)  # fmt: skip
HEARTBEAT = "/gradio_api/heartbeat/"
OPEN_BELOW = ("/assets/", "/static/", HEARTBEAT)
JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names that Gradio's script gives to sessions."""
MAX_BODY = 2**16
"""Bytes of any request but an image: a question, some settings."""
MAX_WAITING, WAIT_S = 64, 300.0
"""How many images of the largest size may wait for their event, and how long one does: others are answered before."""
RETRY_S = 5
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

HEADERS = {
    # Gradio builds its page from scripts within it and from templates that it compiles, hence the two words `unsafe`.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True)
class _Waiting:
    since: float
    visitor: str
    address: str
    data: bytes
    name: str


class Tickets:
    """Images between their arrival and the event that asks for them: a bounded number of bytes, of which one address gets half.

    A visitor has one; a newer takes its place. None makes room for another visitor's.
    """

    def __init__(self, limits: Limits, idle_s: float = WAIT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.idle_s, self.clock = MAX_WAITING * limits.upload_bytes, idle_s, clock
        self._waiting: dict[str, _Waiting] = {}
        self._coming: dict[str, int] = {}
        """Bytes that are on their way, by address."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def room(self, address: str, size: int) -> Iterator[bool]:
        """Whether there is room for an image of so many bytes; it is kept free for the length of the block."""
        self.sweep()
        with self._lock:
            mine = self._coming.get(address, 0) + sum(len(one.data) for one in self._waiting.values() if one.address == address)
            all_of_them = sum(self._coming.values()) + sum(len(one.data) for one in self._waiting.values())
            free = mine + size <= self.most // 2 and all_of_them + size <= self.most
            if free:
                self._coming[address] = self._coming.get(address, 0) + size
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._coming[address] -= size
                    if not self._coming[address]:
                        del self._coming[address]

    def put(self, data: bytes, name: str, visitor: str = "", address: str = "") -> str:
        """The ticket of an image that came in."""
        ticket = secrets.token_urlsafe(18)
        with self._lock:
            for older in [key for key, one in self._waiting.items() if visitor and one.visitor == visitor]:
                del self._waiting[older]
            self._waiting[ticket] = _Waiting(self.clock(), visitor, address, data, name)
        return ticket

    def pop(self, ticket: str) -> tuple[bytes, str] | None:
        """(bytes, name) of an image, which waits no longer; None if it does not wait (any more)."""
        self.sweep()
        with self._lock:
            found = self._waiting.pop(ticket, None)
        return (found.data, found.name) if found else None

    def sweep(self) -> None:
        """Drops images that no event took in time."""
        with self._lock:
            for ticket in [key for key, one in self._waiting.items() if self.clock() - one.since >= self.idle_s]:
                del self._waiting[ticket]


class Gate:
    """The layer.

    Args:
        tickets: the images that came in and were not picked up yet.
        hosts, any_address: names under which the page is asked for, as `our_host` takes them.
        takes: whether the page has a function of that index for these values.
        knows: whether Gradio has a stream for that session; a stream for another is not there.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        tickets: Tickets,
        hosts: Collection[str] = LOOPBACK,
        any_address: bool = False,
        takes: Callable[[int, list[Any]], bool] = lambda index, values: True,
        knows: Callable[[str], bool] = lambda session: True,
    ) -> None:
        self.app, self.limits, self.tickets = app, limits, tickets
        self.hosts, self.any_address, self.takes, self.knows = hosts, any_address, takes, knows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})  # the page uses none
            return
        path, method = scope["path"], scope["method"]
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"]
        if len(hosts) != 1 or not our_host(hosts[0], self.hosts, self.any_address):
            await _reply(send, 421, "This server does not answer under that name; --allowed_hosts of app.py adds names.")
        elif path == "/picture" and method == "POST":
            await self._take_image(scope, receive, send)
        elif not (path in OPEN or path.startswith(OPEN_BELOW)):
            await _reply(send, 404, "There is no such page.")
        elif method in ("GET", "HEAD", "OPTIONS"):
            if (session := _session_of(scope)) is not None and not (SESSION.fullmatch(session) and self._has(path, session)):
                await _reply(send, 404, "There is no such session.")
            else:
                await self.app(scope, receive, _with_headers(send))
        else:
            await self._pass_on(scope, receive, send)

    def _has(self, path: str, session: str) -> bool:
        return path != DATA or self.knows(session)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request with a body through, if it is one of the page's."""
        try:
            body = await _read(receive, MAX_BODY, self.limits.body_s)
        except TimeoutError:
            await _reply(send, 408, "That took too long.")
            return
        if body is None:
            await _reply(send, 413, "That is too much.")
        elif scope["path"] == JOIN and not (plain_values(body) and self._of_the_page(json.loads(body))):
            await _reply(send, 400, "That is nothing this page sends.")
        else:
            await self.app(scope, _once(body, receive), _with_headers(send))

    def _of_the_page(self, event: dict[str, Any]) -> bool:
        """Whether an event is for a function of the page, in a session, with values that it takes."""
        index, session, trigger = event.get("fn_index"), event.get("session_hash"), event.get("trigger_id")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            return False
        if any(event.get(name) for name in ("batched", "simple_format", "event_id", "oauth_token")):
            return False
        if type(index) is not int or not (trigger is None or type(trigger) is int):
            return False
        return self.takes(index, event["data"])

    async def _take_image(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get("content-type") != "application/octet-stream":
            # Another site's form cannot send this type without asking first, and Gradio's CORS layer, not asked here, says no.
            await _reply(send, 415, "An image is sent as application/octet-stream.")
            return
        length, most = headers.get("content-length", ""), self.limits.upload_bytes
        size = min(int(length), most) if re.fullmatch("[0-9]{1,15}", length) else most
        address = str((scope.get("client") or ("",))[0])
        with self.tickets.room(address, size) as free:
            try:
                # A browser reads an answer once its image is sent, so it is received in any case.
                data = await _read(receive, size if free else most, self.limits.upload_s, keep=free)
            except TimeoutError:
                await _reply(send, 408, "The image took too long to arrive; send it again.")
                return
        if data is None:
            await _reply(send, 413, f"This file is too large; at most {most / 2**20:.0f} MiB are taken.")
        elif not free:
            await _reply(send, 503, "Too many images are waiting here; try again in a moment.", retry=True)
        else:
            name = plain_name(unquote(headers.get("x-picture-name", "")))
            await _send_json(send, 200, {"ticket": self.tickets.put(data, name, headers.get("x-visitor", ""), address)})


def our_host(host: str, hosts: Collection[str], any_address: bool = False) -> bool:
    """Whether a request's Host header, with or without a port, names this server.

    Args:
        hosts: its names and addresses, those of IPv6 in brackets.
        any_address: it listens on all addresses of its machine, whichever these are. Only names can be made to point here.
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/]+)(?::[0-9]{1,5})?", host)
    if match is None:
        return False
    name = match[1].lower().rstrip(".")
    if any_address:
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
    return name in {one.lower().rstrip(".") for one in hosts}


def _session_of(scope: Scope) -> str | None:
    """The session that the path or the query of a request names; None if it needs none. More than one is no session."""
    if scope["path"].startswith(HEARTBEAT):
        return scope["path"].removeprefix(HEARTBEAT)
    if scope["path"] != DATA:
        return None
    return ",".join(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""]))


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


async def _read(receive: Receive, limit: int, seconds: float, keep: bool = True) -> bytes | None:
    """The body of a request; None as soon as it is longer than `limit`, or the client is gone. Without `keep`, nothing of it.

    Raises:
        TimeoutError: it is not there after `seconds`.
    """
    parts, size = [], 0
    end = time.monotonic() + seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0))
        except asyncio.TimeoutError:  # of Python 3.10, a class of its own
            raise TimeoutError from None
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        if keep:
            parts.append(part)
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


async def _reply(send: Send, status: int, words: str, retry: bool = False) -> None:
    await _send_json(send, status, {"message": words}, [(b"retry-after", str(RETRY_S).encode())] if retry else [])


async def _send_json(send: Send, status: int, content: dict[str, str], more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    send, body = _with_headers(send), json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def in_time(protocol: type, seconds: float) -> type:
    """uvicorn's H11Protocol that closes a connection whose next request's head is not there after `seconds`."""

    class InTime(protocol):  # type: ignore[misc, valid-type]
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.deadline = self.loop.call_later(seconds, self.too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.answering():
                if self.deadline is not None:
                    self.deadline.cancel()
                self.deadline = None
            elif self.deadline is None:  # the beginning of a further request
                self.deadline = self.loop.call_later(seconds, self.too_slow)

        def connection_lost(self, error: Exception | None) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            super().connection_lost(error)

        def answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def too_slow(self) -> None:
            self.deadline = None
            if not self.answering():
                self.transport.close()

    return InTime
