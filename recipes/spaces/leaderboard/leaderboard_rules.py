"""What keeps results off the leaderboard: valid ones must be of its data, of a public model, with its options.

Every results.json must also pass `validation.py`, here as anywhere.
"""

import json
import re

from validation import REPO_ID, REVISION, check_results, quote, schema_problems, shortened

FIXED = {"num_candidates": 20, "limit": None}  # options that make results comparable, where a run has them


def check_submission(content: object, data_files: dict | None) -> list[str]:
    """What keeps a parsed file off the leaderboard: all of `check_results` and `check_place`.

    `data_files` of the results repository are name -> {"sha256", "questions", "halves"?}; None lets any data pass.
    """
    problems = check_results(content)
    if problems and (not isinstance(content, dict) or schema_problems(content)):
        return problems
    return shortened([*problems, *check_place(content, data_files)])


def check_place(content: dict, data_files: dict | None) -> list[str]:
    """What keeps a file off the leaderboard that `check_results` has found valid: its options, data and model."""
    options = content["options"]
    problems = [
        f"options.{name} must be {json.dumps(wanted)}, got {quote(options[name])}: other runs are made so."
        for name, wanted in FIXED.items()
        if options.get(name, wanted) != wanted
    ]
    if data_files is not None:
        problems += _check_data(content["data"], data_files)
    return shortened(problems + _check_model(content))


def _check_data(data: dict, data_files: dict) -> list[str]:
    """Whether the data are one of the results repository's, whole and unchanged."""
    name, known = data["name"], data_files.get(data["name"])
    if known is None:
        names = ", ".join(sorted(data_files)) or "none"
        rule = f"data.name must be one of data_files.json ({names}), got {quote(name)}"
        return [f"{rule}. Evaluate on one of them, or ask for a new one in the results repository."]
    problems, questions = [], known["questions"]
    if data["sha256"] != known["sha256"]:
        rule = f"data.sha256 must be that of {name} ({known['sha256'][:12]}...), got {data['sha256'][:12]}..."
        problems.append(f"{rule} Evaluate on the file as it is published.")
    if (whole := data.get("file_questions", questions)) != questions:
        rule = f"data.file_questions must be all of {name} ({questions}), got {whole}"
        problems.append(f"{rule}. Evaluate on the file as it is published.")
    half, asked = data.get("half"), data["questions"]
    if half and "halves" not in known:  # an older data_files.json does not say how many a half has
        if asked >= questions:
            rule = f"data.questions must be less than all of {name} ({questions}) where data.half is {half!r}"
            problems.append(f"{rule}, got {asked}. Evaluate again.")
    elif asked != (wanted := known["halves"][half] if half else questions):
        rule = f"data.questions must be all of {f'the {half} half of ' if half else ''}{name} ({wanted}), got {asked}"
        problems.append(f"{rule}. Evaluate without --limit.")
    return problems


def _check_model(content: dict) -> list[str]:
    """A published model at a commit, or the address of an external system."""
    repo, revision = content["model"]["repo"], content["model"]["revision"]
    is_external = content["system"]["kind"] == "external"
    if repo is None:
        if is_external and content["system"]["url"]:
            return []
        remedy = "Give system.url or publish the model" if is_external else "Publish the model"
        return [f"model.repo must name the model on the Hub, got null. {remedy} and evaluate it from there."]
    problems = []
    if REPO_ID.fullmatch(repo) is None or ".." in repo or "--" in repo:
        problems.append(f"model.repo must be owner/name of the Hub, got {quote(repo)}.")
    if REVISION.fullmatch(revision or "") is None:
        rule = f"model.revision must be the commit of 40 hex digits, got {quote(revision) if revision else 'null'}"
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
        entry = entry if isinstance(entry, dict) else {}
        digest, questions = entry.get("sha256"), entry.get("questions")
        if not isinstance(digest, str) or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
            problems.append(f"{quote(name)} must have sha256, 64 hex digits.")
        elif type(questions) is not int or questions < 1:
            problems.append(f"{quote(name)} must have questions, a number >= 1, got {quote(questions)}.")
        elif "halves" in entry and not _are_halves(entry["halves"], questions):
            rule = f"{quote(name)} must have halves as {{first, second}}, whose sum is {questions}"
            problems.append(f"{rule}, got {quote(entry['halves'])}.")
    return shortened(problems)


def _are_halves(halves: object, questions: int) -> bool:
    if not isinstance(halves, dict) or set(halves) != {"first", "second"}:
        return False
    return all(type(n) is int and n >= 0 for n in halves.values()) and sum(halves.values()) == questions
