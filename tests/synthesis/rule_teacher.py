"""The rules of the loopback teacher as a function in this process, for tests that need no server; and documents."""

import asyncio
from collections import Counter

from teacher_rules import Settings, answer

from modeling_clara.synthesis.ask import Asker
from modeling_clara.synthesis.client import Completion

SENTENCES = [
    "The tower of {place} was built in {year}.",
    "The river {river} is a stream south of {place}.",
    "{name} was the first mayor of {place}.",
    "The bridge over the {river} was opened in {later}.",
    "{painter} is a painter who lives in the old mill of {place}.",
]
PLACES = "Tarn Orme Selby Quist Varda Lunde Brask Holt Nemi Ruska".split()
RIVERS = "Orvel Ister Marn Dove Esk Tavy Onny Rede Wye Leen".split()
FIRST = "Ilse Ove Marta Jens Anke Rolf Tilda Knut Berta Emil".split()
LAST = "Brand Lind Falk Holm Krog Munk Pohl Rust Stern Voss".split()


def documents(n: int) -> list[dict]:
    """Chunks of five facts each, all different."""
    made = []
    for number in range(n):
        place, river, first, last = (names[number % 10] for names in (PLACES, RIVERS, FIRST, LAST))
        fields = {"place": place, "river": river, "name": f"{first} {last}", "painter": f"{FIRST[-number % 10]} Ask"}
        fields |= {"year": 1801 + 7 * number, "later": 1850 + 3 * number}
        text = " ".join(sentence.format(**fields) for sentence in SENTENCES)
        made.append({"id": f"doc-{number}", "title": place, "text": text, "span": 0})
    return made


class RuleTeacher:
    """`complete` by rules; `finish` gives a fault to the n-th call: "truncated", "broken" or an error to raise."""

    def __init__(self, faults: dict | None = None, **settings):
        self.settings, self.faults, self.planted = Settings(**settings), faults or {}, []
        self.tasks, self.options = Counter(), []

    async def complete(self, messages, *, schema=None, max_tokens, temperature=0.0, seed=None) -> Completion:
        task, fault = schema["title"], self.faults.get(len(self.options))
        self.tasks[task] += 1
        self.options.append({"task": task, "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
        text = answer(task, schema, messages[-1]["content"], self.settings, self.planted, str(seed))
        if isinstance(fault, Exception):
            raise fault
        if fault == "truncated":
            return Completion(text[: len(text) // 2], "length", 1, max_tokens)
        return Completion("Surely! " if fault == "broken" else text, "stop", 1, 1)


def run(synthesize, document: dict, teacher: RuleTeacher, settings, **options):
    """The outcome of one document."""
    return asyncio.run(synthesize(document, Asker(teacher.complete), settings, **options))
