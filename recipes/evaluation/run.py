"""Tasks -> predictions.jsonl: resumable, in several processes, every failure counted.

What is predicted is appended to `parts/`, one file a process; at the end they become predictions.jsonl, in the order
of the data.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from modeling_clara.corpus.storage import append_lines, foreign_files, read_lines, write_lines
from modeling_clara.storage_clara import write_json
from recipes.evaluation.progress import Progress
from recipes.evaluation.systems import Bench, Clock, System, read, retrieve, rows_to_read, span_bytes, time_one
from recipes.evaluation.tasks import Task

logger = logging.getLogger(__name__)

RUN_FILE, PREDICTIONS_FILE, PARTS_FOLDER = "run.json", "predictions.jsonl", "parts"
MAX_REASON = 500  # characters of an error that are kept


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds what is no run; files with a dot do not count, such as what a killed start left."""
    return not (folder / RUN_FILE).exists() and bool(foreign_files(folder, [".*"]))


def start_run(folder: Path, options: dict) -> None:
    """Write run.json, or raise a ValueError unless the folder was begun with the same options; it names the other."""
    path = folder / RUN_FILE
    if is_foreign(folder):
        raise ValueError(f"--output must be a new folder or one of this command, got {folder}. Choose another one.")
    if not path.exists():
        write_json(path, options)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}. Remove the folder, or choose another --output.") from error
    for name in sorted({*before, *options}):
        if before.get(name) != options.get(name):
            raise ValueError(
                f"`{name}` must be {before.get(name)!r} as when {folder} was begun, got {options.get(name)!r}. "
                "Choose another --output, or remove the folder."
            )


def predict(
    bench: Bench,
    system: System,
    tasks: Sequence[Task],
    folder: Path,
    *,
    batch_size: int = 32,
    process: tuple[int, int] = (0, 1),
    description: str = "questions",
) -> None:
    """Predict what `folder` does not have yet; process i of N every N-th of all tasks.

    `batch_size` questions are retrieved and read together; of a batch that fails each is tried alone.
    """
    index, count = process
    done = {row["id"] for row in finished_rows(folder)}
    mine = [task for task in tasks[index::count] if task.question.id not in done]
    if not mine:
        return
    part = folder / PARTS_FOLDER / f"{index}-of-{count}.jsonl"
    with Progress(f"answering with {description}", len(mine), "questions", shown=index == 0) as progress:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            append_lines(part, predict_batch(bench, system, batch))
            progress.update(len(batch))


def predict_batch(bench: Bench, system: System, tasks: Sequence[Task]) -> list[dict]:
    """Rows of predictions.jsonl; if the batch fails, each question is tried by itself."""
    try:
        return _predict(bench, system, tasks)
    except Exception as error:  # whatever goes wrong is counted: a missing answer must not look like a wrong one
        _release_memory(error)
        if len(tasks) == 1:
            reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
            logger.warning("question %s failed: %s", tasks[0].question.id, reason)
            return [prediction_row(tasks[0].question.id, failure=reason)]
    return [row for task in tasks for row in predict_batch(bench, system, [task])]


def _predict(bench: Bench, system: System, tasks: Sequence[Task]) -> list[dict]:
    clock = Clock()
    hits = retrieve(bench, system, tasks, clock)
    chosen = [rows_to_read(bench, system, task, row) for task, row in zip(tasks, hits, strict=True)]
    answers = [("", None, 0)] * len(tasks)
    reading = [number for number, rows in enumerate(chosen) if rows or system.retriever is None]
    if reading:
        found = read(bench, system, [tasks[n] for n in reading], [chosen[n] for n in reading], clock)
        for number, *answer in zip(reading, *found, strict=True):
            answers[number] = answer
    seconds = {
        name: clock.seconds.get(name, 0.0) / len(tasks) for name in ("query", "search", "prepare", "read", "decode")
    }
    ids, is_ranked = bench.spans.document_ids, system.ranks and not bench.read_all
    predicted = []
    for number, (task, ranked, rows, answer) in enumerate(zip(tasks, hits, chosen, answers, strict=True)):
        text, n_tokens, n_texts = answer
        abstained = number not in reading
        shown = ranked if is_ranked else []
        predicted.append(
            prediction_row(
                task.question.id,
                prediction=text or None,
                abstained=abstained,
                failure=None if abstained or text else "empty answer",
                retrieved=[ids[row] for row, _ in shown],
                scores=[round(score, 6) for _, score in shown],
                read=list(dict.fromkeys(ids[row] for row in rows)),
                n_tokens=n_tokens,
                span_bytes=span_bytes(bench, rows, n_texts),
                seconds=sum(seconds.values()),
                model_seconds=seconds["query"] + seconds["read"] + seconds["decode"],
            )
        )
    return predicted


def prediction_row(question_id: str, **values) -> dict:
    """One line of predictions.jsonl: exactly one of `prediction`, `abstained` and `failure` says how it ended."""
    row = {"id": question_id, "prediction": None, "abstained": False, "failure": None}
    row |= {"retrieved": [], "scores": [], "read": []}
    return row | dict.fromkeys(("n_tokens", "span_bytes", "seconds", "model_seconds")) | values


def _release_memory(error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def finished_rows(folder: Path) -> Iterator[dict]:
    """Rows that were predicted before, of the finished file and of all parts."""
    for path in (folder / PREDICTIONS_FILE, *sorted((folder / PARTS_FOLDER).glob("*.jsonl"))):
        yield from read_lines(path)


def collect(folder: Path, tasks: Sequence[Task]) -> list[dict]:
    """Make predictions.jsonl out of the parts, in the order of the tasks.

    Raises:
        RuntimeError: a question has no prediction, because a process has ended early.
    """
    rows = {row["id"]: row for row in finished_rows(folder)}
    missing = [task.question.id for task in tasks if task.question.id not in rows]
    if missing:
        raise RuntimeError(
            f"{len(missing)} questions must still be answered (first: {missing[0]}). Run the same command again."
        )
    ordered = [rows[task.question.id] for task in tasks]
    if (folder / PARTS_FOLDER).exists():
        write_lines(folder / PREDICTIONS_FILE, ordered)
        shutil.rmtree(folder / PARTS_FOLDER)
    return ordered


def measure_latency(bench: Bench, system: System, tasks: Sequence[Task], n_questions: int) -> list[dict[str, float]]:
    """Milliseconds of the first `n_questions` of the tasks, one at a time, after one that is not counted."""
    times, timed = [], tasks[:n_questions]
    for number, task in enumerate([*timed[:1], *timed]):
        try:
            found = time_one(bench, system, task)
            times += [found] if number else []
        except Exception as error:  # the answers are there; that one cannot be timed shall not cost them
            _release_memory(error)
            logger.warning("question %s cannot be timed: %s. It is left out of the latency.", task.question.id, error)
    return times
