"""The words of BM25 in all scripts: what is one, what is found, and that an index of other words is made again."""

import unicodedata

import numpy as np
import pytest
from corpora import ids, make_documents, make_memory
from scripts import CHINESE, JAPANESE, THAI, make_passages

from modeling_clara import CompressedCorpus, lexical_clara
from modeling_clara.lexical_clara import Bm25, split_words

pytest.importorskip("bm25s")


def words(text: str) -> list[str]:
    return split_words([text])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is vitamin C in R, or a B?", ["vitamin", "c", "r", "b"]),
        ("It's Otto's; don\u2019t rivers' l\u2019eau 'R'", ["otto", "don", "river", "l", "eau", "r"]),
        ("snake_case 709,037 x\u00b2", ["snake", "case", "709", "037", "x2"]),
        ("\uff21\uff22\uff23 \uff76\uff80\uff76\uff85", ["abc", "カタ", "タカ", "カナ"]),  # full and half width
        ("Stra\u00dfe STRASSE", ["strass", "strass"]),
        ("हिन्दी कार्यालय বাংলা தமிழ்", ["हिन्दी", "कार्यालय", "বাংলা", "தமிழ்"]),
        ("עִבְרִית العَرَبِيَّة", ["עִבְרִית", "العَرَبِيَّة"]),
        ("한국어는 재미있다", ["한국어는", "재미있다"]),
        ("東京都は1999年にB社・水", ["東京", "京都", "都は", "1999", "年に", "b", "社", "水"]),
        ("葛\U000e0100飾 soft\u00adware", ["葛飾", "softwar"]),
        ("ກາ ကာကာ សាសា ที่นี่", ["ກາ", "ကာကာ", "សាសា", "ที่นี่"]),
        ("🇫🇷 ?! _ \ud800 \u0301", []),
    ],
    ids=ascii,
)
def test_what_a_word_is(text, expected):
    assert words(text) == expected
    assert all(words(unicodedata.normalize(form, text)) == expected for form in ("NFC", "NFD", "NFKC"))
    assert words(text.upper()) == words(text.lower()) == expected


def test_texts_are_split_one_by_one():
    texts = ["The river", "", "東京", "rivers"]
    assert split_words(texts) == [words(text) for text in texts] == [["river"], [], ["東京"], ["river"]]
    assert split_words([]) == []


@pytest.mark.parametrize(
    ("script", "n", "n_questions"), [(CHINESE, 300, 100), (JAPANESE, 100, 40), (THAI, 80, 40)], ids=("zh", "ja", "th")
)
def test_text_without_spaces_is_found(script, n, n_questions):
    """The gold passage is among 20 candidates for nine questions of ten; by chance it would be for 1 of 15 or of 4."""
    texts, questions = make_passages(script, n, n_questions)
    bm25, found = Bm25.of_words(split_words(texts)), 0
    for question, gold in questions:
        scores = bm25.scores(words(question))
        found += bool(scores[gold] > 0 and np.sum(scores >= scores[gold]) <= 20)
    assert found >= 0.9 * n_questions


def test_hybrid_search_finds_chinese(shared_model, tmp_path):
    texts, questions = make_passages(CHINESE, 60, 10)
    documents = [{**document, "text": text} for document, text in zip(make_documents(60), texts, strict=True)]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus").with_options(hybrid=True)
    found = corpus.search(make_memory(10, 3), 20, questions=[question for question, _ in questions])
    assert all(f"d{gold}" in names for names, (_, gold) in zip(ids(found), questions, strict=True))


def test_an_index_of_other_words_is_made_again(shared_model, tmp_path, monkeypatch):
    documents = [{**document, "text": "xylophonium"} for document in make_documents(3)]
    folder = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus").folder
    asked = {"hybrid": True, "questions": ["xylophonium"]}
    with monkeypatch.context() as patch:
        patch.setattr(lexical_clara, "WORDS", "english words, stemmed")
        CompressedCorpus.open(folder).search(make_memory(1), 3, **asked)
        (old,) = (folder / "index").glob("bm25-*")
    CompressedCorpus.open(folder).search(make_memory(1), 3, **asked)
    (new,) = (folder / "index").glob("bm25-*")
    assert new != old
