"""Builds and publishes a metric or the leaderboard as a Space, and describes the data that a leaderboard accepts.

    python -m recipes.spaces.publish build recipes/spaces/leaderboard OUT
    python -m recipes.spaces.publish push recipes/spaces/metrics/rag_answer org/rag_answer
    python -m recipes.spaces.publish push recipes/spaces/leaderboard org/board --variable RESULTS_REPO=org/results
    python -m recipes.spaces.publish describe questions.jsonl.gz more.jsonl.gz > data_files.json

A Space is a folder that stands by itself: its own files, and copies of what it shares with others (`SHARED`).
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

SPACES = Path(__file__).resolve().parent
METRICS, LEADERBOARD, EVALUATION = SPACES / "metrics", SPACES / "leaderboard", SPACES.parent / "evaluation"
SHARED = {  # name in the Space -> file that is copied there
    "metric": {"app.py": METRICS / "space_app.py", "checked_rows.py": METRICS / "checked_rows.py"},
    "leaderboard": {name: EVALUATION / name for name in ("validation.py", "results.schema.json")},
}
IN_THE_CLONE, IN_A_SPACE = b"from recipes.spaces.metrics.checked_rows import", b"from .checked_rows import"
SUFFIXES = (".py", ".md", ".txt", ".json", ".js")


def space_files(folder: Path) -> dict[str, bytes]:
    """Path in the Space -> content of every file: those of the folder, and those that it shares with others."""
    folder = Path(folder).resolve()
    kind = "metric" if folder.parent == METRICS else "leaderboard" if folder == LEADERBOARD else None
    paths = [path for path in folder.rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts]
    sources = {path.relative_to(folder).as_posix(): path for path in paths} | SHARED.get(kind, {})
    for name in ("README.md", "app.py"):
        if name not in sources:
            raise FileNotFoundError(f"{folder} must have {name} to be a Space, found none. Name another folder.")
    # `evaluate` copies what a metric imports from its own folder; in a clone the file is one for all metrics
    return {name: path.read_bytes().replace(IN_THE_CLONE, IN_A_SPACE) for name, path in sorted(sources.items())}


def build_space(folder: Path, output: Path) -> None:
    """Write the files of a Space into a new or empty folder."""
    files = space_files(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"the output must be a new or empty folder, got {output}. Choose another one.")
    for name, content in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)


def push_space(
    folder: Path, repo_id: str, *, private: bool | None = None, variables: Mapping[str, str] | None = None
) -> str:
    """Make the Space or update it in one commit, whose URL is returned; files that are gone are removed.

    `private` is of a new one, `variables` are those of its environment.
    """
    files = space_files(folder)
    api = HfApi()
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    info = api.repo_info(repo_id, repo_type="space")
    stale = {sibling.rfilename for sibling in info.siblings} - {*files, ".gitattributes"}  # which is the Hub's own
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload a Space", repo_type="space", parent_commit=info.sha
    )
    for name, value in (variables or {}).items():
        api.add_space_variable(repo_id, name, value)
    return commit.commit_url


def describe_data(paths: Sequence[str]) -> dict[str, dict]:
    """`data_files.json` of a results repository: name -> `{sha256, questions, halves}` of each data file."""
    from recipes.evaluation.questions import HALVES, half_of, read_data  # with torch; the other commands need none

    described = {}
    for path in paths:
        data = read_data(path, may_abstain=True)
        if data.name in described:
            raise ValueError(f"the data files must have different names, got {data.name} twice. Rename one.")
        counts = Counter(half_of(question.text) for question in data.questions)
        halves = {half: counts[half] for half in HALVES}
        described[data.name] = {"sha256": data.sha256, "questions": len(data.questions), "halves": halves}
    return described


def run(arguments: argparse.Namespace) -> None:
    """One command."""
    if arguments.command == "describe":
        print(json.dumps(describe_data(arguments.data), indent=1))
    elif arguments.command == "build":
        build_space(arguments.folder, arguments.output)
        print(f"Written: {arguments.output}. Run it: python {arguments.output / 'app.py'}")
    else:
        for entry in arguments.variable:
            if "=" not in entry:
                raise ValueError(f"--variable must be NAME=VALUE, got {entry!r}. Correct it.")
        variables = dict(entry.split("=", 1) for entry in arguments.variable)
        print(push_space(arguments.folder, arguments.repo_id, private=arguments.private, variables=variables))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    sys.stdout.reconfigure(errors="replace")  # any console; `modeling_clara` is not imported for this
    parser = argparse.ArgumentParser(
        "python -m recipes.spaces.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the files of a Space into a folder, to run it here")
    build.add_argument("folder", type=Path)
    build.add_argument("output", type=Path, help="new or empty folder")
    push = commands.add_parser("push", help="upload a folder as a Space")
    push.add_argument("folder", type=Path)
    push.add_argument("repo_id")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="of the Space")
    describe = commands.add_parser("describe", help="print data_files.json for these data files")
    describe.add_argument("data", nargs="+")
    try:
        run(parser.parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
