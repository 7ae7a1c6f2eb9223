"""Passages with questions, cut into rows that grow longer: `python -m recipes.training.curriculum FILE ... -o OUTPUT`.

Stands before `train.py`, which reads the rows in the order of the file with `train_sampling_strategy: sequential`. It
knows nothing of models. What stage 1 has to find first is the way through the memories: from sentences of ten words it
finds it within some dozen steps, from whole passages not in hundreds (docs/experiments.md).
"""

import argparse
import math
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from modeling_clara.cli.console import allow_any_console
from modeling_clara.corpus.storage import write_lines
from recipes.training.data import BadRow, convert_rows, in_steps, read_documents, read_targets

# Words of a level's pieces, from one bound to below the next, and its rows.
BOUNDS = (6, 13, 19, 27, 37, 51, 71, 96, 131)
ROWS = (320, 320, 320, 320, 320, 400, 560, 560)
MAX_SENTENCES, MAX_QUESTIONS = 4, 4  # of a piece
SAID_AGAIN = 16  # words: shorter pieces are all said again, longer ones ever more rarely
SEED = 42


def sentences(text: str) -> list[str]:
    """Roughly the sentences of a text; an abbreviation ends one as well.

    >>> sentences("It rained. Nobody came!")
    ['It rained.', 'Nobody came!']
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())


def pieces(text: str) -> list[str]:
    """A text, and its runs of one to four sentences.

    >>> pieces("It rained. Nobody came!")
    ['It rained. Nobody came!', 'It rained.', 'Nobody came!']
    """
    parts = sentences(text)
    runs = [
        " ".join(parts[start : start + size])
        for size in range(1, MAX_SENTENCES + 1)
        for start in range(0, len(parts) - size + 1, size)
    ]
    return list(dict.fromkeys([text, *runs]))


def stands_in(answer: str, text: str) -> int:
    """How often an answer stands in a text, as whole words and numbers.

    >>> stands_in("1 May", "From 1 May to 11 May."), stands_in("May", "From 1 May to 11 May.")
    (1, 2)
    >>> stands_in("9", "For 9.5 or 9,000, or 1.9?"), stands_in("$5", "For $5.50, not $5."), stands_in("C", "C++ and C")
    (0, 1, 1)
    """
    pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(answer)}(?!\w|[.,]\d|[+#])"
    return len(re.findall(pattern, text, re.IGNORECASE))


def to_passage(row: Mapping) -> dict:
    """A passage `{title, text, qas: [(question, answer)]}` of a row `{title?, text, qas}`, or a `BadRow`.

    White space becomes single spaces; of several answers to a question the first one counts.
    """
    if "text" not in row or not isinstance(row.get("qas"), list):
        raise BadRow("must have `text` and a list `qas`")
    title = row.get("title")
    (document,) = read_documents({"title": "" if title is None else title, "text": row["text"]})
    pairs = read_targets({"qas": row["qas"]}) if row["qas"] else []
    return {"title": document["title"], "text": " ".join(document["text"].split()), "qas": pairs}


def curriculum_rows(
    passages: Iterable[Mapping], *, scale: float = 1.0, rows_of_step: int = 8, seed: int = SEED
) -> list[dict]:
    """Rows of stage 1, level by level. From the second level on, a piece has at least one question.

    Args:
        passages: of `to_passage`.
        scale: share of the rows of `ROWS`; a level that has fewer pieces takes all of them.
        rows_of_step: rows next to each other that are alike in their number of targets, so that a step pads little. A
            level that has as many has a multiple of it.
        seed: of the choice and the order within a level.

    Returns:
        Rows `{title, text, qas?, paraphrase?}`, none twice.
    """
    generator = random.Random(seed)
    levels = [{} for _ in ROWS]  # of (title, piece) -> its questions
    for passage in passages:
        title, text, pairs = passage["title"], passage["text"], passage["qas"]
        alone = [(question, answer) for question, answer in pairs if stands_in(answer, text) == 1]
        for piece in pieces(text):
            n_words = len(piece.split())
            level = next((i for i, (low, high) in enumerate(pairwise(BOUNDS)) if low <= n_words < high), None)
            asked = pairs if piece == text else [pair for pair in alone if stands_in(pair[1], piece)]
            if level is not None and (asked or level == 0):
                levels[level].setdefault((title, piece), asked)
    rows = []
    for level, n_rows in zip(levels, ROWS, strict=True):
        found = list(level.items())
        generator.shuffle(found)
        n_rows = min(len(found), max(1, round(n_rows * scale)))
        n_rows -= n_rows % rows_of_step if n_rows > rows_of_step else 0
        chosen = [to_row(*key, pairs, generator) for key, pairs in found[:n_rows]]
        chosen.sort(key=lambda row: ("paraphrase" in row, len(row.get("qas", ()))))
        rows += in_steps(chosen, rows_of_step, generator)
    return rows


def to_row(title: str, piece: str, pairs: Sequence[tuple[str, str]], generator: random.Random) -> dict:
    """A row with some of the questions, and with the piece itself as a target the more often the shorter it is."""
    row = {"title": title, "text": piece}
    if pairs:
        drawn = generator.sample(list(pairs), min(MAX_QUESTIONS, len(pairs)))
        row["qas"] = [{"question": question, "answers": [answer]} for question, answer in drawn]
    if not pairs or generator.random() < SAID_AGAIN / len(piece.split()):
        row["paraphrase"] = piece
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="rows {title?, text, qas: [{question, answers}]}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--scale", type=float, default=1.0, help=f"share of {sum(ROWS):,} rows, may be above 1")
    parser.add_argument("--rows-of-step", type=int, default=8, help="per_device_train_batch_size of the run")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args(argv)
    try:
        if not (arguments.scale > 0 and math.isfinite(arguments.scale)):
            raise ValueError(f"--scale must be above 0, got {arguments.scale}. Correct it.")
        if arguments.rows_of_step < 1:
            raise ValueError(f"--rows-of-step must be at least 1, got {arguments.rows_of_step}. Correct it.")
        if arguments.output.suffix != ".jsonl":
            raise ValueError(f"--output must be a .jsonl file, got {arguments.output}. Correct its name.")
        if arguments.output.resolve() in [path.resolve() for path in arguments.files]:
            raise ValueError(f"--output must not be one of the files, got {arguments.output}. Choose another name.")
        passages = list(convert_rows(arguments.files, to_passage))
        options = {"scale": arguments.scale, "rows_of_step": arguments.rows_of_step, "seed": arguments.seed}
        rows = curriculum_rows(passages, **options)
        if not rows:
            raise ValueError(
                f"the files must have pieces of {BOUNDS[0]} to {BOUNDS[-1] - 1} words, with a question from "
                f"{BOUNDS[1]} words on, got none. Name others."
            )
        n_rows = write_lines(arguments.output, rows)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {n_rows:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
