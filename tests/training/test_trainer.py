"""The trainers: what moves, what is held, equal results for any batching, and a restart that changes nothing.

Every test trains a tiny real model for a few steps on rows written to disk, through the same preparation as
`train.py`.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_runs import CITIES, assert_equal, count_roles, loss_curve, moved, state_of

from modeling_clara import CLaRaForRAG
from modeling_clara.corpus.storage import read_lines
from recipes.benchmarks.training import padded_passes
from recipes.training.arguments import parse_arguments
from recipes.training.preparation import prepare_model
from recipes.training.stages import STAGES
from recipes.training.trainer import memory_size_of_step, part_of

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
PARTS = {
    "pretrain": {"compressor", "generator", "rows"},
    "instruct": {"compressor", "generator", "rows"},
    "contrastive": {"reasoner"},
    "joint": {"reasoner", "generator"},
    "text": {"generator"},
}
TRAINED_BACKBONE = {"model_options": {"train_backbone": True}}
SGD = {"optim": "sgd", "learning_rate": 1e-1, "max_steps": 2}  # AdamW's first steps are signs, which rounding flips


@pytest.mark.parametrize("stage, options", [*((stage, {}) for stage in PARTS), ("pretrain", TRAINED_BACKBONE)])
def test_what_should_train_moves_and_is_saved_and_nothing_else(build, tmp_path, stage, options):
    trainer = build(stage, max_steps=3, **options)
    before = state_of(trainer.model)
    trainer.train()
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trainable} == PARTS[stage] | ({"backbone"} if options else set())
    assert moved(before, trainer.model) == set(trainable)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, trainable.values()))
    trainer.save_model()
    assert_equal(state_of(trainer.model), state_of(CLaRaForRAG.from_pretrained(tmp_path / "run")))


@pytest.mark.parametrize(
    "stage, order, options",
    [
        ("pretrain", "sequential", {}),
        ("pretrain", "group_by_length", TRAINED_BACKBONE),
        ("instruct", "random", {}),
        ("contrastive", "group_by_length", {}),
        ("joint", "random", {}),
    ],
)
def test_resuming_equals_not_stopping(build, train, stage, order, options):
    """Bit-equal, dropout and the draw of k included, in the second epoch; `test_train_script.py` stops elsewhere."""
    options = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": order, **options}
    options |= {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True}
    whole = train(stage, "whole", gradient_accumulation_steps=2, **options)
    n_steps = whole.state.global_step
    resumed = build(stage, "resumed", gradient_accumulation_steps=2, **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{n_steps // 2 + 1}")
    assert resumed.state.global_step == n_steps > 3
    assert_equal(state_of(whole.model), state_of(resumed.model))
    assert loss_curve(whole) == loss_curve(resumed)


@pytest.mark.parametrize("stage", PARTS)
def test_accumulating_micro_batches_equals_one_batch(train, stage):
    """4 x 1 == 1 x 4, with targets and candidate lists of unequal length."""
    options = {"dropout": False, "data_options": {"targets_per_document": 2}, **SGD}
    runs = [
        train(stage, f"run{n}", per_device_train_batch_size=n, gradient_accumulation_steps=4 // n, **options)
        for n in (1, 4)
    ]
    assert_equal(*(state_of(trainer.model) for trainer in runs), rtol=1e-4, atol=1e-6)
    for one, four in zip(*(trainer.state.log_history[:2] for trainer in runs), strict=True):
        for name in set(one) - {"epoch", "tokens_per_second", "step"}:
            assert one[name] == pytest.approx(four[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", PARTS)
def test_checkpointing_changes_nothing_and_bfloat16_not_what_trains(train, stage):
    with padded_passes():  # as recomputed ones are: dropout draws the same
        exact = train(stage, "exact", **SGD)
    checkpointed = train(stage, "checkpointed", activation_checkpointing=True, **SGD)
    assert_equal(state_of(exact.model), state_of(checkpointed.model), rtol=1e-5, atol=1e-6)
    assert loss_curve(exact) == pytest.approx(loss_curve(checkpointed), rel=1e-4)
    half = train(stage, "half", bf16=True, model_options={"dtype": "bfloat16"}, **SGD)
    for parameter in half.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert loss_curve(half) == pytest.approx(loss_curve(exact), rel=0.1, abs=0.05)


def test_k_is_drawn_from_seed_and_step():
    drawn, again, other = ([memory_size_of_step([2, 4], seed, step) for step in range(200)] for seed in (7, 7, 8))
    assert drawn == again != other and 60 < drawn.count(2) < 140
    assert 130 < [memory_size_of_step([2, 4, 4, 4], 7, step) for step in range(200)].count(4) < 170


@pytest.mark.parametrize("some", [None, [4], [2, 4, 4, 4]])
def test_every_pass_of_a_step_has_its_k_and_its_count_of_rows(build, some):
    trainer, read = build(max_steps=6, gradient_accumulation_steps=2, train_memory_sizes=some), []
    trainer.model.register_forward_pre_hook(lambda _, arguments, inputs: read.append(inputs), with_kwargs=True)
    trainer.train()
    drawn = [memory_size_of_step(some or [2, 4], trainer.args.seed, step) for step in range(6) for _ in range(2)]
    assert [inputs["memory_size"] for inputs in read] == drawn and set(drawn) == set(some or [2, 4])
    assert {float(inputs["num_samples_in_batch"]) for inputs in read} == {4.0}


@pytest.mark.parametrize("wrong", [[], [3], [4, 8]])
def test_k_is_drawn_among_the_models(build, wrong):
    with pytest.raises(ValueError, match="`train_memory_sizes` must name some"):
        build(train_memory_sizes=wrong)


def test_the_log_of_a_step(train):
    trainer = train("joint", max_steps=2, eval_strategy="steps", eval_steps=2)
    step, *_, evaluation = (entry for entry in trainer.state.log_history if "train_runtime" not in entry)
    ranking = {"recall@1", "recall@3", "recall@5", "mrr", "margin", "exact_match"}
    assert ranking | {"learning_rate", "tokens_per_second"} <= set(step)
    assert step["loss"] == pytest.approx(step["ce"], rel=1e-5)
    assert step["grad_norm"] ** 2 == pytest.approx(step["grad_norm/reasoner"] ** 2 + step["grad_norm/generator"] ** 2)
    assert {f"eval_{name}" for name in ranking | {"ce", "loss"}} <= set(evaluation)
    (sample,) = read_lines(Path(trainer.args.output_dir) / "samples.jsonl")
    assert sample["step"] == 2 and sample["expected"] == CITIES[0]
    other = train("pretrain", "other", max_steps=1)
    step, weight = other.state.log_history[0], other.model.config.alignment_weight
    assert step["loss"] == pytest.approx(step["ce"] + weight * step["mse"], rel=1e-5)


def test_evaluation_is_the_same_for_any_batch(build):
    one, *others = (build("joint", f"run{n}", per_device_eval_batch_size=n).evaluate() for n in (1, 3, 8))
    for other in others:
        for name in ("eval_ce", "eval_recall@1", "eval_mrr", "eval_margin", "eval_exact_match"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


# --- stages and checkpoints ------------------------------------------------------------------------------------------


def test_a_new_stage_is_one_entry(build, tmp_path, monkeypatch):
    """Parsed, its section of a recipe read, its rows checked, trained and logged."""
    monkeypatch.setitem(STAGES, "reread", dataclasses.replace(STAGES["instruct"], roles=("generator",)))
    (tmp_path / "recipe.yaml").write_text("stage: reread\nreread: {max_steps: 3}\nmax_steps: 9\nuse_cpu: true\n")
    given = ["checkpoint=x", "datasets=[{path: y}]"]
    _, _, training = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), *given])
    assert training.max_steps == 3 and training.roles == ("generator",)
    trainer = build("reread", max_steps=2)
    before, counts = state_of(trainer.model), count_roles(trainer.model)
    trainer.train()
    assert len(loss_curve(trainer)) == 2 and "ce" in trainer.state.log_history[0]
    assert {part_of(name) for name in moved(before, trainer.model)} == {"generator"}
    assert counts == {"compressor": 2, "generator": 2}


def test_records_are_consistent():
    for name, stage in STAGES.items():
        assert stage.losses and set(stage.losses) <= {"lm", "alignment", "contrastive"}, name
        assert stage.start in ("backbone", "checkpoint") and not (stage.selects and stage.reads_text), name
        assert ("alignment" in stage.losses) == stage.reads_memories, name  # what a step compresses can be aligned


@pytest.fixture
def start(checkpoint):
    """`start(stage, *overrides)`: the model of a stage's own YAML, from a checkpoint of other settings."""

    def run(stage: str, *overrides: str):
        given = [f"checkpoint={checkpoint}", "datasets=[{path: rows.jsonl}]", "use_cpu=true", "report_to=none"]
        recipe = str(CONFIGS / "stages" / f"{stage}.yaml")
        model_arguments, _, training = parse_arguments(["--config", recipe, *given, *overrides])
        return prepare_model(model_arguments, training)

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_recipe_goes_on_from_a_checkpoint_of_other_settings(start, caplog, stage):
    model = start(stage)
    assert model.config.memory_sizes == [2, 4] and model.config.lora["generator"]["rank"] == 4
    told = [record.getMessage() for record in caplog.records if "keeps its own" in record.getMessage()]
    assert len(told) == (STAGES[stage].start == "backbone")  # the recipes with keys of fresh adapters
    assert all("lora_rank 4 (not 16)" in line and "document_max_length 64 (not 256)" in line for line in told)


def test_the_command_line_may_say_what_the_checkpoint_has_and_nothing_else(start, shared_model):
    overlap = shared_model.processor.document_overlap
    same = ["lora_rank=4", "memory_sizes=[2, 4]", "memory_normalization=false"]
    same += [f"processor_kwargs={{document_overlap: {overlap}}}"]
    assert start("pretrain", *same).config.lora["compressor"]["rank"] == 4
    wrong = ["memory_sizes=[4, 8]", "document_max_length=128", "lora_dropout=0.7", "memory_normalization=true"]
    wrong += [f"processor_kwargs={{document_overlap: {overlap + 1}}}"]
    with pytest.raises(ValueError, match="must be what `checkpoint` has.*Leave them out") as error:
        start("pretrain", same[0], *wrong)
    for name in ("'memory_sizes': [4, 8]", "'document_max_length': 128", "'lora_dropout': 0.7"):
        assert name in str(error.value)
    assert "processor_kwargs.document_overlap" in str(error.value) and "'memory_normalization': True" in str(
        error.value
    )
    assert "lora_rank" not in str(error.value)
