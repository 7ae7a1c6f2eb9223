"""`CLaRaRetriever` for LangChain: `retriever = CLaRaRetriever.from_corpus("my-corpus")`, then `retriever.invoke(...)`.

A chat model is not needed here: `clara serve` speaks the protocol of `ChatOpenAI`.
"""

import functools
from typing import Any, Self

from .retrieval import chunk_id, describe, load, missing_extra, search

try:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables.config import run_in_executor
except ImportError as error:
    raise missing_extra("langchain-core", "langchain") from error


class CLaRaRetriever(BaseRetriever):
    """Retrieves chunks of a compressed corpus, the best chunk of each document.

    A `Document` has the text, the id DOCUMENT#CHUNK, and as metadata the corpus's columns with title, document_id,
    chunk and score (the cosine). `k`, `where`, `hybrid` and `min_score` may also be given to `invoke`.
    """

    corpus: Any
    """A `CompressedCorpus`, or its folder or id on the Hub, which shows changes of the corpus at every call."""
    model: Any = None
    """A `CLaRaForRAG`, or its folder or id; default the model that made the corpus."""
    k: int | None = None
    """Documents; default `retrieval_top_k` of the model's config."""
    where: dict | None = None
    """A filter, see `search_clara.py`."""
    hybrid: bool | str | None = None
    """Also rank by BM25: True, "ranks" or "scores"."""
    min_score: float | None = None
    """Documents with a lower cosine are left out."""

    def model_post_init(self, context: Any, /) -> None:
        """Load what was given by name."""
        super().model_post_init(context)
        self.corpus, self.model = load(self.corpus, self.model)

    @classmethod
    def from_corpus(cls, corpus, model=None, *, backbone=None, revision=None, dtype=None, **fields) -> Self:
        """A retriever over the corpus of a folder or an id; options as in `retrieval.load`, `fields` as above."""
        corpus, model = load(corpus, model, backbone=backbone, revision=revision, dtype=dtype)
        return cls(corpus=corpus, model=model, **fields)

    def _get_relevant_documents(
        self, query: str, *, run_manager=None, k=None, where=None, hybrid=None, min_score=None
    ) -> list[Document]:
        sources = search(
            self.model,
            self.corpus,
            query,
            top_k=self.k if k is None else k,
            where=self.where if where is None else where,
            hybrid=self.hybrid if hybrid is None else hybrid,
            min_score=self.min_score if min_score is None else min_score,
        )
        return [
            Document(
                id=chunk_id(source), page_content=source.text, metadata={**describe(source), "score": source.score}
            )
            for source in sources
        ]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager=None, k=None, where=None, hybrid=None, min_score=None
    ) -> list[Document]:
        options = {"k": k, "where": where, "hybrid": hybrid, "min_score": min_score}
        return await run_in_executor(None, functools.partial(self._get_relevant_documents, query, **options))
