"""Hard negatives: the documents that a trained reasoner takes for the best, and that are not gold.

    python -m recipes.mine rows.jsonl --model CHECKPOINT --memories FOLDER --output hard.jsonl

Rows are `{question, answers, docs, pos_index}`, for a stage that compresses its candidates in every step and has time
for a few documents a row. All short documents of the rows are searched. A document that has one of the answers word
for word is no negative, since it may well be right.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.cli import DTYPES, weight_options
from modeling_clara.cli.console import allow_any_console
from modeling_clara.corpus.storage import write_lines
from recipes.spaces.metrics.rag_answer.rag_answer import answer_words, contains_run
from recipes.training.data import BadRow, convert_rows, document_key, in_steps, read_documents, read_positives
from recipes.training.memories import open_or_compress

SEED = 42
QUESTIONS_AT_A_TIME = 64
SEARCHED = 30  # documents of a question, among which the negatives are looked for
TELL_NOTHING = ([], ["yes"], ["no"])  # answers that stand in texts which have nothing to do with the question


def read_questions(paths: Sequence[str]) -> Iterator[dict]:
    """Rows `{question, answers, docs, pos_index}` with a gold document, of all files."""
    return convert_rows(paths, to_question)


def to_question(row: Mapping) -> dict:
    documents = read_documents(row)
    positives = read_positives(row, len(documents))
    if not positives or not row.get("question") or not row.get("answers"):
        raise BadRow("must have `question`, `answers` and gold documents in `pos_index`")
    return {"question": row["question"], "answers": row["answers"], "docs": documents, "pos_index": positives}


def mine(
    model: CLaRaForRAG,
    rows: Sequence[Mapping],
    folder: Path,
    *,
    num_documents: int,
    max_words: int,
    single_share: float | None = None,
    batch_size: int = 16,
) -> list[dict]:
    """Rows of gold documents and the hardest others, at random places.

    Args:
        model: whose compressor and reasoner choose.
        rows: as `read_questions` yields them; those with a long gold document, or with too many, are left out, and a
            question that stands there twice is taken once.
        folder: of the memories, which a second run finds there.
        num_documents: of a row that comes out.
        max_words: of a document.
        single_share: rows with one gold document are thinned out to this share, of what is mined from; None keeps all.
        batch_size: documents in one pass.
    """

    def is_short(document: Mapping) -> bool:
        return len(document["text"].split()) <= max_words

    generator, mined = random.Random(SEED), []
    asked: dict[str, Mapping] = {}
    for row in rows:
        gold = [row["docs"][index] for index in row["pos_index"]]
        if len(gold) < num_documents and all(map(is_short, gold)):
            asked.setdefault(row["question"], row)
    rows = list(asked.values()) if single_share is None else with_singles(list(asked.values()), single_share)
    documents = {document_key(document): document for row in rows for document in row["docs"] if is_short(document)}
    if len(documents) < num_documents:
        return []
    chunks = [model.processor.split_document(document)[0] for document in documents.values()]  # the first ones alone
    chunks = [{"title": chunk["title"], "text": chunk["text"]} for chunk in chunks]
    keys = dict(zip(map(document_key, chunks), documents, strict=True))
    memories = open_or_compress(model, chunks, folder, batch_size)
    for start in range(0, len(rows), QUESTIONS_AT_A_TIME):
        block = rows[start : start + QUESTIONS_AT_A_TIME]
        questions = model.encode_queries(
            [row["question"] for row in block], memory_size=model.config.retrieval_memory_size, batch_size=batch_size
        )
        for row, hits in zip(block, memories.search(questions, SEARCHED), strict=True):
            gold = {document_key(row["docs"][index]) for index in row["pos_index"]}
            found = [keys[key] for key in map(document_key, hits) if key in keys]
            negatives = [key for key in found if key not in gold and not has_answer(documents[key], row["answers"])]
            if len(gold) + len(negatives) < num_documents:
                continue
            chosen = [*sorted(gold), *negatives[: num_documents - len(gold)]]
            generator.shuffle(chosen)
            positives = [place for place, key in enumerate(chosen) if key in gold]
            mined.append({**row, "docs": [documents[key] for key in chosen], "pos_index": positives})
    return mined


def with_singles(rows: Sequence[Mapping], share: float) -> list[Mapping]:
    """Rows in their order, those with one gold document thinned out until they are at most this share of all.

    >>> single, double = {"pos_index": [0]}, {"pos_index": [0, 1]}
    >>> len(with_singles([single] * 8 + [double] * 6, 0.25))
    8
    """
    single = [place for place, row in enumerate(rows) if len(row["pos_index"]) == 1]
    n_kept = min(len(single), int(share / (1 - share) * (len(rows) - len(single))))
    left_out = set(single) - set(random.Random(SEED).sample(single, n_kept))
    return [row for place, row in enumerate(rows) if place not in left_out]


def has_answer(document: Mapping, answers: Sequence[str]) -> bool:
    """Whether a document has one of the answers word for word.

    >>> has_answer({"title": "", "text": "Oslo is the capital."}, ["Capital"])
    True
    """
    words = answer_words(f"{document['title']} {document['text']}")
    return any(contains_run(words, gold) for gold in map(answer_words, answers) if gold not in TELL_NOTHING)


def main(argv: Sequence[str] | None = None) -> int:
    """Mine; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="files or data sets with gold documents")
    parser.add_argument("--model", required=True, help="checkpoint with a trained reasoner")
    parser.add_argument("--backbone", help="where its backbone is")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is faster if the machine has it")
    parser.add_argument("--memories", type=Path, required=True, help="folder of the documents' memories")
    parser.add_argument("--output", type=Path, required=True, help="file of rows")
    parser.add_argument("--num-documents", type=int, default=5, help="of a row, the gold ones with them")
    parser.add_argument("--max-words", type=int, default=100, help="of a document; longer ones are left out")
    parser.add_argument("--batch-size", type=int, default=32, help="documents in one pass")
    single = "rows with one gold document, at most this share of all (default: all)"
    parser.add_argument("--single-share", type=float, help=single)
    parser.add_argument("--rows-of-step", type=int, help="rows of one length next to each other, as a step takes them")
    arguments = parser.parse_args(argv)
    if arguments.single_share is not None and not 0 <= arguments.single_share < 1:
        parser.error(f"--single-share must be from 0 to below 1, got {arguments.single_share}")
    try:
        rows = list(read_questions(arguments.rows))
        options = {"device_map": "cuda" if torch.cuda.is_available() else None, **weight_options(arguments.dtype)}
        model = CLaRaForRAG.from_pretrained(arguments.model, backbone=arguments.backbone, **options)
        names = ("num_documents", "max_words", "single_share", "batch_size")
        mined = mine(model, rows, arguments.memories, **{name: getattr(arguments, name) for name in names})
        if not mined:
            raise ValueError("no row has short gold documents and negatives. Raise --max-words, or --single-share.")
        if arguments.rows_of_step:
            mined.sort(key=lambda row: max(len(document["text"]) for document in row["docs"]))
            mined = in_steps(mined, arguments.rows_of_step, random.Random(SEED))
        n_rows = write_lines(arguments.output, mined)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {n_rows:,} of {len(rows):,} rows")
    return 0
