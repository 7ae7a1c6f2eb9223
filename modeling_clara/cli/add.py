"""`clara add`: appends documents to a corpus; ids that are there already are left out."""

import argparse

from .changes import add_change_options, change_options, open_for_change, print_changes, strict_status


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("add", help="add documents to a corpus")
    parser.add_argument("corpus", help="folder of the corpus")
    parser.add_argument("input", help="documents, as for `clara compress`")
    add_change_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    corpus = open_for_change(arguments)
    changes = corpus.add(arguments.input, **change_options(arguments))
    print_changes(corpus, changes, arguments.json)
    return strict_status(arguments, changes.rejected)
