"""Stages as records: a new one is one entry, and a stage's YAML goes on from a checkpoint of other settings."""

import dataclasses
import logging
from pathlib import Path

import pytest
from training_runs import loss_curve

from recipes.training.arguments import CLaRaTrainingArguments, parse_arguments
from recipes.training.preparation import prepare_model
from recipes.training.stages import STAGES

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


def test_a_new_stage_is_one_entry(build, tmp_path, monkeypatch):
    """Parsed, its section of a recipe read, its rows checked, trained and logged."""
    instruct = STAGES["instruct"]
    monkeypatch.setitem(STAGES, "reread", dataclasses.replace(instruct, roles=("generator",), needs_gold=False))
    (tmp_path / "recipe.yaml").write_text("stage: reread\nreread: {max_steps: 3}\nmax_steps: 9\nuse_cpu: true\n")
    given = ["checkpoint=x", "datasets=[{path: y}]"]
    _, _, training = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), *given])
    assert training.max_steps == 3 and training.roles == ("generator",)
    trainer = build("reread", max_steps=2)
    trainer.train()
    assert len(loss_curve(trainer)) == 2 and "ce" in trainer.state.log_history[0]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".generator." in name for name in trained)


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
        files = [str(CONFIGS / "stages" / f"{stage}.yaml")]
        model_arguments, _, training = parse_arguments(["--config", *files, *given, *overrides])
        assert isinstance(training, CLaRaTrainingArguments)
        return prepare_model(model_arguments, training)

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_recipe_goes_on_from_a_checkpoint_of_other_settings(start, shared_model, caplog, stage):
    with caplog.at_level(logging.WARNING):
        model = start(stage)
    assert model.config.memory_sizes == [2, 4] and model.config.lora["generator"]["rank"] == 4
    told = [record.getMessage() for record in caplog.records if "keeps its own" in record.getMessage()]
    assert len(told) == (STAGES[stage].start == "backbone")  # the recipes with keys of fresh adapters
    assert all("lora_rank 4 (not 16)" in line and "document_max_length 64 (not 256)" in line for line in told)


@pytest.mark.parametrize("override", ["lora_rank=16", "memory_sizes=[4, 8]", "document_max_length=128"])
def test_the_command_line_may_not_contradict_the_checkpoint(start, override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"'{key}': .* must be what `checkpoint` has, .*Leave them out"):
        start("pretrain", override)


def test_the_command_line_may_say_what_the_checkpoint_has(start):
    assert start("pretrain", "lora_rank=4", "memory_sizes=[2, 4]").config.lora["compressor"]["rank"] == 4
