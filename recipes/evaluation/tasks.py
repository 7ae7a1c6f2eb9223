"""Questions -> tasks: which documents each question may choose from, by setting.

Stands between the data and the systems, which all get the same tasks. It knows nothing of models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recipes.evaluation.formats import Question
from recipes.evaluation.questions import EvaluationData

SETTINGS = {
    "normal": "the candidates of the data; where it brings none, those that BM25 chooses out of all its documents",
    "oracle": "the same with the gold documents among them",
    "corpus": "all documents of the data, or of --corpus",
    "gold_only": "the gold documents alone, all of them read",
    "closed_book": "none",
}


NOT_THERE = "not in the corpus: "  # before the id of a gold document that cannot be found, and counts all the same


@dataclass(frozen=True)
class Task:
    """A question in a setting.

    Attributes:
        question: as in the data.
        candidates: ids of the documents that may be retrieved; None for all of the corpus.
        gold: ids of its gold documents; one that the corpus does not have begins with `NOT_THERE`.
    """

    question: Question
    candidates: tuple[str, ...] | None
    gold: tuple[str, ...]


def check_setting(setting: str) -> str:
    """Return `setting`, or raise a ValueError."""
    if setting not in SETTINGS:
        raise ValueError(f"`setting` must be one of {', '.join(SETTINGS)}, got {setting!r}. Correct --setting.")
    return setting


def make_tasks(
    data: EvaluationData,
    setting: str,
    choose: Callable[[Sequence[str], int], list[list[str]]],
    *,
    num_candidates: int = 20,
    known: Mapping[str, str] | None = None,
) -> list[Task]:
    """Give every question its candidates.

    Args:
        data: the questions.
        setting: one of `SETTINGS`.
        choose: `(texts, n)` -> for each text the ids of n documents of the data, best first; asked only where the data
            brings no candidates.
        num_candidates: documents that are chosen so. A gold document that is added takes the last one's place.
        known: ids of the data -> ids of the corpus, where another corpus is searched; default: the data's own.

    Returns:
        One task a question, in order.

    Raises:
        ValueError: the data does not have what the setting needs; file and line are named.
    """
    check_setting(setting)
    questions = data.questions
    if setting == "closed_book":
        return [Task(question, (), ()) for question in questions]
    if setting == "corpus":
        names = {name: name for name in data.documents} if known is None else known
        return [
            Task(question, None, tuple(dict.fromkeys(names.get(name, NOT_THERE + name) for name in question.gold)))
            for question in questions
        ]
    _check_documents(data, setting)
    if setting == "gold_only":
        return [Task(question, question.gold, question.gold) for question in questions]
    open_questions = [question for question in questions if not question.candidates]
    chosen = choose([question.text for question in open_questions], num_candidates) if open_questions else []
    chosen_for = {question.id: ids for question, ids in zip(open_questions, chosen, strict=True)}
    tasks = []
    for question in questions:
        candidates = list(dict.fromkeys(chosen_for.get(question.id, question.candidates)))
        if setting == "oracle":
            added = [name for name in question.gold if name not in candidates]
            if added and question.id in chosen_for:
                kept = [name for name in candidates if name not in question.gold]
                n_kept = max(0, num_candidates - len(question.gold))
                candidates = [name for name in candidates if name in question.gold or name in kept[:n_kept]]
            candidates += added
        tasks.append(Task(question, tuple(candidates), question.gold))
    return tasks


def _check_documents(data: EvaluationData, setting: str) -> None:
    """Raise a ValueError unless the data has the documents that the setting needs."""
    questions = data.questions
    missing = next(
        (question for question in questions if any(name not in data.documents for name in question.gold)), None
    )
    if missing is not None or not data.documents:
        where = missing or questions[0]
        raise ValueError(
            f"the setting {setting!r} needs documents with text in the data, {where.place} has none. Use --setting "
            "corpus with --corpus, or --setting closed_book."
        )
    if setting == "gold_only":
        without = next((question for question in questions if not question.gold), None)
        if without is not None:
            raise ValueError(
                f"the setting 'gold_only' needs gold documents, {without.place} has none. Add `pos_index`, or use "
                "another setting."
            )
    if setting == "oracle" and not any(question.gold for question in questions):
        raise ValueError(
            f"the setting 'oracle' needs gold documents, no question has any ({questions[0].place} is the first). Add "
            "`pos_index`, or use --setting normal."
        )


def needed_documents(tasks: Sequence[Task], data: EvaluationData) -> dict[str, dict]:
    """The documents that the tasks can retrieve, and some for the control, in the order of the data."""
    needed = {name for task in tasks for name in (*(task.candidates or ()), *task.gold)}
    if any(task.candidates is None for task in tasks):
        needed = set(data.documents)
    return {name: document for name, document in data.documents.items() if name in needed}
