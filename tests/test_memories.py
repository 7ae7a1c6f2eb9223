"""Stored memories: float16 of what the model computes, back from disk as written, damage found, search against numpy.

Folders are damaged byte by byte here; fingerprints are the model's own.
"""

import json
import random
from pathlib import Path

import memories
import numpy as np
import pytest
import torch
from memories import SHARD, MemoryStore, open_or_compress

DOCUMENTS = [
    {"title": "Rome", "text": "Rome is the capital of Italy."},
    {"title": "", "text": "Paris is the capital of France."},
    {"title": "", "text": "Rome is the capital of Italy."},
    {"title": "Flüsse", "text": "Die Seine fließt durch Paris. 🇫🇷"},
    {"title": "", "text": "a"},
]


def random_store(n: int, k: int = 4, hidden: int = 6, retrieval_memory_size: int = 4, seed: int = 0) -> MemoryStore:
    generator = torch.Generator().manual_seed(seed)
    documents = [{"title": f"T{row % 3}", "text": f"text {row}"} for row in range(n)]
    return MemoryStore(documents, torch.randn(n, k, hidden, generator=generator).half(), retrieval_memory_size)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved store of five documents, made by the compressor "ab"."""
    random_store(5).save(tmp_path / "memories", "ab" * 32)
    return tmp_path / "memories"


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- what is stored --------------------------------------------------------------------------------------------------


def test_memories_are_those_of_the_model_rounded_to_float16(shared_model):
    store = MemoryStore.compress(shared_model, DOCUMENTS, batch_size=2)
    assert store.memory.dtype == torch.float16 and store.retrieval_memory_size == 4
    with shared_model.bulk_compression():
        assert torch.equal(store.memory, shared_model.compress(DOCUMENTS, batch_size=2).half())
    torch.testing.assert_close(store.memory.float(), shared_model.compress(DOCUMENTS), rtol=1e-3, atol=1e-3)
    assert len(store) == len(DOCUMENTS)


def test_the_memories_do_not_hang_on_how_the_documents_are_grouped(shared_model, monkeypatch):
    whole = MemoryStore.compress(shared_model, DOCUMENTS)
    monkeypatch.setattr(memories, "CHUNK", 2)
    parts = MemoryStore.compress(shared_model, DOCUMENTS, batch_size=1)
    torch.testing.assert_close(parts.memory, whole.memory, rtol=1e-3, atol=1e-3)


def test_lookup_gives_the_rows_of_the_documents_as_float32():
    store = random_store(6)
    asked = [{**store.documents[row], "id": "ignored"} for row in (4, 0, 4)]
    found = store.lookup(asked)
    assert found.dtype == torch.float32
    assert torch.equal(found, store.memory[[4, 0, 4]].float())


def test_a_document_that_is_not_stored_is_a_key_error():
    store = random_store(3)
    with pytest.raises(KeyError):
        store.lookup([store.documents[0], {"title": "", "text": store.documents[1]["text"]}])


def test_a_memory_that_float16_cannot_hold_is_an_error(model):
    with torch.no_grad():
        model.backbone.base_model.norm.weight *= 1e6
    assert model.compress(DOCUMENTS).isfinite().all()
    with pytest.raises(ValueError, match="finite|float16"):
        MemoryStore.compress(model, DOCUMENTS)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_saved_store_comes_back_bit_for_bit(shared_model, tmp_path):
    store = MemoryStore.compress(shared_model, DOCUMENTS)
    store.save(tmp_path / "a" / "b", shared_model.fingerprint)
    again = MemoryStore.open(tmp_path / "a" / "b", shared_model.fingerprint)
    assert again.documents == store.documents == DOCUMENTS
    assert again.memory.dtype == torch.float16 and torch.equal(again.memory, store.memory)
    assert (again.rows, again.retrieval_memory_size) == (store.rows, store.retrieval_memory_size)
    assert torch.equal(again.lookup(DOCUMENTS[::-1]), store.memory.flip(0).float())
    names = {path.relative_to(tmp_path / "a" / "b").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"corpus.json", SHARD}


def test_signs_of_zero_nan_and_infinity_survive(tmp_path):
    store = random_store(2)
    store.memory[0, 0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 6e-8]).half()
    store.save(tmp_path, "f")
    assert torch.equal(MemoryStore.open(tmp_path, "f").memory.view(torch.int16), store.memory.view(torch.int16))


def test_saving_again_replaces_the_store(folder):
    other = random_store(3, seed=1)
    other.save(folder, "cd" * 32)
    assert torch.equal(MemoryStore.open(folder, "cd" * 32).memory, other.memory)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_byte_is_found(folder, place):
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"`{path}` is damaged: its checksum is wrong. Build the memories again"):
        MemoryStore.open(folder, "ab" * 32)


def test_what_does_not_fit_names_file_and_remedy(folder):
    with pytest.raises(
        ValueError, match=f"memories in {folder} must be of this compressor .cdcdcdcdcdcd.*abababababab"
    ):
        MemoryStore.open(folder, "cd" * 32)
    edit(folder / "corpus.json", format_version=2)
    with pytest.raises(
        ValueError, match=f"`format_version` of {folder}/corpus.json must be 1, got 2. Build the memor"
    ):
        MemoryStore.open(folder, "ab" * 32)
    (folder / SHARD).unlink()
    edit(folder / "corpus.json", format_version=1)
    with pytest.raises(FileNotFoundError, match=f"`{folder / SHARD}` is missing. Build the memories again"):
        MemoryStore.open(folder, "ab" * 32)
    (folder / "corpus.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"`{folder}` must hold corpus.json, found none. Name a folder"):
        MemoryStore.open(folder, "ab" * 32)


@pytest.mark.parametrize(
    "text", ['{"format_version": 1, ', "[]", '{"format_version": 1}'], ids=["cut", "list", "fields"]
)
def test_a_damaged_description_is_named(folder, text):
    (folder / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match="corpus.json"):
        MemoryStore.open(folder, "ab" * 32)


# --- one folder per run ----------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: equal only if nothing was written again."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_a_restart_opens_what_is_there_for_the_same_or_fewer_documents(shared_model, tmp_path):
    first = open_or_compress(shared_model, DOCUMENTS, tmp_path, 2)
    written = stamps(tmp_path)
    for documents in (DOCUMENTS, DOCUMENTS[3:]):
        again = open_or_compress(shared_model, documents, tmp_path, 2)
        assert torch.equal(again.memory, first.memory)
    assert stamps(tmp_path) == written


@pytest.mark.parametrize("damage", ["no description", "no shard", "a damaged shard", "a partial shard"])
def test_what_is_half_written_is_made_anew(shared_model, tmp_path, damage):
    first = open_or_compress(shared_model, DOCUMENTS, tmp_path, 2)
    shard = tmp_path / SHARD
    if damage == "no description":
        (tmp_path / "corpus.json").unlink()
    elif damage == "no shard":
        shard.unlink()
    elif damage == "a damaged shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (tmp_path / "corpus.json").unlink()
        shard.rename(f"{shard}.1.partial")
    assert torch.equal(open_or_compress(shared_model, DOCUMENTS, tmp_path, 2).memory, first.memory)
    assert torch.equal(MemoryStore.open(tmp_path, shared_model.fingerprint).memory, first.memory)


def test_new_documents_and_another_compressor_are_compressed(model, tmp_path):
    open_or_compress(model, DOCUMENTS[:2], tmp_path, 2)
    more = open_or_compress(model, DOCUMENTS, tmp_path, 2)
    assert more.documents == DOCUMENTS
    with torch.no_grad():
        model.memory_embeddings += 0.5
    other = open_or_compress(model, DOCUMENTS, tmp_path, 2)
    assert not torch.equal(other.memory, more.memory)
    assert torch.equal(other.memory, MemoryStore.compress(model, DOCUMENTS, 2).memory)


def test_the_size_that_is_compared_is_the_configs(model, tmp_path):
    open_or_compress(model, DOCUMENTS, tmp_path, 2)
    model.config.retrieval_memory_size = 2
    assert open_or_compress(model, DOCUMENTS, tmp_path, 2).retrieval_memory_size == 2


# --- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 5, 99])
def test_search_is_the_exact_cosine_scan(size, top_k):
    store = random_store(40, retrieval_memory_size=size)
    query = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(1)) * 9
    vectors = store.memory.double().numpy()[:, :size].reshape(40, -1)
    asked = query.double().numpy()[:, :size].reshape(7, -1)
    cosines = (asked @ vectors.T) / np.outer(np.linalg.norm(asked, axis=1), np.linalg.norm(vectors, axis=1))
    found = store.search(query, top_k)
    assert len(found) == 7
    for hits, row in zip(found, cosines, strict=True):
        expected = np.argsort(-row)[:top_k]
        assert [hit["document_id"] for hit in hits] == [str(index) for index in expected]
        for hit, index in zip(hits, expected, strict=True):
            assert hit["score"] == pytest.approx(row[index], abs=1e-6)
            assert {"title": hit["title"], "text": hit["text"]} == store.documents[index]
            assert torch.equal(hit["memory"], store.memory[index].float()) and hit["span"] == 0


def test_search_takes_questions_of_just_the_size_that_is_compared():
    store = random_store(9, retrieval_memory_size=2)
    query = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    assert [[hit["score"] for hit in hits] for hits in store.search(query[:, :2], 9)] == [
        [hit["score"] for hit in hits] for hits in store.search(query, 9)
    ]


def test_a_store_is_a_corpus_of_the_text_level_calls(shared_model):
    documents = [{"title": "", "text": f"{random.Random(row).random()} is number {row}."} for row in range(6)]
    store = MemoryStore.compress(shared_model, documents)
    question = ["Which number is it?"]
    (live,) = shared_model.retrieve(question, documents=documents, top_k=6)
    (stored,) = shared_model.retrieve(question, corpus=store, top_k=6)
    by_text = {source.text: source.score for source in live}
    assert {source.text for source in stored} == set(by_text)
    for source in stored:
        assert source.score == pytest.approx(by_text[source.text], abs=2e-3)
