"""Builds a model, a corpus, a metric, the leaderboard, the page or data as published, checks it, publishes one state.

    python upload.py model model_cards/clara-smollm2-135m --repo-id org/clara-smollm2-135m --dry-run
    python upload.py model model_cards/clara-smollm2-135m --build build/clara-smollm2-135m

What is built is loaded by a process that cannot import this package, and must give the same memories and answers as
the source, bit for bit. docs/checkpoints.md says what the checks refuse and what happens on the Hub.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from recipes.publishing.build import Built, building
from recipes.publishing.kinds import KINDS
from recipes.publishing.remote import Changes, Target, publish

KIND_OPTIONS = {  # of a kind: name -> (of the build, keywords of the parser)
    "model": {
        "--backbone": {"help": "the weights the adapters were trained on"},
        "--corpus": {"help": "a corpus of this model that must open as well", "metavar": "FOLDER"},
    },
    "corpus": {
        "--compressor": {"help": "id on the Hub of the model that made the memories", "metavar": "ORG/NAME"},
        "--compressor-revision": {
            "help": "its commit; default the one in corpus.json, or the newest",
            "metavar": "COMMIT",
        },
    },
}
FILE_KINDS = {".safetensors": "weights", ".parquet": "data", ".jsonl": "data", ".gz": "data", ".py": "code"}


def run(arguments: argparse.Namespace) -> None:
    """One command."""
    if not arguments.repo_id and (arguments.dry_run or not arguments.build):
        raise ValueError("`--repo-id` must be given to publish, or `--build` to build only. Add one of them.")
    if arguments.repo_id and arguments.repo_id.count("/") != 1:
        raise ValueError(
            f"`--repo-id` must be ORG/NAME, got {arguments.repo_id}. Add the organisation or your user name."
        )
    if arguments.repo_id:
        try:
            validate_repo_id(arguments.repo_id)
        except HFValidationError as error:
            raise ValueError(f"`--repo-id` must be ORG/NAME, got {arguments.repo_id}: {error} Correct it.") from None
    if arguments.token:
        os.environ["HF_TOKEN"] = arguments.token  # for this process and the clean one
    variables = dict(entry.partition("=")[::2] for entry in arguments.variable)
    if wrong := [entry for entry in arguments.variable if "=" not in entry]:
        raise ValueError(f"`--variable` must be NAME=VALUE, got {wrong[0]!r}. Correct it.")
    names = [name.removeprefix("--").replace("-", "_") for name in KIND_OPTIONS.get(arguments.kind, {})]
    options = {name: getattr(arguments, name) for name in names}
    with building(KINDS[arguments.kind], arguments.path, arguments.build, options) as built:
        show_build(built, all_files=arguments.dry_run)
        if arguments.repo_id:
            flags = {"private": arguments.private, "tag": arguments.tag, "create_pr": arguments.create_pr}
            target = Target(arguments.repo_id, arguments.revision, variables=variables, **flags)
            changes, card = publish(built, target, dry_run=arguments.dry_run)
            show_changes(target, changes, arguments.dry_run)
            if arguments.dry_run:
                print(f"\n{card.content.decode()}")


def show_build(built: Built, all_files: bool) -> None:
    """Print the files: code as one line unless all are asked for."""
    sizes = {name: file.size for name, file in built.files.items()}
    kinds = Counter()
    for name, size in sizes.items():
        kinds[FILE_KINDS.get(Path(name).suffix, "other files")] += size
        if all_files or not name.endswith(".py"):
            print(f"  {size / 1e6:10,.2f} MB  {name}")
    parts = ", ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in kinds.most_common())
    state = "as built before" if built.is_reused else "built"
    print(f"{len(sizes)} files and the card, {state} in {built.folder}: {parts}")
    if "fingerprint" in built.found:
        same = "a process without this package gives the same memories and answers"
        print(f"{same}; fingerprint {built.found['fingerprint']}")
    elif built.found:
        print(
            "a process without this package loads it" + (", and gives the same" if built.kind.name != "data" else "")
        )
    for name, (n_rows, columns) in built.found.get("splits", {}).items():
        print(f"  {name}: {n_rows:,} rows of {', '.join(columns)}")


def show_changes(target: Target, changes: Changes, dry_run: bool) -> None:
    """Print what was published, or would be."""
    for what in ("added", "changed", "deleted"):
        names = getattr(changes, what)
        if dry_run or what == "deleted":
            for name in names:
                print(f"  {'would be ' if dry_run else ''}{what}: {name}")
    if changes.overwritten:
        print(f"the card was edited on the Hub as well; that text is in {changes.overwritten[:12]}")
    counts = ", ".join(f"{len(getattr(changes, what))} {what}" for what in ("added", "changed", "deleted"))
    if dry_run:
        print(f"nothing is published; {target.repo_id}{' would be made' if changes.is_new else ''}: {counts}")
    elif not changes:
        print(f"{target.repo_id} has all of it at {changes.commit}: nothing to upload")
    else:
        print(f"{changes.url}: {counts}; downloaded again and compared")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="{" + ",".join(KINDS) + "}")
    for kind in KINDS.values():
        command = commands.add_parser(kind.name, help=kind.what)
        command.add_argument("path", type=Path, help="folder" + (" or file" if kind.name == "data" else ""))
        command.add_argument("--repo-id", metavar="ORG/NAME", help="repo to publish to, made if there is none")
        command.add_argument("--build", type=Path, metavar="OUT", help="folder to write; default one in the cache")
        command.add_argument("--private", action="store_true", help="the repo is private")
        command.add_argument("--revision", default="main", metavar="BRANCH", help="branch to move; default main")
        command.add_argument("--tag", help="name for the published commit")
        command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
        command.add_argument("--dry-run", action="store_true", help="print files, card and changes; publish nothing")
        command.add_argument("--token", help="of the Hub; default that of `hf auth login` or HF_TOKEN")
        command.set_defaults(variable=[])
        if kind.name == "leaderboard":
            text = "of the Space's environment"
            command.add_argument("--variable", action="append", metavar="NAME=VALUE", help=text)
        for name, settings in KIND_OPTIONS.get(kind.name, {}).items():
            command.add_argument(name, **settings)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    sys.stdout.reconfigure(errors="replace")  # any console
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError, HTTPError) as error:
        print(f"upload: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("upload: interrupted. Run the same command again: it finishes what is left.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
