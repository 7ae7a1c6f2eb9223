"""The folder of a run: who may use it, where it goes on after a kill, and trained weights back in a model bit for bit.

Arguments are parsed from key=value as `train.py` does; checkpoints are the model's own.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_backbone
from training_runs import EMBEDDINGS, assert_equal, moved, state_of

from modeling_clara import ROLES, CLaRaForRAG
from modeling_clara.storage_clara import file_sha256, read_json
from recipes.training.arguments import parse_arguments
from recipes.training.checkpoints import check_folder, claim_folder, describe_run, last_checkpoint, load_trained


@pytest.fixture
def describe(tmp_path_factory):
    """`describe("seed=3", ...)`: the description of a run."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        "stage: pretrain\nbackbone: folder\ndatasets: [{path: rows.jsonl}]\nuse_cpu: true\nreport_to: none\n"
    )
    return lambda *overrides: describe_run(*parse_arguments(["--config", str(path), *overrides]))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(folder: Path, description: dict, message: str) -> None:
    """With this message, and nothing in the folder or beside it is changed."""
    before = tree(folder.parent)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, description)
    assert tree(folder.parent) == before


def make_checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    """checkpoint-<step> with weights and, unless it was cut off, the Trainer's state."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


# --- what a run is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, keys",
    [
        (["learning_rate=1e-3"], ["training.learning_rate"]),
        (["max_steps=9"], ["training.max_steps"]),
        (["stage=instruct"], ["training.stage"]),
        (["backbone=other"], ["model.backbone"]),
        (["memory_sizes=[2]"], ["model.memory_sizes"]),
        (["datasets=[{path: other.jsonl}]"], ["data.datasets"]),
        (["targets_per_document=2"], ["data.targets_per_document"]),
        (["seed=1", "lora_rank=2", "num_candidates=3"], ["data.num_candidates", "model.lora_rank", "training.seed"]),
    ],
)
def test_what_changes_the_result_is_another_run_and_is_named(describe, tmp_path, overrides, keys):
    claim_folder(tmp_path / "run", describe())
    message = rf"holds another run: {re.escape(str(keys))} differ \(see .*run.json\). Choose another name"
    assert_refused(tmp_path / "run", describe(*overrides), message)


def test_what_does_not_change_the_result_is_the_same_run(describe):
    assert describe() == json.loads(json.dumps(describe()))
    for free in ("save_steps=9", "num_samples=0", "disable_tqdm=true", "save_total_limit=3", "max_minutes=1"):
        assert describe(free, "output_dir=elsewhere") == describe()
    assert describe("learning_rate=1e-4") == describe("learning_rate=0.0001")


def test_keys_of_an_older_or_newer_version(describe, tmp_path):
    """They are named, unless a missing one means what its default does now."""
    claim_folder(tmp_path / "run", {**describe(), "extra": {"a": 1}})
    assert_refused(tmp_path / "run", describe(), r"\['extra.a'\] differ")
    before = describe()
    del before["data"]["text_share"]
    claim_folder(tmp_path / "run", before)
    assert check_folder(tmp_path / "run", describe()) is None
    assert_refused(tmp_path / "run", describe("text_share=0.5"), r"\['data.text_share'\] differ")


# --- what it reads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data_run(describe, tmp_path):
    """`data_run()` describes a run on a file, and on a folder for evaluation; the run has a checkpoint."""
    rows, held_out = tmp_path / "rows[1].jsonl", tmp_path / "held_out" / "rows.jsonl"
    held_out.parent.mkdir()
    for path in (rows, held_out):
        path.write_text('{"a": 1}\n{"a": 2}\n')
    options = [f"datasets=[{{path: '{rows}'}}]", f"eval_datasets=[{{path: {held_out.parent}}}]"]
    claim_folder(tmp_path / "run", describe(*options))
    make_checkpoint(tmp_path / "run", 5)
    return lambda: describe(*options)


@pytest.mark.parametrize("name", ["rows[1].jsonl", "held_out/rows.jsonl"])
@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n{"a": 3}\n', '{"a": 1}\n{"a": 7}\n', None])
def test_a_run_does_not_resume_on_data_that_changed(data_run, tmp_path, name, content):
    """One row more, as many rows of the same size but other ones, and no file at all: named with both hashes."""
    path, run = tmp_path / name, tmp_path / "run"
    assert check_folder(run, data_run()) == run / "checkpoint-5"
    began, times, now = file_sha256(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns), "no such file"
    path.unlink()
    if content is not None:
        path.write_text(content)
        os.utime(path, ns=times)
        now = f"SHA-256 {file_sha256(path)}"
    path = str(path).replace("[", r"\[")
    message = (
        f"^{path} must be what the run in {run} began with, SHA-256 {began}, but is {now}. Put the old file back, or"
    )
    assert_refused(run, data_run(), message)


def test_a_file_that_joins_a_folder_of_data_is_named(data_run, tmp_path):
    (tmp_path / "held_out" / "more.jsonl").write_text("{}")
    message = "held_out/more.jsonl must be what .* began with, no such file, but is SHA-2"
    assert_refused(tmp_path / "run", data_run(), message)


def test_a_run_without_hashes_resumes_and_has_them_from_then_on(data_run, tmp_path):
    """A run of a version that recorded only the path."""
    description, run = data_run(), tmp_path / "run"
    claim_folder(run, {name: part for name, part in description.items() if name != "files"})
    assert check_folder(run, description) == run / "checkpoint-5"
    claim_folder(run, description)
    names = {str(tmp_path / name) for name in ("rows[1].jsonl", "held_out/rows.jsonl")}
    assert read_json(run / "run.json")["files"].keys() == names


# --- whose folder it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, [], ["dataset_cache", "memories"]], ids=["new", "empty", "prepared"])
def test_a_free_folder_is_claimed_and_open_to_its_own_run_again_and_again(describe, tmp_path, content):
    """Also one that a run was killed in before its first step."""
    folder = tmp_path / "a" / "run"
    for name in content or ():
        (folder / name).mkdir(parents=True)
    if content == []:
        folder.mkdir(parents=True)
    before = tree(tmp_path)
    assert check_folder(folder, describe()) is None and tree(tmp_path) == before
    for _ in range(2):
        claim_folder(folder, describe())
        assert read_json(folder / "run.json") == describe()
        assert {path.name for path in folder.iterdir()} == {"run.json", *(content or ())}
        assert check_folder(folder, describe()) is None
    make_checkpoint(folder, 5)
    assert check_folder(folder, describe()) == folder / "checkpoint-5"


def test_a_folder_with_other_content_is_refused(describe, checkpoint, tmp_path):
    (tmp_path / "thesis" / "memories").mkdir(parents=True)
    for name in "dcba":
        (tmp_path / "thesis" / name).write_text("mine")
    message = r"`output_dir` must be a new or empty folder.*holds \['a', 'b', 'c'\]. Choose"
    assert_refused(tmp_path / "thesis", describe(), message)
    shutil.copytree(checkpoint, tmp_path / "model")
    assert_refused(tmp_path / "model", describe(), "`output_dir` must be a new or empty folder")
    message = f"`output_dir` must be a folder, got the file {tmp_path}/thesis/a. Choose another"
    assert_refused(tmp_path / "thesis" / "a", describe(), message)


def test_a_finished_run_and_a_damaged_description_are_refused(describe, tmp_path):
    run = tmp_path / "run"
    claim_folder(run, describe())
    make_checkpoint(run, 5)
    (run / "config.json").write_text("{}")
    assert_refused(run, describe(), f"the run in {run} is finished. Choose another `output_dir`, or delete it")
    (run / "run.json").write_text('{"model": ')
    assert_refused(run, describe(), "run.json is damaged")


# --- where it goes on ------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_is_taken_by_its_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (1000, 900, 20):
        make_checkpoint(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-5-copy"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'], ids=["no state", "empty", "cut"])
def test_a_half_written_checkpoint_is_removed_with_a_warning_and_the_one_before_taken(tmp_path, caplog, state):
    kept, half = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10, state)
    (tmp_path / "notes.txt").write_text("mine")
    assert last_checkpoint(tmp_path) == kept
    assert f"removing {half}, which was not written to the end" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "notes.txt"}
    shutil.rmtree(kept)
    make_checkpoint(tmp_path, 10, state)
    assert last_checkpoint(tmp_path) is None and not half.exists()


# --- weights back into a model ---------------------------------------------------------------------------------------


@torch.no_grad()
def shake(model, seed: int = 7) -> None:
    """Change every weight."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        tensor += torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_trained_weights_come_back_bit_for_bit(model, tmp_path, include_backbone):
    """Those of the backbone too if it was trained, else they stay; an optimizer's parameters are still the model's."""
    if include_backbone:
        shake(model, seed=8)
    model.save_pretrained(tmp_path, include_backbone=include_backbone or None)
    saved, parameters = state_of(model), dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    shake(model)
    assert moved(saved, model) == set(saved)
    load_trained(model, tmp_path)
    own = {name for name in saved if "lora_" in name} | EMBEDDINGS
    assert moved(saved, model) == (set() if include_backbone else set(saved) - own)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad == flags[name]


def test_a_backbone_with_tied_embeddings_comes_back(tmp_path):
    folder = save_backbone(tmp_path / "backbone", "qwen2", tied=True)
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(2,), lora_rank=2)
    model.save_pretrained(tmp_path / "run", include_backbone=True)
    saved = state_of(model)
    shake(model)
    load_trained(model, tmp_path / "run")
    assert_equal(saved, state_of(model))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("file", ["clara.safetensors", *(f"{role}/adapter_model.safetensors" for role in ROLES)])
def test_a_damaged_checkpoint_is_named_and_the_model_left_as_it_is(model, checkpoint_copy, file):
    shake(model)
    before, path = state_of(model), checkpoint_copy / file
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"`{file}` must hold the tensors"):
        load_trained(model, checkpoint_copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"`{file}` must be in"):
        load_trained(model, checkpoint_copy)
    assert_equal(before, state_of(model))
