"""`clara sync`, `add`, `update`, `delete`, `--strict`: what they do and say, and what a reader finds meanwhile."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modeling_clara import CompressedCorpus, cli


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def notes(tmp_path) -> Path:
    write(tmp_path / "notes" / "rome.txt", "Rome is the capital of Italy.")
    write(tmp_path / "notes" / "deep" / "paris.md", "Paris is the capital of France.")
    write(tmp_path / "notes" / "rows.csv", "id,text,year\nr1,Oslo is in Norway.,1814\nr2,Lima is in Peru.,1535\n")
    return tmp_path / "notes"


@pytest.fixture
def synced(notes, checkpoint, capsys) -> Path:
    folder = notes.parent / "corpus"
    assert cli.main(["sync", str(notes), str(folder), "--model", str(checkpoint)]) == 0
    assert "4 documents of 3 files" in capsys.readouterr().out
    return folder


def run(capsys, *arguments: str, status: int = 0) -> str:
    assert cli.main([*map(str, arguments)]) == status, capsys.readouterr().err
    return capsys.readouterr().out


def test_sync_says_what_it_will_do_and_does_it(notes, synced, capsys, monkeypatch):
    with monkeypatch.context() as without:  # nothing has to be compressed
        without.setattr(cli.changes, "open_for_change", None)
        assert run(capsys, "sync", notes, synced) == "nothing has changed\n"
    write(notes / "rome.txt", "Rome has been the capital since 1871.")
    write(notes / "new.txt", "Bern is the seat of the government.")
    (notes / "deep" / "paris.md").unlink()
    planned = run(capsys, "sync", notes, synced, "--dry-run")
    assert [line.split() for line in planned.splitlines()] == [
        ["add", "1", "files"], ["new.txt"], ["update", "1", "files"], ["rome.txt"],
        ["delete", "1", "files"], ["deep/paris.md"], ["keep", "1", "files"], ["leave", "out", "0", "files"],
    ]  # fmt: skip
    assert len(CompressedCorpus.open(synced)) == 4
    report = json.loads(run(capsys, "sync", notes, synced, "--json"))
    assert report == {"added": 2, "deleted": 1, "unchanged": 0, "left_out": {}, "documents": 4}
    assert set(CompressedCorpus.open(synced).document_ids()) == {"rome.txt", "new.txt", "r1", "r2"}


def test_what_could_not_be_read_is_counted_and_strict_makes_it_an_error(notes, synced, capsys):
    write(notes / "empty.md", " ")
    write(notes / "tool.exe", "MZ")
    write(notes / ".git" / "config", "[core]")
    write(notes / "broken.json", "{")
    printed = run(capsys, "sync", notes, synced)
    assert "left out: 1 empty, 1 failed, 1 skipped, 1 unsupported (1 .exe)" in printed
    assert run(capsys, "sync", notes, synced) == "nothing has changed; 2 files are left out\n"
    model = CompressedCorpus.open(synced).manifest.compressor["name_or_path"]
    other = [notes, "-o", notes.parent / "other", "--model", model]
    printed = run(capsys, "compress", *other, "--strict", status=1)
    assert "left out: 1 empty, 1 failed, 1 skipped, 1 unsupported (1 .exe)" in printed
    for name in ("empty.md", "tool.exe", "broken.json"):
        (notes / name).unlink()
    other[2] = notes.parent / "third"
    run(capsys, "compress", *other, "--strict")  # what is hidden is meant to be skipped


def test_documents_are_added_updated_and_deleted(notes, synced, capsys, tmp_path):
    rows = tmp_path / "more.jsonl"
    write(rows, '{"id": "r1", "text": "Oslo lies on a fjord."}\n{"id": "x", "text": "Cairo is in Egypt."}\n')
    assert json.loads(run(capsys, "add", synced, rows, "--json"))["left_out"] == {"failed": 1}
    assert run(capsys, "update", synced, rows).startswith("2 documents compressed, 0 deleted")
    corpus = CompressedCorpus.open(synced)
    assert corpus.get(["r1"])[0]["spans"][0]["text"] == "Oslo lies on a fjord." and "x" in corpus
    assert json.loads(run(capsys, "update", synced, rows, "--upsert", "--json"))["unchanged"] == 2
    printed = run(capsys, "delete", synced, "x", "r1")
    assert "2 documents deleted" in printed and "--compact" in printed
    shards = b"".join(path.read_bytes() for path in (synced / "data").iterdir())
    run(capsys, "delete", synced, "--compact")
    assert sum(path.stat().st_size for path in (synced / "data").iterdir()) < len(shards)
    assert set(CompressedCorpus.open(synced).document_ids()) == {"rome.txt", "deep/paris.md", "r2"}
    assert cli.main(["delete", str(synced)]) == 1 and "`ids` must be given" in capsys.readouterr().err
    assert cli.main(["delete", str(synced), "nobody"]) == 1 and "'nobody' is none" in capsys.readouterr().err


def test_the_first_sync_needs_a_model_and_a_folder(notes, tmp_path, capsys):
    assert cli.main(["sync", str(notes), str(tmp_path / "c")]) == 1
    assert "`--model` must be given, because there is no corpus" in capsys.readouterr().err
    assert cli.main(["sync", str(tmp_path / "nowhere"), str(tmp_path / "c"), "--model", "x"]) == 1


def test_a_watch_is_found_by_a_query(notes, synced, checkpoint):
    """A real process watches; a reader that is open finds the change."""
    command = [sys.executable, "-m", "modeling_clara.cli", "sync", str(notes), str(synced), "--watch", "0.2"]
    reader = CompressedCorpus.open(synced)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            assert _next_line(process, "nothing has changed")
            write(notes / "bern.txt", "Bern is in Switzerland.")
            assert _next_line(process, "1 documents compressed")
            assert "bern.txt" in reader.refresh()
            (notes / "bern.txt").unlink()
            assert _next_line(process, "1 deleted")
            assert "bern.txt" not in reader.refresh() and reader.verify() == []
        finally:
            watchdog.cancel()
            process.kill()


def _next_line(process, wanted: str) -> bool:
    """Whether the process prints what is wanted before it ends."""
    return any(wanted in line for line in iter(process.stdout.readline, ""))
