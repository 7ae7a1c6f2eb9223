"""Measures an evaluation: `python -m recipes.benchmarks.evaluation` (`make bench-evaluation`).

Scores generated predictions, and asks clara-pico generated questions through the real command. Prints a Markdown table
and JSON. It knows nothing of how good the answers are.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import evaluate

from modeling_clara.corpus.storage import write_lines
from recipes.benchmarks.shared import add_outputs, describe_machine, show
from recipes.evaluation.cli import main as evaluate_main
from recipes.evaluation.formats import Question
from recipes.evaluation.report import table
from recipes.evaluation.run import prediction_row
from recipes.evaluation.scores import CUTOFFS, compare, score_questions, with_intervals
from recipes.evaluation.tasks import Task
from recipes.models.pico.facts import FactSheets
from recipes.spaces.publish import LEADERBOARD, build_space

RECIPES = Path(__file__).resolve().parents[1]
PICO = RECIPES.parent / "model_cards" / "clara-pico"
METRICS = RECIPES / "spaces" / "metrics"
WORDS = "the a of in Paris Rome Curie Marie 1,200 river north tower an opera king band film city first second".split()


def generated_run(n_questions: int, seed: int = 0) -> tuple[list[Task], list[dict]]:
    """Tasks with one to three gold answers and two gold documents of 20, and predictions of one to eight words."""
    generator = random.Random(seed)
    tasks, rows = [], []
    for number in range(n_questions):
        answers = [
            " ".join(generator.choices(WORDS, k=generator.randint(1, 4))) for _ in range(generator.randint(1, 3))
        ]
        candidates = tuple(str(index) for index in range(20))
        question = Question(str(number), "?", tuple(answers), candidates, ("3", "7"), "")
        tasks.append(Task(question, candidates, question.gold))
        text = " ".join(generator.choices(WORDS, k=generator.randint(1, 8)))
        ranking = generator.sample(candidates, len(candidates))
        rows.append(prediction_row(str(number), prediction=text, retrieved=ranking))
    return tasks, rows


def benchmark_scoring(n_questions: int) -> dict[str, float]:
    """Seconds of metrics, intervals and one comparison, and of the `evaluate` modules on the same rows."""
    tasks, rows = generated_run(n_questions)
    marks = {"start": time.perf_counter()}
    scores = score_questions(tasks, rows, with_retrieval=True)
    marks["metrics"] = time.perf_counter()
    with_intervals(scores)
    marks["bootstrap"] = time.perf_counter()
    compare(scores, {name: values[::-1] for name, values in scores.items()}, "another system")
    marks["comparison with another system"] = time.perf_counter()
    answers = [list(task.question.answers) for task in tasks]
    evaluate.load(str(METRICS / "rag_answer")).compute(
        predictions=[row["prediction"] for row in rows], references=answers
    )
    marks["evaluate module rag_answer"] = time.perf_counter()
    evaluate.load(str(METRICS / "retrieval")).compute(
        predictions=[row["retrieved"] for row in rows], references=[list(task.gold) for task in tasks], k=list(CUTOFFS)
    )
    marks["evaluate module retrieval"] = time.perf_counter()
    names = list(marks)
    return {name: marks[name] - marks[before] for before, name in zip(names, names[1:], strict=False)}


def benchmark_run(model: str, data: str | None, n_questions: int, n_documents: int) -> tuple[dict[str, float], dict]:
    """Seconds of the whole command, loading and compressing included, the model's share of answering; results.json."""
    with tempfile.TemporaryDirectory() as temporary:
        path = data or str(Path(temporary) / "questions.jsonl")
        if data is None:
            write_lines(Path(path), FactSheets(5, test=True).retrieval_rows(n_questions, n_documents))
        output = Path(temporary) / "run"
        arguments = ["--model", model, "--data", path, "--output", str(output), "--limit", str(n_questions)]
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            status = evaluate_main(arguments)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError("the evaluation must end well, see the error above. Correct its cause.")
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    efficiency = results["efficiency"]
    times = {
        "whole command": seconds,
        "answering": efficiency["seconds"],
        "share of it in the model": efficiency["model_seconds"] / efficiency["seconds"],
    }
    return times, results


def benchmark_leaderboard(results: dict, n_results: int) -> dict[str, float]:
    """Seconds in which the leaderboard reads so many results, and reads them again.

    Args:
        results: content of a results.json, copied under other names.
        n_results: files.
    """
    with tempfile.TemporaryDirectory() as space, tempfile.TemporaryDirectory() as temporary:
        build_space(LEADERBOARD, Path(space))
        sys.path.append(space)  # a Space stands by itself
        from leaderboard_source import Source

        for number in range(n_results):
            path = Path(temporary) / "results" / f"{number}.json"
            path.parent.mkdir(exist_ok=True)
            named = {**results, "system": {**results["system"], "name": f"system {number}"}}
            path.write_text(json.dumps(named), encoding="utf-8")
        source, seconds = Source(temporary, check_revisions=False), {}
        for name in ("reading", "reading again"):
            start = time.perf_counter()
            loaded = source.load()
            seconds[name] = time.perf_counter() - start
            if len(loaded.entries) != n_results:
                raise RuntimeError(f"all results must be shown, but {loaded.refused[0]}. Correct its cause.")
    return seconds


def render(report: dict, arguments: argparse.Namespace) -> str:
    """The tables."""
    heads = {
        "scoring": f"{arguments.predictions:,} predictions",
        "run": f"{arguments.questions} questions, {Path(arguments.model).name}",
        "leaderboard": f"leaderboard, {arguments.results:,} results",
    }
    tables = []
    for name, head in heads.items():
        rows = [
            [what, f"{value:.3f}" if "share" in what else f"{value:.1f} s"] for what, value in report[name].items()
        ]
        tables.append(table([head, "time"], rows))
    return "\n\n".join(tables)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predictions", type=int, default=100_000, help="that are scored (default: 100,000)")
    parser.add_argument("--model", default=str(PICO), help="that answers (default: clara-pico)")
    parser.add_argument("--data", help="questions (default: generated fact sheets)")
    parser.add_argument("--questions", type=int, default=200, help="that it is asked (default: 200)")
    parser.add_argument("--documents", type=int, default=10, help="of each generated question (default: 10)")
    parser.add_argument("--results", type=int, default=5000, help="that the leaderboard reads (default: 5,000)")
    arguments = add_outputs(parser).parse_args()
    report = {**describe_machine(), "scoring": benchmark_scoring(arguments.predictions)}
    report["run"], results = benchmark_run(arguments.model, arguments.data, arguments.questions, arguments.documents)
    report["leaderboard"] = benchmark_leaderboard(results, arguments.results)
    show("evaluation", report, render(report, arguments), arguments)


if __name__ == "__main__":
    main()
