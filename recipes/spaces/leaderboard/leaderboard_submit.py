"""Takes a results.json of a user to the results repository: all checks, then a pull request with this one file.

It never shows a token: of a failure it tells the status and what to do.
"""

import hashlib
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from leaderboard_revisions import EXISTS, MISSING, RevisionChecker
from leaderboard_rules import check_submission
from leaderboard_source import FOLDER, missing_model
from leaderboard_text import data_name, plain, safe_name
from validation import parse_results

HEADLINES = ("f1", "em", "containment", "recall@5", "recall@10", "abstention")


@dataclass
class Checked:
    """An upload after its checks: `problems`, or the place and the words of its pull request."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    content: bytes = b""
    digest: str = ""  # the first 12 hex digits of the SHA-256 of the file
    path: str = ""
    title: str = ""
    description: str = ""


@dataclass
class Outcome:
    """What became of a submission: the address of a pull request, or why there is none."""

    url: str = ""
    message: str = ""


def check_upload(content: bytes, data_files: dict | None, checker: RevisionChecker | None) -> Checked:
    """All checks of the leaderboard on the bytes of a file.

    Without `data_files` of the results repository any data will do; without a `checker` no model is looked up.
    """
    try:
        results = parse_results(content)
        problems = check_submission(results, data_files)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        return Checked(problems)
    notes, model = [], (results["model"]["repo"], results["model"]["revision"])
    if checker is not None and model[0] is not None:
        state = checker.check([model])[model]
        if state == MISSING:
            return Checked([missing_model(*model)])
        if state != EXISTS:
            notes.append("The model could not be looked up on the Hub now; it will be when the results are shown.")
    return _described(content, results, notes)


def _described(content: bytes, results: dict, notes: list[str]) -> Checked:
    """The place in the repository, and the title and text of the pull request."""
    model, setting, date = results["model"], results["setting"], results["created"][:10]
    name, data = results["system"]["name"], data_name(results["data"])
    digest = hashlib.sha256(content).hexdigest()[:12]
    path = f"{FOLDER}/{safe_name(model['repo'] or name)}/{safe_name(data)}/{setting}-{safe_name(name)}-{digest}.json"
    names = [name for name in HEADLINES if name in results["metrics"]] or sorted(results["metrics"])[:6]
    metrics = [(name, results["metrics"][name]) for name in names]
    where = f"model `{model['repo']}` at `{model['revision']}`" if model["repo"] else "an external system"
    lines = [
        f"One results.json, written {date}: {_code(name)} on {_code(data)}, setting {setting}, {where}.",
        "",
        "| metric | value | interval | questions |",
        "|---|---|---|---|",
        *(f"| {name} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']} |" for name, m in metrics),
        "",
        "It passed all checks of the leaderboard.",
    ]
    title = f"Results: {plain(name, 60)} on {plain(data, 60)}, {setting} [{digest}]"
    return Checked([], notes, content, digest, path, title, "\n".join(lines))


def _code(text: str) -> str:
    """The text as code of Markdown, where it cannot become a link, a picture or a mention."""
    return f"`{plain(text).replace('`', ' ')}`"


def submit(checked: Checked, repo: str, token: str | None) -> Outcome:
    """Opens a pull request in the dataset `repo` that adds a file without problems, in the name of the token's user.

    A file that is there, or asked for already, is told instead.
    """
    if checked.problems:
        raise ValueError("`checked` must have no problems. Show them instead of submitting the file.")
    if not token:
        return Outcome(message="A token must say who submits. Sign in with Hugging Face, or set HF_TOKEN locally.")
    api = HfApi(token=token)
    try:
        if api.file_exists(repo, checked.path, repo_type="dataset"):
            return Outcome(message=f"This file is on the leaderboard already, as {checked.path}.")
        wanted = {"discussion_type": "pull_request", "discussion_status": "open"}
        for request in api.get_repo_discussions(repo, repo_type="dataset", **wanted):
            if request.title.endswith(f"[{checked.digest}]"):
                return Outcome(request.url, "This file was submitted already; its pull request is open.")
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(checked.path, checked.content)],
            repo_type="dataset",
            commit_message=checked.title,
            commit_description=checked.description,
            create_pr=True,
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        return Outcome(message=_told(error, repo))
    return Outcome(commit.pr_url, "The pull request is open. A maintainer merges it.")


def _told(error: Exception, repo: str) -> str:
    """A failure in plain words; never the text of an exception, which may quote a header."""
    if isinstance(error, RepositoryNotFoundError):
        return f"The dataset {repo} was not found with this token. Check the name, or sign in with another account."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = {
            401: "The Hub does not know this token (401). Sign out and in again, or renew HF_TOKEN.",
            403: f"This token may not open pull requests in {repo} (403). "
            "Sign in again and grant `write-discussions`, or use a token that may write.",
            429: "The Hub asks to wait (429). Try again in some minutes.",
        }
        return known.get(status, f"The Hub refused the pull request ({status}). Try again later.")
    if isinstance(error, httpx2.HTTPError | OSError):
        return f"The Hub cannot be reached ({type(error).__name__}). Check the network and try again."
    return f"The pull request could not be made ({type(error).__name__}). Check the token and try again."
