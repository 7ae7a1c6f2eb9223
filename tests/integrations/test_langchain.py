"""LangChain's own tests of retrievers run on ours, and its documents are what `model.retrieve` finds."""

import asyncio
import shutil

import pytest
from frameworks import OPTIONS, QUESTIONS, retrieve
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_tests.integration_tests import RetrieversIntegrationTests

from modeling_clara.integrations.langchain import CLaRaRetriever


@pytest.mark.anyio
class TestStandard(RetrieversIntegrationTests):
    """The suite of langchain-tests."""

    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture(autouse=True)
    def given(self, corpus, clara):
        self.params = {"corpus": corpus, "model": clara}

    @property
    def retriever_constructor(self):
        return CLaRaRetriever

    @property
    def retriever_constructor_params(self):
        return self.params

    @property
    def retriever_query_example(self):
        return QUESTIONS[0]


def found(documents) -> list[tuple]:
    return [(d.id, d.metadata["score"], d.page_content, d.metadata["title"], d.metadata) for d in documents]


@pytest.mark.parametrize(("given", "view", "call"), OPTIONS)
def test_documents_are_what_retrieve_finds(given, view, call, clara, corpus):
    """Given when it is made, or when it is called, with and without waiting; every column of the corpus is there."""
    made, plain = CLaRaRetriever(corpus=corpus, model=clara, **given), CLaRaRetriever(corpus=corpus, model=clara)
    for question in QUESTIONS:
        expected = retrieve(clara, corpus, question, view, call)
        assert expected
        for documents in (
            made.invoke(question),
            plain.invoke(question, **given),
            asyncio.run(made.ainvoke(question)),
            asyncio.run(plain.ainvoke(question, **given)),
        ):
            assert [row[:4] for row in found(documents)] == [row[:4] for row in expected]
            for document, (_, score, _, title, metadata) in zip(documents, expected, strict=True):
                document_id, _, chunk = document.id.rpartition("#")
                ours = {"score": score, "title": title, "document_id": document_id, "chunk": int(chunk)}
                assert document.metadata == {**metadata, **ours}


def test_a_corpus_by_its_path_brings_its_model_and_shows_changes(clara, folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    retriever = CLaRaRetriever.from_corpus(copy, k=6)
    assert retriever.model is not clara and retriever.model.fingerprint == clara.fingerprint
    assert found(retriever.invoke(QUESTIONS[0])) and capsys.readouterr() == ("", "")  # a library prints nothing
    writer = clara.load_corpus(copy)
    writer.delete(["d0", "d1", "d2"])
    assert {d.metadata["document_id"] for d in retriever.invoke(QUESTIONS[0])} == {"d3", "d4", "d5"}
    again = CLaRaRetriever(corpus=str(copy), model=str(clara.name_or_path), k=2)
    assert found(again.invoke(QUESTIONS[1])) == found(retriever.invoke(QUESTIONS[1], k=2))
    opened = CLaRaRetriever.from_corpus(writer)  # the corpus has its model
    assert opened.model is clara and opened.corpus is writer


def test_it_is_a_runnable_like_others(clara, corpus):
    """In a chain, in batches, and with fields that are set for each call; nothing is loaded again for these."""
    retriever = CLaRaRetriever(corpus=corpus, model=clara)
    texts = (retriever | RunnableLambda(lambda documents: [d.page_content for d in documents])).batch(QUESTIONS)
    assert texts == [[row[2] for row in retrieve(clara, corpus, question)] for question in QUESTIONS]
    field = retriever.configurable_fields(k=ConfigurableField(id="k"))
    assert len(field.invoke(QUESTIONS[0], config={"configurable": {"k": 5}})) == 5


def test_wrong_values_are_named(clara, corpus, model, tmp_path):
    retriever = CLaRaRetriever(corpus=corpus, model=clara)
    with pytest.raises(ValueError, match="`top_k` must be"):
        retriever.invoke(QUESTIONS[0], k=0)
    with pytest.raises(ValueError, match="'age'"):
        retriever.invoke(QUESTIONS[0], where={"age": 3})
    with pytest.raises(TypeError, match="depth"):
        retriever.invoke(QUESTIONS[0], depth=3)
    with pytest.raises(TypeError, match="`corpus` must be"):
        CLaRaRetriever(corpus=3, model=clara)
    with pytest.raises(TypeError, match="`model` must be"):
        CLaRaRetriever(corpus=corpus, model=3)
    with pytest.raises(ValueError, match="`dtype` must go with"):
        CLaRaRetriever.from_corpus(corpus, clara, dtype="bfloat16")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CLaRaRetriever.from_corpus(tmp_path / "nowhere")
    model.memory_embeddings.data.add_(1)
    with pytest.raises(ValueError, match="the compressor of the model must be the one"):
        CLaRaRetriever(corpus=corpus, model=model)
