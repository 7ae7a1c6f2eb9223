"""`clara demo`: real passages are compressed, retrieved by a question and read, beside the same backbone on full text.

Stands on top of the public API, as a user's script would. It knows nothing of the model's inside but the role switch.
"""

import json
import re
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from .configuration_clara import CLaRaConfig
from .modeling_clara import CLaRaForRAG
from .smollm2 import fetch_backbone
from .sources_clara import TEXT_SUFFIXES, DocumentSource

PASSAGES = Path(__file__).parent / "data" / "demo_passages.jsonl"
# clara-pico, beside it, knows fact sheets only
TRAINED_MODEL = Path(__file__).parent.parent / "model_cards" / "clara-smollm2-135m"
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
FOLDER_QUESTION = "What is this text about?"
UNANSWERABLE = "Who wrote the novel Moby-Dick?"  # no packaged passage says it
MAX_NEW_TOKENS = 64
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def load_model(checkpoint: str | None, backbone: str | None) -> tuple[CLaRaForRAG, bool]:
    """A model for the demo, and whether its adapters are trained.

    Args:
        checkpoint: folder or Hub id; default model_cards/clara-smollm2-135m where it is and `backbone` is of its kind,
            else fresh adapters.
        backbone: folder or Hub id; default SmolLM2-135M-Instruct.
    """
    if checkpoint is not None:
        return CLaRaForRAG.from_pretrained(checkpoint, backbone=backbone), True
    if TRAINED_MODEL.is_dir() and (backbone is None or is_backbone_of(TRAINED_MODEL, backbone)):
        return CLaRaForRAG.from_pretrained(TRAINED_MODEL, backbone=backbone or fetch_backbone()), True
    torch.manual_seed(0)
    return CLaRaForRAG.from_backbone(backbone or fetch_backbone()), False


def is_backbone_of(checkpoint: Path, backbone: str) -> bool:
    """Whether a backbone has the shape of a checkpoint's own; loading tells whether the weights are the same."""
    own = CLaRaConfig.from_pretrained(checkpoint).text_config
    try:
        other = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError):  # who loads it says what is wrong
        return False
    return all(getattr(own, name) == getattr(other, name, None) for name in SHAPE)


def read_passages(folder: str | None) -> tuple[list[dict], list[dict], list[dict]]:
    """Passages, questions that come with them, and what was skipped.

    Args:
        folder: a folder of .txt and .md files, searched through; default the packaged passages.

    Returns:
        documents `{id, title, text}`, questions `{question, answers}`, rejected `{id, reason}`.

    Raises:
        ValueError: the folder is none, or holds no readable text.
    """
    if folder is None:
        rows = [json.loads(line) for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
        questions = [question for row in rows for question in row["questions"]]
        return [{key: row[key] for key in ("id", "title", "text")} for row in rows], questions, []
    if not Path(folder).is_dir():
        raise ValueError(
            f"`folder` must be a folder of {' or '.join(TEXT_SUFFIXES)} files, got {folder}. Name another one."
        )
    rows = list(DocumentSource(folder))
    documents = [{"id": row.place, **row.document} for row in rows if row.document is not None]
    rejected = [{"id": row.place, "reason": row.problem} for row in rows if row.document is None]
    if not documents:
        raise ValueError(
            f"`folder` must hold at least one readable {' or '.join(TEXT_SUFFIXES)} file, found {len(rejected)} "
            f"unreadable ones in {folder}. Name another folder."
        )
    return documents, [], rejected


def compress_documents(model: CLaRaForRAG, documents: Sequence[Mapping]) -> list[dict]:
    """Split documents into spans and store each span's memory; a span is a document of its own to the reader."""
    spans = [span for document in documents for span in model.processor.split_document(document)]
    with model.bulk_compression():
        memory = model.compress(spans)
    counts = {}
    for span in spans:
        counts[span["id"]] = counts.get(span["id"], 0) + 1
    for span, rows in zip(spans, memory, strict=True):
        span["memory"] = rows
        if counts[span["id"]] > 1:
            span["id"] = f"{span['id']}#{span['span']}"
    return spans


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer has a right one in it, word for word: `containment` of recipes/metrics/rag_answer.

    >>> contains_answer("It is in the Black Forest.", ["Black Forest"]), contains_answer("Newark", ["New"])
    (True, False)
    """
    said = f" {_words(text)} "
    return any(f" {words} " in said if words else not said.strip() for words in map(_words, answers))


def _words(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def answer_from_text(
    model: CLaRaForRAG, question: str, documents: Sequence[Mapping], max_new_tokens: int = MAX_NEW_TOKENS
) -> tuple[str, dict[str, float]]:
    """The plain backbone reads the text of the documents.

    Returns:
        The answer; `prompt_tokens`, `first_token_ms` and `decode_ms`.
    """
    prompt = model.processor.build_prompt(question, 0, model.config.max_memory_size, text_documents=documents)
    ids = torch.tensor([prompt.input_ids], device=model.memory_embeddings.device)
    generation = model.build_generation_config(None, max_new_tokens)
    model.check_window(len(prompt.input_ids) + max_new_tokens, "question", "Lower `top_k`.")
    first = model.build_generation_config(None, 1)
    with model.lock, model.roles.use(None), torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        start = time.perf_counter()
        model.backbone.generate(**inputs, generation_config=first)
        first_token = time.perf_counter() - start
        start = time.perf_counter()
        generated = model.backbone.generate(**inputs, generation_config=generation)
        whole = time.perf_counter() - start
    text = model.decode_answer(generated[0, ids.shape[1] :].tolist(), generation.eos_token_id)
    decode = max(whole - first_token, 0.0)
    return text, {"prompt_tokens": ids.shape[1], "first_token_ms": 1e3 * first_token, "decode_ms": 1e3 * decode}


def answer_from_memory(
    model: CLaRaForRAG, question: str, documents: Sequence[Mapping], *, top_k: int, memory_size: int | None
) -> tuple[object, dict[str, float]]:
    """The generator reads the memories of the best documents.

    Returns:
        The `Answer`; `prompt_tokens`, `retrieve_ms` (question encoded and documents ranked), `first_token_ms` and
        `decode_ms`.
    """
    start = time.perf_counter()
    stream = model.stream(question, documents=documents, top_k=top_k, memory_size=memory_size)
    marks = [time.perf_counter()]
    while True:
        try:
            next(stream)
            marks.append(time.perf_counter())
        except StopIteration as stop:
            marks.append(time.perf_counter())
            answer = stop.value
            break
    return answer, {
        "prompt_tokens": answer.prompt_tokens,
        "retrieve_ms": 1e3 * (marks[0] - start),
        "first_token_ms": 1e3 * (marks[1] - marks[0]),
        "decode_ms": 1e3 * (marks[-1] - marks[1]),
    }


def count_right(
    model: CLaRaForRAG, questions: Sequence[Mapping], spans: Sequence[Mapping], *, top_k: int, memory_size: int | None
) -> dict[str, int]:
    """Ask questions `{question, answers}` together, from memory and, with the same documents, from text.

    Returns:
        `questions`; `memory` and `text`: answers that contain a right one; `refused`: not answered from memory.
    """
    texts = [row["question"] for row in questions]
    answers = model.answer(texts, documents=spans, top_k=top_k, memory_size=memory_size, max_new_tokens=MAX_NEW_TOKENS)
    by_id, prompts, largest = {span["id"]: span for span in spans}, [], model.config.max_memory_size
    for text, sources in zip(texts, model.retrieve(texts, documents=spans, top_k=top_k), strict=True):
        read = [by_id[source.document_id] for source in sources]
        prompts.append(model.processor.build_prompt(text, 0, largest, text_documents=read))
        model.check_window(len(prompts[-1].input_ids) + MAX_NEW_TOKENS, text, "Lower `top_k`.")
    generation = model.build_generation_config(None, MAX_NEW_TOKENS)
    nothing = model.memory_embeddings.new_zeros(0, largest, model.config.text_config.hidden_size)
    with model.lock, torch.no_grad():
        plain = model.generate_texts(prompts, [nothing] * len(prompts), generation, role=None)
    pairs = {"memory": [answer.text for answer in answers], "text": plain}
    right = {
        reader: sum(contains_answer(text, row["answers"]) for text, row in zip(found, questions, strict=True))
        for reader, found in pairs.items()
    }
    return {"questions": len(questions), "refused": sum(answer.abstained for answer in answers), **right}


def run_demo(
    model: CLaRaForRAG,
    *,
    folder: str | None = None,
    questions: Sequence[str] = (),
    ask_all: bool = False,
    top_k: int | None = None,
    memory_size: int | None = None,
) -> dict:
    """Compress, ask, compare.

    Args:
        model: see `load_model`.
        folder: a folder of text; default the packaged passages.
        questions: default three of the packaged ones, and one that they do not answer where the model has a
            threshold (`config.min_score`); or one general question for a folder.
        ask_all: count the right answers to all packaged questions.
        top_k: documents read; default min(config.retrieval_top_k, documents).
        memory_size: memory vectors per document; default the largest.

    Returns:
        `passages`, `spans`, `tokens`, `memory_size`, `compress_ms`, `rejected` and, for every question,
        `results` with `question`, `right_answers`, `memory` and `text` (answer and times), `sources`, `tokens_saved`;
        `right`: of the packaged questions that were asked, as `count_right`.

    Raises:
        ValueError: `ask_all` with a folder.
    """
    if ask_all and folder is not None:
        raise ValueError(f"`ask_all` needs the packaged passages, got the folder {folder}. Leave one of them out.")
    documents, packaged, rejected = read_passages(folder)
    questions = list(questions) or _default_questions(packaged, model.config.min_score is not None)
    right_answers = {row["question"]: row["answers"] for row in packaged}
    largest = model.config.check_memory_size(memory_size)
    start = time.perf_counter()
    spans = compress_documents(model, documents)
    compress_ms = 1e3 * (time.perf_counter() - start)
    top_k = min(model.config.retrieval_top_k, len(spans)) if top_k is None else top_k
    by_id = {span["id"]: span for span in spans}
    results = []
    for question in questions:
        answer, times = answer_from_memory(model, question, spans, top_k=top_k, memory_size=memory_size)
        sources = answer.sources or model.retrieve([question], documents=spans, top_k=top_k)[0]
        text_answer, text_times = answer_from_text(model, question, [by_id[source.document_id] for source in sources])
        results.append(
            {
                "question": question,
                "right_answers": right_answers.get(question, []),
                "memory": {"answer": answer.text, "abstained": answer.abstained, **times},
                "text": {"answer": text_answer, **text_times},
                "sources": [
                    {"document_id": source.document_id, "title": source.title, "score": source.score}
                    for source in sources
                ],
                "tokens_saved": text_times["prompt_tokens"] - times["prompt_tokens"],
            }
        )
    sizes = {"top_k": top_k, "memory_size": memory_size}
    return {
        "passages": len(documents),
        "spans": len(spans),
        "tokens": sum(span["n_tokens"] for span in spans),
        "memory_size": largest,
        "compress_ms": compress_ms,
        "rejected": rejected,
        "results": results,
        "right": count_right(model, packaged, spans, **sizes) if ask_all else _right_among(results),
    }


def _default_questions(packaged: Sequence[Mapping], can_refuse: bool) -> list[str]:
    if not packaged:
        return [FOLDER_QUESTION]
    return [row["question"] for row in packaged[:: len(packaged) // 3][:3]] + [UNANSWERABLE] * can_refuse


def _right_among(results: Sequence[Mapping]) -> dict[str, int]:
    """As `count_right`, of the results of questions whose answer is known."""
    known = [row for row in results if row["right_answers"]]
    right = {
        reader: sum(contains_answer(row[reader]["answer"], row["right_answers"]) for row in known)
        for reader in ("memory", "text")
    }
    return {"questions": len(known), "refused": sum(row["memory"]["abstained"] for row in known), **right}
