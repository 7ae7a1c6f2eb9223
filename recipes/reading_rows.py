"""Pieces, then passages, multi-hop questions and texts in steps of one size: `reading.jsonl`, all that stage 1 reads.

Stands beside `smollm2_data.py`, which has read and checked the rows; knows nothing of models. Every step has rows of
all kinds, so that a long run may be stopped at any step, and passages of one title stand next to each other: they are
each other's hardest negatives in the contrastive term.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

# Rows of a step by kind.
STEP = {"passages": 10, "multihop": 3, "texts": 3}
PIECES = 480  # of the curriculum at most, evenly spaced: 30 steps until memories are read at all
MAX_WORDS = 170  # of a passage: a span holds about 180
MAX_QUESTIONS = 5  # of a row; a passage with more has further rows
PARAPHRASED = 0.25  # share of the passages and texts with their own text as a further target
NUM_READ = 3  # documents of a multi-hop row
TITLE_RUN = 4  # passages of one title next to each other


def passage_rows(passages: Sequence[Mapping], generator: random.Random) -> list[dict]:
    """Passages with their questions, each question once, runs of one title in random order."""
    rows = []
    for passage in passages:
        if len(passage["text"].split()) > MAX_WORDS:
            continue
        pairs = generator.sample(passage["qas"], len(passage["qas"]))
        for start in range(0, len(pairs), MAX_QUESTIONS):
            rows.append(
                {"title": passage["title"], "text": passage["text"], "qas": pairs[start : start + MAX_QUESTIONS]}
            )
    generator.shuffle(rows)
    rows.sort(key=lambda row: row["title"])
    runs = []
    for _, group in groupby(rows, key=lambda row: row["title"]):
        group = list(group)
        runs += [group[start : start + TITLE_RUN] for start in range(0, len(group), TITLE_RUN)]
    generator.shuffle(runs)
    return [row for run in runs for row in run]


def multihop_rows(rows: Sequence[Mapping], generator: random.Random) -> list[dict]:
    """Questions over their gold documents and others of the same row, in random places."""
    chosen = []
    for row in rows:
        gold = [row["docs"][index] for index in row["pos_index"]]
        others = [document for index, document in enumerate(row["docs"]) if index not in row["pos_index"]]
        if not 1 <= len(gold) <= NUM_READ:
            continue
        documents = gold + generator.sample(others, min(NUM_READ - len(gold), len(others)))
        generator.shuffle(documents)
        places = [place for place, document in enumerate(documents) if document in gold]
        chosen.append({"question": row["question"], "answers": row["answers"], "docs": documents, "pos_index": places})
    generator.shuffle(chosen)
    return chosen


def with_paraphrases(rows: Sequence[Mapping], generator: random.Random) -> list[dict]:
    """Some of the rows with their own text as a further target."""
    return [{**row, "paraphrase": row["text"]} if generator.random() < PARAPHRASED else row for row in rows]


def reading_rows(
    pieces: Sequence[Mapping],
    passages: Sequence[Mapping],
    multihop: Sequence[Mapping],
    texts: Sequence[Mapping],
    seed: int = 42,
) -> list[dict]:
    """Some pieces, then all passages once in steps of `STEP`; multi-hop rows and texts begin again where they end.

    Args:
        pieces: rows of `curriculum.py`, in its order.
        passages: `{title, text, qas}`.
        multihop: `{question, answers, docs, pos_index}`.
        texts: `{title, text, qas}` with cloze questions.
        seed: of every choice.
    """
    generator = random.Random(seed)
    kinds = {
        "passages": with_paraphrases(passage_rows(passages, generator), generator),
        "multihop": multihop_rows(multihop, generator),
        "texts": with_paraphrases(generator.sample(texts, len(texts)), generator),
    }
    n_steps = len(kinds["passages"]) // STEP["passages"]
    n_pieces = min(PIECES, len(pieces))
    rows = [pieces[place * len(pieces) // n_pieces] for place in range(n_pieces)]
    for step in range(n_steps):
        for kind, n_rows in STEP.items():
            source = kinds[kind]
            rows += [source[place % len(source)] for place in range(step * n_rows, (step + 1) * n_rows)]
    return rows
