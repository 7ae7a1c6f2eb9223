"""`clara ask`: answers questions from a corpus, with the model that made it unless told otherwise.

Without a question it is a chat: one question a line, from the keyboard or from a pipe. The model is loaded once.
"""

import argparse
import contextlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from .errors import describe_error
from .models import add_hybrid_option, add_model_options, load_model_of, with_hybrid
from .terminal import Screen, one_line

if TYPE_CHECKING:
    from .. import Answer, Source

ABSTAINED = "(no document is near enough)"
NOTHING = "(nothing)"
UNSURE = 0.7  # `Answer.confidence` below which the text is read; docs/experiments.md, "How sure an answer is"
CALL_OPTIONS = ("top_k", "memory_size", "retrieval_memory_size", "min_score", "max_new_tokens")
PLACES = ("page", "sheet", "section")  # metadata that says where in a document a source stands
PROMPT, QUIT = "> ", "/quit"


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("ask", help="answer questions from a corpus; without a question, a chat")
    parser.add_argument("corpus", help="folder or Hub id of a corpus")
    parser.add_argument(
        "question",
        nargs="*",
        help="one or several questions, each in quotes; without one, every line of the input is a question, until an "
        f"empty line, {QUIT} or Ctrl-D",
    )
    add_model_options(parser, model=" (default: the one that made the corpus)")
    parser.add_argument("--revision", help="branch, tag or commit of the corpus on the Hub")
    parser.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    add_expand_options(parser)
    parser.add_argument("--memory-size", type=int, help="memory vectors that are read (default: all)")
    parser.add_argument(
        "--retrieval-memory-size", type=int, help="memory vectors that are compared (default: the model's)"
    )
    parser.add_argument(
        "--min-score", type=float, help="abstain if no document has this cosine (default: the model's; -1: never)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (default: 64)")
    parser.add_argument("--where", type=_parse_filter, help='filter, such as \'{"year": {"$gte": 2020}}\'')
    add_hybrid_option(parser)
    parser.set_defaults(run=run)
    return parser


def add_expand_options(parser: argparse.ArgumentParser) -> None:
    """What is read as text. Unless told otherwise an answer that memories leave unsure is read again from the text."""
    parser.add_argument(
        "--expand",
        type=int,
        metavar="N",
        help="best sources that are read as text: 1 in any case, 0 never (default: 1, where --expand-below says so)",
    )
    parser.add_argument(
        "--expand-below",
        type=float,
        metavar="P",
        help="read the text only where the answer from memory has a confidence below P, or the text is no longer than "
        f"its memory (default: {UNSURE}, unless --expand is given)",
    )


def expanding(arguments: argparse.Namespace) -> dict:
    """`expand` and `expand_below` of a call, from the options of `add_expand_options`."""
    expand, below = arguments.expand, arguments.expand_below
    if expand is None:
        return {"expand": 1, "expand_below": UNSURE if below is None else below}
    return {"expand": expand, "expand_below": below}


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
    model = load_model_of(corpus, arguments.model, arguments.backbone, dtype=arguments.dtype)
    corpus = with_hybrid(corpus.attach(model), arguments.hybrid).with_options(where=arguments.where)
    options = {name: getattr(arguments, name) for name in CALL_OPTIONS} | expanding(arguments)
    if not arguments.question:
        return chat(model, corpus, options, arguments)
    start = time.perf_counter()
    answers = model.answer(arguments.question, corpus=corpus, **options)
    answer_ms = 1e3 * (time.perf_counter() - start)
    if arguments.json:
        rows = [_as_row(*pair) for pair in zip(arguments.question, answers, strict=True)]
        print(json.dumps({"answers": rows, "answer_ms": answer_ms}, indent=2, default=_json_value))
        return 0
    for question, answer in zip(arguments.question, answers, strict=True):
        said = ABSTAINED if answer.abstained else one_line(answer.text) or NOTHING
        Screen()(f"{one_line(question)}\n  {said}\n")
        print_sources(answer)
    print(f"retrieved and answered in {answer_ms:,.0f} ms")
    return 0


# --- the chat --------------------------------------------------------------------------------------------------------


def chat(model, corpus, options: dict, arguments: argparse.Namespace) -> int:
    """Answer a question a line; what is wrong with one does not end the chat, but the exit status is then 1."""
    is_keyboard, status = sys.stdin.isatty(), 0
    if is_keyboard:
        print(f"{len(corpus):,} documents. An empty line ends the chat.", file=sys.stderr)
    for question in read_questions(is_keyboard):
        if not (is_keyboard or arguments.json):  # nobody has seen it typed
            Screen()(f"{question}\n")
        try:
            with interruptible() as is_asked_to_stop:
                _answer_in_chat(model, corpus.refresh(), question, options, arguments.json, is_asked_to_stop)
        except KeyboardInterrupt:
            if not is_keyboard:
                raise
            print("\n(stopped)", file=sys.stderr)
        except BrokenPipeError:
            raise
        except Exception as error:
            message, status = describe_error(error, arguments.parser), 1
            if arguments.json:
                print(json.dumps({"question": question, "problem": message}), flush=True)
            print(f"clara ask: {message}", file=sys.stderr)
    return status


def read_questions(is_keyboard: bool) -> Iterator[str]:
    """Lines up to the end or `QUIT`. At a keyboard an empty one is the end too; in a pipe it is skipped."""
    if is_keyboard:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, the import gives `input` its editing and history
    while True:
        try:
            if is_keyboard and not sys.stdout.isatty():  # the answers go elsewhere, the prompt does not
                print(PROMPT, end="", file=sys.stderr, flush=True)
            question = input(PROMPT if is_keyboard and sys.stdout.isatty() else "").strip()
        except EOFError:
            if is_keyboard:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_keyboard:
                raise
            print(file=sys.stderr)  # as in a shell: a new line to type on
            continue
        if question == QUIT or (is_keyboard and not question):
            return
        if question:
            yield question


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Context: Ctrl-C sets this event; it raises `KeyboardInterrupt` only when pressed again.

    Raised at once it may come between taking the model's lock and noting so, and every later question would wait.
    """
    is_asked = threading.Event()

    def handle(*_):
        if is_asked.is_set():
            raise KeyboardInterrupt
        is_asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield is_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _answer_in_chat(
    model, corpus, question: str, options: dict, as_json: bool, is_asked_to_stop: threading.Event
) -> None:
    """Print an answer as it comes, and its sources; with `as_json` one line. Stopped, a `KeyboardInterrupt`."""
    start, is_started = time.perf_counter(), False
    stream = model.stream(question, corpus=corpus, **options)
    screen = Screen(hanging=0)
    with contextlib.closing(stream):  # the generator's thread ends as well
        while True:
            try:
                piece = next(stream)
            except StopIteration as stop:
                answer, piece = stop.value, None
            if is_asked_to_stop.is_set():
                raise KeyboardInterrupt
            if piece is None:
                break
            if not as_json:
                screen(("" if is_started else "  ") + piece.replace("\n", " "))
                is_started = True
    if as_json:
        row = _as_row(question, answer) | {"answer_ms": 1e3 * (time.perf_counter() - start)}
        print(json.dumps(row, default=_json_value), flush=True)
        return
    screen("\n" if is_started else f"  {ABSTAINED if answer.abstained else NOTHING}\n")
    print_sources(answer)


# --- what is shown ---------------------------------------------------------------------------------------------------


def print_sources(answer: "Answer") -> None:
    """A line for each source, best first, how sure the answer is, and what was read; or how to get an answer."""
    screen = Screen()
    if answer.abstained:
        screen("  --min-score -1 answers in any case\n")
    for source in answer.sources:
        screen(f"  {source.score:.3f}  {source.read_as:<6}  {name_place(source)}  {one_line(source.title)}\n")
    sure = "" if answer.confidence is None else f"confidence {answer.confidence:.2f}, "
    print(f"  {sure}{answer.prompt_tokens:,} prompt tokens")


def name_place(source: "Source") -> str:
    """The document's id, and where in the document the source stands, as far as the corpus knows more than the id.

    "report.pdf, page 3" of `report.pdf` with the metadata `{"page": 3}`; "report.pdf#page=3" says it already.
    """
    known = [(name, source.metadata.get(name)) for name in PLACES]
    more = [
        f"{name} {value}"
        for name, value in known
        if value not in (None, "") and not re.search(rf"{name}\W?{re.escape(str(value))}(?!\w)", source.document_id)
    ]
    return one_line(", ".join([source.document_id, *more]))


def _as_row(question: str, answer: "Answer") -> dict:
    return {
        "question": question,
        "answer": answer.text,
        "abstained": answer.abstained,
        "confidence": answer.confidence,
        "prompt_tokens": answer.prompt_tokens,
        "sources": [asdict(source) for source in answer.sources],
    }


def _json_value(value) -> str:
    """Metadata that JSON has no type for, such as times: ISO text, or what Python prints."""
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
