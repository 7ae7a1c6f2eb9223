"""datatrove's InferenceRunner with our teacher as its server: what was answered or written survives a kill.

datatrove shares, counts and caches; waiting, retries, budget and repair are the teacher's. Import it inside functions:
it needs the extra `synthesis`.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..corpus.storage import whole_size
from ..storage_clara import replacing
from .client import BadRequest, Completion, GaveUp, OutOfBudget, TeacherDown

try:
    import aiofiles  # noqa: F401 - the three that datatrove imports when it runs
    import aiosqlite  # noqa: F401
    import xxhash  # noqa: F401
    from datatrove.data import Document
    from datatrove.pipeline.inference.checkpointing import CheckpointManager, RequestCache
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.inference.types import InferenceError, InferenceResult, ServerError
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from loguru import logger
except ImportError as error:
    raise ImportError(
        f"synthesis needs {error.name}, which is not installed: pip install -e '.[synthesis]' in a clone."
    ) from error

logger.disable("datatrove")  # its log is no progress

BAD_REQUEST = "bad_request"  # finish_reason of a request that will never work, so that the cache keeps that as well
RECORDS_PER_CHUNK = 256  # of a file of outcomes, and how many a resumed run may have to read again
READ_AHEAD = 256  # documents that are read in one call to the thread


class TeacherServer:
    """What the runner takes for its server."""

    def __init__(self, teacher):
        self.teacher = teacher

    async def __aenter__(self) -> "TeacherServer":
        return self

    async def __aexit__(self, *_) -> None:
        await self.teacher.close()

    async def make_request(self, payload: dict) -> dict:
        """One answer in the shape of OpenAI's chat completions."""
        arguments = {name: value for name, value in payload.items() if name != "model"}
        try:
            answer: Completion = await self.teacher.complete(arguments.pop("messages"), **arguments)
        except GaveUp as error:  # not for the cache: a later run may try it again
            raise InferenceError(None, str(error)) from error
        except BadRequest as error:
            return _response(str(error), BAD_REQUEST, 0, 0)
        except (OutOfBudget, TeacherDown, OSError) as error:  # the runner would try an OSError again for minutes
            raise ServerError(error) from error
        return _response(answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens)


def _response(text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> dict:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"message": {"content": text}, "finish_reason": finish_reason}], "usage": usage}


async def read_result(request: Awaitable[InferenceResult]) -> Completion:
    """The answer of a request; a `BadRequest` if it has none."""
    try:
        result = await request
    except InferenceError as error:
        if isinstance(error.__cause__, GaveUp):
            raise error.__cause__ from None
        raise
    if result.finish_reason == BAD_REQUEST:
        raise BadRequest(result.text)
    usage = result.usage
    return Completion(result.text, result.finish_reason, usage["prompt_tokens"], usage["completion_tokens"])


class DurableCache(RequestCache):
    """Answers are on disk before anything follows from them."""

    async def initialize(self, rank: int) -> None:
        await super().initialize(rank)
        await self._conn.execute("PRAGMA journal_mode=WAL")  # a commit costs no wait for the disk
        await self._conn.execute("PRAGMA synchronous=NORMAL")

    async def store_result(self, *args, **kwargs) -> None:
        await super().store_result(*args, **kwargs)
        await self.flush()


class SafeCheckpoints(CheckpointManager):
    """Can be killed at any moment: what is removed is noted as done before."""

    async def parse_existing_checkpoints(self, rank: int, output_writer_context) -> tuple[int, set[str]]:
        """Cuts lines off that a killed run did not finish; without that the next one would be lost with them."""
        for path in Path(self.checkpoints_local_dir, f"{rank:05d}").glob("chunk_*.jsonl"):
            with open(path, "r+b") as file:
                file.truncate(whole_size(file))
        return await super().parse_existing_checkpoints(rank, output_writer_context)

    async def update_last_chunk_index(self, rank: int) -> None:
        folder = Path(self.checkpoints_local_dir)
        async with self.checkpoint_file_lock:
            while (index := self.last_chunk_index + 1) in self.new_completed_chunks:
                with replacing(folder / "last_chunk" / f"{rank:05d}.txt") as partial:
                    partial.write_text(str(index))
                self.last_chunk_index = index
                (folder / f"{rank:05d}" / f"chunk_{index:05d}.jsonl").unlink(missing_ok=True)
                self.file_locks.pop(index, None)
                self.per_chunk_counts.pop(index)
                self.new_completed_chunks.remove(index)
                await self.request_cache.drop_chunk(index)

    async def cleanup_last_chunk(self, rank: int, chunk_index: int) -> None:
        """Nothing: the writer has not closed that file yet."""


class SynthesisRunner(InferenceRunner):
    """Calls `rollout(document, generate)` for every document; its outcomes become lines of `folder/outcomes/`.

    Args:
        rollout: gives the outcome, a dict.
        folder: of the run's work; `checkpoints/` has the answers of documents that are not finished.
        teacher: see `client.Teacher`.
        concurrency: calls at a time at most, and documents at a time.
    """

    def __init__(
        self,
        rollout: Callable[..., Awaitable[dict]],
        folder: Path,
        teacher,
        concurrency: int,
    ):
        def adapt(_, document: Document) -> dict:
            (outcome,) = document.metadata[self.metadata_key]
            return outcome

        name = "${rank}_${chunk_index}.jsonl"
        writer = JsonlWriter(str(folder / "outcomes"), output_filename=name, compression=None, adapter=adapt)
        config = InferenceConfig("custom", "teacher", metric_interval=10**9, max_concurrent_generations=concurrency)
        super().__init__(rollout, config, writer)
        checkpoints = str(folder / "checkpoints")
        self.request_cache = DurableCache(checkpoints)
        self.checkpoint_manager = SafeCheckpoints(checkpoints, RECORDS_PER_CHUNK, self.request_cache)
        self.metrics.window = 1  # seconds for which datatrove remembers every request
        self.teacher, self.in_flight = teacher, asyncio.Semaphore(concurrency)
        self.n_running, self.is_over = 0, False

    def _init_server(self, rank: int) -> TeacherServer:
        return TeacherServer(self.teacher)

    async def _cached_request(self, *args, **kwargs) -> InferenceResult:
        """A call is in flight until its answer is on disk: datatrove's own makes the next one before.

        When the budget is spent, answers that have come are kept before the run ends.
        """
        async with self.in_flight:
            self.n_running += 1
            try:
                return await super()._cached_request(*args, **kwargs)
            except ServerError as error:
                self.is_over = self.is_over or isinstance(error.error, OutOfBudget)
                raise
            finally:
                self.n_running -= 1
                while self.is_over and self.n_running:
                    await asyncio.sleep(0.01)

    async def _async_data_gen(self, sync_gen: Iterable[Document]) -> AsyncIterator[Document]:
        """datatrove's own crosses to the thread for every document, which is most of the time of a resumed run."""
        loop, documents = asyncio.get_running_loop(), iter(sync_gen)
        with ThreadPoolExecutor(max_workers=1) as reader:
            while some := await loop.run_in_executor(reader, lambda: list(itertools.islice(documents, READ_AHEAD))):
                for document in some:
                    yield document

    async def _save_document(self, document, output_writer_context, rank, chunk_index, count_processed_stat=True):
        """datatrove's own goes on without the document if the disk is full."""
        await self.checkpoint_manager.write_document(document, rank, chunk_index, output_writer_context)

    async def run_async(self, data_gen: Iterable[Document], rank: int = 0) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)  # the first error ends the run; the others are not printed
        try:
            await super().run_async(data_gen, rank)
        except (ServerError, InferenceError) as error:
            raise _cause(error) from None


def _cause(error: Exception) -> Exception:
    """What the runner's own errors were raised for."""
    while isinstance(error, ServerError | InferenceError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error
