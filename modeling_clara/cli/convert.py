"""`clara convert`: the memories of a corpus in another codec, without compressing again."""

import argparse
import json

from .models import silence_libraries


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("convert", help="encode the memories of a corpus with another codec")
    parser.add_argument("corpus", help="folder of a corpus")
    parser.add_argument("--codec", required=True, help="float16, int8 or int4")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    silence_libraries()
    from transformers.utils import logging as transformers_logging

    from .. import CompressedCorpus

    corpus = CompressedCorpus.open(arguments.corpus)
    transformers_logging.enable_progress_bar()
    before = sum(shard.n_bytes for shard in corpus.manifest.shards)
    report = {"path": arguments.corpus, "codec_before": corpus.manifest.codec, "bytes_before": before}
    corpus.convert(arguments.codec)
    report |= {"codec": arguments.codec, "bytes": sum(shard.n_bytes for shard in corpus.manifest.shards)}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"{arguments.corpus}: {report['codec_before']}, {before / 1e6:,.1f} MB -> {report['codec']}, "
            f"{report['bytes'] / 1e6:,.1f} MB"
        )
    return 0
