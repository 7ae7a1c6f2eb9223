"""Builds a metric, the leaderboard or the page as a Space, and describes the data that a leaderboard accepts.

    python -m recipes.spaces.publish build recipes/spaces/leaderboard OUT
    python -m recipes.spaces.publish describe questions.jsonl.gz more.jsonl.gz > data_files.json

`upload.py` publishes them as the kinds metric, leaderboard and page. A Space is a folder that stands by itself: its
own files, and copies of what it shares with others (`SHARED`).
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SPACES = Path(__file__).resolve().parent
METRICS, LEADERBOARD, PAGE = SPACES / "metrics", SPACES / "leaderboard", SPACES / "ask"
EVALUATION, PACKAGE = SPACES.parent / "evaluation", SPACES.parents[1] / "modeling_clara"
SHARED = {  # name in the Space -> file that is copied there
    "metric": {"app.py": METRICS / "space_app.py", "checked_rows.py": METRICS / "checked_rows.py"},
    "leaderboard": {name: EVALUATION / name for name in ("validation.py", "results.schema.json")},
    "page": {path.relative_to(PACKAGE.parent).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    | {"modeling_clara/cli/demo_passages.jsonl": PACKAGE / "cli" / "demo_passages.jsonl"},
}
IN_THE_CLONE, IN_A_SPACE = b"from recipes.spaces.metrics.checked_rows import", b"from .checked_rows import"
SUFFIXES = (".py", ".md", ".txt", ".json", ".js")


def space_files(folder: Path) -> dict[str, bytes]:
    """Path in the Space -> content of every file: those of the folder, and those that it shares with others."""
    folder = Path(folder).resolve()
    kind = "metric" if folder.parent == METRICS else {LEADERBOARD: "leaderboard", PAGE: "page"}.get(folder)
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
    else:
        build_space(arguments.folder, arguments.output)
        print(f"Written: {arguments.output}. Run it: python {arguments.output / 'app.py'}")


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
