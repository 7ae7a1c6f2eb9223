"""What the retrievers of all frameworks share: a corpus and its model by object or by name, one search, one id.

It imports no framework. Every retriever gives what `model.retrieve` gives, in the framework's own objects.
"""

import logging
import os
from collections.abc import Mapping

from ..candidates_clara import Source, open_corpus
from ..cli.models import load_model, load_model_of  # which know where the weights of a backbone come from
from ..names import CLaRaForRAG, corpus_class

logger = logging.getLogger(__name__)


def missing_extra(package: str, extra: str) -> ImportError:
    """The error of a module whose framework is not installed."""
    module = f"modeling_clara.integrations.{extra.replace('-', '_')}"
    return ImportError(
        f"`{module}` needs {package}: pip install {package}, or the extra `{extra}` from a clone of the repository."
    )


def load(corpus, model=None, *, backbone: str | None = None, revision: str | None = None, dtype: str | None = None):
    """A corpus and the model that searches it; a ValueError if another compressor made the corpus.

    Args:
        corpus: a `CompressedCorpus`, or its folder or id on the Hub. A name stays one, so that every search shows what
            was changed since; with `revision` it is opened, as it is there.
        model: a `CLaRaForRAG`, or its folder or id; default the corpus's, else the one that made it.
        backbone: folder or id of the backbone of a model that is loaded; default the one it was trained on.
        revision: branch, tag or commit of the corpus on the Hub.
        dtype: of the weights of a model that is loaded: float32, bfloat16, float16, int8 or int4.
    """
    if revision is not None:
        corpus = corpus_class().open(corpus, revision)
    elif isinstance(corpus, str | os.PathLike):
        corpus = os.path.abspath(corpus) if os.path.isdir(corpus) else str(corpus)
    if model is None:
        model = _load_maker(corpus_class().open(corpus) if isinstance(corpus, str) else corpus, backbone, dtype)
    else:
        model = load_by_name(model, backbone=backbone, dtype=dtype)
    opened = open_corpus(model, corpus)
    if hasattr(opened, "check_model"):
        opened.check_model(model)
    return corpus, model


def load_by_name(model, *, backbone: str | None = None, dtype: str | None = None) -> CLaRaForRAG:
    """A model as it is, or loaded from its folder or id on the backbone that it was trained on."""
    if isinstance(model, str | os.PathLike):
        return load_model(str(model), backbone=backbone, dtype=dtype, report=logger.info)
    if not hasattr(model, "retrieve"):
        raise TypeError(f"`model` must be a CLaRaForRAG, its folder or its id, got {type(model).__name__}. Pass one.")
    if backbone is not None or dtype is not None:
        raise ValueError("`backbone` and `dtype` must go with the name of a model. Leave them out, or pass its name.")
    return model


def _load_maker(corpus, backbone: str | None, dtype: str | None) -> CLaRaForRAG:
    """The model of an open corpus, or the one that its manifest names."""
    if getattr(corpus, "model", None) is not None:
        return load_by_name(corpus.model, backbone=backbone, dtype=dtype)
    if not hasattr(corpus, "manifest") or not corpus.manifest.compressor.get("name_or_path"):
        raise ValueError("`model` must be given, because the corpus does not name the one that made it. Pass it.")
    return load_model_of(corpus, backbone=backbone, dtype=dtype, report=logger.info)


def search(
    model: CLaRaForRAG, corpus, question: str, *, where: Mapping | None, hybrid: bool | str | None, **rest
) -> list[Source]:
    """`model.retrieve` of one question; `where` and `hybrid`, if given, replace those of the corpus."""
    corpus = open_corpus(model, corpus)
    if where is not None or hybrid is not None:
        corpus = corpus.with_options(where=where, hybrid=hybrid)
    (sources,) = model.retrieve([question], corpus=corpus, **rest)
    return sources


def chunk_id(source: Source) -> str:
    """An id that no other chunk has: DOCUMENT#CHUNK."""
    return f"{source.document_id}#{source.span}"


def describe(source: Source) -> dict:
    """Metadata of a chunk: the corpus's columns, and title, document_id and chunk, which win over such columns."""
    return {**source.metadata, "title": source.title, "document_id": source.document_id, "chunk": source.span}
