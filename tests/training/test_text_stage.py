"""The stage "text": the loss and the answers are those of the backbone with the generator merged into its weights.

What all stages share is in `test_trainer.py`, its records are in `test_data.py`, its batches in `test_collators.py`.
"""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_collators import inputs
from training_runs import CITIES, count_roles
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRAG
from modeling_clara.corpus.storage import read_lines
from modeling_clara.generation_clara import eval_mode


@pytest.fixture(scope="module")
def merged(shared_model, backbone_folder):
    """The backbone as transformers loads it, the generator's low-rank products added to its weights."""
    reference = AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32).eval()
    names = [name for name, module in shared_model.backbone.named_modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for name in names:
            delta = shared_model.backbone.get_submodule(name).get_delta_weight("generator")
            reference.get_submodule(name.removeprefix("base_model.model.")).weight += delta
    assert names
    return reference


@torch.no_grad()
def plain_loss(reference, model: CLaRaForRAG, records: list[dict]) -> float:
    """Mean cross entropy of all answer tokens, prompt by prompt without padding."""
    total, count = 0.0, 0
    for one in records:
        for question, answer in zip(one["questions"], one["answers"], strict=True):
            prompt = model.processor.build_prompt(question, 0, 4, answer, text_documents=one["documents"])
            logits = reference(input_ids=torch.tensor([prompt.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(prompt.labels[1:])
            is_target = targets != -100
            total -= float(logits.log_softmax(-1)[is_target].gather(1, targets[is_target][:, None]).sum())
            count += int(is_target.sum())
    return total / count


TARGETS = {"data_options": {"targets_per_document": 2}, "dropout": False}


def test_the_loss_is_that_of_the_backbone_with_the_generator_merged(build, merged, backbone_folder):
    """Of a batch for every k, and of a step of two micro-batches with unequal counts of targets."""
    trainer = build("text", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, **TARGETS)
    model, records = trainer.model, list(trainer.train_dataset)
    assert len(records) == 8 and {len(one["questions"]) for one in records} == {1, 2}
    for part in (records[:1], records[1:4], records):
        expected = plain_loss(merged, model, part)
        for size in model.config.memory_sizes:
            with torch.no_grad():
                found = float(model(**inputs(trainer.data_collator(part), size)).loss)
            assert found == pytest.approx(expected, rel=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(backbone_folder).eval()
    assert abs(plain_loss(untrained, model, records) - expected) > 0.05  # the adapter matters
    counts = count_roles(model)
    trainer.train()
    assert counts == {"generator": 2}
    step = trainer.state.log_history[0]
    assert step["loss"] == pytest.approx(expected, rel=1e-5) and step["ce"] == pytest.approx(expected, rel=1e-5)
    assert {"grad_norm/generator", "exact_match"} <= set(step) and "mse" not in step


def test_evaluation_and_samples_are_read_from_texts(build, merged):
    """The same for any batch; sample answers are what greedy decoding with the merged generator writes."""
    for size in (1, 3):
        trainer = build("text", f"run{size}", per_device_eval_batch_size=size, num_samples=2, **TARGETS)
        model, records = trainer.model, list(trainer.eval_dataset)
        assert trainer.evaluate()["eval_ce"] == pytest.approx(plain_loss(merged, model, records), rel=1e-5)
    samples = read_lines(Path(trainer.args.output_dir) / "samples.jsonl")
    assert [row["expected"] for row in samples] == CITIES[:2]
    for row, one in zip(samples, records, strict=False):
        prompt = model.processor.build_prompt(one["questions"][0], 0, 4, text_documents=one["documents"])
        config = model.build_generation_config(None, 32)
        ids = torch.tensor([prompt.input_ids])
        with torch.no_grad(), eval_mode(model):
            found = merged.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answer = model.decode_answer(found[0, ids.shape[1] :].tolist(), config.eos_token_id)
        assert row["answer"] == answer and row["question"] == one["questions"][0]
