"""`clara convert`: the memories of a corpus in another codec, without compressing again."""

import argparse
import json

from .models import show_progress


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("convert", help="encode the memories of a corpus with another codec")
    parser.add_argument("corpus", help="folder of a corpus")
    parser.add_argument("--codec", required=True, help="float16, int8 or int4")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from .. import CompressedCorpus

    corpus = CompressedCorpus.open(arguments.corpus)
    show_progress()
    before = sum(shard.n_bytes for shard in corpus.manifest.shards)
    report = {"path": arguments.corpus, "codec_before": corpus.manifest.codec, "bytes_before": before}
    corpus.convert(arguments.codec)
    after = sum(shard.n_bytes for shard in corpus.manifest.shards)
    report |= {"codec": arguments.codec, "bytes": after}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        sizes = f"{before / 1e6:,.1f} MB -> {arguments.codec}, {after / 1e6:,.1f} MB"
        print(f"{arguments.corpus}: {report['codec_before']}, {sizes}")
    return 0
