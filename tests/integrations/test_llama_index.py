"""LlamaIndex's nodes are what `model.retrieve` finds, and its own parts tell them apart."""

import asyncio
import shutil

import pytest
from frameworks import OPTIONS, QUESTIONS, retrieve
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from modeling_clara.integrations.llama_index import CLaRaRetriever


def renamed(given: dict) -> dict:
    return {"similarity_top_k" if name == "k" else name: value for name, value in given.items()}


@pytest.mark.parametrize(("given", "view", "call"), OPTIONS)
def test_nodes_are_what_retrieve_finds(given, view, call, clara, corpus):
    retriever = CLaRaRetriever(corpus, clara, **renamed(given))
    for question in QUESTIONS:
        expected = retrieve(clara, corpus, question, view, call)
        for nodes in (
            retriever.retrieve(question),
            retriever.retrieve(QueryBundle(question)),
            asyncio.run(retriever.aretrieve(question)),
        ):
            assert [(n.node_id, n.score, n.text, n.metadata["title"]) for n in nodes] == [row[:4] for row in expected]
            for node, (name, _, _, title, metadata) in zip(nodes, expected, strict=True):
                document_id, _, chunk = name.rpartition("#")
                assert node.node.ref_doc_id == document_id
                metadata = {**metadata, "day": metadata["day"].isoformat()}
                assert node.metadata == {**metadata, "title": title, "document_id": document_id, "chunk": int(chunk)}


def test_a_chunk_is_one_node_whatever_the_question(clara, corpus):
    """Fusion joins by a hash of text and metadata: the score is not in it, the id is."""
    retriever = CLaRaRetriever(corpus, clara, similarity_top_k=6)
    hashes = [{node.node_id: node.node.hash for node in retriever.retrieve(question)} for question in QUESTIONS]
    assert len(set(hashes[0].values())) == 6
    shared = hashes[0].keys() & hashes[1].keys()
    assert shared and all(hashes[0][name] == hashes[1][name] for name in shared)
    fusion = QueryFusionRetriever(
        [retriever, CLaRaRetriever(corpus, clara, similarity_top_k=6, hybrid=True)],
        llm=MockLLM(),
        num_queries=1,
        similarity_top_k=20,
        use_async=False,
    )
    names = [node.node_id for node in fusion.retrieve(QUESTIONS[0])]
    assert len(names) == len(set(names)) and {name.partition("#")[0] for name in names} == {f"d{n}" for n in range(6)}


def test_a_query_engine_reads_the_nodes(clara, corpus):
    """With a language model that says what it is asked; where a chunk stands is not read to it."""
    synthesizer = get_response_synthesizer(llm=MockLLM())
    retriever = CLaRaRetriever(corpus, clara, similarity_top_k=2)
    engine = RetrieverQueryEngine(retriever=retriever, response_synthesizer=synthesizer)
    response = engine.query(QUESTIONS[0])
    nodes = retriever.retrieve(QUESTIONS[0])
    assert [node.node_id for node in response.source_nodes] == [node.node_id for node in nodes]
    assert all(node.text.strip() in str(response) for node in nodes)
    assert "document_id" not in nodes[0].node.get_content(MetadataMode.LLM)


def test_a_corpus_by_its_path_brings_its_model_and_shows_changes(clara, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    retriever = CLaRaRetriever(copy, similarity_top_k=6)
    clara.load_corpus(copy).delete(["d0", "d1", "d2"])
    assert {node.node.ref_doc_id for node in retriever.retrieve(QUESTIONS[0])} == {"d3", "d4", "d5"}


def test_nodes_are_stored_as_json(clara, corpus, tmp_path):
    nodes = [found.node for found in CLaRaRetriever(corpus, clara, similarity_top_k=6).retrieve(QUESTIONS[0])]
    store = SimpleDocumentStore()
    store.add_documents(nodes)
    store.persist(str(tmp_path / "nodes.json"))
    assert SimpleDocumentStore.from_persist_path(str(tmp_path / "nodes.json")).docs == {n.node_id: n for n in nodes}
    assert [TextNode.from_json(node.to_json()) for node in nodes] == nodes
