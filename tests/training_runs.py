"""Training runs for tests: rows on disk, a checkpoint to start from, a trainer prepared as `train.py` does it.

A plugin of `conftest.py`, because the tests of several files train. It asserts nothing about training.
"""

import json

import pytest
import torch

from modeling_clara import CLaRaForRAG
from recipes.training.arguments import CLaRaTrainingArguments, DataArguments, ModelArguments
from recipes.training.preparation import prepare_trainer

NAMES = ["Mira", "Anton", "Clara", "Boris", "Dora", "Emil", "Flora", "Gustav"]
CITIES = ["Paris", "Rome", "Berlin", "Lima", "Oslo", "Cairo", "Prague", "Vienna in the snow"]


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    """One file for stage 1 and one for the others; answers, documents and lists differ in length."""
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "pretrain.jsonl", "w") as file:
        for name, city in zip(NAMES, CITIES, strict=True):
            pairs = [{"question": f"Where does {name} live?", "answers": [city]}] * (1 + len(name) % 2)
            row = {
                "title": name,
                "text": f"{name} lives in {city}.",
                "qas": pairs,
                "paraphrase": f"In {city} lives {name}.",
            }
            file.write(json.dumps(row) + "\n")
    with open(folder / "select.jsonl", "w") as file:
        for index, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
            others = [(index + step) % 8 for step in range(3 + index % 2)]
            docs = [f"{NAMES[other]}\n{NAMES[other]} lives in {CITIES[other]}." for other in sorted(others)]
            row = {"question": f"Where does {name} live?", "answer": city, "docs": docs}
            file.write(json.dumps({**row, "pos_index": [sorted(others).index(index)]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(shared_model, tmp_path_factory):
    """A checkpoint whose adapters matter, its reasoner untrained: what stage 2 leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    shared_model.save_pretrained(folder)
    return folder


@pytest.fixture
def build(training_files, trained, tmp_path):
    """`build(stage, name, **options)`: a trainer in a folder of its own."""

    def make(stage="pretrain", name="run", model_options=None, data_options=None, **options):
        path = str(training_files / ("pretrain.jsonl" if stage == "pretrain" else "select.jsonl"))
        model_arguments = ModelArguments(**{"checkpoint": str(trained), **(model_options or {})})
        data = DataArguments(datasets=[{"path": path}], eval_datasets=[{"path": path}], **(data_options or {}))
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "num_samples": 1,
        }
        training = CLaRaTrainingArguments(output_dir=str(tmp_path / name), stage=stage, **{**defaults, **options})
        return prepare_trainer(model_arguments, data, training)

    return make


def state_of(model: CLaRaForRAG) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict, right: dict, **tolerance) -> None:
    for name, tensor in left.items():
        if tolerance:
            torch.testing.assert_close(tensor, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(tensor, right[name]), name


def loss_curve(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def count_roles(model) -> dict[str, int]:
    """How often the backbone's base model runs in each role from now on."""
    counts = {}
    model.backbone.base_model.register_forward_pre_hook(
        lambda *_: counts.__setitem__(model.roles.active, counts.get(model.roles.active, 0) + 1)
    )
    return counts
