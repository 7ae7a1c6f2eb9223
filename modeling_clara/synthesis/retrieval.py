"""Stage 3: a question that one document answers, among candidates that look like it and do not answer it.

The record is a row that the stages `joint` and `contrastive` read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .ask import Asker
from .checks import full_text, run_checks, stands_in
from .distractors import Search, draw, is_same, mixed
from .leakage import LeakageGuard
from .outcome import Outcome, Work
from .schemas import RETRIEVAL_QUESTION

RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class Settings:
    """What rows look like.

    Attributes:
        candidates: documents of a row, the gold one among them.
        attempts: questions that are written for a document at most.
        seed: of the order of candidates.
    """

    candidates: int = 20
    attempts: int = 3
    seed: int = 0

    def __post_init__(self):
        if self.candidates < 2:
            raise ValueError(f"`candidates` must be >= 2, got {self.candidates}. Raise it.")
        if self.attempts < 1:
            raise ValueError(f"`attempts` must be >= 1, got {self.attempts}. Raise it.")


async def synthesize(
    document: Mapping, asker: Asker, settings: Settings, *, search: Search, guard: LeakageGuard | None = None
) -> Outcome:
    """One row whose question a document answers.

    Args:
        document: `{id, title, text, span}` of a chunk.
        asker: of the teacher.
        settings: what rows look like.
        search: finds the other candidates. Those in which the answer stands are left out: they may be right as well.
        guard: evaluation files whose texts and questions must not come in.

    Returns:
        With the record `{id, question, answers, docs: [{id, title, text}], pos_index, kind}`, or none.

    Raises:
        OutOfBudget, TeacherDown: the document is not done.
    """
    work = Work(document, asker, guard)
    if leak := work.leaks():
        return work.drop(leak)
    generator = draw(settings.seed, document.get("id"), document.get("span"), work.text)
    for attempt in range(settings.attempts):
        answer = await asker.ask("retrieval_question", schema=RETRIEVAL_QUESTION, attempt=attempt, **work.place)
        if answer.problem:
            work.reject(RETRIEVAL, answer.problem, answer.text, attempt)
            continue
        work.counts[f"{RETRIEVAL}_written"] += 1
        pair = {name: answer.value[name].strip() for name in ("question", "answer")}
        reasons = run_checks(full_text(document), **pair, guard=guard)
        problem = "; ".join(reasons) or await work.verify(**pair)
        others = [] if problem else other_candidates(document, pair, search, settings.candidates - 1)
        if not problem and not others:
            problem = "no other documents: the search found none without the answer"
        if problem:
            work.reject(RETRIEVAL, problem, pair, attempt)
            continue
        work.counts[f"{RETRIEVAL}_accepted"] += 1
        documents, places = mixed([document], others, generator)
        row = {"id": document.get("id"), "question": pair["question"], "answers": [pair["answer"]]}
        return work.accept({**row, "docs": documents, "pos_index": places, "kind": RETRIEVAL})
    return work.drop("nothing passed")


def other_candidates(document: Mapping, pair: Mapping, search: Search, n: int) -> list[Mapping]:
    """The n best documents for a question that are not the right one and do not hold the answer."""
    found = search(pair["question"], 2 * n + 1)
    return [
        other for other in found if not is_same(document, other) and not stands_in(full_text(other), pair["answer"])
    ][:n]
