"""Rows of clara-smollm2-135m: `python -m recipes.models.smollm2_135m.data SOURCE --output data/smollm2`.

What is held out is in no training file: neither its title in a file that has titles, nor its text in any. SOURCE holds
passages_*.jsonl.gz, corpus_*, multihop_*_train, multihop_*_dev and unanswerable_*. It becomes

    reading.jsonl              the first run: pieces, then passages, multi-hop rows and texts in steps of 16
    reading_hard.jsonl         the second run: more questions over several documents that look alike
    reading_passages.jsonl     the third run: mostly single passages
    finding.jsonl              the fourth run: questions and the documents that they are to find
    pretrain_questions.jsonl   for the paper's stage 1: passages with their questions
    pretrain_paraphrase.jsonl  passages and texts of corpora that are paraphrased
    pretrain_cloze.jsonl       questions for words that are missing in sentences of corpora
    curriculum.jsonl           pieces of passages, from single sentences to whole ones, in the order to train on
    instruct.jsonl             for stage 2: questions over five documents, some unanswerable
    retrieval.jsonl            for contrastive and joint: up to twenty candidates, the gold ones marked
    dev/*.jsonl                a tenth of the titles of every passages file, and the multihop development files
    corpus.jsonl               documents to search: corpus_wikipedia_2wiki and all of the multihop development files
    counts.json                the rows of every file, written last
"""

import argparse
import hashlib
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from trl.scripts.utils import DatasetConfig

from modeling_clara.cli.console import allow_any_console
from modeling_clara.corpus.storage import write_lines
from modeling_clara.storage_clara import write_json
from recipes.evaluation.rankers import Bm25Ranker
from recipes.evaluation.spans import Spans
from recipes.models.smollm2_135m.reading_rows import HARD_NUM_READ, finding_rows, later_reading_rows, reading_rows
from recipes.training.curriculum import curriculum_rows, sentences, to_passage
from recipes.training.data import read_documents, read_positives, read_rows

PATTERNS = {
    "passages": "passages_*.jsonl.gz",
    "corpora": "corpus_*.jsonl.gz",
    "multihop": "multihop_*_train*.jsonl.gz",
    "development": "multihop_*_dev.jsonl.gz",
    "unanswerable": "unanswerable_*.jsonl.gz",
}
DEV_SHARE = 10  # one title in so many is held out
MIN_WORDS, MAX_WORDS = 12, 180  # of a passage that is paraphrased: what a chunk holds
NUM_READ, NUM_CANDIDATES = 5, 20  # documents of an instruct row, candidates of a retrieval row
NO_ANSWER = "The background does not say."
CLOZE = 'Which words are missing in "{sentence}"?'
GAP = "____"
SEED = 42
FINDING_STEPS = 250  # of the run that trains the reasoner alone
COUNTS_FILE = "counts.json"
# Files whose licence lets what is trained on them be Apache-2.0 or CC BY-SA.
FREE_PASSAGES = ("passages_squad", "passages_nq", "passages_qed", "passages_adversarialqa")
SEARCHED = "corpus_wikipedia_2wiki.jsonl.gz"  # to which the documents of the development questions are added


def words(text: str) -> str:
    """A text without case, white space and punctuation, to tell whether two are the same."""
    return re.sub(r"[\W_]+", "", text.casefold())


def bare(row: Mapping) -> dict:
    """The document `{title, text}` of a row."""
    return {"title": row.get("title", ""), "text": row["text"]}


def is_held_back(title: str, text: str) -> bool:
    """One title in ten, the same in every run; of untitled passages one text in ten."""
    digest = hashlib.sha256((words(title) or words(text)).encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // DEV_SHARE


class HeldBack:
    """Texts and titles that no training row may have: of passages by file name, and of multihop development rows."""

    def __init__(self, passages: Mapping[str, Sequence[Mapping]], multihop: Sequence[Mapping]):
        self.passages = {name: [row for row in rows if is_held_back(**bare(row))] for name, rows in passages.items()}
        held = [row for rows in self.passages.values() for row in rows]
        self.titles = {words(row.get("title", "")) for row in held} - {""}
        self.texts = {words(row["text"]) for row in held}
        self.questions = {words(row["question"]) for row in multihop}
        self.questions |= {words(pair["question"]) for row in held for pair in row["qas"]}
        for row in multihop:
            documents = read_documents(row)
            self.texts |= {words(documents[index]["text"]) for index in read_positives(row, len(documents))}

    def has(self, document: Mapping) -> bool:
        """Whether a document `{title?, text}` is held out."""
        return words(document["text"]) in self.texts or words(document.get("title", "")) in self.titles

    def others(self, rows: Sequence[Mapping]) -> list[Mapping]:
        """The rows `{title?, text}` that are not held out."""
        return [row for row in rows if not self.has(row)]


# --- rows ------------------------------------------------------------------------------------------------------------


def paraphrased(title: str, text: str) -> dict | None:
    """A row whose target is the text itself; None if it is too short to teach, or too long for a chunk."""
    n_words = len(text.split())
    return {"title": title, "text": text, "paraphrase": text} if MIN_WORDS <= n_words <= MAX_WORDS else None


def cloze(title: str, text: str, n_questions: int = 2) -> dict | None:
    """A row with questions for numbers and names that are taken out of its sentences; None if there are none.

    >>> cloze("Rome", "The old town of Rome has had some 2,873,000 people since the year 2019.")["qas"][0]["answers"]
    ['2,873,000']
    """
    pairs = []
    for sentence in sentences(text):
        if not 8 <= len(sentence.split()) <= 40:
            continue
        # numbers, and runs of capitalised words after the first word
        found = re.search(r"(?<=\s)(?:\d[\d,.]*\d|(?:[A-Z][\w-]+)(?:\s[A-Z][\w-]+)+)(?=[\s,;.])", sentence)
        if found and sentence.count(found[0]) == 1:
            question = CLOZE.format(sentence=sentence.replace(found[0], GAP))
            pairs.append({"question": question, "answers": [found[0]]})
        if len(pairs) == n_questions:
            break
    return {"title": title, "text": text, "qas": pairs} if pairs and len(text.split()) <= MAX_WORDS else None


def pretraining_rows(passages: Sequence[Mapping], corpora: Sequence[Mapping], held: HeldBack) -> dict[str, list[dict]]:
    """Stage 1, by file: every passage with its questions, paraphrases of every text, cloze questions on corpora."""
    passages, corpora = held.others(passages), held.others(corpora)
    made = {
        "questions": [{**bare(row), "qas": row["qas"]} for row in passages],
        "paraphrase": [paraphrased(**bare(row)) for row in [*passages, *corpora]],
        "cloze": [cloze(**bare(row)) for row in corpora],
    }
    return {f"pretrain_{kind}": [row for row in rows if row] for kind, rows in made.items()}


def piece_rows(passages: Sequence[Mapping], held: HeldBack) -> list[dict]:
    """The beginning of stage 1: passages in pieces, see `curriculum.py`; another file may hold a piece."""
    return held.others(curriculum_rows([to_passage(row) for row in held.others(passages)]))


def question_rows(passages: Sequence[Mapping], held: HeldBack) -> list[dict]:
    """One row a question of a passage: `{question, answers, gold}`."""
    return [
        {"question": pair["question"], "answers": pair["answers"], "gold": [bare(row)]}
        for row in held.others(passages)
        for pair in row["qas"]
        if words(pair["question"]) not in held.questions and pair["answers"]
    ]


def questions_of(passages: Sequence[Mapping], held: HeldBack) -> list[dict]:
    """Passages that are not held out, with those of their questions that are not and have an answer; each once."""
    found = {}
    for row in held.others(passages):
        passage = found.setdefault(words(row["text"]), {**bare(row), "qas": []})
        known = {words(pair["question"]) for pair in passage["qas"]} | held.questions
        for pair in row["qas"]:
            if pair["answers"] and words(pair["question"]) not in known:
                passage["qas"].append({"question": pair["question"], "answers": pair["answers"]})
                known.add(words(pair["question"]))
    return list(found.values())


def multihop_rows(rows: Sequence[Mapping], held: HeldBack) -> Iterator[dict]:
    """Rows with their own candidates, but for those whose question or a document of which is held out."""
    for row in rows:
        documents = read_documents(row)
        if words(row["question"]) not in held.questions and not any(map(held.has, documents)):
            gold = read_positives(row, len(documents))
            yield {"question": row["question"], "answers": row["answers"], "docs": documents, "pos_index": gold}


def unanswerable_rows(rows: Sequence[Mapping], held: HeldBack) -> Iterator[dict]:
    """Rows whose documents do not answer them, with the words that say so."""
    for row in rows:
        documents = read_documents(row)
        if not any(map(held.has, documents)):
            yield {"question": row["question"], "answers": [NO_ANSWER], "docs": documents, "pos_index": []}


def with_distractors(
    rows: Sequence[Mapping], n_documents: int, generator: random.Random, others: Iterable[Mapping] = ()
) -> Iterator[dict]:
    """Rows `{question, answers, docs, pos_index}` of `{question, answers, gold}`, the gold ones at random places.

    The other ones of `n_documents` are what BM25 takes for the best of all rows' gold documents and of `others`.
    """
    documents = {}
    for document in [*(document for row in rows for document in row["gold"]), *others]:
        documents.setdefault((document["title"], document["text"]), len(documents))
    keys = list(documents)
    spans = Spans([str(n) for n in range(len(keys))], [0] * len(keys), [k[0] for k in keys], [k[1] for k in keys])
    ranked = Bm25Ranker(spans).rank([row["question"] for row in rows], [None] * len(rows), n_documents)
    for row, hits in zip(rows, ranked, strict=True):
        gold = list(dict.fromkeys(documents[document["title"], document["text"]] for document in row["gold"]))
        distractors = [number for number, _ in hits if number not in gold]
        order = [*gold, *distractors[: max(0, n_documents - len(gold))]]
        generator.shuffle(order)
        yield {
            "question": row["question"],
            "answers": row["answers"],
            "docs": [{"title": keys[number][0], "text": keys[number][1]} for number in order],
            "pos_index": sorted(order.index(number) for number in gold),
        }


def cut(row: Mapping, n_documents: int, generator: random.Random) -> dict:
    """A row with its gold documents and as many others as make `n_documents`, in their order."""
    others = [index for index in range(len(row["docs"])) if index not in row["pos_index"]]
    n_others = max(0, n_documents - len(row["pos_index"]))
    kept = sorted([*row["pos_index"], *generator.sample(others, min(n_others, len(others)))])
    gold = [place for place, index in enumerate(kept) if index in row["pos_index"]]
    return {**row, "docs": [row["docs"][index] for index in kept], "pos_index": gold}


def searched_rows(corpus: Sequence[Mapping], development: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """Documents `{id, title, text}`, each once: of a corpus, and those of development rows by file name."""
    documents = [{"id": str(row["id"]), **bare(row)} for row in corpus]
    for name, rows in development.items():
        read = (document for row in rows for document in read_documents(row))
        documents += [{"id": f"{name.split('.')[0]}-{number}", **document} for number, document in enumerate(read)]
    found = {}
    for document in documents:
        found.setdefault((words(document["title"]), words(document["text"])), document)
    return list(found.values())


# --- files -----------------------------------------------------------------------------------------------------------


def write_files(source: Path, output: Path, seed: int = SEED) -> dict[str, int]:
    """Write all files; the number of rows of each. A `FileNotFoundError` if a kind of data is missing."""
    (output / COUNTS_FILE).unlink(missing_ok=True)
    groups = {}
    for kind, pattern in PATTERNS.items():
        paths = sorted(source.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{source} must have {pattern}, found none. Name another folder.")
        groups[kind] = {path.name: [row for _, row in read_rows(DatasetConfig(str(path)))] for path in paths}
    rows_of = {kind: [row for rows in group.values() for row in rows] for kind, group in groups.items()}
    passages, development = groups["passages"], groups["development"]
    held, generator = HeldBack(passages, rows_of["development"]), random.Random(seed)
    multihop = list(multihop_rows(rows_of["multihop"], held))
    # stages 2 and 3 of the paper; neighbours share documents, so the files pack well
    found = with_distractors(question_rows(rows_of["passages"], held), NUM_CANDIDATES, generator)
    rows = [*found, *multihop]
    instruct = [cut(row, NUM_READ, generator) for row in rows]
    files = {
        "curriculum": piece_rows(rows_of["passages"], held),
        **pretraining_rows(rows_of["passages"], rows_of["corpora"], held),
        "instruct": [*instruct, *unanswerable_rows(rows_of["unanswerable"], held)],
        "retrieval": [row for row in rows if len(row["docs"]) >= NUM_READ],
    }
    # what the runs of the published model read; the passages' licence lets the model be free
    free = [row for name, group in passages.items() if name.startswith(FREE_PASSAGES) for row in group]
    asked = [row for row in questions_of(free, held) if row["qas"]]
    questions = question_rows(asked, held)
    alike = with_distractors(questions, HARD_NUM_READ["candidates"], random.Random(seed))
    texts = files["pretrain_cloze"]
    files["reading"] = reading_rows(piece_rows(asked, held), asked, multihop, texts, seed)
    files |= later_reading_rows(asked, multihop, list(alike), texts)
    files["finding"] = finding_rows(questions, multihop, FINDING_STEPS)
    files |= {
        f"dev/{name.removesuffix('.jsonl.gz')}": group for name, group in {**held.passages, **development}.items()
    }
    files["corpus"] = searched_rows(groups["corpora"].get(SEARCHED, ()), development)
    counts = {name: write_lines(output / f"{name}.jsonl", rows) for name, rows in files.items()}
    write_json(output / COUNTS_FILE, {"rows": counts})
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the data")
    parser.add_argument("--output", type=Path, default=Path("data/smollm2"))
    arguments = parser.parse_args(argv)
    try:
        counts = write_files(arguments.source, arguments.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"{name}: {count:,} rows" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
