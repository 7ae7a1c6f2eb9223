"""One run of an evaluation: data, model, tasks and spans, and what is made of them.

Stands on all other parts; `cli.py` gives it checked options.
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
from modeling_clara.storage_clara import file_sha256, write_json
from recipes.evaluation.external import read_predictions
from recipes.evaluation.progress import Progress
from recipes.evaluation.questions import read_data
from recipes.evaluation.rankers import Bm25Ranker
from recipes.evaluation.results import (
    RESULTS_FILE,
    build_results,
    check_rows,
    describe_external,
    describe_system,
    public_name,
)
from recipes.evaluation.run import collect, measure_latency, predict, start_run
from recipes.evaluation.scores import compare, score_questions
from recipes.evaluation.spans import Spans, compress_documents, finish_codec, match_documents, open_memories
from recipes.evaluation.systems import SYSTEMS, Bench
from recipes.evaluation.tasks import NOT_THERE, Task, make_tasks, needed_documents

logger = logging.getLogger(__name__)


class Evaluation:
    """One run: data, model, tasks and spans, and what is made of them.

    Args:
        arguments: checked.
        state: of accelerate; one process without it.
    """

    def __init__(self, arguments: argparse.Namespace, state: PartialState):
        self.arguments, self.state = arguments, state
        with self._progress("reading the data"):
            self.data = read_data(
                arguments.data,
                split=arguments.split,
                config=arguments.data_config,
                half=arguments.half,
                limit=arguments.limit,
                skip_bad_rows=arguments.skip_bad_rows,
                may_abstain=arguments.min_score is not None or arguments.predictions is not None,
            )
        self.shared = {"data": self.data, "setting": arguments.setting, "command": arguments.command}
        self.draws = {"seed": arguments.seed, "resamples": arguments.resamples}
        self.model: CLaRaForRAG | None = None
        self.text_reader: CLaRaForRAG | None = None
        self.corpus: CompressedCorpus | None = None
        self.missing_gold = 0

    def _start(self, folder: Path, options: dict) -> None:
        start_run(folder, options)
        write_lines(folder / "rejected.jsonl", self.data.rejected)

    def _progress(self, what: str, total: int | None = None, unit: str = "") -> Progress:
        return Progress(what, total, unit, shown=self.state.is_main_process)

    # --- another system's predictions --------------------------------------------------------------------------------

    def score_predictions(self) -> list[dict]:
        """Score --predictions; the results."""
        arguments, data = self.arguments, self.data
        tasks = [Task(asked, tuple(dict.fromkeys(asked.candidates)), asked.gold) for asked in data.questions]
        rows = read_predictions(arguments.predictions, tasks, data.ids, data.documents)
        ranks = any(row["retrieved"] for row in rows)
        if ranks and arguments.setting in ("closed_book", "gold_only"):
            raise ValueError(
                f"`retrieved` must be left out in the setting {arguments.setting!r}, where nothing is ranked. Remove "
                "it, or correct --setting."
            )
        scores = score_questions(tasks, rows, with_retrieval=ranks)
        check_rows(arguments.name, rows, scores)
        content = build_results(
            **self.shared,
            system=describe_external(arguments.name, arguments.url),
            tasks=tasks,
            rows=rows,
            scores=scores,
            options={**self.draws, "limit": arguments.limit},
        )
        options = {"data": data.sha256, "predictions": file_sha256(arguments.predictions), "system": arguments.name}
        options |= {name: getattr(arguments, name) for name in ("setting", "half", "limit")}
        self._start(arguments.output, options)
        write_lines(arguments.output / "predictions.jsonl", rows)
        write_json(arguments.output / RESULTS_FILE, content)
        return [content]

    # --- our systems -------------------------------------------------------------------------------------------------

    def run(self) -> list[dict]:
        """Predict and score with every system; their results, the first one's first."""
        arguments, state = self.arguments, self.state
        self._load()
        first, *others = arguments.systems
        folders = {first: arguments.output}
        folders |= {name: arguments.output / "baselines" / name.replace("_", "-") for name in others}
        sizes = self._sizes()
        with self._progress("hashing the weights"):
            options = self._options(sizes)
        if state.is_main_process:
            for name, folder in folders.items():
                self._start(folder, {**options, **self._own_options(name), "system": name})
        state.wait_for_everyone()
        systems = [SYSTEMS[name] for name in folders]
        tasks, spans = self._prepare(any(system.needs_memory for system in systems))
        bench = self._bench(spans, sizes)
        with self._progress("preparing the retrievers", len(systems), "systems") as progress:
            for system in systems:
                bench.prepare(system)
                progress.update()
        for name, folder in folders.items():
            predict(
                bench,
                SYSTEMS[name],
                tasks,
                folder,
                batch_size=arguments.batch_size,
                process=(state.process_index, state.num_processes),
                description=name,
            )
        state.wait_for_everyone()
        bench.warn_of_chance()
        results = self._score(bench, tasks, folders, options) if state.is_main_process else []
        state.wait_for_everyone()
        return results

    def _load(self) -> None:
        arguments, device = self.arguments, self.state.device
        given = {name: getattr(arguments, name) for name in ("revision", "backbone", "dtype")}
        loader = {name: value for name, value in given.items() if value is not None}
        with self._progress("loading the model"):
            self.model = CLaRaForRAG.from_pretrained(arguments.model, **loader).to(device)
            if arguments.text_reader is not None:
                loader.pop("revision", None)
                self.text_reader = CLaRaForRAG.from_pretrained(arguments.text_reader, **loader).to(device)
            if arguments.corpus is not None:
                self.corpus = self.model.load_corpus(arguments.corpus)
        self.codec = self.corpus.manifest.codec if self.corpus is not None else arguments.codec or "float16"

    def _sizes(self) -> dict[str, int]:
        """`top_k`, `memory_size` and `retrieval_memory_size` of the run."""
        arguments, config = self.arguments, self.model.config
        compared = arguments.retrieval_memory_size
        compared = config.retrieval_memory_size if compared is None else compared
        sizes = {
            "memory_size": config.check_memory_size(arguments.memory_size),
            "retrieval_memory_size": config.check_memory_size(compared, "retrieval_memory_size"),
        }
        if self.corpus is not None and max(sizes.values()) > self.corpus.manifest.memory_size:
            raise ValueError(
                f"--memory-size must be <= the {self.corpus.manifest.memory_size} vectors that the corpus stores, "
                f"got {max(sizes.values())}. Lower it, or build the corpus with more."
            )
        return {"top_k": arguments.top_k or config.retrieval_top_k, **sizes}

    def _options(self, sizes: dict[str, int]) -> dict:
        """What the predictions depend on; kept in run.json and compared when a run goes on."""
        names = ("setting", "num_candidates", "min_score", "max_new_tokens", "half", "limit", "split", "seed")
        return {
            "weights": weights_digest(self.model),
            "data": self.data.sha256,
            "corpus": None if self.corpus is None else file_sha256(self.corpus.folder / "corpus.json"),
            **sizes,
            "codec": self.codec,
            **{name: getattr(self.arguments, name) for name in names},
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _own_options(self, name: str) -> dict:
        """What the predictions of one system depend on beside that."""
        system = SYSTEMS[name]
        return {
            "dense": self.arguments.dense if system.retriever == "dense" else None,
            "text_reader": self._text_digest if system.reader == "tuned_text" else None,
            "expand": self.arguments.expand if system.reader == "memory_and_text" else None,
            "expand_below": self.arguments.expand_below if system.reader == "memory_and_text" else None,
        }

    @functools.cached_property
    def _text_digest(self) -> str:
        return weights_digest(self.text_reader)

    def _prepare(self, needs_memory: bool) -> tuple[list[Task], Spans]:
        """The tasks, and the spans that they can retrieve."""
        arguments, data, spans, known = self.arguments, self.data, None, None
        if self.corpus is not None:
            spans = Spans.of_corpus(self.corpus)
            known = match_documents(spans, data.documents, data.titles)
        elif arguments.setting == "corpus" and not data.documents:
            raise ValueError(f"{data.name} brings no documents to search. Pass --corpus.")
        tasks = make_tasks(data, arguments.setting, self._choose, num_candidates=arguments.num_candidates, known=known)
        if spans is None:
            documents = needed_documents(tasks, data)
            with_memory = needs_memory and documents
            return tasks, self._memories(documents) if with_memory else Spans.of_documents(self.model, documents)
        gold = {name for task in tasks for name in task.gold}
        self.missing_gold = sum(name.startswith(NOT_THERE) for name in gold)
        if self.missing_gold:
            found = "%d of %d gold documents are not in the corpus; they count as not found."
            logger.warning(found, self.missing_gold, len(gold))
        return tasks, spans

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
        key = repr([model.fingerprint, str(model.dtype), list(documents.items())])
        folder = arguments.memories or arguments.output / "memories"
        folder /= hashlib.sha256(key.encode()).hexdigest()[:16]
        if not any(CompressedCorpus.is_complete(folder / name) for name in ("float16", self.codec)):
            compress_documents(model, documents, folder, rank=state.process_index, world_size=state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            finish_codec(folder, self.codec)
        state.wait_for_everyone()
        return open_memories(model, folder, self.codec, len(documents))

    def _bench(self, spans: Spans, sizes: dict[str, int]) -> Bench:
        arguments = self.arguments
        names = ("max_new_tokens", "min_score", "dense", "expand", "expand_below", "seed")
        return Bench(
            model=self.model,
            spans=spans,
            text_reader=self.text_reader,
            depth=max(20, arguments.num_candidates, sizes["top_k"]),
            read_all=arguments.setting == "gold_only",
            **sizes,
            **{name: getattr(arguments, name) for name in names},
        )

    def _score(self, bench: Bench, tasks: list[Task], folders: dict[str, Path], options: dict) -> list[dict]:
        """Write results.json of every system that has answered; the first one's has the comparisons."""
        rows = {name: collect(folder, tasks) for name, folder in folders.items()}
        scores, problems, results = {}, [], []
        for name in folders:
            ranks = SYSTEMS[name].ranks and not bench.read_all
            found = score_questions(tasks, rows[name], with_retrieval=ranks)
            try:
                check_rows(name, rows[name], found)
                scores[name] = found
            except ValueError as error:
                problems.append(str(error))
        with self._progress("scoring and timing", len(scores), "systems") as progress:
            for name in scores:
                results.append(self._results_of(name, bench, tasks, rows[name], scores, options))
                write_json(folders[name] / RESULTS_FILE, results[-1])
                progress.update()
        if problems:
            written = f" Written are the results of {', '.join(scores)}." if scores else ""
            raise ValueError(" ".join(problems) + written)
        return results

    def _results_of(
        self, name: str, bench: Bench, tasks: list[Task], rows: list[dict], scores: dict, options: dict
    ) -> dict:
        arguments = self.arguments
        others = [other for other in scores if other != name] if name == arguments.systems[0] else []
        answered = [task for task, row in zip(tasks, rows, strict=True) if row["prediction"] is not None]
        kept = {key: options[key] for key in ("limit", "min_score", "num_candidates", "dtype", "weights")}
        kept |= self._own_options(name)
        kept |= {"dense": public_name(kept["dense"]), "missing_gold": self.missing_gold}
        return build_results(
            **self.shared,
            system=describe_system(name, SYSTEMS[name], bench, self.codec),
            model=self.model,
            corpus=self.corpus,
            tasks=tasks,
            rows=rows,
            scores=scores[name],
            comparisons=[
                line
                for other in others
                for line in compare(scores[name], scores[other], other.replace("_", "-"), **self.draws)
            ],
            latency=measure_latency(bench, SYSTEMS[name], answered, arguments.latency_questions),
            options={**kept, "batch_size": arguments.batch_size, **self.draws},
            processes=self.state.num_processes,
            device=self.state.device,
        )


def weights_digest(model: CLaRaForRAG) -> str:
    """SHA-256 of all that answers depend on: every weight, the prompts and the tokenizer."""
    digest = hashlib.sha256(json.dumps(model.processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(str(model.processor.tokenizer.chat_template).encode())
    digest.update(model.processor.tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
