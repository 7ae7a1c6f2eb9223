"""Checks of results.json in plain words: its version, its schema, values that cannot be, its place on the leaderboard.
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
MAX_BYTES = 1_000_000  # of a results.json; those of recipes/evaluate.py have about 10 kB
MAX_PROBLEMS = 20  # told of one file
MAX_PROBLEM_LENGTH = 300  # letters of one problem: messages of jsonschema quote the value, however long
TOLERANCE = 1e-9  # of comparisons of floats
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
URL = re.compile(r"https?://[^\s<>\"'`{}|\\^]{1,2000}")
REVISION = re.compile(r"[0-9a-f]{40}")
NOT_ABOVE = (("em", "f1"), ("em", "containment"))  # of every question, so of means
ANSWER_METRICS = ("em", "f1", "containment", "bag_containment")
RETRIEVAL_METRIC = re.compile(r"mrr|(recall|hit|ndcg|precision)@\d{1,4}")
FIXED = {"num_candidates": 20, "limit": None}  # options that make results comparable, where a run has them
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
            raise DuplicateKey(
                f"each key must stand once in an object, got {_quote(twice)} twice. Remove one of them."
            )
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


def _quote(value: object) -> str:
    """The value for a message, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_results(content: object, data_files: dict | None = None) -> list[str]:
    """What is wrong with a results.json, in plain words; nothing where it is valid.

    Args:
        content: the parsed file, whatever it is.
        data_files: of the results repository, name -> {"sha256", "questions"}: with it the data must be one of them.
    """
    if not isinstance(content, dict):
        return [f"results must be a JSON object, got {type(content).__name__}. Is this a results.json?"]
    version = content.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        return [_version_problem(version, "schema_version" in content)]
    problems = _check_values(content)
    if not problems:
        problems = _schema_problems(content)
    if not problems:
        problems = [*(_check_counts(content) or _check_metrics(content)), *_check_rest(content)]
        if data_files is not None:
            problems += check_data(content, data_files)
    return _shortened(problems)


def check_submission(content: object, data_files: dict | None) -> list[str]:
    """What keeps a results.json off the leaderboard: all of `check_results`, and that its model can be found.

    Args:
        content: the parsed file, whatever it is.
        data_files: as for `check_results`; None where the repository has no data_files.json, then any data passes.
    """
    problems = check_results(content)
    if problems and not _has_places(content):
        return problems
    return _shortened([*problems, *_check_options(content), *check_place(content, data_files)])


def check_place(content: dict, data_files: dict | None) -> list[str]:
    """What keeps a file off the leaderboard that `check_results` has found valid: its data and its model."""
    return _shortened([*(check_data(content, data_files) if data_files is not None else []), *_check_model(content)])


def _check_options(content: dict) -> list[str]:
    """Options that make a run incomparable with the others."""
    options = content["options"]
    return [
        f"options.{name} must be {json.dumps(wanted)}, got {_quote(options[name])}: other runs are made so."
        for name, wanted in FIXED.items()
        if options.get(name, wanted) != wanted
    ]


def _has_places(content: object) -> bool:
    """Whether what `check_place` reads is there, although something else is wrong."""
    return isinstance(content, dict) and not _schema_problems(content)


def _schema_problems(content: dict) -> list[str]:
    return [f"{_path(error.absolute_path)}{error.message}" for error in VALIDATOR.iter_errors(content)]


def _version_problem(version: object, is_there: bool) -> str:
    if not is_there:
        return (
            f"schema_version must be {SCHEMA_VERSION}, but is missing. Is this a results.json of recipes/evaluate.py?"
        )
    message = f"schema_version must be {SCHEMA_VERSION}, got {_quote(version)}"
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        return f"{message}: made by a newer recipes/evaluate.py; update the leaderboard."
    if isinstance(version, int) and not isinstance(version, bool):
        return f"{message}: made by an older recipes/evaluate.py; update it and evaluate again."
    return f"{message}. Is this a results.json of recipes/evaluate.py?"


def _path(keys: object) -> str:
    """The place of a value, such as `metrics.f1.value: `; nothing for the whole file."""
    path = ".".join(str(key) for key in keys)
    return f"{path[:100]}: " if path else ""


def _shortened(problems: list[str]) -> list[str]:
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
            problems.append(f"{_path(keys)}must be a finite number, got {_quote(node)}. Find out where it comes from.")
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
    if sum(failures.values()) != counts["failed"]:
        total = sum(failures.values())
        problems.append(f"failures: their sum must be counts.failed ({counts['failed']}), got {total}.")
    for name in ("without_answers", "without_gold"):
        if counts[name] > questions:
            problems.append(f"counts.{name} must be <= questions ({questions}), got {counts[name]}.")
    return problems


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


def check_data(content: dict, data_files: dict) -> list[str]:
    """Whether the data of a schema-valid results.json are one of the results repository's, whole and unchanged."""
    data = content["data"]
    known = data_files.get(data["name"])
    if known is None:
        names = ", ".join(sorted(data_files)) or "none"
        rule = f"data.name must be one of data_files.json ({names}), got {_quote(data['name'])}"
        return [f"{rule}. Evaluate on one of them, or ask for a new one in the results repository."]
    problems = []
    if data["sha256"] != known["sha256"]:
        rule = f"data.sha256 must be that of {data['name']} ({known['sha256'][:12]}...), got {data['sha256'][:12]}..."
        problems.append(f"{rule} Evaluate on the file as it is published.")
    if data.get("half"):
        if data["questions"] >= known["questions"]:
            rule = f"data.questions must be less than all of {data['name']} ({known['questions']})"
            problems.append(f"{rule} where data.half is {data['half']!r}, got {data['questions']}. Evaluate again.")
    elif data["questions"] != known["questions"]:
        rule = f"data.questions must be all of {data['name']} ({known['questions']}), got {data['questions']}"
        problems.append(f"{rule}. Evaluate without --limit.")
    return problems


def _check_model(content: dict) -> list[str]:
    """A published model at a commit, or the address of an external system."""
    system, model, problems = content["system"], content["model"], []
    if system["kind"] == "external" and system["url"] and model["repo"] is None:
        return []
    if model["repo"] is None:
        remedy = "Publish the model" if system["kind"] != "external" else "Give system.url or publish the model"
        problems.append(f"model.repo must name the model on the Hub, got null. {remedy} and evaluate it from there.")
    elif REPO_ID.fullmatch(model["repo"]) is None or ".." in model["repo"] or "--" in model["repo"]:
        problems.append(f"model.repo must be owner/name of the Hub, got {_quote(model['repo'])}.")
    if model["repo"] is not None and REVISION.fullmatch(model["revision"] or "") is None:
        shown = "null" if model["revision"] is None else _quote(model["revision"])
        rule = f"model.revision must be the commit of 40 hex digits, got {shown}"
        problems.append(f"{rule}. Evaluate the model from the Hub.")
    return problems


def check_data_files(content: object) -> list[str]:
    """What is wrong with a data_files.json: name -> {"sha256": 64 hex digits, "questions": a number of them}."""
    if not isinstance(content, dict):
        return [f"data_files.json must be an object of names, got {type(content).__name__}."]
    problems = []
    for name, entry in content.items():
        is_whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not is_whole or re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is None:
            problems.append(f"{_quote(name)} must have sha256, 64 hex digits.")
        elif type(entry.get("questions")) is not int or entry["questions"] < 1:
            problems.append(
                f"{_quote(name)} must have questions, a number >= 1, got {_quote(entry.get('questions'))}."
            )
    return _shortened(problems)
