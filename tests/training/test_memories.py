"""Memories of a training run: a float16 corpus in the run's folder, looked up by title and text, searched live.

The corpus itself is tested elsewhere; here is what training asks of it.
"""

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


def test_memories_are_those_of_the_model_rounded_to_float16(shared_model, tmp_path):
    memories = compress_documents(shared_model, DOCUMENTS[:4], tmp_path / "m", batch_size=2)
    with shared_model.bulk_compression():
        expected = shared_model.compress(DOCUMENTS[:4], batch_size=2).half().float()
    assert torch.equal(memories.lookup(DOCUMENTS[:4]), expected)
    assert torch.equal(memories.lookup([DOCUMENTS[3], DOCUMENTS[0]]), expected[[3, 0]])
    assert len(memories) == 4
    with pytest.raises(KeyError):
        memories.lookup([DOCUMENTS[4]])
    (live,) = shared_model.retrieve(["Which capital?"], documents=DOCUMENTS[:4], top_k=4)
    (stored,) = shared_model.retrieve(["Which capital?"], corpus=memories, top_k=4)  # as of any corpus
    assert [source.text for source in stored] == [source.text for source in live]
    assert [source.score for source in stored] == pytest.approx([source.score for source in live], abs=2e-3)


def test_a_memory_beyond_float16_is_an_error_that_shows_the_text(model, tmp_path, monkeypatch):
    compress = type(model).compress

    def first_is_large(*arguments, **options):
        memories = compress(*arguments, **options)
        return torch.cat([memories[:1] * 1e5, memories[1:]])

    monkeypatch.setattr(type(model), "compress", first_is_large)
    with pytest.raises(ValueError, match="the memory of '.*' must fit into float16, see .*rejected.jsonl"):
        compress_documents(model, DOCUMENTS, tmp_path / "m")


def test_a_users_corpus_is_looked_up_by_text_whatever_its_ids(shared_model, tmp_path):
    documents = [{"id": f"doc-{number}", **document} for number, document in enumerate(DOCUMENTS)]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "c", codec="int8", shard_size=2)
    corpus.delete(["doc-1"])
    memories = DocumentMemories(corpus)
    expected = shared_model.compress([DOCUMENTS[3]])
    torch.testing.assert_close(memories.lookup([DOCUMENTS[3]]), expected, rtol=0.05, atol=0.05)
    with pytest.raises(KeyError):
        memories.lookup([DOCUMENTS[1]])
    (hits,) = memories.search(expected, 2)
    assert hits[0]["document_id"] == "doc-3" and hits[0]["memory"].shape == (4, 32)


# --- the folder of a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def restart(shared_model, tmp_path):
    """`restart(documents)`: the memories of a start in the same folder."""
    return lambda documents, model=shared_model: open_or_compress(model, documents, tmp_path / "memories", 2)


def shards(memories: DocumentMemories) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard: equal only if nothing was written again."""
    stats = {path.name: path.stat() for path in (memories.corpus.folder / "data").iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_restart_opens_what_is_there_and_adds_new_documents(restart, shared_model):
    first = restart(DOCUMENTS[:3])
    expected, written = first.lookup(DOCUMENTS[:3]), shards(first)
    for documents in (DOCUMENTS[:3], DOCUMENTS[1:2]):
        again = restart(documents)
        assert torch.equal(again.lookup(DOCUMENTS[:3]), expected) and shards(again) == written
    more = restart(DOCUMENTS)
    assert len(more) == len(DOCUMENTS) and torch.equal(more.lookup(DOCUMENTS[:3]), expected)
    assert written.items() < shards(more).items()
    torch.testing.assert_close(more.lookup(DOCUMENTS), shared_model.compress(DOCUMENTS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, shard: (folder / "corpus.json").unlink(),
        lambda folder, shard: (folder / "corpus.json").write_text('{"format_version": 99}'),
        lambda folder, shard: shard.unlink(),
        lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-1]),
    ],
    ids=["no description", "another format", "no shard", "a damaged shard"],
)
def test_what_is_damaged_is_made_anew(restart, tmp_path, damage):
    folder = tmp_path / "memories"
    expected = restart(DOCUMENTS).lookup(DOCUMENTS)
    (shard,) = (folder / "data").glob("*.parquet")
    damage(folder, shard)
    assert torch.equal(restart(DOCUMENTS).lookup(DOCUMENTS), expected)
    assert CompressedCorpus.open(folder).verify() == []


def test_a_new_document_that_cannot_be_stored_loses_no_other(restart, monkeypatch):
    first = restart(DOCUMENTS[:2]).lookup(DOCUMENTS[:2])
    monkeypatch.setattr(CompressedCorpus, "add", lambda *arguments, **options: None)  # as if every row were rejected
    with pytest.raises(ValueError, match="must fit into float16"):
        restart(DOCUMENTS)
    assert torch.equal(restart(DOCUMENTS[:2]).lookup(DOCUMENTS[:2]), first)


def test_another_compressor_compresses_anew(restart, model):
    before = restart(DOCUMENTS).lookup(DOCUMENTS)
    with torch.no_grad():
        model.memory_embeddings += 0.5
    after = restart(DOCUMENTS, model).lookup(DOCUMENTS)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, model.compress(DOCUMENTS), rtol=1e-3, atol=1e-3)
