"""`clara ask`: answers questions from a corpus, with the model that made it unless told otherwise."""

import argparse
import json
import time
from dataclasses import asdict

from .models import load_model_of

ABSTAINED = "(no document is near enough)"
CALL_OPTIONS = ("top_k", "memory_size", "retrieval_memory_size", "min_score", "max_new_tokens", "expand")


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("ask", help="answer questions from a corpus")
    parser.add_argument("corpus", help="folder or Hub id of a corpus")
    parser.add_argument("question", nargs="+", help="one or several questions, each in quotes")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the one that made the corpus)")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of the corpus on the Hub")
    parser.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    parser.add_argument(
        "--expand", type=int, default=0, metavar="N", help="best sources that are read as text (default: 0)"
    )
    parser.add_argument("--memory-size", type=int, help="memory vectors that are read (default: all)")
    parser.add_argument(
        "--retrieval-memory-size", type=int, help="memory vectors that are compared (default: the model's)"
    )
    parser.add_argument(
        "--min-score", type=float, help="abstain if no document has this cosine (default: the model's; -1: never)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (default: 64)")
    parser.add_argument("--where", type=_parse_filter, help='filter, such as \'{"year": {"$gte": 2020}}\'')
    parser.add_argument("--hybrid", action="store_true", help="also rank by BM25 over the text")
    parser.set_defaults(run=run)
    return parser


def _parse_filter(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"year": 2020}}, got {text!r}')
    return value


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from .. import CompressedCorpus

    corpus = CompressedCorpus.open(arguments.corpus, arguments.revision)
    model = load_model_of(corpus, arguments.model, arguments.backbone)
    corpus = corpus.attach(model).with_options(where=arguments.where, hybrid=arguments.hybrid)
    options = {name: getattr(arguments, name) for name in CALL_OPTIONS}
    start = time.perf_counter()
    answers = model.answer(arguments.question, corpus=corpus, **options)
    answer_ms = 1e3 * (time.perf_counter() - start)
    if arguments.json:
        rows = [
            {"question": question, "answer": answer.text, "abstained": answer.abstained}
            | {"prompt_tokens": answer.prompt_tokens, "sources": [asdict(source) for source in answer.sources]}
            for question, answer in zip(arguments.question, answers, strict=True)
        ]
        print(json.dumps({"answers": rows, "answer_ms": answer_ms}, indent=2))
        return 0
    for question, answer in zip(arguments.question, answers, strict=True):
        print(f"{question}\n  {ABSTAINED if answer.abstained else one_line(answer.text)}")
        for source in answer.sources:
            print(f"  {source.score:.3f}  {source.read_as:<6}  {source.document_id}  {source.title}")
        print(f"  {answer.prompt_tokens:,} prompt tokens")
    print(f"retrieved and answered in {answer_ms:,.0f} ms")
    return 0


def one_line(text: str, limit: int = 200) -> str:
    """The text for a terminal."""
    text = " ".join(text.split())
    return (text if len(text) <= limit else text[: limit - 3] + "...") or "(nothing)"
