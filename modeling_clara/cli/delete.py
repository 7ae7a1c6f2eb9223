"""`clara delete`: deletes documents from a corpus by their ids."""

import argparse
import json


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("delete", help="delete documents of a corpus by their ids")
    parser.add_argument("corpus", help="folder of the corpus")
    parser.add_argument("ids", nargs="*", help="of documents, as `clara ask` prints them")
    parser.add_argument("--compact", action="store_true", help="also take their text out of the files, for good")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from .. import CompressedCorpus

    if not arguments.ids and not arguments.compact:
        raise ValueError("`ids` must be given, or `--compact` to take earlier ones out of the files. Add one.")
    corpus = CompressedCorpus.open(arguments.corpus)
    number = corpus.delete(arguments.ids) if arguments.ids else 0
    if arguments.compact:
        corpus.compact()
    if arguments.json:
        print(json.dumps({"deleted": number, "documents": len(corpus), "compacted": arguments.compact}))
        return 0
    print(f"{number:,} documents deleted; the corpus has {len(corpus):,}")
    if not arguments.compact:
        print("Their text stays in the files until `clara delete --compact`, or until the corpus is published.")
    return 0
