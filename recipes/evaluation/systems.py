"""Systems: what ranks the documents of a task and what reads them, all on one backbone.

A system retrieves rows of `Spans` and reads them; it knows nothing of gold documents, answers or scores.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from modeling_clara import CLaRaForRAG
from modeling_clara.candidates_clara import least_score
from modeling_clara.generation_clara import eval_mode, write_answers
from modeling_clara.reading_clara import Reading, prepare_readings
from recipes.evaluation.rankers import Bm25Ranker, DenseRanker, HybridRanker
from recipes.evaluation.spans import Spans
from recipes.evaluation.tasks import Task

FUSION = {"hybrid": "ranks", "hybrid_scores": "scores"}  # of a retriever that uses cosine and words
COMPARING = ("clara", *FUSION)  # retrievers that compare memories


@dataclass(frozen=True)
class System:
    """How a system works: `kind` as in results.schema.json, what retrieves, what reads."""

    kind: str
    retriever: str | None
    reader: str

    @property
    def ranks(self) -> bool:
        """Whether it chooses among candidates."""
        return self.retriever not in (None, "wrong")

    @property
    def reads_memory(self) -> bool:
        """Whether it reads memories, of all documents or of all but the best."""
        return self.reader in ("memory", "memory_and_text")

    @property
    def needs_memory(self) -> bool:
        """Whether it compares or reads memories."""
        return self.retriever == "clara" or self.reads_memory

    @property
    def role(self) -> str | None:
        """Texts are read by the plain backbone, as who has no CLaRa would, or by an adapter trained for them."""
        return None if self.reader in ("text", "backbone") else "generator"

    def n_texts(self, n_rows: int, expand: int) -> int:
        """How many of `n_rows` spans, the best first, are read as text."""
        return {"memory": 0, "memory_and_text": min(expand, n_rows)}.get(self.reader, n_rows)


SYSTEMS = {
    "clara": System("clara", "clara", "memory"),
    "clara_expand": System("clara", "clara", "memory_and_text"),
    "bm25_memory": System("clara", "bm25", "memory"),
    "hybrid": System("clara", "hybrid", "memory"),
    "hybrid_scores": System("clara", "hybrid_scores", "memory"),
    "text": System("text", "clara", "text"),
    "bm25_text": System("text", "bm25", "text"),
    "dense_text": System("text", "dense", "text"),
    "tuned_text": System("text", "clara", "tuned_text"),
    "bm25_tuned_text": System("text", "bm25", "tuned_text"),
    "closed_book": System("closed_book", None, "question"),
    "closed_book_backbone": System("closed_book", None, "backbone"),
    "wrong_memory": System("control", "wrong", "memory"),
}


class Clock:
    """Seconds by name; a mark ends what runs since the mark before."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class _FirstToken(BaseStreamer):
    """Marks the first new token on a clock. `generate` hands over the prompt first."""

    def __init__(self, clock: Clock):
        self.clock, self.calls = clock, 0

    def put(self, value):
        self.calls += 1
        if self.calls == 2:
            self.clock.mark("read")

    def end(self):
        if self.calls < 2:
            self.clock.mark("read")


@dataclass
class Bench:
    """What all systems of a run share."""

    model: CLaRaForRAG  # whose backbone all of them use
    spans: Spans  # that are retrieved and read; with memories if a system needs them
    top_k: int  # documents read
    memory_size: int  # k that is read
    retrieval_memory_size: int  # k that is compared
    max_new_tokens: int = 64
    min_score: float | None = None  # instead of that in the model's config.json
    dense: str | None = None  # encoder of the dense baseline
    text_reader: CLaRaForRAG | None = None  # whose generator was trained on texts, for the reader "tuned_text"
    expand: int = 1  # spans that the reader "memory_and_text" reads as text, the best first
    expand_below: float | None = None  # only where its answer from memory alone is less sure than this
    depth: int = 20  # documents ranked
    read_all: bool = False  # every span of the candidates, unranked (the setting gold_only)
    seed: int = 0  # of the control's documents
    _rankers: dict = field(default_factory=dict, init=False)

    def ranker(self, name: str):
        """BM25, the dense encoder or BM25 with the cosine, made when it is first needed."""
        if name not in self._rankers:
            if name == "bm25":
                made = Bm25Ranker(self.spans)
            elif name == "dense":
                made = DenseRanker(self.spans, self.dense, device=str(self.model.memory_embeddings.device))
            else:
                made = HybridRanker(self.spans, self.ranker("bm25"), FUSION[name])
            self._rankers[name] = made
        return self._rankers[name]

    def prepare(self, system: System) -> None:
        """Make what a system ranks with; what is missing is an error here, not a failure of every question."""
        if system.ranks and system.retriever != "clara":
            self.ranker(system.retriever)

    def warn_of_chance(self) -> None:
        """Say of how many questions BM25 has found nothing, so that their documents are in an order by chance."""
        if "bm25" in self._rankers:
            self._rankers["bm25"].warn_of_chance()


Hits = list[tuple[int, float]]


def retrieve(bench: Bench, system: System, tasks: Sequence[Task], clock: Clock) -> list[Hits]:
    """For each task (row, score) of its documents, best first; marks `query` and `search`."""
    if system.retriever is None:
        return [[] for _ in tasks]
    if system.retriever == "wrong":
        return [[(row, 0.0) for row in wrong_rows(bench, task)] for task in tasks]
    rows = [None if task.candidates is None else bench.spans.rows_of(task.candidates) for task in tasks]
    if bench.read_all:  # nothing is left to choose
        return [[(int(row), 0.0) for row in mine] for mine in rows]
    texts = [task.question.text for task in tasks]
    if system.retriever in COMPARING:
        queries = bench.model.encode_queries(texts, memory_size=bench.retrieval_memory_size).cpu()
        clock.mark("query")
    if system.retriever == "clara":
        hits = [
            bench.spans.cosines(query, mine, bench.depth) if mine is None or len(mine) else []
            for query, mine in zip(queries, rows, strict=True)
        ]
    else:
        given = (queries,) if system.retriever in FUSION else ()
        hits = bench.ranker(system.retriever).rank(texts, rows, bench.depth, *given)
    clock.mark("search")
    return hits


def wrong_rows(bench: Bench, task: Task) -> list[int]:
    """First spans of documents that have nothing to do with the question, drawn from (seed, question id).

    As many as `clara` reads: `top_k`, or if all gold documents are read, as many as these. Documents that are no
    candidates of the question come first, then candidates that are not gold; a ValueError if there is none.
    """
    names, generator = bench.spans.names, random.Random(f"{bench.seed} {task.question.id}")
    gold, chosen = set(task.gold), {}
    wanted = max(1, len(gold)) if bench.read_all else bench.top_k
    for avoided in (gold.union(task.candidates or ()), gold):
        for name in generator.sample(names, min(len(names), wanted + len(avoided))):
            if name not in avoided and len(chosen) < wanted:
                chosen.setdefault(bench.spans.rows[name].start)
    if chosen:
        return list(chosen)
    raise ValueError("the control needs documents that are not gold, found none. Leave out 'wrong_memory'.")


def rows_to_read(bench: Bench, system: System, task: Task, hits: Hits) -> list[int]:
    """Rows of the documents that are read, best first; none if the model would abstain with this `min_score`.

    Of retrievers without a cosine `min_score` asks nothing. If one document reaches it, all are read.
    """

    def least(row: int) -> float:
        return least_score(bench.model.config, task.question.text, bench.spans.source(row), bench.min_score)

    chosen = hits if bench.read_all else hits[: bench.top_k]
    asks = bench.min_score not in (None, -1) and system.retriever in COMPARING and not bench.read_all
    if asks and all(score < least(row) for row, score in chosen):
        return []
    return [row for row, _ in chosen]


def read(
    bench: Bench, system: System, tasks: Sequence[Task], rows: Sequence[Sequence[int]], clock: Clock, **kwargs
) -> tuple[list[str], list[int], list[int]]:
    """Answers to `tasks` from their `rows`, how many positions of input each took, and how many texts it is from.

    Marks `prepare` and `decode`. `kwargs` are those of `generate`. Raises a ValueError if a prompt does not fit into
    the backbone's window.
    """
    model = bench.text_reader if system.reader == "tuned_text" else bench.model
    generation = model.build_generation_config(None, bench.max_new_tokens)
    reading = [_prepare(bench, model, system, task, mine, generation) for task, mine in zip(tasks, rows, strict=True)]
    clock.mark("prepare")
    with model.lock, eval_mode(model), torch.no_grad():
        if bench.expand_below is not None and system.reader == "memory_and_text":
            answers = write_answers(model, reading, generation, bench.expand_below)
            clock.mark("read")  # an answer that is sure enough is shown when it is whole
            texts, n_tokens = [answer.text for answer in answers], [answer.prompt_tokens for answer in answers]
            n_texts = [sum(source.read_as == "text" for source in answer.sources) for answer in answers]
        else:
            prompts, memories, _ = (list(column) for column in zip(*(mine[0] for mine in reading), strict=True))
            texts = model.generate_texts(prompts, memories, generation, role=system.role, **kwargs)
            n_tokens = [len(prompt.input_ids) for prompt in prompts]
            n_texts = [system.n_texts(len(mine), bench.expand) for mine in rows]
    clock.mark("decode")
    return texts, n_tokens, n_texts


def _prepare(
    bench: Bench, model: CLaRaForRAG, system: System, task: Task, rows: Sequence[int], generation: GenerationConfig
) -> list[Reading]:
    """What the model's own `answer` would read."""
    spans, size, question, name = bench.spans, bench.memory_size, task.question.text, f"question {task.question.id}"
    device = model.memory_embeddings.device
    if system.reads_memory:
        memories = spans.memories(rows, size).to(device)
        hits = [(spans.source(row), memory) for row, memory in zip(rows, memories, strict=True)]
        expand = system.n_texts(len(rows), bench.expand)
        expand_below = bench.expand_below if system.reader == "memory_and_text" else None
        return prepare_readings(model, question, hits, size, expand, expand_below, generation, name)
    documents = [spans.document(row) for row in rows]
    prompt = model.processor.build_prompt(question, 0, size, text_documents=documents, name=name)
    model.config.check_window(len(prompt.input_ids) + bench.max_new_tokens, name, "Lower --top-k.")
    return [Reading(prompt, torch.zeros(0, size, model.config.text_config.hidden_size, device=device), [])]


def time_one(bench: Bench, system: System, task: Task) -> dict[str, float]:
    """Milliseconds of one question alone, from stored memories: query, search, read (to the first token), decode."""
    clock = Clock()
    (hits,) = retrieve(bench, system, [task], clock)
    rows = rows_to_read(bench, system, task, hits)
    read(bench, system, [task], [rows], clock, streamer=_FirstToken(clock))
    seconds = clock.seconds
    seconds["read"] = seconds.pop("prepare") + seconds.get("read", 0.0)
    times = {name: 1e3 * seconds.get(name, 0.0) for name in ("query", "search", "read", "decode")}
    return {**times, "total": sum(times.values())}


def span_bytes(bench: Bench, rows: Sequence[int], n_texts: int) -> float | None:
    """Bytes of a span as it was read (stored memory or text), the mean over these rows, best first; None of none."""
    if not len(rows):
        return None
    sizes = [bench.spans.text_bytes(row) for row in rows[:n_texts]]
    sizes += [bench.spans.memory_bytes(bench.memory_size) for _ in rows[n_texts:]]
    return float(np.mean(sizes))
