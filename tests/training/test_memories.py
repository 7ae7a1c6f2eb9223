"""Memories of a training run: a float16 corpus in the run's folder, looked up by title and text, searched live.

The corpus itself is tested elsewhere; here is what training asks of it.
"""

import json
from pathlib import Path

import pytest
import torch

from modeling_clara import CompressedCorpus
from recipes.training.memories import DocumentMemories, compress_documents, open_or_compress

DOCUMENTS = [
    {"title": "Rome", "text": "Rome is the capital of Italy."},
    {"title": "", "text": "Paris is the capital of France."},
    {"title": "", "text": "Rome is the capital of Italy."},
    {"title": "Flüsse", "text": "Die Seine fließt durch Paris. 🇫🇷"},
    {"title": "", "text": "a"},
]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every published file: equal only if nothing was written again."""
    files = [path for path in folder.rglob("*") if path.is_file() and "index" not in path.parts]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_memories_are_those_of_the_model_rounded_to_float16(shared_model, tmp_path):
    memories = compress_documents(shared_model, DOCUMENTS, tmp_path / "m", batch_size=2)
    with shared_model.bulk_compression():
        expected = shared_model.compress(DOCUMENTS, batch_size=2).half().float()
    assert torch.equal(memories.lookup(DOCUMENTS), expected)
    assert torch.equal(memories.lookup([DOCUMENTS[3], DOCUMENTS[0]]), expected[[3, 0]])
    assert len(memories) == len(DOCUMENTS)


def test_a_document_that_is_not_stored_is_a_key_error(shared_model, tmp_path):
    memories = compress_documents(shared_model, DOCUMENTS[:2], tmp_path / "m")
    with pytest.raises(KeyError):
        memories.lookup([DOCUMENTS[2]])


def test_a_memory_beyond_float16_is_an_error_that_shows_the_text(model, tmp_path, monkeypatch):
    compress = type(model).compress
    monkeypatch.setattr(type(model), "compress", lambda *args, **options: compress(*args, **options) * 1e5)
    with pytest.raises(ValueError, match="float16"):
        compress_documents(model, DOCUMENTS, tmp_path / "m")


def test_a_users_corpus_is_looked_up_by_text_whatever_its_ids(shared_model, tmp_path):
    documents = [{"id": f"doc-{number}", **document} for number, document in enumerate(DOCUMENTS)]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "c", codec="int8", shard_size=2)
    corpus.delete(["doc-1"])
    memories = DocumentMemories(corpus)
    found = memories.lookup([DOCUMENTS[3]])
    torch.testing.assert_close(found, shared_model.compress([DOCUMENTS[3]]), rtol=0.05, atol=0.05)
    with pytest.raises(KeyError):
        memories.lookup([DOCUMENTS[1]])
    (hits,) = memories.search(shared_model.compress([DOCUMENTS[3]]), 2)
    assert hits[0]["document_id"] == "doc-3" and hits[0]["memory"].shape == (4, 32)


# --- the folder of a run ---------------------------------------------------------------------------------------------


def test_a_restart_opens_what_is_there_for_the_same_or_fewer_documents(shared_model, tmp_path):
    folder = tmp_path / "memories"
    first = open_or_compress(shared_model, DOCUMENTS, folder, 2)
    written = stamps(folder)
    for documents in (DOCUMENTS, DOCUMENTS[3:]):
        again = open_or_compress(shared_model, documents, folder, 2)
        assert torch.equal(again.lookup(documents), first.lookup(documents))
    assert stamps(folder) == written


@pytest.mark.parametrize("damage", ["no description", "no shard", "a damaged shard", "another format"])
def test_what_is_damaged_is_made_anew(shared_model, tmp_path, damage):
    folder = tmp_path / "memories"
    expected = open_or_compress(shared_model, DOCUMENTS, folder, 2).lookup(DOCUMENTS)
    (shard,) = (folder / "data").glob("*.parquet")
    if damage == "no description":
        (folder / "corpus.json").unlink()
    elif damage == "no shard":
        shard.unlink()
    elif damage == "a damaged shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (folder / "corpus.json").write_text(json.dumps({"format_version": 99}))
    assert torch.equal(open_or_compress(shared_model, DOCUMENTS, folder, 2).lookup(DOCUMENTS), expected)
    assert CompressedCorpus.open(folder).verify() == []


def test_new_documents_join_those_that_are_there(shared_model, tmp_path):
    folder = tmp_path / "memories"
    first = open_or_compress(shared_model, DOCUMENTS[:2], folder, 2).lookup(DOCUMENTS[:2])
    shards = {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    more = open_or_compress(shared_model, DOCUMENTS, folder, 2)
    assert len(more) == len(DOCUMENTS) and torch.equal(more.lookup(DOCUMENTS[:2]), first)
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    assert shards.items() < kept.items()
    torch.testing.assert_close(more.lookup(DOCUMENTS), shared_model.compress(DOCUMENTS), rtol=1e-3, atol=1e-3)


def test_a_new_document_that_cannot_be_stored_loses_no_other(shared_model, tmp_path, monkeypatch):
    folder = tmp_path / "memories"
    first = open_or_compress(shared_model, DOCUMENTS[:2], folder, 2).lookup(DOCUMENTS[:2])
    monkeypatch.setattr(CompressedCorpus, "add", lambda *arguments, **options: None)  # as where every row is rejected
    with pytest.raises(ValueError, match="must fit into float16"):
        open_or_compress(shared_model, DOCUMENTS, folder, 2)
    assert torch.equal(open_or_compress(shared_model, DOCUMENTS[:2], folder, 2).lookup(DOCUMENTS[:2]), first)


def test_another_compressor_compresses_anew(model, tmp_path):
    folder = tmp_path / "memories"
    before = open_or_compress(model, DOCUMENTS, folder, 2).lookup(DOCUMENTS)
    with torch.no_grad():
        model.memory_embeddings += 0.5
    after = open_or_compress(model, DOCUMENTS, folder, 2).lookup(DOCUMENTS)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, model.compress(DOCUMENTS), rtol=1e-3, atol=1e-3)


def test_memories_are_a_corpus_of_the_text_level_calls(shared_model, tmp_path):
    memories = compress_documents(shared_model, DOCUMENTS, tmp_path / "m")
    (live,) = shared_model.retrieve(["Which capital?"], documents=DOCUMENTS, top_k=5)
    (stored,) = shared_model.retrieve(["Which capital?"], corpus=memories, top_k=5)
    assert [source.text for source in stored] == [source.text for source in live]
    assert [source.score for source in stored] == pytest.approx([source.score for source in live], abs=2e-3)
