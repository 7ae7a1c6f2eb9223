"""Predictions that another system made -> rows of predictions.jsonl. A file has a line for every question:

    {"id": "...", "prediction": "Paris", "retrieved": [3, 0]}        an answer, and documents by their place in `docs`
    {"id": "...", "prediction": null, "abstained": true}             no answer, because it is not in the documents
    {"id": "...", "prediction": null, "failure": "timeout"}          no answer, because something went wrong

If rows of the data have no `docs`, `retrieved` has ids: `_id` (BEIR), `wikipedia_id` (KILT), and of passages their
number in the file, from 0, equal ones counted once. A document that the data does not have is one that is not gold.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from trl.scripts.utils import DatasetConfig

from recipes.evaluation.questions import MAX_NAMED
from recipes.evaluation.run import MAX_REASON, prediction_row
from recipes.evaluation.tasks import Task
from recipes.training.data import BadRow, read_rows

KEYS = {"id", "prediction", "abstained", "failure", "retrieved", "n_tokens"}


def read_predictions(
    path: Path, tasks: Sequence[Task], ids: Collection[str] = (), documents: Collection[str] = ()
) -> list[dict]:
    """Rows of a file of predictions (.jsonl or .jsonl.gz), in the order of the tasks.

    `ids` are further questions of the data, whose predictions are left aside; `documents` ids of its documents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an id is unknown, repeated or missing, or a prediction is empty or no text; the line is named.
    """
    by_id = {task.question.id: task for task in tasks}
    rows, places, problems = {}, {}, []
    for place, row in read_rows(DatasetConfig(path=str(path)), on_bad_row=problems.append):
        try:
            question_id = _id(row)
            if question_id in places:
                raise BadRow(f"has the id {question_id!r} like {places[question_id]}. Keep one of them")
            if question_id not in by_id and question_id not in ids:
                raise BadRow(
                    f"has the id {question_id!r}, which the data does not have (its first is {next(iter(by_id))!r})"
                )
            places[question_id] = place
            if question_id in by_id:
                rows[question_id] = _prediction(row, by_id[question_id])
        except BadRow as error:
            problems.append(BadRow(f"{str(error).rstrip('.')}.", place))
    if problems:
        named = " ".join(str(error) for error in problems[:MAX_NAMED])
        raise ValueError(f"{len(problems)} row(s) of {path.name} cannot be scored: {named}")
    missing = [name for name in by_id if name not in rows]
    if missing:
        raise ValueError(
            f"{path.name} must have a prediction for each question, but {len(missing)} have none, the first is "
            f"{missing[0]!r}. Add them; what failed is written as "
            '{"id": ..., "prediction": null, "failure": "reason"}.'
        )
    ordered = [rows[name] for name in by_id]
    retrieved = [(row["id"], name) for row in ordered for name in row["retrieved"]]
    known = set(documents).union(*(task.question.candidates + task.gold for task in tasks))
    if retrieved and known and not any(name in known for _, name in retrieved):
        question_id, name = retrieved[0]
        raise ValueError(
            f"`retrieved` of {path.name} must have documents of the data, but has none of them; the first is {name!r} "
            f"of {question_id!r}. Write ids as the data has them, such as {next(iter(known))!r}, or places in `docs` "
            "as numbers."
        )
    return ordered


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _id(row: Mapping) -> str:
    given = row.get("id")
    if not _is_int(given) and not isinstance(given, str):
        raise BadRow(f"must have an `id`, got {given!r}")
    return str(given)


def _prediction(row: Mapping, task: Task) -> dict:
    unknown = sorted(set(row) - KEYS)
    if unknown:
        raise BadRow(f"must have no keys but {', '.join(sorted(KEYS))}, got {unknown[0]!r}")
    text, abstained, failure = row.get("prediction"), row.get("abstained") or False, row.get("failure")
    if text is not None and not isinstance(text, str):
        raise BadRow(f"must have a text as `prediction`, got {text!r}")
    if not isinstance(abstained, bool) or not (failure is None or (isinstance(failure, str) and failure.strip())):
        raise BadRow(f"must have true or false as `abstained` and a text as `failure`, got {abstained!r}, {failure!r}")
    if failure is not None and not failure.isprintable():
        raise BadRow(f"must have a printable text of one line as `failure`, got {failure!r}")
    prediction = (text or "").strip() or None
    if (prediction is not None) + abstained + (failure is not None) != 1:
        raise BadRow(
            f"must have one of `prediction`, `abstained` and `failure`, got {text!r}, {abstained!r} and {failure!r}; "
            "an empty prediction is a failure or an abstention, say which"
        )
    n_tokens = row.get("n_tokens")
    if n_tokens is not None and (not _is_int(n_tokens) or n_tokens < 0):
        raise BadRow(f"must have a number of tokens >= 0 as `n_tokens`, got {n_tokens!r}")
    return prediction_row(
        task.question.id,
        prediction=prediction,
        abstained=abstained,
        failure=failure and failure[:MAX_REASON],
        retrieved=_retrieved(row.get("retrieved"), task.question.candidates),
        n_tokens=n_tokens,
    )


def _retrieved(given, candidates: Sequence[str]) -> list[str]:
    """Ids of documents, each once; `candidates` are those of the question, which places stand for."""
    if given is not None and not isinstance(given, list):
        raise BadRow(f"must have a list as `retrieved`, got {given!r}")
    names = []
    for entry in given or ():
        if not _is_int(entry) and not isinstance(entry, str):
            raise BadRow(f"must have ids or places in `retrieved`, got {entry!r}")
        if isinstance(entry, str) and candidates and entry.isdigit():
            raise BadRow(f"must have places in `docs` as numbers in `retrieved`, got the text {entry!r}")
        is_place = _is_int(entry) and bool(candidates)
        if is_place and not 0 <= entry < len(candidates):
            raise BadRow(f"must have places from 0 to {len(candidates) - 1} in `retrieved`, got {entry}")
        names.append(candidates[entry] if is_place else str(entry))
    return list(dict.fromkeys(names))
