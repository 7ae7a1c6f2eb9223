"""Hybrid search: the order of BM25 over title and text, fused with that of the memories by reciprocal rank.

BM25 is computed here by bm25s itself, the fusion by hand.
"""

import doctest
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from corpora import assert_ranked, ids, make_documents, make_memory, ranking

from modeling_clara import CompressedCorpus, lexical_clara
from modeling_clara.lexical_clara import fuse, fuse_ranks, fuse_scores, split_words

bm25s = pytest.importorskip("bm25s")

WORDS = "river city capital bridge museum harbour tower market opera park über 東京都".split()
QUESTIONS = ["Which river flows under the bridge?", "opera OPERA über", "number17 東京都", "museum"]


def make_texts(n: int, seed: int = 0) -> list[dict]:
    """Documents of 3 to 30 random words, with titles."""
    random = np.random.default_rng(seed)
    documents = make_documents(n, seed)
    for row, document in enumerate(documents):
        document["title"] = f"{random.choice(WORDS)} Number{row}"
        document["text"] = " ".join(random.choice(WORDS, random.integers(3, 30)))
    return documents


def words_scores(documents: list[dict], question: str) -> dict[str, float]:
    """Ids of the documents that have a word of the question, the best by BM25 first, with their scores."""
    index = bm25s.BM25()
    texts = [f"{document['title']} {document['text']}" for document in documents]
    index.index(split_words(texts), show_progress=False)
    (words,) = split_words([question])
    scores = index.get_scores([word for word in words if word in index.vocab_dict])
    order = np.argsort(-scores, kind="stable")
    return {documents[row]["id"]: float(scores[row]) for row in order if scores[row] > 0}


def fused_order(by_memory: list[str], by_words: Iterable[str], depth: int = 100) -> list[tuple[str, float]]:
    """Ids with their summed reciprocal ranks, the best first."""
    scores = {}
    for order in (by_memory[:depth], [*by_words][:depth]):
        for place, document_id in enumerate(order):
            scores[document_id] = scores.get(document_id, 0) + 1 / (61 + place)
    return sorted(scores.items(), key=lambda item: -item[1])


def assert_fused(found: list[dict], expected: list[tuple[str, float]]) -> None:
    """The ids are those expected; ones of equal scores may stand in any order among each other."""
    scores = dict(expected)
    assert len({hit["document_id"] for hit in found}) == len(found)
    wanted = [score for _, score in expected[: len(found)]]
    assert [scores[hit["document_id"]] for hit in found] == pytest.approx(wanted)


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(4, seed=7)


@pytest.mark.parametrize("n", [60, 1500])
def test_both_orders_are_fused_by_reciprocal_rank(shared_model, queries, tmp_path, n):
    documents, questions = make_texts(n), QUESTIONS
    if n > 1000:  # words that few documents have, so that no tie stands where an order is cut off
        questions = ["Number7 and number1200", "NUMBER3?", "Number4 Number5 Number6", "number99"]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", shard_size=400)
    dense = [[row[0] for row in rows] for rows in ranking(corpus, queries, 100)]
    found = corpus.search(queries, 20, hybrid="ranks", questions=questions)
    for hits, by_memory, question in zip(found, dense, questions, strict=True):
        assert len(hits) == 20
        assert_fused(hits, fused_order(by_memory, words_scores(documents, question)))
    view = corpus.with_options(hybrid="ranks")
    assert ids(view.search(queries, 20, questions=questions)) == ids(found)
    assert ids(view.search(queries, 20, questions=questions, hybrid=False)) == [row[:20] for row in dense]
    again = CompressedCorpus.open(tmp_path / "corpus").search(queries, 20, hybrid="ranks", questions=questions)
    assert ids(again) == ids(found)
    if n < 1000:  # a short shortlist limits both orders
        found = corpus.search(queries, 4, hybrid="ranks", questions=questions, shortlist=10)
        for hits, by_memory, question in zip(found, dense, questions, strict=True):
            assert_fused(hits, fused_order(by_memory, words_scores(documents, question), depth=10))


def test_scores_are_fused_over_what_both_have_found(shared_model, queries, tmp_path):
    """By hand: 0.3 times the cosine and 0.7 times BM25, each with mean 0 and deviation 1 over all 60 documents."""
    documents = make_texts(60)
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    found = corpus.with_options(hybrid="scores").search(queries, 60, questions=QUESTIONS)
    assert ids(corpus.search(queries, 60, questions=QUESTIONS, hybrid=True)) == ids(found)
    for hits, dense, question in zip(found, ranking(corpus, queries, 60), QUESTIONS, strict=True):
        names, cosines = [row[0] for row in dense], np.array([row[2] for row in dense])
        words = words_scores(documents, question)
        words = np.array([words.get(name, 0.0) for name in names])
        fused = sum(share * (one - one.mean()) / one.std() for share, one in ((0.3, cosines), (0.7, words)))
        found_names = [hit["document_id"] for hit in hits]
        expected, scores = dict(zip(names, fused, strict=True)), dict(zip(names, cosines, strict=True))
        assert [*map(expected.get, found_names)] == pytest.approx(sorted(fused, reverse=True), abs=1e-5)
        assert [hit["score"] for hit in hits] == pytest.approx([*map(scores.get, found_names)], abs=1e-5)
    for call in (lambda: corpus.with_options(hybrid="rank"), lambda: corpus.search(queries, 9, hybrid="rank")):
        with pytest.raises(ValueError, match="`hybrid` must be True, False, 'scores' or 'ranks', got 'rank'"):
            call()


def test_the_score_is_the_cosine_also_if_only_the_words_of_a_chunk_were_found(shared_model, queries, tmp_path):
    documents = make_texts(1500)
    memories = torch.stack([document["memory"] for document in documents])
    number = int(torch.cosine_similarity(memories.flatten(1), queries[0].flatten(), dim=1).argmin())
    farthest = documents[number]["id"]
    documents[number]["text"] += " xylophonium"
    filler = " ".join(["The Seine flows through Paris."] * 20)
    documents.append({"id": "long", "text": f"{filler} A glockenspiel. {filler}"})
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    assert farthest not in ids(corpus.search(queries[:1], 1000))[0]
    (hits,) = corpus.search(queries[:1], 5, hybrid=True, questions=["What is a Xylophonium?"])
    assert farthest in [hit["document_id"] for hit in hits[:2]]
    (others,) = corpus.search(queries[:1], 3, hybrid=True, questions=["glockenspiel"])
    assert any("glockenspiel" in hit["text"] for hit in others)
    for hit in hits + others:
        found = corpus.get([hit["document_id"]])[0]
        assert torch.equal(hit["memory"], found["memory"][hit["span"]])
        assert hit["text"] == found["spans"][hit["span"]]["text"]
        cosine = torch.cosine_similarity(hit["memory"].flatten(), queries[0].flatten(), dim=0)
        assert hit["score"] == pytest.approx(float(cosine), abs=1e-5)


def test_filters_and_changes_hold_for_words_too(shared_model, queries, tmp_path):
    documents = make_texts(120)
    for row in (3, 14, 25):
        documents[row]["text"] += " xylophonium"
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus").with_options(hybrid=True)
    asked = {"questions": ["xylophonium"] * 4}
    assert all({"d3", "d14", "d25"} <= set(row) for row in ids(corpus.search(queries, 120, **asked)))
    for row in ids(corpus.search(queries, 120, {"year": {"$gte": 2004}}, **asked)):
        assert {"d14", "d25"} <= set(row) and all(int(name[1:]) % 10 >= 4 for name in row) and len(row) == 72
    corpus.delete(["d14"])
    for row in ids(corpus.search(queries, 5, {"year": {"$lt": 2006}}, **asked)):
        assert set(row[:3]) >= {"d3", "d25"} and "d14" not in row
    assert corpus.search(queries, 5, {"document_id": "d14"}, **asked) == [[]] * 4
    asked = {"questions": ["marimba"]}
    before = ids(corpus.search(queries[:1], 3, **asked))
    corpus.add([{"id": "new", "text": "A marimba.", "memory": -queries[0], "year": 1}])
    assert "new" in ids(corpus.search(queries[:1], 3, **asked))[0]
    corpus.update([{"id": "new", "text": "A glockenspiel.", "memory": -queries[0], "year": 1}])
    assert ids(corpus.search(queries[:1], 3, **asked)) == before
    for _ in range(2):
        for opened in (corpus, CompressedCorpus.open(corpus.folder).with_options(hybrid=True)):
            assert "new" in ids(opened.search(queries[:1], 3, questions=["Glockenspiel?"]))[0]
        corpus.compact()


def test_equal_words_tie_to_the_lower_row(shared_model, queries, tmp_path):
    documents = [{**document, "text": "the same"} for document in make_documents(900)]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    (best,) = ids(corpus.search(queries[:1], 10, shortlist=10))
    (hits,) = corpus.search(queries[:1], 10, hybrid="ranks", questions=["same"], shortlist=10)
    assert_fused(hits, fused_order(best, [f"d{row}" for row in range(10)], depth=10))


def test_without_a_known_word_a_search_goes_by_memories_alone(shared_model, queries, tmp_path):
    corpus = CompressedCorpus.build(shared_model, make_texts(40), tmp_path / "corpus")
    for question in ("zzz qqq", "?", "", "a b c", "\ud800", "🇫🇷", "\x00"):
        found = corpus.search(queries[:1], 7, hybrid=True, questions=[question])
        assert_ranked(found, ranking(corpus, queries[:1], 7))
    assert corpus.search(queries[:0], 7, hybrid=True, questions=[]) == []
    for number, text in enumerate(("a", "?!", "🇫🇷 🇩🇪")):
        documents = [{**document, "text": text} for document in make_documents(5)]
        corpus = CompressedCorpus.build(shared_model, documents, tmp_path / str(number))
        found = corpus.search(queries, 7, hybrid=True, questions=QUESTIONS)
        assert_ranked(found, ranking(corpus, queries, 7))


def test_fused_ranks():
    failed, attempted = doctest.testmod(lexical_clara)
    assert failed == 0 and attempted >= 1
    assert fuse_scores([0.5, 0.5, 0.5], [1.0, 3.0, 2.0], 0.5) == pytest.approx([-(1.5**0.5) / 2, 1.5**0.5 / 2, 0])
    assert fuse_scores([0.2, 0.4], [0, 0]).tolist() == pytest.approx([-0.3, 0.3]) and fuse_scores([], []).size == 0
    assert fuse_scores([0.1] * 3, [7.7] * 3).tolist() == [0, 0, 0]  # equal scores have no deviation to divide by
    cosines = {4: 0.5, 3: 0.5, 9: 0.6, 1: 0.1}
    assert fuse([9, 3, 4, 1], {}, cosines, "scores") == [9, 3, 4, 1]  # ties go to the lower item
    assert fuse([9, 3, 4, 1], {1: 3.0}, cosines, "scores") == [1, 9, 3, 4]
    assert fuse([9, 3], {1: 3.0, 4: 2.0}, cosines, "ranks") == [9, 1, 3, 4]  # equal ranks: the larger cosine
    assert fuse_ranks([]) == {} and fuse_ranks([[], []]) == {}
    assert fuse_ranks([["a", "b"], ["b"]]) == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 1 / 61})
    both, one = fuse_ranks([[1, 2], [3, 1]]), fuse_ranks([[1]])
    assert max(both, key=both.get) == 1 and one[1] < both[1]
