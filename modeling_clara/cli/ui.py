"""`clara ui`: a page over a corpus, on which questions are asked and own files are compressed."""

import argparse
import json

from .demo import PASSAGES, UNANSWERABLE
from .models import add_hybrid_option, add_model_options, load_model_of, with_hybrid

N_EXAMPLES, LONGEST = 4, 60  # longer ones are cut on the page


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("ui", help="a page in the browser: ask a corpus, see what was read and what it cost")
    parser.add_argument("corpus", help="folder or Hub id of a corpus")
    add_model_options(parser, model=" (default: the one that made the corpus)")
    parser.add_argument("--revision", help="branch, tag or commit of the corpus on the Hub")
    add_hybrid_option(parser)
    parser.add_argument("--host", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--example", action="append", default=[], help="a question on offer; may be given several times"
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from .. import CompressedCorpus

    try:
        from ..service.page import build_page, serve
    except ImportError as error:
        raise ImportError(
            f"the page needs gradio: pip install 'gradio>=6,<7', or the extra `ui` from a clone of the repository "
            f"({error})."
        ) from error
    corpus = CompressedCorpus.open(arguments.corpus, arguments.revision)
    model = load_model_of(corpus, arguments.model, arguments.backbone, dtype=arguments.dtype)
    corpus = with_hybrid(corpus.attach(model), arguments.hybrid)
    name = arguments.corpus.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    app = build_page(model, corpus, name=name, examples=arguments.example or example_questions(corpus))

    def show_address(url: str) -> None:
        print(json.dumps({"url": url}) if arguments.json else f"{url}    (Ctrl-C ends it)", flush=True)

    serve(app, show_address, server_name=arguments.host, server_port=arguments.port)
    return 0


def example_questions(corpus) -> list[str]:
    """Questions on offer: those of the packaged passages if the corpus has them, else one for each first title."""
    from ..corpus.storage import read_lines

    packaged = [row["questions"][0]["question"] for row in read_lines(PASSAGES) if row["id"] in corpus]
    known = [question for question in packaged if len(question) < LONGEST]
    if known:
        return [*known[:: max(1, len(known) // N_EXAMPLES)][:N_EXAMPLES], UNANSWERABLE]
    titles = dict.fromkeys(row["title"] for row, _ in zip(corpus.rows(["title"]), range(50), strict=False))
    questions = [f"What is said about {title}?" for title in titles if title]
    return [question for question in questions if len(question) < LONGEST][:N_EXAMPLES]
