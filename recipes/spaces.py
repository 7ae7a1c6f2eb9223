"""Publishes a metric or the leaderboard as a Space, and describes the data files that a leaderboard accepts.

    python recipes/spaces.py push recipes/metrics/rag_answer org/rag_answer
    python recipes/spaces.py push recipes/leaderboard org/clara-leaderboard --variable RESULTS_REPO=org/clara-results
    python recipes/spaces.py describe questions.jsonl.gz more.jsonl.gz > data_files.json

Stands between the folders beside it and the Hub. It knows nothing of what they do.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.questions import read_data
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

SUFFIXES = (".py", ".md", ".txt", ".json", ".js", ".css")
KEPT = (".gitattributes",)  # of the Hub's own


def space_files(folder: Path) -> dict[str, bytes]:
    """Path in the Space -> content of every file of a folder; links are followed.

    Raises:
        FileNotFoundError: the folder is no Space, because README.md or app.py is missing.
    """
    for name in ("README.md", "app.py"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must have {name} to be a Space, found none. Name another folder.")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }


def push_space(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Make the Space or update it, in one commit; files that the folder no longer has are removed.

    Args:
        folder: with README.md and app.py.
        repo_id: of the Space.
        private: of a new one.
        token: for the Hub.
        variables: of the Space's environment.

    Returns:
        URL of the commit.
    """
    files = space_files(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    info = api.repo_info(repo_id, repo_type="space")
    stale = {sibling.rfilename for sibling in info.siblings or []} - set(files) - set(KEPT)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload a Space", repo_type="space", parent_commit=info.sha
    )
    for name, value in (variables or {}).items():
        api.add_space_variable(repo_id, name, value)
    return commit.commit_url


def describe_data(paths: Sequence[str]) -> dict[str, dict]:
    """`data_files.json` of a results repository: name -> `{sha256, questions}` of each data file.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or two have one name.
    """
    described = {}
    for path in paths:
        data = read_data(path, may_abstain=True)
        if data.name in described:
            raise ValueError(f"the data files must have different names, got {data.name} twice. Rename one.")
        described[data.name] = {"sha256": data.sha256, "questions": len(data.questions)}
    return described


def main(argv: Sequence[str] | None = None) -> int:
    """Do it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="upload a folder as a Space")
    push.add_argument("folder", type=Path)
    push.add_argument("repo_id")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="of the Space")
    describe = commands.add_parser("describe", help="print data_files.json for these data files")
    describe.add_argument("data", nargs="+")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "describe":
            print(json.dumps(describe_data(arguments.data), indent=1))
            return 0
        wrong = [entry for entry in arguments.variable if "=" not in entry]
        if wrong:
            raise ValueError(f"--variable must be NAME=VALUE, got {wrong[0]!r}. Correct it.")
        variables = dict(entry.split("=", 1) for entry in arguments.variable)
        print(push_space(arguments.folder, arguments.repo_id, private=arguments.private, variables=variables))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
