"""Checks of results.json in plain words: its version, its schema, values that cannot be.
It stands between a file that anybody wrote and everything that shows, compares or publishes it.
It does not know files, the Hub or the interface; it needs nothing beyond the standard library but jsonschema.
"""

import json
import math
import re
from datetime import UTC, datetime, timedelta
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
NOT_ABOVE = (("em", "f1"), ("em", "containment"))  # of every question, so of means
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
    """The JSON value of a file's bytes; ValueError with a plain message where it is none.

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
    """What is wrong with a results.json, in plain words; nothing where it is valid.

    Args:
        content: the parsed file, whatever it is.
    """
    if not isinstance(content, dict):
        return [f"results must be a JSON object, got {type(content).__name__}. Is this a results.json?"]
    version = content.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        return [_version_problem(version, "schema_version" in content)]
    problems = _check_values(content)
    if not problems:
        problems = schema_problems(content)
    if not problems:
        problems = [*(_check_counts(content) or _check_metrics(content)), *_check_rest(content)]
    return shortened(problems)


def schema_problems(content: dict) -> list[str]:
    return [f"{_path(error.absolute_path)}{error.message}" for error in VALIDATOR.iter_errors(content)]


def _version_problem(version: object, is_there: bool) -> str:
    if not is_there:
        return f"schema_version must be {SCHEMA_VERSION}, but is missing. Is this a results.json of recipes.evaluate?"
    message = f"schema_version must be {SCHEMA_VERSION}, got {quote(version)}"
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        return f"{message}: made by a newer recipes.evaluate; update the leaderboard."
    if isinstance(version, int) and not isinstance(version, bool):
        return f"{message}: made by an older recipes.evaluate; update it and evaluate again."
    return f"{message}. Is this a results.json of recipes.evaluate?"


def _path(keys: object) -> str:
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
    counts, failures = content["counts"], content["failures"]
    problems, questions = [], counts["questions"]
    done = counts["answered"] + counts["abstained"] + counts["failed"]
    if done != questions:
        rule = f"counts: answered + abstained + failed must be questions ({questions}), got {done}"
        problems.append(f"{rule}. Evaluate again, some questions were lost.")
    if questions != content["data"]["questions"]:
        asked = content["data"]["questions"]
        problems.append(f"counts.questions must be data.questions ({asked}), got {questions}. Evaluate again.")
    problems += _check_file_questions(content)
    if sum(failures.values()) != counts["failed"]:
        total = sum(failures.values())
        problems.append(f"failures: their sum must be counts.failed ({counts['failed']}), got {total}.")
    for name in ("without_answers", "without_gold"):
        if counts[name] > questions:
            problems.append(f"counts.{name} must be <= questions ({questions}), got {counts[name]}.")
    return problems


def _check_file_questions(content: dict) -> list[str]:
    """Whether as many questions were asked as the whole file has; a half or `--limit` may ask fewer."""
    data, asked = content["data"], content["data"]["questions"]
    whole = data.get("file_questions", asked)  # older results do not say it
    is_part = data.get("half") is not None or content["options"].get("limit") is not None
    if asked > whole or (asked < whole and not is_part):
        rule = "at least" if is_part else "exactly"
        return [f"data.file_questions must be {rule} data.questions ({asked}), got {whole}. Evaluate again."]
    return []


def _check_metrics(content: dict) -> list[str]:
    problems, metrics, questions = [], content["metrics"], content["counts"]["questions"]
    for name, metric in metrics.items():
        low, value, high = metric["low"], metric["value"], metric["high"]
        if not low - TOLERANCE <= value <= high + TOLERANCE:
            problems.append(f"metrics.{name}: low <= value <= high must hold, got {low} <= {value} <= {high}.")
        if metric["n"] > questions:
            problems.append(f"metrics.{name}.n must be <= counts.questions ({questions}), got {metric['n']}.")
    problems += _check_sizes(content)
    pairs = [*NOT_ABOVE, *_rising_pairs(metrics)]
    pairs += [("hit@1", "mrr")]
    for lower, upper in pairs:
        if lower not in metrics or upper not in metrics or metrics[lower]["n"] != metrics[upper]["n"]:
            continue
        small, large = metrics[lower]["value"], metrics[upper]["value"]
        if small > large + TOLERANCE:
            problems.append(
                f"metrics.{lower} must be <= metrics.{upper} ({large}), got {small}: it holds per question."
            )
    return problems


def _check_sizes(content: dict) -> list[str]:
    """Whether each metric is a mean over the questions that it must be a mean of, and can be what it is."""
    problems, metrics, counts = [], content["metrics"], content["counts"]
    sizes = {name: counts["questions"] - counts["without_answers"] for name in ANSWER_METRICS}
    if not metrics:
        problems.append("metrics must have at least one, got none. Evaluate again.")
    for name, metric in metrics.items():
        is_retrieval = RETRIEVAL_METRIC.fullmatch(name) is not None
        expected = counts["questions"] - counts["without_gold"] if is_retrieval else sizes.get(name, metric["n"])
        if metric["n"] != expected:
            problems.append(f"metrics.{name}.n must be all {expected} questions that it is of, got {metric['n']}.")
        if is_retrieval and content["setting"] in ("closed_book", "gold_only"):
            problems.append(f"metrics.{name} must be left out in the setting {content['setting']}: nothing is ranked.")
        if name in ANSWER_METRICS and metric["value"] * metric["n"] > counts["answered"] + 1e-6:
            problems.append(
                f"metrics.{name} must be <= the share of questions that were answered, got {metric['value']}."
            )
    return problems


def _rising_pairs(metrics: dict) -> list[tuple[str, str]]:
    """Neighbours such as recall@5 and recall@10."""
    pairs = []
    for name in RISING:
        depths = sorted(int(key.split("@")[1]) for key in metrics if key.startswith(f"{name}@"))
        pairs += [(f"{name}@{a}", f"{name}@{b}") for a, b in zip(depths, depths[1:], strict=False)]
    return pairs


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
