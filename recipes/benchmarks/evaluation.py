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
from pathlib import Path

import evaluate

from modeling_clara.corpus.storage import write_lines
from recipes.benchmarks.shared import add_outputs, describe_machine, figures, seconds_of, show
from recipes.evaluation.cli import main as evaluate_main
from recipes.evaluation.formats import Question
from recipes.evaluation.run import prediction_row
from recipes.evaluation.scores import CUTOFFS, compare, score_questions, with_intervals
from recipes.evaluation.tasks import Task
from recipes.models.pico.facts import FactSheets
from recipes.publishing.runs import CARDS
from recipes.spaces.publish import LEADERBOARD, build_space

METRICS = Path(__file__).resolve().parents[1] / "spaces" / "metrics"
WORDS = "the a of in Paris Rome Curie Marie 1,200 river north tower an opera king band film city first second".split()


def generated_run(n_questions: int, seed: int = 0) -> tuple[list[Task], list[dict]]:
    """Tasks with one to three gold answers and two gold documents of 20, and predictions of one to eight words."""
    generator = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    tasks, rows = [], []
    for number in range(n_questions):
        answers = tuple(text(4) for _ in range(generator.randint(1, 3)))
        candidates = tuple(str(index) for index in range(20))
        question = Question(str(number), "?", answers, candidates, ("3", "7"), "")
        tasks.append(Task(question, candidates, question.gold))
        prediction = text(8)
        ranking = generator.sample(candidates, len(candidates))
        rows.append(prediction_row(str(number), prediction=prediction, retrieved=ranking))
    return tasks, rows


def benchmark_scoring(n_questions: int) -> dict[str, float]:
    """Seconds of metrics, intervals and one comparison, and of the `evaluate` modules on the same rows."""
    tasks, rows = generated_run(n_questions)
    texts, rankings = [row["prediction"] for row in rows], [row["retrieved"] for row in rows]
    answers, gold = [list(task.question.answers) for task in tasks], [list(task.gold) for task in tasks]
    scores = {}

    def module(name: str, **options):
        return evaluate.load(str(METRICS / name)).compute(**options)

    runs = {
        "metrics": lambda: scores.update(score_questions(tasks, rows, with_retrieval=True)),
        "bootstrap": lambda: with_intervals(scores),
        "comparison with another system": lambda: compare(
            scores, {name: values[::-1] for name, values in scores.items()}, "another system"
        ),
        "evaluate module rag_answer": lambda: module("rag_answer", predictions=texts, references=answers),
        "evaluate module retrieval": lambda: module(
            "retrieval", predictions=rankings, references=gold, k=list(CUTOFFS)
        ),
    }
    return {name: seconds_of(run) for name, run in runs.items()}


def benchmark_run(model: str, data: str | None, n_questions: int, n_documents: int) -> tuple[dict[str, float], dict]:
    """Seconds of the whole command, loading and compressing included, the model's share of answering; results.json."""
    with tempfile.TemporaryDirectory() as temporary:
        path = data or str(Path(temporary) / "questions.jsonl")
        if data is None:
            write_lines(Path(path), FactSheets(5, test=True).retrieval_rows(n_questions, n_documents))
        output = Path(temporary) / "run"
        arguments = ["--model", model, "--data", path, "--output", str(output), "--limit", str(n_questions)]

        def run():
            if evaluate_main(arguments):
                raise RuntimeError("the evaluation must end well, see the error above. Correct its cause.")

        with contextlib.redirect_stdout(io.StringIO()):
            seconds = seconds_of(run)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    answering, share = (results["efficiency"][name] for name in ("seconds", "model_seconds"))
    return {"whole command": seconds, "answering": answering, "share of it in the model": share / answering}, results


def benchmark_leaderboard(results: dict, n_results: int) -> dict[str, float]:
    """Seconds in which the leaderboard reads `n_results` copies of a results.json, and reads them again."""
    with tempfile.TemporaryDirectory() as space, tempfile.TemporaryDirectory() as temporary:
        build_space(LEADERBOARD, Path(space))
        sys.path.append(space)  # a Space stands by itself
        from leaderboard_source import Source

        folder = Path(temporary) / "results"
        folder.mkdir()
        for number in range(n_results):
            named = {**results, "system": {**results["system"], "name": f"system {number}"}}
            (folder / f"{number}.json").write_text(json.dumps(named), encoding="utf-8")
        source = Source(temporary, check_revisions=False)

        def load():
            loaded = source.load()
            if len(loaded.entries) != n_results:
                raise RuntimeError(f"all results must be shown, but {loaded.refused[0]}. Correct its cause.")

        return {name: seconds_of(load) for name in ("reading", "reading again")}


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
            {"what": what, "figure": f"{value:.3f}" if "share" in what else f"{value:.1f} s"}
            for what, value in report[name].items()
        ]
        tables.append(figures(f"{head} | time", "{what} | {figure}", rows))
    return "\n\n".join(tables)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predictions", type=int, default=100_000, help="that are scored (default: 100,000)")
    parser.add_argument("--model", default=str(CARDS / "clara-pico"), help="that answers (default: clara-pico)")
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
