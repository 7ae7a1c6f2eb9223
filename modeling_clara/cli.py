"""The `clara` command: `clara compress`, `ask`, `info`, `convert` and `demo`.

Stands between a shell and the package: parses, calls, prints. Exit status 0 where all is well, 1 where something is
wrong, 2 for a wrong call.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from transformers.utils import logging as transformers_logging

DTYPES = ("float32", "bfloat16")
ABSTAINED = "(no document is near enough)"


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
    demo.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    demo.add_argument("--memory-size", type=int, help="memory vectors per document (default: the largest)")
    demo.add_argument("--all", action="store_true", help="ask all packaged questions and count the right answers")
    demo.set_defaults(run=run_demo)
    _add_compress(commands)
    _add_ask(commands)
    convert = commands.add_parser("convert", help="encode the memories of a corpus with another codec")
    convert.add_argument("corpus", help="folder of a corpus")
    convert.add_argument("--codec", required=True, help="float16, int8 or int4")
    convert.set_defaults(run=run_convert)
    info = commands.add_parser("info", help="describe a checkpoint or a corpus and check its files")
    info.add_argument("path", help="folder or Hub id of a checkpoint or a corpus")
    info.add_argument("--revision", help="branch, tag or commit of a Hub id")
    info.add_argument("--verify", action="store_true", help="read every byte of a corpus")
    info.set_defaults(run=run_info)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_compress(commands) -> None:
    compress = commands.add_parser("compress", help="compress documents into a corpus; killed, it goes on")
    add_build_options(compress)
    compress.add_argument("--shard", type=parse_job, default=(0, 1), metavar="I/N", help="do job I of N, I from 0")
    compress.set_defaults(run=run_compress)


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """The options of a build, as `build_options` reads them; recipes/compress.py has them too."""
    parser.add_argument(
        "input",
        help="folder of .txt and .md files, a .jsonl, .jsonl.gz or .parquet file or a folder of them, or the id of a "
        "data set on the Hub",
    )
    parser.add_argument("-o", "--output", required=True, help="folder of the corpus")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to compute in; bfloat16 is faster on some machines (default: float32 on CPU, else the backbone's)",
    )
    parser.add_argument("--codec", default="int8", help="float16, int8 or int4 (default: int8)")
    parser.add_argument("--memory-size", type=int, help="memory vectors that are stored (default: the largest)")
    parser.add_argument("--shard-size", type=int, default=1024, help="spans of a shard (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=16, help="documents per pass (default: 16)")
    parser.add_argument("--text-column", default="text", help="column of the text (default: text)")
    parser.add_argument("--title-column", default="title", help="column of the title (default: title)")
    parser.add_argument("--id-column", help="column of the id (default: id or document_id)")
    parser.add_argument("--split", default="train", help="of a data set on the Hub (default: train)")
    parser.add_argument("--config-name", help="of a data set on the Hub")
    parser.add_argument(
        "--metadata", type=_parse_metadata, default={}, metavar="NAME=TYPE,...", help="Arrow types of metadata columns"
    )
    parser.add_argument("--source", help="name or address of the text, for the card")
    parser.add_argument("--license", help="of the text, for the card, such as cc-by-sa-4.0")
    parser.add_argument("--language", help="of the text, for the card, such as en")


def build_options(arguments: argparse.Namespace) -> dict:
    """Keywords of `CompressedCorpus.build`."""
    names = ("codec", "memory_size", "shard_size", "batch_size", "metadata")
    columns = ("text_column", "title_column", "id_column", "split", "config_name")
    source = {"name": arguments.source, "license": arguments.license, "language": arguments.language}
    return {
        **{name: getattr(arguments, name) for name in (*names, *columns)},
        "source": {name: value for name, value in source.items() if value},
    }


def _parse_metadata(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and mark and kind for name, mark, kind in pairs):
        raise argparse.ArgumentTypeError(f"must be NAME=TYPE,..., such as year=int64, got {text!r}")
    return {name: kind for name, _, kind in pairs}


def _add_ask(commands) -> None:
    ask = commands.add_parser("ask", help="answer questions from a corpus")
    ask.add_argument("corpus", help="folder or Hub id of a corpus")
    ask.add_argument("question", nargs="+", help="one or several questions, each in quotes")
    ask.add_argument("--model", help="checkpoint folder or Hub id (default: the one that made the corpus)")
    ask.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    ask.add_argument("--revision", help="branch, tag or commit of the corpus on the Hub")
    ask.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    ask.add_argument(
        "--expand", type=int, default=0, metavar="N", help="best sources that are read as text (default: 0)"
    )
    ask.add_argument("--memory-size", type=int, help="memory vectors that are read (default: all)")
    ask.add_argument(
        "--retrieval-memory-size", type=int, help="memory vectors that are compared (default: the model's)"
    )
    ask.add_argument(
        "--min-score", type=float, help="abstain where no document has this cosine (default: the model's; -1: never)"
    )
    ask.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (default: 64)")
    ask.add_argument("--where", type=json.loads, help='filter, such as \'{"year": {"$gte": 2020}}\'')
    ask.add_argument("--hybrid", action="store_true", help="also rank by BM25 over the text")
    ask.set_defaults(run=run_ask)


def parse_job(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(number), int(total)


def load_model(name: str, **kwargs):
    """A checkpoint, on a GPU where there is one."""
    import torch

    from .modeling_clara import CLaRaForRAG

    return CLaRaForRAG.from_pretrained(name, device_map="cuda" if torch.cuda.is_available() else None, **kwargs)


def run_compress(arguments: argparse.Namespace) -> int:
    """`clara compress`; returns the exit status."""
    from .corpus_clara import CompressedCorpus

    model = load_model(arguments.model, backbone=arguments.backbone, dtype=arguments.dtype)
    transformers_logging.enable_progress_bar()
    options = build_options(arguments)
    corpus = CompressedCorpus.build(model, arguments.input, arguments.output, job=arguments.shard, **options)
    report = {"path": arguments.output, "complete": corpus is not None}
    if corpus is not None:
        manifest = corpus.manifest
        report |= {"documents": len(corpus), "spans": manifest.n_spans, "rejected": manifest.n_rejected}
        report |= {"codec": manifest.codec, "bytes": sum(shard.n_bytes for shard in manifest.shards)}
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    elif corpus is None:
        print(f"job {arguments.shard[0]} of {arguments.shard[1]} is done; the corpus is complete when all are")
    else:
        print(
            f"{report['documents']:,} documents, {report['spans']:,} spans, {report['bytes'] / 1e6:,.1f} MB as "
            f"{report['codec']} in {arguments.output}"
        )
        if report["rejected"]:
            print(f"{report['rejected']} rows were left out: see {arguments.output}/rejected.jsonl")
    return 0


def run_ask(arguments: argparse.Namespace) -> int:
    """`clara ask`; returns the exit status."""
    from .corpus_clara import CompressedCorpus

    corpus = CompressedCorpus.open(arguments.corpus, arguments.revision)
    compressor = corpus.manifest.compressor
    name = arguments.model or compressor.get("name_or_path")
    if not name:
        raise ValueError("`--model` must be given, because corpus.json does not name the compressor. Add it.")
    revision = None if arguments.model else compressor.get("revision")
    model = load_model(name, revision=revision, backbone=arguments.backbone)
    corpus = corpus.attach(model).with_options(where=arguments.where, hybrid=arguments.hybrid)
    start = time.perf_counter()
    answers = model.answer(
        arguments.question,
        corpus=corpus,
        top_k=arguments.top_k,
        memory_size=arguments.memory_size,
        retrieval_memory_size=arguments.retrieval_memory_size,
        min_score=arguments.min_score,
        max_new_tokens=arguments.max_new_tokens,
        expand=arguments.expand,
    )
    answer_ms = 1e3 * (time.perf_counter() - start)
    rows = [
        {"question": question, "answer": answer.text, "abstained": answer.abstained}
        | {"prompt_tokens": answer.prompt_tokens, "sources": [asdict(source) for source in answer.sources]}
        for question, answer in zip(arguments.question, answers, strict=True)
    ]
    if arguments.json:
        print(json.dumps({"answers": rows, "answer_ms": answer_ms}, indent=2, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"{row['question']}\n  {ABSTAINED if row['abstained'] else _short(row['answer'])}")
        for source in row["sources"]:
            print(f"  {source['score']:.3f}  {source['read_as']:<6}  {source['document_id']}  {source['title']}")
        print(f"  {row['prompt_tokens']:,} prompt tokens")
    print(f"retrieved and answered in {answer_ms:,.0f} ms")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """`clara convert`; returns the exit status."""
    from .corpus_clara import CompressedCorpus

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
        ask_all=arguments.all,
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
    right = report["right"]
    if right["questions"]:
        print(
            f"\nOf {right['questions']} questions with a known answer {right['memory']} answers from memory and "
            f"{right['text']} from text contain it"
            + (f"; from memory {right['refused']} were refused." if right["refused"] else ".")
        )
    return 0


def _print_result(result: dict) -> None:
    memory, text = result["memory"], result["text"]
    total = memory["retrieve_ms"] + memory["first_token_ms"]
    print(f"\n{result['question']}")
    print(f"  from memory  {ABSTAINED if memory['abstained'] else _short(memory['answer'])}")
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
    from .info import describe_checkpoint, describe_corpus, find_corpus

    corpus = find_corpus(arguments.path, arguments.revision)
    if corpus is not None:
        report = describe_corpus(corpus, arguments.verify)
        problems = report["problems"]
    else:
        report = describe_checkpoint(arguments.path, revision=arguments.revision)
        problems = [report["problem"]] if report["problem"] else []
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for name, value in report.items():
            if name not in ("problem", "problems"):
                print(f"{name:<24}{value}")
        for problem in problems:
            print(f"problem: {problem}")
        if not problems:
            print("every byte is right" if corpus and arguments.verify else "all files are there and fit")
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError, ImportError) as error:
        if arguments.json:
            print(json.dumps({"problem": str(error)}, ensure_ascii=False))
        print(f"clara {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
