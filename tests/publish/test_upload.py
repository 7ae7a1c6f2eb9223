"""`upload.py model`: what it builds loads without this package, gives the same bits, and nothing else gets in."""

import json
import subprocess
import sys
import zipfile
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
def built(tmp_path_factory) -> Path:
    """clara-pico as it is published."""
    output = tmp_path_factory.mktemp("build") / "clara-pico"
    build_model(CARDS / "clara-pico", output, corpus=CARDS / "clara-pico-corpus")
    return output


def test_build_gives_the_bits_of_its_source(built):
    model = CLaRaForRAG.from_pretrained(CARDS / "clara-pico")
    assert probe(built, CARDS / "clara-pico-corpus") == describe(model)


def test_build_has_all_that_the_card_folder_has(built):
    source = {path.relative_to(CARDS / "clara-pico") for path in (CARDS / "clara-pico").rglob("*") if path.is_file()}
    files = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    assert source <= files
    assert (built / "README.md").read_bytes() == (CARDS / "clara-pico" / "README.md").read_bytes()
    for role in ("compressor", "reasoner", "generator"):
        name = f"{role}/adapter_model.safetensors"
        old, new = load_file(CARDS / "clara-pico" / name), load_file(built / name)
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert not [path for path in built.rglob("*") if path.is_symlink() or path.suffix in (".bin", ".pt", ".pkl")]
    assert str(ROOT) not in "".join(path.read_text() for path in built.rglob("*.json"))


def test_repository_has_no_links():
    """A zip of it, and a checkout on a system without symbolic links, must be whole."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_zip_of_a_build_loads(built, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for path in built.rglob("*"):
            archive.write(path, path.relative_to(built))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert probe(tmp_path / "unpacked")["fingerprint"] == probe(built)["fingerprint"]


def test_second_build_replaces_the_first(built, tmp_path):
    output = tmp_path / "out"
    build_model(CARDS / "clara-pico", output)
    (output / "old_clara.py").write_text("from .configuration_clara import CLaRaConfig\n")
    build_model(CARDS / "clara-pico", output)
    assert not (output / "old_clara.py").exists() and (output / "modeling_clara.py").exists()


def test_backbone_that_is_not_on_the_hub_is_included(checkpoint, backbone_folder, tmp_path):
    assert json.loads((checkpoint / "config.json").read_text())["backbone_revision"] is None
    report = build_model(checkpoint, tmp_path / "out", backbone=str(backbone_folder))
    assert "backbone/model.safetensors" in report["files"]
    backbone_folder.rename(backbone_folder.with_name("away"))  # nothing outside the folder is read
    try:
        assert probe(tmp_path / "out")["memory"] == report["memory"]
    finally:
        backbone_folder.with_name("away").rename(backbone_folder)


def test_pickles_caches_and_checkpoints_stay_out(checkpoint_copy, backbone_folder, tmp_path):
    for name in ("optimizer.pt", "checkpoint-20/trainer_state.json", ".cache/x.json", "memories/corpus.json"):
        (checkpoint_copy / name).parent.mkdir(exist_ok=True)
        (checkpoint_copy / name).write_text("{}")
    files = build_model(checkpoint_copy, tmp_path / "out", backbone=str(backbone_folder))["files"]
    assert not [name for name in files if name.startswith(("optimizer", "checkpoint-", ".cache", "memories"))]


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
