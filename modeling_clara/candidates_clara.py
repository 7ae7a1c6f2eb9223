"""Texts to memories, and which documents a question gets: from the documents of a call or from a corpus.

The functions take a model with its processor. Nothing here reads prompts or files.
"""

import math
import numbers
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.utils.logging import tqdm

from .adapters_clara import eval_mode
from .configuration_clara import CLaRaConfig
from .packing_clara import can_pack, cut_batches
from .passes_clara import CLaRaPasses
from .processing_clara import CLaRaProcessor
from .retrieval_clara import flatten_memory
from .text_clara import check_count, check_list, given_id, read_document, word_overlap


@dataclass(frozen=True)
class Source:
    """A chunk that was retrieved. `score` is the cosine of eq. 3.1, in [-1, 1].

    `read_as` is "text" if `answer` or `stream` read the title and the text, else "memory". `metadata` has the other
    columns of a corpus, such as `page`; it is empty for documents of a call.
    """

    document_id: str
    span: int
    score: float
    title: str
    text: str
    read_as: str = "memory"
    metadata: dict = field(default_factory=dict, hash=False)


_OPENED = weakref.WeakKeyDictionary()  # of each model the corpora that its calls have named, by folder or id

Hits = list[list[tuple[Source, torch.Tensor]]]  # of each question (source, memory (n, hidden)), best first


def text_processor(model: CLaRaPasses) -> CLaRaProcessor:
    """The model's processor; a ValueError if there is none."""
    if model.processor is None:
        raise ValueError(
            "`model.processor` must be set for calls on text, got None. Load the model with `from_pretrained` or "
            "`from_backbone`, or set it to a CLaRaProcessor."
        )
    return model.processor


def encode_documents(model: CLaRaPasses, documents: Sequence, memory_size: int, batch_size: int = 16) -> torch.Tensor:
    """Memories (documents, k, hidden) float32 of documents of one chunk each."""
    ids = text_processor(model).encode_documents(documents)
    return _encode_ids(model, "compressor", ids, memory_size, batch_size, "documents")


def encode_questions(model: CLaRaPasses, questions: Sequence, memory_size: int, batch_size: int = 16) -> torch.Tensor:
    """Memories (questions, k, hidden) float32 of questions."""
    trained = model.config.retrieval_memory_size
    if model.config.memory_layout == "windows" and memory_size > trained:
        raise ValueError(
            f"`memory_size` of questions must be <= `config.retrieval_memory_size` ({trained}), got "
            f"{memory_size}. No more memory tokens were trained; pass a smaller size."
        )
    ids = text_processor(model).encode_questions(questions)
    for index, question_ids in enumerate(ids):
        n_rows = memory_size + model.config.start_embedding
        model.config.check_window(len(question_ids) + n_rows, f"questions[{index}]")
    return _encode_ids(model, "reasoner", ids, memory_size, batch_size, "questions")


def _encode_ids(
    model: CLaRaPasses, role: str, ids: list[list[int]], memory_size: int, batch_size: int, name: str
) -> torch.Tensor:
    """(texts, k, hidden) float32 of id lists; batches of similar length, one synchronisation at the end."""
    check_count(batch_size, "batch_size", "Default: 16.")
    device, processor = model.memory_embeddings.device, text_processor(model)
    memory = torch.empty(len(ids), memory_size, model.config.text_config.hidden_size, device=device)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    is_packed = can_pack(model.backbone, len(ids[order[-1]]) + memory_size)
    batches = list(cut_batches(order, [len(text) + memory_size for text in ids], batch_size, is_packed))
    for rows in tqdm(batches, desc=f"{role} passes", delay=2, leave=False):  # a bar after two seconds
        batch = processor.pad([ids[row] for row in rows], processor.pad_token_id)
        lengths = torch.tensor([len(ids[row]) for row in rows])
        with model.lock, eval_mode(model):  # for one pass: between those of `compress` other threads have their turn
            encoded, _ = model.encode(role, batch.to(device), lengths.to(device), memory_size)
        memory[torch.tensor(rows, device=device)] = encoded.float()
    broken = (~memory.isfinite().flatten(1).all(-1)).nonzero()
    if len(broken):
        raise ValueError(
            f"the memory of `{name}[{int(broken[0])}]` must be finite, got NaN or infinity. The weights of the "
            f"backbone or the {role} are broken: reload them with `from_pretrained`."
        )
    return memory


def search(
    model: CLaRaPasses, questions, documents, corpus, top_k, retrieval_memory_size, min_score, memory_size: int = 0
) -> tuple[Hits, torch.Tensor]:
    """Hits and query memories (questions, k, hidden); arguments and errors as in `CLaRaForRAG.retrieve`.

    `memory_size` is what will be read, 0 if nothing is. If something is, a question without a source of
    `least_score` has no hits, unless the caller sets a `min_score` or compares other vectors.
    """
    check_list(questions, "questions")
    config = model.config
    k_score = config.retrieval_memory_size if retrieval_memory_size is None else retrieval_memory_size
    k_score = config.check_memory_size(k_score, "retrieval_memory_size")
    if (documents is None) == (corpus is None):
        raise ValueError("`documents` or `corpus` must be given, not both and not neither. Pass one of them.")
    if top_k is not None:
        check_count(top_k, "top_k", "Leave it out for the default.")
    is_number = isinstance(min_score, numbers.Real) and not isinstance(min_score, bool)
    if min_score is not None and not (is_number and math.isfinite(min_score)):
        raise ValueError(f"`min_score` must be a finite number, got {min_score!r}. Pass a cosine between -1 and 1.")
    if corpus is not None:
        corpus = open_corpus(model, corpus)
        queries = encode_questions(model, questions, k_score)
        options = {}
        if hasattr(corpus, "check_model"):  # a `CompressedCorpus`, also of another copy of this code
            corpus.check_model(model)
            options["questions"] = questions
        found = corpus.search(queries, top_k or config.retrieval_top_k, **options)
        hits = [[_read_hit(model, hit, memory_size) for hit in row] for row in found]
    else:
        candidates, memory = collect_candidates(model, documents, len(questions), top_k, max(k_score, memory_size))
        queries = encode_questions(model, questions, k_score)
        hits = rank_candidates(queries, candidates, memory, k_score, top_k or config.retrieval_top_k)
    if min_score is None and memory_size and config.min_score is not None and k_score == config.retrieval_memory_size:
        pairs = zip(questions, hits, strict=True)
        hits = [row if any(s.score >= least_score(config, asked, s) for s, _ in row) else [] for asked, row in pairs]
    elif min_score not in (None, -1):  # of -1 nothing is left out, also if rounding made a cosine smaller
        hits = [[hit for hit in row if hit[0].score >= min_score] for row in hits]
    return hits, queries


def least_score(config: CLaRaConfig, question: str, source: Source, min_score: float | None = None) -> float | None:
    """The cosine at which a model answers from this source by default: less, the more of the question's words it has.

    `min_score` is the config's unless another is given; None if there is none.
    """
    min_score = config.min_score if min_score is None else min_score
    if min_score is None:
        return None
    return min_score - config.overlap_weight * source_overlap(question, source)


def source_overlap(question: str, source: Source) -> float:
    """`word_overlap` of a question with the title and the text of a source."""
    return word_overlap(question, f"{source.title or ''} {source.text or ''}")


def open_corpus(model: CLaRaPasses, corpus):
    """The corpus of a folder or an id, opened once for a model, as it is now; any other object is returned."""
    if isinstance(corpus, str | os.PathLike):
        name = os.path.abspath(corpus) if os.path.isdir(corpus) else str(corpus)
        opened = _OPENED.setdefault(model, {})
        if name not in opened:  # without the model, which would be kept alive by what it has opened
            opened[name] = model.corpus_class().open(name)
        return opened[name].refresh()
    if not hasattr(corpus, "search"):
        raise TypeError(
            f"`corpus` must be a CompressedCorpus, its folder or its id on the Hub, got {type(corpus).__name__}. Pass "
            "one of them."
        )
    return corpus


def _read_hit(model: CLaRaPasses, hit: Mapping, memory_size: int) -> tuple[Source, torch.Tensor]:
    fields = {name: hit[name] for name in ("document_id", "span", "score", "title", "text")}
    source = Source(**fields, metadata=dict(hit.get("metadata") or {}))
    name = f"memory of {source.document_id!r} in the corpus"
    return source, read_stored_memory(model, hit["memory"], memory_size, name)


class Candidate(NamedTuple):
    """One chunk on offer."""

    document_id: str
    order: int  # of its document in the list
    span: int
    title: str
    text: str
    row: int  # in the memory tensor


def collect_candidates(
    model: CLaRaPasses, documents, n_questions: int, top_k: int | None, memory_size: int
) -> tuple[list[list[Candidate]], torch.Tensor]:
    """The chunks on offer for each question, and the (chunks, k, hidden) memories that their rows point to.

    Checks the documents, see `CLaRaForRAG.retrieve`, and computes the memories that are not stored yet.
    """
    documents = check_list(documents, "documents")
    nested = [isinstance(entry, Sequence) and not isinstance(entry, str | bytes) for entry in documents]
    if any(nested):
        if not all(nested):
            place = nested.index(False)
            raise TypeError(
                f"`documents[{place}]` must be a list like the others, got {type(documents[place]).__name__}. Pass "
                "one list for all questions, or a list for every question."
            )
        if len(documents) != n_questions:
            raise ValueError(
                f"`documents` must have one list per question ({n_questions}), got {len(documents)}. Make the "
                "lists equally long, or pass one flat list for all questions."
            )
        lists = {f"documents[{index}]": entry for index, entry in enumerate(documents)}
    else:
        lists = {"documents": documents}
    pool = _MemoryPool(model, memory_size)
    candidates = []
    for name, entry in lists.items():
        row = pool.add(check_list(entry, name), name)
        n_documents = row[-1].order + 1
        if top_k is not None and top_k > n_documents:
            raise ValueError(
                f"`top_k` must be <= number of documents ({n_documents}) in `{name}`, got {top_k}. Lower `top_k` or "
                "pass more documents."
            )
        candidates.append(row)
    return (candidates if any(nested) else candidates * n_questions), pool.memory()


def rank_candidates(
    queries: torch.Tensor, candidates: list[list[Candidate]], memory: torch.Tensor, memory_size: int, top_k: int
) -> Hits:
    """Score each question's chunks, keep the best chunk of every document, sort; scores leave the device once.

    `queries` is (questions, n, hidden), `memory` (chunks, n, hidden). Ties go to the lower index.
    """
    vectors, queries = flatten_memory(memory, memory_size), flatten_memory(queries, memory_size)
    lists = {id(row): row for row in candidates}  # questions may share one
    rows_of = {key: torch.tensor([c.row for c in row], device=vectors.device) for key, row in lists.items()}
    # A matrix product may round equal rows differently, by their place in it: duplicates would not tie.
    scores = torch.cat(
        [(vectors[rows_of[id(row)]] * query).sum(-1) for row, query in zip(candidates, queries, strict=True)]
    ).tolist()
    ranked, left = [], iter(scores)
    for row in candidates:
        best = {}  # by document; the first of equal ones stays
        for candidate, score in [(candidate, next(left)) for candidate in row]:
            if candidate.order not in best or score > best[candidate.order][1]:
                best[candidate.order] = (candidate, score)
        kept = sorted(best.values(), key=lambda hit: (-hit[1], hit[0].order))[:top_k]
        ranked.append([(Source(c.document_id, c.span, score, c.title, c.text), memory[c.row]) for c, score in kept])
    return ranked


class _MemoryPool:
    """Collects chunks of all candidate lists, each different text once, and computes their memories together."""

    def __init__(self, model: CLaRaPasses, memory_size: int):
        self.model, self.memory_size = model, memory_size
        self.chunks: list[dict | torch.Tensor] = []  # a stored memory needs no text
        self.rows: dict[tuple[str, str], int] = {}  # of title and text in `chunks`

    def add(self, documents: list, name: str) -> list[Candidate]:
        """Candidates of one list, their rows pointing into `memory()`."""
        candidates, seen = [], {}
        for order, document in enumerate(documents):
            place = f"{name}[{order}]"
            document_id = _document_id(document, order, place)
            if seen.setdefault(document_id, order) != order:
                raise ValueError(
                    f"`{place}` must have an id of its own, got {document_id!r} like `{name}[{seen[document_id]}]`. "
                    "Give each document a different `id`, or none at all."
                )
            stored = document.get("memory") if isinstance(document, Mapping) else None
            if stored is not None:
                texts, span = read_document(document, place), int(document.get("span", 0))
                candidates.append(Candidate(document_id, order, span, *texts, len(self.chunks)))
                self.chunks.append(read_stored_memory(self.model, stored, self.memory_size, f"{place}['memory']"))
                continue
            for part in text_processor(self.model).split_document(document, place):
                key = (part["title"], part["text"])
                if key not in self.rows:
                    self.rows[key] = len(self.chunks)
                    self.chunks.append(part)
                candidates.append(Candidate(document_id, order, part["span"], *key, self.rows[key]))
        return candidates

    def memory(self) -> torch.Tensor:
        """(rows, k, hidden) float32: computed for the texts, as given for the stored ones."""
        texts = [chunk for chunk in self.chunks if isinstance(chunk, dict)]
        computed = iter(encode_documents(self.model, texts, self.memory_size) if texts else ())
        return torch.stack([next(computed) if isinstance(chunk, dict) else chunk for chunk in self.chunks])


def read_stored_memory(model: CLaRaPasses, memory, memory_size: int, name: str) -> torch.Tensor:
    """(k, hidden) float32 on the model's device of a memory that was computed before, or an error that names it."""
    try:
        memory = torch.as_tensor(memory, dtype=torch.float32, device=model.memory_embeddings.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be numbers, got {type(memory).__name__}. Pass a tensor.") from error
    hidden_size = model.config.text_config.hidden_size
    if memory.ndim != 2 or memory.shape[0] < memory_size or memory.shape[1] != hidden_size:
        raise ValueError(
            f"`{name}` must have the shape (>= {memory_size}, {hidden_size}), got {tuple(memory.shape)}. Compress the "
            "document with this model and a `memory_size` that large."
        )
    if not memory.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity. Compress the document again.")
    return memory[:memory_size]


def _document_id(document, order: int, place: str) -> str:
    given = given_id(document) if isinstance(document, Mapping) else None
    if given is None:
        return str(order)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise TypeError(f"`{place}['id']` must be a str or int, got {type(given).__name__}. Pass text.")
    return str(given)
