"""What a teacher's calls may take, and what they took: tokens and cost.
A call that could exceed what is left is not sent.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PRICED = ("prompt", "completion")
BYTES_PER_TOKEN = 3.0  # of a request whose tokens are not known; English has four


class OutOfBudget(RuntimeError):
    """The call does not fit into what is left of the budget; it was not sent."""


@dataclass
class Usage:
    """What was used so far; `cost` in the unit of the price file, `lost_tokens` of calls whose answer never came."""

    calls: int = 0
    tries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """All that count towards `max_tokens_total`."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens


def read_prices(path: str | Path, model: str) -> dict[str, float]:
    """Price of a million tokens, `{"prompt": ..., "completion": ...}`, of a model from a JSON file of many.

    Raises:
        ValueError: the file has no such price.
    """
    try:
        prices = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file of prices, got {error}. Correct it.") from error
    price = prices.get(model) if isinstance(prices, dict) else None
    if not isinstance(price, dict) or not all(_is_price(price.get(key)) for key in PRICED):
        raise ValueError(
            f'{path} must have {{"{model}": {{"prompt": NUMBER, "completion": NUMBER}}}}, prices of a million tokens. '
            "Add it."
        )
    return {key: float(price[key]) for key in PRICED}


def _is_price(value) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def estimate_tokens(value) -> int:
    """Tokens of a JSON value, rather too many."""
    return int(len(json.dumps(value, ensure_ascii=False).encode()) / BYTES_PER_TOKEN) + 1


class Budget:
    """Tokens and cost that are left. A call reserves the most it can take and settles what it took."""

    def __init__(self, usage: Usage, tokens: int | None, cost: float | None, prices: Mapping[str, float] | None):
        self.usage, self.most_tokens, self.most_cost = usage, tokens, cost
        self.prices = prices or dict.fromkeys(PRICED, 0.0)
        self.reserved_tokens, self.reserved_cost, self.settled = 0, 0.0, asyncio.Event()

    def cost(self, prompt: int, completion: int) -> float:
        return (prompt * self.prices["prompt"] + completion * self.prices["completion"]) / 1e6

    async def reserve(self, payload: dict) -> tuple[int, int, float]:
        """Waits until the calls under way leave enough; the reservation: prompt and completion tokens, cost."""
        if self.most_tokens is None and self.most_cost is None:
            return 0, 0, 0.0
        prompt = estimate_tokens([payload["messages"], payload.get("response_format")])
        held = prompt, payload["max_tokens"], self.cost(prompt, payload["max_tokens"])
        while what := self._lacks(*held):
            if not self.reserved_tokens:
                raise OutOfBudget(f"the call needs {what} left. Raise the limit; the same command goes on.")
            self.settled.clear()
            await self.settled.wait()
        self._hold(held, 1)
        return held

    def _lacks(self, prompt: int, completion: int, cost: float) -> str | None:
        """What is too much, in words."""
        tokens, used = prompt + completion, self.usage
        if self.most_tokens is not None and used.tokens + self.reserved_tokens + tokens > self.most_tokens:
            left = self.most_tokens - used.tokens
            return f"up to {tokens} tokens, and `max_tokens_total` {self.most_tokens} has {left}"
        if self.most_cost is not None and used.cost + self.reserved_cost + cost > self.most_cost:
            return f"up to {cost:.4f}, and `max_cost` {self.most_cost:g} has {self.most_cost - used.cost:.4f}"
        return None

    def _hold(self, held: tuple[int, int, float], sign: int) -> None:
        self.reserved_tokens += sign * (held[0] + held[1])
        self.reserved_cost += sign * held[2]

    def settle(
        self, held: tuple[int, int, float], prompt: int = 0, completion: int = 0, *, lost: bool = False
    ) -> None:
        """The call is over and took these tokens; one that is lost counts as reserved."""
        self._hold(held, -1)
        self.settled.set()
        if lost:
            self.usage.lost_tokens += held[0] + held[1]
            self.usage.cost += held[2]
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        self.usage.cost += self.cost(prompt, completion)
