"""How sure an answer is, and what is read as text because it is not (`expand_below`)."""

import math
from statistics import median

import pytest
import torch
from readings import random_texts, read_stream, texts
from tiny import DOCUMENTS, QUESTIONS
from transformers import GenerationConfig

NEVER, ALWAYS = 1e-12, 1.0


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("n_tokens, is_ended", [(1, False), (7, False), (9, True)])
def test_confidence_is_the_geometric_mean_of_the_token_probabilities(
    shared_model, monkeypatch, question, n_tokens, is_ended
):
    """Up to the end token, with it; by one pass over prompt and answer."""
    generated, decode = [], shared_model.backbone.generate
    monkeypatch.setattr(
        shared_model.backbone, "generate", lambda **kwargs: generated.append(decode(**kwargs)) or generated[-1]
    )
    documents, config = random_texts(2, seed=1), GenerationConfig(max_new_tokens=n_tokens)
    if is_ended:
        shared_model.answer([question], documents=documents, top_k=2, generation_config=config)
        config.eos_token_id = generated.pop()[0, 2].item()
    (answer,) = shared_model.answer([question], documents=documents, top_k=2, generation_config=config)
    (ids,) = generated[0].tolist()
    assert len(ids) <= (3 if is_ended else n_tokens)
    memory = shared_model.compress(documents)[[int(source.document_id) for source in answer.sources]]
    prompt = shared_model.processor.build_prompt(question, 2, 4)
    inputs = shared_model.processor.pad_prompts([prompt])
    with torch.no_grad(), shared_model.roles.use("generator"):
        is_real = torch.ones(1, 2, dtype=torch.bool)
        read = shared_model.prompt_embeddings(inputs["input_ids"], inputs["memory_mask"], memory[None], is_real)
        written = shared_model.get_input_embeddings()(torch.tensor([ids]))
        logits = shared_model.backbone(inputs_embeds=torch.cat([read, written], dim=1)).logits[0]
    chosen = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
    assert answer.confidence == pytest.approx(math.exp(float(chosen.mean())), rel=1e-4)


def test_confidence_does_not_depend_on_the_batch(shared_model):
    questions = random_texts(9, seed=3, longest=30)
    together = shared_model.answer(questions, documents=DOCUMENTS, max_new_tokens=6)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = shared_model.answer([question], documents=DOCUMENTS, max_new_tokens=6)
        assert alone.confidence == pytest.approx(answer.confidence, rel=1e-3)


def test_beams_have_no_confidence(shared_model):
    config = GenerationConfig(num_beams=2)
    (answer,) = shared_model.answer(QUESTIONS[:1], documents=DOCUMENTS, max_new_tokens=3, generation_config=config)
    assert answer.confidence is None


def test_only_unsure_answers_are_read_again(shared_model):
    options = {"documents": DOCUMENTS, "max_new_tokens": 6, "explain": True}
    questions = random_texts(8, seed=5)
    memory = shared_model.answer(questions, **options)
    text = shared_model.answer(questions, expand=1, **options)
    threshold = median(answer.confidence for answer in memory)
    mixed = shared_model.answer(questions, expand=1, expand_below=threshold, **options)
    again = [answer.confidence < threshold for answer in memory]
    assert 0 < sum(again) < len(again)
    for was_unsure, found, first, second in zip(again, mixed, memory, text, strict=True):
        assert found.text == (second if was_unsure else first).text and found.keywords == first.keywords
        assert found.sources[0].read_as == ("text" if was_unsure else "memory")
        assert found.prompt_tokens == first.prompt_tokens + was_unsure * second.prompt_tokens
        assert found.confidence == pytest.approx((second if was_unsure else first).confidence, rel=1e-3)
    never = shared_model.answer(questions, expand=1, expand_below=NEVER, **options)
    always = shared_model.answer(questions, expand=1, expand_below=ALWAYS, **options)
    assert texts(never) == texts(memory) and texts(always) == texts(text)


@pytest.mark.parametrize("expand_below", [NEVER, ALWAYS])
def test_a_stream_of_both_readings_is_the_answer(shared_model, expand_below):
    options = {"documents": DOCUMENTS, "max_new_tokens": 9, "expand": 1, "expand_below": expand_below, "explain": True}
    pieces, answer = read_stream(shared_model.stream(QUESTIONS[0], **options))
    assert [answer] == shared_model.answer(QUESTIONS[:1], **options)
    assert "".join(pieces).strip() == answer.text and (len(pieces) == 1) == (expand_below == NEVER)


@pytest.mark.parametrize("memory_size", [None, 2])
def test_a_text_no_longer_than_its_memory_is_read_at_once(shared_model, memory_size):
    """It costs no more, and says what it says."""
    most, ways = memory_size or shared_model.config.max_memory_size, set()
    for text in ("x", "ab", "Oslo", "Oslo is the capital of Norway."):
        n_tokens = shared_model.processor.split_document(text)[0]["n_tokens"]
        given = {"documents": [text], "memory_size": memory_size, "max_new_tokens": 4, "expand": 1}
        (found,) = shared_model.answer(QUESTIONS[:1], expand_below=NEVER, **given)
        (as_text,) = shared_model.answer(QUESTIONS[:1], **given)
        assert (found == as_text) == (found.sources[0].read_as == "text") == (n_tokens <= most)
        assert read_stream(shared_model.stream(QUESTIONS[0], expand_below=NEVER, **given))[1] == found
        ways.add(found.sources[0].read_as)
    assert ways == {"text", "memory"}


def test_what_does_not_fit_with_its_text_is_read_from_memory(shared_model):
    documents = [" ".join(["Seine"] * 50)] * 12
    options = {"documents": documents, "top_k": 12, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="window of 512"):
        shared_model.answer(["q"], expand=12, **options)
    unsure = {"expand": 12, "expand_below": ALWAYS, **options}
    (from_memory,) = shared_model.answer(["q"], **options)
    assert shared_model.answer(["q"], **unsure) == [from_memory]
    assert read_stream(shared_model.stream("q", **unsure))[1] == from_memory
    with pytest.raises(ValueError, match="window of 512"):  # the memories themselves have to fit
        shared_model.answer(["q"], **{**unsure, "max_new_tokens": 500})


@pytest.mark.parametrize("call", ["answer", "stream"])
def test_a_question_without_sources_is_not_read_at_all(shared_model, call):
    options = {"documents": DOCUMENTS, "min_score": 1.0, "expand": 1, "expand_below": 0.5}
    if call == "answer":
        (answer,) = shared_model.answer(QUESTIONS[:1], **options)
    else:
        pieces, answer = read_stream(shared_model.stream(QUESTIONS[0], **options))
        assert pieces == []
    assert answer.abstained and answer.confidence is None and answer.prompt_tokens == 0


@pytest.mark.parametrize("wrong", [0, 1.5, -0.1, True, "0.5", float("nan")])
@pytest.mark.parametrize("call", ["answer", "stream"])
def test_what_is_no_probability_is_refused(shared_model, call, wrong):
    given = QUESTIONS[:1] if call == "answer" else QUESTIONS[0]
    with pytest.raises(ValueError, match="`expand_below` must be a probability above 0 and at most 1, got"):
        getattr(shared_model, call)(given, documents=DOCUMENTS, expand=1, expand_below=wrong)


def test_what_could_decide_nothing_is_refused(shared_model):
    options = {"documents": DOCUMENTS, "expand_below": 0.5}
    with pytest.raises(ValueError, match="`expand` must be >= 1 with `expand_below`, got 0"):
        shared_model.answer(QUESTIONS[:1], **options)
    with pytest.raises(ValueError, match="`num_beams` must be 1 with `expand_below`, got 3"):
        shared_model.answer(QUESTIONS[:1], expand=1, generation_config=GenerationConfig(num_beams=3), **options)
