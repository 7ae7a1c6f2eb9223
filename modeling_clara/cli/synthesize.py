"""`clara synthesize`: a language model makes training data of documents; killed, the same command goes on."""

import argparse
import json
import sys

from .changes import COLUMNS, add_column_options
from .models import show_progress

TASKS = ("scp", "instruct", "retrieval")


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("synthesize", help="make training data of documents with a language model")
    add_run_options(parser)
    parser.add_argument("--preview", type=int, nargs="?", const=3, metavar="N", help="show what N chunks become (3)")
    parser.add_argument("--dry-run", action="store_true", help="estimate calls, tokens and cost; no call is made")
    parser.add_argument("--rank", type=int, default=0, help="number of this process, from 0 (default: 0)")
    parser.add_argument("--world-size", type=int, default=1, help="processes that share the documents (default: 1)")
    parser.add_argument("--strict", action="store_true", help="status 1 if anything could not be read")
    parser.set_defaults(run=run)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run; recipes/synthesize.py has them too."""
    parser.add_argument("input", help="documents, as `clara compress` takes them")
    parser.add_argument("-o", "--output", help="a folder, for Parquet and a card, or a file that ends in .jsonl")
    parser.add_argument(
        "--task", choices=TASKS, default="scp", help="scp: stage 1; instruct: stage 2; retrieval: stage 3 (scp)"
    )
    parser.add_argument(
        "--model", required=True, help="name at the endpoint; or a GGUF file, or a transformers model, to run here"
    )
    parser.add_argument("--base-url", help="of an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable that holds its key (default: OPENAI_API_KEY)",
    )
    parser.add_argument("--device", help="of a transformers model")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at a time at most (default: 8)")
    parser.add_argument("--rounds", type=int, help="of questions about what none asks for yet, with --task scp (10)")
    parser.add_argument(
        "--set",
        dest="settings",
        type=parse_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the task, such as complex=0",
    )
    parser.add_argument("--tokenizer", help="folder or Hub id of your model or its backbone (default: count words)")
    parser.add_argument("--max-document-tokens", type=int, help="of a chunk (default: the model's, else 256)")
    parser.add_argument("--leakage", nargs="+", default=[], metavar="FILE", help="evaluation files to keep out")
    parser.add_argument("--max-tokens-total", type=int, help="tokens of all calls, those of earlier commands included")
    parser.add_argument("--max-cost", type=float, help="cost of all calls; needs --prices")
    parser.add_argument("--prices", metavar="FILE", help='{"MODEL": {"prompt": 0.1, "completion": 0.4}} a million')
    add_column_options(parser)
    parser.add_argument("--source", help="name or address of the documents, for the card")
    parser.add_argument("--license", help="of the documents, for the card, such as cc-by-sa-4.0")
    parser.add_argument("--language", help="of the documents, for the card, such as en")


def parse_setting(text: str) -> tuple[str, object]:
    name, mark, value = text.partition("=")
    if not (name and mark):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as complex=3, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    show_progress()
    if arguments.dry_run or arguments.preview is not None:
        return look(arguments)
    try:
        report = run_synthesis(arguments)
    except KeyboardInterrupt:
        print("What is done is kept: the same command goes on from there.", file=sys.stderr)
        raise
    if report is None:
        text = f"rank {arguments.rank} of {arguments.world_size} is done; the data are complete when all are"
        print(json.dumps({"path": arguments.output, "complete": False}, indent=2) if arguments.json else text)
        return 0
    report = {"path": arguments.output, "complete": True, **report}
    print(json.dumps(report, indent=2) if arguments.json else describe_report(report))
    left_out = report["rejects"].get("document", {})
    return int(arguments.strict and bool({"failed", "unsupported", "empty"} & left_out.keys()))


def look(arguments: argparse.Namespace) -> int:
    """`--dry-run` and `--preview`; returns the exit status."""
    from ..synthesis.preview import estimate, preview
    from ..synthesis.run import open_run

    opened = open_run(arguments.input, arguments.output or "new", **run_options(arguments))
    if arguments.dry_run:
        estimated = estimate(opened, read_prices(arguments))
        print(json.dumps(estimated, indent=2) if arguments.json else describe_estimate(estimated))
        return 0
    shown = preview(opened, lambda: open_teacher(arguments), arguments.preview)
    print(json.dumps(shown, indent=2, default=str) if arguments.json else "\n\n".join(map(describe_look, shown)))
    return 0


def run_synthesis(arguments: argparse.Namespace) -> dict | None:
    """`synthesize` with the options of the command; one rank of recipes/synthesize.py, too."""
    from ..synthesis.run import synthesize

    if not arguments.output:
        raise ValueError("`output` must name a folder or a .jsonl file, got none. Add -o NAME.")
    return synthesize(
        arguments.input,
        arguments.output,
        lambda: open_teacher(arguments),
        concurrency=arguments.concurrency,
        prices=read_prices(arguments),
        card=card_fields(arguments),
        **run_options(arguments),
    )


def run_options(arguments: argparse.Namespace) -> dict:
    """Keywords of `open_run`."""
    settings = dict(arguments.settings) | ({} if arguments.rounds is None else {"rounds": arguments.rounds})
    names = ("model", "task", "tokenizer", "max_document_tokens", "leakage", "rank", "world_size", *COLUMNS)
    return {"settings": settings} | {name: getattr(arguments, name) for name in names}


def card_fields(arguments: argparse.Namespace) -> dict:
    """What the card says of the documents."""
    fields = {"name": arguments.source, "license": arguments.license, "language": arguments.language}
    return {name: value for name, value in fields.items() if value}


def read_prices(arguments: argparse.Namespace) -> dict | None:
    """The prices of the model."""
    from ..synthesis.client import read_prices

    return read_prices(arguments.prices, arguments.model) if arguments.prices else None


def open_teacher(arguments: argparse.Namespace):
    """The teacher; of a budget every rank has its share."""
    from ..synthesis.backends import connect
    from ..synthesis.client import Teacher

    names = ("base_url", "api_key_env", "concurrency", "device")
    backend = connect(arguments.model, **{name: getattr(arguments, name) for name in names})
    tokens, cost, n = arguments.max_tokens_total, arguments.max_cost, arguments.world_size
    return Teacher(
        backend,
        arguments.model,
        concurrency=arguments.concurrency,
        max_tokens_total=None if tokens is None else tokens // n,
        max_cost=None if cost is None else cost / n,
        prices=read_prices(arguments),
    )


# --- what is printed -------------------------------------------------------------------------------------------------


def describe_report(report: dict) -> str:
    """A finished run for a person."""
    share = report["accepted"] / report["chunks"] if report["chunks"] else 0
    cost = f", cost {report['cost']:,.4f}" if "cost" in report else ""
    lines = [
        f"{report['accepted']:,} of {report['chunks']:,} chunks accepted ({share:.0%}), from {report['documents']:,} "
        f"documents, in {report['path']}",
        f"{report['calls']:,} calls, {report['prompt_tokens']:,} tokens read, {report['completion_tokens']:,} written"
        f"{cost}",
    ]
    for kind, reasons in report["rejects"].items():
        lines.append(f"rejected {kind}: " + ", ".join(f"{number:,} {reason}" for reason, number in reasons.items()))
    return "\n".join(lines)


def describe_estimate(estimated: dict) -> str:
    """An estimate for a person."""
    cost = f", cost {estimated['cost']:,.2f}" if "cost" in estimated else ""
    return (
        f"{estimated['documents']:,} documents, {estimated['chunks']:,} chunks\nabout {estimated['calls']:,} calls, "
        f"{estimated['prompt_tokens']:,} tokens read and {estimated['completion_tokens']:,} written{cost}"
    )


def describe_look(look: dict) -> str:
    """What became of a chunk, with all that was asked and answered."""
    from .terminal import without_controls

    parts = [f"=== {look['document']['id']}"]
    for call in look["calls"]:
        parts += [f"--- {message['role']}\n{message['content']}" for message in call["messages"]]
        parts.append(f"--- answer\n{call['answer']}")
    parts.append(f"--- record\n{json.dumps(look['record'], indent=2, ensure_ascii=False)}")
    parts += [f"rejected {reject['kind']}: {reject['reason']}" for reject in look["rejects"]]
    return without_controls("\n".join(parts))
