"""Normalised memories: memories with fixed channel statistics, through every call, a checkpoint and training."""

import copy
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from test_hub_loading import edit_json, observe

from modeling_clara import CLaRaForRAG
from modeling_clara.memory_clara import memory_statistics, normalize_memory, restore_states
from recipes.training import preparation
from recipes.training.arguments import CLaRaTrainingArguments


def test_statistics_and_their_inverse():
    states = torch.randn(50, 8) * torch.arange(1, 9) + 30
    states[:, 3] = 7.0  # a channel that never changes tells nothing
    shift, scale = memory_statistics(states, 0.25)
    memory = normalize_memory(states, shift, scale)
    live = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(memory[:, live].std(0, correction=0), torch.full((7,), 0.25))
    torch.testing.assert_close(memory.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert not memory[:, 3].any() and memory.isfinite().all()
    torch.testing.assert_close(restore_states(memory, shift, scale), states, atol=1e-4, rtol=1e-5)
    half = normalize_memory(states.bfloat16(), shift, scale)
    assert half.dtype == torch.bfloat16


def test_every_pass_is_in_the_same_space(model, documents, questions):
    """Memories are the shifted and scaled ones of before, whichever way the documents go through the backbone."""
    raw, raw_queries = model.compress(documents), model.encode_queries(questions)
    before, words, near = model.fingerprint, model.explain_queries(questions), {"atol": 1e-4, "rtol": 1e-4}
    model.normalize_memories(documents)
    memory, numbers = model.compress(documents), (model.memory_shift, model.memory_scale)
    expected = normalize_memory(raw, *numbers)
    torch.testing.assert_close(memory, expected)
    torch.testing.assert_close(model.encode_queries(questions), normalize_memory(raw_queries, *numbers))
    spread = model.get_input_embeddings().weight.std()
    torch.testing.assert_close(memory.flatten(0, 1).std(), spread, rtol=0.1, atol=0)
    with model.bulk_compression():
        torch.testing.assert_close(model.compress(documents), expected, **near)
    batch = model.processor.pad_documents([model.processor.encode_documents(documents)])
    torch.testing.assert_close(model(**batch).memory[0], expected, **near)
    assert model.fingerprint != before
    assert model.explain_queries(questions) == words  # the LM head still reads the states


@pytest.mark.parametrize("layout", ["tokens", "windows"])
def test_saved_and_loaded(shared_model, shared_windows, documents, questions, tmp_path, layout):
    model = copy.deepcopy(shared_model if layout == "tokens" else shared_windows)
    assert model.memory_shift is None and "memory_shift" not in model.state_dict()
    model.normalize_memories(documents)
    model.save_pretrained(tmp_path / "saved")
    loaded = CLaRaForRAG.from_pretrained(tmp_path / "saved")
    assert loaded.config.memory_normalization and observe(loaded) == observe(model)
    loaded.normalize_memories(documents)  # measured again the numbers are the same
    assert torch.equal(loaded.memory_shift, model.memory_shift) and loaded.fingerprint == model.fingerprint
    loaded.normalize_memories(documents[:2])  # others are what is saved then
    loaded.save_pretrained(tmp_path / "again")
    again = CLaRaForRAG.from_pretrained(tmp_path / "again")
    assert torch.equal(again.memory_scale, loaded.memory_scale) and again.fingerprint == loaded.fingerprint
    half = CLaRaForRAG.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.fingerprint == model.fingerprint and half.compress(documents).dtype == torch.float32
    assert half.answer(questions, documents=documents, max_new_tokens=2)
    edit_json(tmp_path / "saved/config.json", memory_normalization=False)
    with pytest.raises(ValueError, match="memory_s"):
        CLaRaForRAG.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (["one"], ValueError, "at least 2"),
        ("text", TypeError, "documents"),
        (["a", ""], ValueError, r"ments\[1\]"),
    ],
)
def test_bad_documents_change_nothing_and_nothing_of_it_trains(model, documents, bad, error, text):
    model.normalize_memories(documents)
    shift = model.memory_shift.clone()
    with pytest.raises(error, match=text):
        model.normalize_memories(bad)
    assert model.config.memory_normalization and torch.equal(shift, model.memory_shift)
    model.set_trainable_roles(("compressor", "generator"))
    assert not model.memory_shift.requires_grad and not model.memory_scale.requires_grad


def test_training_measures_documents_from_the_first_to_the_last(model, tmp_path):
    """Each once, however many a record has: the data may be sorted."""
    records = [{"documents": [{"title": "", "text": f"{n} word"} for n in range(90)]}]
    records += [{"documents": [{"title": "", "text": f"{n} word"}]} for n in (*range(80, 200), *range(150, 200))]
    measured = []
    measure = model.normalize_memories
    model.normalize_memories = lambda documents, **options: measured.extend(documents) or measure(documents, **options)
    training = CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    preparation.normalize_memories(model, Dataset.from_list(records), training)
    numbers = [int(document["text"].split()[0]) for document in measured]
    assert len(numbers) == 128 and numbers[0] == 0 and numbers[-1] >= 198
    assert {later - earlier for earlier, later in pairwise(numbers)} == {1, 2}
    assert model.config.memory_normalization
    measured.clear()
    preparation.normalize_memories(model, Dataset.from_list(records[-3:]), training)
    assert [document["text"] for document in measured] == ["197 word", "198 word", "199 word"]
