"""Checks of pairs and paraphrases against their document that need no language model.

`check(document, question, answer)` or `check(document, paraphrase)` is a reason or None. A reason begins with the name
of its check, as in "numbers: 1931 is not in the document". They find what is surely wrong and let the rest through:
whether an answer is right, only a reader knows.
"""

import functools
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..lexical_clara import split_words
from ..text_clara import SPACELESS
from . import features
from .features import names_about, words
from .leakage import LeakageGuard

QUESTION_WORDS, ANSWER_WORDS = (3, 60), (1, 80)
PARAPHRASE_LENGTH = (0.5, 2.5)  # of the document's words
MAX_MISSING = 0.3  # share of the answer's content words that the document need not have
LONGEST_RUN, MIN_RUN = 0.5, 8  # share of a paraphrase, and words, that are one run of the document
COPIED_NGRAM, MAX_COPIED = 4, 0.8  # share of the n-grams of a paraphrase that are the document's
SAME_QUESTION = 0.8  # Jaccard of words and pairs of words
MIN_KEPT = 0.8  # share of the document's numbers and names that a paraphrase must keep
FACT_MISSING = 0.6  # the same of a fact that the teacher names in its own words
INFLECTED = 0.7  # share of the longer word that two forms of a word begin with
SCRIPT_SHARE = 0.05  # of the document's letters, for a script that a claim may be written in
MIN_LETTERS = 4
QUOTATION = ('"', "\u201c", "\u201e", "\u00ab")
ARTICLES = frozenset("a an the der die das ein eine einen le la les un une el los las il lo gli o os as".split())
CHOICE = frozenset("or oder ou o eller lub или albo".split())  # offers answers to choose from
UNNAMED = re.compile(
    r"\b(?:(?:this|these|those) (?!is\b|are\b|was\b|were\b|who\b|that\b|which\b)\w+"
    r"|the (?:document|passage|article|text|author|excerpt|paragraph))\b",
    re.IGNORECASE,
)
FOREIGN = 0.08  # share of function words of a language that a text in another one may have
SAID = frozenset("yes no true false".split()).union(features.NUMBER_WORDS)  # what an answer may say of its own


# --- one claim against the document ----------------------------------------------------------------------------------


def check_length(document: str, question: str, answer: str) -> str | None:
    """Too short to ask anything, or longer than a question or an answer is."""
    for name, text, (least, most) in (("question", question, QUESTION_WORDS), ("answer", answer, ANSWER_WORDS)):
        if not least <= (n_words := len(words(text))) <= most:
            return f"length: the {name} must have {least} to {most} words, got {n_words}"
    return None


def check_cut(document: str, question: str, answer: str) -> str | None:
    """A question that ends with an article, or an answer that ends where a quotation begins in the document.

    Teachers that write JSON end a text at a quotation mark that they forget to escape.
    """
    last = question.split()[-1:]
    if last and last[0].lower() in ARTICLES:
        return f"cut: the question ends with {last[0]!r}"
    place = document.find(answer) if len(words(answer)) > 1 else -1
    follows = document[place + len(answer) :].lstrip(" ") if place >= 0 else ""
    if follows[:1] in QUOTATION and follows[1:2].isalnum():
        return f"cut: the document goes on with {follows[:12]!r}"
    return None


def check_told(document: str, question: str, answer: str) -> str | None:
    """An answer of several words that the question has all of, unless it offers a choice."""
    asked, said = words(question), _content(answer)
    if len(said) < 2 or not CHOICE.isdisjoint(asked) or not frozenset(_content(question)).issuperset(said):
        return None
    return "told: the question has all words of the answer"


def check_named(document: str, question: str, answer: str) -> str | None:
    """A question without a name that says "this property" or "the passage" (English): of which document?"""
    found = None if features.names(question) else UNNAMED.search(question)
    return f"unnamed: {found[0]!r} says nothing without the document" if found else None


def check_language(document: str, *claims: str) -> str | None:
    """Another script than any of the document's, or clearly another language."""
    claim = " ".join(claims)
    there, script = features.scripts(document), next(iter(features.scripts(claim)), None)
    n_letters = sum(map(str.isalpha, claim))
    if script and n_letters >= MIN_LETTERS and there.get(script, 0.0) < SCRIPT_SHARE:
        return f"language: {script} is not the script of the document"
    own, claimed = features.language(document), features.language(claim)
    differs = own and claimed and own != claimed and features.function_share(document, claimed) < FOREIGN
    return f"language: {claimed} is not {own}" if differs else None


def check_numbers(document: str, *claims: str) -> str | None:
    """A number that the document has in no form; numbers that were reckoned from others are found too."""
    known = features.known_numbers(document)
    for claim in claims:
        for written, readings in features.numbers(claim):
            if not readings & known:
                return f"numbers: {written} is not in the document"
    return None


def check_names(document: str, *claims: str) -> str | None:
    """A name of which a word is nowhere in the document."""
    known = _known_words(document)
    names = [name for claim in claims for name in names_about(document, claim)]
    return next((reason for name in names if (reason := _unknown_name(name, known))), None)


def _unknown_name(name: str, known: frozenset[str]) -> str | None:
    missing = [word for word in words(name) if not _is_known(word, known)]
    return f"names: {missing[0]} of {name!r} is not in the document" if missing else None


def check_pair_names(document: str, question: str, answer: str) -> str | None:
    """As `check_names` for the answer; of the question's names the document need have only half.

    A question may call by a word of its own what the document describes: "Which South Asian country ...?"
    """
    asked = [word for name in names_about(document, question) for word in words(name)]
    known = _known_words(document)
    missing = [word for word in asked if not _is_known(word, known)]
    if 2 * len(missing) > len(asked) and len(missing) > 1:
        return f"names: {', '.join(missing[:5])} of the question are not in the document"
    known = known | _known_words(question) | SAID
    names = names_about(document, answer, True)
    return next((reason for name in names if (reason := _unknown_name(name, known))), None)


def check_answer(document: str, question: str, answer: str, max_missing: float = MAX_MISSING) -> str | None:
    """An answer that neither stands in the document word for word nor is made of its words and the question's."""
    if stands_in(document, answer):
        return None
    known = _known_words(document) | _known_words(question)
    wanted = _content(answer)
    missing = [word for word in wanted if word not in SAID and not _is_known(word, known)]
    is_unit = len(missing) == 1 and any(map(str.isdigit, wanted))  # 5 miles, of a document that has 5 mi
    if len(missing) > max_missing * len(wanted) and not is_unit:
        return f"answer: {', '.join(missing[:5])} is not in the document"
    return None


def check_fact(document: str, fact: str) -> str | None:
    """A sentence about the document with a number, a name or most of its words from elsewhere."""
    return (
        check_numbers(document, fact) or check_names(document, fact) or check_answer(document, "", fact, FACT_MISSING)
    )


def stands_in(document: str, answer: str) -> bool:
    """Whether the answer stands in the document word for word, without case, punctuation and English articles.

    As the containment of `recipes.evaluate`, but in any script.
    """
    text, wanted = (
        " ".join(word for word in words(part) if word not in ("a", "an", "the")) for part in (document, answer)
    )
    return bool(wanted) and f" {wanted} " in f" {text} "


@functools.lru_cache(features.CACHED)
def _content(text: str) -> tuple[str, ...]:
    """The stemmed words that are no function words; of scripts without spaces pairs of characters."""
    return tuple(split_words([text if SPACELESS.search(text) else " ".join(words(text))])[0])


@functools.lru_cache(features.CACHED)
def _known_words(text: str) -> frozenset[str]:
    return frozenset(words(text)) | frozenset(_content(text)) | features.months(text)


def _is_known(word: str, known: frozenset[str]) -> bool:
    """Whether a text has the word, or a form of it: German and Germany, Brazil and Brazilian, Parks and Park."""
    if len(word) == 1 or word in known or word.isdigit():  # numbers have their own check
        return True
    if word.endswith("s") and word[:-1] in known or f"{word}s" in known:
        return True
    return len(word) >= 4 and any(
        _is_inflected(word, other)
        or (
            len(other) >= 4 and abs(len(other) - len(word)) <= 3 and (other.startswith(word) or word.startswith(other))
        )
        for other in known
    )


def _is_inflected(word: str, other: str) -> bool:
    """Whether words differ in their last letters only: столица and столицей, but Brand and Brandt as well."""
    return len(word) > 4 and len(os.path.commonprefix([word, other])) >= INFLECTED * max(len(word), len(other))


# --- claims against each other, paraphrases --------------------------------------------------------------------------


def check_duplicate(question: str, answer: str, others: Iterable[tuple[str, str]]) -> str | None:
    """The content words of another pair's question, or nearly its question with the same answer."""
    mine, content, said = _shingles(question), set(_content(question)), words(answer)
    for other, its_answer in others:
        is_near = features.jaccard(mine, _shingles(other)) >= SAME_QUESTION
        if is_near and (content == set(_content(other)) or said == words(its_answer)):
            return f"duplicate: it asks what {other!r} asks"
    return None


@functools.lru_cache(features.CACHED)
def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(features.ngrams(words(text), 1) | features.ngrams(words(text), 2))


def check_copied(document: str, paraphrase: str) -> str | None:
    """A long run of the document's words in one piece, or hardly a short run that is not the document's."""
    text, own = words(paraphrase), words(document)
    if not text:
        return "length: the paraphrase is empty"
    run = longest_run(text, own)
    if run >= MIN_RUN and run > LONGEST_RUN * len(text):
        return f"copied: {run} of {len(text)} words are one run of the document"
    share = ngram_share(paraphrase, document, COPIED_NGRAM)
    return (
        f"copied: {share:.0%} of its runs of {COPIED_NGRAM} words are the document's" if share > MAX_COPIED else None
    )


def longest_run(text: Sequence[str], other: Sequence[str]) -> int:
    """Words of the longest run that both have.

    >>> longest_run("a b c d".split(), "x b c y".split())
    2
    """
    best, before = 0, {}
    places = {}
    for place, word in enumerate(other):
        places.setdefault(word, []).append(place)
    for word in text:
        before = {place: before.get(place - 1, 0) + 1 for place in places.get(word, ())}
        best = max(best, *before.values()) if before else best
    return best


def ngram_share(text: str, other: str, n: int) -> float:
    """The share of a text's runs of n words that another text has, 0 to 1; 0 if it has none."""
    runs = features.ngrams(words(text), n)
    return len(runs & features.ngrams(words(other), n)) / len(runs) if runs else 0.0


def check_paraphrase_length(document: str, paraphrase: str) -> str | None:
    """Much shorter than the document, or much longer."""
    share = len(words(paraphrase)) / max(1, len(words(document)))
    least, most = PARAPHRASE_LENGTH
    if not least <= share <= most:
        return f"length: the paraphrase must have {least} to {most} times the document's words, got {share:.2f}"
    return None


def check_kept(document: str, paraphrase: str) -> str | None:
    """Too many numbers or names of the document that the paraphrase does not have."""
    known, there = features.known_numbers(paraphrase), features.numbers(document)
    lost = [written for written, readings in there if not readings & known]
    if len(lost) > (1 - MIN_KEPT) * len(there):
        return f"lost: the number {lost[0]}"
    names, known = names_about(document, document), _known_words(paraphrase)
    lost = [name for name in names if not all(_is_known(word, known) for word in words(name))]
    return f"lost: the name {lost[0]!r}" if len(lost) > (1 - MIN_KEPT) * len(names) else None


# --- all of them -----------------------------------------------------------------------------------------------------

PAIR_CHECKS: tuple[Callable[..., str | None], ...] = (
    check_length,
    check_cut,
    check_told,
    check_named,
    check_language,
    check_numbers,
    check_pair_names,
    check_answer,
)
PARAPHRASE_CHECKS: tuple[Callable[..., str | None], ...] = (
    check_paraphrase_length,
    check_language,
    check_copied,
    check_numbers,
    check_names,
    check_kept,
)


def run_checks(
    document: str,
    question: str | None = None,
    answer: str | None = None,
    *,
    paraphrase: str | None = None,
    others: Iterable[tuple[str, str]] = (),
    guard: LeakageGuard | None = None,
) -> list[str]:
    """The reasons of all checks that a pair, or a paraphrase, does not pass; none if all is well.

    Args:
        document: its title and text.
        question: of the pair.
        answer: of the pair.
        paraphrase: instead of a pair.
        others: (question, answer) of pairs that are there already.
        guard: evaluation files whose questions and texts must not come in.
    """
    if paraphrase is not None:
        reasons = [check(document, paraphrase) for check in PARAPHRASE_CHECKS]
        reasons.append(guard.check(paraphrase) if guard else None)
    else:
        reasons = [check(document, question, answer) for check in PAIR_CHECKS]
        reasons += [check_duplicate(question, answer, others), guard.check(question) if guard else None]
    return [reason for reason in reasons if reason]


def check_of(reason: str) -> str:
    """The name of the check that a reason comes from: what rejects are counted by."""
    return reason.partition(":")[0]


def full_text(row: Mapping) -> str:
    """Title and text of a document, which a claim may take its words from."""
    return f"{row.get('title') or ''}\n{row['text']}".strip()


def answer_of(pair: Mapping) -> str:
    """The answer of a pair, or the first of several."""
    given = pair.get("answers") or pair["answer"]
    return given if isinstance(given, str) else given[0]


def check_row(row: Mapping, guard: LeakageGuard | None = None) -> list[tuple[str, object, list[str]]]:
    """(kind, value, reasons) of every pair of a row `{title?, text, qas?, paraphrase?}`, and of its paraphrase.

    Pairs are held against those before them, with the first of several answers.
    """
    document, found, others = full_text(row), [], []
    for pair in row.get("qas") or []:
        asked = (pair["question"], answer_of(pair))
        found.append(("pair", pair, run_checks(document, *asked, others=others, guard=guard)))
        others.append(asked)
    if row.get("paraphrase"):
        text = row["paraphrase"]
        found.append(("paraphrase", text, run_checks(document, paraphrase=text, guard=guard)))
    return found


def passes(row: Mapping, guard: LeakageGuard | None = None) -> bool:
    """Whether all of a row passes, for `Dataset.filter`."""
    return not any(reasons for _, _, reasons in check_row(row, guard))


def keep_passing(row: Mapping, guard: LeakageGuard | None = None) -> dict:
    """The row with what passes, and `rejects` `[{kind, value, reasons}]`, for `Dataset.map`."""
    found = check_row(row, guard)
    kept = {"qas": [value for kind, value, reasons in found if kind == "pair" and not reasons]}
    if "paraphrase" in row:
        kept["paraphrase"] = next(
            (text for kind, text, reasons in found if kind == "paraphrase" and not reasons), None
        )
    rejects = [
        {"kind": kind, "value": value if kind == "paraphrase" else value["question"], "reasons": reasons}
        for kind, value, reasons in found
        if reasons
    ]
    return {**row, **kept, "rejects": rejects}


def summarize(rows: Iterable[Mapping], guard: LeakageGuard | None = None) -> dict[str, dict]:
    """kind -> `{n, passed, stands_in_document, failed: {check: share}}` over rows, the shares 0 to 1.

    `failed` counts every check that something does not pass, so that its shares can overlap.
    """
    n, failed, passed, stands = Counter(), {"pair": Counter(), "paraphrase": Counter()}, Counter(), 0
    for row in rows:
        for kind, value, reasons in check_row(row, guard):
            n[kind] += 1
            passed[kind] += not reasons
            failed[kind].update({check_of(reason) for reason in reasons})
            if kind == "pair":
                stands += stands_in(full_text(row), answer_of(value))
    summary = {
        kind: {
            "n": n[kind],
            "passed": passed[kind] / n[kind],
            "failed": {name: count / n[kind] for name, count in failed[kind].most_common()},
        }
        for kind in n
    }
    if "pair" in summary:
        summary["pair"]["stands_in_document"] = stands / n["pair"]
    return summary
