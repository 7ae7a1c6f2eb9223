"""The folder of a run: who may use it, where it goes on after a kill, and trained weights back in a model bit for bit.

Arguments are parsed from key=value as `train.py` does; checkpoints are the model's own.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize_adapters, save_backbone

from modeling_clara import ROLES, CLaRaForRAG
from modeling_clara.storage_clara import file_sha256
from recipes.training.arguments import parse_arguments
from recipes.training.checkpoints import (
    RUN_FILE,
    check_folder,
    claim_folder,
    describe_run,
    last_checkpoint,
    load_trained,
)


@pytest.fixture
def describe(tmp_path):
    """`describe("seed=3", ...)`: the description of a run."""
    (tmp_path / "recipe.yaml").write_text(
        "stage: pretrain\nbackbone: folder\ndatasets: [{path: rows.jsonl}]\nuse_cpu: true\nreport_to: none\n"
    )

    def run(*overrides: str) -> dict:
        return describe_run(*parse_arguments(["--config", str(tmp_path / "recipe.yaml"), *overrides]))

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, to see that nothing was changed."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def make_checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    """checkpoint-<step> with weights and, unless it was cut off, the Trainer's state."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


# --- what a run is ---------------------------------------------------------------------------------------------------


def test_a_description_is_plain_json_and_the_same_for_the_same_arguments(describe):
    assert describe() == describe() == json.loads(json.dumps(describe()))
    assert describe("learning_rate=1e-4") == describe("learning_rate=0.0001")


@pytest.mark.parametrize(
    "override, key",
    [
        ("learning_rate=1e-3", "training.learning_rate"),
        ("seed=7", "training.seed"),
        ("max_steps=9", "training.max_steps"),
        ("stage=instruct", "training.stage"),
        ("backbone=other", "model.backbone"),
        ("memory_sizes=[2]", "model.memory_sizes"),
        ("datasets=[{path: other.jsonl}]", "data.datasets"),
        ("targets_per_document=2", "data.targets_per_document"),
    ],
)
def test_what_changes_the_result_is_another_run_and_is_named(describe, tmp_path, override, key):
    claim_folder(tmp_path / "run", describe())
    before = tree(tmp_path / "run")
    with pytest.raises(
        ValueError, match=rf"holds another run: \['{key}'\] differ \(see .*run.json\). Choose another name"
    ):
        check_folder(tmp_path / "run", describe(override))
    assert tree(tmp_path / "run") == before


def test_all_differing_keys_are_named(describe, tmp_path):
    claim_folder(tmp_path, describe())
    with pytest.raises(ValueError, match=r"\['data.num_candidates', 'model.lora_rank', 'training.seed'\] differ"):
        check_folder(tmp_path, describe("seed=1", "lora_rank=2", "num_candidates=3"))


@pytest.mark.parametrize(
    "override", ["save_steps=9", "num_samples=0", "disable_tqdm=true", "save_total_limit=3", "output_dir=elsewhere"]
)
def test_what_does_not_change_the_result_is_the_same_run(describe, override):
    assert describe(override) == describe()


def test_keys_that_an_older_or_newer_version_has_are_named(describe, tmp_path):
    claim_folder(tmp_path, {**describe(), "extra": {"a": 1}})
    with pytest.raises(ValueError, match=r"\['extra.a'\] differ"):
        check_folder(tmp_path, describe())


# --- what it reads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data_run(describe, tmp_path):
    """`data_run()` describes a run on two files, one of them for evaluation; the run has a checkpoint."""
    rows, held_out = tmp_path / "rows[1].jsonl", tmp_path / "held_out.jsonl"
    for path in (rows, held_out):
        path.write_text('{"a": 1}\n{"a": 2}\n')
    options = [f"datasets=[{{path: '{rows}'}}]", f"eval_datasets=[{{path: {held_out}}}]"]
    claim_folder(tmp_path / "run", describe(*options))
    make_checkpoint(tmp_path / "run", 5)
    return lambda: describe(*options)


@pytest.mark.parametrize("name", ["rows[1].jsonl", "held_out.jsonl"])
@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n{"a": 3}\n', '{"a": 1}\n{"a": 7}\n', None])
def test_a_run_does_not_resume_on_data_that_changed(data_run, tmp_path, name, content):
    """One row more, as many rows of the same size but other ones, and no file at all: named with both hashes."""
    path, run = tmp_path / name, tmp_path / "run"
    assert check_folder(run, data_run()) == run / "checkpoint-5"
    hashes, times = [file_sha256(path)], (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.unlink() if content is None else path.write_text(content)
    if content is not None:
        os.utime(path, ns=times)
        hashes.append(file_sha256(path))
    before = tree(run)
    with pytest.raises(ValueError, match="Put the old file back, or choose another `output_dir`") as raised:
        check_folder(run, data_run())
    assert str(raised.value).startswith(
        f"{path} must be what the run in {run} began with, SHA-256 {hashes[0]}, but is"
    )
    assert (hashes[-1] if content else "no such file") in str(raised.value).partition("but is")[2]
    assert tree(run) == before


def test_a_file_that_joins_a_folder_of_data_is_named(describe, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}")
    option = f"datasets=[{{path: {folder}}}]"
    claim_folder(tmp_path / "run", describe(option))
    (folder / "more.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=f"{folder}/more.jsonl must be what .* began with, no such file, but is SHA-2"
    ):
        check_folder(tmp_path / "run", describe(option))


def test_a_run_without_hashes_resumes_and_has_them_from_then_on(data_run, tmp_path):
    """A run of a version that recorded only the path."""
    description, run = data_run(), tmp_path / "run"
    claim_folder(run, {name: part for name, part in description.items() if name != "files"})
    assert check_folder(run, description) == run / "checkpoint-5"
    claim_folder(run, description)
    assert json.loads((run / RUN_FILE).read_text())["files"].keys() == {
        str(tmp_path / name) for name in ("rows[1].jsonl", "held_out.jsonl")
    }


# --- whose folder it is ----------------------------------------------------------------------------------------------


def test_a_new_an_empty_and_a_prepared_folder_are_free_and_stay_as_they_are(describe, tmp_path):
    for name in ("new", "empty", "prepared"):
        folder = tmp_path / name
        if name != "new":
            folder.mkdir()
        if name == "prepared":  # killed before the first step
            for part in ("dataset_cache", "memories"):
                (folder / part).mkdir()
        before = tree(tmp_path)
        assert check_folder(folder, describe()) is None
        assert tree(tmp_path) == before


def test_a_claimed_folder_is_open_to_its_own_run_again_and_again(describe, tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        claim_folder(folder, describe())
        assert json.loads((folder / RUN_FILE).read_text()) == describe()
        assert [path.name for path in folder.iterdir()] == [RUN_FILE]
        assert check_folder(folder, describe()) is None
    make_checkpoint(folder, 5)
    assert check_folder(folder, describe()) == folder / "checkpoint-5"


def test_a_folder_with_other_content_is_refused_and_left_alone(describe, tmp_path):
    folder = tmp_path / "thesis"
    (folder / "memories").mkdir(parents=True)
    for name in "dcba":
        (folder / name).write_text("mine")
    before = tree(folder)
    with pytest.raises(
        ValueError, match=r"`output_dir` must be a new or empty folder.*holds \['a', 'b', 'c'\]. Choose"
    ):
        check_folder(folder, describe())
    assert tree(folder) == before


def test_a_checkpoint_without_a_run_is_refused(describe, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match="`output_dir` must be a new or empty folder"):
        check_folder(tmp_path / "model", describe())


def test_a_file_is_refused(describe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(
        ValueError, match=f"`output_dir` must be a folder, got the file {tmp_path}/run. Choose another"
    ):
        check_folder(tmp_path / "run", describe())


def test_a_finished_run_is_not_trained_again(describe, tmp_path):
    claim_folder(tmp_path, describe())
    make_checkpoint(tmp_path, 5)
    (tmp_path / "config.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=f"the run in {tmp_path} is finished. Choose another `output_dir`, or delete it"
    ):
        check_folder(tmp_path, describe())
    assert tree(tmp_path) == before


def test_a_damaged_description_is_named(describe, tmp_path):
    claim_folder(tmp_path, describe())
    (tmp_path / RUN_FILE).write_text('{"model": ')
    with pytest.raises(ValueError, match="run.json"):
        check_folder(tmp_path, describe())


# --- where it goes on ------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_is_taken_by_its_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (1000, 900, 20):
        make_checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'], ids=["no state", "empty", "cut"])
def test_a_half_written_checkpoint_is_removed_with_a_warning_and_the_one_before_taken(tmp_path, caplog, state):
    kept = make_checkpoint(tmp_path, 5)
    half = make_checkpoint(tmp_path, 10, state)
    (tmp_path / "notes.txt").write_text("mine")
    assert last_checkpoint(tmp_path) == kept
    assert f"removing {half}, which was not written to the end" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "notes.txt"]
    shutil.rmtree(kept)
    make_checkpoint(tmp_path, 10, state)
    assert last_checkpoint(tmp_path) is None and not half.exists()


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-5-copy"])
def test_a_folder_that_is_named_almost_like_a_checkpoint_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    kept = make_checkpoint(tmp_path, 5)
    assert last_checkpoint(tmp_path) == kept and (tmp_path / name).exists()


# --- weights back into a model ---------------------------------------------------------------------------------------


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shake(model, names=lambda name: True) -> None:
    """Change every weight that is meant."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if names(name):
                tensor += torch.randn(tensor.shape, generator=generator)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def is_ours(name: str) -> bool:
    return "lora_" in name or "embedding" in name and not name.startswith("backbone")


def test_trained_weights_come_back_bit_for_bit(model, tmp_path):
    shake(model, is_ours)
    model.save_pretrained(tmp_path)
    saved = state(model)
    randomize_adapters(model, seed=9)
    shake(model, is_ours)
    assert not same(state(model), saved)
    load_trained(model, tmp_path)
    assert same(state(model), saved)


def test_a_backbone_that_was_trained_comes_back_with_the_adapters(model, tmp_path):
    shake(model)
    model.save_pretrained(tmp_path, include_backbone=True)
    saved, flags = state(model), [parameter.requires_grad for parameter in model.parameters()]
    shake(model)
    assert not any(torch.equal(saved[name], tensor) for name, tensor in model.named_parameters())
    load_trained(model, tmp_path)
    assert same(state(model), saved)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_backbone_with_tied_embeddings_comes_back(tmp_path):
    folder = save_backbone(tmp_path / "backbone", "qwen2", tied=True)
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(2,), lora_rank=2)
    model.save_pretrained(tmp_path / "run", include_backbone=True)
    saved = state(model)
    shake(model)
    load_trained(model, tmp_path / "run")
    assert same(state(model), saved)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_backbone_that_is_not_in_the_checkpoint_is_left_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    shake(model)
    before = state(model)
    load_trained(model, tmp_path)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_ours(name)}


def test_an_optimizer_keeps_the_parameters_that_it_was_made_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    parameters = list(model.parameters())
    load_trained(model, tmp_path)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("file", ["clara.safetensors", *(f"{role}/adapter_model.safetensors" for role in ROLES)])
def test_a_damaged_checkpoint_is_named_and_the_model_left_as_it_is(model, tmp_path, file):
    model.save_pretrained(tmp_path)
    shake(model)
    before = state(model)
    tensors = load_file(tmp_path / file)
    tensors.pop(min(tensors))
    save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match=f"`{file}` must hold the tensors"):
        load_trained(model, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"`{file}` must be in"):
        load_trained(model, tmp_path)
    assert same(state(model), before)
