"""Rows of the four runs, each after the one before: `reading`, `reading_hard`, `reading_passages`, `finding`.

Every step has rows of all kinds, so that a long run may be stopped at any step. Passages of one title stand next to
each other: they are each other's hardest negatives in the contrastive term.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

# Rows of a step by kind.
STEP = {"passages": 10, "multihop": 3, "texts": 3}
HARD_STEP = {"passages": 8, "multihop": 3, "candidates": 3, "texts": 2}
PASSAGES_STEP = {"passages": 12, "multihop": 1, "candidates": 1, "texts": 2}
PIECES = 480  # of the curriculum at most, evenly spaced: 30 steps until memories are read at all
MAX_WORDS = 170  # of a passage: a chunk holds about 180
MAX_QUESTIONS = 5  # of a row; a passage with more has further rows
PARAPHRASED = 0.25  # share of the passages and texts with their own text as a further target
PASSAGES_PARAPHRASED = 0.35  # the same in the third run
NUM_READ = {"multihop": 3}  # documents of a row
HARD_NUM_READ = {"multihop": 5, "candidates": 3}
FINDING_STEP = 16  # questions of either kind in a step of the fourth run
TITLE_RUN = 4  # passages of one title next to each other


def passage_rows(passages: Sequence[Mapping], generator: random.Random) -> list[dict]:
    """Passages with their questions, each question once, runs of one title in random order."""
    rows = []
    for passage in passages:
        if len(passage["text"].split()) <= MAX_WORDS:
            pairs = generator.sample(passage["qas"], len(passage["qas"]))
            document = {"title": passage["title"], "text": passage["text"]}
            rows += [{**document, "qas": some} for some in parts(pairs, MAX_QUESTIONS)]
    generator.shuffle(rows)
    rows.sort(key=lambda row: row["title"])
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["title"])]
    runs = [run for group in groups for run in parts(group, TITLE_RUN)]
    generator.shuffle(runs)
    return [row for run in runs for row in run]


def parts(rows: list, size: int) -> list[list]:
    """A list in pieces of so many entries; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def several_documents(rows: Sequence[Mapping], num_read: int, generator: random.Random) -> list[dict]:
    """Questions over their gold documents and others of the same row, `num_read` in all, in random places."""
    chosen = []
    for row in rows:
        gold = [row["docs"][index] for index in row["pos_index"]]
        others = [document for index, document in enumerate(row["docs"]) if index not in row["pos_index"]]
        if not 1 <= len(gold) <= num_read:
            continue
        documents = gold + generator.sample(others, min(num_read - len(gold), len(others)))
        generator.shuffle(documents)
        places = [place for place, document in enumerate(documents) if document in gold]
        chosen.append({"question": row["question"], "answers": row["answers"], "docs": documents, "pos_index": places})
    generator.shuffle(chosen)
    return chosen


def with_paraphrases(rows: Sequence[Mapping], share: float, generator: random.Random) -> list[dict]:
    """A share of the rows with their own text as a further target."""
    return [{**row, "paraphrase": row["text"]} if generator.random() < share else row for row in rows]


def reading_rows(
    pieces: Sequence[Mapping],
    passages: Sequence[Mapping],
    multihop: Sequence[Mapping],
    texts: Sequence[Mapping],
    seed: int = 42,
) -> list[dict]:
    """`reading.jsonl`: some pieces in the order of `curriculum.py`, then all passages once in steps of `STEP`.

    Passages and texts are `{title, text, qas}`, multi-hop rows `{question, answers, docs, pos_index}`.
    """
    n_pieces = min(PIECES, len(pieces))
    rows = [pieces[place * len(pieces) // n_pieces] for place in range(n_pieces)]
    return rows + in_steps({"passages": passages, "multihop": multihop, "texts": texts}, STEP, NUM_READ, seed)


def later_reading_rows(
    passages: Sequence[Mapping], multihop: Sequence[Mapping], candidates: Sequence[Mapping], texts: Sequence[Mapping]
) -> dict[str, list[dict]]:
    """`reading_hard` and `reading_passages`: all passages once each, in steps of `HARD_STEP` and `PASSAGES_STEP`.

    `candidates` are rows as `multihop`.
    """
    kinds = {"passages": passages, "multihop": multihop, "candidates": candidates, "texts": texts}
    return {
        "reading_hard": in_steps(kinds, HARD_STEP, HARD_NUM_READ, seed=43),
        "reading_passages": in_steps(kinds, PASSAGES_STEP, HARD_NUM_READ, seed=44, paraphrased=PASSAGES_PARAPHRASED),
    }


def in_steps(
    kinds: Mapping[str, Sequence[Mapping]],
    step: Mapping[str, int],
    num_read: Mapping[str, int],
    seed: int,
    paraphrased: float = PARAPHRASED,
) -> list[dict]:
    """Steps of so many rows of every kind until the passages end; other kinds begin again where they end."""
    generator, made = random.Random(seed), {}
    for kind, source in kinds.items():
        if kind in num_read:
            made[kind] = several_documents(source, num_read[kind], generator)
        else:
            is_asked = kind == "passages"
            drawn = passage_rows(source, generator) if is_asked else generator.sample(source, len(source))
            made[kind] = with_paraphrases(drawn, paraphrased, generator)
    rows = []
    for number in range(len(made["passages"]) // step["passages"]):
        for kind, n_rows in step.items():
            source = made[kind]
            rows += [source[place % len(source)] for place in range(number * n_rows, (number + 1) * n_rows)]
    return rows


def finding_rows(
    questions: Sequence[Mapping], multihop: Sequence[Mapping], n_steps: int, seed: int = 45
) -> list[dict]:
    """`finding.jsonl`: steps of `FINDING_STEP` questions on a passage and as many multi-hop ones.

    `questions` are `{question, answers, gold}`. All passages come once before one comes twice; the multi-hop rows
    begin again where they end.
    """
    generator, by_passage = random.Random(seed), {}
    for row in generator.sample(questions, len(questions)):
        by_passage.setdefault(row["gold"][0]["text"], []).append(row)
    turns = [[rows[turn] for rows in by_passage.values() if turn < len(rows)] for turn in range(MAX_QUESTIONS)]
    single = [
        {"question": row["question"], "answers": row["answers"], "docs": row["gold"], "pos_index": [0]}
        for turn in turns
        for row in generator.sample(turn, len(turn))
    ]
    several = [row for row in multihop if row["pos_index"]]
    several, rows = generator.sample(several, len(several)), []
    for number in range(min(n_steps, len(single) // FINDING_STEP)):
        places = range(number * FINDING_STEP, (number + 1) * FINDING_STEP)
        rows += [*(single[place] for place in places), *(several[place % len(several)] for place in places)]
    return rows
