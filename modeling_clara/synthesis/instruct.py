"""Stage 2: a question over one or more documents among others that look like them, with the teacher's short answer.

A share of the rows is unanswerable: their documents look right, and the answer says that they are not. The record is
a row that the stages `instruct`, `text` and `joint` read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ask import Asker
from .checks import check_length, run_checks
from .distractors import Search, draw, is_same, mixed
from .leakage import LeakageGuard
from .outcome import Outcome, Work
from .schemas import INSTRUCT_QUESTION, TEACHER_ANSWER

INSTRUCT, UNANSWERABLE = "instruct", "unanswerable"
NO_ANSWER = "The background does not say."


@dataclass(frozen=True)
class Settings:
    """What rows look like.

    Attributes:
        documents: of a row.
        gold: documents that a question needs at most; how many is drawn for each.
        unanswerable: share of rows whose documents do not hold the answer, 0 to 1.
        no_answer: what is learned for these.
        attempts: questions that are written for a document at most.
        seed: of the draws.
    """

    documents: int = 5
    gold: int = 2
    unanswerable: float = 0.1
    no_answer: str = NO_ANSWER
    attempts: int = 3
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.gold <= self.documents:
            raise ValueError(f"`gold` must be from 1 to `documents` ({self.documents}), got {self.gold}. Lower it.")
        if not 0 <= self.unanswerable <= 1:
            raise ValueError(f"`unanswerable` must be a share from 0 to 1, got {self.unanswerable}. Correct it.")
        if self.attempts < 1:
            raise ValueError(f"`attempts` must be >= 1, got {self.attempts}. Raise it.")


async def synthesize(
    document: Mapping, asker: Asker, settings: Settings, *, search: Search, guard: LeakageGuard | None = None
) -> Outcome:
    """One row whose question a document answers, with others if it needs them; or that its documents do not answer.

    Args:
        document: `{id, title, text, span}` of a chunk.
        asker: of the teacher.
        settings: what rows look like.
        search: finds documents that look like the right one; it may find the document itself, which is left out.
        guard: evaluation files whose texts and questions must not come in.

    Returns:
        With the record `{id, question, answers, docs: [{id, title, text}], pos_index, kind}`, of the kind "instruct"
        or "unanswerable" (with empty `pos_index`), or none.

    Raises:
        OutOfBudget, TeacherDown: the document is not done.
    """
    work = Work(document, asker, guard)
    if leak := work.leaks():
        return work.drop(leak)
    generator = draw(settings.seed, document.get("id"), document.get("span"), work.text)
    kind = UNANSWERABLE if generator.random() < settings.unanswerable else INSTRUCT
    n_gold = generator.randint(1, settings.gold)
    near = [other for other in search(f"{work.title} {work.text}", n_gold) if not is_same(document, other)]
    gold = [document, *near[: n_gold - 1]]
    for attempt in range(settings.attempts):
        question = await ask_question(work, gold, kind, attempt)
        if question is None:
            continue
        n_others = settings.documents - (0 if kind == UNANSWERABLE else len(gold))
        found = search(question, settings.documents + len(gold))
        others = [other for other in found if not any(is_same(right, other) for right in gold)][:n_others]
        right = [] if kind == UNANSWERABLE else gold
        documents, places = mixed(right, others, generator)
        answer = await answered(work, question, documents, gold, kind, settings.no_answer, attempt)
        if answer is not None:
            row = {"id": document.get("id"), "question": question, "answers": [answer]}
            return work.accept({**row, "docs": documents, "pos_index": places, "kind": kind})
    return work.drop("nothing passed")


async def ask_question(work: Work, gold: Sequence[Mapping], kind: str, attempt: int) -> str | None:
    """A question that the gold documents answer together, or None and a reject."""
    answer = await work.asker.ask(
        "instruct_question", schema=INSTRUCT_QUESTION, attempt=attempt, documents=gold, n=len(gold)
    )
    if answer.problem:
        work.reject(kind, answer.problem, answer.text, attempt)
        return None
    question = answer.value["question"].strip()
    work.counts[f"{kind}_written"] += 1
    problem = check_length("", question, "a") or (work.guard.check(question) if work.guard else None)
    if problem:
        work.reject(kind, problem, {"question": question}, attempt)
        return None
    return question


async def answered(
    work: Work,
    question: str,
    documents: Sequence[Mapping],
    gold: Sequence[Mapping],
    kind: str,
    no_answer: str,
    attempt: int,
) -> str | None:
    """What is learned for a question: the teacher's answer, or that there is none; None and a reject if wrong."""
    if not documents:
        work.reject(kind, "no other documents: the search found none", {"question": question}, attempt)
        return None
    answer = await work.asker.ask("teacher_answer", schema=TEACHER_ANSWER, question=question, documents=documents)
    pair = {"question": question, "answer": (answer.value or {}).get("answer", "").strip()}
    problem = answer.problem
    if not problem and kind == UNANSWERABLE:
        problem = "answerable: the teacher finds an answer in other documents" if answer.value["answerable"] else None
    elif not problem and not answer.value["answerable"]:
        problem = "unanswerable: the teacher finds no answer"
    elif not problem:
        text = "\n\n".join(f"{entry.get('title') or ''}\n{entry['text']}".strip() for entry in gold)
        problem = "; ".join(run_checks(text, **pair, guard=work.guard)) or await work.verify(**pair, text=text)
    if problem:
        work.reject(kind, problem, pair, attempt)
        return None
    work.counts[f"{kind}_accepted"] += 1
    return no_answer if kind == UNANSWERABLE else pair["answer"]
