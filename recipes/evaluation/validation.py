"""Checks of results.json in plain words: its version, its schema, values that cannot be.
It stands between a file that anybody wrote and everything that shows, compares or publishes it.
It does not know files, the Hub or the interface; it needs nothing beyond the standard library but jsonschema.
"""

import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from jsonschema import Draft202012Validator, FormatChecker

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("results.schema.json")
MAX_BYTES = 1_000_000  # of a results.json; those of recipes.evaluate have about 10 kB
MAX_PROBLEMS = 20  # told of one file
MAX_PROBLEM_LENGTH = 300  # letters of one problem: messages of jsonschema quote the value, however long
TOLERANCE = 1e-9  # of comparisons of floats
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
URL = re.compile(r"https?://[^\s<>\"'`{}|\\^]{1,2000}")
REVISION = re.compile(r"[0-9a-f]{40}")
NOT_ABOVE = (("em", "f1"), ("em", "containment"), ("hit@1", "mrr"))  # of every question, so of means
ANSWER_METRICS = ("em", "f1", "containment", "bag_containment")
RETRIEVAL_METRIC = re.compile(r"mrr|(recall|hit|ndcg|precision)@\d{1,4}")
RISING = ("recall", "hit")  # a further document can only add


class DuplicateKey(ValueError):
    """An object of a JSON text names one key twice."""


def load_schema() -> dict:
    """The documented schema of results.json, as it lies beside this file."""
    return json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))


def parse_time(text: str) -> datetime:
    """A time of ISO 8601 that must have a zone; ValueError otherwise."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("no time zone")
    return time


def _format_checker() -> FormatChecker:
    """`date-time` and `uri`, for which jsonschema wants further packages; only http(s) addresses are URIs here."""
    checker = FormatChecker(formats=())
    checker.checks("date-time", raises=ValueError)(lambda value: not isinstance(value, str) or bool(parse_time(value)))
    checker.checks("uri")(lambda value: not isinstance(value, str) or URL.fullmatch(value) is not None)
    return checker


VALIDATOR = Draft202012Validator(load_schema(), format_checker=_format_checker())


def parse_results(text: bytes) -> object:
    """The JSON value of a file's bytes; ValueError with a plain message if it is none.

    Refused are more than `MAX_BYTES`, other encodings than UTF-8, a key twice in one object, and nesting too deep.
    NaN and Infinity pass: `check_results` names where they stand.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(
            f"the file must have at most {MAX_BYTES:,} bytes, got {len(text):,}. This is no results.json."
        )

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DuplicateKey(f"each key must stand once in an object, got {quote(twice)} twice. Remove one of them.")
        return found

    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique)
    except DuplicateKey:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"the file must be UTF-8, got another byte at {error.start}. Save it as UTF-8.") from None
    except RecursionError:
        raise ValueError("the file is nested too deeply for a results.json.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"the file must be JSON: {error.msg} at {where}. Was it copied as a whole?") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"the file must be JSON: {error}") from None


def quote(value: object) -> str:
    """The value for a message, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_results(content: object) -> list[str]:
    """What is wrong with the value of a results.json, whatever it is, in plain words; nothing if it is valid."""
    if not isinstance(content, dict):
        return [f"results must be a JSON object, got {type(content).__name__}. Is this a results.json?"]
    version = content.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        return [_version_problem(version, "schema_version" in content)]
    problems = _check_values(content) or schema_problems(content)
    if not problems:
        problems = [*(_check_counts(content) or _check_metrics(content)), *_check_rest(content)]
    return shortened(problems)


def schema_problems(content: dict) -> list[str]:
    return [f"{_path(error.absolute_path)}{error.message}" for error in VALIDATOR.iter_errors(content)]


def _version_problem(version: object, is_there: bool) -> str:
    got = f"got {quote(version)}" if is_there else "but is missing"
    if not isinstance(version, int) or isinstance(version, bool):
        return f"schema_version must be {SCHEMA_VERSION}, {got}. Is this a results.json of recipes.evaluate?"
    newer = "a newer recipes.evaluate; update the leaderboard."
    older = "an older recipes.evaluate; update it and evaluate again."
    return f"schema_version must be {SCHEMA_VERSION}, {got}: made by {newer if version > SCHEMA_VERSION else older}"


def _path(keys: Iterable) -> str:
    """The place of a value, such as `metrics.f1.value: `; nothing for the whole file."""
    path = ".".join(str(key) for key in keys)
    return f"{path[:100]}: " if path else ""


def shortened(problems: list[str]) -> list[str]:
    """At most `MAX_PROBLEMS`, each on one line of at most `MAX_PROBLEM_LENGTH` letters that can be printed."""
    lines = []
    for problem in problems[:MAX_PROBLEMS]:
        text = problem.encode("utf-8", "backslashreplace").decode()
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        lines.append(text if len(text) <= MAX_PROBLEM_LENGTH else f"{text[: MAX_PROBLEM_LENGTH - 3]}...")
    more = len(problems) - MAX_PROBLEMS
    return [*lines, f"... and {more} more problems"] if more > 0 else lines


def _check_values(content: dict) -> list[str]:
    """Numbers that are not finite and strings that are no text, anywhere in the file."""
    problems: list[str] = []
    open_nodes: list[tuple[tuple, object]] = [((), content)]
    while open_nodes:
        keys, node = open_nodes.pop()
        if isinstance(node, dict):
            open_nodes += [((*keys, key), value) for key, value in node.items()]
            node = "".join(str(key) for key in node)
        elif isinstance(node, list):
            open_nodes += [((*keys, index), value) for index, value in enumerate(node)]
        if isinstance(node, str) and not node.isascii() and any("\ud800" <= letter <= "\udfff" for letter in node):
            problems.append(f"{_path(keys)}the text has half of a surrogate pair. Write it as UTF-8.")
        elif isinstance(node, int | float) and not _is_finite(node):
            problems.append(f"{_path(keys)}must be a finite number, got {quote(node)}. Find out where it comes from.")
    return problems[::-1]


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False


def _check_counts(content: dict) -> list[str]:
    counts, data, total = content["counts"], content["data"], sum(content["failures"].values())
    problems, questions, asked = [], counts["questions"], data["questions"]
    done = counts["answered"] + counts["abstained"] + counts["failed"]
    if done != questions:
        rule = f"counts: answered + abstained + failed must be questions ({questions}), got {done}"
        problems.append(f"{rule}. Evaluate again, some questions were lost.")
    if questions != asked:
        problems.append(f"counts.questions must be data.questions ({asked}), got {questions}. Evaluate again.")
    whole = data.get("file_questions", asked)  # older results do not say it
    is_part = data.get("half") is not None or content["options"].get("limit") is not None
    if asked > whole or (asked < whole and not is_part):
        rule = "at least" if is_part else "exactly"
        problems.append(f"data.file_questions must be {rule} data.questions ({asked}), got {whole}. Evaluate again.")
    if total != counts["failed"]:
        problems.append(f"failures: their sum must be counts.failed ({counts['failed']}), got {total}.")
    for name in ("without_answers", "without_gold"):
        if counts[name] > questions:
            problems.append(f"counts.{name} must be <= questions ({questions}), got {counts[name]}.")
    return problems


def _check_metrics(content: dict) -> list[str]:
    metrics = content["metrics"]
    problems = [] if metrics else ["metrics must have at least one, got none. Evaluate again."]
    for name, metric in metrics.items():
        problems += [f"metrics.{name}{problem}" for problem in _metric_problems(content, name, metric)]
    pairs = list(NOT_ABOVE)
    for name in RISING:  # neighbours such as recall@5 and recall@10
        depths = sorted(int(key.split("@")[1]) for key in metrics if key.startswith(f"{name}@"))
        pairs += [(f"{name}@{small}", f"{name}@{large}") for small, large in pairwise(depths)]
    for lower, upper in pairs:
        if lower in metrics and upper in metrics and metrics[lower]["n"] == metrics[upper]["n"]:
            small, large = metrics[lower]["value"], metrics[upper]["value"]
            if small > large + TOLERANCE:
                rule = f"metrics.{lower} must be <= metrics.{upper} ({large})"
                problems.append(f"{rule}, got {small}: it holds per question.")
    return problems


def _metric_problems(content: dict, name: str, metric: dict) -> list[str]:
    """Whether a metric is a mean over the questions that it must be a mean of, and can be what it is."""
    problems, counts, setting = [], content["counts"], content["setting"]
    low, value, high, n = (metric[key] for key in ("low", "value", "high", "n"))
    questions, is_retrieval = counts["questions"], RETRIEVAL_METRIC.fullmatch(name) is not None
    if not low - TOLERANCE <= value <= high + TOLERANCE:
        problems.append(f": low <= value <= high must hold, got {low} <= {value} <= {high}.")
    if n > questions:
        problems.append(f".n must be <= counts.questions ({questions}), got {n}.")
    left_out = "without_gold" if is_retrieval else "without_answers" if name in ANSWER_METRICS else None
    if left_out and n != questions - counts[left_out]:
        problems.append(f".n must be all {questions - counts[left_out]} questions that it is of, got {n}.")
    if is_retrieval and setting in ("closed_book", "gold_only"):
        problems.append(f" must be left out in the setting {setting}: nothing is ranked.")
    if name in ANSWER_METRICS and value * n > counts["answered"] + 1e-6:
        problems.append(f" must be <= the share of questions that were answered, got {value}.")
    return problems


def _check_rest(content: dict) -> list[str]:
    problems, system = [], content["system"]
    for part, quantiles in (content["efficiency"]["latency_ms"] or {}).items():
        if quantiles and quantiles["p50"] > quantiles["p95"] + TOLERANCE:
            values = f"{quantiles['p50']} > {quantiles['p95']}"
            problems.append(f"efficiency.latency_ms.{part}: p50 must be <= p95, got {values}.")
    if parse_time(content["created"]) > datetime.now(UTC) + timedelta(days=1):
        problems.append(f"created must not lie in the future, got {content['created']}. Set the clock and run again.")
    for name in ("memory_size", "codec") if system["kind"] == "clara" else ():
        if system[name] is None:
            problems.append(f"system.{name} must be given where system.kind is clara, got null.")
    return problems
