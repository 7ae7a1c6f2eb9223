"""The `run.sh` of every published model: its commands and their order, skipped when finished, stopped by a failure.

A stand-in for the interpreter writes down each command and makes the file by which the step counts as finished.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modeling_clara.corpus.storage import read_lines
from recipes.evaluation.cli import build_parser
from recipes.training.arguments import parse_arguments

MODELS = Path(__file__).parents[2] / "recipes" / "models"
# What the modules leave behind: a file in the folder that an option or a place names.
MARKS = {
    "recipes.models.pico.facts": ("--output", "test_wordings_joint.jsonl"),
    "recipes.models.pico.backbone": ("--output", "tokenizer_config.json"),
    "recipes.models.smollm2_135m.data": ("--output", "counts.json"),
    "recipes.models.smollm2_135m.publish": (1, "config.json"),
    "recipes.evaluation.calibrate": (0, "calibration.json"),
    "recipes.evaluate": ("--output", "results.json"),
}
STAND_IN = """#!{python}
import json, os, sys, yaml
from pathlib import Path
module, words = sys.argv[2], sys.argv[3:]
with open("commands.jsonl", "a") as file:
    file.write(json.dumps([module, *words]) + "\\n")
if os.environ.get("FAILS") == module:
    sys.exit(3)
place, mark = {marks!r}.get(module, (None, None))
if module == "recipes.train" and "max_minutes=1" not in words:
    place, mark = 0, "config.json"
    words = [yaml.safe_load(Path(words[1]).read_text())["output_dir"]]
if place is not None:
    folder = Path(words[place] if isinstance(place, int) else words[words.index(place) + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / mark).touch()
"""
TRAIN = "recipes.train"
PICO, SMOLLM2, EVALUATION = "recipes.models.pico", "recipes.models.smollm2_135m", "recipes.evaluation"
MEASURE = [f"{EVALUATION}.calibrate", *["recipes.evaluate"] * 3, f"{EVALUATION}.update_card"]
STEPS = {
    "pico": [f"{PICO}.facts", f"{PICO}.backbone", TRAIN, TRAIN, TRAIN, f"{PICO}.evaluate"],
    "smollm2_135m": [f"{SMOLLM2}.data", *[TRAIN] * 5, f"{SMOLLM2}.publish", *MEASURE],
}


@pytest.fixture(params=STEPS)
def model(request) -> str:
    return request.param


@pytest.fixture
def script(tmp_path):
    """`script(model, *arguments, **environment)`: exit status and commands of a run in an empty folder."""
    stand_in = tmp_path / "stand in"
    stand_in.write_text(STAND_IN.format(python=sys.executable, marks=MARKS))
    stand_in.chmod(0o755)

    def run(model: str, *arguments: str, **environment: str) -> tuple[int, list[list[str]]]:
        log = tmp_path / "commands.jsonl"
        log.unlink(missing_ok=True)
        source = [str(tmp_path / "my data")] if model == "smollm2_135m" else []
        command = [str(MODELS / model / "run.sh"), *source, *arguments]
        environment = {**os.environ, "PYTHON": str(stand_in), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, read_lines(log)

    return run


def names(commands: list[list[str]]) -> list[str]:
    return [command[0] for command in commands]


def test_every_step_runs_once_and_its_options_are_known(script, model):
    status, commands = script(model, "max_steps=3")
    assert status == 0 and names(commands) == STEPS[model]
    for module, *words in commands:
        assert importlib.util.find_spec(module) is not None
        if module == TRAIN:
            assert parse_arguments(words)[2].max_steps == 3
        if module == "recipes.evaluate":
            build_parser().parse_args(words)
    assert script(model) == (0, commands[-1:])  # the last step tells the results again


def test_a_failure_or_a_stop_ends_it_and_the_same_command_goes_on(script, model):
    """Every kind of step fails once, with the first training stopped by its time as well: exit status 0 without it."""
    begin = 0
    for failing in dict.fromkeys(STEPS[model]):
        end = STEPS[model].index(failing)
        status, commands = script(model, FAILS=failing)
        assert status == 3 and names(commands) == STEPS[model][begin : end + 1]
        begin = end
        if failing == TRAIN:
            status, commands = script(model, "max_minutes=1")
            assert status == 0 and names(commands) == [TRAIN]
    status, commands = script(model)
    assert status == 0 and names(commands) == STEPS[model][begin:]


def test_recipes_stand_beside_the_script(model):
    text = (MODELS / model / "run.sh").read_text()
    assert len(text.splitlines()) <= 60 and "set -euo pipefail" in text and (MODELS / model / "README.md").exists()
    recipes = [path for path in (MODELS / model).glob("*.yaml") if path.name != "card.yaml"]
    outputs = [yaml.safe_load(path.read_text())["output_dir"] for path in recipes]
    assert len(outputs) == len(set(outputs)) == STEPS[model].count(TRAIN)


def test_weights_that_are_not_the_hubs_go_to_every_step_that_loads_them(script):
    for module, *words in script("smollm2_135m", BACKBONE="my weights")[1]:
        if module == TRAIN:
            assert "backbone=my weights" in words
        elif module in ("recipes.models.smollm2_135m.publish", "recipes.evaluation.calibrate", "recipes.evaluate"):
            assert words[-2:] == ["--backbone", "my weights"]
