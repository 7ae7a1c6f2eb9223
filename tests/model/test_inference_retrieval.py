"""`retrieve` and what `answer` reads of it, as memory or as text, against cosines and readings computed here."""

from dataclasses import replace

import pytest
import torch
from readings import ExactScan, corpus_documents, cosines, greedy_reference, random_texts, read_stream, texts
from tiny import DOCUMENTS, HIDDEN, QUESTIONS

from modeling_clara import Answer, CompressedCorpus
from modeling_clara.candidates_clara import least_score

ABSTAINED = Answer("", [], None, abstained=True)


@pytest.mark.parametrize("k", [2, 4])
def test_retrieval_is_the_exact_cosine_of_the_first_k_vectors(shared_model, k):
    documents, questions = random_texts(17, seed=1), random_texts(5, seed=9)
    rows = shared_model.retrieve(questions, documents=documents, top_k=17, retrieval_memory_size=k)
    scores = cosines(shared_model.encode_queries(questions), shared_model.compress(documents), k)
    for row, expected in zip(rows, scores, strict=True):
        order = sorted(range(17), key=lambda index, expected=expected: (-round(expected[index], 6), index))
        assert [int(source.document_id) for source in row] == order
        assert [source.score for source in row] == pytest.approx([expected[index] for index in order], abs=1e-5)
        assert [source.text for source in row] == [documents[index] for index in order]


@pytest.mark.parametrize("stored", [False, True])
def test_ties_go_to_the_lower_index_and_duplicates_are_kept(shared_model, stored):
    few = ["A b", "Paris is.", "A b", "x", "A b"]
    memories = dict(zip(few, shared_model.compress(few), strict=True))
    for n in (2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 39):  # a matrix product rounds equal rows differently for some
        documents = [{"text": text, "memory": memories[text]} if stored else text for text in (few * 8)[:n]]
        for row in shared_model.retrieve(random_texts(4), documents=documents, top_k=n):
            assert len({source.score for source in row}) == len({source.text for source in row})
            assert row == sorted(row, key=lambda source: (-source.score, int(source.document_id)))
            assert sorted(int(source.document_id) for source in row) == list(range(n))


def test_top_k_defaults_to_the_smaller_of_config_and_candidates(shared_model):
    def lengths(documents, **options) -> list[int]:
        return [len(row) for row in shared_model.retrieve(QUESTIONS, documents=documents, **options)]

    assert (lengths(DOCUMENTS), lengths(DOCUMENTS[:1]), lengths(DOCUMENTS, top_k=4)) == ([2, 2], [1, 1], [4, 4])
    assert lengths([DOCUMENTS[:1], DOCUMENTS]) == [1, 2]


def test_a_document_counts_once_by_its_best_chunk_and_that_chunk_is_read(shared_model):
    """From memory, and as text."""
    long, question = {"id": "long", "title": "Cities", "text": " ".join(random_texts(20, seed=3))}, "capital of Italy"
    chunks = shared_model.processor.split_document(long)
    assert len(chunks) > 3
    scores = cosines(shared_model.encode_queries([question]), shared_model.compress(chunks), 4)[0]
    best = max(range(len(chunks)), key=scores.__getitem__)
    (row,) = shared_model.retrieve([question], documents=["Paris", long], top_k=2)
    assert sorted(source.document_id for source in row) == ["0", "long"]
    source = next(source for source in row if source.document_id == "long")
    assert (source.span, source.text, source.title) == (best, chunks[best]["text"], "Cities")
    assert source.score == pytest.approx(scores[best], abs=1e-5)
    memory, document = shared_model.compress([chunks[best]]), {"title": "Cities", "text": source.text}
    for expand, read in enumerate([(memory, 8), (memory[:0], 8, [document])]):
        (answer,) = shared_model.answer([question], documents=[long], max_new_tokens=8, expand=expand)
        assert answer.text == greedy_reference(shared_model, question, *read)


def test_ids_are_the_index_unless_a_document_has_one(shared_model):
    documents = ["a", {"text": "b", "id": 7}, {"text": "c", "document_id": "x"}, {"text": "d", "id": None}]
    (row,) = shared_model.retrieve(["q"], documents=documents, top_k=4)
    assert {source.text: source.document_id for source in row} == {"a": "0", "b": "7", "c": "x", "d": "3"}


@pytest.mark.parametrize("expand", [0, 1])
def test_below_min_score_the_model_abstains_and_does_not_generate(shared_model, expand):
    options, generated = {"documents": DOCUMENTS, "expand": expand}, []
    hook = shared_model.backbone.register_forward_pre_hook(lambda *_: generated.append(1))  # not of the base model
    assert shared_model.answer(QUESTIONS, min_score=1.1, **options) == [ABSTAINED] * 2
    assert read_stream(shared_model.stream(QUESTIONS[0], min_score=1.1, **options)) == ([], ABSTAINED)
    assert not generated and ABSTAINED.prompt_tokens == 0
    shared_model.answer(QUESTIONS, min_score=-1, max_new_tokens=1, **options)
    hook.remove()
    assert generated


def test_the_threshold_of_a_checkpoint_is_the_default_of_answering(model):
    """`answer` and `stream` take it unless they are told another, -1 switches it off, `retrieve` does not know it."""
    options, fingerprint = {"documents": DOCUMENTS, "max_new_tokens": 4}, model.fingerprint
    smaller = {"retrieval_memory_size": 2, **options}  # the threshold is of other cosines
    before, by_two = model.answer(QUESTIONS, **options), model.answer(QUESTIONS, **smaller)
    ranked = model.retrieve(QUESTIONS, documents=DOCUMENTS)
    model.config.min_score = best = max(row[0].score for row in ranked)
    answers = model.answer(QUESTIONS, **options)
    kept = [row[0].score >= best for row in ranked]  # an answered question reads all of its sources
    assert answers == [b if k else ABSTAINED for k, b in zip(kept, before, strict=True)] and sorted(kept) == [0, 1]
    assert [read_stream(model.stream(question, **options))[1] for question in QUESTIONS] == answers
    assert model.answer(QUESTIONS, **smaller) == by_two
    assert model.retrieve(QUESTIONS, documents=DOCUMENTS) == ranked and model.fingerprint == fingerprint
    assert model.answer(QUESTIONS, min_score=-1, **options) == before
    assert read_stream(model.stream(QUESTIONS[0], min_score=-1, **options))[1] == before[0]
    assert model.answer(QUESTIONS, min_score=1.1, **options) == [ABSTAINED] * 2


def test_a_source_with_words_of_the_question_needs_less_of_a_cosine(model):
    documents = ["The Danube rises in the Black Forest.", "Colours of Lima", "x"]
    asked = ["Where does the Danube rise?", "?"]  # words in common: the, Danube; none
    options = {"documents": [[text] for text in documents[:2]], "max_new_tokens": 2}
    before = model.answer(asked, **options)
    model.config.min_score = 1.0
    assert model.answer(asked, **options) == [ABSTAINED] * 2
    model.config.overlap_weight = 1.0
    scores = [row[0].score for row in model.retrieve(asked, documents=options["documents"])]
    least = 1 - (3**2 + 5**2) / (5**2 + 4**2 + 3**2 + 5**2 + 4**2)
    found = [least_score(model.config, q, a.sources[0]) for q, a in zip(asked, before, strict=True)]
    assert found == pytest.approx([least, 1.0])
    model.config.min_score = min(1.0, 1.0 - least + scores[0]) - 1e-4  # what the first source just reaches
    assert model.answer(asked, **options) == [before[0], ABSTAINED]
    assert read_stream(model.stream(asked[0], documents=documents[:1], max_new_tokens=2))[1].text == before[0].text


def test_min_score_keeps_what_reaches_it_and_minus_one_everything(shared_model):
    """Also a cosine that rounding has made smaller than -1."""
    (row,) = shared_model.retrieve(QUESTIONS[:1], documents=DOCUMENTS, top_k=4)
    for n in range(1, 5):
        kept = shared_model.retrieve(QUESTIONS[:1], documents=DOCUMENTS, top_k=4, min_score=row[n - 1].score)
        assert kept == [row[:n]]
    query = shared_model.encode_queries(QUESTIONS[:1], memory_size=4)[0]
    documents = [{"text": "opposite", "memory": -query}]
    (answer,) = shared_model.answer(QUESTIONS[:1], documents=documents, min_score=-1, max_new_tokens=2)
    assert not answer.abstained and answer.sources[0].score == pytest.approx(-1)
    assert shared_model.retrieve(QUESTIONS[:1], documents=documents, min_score=-0.9) == [[]]


def test_stored_memories_give_what_computed_ones_give(shared_model):
    stored = [
        {**(document if isinstance(document, dict) else {"text": document}), "memory": memory.tolist(), "span": index}
        for index, (document, memory) in enumerate(zip(DOCUMENTS, shared_model.compress(DOCUMENTS), strict=True))
    ]
    expected = shared_model.answer(QUESTIONS, documents=DOCUMENTS, top_k=3, max_new_tokens=8)
    for documents in (stored, [*stored[:2], *DOCUMENTS[2:]]):
        found = shared_model.answer(QUESTIONS, documents=documents, top_k=3, max_new_tokens=8)
        for answer, wanted in zip(found, expected, strict=True):
            assert answer.text == wanted.text
            assert [s.document_id for s in answer.sources] == [s.document_id for s in wanted.sources]
            assert [s.score for s in answer.sources] == pytest.approx([s.score for s in wanted.sources], abs=1e-5)
    assert {source.span for source in shared_model.retrieve(["q"], documents=stored, top_k=4)[0]} == {0, 1, 2, 3}


def test_a_stored_memory_serves_at_every_size_that_it_has(shared_model):
    large = torch.cat([shared_model.compress(DOCUMENTS[:1])[0], torch.ones(3, HIDDEN)])  # as of a larger model size
    for size in (2, 4):
        sizes = {"retrieval_memory_size": size, "memory_size": size, "max_new_tokens": 6}
        stored = {"text": DOCUMENTS[0], "memory": large.numpy()}
        (found,) = shared_model.answer(["q"], documents=[stored, "b"], **sizes)
        assert found.text == shared_model.answer(["q"], documents=[DOCUMENTS[0], "b"], **sizes)[0].text
    small = [{"text": "a", "memory": shared_model.compress(["a"], memory_size=2)[0]}]
    options = {"documents": small, "retrieval_memory_size": 2}
    assert shared_model.answer(["q"], memory_size=2, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match=r"documents\[0\]\['memory'\].*\(>= 4, 32\), got \(2, 32\)"):
        shared_model.answer(["q"], **options)


@pytest.mark.parametrize(("expand", "memory_size"), [(0, 2), (0, 4), (1, 2), (2, 4), (3, 2), (9, 4)])
def test_the_best_sources_are_read_as_text_and_the_rest_from_memory(shared_model, expand, memory_size):
    options = {"documents": DOCUMENTS, "top_k": 3, "memory_size": memory_size, "max_new_tokens": 8}
    retrieved = shared_model.retrieve(QUESTIONS, documents=DOCUMENTS, top_k=3)
    answers = shared_model.answer(QUESTIONS, **options, **({"expand": expand} if expand else {}))
    for question, answer, sources in zip(QUESTIONS, answers, retrieved, strict=True):
        assert [replace(source, read_as="memory") for source in answer.sources] == sources
        assert [source.read_as for source in answer.sources] == (["text"] * expand + ["memory"] * 3)[:3]
        read = [{"title": source.title, "text": source.text} for source in sources]
        memory, as_text = torch.zeros(0, memory_size, HIDDEN), read[:expand]
        if expand < 3:
            memory = shared_model.compress(read[expand:], memory_size=memory_size)
        assert answer.text == greedy_reference(shared_model, question, memory, 8, as_text)
        prompt = shared_model.processor.build_prompt(question, len(memory), memory_size, text_documents=as_text)
        assert answer.prompt_tokens == len(prompt.input_ids)
        assert sum(prompt.memory_mask) == max(0, 3 - expand) * (memory_size + 1)


def test_a_corpus_gives_its_stored_text(shared_model, tmp_path):
    documents = corpus_documents()
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec="float16")
    options = {"top_k": 3, "expand": 2, "max_new_tokens": 8}
    by_id = {document["document_id"]: document for document in documents}
    for question, answer in zip(QUESTIONS, shared_model.answer(QUESTIONS, corpus=corpus, **options), strict=True):
        as_text = [by_id[source.document_id] for source in answer.sources[:2]]
        stored = corpus.get([answer.sources[2].document_id])[0]["memory"]
        assert answer.text == greedy_reference(shared_model, question, stored, 8, as_text)


@pytest.mark.parametrize("text", ["", " \n", None])
def test_a_corpus_without_text_is_an_error_that_names_the_document(shared_model, text):
    corpus, options = ExactScan(shared_model, corpus_documents()), {"max_new_tokens": 4}
    expected = shared_model.answer(QUESTIONS, corpus=corpus, **options)
    corpus.documents = [{**document, "text": text} for document in corpus.documents]
    assert texts(shared_model.answer(QUESTIONS, corpus=corpus, **options)) == texts(expected)
    message = f"text of document {expected[0].sources[0].document_id!r} must be stored.*Pass expand=0"
    with pytest.raises(ValueError, match=message):
        shared_model.answer(QUESTIONS, corpus=corpus, expand=1)
    with pytest.raises(ValueError, match=message):  # however sure it would be from memory
        shared_model.answer(QUESTIONS, corpus=corpus, expand=1, expand_below=1e-9)
    with pytest.raises(ValueError, match=message):
        shared_model.stream(QUESTIONS[0], corpus=corpus, expand=1)


def test_a_prompt_beyond_the_window_names_expand_only_if_it_helps(shared_model):
    documents = [" ".join(["Seine"] * 50)] * 12
    options = {"documents": documents, "top_k": 12, "max_new_tokens": 4}
    assert shared_model.answer(["q"], **options, expand=1)[0].prompt_tokens < 512
    with pytest.raises(ValueError, match=r"`questions\[1\]` must fit .* 512 tokens.*lower `expand`, `top_k`"):
        shared_model.answer(["q", "r"], expand=12, **{**options, "documents": [["a"] * 12, documents]})
    with pytest.raises(ValueError, match=r"`question` must fit .*lower `expand`, `top_k`"):
        shared_model.stream("q", expand=12, **options)
    with pytest.raises(ValueError, match=r"window of 512.*or lower `top_k`, `memory_size` or"):
        shared_model.answer(["q"], **{**options, "max_new_tokens": 500})
