"""Answers of the teacher in tests: rules over the sentences of the document that stands in the prompt.
A sentence is a fact; the same prompt and seed always get the same answer, right or planted wrong.

Parts of the last user message, each between its two tags; a tag may have attributes:

    <document>    the document; several for the tasks over documents. A title belongs outside.
    <pairs>       pairs that exist, in any form: sentences they cover are not asked about again
    <facts>       sentences to ask about, and no others
    <question> <answer>    of verdict and teacher_answer
    <paraphrase>           of paraphrase_verdict

Every task fills the schema it gets by type, so that names of fields are the prompt's choice: a boolean says yes or no,
an array of objects has the pairs, an array of strings has the sentences that no pair covers (in paraphrase_verdict
"lost" has sentences and "added" words), an enum has its first value for yes and its last for no, a number 10 or 1, a
nullable field null for no. Strings called question, answer and paraphrase have these; in a pair any other string is
the sentence, and elsewhere a reason.
"""

import json
import re
import zlib
from dataclasses import dataclass, field

INVENTED = "Zorvania"  # what no document names
NOT_NAMES = set("what when who which how the it a an and in of on to he she they this that its as is was".split())
PART = re.compile(r", and (?=what |when )", re.IGNORECASE)


@dataclass
class Reply:
    """What a rule found, before it has the form of a schema."""

    yes: bool = True
    pairs: list[dict] = field(default_factory=list)  # question, answer, sentence
    lines: list[str] = field(default_factory=list)
    texts: dict[str, str | list[str]] = field(default_factory=dict)


@dataclass
class Settings:
    """Every n-th by a hash of prompt and seed; 0 is never."""

    wrong_every: int = 0  # pairs with a wrong answer, and paraphrases that add, lose or copy
    skip_every: int = 0  # sentences that no pair is written for, as long as <facts> does not name them


def chosen(every: int, *texts: str) -> bool:
    """Whether a hash of the texts makes this one of every n."""
    return bool(every) and zlib.crc32("\0".join(texts).encode()) % every == 0


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def words(text: str) -> set[str]:
    """Numbers as they stand and words in small letters."""
    return {word.lower() for word in re.findall(r"\d[\d.,]*\d|\w[\w'’-]*", text)}


def names(text: str) -> set[str]:
    """Numbers and words with a capital, in small letters."""
    found = re.findall(r"\d[\d.,]*\d|\d|\b[A-Z][\w'’-]*", text)
    return {word.lower() for word in found} - NOT_NAMES


def pair_of(sentence: str) -> dict:
    """Question and answer of one sentence; the answer stands in the sentence as it is."""
    plain = sentence.rstrip(".!?")
    subject, _, _ = plain.partition(" ")
    if found := re.match(r"(.+?) (was|were) (\w+) in (\d{4})$", plain):
        subject, verb, done, answer = found.groups()
        question = f"When {verb} {small(subject)} {done}?"
    elif found := re.match(r"(.+?) (is|was|are|were) (.+)$", plain):
        subject, verb, answer = found.groups()
        question = f"What {verb} {small(subject)}?"
    else:
        question, answer = f"What is said of {small(' '.join(plain.split()[:3]))}?", plain
    return {"question": question, "answer": answer, "sentence": sentence}


def small(subject: str) -> str:
    return re.sub(r"^(The|It|A|An|He|She|They|This|In|On|At)\b", lambda found: found[0].lower(), subject)


def is_supported(document: str, question: str, answer: str) -> bool:
    """Whether for every part of a question one sentence has its names, its numbers and all words of its answer."""
    parts = list(zip(PART.split(question), answer.split("; "), strict=False))
    if len(PART.split(question)) != len(answer.split("; ")):
        parts = [(question, answer)]
    return bool(answer.strip()) and all(
        any(names(asked) | words(said) <= words(sentence) for sentence in sentences(document)) for asked, said in parts
    )


def spoil(document: str, pair: dict, others: list[dict]) -> dict:
    """The pair with a wrong answer, and "kind": wrong number, swapped entity or invented."""
    answer, number = pair["answer"], re.search(r"\d[\d.,]*", pair["answer"])
    tries = {"invented": f"{answer} of {INVENTED}"}
    if number:
        changed = next(n for n in range(11, 99) if str(n) not in document)
        tries["wrong number"] = answer.replace(number[0], str(changed), 1)
    for other in others:
        if other["answer"] != answer and not is_supported(document, pair["question"], other["answer"]):
            tries["swapped entity"] = other["answer"]
    kind = sorted(tries)[zlib.crc32(pair["question"].encode()) % len(tries)]
    return {**pair, "answer": tries[kind], "kind": kind}


class Rules:
    """The answer to one prompt. `planted` collects what was made wrong."""

    def __init__(self, prompt: str, settings: Settings, planted: list[dict], seed: str = ""):
        self.prompt, self.settings, self.planted, self.seed = prompt, settings, planted, seed
        self.documents = self.tags("document")

    def tags(self, name: str) -> list[str]:
        """The text between each pair of these tags."""
        return [text.strip() for text in re.findall(rf"<{name}\b[^>]*>(.*?)</{name}>", self.prompt, re.DOTALL)]

    def tag(self, name: str) -> str:
        return next(iter(self.tags(name)), "")

    def covered(self, sentence: str) -> bool:
        """Whether the pairs of the prompt have every word of a sentence."""
        have = words(self.tag("pairs"))
        return all(word in have for word in words(sentence) if len(word) > 3 or word[0].isdigit())

    def facts(self) -> list[dict]:
        """Right pairs of the sentences to ask about."""
        facts, wanted = self.tag("facts"), sentences(self.documents[0])
        if facts:
            wanted = [sentence for sentence in wanted if sentence in facts]
        else:
            skip = self.settings.skip_every
            wanted = [sentence for sentence in wanted if not chosen(skip, self.seed, self.prompt, sentence)]
        return [pair_of(sentence) for sentence in wanted if not self.covered(sentence)]

    def some_wrong(self, pairs: list[dict]) -> Reply:
        every, given = self.settings.wrong_every, []
        for pair in pairs:
            if chosen(every, self.seed, self.prompt, pair["question"]):
                pair = spoil(self.documents[0], pair, pairs)
                self.planted.append({**pair, "document": self.documents[0]})
            given.append(pair)
        return Reply(pairs=given)

    def simple_pairs(self) -> Reply:
        return self.some_wrong(self.facts())

    def complex_pairs(self) -> Reply:
        facts = self.facts()
        return self.some_wrong([join(*pair) for pair in zip(facts, facts[1:], strict=False)])

    def verdict(self) -> Reply:
        yes = is_supported(" ".join(self.documents), self.tag("question"), self.tag("answer"))
        return Reply(yes, texts={"reason": "found" if yes else "no sentence says this"})

    def coverage(self) -> Reply:
        missing = [sentence for sentence in sentences(self.documents[0]) if not self.covered(sentence)]
        return Reply(not missing, lines=missing)

    def paraphrase(self) -> Reply:
        document = self.documents[0]
        parts = [reword(sentence) for sentence in sentences(document)]
        text = " ".join(parts)
        if chosen(self.settings.wrong_every, self.seed, self.prompt):
            tries = {"copied": document, "added": f"{text} This was in {INVENTED}.", "lost": " ".join(parts[:-1])}
            kind = sorted(tries)[zlib.crc32(document.encode()) % 3]
            text = tries[kind] or document
            self.planted.append({"kind": kind, "paraphrase": text, "document": document})
        return Reply(texts={"paraphrase": text})

    def paraphrase_verdict(self) -> Reply:
        paraphrase, document = self.tag("paraphrase"), self.documents[0]
        lost = [sentence for sentence in sentences(document) if not words(sentence) <= words(paraphrase)]
        added = sorted(names(paraphrase) - words(document))
        texts = {"reason": "compared word by word", "lost": lost, "added": added}
        return Reply(not lost and not added, lines=lost + added, texts=texts)

    def instruct_question(self) -> Reply:
        first = [pair_of(sentences(document)[0]) for document in self.documents[:2]]
        return Reply(texts=first[0] if len(first) == 1 else join(*first))

    def teacher_answer(self) -> Reply:
        known = [pair_of(sentence) for document in self.documents for sentence in sentences(document)]
        answers = {pair["question"].lower(): pair["answer"] for pair in known}
        found = [answers.get(f"{part.rstrip('?')}?".lower()) for part in PART.split(self.tag("question"))]
        yes = None not in found
        return Reply(yes, texts={"answer": "; ".join(found) if yes else "The documents do not say."})

    def retrieval_question(self) -> Reply:
        facts = sentences(self.documents[0])
        return Reply(texts=pair_of(facts[zlib.crc32(self.prompt.encode()) % len(facts)]))


TASKS = (
    *("simple_pairs", "complex_pairs", "verdict", "coverage", "paraphrase", "paraphrase_verdict"),
    *("instruct_question", "teacher_answer", "retrieval_question"),
)


def join(first: dict, second: dict) -> dict:
    """One question over two facts."""
    question = f"{first['question'].rstrip('?')}, and {second['question'][0].lower()}{second['question'][1:]}"
    sentence = f"{first['sentence']} {second['sentence']}"
    return {"question": question, "answer": f"{first['answer']}; {second['answer']}", "sentence": sentence}


def reword(sentence: str) -> str:
    """All words of a sentence, and no more than three in the order they had."""
    parts = sentence.rstrip(".!?").split()
    return ", as noted, ".join(" ".join(parts[at : at + 3]) for at in range(0, len(parts), 3)) + "."


def fill(schema: dict, reply: Reply, texts: dict | None = None):
    """A value of this JSON schema."""
    texts = reply.texts if texts is None else texts
    kind, kinds = schema.get("type"), ()
    if isinstance(kind, list):
        kind, kinds = next(name for name in kind if name != "null"), kind
    if "enum" in schema:
        return schema["enum"][0 if reply.yes else -1]
    if kind == "object":
        return {name: field_of(name, part, reply, texts) for name, part in schema["properties"].items()}
    if kind == "array":
        items = schema.get("items", {})
        if items.get("type") == "object":
            return [fill(items, reply, pair) for pair in reply.pairs]
        return reply.lines
    if "null" in kinds and not reply.yes:
        return None
    return {"boolean": reply.yes, "integer": 10 if reply.yes else 1, "number": 10 if reply.yes else 1}.get(kind, "")


def field_of(name: str, schema: dict, reply: Reply, texts: dict):
    """The value of one property."""
    if name == "answers" and "answer" in texts:
        return [texts["answer"]]
    if isinstance(texts.get(name), list):
        return texts[name]
    value = fill(schema, reply, texts)
    return texts.get(name, texts.get("sentence", texts.get("reason", ""))) if value == "" else value


def answer(task: str, schema: dict, prompt: str, settings: Settings, planted: list[dict], seed: str = "") -> str:
    """The teacher's JSON."""
    reply = getattr(Rules(prompt, settings, planted, seed), task)()
    return json.dumps(fill(schema, reply), ensure_ascii=False)
