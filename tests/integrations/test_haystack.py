"""Haystack's documents are what `model.retrieve` finds, its filters mean the same to both, pipelines save."""

import asyncio
import random
import shutil

import pytest
from frameworks import OPTIONS, QUESTIONS, retrieve
from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.joiners import DocumentJoiner
from haystack.core.errors import DeserializationError
from haystack.errors import FilterError
from haystack.utils.filters import document_matches_filter

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.integrations.haystack import CLaRaRetriever, to_where

FILTERS = {"lang": {"field": "meta.lang", "operator": "==", "value": "de"}}
FILTERS["year"] = {"field": "meta.year", "operator": ">=", "value": 2019}
VALUES = {
    "meta.year": [2017, 2019, 2021, 2022.5],
    "year": [2020, 2023],
    "meta.price": [0, 1.5, 4.5, 100],
    "meta.lang": ["en", "de", "fr"],
    "meta.open": [True, False],
    "meta.day": ["2021-01-15", "2021-03-01", "2021-06-15T00:00:00"],
    "meta.title": ["", "Berlin", "Cairo"],
    "meta.document_id": ["d1", "d5", "d9"],
    "meta.chunk": [0, 1, 2],
    "id": ["d5#1", "d0#0", "d5#99", "d5", "nothing"],
}
TEXT = ("meta.lang", "meta.title", "meta.document_id", "meta.open", "id")  # which Haystack does not put in an order


@pytest.fixture(scope="module")
def chunks(corpus) -> list[Document]:
    """All chunks as Haystack has them, with days as text, which is what its own filters compare."""
    found = []
    for row in corpus.rows(["document_id", "span", "title", "text", *corpus.metadata_columns]):
        name, chunk, day = f"{row['document_id']}#{row['span']}", row["span"], row["day"].isoformat()
        found.append(Document(id=name, content=row["text"], meta={**row, "chunk": chunk, "day": day}))
    return found


def make_filters(rng: random.Random, depth: int) -> dict:
    """Any filters, valid for the columns of `ROWS`."""
    if depth and rng.random() < 0.6:
        parts = [make_filters(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"operator": rng.choice(["AND", "OR", "NOT"]), "conditions": parts}
    field = rng.choice(list(VALUES))
    operators = ["==", "!=", "in", "not in"] + ([] if field in TEXT else [">", ">=", "<", "<="])
    operator = rng.choice(operators)
    values = rng.sample(VALUES[field], rng.randint(0, len(VALUES[field])))
    return {"field": field, "operator": operator, "value": values if "in" in operator else rng.choice(VALUES[field])}


@pytest.mark.parametrize(("given", "view", "call"), OPTIONS)
def test_documents_are_what_retrieve_finds(given, view, call, clara, corpus):
    filters = {"lang": FILTERS["lang"], "year": FILTERS["year"], None: None}[next(iter(given.get("where", {})), None)]
    settings = {"top_k": given.get("k"), "hybrid": given.get("hybrid"), "min_score": given.get("min_score")}
    retriever = CLaRaRetriever(corpus, clara, filters=filters, **settings)
    del settings["top_k"]
    for question in QUESTIONS:
        expected = retrieve(clara, corpus, question, view, call)
        for found in (
            retriever.run(question),
            CLaRaRetriever(corpus, clara, **settings).run(question, filters=filters, top_k=given.get("k")),
            asyncio.run(retriever.run_async(question)),
        ):
            rows = [(d.id, d.score, d.content, d.meta["title"]) for d in found["documents"]]
            assert rows == [row[:4] for row in expected]
            for document, (name, _, _, title, metadata) in zip(found["documents"], expected, strict=True):
                document_id, _, chunk = name.rpartition("#")
                assert document.meta == {**metadata, "title": title, "document_id": document_id, "chunk": int(chunk)}


def test_filters_mean_what_they_mean_to_haystack(clara, corpus, chunks):
    """Over filters at random, the documents that are found are those of which Haystack lets a chunk through."""
    rng, n_found = random.Random(0), []
    memory = clara.encode_queries([QUESTIONS[0]])
    for _ in range(150):
        filters = make_filters(rng, 3)
        expected = {chunk.id.partition("#")[0] for chunk in chunks if document_matches_filter(filters, chunk)}
        (hits,) = corpus.search(memory, 6, to_where(filters))
        assert {hit["document_id"] for hit in hits} == expected, filters
        n_found.append(len(expected))
    assert {0, 1, 2, 3, 4, 5, 6} == set(n_found)  # of all kinds


def test_a_filter_on_chunks_decides_which_chunk_is_given(clara, corpus):
    run = CLaRaRetriever(corpus, clara).run
    filters = {"field": "id", "operator": "in", "value": ["d5#1", "d0#0"]}
    assert {d.id for d in run(QUESTIONS[0], filters)["documents"]} == {"d5#1", "d0#0"}
    tags = {"field": "meta.tags", "operator": "in", "value": ["old"]}  # one element of a list is enough
    assert {d.meta["document_id"] for d in run(QUESTIONS[0], tags, 6)["documents"]} == {"d1", "d3", "d5"}


@pytest.mark.parametrize("chunk", ["00", "+0", "٠", "²", "0 ", "9" * 5000, ""])
def test_an_id_is_compared_letter_by_letter(chunk, clara, corpus):
    filters = {"field": "id", "operator": "==", "value": f"d0#{chunk}"}
    assert CLaRaRetriever(corpus, clara).run(QUESTIONS[0], filters=filters)["documents"] == []


@pytest.mark.parametrize(
    ("filters", "name"),
    [
        ({"year": 2020}, "operator"),
        ([FILTERS["lang"]], "dicts"),
        ({"field": "meta.year", "operator": "=="}, "value"),
        ({"field": "meta.year", "value": 3}, "operator"),
        ({"operator": "AND"}, "conditions"),
        ({"operator": "AND", "conditions": []}, "conditions"),
        ({"operator": "XOR", "conditions": [FILTERS["lang"]]}, "'XOR'"),
        ({"field": "meta.year", "operator": "~", "value": 3}, "'~'"),
        ({"field": "meta.year", "operator": "==", "value": None}, "None"),
        ({"field": "meta.year", "operator": "in", "value": 3}, "must be a list"),
        ({"field": "meta.year", "operator": "in", "value": [3, None]}, "None"),
        ({"field": "meta.year", "operator": ">", "value": [3]}, r"\[3\]"),
        ({"field": "content", "operator": "==", "value": "x"}, "'content'"),
        ({"field": "embedding", "operator": "==", "value": 1.0}, "'embedding'"),
        ({"field": "id", "operator": ">", "value": "d1#0"}, "'id'"),
        ({"field": "meta.age", "operator": "==", "value": 3}, "'age'"),
        ({"field": "meta.year", "operator": ">", "value": "soon"}, "'soon'"),
        ({"operator": "NOT", "conditions": [{"operator": "OR", "conditions": [{"field": "blob"}]}]}, "operator"),
    ],
)
def test_what_cannot_be_translated_is_an_error_of_haystack_that_names_it(filters, name, clara, corpus):
    with pytest.raises(FilterError, match=name):
        CLaRaRetriever(corpus, clara).run(QUESTIONS[0], filters=filters)


def test_filters_of_a_run_replace_or_join_those_of_the_retriever(clara, corpus):
    for policy, expected in (("replace", {"d1", "d2", "d4", "d5"}), ("merge", {"d4", "d5"})):
        retriever = CLaRaRetriever(corpus, clara, top_k=6, filters=FILTERS["lang"], filter_policy=policy)
        documents = retriever.run(QUESTIONS[0], filters=FILTERS["year"])["documents"]
        assert {d.meta["document_id"] for d in documents} == expected
    with pytest.raises(ValueError, match="FilterPolicy"):
        CLaRaRetriever(corpus, clara, filter_policy="neither")
    with pytest.raises(FilterError):  # when it is made, not at the first question
        CLaRaRetriever(corpus, clara, filters={"year": 2020})


def test_a_pipeline_is_saved_by_paths_and_loaded(clara, folder, tmp_path):
    """Joined with a second retriever and read by a prompt; nothing is loaded before it is warmed up."""
    copy = shutil.copytree(folder, tmp_path / "corpus")
    pipeline = Pipeline()
    pipeline.add_component("retriever", CLaRaRetriever(copy, top_k=3, filters=FILTERS["lang"], filter_policy="merge"))
    pipeline.add_component("hybrid", CLaRaRetriever(str(copy), str(clara.name_or_path), top_k=3, hybrid=True))
    pipeline.add_component("joiner", DocumentJoiner())
    template = "{% for d in documents %}[{{ d.id }}] {{ d.content }}\n{% endfor %}{{ question }}"
    pipeline.add_component("prompt", PromptBuilder(template, required_variables="*"))
    for name in ("retriever", "hybrid"):
        pipeline.connect(name, "joiner.documents")
    pipeline.connect("joiner.documents", "prompt.documents")
    text = pipeline.dumps()
    with pytest.raises(DeserializationError):  # Haystack imports no package that it was not told of
        Pipeline.loads(text)
    loaded = Pipeline.loads(text, allowed_modules=["modeling_clara"])
    assert loaded.to_dict()["components"] == pipeline.to_dict()["components"]
    assert loaded.get_component("retriever")._loaded is None
    inputs = {"retriever": {"query": QUESTIONS[0]}, "hybrid": {"query": QUESTIONS[0]}}
    inputs["prompt"] = {"question": QUESTIONS[0]}
    done = [each.run(inputs, include_outputs_from={"joiner"}) for each in (pipeline, loaded)]
    assert done[0] == done[1]
    names = [document.id for document in done[0]["joiner"]["documents"]]
    assert len(names) == len(set(names)) and all(f"[{name}]" in done[0]["prompt"]["prompt"] for name in names)
    clara.load_corpus(copy).delete(["d4"])
    changed = loaded.run(inputs, include_outputs_from={"joiner"})
    assert "d4" not in {document.meta["document_id"] for document in changed["joiner"]["documents"]}


def test_objects_are_saved_by_their_names_or_not_at_all(clara, corpus, shared_model, folder):
    saved = CLaRaRetriever(corpus, clara, min_score=0.1).to_dict()
    assert saved["init_parameters"]["corpus"] == str(folder)
    assert saved["init_parameters"]["model"] == clara.name_or_path
    again = CLaRaRetriever.from_dict(saved)
    again.warm_up()
    assert again.run(QUESTIONS[0]) == CLaRaRetriever(corpus, clara, min_score=0.1).run(QUESTIONS[0])
    with pytest.raises(ValueError, match="without options of its own"):
        CLaRaRetriever(corpus.with_options(where={"lang": "de"}), clara).to_dict()
    nameless = CLaRaForRAG(clara.config)
    with pytest.raises(ValueError, match="`model` must have a name"):
        CLaRaRetriever(corpus, nameless).to_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::FutureWarning:datasets")
def test_a_corpus_of_the_hub_is_saved_with_its_commit(clara, folder, tmp_path):
    """The pipeline that is loaded finds what the saved one found, whatever was pushed in between."""
    copy = clara.load_corpus(shutil.copytree(folder, tmp_path / "corpus"))
    copy.push_to_hub("frameworks/corpus", compressor="frameworks/model")
    opened = CompressedCorpus.open("frameworks/corpus")
    saved = CLaRaRetriever(opened, clara).to_dict()
    copy.delete(["d0", "d1", "d2"])
    copy.push_to_hub("frameworks/corpus", compressor="frameworks/model")
    assert saved["init_parameters"]["corpus"] == "frameworks/corpus"
    for revision, n in ((saved["init_parameters"]["revision"], 6), (None, 3)):
        again = CLaRaRetriever.from_dict(saved)
        again.model, again.revision = clara, revision  # the model of these tests is not on the Hub
        assert len(again.run(QUESTIONS[0], top_k=6)["documents"]) == n
