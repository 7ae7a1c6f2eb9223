"""Answers questions of many callers: one thread runs the model, and what waited while it was busy is one batch.

Callers are coroutines, of any event loop. It knows nothing of HTTP.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..candidates_clara import Source
from ..corpus_clara import CompressedCorpus
from ..generation_clara import Answer
from ..text_clara import check_count, check_list, check_text

T = TypeVar("T")
History = Sequence[tuple[str, str]]  # earlier turns, the oldest first: question and answer


@dataclass(frozen=True)
class AskOptions:
    """All that a request may say; see `CLaRaForRAG.answer`.

    Attributes:
        where: JSON text of a filter.
        hybrid: also rank by BM25 over the text.
        temperature: 0 is greedy search.
        top_p: the share of probability that is sampled from.
        seed: of the sampling; the same seed gives the same text.
    """

    top_k: int | None = None
    memory_size: int | None = None
    retrieval_memory_size: int | None = None
    min_score: float | None = None
    max_new_tokens: int = 64
    expand: int = 0
    explain: bool = False
    where: str | None = None
    hybrid: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Overloaded(Exception):
    """The queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Overloaded):
    """The engine takes no more requests, because it is being closed."""


class Request:
    """One call that waits or runs. Its caller iterates over it: pieces of text, the result last."""

    def __init__(self, kind: str, content, options, history: History = (), *, wants_pieces: bool = False):
        self.kind, self.content, self.options, self.history = kind, content, options, tuple(history)
        self.wants_pieces = wants_pieces
        self.is_left = self.is_done = False  # by its caller; on the caller's side
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
        if self.is_done:
            raise StopAsyncIteration
        item = await self._items.get()
        self.is_done = not isinstance(item, str)
        if isinstance(item, BaseException):
            raise item
        return item

    async def aclose(self) -> None:
        """Leave: what has not begun will not begin, and generation stops."""
        self.is_left = self.is_done = True


class Engine:
    """Answers, searches and changes a corpus for many callers.

    Args:
        model: a `CLaRaForRAG`, which belongs to the engine while it runs.
        corpus: a `CompressedCorpus` of this model.
        max_batch: requests that are answered together.
        max_queue: requests that wait; further ones are `Overloaded`.
        generator: a `RemoteGenerator` that writes the answers; default this process.
    """

    def __init__(self, model, corpus: CompressedCorpus, *, max_batch: int = 16, max_queue: int = 64, generator=None):
        check_count(max_batch, "max_batch", "Default: 16.")
        check_count(max_queue, "max_queue", "Default: 64.")
        self.model, self.corpus, self.generator = model, corpus, generator
        self.max_batch, self.max_queue = max_batch, max_queue
        self.n_running = 0
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_open, self._batch_seconds = False, 1.0
        self._thread: threading.Thread | None = None
        self._writer: ThreadPoolExecutor | None = None

    # --- calls -------------------------------------------------------------------------------------------------------

    async def answer(self, question: str, options: AskOptions = AskOptions(), history: History = ()) -> Answer:
        """What `model.answer` gives; the last question is asked, earlier turns are its context."""
        check_text(question, "question")
        return await self._result(Request("answer", question, options, history))

    def stream(
        self, question: str, options: AskOptions = AskOptions(), history: History = ()
    ) -> AsyncIterator[str | Answer]:
        """Pieces of text as they are generated, the `Answer` last; `aclose` stops the generation."""
        check_text(question, "question")
        return self._submit(Request("answer", question, options, history, wants_pieces=True))

    async def search(self, question: str, options: AskOptions = AskOptions()) -> list[Source]:
        """What `model.retrieve` gives."""
        check_text(question, "question")
        return await self._result(Request("search", question, options))

    async def embed(self, questions: list[str], memory_size: int | None = None) -> torch.Tensor:
        """What `model.encode_queries` gives: (questions, k, hidden) float32."""
        return await self._result(Request("embed", check_list(questions, "questions"), memory_size))

    async def write(self, change: Callable[[CompressedCorpus], T]) -> T:
        """Run `change(corpus)` in the one thread that writes; returns when the next search sees it."""

        def run():
            result = change(self.corpus)
            self.corpus.refresh()
            return result

        if not self._is_open:
            raise Stopping("the service is stopping.", 5.0)
        return await asyncio.get_running_loop().run_in_executor(self._writer, run)

    @property
    def n_waiting(self) -> int:
        """Requests that wait."""
        with self._changed:
            return sum(not request.is_left for request in self._waiting)

    # --- running -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the threads."""
        self.corpus.attach(self.model)
        self._is_open = True
        self._writer = ThreadPoolExecutor(1, "corpus-writer")
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Take no more requests, finish those that were taken, and stop the threads."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self._writer.shutdown)
            self._thread = self._writer = None

    def _submit(self, request: Request) -> Request:
        with self._changed:
            if not self._is_open:
                raise Stopping("the service is stopping.", 5.0)
            n_waiting = sum(not waiting.is_left for waiting in self._waiting)
            if n_waiting >= self.max_queue:
                retry_after = self._batch_seconds * n_waiting / self.max_batch
                raise Overloaded(f"{n_waiting} requests wait already. Try again later.", retry_after)
            self._waiting.append(request)
            self._changed.notify()
        return request

    async def _result(self, request: Request):
        async with aclosing(self._submit(request)):
            return await anext(request)

    def _take(self) -> list[Request]:
        """The oldest requests; none once the engine is closed and nothing waits."""
        with self._changed:
            while True:
                self._waiting = deque(request for request in self._waiting if not request.is_left)
                if self._waiting or not self._is_open:
                    break
                self._changed.wait()
            first = list(self._waiting)[:1]
            batch = [r for r in self._waiting if (r.kind, r.options) == (first[0].kind, first[0].options)]
            batch = batch[: self.max_batch]
            self._waiting = deque(request for request in self._waiting if request not in batch)
            self.n_running = len(batch)
            return batch

    def _work(self) -> None:
        while batch := self._take():
            start = time.monotonic()
            self._run(batch)
            self._batch_seconds = time.monotonic() - start
            self.n_running = 0

    def _run(self, batch: list[Request]) -> None:
        """Give each request of a kind and of equal options its result; if one is wrong, each runs alone."""
        try:
            results = getattr(self, f"_{batch[0].kind}")([request.content for request in batch], batch[0].options)
        except Exception as error:
            if len(batch) == 1:
                batch[0].send(error)
            else:
                for request in batch:
                    self._run([request])
            return
        for request, result in zip(batch, results, strict=True):
            if request.wants_pieces and result.text:
                request.send(result.text)
            request.send(result)

    def _view(self, options: AskOptions) -> CompressedCorpus:
        where = None if options.where is None else json.loads(options.where)
        return self.corpus.with_options(where=where, hybrid=options.hybrid)

    def _answer(self, questions: list[str], options: AskOptions) -> list[Answer]:
        names = ("top_k", "memory_size", "retrieval_memory_size", "min_score", "max_new_tokens", "expand", "explain")
        given = {name: getattr(options, name) for name in names}
        return self.model.answer(questions, corpus=self._view(options), **given)

    def _search(self, questions: list[str], options: AskOptions) -> list[list[Source]]:
        names = ("top_k", "retrieval_memory_size", "min_score")
        given = {name: getattr(options, name) for name in names}
        return self.model.retrieve(questions, corpus=self._view(options), **given)

    def _embed(self, questions: list[list[str]], memory_size: int | None) -> list[torch.Tensor]:
        flat = [question for row in questions for question in row]
        return self.model.encode_queries(flat, memory_size=memory_size).split([len(row) for row in questions])
