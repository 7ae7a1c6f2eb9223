"""Answers questions of many callers with one model: one thread runs it, on all that waits at a time.

Callers are coroutines, of any event loop. It knows nothing of HTTP.
"""

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Self, TypeVar

import torch

from ..adapters_clara import eval_mode
from ..candidates_clara import Source
from ..corpus_clara import CompressedCorpus
from ..generation_clara import Answer, Pieces, decode_answer
from ..reading_clara import Reading, check_expand_below, prepare_readings
from ..text_clara import check_count, check_list, check_text
from .decoding import Decoder, Draft, check_sampling, prompt_embeddings
from .history import History, check_history, query_of
from .options import SEARCHING, WRITING, AskOptions
from .queueing import Overloaded, Request, RequestQueue, Stopping
from .writing import Writer

__all__ = ["AskOptions", "Engine", "Overloaded", "Stopping"]

T = TypeVar("T")
TURN_SECONDS = 1.0  # of the model's thread, after which a write may compress its next documents


class _Reply(Draft):
    """An answer that is being written for a request from the first of its readings; the others may follow."""

    def __init__(self, request: Request, keywords: list[str] | None, readings: list[Reading], n_read: int = 0):
        options = request.options
        sampler = check_sampling(options.temperature, options.top_p, options.seed)
        super().__init__(readings[0], options.max_new_tokens, sampler)
        self.request, self.later, self.pieces = request, readings[1:], Pieces()
        self.answer = _unwritten(readings[0], keywords, n_read)

    @property
    def is_unsure(self) -> bool:
        """Whether its text, which is whole, is not the answer: that of the next reading is."""
        return bool(self.later) and self.confidence < self.request.options.expand_below

    def next(self) -> Self:
        """The answer from the next reading."""
        return type(self)(self.request, self.answer.keywords, self.later, self.answer.prompt_tokens)


def _unwritten(reading: Reading, keywords: list[str] | None, n_read: int = 0) -> Answer:
    """The answer from a reading without its text; `n_read` positions of input were read before it."""
    return Answer("", reading.sources, keywords, prompt_tokens=n_read + len(reading.prompt.input_ids))


class _Prepared(NamedTuple):
    """What a remote generator needs."""

    answer: Answer  # without its text
    embeddings: torch.Tensor  # (tokens, hidden)


class Engine:
    """Answers, searches and changes a corpus for many callers; `async with` starts and closes it.

    Args:
        model: a `CLaRaForRAG`, which belongs to the engine while it runs.
        corpus: a `CompressedCorpus` of this model.
        max_batch: answers that are written together.
        max_queue: requests that wait; further ones are `Overloaded`.
        generator: a `RemoteGenerator` that writes the answers; default this process.
        merge: reasoner and generator are merged while it runs: faster, for two more copies of the adapted weights.
        prefix_bytes: for beginnings of prompts, whose documents were read before; 0 switches that off.
    """

    def __init__(
        self,
        model,
        corpus: CompressedCorpus,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        generator=None,
        merge: bool = True,
        prefix_bytes: int = 256 * 2**20,
    ):
        check_count(max_batch, "max_batch", "Default: 16.")
        check_count(max_queue, "max_queue", "Default: 64.")
        check_count(prefix_bytes, "prefix_bytes", "Default: 256 MiB.", least=0)
        self.model, self.corpus, self.generator = model, corpus, generator
        self.merge, self.prefix_bytes = merge, prefix_bytes
        self._queue = RequestQueue(max_batch, max_queue)
        self._n_here = self._n_remote = 0
        self.on_pass: Callable[[int], None] = lambda n_requests: None  # called by the model's thread
        self._counting = threading.Lock()
        build = functools.partial(model.build_generation_config, None)
        self._generation = functools.lru_cache(maxsize=64, typed=True)(build)  # by `max_new_tokens`
        self._decoder: Decoder | None = None
        self._stack = contextlib.ExitStack()

    @property
    def n_waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def n_running(self) -> int:
        """Requests that are worked on, here or by the remote generator."""
        return self._n_here + self._n_remote

    # --- calls -------------------------------------------------------------------------------------------------------

    async def answer(self, question: str, options: AskOptions = AskOptions(), history: History = ()) -> Answer:
        """The answer to a question; with its options and without history that of `model.answer`.

        A TypeError or ValueError says what is wrong with the request.

        Args:
            question: the last one of a conversation.
            options: as a request may give them.
            history: earlier turns, the oldest first, as pairs of question and answer: context for the search, see
                `history.py`.
        """
        result = await self._result(self._ask(question, options, history))
        if isinstance(result, Answer):
            return result
        with self._remotely():
            texts = await self.generator.generate([result.embeddings], **self._remote_options(options))
        return replace(result.answer, text=texts[0])

    def stream(
        self, question: str, options: AskOptions = AskOptions(), history: History = ()
    ) -> AsyncIterator[str | Answer]:
        """Pieces of an answer's text as it is written, then the `Answer`; `aclose` of the iterator stops the writing.

        The arguments are those of `answer`. A full queue and a wrong type raise here, other errors at the first item.
        """
        request = self._queue.put(self._ask(question, options, history, wants_pieces=True), self._n_remote)
        return request if self.generator is None else self._stream_remote(request)

    async def search(self, question: str, options: AskOptions = AskOptions()) -> list[Source]:
        """What `model.retrieve` finds."""
        return await self._result(Request("search", check_text(question, "question"), options))

    async def embed(self, questions: list[str], memory_size: int | None = None) -> torch.Tensor:
        """Queries (questions, k, hidden) float32 of `model.encode_queries`."""
        questions = [check_text(text, f"questions[{n}]") for n, text in enumerate(check_list(questions, "questions"))]
        return await self._result(Request("embed", questions, memory_size))

    async def write(self, change: Callable[[CompressedCorpus], T]) -> T:
        """Run `change(corpus)` in the thread that writes, one after the other; the next search sees what it did.

        Answers wait for a pass of the compressor at most: pass `batch_size=4` to `add` and the like to keep it short.
        """
        self._queue.check_open()
        return await self._writer.run(change)

    async def refresh(self) -> None:
        """Let the next search see what other processes have written; a RuntimeError if that cannot be served."""
        self._queue.check_open()
        await self._writer.refresh()

    @property
    def n_writes(self) -> int:
        """Changes that run or wait, also those whose callers have gone."""
        return len(self._writer)

    async def start(self) -> None:
        """Get ready and take requests."""
        self.corpus.attach(self.model)
        if self.generator is not None:
            await self.generator.connect(self.model)
        if self.merge:
            roles = ("reasoner",) if self.generator is not None else ("reasoner", "generator")
            self._stack.enter_context(self.model.roles.merged(roles, self.model.lock))
        if self.generator is None:
            self._decoder = Decoder(self.model, self.prefix_bytes)
        self._writer = Writer(self.corpus)
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._queue.open()
        self._thread.start()

    async def close(self) -> None:
        """Take no more requests, finish those that were taken, and leave the model as it was."""
        if not self._queue.is_open:
            return
        self._queue.close()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._writer.close)
        while self._n_remote:
            await asyncio.sleep(0.02)
        if self.generator is not None:
            await self.generator.close()
        self._stack.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception) -> None:
        await self.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _ask(self, question: str, options: AskOptions, history: History, *, wants_pieces: bool = False) -> Request:
        check_text(question, "question")
        check_sampling(options.temperature, options.top_p, options.seed)
        check_expand_below(options.expand_below, options.expand)
        if options.expand_below is not None and self.generator is not None:
            raise ValueError(
                "`expand_below` must be left out where another server writes the answers: it does not say how sure it "
                "is. Pass `expand` alone."
            )
        return Request("answer", question, options, check_history(history), wants_pieces=wants_pieces)

    async def _result(self, request: Request):
        async with contextlib.aclosing(self._queue.put(request, self._n_remote)):
            return await anext(request)

    def _remote_options(self, options: AskOptions) -> dict:
        given = {name: getattr(options, name) for name in WRITING}
        return {**given, "stop_ids": self._generation(options.max_new_tokens).eos_token_id}

    @contextlib.contextmanager
    def _remotely(self):
        with self._counting:
            self._n_remote += 1
        try:
            yield
        finally:
            with self._counting:
                self._n_remote -= 1

    async def _stream_remote(self, request: Request) -> AsyncIterator[str | Answer]:
        async with contextlib.aclosing(request):
            result = await anext(request)
        if isinstance(result, _Prepared):
            text = ""
            pieces = self.generator.stream(result.embeddings, **self._remote_options(request.options))
            with self._remotely():
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        text += piece
                        yield piece
            result = replace(result.answer, text=text)
        yield result

    # --- the model's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        drafts = [] if self._decoder is None else self._decoder.drafts
        while drafts or self._queue.wait():
            until = time.monotonic() + TURN_SECONDS
            with self.model.lock, eval_mode(self.model), torch.no_grad():
                while time.monotonic() < until:
                    batch = self._queue.take(len(drafts), at_once=("search", "embed"))
                    if not batch and not drafts:
                        break
                    self._n_here = len(batch) + len(drafts)
                    self._advance(batch)
                    drafts = [] if self._decoder is None else self._decoder.drafts
                    self._n_here = len(drafts)

    def _advance(self, batch: list[Request]) -> None:
        """Do what can be done at once for new requests, and write the next token of the others."""
        decoder = self._decoder
        try:
            self.on_pass(self._n_here)
            if decoder is not None:
                decoder.drop([draft for draft in decoder.drafts if draft.request.is_left])
                if decoder.drafts:
                    decoder.step()
            replies = [reply for requests in _groups(batch) for reply in self._begin(requests)]
            if replies:
                decoder.add(replies)
            if decoder is not None:
                self._deliver(decoder)
        except Exception as error:  # no fault of a single request
            running = [] if decoder is None else [draft.request for draft in (*decoder.drafts, *decoder.ended)]
            self._decoder = None if decoder is None else Decoder(self.model, self.prefix_bytes)
            for request in (*batch, *running):
                request.send(error)

    def _deliver(self, decoder: Decoder) -> None:
        """Send the new pieces, and the answers that are whole."""
        ended, unsure = [(reply, True) for reply in decoder.ended], []
        for reply, is_whole in [*((reply, False) for reply in decoder.drafts), *ended]:
            request = reply.request
            if reply.error is None and reply.later and (not is_whole or reply.is_unsure):
                unsure += [reply.next()] if is_whole else []  # until then nobody knows whether it is the answer
                continue
            if reply.error is not None:
                request.send(reply.error)
            elif is_whole or request.wants_pieces:
                text = decode_answer(self.model, reply.ids, list(decoder.ends))
                if request.wants_pieces and (piece := reply.pieces.cut(text, is_whole)):
                    request.send(piece)
                if is_whole:
                    n_tokens = sum(token not in decoder.ends for token in reply.ids)
                    written = {"text": text, "confidence": reply.confidence, "completion_tokens": n_tokens}
                    self._finish(request, replace(reply.answer, **written))
        decoder.ended = []
        if unsure:
            try:
                decoder.add(unsure)
            except Exception as error:  # the decoder may not know them yet
                for reply in unsure:
                    reply.request.send(error)
                raise
            self._deliver(decoder)

    def _finish(self, request: Request, result) -> None:
        request.send(result)
        self._queue.last_seconds = time.monotonic() - request.arrived

    def _begin(self, requests: list[Request]) -> list[_Reply]:
        """Send the results of one kind and equal options, or return the answers to be written.

        If something is wrong, each request is tried alone: an error is for the one that caused it.
        """
        options = requests[0].options
        try:
            results = getattr(self, f"_{requests[0].kind}")(requests, options)
        except Exception as error:
            if len(requests) > 1:
                return [reply for request in requests for reply in self._begin([request])]
            requests[0].send(error)
            return []
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Exception):
                request.send(result)
            elif not isinstance(result, _Reply):
                self._finish(request, result)
        return [result for result in results if isinstance(result, _Reply)]

    def _search(self, requests: list[Request], options: AskOptions) -> list[list[Source]]:
        names = ("top_k", "retrieval_memory_size", "min_score")
        given = {name: getattr(options, name) for name in names}
        return self.model.retrieve([request.content for request in requests], corpus=self._view(options), **given)

    def _embed(self, requests: list[Request], memory_size: int | None) -> Sequence[torch.Tensor]:
        rows = [request.content for request in requests]
        memory = self.model.encode_queries([text for row in rows for text in row], memory_size=memory_size)
        return memory.split([len(row) for row in rows])

    def _answer(self, requests: list[Request], options: AskOptions) -> list:
        """Of each request an answer to be written, one that needs no writing, or what is wrong."""
        searched = (None, self._view(options), options.top_k, options.retrieval_memory_size, options.min_score)
        queries = [query_of(request.content, request.history) for request in requests]
        hits, words = self.model.search_to_read(
            queries, searched, options.memory_size, options.expand, options.explain
        )
        results = []
        for request, row, keywords in zip(requests, hits, words, strict=True):
            if not row:
                results.append(Answer("", [], keywords, abstained=True))
                continue
            try:
                generation = self._generation(request.options.max_new_tokens)
                given = (options.memory_size, options.expand, options.expand_below, generation, "question")
                readings = prepare_readings(self.model, request.content, row, *given)
            except (ValueError, TypeError) as error:
                results.append(error)
                continue
            if self.generator is None:
                results.append(_Reply(request, keywords, readings))
            else:
                answer = _unwritten(readings[0], keywords)
                results.append(_Prepared(answer, prompt_embeddings(self.model, readings[0])))
        return results

    def _view(self, options: AskOptions) -> CompressedCorpus:
        try:
            where = None if options.where is None else json.loads(options.where)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`where` must be JSON, got {options.where[:80]!r}. Correct it.") from error
        return self.corpus.with_options(where=where, hybrid=options.hybrid)


def _groups(batch: Iterable[Request]) -> list[list[Request]]:
    """Requests that are searched for together."""
    groups: dict[Hashable, list[Request]] = {}
    for request in batch:
        options = request.options
        asked = tuple(getattr(options, name) for name in SEARCHING) if isinstance(options, AskOptions) else options
        groups.setdefault((request.kind, asked), []).append(request)
    return list(groups.values())
