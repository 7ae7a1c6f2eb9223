"""Training runs for tests: rows on disk and a trainer prepared as `train.py` does it, from `checkpoint`.

A plugin of `conftest.py`, because the tests of several files train. It asserts nothing about training.
"""

from pathlib import Path

import pytest
import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.corpus.storage import write_lines
from recipes.training.arguments import CLaRaTrainingArguments, DataArguments, ModelArguments
from recipes.training.preparation import prepare_trainer

NAMES = ["Mira", "Anton", "Clara", "Boris", "Dora", "Emil", "Flora", "Gustav"]
CITIES = ["Paris", "Rome", "Berlin", "Lima", "Oslo", "Cairo", "Prague", "Vienna in the snow"]
HOMES = list(zip(NAMES, CITIES, strict=True))
EMBEDDINGS = {"memory_embeddings", "separator_embedding"}


@pytest.fixture(scope="session")
def training_files(tmp_path_factory) -> Path:
    """pretrain.jsonl, text.jsonl, and select.jsonl for the others; answers, documents and lists differ in length."""
    passages, readings, selections = [], [], []
    for index, (name, city) in enumerate(HOMES):
        home, row = {"question": f"Where does {name} live?", "answers": [city]}, {"title": name}
        row |= {"text": f"{name} lives in {city}.", "paraphrase": f"In {city} lives {name}."}
        passages.append({**row, "qas": [home] * (1 + len(name) % 2)})
        other = {"question": f"Who lives in {city}?", "answers": [f"It is {name}"]}
        more = {"qas": [home, other], "paraphrase": f"In {city}."} if index % 2 else {"qas": [home]}
        docs = [f"{who}\nLives in {where}." for who, where in (HOMES * 2)[index : index + 1 + index % 4]]
        readings.append({"docs": docs, **more})
        candidates = sorted((index + step) % 8 for step in range(3 + index % 2))
        docs = [f"{NAMES[n]}\n{NAMES[n]} lives in {CITIES[n]}." for n in candidates]
        selections.append({**home, "docs": docs, "pos_index": [candidates.index(index)]})
    folder = tmp_path_factory.mktemp("rows")
    for kind, rows in (("pretrain", passages), ("text", readings), ("select", selections)):
        write_lines(folder / f"{kind}.jsonl", rows)
    return folder


@pytest.fixture
def build(training_files, checkpoint, tmp_path):
    """`build(stage, name, **options)`: a trainer in a folder of its own."""

    def make(stage="pretrain", name="run", model_options=None, data_options=None, dropout=True, **options):
        source = [{"path": str(training_files / f"{stage if stage in ('pretrain', 'text') else 'select'}.jsonl")}]
        data = DataArguments(datasets=source, eval_datasets=source, **(data_options or {}))
        model_arguments = ModelArguments(**{"checkpoint": str(checkpoint), **(model_options or {})})
        defaults = {
            "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "num_samples": 1,
        }  # fmt: skip
        training = CLaRaTrainingArguments(output_dir=str(tmp_path / name), stage=stage, **{**defaults, **options})
        trainer = prepare_trainer(model_arguments, data, training)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        return trainer

    return make


@pytest.fixture
def train(build):
    """The same, trained."""

    def run(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.train()
        return trainer

    return run


def state_of(model: CLaRaForRAG) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict, model: CLaRaForRAG) -> set[str]:
    """Names of the weights that are others than before."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def assert_equal(left: dict, right: dict, **tolerance) -> None:
    for name, tensor in left.items():
        if tolerance:
            torch.testing.assert_close(tensor, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(tensor, right[name]), name


def loss_curve(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def count_roles(model) -> dict[str, int]:
    """How often the backbone's base model runs in each role from now on."""
    counts = {}
    model.backbone.base_model.register_forward_pre_hook(
        lambda *_: counts.__setitem__(model.roles.active, counts.get(model.roles.active, 0) + 1)
    )
    return counts
