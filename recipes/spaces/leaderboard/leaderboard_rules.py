"""What keeps results off the leaderboard: valid ones must be of its data, of a public model, with its options.
It stands on `validation.py`, which every results.json must pass anywhere.
It does not know files or the interface.
"""

import json
import re

from validation import REPO_ID, REVISION, check_results, quote, schema_problems, shortened

FIXED = {"num_candidates": 20, "limit": None}  # options that make results comparable, where a run has them


def check_submission(content: object, data_files: dict | None) -> list[str]:
    """What keeps a results.json off the leaderboard: all of `check_results`, and that its model can be found.

    Args:
        content: the parsed file, whatever it is.
        data_files: of the results repository, name -> {"sha256", "questions", "halves"?}; None if it has no
            data_files.json, then any data passes.
    """
    problems = check_results(content)
    if problems and not _has_places(content):
        return problems
    return shortened([*problems, *_check_options(content), *check_place(content, data_files)])


def check_place(content: dict, data_files: dict | None) -> list[str]:
    """What keeps a file off the leaderboard that `check_results` has found valid: its data and its model."""
    return shortened([*(check_data(content, data_files) if data_files is not None else []), *_check_model(content)])


def _check_options(content: dict) -> list[str]:
    """Options that make a run incomparable with the others."""
    options = content["options"]
    return [
        f"options.{name} must be {json.dumps(wanted)}, got {quote(options[name])}: other runs are made so."
        for name, wanted in FIXED.items()
        if options.get(name, wanted) != wanted
    ]


def _has_places(content: object) -> bool:
    """Whether what `check_place` reads is there, although something else is wrong."""
    return isinstance(content, dict) and not schema_problems(content)


def check_data(content: dict, data_files: dict) -> list[str]:
    """Whether the data of a schema-valid results.json are one of the results repository's, whole and unchanged."""
    data = content["data"]
    known = data_files.get(data["name"])
    if known is None:
        names = ", ".join(sorted(data_files)) or "none"
        rule = f"data.name must be one of data_files.json ({names}), got {quote(data['name'])}"
        return [f"{rule}. Evaluate on one of them, or ask for a new one in the results repository."]
    problems = []
    if data["sha256"] != known["sha256"]:
        rule = f"data.sha256 must be that of {data['name']} ({known['sha256'][:12]}...), got {data['sha256'][:12]}..."
        problems.append(f"{rule} Evaluate on the file as it is published.")
    if data.get("file_questions", known["questions"]) != known["questions"]:
        rule = (
            f"data.file_questions must be all of {data['name']} ({known['questions']}), got {data['file_questions']}"
        )
        problems.append(f"{rule}. Evaluate on the file as it is published.")
    return problems + _check_part(data, known)


def _check_part(data: dict, known: dict) -> list[str]:
    """Whether all questions were asked, of the file or of its half."""
    half, asked = data.get("half"), data["questions"]
    if half and "halves" not in known:  # an older data_files.json does not say how many a half has
        if asked < known["questions"]:
            return []
        rule = f"data.questions must be less than all of {data['name']} ({known['questions']})"
        return [f"{rule} where data.half is {half!r}, got {asked}. Evaluate again."]
    part = f"the {half} half of {data['name']}" if half else data["name"]
    wanted = known["halves"][half] if half else known["questions"]
    if asked == wanted:
        return []
    return [f"data.questions must be all of {part} ({wanted}), got {asked}. Evaluate without --limit."]


def _check_model(content: dict) -> list[str]:
    """A published model at a commit, or the address of an external system."""
    system, model, problems = content["system"], content["model"], []
    if system["kind"] == "external" and system["url"] and model["repo"] is None:
        return []
    if model["repo"] is None:
        remedy = "Publish the model" if system["kind"] != "external" else "Give system.url or publish the model"
        problems.append(f"model.repo must name the model on the Hub, got null. {remedy} and evaluate it from there.")
    elif REPO_ID.fullmatch(model["repo"]) is None or ".." in model["repo"] or "--" in model["repo"]:
        problems.append(f"model.repo must be owner/name of the Hub, got {quote(model['repo'])}.")
    if model["repo"] is not None and REVISION.fullmatch(model["revision"] or "") is None:
        shown = "null" if model["revision"] is None else quote(model["revision"])
        rule = f"model.revision must be the commit of 40 hex digits, got {shown}"
        problems.append(f"{rule}. Evaluate the model from the Hub.")
    return problems


def check_data_files(content: object) -> list[str]:
    """What is wrong with a data_files.json: name -> {"sha256": 64 hex digits, "questions": a number of them}.

    An entry may have `halves`, {"first": n, "second": n}: the questions of each half (`--half`).
    """
    if not isinstance(content, dict):
        return [f"data_files.json must be an object of names, got {type(content).__name__}."]
    problems = []
    for name, entry in content.items():
        is_whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not is_whole or re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is None:
            problems.append(f"{quote(name)} must have sha256, 64 hex digits.")
        elif type(entry.get("questions")) is not int or entry["questions"] < 1:
            problems.append(f"{quote(name)} must have questions, a number >= 1, got {quote(entry.get('questions'))}.")
        elif "halves" in entry and not _are_halves(entry["halves"], entry["questions"]):
            rule = f"{quote(name)} must have halves as {{first, second}}, whose sum is {entry['questions']}"
            problems.append(f"{rule}, got {quote(entry['halves'])}.")
    return shortened(problems)


def _are_halves(halves: object, questions: int) -> bool:
    if not isinstance(halves, dict) or set(halves) != {"first", "second"}:
        return False
    return all(type(n) is int and n >= 0 for n in halves.values()) and sum(halves.values()) == questions
