"""`clara compress`: documents become a corpus; killed, the same command goes on.

recipes/compress.py has the same options, without `--rank` and `--world-size`: its cluster deals the ranks.
"""

import argparse
import json
import sys

from .changes import COLUMNS, add_column_options, describe_rejected, strict_status
from .models import add_model_options, load_model, show_progress


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("compress", help="compress documents into a corpus; killed, it goes on")
    add_build_options(parser)
    parser.add_argument("--rank", type=int, default=0, help="number of this process, from 0 (default: 0)")
    parser.add_argument("--world-size", type=int, default=1, help="processes that share the documents (default: 1)")
    parser.add_argument("--strict", action="store_true", help="status 1 if anything could not be read")
    parser.add_argument("--shard", type=_parse_shard, help=argparse.SUPPRESS)  # I/N, the old form of the two
    parser.set_defaults(run=run)
    return parser


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """The options of a build, as `build_options` reads them; recipes/compress.py has them too."""
    parser.add_argument(
        "input",
        help="folder or file of documents (text, HTML, PDF, Word, PowerPoint, EPUB, Excel, CSV, JSON, Parquet), an "
        "address such as s3://bucket/folder, or the id of a data set on the Hub",
    )
    parser.add_argument("-o", "--output", required=True, help="folder of the corpus")
    add_model_options(parser, model="")
    parser.add_argument("--codec", default="int8", help="float16, int8 or int4 (default: int8)")
    parser.add_argument("--memory-size", type=int, help="memory vectors that are stored (default: the largest)")
    parser.add_argument("--shard-size", type=int, default=1024, help="chunks of a shard (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=16, help="documents per pass (default: 16)")
    add_column_options(parser)
    parser.add_argument(
        "--metadata", type=parse_metadata, default={}, metavar="NAME=TYPE,...", help="Arrow types of metadata columns"
    )
    parser.add_argument("--source", help="name or address of the text, for the card")
    parser.add_argument("--license", help="of the text, for the card, such as cc-by-sa-4.0")
    parser.add_argument("--language", help="of the text, for the card, such as en")


def build_options(arguments: argparse.Namespace) -> dict:
    """Keywords of `CompressedCorpus.build`."""
    names = ("codec", "memory_size", "shard_size", "batch_size", "metadata")
    source = {"name": arguments.source, "license": arguments.license, "language": arguments.language}
    options = {name: getattr(arguments, name) for name in (*names, *COLUMNS)}
    return options | {"source": {name: value for name, value in source.items() if value}}


def parse_metadata(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and mark and kind for name, mark, kind in pairs):
        raise argparse.ArgumentTypeError(f"must be NAME=TYPE,..., such as year=int64, got {text!r}")
    return {name: kind for name, _, kind in pairs}


def _parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(number), int(total)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    rank, world_size = arguments.shard or (arguments.rank, arguments.world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"`--rank` must be from 0 to `--world-size` - 1 ({world_size - 1}), got {rank}. Correct one.")
    options = build_options(arguments) | {"rank": rank, "world_size": world_size}
    return build_corpus(arguments, arguments.input, arguments.output, options)


def build_corpus(arguments: argparse.Namespace, documents: str, folder: str, options: dict) -> int:
    """Build a corpus and say what it is; returns the exit status."""
    from .. import CompressedCorpus
    from ..corpus.sources import check_location
    from ..corpus.storage import read_lines
    from .info import measure_text, readable_bytes

    check_location(documents)
    model = load_model(arguments.model, backbone=arguments.backbone, dtype=arguments.dtype)
    show_progress()
    try:
        corpus = CompressedCorpus.build(model, documents, folder, **options)
    except KeyboardInterrupt:
        print("What is compressed is kept: the same command goes on from there.", file=sys.stderr)
        raise
    if corpus is None:
        report = {"path": folder, "complete": False}
        text = f"rank {options['rank']} of {options['world_size']} is done; the corpus is complete when all are"
        print(json.dumps(report, indent=2) if arguments.json else text)
        return 0
    manifest, rejected = corpus.manifest, read_lines(corpus.folder / "rejected.jsonl")
    report = {"path": folder, "complete": True}
    report |= {"documents": len(corpus), "spans": manifest.n_spans, "rejected": manifest.n_rejected}
    report |= {"codec": manifest.codec, "bytes": sum(shard.n_bytes for shard in manifest.shards)}
    report |= measure_text(corpus.folder, manifest)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return strict_status(arguments, rejected)
    n_files = manifest.build.get("input", {}).get("files")
    of_files = f" of {n_files:,} files" if n_files else ""
    text, memories = report["text_bytes"], report["memory_bytes"]
    times = f", {memories / text:.1f} times the text" if text else ""
    print(f"{report['documents']:,} documents{of_files}, {report['spans']:,} chunks in {folder}")
    print(f"{report['tokens']:,} tokens, {readable_bytes(text)} of text")
    print(f"memories {readable_bytes(memories)} as {report['codec']}{times}")
    if rejected:
        print(f"left out: {describe_rejected(rejected)}; see {folder}/rejected.jsonl")
    return strict_status(arguments, rejected)
