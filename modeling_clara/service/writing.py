"""Changes of a corpus, one after the other in a thread of their own.

A change is on the disk when its call returns, and the next search sees it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..corpus_clara import CompressedCorpus

logger = logging.getLogger(__name__)
T = TypeVar("T")
SMALL_SHARDS = 64  # of small changes, after which the corpus is compacted


class Writer:
    """The one thread that changes a corpus."""

    def __init__(self, corpus: CompressedCorpus):
        self.corpus = corpus
        self._thread = ThreadPoolExecutor(1, "corpus-writer")
        self._changes: set[Future] = set()

    def __len__(self) -> int:
        """Changes that run or wait, also those whose callers have gone."""
        return len(self._changes)

    async def run(self, change: Callable[[CompressedCorpus], T]) -> T:
        """The result of `change(corpus)`. It does not begin if its caller leaves before.

        A RuntimeError says that the corpus on the disk is damaged or of another model: no fault of the change.
        """

        def work() -> T:
            self._refresh()
            result = change(self.corpus)
            self.corpus.refresh()
            return result

        future = self._thread.submit(work)
        self._changes.add(future)
        future.add_done_callback(self._changes.discard)
        result = await asyncio.wrap_future(future)
        if self._has_small_shards():
            with contextlib.suppress(RuntimeError):  # it is being closed
                self._thread.submit(self._compact)
        return result

    async def refresh(self) -> None:
        """Let the next search see what other processes have written; errors are those of `run`."""
        await asyncio.wrap_future(self._thread.submit(self._refresh))

    def _refresh(self) -> None:
        try:
            self.corpus.refresh()
            self.corpus.check_model(self.corpus.model)
        except ValueError as error:
            raise RuntimeError(f"the corpus must be whole, and of this model: {error}") from error

    def close(self) -> None:
        """Finish the changes that were taken."""
        self._thread.shutdown()

    def _has_small_shards(self) -> bool:
        """Whether there are many more shards than the chunks need: every small change makes one."""
        manifest = self.corpus.manifest
        return len(manifest.shards) > SMALL_SHARDS + 2 * manifest.n_spans / 1024

    def _compact(self) -> None:
        if self._has_small_shards():
            try:
                self.corpus.compact()
            except (OSError, ValueError, RuntimeError):
                logger.warning("the corpus could not be compacted; call `compact` when it can be.", exc_info=True)
