"""`clara update`: puts documents in place of those with the same ids; new ids are added with `--upsert`."""

import argparse

from .changes import add_change_options, change_options, open_for_change, print_changes, strict_status


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("update", help="replace documents of a corpus by their ids")
    parser.add_argument("corpus", help="folder of the corpus")
    parser.add_argument("input", help="documents with ids, as for `clara compress`")
    add_change_options(parser)
    parser.add_argument("--upsert", action="store_true", help="add new ids, leave equal documents as they are")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    corpus = open_for_change(arguments)
    change = corpus.upsert if arguments.upsert else corpus.update
    changes = change(arguments.input, **change_options(arguments))
    print_changes(corpus, changes, arguments.json)
    return strict_status(arguments, changes.rejected)
