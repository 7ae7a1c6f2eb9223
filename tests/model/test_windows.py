"""`memory_layout="windows"`: means of a document's windows as nested memories, from the tensors to a corpus.

What holds for every layout is tested in `test_model.py`, `test_packing.py` and `test_shared_prompts.py`.
"""

import copy

import pytest
import torch
from readings import corpus_documents
from tiny import DOCUMENTS, QUESTIONS

from modeling_clara import CLaRaForRAG, CompressedCorpus, generation_clara
from modeling_clara.candidates_clara import Source
from modeling_clara.memory_clara import (
    nest_windows,
    normalize_memory,
    read_windows,
    token_matrices,
    whole_tokens,
    window_means,
)
from modeling_clara.reading_clara import prepare_reading
from modeling_clara.retrieval_clara import cosine_scores
from modeling_clara.text_clara import read_document

SIZES = [2, 4, 8]  # of `shared_windows`


@pytest.fixture
def windows_model(shared_windows) -> CLaRaForRAG:
    """A copy to change."""
    return copy.deepcopy(shared_windows)


def slow_means(states: torch.Tensor, length: int, n_windows: int) -> torch.Tensor:
    """Every window summed token by token in double precision."""
    rows = []
    for window in range(n_windows):
        start, end = window * length / n_windows, (window + 1) * length / n_windows
        total, weight = torch.zeros(states.shape[-1], dtype=torch.float64), 0.0
        for token in range(length):
            share = max(0.0, min(end, token + 1) - max(start, token))
            total, weight = total + share * states[token].double(), weight + share
        rows.append(total / weight)
    return torch.stack(rows)


@pytest.mark.parametrize("n_windows", [1, 2, 8, 16])
def test_means_are_those_of_a_slow_loop(n_windows):
    lengths = [1, 2, 3, 7, 8, 16, 19, 40]
    states = torch.randn(len(lengths), 40, 5, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        states[row, length:] = float(10**4)  # padding counts for nothing
    found = window_means(states, torch.tensor(lengths), n_windows)
    assert found.dtype == torch.float32 and found.shape == (len(lengths), n_windows, 5)
    for row, length in enumerate(lengths):
        expected = slow_means(states[row], length, n_windows)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], states[0, :1].expand(n_windows, -1))  # one token is every window


def test_means_of_nothing_are_zeros_and_of_bfloat16_are_summed_in_float32():
    states = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(1)).bfloat16() + 30
    lengths = torch.tensor([0, 300])
    found, exact = window_means(states, lengths, 2), window_means(states.float(), lengths, 2)
    assert found.dtype == torch.bfloat16 and not found[0].any() and torch.equal(found[1], exact[1].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(window_means(states.float(), lengths, 2), exact)


@pytest.mark.parametrize(("n_base", "n"), [(1, 1), (1, 16), (2, 2), (4, 16), (3, 12)])
def test_nesting_and_reading_undo_each_other(n_base, n):
    windows = torch.randn(3, 2, n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nested = nest_windows(windows, n_base)
    assert nested.shape == windows.shape
    torch.testing.assert_close(read_windows(nested, n_base), windows)
    torch.testing.assert_close(nest_windows(read_windows(windows, n_base), n_base), windows)


@pytest.mark.parametrize(("n_base", "n"), [(1, 8), (4, 16)])
def test_the_first_vectors_are_the_windows_of_that_size_and_their_cosine(n_base, n):
    """Also of two documents whose windows have different lengths in tokens."""
    states = torch.randn(2, 37, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lengths, size, near = torch.tensor([37, 21]), n_base, {"atol": 1e-6, "rtol": 1e-6}
    whole = nest_windows(window_means(states, lengths, n), n_base)
    while size <= n:
        windows = window_means(states, lengths, size)
        torch.testing.assert_close(read_windows(whole[:, :size], n_base), windows, **near)
        torch.testing.assert_close(whole[:, :size], nest_windows(windows, n_base), **near)
        cosines = [cosine_scores(rows[:1], rows[None, 1:], size) for rows in (whole, windows)]
        torch.testing.assert_close(*cosines, **near)
        size *= 2


@torch.no_grad()
def test_a_memory_is_the_means_of_states_and_embeddings(shared_windows):
    """Written out for each document alone, in double precision, and read back as windows."""
    memory = shared_windows.compress(DOCUMENTS)
    scale = shared_windows.residual_scale.double()
    for row, ids in enumerate(shared_windows.processor.encode_documents(DOCUMENTS)):
        embeddings = shared_windows.get_input_embeddings()(torch.tensor([ids]))
        with shared_windows.roles.use("compressor"):
            states = shared_windows.backbone.base_model(inputs_embeds=embeddings).last_hidden_state[0]
        for size in SIZES:
            expected = slow_means(states, len(ids), size) + scale * slow_means(embeddings[0], len(ids), size)
            read = shared_windows.as_read(memory[row, :size])
            torch.testing.assert_close(read.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_question_has_states_of_memory_tokens_and_its_own_mean(shared_windows):
    """A question is one window: its mean stands in the widest windows, and no window's halves differ by it."""
    queries, other = shared_windows.encode_queries(QUESTIONS), copy.deepcopy(shared_windows)
    for size in SIZES:
        found = shared_windows.encode_queries(QUESTIONS, memory_size=size)
        torch.testing.assert_close(found, queries[:, :size], atol=1e-5, rtol=1e-5)
    other.residual_scale.data.zero_()
    difference = queries - other.encode_queries(QUESTIONS)
    torch.testing.assert_close(difference[:, 0], difference[:, 1], atol=1e-5, rtol=0)
    assert not difference[:, 2:].any()
    for row, ids in enumerate(shared_windows.processor.encode_questions(QUESTIONS)):
        mean = shared_windows.get_input_embeddings()(torch.tensor(ids)).mean(0)
        torch.testing.assert_close(difference[row, 0], shared_windows.residual_scale * mean, atol=1e-5, rtol=1e-4)


def test_normalized_memories_are_the_same_function_of_the_states(windows_model):
    """Every window is shifted and scaled; what the question's words and the document's add is not."""
    scale = windows_model.residual_scale.detach().clone()
    windows_model.residual_scale.data.zero_()
    states = windows_model.as_read(windows_model.compress(DOCUMENTS))
    windows_model.residual_scale.data.copy_(scale)
    windows_model.normalize_memories(DOCUMENTS)
    measured, whole = (windows_model.memory_shift, windows_model.memory_scale), windows_model.compress(DOCUMENTS)
    embeddings = windows_model.get_input_embeddings().weight
    for row, ids in enumerate(windows_model.processor.encode_documents(DOCUMENTS)):
        residual = scale * window_means(embeddings[ids][None], torch.tensor([len(ids)]), 8)[0]
        expected = normalize_memory(states[row], *measured) + residual
        torch.testing.assert_close(windows_model.as_read(whole[row]), expected, atol=1e-4, rtol=1e-4)


def test_the_fingerprint_is_also_of_the_residual_and_the_smallest_size(windows_model):
    seen = [windows_model.fingerprint]
    with torch.no_grad():
        windows_model.residual_scale[3] += 1e-3
    seen.append(windows_model.fingerprint)
    windows_model.config.memory_sizes = [4, 8]
    assert len({*seen, windows_model.fingerprint}) == 3


def test_answers_from_a_corpus_are_those_from_its_texts(shared_windows, tmp_path):
    texts = corpus_documents()
    corpus = CompressedCorpus.build(shared_windows, texts, tmp_path / "corpus", codec="float16")
    for size in SIZES:
        options = {"memory_size": size, "retrieval_memory_size": size, "top_k": 3, "max_new_tokens": 6}
        found = shared_windows.answer(QUESTIONS, corpus=corpus, **options)
        for mine, other in zip(found, shared_windows.answer(QUESTIONS, documents=texts, **options), strict=True):
            assert [source.document_id for source in mine.sources] == [s.document_id for s in other.sources]
            assert mine.sources[0].score == pytest.approx(other.sources[0].score, abs=1e-3)
            assert mine.text == other.text


def test_a_question_has_no_more_vectors_than_were_trained(windows_model):
    windows_model.config.retrieval_memory_size = 4
    assert windows_model.encode_queries(QUESTIONS).shape[1] == 4
    with pytest.raises(ValueError, match="`memory_size` of questions must be <= .* got 8"):
        windows_model.retrieve(QUESTIONS, documents=DOCUMENTS, retrieval_memory_size=8)


@pytest.mark.parametrize("n_windows", [1, 2, 8, 64])
def test_tokens_follow_from_windows_that_are_no_wider(n_windows):
    """Exactly; a codec's noise grows little; windows of longer texts and of unknown ones are left alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = [*range(1, n_windows + 1), n_windows + 1, 2 * n_windows + 3]
    states = torch.randn(len(lengths), lengths[-1], 5, generator=generator, dtype=torch.float64).float()
    windows = window_means(states, torch.tensor(lengths), n_windows)
    noise = 0.03 * torch.randn(windows.shape, generator=generator)
    found, noisy = (whole_tokens(rows, torch.tensor(lengths)) for rows in (windows, windows + noise))
    for row, length in enumerate(lengths[:n_windows]):
        torch.testing.assert_close(found[row, :length], states[row, :length], atol=1e-4, rtol=1e-4)
        assert not found[row, length:].any()
        assert (noisy - found)[row].std() < 0.06
    assert torch.equal(found[n_windows:], windows[n_windows:])
    assert torch.equal(whole_tokens(windows, torch.zeros(len(lengths), dtype=torch.long)), windows)
    token_matrices.cache_clear()  # nothing may be kept of the context of the first call
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(whole_tokens(windows, torch.tensor(lengths)), found)
    asked = windows.clone().requires_grad_()
    whole_tokens(asked, torch.tensor(lengths)).sum().backward()
    assert asked.grad.isfinite().all()


def token_vectors(model, document) -> torch.Tensor:
    """The vector of each token of a document, (tokens, hidden)."""
    ids = torch.tensor(model.processor.encode_documents([document]))
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad(), model.roles.use("compressor"):
        states = model.backbone.base_model(inputs_embeds=embeddings).last_hidden_state
        return (model.as_memory(states) + model.residual_scale * embeddings)[0]


SHORT = ["a b", {"title": "a", "text": "b c"}, "Paris is the capital of France, and it is large."]


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_short_documents_are_read_token_by_token(shared_windows, tmp_path, monkeypatch, codec):
    """With the smallest k that has room, or a given one, out of a corpus; also where they are paraphrased."""
    rows = [{"text": row} if isinstance(row, str) else row for row in SHORT]
    rows = [{"id": str(number), **row} for number, row in enumerate(rows)]
    lengths = [len(ids) for ids in shared_windows.processor.encode_documents(SHORT)]
    assert lengths[0] <= SIZES[0] < lengths[1] <= SIZES[-1] < lengths[2]
    corpus, read = CompressedCorpus.build(shared_windows, rows, tmp_path / "corpus", codec=codec), []
    write = generation_clara.write_texts
    monkeypatch.setattr(
        generation_clara,
        "write_texts",
        lambda model, prompts, *rest, **kwargs: read.extend(rest[0]) or write(model, prompts, *rest, **kwargs),
    )
    near = {"atol": 0.01, "rtol": 0.01} if codec == "float16" else {"atol": 0.1, "rtol": 0.1}
    for size in (None, *SIZES):
        for row, length in zip(rows, lengths, strict=True):
            read.clear()
            shared_windows.answer(
                QUESTIONS[:1],
                corpus=corpus.with_options(where={"document_id": row["id"]}),
                top_k=1,
                memory_size=size,
                max_new_tokens=1,
            )
            shared_windows.paraphrase([row], memory_size=size, max_new_tokens=1)
            k = size or min((one for one in SIZES if one >= length), default=SIZES[-1])
            for memory in read:
                assert memory.shape[:2] == (1, k)
                windows = shared_windows.as_read(memory)[0]
                if length <= k:
                    torch.testing.assert_close(windows[:length], token_vectors(shared_windows, row), **near)
                    torch.testing.assert_close(windows[length:], torch.zeros(k - length, windows.shape[1]))
                else:
                    whole = shared_windows.as_read(shared_windows.compress([row], memory_size=k))[0]
                    torch.testing.assert_close(windows, whole, **near)
            assert len(read) == 2
    together = shared_windows.answer(QUESTIONS[:1], documents=SHORT, top_k=3, max_new_tokens=4)[0]
    assert together.prompt_tokens == len(shared_windows.processor.build_prompt(QUESTIONS[0], 3, SIZES[-1]).input_ids)


@pytest.mark.parametrize("more", [-3, -1, 1, 2, 20])
def test_a_memory_of_another_text_keeps_its_windows(shared_windows, more):
    """Stored with the title, say, and handed over without."""
    states = torch.randn(1, 24, 5, generator=torch.Generator().manual_seed(2))
    windows = window_means(states, torch.tensor([24]), 64)
    assert torch.equal(whole_tokens(windows, torch.tensor([24 + more])), windows)
    document = {"title": "T", "text": "a b c"}
    memory, generation = shared_windows.compress([document])[0], shared_windows.build_generation_config(None, 1)
    hits = [(Source("a", 0, 1.0, "", document["text"]), memory)]
    reading = prepare_reading(shared_windows, "Who?", hits, None, 0, generation, "question")
    k = reading.memory.shape[1]
    torch.testing.assert_close(shared_windows.as_read(reading.memory[0]), shared_windows.as_read(memory[:k]))


def test_windows_stay_where_the_length_is_not_known(shared_windows):
    """A source without its text, of which only a corpus of another kind can consist."""
    source = Source("a", 0, 1.0, "", "")
    memory, generation = shared_windows.compress(["a b"])[0], shared_windows.build_generation_config(None, 1)
    reading = prepare_reading(shared_windows, "Who?", [(source, memory)], None, 0, generation, "question")
    torch.testing.assert_close(reading.memory[0], memory)


@torch.no_grad()
def test_a_training_step_reads_what_an_answer_reads(shared_windows):
    """Documents of all lengths in a row: the loss is that of the memories of a reading."""
    processor, generation = shared_windows.processor, shared_windows.build_generation_config(None, 1)
    for size in SIZES:
        batch = processor(QUESTIONS[:1], [SHORT], ["Paris"], memory_size=size)
        hits = [
            (Source("", 0, 1.0, *read_document(row, "row")), memory)
            for row, memory in zip(SHORT, shared_windows.compress(SHORT), strict=True)
        ]
        memory = prepare_reading(shared_windows, QUESTIONS[0], hits, size, 0, generation, "question").memory[None]
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "memory_mask", "labels")}
        found = shared_windows(**batch, memory_size=size).lm_loss
        torch.testing.assert_close(found, shared_windows(memory=memory, **prompt, memory_size=size).lm_loss)


def test_the_residual_trains_with_the_compressor(windows_model):
    for roles in (("reasoner", "generator"), ("compressor",)):
        windows_model.set_trainable_roles(roles)
        rows = (windows_model.residual_scale, windows_model.memory_embeddings)
        assert all(row.requires_grad == ("compressor" in roles) for row in rows)
