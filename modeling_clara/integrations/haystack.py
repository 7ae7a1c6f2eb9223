"""`CLaRaRetriever` for Haystack: a component that a pipeline saves by paths, and filters as Haystack writes them.

To load a saved pipeline, Haystack must be told that it may import this package: `allowed_modules=["modeling_clara"]`.
"""

import asyncio
import os
import re
from datetime import date, time
from decimal import Decimal
from typing import Any

from ..search_clara import SearchOptions
from .retrieval import chunk_id, describe, load, missing_extra, search

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.document_stores.types import FilterPolicy, apply_filter_policy
    from haystack.errors import FilterError
except ImportError as error:
    raise missing_extra("haystack-ai", "haystack") from error

COMPARISONS = {"==": "$eq", "!=": "$ne", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte", "in": "$in"}
COMPARISONS |= {"not in": "$nin"}
JUNCTIONS = ("AND", "OR", "NOT")
CHUNK = re.compile(r"0|[1-9][0-9]{0,9}")  # a number as `chunk_id` writes it
NOT_STORED = ("content", "blob", "meta", "score", "embedding", "sparse_embedding")  # fields of a Document


@component
class CLaRaRetriever:
    """Retrieves chunks of a compressed corpus, the best chunk of each document.

    A `Document` has the text, the cosine as score, the id DOCUMENT#CHUNK, and as meta the corpus's columns with title,
    document_id and chunk.

    Args:
        corpus: a `CompressedCorpus`, or its folder or id on the Hub, which shows changes of the corpus at every call.
        model: a `CLaRaForRAG`, or its folder or id; default the model that made the corpus.
        top_k: documents; default `retrieval_top_k` of the model's config.
        filters: of Haystack, see `to_where`.
        filter_policy: "replace" or "merge", what filters of a run do to these.
        hybrid: also rank by BM25: True, "ranks" or "scores".
        min_score: documents with a lower cosine are left out.
        backbone, revision, dtype: of what is loaded, see `retrieval.load`.
    """

    def __init__(
        self,
        corpus: Any,
        model: Any = None,
        *,
        top_k: int | None = None,
        filters: dict[str, Any] | None = None,
        filter_policy: str | FilterPolicy = FilterPolicy.REPLACE,
        hybrid: bool | str | None = None,
        min_score: float | None = None,
        backbone: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
    ):
        if filters:
            to_where(filters)
        is_policy = isinstance(filter_policy, FilterPolicy)
        self.filter_policy = filter_policy if is_policy else FilterPolicy.from_str(filter_policy)
        self.corpus, self.model, self.top_k, self.filters = corpus, model, top_k, filters
        self.hybrid, self.min_score, self.backbone, self.revision, self.dtype = (
            hybrid, min_score, backbone, revision, dtype,
        )  # fmt: skip
        self._loaded = None

    def warm_up(self) -> None:
        """Load what was given by name; a pipeline does so before its first run."""
        if self._loaded is None:
            options = {"backbone": self.backbone, "revision": self.revision, "dtype": self.dtype}
            self._loaded = load(self.corpus, self.model, **options)

    @component.output_types(documents=list[Document])
    def run(self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None):
        """Documents for a question, best first; a FilterError names what is wrong with `filters`."""
        self.warm_up()
        corpus, model = self._loaded
        filters = apply_filter_policy(self.filter_policy, self.filters, filters)
        where, top_k = to_where(filters) if filters else None, self.top_k if top_k is None else top_k
        options = {"top_k": top_k, "where": where, "hybrid": self.hybrid, "min_score": self.min_score}
        try:
            sources = search(model, corpus, query, **options)
        except (TypeError, ValueError) as error:
            if where is None or not str(error).startswith("`where"):
                raise
            raise FilterError(str(error)) from error
        return {
            "documents": [
                Document(id=chunk_id(source), content=source.text, meta=describe(source), score=source.score)
                for source in sources
            ]
        }

    @component.output_types(documents=list[Document])
    async def run_async(self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None):
        """`run` in a thread."""
        return await asyncio.to_thread(self.run, query, filters, top_k)

    def to_dict(self) -> dict[str, Any]:
        """Serialize by names; a ValueError if an object has none that loads it as it is."""
        corpus, revision = _corpus_name(self.corpus, self.revision)
        return default_to_dict(
            self,
            corpus=corpus,
            model=None if self.model is None else _model_name(self.model),
            top_k=self.top_k,
            filters=self.filters,
            filter_policy=self.filter_policy.value,
            hybrid=self.hybrid,
            min_score=self.min_score,
            backbone=self.backbone,
            revision=revision,
            dtype=self.dtype,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CLaRaRetriever":
        """The component that `to_dict` serialized."""
        return default_from_dict(cls, data)


def _corpus_name(corpus, revision: str | None) -> tuple[str, str | None]:
    if isinstance(corpus, str | os.PathLike):
        return str(corpus), revision
    if not hasattr(corpus, "folder") or corpus._options != SearchOptions():
        raise ValueError(
            f"`corpus` must be a CompressedCorpus without options of its own to be saved, got {corpus!r}. Pass its "
            "folder or id, and `filters` and `hybrid` to the retriever."
        )
    if corpus.repo_id is None:
        return str(corpus.folder), None
    return corpus.repo_id, corpus.folder.name  # of the Hub's cache, which names the commit


def _model_name(model) -> str:
    name = model if isinstance(model, str | os.PathLike) else model.name_or_path
    if not name:
        raise ValueError("`model` must have a name to be saved, got one without. Load it from a folder or the Hub.")
    return str(name)


# --- filters ---------------------------------------------------------------------------------------------------------


def to_where(filters: dict[str, Any]) -> dict[str, Any]:
    """Haystack's filters as `where`, see `search_clara.py`; a FilterError names what cannot be translated.

    A field is `meta.COLUMN` (or `COLUMN`), `meta.title`, `meta.document_id`, `meta.chunk` or `id`. Other fields of a
    document are not stored, and nothing compares with None. If the column holds lists, one of their elements must meet
    a condition.
    """
    if not isinstance(filters, dict):
        raise FilterError(f"filters must be dicts, got {filters!r}. Example: {_example()}.")
    if "field" in filters:
        return _comparison(filters)
    operator, parts = (_given(filters, name) for name in ("operator", "conditions"))
    if operator not in JUNCTIONS:
        raise FilterError(f"`operator` must be one of {', '.join(JUNCTIONS)}, got {operator!r}. Correct it.")
    if not isinstance(parts, list) or not parts:
        raise FilterError(f"`conditions` of {operator} must be a list of filters, got {parts!r}. Add one.")
    where = [to_where(part) for part in parts]
    return {"$not": {"$and": where}} if operator == "NOT" else {f"${operator.lower()}": where}


def _comparison(condition: dict[str, Any]) -> dict[str, Any]:
    field, operator, value = (_given(condition, name) for name in ("field", "operator", "value"))
    if operator not in COMPARISONS:
        raise FilterError(f"`operator` must be one of {', '.join(COMPARISONS)}, got {operator!r}. Correct it.")
    if not isinstance(field, str) or field in NOT_STORED:
        raise FilterError(f"`field` must be id or one of meta, got {field!r}, which is not filtered. Leave it out.")
    many = operator in ("in", "not in")
    if many and not isinstance(value, list):
        raise FilterError(f"`value` of {field!r} must be a list for {operator!r}, got {value!r}. Wrap it in [].")
    for part in value if many else [value]:
        if not isinstance(part, str | int | float | Decimal | date | time):
            raise FilterError(
                f"`value` of {field!r} must be text, a number, a bool, a date or a time, got {part!r}. A corpus "
                "compares with no others: leave the condition out."
            )
    if field == "id":
        return _id_condition(operator, value)
    column = field.removeprefix("meta.")
    return {"span" if column == "chunk" else column: {COMPARISONS[operator]: value}}


def _id_condition(operator: str, value) -> dict[str, Any]:
    """A condition on the ids of `chunk_id`."""
    if operator not in ("==", "!=", "in", "not in"):
        raise FilterError(f"`operator` of 'id' must be ==, !=, in or not in, got {operator!r}. Correct it.")
    parts = [str(name).rpartition("#") for name in (value if isinstance(value, list) else [value])]
    chunks = [{"document_id": name, "span": int(chunk)} for name, _, chunk in parts if CHUNK.fullmatch(chunk)]
    where = {"$or": chunks} if chunks else {"document_id": {"$in": []}}
    return where if operator in ("==", "in") else {"$not": where}


def _given(filters: dict[str, Any], name: str):
    if name not in filters:
        raise FilterError(f"filters must have the key {name!r}, got {filters!r}. Example: {_example()}.")
    return filters[name]


def _example() -> dict[str, Any]:
    return {"field": "meta.year", "operator": ">=", "value": 2020}
