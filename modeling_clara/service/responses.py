"""`/v1/responses`: the same answers in the form of OpenAI's Responses, of which nothing is stored.

Its stream is a fixed order of typed events around the pieces of text.
"""

import itertools
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
from .schemas import ResponsesBody
from .sources import annotations

router = APIRouter()


@router.post("/v1/responses", summary="Ask, as with OpenAI's responses", responses=STREAMED)
async def respond(body: ResponsesBody, request: Request):
    """Retrieve, read and answer; with `stream` as server-sent events."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    question, history = read_turns(service, body.input, "input")
    ask = Ask(question, history, read_options(service, body, body.max_output_tokens))
    draft = _Draft(service, body)
    if body.stream:
        return event_response(service, _events(await ask_stream(service, request, ask), draft))
    reply = await ask_all(service, request, ask)
    return Json(draft.complete(reply))


class _Draft:
    """One response as it grows."""

    def __init__(self, service: Service, body: ResponsesBody):
        self.item_id = new_id("msg_")
        self.fields = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": service.model_id,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def message(self, status: str, parts: list[dict]) -> dict:
        """The one item of the output."""
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": parts}

    def complete(self, reply: Reply) -> dict:
        """The response with its text, sources and usage."""
        is_whole = reply.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        read, written = reply.answer.prompt_tokens, reply.completion_tokens
        return {
            **self.fields,
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self.message(status, [text_part(reply)])],
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": written,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + written,
            },
            **reply.found,
        }


def text_part(reply: Reply) -> dict:
    """The text with its citations."""
    cited = annotations(reply.answer.sources, reply.text, nested=False)
    return {"type": "output_text", "text": reply.text, "annotations": cited, "logprobs": []}


async def _events(pieces: AsyncIterator[str | Reply], draft: _Draft) -> AsyncIterator[dict]:
    numbers = itertools.count()

    def event(kind: str, **fields) -> dict:
        return to_event({"type": f"response.{kind}", "sequence_number": next(numbers), **fields}, f"response.{kind}")

    yield event("created", response=draft.fields)
    yield event("in_progress", response=draft.fields)
    yield event("output_item.added", output_index=0, item=draft.message("in_progress", []))
    place = {"item_id": draft.item_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield event("content_part.added", **place, part=empty)
    async with aclosing(pieces):
        try:
            async for item in pieces:
                if isinstance(item, str):
                    yield event("output_text.delta", **place, delta=item, logprobs=[])
                    continue
                part, done = text_part(item), draft.complete(item)
                for index, citation in enumerate(part["annotations"]):
                    fields = {"annotation_index": index, "annotation": citation}
                    yield event("output_text.annotation.added", **place, **fields)
                yield event("output_text.done", **place, text=item.text, logprobs=[])
                yield event("content_part.done", **place, part=part)
                yield event("output_item.done", output_index=0, item=done["output"][0])
                yield event(done["status"], response=done)
        except ApiError as error:
            fields = {"code": error.code, "message": error.message, "param": error.param}
            yield to_event({"type": "error", "sequence_number": next(numbers), **fields}, "error")
