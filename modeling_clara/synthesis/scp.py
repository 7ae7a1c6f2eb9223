"""Stage 1 of the paper (SCP, arXiv 2511.18659): simple and complex pairs of a document, and its paraphrase, verified.

The teacher writes pairs; what does not pass is rejected. It then names facts that no pair covers, and writes pairs for
these, round by round. The record is a row that the stage `pretrain` reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .ask import Asker
from .checks import check_fact, full_text, run_checks
from .leakage import LeakageGuard
from .outcome import Outcome, Work
from .schemas import COMPLEX_PAIRS, COVERAGE, PARAPHRASE, PARAPHRASE_VERDICT, SIMPLE_PAIRS

SIMPLE, COMPLEX, PARAPHRASED, COVERED = "simple", "complex", "paraphrase", "coverage"


@dataclass(frozen=True)
class Settings:
    """How much is asked for.

    Attributes:
        rounds: of supplementary pairs at most; the paper has 10. They end when no fact is uncovered, or nothing new
            passes.
        simple, complex: pairs at most, of one fact each and of several; 0 for none.
        paraphrases: attempts at a paraphrase at most, each told why the one before did not pass; 0 for none.
        complete: whether to drop a document of which a fact stays uncovered or whose paraphrase does not pass, as the
            paper does. Else what has passed is kept.
    """

    rounds: int = 10
    simple: int = 10
    complex: int = 5
    paraphrases: int = 3
    complete: bool = False

    def __post_init__(self):
        for name in ("rounds", "simple", "complex", "paraphrases"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}. Raise it.")
        if not self.simple and not self.complex and not self.paraphrases:
            raise ValueError("`simple`, `complex` or `paraphrases` must be > 0, got 0 for all. Ask for one of them.")


async def synthesize(
    document: Mapping, asker: Asker, settings: Settings, *, guard: LeakageGuard | None = None
) -> Outcome:
    """Pairs and a paraphrase of one document.

    Args:
        document: `{id, title, text, span}` of a chunk.
        asker: of the teacher.
        settings: how much is asked for.
        guard: evaluation files whose texts and questions must not come in.

    Returns:
        With the record `{id, title, text, span, qas: [{question, answers, kind, round}], paraphrase}`, or none if no
        pair and no paraphrase has passed.

    Raises:
        OutOfBudget, TeacherDown: the document is not done.
    """
    work = Work(document, asker, guard)
    if leak := work.leaks():
        return work.drop(leak)
    pairs = []
    for kind, name, schema, n in (
        (SIMPLE, "simple_pairs", SIMPLE_PAIRS, settings.simple),
        (COMPLEX, "complex_pairs", COMPLEX_PAIRS, settings.complex),
    ):
        if n:
            written = await work.ask_pairs(name, schema, kind, 0, n, limit=n)
            pairs += await work.accepted_pairs(written, kind, 0, pairs)
    uncovered = []
    if settings.rounds and (settings.simple or settings.complex):
        pairs, uncovered = await supplement(work, pairs, settings.rounds)
        work.counts["facts_uncovered"] += len(uncovered or [])
    paraphrase = await paraphrased(work, settings.paraphrases)
    if settings.complete and (missing := incomplete(uncovered, paraphrase, settings)):
        for pair in pairs:
            work.reject(pair["kind"], f"incomplete: {missing}", pair, pair["round"])
        if paraphrase:
            work.reject(PARAPHRASED, f"incomplete: {missing}", paraphrase)
        return work.drop(f"incomplete: {missing}")
    if not pairs and not paraphrase:
        return work.drop("nothing passed")
    record = {"id": document.get("id"), "title": work.title, "text": work.text, "span": document.get("span", 0)}
    return work.accept({**record, "qas": pairs, "paraphrase": paraphrase})


def incomplete(uncovered: list[str] | None, paraphrase: str | None, settings: Settings) -> str | None:
    """What a complete document would have."""
    if uncovered is None:
        return "the teacher did not say which facts are covered"
    if uncovered:
        return f"no pair covers {len(uncovered)} facts, such as: {uncovered[0]}"
    return "no paraphrase passed" if settings.paraphrases and not paraphrase else None


async def supplement(work: Work, pairs: list[dict], rounds: int) -> tuple[list[dict], list[str] | None]:
    """(pairs with those of all rounds, facts that are still uncovered, or None if that is not known)."""
    for round in range(1, rounds + 1):
        uncovered = await uncovered_facts(work, pairs, round)
        if not uncovered:
            return pairs, uncovered
        work.counts["rounds"] += 1
        fields = {"facts": uncovered, "pairs": as_asked(pairs)}
        written = await work.ask_pairs("supplementary_pairs", SIMPLE_PAIRS, SIMPLE, round, **fields)
        new = await work.accepted_pairs(written, SIMPLE, round, pairs)
        if not new:
            break
        pairs = pairs + new
    else:
        uncovered = await uncovered_facts(work, pairs, rounds)
    return pairs, uncovered


def as_asked(pairs: list[dict]) -> list[dict]:
    """Pairs as prompts list them."""
    return [{"question": pair["question"], "answer": pair["answers"][0]} for pair in pairs]


async def uncovered_facts(work: Work, pairs: list[dict], round: int) -> list[str] | None:
    """Facts of the document that no pair covers, as the teacher sees it; None without an answer.

    What the teacher lists but the document does not say is rejected: nobody can ask about it.
    """
    answer = await work.asker.ask("coverage", schema=COVERAGE, pairs=as_asked(pairs), **work.place)
    if answer.problem:
        work.reject(COVERED, answer.problem, answer.text, round)
        return None
    facts = []
    for fact in dict.fromkeys(" ".join(fact.split()) for fact in answer.value["uncovered"]):
        if reason := check_fact(full_text(work.document), fact):
            work.reject(COVERED, reason, fact, round)
        elif fact:
            facts.append(fact)
    return facts


async def paraphrased(work: Work, attempts: int) -> str | None:
    """The first paraphrase that passes, or None."""
    document, problem, refused = full_text(work.document), None, set()
    for attempt in range(attempts):
        answer = await work.asker.ask("paraphrase", schema=PARAPHRASE, attempt=attempt, problem=problem, **work.place)
        if answer.problem:
            work.reject(PARAPHRASED, answer.problem, answer.text, attempt)
            continue
        text = answer.value["paraphrase"].strip()
        work.counts["paraphrase_written"] += 1
        reasons = run_checks(document, paraphrase=text, guard=work.guard)
        if text in refused:
            reasons = ["duplicate: the same paraphrase was refused before"]
        problem = "; ".join(reasons) or await compare(work, text)
        refused.add(text)
        if problem is None:
            work.counts["paraphrase_accepted"] += 1
            return text
        work.reject(PARAPHRASED, problem, text, attempt)
    return None


async def compare(work: Work, paraphrase: str) -> str | None:
    """What the teacher finds added to the document, or lost."""
    answer = await work.asker.ask("paraphrase_verdict", schema=PARAPHRASE_VERDICT, paraphrase=paraphrase, **work.place)
    if answer.problem:
        return f"not verified: {answer.problem}"
    for name in ("added", "lost"):
        if found := [entry for entry in answer.value[name] if entry.strip()]:
            return f"{name}: {'; '.join(found)}"
    return None
