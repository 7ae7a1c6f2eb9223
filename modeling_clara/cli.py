"""The `clara` command: `clara demo` and `clara info`.

Stands between a shell and the package: parses, calls, prints. Exit status 0 where all is well, 1 where something is
wrong, 2 for a wrong call.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="clara", description="Documents compressed into memory tokens, and asked.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="compress passages, ask, and compare with reading the full text")
    demo.add_argument("folder", nargs="?", help="folder of .txt and .md files (default: packaged passages)")
    demo.add_argument("-q", "--question", action="append", default=[], help="a question; may be given several times")
    demo.add_argument(
        "--model", help="checkpoint folder or Hub id (default: clara-smollm2-135m in model_cards/, else untrained)"
    )
    demo.add_argument("--backbone", help="backbone folder or Hub id (default: SmolLM2-135M-Instruct)")
    demo.add_argument("--top-k", type=int, help="documents that are read (default: 5)")
    demo.add_argument("--memory-size", type=int, help="memory vectors per document (default: the largest)")
    demo.set_defaults(run=run_demo)
    info = commands.add_parser("info", help="describe a checkpoint and check its files")
    info.add_argument("path", help="checkpoint folder or Hub id")
    info.add_argument("--revision", help="branch, tag or commit of a Hub id")
    info.set_defaults(run=run_info)
    for command in (demo, info):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run_demo(arguments: argparse.Namespace) -> int:
    """`clara demo`; returns the exit status."""
    from .demo import load_model
    from .demo import run_demo as run

    model, is_trained = load_model(arguments.model, arguments.backbone)
    transformers_logging.enable_progress_bar()
    report = {"trained": is_trained}
    report |= run(
        model,
        folder=arguments.folder,
        questions=arguments.question,
        top_k=arguments.top_k,
        memory_size=arguments.memory_size,
    )
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    rate = 1e3 * report["tokens"] / report["compress_ms"]
    print(
        f"{report['passages']} passages ({report['spans']} spans, {report['tokens']:,} tokens) compressed into "
        f"{report['memory_size']} memory tokens each in {report['compress_ms'] / 1e3:.1f} s ({rate:,.0f} tokens/s)"
    )
    for row in report["rejected"]:
        print(f"  skipped {row['id']}: {row['reason']}")
    if not report["trained"]:
        print("The adapters are untrained: answers from memory are not meaningful yet. Times and sizes are.")
    for result in report["results"]:
        _print_result(result)
    return 0


def _print_result(result: dict) -> None:
    memory, text = result["memory"], result["text"]
    total = memory["retrieve_ms"] + memory["first_token_ms"]
    print(f"\n{result['question']}")
    print(f"  from memory  {_short(memory['answer'])}")
    print(
        f"               {memory['prompt_tokens']} prompt tokens | encode + search {memory['retrieve_ms']:.0f} ms | "
        f"read {memory['first_token_ms']:.0f} ms | decode {memory['decode_ms']:.0f} ms"
    )
    print(f"  from text    {_short(text['answer'])}")
    print(
        f"               {text['prompt_tokens']} prompt tokens | read {text['first_token_ms']:.0f} ms | "
        f"decode {text['decode_ms']:.0f} ms"
    )
    print(
        f"  {result['tokens_saved']} prompt tokens saved, first token "
        f"{text['first_token_ms'] / total:.1f} times sooner"
    )
    for source in result["sources"]:
        print(f"  {source['score']:.3f}  {source['document_id']}  {source['title']}")


def _short(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return (text if len(text) <= limit else text[: limit - 3] + "...") or "(nothing)"


def run_info(arguments: argparse.Namespace) -> int:
    """`clara info`; returns the exit status."""
    from .info import describe_checkpoint

    report = describe_checkpoint(arguments.path, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for name, value in report.items():
            if name != "problem":
                print(f"{name:<24}{value}")
        print(f"problem: {report['problem']}" if report["problem"] else "all files are there and fit")
    return 1 if report["problem"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if arguments.json:
            print(json.dumps({"problem": str(error)}, ensure_ascii=False))
        print(f"clara {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
