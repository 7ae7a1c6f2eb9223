"""`clara sync`: makes a corpus agree with a folder; killed, the same command goes on."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .changes import add_change_options, change_options, count_statuses, open_for_change, print_changes, strict_status
from .compress import parse_metadata
from .terminal import one_line

SHOWN = 10  # files that a dry run names of each kind


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("sync", help="make a corpus agree with a folder; killed, it goes on")
    parser.add_argument("input", help="folder, file or address of documents")
    parser.add_argument("corpus", help="folder of the corpus, which is built if it is not there")
    add_change_options(parser, has_datasets=False)
    parser.add_argument("--codec", default="int8", help="of a new corpus: float16, int8 or int4 (default: int8)")
    parser.add_argument(
        "--metadata", type=parse_metadata, default={}, metavar="NAME=TYPE,...", help="of a new corpus: Arrow types"
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="go on, looking so often (default: 1)"
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from .. import CompressedCorpus

    if arguments.dry_run:
        return _print_plan(arguments)
    if not CompressedCorpus.is_complete(arguments.corpus):
        status, corpus = _build(arguments), None
    else:
        status, corpus = _sync_once(arguments, None)
    while arguments.watch is not None:
        time.sleep(max(arguments.watch, 0.1))
        try:
            status, corpus = _sync_once(arguments, corpus, is_quiet=True)
        except Exception as error:  # a folder that is out of reach, another writer: the next look may be better
            print(f"clara sync: {one_line(error)}", file=sys.stderr)
    return status


def _build(arguments: argparse.Namespace) -> int:
    from .compress import build_corpus

    if arguments.model is None:
        raise ValueError(f"`--model` must be given, because there is no corpus in {arguments.corpus} yet. Add it.")
    options = {**change_options(arguments), "codec": arguments.codec, "metadata": arguments.metadata}
    return build_corpus(arguments, arguments.input, arguments.corpus, options)


def _print_plan(arguments: argparse.Namespace) -> int:
    from ..corpus.sync import plan_sync

    plan = plan_sync(Path(arguments.corpus), arguments.input)
    kinds = {
        "add": [file.name for file in plan.new],
        "update": [file.name for file in plan.changed],
        "delete": plan.gone,
        "keep": [file.name for file in plan.unchanged],
        "leave out": [file.name for file in plan.left_out],
    }
    if arguments.json:
        print(json.dumps({name.replace(" ", "_"): names for name, names in kinds.items()}, indent=2))
        return 0
    for kind, names in kinds.items():
        print(f"{kind:<10}{len(names):>8,} files")
        _print_names(names if kind in ("add", "update", "delete") else ())
    return 0


def _print_names(names: Sequence[str]) -> None:
    for name in names[:SHOWN]:
        print(f"    {one_line(name)}")
    if len(names) > SHOWN:
        print(f"    ... and {len(names) - SHOWN:,} more")


def _sync_once(arguments: argparse.Namespace, corpus, is_quiet: bool = False) -> tuple[int, object]:
    """Returns the exit status and the corpus, which is opened when it is first needed."""
    from ..corpus.formats import describe_missing
    from ..corpus.jobs import REJECTED_FILE
    from ..corpus.storage import read_lines
    from ..corpus.sync import plan_sync
    from ..manifest_clara import Manifest

    folder = Path(arguments.corpus)
    plan = plan_sync(folder, arguments.input)
    if not is_quiet and (missing := describe_missing(plan.left_out)):
        print(missing, file=sys.stderr)
    if plan.is_empty:
        manifest, rejected = Manifest.read(folder), read_lines(folder / REJECTED_FILE)
        if arguments.json and not is_quiet:
            report = {"added": 0, "deleted": 0, "unchanged": 0, "left_out": dict(count_statuses(rejected))}
            print(json.dumps({**report, "documents": manifest.n_documents}, indent=2), flush=True)
        elif not is_quiet:
            left_out = f"; {len(plan.left_out):,} files are left out" if plan.left_out else ""
            print(f"nothing has changed{left_out}", flush=True)
        return strict_status(arguments, rejected), corpus
    needs_model = bool(plan.new or plan.changed)
    if corpus is None or (needs_model and corpus.model is None):
        corpus = open_for_change(arguments, needs_model=needs_model)
    changes = corpus.sync(arguments.input, **change_options(arguments))
    print_changes(corpus, changes, arguments.json)
    return strict_status(arguments, read_lines(folder / REJECTED_FILE)), corpus
