"""Settings -> candidates, documents of the data -> those of a corpus, and rankers against formulas written here."""

import math
import random
import re

import numpy as np
import pytest

from recipes.evaluation.formats import Question
from recipes.evaluation.questions import EvaluationData
from recipes.evaluation.rankers import Bm25Ranker, DenseRanker
from recipes.evaluation.spans import Spans, match_documents
from recipes.evaluation.tasks import NOT_THERE, SETTINGS, make_tasks, needed_documents

WORDS = ["kilo", "zulu", "tango", "oscar", "victor", "bravo", "alpha"]  # no stop words, and their own stems


def document(text: str, title: str = "") -> dict:
    return {"title": title, "text": text}


def question(name: str, candidates=(), gold=()) -> Question:
    return Question(name, f"text of {name}", ("x",), tuple(candidates), tuple(gold), f"rows.jsonl:{name}")


def data_of(*questions: Question, n_documents: int = 6, titles=None) -> EvaluationData:
    documents = {str(number): document(f"document {number}") for number in range(n_documents)}
    return EvaluationData("rows.jsonl", "0" * 64, "multihop", list(questions), documents, titles or {})


def spans_of(documents: dict, live=None) -> Spans:
    """Spans of id -> list of texts, or of (title, text), one a span."""
    rows = [
        (name, number, *(part if isinstance(part, tuple) else ("", part)))
        for name, parts in documents.items()
        for number, part in enumerate(parts)
    ]
    return Spans(*map(list, zip(*rows, strict=True)), live=live)


def never(questions, n):
    raise AssertionError("candidates of the data must not be chosen again")


def test_candidates_of_the_data_stay_in_their_order_each_once():
    """Gold that the data does not offer is added in oracle alone."""
    data = data_of(question("1", "423142", "14"), question("2", "012", "51"))
    for setting, second in (("normal", "012"), ("oracle", "0125")):
        tasks = make_tasks(data, setting, never, num_candidates=2)
        assert [task.candidates for task in tasks] == [("4", "2", "3", "1"), tuple(second)]
    for setting in ("normal", "oracle", "gold_only"):
        assert [task.gold for task in make_tasks(data, setting, never)] == [("1", "4"), ("5", "1")]


def test_oracle_keeps_all_gold_and_the_best_of_the_others():
    """Gold that was not chosen takes the places of the last others, and more places only if there are not enough."""
    generator, names = random.Random(0), [str(number) for number in range(12)]
    for _ in range(200):
        n, asked = generator.randint(1, 8), []
        chosen = generator.sample(names, generator.randint(0, n))
        gold = generator.sample(names, generator.randint(0, 5))

        def choose(texts, count):
            asked.append((list(texts), count))  # noqa: B023
            return [chosen]  # noqa: B023

        data = data_of(question("1", gold=gold), question("2", "0", "0"), n_documents=12)
        task, _ = make_tasks(data, "oracle", choose, num_candidates=n)
        others = [name for name in chosen if name not in gold][: max(0, n - len(gold))]
        kept = [name for name in chosen if name in (*gold, *others)]
        added = [name for name in gold if name not in chosen]
        assert (task.candidates, task.gold) == ((*kept, *added), tuple(gold)) and asked == [(["text of 1"], n)]
        assert make_tasks(data, "normal", choose, num_candidates=n)[0].candidates == tuple(chosen)


def test_only_questions_without_candidates_are_chosen_for():
    data = data_of(question("1", "01"), question("2", gold="4"), question("3", "2"), question("4"))
    tasks = make_tasks(data, "normal", lambda texts, n: [[text[-1]] for text in texts])
    assert [task.candidates for task in tasks] == [("0", "1"), ("2",), ("2",), ("4",)]
    assert [task.question.id for task in tasks] == ["1", "2", "3", "4"]


def test_corpus_closed_book_and_gold_only():
    data = data_of(question("1", "01", "15"), question("2", "23", "2"))
    shown = {name: [(t.candidates, t.gold) for t in make_tasks(data, name, never)] for name in SETTINGS}
    assert shown["corpus"] == [(None, ("1", "5")), (None, ("2",))]
    assert shown["closed_book"] == [((), ()), ((), ())]
    assert shown["gold_only"] == [(("1", "5"), ("1", "5")), (("2",), ("2",))]
    another = make_tasks(data, "corpus", never, known={"1": "x", "5": "y", "0": "z"})  # has its own ids, and lacks one
    assert [(task.candidates, task.gold) for task in another] == [(None, ("x", "y")), (None, (f"{NOT_THERE}2",))]
    same = make_tasks(data, "corpus", never, known={"1": "x", "5": "x", "2": "x"})  # two documents are one there
    assert [task.gold for task in same] == [("x",), ("x",)]


def test_a_setting_that_the_data_cannot_serve_names_the_row():
    kilt = data_of(question("1"), question("2", gold=["wiki9"]), n_documents=0, titles={"wiki9": "Nine"})
    for data, setting, message in (
        (data_of(question("1")), "Oracle", "`setting` must be one of normal, oracle.*'Oracle'"),
        (data_of(question("1", "0", "0"), question("2", "0")), "gold_only", "needs gold documents, rows.jsonl:2 has"),
        (data_of(question("1", "0"), question("2", "1")), "oracle", "needs gold documents.*rows.jsonl:1"),
        (kilt, "normal", "'normal' needs documents.*rows.jsonl:2.*--corpus"),
        (kilt, "oracle", "'oracle' needs documents.*rows.jsonl:2.*--corpus"),
        (kilt, "gold_only", "'gold_only' needs documents.*rows.jsonl:2.*--corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            make_tasks(data, setting, never)
    assert make_tasks(kilt, "corpus", never, known={"wiki9": "c"})[1].gold == ("c",)


def test_needed_documents_are_candidates_and_gold_in_the_order_of_the_data():
    data = data_of(question("1", "41", "5"), question("2", "2"))
    for setting, needed in (("normal", ["1", "2", "4", "5"]), ("corpus", list(data.documents)), ("closed_book", [])):
        assert list(needed_documents(make_tasks(data, setting, never), data)) == needed


def test_documents_are_found_by_their_words():
    rows = {"text": [("T ", " body\n")], "long": [("Long", "part one"), ("Long", "part two")]}
    rows |= {"7": [("Twice", "part one"), ("Twice", "part two")], "8": [("Twice", "other"), ("Twice", "parts")]}
    rows |= {"2": [("Paris", "of the corpus")], "3": ["text of the corpus"], "9": [("T", "body")]}
    documents = {
        "0": document("body", "T"),  # the first of equal ones
        "1": document("Part one, part two.", "LONG"),  # the first chunk is its beginning
        "7": document("part one part two", "Twice"),
        "8": document("yet another", "Twice"),  # neither id nor title make two texts the same
        "2": document("of the corpus"),
        "3": document("nowhere"),  # ids of most data are running numbers, as are many of a corpus
        "4": document("another body", "T"),
    }
    assert match_documents(spans_of(rows), documents, {}) == {"0": "text", "1": "long", "7": "7"}


def test_titles_without_text_are_found_by_id_or_unique_title():
    spans = spans_of({"9": [("Nine", "a")], "x": [("Ten", "b")], "y": [("Two", "c")], "z": [("Two", "d")]})
    titles = {"9": "nine", "10": "ten", "2": "Two", "z": "Two", "3": "", "4": "None", "x": ""}
    assert match_documents(spans, {}, titles) == {"9": "9", "10": "x", "z": "z", "x": "x"}
    assert match_documents(spans, {}, {"9": "Another"}) == {}  # running numbers agree by chance


def test_deleted_documents_are_not_found():
    spans = spans_of({name: [("T", "body")] for name in "abc"}, np.array([False, True, True]))
    assert match_documents(spans, {"0": document("body", "T")}, {"a": "Gone"}) == {"0": "b"}


def bm25(query: str, texts: list[str]) -> list[float]:
    """Lucene's BM25 of each text, as Kamphuis et al. (2020) write it; words of `texts` are their own stems."""
    documents = [re.findall(r"\w\w+", text.lower()) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in re.findall(r"\w\w+", query.lower()):
        having = sum(word in document for document in documents)
        rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for index, document in enumerate(documents):
            count = document.count(word)
            scores[index] += rarity * count / (count + 1.5 * (0.25 + 0.75 * len(document) / average))
    return scores


def random_texts(generator, n: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, 9))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_bm25_is_its_formula(seed):
    """Every document by its best chunk; among some documents words are as rare as they are among these."""
    generator = random.Random(seed)
    texts = random_texts(generator, 60)
    documents = {str(n): texts[3 * n : 3 * n + 1 + n % 3] for n in range(20)}  # documents of one to three chunks
    spans = spans_of(documents)
    ranker = Bm25Ranker(spans)
    for depth in (1, 3, 20, 50):
        query = " ".join(generator.choices([*WORDS, "unknown"], k=4))
        some = generator.sample(list(documents), 9)
        for names, given in ((documents, None), (documents, spans.rows_of(documents)), (some, spans.rows_of(some))):
            rows = sorted(spans.rows_of(names).tolist())
            scores = dict(zip(rows, bm25(query, [spans.texts[row] for row in rows]), strict=True))
            best = {}
            for row in sorted(rows, key=lambda row: (-round(scores[row], 5), row)):  # noqa: B023
                best.setdefault(spans.document_ids[row], row)
            (hits,) = ranker.rank([query], [given], depth)
            assert [row for row, _ in hits] == list(best.values())[:depth]
            assert [score for _, score in hits] == pytest.approx([scores[row] for row, _ in hits], rel=1e-5)


def test_a_document_counts_once_by_its_best_chunk_however_many_it_has():
    documents = {"long": ["kilo"] * 100, "best": ["zulu tango", "kilo zulu", "kilo"], "none": ["oscar"], "x": ["zulu"]}
    (hits,) = Bm25Ranker(spans_of(documents)).rank(["kilo"], [None], 3)
    assert [row for row, _ in hits] == [0, 102, 103]  # the shorter chunk of "best"; ties go to the lower row
    assert hits[0][1] == hits[1][1] > 0 == hits[2][1]


def test_bm25_without_known_words_orders_by_chance_and_counts():
    """The order of the rows would be a silent one, and a file may begin with what is asked for."""
    spans = spans_of({"0": ["  "], "1": ["the of a"], "2": ["kilo"], "3": ["\u6771\u4eac"]})
    ranker = Bm25Ranker(spans)
    for query in ("zulu", "the of", "?", ""):
        for rows in (None, np.arange(4)):
            (hits,) = ranker.rank([query], [rows], 9)
            assert sorted(hits) == [(row, 0.0) for row in range(4)] and ranker.rank([query], [rows], 9) == [hits]
    orders = {tuple(row for row, _ in ranker.rank([f"zulu {n}"], [None], 9)[0]) for n in range(40)}
    assert len(orders) > 10 and len(ranker.by_chance) == len(ranker.asked) == 44
    assert ranker.rank(["\u6771\u4eac"], [None], 1)[0][0][0] == 3
    assert ranker.by_chance == ranker.asked - {"\u6771\u4eac"}
    assert sorted(ranker.rank(["kilo"], [np.array([0, 1])], 9)[0]) == [(0, 0.0), (1, 0.0)]  # no candidate has a word
    assert ranker.rank(["kilo"], [np.zeros(0, np.int64)], 9) == [[]]
    assert Bm25Ranker(spans_of({"0": ["the"]})).rank(["kilo"], [None], 9) == [[(0, 0.0)]]


def test_bm25_reads_titles_and_stems_and_leaves_out_case_stop_words_and_deleted_rows():
    spans = spans_of({"0": ["The capital"], "1": [("Rivers", "flow")], "2": ["RIVER of the"]})
    (hits,) = Bm25Ranker(spans).rank(["Which river is the one?"], [None], 3)
    assert [row for row, _ in hits] == [2, 1, 0] and hits[2][1] == 0.0
    spans = spans_of({"0": ["zulu"], "1": ["kilo", "kilo kilo"], "2": ["oscar"]}, np.array([True, False, False, True]))
    assert [row for row, _ in Bm25Ranker(spans).rank(["kilo"], [None], 9)[0]] == [0, 3]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """(folder of a sentence-transformers model, its table of word vectors): a text is the mean of its words."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: n for n, w in enumerate(WORDS, 1)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).normal(size=(len(WORDS) + 1, 6)).astype(np.float32)
    table[0] = 0
    folder = tmp_path_factory.mktemp("encoder")
    module = StaticEmbedding(tokenizer, embedding_weights=table)
    library.SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return folder, dict(zip(WORDS, table[1:], strict=True))


def test_dense_scores_are_cosines_of_title_and_text(encoder):
    folder, table = encoder
    texts = [text or "kilo" for text in random_texts(random.Random(3), 40)]
    spans = spans_of({str(n): [("tango", texts[2 * n]), ("tango", texts[2 * n + 1])] for n in range(20)})
    ranker = DenseRanker(spans, str(folder))

    def vector(text: str) -> np.ndarray:
        total = sum(table[word].astype(np.float64) for word in text.split())
        return total / np.linalg.norm(total)

    queries = ["kilo zulu", "oscar", "bravo bravo tango"]
    found = ranker.rank(queries, [None] * 3, 20)
    for query, hits in zip(queries, found, strict=True):
        cosines = [float(vector(f"tango {text}") @ vector(query)) for text in texts]
        best = {}  # of each document, which has two chunks
        for row in sorted(range(40), key=lambda row: (-round(cosines[row], 5), row)):  # noqa: B023
            best.setdefault(row // 2, row)
        assert [row for row, _ in hits] == list(best.values())
        assert [score for _, score in hits] == pytest.approx([cosines[row] for row in best.values()], abs=1e-5)
    mine = spans.rows_of(["4", "17", "2"])
    for hits, everything in zip(ranker.rank(queries, [mine] * 3, 2), found, strict=True):
        expected = [hit for hit in everything if hit[0] in mine.tolist()][:2]  # other rows do not matter
        assert [row for row, _ in hits] == [row for row, _ in expected]
        assert [score for _, score in hits] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert ranker.rank(["kilo"], [np.zeros(0, np.int64)], 3) == [[]]


def test_dense_texts_without_a_known_word_score_zero(encoder):
    spans = spans_of({"0": ["unknown"], "1": ["kilo"], "2": ["unknown too"]})
    ranker = DenseRanker(spans, str(encoder[0]))
    assert [row for row, _ in ranker.rank(["kilo"], [None], 3)[0]] == [1, 0, 2]
    assert ranker.rank(["unknown"], [None], 3) == [[(0, 0.0), (1, 0.0), (2, 0.0)]]


def test_a_folder_that_is_no_encoder_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match=f"--dense must name a sentence-transformers model, got {tmp_path}"):
        DenseRanker(spans_of({"0": ["kilo"]}), str(tmp_path))
