"""Text in, text out: compress, retrieve, answer, stream and the rest against references computed here.

What a call returns must not depend on its batch, its thread or its memory's origin, and it must leave no trace.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from readings import greedy_reference, random_texts, read_stream, texts
from tiny import DOCUMENTS, HIDDEN, QUESTIONS, save_backbone
from transformers import GenerationConfig

from modeling_clara import CLaRaForRAG
from modeling_clara.packing_clara import can_pack

CALLS = {
    "compress": lambda model: model.compress(DOCUMENTS),
    "encode_queries": lambda model: model.encode_queries(QUESTIONS, memory_size=2),
    "retrieve": lambda model: model.retrieve(QUESTIONS, documents=DOCUMENTS),
    "answer": lambda model: model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=4, explain=True),
    "paraphrase": lambda model: model.paraphrase(DOCUMENTS[:2], max_new_tokens=4),
    "explain_queries": lambda model: model.explain_queries(QUESTIONS, top_n=5),
    "stream": lambda model: list(model.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=4)),
}


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


@pytest.fixture(params=["packed", "padded"])
def passes(request, model):
    """A model that reads texts packed, and one whose attention allows padded passes only."""
    if request.param == "padded":
        model.backbone.config._attn_implementation = "eager"
    assert can_pack(model.backbone, 64) == (request.param == "packed")
    return model


@pytest.mark.parametrize("method", ["compress", "encode_queries"])
def test_a_memory_is_float32_and_the_same_alone_in_any_batch_and_place_and_size(passes, method):
    documents, encode = random_texts(30), getattr(passes, method)
    alone = torch.cat([encode([document]) for document in documents])
    assert alone.shape == (30, 4, HIDDEN) and alone.dtype == torch.float32 and not alone.requires_grad
    assert alone.device == passes.memory_embeddings.device
    assert (alone[0] - alone[1]).abs().max() > 0.1
    for batch_size in (3, 16, 1000):
        near = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(encode(documents, batch_size=batch_size), alone, **near)
        torch.testing.assert_close(encode(documents[::-1], batch_size=batch_size), alone.flip(0), **near)
        small = encode(documents, batch_size=batch_size, memory_size=2)
        torch.testing.assert_close(small, alone[:, :2], **near)


def test_the_default_is_greedy_whatever_the_backbone_prefers(model):
    expected = model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=8)
    model.backbone.generation_config.update(do_sample=True, temperature=3.0, num_beams=3, repetition_penalty=9.0)
    assert model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=8) == expected
    assert "".join(model.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=8)) == expected[0].text


@pytest.mark.parametrize("beams, expand", [(1, 0), (3, 0), (1, 1), (1, 2)])
def test_an_answer_does_not_depend_on_its_batch(passes, beams, expand):
    """Prompts of mixed lengths and, as `retrieval_top_k` is 2, of none to two memories."""
    questions = random_texts(13, seed=6, longest=30)
    lists = [random_texts(1 + index % 4, seed=index) for index in range(13)]
    options = {"max_new_tokens": 8, "generation_config": GenerationConfig(num_beams=beams), "expand": expand}
    together = passes.answer(questions, documents=lists, **options)
    assert len(set(texts(together))) > 6
    n_memories = {sum(source.read_as == "memory" for source in answer.sources) for answer in together}
    assert n_memories == set(range(max(0, 1 - expand), 3 - expand))
    for question, documents, answer in list(zip(questions, lists, together, strict=True))[::3]:
        (alone,) = passes.answer([question], documents=documents, **options)
        assert (alone.text, alone.prompt_tokens) == (answer.text, answer.prompt_tokens)
        for mine, other in zip(alone.sources, answer.sources, strict=True):
            assert (mine.document_id, mine.read_as) == (other.document_id, other.read_as)


def test_sampling_is_reproducible_and_the_configuration_given_is_kept(shared_model):
    sampling, endless = (GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=n) for n in (3, None))
    given = sampling.to_dict()

    def sample(seed: int, config: GenerationConfig, n_tokens: int = 20) -> tuple[str, ...]:
        torch.manual_seed(seed)
        options = {"max_new_tokens": n_tokens, "generation_config": config}
        return tuple(texts(shared_model.answer(QUESTIONS, documents=DOCUMENTS, **options)))

    assert sample(1, sampling) == sample(1, sampling) == sample(1, endless, 3) != sample(1, endless)
    assert len({sample(seed, sampling) for seed in range(4)}) > 1 and sampling.to_dict() == given


def test_a_paraphrase_is_the_greedy_reading_of_one_memory(shared_model):
    found = shared_model.paraphrase(DOCUMENTS, memory_size=2, max_new_tokens=7)
    memories = shared_model.compress(DOCUMENTS, memory_size=2)
    assert found == [greedy_reference(shared_model, None, memory[None], 7) for memory in memories]


def test_query_words_have_no_marks_no_punctuation_and_the_length_asked_for(shared_model):
    tokenizer = shared_model.processor.tokenizer
    marks = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for top_n in (1, 5, 50, len(tokenizer)):
        for words in shared_model.explain_queries(QUESTIONS, top_n=top_n):
            assert len(set(words)) == len(words) <= top_n and marks.isdisjoint(words)
            assert all(any(map(str.isalnum, word)) and word == word.strip() for word in words)
    answers = shared_model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1, explain=True)
    assert [answer.keywords for answer in answers] == shared_model.explain_queries(QUESTIONS)
    assert shared_model.answer(QUESTIONS, documents=DOCUMENTS, max_new_tokens=1)[0].keywords is None


@pytest.mark.parametrize("max_new_tokens, expand", [(1, 0), (40, 0), (12, 1), (12, 5)])
@pytest.mark.parametrize("question", [*QUESTIONS, "Rome?"])
def test_a_stream_joins_to_the_answer_and_returns_it(shared_model, question, max_new_tokens, expand):
    options = {"documents": DOCUMENTS, "max_new_tokens": max_new_tokens, "explain": True, "expand": expand}
    pieces, answer = read_stream(shared_model.stream(question, **options))
    assert [answer] == shared_model.answer([question], **options)
    assert "".join(pieces).strip() == answer.text
    assert all(pieces) and max_new_tokens // 4 < len(pieces) <= max_new_tokens


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
    assert set(threading.enumerate()) <= before and 0 < len(passes) < 300
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


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("flags", ["train", "mixed", "inference"])
def test_a_call_leaves_no_trace_and_ignores_training_flags_and_inference_mode(model, name, flags):
    expected = CALLS[name](model.eval())
    model.set_trainable_roles(["generator"])
    for index, module in enumerate(model.modules()):
        module.training = flags == "train" or (flags == "mixed" and index % 3 == 0)
    with no_trace(model), torch.inference_mode(flags == "inference"):
        found = CALLS[name](model)
    if isinstance(found, torch.Tensor):
        assert not found.requires_grad and found.grad_fn is None and torch.equal(found, expected)
    else:
        assert found == expected


def test_threads_get_what_they_would_get_one_after_the_other(model):
    model.train()
    questions = random_texts(6, seed=8)

    def work(index: int):
        (answer,) = model.answer([questions[index]], documents=DOCUMENTS, max_new_tokens=4)
        pieces = "".join(model.stream(questions[index], documents=DOCUMENTS, max_new_tokens=4))
        return answer, pieces, model.compress(questions[: index + 1]).sum().item()

    expected = [work(index) for index in range(6)]
    with no_trace(model), ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, list(range(6)) * 2)) == expected * 2


@pytest.mark.parametrize("context", ["bulk_compression", "bulk_answering"])
@pytest.mark.parametrize("inference", [False, True])
def test_bulk_contexts_change_no_result_and_restore_the_very_same_weights(model, context, inference):
    """Also after an error, and they do not nest."""
    expected = {name: call(model) for name, call in CALLS.items()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with no_trace(model), torch.inference_mode(inference), pytest.raises(ZeroDivisionError):
        with getattr(model, context)():
            torch.testing.assert_close(CALLS["compress"](model), expected["compress"], rtol=0, atol=1e-4)
            assert texts(CALLS["answer"](model)) == texts(expected["answer"])
            assert CALLS["paraphrase"](model) == expected["paraphrase"]
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(CALLS["stream"], model).result(timeout=60) == expected["stream"]
            with pytest.raises(RuntimeError, match="merged already"), model.bulk_compression():
                pass
            assert model.roles.merged_weights
            raise ZeroDivisionError
    assert not model.roles.merged_weights
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert torch.equal(CALLS["compress"](model), expected["compress"])
