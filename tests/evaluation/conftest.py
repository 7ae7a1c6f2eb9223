"""Fixtures of the evaluation: compressed documents, what the systems share, tasks, and the command as a call."""

from pathlib import Path

import pytest
from evaluation_runs import write_data
from evaluation_systems import N_TOKENS, documents, make_data, nothing

from recipes.evaluation.cli import main
from recipes.evaluation.spans import Spans, compress_documents, finish_codec, open_memories
from recipes.evaluation.systems import Bench
from recipes.evaluation.tasks import Task, make_tasks


@pytest.fixture(scope="session")
def memories(shared_model, tmp_path_factory) -> dict[str, Spans]:
    """The spans with their memories, by codec."""
    folder = tmp_path_factory.mktemp("memories")
    found = {}
    for codec in ("float16", "int8", "int4"):
        compress_documents(shared_model, documents(), folder)
        finish_codec(folder, codec)
        found[codec] = open_memories(shared_model, folder, codec, len(documents()))
    return found


@pytest.fixture
def bench(shared_model, memories) -> Bench:
    return Bench(shared_model, memories["float16"], top_k=2, memory_size=4, retrieval_memory_size=2,
                 max_new_tokens=N_TOKENS, text_reader=shared_model)  # fmt: skip


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


@pytest.fixture
def evaluate(checkpoint, data, tmp_path, run_memories, capsys):
    """`evaluate(*options, expect=0)`: what the command prints, standard error included."""

    def call(*options: str, expect: int = 0, output: str = "run", **changed) -> str:
        given = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / output), **changed}
        named = [part for name, value in given.items() if value for part in (f"--{name}", value)]
        common = ["--resamples", "100"]
        if given["model"]:
            common += ["--memories", str(run_memories), "--max-new-tokens", "6", "--latency-questions", "0"]
            common += ["--batch-size", "4"]
        capsys.readouterr()
        status = main([*named, *common, *options])
        captured = capsys.readouterr()
        assert status == expect, captured.err
        return captured.out + captured.err

    return call
