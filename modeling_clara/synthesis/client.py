"""A teacher to ask: retries, as many requests at a time as it bears, a budget, and an end when it is down.
Whatever the backend, a call either gets a completion or one of four errors; it is never silently dropped.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

from .backends import Backend, Failed
from .budget import Budget, OutOfBudget, Usage, estimate_tokens, read_prices
from .outage import OVERLOAD, BadRequest, GaveUp, Outage, Slots, TeacherDown, is_passing

__all__ = ["BadRequest", "Completion", "GaveUp", "OutOfBudget", "Teacher", "TeacherDown", "Usage", "read_prices"]

LONGEST_PAUSE = 60.0  # seconds between two tries, unless the endpoint asks for more
PATIENCE = 4  # times as many tries if the endpoint is only overloaded


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote; `finish_reason` is "length" if it was cut off. Tokens are those that were counted."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Teacher:
    """A model to ask from many tasks at once, in one event loop.

    Args:
        backend: what answers.
        model: its name there.
        concurrency: most requests at a time. An overloaded backend halves what is allowed, successes restore it.
        timeout: seconds of one try.
        retries: further tries of a request that failed; `PATIENCE` times as many if the backend is only overloaded.
        backoff: seconds before the first of them; doubled each time.
        max_tokens_total: tokens of all calls of this process; None is no limit.
        max_cost: cost of all calls of this process in the unit of `prices`.
        prices: see `read_prices`.
        outage_calls: as many calls that fail finally, with no success between them, are an outage.
        outage_seconds: as long without a success, while tries fail, is an outage too; so is a longer Retry-After.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        *,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 0.5,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: Mapping[str, float] | None = None,
        outage_calls: int = 20,
        outage_seconds: float = 600.0,
    ):
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be >= 1, got {concurrency}. Raise it.")
        for name, limit in (("max_tokens_total", max_tokens_total), ("max_cost", max_cost)):
            if limit is not None and not limit > 0:  # NaN is no limit either
                raise ValueError(f"`{name}` must be > 0, got {limit}. Raise it, or leave it out for no limit.")
        if max_cost is not None and prices is None:
            raise ValueError(f"`max_cost` needs the prices of {model}, got none. Pass a price file.")
        self.backend, self.model, self.timeout, self.retries, self.backoff = backend, model, timeout, retries, backoff
        self.usage = Usage()
        self._slots = Slots(concurrency)
        self._budget = Budget(self.usage, max_tokens_total, max_cost, prices)
        self._outage = Outage(outage_calls, outage_seconds)

    @property
    def concurrency(self) -> int:
        """Requests that may be sent at a time now."""
        return self._slots.limiter.total_tokens

    async def complete(
        self,
        messages: list[dict],
        *,
        schema: dict | None = None,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Completion:
        """The model's answer to a chat.

        Args:
            messages: `{role, content}` each.
            schema: JSON schema of the answer, with a title.
            max_tokens: of the answer.
            temperature: 0 is greedy.
            seed: of the sampling, where the backend has one.

        Raises:
            OutOfBudget: the call does not fit into the budget.
            TeacherDown: no call is answered any more.
            BadRequest: this one cannot be answered; `GaveUp` if only for now.
        """
        payload = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            payload["seed"] = seed
        if schema is not None:
            form = {"name": schema["title"], "schema": schema, "strict": True}
            payload["response_format"] = {"type": "json_schema", "json_schema": form}
        tries = overloads = 0
        while True:
            try:
                return await self._try(payload)
            except Failed as failed:
                error = failed
            if error.status in OVERLOAD:
                overloads += 1
            else:
                tries += 1
            if not is_passing(error.status):
                raise self._outage.refuse(error)
            if tries > self.retries or overloads > PATIENCE * self.retries:
                raise self._outage.give_up(error, tries + overloads)
            pause = min(LONGEST_PAUSE, self.backoff * 2 ** (tries + overloads - 1))
            if (error.retry_after or 0.0) < pause:  # otherwise the next try waits for a slot, as all calls do
                await self._outage.sleep(pause * random.uniform(0.5, 1.0))

    async def _try(self, payload: dict) -> Completion:
        """One try, when it may be sent."""
        since = await self._slots.take(self._outage)
        try:
            held = await self._budget.reserve(payload)
            self.usage.tries += 1
            try:
                async with asyncio.timeout(self.timeout):
                    completion = read_reply(await self.backend.send(payload), payload)
            except BaseException as error:
                lost = not isinstance(error, Failed)  # a timeout or a cancelled call, which may have to be paid
                self._budget.settle(held, lost=lost)
                raise
            self._budget.settle(held, completion.prompt_tokens, completion.completion_tokens)
        except TimeoutError:
            error = Failed(f"no answer within {self.timeout:g} s")
            self._slots.slow_down(since)
            self._outage.note(error)
            raise error from None
        except Failed as error:
            if error.status in OVERLOAD:
                self._slots.slow_down(since)
            if is_passing(error.status):
                self._slots.close(error.retry_after or 0.0)
                self._outage.note(error)
            raise
        finally:
            self._slots.limiter.release()
        self.usage.calls += 1
        self._slots.speed_up()
        self._outage.clear()
        return completion

    async def close(self) -> None:
        """Ends the backend."""
        await self.backend.close()

    async def __aenter__(self) -> "Teacher":
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()


def read_reply(reply: dict, payload: dict) -> Completion:
    """A chat completion; tokens that the backend does not count are estimated."""
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"].get("content") or ""
        if isinstance(text, list):  # of parts, some of which may be thoughts
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        counted = [
            estimate_tokens(value) if usage.get(key) is None else int(usage[key])
            for key, value in (("prompt_tokens", payload["messages"]), ("completion_tokens", text))
        ]
        if isinstance(text, str):
            return Completion(text, choice.get("finish_reason") or "stop", *counted)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        pass
    raise Failed(f"the answer is no chat completion: {str(reply)[:200]}")
