"""Changing a corpus: add, update, delete, compact and convert, each against what a plain dictionary would hold.

Documents bring their memories. Long histories and other processes are in test_corpus_histories.py.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from modeling_clara import CompressedCorpus

CODECS = ("float16", "int8", "int4")
# of a memory, as a share of its length: rounding to 10 bits, 8 bits and 4 bits
ERRORS = {"float16": 1e-3, "int8": 0.02, "int4": 0.2}


def memory(seed: int) -> torch.Tensor:
    """(4, 32) float32 that float16 holds exactly."""
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).half().float()


def make(name: str, seed: int, **fields) -> dict:
    """A document with its memory; both tell the seed."""
    return {"id": name, "text": f"text {seed} of {name}", "memory": memory(seed), "year": 2000 + seed, **fields}


def make_many(count: int, name: str = "d", first: int = 0) -> list[dict]:
    return [make(f"{name}{index}", index) for index in range(first, first + count)]


def build(model, path: Path, count: int = 10, **options) -> CompressedCorpus:
    return CompressedCorpus.build(model, make_many(count), path, **{"codec": "float16", "shard_size": 4} | options)


@pytest.fixture
def corpus(shared_model, tmp_path) -> CompressedCorpus:
    """d0 to d9 as float16 in three shards."""
    return build(shared_model, tmp_path / "corpus")


def read_json(corpus) -> dict:
    return json.loads((corpus.folder / "corpus.json").read_text())


def edit_json(corpus, **fields) -> None:
    (corpus.folder / "corpus.json").write_text(json.dumps(read_json(corpus) | fields))


def read_all(corpus) -> list[dict]:
    """Every document, in order."""
    ids = list(corpus.document_ids())
    return corpus.get(ids) if ids else []


def texts(corpus) -> dict[str, str]:
    """The text of every document, in order."""
    return {found["document_id"]: found["spans"][0]["text"] for found in read_all(corpus)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_search_is_exact(corpus, found: list[dict]) -> None:
    """Search finds what float64 cosines of all stored memories say, for both sizes."""
    for k in (2, 4):
        query = torch.randn(3, k, 32, generator=torch.Generator().manual_seed(k))
        if found:
            vectors = torch.cat([f["memory"][:, :k].flatten(1) for f in found]).double()
            names = [f["document_id"] for f in found for _ in f["spans"]]
            cosines = torch.nn.functional.cosine_similarity(query.double().flatten(1)[:, None], vectors[None], dim=-1)
        for question, hits in enumerate(corpus.search(query, 7)):
            scores = {}
            for name, score in zip(names, cosines[question].tolist(), strict=True) if found else []:
                scores[name] = max(score, scores.get(name, -1))
            expected = sorted(scores, key=lambda name: -scores[name])[:7]
            assert [hit["document_id"] for hit in hits] == expected
            assert [hit["score"] for hit in hits] == pytest.approx([scores[name] for name in expected], abs=1e-5)


def assert_holds(corpus, expected: dict[str, dict], error: float = 1e-3) -> None:
    """The corpus has exactly these documents in this order, with their memories, and every byte is right."""
    found = read_all(corpus)
    assert [document["document_id"] for document in found] == list(expected) and len(corpus) == len(expected)
    for document, given in zip(found, expected.values(), strict=True):
        assert [span["text"] for span in document["spans"]] == [given["text"]]
        assert relative_error(document["memory"][0], given["memory"]) <= error
        assert document["metadata"] == {"year": given["year"]} and document["title"] == ""
    content = read_json(corpus)
    assert content["n_documents"] == content["n_spans"] == len(expected)
    assert_search_is_exact(corpus, found)
    assert corpus.verify() == []


def by_id(documents: list[dict]) -> dict[str, dict]:
    return {document["id"]: document for document in documents}


def top(corpus, document: dict) -> dict:
    """The best hit for a document's own memory."""
    return corpus.search(document["memory"][None], 1)[0][0]


# --- add -------------------------------------------------------------------------------------------------------------


def test_what_is_added_is_found_by_the_next_search(corpus):
    more = make_many(5, "new", 100)
    changes = corpus.add(more, shard_size=2)
    assert (changes.n_documents, changes.n_spans, changes.rejected) == (5, 5, [])
    for document in more:
        hit = top(corpus, document)
        assert (hit["document_id"], hit["text"]) == (document["id"], document["text"])
        assert hit["score"] == pytest.approx(1.0, abs=1e-6)
    assert len(read_json(corpus)["shards"]) == 3 + 3
    assert_holds(corpus, by_id(make_many(10) + more))
    hits = corpus.search(memory(0)[None], 20, {"year": {"$gte": 2100}})[0]
    assert {hit["document_id"] for hit in hits} == set(by_id(more))


def test_an_id_that_is_there_or_given_twice_is_rejected_and_the_rest_is_added(corpus):
    rows = [make("d3", 50), make("x", 51), make("x", 52), make("y", 53)]
    changes = corpus.add(rows, shard_size=1)
    assert (changes.n_documents, changes.n_spans) == (2, 2)
    assert [(row["row"], row["place"], row["id"]) for row in changes.rejected] == [
        (0, "documents[0]", "d3"),
        (2, "documents[2]", "x"),
    ]
    assert "update" in changes.rejected[0]["reason"] and "twice" in changes.rejected[1]["reason"]
    assert_holds(corpus, by_id(make_many(10) + [rows[1], rows[3]]))
    lines = [json.loads(line) for line in (corpus.folder / "rejected.jsonl").read_text().splitlines()]
    assert lines == changes.rejected and read_json(corpus)["n_rejected"] == 2


def test_default_ids_never_collide(corpus):
    def nameless(seed):
        return {"text": f"nameless {seed}", "memory": memory(seed)}

    corpus.add([make("10", 60), make("12", 61)])
    corpus.add([nameless(62), make("14", 63), nameless(64), nameless(65)])
    corpus.delete(["d1", "d2"])
    corpus.add([nameless(66)])
    corpus.compact()
    corpus.add([nameless(67)])
    ids = list(corpus.document_ids())
    assert len(ids) == len(set(ids)) == len(corpus) == 8 + 2 + 6
    assert Counter(texts(corpus).values()).most_common(1)[0][1] == 1
    assert corpus.verify() == []


def test_a_text_without_a_model_is_an_error_and_adds_nothing(corpus):
    before = read_json(corpus)
    opened = CompressedCorpus.open(corpus.folder)
    for call in (opened.add, opened.update):
        with pytest.raises(ValueError, match=r"`documents\[1\]` must have a `memory`.*model"):
            call([make("d1", 70), {"id": "d2", "text": "no memory"}])
    assert read_json(corpus) == before


def test_a_model_compresses_what_has_no_memory(corpus, shared_model):
    long = "The Seine flows through Paris. " * 20
    changes = corpus.add([{"id": "rome", "title": "Rome", "text": "Rome is in Italy."}, {"id": "long", "text": long}])
    assert changes.n_documents == 2 and changes.n_spans == 1 + len(corpus.get(["long"])[0]["spans"]) > 3
    found = corpus.get(["rome"])[0]
    expected = shared_model.compress([{"title": "Rome", "text": "Rome is in Italy."}])
    torch.testing.assert_close(found["memory"], expected, rtol=2e-3, atol=2e-3)
    assert found["metadata"] == {"year": None} and corpus.verify() == []
    corpus.compact(shard_size=2)
    assert corpus.get(["long"])[0]["spans"][-1]["span"] == changes.n_spans - 2
    assert_search_is_exact(corpus, read_all(corpus))
    corpus.delete(["long"])
    assert read_json(corpus)["n_spans"] == len(corpus) == 11


def test_metadata_has_the_columns_and_types_of_the_corpus(corpus):
    rows = [make("a", 80, lang="en"), make("b", 81, year="soon"), make("c", 82, year=None), make("d", 83, span=1)]
    rows += [make("e", 84, year=1.5), make("f", 85, year=2.0**70), {"id": "g", "text": "t", "memory": memory(86)}]
    changes = corpus.add(rows)
    assert [row["id"] for row in changes.rejected] == ["a", "b", "d", "e", "f"]
    assert "'lang'" in changes.rejected[0]["reason"] and "'year'" in changes.rejected[1]["reason"]
    assert [document["metadata"] for document in corpus.get(["c", "g"])] == [{"year": None}, {"year": None}]
    assert corpus.verify() == []


@pytest.mark.parametrize(
    "fields",
    [{"memory": torch.full((4, 32), torch.nan)}, {"memory": torch.full((4, 32), 7e4)}, {"memory": torch.zeros(2, 32)}]
    + [{"memory": "text"}, {"memory": torch.zeros(4, 31)}, {"text": " "}, {"text": "\ud800"}, {"id": ""}, {"id": True}]
    + [{"id": "\udfff"}, {"title": 3}, {"id": 1.5}],
)
def test_a_row_that_cannot_be_used_is_rejected_by_add_and_changes_nothing_by_update(corpus, fields):
    changes = corpus.add([make("bad", 90) | fields, make("good", 91)])
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [0]
    assert "documents[0]" in changes.rejected[0]["reason"]
    assert fields.keys() & {"text", "title"} or changes.rejected[0]["id"] == fields.get("id", "bad")
    if "id" not in fields:
        changes = corpus.update([make("good", 92), make("d1", 93) | fields])
        assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [1]
    good = make("good", 91 if "id" in fields else 92)
    assert_holds(corpus, by_id([*make_many(10), good]))


def test_a_generator_that_fails_leaves_whole_shards(corpus):
    def rows():
        yield from make_many(5, "new")
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        corpus.add(rows(), shard_size=2)
    added = len(corpus) - 10
    assert added in (0, 2, 4)
    assert_holds(CompressedCorpus.open(corpus.folder), by_id(make_many(10) + make_many(5, "new")[:added]))


# --- update and delete -----------------------------------------------------------------------------------------------


def test_update_puts_documents_in_place_of_others(corpus):
    new = [make("d8", 208), make("d2", 202)]
    changes = corpus.update(new, shard_size=1)
    assert (changes.n_documents, changes.n_spans, changes.rejected) == (2, 2, [])
    old = make_many(10)
    assert_holds(corpus, by_id([d for d in old if d["id"] not in ("d8", "d2")] + new))
    assert top(corpus, new[1])["text"] == new[1]["text"]
    hits = corpus.search(old[2]["memory"][None], 10)[0]
    assert old[2]["text"] not in [hit["text"] for hit in hits] and len(hits) == 10
    assert top(corpus.with_options(where={"document_id": "d2"}), old[2])["text"] == new[1]["text"]
    corpus.update([make("d2", 302)])
    corpus.update([make("d2", 402)])
    assert corpus.get(["d2"])[0]["spans"][0]["text"] == make("d2", 402)["text"] and len(corpus) == 10


def test_update_rejects_unknown_ids_twice_the_same_and_none(corpus):
    before = texts(corpus)
    rows = [make("d1", 201), make("none", 202), make("d1", 203), {"text": "nameless", "memory": memory(204)}]
    changes = corpus.update(rows)
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [1, 2, 3]
    assert "`add`" in changes.rejected[0]["reason"] and "must have an id" in changes.rejected[2]["reason"]
    assert texts(corpus) == before | {"d1": rows[0]["text"]}
    assert corpus.verify() == []


def test_delete_takes_all_of_its_ids_or_none(corpus):
    before = read_json(corpus)
    with pytest.raises(KeyError, match="'nobody' is none"):
        corpus.delete(["d1", "nobody", "d2"])
    with pytest.raises(ValueError, match="different.*twice"):
        corpus.delete(["d1", "d1"])
    with pytest.raises(TypeError, match="must be a list"):
        corpus.delete("d1")
    with pytest.raises(ValueError, match="at least one"):
        corpus.delete([])
    assert read_json(corpus) == before and len(corpus) == 10
    assert corpus.delete(["d9", "d0", "d4"]) == 3
    assert_holds(corpus, by_id([d for d in make_many(10) if d["id"] not in ("d9", "d0", "d4")]))
    assert "d4" not in corpus and "d5" in corpus
    for call in (corpus.get, corpus.delete):
        with pytest.raises(KeyError, match="d4"):
            call(["d4"])


@pytest.mark.parametrize("wrong", [3, None, 1.5, b"d1"])
def test_an_id_that_is_no_text_is_a_key_or_type_error(corpus, wrong):
    for call in (corpus.delete, corpus.get):
        with pytest.raises((KeyError, TypeError), match="`ids`"):
            call([wrong])
    assert len(corpus) == 10


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("is_compacted", [False, True])
def test_all_documents_can_be_deleted_and_the_same_ids_added_again(shared_model, tmp_path, codec, is_compacted):
    corpus = build(shared_model, tmp_path / "corpus", codec=codec)
    corpus.delete([f"d{index}" for index in range(10)])
    if is_compacted:
        corpus.compact()
        assert read_json(corpus)["shards"] == []
    for empty in (corpus, CompressedCorpus.open(corpus.folder)):
        assert len(empty) == 0 and list(empty.document_ids()) == [] and empty.verify() == []
        assert empty.search(torch.randn(2, 4, 32), 3) == [[], []]
    again = [make(f"d{index}", 300 + index) for index in range(10)]
    corpus.add(again[:5])
    corpus.add(again[5:])
    assert_holds(corpus, by_id(again), 2 * ERRORS[codec])
    assert_holds(CompressedCorpus.open(corpus.folder), by_id(again), 2 * ERRORS[codec])


# --- compact and convert ---------------------------------------------------------------------------------------------


def stored(corpus) -> dict[str, bytes]:
    return {document["document_id"]: document["memory"].numpy().tobytes() for document in read_all(corpus)}


@pytest.mark.parametrize("shard_size", [1, 3, 7, 1024])
@pytest.mark.parametrize("codec", CODECS)
def test_compact_keeps_documents_and_bytes(shared_model, tmp_path, codec, shard_size):
    corpus = build(shared_model, tmp_path / "corpus", codec=codec)
    corpus.add(make_many(4, "new", 20))
    corpus.delete(["d0", "d5", "new21"])
    corpus.update([make("d6", 206)])
    before, memories = texts(corpus), stored(corpus)
    corpus.compact(shard_size=shard_size)
    assert list(texts(corpus).items()) == list(before.items()) and stored(corpus) == memories
    content = read_json(corpus)
    assert [shard["n_spans"] for shard in content["shards"]][:-1] == [shard_size] * (len(content["shards"]) - 1)
    assert sum(shard["n_documents"] for shard in content["shards"]) == len(before) == content["n_documents"]
    assert all(shard["tombstones"] == [] and shard["n_deleted"] == 0 for shard in content["shards"])
    assert {path.name for path in (corpus.folder / "data").iterdir()} == {
        Path(shard["file"]).name for shard in content["shards"]
    }
    assert b"d5" not in b"".join(path.read_bytes() for path in (corpus.folder / "data").iterdir())
    assert corpus.verify() == CompressedCorpus.open(corpus.folder).verify() == []


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_shards_of_two_codec_states_are_compacted_and_converted(shared_model, tmp_path, codec):
    documents = make_many(12)
    for index in (0, 1):
        options = {"codec": codec, "shard_size": 3, "rank": index, "world_size": 2}
        corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", **options)
    assert len(read_json(corpus)["codec_states"]) == 2
    corpus.delete(["d0", "d5"])
    before = stored(corpus)
    corpus.compact(shard_size=100)
    assert stored(corpus) == before and len(read_json(corpus)["codec_states"]) == 2
    assert_search_is_exact(corpus, read_all(corpus))
    corpus.delete([f"d{index}" for index in range(2, 12, 2)])  # all of the first rank
    corpus.compact()
    content = read_json(corpus)
    assert len(content["codec_states"]) == 1 == len(list((corpus.folder / "codec").iterdir()))
    assert stored(corpus) == {name: value for name, value in before.items() if int(name[1:]) % 2}
    corpus.convert("float16")
    corpus.add(make_many(2, "new"))
    kept = [document for document in documents if int(document["id"][1:]) % 2 and document["id"] != "d5"]
    assert_holds(corpus, by_id(kept + make_many(2, "new")), 2 * ERRORS[codec])


@pytest.mark.parametrize("source", CODECS)
@pytest.mark.parametrize("target", CODECS)
def test_convert_keeps_values_within_the_error_of_the_codecs(shared_model, tmp_path, source, target):
    corpus = build(shared_model, tmp_path / "corpus", 40, codec=source)
    corpus.delete(["d7"])
    before = read_json(corpus)
    corpus.convert(target)
    if source == target:
        assert read_json(corpus) == before
        return
    content = read_json(corpus)
    assert content["codec"] == target and len(content["codec_states"]) == (target != "float16")
    named = {f"{key}.safetensors" for key in content["codec_states"]}
    assert {path.name for path in (corpus.folder / "codec").glob("*")} == named
    expected = by_id([document for document in make_many(40) if document["id"] != "d7"])
    assert_holds(corpus, expected, ERRORS[source] + ERRORS[target])
    corpus.add(make_many(2, "new", 60))
    expected |= by_id(make_many(2, "new", 60))
    assert_holds(CompressedCorpus.open(corpus.folder), expected, 2 * (ERRORS[source] + ERRORS[target]))


def test_convert_refuses_what_does_not_fit_and_unknown_codecs(shared_model, tmp_path):
    large = [make(f"d{index}", index, memory=memory(index) * 1e5) for index in range(6)]
    corpus = CompressedCorpus.build(shared_model, large, tmp_path / "corpus", codec="int8", shard_size=2)
    before, files = read_json(corpus), sorted(path.name for path in (tmp_path / "corpus" / "data").iterdir())
    with pytest.raises(ValueError, match="fit into float16"):
        corpus.convert("float16")
    with pytest.raises(ValueError, match="`codec` must be one of"):
        corpus.convert("int2")
    assert read_json(corpus) == before and corpus.verify() == []
    assert sorted(path.name for path in (tmp_path / "corpus" / "data").iterdir()) == files
    assert_holds(corpus, by_id(large), ERRORS["int8"])
