"""Building what is published: it loads without this package, gives the same bits, and nothing else gets in.

A build is used again if nothing has changed. The tests of the Hub are in test_upload_hub.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants
from published import CARDS, ROOT
from safetensors.torch import load_file, save_file
from tiny import save_backbone

from modeling_clara import CLaRaForRAG
from recipes.publishing.assemble import Assembled, assemble_data
from recipes.publishing.build import Built, building
from recipes.publishing.kinds import KINDS
from recipes.publishing.probe import describe_model, probe
from upload import main

LICENSED = "---\nlicense: mit\n---\n\n# a model\n"
MODEL = KINDS["model"]


def build(source: Path, output: Path | None, **options: str):
    """What `upload.py model` builds; the lock is not held any more."""
    with building(MODEL, source, output, options) as built:
        return built


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """clara-pico as it is published."""
    folder = tmp_path_factory.mktemp("build") / "clara-pico"
    return build(CARDS / "clara-pico", folder, corpus=str(CARDS / "clara-pico-corpus"))


@pytest.fixture
def licensed(checkpoint_copy) -> Path:
    """A checkpoint with a card that has a licence."""
    (checkpoint_copy / "README.md").write_text(LICENSED)
    return checkpoint_copy


def test_build_gives_the_bits_of_its_source(built):
    assert built.found == describe_model(CLaRaForRAG.from_pretrained(CARDS / "clara-pico"))


def test_build_has_all_that_the_card_folder_has(built):
    source, folder = CARDS / "clara-pico", built.folder
    assert set(tree(source)) <= set(tree(folder)) == {*built.files, "README.md"}
    assert (folder / "README.md").read_bytes() == (source / "README.md").read_bytes()
    for role in ("compressor", "reasoner", "generator"):
        old, new = (load_file(place / role / "adapter_model.safetensors") for place in (source, folder))
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.suffix in (".bin", ".pt", ".pkl")]
    assert str(ROOT) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_the_backbone_keeps_its_dtype(built):
    """What was stored in 16 bits is loaded in 32 on a CPU, and published in 16."""
    source, folder = (
        load_file(place / "backbone/model.safetensors") for place in (CARDS / "clara-pico", built.folder)
    )
    assert source.keys() == folder.keys() and all(torch.equal(source[key], folder[key]) for key in source)
    assert {tensor.dtype for tensor in folder.values()} == {torch.float16}
    assert json.loads((built.folder / "backbone/config.json").read_text())["dtype"] == "float16"


def test_repository_has_no_links():
    """A zip of it, and a checkout on a system without symbolic links, must be whole."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_only_what_belongs_to_a_model_is_in_a_build(licensed, backbone_folder, tmp_path):
    """A backbone that is not on the Hub is included; what a run left, caches and an earlier build are not."""
    output = tmp_path / "out"
    of_a_run = ("optimizer.pt", "rng_state_0.pth", "checkpoint-20/trainer_state.json", "memories/corpus.json")
    for name in (*of_a_run, ".cache/x.json"):
        (licensed / name).parent.mkdir(exist_ok=True)
        (licensed / name).write_text("{}")
    (licensed / ".eval_results").mkdir()
    (licensed / ".eval_results" / "nq.yaml").write_text("- value: 1\n")
    output.mkdir()
    for name in ("clara.safetensors", "old_clara.py"):
        (output / name).write_text("from .configuration_clara import CLaRaConfig\n")
    assert json.loads((licensed / "config.json").read_text())["backbone_revision"] is None
    built = build(licensed, output, backbone=str(backbone_folder))
    names = set(tree(output))
    wanted = {"backbone/model.safetensors", "modeling_clara.py", "config.json", ".eval_results/nq.yaml"}
    assert names == {*built.files, "README.md"} >= wanted
    assert not [
        name for name in names if name.startswith(("optim", "rng", "checkpoint-", ".cache", "memories", "old"))
    ]
    assert not [
        name for name in names if name.endswith(".json") and str(backbone_folder) in (output / name).read_text()
    ]
    backbone_folder.rename(backbone_folder.with_name("away"))  # nothing outside the folder is read
    try:
        assert probe("model", output)["memory"] == built.found["memory"]
    finally:
        backbone_folder.with_name("away").rename(backbone_folder)


def test_a_card_alone_needs_no_new_build_and_its_faults_change_nothing(licensed, backbone_folder, tmp_path, capsys):
    options = {"backbone": str(backbone_folder), "corpus": None}
    first = build(licensed, tmp_path / "out", **options)
    (licensed / "README.md").write_text(LICENSED + "\nNew.\n")
    second = build(licensed, tmp_path / "out", **options)
    assert second.is_reused and second.found == first.found and b"New." in second.card(None, None).content
    assert (tmp_path / "out" / "README.md").read_text().endswith("New.\n")
    (licensed / "README.md").write_text("---\ntags: [x]\n---\n")
    with pytest.raises(ValueError, match="must name the licence"):
        build(licensed, tmp_path / "out", **options)
    assert (tmp_path / "out" / "README.md").read_text().endswith("New.\n")


def test_a_model_of_short_documents_is_compared(tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    settings = {"document_max_length": 12}
    overlap = {"document_overlap": 2}
    model = CLaRaForRAG.from_backbone(
        backbone, memory_sizes=(2,), lora_rank=2, config_kwargs=settings, processor_kwargs=overlap
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(LICENSED)
    assert build(tmp_path / "model", tmp_path / "out").found["fingerprint"] == model.fingerprint


def test_a_build_is_used_again_until_something_changes(tmp_path):
    source, card = tmp_path / "rows", tmp_path / "rows" / "README.md"
    source.mkdir()
    (source / "train.jsonl").write_text('{"a": 1}\n')
    card.write_text(LICENSED)

    def again() -> Built:
        with building(KINDS["data"], source, None, {}) as built:
            return built

    first = again()
    assert first.folder.is_relative_to(constants.HF_HOME) and not first.is_reused
    start = first.folder.stat().st_mtime_ns
    os.utime(card)  # another time, the same content
    second = again()
    assert second.is_reused and second.found == first.found and second.folder.stat().st_mtime_ns == start
    assert {name: file.sha256 for name, file in second.files.items()} == {n: f.sha256 for n, f in first.files.items()}
    card.write_text(LICENSED + "\nNew.\n")
    assert not again().is_reused and "New." in (first.folder / "README.md").read_text()
    (first.folder / "train.jsonl").write_text("{}")  # somebody changed the build
    assert not again().is_reused and (first.folder / "train.jsonl").read_text() == '{"a": 1}\n'
    (source / "more.txt").write_text("")
    assert not again().is_reused and again().is_reused
    with FileLock(first.folder.parent / "lock"), pytest.raises(RuntimeError, match="one process at a time"):
        again()


@pytest.mark.parametrize("fault", ["no checkpoint", "other files", "other backbone", "checks", "link", "weights"])
def test_refused_builds_write_nothing(fault, licensed, backbone_folder, tmp_path, capsys):
    source, output, extra = licensed, tmp_path / "out", ["--backbone", str(backbone_folder)]
    if fault == "no checkpoint":
        source, wanted = tmp_path, ["must be a folder with config.json"]
    elif fault == "other files":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        wanted = ["must be new or an earlier build"]
    elif fault == "other backbone":
        torch.manual_seed(7)
        extra = ["--backbone", str(save_backbone(tmp_path / "backbone", "mistral"))]
        wanted = ["must have model_type llama"]
    elif fault == "checks":
        (licensed / "README.md").write_text("---\ntags: [x]\n---\n![x](missing.png)\n")
        (licensed / "weights.pth").write_bytes(b"")
        (licensed / "notes.json").write_text(f'["{licensed}"]')
        wanted = ["weights.pth must be safetensors", "notes.json must not hold an absolute path", "missing.png"]
        wanted += ["must name the licence"]  # all of them at once
    elif fault == "link":
        (licensed / "passwords").symlink_to("/etc/passwd")
        wanted = ["must lie inside the folder"]
    else:
        name = licensed / "compressor/adapter_model.safetensors"
        save_file({key: tensor[:1].clone() for key, tensor in load_file(name).items()}, name)
        wanted = ["must have the shape"]
    before = sorted(tmp_path.rglob("*"))
    assert main(["model", str(source), "--build", str(output), *extra]) == 1
    said = capsys.readouterr().err
    assert all(words in said for words in wanted) and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_said_and_the_earlier_build_stays(built):
    """Files of more than some bytes are refused by the system, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = tree(built.folder)
    (source := built.folder.parent / "source").mkdir()
    for name, content in before.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    command = [sys.executable, str(ROOT / "upload.py"), "model", str(source), "--build", str(built.folder)]
    limit = (1_000_000, 1_000_000)
    process = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert process.returncode == 1 and "the disk must have room for the build" in process.stderr
    assert "Traceback" not in process.stderr and tree(built.folder) == before
    assert [path.name for path in built.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_does_not_load_or_gives_something_else_is_not_written(built, tmp_path):
    """A corpus that the model did not make, and data of which other rows are expected."""
    before = tree(built.folder)
    (other := tmp_path / "corpus").mkdir()
    for name, content in tree(CARDS / "clara-pico-corpus").items():
        if not name.startswith("index/"):
            (other / name).parent.mkdir(exist_ok=True)
            (other / name).write_bytes(content.replace(b"086fb420af21efe5", b"186fb420af21efe5"))
    with pytest.raises(ValueError, match="must load in a process without this project, but there: ValueError"):
        build(CARDS / "clara-pico", built.folder, corpus=str(other))
    assert tree(built.folder) == before

    def expect_more(source, folder, options):
        return Assembled(assemble_data(source, folder, options).probe, {"splits": {"default/rows": [3, ["a"]]}})

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    kind = replace(KINDS["data"], assemble=expect_more)
    with pytest.raises(ValueError, match=r"must give what .*rows.jsonl gives, but differs in \['splits'\]"):
        with building(kind, tmp_path / "rows.jsonl", tmp_path / "out", {}):
            raise AssertionError("it must not come so far")
    assert not (tmp_path / "out").exists()


def test_probe_cannot_import_the_package(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from recipes.publishing.probe import HiddenPackage
sys.meta_path.insert(0, HiddenPackage())
try:
    import modeling_clara
except ModuleNotFoundError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'modeling_clara'" in process.stdout
