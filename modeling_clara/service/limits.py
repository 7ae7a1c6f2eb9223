"""How large, how many and how long a request may be, and the middleware that reads a body within that.

A body is read whole before anything is done with it, so that a slow client holds a connection and nothing else.
"""

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, told_to_client

T = TypeVar("T")
# Of a body that is refused so much is read and dropped: most clients look for a response when they have sent it.
DRAIN_BYTES, DRAIN_SECONDS = 2**23, 5.0


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    Attributes:
        body_bytes, document_bytes: of a body; the second for `/documents`.
        question_chars: of a question.
        messages: turns of a conversation.
        inputs: questions of one `/v1/embeddings`.
        documents: of one `/documents`.
        filter_parts: values and nested filters of a `where`, each of which is compared with the whole corpus.
        writes: changes that run or wait at a time.
        body_seconds: for a client to send its body.
        answer_seconds, write_seconds: until the answer is complete, until a change is made.
        send_seconds: for a client to take a piece of a stream.
    """

    body_bytes: int = 2**20
    document_bytes: int = 2**25
    question_chars: int = 8000
    messages: int = 100
    inputs: int = 256
    documents: int = 1000
    filter_parts: int = 1000
    writes: int = 16
    body_seconds: float = 30
    answer_seconds: float = 120
    write_seconds: float = 600
    send_seconds: float = 30


class BodyLimit:
    """ASGI middleware: reads the whole body, refuses one that is too large or too slow, and hands it on."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.limits.document_bytes if scope["path"].startswith("/documents") else self.limits.body_bytes
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await _read(scope, receive, most)
        except TimeoutError:
            error = ApiError(408, f"the body must arrive in {self.limits.body_seconds:g} seconds. Send it faster.")
        except ApiError as refused:
            error = refused
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
            return
        await close_with(error, scope, receive, send)


async def close_with(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error, and close the connection: what is left of a body is not read."""
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error instead of reading the body, see `DRAIN_BYTES`."""
    with contextlib.suppress(TimeoutError, ApiError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await _read(scope, receive, 0)
    await close_with(error, scope, receive, send)


async def _read(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """The body; None if the client has left."""
    too_large = ApiError(413, f"the body must have at most {most:,} bytes. Send less at a time.", code="too_large")
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    size = int(length) if length.isdigit() else 0
    if size > most + DRAIN_BYTES or (size > most and headers.get("expect")):  # the client waits for a sign to send it
        raise too_large
    parts, size, is_more = [], 0, True
    while is_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size > most + DRAIN_BYTES:
            break
        if size <= most:
            parts.append(message.get("body", b""))
        is_more = message.get("more_body", False)
    if size > most:
        raise too_large
    body = b"".join(parts)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        message = f"the body must be UTF-8, byte {error.start} is not. Encode it."
        raise ApiError(400, message, code="not_utf8") from error
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body once, then what the connection says: that the client has left."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


async def bounded(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of a call of the engine; it is cancelled after `seconds`, and if the client leaves."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request))
    try:
        async with told_to_client(seconds):
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(499, "the client has left.")  # nobody reads it; the log does
            return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
