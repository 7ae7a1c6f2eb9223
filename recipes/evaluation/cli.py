"""The options of `recipes/evaluate.py`, and the whole way of an evaluation in one place.

Stands on all parts of the package. It prints the table of results.
"""

import argparse
import datetime
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from evaluation.external import read_predictions
from evaluation.questions import EvaluationData, read_data
from evaluation.rankers import Bm25Ranker
from evaluation.report import comparison_table, results_table, update_card
from evaluation.results import (
    build_results,
    describe_corpus,
    describe_external,
    describe_model,
    describe_system,
    write_results,
)
from evaluation.run import collect, measure_latency, predict, start_run
from evaluation.scores import RESAMPLES, compare, score_questions
from evaluation.spans import Spans, compress_documents, finish_codec, match_documents, open_memories
from evaluation.systems import SYSTEMS, Bench
from evaluation.tasks import SETTINGS, Task, check_setting, make_tasks, needed_documents
from modeling_clara import CLaRaForRAG
from modeling_clara.codecs_clara import CODECS
from modeling_clara.storage_clara import write_lines

BASELINES = "baselines"
EXIT_CODES = "Exit status: 0 done, 1 an error that is printed, 130 interrupted; the same command goes on."


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__.splitlines()[0], epilog=EXIT_CODES, allow_abbrev=False
    )
    settings = "; ".join(f"{name}: {text}" for name, text in SETTINGS.items())
    parser.add_argument("--data", required=True, help="file, BEIR folder or Hub data set with questions")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run; the same command goes on there")
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--backbone", help="where the model's backbone is")
    parser.add_argument("--predictions", type=Path, help="score this JSONL file of another system instead of a model")
    parser.add_argument("--name", help="of the system of --predictions")
    parser.add_argument("--url", help="https address that describes the system of --predictions")
    parser.add_argument("--setting", default="normal", help=f"{settings} (default: normal)")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["clara"],
        metavar="SYSTEM",
        help=f"the first is compared with the others: {', '.join(SYSTEMS)}, or all (default: clara)",
    )
    parser.add_argument("--memory-size", type=int, help="vectors of a memory that are read (default: the largest)")
    parser.add_argument("--retrieval-memory-size", type=int, help="vectors that are compared (default: the model's)")
    parser.add_argument("--codec", default="float16", help=f"of the memories: {', '.join(CODECS)} (default: float16)")
    parser.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    parser.add_argument("--num-candidates", type=int, default=20, help="that BM25 chooses (default: 20)")
    parser.add_argument("--min-score", type=float, help="cosine below which the model abstains")
    parser.add_argument("--corpus", help="compressed corpus to search in the setting corpus (default: the data's own)")
    parser.add_argument("--dense", help="sentence-transformers model of dense_text, such as all-MiniLM-L6-v2")
    parser.add_argument("--memories", type=Path, help="folder of compressed documents (default: OUTPUT/memories)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time (default: 32)")
    parser.add_argument("--limit", type=int, help="first questions of the file only")
    parser.add_argument("--split", help="of a Hub data set or BEIR folder (default: test)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="list them in rejected.jsonl and go on")
    parser.add_argument("--latency-questions", type=int, default=20, help="timed one at a time (default: 20; 0: none)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and control (default: 0)")
    parser.add_argument("--dtype", help="of the model (default: float32 on CPU)")
    parser.add_argument("--card", type=Path, help="folder of a model: write the results into its card as well")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Everything that can be checked before a model is loaded.

    Raises:
        ValueError: an option is wrong, with its remedy.
    """
    check_setting(arguments.setting)
    if (arguments.model is None) == (arguments.predictions is None):
        raise ValueError("--model or --predictions must be given, not both and not neither. Pass one of them.")
    if arguments.predictions is not None and not arguments.name:
        raise ValueError("--name must say what the system of --predictions is called. Pass it.")
    if arguments.codec not in CODECS:
        raise ValueError(f"--codec must be one of {', '.join(CODECS)}, got {arguments.codec!r}. Correct it.")
    if arguments.corpus is not None and arguments.setting != "corpus":
        raise ValueError(f"--corpus needs --setting corpus, got {arguments.setting!r}. Add it, or leave out --corpus.")
    if arguments.card is not None and not (arguments.card / "README.md").exists():
        raise ValueError(f"--card must be the folder of a model with README.md, got {arguments.card}. Correct it.")
    counts = {"top_k": 1, "num_candidates": 1, "max_new_tokens": 1, "batch_size": 1, "resamples": 100, "limit": 1}
    for name, least in {**counts, "latency_questions": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}. Correct it.")
    if arguments.systems == ["all"]:
        no_dense = [] if arguments.dense else ["dense_text"]
        arguments.systems = [name for name in SYSTEMS if name not in no_dense]
    unknown = [name for name in arguments.systems if name not in SYSTEMS]
    if unknown or len(set(arguments.systems)) < len(arguments.systems):
        wrong = unknown[0] if unknown else "one twice"
        raise ValueError(f"--systems must be of {', '.join(SYSTEMS)}, or all, got {wrong}. Correct it.")
    if arguments.setting == "closed_book":
        given = [name for name in arguments.systems if SYSTEMS[name].retriever is not None]
        if arguments.systems == ["clara"]:
            arguments.systems = ["closed_book"]
        elif given:
            raise ValueError(
                f"the setting 'closed_book' has no documents, but --systems has {given[0]!r}. Leave it out."
            )
    if "dense_text" in arguments.systems and arguments.dense is None:
        raise ValueError("the system 'dense_text' needs --dense MODEL. Pass it, or leave out 'dense_text'.")


class Evaluation:
    """One run: data, model, tasks and spans, and what is made of them.

    Args:
        arguments: checked.
        state: of accelerate; one process without it.
    """

    def __init__(self, arguments: argparse.Namespace, state: PartialState):
        self.arguments, self.state = arguments, state
        self.data: EvaluationData = read_data(
            arguments.data,
            split=arguments.split,
            limit=arguments.limit,
            skip_bad_rows=arguments.skip_bad_rows,
            may_abstain=arguments.min_score is not None or arguments.predictions is not None,
        )
        self.model: CLaRaForRAG | None = None
        self.corpus = None
        if state.is_main_process:
            write_lines(arguments.output / "rejected.jsonl", self.data.rejected)

    # --- another system's predictions --------------------------------------------------------------------------------

    def score_predictions(self) -> list[dict]:
        """Score --predictions; the results."""
        arguments = self.arguments
        tasks = [
            Task(question, tuple(dict.fromkeys(question.candidates)), question.gold)
            for question in self.data.questions
        ]
        rows = read_predictions(arguments.predictions, tasks)
        write_lines(arguments.output / "predictions.jsonl", rows)
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
        )
        write_results(arguments.output, content)
        return [content]

    # --- our systems -------------------------------------------------------------------------------------------------

    def run(self) -> list[dict]:
        """Predict and score with every system; their results, the first one's first."""
        arguments, state = self.arguments, self.state
        loader = {name: getattr(arguments, name) for name in ("revision", "backbone", "dtype")}
        loader = {name: value for name, value in loader.items() if value is not None}
        self.model = CLaRaForRAG.from_pretrained(arguments.model, **loader).to(state.device)
        systems = {name: SYSTEMS[name] for name in arguments.systems}
        tasks, spans = self._prepare(any(system.needs_memory for system in systems.values()))
        bench = self._bench(spans)
        options = self._options(bench)
        folders = {name: self._folder(name) for name in systems}
        if state.is_main_process:
            for name, folder in folders.items():
                start_run(folder, {**options, "system": name})
        state.wait_for_everyone()
        process = (state.process_index, state.num_processes)
        for name, system in systems.items():
            predict(
                bench, system, tasks, folders[name],
                batch_size=arguments.batch_size, process=process, description=name,
            )  # fmt: skip
        state.wait_for_everyone()
        results = self._score(bench, tasks, folders, options) if state.is_main_process else []
        state.wait_for_everyone()
        return results

    def _folder(self, name: str) -> Path:
        first = name == self.arguments.systems[0]
        return self.arguments.output if first else self.arguments.output / BASELINES / name.replace("_", "-")

    def _prepare(self, needs_memory: bool) -> tuple[list[Task], Spans]:
        """The tasks, and the spans that they can retrieve."""
        arguments, model, data = self.arguments, self.model, self.data
        if arguments.corpus is not None:
            self.corpus = model.load_corpus(arguments.corpus)
            spans = Spans.of_corpus(self.corpus)
            known = match_documents(spans, data.documents, data.titles)
            return make_tasks(data, arguments.setting, _choose_nothing, known=known), spans
        if arguments.setting == "corpus" and not data.documents:
            raise ValueError(f"{data.name} brings no documents to search. Pass --corpus.")
        everything: list[Spans] = []

        def choose(questions: Sequence[str], n: int) -> list[list[str]]:
            everything.append(Spans.of_documents(model, data.documents))
            ranked = Bm25Ranker(everything[0]).rank(questions, [None] * len(questions), n)
            return [[everything[0].document_ids[row] for row, _ in hits] for hits in ranked]

        tasks = make_tasks(data, arguments.setting, choose, num_candidates=arguments.num_candidates)
        documents = needed_documents(tasks, data)
        if not needs_memory or not documents:
            return tasks, Spans.of_documents(model, documents)
        return tasks, self._memories(documents)

    def _memories(self, documents: dict[str, dict]) -> Spans:
        """Compress what is not compressed yet, all processes together."""
        arguments, model, state = self.arguments, self.model, self.state
        digest = hashlib.sha256(repr([model.fingerprint, list(documents.items())]).encode()).hexdigest()[:16]
        folder = (arguments.memories or arguments.output / "memories") / digest
        codec = arguments.codec
        if not (folder / codec / "corpus.json").exists():
            job = (state.process_index, state.num_processes)
            if not (folder / "float16" / "corpus.json").exists():
                compress_documents(model, documents, folder, codec=codec, job=job)
            state.wait_for_everyone()
            if state.is_main_process:
                finish_codec(folder, codec)
        state.wait_for_everyone()
        return open_memories(model, folder, codec, len(documents))

    def _bench(self, spans: Spans) -> Bench:
        arguments, config = self.arguments, self.model.config
        memory_size = config.check_memory_size(arguments.memory_size)
        compared = config.check_memory_size(
            arguments.retrieval_memory_size or config.retrieval_memory_size, "retrieval_memory_size"
        )
        if spans.corpus is not None and max(memory_size, compared) > spans.corpus.manifest.memory_size:
            raise ValueError(
                f"--memory-size must be <= the {spans.corpus.manifest.memory_size} vectors that the corpus stores, "
                f"got {max(memory_size, compared)}. Lower it, or build the corpus with more."
            )
        top_k = arguments.top_k or config.retrieval_top_k
        return Bench(
            model=self.model,
            spans=spans,
            top_k=top_k,
            memory_size=memory_size,
            retrieval_memory_size=compared,
            max_new_tokens=arguments.max_new_tokens,
            min_score=arguments.min_score,
            dense=arguments.dense,
            depth=max(20, arguments.num_candidates, top_k),
            read_all=arguments.setting == "gold_only",
            seed=arguments.seed,
        )

    def _options(self, bench: Bench) -> dict:
        """What the predictions depend on; kept in run.json and compared when a run goes on."""
        arguments = self.arguments
        return {
            "model": arguments.model,
            "weights": weights_digest(self.model),
            "data": self.data.sha256,
            "setting": arguments.setting,
            "corpus": arguments.corpus,
            "generation": None if self.corpus is None else self.corpus.manifest.generation,
            "memory_size": bench.memory_size,
            "retrieval_memory_size": bench.retrieval_memory_size,
            "codec": self._codec(),
            "top_k": bench.top_k,
            "num_candidates": arguments.num_candidates,
            "min_score": arguments.min_score,
            "dense": arguments.dense,
            "max_new_tokens": arguments.max_new_tokens,
            "limit": arguments.limit,
            "split": arguments.split,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seed": arguments.seed,
        }

    def _codec(self) -> str:
        return self.arguments.codec if self.corpus is None else self.corpus.manifest.codec

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
        first, results = arguments.systems[0], []
        kept = ("limit", "min_score", "dense", "num_candidates", "dtype", "seed")
        for name, folder in folders.items():
            answered = [t for t, row in zip(tasks, rows[name], strict=True) if row["prediction"] is not None]
            others = [other for other in folders if other != name] if name == first else []
            draws = {"seed": arguments.seed, "resamples": arguments.resamples}
            content = build_results(
                system=describe_system(name, SYSTEMS[name], bench, self._codec()),
                model=describe_model(self.model),
                corpus=None if self.corpus is None else describe_corpus(self.corpus),
                data=self.data,
                setting=arguments.setting,
                tasks=tasks,
                rows=rows[name],
                scores=scores[name],
                comparisons=[
                    line
                    for other in others
                    for line in compare(scores[name], scores[other], other.replace("_", "-"), **draws)
                ],
                latency=measure_latency(bench, SYSTEMS[name], answered, arguments.latency_questions),
                options={**{key: options[key] for key in kept}, "batch_size": arguments.batch_size, **draws},
                processes=self.state.num_processes,
                device=self.state.device,
            )
            write_results(folder, content)
            results.append(content)
        return results


def _choose_nothing(questions: Sequence[str], n: int) -> list[list[str]]:
    return [[] for _ in questions]


def weights_digest(model: CLaRaForRAG) -> str:
    """SHA-256 of the compressor's fingerprint and the adapters of the other roles: what answers depend on."""
    digest = hashlib.sha256(model.fingerprint.encode())
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and (".generator." in name or ".reasoner." in name):
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        check_arguments(arguments)
        # waiting for the process that compresses may take hours
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience.timeout)
        evaluation = Evaluation(arguments, state)
        results = evaluation.score_predictions() if arguments.predictions is not None else evaluation.run()
        if state.is_main_process:
            print(results_table(results))
            print(f"\n{comparison_table(results[0])}\n" if results[0]["comparisons"] else "")
            print(f"Written: {arguments.output / 'results.json'}")
            if arguments.card is not None:
                print("Written: " + ", ".join(map(str, update_card(arguments.card, results))))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
