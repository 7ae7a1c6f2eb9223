"""Requests that wait for the model: a bounded queue between coroutines and one thread.

It knows nothing of what a request is about.
"""

import asyncio
import threading
import time
from collections.abc import Collection

LATE_SECONDS = 1.0  # a request that has waited so long joins those that run, however few wait with it


class Overloaded(Exception):
    """The queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Overloaded):
    """The engine takes no more requests, because it is not started or being closed."""


class Request:
    """One call that waits or runs. Its caller iterates over it: pieces of text, the result last.

    Attributes:
        kind: "answer", "search" or "embed".
        wants_pieces: whether the caller reads pieces.
        is_left: whether the caller has gone.
        arrived: time.monotonic() of the call.
    """

    def __init__(self, kind: str, content, options, history=(), *, wants_pieces: bool = False):
        self.kind, self.content, self.options, self.history = kind, content, options, history
        self.wants_pieces, self.is_left, self.arrived = wants_pieces, False, time.monotonic()
        self._is_done = False  # the caller has the result
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue()

    def send(self, item) -> None:
        """Hand a piece, the result or an exception to the caller, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed
            self.is_left = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._is_done:
            raise StopAsyncIteration
        item = await self._items.get()
        self._is_done = not isinstance(item, str)
        if isinstance(item, BaseException):
            raise item
        return item

    async def aclose(self) -> None:
        """Leave: what has not begun will not begin, and generation stops."""
        self.is_left = self._is_done = True


class RequestQueue:
    """What waits, the oldest first.

    Args:
        max_batch: requests that run together.
        max_queue: requests that wait.
    """

    def __init__(self, max_batch: int, max_queue: int):
        self.max_batch, self.max_queue = max_batch, max_queue
        self.is_open = False
        self.last_seconds = 1.0  # from the arrival of a request to its result
        self._waiting: list[Request] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return sum(not request.is_left for request in self._waiting)

    def put(self, request: Request, n_elsewhere: int = 0) -> Request:
        """Let a request wait; Overloaded if too many do, of which `n_elsewhere` wait for another server."""
        with self._changed:
            self.check_open()
            n_waiting = len(self) + max(0, n_elsewhere - self.max_batch)
            if n_waiting >= self.max_queue:
                raise Overloaded(
                    f"the queue must be <= {self.max_queue} requests, got one more. Try again later.",
                    self.last_seconds,
                )
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def check_open(self) -> None:
        """Stopping unless requests are taken."""
        if not self.is_open:
            raise Stopping("the engine must be started, and is not or stops. Ask another one.", self.last_seconds)

    def open(self) -> None:
        """Take requests."""
        self.is_open = True

    def close(self) -> None:
        """Take no more requests."""
        with self._changed:
            self.is_open = False
            self._changed.notify_all()

    def wait(self) -> bool:
        """Until something waits; False if nothing does and nothing will."""
        with self._changed:
            self._changed.wait_for(lambda: len(self) or not self.is_open)
            return bool(len(self))

    def take(self, n_running: int, at_once: Collection[str] = ()) -> list[Request]:
        """The requests that join those that run.

        Requests of the kinds `at_once` do so at any time. Others wait until they are as many as run, because a few
        take almost as long as many do, or until one is late.
        """
        with self._changed:
            waiting = [request for request in self._waiting if not request.is_left]
            taken = [request for request in waiting if request.kind in at_once][: self.max_batch]
            others = [request for request in waiting if request.kind not in at_once]
            is_late = others and time.monotonic() - others[0].arrived > LATE_SECONDS
            if len(others) >= n_running or is_late:
                taken += others[: max(0, self.max_batch - n_running)]
            self._waiting = [request for request in waiting if request not in taken]
            return taken
