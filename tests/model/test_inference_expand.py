"""`expand` of `answer` and `stream`: the best sources read as text, the rest from memory, against prompts built here.

Each answer is compared with a greedy reading that is computed token by token, without the code under test.
"""

from dataclasses import replace

import pytest
import torch
from readings import ExactScan, corpus_documents, greedy_reference, texts
from tiny import DOCUMENTS, HIDDEN, QUESTIONS

from modeling_clara import CompressedCorpus

N_TOKENS = 8


@pytest.mark.parametrize(("expand", "memory_size"), [(0, 2), (0, 4), (1, 2), (2, 4), (3, 2), (9, 4)])
def test_the_best_sources_are_read_as_text_and_the_rest_from_memory(shared_model, expand, memory_size):
    options = {"documents": DOCUMENTS, "top_k": 3, "memory_size": memory_size, "max_new_tokens": N_TOKENS}
    retrieved = shared_model.retrieve(QUESTIONS, documents=DOCUMENTS, top_k=3)
    answers = shared_model.answer(QUESTIONS, expand=expand, **options)
    for question, answer, sources in zip(QUESTIONS, answers, retrieved, strict=True):
        assert [replace(source, read_as="memory") for source in answer.sources] == sources
        assert [source.read_as for source in answer.sources] == (["text"] * expand + ["memory"] * 3)[:3]
        read = [{"title": source.title, "text": source.text} for source in sources]
        memory, as_text = torch.zeros(0, memory_size, HIDDEN), read[:expand]
        if expand < 3:
            memory = shared_model.compress(read[expand:], memory_size=memory_size)
        assert answer.text == greedy_reference(shared_model, question, memory, N_TOKENS, as_text)
        prompt = shared_model.processor.build_prompt(question, len(memory), memory_size, text_documents=as_text)
        assert answer.prompt_tokens == len(prompt.input_ids)
        assert sum(prompt.memory_mask) == max(0, 3 - expand) * (memory_size + 1)


def test_nothing_is_read_as_text_unless_asked_for(shared_model):
    options = {"documents": DOCUMENTS, "max_new_tokens": N_TOKENS}
    answers = shared_model.answer(QUESTIONS, **options)
    assert answers == shared_model.answer(QUESTIONS, expand=0, **options)
    assert [answer.sources for answer in answers] == shared_model.retrieve(QUESTIONS, documents=DOCUMENTS)
    assert [texts(shared_model.answer(QUESTIONS, expand=n, **options)) for n in (1, 2)] != [texts(answers)] * 2


def test_a_corpus_gives_its_stored_text(shared_model, tmp_path):
    documents = corpus_documents()
    corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec="float16")
    options = {"top_k": 3, "expand": 2, "max_new_tokens": N_TOKENS}
    by_id = {document["document_id"]: document for document in documents}
    for question, answer in zip(QUESTIONS, shared_model.answer(QUESTIONS, corpus=corpus, **options), strict=True):
        as_text = [by_id[source.document_id] for source in answer.sources[:2]]
        stored = corpus.get([answer.sources[2].document_id])[0]["memory"]
        assert answer.text == greedy_reference(shared_model, question, stored, N_TOKENS, as_text)


@pytest.mark.parametrize("text", ["", " \n", None])
def test_a_corpus_without_text_is_an_error_that_names_the_document(shared_model, text):
    documents = corpus_documents()
    corpus = ExactScan(shared_model, documents)
    expected = shared_model.answer(QUESTIONS, corpus=corpus, max_new_tokens=N_TOKENS)
    corpus.documents = [{**document, "text": text} for document in documents]
    assert texts(shared_model.answer(QUESTIONS, corpus=corpus, max_new_tokens=N_TOKENS)) == texts(expected)
    best = expected[0].sources[0].document_id
    for call in (shared_model.answer, lambda questions, **options: shared_model.stream(questions[0], **options)):
        with pytest.raises(ValueError, match=f"text of document {best!r} must be stored.*Pass expand=0"):
            call(QUESTIONS, corpus=corpus, expand=1)


def test_a_prompt_beyond_the_window_names_expand_only_where_it_helps(shared_model):
    documents = [" ".join(["Seine"] * 50)] * 12
    options = {"documents": documents, "top_k": 12, "max_new_tokens": 4}
    assert shared_model.answer(["q"], **options, expand=1)[0].prompt_tokens < 512
    with pytest.raises(ValueError, match=r"`questions\[1\]` must fit .* 512 tokens.*lower `expand`, `top_k`"):
        shared_model.answer(["q", "r"], expand=12, **{**options, "documents": [["a"] * 12, documents]})
    with pytest.raises(ValueError, match=r"`question` must fit .*lower `expand`, `top_k`"):
        shared_model.stream("q", expand=12, **options)
    with pytest.raises(ValueError, match=r"window of 512.*or lower `top_k`, `memory_size` or"):
        shared_model.answer(["q"], **{**options, "max_new_tokens": 500})
