"""Building a corpus: spans, ids, memories, codecs, shards, ranks, what a second call does, and the card.

Every expectation is the model's own: texts of its processor, memories of `compress`.
"""

import copy
import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Features, Value
from huggingface_hub import DatasetCard

from modeling_clara import CompressedCorpus

LONG = " ".join(f"Sentence number {n} says that Paris is the capital of France." for n in range(12))
ROWS = [
    {"id": "rome", "title": "Rome", "text": "Rome is the capital of Italy."},
    {"id": 7, "text": "Seven is a number."},
    {"text": "The Seine flows through Paris."},
    {"id": "long", "title": "Capitals", "text": LONG},
    "Berlin is the capital of Germany.",
    {"id": "last", "title": None, "text": "Die Seine fließt durch Paris. 🇫🇷"},
]
IDS = ["rome", "7", "2", "long", "4", "last"]
# Largest relative error of a stored memory vector
ERRORS = {"float16": 1e-3, "int8": 0.02, "int4": 0.25}


def many(n: int) -> list[dict]:
    return [{"id": f"d{number}", "text": f"Document number {number} is about Paris."} for number in range(n)]


def contents(corpus: CompressedCorpus) -> dict[str, list[str]]:
    """The texts of the spans of every document, by id, in order."""
    ids = list(corpus.document_ids())
    assert len(ids) == len(set(ids)) == len(corpus)
    return {document["document_id"]: [span["text"] for span in document["spans"]] for document in corpus.get(ids)}


def rejected(folder: Path) -> list[dict]:
    path = folder / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_memories(model, corpus: CompressedCorpus, memory_size: int | None = None) -> None:
    """Every stored memory is what the model computes, within the codec's error; n_tokens are the compressor's."""
    for document in corpus.get(list(corpus.document_ids())):
        spans = [{"title": span["title"], "text": span["text"]} for span in document["spans"]]
        expected = model.compress(spans, memory_size=memory_size)
        assert document["memory"].shape == expected.shape and document["memory"].dtype == torch.float32
        error = (document["memory"] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < ERRORS[corpus.manifest.codec], (document["document_id"], error)
        tokens = [len(ids) for ids in model.processor.encode_documents(spans)]
        assert [span["n_tokens"] for span in document["spans"]] == tokens


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file but locks: equal only if nothing was written again."""
    paths = [folder / name for name in files(folder) if ".lock" not in name]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# --- what is built ---------------------------------------------------------------------------------------------------


def test_every_document_is_there_with_its_id_its_spans_and_its_memories(shared_model, tmp_path):
    corpus = CompressedCorpus.build(shared_model, ROWS, tmp_path / "a" / "corpus", codec="float16")
    found = contents(corpus)
    assert list(found) == IDS
    for document_id, row in zip(IDS, ROWS, strict=True):
        assert found[document_id] == [span["text"] for span in shared_model.processor.split_document(row)]
    spans = corpus.get(["long"])[0]["spans"]
    assert len(spans) > 3 and [span["span"] for span in spans] == list(range(len(spans)))
    assert {span["title"] for span in spans} == {"Capitals"} and corpus.get(["rome"])[0]["title"] == "Rome"
    check_memories(shared_model, corpus)
    assert (len(corpus), corpus.manifest.n_spans) == (6, sum(map(len, found.values())))
    assert corpus.model is shared_model and corpus.verify() == []
    (shard,) = corpus.manifest.shards
    table = pq.read_table(tmp_path / "a" / "corpus" / shard.file).to_pylist()
    expected = [f"{document_id}#{span}" for document_id, texts in found.items() for span in range(len(texts))]
    assert [row["id"] for row in table] == expected


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
@pytest.mark.parametrize("memory_size", [None, 2])
def test_memories_are_those_of_compress_within_the_codecs_error(shared_model, tmp_path, codec, memory_size):
    rows = ROWS + many(60)
    folder = tmp_path / "c"
    corpus = CompressedCorpus.build(
        shared_model, rows, folder, codec=codec, memory_size=memory_size, shard_size=16, batch_size=5
    )
    check_memories(shared_model, corpus, memory_size)
    sizes = [2] if memory_size == 2 else [2, 4]
    manifest = corpus.manifest
    assert (manifest.memory_size, manifest.retrieval_memory_size) == (sizes[-1], sizes[-1])
    assert manifest.memory_sizes == sizes
    assert manifest.fingerprint == shared_model.fingerprint and manifest.codec == codec
    assert len(manifest.codec_states) == (codec != "float16") and corpus.verify() == []
    query = shared_model.encode_queries(["What is the capital of Italy?"], memory_size=sizes[-1])
    assert corpus.search(query, 3)[0][0]["memory"].shape == (sizes[-1], 32)


@pytest.mark.parametrize("shard_size", [1, 7, 20, 1000])
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


def test_a_finished_corpus_has_nothing_but_its_files(shared_model, tmp_path):
    folder = tmp_path / "c"
    corpus = CompressedCorpus.build(shared_model, [*many(30), "", {"id": "d3", "text": "again"}], folder, shard_size=8)
    named = {shard.file for shard in corpus.manifest.shards}
    named |= {f"codec/{key}.safetensors" for key in corpus.manifest.codec_states}
    found = {name for name in files(folder) if not name.startswith("index/")}
    assert found - {".lock"} == named | {"corpus.json", "README.md", "rejected.jsonl"}
    assert not [name for name in files(folder) if "partial" in name or name.endswith(".pid")]
    assert not (folder / "build").exists()


def test_the_model_is_left_as_it_was(model, tmp_path):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seed = torch.random.get_rng_state()
    corpus = CompressedCorpus.build(model, ROWS, tmp_path / "c", codec="float16")
    assert model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert torch.equal(torch.random.get_rng_state(), seed)
    with model.bulk_compression():  # is not still open
        pass
    check_memories(model, corpus)

    def broken():
        yield from ROWS
        raise KeyError("the source breaks")

    with pytest.raises(KeyError, match="the source breaks"):
        CompressedCorpus.build(model, broken(), tmp_path / "d")
    assert model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with model.bulk_compression():
        pass


# --- a model that is broken ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [1, 1024])
def test_a_model_with_broken_weights_is_an_error(model, tmp_path, shard_size):
    with torch.no_grad():
        model.memory_embeddings.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite|usable"):
        CompressedCorpus.build(model, many(6), tmp_path / "c", shard_size=shard_size)
    assert not (tmp_path / "c" / "corpus.json").exists()


def test_a_broken_model_is_an_error_beside_documents_that_bring_their_memory(model, tmp_path):
    given = {"id": "given", "text": "a text", "memory": model.compress(["a text"])[0]}
    with torch.no_grad():
        model.memory_embeddings.fill_(torch.nan)
    with pytest.raises(ValueError, match="weights"):
        CompressedCorpus.build(model, [*many(5), given], tmp_path / "c")


# --- several ranks ---------------------------------------------------------------------------------------------------


def build_in_ranks(model, rows: list, folder: Path, order: tuple[int, ...]) -> CompressedCorpus:
    for number in order[:-1]:
        assert CompressedCorpus.build(model, rows, folder, rank=number, world_size=len(order), shard_size=4) is None
        assert not (folder / "corpus.json").exists()
    return CompressedCorpus.build(model, rows, folder, rank=order[-1], world_size=len(order), shard_size=4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_ranks_give_the_documents_of_one(shared_model, tmp_path, order):
    rows = [*ROWS, *many(20), "", {"text": 5}, {"id": "rome", "text": "again, in the first job"}]
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


@pytest.mark.parametrize("places", [(0, 1), (1, 3), (2, 3), (5, 19)])
def test_of_an_id_in_two_ranks_the_first_row_counts(shared_model, tmp_path, places):
    rows = many(20)
    for place in places:
        rows[place] = {"id": "twice", "text": f"This is row {place}."}
    one = CompressedCorpus.build(shared_model, rows, tmp_path / "one")
    corpus = build_in_ranks(shared_model, rows, tmp_path / "three", (0, 1, 2))
    assert contents(one)["twice"] == [f"This is row {places[0]}."] and len(one) == len(corpus) == 19
    assert corpus.verify() == [] and corpus.manifest.n_rejected == 1
    (row,) = rejected(tmp_path / "three")
    assert row["id"] == "twice" and "twice" in row["reason"]
    assert contents(corpus) == contents(one)


def test_more_ranks_than_documents(shared_model, tmp_path):
    made = [CompressedCorpus.build(shared_model, ["a", "b"], tmp_path / "c", rank=n, world_size=4) for n in range(4)]
    assert made[:3] == [None] * 3 and contents(made[3]) == {"0": ["a"], "1": ["b"]}


def test_ranks_must_agree(shared_model, tmp_path):
    build = CompressedCorpus.build
    assert build(shared_model, many(6), tmp_path / "c", rank=0, world_size=2) is None
    assert not CompressedCorpus.is_complete(tmp_path / "c")
    for rank, n, options in [(1, 3, {}), (1, 2, {"codec": "int4"}), (1, 2, {"memory_size": 2}), (0, 1, {})]:
        with pytest.raises(ValueError, match="a build must go on with the input and the options"):
            build(shared_model, many(6), tmp_path / "c", rank=rank, world_size=n, **options)
    with pytest.raises(ValueError, match="a build must go on with the input"):
        build(shared_model, many(7), tmp_path / "c", rank=1, world_size=2)
    changed = [{**row, "text": "other"} for row in many(6)]
    with pytest.raises(ValueError, match="must go on with the input"):
        build(shared_model, changed, tmp_path / "c", rank=0, world_size=2)
    assert len(build(shared_model, many(6), tmp_path / "c", rank=1, world_size=2)) == 6
    assert CompressedCorpus.is_complete(tmp_path / "c")


@pytest.mark.parametrize(
    ("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (True, 2), (3, None), ("0", "2"), ((0, 1), 2), (0, 2.0)]
)
def test_a_wrong_rank_is_named(shared_model, tmp_path, rank, world_size):
    with pytest.raises(ValueError, match="`rank` must be an int from 0 to `world_size` - 1"):
        CompressedCorpus.build(shared_model, many(2), tmp_path / "c", rank=rank, world_size=world_size)
    assert not (tmp_path / "c").exists()


# --- the same folder again -------------------------------------------------------------------------------------------


def test_building_again_writes_nothing(shared_model, tmp_path):
    build, folder = CompressedCorpus.build, tmp_path / "c"
    first = contents(build(shared_model, many(20), folder, shard_size=6, source={"license": "mit"}))
    written = stamps(folder)
    assert contents(build(shared_model, many(20), folder, shard_size=6, batch_size=3)) == first
    (folder / "build").mkdir()  # of a build that was killed at the very end
    assert contents(build(shared_model, many(20), folder, shard_size=6)) == first
    assert stamps(folder) == written and not (folder / "build").exists()


OTHERS = {
    "codec": ({"codec": "int4"}, many(20)),
    "shard_size": ({"shard_size": 5}, many(20)),
    "memory_size": ({"memory_size": 2}, many(20)),
    "metadata": ({"metadata": {"year": "int64"}}, many(20)),
    "title_column": ({"title_column": "name"}, many(20)),
    "jobs": ({"rank": 0, "world_size": 2}, many(20)),
    "fewer": ({}, many(19)),
    "more": ({}, many(21)),
    "another text": ({}, [*many(2), {"id": "d2", "text": "other"}, *many(20)[3:]]),
    "an id": ({}, [{**many(1)[0], "id": "x"}, *many(20)[1:]]),
    "a metadata column": ({}, [{**many(1)[0], "year": 5}, *many(20)[1:]]),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("finished", [True, False])
def test_another_input_or_option_is_an_error_that_loses_nothing(shared_model, tmp_path, monkeypatch, other, finished):
    monkeypatch.setattr("modeling_clara.corpus.sources.PEEKED_ROWS", 4)  # beyond them a stream may fail
    build, folder = CompressedCorpus.build, tmp_path / "c"

    class Breaking(list):
        features = Features({"id": Value("string"), "text": Value("string")})  # no row is read for the types alone

        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 15)
            raise KeyError("here")

    if finished:
        build(shared_model, many(20), folder, shard_size=6)
    else:
        with pytest.raises(KeyError):
            build(shared_model, Breaking(many(20)), folder, shard_size=6)
    written = stamps(folder)
    assert any(name.startswith("data/") for name in written)
    options, rows = OTHERS[other]
    with pytest.raises(ValueError, match="must go on with the input|was built from other documents"):
        build(shared_model, rows, folder, **{"shard_size": 6, **options})
    assert stamps(folder) == written
    assert list(contents(build(shared_model, many(20), folder, shard_size=6))) == [f"d{n}" for n in range(20)]


def test_another_model_is_an_error(shared_model, model, tmp_path):
    CompressedCorpus.build(shared_model, many(3), tmp_path / "c")
    with torch.no_grad():
        model.memory_embeddings += 0.5
    with pytest.raises(ValueError, match=f"{shared_model.fingerprint[:12]}.*{model.fingerprint[:12]}"):
        CompressedCorpus.build(model, many(3), tmp_path / "c")


def test_what_was_changed_later_stays(shared_model, tmp_path):
    corpus = CompressedCorpus.build(shared_model, many(5), tmp_path / "c")
    corpus.add([{"id": "new", "text": "A new one."}])
    corpus.delete(["d0"])
    again = CompressedCorpus.build(shared_model, many(5), tmp_path / "c")
    assert list(contents(again)) == ["d1", "d2", "d3", "d4", "new"]


def test_a_new_folder_is_asked_for(shared_model, tmp_path):
    build, folder = CompressedCorpus.build, tmp_path / "c"
    folder.mkdir()
    assert len(build(shared_model, many(3), folder, resume=False)) == 3
    written = stamps(folder)
    with pytest.raises(ValueError, match="`path` must be a new folder with `resume=False`"):
        build(shared_model, many(3), folder, resume=False)
    assert stamps(folder) == written
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`path` must be a folder, got the file"):
        build(shared_model, many(3), tmp_path / "file")


@pytest.mark.parametrize("name", ["notes.txt", "data/train.parquet", "codec/mine.safetensors", "data/2024/mine.csv"])
def test_a_folder_that_holds_something_else_is_refused(shared_model, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    (tmp_path / "README.md").write_text("# My data\n")
    with pytest.raises(ValueError, match="`path` must be a new folder"):
        CompressedCorpus.build(shared_model, many(3), tmp_path)
    assert mine.read_text() == "mine" and files(tmp_path) == {name, "README.md"}


@pytest.mark.parametrize(
    "options", [{"codec": "int2"}, {"shard_size": 0}, {"batch_size": -1}, {"memory_size": 3}, {"split_column": "x"}]
)
def test_a_wrong_argument_leaves_no_folder(shared_model, tmp_path, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        CompressedCorpus.build(shared_model, many(3), tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_is_that_of_a_dataset(shared_model, tmp_path):
    source = {"name": "Capitals", "license": "cc-by-4.0", "language": "en"}
    rows = [{**row, "year": 2000} for row in many(5)]
    CompressedCorpus.build(shared_model, [*rows, ""], tmp_path / "c", source=source, codec="int4")
    card = DatasetCard.load(tmp_path / "c" / "README.md")
    data = card.data.to_dict()
    files_of_split = [{"split": "train", "path": "data/*.parquet"}]
    assert data["configs"] == [{"config_name": "default", "data_files": files_of_split}]
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
    texts = []
    for number in range(3):
        corpus.add([f"added {number}"])
        texts.append(path.read_text())
        assert f"{4 + number} documents in" in texts[-1] and "99 documents" not in texts[-1]
    before, after = copy.copy(texts[0]).split("<!-- clara: begin -->")[0], texts[0].split("<!-- clara: end -->")[1]
    assert after == "\n\n## My words last\n\n---\n" and "# My words first" in before
    for changed in texts[1:]:  # nothing grows
        assert changed.split("<!-- clara: begin -->")[0] == before
        assert changed.split("<!-- clara: end -->")[1] == after
    head = yaml.safe_load(before.split("---\n")[1])
    assert head["pretty_name"] == "Mine" and head["tags"][0] == "geography" and head["tags"].count("clara") == 1
