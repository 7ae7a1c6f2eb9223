"""Measures the checks without a model: `python -m recipes.benchmarks.synthesis_checks PASSAGES`.

How many published pairs pass, and why the others do not; which share of errors planted by rule is found. PASSAGES is
a file of rows `{title?, text, qas}`, such as the pairs that the reference implementation has published. With
`--teacher URL --model NAME` a model verifies the same pairs as well.
"""

import argparse
import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from modeling_clara.cli.console import allow_any_console
from modeling_clara.synthesis import features
from modeling_clara.synthesis.ask import Asker
from modeling_clara.synthesis.backends import Endpoint
from modeling_clara.synthesis.checks import answer_of, check_of, check_row, full_text, run_checks, summarize
from modeling_clara.synthesis.client import Teacher
from modeling_clara.synthesis.outcome import Work
from recipes.benchmarks.shared import add_outputs, describe_machine, figures, read_rows, show

N_PLANTED = 200
# What nobody can know to be false without reading: no name, no number.
INVENTED = (
    "and was closed because of a fire",
    "which the neighbours never forgave",
    "after a long quarrel with a publisher",
    "and later sold it to a wealthy collector",
    "although most witnesses denied it",
    "which made every critic angry",
)
INVENTED_NAMES = ("Otto Wexler", "Marta Lindqvist", "the Kestrel Foundation", "Port Averill", "the Duchess of Tarn")

Claim = tuple[str, str, str]  # document, question, answer


def claims_of(rows: Sequence[Mapping]) -> list[Claim]:
    """Every pair of the rows with its document."""
    return [(full_text(row), pair["question"], answer_of(pair)) for row in rows for pair in row["qas"]]


# --- planted errors --------------------------------------------------------------------------------------------------


def wrong_number(claim: Claim, others: Sequence[Claim], generator: random.Random) -> str | None:
    """The answer with one number changed by a little."""
    numbers = list(re.finditer(r"\d+", claim[2]))
    if not numbers:
        return None
    match = generator.choice(numbers)
    value = int(match[0]) + generator.choice([-2, -1, 1, 2, 3, 10])
    return f"{claim[2][: match.start()]}{abs(value)}{claim[2][match.end() :]}"


def _names(document: str) -> list[str]:
    """The names of a document without its quotations."""
    return [name for name in features.names(document) if name[0].isupper() and len(name) > 3]


def swapped(claim: Claim, names: Sequence[str], generator: random.Random) -> str | None:
    """The answer with one of the document's names exchanged for another one."""
    document, _, answer = claim
    own = [name for name in _names(document) if re.search(rf"\b{re.escape(name)}\b", answer)]
    strange = [name for name in names if name.casefold() not in answer.casefold()]
    if not own or not strange:
        return None
    return answer.replace(generator.choice(own), generator.choice(strange), 1)


def swapped_entity(claim: Claim, others: Sequence[Claim], generator: random.Random) -> str | None:
    """A name exchanged for one of another document."""
    document, other = claim[0].casefold(), generator.choice(others)[0]
    return swapped(claim, [name for name in _names(other) if name.casefold() not in document], generator)


def swapped_inside(claim: Claim, others: Sequence[Claim], generator: random.Random) -> str | None:
    """A name exchanged for another one of the same document: all words are there, only their relation is wrong."""
    return swapped(claim, _names(claim[0]), generator)


def invented_name(claim: Claim, others: Sequence[Claim], generator: random.Random) -> str | None:
    """Something added that has a name and a year."""
    return f"{claim[2].rstrip('.')} and {generator.choice(INVENTED_NAMES)}, {generator.randint(1700, 2030)}"


def invented_words(claim: Claim, others: Sequence[Claim], generator: random.Random) -> str | None:
    """Something added that has neither."""
    return f"{claim[2].rstrip('.')} {generator.choice(INVENTED)}"


ERRORS: dict[str, Callable[[Claim, Sequence[Claim], random.Random], str | None]] = {
    "wrong number": wrong_number,
    "entity of another document": swapped_entity,
    "another entity of the document": swapped_inside,
    "invented, with name and year": invented_name,
    "invented, without": invented_words,
}


def planted(claims: Sequence[Claim], error: str, n: int, seed: int = 0) -> Iterator[tuple[Claim, str]]:
    """(claim as it was, wrong answer) of n claims, the same for every run."""
    generator = random.Random(f"{error}{seed}")
    order = list(range(len(claims)))
    generator.shuffle(order)
    made = 0
    for number in order:
        claim = claims[number]
        answer = ERRORS[error](claim, claims, generator)
        if answer is not None and features.words(answer) != features.words(claim[2]) and made < n:
            made += 1
            yield claim, answer


def measure_planted(claims: Sequence[Claim], n: int) -> list[dict]:
    """What the checks find of every kind of error, and how often the right answer of the same pairs alarms them."""
    rows = []
    for error in ERRORS:
        made = list(planted(claims, error, n))
        wrong = [run_checks(document, question, answer) for (document, question, _), answer in made]
        right = [run_checks(*claim) for claim, _ in made]
        by = Counter(check_of(reason) for reasons in wrong for reason in reasons[:1])
        rows.append(
            {
                "error": error,
                "n": len(made),
                "found": sum(map(bool, wrong)) / max(1, len(made)),
                "alarms": sum(map(bool, right)) / max(1, len(made)),
                "by": ", ".join(f"{name} {count}" for name, count in by.most_common()),
            }
        )
    return rows


async def verify_planted(claims: Sequence[Claim], n: int, url: str, model: str) -> list[dict]:
    """What the teacher's verification finds of every kind of error, and of the right answers of the same pairs."""
    rows = []
    async with Teacher(Endpoint(url), model) as teacher:

        async def is_refused(document: str, question: str, answer: str) -> bool:
            work = Work({"text": document}, Asker(teacher.complete))
            return await work.verify(question, answer) is not None

        for error in ERRORS:
            made = list(planted(claims, error, n))
            wrong = await asyncio.gather(*(is_refused(*claim[:2], answer) for claim, answer in made))
            right = await asyncio.gather(*(is_refused(*claim) for claim, _ in made))
            n_made = max(1, len(made))
            rows.append({"error": error, "n": len(made), "found": sum(wrong) / n_made, "alarms": sum(right) / n_made})
    return rows


# --- the command -----------------------------------------------------------------------------------------------------


def failing(rows: Sequence[Mapping]) -> Iterator[tuple[Mapping, Mapping, list[str]]]:
    """(row, pair, reasons) of every pair that does not pass."""
    for row in rows:
        for kind, pair, reasons in check_row(row):
            if kind == "pair" and reasons:
                yield row, pair, reasons


def main() -> None:
    """The command line."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passages", help="rows {title?, text, qas}: .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--planted", type=int, default=N_PLANTED, help=f"errors of each kind (default: {N_PLANTED})")
    parser.add_argument("--failing", type=int, default=0, metavar="N", help="also print N of the pairs that fail")
    parser.add_argument("--teacher", metavar="URL", help="endpoint that also verifies the planted errors")
    parser.add_argument("--model", help="its model")
    parser.add_argument("--verified", type=int, metavar="N", help="errors of each kind for it (default: all planted)")
    arguments = add_outputs(parser).parse_args()
    if bool(arguments.teacher) != bool(arguments.model):
        parser.error("--teacher and --model go together")
    rows = read_rows(arguments.passages)
    summary, claims = summarize(rows)["pair"], claims_of(rows)
    found = measure_planted(claims, arguments.planted)
    checks = [{"check": name, "share": share} for name, share in summary["failed"].items()]
    text = (
        f"{summary['n']:,} pairs of {len(rows):,} passages: {summary['passed']:.1%} pass all checks, "
        f"{summary['stands_in_document']:.1%} of the answers stand in the document word for word.\n\n"
        + figures("check | pairs that do not pass it", "{check} | {share:.2%}", checks)
        + "\n\n"
        + figures(
            "planted error | n | found | the same pairs untouched | first found by",
            "{error} | {n} | {found:.1%} | {alarms:.1%} | {by}",
            found,
        )
    )
    verified = []
    if arguments.teacher:
        n = arguments.verified or arguments.planted
        verified = asyncio.run(verify_planted(claims, n, arguments.teacher, arguments.model))
        text += f"\n\nVerified by {arguments.model}:\n\n" + figures(
            "planted error | n | found | the same pairs untouched",
            "{error} | {n} | {found:.1%} | {alarms:.1%}",
            verified,
        )
    report = {
        **describe_machine(),
        "data": Path(arguments.passages).name,
        "pairs": summary,
        "planted": found,
        "verified": verified,
    }
    show("checks without a model", report, text, arguments)
    for row, pair, reasons in random.Random(0).sample(list(failing(rows)), arguments.failing):
        print(f"\n{full_text(row)}\nQ: {pair['question']}\nA: {answer_of(pair)}\n=> {'; '.join(reasons)}")


if __name__ == "__main__":
    main()
