"""What becomes of one document: a record or none, and a reject with its reason for everything that did not pass.

The tasks share this book-keeping, and how a pair is checked: first without a model, which costs nothing, then by the
teacher against the document.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .ask import Asker
from .checks import check_duplicate, full_text, run_checks
from .leakage import LeakageGuard
from .schemas import VERDICT

DOCUMENT = "document"  # kind of the one reject of a document that has no record


@dataclass
class Outcome:
    """The result for one document.

    Attributes:
        record: the row, or None if nothing of it can be kept.
        rejects: `{kind, reason, value, document_id, round}`; without a record one of them has the kind "document".
        counts: what was written, accepted and rejected; sums over documents make sense.
    """

    record: dict | None
    rejects: list[dict] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Work:
    """One document on its way."""

    def __init__(self, document: Mapping, asker: Asker, guard: LeakageGuard | None = None):
        self.document, self.asker, self.guard = document, asker, guard
        self.title, self.text = document.get("title") or "", document["text"]
        self.place = {"title": self.title, "text": self.text}
        self.rejects, self.counts = [], Counter()
        self.judged: set[tuple[str, str]] = set()  # pairs that were verified: the same one would get the same verdict

    def reject(self, kind: str, reason: str, value=None, round: int = 0) -> None:
        """Keep what did not pass, and why."""
        document_id = self.document.get("id")
        self.rejects.append(
            {"kind": kind, "reason": reason, "value": value, "document_id": document_id, "round": round}
        )
        self.counts[f"{kind}_rejected"] += 1

    def leaks(self) -> str | None:
        """Why the document must not be used at all."""
        return self.guard.check(self.text) if self.guard else None

    def accept(self, record: dict) -> Outcome:
        """The outcome of a document that passed."""
        return Outcome(record, self.rejects, dict(self.counts))

    def drop(self, reason: str) -> Outcome:
        """The outcome of a document that did not."""
        self.reject(DOCUMENT, reason)
        return Outcome(None, self.rejects, dict(self.counts))

    async def ask_pairs(
        self, name: str, schema: dict, kind: str, round: int, n: int | None = None, **fields
    ) -> list[dict]:
        """Pairs that the teacher writes, the first n of them; without an answer none, and a reject."""
        answer = await self.asker.ask(name, schema=schema, **self.place, **fields)
        if answer.problem:
            self.reject(kind, answer.problem, answer.text, round)
            return []
        written = [{name: pair[name].strip() for name in ("question", "answer")} for pair in answer.value["pairs"]]
        for pair in written[n:] if n else []:
            self.reject(kind, f"too many: more than {n} pairs", pair, round)
        self.counts[f"{kind}_written"] += len(written)
        return written[:n]

    async def accepted_pairs(
        self, pairs: Sequence[dict], kind: str, round: int, others: Sequence[Mapping]
    ) -> list[dict]:
        """Those of the pairs that pass all checks and the teacher's verification, as `qas` of a record has them."""
        document, accepted = full_text(self.document), []
        known = [(pair["question"], pair["answers"][0]) for pair in others]
        candidates = []
        for pair in pairs:
            asked = (pair["question"], pair["answer"])
            if reasons := run_checks(document, *asked, others=known, guard=self.guard):
                self.reject(kind, "; ".join(reasons), pair, round)
            elif asked in self.judged:
                self.reject(kind, "duplicate: the same pair was verified before", pair, round)
            else:
                candidates.append(pair)
                self.judged.add(asked)
        problems = await asyncio.gather(*(self.verify(**pair) for pair in candidates))
        for pair, problem in zip(candidates, problems, strict=True):
            question, answer = pair["question"], pair["answer"]
            # a pair is held against its neighbours only now: a wrong one must not keep a right one out
            if problem := problem or check_duplicate(question, answer, known):
                self.reject(kind, problem, pair, round)
                continue
            accepted.append({"question": question, "answers": [answer], "kind": kind, "round": round})
            known.append((question, answer))
        self.counts[f"{kind}_accepted"] += len(accepted)
        return accepted

    async def verify(self, question: str, answer: str, text: str | None = None) -> str | None:
        """Why the teacher does not find a pair supported by the document, or by another text; None if it does."""
        place = self.place if text is None else {"title": "", "text": text}
        verdict = await self.asker.ask("verdict", schema=VERDICT, question=question, answer=answer, **place)
        if verdict.problem:
            return f"not verified: {verdict.problem}"
        return None if verdict.value["supported"] else f"unsupported: {verdict.value['reason']}"
