"""`/v1/chat/completions`: the last user message is asked, earlier turns are its context.

Sources come as annotations of the message and as the list `sources`; in a stream with the chunk that ends the answer.
"""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request

from .asking import (
    STREAMED,
    Ask,
    Reply,
    Service,
    ask_all,
    ask_stream,
    event_response,
    new_id,
    read_options,
    read_turns,
)
from .errors import ApiError, Json, to_event
from .schemas import ChatBody
from .sources import annotations

router = APIRouter()


@router.post("/v1/chat/completions", summary="Ask, as with OpenAI's chat completions", responses=STREAMED)
async def complete(body: ChatBody, request: Request):
    """Retrieve, read and answer; with `stream` as server-sent events."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    question, history = read_turns(service, body.messages, "messages")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    ask = Ask(question, history, read_options(service, body, most), tuple(body.stop))
    common = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": service.model_id}
    if body.stream:
        pieces = await ask_stream(service, request, ask)
        return event_response(service, _events(pieces, common, body.stream_options.include_usage))
    reply = await ask_all(service, request, ask)
    message = {"role": "assistant", "content": reply.text, "refusal": None, "annotations": _cited(reply)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
    return Json({**common, "object": "chat.completion", "choices": [choice], "usage": _usage(reply), **reply.found})


async def _events(pieces: AsyncIterator[str | Reply], common: dict, with_usage: bool) -> AsyncIterator[dict]:
    """Chunks: the role, pieces of text, the end with the sources, and the usage if it is wanted."""
    common = {**common, "object": "chat.completion.chunk"}

    def chunk(delta: dict, finish_reason: str | None = None, **more) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return to_event({**common, "choices": [choice], **({"usage": None} if with_usage else {}), **more})

    yield chunk({"role": "assistant", "content": ""})
    async with aclosing(pieces):
        try:
            async for item in pieces:
                if isinstance(item, str):
                    yield chunk({"content": item})
                    continue
                yield chunk({"annotations": _cited(item)}, item.finish_reason, **item.found)
                if with_usage:
                    yield to_event({**common, "choices": [], "usage": _usage(item), **item.found})
        except ApiError as error:
            yield to_event(error.body())
            return
    yield {"data": "[DONE]"}


def _cited(reply: Reply) -> list[dict]:
    return annotations(reply.answer.sources, reply.text, nested=True)


def _usage(reply: Reply) -> dict:
    read, written = reply.answer.prompt_tokens, reply.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
