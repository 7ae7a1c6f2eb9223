"""A question of a client to the engine and back: turns to a question, pieces of text to a reply.

Chat completions and responses share this; they differ in the JSON around it.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request

from ..generation_clara import Answer
from .engine import AskOptions, Engine
from .errors import ApiError, told_to_client
from .limits import Limits, bounded
from .logs import note
from .metrics import Metrics
from .schemas import Message, Options, Sampling
from .sources import source_row

ABSTAINED = "No document of the corpus answers this."
STREAMED = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}  # for the OpenAPI document
PING_SECONDS = 15  # a comment in a stream that is silent, so that proxies keep it open


@dataclass
class Service:
    """What the routes share: `request.app.state.service`."""

    engine: Engine
    model_id: str
    limits: Limits
    metrics: Metrics
    created: int

    def check_model(self, name: str) -> None:
        """An error unless a client asks for the model that is here."""
        if name != self.model_id:
            message = f"`model` must be {self.model_id!r}, got {name[:80]!r}. `GET /v1/models` names it."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_question(self, text: str, name: str) -> str:
        """A question that is neither empty nor too long."""
        most = self.limits.question_chars
        if not text.strip():
            raise ApiError(400, f"`{name}` must not be empty. Ask something.", param=name, code="invalid_value")
        if len(text) > most:
            message = f"`{name}` must have at most {most:,} characters, got {len(text):,}. Shorten it."
            raise ApiError(400, message, param=name, code="too_long")
        return text

    def where_text(self, where: dict[str, Any] | None) -> str | None:
        """A filter as the engine takes it; an error if it has more parts than the model's thread should compare."""
        most = self.limits.filter_parts
        if count_parts(where, most) > most:
            message = f"`where` must have at most {most:,} conditions and values. Filter by a column that says it all."
            raise ApiError(400, message, param="where", code="too_long")
        return None if where is None else json.dumps(where, sort_keys=True)


@dataclass(frozen=True)
class Ask:
    """A question as the engine takes it, and texts at which the answer ends."""

    question: str
    history: tuple[tuple[str, str], ...]
    options: AskOptions
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer as a client gets it; `text` says so if nothing was found."""

    text: str
    answer: Answer
    finish_reason: str  # stop or length
    completion_tokens: int

    @property
    def found(self) -> dict:
        """What is ours in every form of an answer."""
        sources = [source_row(source) for source in self.answer.sources]
        return {"sources": sources, "abstained": self.answer.abstained, "confidence": self.answer.confidence}


def read_turns(service: Service, messages: Sequence[Message], name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The last user message, and the turns before it as (question, answer).

    System messages are left out: the model is trained on one instruction, which its processor writes.
    """
    if len(messages) > service.limits.messages:
        message = f"`{name}` must be at most {service.limits.messages}, got {len(messages)}. Leave out the oldest."
        raise ApiError(400, message, param=name, code="too_long")
    turns = [message for message in messages if message.role in ("user", "assistant")]
    if not turns or turns[-1].role != "user" or messages[-1].role == "assistant":
        role = messages[-1].role
        raise ApiError(400, f"`{name}` must end with a user's message, got {role!r}. Add the question.", param=name)
    history: list[tuple[str, str]] = []
    for turn in turns[:-1]:
        if turn.role == "user":
            history.append((turn.content, ""))
        elif history:  # a greeting before the first question is no answer
            question, answer = history[-1]
            history[-1] = (question, f"{answer}\n{turn.content}".strip())
    return service.check_question(turns[-1].content, name), tuple(history)


def count_parts(where, most: int) -> int:
    """Values and nested filters of a filter; counting ends above `most`."""
    left, n_parts = [where], 0
    while left and n_parts <= most:
        part = left.pop()
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        n_parts += len(inner)
        left.extend(inner)
    return n_parts


def read_options(service: Service, body: Sampling, max_new_tokens: int | None) -> AskOptions:
    """The engine's options of a request."""
    given = {name: getattr(body, name) for name in Options.model_fields if name != "where"}
    given |= {"temperature": body.temperature, "top_p": body.top_p, "seed": body.seed}
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    return AskOptions(**given, where=service.where_text(body.where))


async def ask_all(service: Service, request: Request, ask: Ask) -> Reply:
    """The whole reply."""
    work = service.engine.answer(ask.question, ask.options, ask.history)
    answer = await bounded(request, work, service.limits.answer_seconds)
    return _finish(service, request, ask, answer)


async def ask_stream(service: Service, request: Request, ask: Ask) -> AsyncIterator[str | Reply]:
    """Pieces of the reply's text, the `Reply` last. What is wrong with the question raises here, not while reading."""
    deadline = time.monotonic() + service.limits.answer_seconds
    pieces = _pieces(service, request, ask)
    first = await bounded(request, anext(pieces), service.limits.answer_seconds)

    async def rest():
        async with aclosing(pieces):
            item = first
            while True:
                yield item
                if isinstance(item, Reply):
                    return
                async with told_to_client(max(0.0, deadline - time.monotonic())):
                    item = await anext(pieces)

    return rest()


async def _pieces(service: Service, request: Request, ask: Ask) -> AsyncIterator[str | Reply]:
    text, n_sent = "", 0
    async with aclosing(service.engine.stream(ask.question, ask.options, ask.history)) as stream:
        async for item in stream:
            if isinstance(item, Answer):
                reply = _finish(service, request, ask, item)
                break
            text += item
            shown = len(cut(text, ask.stop)) - held(text, ask.stop)
            if shown > n_sent:
                yield text[n_sent:shown]
                n_sent = shown
    if len(reply.text) > n_sent:
        yield reply.text[n_sent:]
    yield reply


def _finish(service: Service, request: Request, ask: Ask, answer: Answer) -> Reply:
    n_tokens, most = answer.completion_tokens, ask.options.max_new_tokens
    if n_tokens is None:  # of another server, or of nothing; a model may spell a text with other tokens
        n_tokens = min(len(service.engine.model.processor.encode_text(answer.text)), most)
    text = ABSTAINED if answer.abstained else cut(answer.text, ask.stop)
    is_cut = n_tokens >= most and text == answer.text
    service.metrics.count_answer(answer.abstained, answer.prompt_tokens, n_tokens)
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": n_tokens, "sources": len(answer.sources)}
    note(request, **counts, abstained=answer.abstained)
    return Reply(text, answer, "length" if is_cut else "stop", n_tokens)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of `stops`."""
    if cut(text, stops) != text:
        return 0
    starts = [stop[: len(text) + 1] for stop in stops]  # a stop may be much longer than the text
    sizes = (n for start in starts for n in range(len(start) - 1, 0, -1) if text.endswith(start[:n]))
    return max(sizes, default=0)


def event_response(service: Service, events: AsyncIterator[dict]) -> EventSourceResponse:
    """Server-sent events; a client that does not take them in time is left."""
    return EventSourceResponse(events, sep="\n", ping=PING_SECONDS, send_timeout=service.limits.send_seconds)


def new_id(prefix: str) -> str:
    """An id of an answer."""
    return f"{prefix}{uuid.uuid4().hex}"
