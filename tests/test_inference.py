"""Text in, text out: compress, retrieve, answer, stream and the rest against references computed here.

What a call returns must not depend on its batch, its thread or its memory's origin, and it must leave no trace.
"""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUESTIONS
from tiny import HIDDEN, save_backbone
from transformers import GenerationConfig

from modeling_clara import Answer, CLaRaForRAG
from modeling_clara.packing_clara import can_pack

WORDS = "Paris Rome Berlin Seine capital river France Italy Germany answer question the of is flows through".split()
CALLS = {
    "compress": lambda model: model.compress(DOCUMENTS),
    "encode_queries": lambda model: model.encode_queries(QUESTIONS, memory_size=2),
    "retrieve": lambda model: model.retrieve(QUESTIONS, documents=DOCUMENTS),
    "answer": lambda model: model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=4, explain=True),
    "paraphrase": lambda model: model.paraphrase(DOCUMENTS[:2], max_new_tokens=4),
    "explain_queries": lambda model: model.explain_queries(QUESTIONS, top_n=5),
    "stream": lambda model: list(model.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=4)),
}


def random_texts(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(n)]


def read_stream(stream) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def trace(model) -> dict:
    return {
        "config": model.config.to_dict(),
        "backbone": model.backbone.config.to_dict(),
        "attention": model.backbone.config._attn_implementation,
        "generation": model.backbone.generation_config.to_dict(),
        "role": (model.roles.active, [tuple(layer.active_adapters) for layer in model.roles.layers]),
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


@contextlib.contextmanager
def no_trace(model):
    """Weights bit-equal, and configs, role, flags and modes as before, also where the call raises."""
    before, weights = trace(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert trace(model) == before
    after = model.state_dict()
    assert list(after) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=0, equal_nan=True)


class ExactScan:
    """The smallest corpus there is: every memory in one tensor, scanned in float64."""

    def __init__(self, model, documents: list[dict], memory_size: int = 4, dtype=np.float32):
        self.documents = documents
        self.memory = model.compress(documents, memory_size=memory_size)
        self.stored = self.memory.numpy().astype(dtype)

    def search(self, query_memory, top_k):
        scores = cosines(query_memory, self.memory, query_memory.shape[1])
        rows = [sorted(range(len(self.documents)), key=lambda i, row=row: (-row[i], i))[:top_k] for row in scores]
        return [
            [{"span": 0, "score": scores[q][i], "memory": self.stored[i], **self.documents[i]} for i in row]
            for q, row in enumerate(rows)
        ]


def corpus_documents() -> list[dict]:
    return [
        {"document_id": f"doc-{i}", "title": "T" if i % 3 else "", "text": text}
        for i, text in enumerate(random_texts(9, seed=4))
    ]


def cosines(queries: torch.Tensor, memory: torch.Tensor, memory_size: int) -> list[list[float]]:
    """eq. 3.1 in float64: the first k vectors as one vector."""
    flat = [tensor[:, :memory_size].double().flatten(1) for tensor in (queries, memory)]
    return torch.nn.functional.cosine_similarity(flat[0][:, None], flat[1][None], dim=-1).tolist()


def greedy_reference(model, question: str | None, memory: torch.Tensor, n_tokens: int) -> str:
    """Argmax after argmax, the whole prompt again for every token, no `generate`."""
    prompt = model.processor.build_prompt(question, len(memory), memory.shape[1])
    inputs = model.processor.pad_prompts([prompt])
    is_real = torch.ones(1, len(memory), dtype=torch.bool)
    ids = []
    with torch.no_grad(), model.roles.use("generator"):
        embeds = model.prompt_embeddings(inputs["input_ids"], inputs["memory_mask"], memory[None], is_real)
        for _ in range(n_tokens):
            token = model.backbone(inputs_embeds=embeds).logits[0, -1].argmax()
            if token in (model.processor.answer_end_id, model.processor.tokenizer.eos_token_id):
                break
            ids.append(int(token))
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], dim=1)
    return model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(params=["packed", "padded"])
def passes(request, model):
    """A model that reads texts packed, and one whose attention allows padded passes only."""
    if request.param == "padded":
        model.backbone.config._attn_implementation = "eager"
    assert can_pack(model.backbone, 64) == (request.param == "packed")
    return model


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory_size", "vectors"), [(None, 4), (2, 2), (4, 4)])
def test_memories_are_float32_of_the_size_asked_for(passes, memory_size, vectors):
    for memory in (
        passes.compress(DOCUMENTS, memory_size=memory_size),
        passes.encode_queries(QUESTIONS * 2, memory_size=memory_size),
    ):
        assert memory.shape == (4, vectors, HIDDEN)
        assert memory.dtype == torch.float32
        assert memory.device == passes.memory_embeddings.device
        assert not memory.requires_grad


@pytest.mark.parametrize("method", ["compress", "encode_queries"])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_a_memory_is_the_same_alone_and_in_any_batch_and_place(passes, method, batch_size):
    documents = random_texts(40)
    encode = getattr(passes, method)
    alone = torch.cat([encode([document]) for document in documents])
    torch.testing.assert_close(encode(documents, batch_size=batch_size), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode(documents[::-1], batch_size=batch_size), alone.flip(0), rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1


@pytest.mark.parametrize("role", ["compressor", "reasoner"])
def test_the_packed_pass_gives_what_the_padded_pass_gives(shared_model, role):
    processor = shared_model.processor
    ids = [processor.encode_text(text) for text in random_texts(9, seed=2)]
    with torch.no_grad():
        packed = shared_model.encode_packed(role, ids, 4)
        padded, _ = shared_model.encode(role, processor.pad(ids, 0), torch.tensor([len(row) for row in ids]), 4)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["compress", "encode_queries"])
def test_a_small_memory_is_the_beginning_of_a_large_one(passes, method):
    encode = getattr(passes, method)
    torch.testing.assert_close(
        encode(QUESTIONS, memory_size=2), encode(QUESTIONS, memory_size=4)[:, :2], rtol=0, atol=1e-5
    )


# --- retrieval -------------------------------------------------------------------------------------------------------


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
    questions = random_texts(4)
    for n in range(2, 40):  # a matrix product rounds equal rows differently for some of these
        documents = [{"text": text, "memory": memories[text]} if stored else text for text in (few * 8)[:n]]
        for row in shared_model.retrieve(questions, documents=documents, top_k=n):
            assert len({source.score for source in row}) == len({source.text for source in row})
            assert row == sorted(row, key=lambda source: (-source.score, int(source.document_id)))
            assert sorted(int(source.document_id) for source in row) == list(range(n))


def test_top_k_defaults_to_the_smaller_of_config_and_candidates(shared_model):
    assert [len(row) for row in shared_model.retrieve(QUESTIONS, documents=DOCUMENTS)] == [2, 2]
    assert [len(row) for row in shared_model.retrieve(QUESTIONS, documents=DOCUMENTS[:1])] == [1, 1]
    assert [len(row) for row in shared_model.retrieve(QUESTIONS, documents=DOCUMENTS, top_k=4)] == [4, 4]
    ragged = shared_model.retrieve(QUESTIONS, documents=[DOCUMENTS[:1], DOCUMENTS])
    assert [len(row) for row in ragged] == [1, 2]


def test_lists_per_question_give_what_each_question_gives_alone(shared_model):
    lists = [DOCUMENTS[:1], random_texts(7), DOCUMENTS[1:]]
    questions = [*QUESTIONS, "Which?"]
    together = shared_model.answer(questions, documents=lists, max_new_tokens=6)
    for question, documents, found in zip(questions, lists, together, strict=True):
        (alone,) = shared_model.answer([question], documents=documents, max_new_tokens=6)
        assert alone.text == found.text
        assert [source.document_id for source in alone.sources] == [source.document_id for source in found.sources]
    shared = shared_model.retrieve(questions, documents=DOCUMENTS)
    assert shared == shared_model.retrieve(questions, documents=[DOCUMENTS] * 3)


def test_a_document_counts_once_by_its_best_span_and_that_span_is_read(shared_model):
    long = {"id": "long", "title": "Cities", "text": " ".join(random_texts(20, seed=3))}
    spans = shared_model.processor.split_document(long)
    assert len(spans) > 3
    question = "capital of Italy"
    scores = cosines(shared_model.encode_queries([question]), shared_model.compress(spans), 4)[0]
    best = max(range(len(spans)), key=scores.__getitem__)
    (row,) = shared_model.retrieve([question], documents=["Paris", long], top_k=2)
    assert sorted(source.document_id for source in row) == ["0", "long"]
    source = next(source for source in row if source.document_id == "long")
    assert (source.span, source.text, source.title) == (best, spans[best]["text"], "Cities")
    assert source.score == pytest.approx(scores[best], abs=1e-5)
    (answer,) = shared_model.answer([question], documents=[long], max_new_tokens=8)
    memory = shared_model.compress([spans[best]])
    assert answer.text == greedy_reference(shared_model, question, memory, 8)


def test_ids_are_the_index_unless_a_document_has_one(shared_model):
    documents = ["a", {"text": "b", "id": 7}, {"text": "c", "document_id": "x"}, {"text": "d", "id": None}]
    (row,) = shared_model.retrieve(["q"], documents=documents, top_k=4)
    assert {source.text: source.document_id for source in row} == {"a": "0", "b": "7", "c": "x", "d": "3"}


def test_min_score_keeps_what_reaches_it(shared_model):
    (row,) = shared_model.retrieve(QUESTIONS[:1], documents=DOCUMENTS, top_k=4)
    for n in range(1, 5):
        kept = shared_model.retrieve(QUESTIONS[:1], documents=DOCUMENTS, top_k=4, min_score=row[n - 1].score)
        assert kept == [row[:n]]


def test_below_min_score_the_model_abstains_and_does_not_generate(shared_model):
    def switches(call) -> int:
        before = shared_model.roles.switches
        call()
        return shared_model.roles.switches - before

    options = {"documents": DOCUMENTS, "min_score": 1.1}
    answers = shared_model.answer(QUESTIONS, **options)
    assert answers == [Answer("", [], None, abstained=True)] * 2
    retrieving = switches(lambda: shared_model.retrieve(QUESTIONS, **options))
    assert switches(lambda: shared_model.answer(QUESTIONS, **options)) == retrieving
    assert switches(lambda: shared_model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1)) > retrieving
    assert read_stream(shared_model.stream(QUESTIONS[0], **options)) == ([], answers[0])
    best = [row[0].score for row in shared_model.retrieve(QUESTIONS, documents=DOCUMENTS)]
    one = shared_model.answer(QUESTIONS, documents=DOCUMENTS, min_score=max(best), max_new_tokens=4)
    assert sorted(answer.abstained for answer in one) == [False, True]
    assert [answer.abstained for answer in one] == [score < max(best) for score in best]


def test_what_is_compared_and_what_is_read_have_sizes_of_their_own(shared_model):
    documents = random_texts(6, seed=5)
    for k_score, k_read in ((2, 4), (4, 2)):
        sizes = {"retrieval_memory_size": k_score, "memory_size": k_read}
        (answer,) = shared_model.answer(["Which river?"], documents=documents, max_new_tokens=8, **sizes)
        (row,) = shared_model.retrieve(["Which river?"], documents=documents, retrieval_memory_size=k_score)
        assert [source.document_id for source in answer.sources] == [source.document_id for source in row]
        memory = shared_model.compress([source.text for source in answer.sources], memory_size=k_read)
        assert answer.text == greedy_reference(shared_model, "Which river?", memory, 8)


def test_stored_memories_give_what_computed_ones_give(shared_model):
    stored = [
        {**(document if isinstance(document, dict) else {"text": document}), "memory": memory.tolist(), "span": index}
        for index, (document, memory) in enumerate(zip(DOCUMENTS, shared_model.compress(DOCUMENTS), strict=True))
    ]
    expected = shared_model.answer(QUESTIONS, documents=DOCUMENTS, top_k=3, max_new_tokens=8)
    for documents in (stored, [*stored[:2], *DOCUMENTS[2:]]):
        found = shared_model.answer(QUESTIONS, documents=documents, top_k=3, max_new_tokens=8)
        assert texts(found) == texts(expected)
        for answer, wanted in zip(found, expected, strict=True):
            assert [s.document_id for s in answer.sources] == [s.document_id for s in wanted.sources]
            assert [s.score for s in answer.sources] == pytest.approx([s.score for s in wanted.sources], abs=1e-5)
    assert {source.span for source in shared_model.retrieve(["q"], documents=stored, top_k=4)[0]} == {0, 1, 2, 3}


def test_a_large_stored_memory_serves_at_every_size(shared_model):
    large = torch.cat([shared_model.compress(DOCUMENTS[:1])[0], torch.ones(3, HIDDEN)])  # as of a larger model size
    for size in (2, 4):
        sizes = {"retrieval_memory_size": size, "memory_size": size, "max_new_tokens": 6}
        stored = {"text": DOCUMENTS[0], "memory": large.numpy()}
        (found,) = shared_model.answer(["q"], documents=[stored, "b"], **sizes)
        assert found.text == shared_model.answer(["q"], documents=[DOCUMENTS[0], "b"], **sizes)[0].text


def test_a_small_stored_memory_serves_where_no_more_is_asked_for(shared_model):
    documents = [{"text": t, "memory": m} for t, m in zip("ab", shared_model.compress(["a", "b"], memory_size=2))]  # noqa: B905
    sizes = {"retrieval_memory_size": 2}
    assert len(shared_model.retrieve(["q"], documents=documents, **sizes)[0]) == 2
    assert shared_model.answer(["q"], documents=documents, memory_size=2, max_new_tokens=2, **sizes)
    with pytest.raises(ValueError, match=r"documents\[0\]\['memory'\].*\(>= 4, 32\), got \(2, 32\)"):
        shared_model.answer(["q"], documents=documents, memory_size=4, **sizes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_corpus_gives_what_its_documents_give(shared_model, dtype):
    documents = corpus_documents()
    corpus = ExactScan(shared_model, documents, dtype=dtype)
    assert len(shared_model.retrieve(QUESTIONS, corpus=corpus)[0]) == shared_model.config.retrieval_top_k
    options = {"top_k": 3, "retrieval_memory_size": 2, "max_new_tokens": 8}
    expected = shared_model.answer(QUESTIONS, documents=documents, **options)
    found = shared_model.answer(QUESTIONS, corpus=corpus, **options)
    assert [[s.document_id for s in a.sources] for a in found] == [
        [s.document_id for s in a.sources] for a in expected
    ]
    assert found[0].sources[0].score == pytest.approx(expected[0].sources[0].score, abs=1e-5)
    if dtype is np.float32:
        assert texts(found) == texts(expected)
    limit = found[0].sources[1].score
    kept = shared_model.retrieve(QUESTIONS[:1], corpus=corpus, top_k=9, retrieval_memory_size=2, min_score=limit)
    assert kept == [found[0].sources[:2]]
    assert shared_model.answer(QUESTIONS, corpus=corpus, min_score=1.1)[1] == Answer("", [], None, abstained=True)


def test_a_corpus_with_smaller_memories_than_asked_for_is_an_error(shared_model):
    corpus = ExactScan(shared_model, corpus_documents(), memory_size=2)
    assert shared_model.retrieve(QUESTIONS, corpus=corpus, retrieval_memory_size=2)
    with pytest.raises(ValueError, match=r"memory of 'doc-\d' in the corpus.*\(>= 4, 32\), got \(2, 32\)"):
        shared_model.answer(QUESTIONS, corpus=corpus, retrieval_memory_size=2)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_new_tokens", [1, 9])
def test_an_answer_is_the_greedy_reading_of_its_sources_in_ranked_order(shared_model, max_new_tokens):
    answers = shared_model.answer(QUESTIONS, documents=DOCUMENTS, top_k=3, max_new_tokens=max_new_tokens)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        scores = [source.score for source in answer.sources]
        assert scores == sorted(scores, reverse=True)
        memory = shared_model.compress([{"title": s.title, "text": s.text} for s in answer.sources])
        assert answer.text == greedy_reference(shared_model, question, memory, max_new_tokens)


def test_the_default_is_greedy_whatever_the_backbone_prefers(model):
    expected = model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=8)
    model.backbone.generation_config.update(do_sample=True, temperature=3.0, num_beams=3, repetition_penalty=9.0)
    assert model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=8) == expected
    assert "".join(model.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=8)) == expected[0].text


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(passes, beams):
    questions = random_texts(19, seed=6, longest=30)
    lists = [random_texts(1 + index % 4, seed=index) for index in range(19)]
    options = {"max_new_tokens": 8, "generation_config": GenerationConfig(num_beams=beams)}
    together = passes.answer(questions, documents=lists, **options)
    assert len(set(texts(together))) > 10
    for question, documents, answer in list(zip(questions, lists, together, strict=True))[::3]:
        assert passes.answer([question], documents=documents, **options)[0].text == answer.text


def test_sampling_is_reproducible_and_the_configuration_given_is_kept(shared_model):
    sampling = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=3)
    given = sampling.to_dict()

    def sample(seed: int, config: GenerationConfig, max_new_tokens: int = 20) -> list[str]:
        torch.manual_seed(seed)
        options = {"max_new_tokens": max_new_tokens, "generation_config": config}
        return texts(shared_model.answer(QUESTIONS, documents=DOCUMENTS, **options))

    assert sample(1, sampling) == sample(1, sampling)
    assert len({tuple(sample(seed, sampling)) for seed in range(4)}) > 1
    without_limit = GenerationConfig(do_sample=True, temperature=2.0)
    assert sample(1, sampling) == sample(1, without_limit, max_new_tokens=3) != sample(1, without_limit)
    assert sampling.to_dict() == given


def test_a_paraphrase_is_the_greedy_reading_of_one_memory(shared_model):
    found = shared_model.paraphrase(DOCUMENTS, memory_size=2, max_new_tokens=7)
    memories = shared_model.compress(DOCUMENTS, memory_size=2)
    assert found == [greedy_reference(shared_model, None, memory[None], 7) for memory in memories]


def test_query_words_have_no_marks_no_punctuation_and_the_length_asked_for(shared_model):
    tokenizer = shared_model.processor.tokenizer
    marks = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for top_n in (1, 5, 50, len(tokenizer)):
        for words in shared_model.explain_queries(QUESTIONS, top_n=top_n):
            assert 0 <= len(words) <= top_n
            assert len(set(words)) == len(words)
            assert all(any(map(str.isalnum, word)) and word == word.strip() for word in words)
            assert marks.isdisjoint(words)
    answers = shared_model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1, explain=True)
    assert [answer.keywords for answer in answers] == shared_model.explain_queries(QUESTIONS)
    assert shared_model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1)[0].keywords is None


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_new_tokens", [1, 40])
@pytest.mark.parametrize("question", [*QUESTIONS, "Rome?"])
def test_a_stream_joins_to_the_answer_and_returns_it(shared_model, question, max_new_tokens):
    options = {"documents": DOCUMENTS, "max_new_tokens": max_new_tokens, "explain": True}
    pieces, answer = read_stream(shared_model.stream(question, **options))
    (expected,) = shared_model.answer([question], **options)
    assert (answer.text, answer.keywords) == (expected.text, expected.keywords)
    assert "".join(pieces).strip() == answer.text
    assert all(pieces) and len(pieces) <= max_new_tokens
    assert len(pieces) > max_new_tokens // 4
    assert [source.document_id for source in answer.sources] == [source.document_id for source in expected.sources]


def test_a_stream_does_not_show_an_end_mark_that_is_no_special_token(tmp_path):
    model = CLaRaForRAG.from_backbone(save_backbone(tmp_path), memory_sizes=(2,), lora_rank=2)
    tokenizer = model.processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<tool_call>")
    end = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert model.processor.answer_end_id == end
    config = GenerationConfig(forced_eos_token_id=end, max_new_tokens=4)
    pieces, answer = read_stream(model.stream("q", documents=["d"], generation_config=config))
    assert "".join(pieces) == answer.text
    assert "<tool_call>" not in answer.text


def test_closing_a_stream_ends_its_thread_and_the_model_goes_on(shared_model):
    (expected,) = shared_model.answer(QUESTIONS[:1], documents=DOCUMENTS, max_new_tokens=6)
    before = set(threading.enumerate())
    stream, passes = shared_model.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=400), []
    hook = shared_model.backbone.register_forward_hook(lambda *_: passes.append(1))
    assert set(threading.enumerate()) <= before  # nothing runs before the first piece is asked for
    next(stream)
    stream.close()
    hook.remove()
    assert set(threading.enumerate()) <= before
    assert 0 < len(passes) < 300
    with no_trace(shared_model):
        assert shared_model.answer(QUESTIONS[:1], documents=DOCUMENTS, max_new_tokens=6) == [expected]


def test_a_stream_left_open_does_not_block_the_next_call(shared_model):
    (expected,) = shared_model.answer(QUESTIONS[:1], documents=DOCUMENTS, max_new_tokens=6)
    unread, half_read = (shared_model.stream(q, documents=DOCUMENTS, max_new_tokens=60) for q in QUESTIONS)
    next(half_read)
    with ThreadPoolExecutor(1) as pool:
        options = {"documents": DOCUMENTS, "max_new_tokens": 6}
        assert pool.submit(shared_model.answer, QUESTIONS[:1], **options).result(timeout=60) == [expected]
    assert read_stream(unread)[1].text.startswith(expected.text[:3])
    assert read_stream(half_read)[1].text


# --- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("flags", ["train", "eval", "mixed"])
def test_a_call_leaves_no_trace_and_ignores_the_training_flags(model, name, flags):
    expected = CALLS[name](model.eval())
    model.set_trainable_roles(["generator"])
    model.train(flags == "train")
    if flags == "mixed":
        for index, module in enumerate(model.modules()):
            module.training = index % 3 == 0
    with no_trace(model):
        found = CALLS[name](model)
    if isinstance(found, torch.Tensor):
        assert not found.requires_grad and found.grad_fn is None
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_inside_inference_mode(shared_model, name):
    expected = CALLS[name](shared_model)
    with torch.inference_mode():
        found = CALLS[name](shared_model)
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def test_threads_get_what_they_would_get_one_after_the_other(model):
    model.train()
    questions = random_texts(8, seed=8)

    def work(index: int):
        (answer,) = model.answer([questions[index]], documents=DOCUMENTS, max_new_tokens=6)
        pieces = "".join(model.stream(questions[index], documents=DOCUMENTS, max_new_tokens=6))
        return answer, pieces, model.compress(questions[: index + 1]).sum().item()

    expected = [work(index) for index in range(8)]
    with no_trace(model), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, list(range(8)) * 3)) == expected * 3


@pytest.mark.parametrize("context", ["bulk_compression", "bulk_answering"])
@pytest.mark.parametrize("inference", [False, True])
def test_bulk_contexts_change_no_result_and_restore_the_weights_exactly(model, context, inference):
    expected = {name: call(model) for name, call in CALLS.items()}
    mode = torch.inference_mode() if inference else contextlib.nullcontext()
    with no_trace(model), mode, getattr(model, context)():
        torch.testing.assert_close(CALLS["compress"](model), expected["compress"], rtol=0, atol=1e-4)
        assert texts(CALLS["answer"](model)) == texts(expected["answer"])
        assert CALLS["paraphrase"](model) == expected["paraphrase"]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(CALLS["stream"], model).result(timeout=60) == expected["stream"]
    torch.testing.assert_close(CALLS["compress"](model), expected["compress"], rtol=0, atol=0)


@pytest.mark.parametrize("context", ["bulk_compression", "bulk_answering"])
def test_bulk_contexts_restore_after_an_error_and_do_not_nest(model, context):
    with no_trace(model), pytest.raises(ZeroDivisionError), getattr(model, context)():
        model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1)
        raise ZeroDivisionError
    with no_trace(model), getattr(model, context)():
        with pytest.raises(RuntimeError, match="merged already"), model.bulk_compression():
            pass
        model.compress(DOCUMENTS)
