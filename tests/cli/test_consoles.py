"""Consoles that are not UTF-8: every command prints, with "?" for what the console lacks; JSON is whole and ASCII."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_clara import cli
from recipes import figures
from recipes.evaluation import cli as evaluation
from recipes.training import curriculum, mine_negatives

ROOT = Path(__file__).parents[2]
TOWN = {"id": "東京", "title": "東京", "text": "東京は日本の首都である。 Tokyo is the capital of Japan."}


def call(monkeypatch, encoding: str, main, *arguments) -> tuple[int, str, str]:
    """Status, stdout and stderr in a console of this encoding, which Python opens as here."""
    streams = {}
    with monkeypatch.context() as patch:
        for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
            streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
            patch.setattr(sys, name, streams[name])
        status = main([str(argument) for argument in arguments])
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams.values())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_every_command_prints(monkeypatch, checkpoint, tmp_path, encoding):
    folder = tmp_path / "書類"
    folder.mkdir()
    (folder / "東京.jsonl").write_text(json.dumps(TOWN, ensure_ascii=False) + '\n{"text": ""}\n', encoding="utf-8")
    texts = tmp_path / "文"
    texts.mkdir()
    (texts / "東京.txt").write_text(TOWN["text"], encoding="utf-8")
    (texts / "空.txt").touch()
    corpus, model = tmp_path / "資料", ["--model", checkpoint]
    commands = [
        ["compress", folder, "-o", corpus, *model],
        ["ask", corpus, "日本の首都は?", *model, "--max-new-tokens", "2"],
        ["info", corpus, "--verify"],
        ["convert", corpus, "--codec", "int4"],
        ["demo", texts, *model, "-q", "日本の首都は?"],
    ]
    for command in commands:
        for options in ([], ["--json"]):
            status, out, err = call(monkeypatch, encoding, cli.main, *command, *options)
            assert status == 0, err
            if options:
                json.loads(out)
                assert out.isascii()
            elif command[0] in ("ask", "convert", "demo"):
                assert "??" in out
    for options in ([], ["--json"]):
        status, out, err = call(monkeypatch, encoding, cli.main, "ask", tmp_path / "無い", "?", *options)
        assert status == 1 and "\\u7121" in err and (not options or "無い" in json.loads(out)["problem"])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_recipes_print(monkeypatch, checkpoint, tmp_path, encoding):
    rows = tmp_path / "質問.jsonl"
    questions = [{"question": f"町{number}の名前は?", "answers": ["町"]} for number in range(2)]
    documents = [{"title": f"町{number}", "text": f"これは町{number}です。", "qas": questions} for number in range(3)]
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents), encoding="utf-8")
    options = ["--limit", "2", "--systems", "closed_book", "--latency-questions", "0", "--resamples", "100"]
    options += ["--max-new-tokens", "2", "--output", tmp_path / "結果"]
    status, _, err = call(monkeypatch, encoding, evaluation.main, "--model", checkpoint, "--data", rows, *options)
    assert status == 0, err
    status, out, _ = call(monkeypatch, encoding, curriculum.main, rows, "--output", tmp_path / "表.jsonl")
    assert status == 1 or "?" in out
    for main in (
        lambda arguments: figures.main(["rate", *arguments, "--output", str(tmp_path / "図.png")]),
        lambda arguments: mine_negatives.main(
            [*arguments, "--model", "無", "--memories", "無", "--output", "x.jsonl"]
        ),
        lambda arguments: evaluation.main(["--model", "無", "--output", str(tmp_path / "x"), "--data", *arguments]),
    ):
        status, _, err = call(monkeypatch, encoding, main, tmp_path / "無い.jsonl")
        assert status == 1 and "error: " in err


def test_a_training_run_names_what_is_wrong(tmp_path):
    command = [
        sys.executable,
        "-m",
        "recipes.train",
        "--config",
        "recipes/configs/stages/pretrain.yaml",
        f"output_dir={tmp_path / '無い'}",
    ]
    command += [f"checkpoint={tmp_path / '模型'}", f"datasets=[{{path: {tmp_path / '無い.jsonl'}}}]"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 1 and b"error: " in done.stderr and b"UnicodeEncodeError" not in done.stderr


def test_every_entry_that_prints_takes_any_console():
    for path in [*(ROOT / "recipes").rglob("*.py"), ROOT / "upload.py"]:
        text = path.read_text(encoding="utf-8")
        if re.search(r"^if __name__ == .__main__.:", text, re.MULTILINE) and re.search(
            r"^ +print\(", text, re.MULTILINE
        ):
            is_fixed = "allow_any_console()" in text or 'reconfigure(errors="replace")' in text
            prints_json = all("json.dumps(" in line for line in re.findall(r"^ +print\(.*", text, re.MULTILINE))
            assert is_fixed or prints_json or "spaces" in path.parts, path
