"""Recipes from YAML files and key=value: which value wins, what is refused, and that all shipped recipes parse.

The files under recipes/configs are read here as plain YAML and compared with what the arguments have.
"""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from trl.scripts.utils import DatasetConfig

from recipes.training.arguments import parse_arguments, read_recipe
from recipes.training.stages import STAGES

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = RECIPES / "configs"
BACKBONES = sorted(path.stem for path in (CONFIGS / "backbones").glob("*.yaml"))
NEEDED = ("backbone=folder", "datasets=[{path: rows.jsonl}]", "use_cpu=true", "report_to=none")


@pytest.fixture
def recipe(tmp_path):
    """Writes recipe files: `recipe("max_steps: 3", ...)` gives their paths."""

    def write(*texts: str) -> list[str]:
        paths = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        return [str(path) for path in paths]

    return write


# --- which value wins ------------------------------------------------------------------------------------------------

TWO = ["max_steps: 1\nseed: 1\nsave_steps: 1", "seed: 2\nsave_steps: 2"]
SECTIONS = [
    "learning_rate: 0.25\nstage: joint",
    "pretrain: {learning_rate: 1.0, seed: 5}\njoint: {learning_rate: 2.0, max_steps: 7}\nlearning_rate: 0.5",
    "joint: {max_steps: 8}",
]


@pytest.mark.parametrize(
    "files, overrides, expected",
    [
        (TWO, [], {"max_steps": 1, "seed": 2, "save_steps": 2}),
        (TWO[::-1], [], {"max_steps": 1, "seed": 1, "save_steps": 1}),
        (TWO, ["save_steps=3"], {"max_steps": 1, "seed": 2, "save_steps": 3}),
        (TWO[1:], ["seed=3", "seed=4"], {"seed": 4, "save_steps": 2}),
        (SECTIONS, [], {"stage": "joint", "learning_rate": 2.0, "max_steps": 8}),
        (SECTIONS, ["stage=pretrain"], {"stage": "pretrain", "learning_rate": 1.0, "seed": 5}),
        (SECTIONS, ["stage=instruct"], {"stage": "instruct", "learning_rate": 0.5}),
        (SECTIONS, ["learning_rate=3.0"], {"stage": "joint", "learning_rate": 3.0, "max_steps": 8}),
        (["joint: {max_steps: 8}", "max_steps: 3\nstage: joint"], [], {"stage": "joint", "max_steps": 3}),
        (["", "# only a comment", "joint:\nstage: joint"], [], {"stage": "joint"}),
    ],
)
def test_later_files_win_and_sections_count_in_their_stage_and_key_value_wins_over_all(
    recipe, files, overrides, expected
):
    assert read_recipe(recipe(*files), overrides) == expected


def test_files_and_overrides_stand_in_any_order_on_the_command_line(recipe):
    """An override is one even if its value looks like a file."""
    files = recipe("seed: 1\nmax_steps: 1", "seed: 2")
    for line in (
        ["--config", *files, *NEEDED, "max_steps=5", "output_dir=runs/a.yaml"],
        ["max_steps=5", *NEEDED, "output_dir=runs/a.yaml", "--config", *files],
        ["--config", *files, *NEEDED, "--max_steps=5", "output_dir=runs/a.yaml"],
    ):
        _, data, training = parse_arguments(line)
        assert (training.seed, training.max_steps, training.output_dir) == (2, 5, "runs/a.yaml")
        assert data.datasets == [DatasetConfig(path="rows.jsonl")]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("learning_rat: 1.0", ["memory_size=4"], r"unknown keys \['learning_rat', 'memory_size'\]. Correct or remove"),
        ("joint: {learning_rat: 1.0}", ["stage=joint"], r"unknown keys \['learning_rat'\]"),
        ("joint: {learning_rat: 1.0}", ["stage=pretrain"], r"unknown keys \['learning_rat'\]"),
        ("- a\n- b", [], "0.yaml` must hold a YAML mapping, got list. Write `key: value` lines"),
        ("seed: 1\nmax_steps: [1", [], "(?s)0.yaml` must be YAML: .*line 2.*Correct it"),
        ("joint: 5", ["stage=joint"], "`joint`.*mapping"),
        ("", ["max_steps"], r"must look like key=value, got 'max_steps'. Write for example max_steps=10"),
    ],
)
def test_what_is_no_recipe_is_named(recipe, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe(text), overrides)


@pytest.mark.parametrize(
    "override, wanted",
    [
        ("max_steps=8.5", "int, got 8.5"),
        ("max_steps=1e3", "int, got '1e3'"),
        ("max_steps=true", "int, got True"),
        ("max_steps=null", "int, got None"),
        ("lora_rank='16'", "int, got '16'"),
        ("learning_rate=fast", "float, got 'fast'"),
        ("learning_rate=true", "float, got True"),
        ("max_minutes=[1]", r"float, got \[1\]"),
        ("train_backbone=1", "bool, got 1"),
        ("train_backbone='yes'", "bool, got 'yes'"),
        ("memory_sizes=4", "list, got 4"),
        ("memory_sizes=[4, 4.5]", "int, got 4.5"),
        ("processor_kwargs=[1]", r"dict, got \[1\]"),
        ("output_dir=2024", "str, got 2024"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_type_and_value(override, wanted):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^`{key}(\[1\])?` must be of type {wanted}. Correct it in the recipe.$"):
        read_recipe([], [override])


@pytest.mark.parametrize(
    "override, value",
    [
        ("learning_rate=1e-4", 1e-4),  # a text in YAML 1.1
        ("learning_rate=2", 2.0),
        ("retrieval_temperature=5e-2", 0.05),
        ("warmup_steps=0.03", 0.03),
        ("warmup_steps=50", 50.0),
        ("eval_strategy=no", "no"),  # False in YAML 1.1
        ("bf16=yes", True),
        ("memory_sizes=[4, 8]", [4, 8]),
        ("checkpoint=null", None),
        ("lr_scheduler_kwargs={min_lr_rate: 0.1}", {"min_lr_rate": 0.1}),
    ],
)
def test_values_become_what_the_dataclasses_ask_for(override, value):
    key = override.partition("=")[0]
    read = read_recipe([], [override])[key]
    assert read == value
    assert type(read) is type(value)


BEST = ["save_strategy=best", "eval_strategy=steps", "eval_steps=1", "metric_for_best_model=eval_ce"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["backbone=null"], "`backbone` or `checkpoint` must be given, got neither. Name"),
        (["reasoner_init=zero"], r"`reasoner_init` must be one of \['compressor', 'random', 'keep'\], got 'zero'"),
        (["datasets=[]"], r"`datasets` must name at least one source, got none. Add `datasets: \[\{path: ...\}\]`"),
        (["datasets=[a.jsonl]"], r"`datasets\[0\]` must be of type dict, got 'a.jsonl'"),
        (["datasets=[{path: a}, {name: b}]"], r"`datasets\[1\]` must be a mapping with `path`"),
        (["eval_datasets=[{path: a, share: 1}]"], r"`eval_datasets\[0\]` must be .* got \{'path': 'a', 'share': 1\}"),
        (["targets_per_document=0"], "`targets_per_document` must be >= 1, got 0"),
        (["num_candidates=-1"], "`num_candidates` must be >= 1, got -1"),
        (["text_share=-0.1"], "`text_share` must be between 0 and 1, got -0.1"),
        (["text_share=1.5"], "`text_share` must be between 0 and 1, got 1.5"),
        (["text_share=.nan"], "`text_share` must be between 0 and 1, got nan"),
        (["long_documents=cut"], r"`long_documents` must be one of \['split', 'first_span'\], got 'cut'"),
        (["candidates=all"], r"`candidates` must be one of \['given', 'corpus'\], got 'all'"),
        (["candidates=corpus", "in_batch_negatives=true"], "`in_batch_negatives` must be false with `candidates: cor"),
        (["candidates=corpus", "compress_online=true"], "`compress_online` must be false with `candidates: corpus`"),
        (["stage=warmup"], rf"`stage` must be one of {re.escape(str(list(STAGES)))}, got 'warmup'"),
        (["trainable_roles=[reader]"], "`trainable_roles` must be one of .*'generator'.*, got 'reader'"),
        (["max_minutes=0"], r"`max_minutes` must be > 0, got 0.0. Raise it or leave it out"),
        (["max_minutes=.nan"], r"`max_minutes` must be > 0, got nan"),
        (["max_minutes=-.inf"], r"`max_minutes` must be > 0, got -inf"),
        (["max_minutes=1", *BEST], "`save_strategy` must be steps, epoch or no with `max_minutes`, got best"),
    ],
)
def test_rules_between_arguments_name_the_rule_and_the_remedy(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", *recipe("stage: pretrain"), *NEEDED, *overrides])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_roles_unless_others_are_named(recipe, stage):
    given = ["--config", *recipe(f"stage: {stage}"), *NEEDED]
    training = parse_arguments(given)[2]
    assert training.roles == STAGES[stage].roles and training.remove_unused_columns is False
    assert parse_arguments([*given, "trainable_roles=[generator]"])[2].roles == ("generator",)


# --- the recipes that are shipped ------------------------------------------------------------------------------------


def plain(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("ending", [[], ["stages/smoke.yaml"]], ids=["alone", "smoke"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_parses_with_every_backbone_and_keeps_every_value(stage, backbone, ending):
    names = [f"stages/{stage}.yaml", f"backbones/{backbone}.yaml", *ending]
    section, last = plain(names[1])[stage], plain(ending[0]) if ending else {}
    expected = plain(names[0]) | section | last | {"use_cpu": True}
    for key in set(section) & set(last):  # see the test of a later file's plain keys
        del expected[key]
    arguments = parse_arguments(["--config", *[str(CONFIGS / name) for name in names], "use_cpu=true"])
    assert expected.pop("report_to") == "none" and arguments[2].report_to == []
    assert [DatasetConfig(**entry) for entry in expected.pop("datasets")] == arguments[1].datasets
    for key, value in expected.items():
        (owner,) = (part for part in arguments if key in vars(part))
        found = getattr(owner, key)
        assert getattr(found, "value", found) == (float(value) if isinstance(found, float) else value), key


def test_there_is_a_file_for_every_stage_and_every_stage_has_its_backbone_or_checkpoint():
    assert {path.stem for path in (CONFIGS / "stages").glob("*.yaml")} == {*STAGES, "curriculum", "smoke"}
    for backbone in BACKBONES:
        sections = plain(f"backbones/{backbone}.yaml")
        assert set(sections) == set(STAGES)
        for stage, record in STAGES.items():
            assert ("backbone" in sections[stage]) == (record.start == "backbone")
    for stage, record in STAGES.items():
        assert ("checkpoint" in plain(f"stages/{stage}.yaml")) == (record.start == "checkpoint")


def uncommented(text: str) -> list[str]:
    """Lines with a value and no comment; a stage's name or section and entries of lists need none."""
    found = []
    for above, line in pairwise(["", *text.splitlines()]):
        key, _, value = line.strip().partition(":")
        is_named = key in ("", "stage") or key.startswith(("#", "- ")) or re.search(r"\s#\s", line)
        if not is_named and (value.strip() or key not in STAGES and "#" not in above):
            found.append(line)
    return found


SHIPPED = [path for path in sorted(RECIPES.rglob("*.yaml")) if not {"accelerate", "deploy"} & set(path.parts)]
SHIPPED = [path for path in SHIPPED if path.name != "card.yaml"]  # of recipes.publishing.cards


@pytest.mark.parametrize("path", [path for path in SHIPPED if "models" in path.parts], ids=lambda path: path.stem)
def test_a_runs_recipe_is_complete_by_itself(path):
    """Parsed alone every key is known, and it says where it starts, what it reads and where it goes."""
    values, training = yaml.safe_load(path.read_text(encoding="utf-8")), parse_arguments(["--config", str(path)])[2]
    assert {"stage", "output_dir", "datasets", "seed", "learning_rate", "max_steps"} <= set(values)
    assert {"backbone", "checkpoint"} & set(values) and not set(STAGES) & set(values)
    assert training.stage == values["stage"] and training.output_dir == values["output_dir"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_says_why(path):
    assert uncommented(path.read_text(encoding="utf-8")) == []


def test_values_without_a_reason_are_found():
    text = "# head\n\nstage: joint\nseed: 1  # why\nlr: 2\njoint:\n  a: 3\ndatasets:  # why\n  - {path: b}\nother:\n"
    assert uncommented(text) == ["lr: 2", "  a: 3", "other:"]
