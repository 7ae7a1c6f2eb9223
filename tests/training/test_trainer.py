"""The trainers: what moves, what is held, equal results for any batching, and a restart that changes nothing.

Every test trains a tiny real model for a few steps on rows written to disk, through the same preparation as
`train.py`.
"""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from training_runs import CITIES, assert_equal, loss_curve, state_of, without_dropout

from modeling_clara import CLaRaForRAG
from recipes.benchmarks.training import padded_passes
from recipes.training.checkpoints import last_checkpoint
from recipes.training.trainer import memory_size_of_step, part_of

PARTS = {
    "pretrain": {"compressor", "generator", "rows"},
    "instruct": {"compressor", "generator", "rows"},
    "contrastive": {"reasoner"},
    "joint": {"reasoner", "generator"},
}


@pytest.mark.parametrize("stage", PARTS)
def test_what_should_train_moves_and_nothing_else(build, stage):
    trainer = build(stage, max_steps=3)
    before = state_of(trainer.model)
    trainer.train()
    after = state_of(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trainable} == PARTS[stage]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}


def test_a_backbone_that_trains_is_saved_and_comes_back(build, tmp_path):
    trainer = build(model_options={"train_backbone": True}, max_steps=2)
    before = state_of(trainer.model)
    trainer.train()
    moved = {
        part_of(name) for name, tensor in state_of(trainer.model).items() if not torch.equal(before[name], tensor)
    }
    assert moved == PARTS["pretrain"] | {"backbone"}
    trainer.save_model()
    loaded = CLaRaForRAG.from_pretrained(tmp_path / "run")
    assert_equal(state_of(trainer.model), state_of(loaded))


@pytest.mark.parametrize("stage, order", [*product(PARTS, ("random", "group_by_length")), ("pretrain", "sequential")])
def test_resuming_equals_not_stopping(build, stage, order):
    """Bit-equal, dropout and the draw of k included, wherever in the second epoch the run was killed."""
    options = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": order}
    per_epoch = len(build(stage, "count").train_dataset) // 4
    options |= {"max_steps": 2 * per_epoch, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    whole = build(stage, "whole", **options)
    whole.train()
    killed = build(stage, "killed", **options)
    folder = killed.args.output_dir
    killed.train()
    for step in range(per_epoch + 2, 2 * per_epoch + 1):
        shutil.rmtree(f"{folder}/checkpoint-{step}")
    resumed = build(stage, "killed", **options)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(Path(folder))))
    assert resumed.state.global_step == 2 * per_epoch
    assert_equal(state_of(whole.model), state_of(resumed.model))
    assert loss_curve(whole) == loss_curve(resumed)


def test_resuming_a_trained_backbone_equals_not_stopping(build):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "model_options": {"train_backbone": True}}
    whole = build(name="whole", **options)
    whole.train()
    killed = build(name="killed", **options)
    killed.train()
    resumed = build(name="killed", **options)
    resumed.train(resume_from_checkpoint=f"{killed.args.output_dir}/checkpoint-1")
    assert_equal(state_of(whole.model), state_of(resumed.model))


@pytest.mark.parametrize("stage", PARTS)
def test_accumulating_micro_batches_equals_one_batch(build, stage):
    """4 x 1 == 1 x 4, with targets and candidate lists of unequal length."""
    runs = []
    for name, size, accumulation in (("one", 4, 1), ("four", 1, 4)):
        trainer = build(
            stage,
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",  # AdamW's first steps are signs, which rounding flips
            learning_rate=1e-1,
        )
        without_dropout(trainer.model)
        trainer.train()
        runs.append(trainer)
    assert_equal(state_of(runs[0].model), state_of(runs[1].model), rtol=1e-4, atol=1e-6)
    for one, four in zip(*(trainer.state.log_history[:2] for trainer in runs), strict=True):
        for name in set(one) - {"epoch", "tokens_per_second", "step"}:
            assert one[name] == pytest.approx(four[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", PARTS)
def test_checkpointing_activations_changes_nothing(build, stage):
    plain = build(stage, "plain", max_steps=2)
    with padded_passes():  # as recomputed ones are: dropout draws the same
        plain.train()
    checkpointed = build(stage, "checkpointed", max_steps=2, activation_checkpointing=True)
    checkpointed.train()
    assert_equal(state_of(plain.model), state_of(checkpointed.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", PARTS)
def test_bfloat16_keeps_what_trains_in_float32(build, stage):
    exact = build(stage, "exact", max_steps=2)
    exact.train()
    half = build(stage, "half", max_steps=2, bf16=True, model_options={"dtype": "bfloat16"})
    half.train()
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for a, b in zip(loss_curve(exact), loss_curve(half), strict=True):
        assert b == pytest.approx(a, rel=0.1, abs=0.05)


def test_k_is_drawn_from_seed_and_step(build):
    sizes = [2, 4]
    drawn = [memory_size_of_step(sizes, 7, step) for step in range(200)]
    assert drawn == [memory_size_of_step(sizes, 7, step) for step in range(200)]
    assert drawn != [memory_size_of_step(sizes, 8, step) for step in range(200)]
    assert 60 < drawn.count(2) < 140
    trainer = build(max_steps=6, gradient_accumulation_steps=2)
    read = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append((kwargs["memory_size"], kwargs["num_samples_in_batch"])),
        with_kwargs=True,
    )
    trainer.train()
    wanted = [memory_size_of_step(sizes, trainer.args.seed, step) for step in range(6) for _ in range(2)]
    assert [size for size, _ in read] == wanted
    assert {float(samples) for _, samples in read} == {4.0}


def test_k_can_be_held_to_some_sizes(build):
    trainer = build(max_steps=6, train_memory_sizes=[4])
    read = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append(kwargs["memory_size"]), with_kwargs=True
    )
    trainer.train()
    assert read == [4] * 6
    for wrong in ([], [3], [4, 8], [4, 4]):
        with pytest.raises(ValueError, match="`train_memory_sizes` must name some"):
            build(max_steps=6, train_memory_sizes=wrong)


def test_a_checkpoint_keeps_its_settings(build, shared_model):
    """A recipe may say them again, and is refused where it says something else."""
    config, overlap = shared_model.config, shared_model.processor.document_overlap
    same = {"memory_sizes": config.memory_sizes, "lora_rank": config.lora["compressor"]["rank"]}
    build(model_options={**same, "processor_kwargs": {"document_overlap": overlap}, "memory_normalization": False})
    wrong = {"lora_dropout": 0.7, "processor_kwargs": {"document_overlap": overlap + 1}, "memory_normalization": True}
    with pytest.raises(ValueError, match="must be what `checkpoint` has.*Leave them out") as error:
        build(model_options={**same, **wrong})
    for name in ("'lora_dropout': 0.7", "processor_kwargs.document_overlap", "'memory_normalization': True"):
        assert name in str(error.value)
    assert "lora_rank" not in str(error.value)


def test_the_log_of_a_step(build):
    trainer = build("joint", max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    step = trainer.state.log_history[0]
    assert {"ce", "learning_rate", "tokens_per_second", "recall@1", "recall@3", "recall@5", "mrr", "margin"} <= set(
        step
    )
    assert {"grad_norm/reasoner", "grad_norm/generator"} <= set(step)
    assert step["loss"] == pytest.approx(step["ce"], rel=1e-5)
    assert step["grad_norm"] ** 2 == pytest.approx(step["grad_norm/reasoner"] ** 2 + step["grad_norm/generator"] ** 2)
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {"eval_ce", "eval_exact_match", "eval_recall@1", "eval_mrr"} <= set(evaluation)
    samples = [json.loads(line) for line in open(f"{trainer.args.output_dir}/samples.jsonl")]
    assert samples[0]["step"] == 2 and samples[0]["expected"] == CITIES[0]
    pretraining = build("pretrain", "other", max_steps=1)
    pretraining.train()
    step, weight = pretraining.state.log_history[0], pretraining.model.config.alignment_weight
    assert step["loss"] == pytest.approx(step["ce"] + weight * step["mse"], rel=1e-5)


def test_evaluation_is_the_same_for_any_batch(build):
    results = [build("joint", f"run{size}", per_device_eval_batch_size=size).evaluate() for size in (1, 3, 8)]
    for name in ("eval_ce", "eval_recall@1", "eval_mrr", "eval_margin", "eval_exact_match"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)
        assert results[0][name] == pytest.approx(results[2][name], rel=1e-4)
