"""`CLaRaSearch` for MTEB: its search protocol, over a compressed corpus of every task: `mteb.evaluate(search, tasks)`.

A task's documents are compressed into a folder of its own, so a run that was killed goes on where it was.
"""

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .retrieval import load_by_name, missing_extra

try:
    from mteb.models.model_meta import ModelMeta
except ImportError as error:
    raise missing_extra("mteb", "mteb") from error

VALUES = 2**26  # of the memories that a search holds at once, 256 MiB


class CLaRaSearch:
    """Retrieval by a model's own memories, in the form of `mteb.models.SearchProtocol`.

    Args:
        model: a `CLaRaForRAG`, or its folder or id.
        folder: of the corpora, which are kept; default a temporary one.
        codec: of the stored memories: "float16", "int8" or "int4".
        memory_size: vectors that are compared; default `retrieval_memory_size` of the model's config.
        backbone, dtype: of a model that is given by name, see `retrieval.load`.
        meta: fields of `ModelMeta` that the model cannot know, such as `training_datasets`, or another `name`.
    """

    def __init__(
        self,
        model,
        folder: str | os.PathLike | None = None,
        *,
        codec: str = "float16",
        memory_size: int | None = None,
        backbone: str | None = None,
        dtype: str | None = None,
        meta: Mapping | None = None,
    ):
        self.model = load_by_name(model, backbone=backbone, dtype=dtype)
        default = self.model.config.retrieval_memory_size if memory_size is None else memory_size
        self.memory_size = self.model.config.check_memory_size(default)
        self._temporary = tempfile.TemporaryDirectory(prefix="clara-mteb-") if folder is None else None
        self.folder = Path(self._temporary.name if folder is None else folder)
        self.codec, self.meta, self.corpus = codec, dict(meta or {}), None

    def index(self, corpus, *, task_metadata, hf_split: str, hf_subset: str, encode_kwargs, **_) -> None:
        """Compress a task's documents; those without text cannot be found, and are in rejected.jsonl of the corpus."""
        name = re.sub(r"[^\w.-]", "_", f"{task_metadata.name}-{hf_subset}-{hf_split}")
        options = {"codec": self.codec, "memory_size": self.memory_size}  # no more vectors are compared
        options["batch_size"] = encode_kwargs.get("batch_size", 16)
        build = self.model.corpus_class().build
        self.corpus = build(self.model, _documents(corpus), self.folder / name, **options)

    def search(self, queries, *, top_k: int, top_ranked: Mapping[str, list[str]] | None = None, **_) -> dict:
        """{query: {document: cosine}} of the best documents, or of those of `top_ranked`."""
        if self.corpus is None:
            raise RuntimeError("`index` must be called before `search`. Call it with the documents of the task.")
        names, questions = list(queries["id"]), [_question(row) for row in queries]
        if top_ranked is not None:
            return self._score_given(names, questions, top_ranked, top_k)
        top_k = min(top_k, len(self.corpus))
        step, found = max(1, VALUES // (top_k * self.memory_size * self.corpus.manifest.hidden_size)), {}
        for first in range(0, len(names), step):
            part = slice(first, first + step)
            options = {"top_k": top_k, "retrieval_memory_size": self.memory_size}
            hits = self.model.retrieve(questions[part], corpus=self.corpus, **options)
            for name, sources in zip(names[part], hits, strict=True):
                found[name] = {source.document_id: source.score for source in sources}
        return found

    def _score_given(self, names: list[str], questions: list[str], top_ranked: Mapping, top_k: int) -> dict:
        rows, documents = defaultdict(list), {}
        for row in self.corpus.rows(["document_id"]):
            rows[row["document_id"]].append(row["row"])
            documents[row["row"]] = row["document_id"]
        found = {}
        for name, query in zip(names, self.model.encode_queries(questions, memory_size=self.memory_size), strict=True):
            mine = [row for document in top_ranked.get(name, ()) for row in rows.get(document, ())]
            (ranked,) = self.corpus.cosines(query[None], [np.array(mine)]) if mine else ((),)
            found[name] = {documents[row]: cosine for row, cosine in ranked[:top_k]}
        return found

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB writes beside its scores; the revision is the fingerprint of the compressor."""
        model, name = self.model, str(self.model.name_or_path)
        fields = {
            "loader": None,
            "name": name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else f"local/{Path(name).name or 'clara'}",
            "revision": model.fingerprint[:12],
            "release_date": None,
            "languages": None,
            "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "memory_usage_mb": None,
            "max_tokens": model.config.document_max_length,
            "embed_dim": self.memory_size * model.config.text_config.hidden_size,
            "license": None,
            "open_weights": None,
            "public_training_code": None,
            "public_training_data": None,
            "framework": ["PyTorch", "Transformers", "safetensors"],
            "similarity_fn_name": "cosine",
            "use_instructions": False,
            "training_datasets": None,
            "experiment_kwargs": {"memory_size": self.memory_size, "codec": self.codec},
        }
        return ModelMeta(**(fields | self.meta))


def _documents(corpus) -> Iterator[dict]:
    for row in corpus:
        title, text = (row.get("title") or "").strip(), row.get("text") or row.get("body") or ""
        yield {"id": row["id"], "title": title if text.strip() else "", "text": text if text.strip() else title}


def _question(row: Mapping) -> str:
    """The text of a query with its instruction, or of a conversation, as MTEB joins them for its own models."""
    text, instruction = row["text"], row.get("instruction")
    if isinstance(text, str):
        return f"{text} {instruction}" if instruction else text
    turns = "; ".join(turn if isinstance(turn, str) else f"{turn['role']}: {turn['content']}" for turn in text)
    return f"{instruction} {turns}" if instruction else turns
