"""Questions -> tasks: which documents each question may choose from, by setting.

All systems get the same tasks.
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
    """A question in a setting."""

    question: Question
    candidates: tuple[str, ...] | None  # ids of the documents that may be retrieved; None for all of the corpus
    gold: tuple[str, ...]  # ids; one that the corpus does not have begins with `NOT_THERE`


def check_setting(setting: str) -> None:
    if setting not in SETTINGS:
        raise ValueError(f"`setting` must be one of {', '.join(SETTINGS)}, got {setting!r}. Correct --setting.")


def make_tasks(
    data: EvaluationData,
    setting: str,
    choose: Callable[[Sequence[str], int], list[list[str]]],
    *,
    num_candidates: int = 20,
    known: Mapping[str, str] | None = None,
) -> list[Task]:
    """One task a question, in order; a ValueError with file and line if the data lacks what the setting needs.

    `choose(texts, num_candidates)` gives for each text the ids of so many documents of the data, best first; asked
    only of questions without candidates. A gold document that is added takes the last one's place. `known` maps ids
    of the data to those of the corpus, if another corpus is searched.
    """
    check_setting(setting)
    questions = data.questions
    if setting == "closed_book":
        return [Task(question, (), ()) for question in questions]
    if setting == "corpus":
        names = dict(zip(data.documents, data.documents, strict=True)) if known is None else known
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
                dropped = kept[max(0, num_candidates - len(question.gold)) :]
                candidates = [name for name in candidates if name not in dropped]
            candidates += added
        tasks.append(Task(question, tuple(candidates), question.gold))
    return tasks


def _check_documents(data: EvaluationData, setting: str) -> None:
    questions, without_gold = data.questions, [question for question in data.questions if not question.gold]
    missing = [question for question in questions if not data.documents.keys() >= {*question.gold}]
    if missing or not data.documents:
        raise ValueError(
            f"the setting {setting!r} needs documents with text in the data, {(missing or questions)[0].place} has "
            "none. Use --setting corpus with --corpus, or --setting closed_book."
        )
    if setting == "gold_only" and without_gold:
        raise ValueError(
            f"the setting 'gold_only' needs gold documents, {without_gold[0].place} has none. Add `pos_index`, or use "
            "another setting."
        )
    if setting == "oracle" and len(without_gold) == len(questions):
        raise ValueError(
            f"the setting 'oracle' needs gold documents, no question has any ({questions[0].place} is the first). Add "
            "`pos_index`, or use --setting normal."
        )


def needed_documents(tasks: Sequence[Task], data: EvaluationData) -> dict[str, dict]:
    """The documents that the tasks can retrieve, in the order of the data."""
    if any(task.candidates is None for task in tasks):
        return data.documents
    needed = {name for task in tasks for name in (*task.candidates, *task.gold)}
    return {name: document for name, document in data.documents.items() if name in needed}
