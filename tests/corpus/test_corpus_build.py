"""Building a corpus: chunks, ids, memories, codecs, shards, ranks, what a second call does, and the card.

Every expectation is the model's own: texts of its processor, memories of `compress`.
"""

import itertools
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from corpora import ERRORS, LONG, assert_has_no_strays, files, read_all, rejected, relative_error, stamps
from huggingface_hub import DatasetCard

from modeling_clara import CompressedCorpus

ROWS = [
    {"id": "rome", "title": "Rome", "text": "Rome is the capital of Italy."},
    {"id": 7, "text": "Seven is a number."},
    {"text": "The Seine flows through Paris."},
    {"id": "long", "title": "Capitals", "text": LONG},
    "Berlin is the capital of Germany.",
    {"id": "last", "title": None, "text": "Die Seine fließt durch Paris. 🇫🇷"},
]
IDS = ["rome", "7", "2", "long", "4", "last"]


def many(n: int) -> list[dict]:
    return [{"id": f"d{number}", "text": f"Document number {number} is about Paris."} for number in range(n)]


def contents(corpus: CompressedCorpus) -> dict[str, list[str]]:
    """The texts of the chunks of every document, by id, in order."""
    return {found["document_id"]: [span["text"] for span in found["spans"]] for found in read_all(corpus)}


def check_memories(model, corpus: CompressedCorpus, memory_size: int | None = None) -> None:
    """Every stored memory is what the model computes, within the codec's error; n_tokens are the compressor's."""
    for document in read_all(corpus):
        spans = [{"title": span["title"], "text": span["text"]} for span in document["spans"]]
        expected = model.compress(spans, memory_size=memory_size)
        assert document["memory"].shape == expected.shape and document["memory"].dtype == torch.float32
        assert relative_error(document["memory"], expected) < ERRORS[corpus.manifest.codec], document["document_id"]
        tokens = [len(ids) for ids in model.processor.encode_documents(spans)]
        assert [span["n_tokens"] for span in document["spans"]] == tokens


def test_every_document_is_there_with_its_id_its_chunks_and_its_files(shared_model, tmp_path):
    folder = tmp_path / "a" / "corpus"
    rows = [*ROWS, "", {"id": "last", "text": "again"}]
    corpus = CompressedCorpus.build(shared_model, rows, folder, shard_size=8)
    found = contents(corpus)
    assert list(found) == IDS
    for document_id, row in zip(IDS, ROWS, strict=True):
        assert found[document_id] == [span["text"] for span in shared_model.processor.split_document(row)]
    spans = corpus.get(["long"])[0]["spans"]
    assert len(spans) > 3 and [span["span"] for span in spans] == list(range(len(spans)))
    assert {span["title"] for span in spans} == {"Capitals"} and corpus.get(["rome"])[0]["title"] == "Rome"
    assert (len(corpus), corpus.manifest.n_spans) == (6, sum(map(len, found.values())))
    assert corpus.model is shared_model and corpus.verify() == []
    table = [row for shard in corpus.manifest.shards for row in pq.read_table(folder / shard.file).to_pylist()]
    expected = [f"{document_id}#{span}" for document_id, texts in found.items() for span in range(len(texts))]
    assert [row["id"] for row in table] == expected
    assert len(rejected(folder)) == 2
    assert_has_no_strays(corpus)


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
@pytest.mark.parametrize("memory_size", [None, 2])
def test_memories_are_those_of_compress_within_the_codecs_error(shared_model, tmp_path, codec, memory_size):
    options = {"codec": codec, "memory_size": memory_size, "shard_size": 16, "batch_size": 5}
    corpus = CompressedCorpus.build(shared_model, ROWS + many(30), tmp_path / "c", **options)
    check_memories(shared_model, corpus, memory_size)
    sizes, manifest = [2] if memory_size == 2 else [2, 4], corpus.manifest
    assert (manifest.memory_sizes, manifest.memory_size, manifest.retrieval_memory_size) == (sizes, *sizes[-1:] * 2)
    assert manifest.fingerprint == shared_model.fingerprint and manifest.codec == codec
    assert len(manifest.codec_states) == (codec != "float16") and corpus.verify() == []
    query = shared_model.encode_queries(["What is the capital of Italy?"], memory_size=sizes[-1])
    assert corpus.search(query, 3)[0][0]["memory"].shape == (sizes[-1], 32)


@pytest.mark.parametrize("shard_size", [1, 7, 1000])
def test_shards_are_as_large_as_asked_and_no_document_is_cut(shared_model, tmp_path, shard_size):
    rows = [ROWS[3] | {"id": f"long{n}"} if n % 5 == 2 else row for n, row in enumerate(many(20))]
    corpus = CompressedCorpus.build(shared_model, iter(rows), tmp_path / "c", shard_size=shard_size)
    assert list(contents(corpus)) == [row["id"] for row in rows]
    shards = corpus.manifest.shards
    assert all(shard.n_spans >= shard_size for shard in shards[:-1])
    for shard in shards:
        ids = pq.read_table(tmp_path / "c" / shard.file, columns=["document_id"])["document_id"].to_pylist()
        lengths = [len(list(group)) for _, group in itertools.groupby(ids)]
        assert len(ids) == shard.n_spans and sum(lengths[:-1]) < shard_size  # the last document filled it
    check_memories(shared_model, corpus)


def test_the_model_is_left_as_it_was(model, tmp_path):
    def state():
        tensors = [tensor.clone() for tensor in model.state_dict().values()]
        return [*tensors, torch.tensor([p.requires_grad for p in model.parameters()]), torch.random.get_rng_state()]

    model.train()
    before = state()
    CompressedCorpus.build(model, ROWS, tmp_path / "c", codec="float16")
    with pytest.raises(KeyError, match="missing"):
        CompressedCorpus.build(model, ({"text": row["missing"]} for row in [{"missing": "a"}, {}]), tmp_path / "d")
    assert model.training and all(map(torch.equal, state(), before))
    with model.bulk_compression():  # is not still open
        pass


@pytest.mark.parametrize(("shard_size", "message"), [(1, "at least one usable document"), (1024, "finite.*weights")])
def test_a_model_with_broken_weights_is_an_error(model, tmp_path, shard_size, message):
    rows = many(5)
    if shard_size > 1:  # a good memory beside them does not hide it
        rows.append({"id": "given", "text": "a text", "memory": model.compress(["a text"])[0]})
    with torch.no_grad():
        model.memory_embeddings.fill_(torch.nan)
    with pytest.raises(ValueError, match=message):
        CompressedCorpus.build(model, rows, tmp_path / "c", shard_size=shard_size)
    assert not (tmp_path / "c" / "corpus.json").exists()


def build_in_ranks(model, rows: list, folder: Path, order: tuple[int, ...]) -> CompressedCorpus:
    for number in order[:-1]:
        assert CompressedCorpus.build(model, rows, folder, rank=number, world_size=len(order), shard_size=4) is None
        assert not (folder / "corpus.json").exists()
    return CompressedCorpus.build(model, rows, folder, rank=order[-1], world_size=len(order), shard_size=4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_ranks_give_the_documents_of_one(shared_model, tmp_path, order):
    rows = [*ROWS, *many(20), "", {"text": 5}, {"id": "rome", "text": "again, in the first rank"}]
    rows += [{"id": "new", "text": "new"}] * ((-len(rows)) % 3)
    one = CompressedCorpus.build(shared_model, rows, tmp_path / "one")
    folder = tmp_path / "three"
    corpus = build_in_ranks(shared_model, rows, folder, order)
    assert contents(corpus) == contents(one)  # in any order
    check_memories(shared_model, corpus)
    assert corpus.verify() == [] and not (folder / "build").exists()
    assert corpus.manifest.n_rejected == len(rejected(folder)) == one.manifest.n_rejected
    assert {str(row["id"]) for row in rejected(folder)} == {str(row["id"]) for row in rejected(tmp_path / "one")}
    written = stamps(folder)
    for number in order:
        again = CompressedCorpus.build(shared_model, rows, folder, rank=number, world_size=3, shard_size=4)
        assert contents(again) == contents(one)
    assert stamps(folder) == written


@pytest.mark.parametrize("places", [(0, 1), (2, 3), (5, 19)])
def test_of_an_id_in_two_ranks_the_first_row_counts(shared_model, tmp_path, places):
    rows = many(20)
    for place in places:
        rows[place] = {"id": "twice", "text": f"This is row {place}."}
    corpus = build_in_ranks(shared_model, rows, tmp_path / "three", (0, 1, 2))
    assert contents(corpus)["twice"] == [f"This is row {places[0]}."] and len(corpus) == 19
    (row,) = rejected(tmp_path / "three")
    assert row["id"] == "twice" and "twice" in row["reason"] and corpus.manifest.n_rejected == 1
    assert corpus.verify() == []


def test_ranks_must_agree(shared_model, tmp_path):
    build, changed = CompressedCorpus.build, [{**row, "text": "other"} for row in many(6)]
    assert build(shared_model, many(6), tmp_path / "c", rank=0, world_size=2) is None
    assert not CompressedCorpus.is_complete(tmp_path / "c")
    others = [(many(6), 1, 3, {}), (many(6), 1, 2, {"codec": "int4"}), (many(6), 1, 2, {"memory_size": 2})]
    others += [(many(6), 0, 1, {}), (many(7), 1, 2, {}), (changed, 0, 2, {})]
    for rows, rank, n, options in others:
        with pytest.raises(ValueError, match="a build must go on with the input"):
            build(shared_model, rows, tmp_path / "c", rank=rank, world_size=n, **options)
    assert len(build(shared_model, many(6), tmp_path / "c", rank=1, world_size=2)) == 6
    assert CompressedCorpus.is_complete(tmp_path / "c")


def test_a_wrong_rank_is_named_and_there_may_be_more_ranks_than_documents(shared_model, tmp_path):
    for rank, n in [(2, 2), (-1, 2), (0, 0), (True, 2), (3, None), ("0", "2"), ((0, 1), 2), (0, 2.0)]:
        with pytest.raises(ValueError, match="`rank` must be an int from 0 to `world_size` - 1"):
            CompressedCorpus.build(shared_model, many(2), tmp_path / "c", rank=rank, world_size=n)
    assert not (tmp_path / "c").exists()
    made = [CompressedCorpus.build(shared_model, ["a", "b"], tmp_path / "c", rank=n, world_size=4) for n in range(4)]
    assert made[:3] == [None] * 3 and contents(made[3]) == {"0": ["a"], "1": ["b"]}


def test_building_again_writes_nothing_and_anything_else_is_refused(shared_model, model, tmp_path):
    build, folder, rows = CompressedCorpus.build, tmp_path / "c", many(20)
    folder.mkdir()
    first = contents(build(shared_model, rows, folder, shard_size=6, source={"license": "mit"}, resume=False))
    written = stamps(folder)
    assert contents(build(shared_model, rows, folder, shard_size=6, batch_size=3)) == first
    (folder / "build").mkdir()  # of a build that was killed at the very end
    assert contents(build(shared_model, rows, folder, shard_size=6)) == first and not (folder / "build").exists()
    options = [{"codec": "int4"}, {"shard_size": 5}, {"memory_size": 2}, {"metadata": {"year": "int64"}}]
    options += [{"title_column": "name"}, {"rank": 0, "world_size": 2}]
    inputs = [many(19), many(21), [*many(2), {"id": "d2", "text": "other"}, *rows[3:]]]
    inputs += [[{**rows[0], "id": "x"}, *rows[1:]], [{**rows[0], "year": 5}, *rows[1:]]]
    for other_rows, other in [*((rows, other) for other in options), *((other, {}) for other in inputs)]:
        with pytest.raises(ValueError, match="must go on with the input|was built from other documents"):
            build(shared_model, other_rows, folder, **{"shard_size": 6, **other})
    with pytest.raises(ValueError, match="`path` must be a new folder with `resume=False`"):
        build(shared_model, rows, folder, shard_size=6, resume=False)
    with torch.no_grad():
        model.memory_embeddings += 0.5
    with pytest.raises(ValueError, match=f"{shared_model.fingerprint[:12]}.*{model.fingerprint[:12]}"):
        build(model, rows, folder, shard_size=6)
    assert stamps(folder) == written
    corpus = CompressedCorpus.open(folder, model=shared_model)
    corpus.add([{"id": "new", "text": "A new one."}])
    corpus.delete(["d0"])  # what was changed later stays
    again = contents(build(shared_model, rows, folder, shard_size=6))
    assert [*again] == [*(row["id"] for row in rows[1:]), "new"]


@pytest.mark.parametrize("name", ["notes.txt", "data/train.parquet", "codec/mine.safetensors", "data/2024/mine.csv"])
def test_a_folder_that_holds_something_else_is_refused(shared_model, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    (tmp_path / "README.md").write_text("# My data\n")
    with pytest.raises(ValueError, match="`path` must be a new folder"):
        CompressedCorpus.build(shared_model, many(3), tmp_path)
    assert mine.read_text() == "mine" and files(tmp_path) == {name, "README.md"}
    with pytest.raises(ValueError, match="`path` must be a folder, got the file"):
        CompressedCorpus.build(shared_model, many(3), mine)


def test_a_wrong_argument_leaves_no_folder(shared_model, tmp_path):
    options = [{"codec": "int2"}, {"shard_size": 0}, {"batch_size": -1}, {"memory_size": 3}, {"split_column": "x"}]
    options += [{"metadata": {"year": "integer"}}, {"metadata": {"text": "string"}}, {"metadata": {"span": "int32"}}]
    options += [{"source": {"language": ["en", "de"]}}]  # no card can show it
    for wrong in options:
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            CompressedCorpus.build(shared_model, many(3), tmp_path / "c", **wrong)
    for documents in ({"text": "a"}, b"bytes", 5, None, pa.table({"text": ["a"]}), pd.DataFrame({"text": ["a"]})):
        with pytest.raises(TypeError, match="`documents` must be"):
            CompressedCorpus.build(shared_model, documents, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_card_is_that_of_a_dataset(shared_model, tmp_path):
    source = {"name": "Capitals", "license": "cc-by-4.0", "language": "en"}
    rows = [{**row, "year": 2000} for row in many(5)]
    CompressedCorpus.build(shared_model, [*rows, ""], tmp_path / "c", source=source, codec="int4")
    card = DatasetCard.load(tmp_path / "c" / "README.md")
    data = card.data.to_dict()
    (config,) = data["configs"]
    assert config == {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    assert (data["license"], data["language"], data["size_categories"]) == ("cc-by-4.0", "en", ["n<1K"])
    assert {"clara", "compressed-corpus"} <= set(data["tags"]) and len(data["tags"]) == len(set(data["tags"]))
    assert data["clara"]["compressor"]["fingerprint"] == shared_model.fingerprint
    assert (data["clara"]["memory_shape"], data["clara"]["codec"]) == ([4, 32], "int4")
    for text in ("# Capitals", "5 documents in 5 spans", "`year` int64", "1, see `rejected.jsonl`", "int4"):
        assert text in card.text


def test_what_a_user_writes_into_the_card_stays(shared_model, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\npretty_name: Mine\ntags:\n- geography\n---\n\n# My words first\n")
    corpus = CompressedCorpus.build(shared_model, many(3), tmp_path)
    text = path.read_text()
    begin, end = text.index("<!-- clara: begin -->"), text.index("<!-- clara: end -->")
    assert text.index("# My words first") < begin < end
    path.write_text(text.replace("3 documents", "99 documents") + "\n## My words last\n\n---\n")
    parts = []
    for number in range(3):
        corpus.add([f"added {number}"])
        before, rest = path.read_text().split("<!-- clara: begin -->")
        ours, after = rest.split("<!-- clara: end -->")
        assert f"{4 + number} documents in" in ours and "99 documents" not in ours
        parts.append((before, after))
    assert len(set(parts)) == 1  # nothing grows
    assert "# My words first" in before and after == "\n\n## My words last\n\n---\n"
    head = yaml.safe_load(before.split("---\n")[1])
    assert head["pretty_name"] == "Mine" and head["tags"][0] == "geography" and head["tags"].count("clara") == 1
