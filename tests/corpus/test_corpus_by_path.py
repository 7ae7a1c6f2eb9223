"""`corpus=` takes a folder or a Hub id wherever it takes a corpus; sources carry the corpus's metadata."""

import copy
import gc
import os
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
from corpora import build, edit_json, make

from modeling_clara import CompressedCorpus, Source
from modeling_clara.candidates_clara import _OPENED
from modeling_clara.corpus_clara import CompressedCorpus as Reader

QUESTIONS = ["What is the capital of Italy?", "Why?"]


def by_stream(model, corpus, **options):
    stream = model.stream(QUESTIONS[0], corpus=corpus, max_new_tokens=4, **options)
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            return stop.value


CALLS = {
    "retrieve": lambda model, corpus, **options: model.retrieve(QUESTIONS, corpus=corpus, **options),
    "answer": lambda model, corpus, **options: model.answer(QUESTIONS, corpus=corpus, max_new_tokens=4, **options),
    "stream": by_stream,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [str, Path, os.path.relpath])
def test_a_path_is_the_corpus_at_it(call, kind, corpus, shared_model):
    expected = CALLS[call](shared_model, corpus, top_k=3)
    assert CALLS[call](shared_model, kind(corpus.folder), top_k=3) == expected


def test_it_is_opened_once_and_refreshed_at_each_call(corpus, model, monkeypatch, tmp_path):
    opened, original = [], Reader.open.__func__
    monkeypatch.setattr(CompressedCorpus, "open", classmethod(lambda *a, **k: opened.append(1) or original(*a, **k)))
    folder = str(corpus.folder)

    def found(path) -> set[str]:
        return {source.document_id for source in model.retrieve(["Why?"], corpus=path, top_k=99)[0]}

    before = found(folder)
    corpus.add([make("new", 50)])
    assert found(folder) == before | {"new"}
    monkeypatch.chdir(tmp_path)
    assert found(Path(os.path.relpath(folder))) == found(folder) and opened == [1]
    corpus.delete(["new", "d0"])
    assert found(folder) == before - {"d0"} and opened == [1]


def test_what_is_rebuilt_at_the_path_is_read_anew_and_another_compressors_is_refused(corpus, model, shared_windows):
    folder = corpus.folder
    assert len(model.retrieve(["Why?"], corpus=folder, top_k=99)[0]) == 10
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        model.retrieve(["Why?"], corpus=folder)
    build(model, folder, 3, codec="int4")
    assert len(model.retrieve(["Why?"], corpus=folder, top_k=99)[0]) == 3
    opened = CompressedCorpus.open(folder)
    edit_json(opened, compressor={"fingerprint": "0" * 64, "name_or_path": "another"})
    with pytest.raises(ValueError, match="the compressor of the model must be the one"):
        model.retrieve(["Why?"], corpus=folder)


def test_the_model_stays_what_it_was(corpus, model):
    """It copies and pickles, and what it has opened goes with it."""
    model.retrieve(["Why?"], corpus=corpus.folder)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin not in _OPENED
    twin.retrieve(["Why?"], corpus=corpus.folder)
    held = [weakref.ref(twin), *map(weakref.ref, _OPENED[twin].values())]
    del twin
    gc.collect()
    assert len(held) == 2 and not any(reference() for reference in held)


def test_a_hub_id_does_as_well(corpus, shared_model):
    corpus.push_to_hub("someone/by-id", compressor="someone/clara")
    expected = shared_model.retrieve(QUESTIONS, corpus=corpus, top_k=3)
    found = shared_model.retrieve(QUESTIONS, corpus="someone/by-id", top_k=3)
    assert [[s.document_id for s in row] for row in found] == [[s.document_id for s in row] for row in expected]


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_corpus_is_named(call, shared_model, tmp_path):
    with pytest.raises(TypeError, match="`corpus` must be a CompressedCorpus, its folder or its id.* got int"):
        CALLS[call](shared_model, 5)
    with pytest.raises(FileNotFoundError, match="`corpus.json` must be in"):
        CALLS[call](shared_model, tmp_path)


@pytest.mark.parametrize("call", CALLS)
def test_sources_carry_metadata(call, corpus, shared_model):
    found = CALLS[call](shared_model, corpus, top_k=3)
    rows = [found] if call == "stream" else found
    for row in rows:
        for source in getattr(row, "sources", row):
            assert source.metadata == corpus.get([source.document_id])[0]["metadata"] != {}
    for source in shared_model.retrieve(["Why?"], documents=["Rome is old.", {"text": "Oslo.", "year": 3}])[0]:
        assert source.metadata == {}


def test_a_corpus_of_other_code_may_have_no_metadata(corpus, shared_model):
    class Other:
        def search(self, query_memory, top_k):
            hits = corpus.search(query_memory, top_k)
            return [[{k: v for k, v in hit.items() if k != "metadata"} for hit in row] for row in hits]

    assert all(source.metadata == {} for row in shared_model.retrieve(QUESTIONS, corpus=Other()) for source in row)


def test_sources_compare_print_and_hash():
    old = Source("a", 0, 0.5, "t", "x", "text")  # as it was constructed before there was metadata
    paged = Source("a", 0, 0.5, "t", "x", "text", {"page": 3})
    assert old == Source("a", 0, 0.5, "t", "x", read_as="text") != paged == eval(repr(paged)) and old.metadata == {}
    assert "'page': 3" in repr(paged) and len({old, paged, old}) == 2
    assert old.metadata is not Source("a", 0, 0.5, "t", "x").metadata
