"""Passages with questions, cut into rows that grow longer: `python recipes/curriculum.py FILE ... -o OUTPUT`.

Stands before `train.py`, which reads the rows in the order of the file with `train_sampling_strategy: sequential`. It
knows nothing of models. What stage 1 has to find first is the way through the memories: from sentences of ten words it
finds it within some dozen steps, from whole passages not in hundreds (LOG.md).
"""

import argparse
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from data import BadRow, read_rows, read_targets
from json_files import write_jsonl
from trl.scripts.utils import DatasetConfig

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
    return re.split(r"(?<=[.!?])\s+", text)


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
    """How often an answer stands in a text, as whole words.

    >>> stands_in("1 May", "From 1 May to 11 May."), stands_in("May", "From 1 May to 11 May.")
    (1, 2)
    """
    return len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE))


def questions_of(piece: str, text: str, pairs: Sequence[Mapping]) -> list[Mapping]:
    """Questions of a text whose first answer stands in it once, and there in this piece."""
    firsts = [(pair, pair["answers"][0]) for pair in pairs if pair["answers"]]
    return [pair for pair, answer in firsts if stands_in(answer, text) == 1 and stands_in(answer, piece)]


def curriculum_rows(
    passages: Iterable[Mapping], *, scale: float = 1.0, rows_of_step: int = 8, seed: int = SEED
) -> list[dict]:
    """Rows of stage 1, level by level.

    Args:
        passages: rows `{title, text, qas}`.
        scale: share of the rows of `ROWS`; a level that has fewer pieces takes all of them.
        rows_of_step: rows next to each other that are alike in their number of targets, so that a step pads little.
        seed: of the choice and the order within a level.

    Returns:
        Rows `{title, text, qas?, paraphrase?}`.
    """
    generator = random.Random(seed)
    levels = [[] for _ in ROWS]
    for passage in passages:
        for piece in pieces(passage["text"]):
            n_words = len(piece.split())
            level = next((i for i, (low, high) in enumerate(pairwise(BOUNDS)) if low <= n_words < high), None)
            if level is None:
                continue
            is_whole = piece == passage["text"]
            pairs = passage["qas"] if is_whole else questions_of(piece, passage["text"], passage["qas"])
            if pairs or level == 0:
                levels[level].append((passage.get("title", ""), piece, pairs))
    rows = []
    for level, n_rows in zip(levels, ROWS, strict=True):
        generator.shuffle(level)
        chosen = [to_row(*piece, generator) for piece in level[: max(1, round(n_rows * scale))]]
        chosen.sort(key=lambda row: ("paraphrase" in row, len(row.get("qas", ()))))
        steps = [chosen[start : start + rows_of_step] for start in range(0, len(chosen), rows_of_step)]
        generator.shuffle(steps)
        rows += [row for step in steps for row in step]
    return rows


def to_row(title: str, piece: str, pairs: Sequence[Mapping], generator: random.Random) -> dict:
    """A row with some of the questions, and with the piece itself as a target the more often the shorter it is."""
    row = {"title": title, "text": piece}
    if pairs:
        row["qas"] = generator.sample(list(pairs), min(MAX_QUESTIONS, len(pairs)))
    if not pairs or generator.random() < SAID_AGAIN / len(piece.split()):
        row["paraphrase"] = piece
    return row


def read_passages(paths: Sequence[Path]) -> list[dict]:
    """Passages with their questions.

    Raises:
        FileNotFoundError, ValueError: naming file, line and rule.
    """
    passages = []
    for path in paths:
        for place, row in read_rows(DatasetConfig(path=str(path))):
            if not isinstance(row.get("text"), str) or "qas" not in row:
                raise BadRow("must have `text` and `qas`", place)
            try:
                targets = read_targets({"qas": row["qas"]}, "pretrain") if row["qas"] else []
            except BadRow as error:
                raise BadRow(str(error), place) from error
            qas = [{"question": question, "answers": [answer]} for question, answer in targets]
            passages.append({"title": row.get("title") or "", "text": row["text"].strip(), "qas": qas})
    return passages


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="rows {title?, text, qas: [{question, answers}]}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--scale", type=float, default=1.0, help=f"share of {sum(ROWS):,} rows, may be above 1")
    parser.add_argument("--rows-of-step", type=int, default=8, help="per_device_train_batch_size of the run")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args(argv)
    try:
        for name in ("scale", "rows_of_step"):
            if not getattr(arguments, name) > 0:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} must be above 0, got {getattr(arguments, name)}. Correct it.")
        passages = read_passages(arguments.files)
        options = {"scale": arguments.scale, "rows_of_step": arguments.rows_of_step, "seed": arguments.seed}
        rows = curriculum_rows(passages, **options)
        if not rows:
            raise ValueError(f"the files must have passages of at least {BOUNDS[0]} words, got none. Name others.")
        n_rows = write_jsonl(arguments.output, rows)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {n_rows:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
