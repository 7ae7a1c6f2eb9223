"""`CLaRaRetriever` for LlamaIndex: `CLaRaRetriever("my-corpus").retrieve(...)`, for any query engine.

The cosine is the score of the node and no metadata, because LlamaIndex takes nodes of equal text and metadata as one.
"""

import asyncio

from ..service.sources import json_value  # which needs nothing of the service
from .retrieval import chunk_id, describe, load, missing_extra, search

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

PLACES = ["document_id", "chunk"]  # metadata that neither a language model nor an embedding reads


class CLaRaRetriever(BaseRetriever):
    """Retrieves chunks of a compressed corpus, the best chunk of each document.

    A node has the text, the id DOCUMENT#CHUNK, the document's id as `ref_doc_id`, and as metadata the corpus's columns
    with title, document_id and chunk. Times are ISO text: LlamaIndex stores and traces nodes as JSON.

    Args:
        corpus: a `CompressedCorpus`, or its folder or id on the Hub, which shows changes of the corpus at every call.
        model: a `CLaRaForRAG`, or its folder or id; default the model that made the corpus.
        similarity_top_k: documents; default `retrieval_top_k` of the model's config.
        where: a filter, see `search_clara.py`.
        hybrid: also rank by BM25: True, "ranks" or "scores".
        min_score: documents with a lower cosine are left out.
        backbone, revision, dtype: of what is loaded, see `retrieval.load`.
        base: arguments of `BaseRetriever`, such as `callback_manager`.
    """

    def __init__(
        self,
        corpus,
        model=None,
        *,
        similarity_top_k: int | None = None,
        where: dict | None = None,
        hybrid: bool | str | None = None,
        min_score: float | None = None,
        backbone: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        **base,
    ):
        super().__init__(**base)
        self.corpus, self.model = load(corpus, model, backbone=backbone, revision=revision, dtype=dtype)
        self.similarity_top_k, self.where, self.hybrid, self.min_score = similarity_top_k, where, hybrid, min_score

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        options = {"top_k": self.similarity_top_k, "where": self.where, "hybrid": self.hybrid}
        sources = search(self.model, self.corpus, query_bundle.query_str, min_score=self.min_score, **options)
        return [NodeWithScore(node=_node(source), score=source.score) for source in sources]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(source) -> TextNode:
    return TextNode(
        id_=chunk_id(source),
        text=source.text,
        metadata=json_value(describe(source)),
        excluded_embed_metadata_keys=PLACES,
        excluded_llm_metadata_keys=PLACES,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source.document_id)},
    )
