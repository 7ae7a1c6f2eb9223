"""Search of a compressed corpus against plain tensor arithmetic: codecs, sizes, indexes, spans, ties, changes.

The helpers that make corpora are shared with the other tests of corpora.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_clara import CompressedCorpus
from modeling_clara.retrieval_clara import cosine_scores

KINDS = ["flat", "hnsw", "ivf"]
CODECS = ["float16", "int8", "int4"]
LONG = " ".join(f"Paris {number} is the capital of France." for number in range(60))


def make_memory(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 4, 32) memories that look like real ones: a common mean, few directions, clusters."""
    fixed = torch.Generator().manual_seed(12345)
    mean = torch.randn(128, generator=fixed) * 2
    directions = torch.randn(16, 128, generator=fixed)
    centres = torch.randn(40, 16, generator=fixed)
    own = torch.Generator().manual_seed(seed)
    place = centres[torch.randint(40, (n,), generator=own)] + 0.6 * torch.randn(n, 16, generator=own)
    return (mean + place @ directions + 0.3 * torch.randn(n, 128, generator=own)).view(n, 4, 32)


def make_documents(n: int, seed: int = 0, prefix: str = "d") -> list[dict]:
    """Documents of one span that bring their memory; `part` is 0 to 99, `year` 2000 to 2009."""
    return [
        {"id": f"{prefix}{row}", "text": f"text {row}", "memory": memory, "year": 2000 + row % 10, "part": row % 100}
        for row, memory in enumerate(make_memory(n, seed))
    ]


def ids(found: list[list[dict]]) -> list[list[str]]:
    return [[hit["document_id"] for hit in hits] for hits in found]


def ranking(corpus, queries: torch.Tensor, top_k: int, keep: Callable[[dict], bool] = lambda document: True) -> list:
    """(document_id, span, score) rows of every question, by `cosine_scores` over all memories of the corpus."""
    documents = [document for document in corpus.get(list(corpus.document_ids())) if keep(document)]
    if not documents:
        return [[] for _ in queries]
    memory = torch.cat([document["memory"] for document in documents])
    scores = cosine_scores(queries, memory.expand(len(queries), *memory.shape), queries.shape[1])
    parts = scores.split([len(document["memory"]) for document in documents], dim=1)
    best = torch.stack([part.max(1).values for part in parts], 1)
    spans = torch.stack([part.max(1).indices for part in parts], 1)
    order = best.sort(dim=1, descending=True, stable=True).indices[:, :top_k].tolist()
    return [
        [(documents[place]["document_id"], int(spans[row, place]), float(best[row, place])) for place in places]
        for row, places in enumerate(order)
    ]


def assert_ranked(found: list[list[dict]], expected: list) -> None:
    """Ids, spans and order are equal, scores to 1e-5."""
    assert len(found) == len(expected)
    for hits, rows in zip(found, expected, strict=True):
        assert [(hit["document_id"], hit["span"]) for hit in hits] == [row[:2] for row in rows]
        assert [hit["score"] for hit in hits] == pytest.approx([row[2] for row in rows], abs=1e-5)


def recall(corpus, queries: torch.Tensor, top_k: int = 10, where: dict | None = None) -> float:
    """Share of the exact results that the index finds."""
    found = ids(corpus.search(queries, top_k, where))
    exact = ids(corpus.search(queries, top_k, where, exact=True))
    assert [len(row) for row in found] == [len(row) for row in exact]
    both = sum(len(set(mine) & set(other)) for mine, other in zip(found, exact, strict=True))
    return both / sum(map(len, exact))


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(20, seed=7)


@pytest.fixture(scope="module", params=CODECS)
def corpus(request, shared_model, tmp_path_factory) -> CompressedCorpus:
    """100 documents with memories and three long texts, in several shards; only read."""
    folder = tmp_path_factory.mktemp("corpus") / request.param
    texts = [
        {"id": f"long{row}", "title": f"Book {row}", "text": LONG.replace("Paris", name), "year": 1990}
        for row, name in enumerate(["Paris", "Rome", "Berlin"])
    ]
    documents = make_documents(50) + texts[:2] + make_documents(50, seed=1, prefix="e") + texts[2:]
    return CompressedCorpus.build(shared_model, documents, folder, codec=request.param, shard_size=30)


@pytest.fixture(scope="module")
def large(shared_model, tmp_path_factory) -> Path:
    """A corpus of 4,000 rows in six shards; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("large") / "corpus"
    CompressedCorpus.build(shared_model, make_documents(4000), folder, shard_size=700)
    return folder


@pytest.fixture(scope="module")
def with_long_document(shared_model, tmp_path_factory) -> Path:
    """1,100 documents of one span and one of hundreds."""
    folder = tmp_path_factory.mktemp("long") / "corpus"
    text = " ".join(f"Paris {number} is the capital of France." for number in range(1200))
    documents = [*make_documents(1100), {"id": "long", "text": text}]
    CompressedCorpus.build(shared_model, documents, folder, codec="float16")
    return folder


@pytest.fixture
def small(shared_model, tmp_path) -> CompressedCorpus:
    """40 documents as float16, to change."""
    return CompressedCorpus.build(shared_model, make_documents(40), tmp_path / "small", codec="float16", shard_size=16)


# --- against arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("top_k", [1, 7, 500])
def test_search_is_the_cosine_of_the_stored_memories(corpus, queries, shared_model, size, top_k):
    texts = shared_model.encode_queries(["Where is Paris 17?", "Rome"], memory_size=size)
    asked = torch.cat([queries[:6, :size], texts])
    expected = ranking(corpus, asked, top_k)
    assert_ranked(corpus.search(asked, top_k), expected)
    assert_ranked(corpus.search(asked, top_k, exact=True), expected)
    assert_ranked(corpus.search(asked, top_k, shortlist=1), expected)


def test_stored_memories_are_those_given(corpus):
    limit = {"float16": 2e-3, "int8": 0.05, "int4": 0.6}[corpus.manifest.codec]
    stored = torch.stack([corpus.get([f"d{row}"])[0]["memory"][0] for row in range(50)])
    assert stored.dtype == torch.float32
    assert (stored - make_memory(50)).square().mean().sqrt() < limit


def test_questions_do_not_hang_on_each_other(corpus, queries):
    many = torch.cat([queries * factor for factor in (1.0, 0.5, 100.0)])  # more than one block
    together = corpus.search(many, 9)
    for number, query in enumerate(many):
        (alone,) = corpus.search(query[None], 9)
        assert [hit["document_id"] for hit in alone] == [hit["document_id"] for hit in together[number]]
        assert [hit["score"] for hit in alone] == pytest.approx([hit["score"] for hit in together[number]], abs=1e-6)
    assert ids(together[:20]) == ids(together[20:40]) == ids(together[40:])
    assert corpus.search(queries[:0], 5) == []


def test_questions_of_any_dtype_are_left_as_they_were(corpus, queries):
    asked = queries[:2].clone().requires_grad_()
    expected = ids(corpus.search(queries[:2], 3))
    for given in (asked, asked.double(), queries[:2].tolist(), queries[:2].numpy()):
        assert ids(corpus.search(given, 3)) == expected
    assert asked.grad is None and torch.equal(asked, queries[:2])
    assert len(corpus.search(queries[:2].bfloat16(), 3)[0]) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_index_finds_what_the_exact_scan_finds(large, queries, kind, size):
    opened = CompressedCorpus.open(large, index=kind)
    asked = queries[:, :size]
    assert recall(opened, asked) >= 0.95
    for where in ({"part": {"$lt": 27}}, {"part": {"$lt": 60}}, {"part": 3}):
        assert recall(opened, asked, where=where) >= 0.95
    assert opened.search(asked, 10, {"part": 100}) == [[]] * len(asked)


def test_the_exact_scan_of_many_rows_is_the_cosine_of_the_stored_memories(large, queries):
    opened = CompressedCorpus.open(large)
    assert_ranked(opened.search(queries, 10, exact=True), ranking(opened, queries, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_indexes_see_what_was_added_and_deleted(large, queries, kind, tmp_path):
    shutil.copytree(large, tmp_path / "copy")
    opened = CompressedCorpus.open(tmp_path / "copy", index=kind)
    best = sorted({row[0] for row in ids(opened.search(queries, 1))})
    assert opened.delete(best) == len(best)
    opened.add([{**document, "memory": queries[row]} for row, document in enumerate(make_documents(9, prefix="new"))])
    assert len(opened.snapshot.segments) == 2
    found = ids(opened.search(queries, 10))
    assert [row[0] for row in found[:9]] == [f"new{row}" for row in range(9)]
    assert not set(best) & set(sum(found, []))
    assert recall(opened, queries) >= 0.95 and recall(opened, queries[:, :2], where={"part": {"$gte": 5}}) >= 0.95
    again = CompressedCorpus.open(tmp_path / "copy", index=kind)
    assert ids(again.search(queries, 10)) == found
    again.compact()
    assert ids(again.search(queries, 10, exact=True)) == ids(opened.search(queries, 10, exact=True))
    assert recall(again, queries) >= 0.95


@pytest.mark.parametrize("n", [1, 10])
def test_a_corpus_that_grew_from_almost_nothing_is_searched_well(shared_model, queries, tmp_path, n):
    opened = CompressedCorpus.build(shared_model, make_documents(n, seed=1, prefix="first"), tmp_path / "corpus")
    opened.add(make_documents(3000))
    assert recall(opened, queries) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 17])
def test_an_index_of_few_documents(shared_model, queries, tmp_path, kind, n):
    CompressedCorpus.build(shared_model, make_documents(n), tmp_path / "corpus")
    opened = CompressedCorpus.open(tmp_path / "corpus", index=kind)
    assert_ranked(opened.search(queries, 5), ranking(opened, queries, 5))


# --- documents and spans ---------------------------------------------------------------------------------------------


def test_top_k_counts_documents_each_with_its_best_span(corpus, shared_model):
    spans = shared_model.processor.split_document({"title": "Book 1", "text": LONG.replace("Paris", "Rome")})
    assert len(spans) > 5
    asked = corpus.get(["long1"])[0]["memory"]
    found = corpus.search(asked, 4)
    assert len(asked) == len(spans)
    for number, hits in enumerate(found):
        assert (hits[0]["document_id"], hits[0]["span"], hits[0]["text"]) == ("long1", number, spans[number]["text"])
        assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
        assert len({hit["document_id"] for hit in hits}) == 4


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw"])
def test_a_document_of_hundreds_of_spans_leaves_room_for_others(with_long_document, kind):
    opened = CompressedCorpus.open(with_long_document, index=None if kind == "exact" else kind)
    memory = opened.get(["long"])[0]["memory"]
    assert len(memory) > 200
    for top_k, shortlist in ((5, 10), (5, 1), (20, 100), (1101, 100), (5000, 100)):
        found = opened.search(memory[[0, 150]], top_k, shortlist=shortlist, exact=kind == "exact")
        assert [(hits[0]["document_id"], hits[0]["span"]) for hits in found] == [("long", 0), ("long", 150)]
        assert [len(hits) for hits in found] == [min(top_k, 1101)] * 2
        assert all(len({hit["document_id"] for hit in hits}) == len(hits) for hits in found)
    if kind != "hnsw":
        assert_ranked(opened.search(memory[[0, 150]], 20), ranking(opened, memory[[0, 150]], 20))


def test_equal_memories_tie_to_the_lower_row(shared_model, queries, tmp_path):
    documents = make_documents(300)
    for row in range(0, 300, 3):
        documents[row]["memory"] = queries[0]
    opened = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", shard_size=70)
    (hits,) = opened.search(queries[:1], 100)
    assert [hit["document_id"] for hit in hits] == [f"d{row}" for row in range(0, 300, 3)]
    assert len({hit["score"] for hit in hits}) == 1
    opened.delete(["d0", "d6"])
    opened.add([{"id": "last", "text": "x", "memory": queries[0]}])
    assert ids(opened.search(queries[:1], 3)) == [["d3", "d9", "d12"]]
    assert ids(opened.search(queries[:1], 99))[0][-1] == "last"


@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_more_equal_memories_than_the_shortlist_holds_tie_to_the_lower_row(shared_model, queries, tmp_path, kind):
    documents = make_documents(2000)
    for row in range(1000, 1400):
        documents[row]["memory"] = queries[0]
    CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    opened = CompressedCorpus.open(tmp_path / "corpus", index=None if kind == "exact" else kind)
    found = opened.search(queries[:1], 5, exact=kind == "exact")
    assert ids(found) == [[f"d{row}" for row in range(1000, 1005)]]


def test_memories_of_zeros_score_zero(shared_model, queries, tmp_path):
    documents = [{**document, "memory": torch.zeros(4, 32)} for document in make_documents(5)]
    opened = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec="float16")
    for asked in (queries[:1], torch.zeros(1, 4, 32)):
        assert [(hit["document_id"], hit["score"]) for hit in opened.search(asked, 2)[0]] == [("d0", 0), ("d1", 0)]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_one_absurd_memory_does_not_spoil_the_others(shared_model, tmp_path, codec):
    documents = make_documents(50)
    documents[3]["memory"] = torch.full((4, 32), 1e25)
    opened = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec=codec)
    found = opened.search(torch.stack([documents[row]["memory"] for row in (0, 10, 49)]), 5)
    assert [hits[0]["document_id"] for hits in found] == ["d0", "d10", "d49"]
    assert all(-1.001 <= hit["score"] <= 1.001 for hits in found for hit in hits)


# --- hits and documents ----------------------------------------------------------------------------------------------


def test_hits_have_everything_that_was_stored(corpus, queries):
    for hits in corpus.search(queries[:3], 103):
        for hit in hits:
            assert list(hit) == ["document_id", "span", "title", "text", "score", "memory", "metadata"]
            (document,) = corpus.get([hit["document_id"]])
            assert hit["memory"].shape == (4, 32) and hit["memory"].dtype == torch.float32
            assert torch.equal(hit["memory"], document["memory"][hit["span"]])
            assert hit["metadata"] == document["metadata"] and set(hit["metadata"]) == {"year", "part"}
            span = document["spans"][hit["span"]]
            assert (hit["title"], hit["text"], hit["span"]) == (span["title"], span["text"], span["span"])
            assert type(hit["score"]) is float and type(hit["span"]) is int
    assert corpus.get(["d7"])[0]["metadata"] == {"year": 2007, "part": 7}
    assert corpus.get(["long2"])[0]["metadata"] == {"year": 1990, "part": None}


def test_documents_by_id(corpus):
    every = list(corpus.document_ids())
    assert every == [f"d{n}" for n in range(50)] + ["long0", "long1"] + [f"e{n}" for n in range(50)] + ["long2"]
    assert len(corpus) == len(every) == 103
    assert [document["document_id"] for document in corpus.get(["e3", "d0", "e3"])] == ["e3", "d0", "e3"]
    assert "d49" in corpus and "long2" in corpus and "d50" not in corpus and "" not in corpus and "d49#0" not in corpus
    assert 5 not in corpus and None not in corpus
    long = corpus.get(["long0"])[0]
    assert long["title"] == "Book 0" and [span["span"] for span in long["spans"]] == list(range(len(long["spans"])))
    assert long["memory"].shape == (len(long["spans"]), 4, 32)
    assert all(span["n_tokens"] > 0 for span in long["spans"])
    with pytest.raises(KeyError, match="nobody"):
        corpus.get(["d0", "nobody"])
    with pytest.raises((KeyError, TypeError), match="ids"):
        corpus.get([5])


def test_options_are_those_of_the_view_alone(corpus, queries):
    before = ids(corpus.search(queries, 5))
    view = corpus.with_options(where={"year": {"$gte": 2005}}, exact=True, shortlist=7)
    assert ids(corpus.search(queries, 5)) == before and view is not corpus
    found = view.search(queries, 5)
    assert all(hit["metadata"]["year"] >= 2005 for hits in found for hit in hits)
    assert ids(found) == ids(corpus.search(queries, 5, {"year": {"$gte": 2005}}))
    assert ids(view.search(queries, 5, {"year": 2001})) == ids(corpus.search(queries, 5, {"year": 2001}))
    assert ids(view.with_options(shortlist=9).search(queries, 5)) == ids(found)  # what is left out stays
    assert len(view) == len(corpus) and "d0" in view


def test_views_see_the_changes_of_each_other(small, queries):
    view = small.with_options(where={"year": 2042})
    assert view.search(queries[:1], 5) == [[]]
    small.add([{"id": "new", "text": "new", "memory": queries[0], "year": 2042}])
    assert ids(view.search(queries[:1], 5)) == [["new"]] and "new" in view and len(view) == 41
    view.delete(["new"])
    assert "new" not in small and ids(small.search(queries[:1], 5, {"year": 2042})) == [[]]


# --- opening ---------------------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: equal only if nothing was written again."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_opening_again_derives_nothing(large, queries, tmp_path):
    shutil.copytree(large, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    first = CompressedCorpus.open(tmp_path / "copy").prepare(2)
    written = stamps(tmp_path)
    again = CompressedCorpus.open(tmp_path / "copy").prepare(2)
    for size in (2, 4):
        assert ids(again.search(queries[:, :size], 9)) == ids(first.search(queries[:, :size], 9))
    assert stamps(tmp_path) == written


@pytest.mark.parametrize("obstacle", ["a file", "permissions"])
def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(large, queries, tmp_path, obstacle):
    folder = tmp_path / "copy"
    shutil.copytree(large, folder, ignore=shutil.ignore_patterns("index"))
    if obstacle == "a file":
        (folder / "index").touch()
    else:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user can write everywhere")
    before = stamps(folder)
    opened = CompressedCorpus.open(folder)
    assert ids(opened.search(queries, 9)) == ids(CompressedCorpus.open(large).search(queries, 9))
    assert opened.index_folder.is_relative_to(os.environ["HF_HOME"]) and stamps(folder) == before
    folder.chmod(0o755)


def test_refresh_shows_what_another_object_changed(small, queries):
    other = CompressedCorpus.open(small.folder)
    before = ids(other.search(queries, 5))
    small.add([{"id": "new", "text": "new", "memory": queries[0]}])
    small.delete(["d1", "d2"])
    small.compact(shard_size=7)
    assert ids(other.search(queries, 5)) == before and "new" not in other and len(other) == 40
    assert all(len(row) == 40 for row in ids(other.search(queries[:, :2], 99)))
    assert other.refresh() is other and len(other) == 39 and "d1" not in other
    assert ids(other.search(queries, 5)) == ids(small.search(queries, 5))
    assert ids(other.search(queries[:1], 1)) == [["new"]]


def test_an_emptied_corpus_finds_nothing_and_takes_documents_again(shared_model, queries, tmp_path):
    opened = CompressedCorpus.build(shared_model, make_documents(20), tmp_path / "corpus")
    opened.delete(list(opened.document_ids()))
    assert len(opened) == 0 and opened.search(queries, 5) == [[]] * 20 and list(opened.document_ids()) == []
    assert opened.search(queries[:1], 5, {"year": 2001}, hybrid=True, questions=["text"]) == [[]]
    opened.compact()
    assert opened.search(queries, 5) == [[]] * 20
    assert CompressedCorpus.open(opened.folder, index="flat").search(queries, 5) == [[]] * 20
    opened.add(make_documents(3))
    assert_ranked(opened.search(queries, 5), ranking(opened, queries, 5))
