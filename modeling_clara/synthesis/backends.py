"""Where a teacher's answers come from: an OpenAI-compatible endpoint, a local transformers model, or llama-server.
A backend sends one request once and fails with `Failed`; retries, budget and concurrency are the client's.
"""

import email.utils
import json
import logging
import os
import re
import time
from typing import Any, Protocol

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
NO_KEY = "none"  # servers of one's own want some key, and any will do


class Failed(Exception):
    """One request failed.

    Args:
        message: what the other side answered.
        status: its HTTP status; None if there was no answer.
        retry_after: seconds after which it wants the next request.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Backend(Protocol):
    """What the client needs."""

    async def send(self, payload: dict) -> dict:
        """The reply to one request, both as OpenAI's chat completions have them.

        Raises:
            Failed: there is none.
        """

    async def close(self) -> None:
        """Frees what the backend holds; it can be called twice."""


def connect(
    model: str,
    *,
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    device: str | None = None,
) -> Backend:
    """The backend that serves a model.

    Args:
        model: name at the endpoint; without `base_url` a GGUF file, or a folder or Hub id of a transformers model.
        base_url: address of an endpoint, to which "/chat/completions" is added.
        api_key_env: environment variable that holds the endpoint's key.
        concurrency: requests at a time: slots of llama-server, rows of a batch of a transformers model.
        device: of a transformers model; default is a GPU if there is one.
    """
    if base_url:
        return Endpoint(base_url, api_key_env)
    if model.lower().endswith(".gguf"):
        from .llama_server import LlamaServer

        return LlamaServer(model, concurrency)
    from .local_model import LocalModel

    return LocalModel(model, concurrency, device)


def in_words(payload: dict) -> dict:
    """The request with its schema in the last message instead of `response_format`."""
    if "response_format" not in payload:
        return payload
    schema = payload["response_format"]["json_schema"]["schema"]
    *before, last = payload["messages"]
    text = f"{last['content']}\n\nAnswer with one JSON object of this JSON schema, and nothing else:\n"
    messages = [*before, {**last, "content": text + json.dumps(schema, ensure_ascii=False)}]
    return {**{key: value for key, value in payload.items() if key != "response_format"}, "messages": messages}


def renamed(payload: dict) -> dict:
    """The request with the newer name of `max_tokens`."""
    rest = {key: value for key, value in payload.items() if key != "max_tokens"}
    return {**rest, "max_completion_tokens": payload["max_tokens"]}


# What some endpoints refuse: key of the request -> words of the refusal, the request as they take it.
REFUSALS = {
    "response_format": (r"response_format|json_schema", in_words),
    "max_tokens": (r"max_completion_tokens", renamed),
    "temperature": (r"'?temperature'?", lambda payload: {k: v for k, v in payload.items() if k != "temperature"}),
    "seed": (r"'?seed'?", lambda payload: {k: v for k, v in payload.items() if k != "seed"}),
}
REFUSED = r"not support|unsupported|supported values|(un|not )available|unknown|unrecognized|unexpected|invalid"
REFUSED += r"|not (permitted|allowed|implemented)|enabled only"


def retry_after(headers: Any) -> float | None:
    """Seconds of a header Retry-After, which is a number or an HTTP date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


class Endpoint:
    """Any OpenAI-compatible server, through the `openai` client without its retries.

    What it refuses by name (a JSON schema, `max_tokens`, `temperature`, `seed`) it is not asked for again.
    """

    def __init__(self, base_url: str, api_key_env: str = "OPENAI_API_KEY"):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "an endpoint needs openai: pip install openai, or the extra `synthesis` from a clone."
            ) from error

        self.base_url, self.api_key_env, self.refused = base_url, api_key_env, set()
        self.client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get(api_key_env) or NO_KEY,
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT_SECONDS),
        )

    async def send(self, payload: dict) -> dict:
        import openai

        body = payload
        for name in REFUSALS:
            if name in self.refused and name in body:
                body = REFUSALS[name][1](body)
        try:
            reply = await self.client.post("/chat/completions", cast_to=object, body=body)
        except openai.APIStatusError as error:
            if self._learn(error, body):
                return await self.send(payload)
            raise self._failed(error.message, error.status_code, error.code, error.response.headers) from error
        except openai.APIConnectionError as error:
            raise Failed(f"no answer from {self.base_url}: {error.__cause__ or error}") from error
        except ValueError as error:
            raise Failed(f"{self.base_url} answered with damaged JSON: {error}") from error
        if isinstance(reply, dict) and reply.get("choices"):
            return reply
        if isinstance(reply, dict) and isinstance(error := reply.get("error"), dict):
            code = error.get("code")
            raise self._failed(str(error.get("message")), code if isinstance(code, int) else None, code, {})
        raise Failed(f"{self.base_url} answered without a completion: {str(reply)[:200]!r}")

    def _learn(self, error, body: dict) -> bool:
        """Whether the refusal names something that the request can do without."""
        if error.status_code not in (400, 422, 500, 501) or not re.search(REFUSED, error.message, re.IGNORECASE):
            return False
        for name, (words, _) in REFUSALS.items():
            if name in body and re.search(words, error.message, re.IGNORECASE):
                if name not in self.refused:
                    logger.warning("%s refuses `%s` and is asked without it: %s", self.base_url, name, error.message)
                self.refused.add(name)
                return True
        return False

    def _failed(self, message: str, status: int | None, code: Any, headers: Any) -> Failed:
        if status in (401, 403):
            there = "is set" if os.environ.get(self.api_key_env) else "is not set"
            message += f" (the key is read from the environment variable {self.api_key_env}, which {there})"
        if code == "insufficient_quota":
            status = 402  # it comes as 429, but waiting does not help
        return Failed(message, status, retry_after(headers))

    async def close(self) -> None:
        await self.client.close()
