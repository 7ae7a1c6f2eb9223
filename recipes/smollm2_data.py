"""Training and development files of clara-smollm2-135m: `python recipes/smollm2_data.py SOURCE --output data/smollm2`.

First in the way of that model. SOURCE holds passages_*.jsonl.gz, corpus_*, multihop_*_train, multihop_*_dev and
unanswerable_*; what is written are rows that `data.py` reads. It knows nothing of models.

    pretrain_questions.jsonl   stage 1: passages with their questions
    pretrain_paraphrase.jsonl  passages and texts of corpora that are said again
    pretrain_cloze.jsonl       questions for words that are missing in sentences of corpora
    curriculum.jsonl           pieces of passages, from single sentences to whole ones, in the order to train on
    instruct.jsonl             questions over five documents, some unanswerable
    reading.jsonl              stage 1 behind the curriculum: passages, multi-hop rows and texts in steps of 16
    retrieval.jsonl            questions over up to twenty candidates, the gold ones marked (contrastive, joint)
    retrieval_multihop.jsonl   the same for multi-hop questions alone, of all files, among BM25's best
    retrieval_made.jsonl       questions made from the titles and words of two documents
    *_small.jsonl              what two CPU cores can learn from pretrain_questions and retrieval in an hour each
    dev/*.jsonl                a tenth of the titles of every passages file, and the multihop development files
    corpus.jsonl               documents to search: corpus_wikipedia_2wiki and all of the multihop development files
    counts.json                the scale and the rows of every file, written last

The samples it was written for give 31,644 rows for stage 1, 3,120 pieces, 23,348 and 21,925 rows, in 34, 1, 95 and
355 MB: rows repeat their documents.
What is held back is in no training file: neither its title in a file that has titles, nor its text in any.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from curriculum import curriculum_rows, sentences, to_passage
from data import read_documents, read_positives
from json_files import write_jsonl
from reading_rows import reading_rows
from retrieval_rows import made_questions, with_distractors
from samplers import in_steps

from modeling_clara.storage_clara import write_json

PATTERNS = {
    "passages": "passages_*.jsonl.gz",
    "corpora": "corpus_*.jsonl.gz",
    "multihop": "multihop_*_train*.jsonl.gz",
    "development": "multihop_*_dev.jsonl.gz",
    "unanswerable": "unanswerable_*.jsonl.gz",
}
DEV_SHARE = 10  # one title in so many is held back
MIN_WORDS, MAX_WORDS = 12, 180  # of a passage that is said again: what a span holds
NUM_READ, NUM_CANDIDATES = 5, 20  # documents of an instruct row, candidates of a retrieval row
NO_ANSWER = "The background does not say."
CLOZE = 'Which words are missing in "{sentence}"?'
GAP = "____"
SEED = 42
COUNTS_FILE = "counts.json"
# Of the small files: words of a passage, rows with few and with many questions, questions of a passage, rows alike in
# both next to each other, and passages of each file among which questions search.
SMALL_WORDS, SMALL_FEW, SMALL_MANY, SMALL_QUESTIONS, SMALL_STEP = range(40, 151), 256, 832, 5, 8
SMALL_MULTIHOP = "multihop_hotpotqa_train.jsonl.gz"
# Files whose candidates are all searched, questions made from the candidates of one row, and documents of a row.
SMALL_CANDIDATES, SMALL_MADE, SMALL_DOCUMENTS = (SMALL_MULTIHOP, "multihop_musique_train.jsonl.gz"), 8, 10
# Files whose licence lets what is trained on them be Apache-2.0 or CC BY-SA.
FREE_PASSAGES = ("passages_squad", "passages_nq", "passages_qed", "passages_adversarialqa")
SEARCHED = "corpus_wikipedia_2wiki.jsonl.gz"  # to which the documents of the development questions are added
SMALL_PASSAGES = {"passages_squad": 420, "passages_nq": 320, "passages_scp_sample": 120}


def words(text: str) -> str:
    """A text without case, white space and punctuation, to tell whether two are the same."""
    return re.sub(r"[\W_]+", "", text.casefold())


def is_held_back(title: str, text: str) -> bool:
    """One title in ten, the same in every run; of untitled passages one text in ten."""
    digest = hashlib.sha256((words(title) or words(text)).encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // DEV_SHARE


def read_file(path: Path) -> list[dict]:
    """Rows of a .jsonl or .jsonl.gz file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class HeldBack:
    """Texts and titles that no training row may have.

    Args:
        passages: rows of the passages files, by file name.
        multihop: rows of the multihop development files.
    """

    def __init__(self, passages: Mapping[str, Sequence[Mapping]], multihop: Sequence[Mapping]):
        self.passages = {
            name: [row for row in rows if is_held_back(row.get("title", ""), row["text"])]
            for name, rows in passages.items()
        }
        held = [row for rows in self.passages.values() for row in rows]
        self.titles = {words(row.get("title", "")) for row in held} - {""}
        self.texts = {words(row["text"]) for row in held}
        self.questions = {words(row["question"]) for row in multihop}
        self.questions |= {words(pair["question"]) for row in held for pair in row["qas"]}
        for row in multihop:
            documents = read_documents(row)
            self.texts |= {words(documents[index]["text"]) for index in read_positives(row, len(documents))}

    def has(self, title: str, text: str) -> bool:
        """Whether a document is held back."""
        return words(text) in self.texts or (bool(title) and words(title) in self.titles)


# --- rows ------------------------------------------------------------------------------------------------------------


def said_again(title: str, text: str) -> dict | None:
    """A row whose target is the text itself; None where it is too short to teach, or too long for a span."""
    n_words = len(text.split())
    return {"title": title, "text": text, "paraphrase": text} if MIN_WORDS <= n_words <= MAX_WORDS else None


def cloze(title: str, text: str, n_questions: int = 2) -> dict | None:
    """A row with questions for numbers and names that are taken out of its sentences; None where there are none.

    >>> cloze("Rome", "The old town of Rome has had some 2,873,000 people since the year 2019.")["qas"][0]["answers"]
    ['2,873,000']
    """
    pairs = []
    for sentence in sentences(text):
        if not 8 <= len(sentence.split()) <= 40:
            continue
        # numbers, and runs of capitalised words behind the first word
        found = re.search(r"(?<=\s)(?:\d[\d,.]*\d|(?:[A-Z][\w-]+)(?:\s[A-Z][\w-]+)+)(?=[\s,;.])", sentence)
        if found and sentence.count(found[0]) == 1:
            question = CLOZE.format(sentence=sentence.replace(found[0], GAP))
            pairs.append({"question": question, "answers": [found[0]]})
        if len(pairs) == n_questions:
            break
    return {"title": title, "text": text, "qas": pairs} if pairs and len(text.split()) <= MAX_WORDS else None


def pretraining_rows(passages: Sequence[Mapping], corpora: Sequence[Mapping], held: HeldBack) -> dict[str, list[dict]]:
    """Stage 1, by file: every passage with its questions, every text to be said again, cloze questions on corpora."""
    passages, corpora = (
        [row for row in rows if not held.has(row.get("title", ""), row["text"])] for rows in (passages, corpora)
    )
    texts = [(row.get("title", ""), row["text"]) for row in [*passages, *corpora]]
    made = {
        "questions": [{"title": row.get("title", ""), "text": row["text"], "qas": row["qas"]} for row in passages],
        "paraphrase": [said_again(*text) for text in texts],
        "cloze": [cloze(*text) for text in texts[len(passages) :]],
    }
    return {f"pretrain_{kind}": [row for row in rows if row] for kind, rows in made.items()}


def piece_rows(passages: Sequence[Mapping], held: HeldBack, scale: float) -> list[dict]:
    """The beginning of stage 1: passages in pieces, see `curriculum.py`."""
    trained = [to_passage(row) for row in passages if not held.has(row.get("title", ""), row["text"])]
    rows = curriculum_rows(trained, scale=scale)
    return [row for row in rows if not held.has(row["title"], row["text"])]  # a piece may be what another file holds


def some_questions(passage: Mapping, generator: random.Random) -> dict:
    """A passage with at most `SMALL_QUESTIONS` of its questions."""
    return {**passage, "qas": generator.sample(passage["qas"], min(SMALL_QUESTIONS, len(passage["qas"])))}


def small_pretraining_rows(questions: Sequence[Mapping], seed: int = SEED) -> list[dict]:
    """Some of the passages with questions, none long, in the order to train on: those of a step are alike."""
    generator = random.Random(seed)
    rows = [row for row in questions if len(row["text"].split()) in SMALL_WORDS]
    rows = [row for row in rows if row["text"].count("[") < 8]  # else full of marks of references
    many, few = ([row for row in rows if (len(row["qas"]) >= 3) == is_many] for is_many in (True, False))
    chosen = generator.sample(many, min(SMALL_MANY, len(many))) + generator.sample(few, min(SMALL_FEW, len(few)))
    chosen = [some_questions(row, generator) for row in chosen]
    chosen.sort(key=lambda row: (len(row["qas"]) >= 3, len(row["text"].split())))
    return in_steps(chosen, SMALL_STEP, generator)


def small_retrieval_rows(passages: Mapping[str, Sequence[Mapping]], held: HeldBack, seed: int = SEED) -> list[dict]:
    """Questions over candidates from few passages, of which each is the candidate of many questions.

    Args:
        passages: rows of the passages files, by file name.
        held: what no row may have.
        seed: of the choice.
    """
    generator, chosen = random.Random(seed), []
    for name, n_passages in SMALL_PASSAGES.items():
        rows = [row for row in passages.get(f"{name}.jsonl.gz", ()) if len(row["text"].split()) in SMALL_WORDS]
        rows = [row for row in rows if not held.has(row.get("title", ""), row["text"])]
        chosen += generator.sample(rows, min(n_passages, len(rows)))
    chosen = [some_questions(row, generator) for row in chosen]
    return list(with_distractors(question_rows(chosen, held), NUM_CANDIDATES, generator))


def question_rows(passages: Sequence[Mapping], held: HeldBack) -> list[dict]:
    """One row a question of a passage: `{question, answers, gold}`."""
    return [
        {"question": pair["question"], "answers": pair["answers"], "gold": [{"title": title, "text": row["text"]}]}
        for row in passages
        for title in [row.get("title", "")]
        if not held.has(title, row["text"])
        for pair in row["qas"]
        if words(pair["question"]) not in held.questions and pair["answers"]
    ]


def questions_of(passages: Sequence[Mapping], held: HeldBack) -> list[dict]:
    """Passages that are not held back, with those of their questions that are not and have an answer; each once."""
    found = {}
    for row in passages:
        title = row.get("title", "")
        if held.has(title, row["text"]):
            continue
        passage = found.setdefault(words(row["text"]), {"title": title, "text": row["text"], "qas": []})
        known = {words(pair["question"]) for pair in passage["qas"]}
        for pair in row["qas"]:
            if pair["answers"] and words(pair["question"]) not in known | held.questions:
                passage["qas"].append({"question": pair["question"], "answers": pair["answers"]})
                known.add(words(pair["question"]))
    return list(found.values())


def multihop_rows(rows: Sequence[Mapping], held: HeldBack) -> Iterator[dict]:
    """Rows with their own candidates, but for those whose question or a document of which is held back."""
    for row in rows:
        documents = read_documents(row)
        gold = read_positives(row, len(documents))
        is_held = any(held.has(document["title"], document["text"]) for document in documents)
        if is_held or words(row["question"]) in held.questions:
            continue
        yield {"question": row["question"], "answers": row["answers"], "docs": documents, "pos_index": gold}


def two_document_rows(by_file: Mapping[str, Sequence[Mapping]], seed: int = SEED) -> dict[str, list[dict]]:
    """What the small contrastive run learns beside single passages: questions that two documents answer.

    Args:
        by_file: `multihop_rows` of the training files, by file name.
        seed: of places, words and templates.

    Returns:
        `retrieval_multihop`, their questions among what BM25 takes for the best of all their documents, and
        `retrieval_made`, questions made from documents that are candidates of one question, or gold ones together.
    """
    generator = random.Random(seed)
    own = {name: rows for name, rows in by_file.items() if name in SMALL_CANDIDATES}
    groups = [(row["docs"], SMALL_MADE) for rows in own.values() for row in rows]
    rows = []
    for name, file_rows in by_file.items():
        for row in file_rows:
            gold = [row["docs"][index] for index in row["pos_index"]]
            if name != SMALL_MULTIHOP:
                rows.append({"question": row["question"], "answers": row["answers"], "gold": gold})
            if name not in own:
                groups.append((gold, 1))
    others = [document for row_docs, _ in groups for document in row_docs]
    made = [row for docs, n in groups for row in made_questions(docs, n, generator)]
    return {
        name: list(with_distractors(found, SMALL_DOCUMENTS, generator, others))
        for name, found in (("retrieval_multihop", rows), ("retrieval_made", made))
    }


def cut(row: Mapping, n_documents: int, generator: random.Random) -> dict:
    """A row with its gold documents and as many others as make `n_documents`, in their order."""
    others = [index for index in range(len(row["docs"])) if index not in row["pos_index"]]
    n_others = max(0, n_documents - len(row["pos_index"]))
    kept = sorted([*row["pos_index"], *generator.sample(others, min(n_others, len(others)))])
    gold = [place for place, index in enumerate(kept) if index in row["pos_index"]]
    return {**row, "docs": [row["docs"][index] for index in kept], "pos_index": gold}


def searched_rows(corpus: Sequence[Mapping], development: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """Documents of a corpus in which every development question finds its own: `{id, title, text}`, each once.

    Args:
        corpus: rows `{id, title?, text}`.
        development: rows of the multihop development files, by file name.
    """
    found = {}
    for row in corpus:
        document = {"id": str(row["id"]), "title": row.get("title", ""), "text": row["text"]}
        found.setdefault((words(document["title"]), words(document["text"])), document)
    for name, rows in development.items():
        for number, document in enumerate(document for row in rows for document in read_documents(row)):
            key = words(document["title"]), words(document["text"])
            found.setdefault(key, {"id": f"{name.split('.')[0]}-{number}", **document})
    return list(found.values())


def unanswerable_rows(rows: Sequence[Mapping], held: HeldBack) -> Iterator[dict]:
    """Rows whose documents do not answer them, with the words that say so."""
    for row in rows:
        documents = read_documents(row)
        if not any(held.has(document["title"], document["text"]) for document in documents):
            yield {"question": row["question"], "answers": [NO_ANSWER], "docs": documents, "pos_index": []}


# --- files -----------------------------------------------------------------------------------------------------------


def share_of(rows: Sequence[Mapping], share: float) -> list[Mapping]:
    """So many of the rows, evenly spaced, at least one of them.

    >>> share_of(range(10), 0.4)
    [0, 2, 5, 7]
    """
    exact = Fraction(share).limit_denominator(1_000_000)
    return [rows[int(n / exact)] for n in range(math.ceil(len(rows) * exact))]


def write_files(source: Path, output: Path, *, scale: float = 1.0, seed: int = SEED) -> dict[str, int]:
    """All files; the number of rows of each.

    Args:
        source: folder with the data.
        output: folder of what is written.
        scale: share of the training rows, for a rehearsal.
        seed: of the order of documents.

    Raises:
        FileNotFoundError: a kind of data is missing.
    """
    (output / COUNTS_FILE).unlink(missing_ok=True)
    groups = {}
    for kind, pattern in PATTERNS.items():
        paths = sorted(source.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{source} must have {pattern}, found none. Name another folder.")
        groups[kind] = {path.name: read_file(path) for path in paths}
    passages, development = groups["passages"], groups["development"]
    held = HeldBack(passages, [row for rows in development.values() for row in rows])
    generator = random.Random(seed)
    texts = [row for rows in passages.values() for row in rows]
    corpora = [row for rows in groups["corpora"].values() for row in rows]
    by_file = {name: list(multihop_rows(rows, held)) for name, rows in groups["multihop"].items()}
    multihop = [row for rows in by_file.values() for row in rows]
    questions = question_rows(texts, held)
    candidates = list(with_distractors(questions, NUM_CANDIDATES, generator))
    unanswerable = list(unanswerable_rows([row for rows in groups["unanswerable"].values() for row in rows], held))
    files = {
        **pretraining_rows(texts, corpora, held),
        "instruct": [cut(row, NUM_READ, generator) for row in [*candidates, *multihop]] + unanswerable,
        "retrieval": [*candidates, *multihop],
        "retrieval_small": [*small_retrieval_rows(passages, held), *by_file.get(SMALL_MULTIHOP, ())],
    }
    files |= two_document_rows(by_file)
    for name in ("retrieval", "retrieval_small", "retrieval_multihop", "retrieval_made"):
        files[name] = [row for row in files[name] if len(row["docs"]) >= NUM_READ]
    free = [row for name, rows in passages.items() if name.startswith(FREE_PASSAGES) for row in rows]
    free = [row for row in questions_of(free, held) if row["qas"]]
    files["reading"] = reading_rows(piece_rows(free, held, 1.0), free, multihop, files["pretrain_cloze"], seed)
    files["pretrain_small"] = small_pretraining_rows(files["pretrain_questions"])
    counts = {"curriculum": write_jsonl(output / "curriculum.jsonl", piece_rows(texts, held, scale))}
    for name, rows in files.items():
        # neighbours share documents, so the files pack well; training draws its own order
        counts[name] = write_jsonl(output / f"{name}.jsonl", share_of(rows, scale))
    for name, rows in {**held.passages, **development}.items():
        name = f"dev/{name.removesuffix('.gz')}"
        counts[name] = write_jsonl(output / name, rows)
    searched = searched_rows(groups["corpora"].get(SEARCHED, ()), development)
    counts["corpus"] = write_jsonl(output / "corpus.jsonl", searched)
    write_json(output / COUNTS_FILE, {"scale": scale, "rows": counts})
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the data")
    parser.add_argument("--output", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training rows, for a rehearsal")
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.scale <= 1:
            raise ValueError(f"--scale must be above 0 and at most 1, got {arguments.scale}. Correct it.")
        counts = write_files(arguments.source, arguments.output, scale=arguments.scale)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"{name}: {count:,} rows" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
