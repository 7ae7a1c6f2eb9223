"""`clara synthesize`: what it prints and leaves, in one line if something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from teacher_server import TeacherServer

from modeling_clara.cli import main
from modeling_clara.corpus.storage import read_lines
from modeling_clara.synthesis.documents import WordSplitter, load_splitter

ROOT = Path(__file__).parents[2]
TEXT = "Oslo is the capital of Norway. It had 709,037 inhabitants in 2022. The city lies on the Oslofjord."


@pytest.fixture
def documents(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    rows = [
        {"id": f"d{number}", "title": "Oslo", "text": f"{TEXT} Its area is {number + 400} km2."} for number in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def server():
    with TeacherServer() as server:
        yield server


def arguments_of(server, documents, output=None) -> list[str]:
    command = ["synthesize", str(documents), "--model", "loopback-teacher", "--base-url", server.base_url]
    return command + (["-o", str(output)] if output else [])


def test_data_come_out_and_the_same_command_has_nothing_to_do(server, documents, tmp_path, capsys):
    command = [*arguments_of(server, documents, tmp_path / "data.jsonl"), "--rounds", "1", "--set", "complex=1"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "4 of 4 chunks accepted (100%), from 4 documents" in said.out and not said.err
    calls = server.answered.total()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accepted"] == 4 and report["options"]["settings"]["complex"] == 1
    assert server.answered.total() == calls
    assert len(read_lines(tmp_path / "data.jsonl")) == 4
    assert main([*command, "--rounds", "2"]) == 1
    assert "`--rounds` was 1, got 2. Give the same, or another `--output`" in capsys.readouterr().err


def test_a_preview_and_an_estimate_write_nothing(server, documents, tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text('{"loopback-teacher": {"prompt": 1.0, "completion": 2.0}}')
    calls, before = server.answered.total(), sorted(tmp_path.iterdir())
    command = arguments_of(server, documents, tmp_path / "data")
    assert main([*command, "--dry-run", "--prices", str(prices), "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert server.answered.total() == calls and estimated["chunks"] == 4
    cost = (estimated["prompt_tokens"] + 2 * estimated["completion_tokens"]) / 1e6
    assert estimated["cost"] == pytest.approx(cost) and cost > 0
    assert main([*command, "--preview", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^=== (.+)$", shown, re.M) == ["d0#0", "d1#0"]
    assert "--- system\n" in shown and "--- answer\n" in shown and '"paraphrase"' in shown
    assert sorted(tmp_path.iterdir()) == before
    assert main(["synthesize", str(documents), "--model", "m", "--dry-run", "--task", "instruct"]) == 0


def test_an_estimate_is_near_what_a_run_takes(server, documents, tmp_path, capsys):
    command = [*arguments_of(server, documents, tmp_path / "data"), "--json"]
    assert main([*command, "--dry-run"]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.5 < estimated["calls"] / report["calls"] < 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "scp", "--set", "rund=1"], "`--set` must be some of rounds, simple"),
        (["--set", "rounds=many"], "'rounds' of `--set` must be like 10, got 'many'"),
        (["--rank", "1"], "`--rank` must be from 0 to `--world-size` - 1 (0), got 1"),
        (["--max-cost", "1"], "`--max-cost` needs the prices"),
        (["--max-tokens-total", "100"], "`--max-tokens-total` 100 has 100 left"),
        (["--leakage", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_an_error_is_one_line_with_the_options_name(options, words, server, documents, tmp_path, capsys):
    assert main([*arguments_of(server, documents, tmp_path / "data"), *options]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_wrong_key_is_one_line(documents, tmp_path, capsys):
    with TeacherServer(faults=["401"] * 100) as server:
        assert main([*arguments_of(server, documents, tmp_path / "data"), "--api-key-env", "NO_SUCH_KEY"]) == 1
    said = capsys.readouterr().err
    assert "NO_SUCH_KEY, which is not set" in said and said.count("\n") == 1


def test_ctrl_c_keeps_what_is_done(documents, tmp_path):
    with TeacherServer(latency=0.05) as server:
        command = [sys.executable, "-m", "modeling_clara.cli", *arguments_of(server, documents, tmp_path / "data")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        options = {"env": environment, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # whoever runs the tests in the background ignores Ctrl-C, and so would the command
        process = subprocess.Popen(
            command, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **options
        )
        while server.answered.total() < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert said.splitlines() == [
            "What is done is kept: the same command goes on from there.",
            "clara synthesize: interrupted",
        ]
        assert main(command[3:]) == 0
        assert (server.answered - type(server.answered)(set(server.answered))).total() <= 8


def test_words_are_cut_after_sentences_and_nothing_is_lost():
    sentences = [f"Sentence number {number} has seven words here." for number in range(40)]
    text = " ".join(sentences)
    chunks = WordSplitter(64).split_document({"id": "a", "title": "T", "text": text, "page": 3})
    assert " ".join(chunk["text"] for chunk in chunks) == text and len(chunks) > 4
    assert all(chunk["text"].endswith(".") and len(chunk["text"].split()) <= 48 for chunk in chunks)
    assert all(chunk["page"] == 3 and chunk["title"] == "T" for chunk in chunks)
    chinese = "挪威的首都是奥斯陆。" * 20
    chunks = WordSplitter(64).split_document({"text": chinese})
    assert "".join(chunk["text"] for chunk in chunks) == chinese and len(chunks) == 5


def test_chunks_are_those_of_the_model(checkpoint, backbone_folder, shared_model):
    document = {"id": "a", "title": "", "text": TEXT * 20}
    assert load_splitter(str(checkpoint)).split_document(document) == shared_model.processor.split_document(document)
    chunks = load_splitter(str(backbone_folder), 40).split_document(document)
    assert len(chunks) > 5 and max(chunk["n_tokens"] for chunk in chunks) <= 40
