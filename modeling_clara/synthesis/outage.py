"""How many requests a teacher bears, and when it is down.
One call that fails is told from a teacher that fails; only the second ends a run.
"""

import asyncio
import logging
import random
import time

from .backends import Failed

logger = logging.getLogger(__name__)

OVERLOAD = (429, 503, 529)
WORTH_ANOTHER_TRY = (408, 409, 425, *OVERLOAD)  # and 5xx
NO_ACCESS = (401, 402, 403)
FAILURES = 3  # tries that make an outage if they last; calls, refused or given up, if none was ever answered


class TeacherDown(RuntimeError):
    """No call will be answered: the endpoint is gone, refuses the key or has failed for a long time."""


class BadRequest(RuntimeError):
    """This one request will never work."""


class GaveUp(BadRequest):
    """This one request failed every time, while others are answered; a later run may try it again."""


class Slots:
    """How many requests may be under way: halved when the backend is overloaded, one more per round of successes."""

    def __init__(self, most: int):
        import anyio

        self.most, self.limiter = most, anyio.CapacityLimiter(most)
        self.halved = self.successes = 0
        self.opens_at = 0.0  # no request before that, because the backend said so

    async def take(self, outage: "Outage") -> int:
        """Waits for a slot; returns what `slow_down` wants to know."""
        while True:
            if (pause := self.opens_at - time.monotonic()) > 0:
                await outage.sleep(pause * random.uniform(1.0, 1.1))
            outage.check()
            await self.limiter.acquire()
            if not outage.reason and self.opens_at <= time.monotonic():
                return self.halved
            self.limiter.release()

    def close(self, seconds: float) -> None:
        """No request for so long."""
        self.opens_at = max(self.opens_at, time.monotonic() + seconds)

    def slow_down(self, since: int) -> None:
        """Halves what is allowed, once for all requests that were under way at that time."""
        if since == self.halved:
            self.halved, self.successes = self.halved + 1, 0
            self.limiter.total_tokens = max(1, self.limiter.total_tokens // 2)
            logger.info("the teacher is overloaded: %d requests at a time", self.limiter.total_tokens)

    def speed_up(self) -> None:
        """One more at a time, after as many successes as there are slots."""
        self.successes += 1
        if self.limiter.total_tokens < self.most and self.successes >= self.limiter.total_tokens:
            self.successes = 0
            self.limiter.total_tokens += 1


class Outage:
    """Tells a failing call from a failing teacher."""

    def __init__(self, calls: int, seconds: float):
        self.calls, self.seconds = calls, seconds
        self.answered, self.reason = False, ""
        self.failed_calls = self.failed_tries = 0
        self.since, self.over = None, asyncio.Event()

    def check(self) -> None:
        if self.reason:
            raise TeacherDown(self.reason)

    def end(self, why: str, remedy: str) -> None:
        """Every call fails from now on, those that sleep at once."""
        self.reason = self.reason or f"the teacher is down: {why}. {remedy}; the same command goes on."
        self.over.set()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, and raises TeacherDown as soon as there is nothing to wait for."""
        try:
            await asyncio.wait_for(self.over.wait(), seconds)
        except TimeoutError:
            pass
        self.check()

    def note(self, error: Failed) -> None:
        """A try failed that might work again."""
        self.since, self.failed_tries = self.since or time.monotonic(), self.failed_tries + 1
        lasted = time.monotonic() - self.since
        if (error.retry_after or 0.0) > self.seconds:
            self.end(f"it wants to be asked again in {error.retry_after:.0f} s, {described(error)}", "Wait")
        elif lasted > self.seconds and self.failed_tries >= FAILURES:
            self.end(
                f"no call was answered for {lasted:.0f} s, the last with {described(error)}", "Look at the server"
            )

    def clear(self) -> None:
        """A call was answered."""
        self.answered, self.since, self.failed_calls, self.failed_tries = True, None, 0, 0

    def refuse(self, error: Failed) -> Exception:
        """What to raise for a refusal."""
        if error.status in NO_ACCESS:
            self.end(described(error), "Set the key, or look at the account")
        elif error.status == 404 and not self.answered:
            self.end(described(error), "Check the model's name and the address")
        elif not self.answered:
            self._count(error, FAILURES)
        return TeacherDown(self.reason) if self.reason else BadRequest(described(error))

    def give_up(self, error: Failed, tries: int) -> Exception:
        """What to raise after the last try."""
        self._count(error, self.calls if self.answered else FAILURES)
        return TeacherDown(self.reason) if self.reason else GaveUp(f"{tries} tries failed, {described(error)}")

    def _count(self, error: Failed, most: int) -> None:
        self.failed_calls += 1
        if self.failed_calls >= most:
            self.end(
                f"{self.failed_calls} calls in a row failed, the last with {described(error)}", "Look at the server"
            )


def described(error: Failed) -> str:
    """The other side's words with its status."""
    return f"HTTP {error.status}: {error}" if error.status else str(error)


def is_passing(status: int | None) -> bool:
    """Whether a request that failed so may work if it is sent again."""
    return status is None or status in WORTH_ANOTHER_TRY or status >= 500
