"""Fixtures of the evaluation: compressed documents, what the systems share, tasks, and the command as a call."""

from pathlib import Path

import pytest
import torch
from evaluation_runs import command, write_data
from evaluation_systems import DOCUMENTS, N_TOKENS, make_data, nothing
from tiny import randomize_adapters

from modeling_clara import CLaRaForRAG
from recipes.evaluation.cli import main
from recipes.evaluation.spans import Spans, compress_documents, finish_codec, open_memories
from recipes.evaluation.systems import Bench
from recipes.evaluation.tasks import Task, make_tasks


@pytest.fixture(scope="session")
def memories(shared_model, tmp_path_factory) -> dict[str, Spans]:
    """The chunks with their memories, by codec."""
    folder = tmp_path_factory.mktemp("memories")
    found = {}
    for codec in ("float16", "int8", "int4"):
        compress_documents(shared_model, DOCUMENTS, folder)
        finish_codec(folder, codec)
        found[codec] = open_memories(shared_model, folder, codec, len(DOCUMENTS))
    return found


@pytest.fixture(scope="session")
def text_reader(backbone_folder) -> CLaRaForRAG:
    """Another generator on the same backbone, with a prompt and memory sizes of its own; its memories are not read."""
    torch.manual_seed(3)
    model = CLaRaForRAG.from_backbone(backbone_folder, memory_sizes=(3,), lora_rank=2)
    randomize_adapters(model, seed=7)
    model.processor.system_prompt = "Answer in one word. " + model.processor.system_prompt
    return model


@pytest.fixture
def bench(shared_model, memories, text_reader) -> Bench:
    sizes = {"top_k": 2, "memory_size": 4, "retrieval_memory_size": 2, "max_new_tokens": N_TOKENS}
    return Bench(shared_model, memories["float16"], **sizes, text_reader=text_reader)


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks(make_data(), "normal", nothing)


@pytest.fixture(scope="session")
def run_memories(tmp_path_factory) -> Path:
    """Compressed documents that all runs share."""
    return tmp_path_factory.mktemp("memories")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data.jsonl")


@pytest.fixture(scope="session")
def finished(checkpoint, run_memories, tmp_path_factory) -> Path:
    """The folder that `evaluate()` leaves, to read and to copy."""
    folder = tmp_path_factory.mktemp("finished")
    data, output = write_data(folder / "data.jsonl"), folder / "run"
    assert main(command(model=checkpoint, memories=run_memories, data=data, output=output)) == 0
    return output


@pytest.fixture
def evaluate(checkpoint, data, tmp_path, run_memories, capsys):
    """`evaluate(*options, expect=0, output="run", **changed)`: what the command prints, errors included."""

    def call(*options: str, expect: int = 0, output: str = "run", **changed) -> str:
        given = {"model": checkpoint, "memories": run_memories, "data": data, "output": tmp_path / output, **changed}
        capsys.readouterr()
        status = main(command(*options, **given))
        captured = capsys.readouterr()
        assert status == expect, captured.err
        return captured.out + captured.err

    return call
