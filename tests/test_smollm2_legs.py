"""clara-smollm2-135m from data to card on a tiny backbone: legs, their order, time, kills, and what travels.

The chain of legs runs once. Its commands run in processes of their own; most of these are forks of one that has
imported everything already, because importing takes longer than what a leg does here.
"""

import doctest
import gzip
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import smollm2_legs
import smollm2_stages as stages
import torch
from safetensors.torch import load_file
from smollm2_stages import BACKBONE, DATA, LEGS, RUNS, Call, leg_name
from tiny import save_backbone

from modeling_clara import CLaRaForRAG
from modeling_clara.configuration_clara import ROLES

SCRIPT, ROOT = Path(smollm2_legs.__file__), Path(smollm2_legs.__file__).parent.parent
ADAPTER = "adapter_model.safetensors"
TINY = [
    "max_steps=3", "save_steps=1", "logging_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
    "warmup_steps=0", "learning_rate=1e-2",
]  # fmt: skip
FRESH = ["lora_rank=2", "lora_alpha=4", "document_max_length=64", "processor_kwargs={document_overlap: 8}"]
HELD_OUT = ["eval_strategy=steps", "eval_steps=3", f"eval_datasets=[{{path: {DATA}/dev/multihop_hotpotqa_dev.jsonl}}]"]
TEXT = [*TINY, *FRESH, "max_steps=6"]
EVALUATED = (
    "passages_squad-k16", "passages_nq-k16-int4", "multihop_hotpotqa_dev-k16", "multihop_musique_dev-k4",
    "multihop_2wiki_dev-label-free",
)  # fmt: skip
TOWN = "In {year} the town {n} had a harbour, and its mayor was Otto Berg {n}, who liked old boats very much."


# --- commands in forks of one process ---------------------------------------------------------------------------------


def run_recipe(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """What `python WORDS` does, in a fork."""
    import trainer

    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    trainer.START = time.monotonic()
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


class Fork:
    """As much of `subprocess.Popen` as the legs use."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, line: list[str], cwd: Path, env: dict[str, str]):
        self.process = self.context.Process(target=run_recipe, args=(line[1:], cwd, env))
        self.process.start()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("recipe", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture(scope="module")
def forks():
    """Legs run their commands in forks."""
    Fork.context.set_forkserver_preload(["preparation", "trainer", "evaluation.cli", "modeling_clara.cli", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "recipes"), str(ROOT)]))
        popen = SimpleNamespace(Popen=Fork, TimeoutExpired=subprocess.TimeoutExpired)
        patch.setattr(stages, "subprocess", popen)
        known = stages.evaluations
        patch.setattr(stages, "evaluations", lambda *has: (one for one in known(*has) if one[0] in EVALUATED))
        yield


@pytest.fixture
def no_command(monkeypatch):
    """Nothing may be run."""

    def refuse(*arguments, **kwargs):
        raise AssertionError(f"a command was run: {arguments}")

    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=refuse))


def run(home: Path, *words, tiny: list[str] = TINY) -> int:
    """`smollm2_legs.py run WORDS` on a CPU; the exit status."""
    given = ["--set", *tiny] if tiny else []
    return smollm2_legs.main(["run", *map(str, words), "--home", str(home), "--cpu", *given])


def fails(capsys, *words) -> str:
    """The one line of a command line that ends with status 1."""
    capsys.readouterr()
    assert smollm2_legs.main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# --- the chain --------------------------------------------------------------------------------------------------------


def passage(n: int) -> dict:
    pairs = [{"question": f"Who was mayor of {n}?", "answers": [f"Otto Berg {n}"]}]
    return {"title": f"Town {n}", "text": TOWN.format(year=1800 + n, n=n), "qas": pairs}


def multihop(name: str, start: int) -> list[dict]:
    """Rows of six documents."""
    rows = []
    for index in range(3):
        docs = [f"Town {n}\n{passage(n)['text']}" for n in range(start + index, start + index + 6)]
        row = {"id": f"{name}{index}", "question": f"Who of {name} {index}?", "answers": ["Otto"], "docs": docs}
        rows.append({**row, "pos_index": [0, 1]})
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    texts = [{"id": str(n), "title": f"Town {n}", "text": passage(n)["text"]} for n in range(300, 310)]
    unanswerable = [
        {"question": "Why?", "answers": [], "docs": [f"Town {n}\n{passage(n)['text']}"]} for n in (400, 401)
    ]
    files = {
        "passages_squad": [passage(n) for n in range(30)],
        "passages_nq": [passage(n) for n in range(30, 60)],
        "corpus_wikipedia_2wiki": texts,
        "multihop_hotpotqa_train": multihop("hotpot", 100),
        "multihop_hotpotqa_dev": multihop("hotpot-dev", 200),
        "multihop_musique_dev": multihop("musique-dev", 220),
        "multihop_2wiki_dev": multihop("wiki-dev", 300),
        "unanswerable_squad": unanswerable,
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


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
    assert run(home, "pretrain", tiny=[*TINY, *FRESH]) == 0
    assert run(home, "instruct", tiny=[*TINY, *HELD_OUT]) == 0
    assert run(home, "contrastive", "joint", "joint-label-free") == 0
    assert run(home, "text", tiny=TEXT) == 0
    return home


@pytest.fixture(scope="module")
def published(trained) -> Path:
    assert run(trained, "8", tiny=[]) == 0
    return trained


@pytest.fixture(scope="module")
def measured(published, source) -> Path:
    results = published / "results"
    assert run(published, "evaluate", "corpus", "--limit", 2, "--source", source, "--results", results, tiny=[]) == 0
    return published


def load(folder: Path, home: Path) -> CLaRaForRAG:
    return CLaRaForRAG.from_pretrained(folder, backbone=home / BACKBONE)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that training changes."""
    found = {f"{role}.{n}": tensor for role in ROLES for n, tensor in load_file(run / role / ADAPTER).items()}
    return found | load_file(run / "clara.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def changed(run: Path, before: Path) -> set[str]:
    ours, theirs = weights(run), weights(before)
    return {name.split(".")[0] for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


def test_every_leg_goes_on_from_the_one_before(trained):
    runs = trained / RUNS
    rows = {"memory_embeddings", "separator_embedding"}
    assert changed(runs / "instruct", runs / "pretrain") == {"compressor", "generator", *rows}
    assert changed(runs / "contrastive", runs / "instruct") == {"reasoner"}
    for name, start in (("joint", "contrastive"), ("joint-label-free", "instruct")):
        assert changed(runs / name, runs / start) == {"reasoner", "generator"}
        given = json.loads((runs / name / "run.json").read_text())
        assert given["model"]["checkpoint"] == str(RUNS / start)
        assert given["data"]["corpus"] == str(RUNS / "contrastive" / "memories")
        assert not (runs / name / "memories").exists()  # the documents were compressed once
    text = weights(runs / "text")
    assert not any(tensor.any() for name, tensor in text.items() if "lora_B" in name and "generator" not in name)
    assert (runs / "instruct" / "samples.jsonl").read_text().count("\n") > 0
    for name in LEGS:
        if (runs / name).exists():
            steps = json.loads((runs / name / "trainer_state.json").read_text())["global_step"]
            assert steps == (6 if name == "text" else 3)


def test_finished_legs_are_not_run_again(published, no_command, capfd):
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    names = [name for name in LEGS if name not in ("evaluate", "corpus")]
    assert run(published, *names, tiny=[]) == 0
    assert "joint-label-free is finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_variants_stand_by_themselves(trained, no_command, forks, monkeypatch):
    lines = []
    monkeypatch.setattr(Call, "command", lambda call, *words: lines.append([str(word) for word in words]))
    assert run(trained, "pretrain", "--variants", "base", "paraphrase-0") == 0  # the run itself is finished
    for name, line in zip(("base", "paraphrase-0"), lines, strict=True):
        assert f"output_dir={RUNS}/variants/pretrain-{name}" in line
        assert line.index("max_steps=300") < line.index("max_steps=3")  # what is given last wins
    assert sum(word.startswith("datasets=[{") for word in lines[0] + lines[1]) == 1


def test_a_variant_is_trained(trained, forks, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (trained / RUNS).glob("*")}
    results = tmp_path / "results"
    assert run(trained, "pretrain", "--variants", "rank-16", "--results", results, tiny=[*TINY, *FRESH[2:]]) == 0
    variant = RUNS / "variants" / "pretrain-rank-16"
    assert load(trained / variant, trained).config.lora["generator"]["rank"] == 16
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert smollm2_legs.main(["collect", str(results), "--home", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / variant / "trainer_state.json").exists()
    assert not (tmp_path / "back" / variant / "generator").exists()  # curves alone


# --- what is refused --------------------------------------------------------------------------------------------------


def test_list_and_names(capsys):
    assert doctest.testmod(stages).failed == 0
    done = subprocess.run([sys.executable, "-S", "-s", str(SCRIPT), "list"], capture_output=True, text=True)
    lines = done.stdout.splitlines()  # with the standard library alone
    assert done.returncode == 0 and [line.split()[:2] for line in lines] == [
        [str(number), name] for number, name in enumerate(LEGS, 1)
    ]
    assert [leg_name(str(number)) for number in range(1, len(LEGS) + 1)] == [leg_name(name) for name in LEGS]


@pytest.mark.parametrize(
    "leg, needed",
    [
        ("instruct", "pretrain"), ("contrastive", "instruct"), ("joint", "contrastive"),
        ("joint-label-free", "instruct"), ("publish", "joint"), ("evaluate", "publish"), ("corpus", "publish"),
    ],
)  # fmt: skip
def test_a_leg_names_the_one_it_needs(leg, needed, tmp_path, no_command, capsys):
    error = fails(capsys, "run", leg, "--home", tmp_path / "home", "--cpu")
    assert f"Run the leg {needed}." in error


def test_what_is_wrong_is_said_before_anything_runs(trained, tmp_path, no_command, capsys):
    home = ["--home", trained, "--cpu"]
    for word in ("0", "11", "-1", "1.5", "train", "", "²"):
        assert "from 1 to 10" in fails(capsys, "run", "pretrain", *home, "--", word)
    for minutes in ("0", "-1", "nan"):
        assert "--minutes" in fails(capsys, "run", "pretrain", *home, f"--minutes={minutes}")
    assert "'lr-3'" in fails(capsys, "run", "pretrain", *home, "--variants", "base", "lr-3")
    (tmp_path / "file").write_text("kept")
    for results in (tmp_path, tmp_path / "file"):
        fails(capsys, "run", "pretrain", *home, "--results", results)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_all_evaluations_are_of_known_options_and_files(prepared, monkeypatch):
    from evaluation.cli import build_parser, check_arguments

    monkeypatch.undo()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import smollm2_stages as s, json; print(json.dumps({n: "
    code += "[str(w) for w in a] for n, a in s.evaluations(True, True)}))"
    known = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, check=True
    )
    lines = json.loads(known.stdout)
    assert len(lines) == 2 * 5 + 3 * 4 and set(EVALUATED) < set(lines)
    for line in lines.values():
        arguments = build_parser().parse_args([*line, "--output", "x"])
        check_arguments(arguments)
        assert (prepared / arguments.data).exists()


# --- time and kills ---------------------------------------------------------------------------------------------------


def test_no_time_at_all(prepared, tmp_path, capfd):
    """Interrupted while it is still starting: there is nothing to take home, and the next legs do not run."""
    command = [
        "run",
        "text",
        "pretrain",
        "--home",
        prepared,
        "--cpu",
        "--minutes",
        "0.02",
        "--results",
        tmp_path / "out",
    ]
    command = [sys.executable, str(SCRIPT), *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "leg text: its time is over" in done.stdout
    assert "leg pretrain" not in done.stdout and not (tmp_path / "out").exists()


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
    parts = list(results.glob("part-*"))
    assert len(parts) > 3 and max(part.stat().st_size for part in parts) <= 10_000
    assert smollm2_legs.main(["collect", str(results), "--home", str(here)]) == 0
    (checkpoint,) = (here / RUNS / "text").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.partition("-")[2]) < 6
    assert not (here / RUNS / "text" / "dataset_cache").exists()
    assert run(here, "text", tiny=TEXT) == 0
    assert_same_weights(here / RUNS / "text", trained / RUNS / "text")
    assert losses(here / RUNS / "text") == losses(trained / RUNS / "text")


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
