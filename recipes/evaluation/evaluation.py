"""One run of an evaluation: data, model, tasks and spans, and what is made of them.

Stands on all other parts; `cli.py` gives it checked options. It knows nothing of what the user sees.
"""

import argparse
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.corpus.storage import write_lines
from recipes.evaluation.external import read_predictions
from recipes.evaluation.progress import Progress
from recipes.evaluation.questions import EvaluationData, hash_data, read_data
from recipes.evaluation.rankers import Bm25Ranker
from recipes.evaluation.results import (
    build_results,
    check_rows,
    describe_corpus,
    describe_external,
    describe_model,
    describe_system,
    public_name,
    write_results,
)
from recipes.evaluation.run import collect, measure_latency, predict, start_run
from recipes.evaluation.scores import compare, score_questions
from recipes.evaluation.spans import Spans, compress_documents, finish_codec, match_documents, open_memories
from recipes.evaluation.systems import SYSTEMS, Bench
from recipes.evaluation.tasks import NOT_THERE, Task, make_tasks, needed_documents

logger = logging.getLogger(__name__)

BASELINES = "baselines"


class Evaluation:
    """One run: data, model, tasks and spans, and what is made of them.

    Args:
        arguments: checked.
        state: of accelerate; one process without it.
    """

    def __init__(self, arguments: argparse.Namespace, state: PartialState):
        self.arguments, self.state = arguments, state
        with self._progress("reading the data"):
            self.data: EvaluationData = read_data(
                arguments.data,
                split=arguments.split,
                config=arguments.data_config,
                half=arguments.half,
                limit=arguments.limit,
                skip_bad_rows=arguments.skip_bad_rows,
                may_abstain=arguments.min_score is not None or arguments.predictions is not None,
            )
        self.model: CLaRaForRAG | None = None
        self.text_reader: CLaRaForRAG | None = None
        self.corpus = None
        self.missing_gold = 0

    def _start(self, folder: Path, options: dict) -> None:
        start_run(folder, options)
        write_lines(folder / "rejected.jsonl", self.data.rejected)

    # --- another system's predictions --------------------------------------------------------------------------------

    def score_predictions(self) -> list[dict]:
        """Score --predictions; the results."""
        arguments = self.arguments
        tasks = [
            Task(question, tuple(dict.fromkeys(question.candidates)), question.gold)
            for question in self.data.questions
        ]
        rows = read_predictions(arguments.predictions, tasks, self.data.ids, self.data.documents)
        if arguments.setting in ("closed_book", "gold_only") and any(row["retrieved"] for row in rows):
            raise ValueError(
                f"`retrieved` must be left out in the setting {arguments.setting!r}, where nothing is ranked. Remove "
                "it, or correct --setting."
            )
        scores = score_questions(tasks, rows, with_retrieval=any(row["retrieved"] for row in rows))
        content = build_results(
            system=describe_external(arguments.name, arguments.url),
            model=describe_model(None),
            corpus=None,
            data=self.data,
            setting=arguments.setting,
            tasks=tasks,
            rows=rows,
            scores=scores,
            comparisons=[],
            latency=[],
            options={"seed": arguments.seed, "resamples": arguments.resamples, "limit": arguments.limit},
            command=arguments.command,
        )
        options = {"data": self.data.sha256, "predictions": hash_data(arguments.predictions), "system": arguments.name}
        options |= {"setting": arguments.setting, "half": arguments.half, "limit": arguments.limit}
        self._start(arguments.output, options)
        write_lines(arguments.output / "predictions.jsonl", rows)
        write_results(arguments.output, content)
        return [content]

    # --- our systems -------------------------------------------------------------------------------------------------

    def run(self) -> list[dict]:
        """Predict and score with every system; their results, the first one's first."""
        arguments, state = self.arguments, self.state
        loader = {name: getattr(arguments, name) for name in ("revision", "backbone", "dtype")}
        loader = {name: value for name, value in loader.items() if value is not None}
        with self._progress("loading the model"):
            self.model = CLaRaForRAG.from_pretrained(arguments.model, **loader).to(state.device)
            if arguments.text_reader is not None:
                loader.pop("revision", None)
                self.text_reader = CLaRaForRAG.from_pretrained(arguments.text_reader, **loader).to(state.device)
            if arguments.corpus is not None:
                self.corpus = self.model.load_corpus(arguments.corpus)
        systems = {name: SYSTEMS[name] for name in arguments.systems}
        folders = {name: self._folder(name) for name in systems}
        sizes = self._sizes()
        with self._progress("hashing the weights"):
            options = self._options(sizes)
        if state.is_main_process:
            for name, folder in folders.items():
                self._start(folder, {**options, **self._own_options(name), "system": name})
        state.wait_for_everyone()
        tasks, spans = self._prepare(any(system.needs_memory for system in systems.values()))
        bench = self._bench(spans, sizes)
        with self._progress("preparing the retrievers", len(systems), "systems") as progress:
            for system in systems.values():
                bench.prepare(system)
                progress.update()
        process = (state.process_index, state.num_processes)
        for name, system in systems.items():
            predict(
                bench, system, tasks, folders[name],
                batch_size=arguments.batch_size, process=process, description=name,
            )  # fmt: skip
        state.wait_for_everyone()
        bench.warn_of_chance()
        results = self._score(bench, tasks, folders, options) if state.is_main_process else []
        state.wait_for_everyone()
        return results

    def _progress(self, what: str, total: int | None = None, unit: str = "", **options) -> Progress:
        return Progress(what, total, unit, shown=self.state.is_main_process, **options)

    def _folder(self, name: str) -> Path:
        first = name == self.arguments.systems[0]
        return self.arguments.output if first else self.arguments.output / BASELINES / name.replace("_", "-")

    def _prepare(self, needs_memory: bool) -> tuple[list[Task], Spans]:
        """The tasks, and the spans that they can retrieve."""
        arguments, model, data = self.arguments, self.model, self.data
        if self.corpus is not None:
            spans = Spans.of_corpus(self.corpus)
            known = match_documents(spans, data.documents, data.titles)
            tasks = make_tasks(data, arguments.setting, _choose_nothing, known=known)
            gold = {name for task in tasks for name in task.gold}
            self.missing_gold = sum(name.startswith(NOT_THERE) for name in gold)
            if self.missing_gold:
                logger.warning(
                    "%d of %d gold documents are not in the corpus; they count as not found.",
                    self.missing_gold, len(gold),
                )  # fmt: skip
            return tasks, spans
        if arguments.setting == "corpus" and not data.documents:
            raise ValueError(f"{data.name} brings no documents to search. Pass --corpus.")
        tasks = make_tasks(data, arguments.setting, self._choose, num_candidates=arguments.num_candidates)
        documents = needed_documents(tasks, data)
        if not needs_memory or not documents:
            return tasks, Spans.of_documents(model, documents)
        return tasks, self._memories(documents)

    def _choose(self, questions: Sequence[str], n: int) -> list[list[str]]:
        """Of each question the ids of the n documents of the data that BM25 puts first."""
        chosen = []
        with self._progress("choosing candidates with BM25", len(questions), "questions") as progress:
            spans = Spans.of_documents(self.model, self.data.documents)
            ranker = Bm25Ranker(spans)
            for question in questions:
                (hits,) = ranker.rank([question], [None], n)
                chosen.append([spans.document_ids[row] for row, _ in hits])
                progress.update()
        ranker.warn_of_chance()
        return chosen

    def _memories(self, documents: dict[str, dict]) -> Spans:
        """Compress what is not compressed yet, all processes together."""
        arguments, model, state = self.arguments, self.model, self.state
        digest = hashlib.sha256(
            repr([model.fingerprint, str(model.dtype), list(documents.items())]).encode()
        ).hexdigest()[:16]
        folder = (arguments.memories or arguments.output / "memories") / digest
        codec = self._codec()
        if not any(CompressedCorpus.is_complete(folder / name) for name in ("float16", codec)):
            share = {"rank": state.process_index, "world_size": state.num_processes}
            compress_documents(model, documents, folder, **share)
        state.wait_for_everyone()
        if state.is_main_process:
            finish_codec(folder, codec)
        state.wait_for_everyone()
        return open_memories(model, folder, codec, len(documents))

    def _sizes(self) -> dict[str, int]:
        """`top_k`, `memory_size` and `retrieval_memory_size` of the run."""
        arguments, config = self.arguments, self.model.config
        compared = arguments.retrieval_memory_size
        sizes = {
            "memory_size": config.check_memory_size(arguments.memory_size),
            "retrieval_memory_size": config.check_memory_size(
                config.retrieval_memory_size if compared is None else compared, "retrieval_memory_size"
            ),
        }
        if self.corpus is not None and max(sizes.values()) > self.corpus.manifest.memory_size:
            raise ValueError(
                f"--memory-size must be <= the {self.corpus.manifest.memory_size} vectors that the corpus stores, "
                f"got {max(sizes.values())}. Lower it, or build the corpus with more."
            )
        return {"top_k": arguments.top_k or config.retrieval_top_k, **sizes}

    def _bench(self, spans: Spans, sizes: dict[str, int]) -> Bench:
        arguments = self.arguments
        return Bench(
            model=self.model,
            spans=spans,
            **sizes,
            max_new_tokens=arguments.max_new_tokens,
            min_score=arguments.min_score,
            dense=arguments.dense,
            text_reader=self.text_reader,
            expand=arguments.expand,
            depth=max(20, arguments.num_candidates, sizes["top_k"]),
            read_all=arguments.setting == "gold_only",
            seed=arguments.seed,
        )

    def _options(self, sizes: dict[str, int]) -> dict:
        """What the predictions depend on; kept in run.json and compared when a run goes on."""
        arguments = self.arguments
        return {
            "weights": weights_digest(self.model),
            "data": self.data.sha256,
            "setting": arguments.setting,
            "corpus": None if self.corpus is None else hash_data(self.corpus.folder / "corpus.json"),
            **sizes,
            "codec": self._codec(),
            "num_candidates": arguments.num_candidates,
            "min_score": arguments.min_score,
            "max_new_tokens": arguments.max_new_tokens,
            "half": arguments.half,
            "limit": arguments.limit,
            "split": arguments.split,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seed": arguments.seed,
        }

    def _own_options(self, name: str) -> dict:
        """What the predictions of one system depend on beside that."""
        system = SYSTEMS[name]
        return {
            "dense": self.arguments.dense if system.retriever == "dense" else None,
            "text_reader": self._text_digest if system.reader == "tuned_text" else None,
            "expand": self.arguments.expand if system.reader == "memory_and_text" else None,
        }

    @functools.cached_property
    def _text_digest(self) -> str:
        return weights_digest(self.text_reader)

    def _codec(self) -> str:
        return self.arguments.codec or "float16" if self.corpus is None else self.corpus.manifest.codec

    def _score(self, bench: Bench, tasks: list[Task], folders: dict[str, Path], options: dict) -> list[dict]:
        """results.json of every system; the first one's has the comparisons."""
        arguments, rows, scores = self.arguments, {}, {}
        ranks = arguments.setting != "gold_only"
        for name, folder in folders.items():
            rows[name] = collect(folder, tasks)
            retriever = SYSTEMS[name].retriever
            scores[name] = score_questions(
                tasks, rows[name], with_retrieval=ranks and retriever not in (None, "wrong")
            )
        problems = {}
        for name in folders:
            try:
                check_rows(name, rows[name], scores[name])
            except ValueError as error:
                problems[name] = str(error)
        usable = [name for name in folders if name not in problems]
        results = []
        with self._progress("scoring and timing", len(usable), "systems") as progress:
            for name in usable:
                results.append(
                    self._results_of(name, bench, tasks, rows[name], scores, usable, folders[name], options)
                )
                progress.update()
        if problems:
            written = f" Written are the results of {', '.join(usable)}." if usable else ""
            raise ValueError(" ".join(problems.values()) + written)
        return results

    def _results_of(
        self, name: str, bench: Bench, tasks: list[Task], rows: list[dict], scores: dict, usable: list[str],
        folder: Path, options: dict,
    ) -> dict:  # fmt: skip
        """Write results.json of one system; its content."""
        arguments = self.arguments
        answered = [task for task, row in zip(tasks, rows, strict=True) if row["prediction"] is not None]
        others = [other for other in usable if other != name] if name == arguments.systems[0] else []
        draws = {"seed": arguments.seed, "resamples": arguments.resamples}
        kept = {key: options[key] for key in ("limit", "min_score", "num_candidates", "dtype", "weights")}
        kept |= self._own_options(name)
        kept |= {"dense": public_name(kept["dense"]), "missing_gold": self.missing_gold}
        content = build_results(
            system=describe_system(name, SYSTEMS[name], bench, self._codec()),
            model=describe_model(self.model),
            corpus=None if self.corpus is None else describe_corpus(self.corpus),
            data=self.data,
            setting=arguments.setting,
            tasks=tasks,
            rows=rows,
            scores=scores[name],
            comparisons=[
                line
                for other in others
                for line in compare(scores[name], scores[other], other.replace("_", "-"), **draws)
            ],
            latency=measure_latency(bench, SYSTEMS[name], answered, arguments.latency_questions),
            options={**kept, "batch_size": arguments.batch_size, **draws},
            command=arguments.command,
            processes=self.state.num_processes,
            device=self.state.device,
        )
        write_results(folder, content)
        return content


def _choose_nothing(questions: Sequence[str], n: int) -> list[list[str]]:
    return [[] for _ in questions]


def weights_digest(model: CLaRaForRAG) -> str:
    """SHA-256 of all that answers depend on: every weight, the prompts and the tokenizer."""
    digest = hashlib.sha256(json.dumps(model.processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(str(model.processor.tokenizer.chat_template).encode())
    digest.update(model.processor.tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
