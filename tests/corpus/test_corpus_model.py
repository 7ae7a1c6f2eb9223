"""Answers from a corpus: the same as from the texts, refused for other compressors, in threads, by remote code."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from corpora import ENVIRONMENT, PACKAGE, ids, make_documents, make_memory
from tiny import randomize_adapters

from modeling_clara import CompressedCorpus

CITIES = ["Paris", "Rome", "Berlin", "Madrid", "Oslo", "Wien"]
TEXTS = [
    *({"id": f"city{n}", "title": name, "text": f"{name} is a capital.", "n": n} for n, name in enumerate(CITIES)),
    {"id": "long", "title": "Rivers", "text": "The Seine flows through Paris. " * 30, "n": 6},
    {"id": "rare", "title": "", "text": "A xylophonium stands in the museum.", "n": 7},
]
QUESTIONS = ["What is the capital of Italy?", "Which river flows through Paris, and why?", "xylophonium"]


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """`TEXTS` as float16; only read."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return CompressedCorpus.build(shared_model, TEXTS, folder, codec="float16", shard_size=4)


@pytest.fixture
def foreign(shared_model, model, tmp_path):
    """A corpus of another compressor, and the model that made it."""
    randomize_adapters(model, seed=5)
    assert model.fingerprint != shared_model.fingerprint
    return CompressedCorpus.build(model, TEXTS, tmp_path / "foreign"), model


def assert_same_sources(found: list, expected: list) -> None:
    assert [(s.document_id, s.span, s.title, s.text) for s in found] == [
        (s.document_id, s.span, s.title, s.text) for s in expected
    ]
    assert [source.score for source in found] == pytest.approx([source.score for source in expected], abs=1e-3)


def read_stream(stream) -> tuple[str, object]:
    """The joined pieces and the answer."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return "".join(pieces), stop.value


@pytest.mark.parametrize(
    "options",
    [{}, {"memory_size": 2, "top_k": 8}, {"retrieval_memory_size": 2, "top_k": 3}, {"explain": True, "top_k": 1}],
    ids=str,
)
def test_answers_from_a_corpus_are_those_from_its_texts(shared_model, corpus, options):
    found = shared_model.answer(QUESTIONS, corpus=corpus, max_new_tokens=8, **options)
    expected = shared_model.answer(QUESTIONS, documents=TEXTS, max_new_tokens=8, **options)
    for mine, other in zip(found, expected, strict=True):
        assert len(mine.sources) == options.get("top_k", 2)
        assert_same_sources(mine.sources, other.sources)
        assert (mine.text, mine.keywords, mine.abstained) == (other.text, other.keywords, False)
    text, answer = read_stream(shared_model.stream(QUESTIONS[0], corpus=corpus, max_new_tokens=8, **options))
    assert text.strip() == answer.text == found[0].text
    assert_same_sources(answer.sources, found[0].sources)
    searched = {name: options[name] for name in ("retrieval_memory_size", "top_k") if name in options}
    assert shared_model.retrieve(QUESTIONS, corpus=corpus, **searched) == [answer.sources for answer in found]


def test_a_score_that_nothing_reaches_abstains(shared_model, corpus):
    found = shared_model.retrieve(QUESTIONS, corpus=corpus, top_k=8)
    limit = (found[0][3].score + found[0][4].score) / 2
    kept = shared_model.retrieve(QUESTIONS, corpus=corpus, top_k=8, min_score=limit)
    assert kept == [[source for source in row if source.score >= limit] for row in found] and len(kept[0]) == 4
    for view in (corpus, corpus.with_options(hybrid=True)):
        (answer,) = shared_model.answer(QUESTIONS[:1], corpus=view, min_score=1.01)
        assert (answer.text, answer.sources, answer.abstained) == ("", [], True)
    assert read_stream(shared_model.stream(QUESTIONS[0], corpus=corpus, min_score=1.01)) == ("", answer)


def test_views_filter_and_fuse(shared_model, corpus):
    found = shared_model.retrieve(QUESTIONS, corpus=corpus, top_k=100)
    assert [sorted(s.document_id for s in row) for row in found] == [sorted(text["id"] for text in TEXTS)] * 3
    view = corpus.with_options(where={"n": {"$in": [2, 3]}})
    found = shared_model.retrieve(QUESTIONS, corpus=view, top_k=5)
    assert [{source.document_id for source in row} for row in found] == [{"city2", "city3"}] * 3
    (answer,) = shared_model.answer(QUESTIONS[:1], corpus=corpus.with_options(where={"n": 77}))
    assert answer.abstained and answer.sources == []
    view = corpus.with_options(where={"n": {"$gte": 4}}, hybrid=True)
    found = shared_model.retrieve(QUESTIONS, corpus=view, top_k=1)
    assert found[2][0].document_id == "rare"
    for row, answer in zip(found, shared_model.answer(QUESTIONS, corpus=view, top_k=1, max_new_tokens=4), strict=True):
        assert answer.sources == row
    dense = shared_model.retrieve(QUESTIONS[2:], corpus=corpus, top_k=8)[0]
    assert found[2][0].score == pytest.approx(next(s.score for s in dense if s.document_id == "rare"), abs=1e-6)
    assert shared_model.stream(QUESTIONS[2], corpus=view, max_new_tokens=2)


def test_a_corpus_of_short_memories_says_what_it_lacks(shared_model, tmp_path):
    short = CompressedCorpus.build(shared_model, TEXTS, tmp_path / "corpus", memory_size=2, codec="float16")
    options = {"retrieval_memory_size": 2, "top_k": 2, "max_new_tokens": 4}
    expected = shared_model.answer(QUESTIONS, documents=TEXTS, memory_size=2, **options)
    found = shared_model.answer(QUESTIONS, corpus=short, memory_size=2, **options)
    for answer, other in zip(found, expected, strict=True):
        assert_same_sources(answer.sources, other.sources)
        assert answer.text == other.text
    lacking = r"memory of '.*' in the corpus` must have the shape \(>= 4, 32\), got \(2, 32"
    with pytest.raises(ValueError, match=lacking):
        shared_model.answer(QUESTIONS, corpus=short, **options)
    with pytest.raises(ValueError, match=r"with k one of \[2\]"):
        shared_model.retrieve(QUESTIONS, corpus=short, retrieval_memory_size=4)


def test_a_corpus_and_documents_exclude_each_other(shared_model, corpus):
    for options in ({}, {"corpus": corpus, "documents": TEXTS}):
        with pytest.raises(ValueError, match="`documents` or `corpus` must be given"):
            shared_model.retrieve(QUESTIONS, **options)
    for name, value in (("top_k", 0), ("top_k", True), ("top_k", "2"), ("retrieval_memory_size", 3)):
        with pytest.raises(ValueError, match=name):
            shared_model.retrieve(QUESTIONS, corpus=corpus, **{name: value})


def test_a_foreign_corpus_is_refused_with_both_fingerprints(shared_model, foreign):
    corpus, other = foreign
    both = f"(?s){other.fingerprint[:12]}.*{shared_model.fingerprint[:12]}"
    assert other.retrieve(QUESTIONS, corpus=corpus)
    bare = CompressedCorpus.open(corpus.folder)
    calls = [lambda: shared_model.load_corpus(corpus.folder), lambda: bare.attach(shared_model)]
    calls += [lambda: CompressedCorpus.open(corpus.folder, model=shared_model)]
    for opened in (corpus, bare, bare.with_options(hybrid=True, where={"n": 1})):
        calls += [lambda opened=opened: shared_model.retrieve(QUESTIONS, corpus=opened)]
        calls += [lambda opened=opened: shared_model.answer(QUESTIONS, corpus=opened)]
        calls += [lambda opened=opened: shared_model.stream(QUESTIONS[0], corpus=opened)]
    for call in calls:
        with pytest.raises(ValueError, match=both):
            call()
    assert bare.model is None and other.retrieve(QUESTIONS, corpus=bare)
    assert len(other.load_corpus(corpus.folder)) == 8


@pytest.mark.parametrize("change", ["data", "adapter"])
def test_a_model_that_was_changed_is_refused_again(model, corpus, change):
    opened = model.load_corpus(corpus.folder)
    assert model.retrieve(QUESTIONS, corpus=opened)
    before = model.fingerprint
    model.memory_embeddings.data.add_(0.5) if change == "data" else randomize_adapters(model, seed=9)
    both = f"(?s){before[:12]}.*{model.fingerprint[:12]}"
    calls = [lambda: model.retrieve(QUESTIONS, corpus=opened), lambda: opened.add([{"id": "new", "text": "new"}])]
    for call in [*calls, lambda: model.load_corpus(corpus.folder)]:
        with pytest.raises(ValueError, match=both):
            call()


def test_a_document_has_one_id_in_a_call_and_in_a_corpus(shared_model, tmp_path):
    names = [{"id": "a", "document_id": "b"}, {"id": None, "document_id": "c"}, {"document_id": 7}, {}]
    documents = [{**fields, "text": f"City {number} is old."} for number, fields in enumerate(names)]
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    (sources,) = shared_model.retrieve(["Which city?"], documents=documents, top_k=4)
    assert sorted(source.document_id for source in sources) == sorted(corpus.document_ids()) == ["3", "7", "a", "c"]


def test_rows_are_read_decoded_and_compared_by_their_numbers(shared_model, tmp_path):
    documents = make_documents(30)
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec="float16", shard_size=7)
    corpus.add([{"id": "new", "text": "new text", "memory": make_memory(1, seed=3)[0], "year": 2005}])
    corpus.delete(["d3", "d29"])
    rows = list(corpus.rows(["document_id", "title", "text", "n_tokens", "year"]))
    assert [row["document_id"] for row in rows] == list(corpus.document_ids()) and len(rows) == len(corpus) == 29
    assert all(set(row) == {"row", "document_id", "title", "text", "n_tokens", "year"} for row in rows)
    numbers = [row["row"] for row in rows]
    assert numbers == [n for n in range(31) if n not in (3, 29)]
    memory = torch.cat([document["memory"] for document in corpus.get([row["document_id"] for row in rows])])
    assert torch.equal(corpus.decode(numbers), memory)
    assert torch.equal(corpus.decode(numbers[::-1], 2), memory.flip(0)[:, :2])
    assert corpus.decode([]).shape == (0, *memory.shape[1:])
    assert corpus.vector_bytes == 2 * memory.shape[2]
    queries = make_memory(2, seed=7)
    hits = corpus.cosines(queries, np.array([numbers[:5], numbers[5:10]]))
    for query, scored in zip(queries, hits, strict=True):
        assert [score for _, score in scored] == sorted((score for _, score in scored), reverse=True)
        for row, score in scored:
            mine = memory[numbers.index(row)]
            assert score == pytest.approx(float(torch.cosine_similarity(mine.flatten(), query.flatten(), dim=0)))
    for wrong in (-1, 31):
        with pytest.raises(ValueError, match=f"`rows` must be numbers of `corpus.rows\\(\\)`, got {wrong}"):
            corpus.decode([0, wrong])


@pytest.mark.parametrize(
    "n_documents, n_searches", [(200, 200), (1500, 200), pytest.param(1500, 10_000, marks=pytest.mark.slow)]
)
def test_threads_search_while_documents_come_and_go(shared_model, tmp_path, n_documents, n_searches):
    corpus = CompressedCorpus.build(shared_model, make_documents(n_documents), tmp_path / "corpus")
    queries, new = make_memory(16, seed=7), make_memory(16, seed=8)
    texts = {document["id"]: document["text"] for document in make_documents(n_documents)}
    ever = set(texts)

    def search(thread: int) -> None:
        draw, other = random.Random(thread), CompressedCorpus.open(corpus.folder)
        for _ in range(n_searches // 8):
            asked = queries[draw.randrange(16)][None, : draw.choice([2, 4])]
            is_view = draw.random() < 0.2
            options = {"hybrid": True, "where": {"year": {"$gte": 2004}}} if is_view else {}
            searched = corpus if thread % 4 else other.refresh()
            (hits,) = searched.search(asked, 5, questions=["text 7"], **options)
            scores, names = [hit["score"] for hit in hits], [hit["document_id"] for hit in hits]
            assert is_view or scores == sorted(scores, reverse=True)
            assert len(set(names)) == 5 and set(names) <= ever
            for hit in hits:
                assert hit["text"] == texts.get(hit["document_id"], "new text")
                cosine = torch.cosine_similarity(hit["memory"][: asked.shape[1]].flatten(), asked.flatten(), dim=0)
                assert abs(float(cosine) - hit["score"]) < 1e-5
                assert not is_view or hit["metadata"]["year"] >= 2004

    with ThreadPoolExecutor(8) as pool:
        searches, number = [pool.submit(search, thread) for thread in range(8)], 0
        while number < 4 or not all(each.done() for each in searches):
            ever.add(f"new{number}")
            document = {"id": f"new{number}", "text": "new text", "memory": new[number % 16], "year": 2005}
            assert corpus.add([document]).n_documents == 1
            if number >= 3:
                corpus.delete([f"new{number - 3}", f"d{number}"])
            if number % 20 == 3:
                corpus.compact()
            number += 1
        assert [each.result() for each in searches] == [None] * 8
    again = CompressedCorpus.open(tmp_path / "corpus")
    assert ids(again.search(queries, 5, exact=True)) == ids(corpus.search(queries, 5, exact=True))
    assert len(again) == len(corpus) == len(list(corpus.document_ids()))


def test_a_codec_is_fitted_on_the_first_memories_that_are_finite(shared_model, tmp_path, monkeypatch):
    compress = type(shared_model).compress

    def compressed(model, documents, **options):
        if any("broken" in document["text"] for document in documents):
            raise ValueError("a memory is not finite")
        return compress(model, documents, **options)

    monkeypatch.setattr(type(shared_model), "compress", compressed)
    monkeypatch.setattr("modeling_clara.corpus.pipeline.COMPRESSED_SPANS", 2)  # compressed at once
    texts = [{"id": "0", "text": "Paris. " * 60 + "broken"}, "also broken", {"id": "0", "text": "whole"}, "another"]
    corpus = CompressedCorpus.build(shared_model, texts, tmp_path / "c")
    assert [*corpus.document_ids()] == ["0", "3"] and corpus.manifest.n_rejected == 2 and corpus.verify() == []
    assert [span["text"] for span in corpus.get(["0"])[0]["spans"]] == ["whole"]


def run(folder, *arguments, **environment) -> str:
    """What a Python process prints that starts in a folder."""
    options = {"env": ENVIRONMENT | environment, "cwd": folder, "stdin": subprocess.DEVNULL, "timeout": 300}
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


SCRIPT = """
import json, sys
sys.modules["modeling_clara"] = None  # an import of the package fails
from transformers import AutoModel
checkpoint, own, foreign, questions, package = map(json.loads, sys.argv[1:])
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
model.answer(questions[:1], documents=["Rome is old."], max_new_tokens=2)
optional = {"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"} & set(sys.modules)
assert not optional, optional
corpus = model.load_corpus(own)
assert type(corpus).__module__.startswith("transformers_modules."), type(corpus)
options = {"top_k": 3, "max_new_tokens": 8}
answers = [
    (answer.text, [(source.document_id, source.score) for source in answer.sources])
    for view in (corpus, corpus.with_options(hybrid=True, where={"n": {"$lt": 7}}))
    for answer in model.answer(questions, corpus=view, **options)
]
refused = 0
try:
    model.load_corpus(foreign)
except ValueError as error:
    refused += "fingerprint" in str(error)
refusals, rows = [], [{"id": "0", "text": "Rome is new."}]
changes = [(corpus.add, rows), (corpus.update, rows), (corpus.delete, ["0"]), (corpus.compact,)]
changes += [(corpus.convert, "int4"), (corpus.verify,), (corpus.push_to_hub, "org/corpus")]
changes += [(type(corpus).build, model, rows, "elsewhere"), (lambda: model.load_corpus(own, backend="milvus"),)]
for call, *arguments in changes:
    try:
        call(*arguments)
    except ImportError as error:
        refusals.append(str(error))
n_documents = len(corpus)
# A user may also have the package and open corpora with its class.
del sys.modules["modeling_clara"]
sys.path.insert(0, package)
from modeling_clara import CompressedCorpus
mixed = model.answer(questions, corpus=CompressedCorpus.open(own), **options)
try:
    model.retrieve(questions, corpus=CompressedCorpus.open(foreign))
except ValueError as error:
    refused += "fingerprint" in str(error)
print(json.dumps([answers, [answer.text for answer in mixed], n_documents, refused, refusals]))
"""


def test_a_checkpoint_brings_the_code_that_reads_corpora(shared_model, checkpoint, model, tmp_path):
    own = CompressedCorpus.build(shared_model, TEXTS, tmp_path / "own", codec="float16")
    randomize_adapters(model, seed=5)  # another compressor
    foreign = CompressedCorpus.build(model, TEXTS, tmp_path / "foreign")
    given = [str(checkpoint), str(own.folder), str(foreign.folder), QUESTIONS, str(PACKAGE)]
    printed = run(tmp_path, "-I", "-c", SCRIPT, *map(json.dumps, given))
    answers, mixed, n_documents, refused, refusals = json.loads(printed)
    views = own, own.with_options(hybrid=True, where={"n": {"$lt": 7}})
    options = {"top_k": 3, "max_new_tokens": 8}
    expected = [answer for view in views for answer in shared_model.answer(QUESTIONS, corpus=view, **options)]
    for (text, sources), answer in zip(answers, expected, strict=True):
        assert text == answer.text
        assert [name for name, _ in sources] == [source.document_id for source in answer.sources]
        assert [score for _, score in sources] == pytest.approx([source.score for source in answer.sources], abs=1e-5)
    assert mixed == [answer.text for answer in expected[:3]]
    assert (n_documents, refused) == (8, 2)
    names = ["add", "update", "delete", "compact", "convert", "verify", "push_to_hub", "build"]
    names += ["open(backend='milvus')"]
    assert [refusal.split("`")[1] for refusal in refusals] == [f"CompressedCorpus.{name}" for name in names]
    assert all("install it from a clone of the repository" in refusal for refusal in refusals)
    assert not (tmp_path / "elsewhere").exists() and len(CompressedCorpus.open(own.folder)) == 8


PACKAGE_SCRIPT = """
import sys
import modeling_clara
from modeling_clara import CLaRaForRAG
def optional():
    return {"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"} & set(sys.modules)
assert not optional(), optional()
model = CLaRaForRAG.from_pretrained(sys.argv[1])
model.answer(["What is old?"], documents=["Rome is old."], max_new_tokens=2)
assert not optional(), optional()
assert "CompressedCorpus" in modeling_clara.__all__
corpus = model.load_corpus(sys.argv[2])
assert type(corpus) is modeling_clara.CompressedCorpus and "pyarrow" in optional()
assert corpus.add([{"id": "new", "text": "Rome is new.", "n": 9}]).n_documents == 1
"""


def test_the_package_imports_what_is_optional_when_a_corpus_is_opened(shared_model, checkpoint, tmp_path):
    own = CompressedCorpus.build(shared_model, TEXTS, tmp_path / "own", codec="float16")
    run(tmp_path, "-c", PACKAGE_SCRIPT, str(checkpoint), str(own.folder), PYTHONPATH=str(PACKAGE))
    assert "new" in CompressedCorpus.open(own.folder)
