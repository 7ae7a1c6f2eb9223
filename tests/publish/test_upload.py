"""`upload.py model`: what it builds loads without this package, gives the same bits, and nothing else gets in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_backbone

from modeling_clara import CLaRaForRAG
from upload import build_model, describe, main, probe

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    """clara-pico as it is published: the folder, and what the build reported."""
    folder = tmp_path_factory.mktemp("build") / "clara-pico"
    return {"folder": folder, **build_model(CARDS / "clara-pico", folder, corpus=CARDS / "clara-pico-corpus")}


def test_build_gives_the_bits_of_its_source(built):
    expected = describe(CLaRaForRAG.from_pretrained(CARDS / "clara-pico"))
    assert {name: built[name] for name in expected} == expected


def test_build_has_all_that_the_card_folder_has(built):
    source, folder = CARDS / "clara-pico", built["folder"]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()} <= names
    assert names == set(built["files"])
    assert (folder / "README.md").read_bytes() == (source / "README.md").read_bytes()
    for role in ("compressor", "reasoner", "generator"):
        old, new = (load_file(place / role / "adapter_model.safetensors") for place in (source, folder))
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.suffix in (".bin", ".pt", ".pkl")]
    assert str(ROOT) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_repository_has_no_links():
    """A zip of it, and a checkout on a system without symbolic links, must be whole."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_only_what_belongs_to_a_model_is_in_a_build(checkpoint_copy, backbone_folder, tmp_path):
    """A backbone that is not on the Hub is included; pickles, caches and what an earlier build left are not."""
    output = tmp_path / "out"
    for name in ("optimizer.pt", "checkpoint-20/trainer_state.json", ".cache/x.json", "memories/corpus.json"):
        (checkpoint_copy / name).parent.mkdir(exist_ok=True)
        (checkpoint_copy / name).write_text("{}")
    output.mkdir()
    for name in ("config.json", "old_clara.py"):
        (output / name).write_text("from .configuration_clara import CLaRaConfig\n")
    assert json.loads((checkpoint_copy / "config.json").read_text())["backbone_revision"] is None
    report = build_model(checkpoint_copy, output, backbone=str(backbone_folder))
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert names == set(report["files"]) >= {"backbone/model.safetensors", "modeling_clara.py", "config.json"}
    assert not [name for name in names if name.startswith(("optimizer", "checkpoint-", ".cache", "memories", "old"))]
    backbone_folder.rename(backbone_folder.with_name("away"))  # nothing outside the folder is read
    try:
        assert probe(output)["memory"] == report["memory"]
    finally:
        backbone_folder.with_name("away").rename(backbone_folder)


@pytest.mark.parametrize("fault", ["no checkpoint", "other files", "other backbone"])
def test_refused_builds_write_nothing(fault, checkpoint, tmp_path, capsys):
    source, output, extra = checkpoint, tmp_path / "out", []
    if fault == "no checkpoint":
        source, wanted = tmp_path, "must be a folder with config.json"
    elif fault == "other files":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        wanted = "must be new or an earlier build"
    else:
        torch.manual_seed(7)
        extra = ["--backbone", str(save_backbone(tmp_path / "backbone", "mistral"))]
        wanted = "must have model_type llama"
    before = sorted(tmp_path.rglob("*"))
    assert main(["model", str(source), "--build", str(output), *extra]) == 1
    assert wanted in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_probe_cannot_import_the_package(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from upload import HiddenPackage
sys.meta_path.insert(0, HiddenPackage())
try:
    import modeling_clara
except ModuleNotFoundError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'modeling_clara'" in process.stdout
