"""What is printed fits into 80 columns of a real pseudo-terminal, and is plain lines in a pipe."""

import doctest
import json
import os
import pty
import random
import re
import shutil
import sys
import threading

import pytest

from modeling_clara import cli
from modeling_clara.cli import info, terminal
from modeling_clara.cli.terminal import Screen, columns

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
WORDS = ["a", "the", "memory", "東京都", "e\u0301te\u0301", "x" * 130, "12,345", "\x1b[2J", "tab\tbed", "\u2028"]


def at_terminal(monkeypatch, function, n_columns: int = 80) -> str:
    """What a function prints to a pseudo-terminal; read to a mark, because closing may drop what was not read."""
    ours, theirs = pty.openpty()
    received, end = bytearray(), b"<end of the test>"

    def read():
        while not received.endswith(end):
            received.extend(os.read(ours, 1024))

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as stream:
        patch.setenv("COLUMNS", str(n_columns))
        patch.setattr(sys, "stdout", stream)
        try:
            function()
        finally:
            print(end.decode(), end="", file=stream, flush=True)
            reader.join()
    os.close(ours)
    return received.removesuffix(end).decode().replace("\r\n", "\n")


def in_pieces(text: str, generator: random.Random) -> list[str]:
    cuts = sorted(generator.sample(range(len(text) + 1), min(8, len(text))))
    return [text[first:last] for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_any_text_in_any_pieces_fits_and_nothing_is_lost(seed, monkeypatch):
    generator = random.Random(seed)
    lines = ["  " * generator.randrange(3) + " ".join(generator.choices(WORDS, k=30)) for _ in range(5)]
    text, width = "\n".join(lines) + "\n", generator.choice([20, 80])

    def show():
        screen = Screen(hanging=generator.choice([0, 2, 24]))
        for piece in in_pieces(text, generator):
            screen(piece)

    shown = at_terminal(monkeypatch, show, width)
    assert max(map(columns, shown.splitlines())) <= width and not CONTROL.search(shown)
    letters = [re.sub(r"\s", "", terminal.without_controls(part)) for part in (text, shown)]
    assert letters[0] == letters[1]
    for word in shown.split():  # whole words, unless they are longer than a line or may be parted
        assert word in "".join(WORDS) and (word in terminal.without_controls(text))


def test_the_same_text_in_a_pipe_stays_as_it_is(capsys):
    text = "  " + " ".join(["word"] * 60) + "\n\nend\n"
    Screen()(text[:33])
    Screen()(text[33:] + "\x1b[2J\x07\n")
    assert capsys.readouterr().out == text + " [2J \n"
    for module in (terminal, info):
        assert doctest.testmod(module).failed == 0


ROWS = [{"id": f"d{n}", "text": f"The city number {n} is the capital of country {n}."} for n in range(6)]


@pytest.fixture(scope="module")
def corpus(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("printed")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    arguments = ["compress", str(folder / "rows.jsonl"), "-o", str(folder / "corpus"), "--model", str(checkpoint)]
    assert cli.main([*arguments, "--source", "Names of many cities", "--license", "cc-by-sa-4.0"]) == 0
    return folder / "corpus"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    from tiny import save_backbone

    return save_backbone(tmp_path_factory.mktemp("wide"), max_position_embeddings=16384)


@pytest.mark.parametrize("command", ["info corpus", "info checkpoint", "info damaged", "ask", "demo"])
def test_what_commands_print_fits_a_terminal_and_a_pipe(
    command, corpus, checkpoint, checkpoint_copy, backbone, monkeypatch, capsys
):
    (checkpoint_copy / "clara.safetensors").unlink()
    calls = {
        "info corpus": ["info", corpus],
        "info checkpoint": ["info", checkpoint],
        "info damaged": ["info", checkpoint_copy],
        "ask": ["ask", corpus, "What is the capital of country 3? " * 4, "Why?", "--top-k", "3"],
        "demo": ["demo", "--backbone", backbone, "-q", "Who invented basketball?"],
    }
    arguments = list(map(str, calls[command]))
    shown = at_terminal(monkeypatch, lambda: cli.main(arguments))
    assert shown and max(map(columns, shown.splitlines())) <= 80 and not CONTROL.search(shown)
    capsys.readouterr()
    cli.main(arguments)
    printed = capsys.readouterr()
    assert not CONTROL.search(printed.out + printed.err)
    without_numbers = [re.sub(r"\s|[\d,.]+", "", text) for text in (shown, printed.out)]  # times differ
    assert without_numbers[0] == without_numbers[1]


def test_info_counts_what_a_person_wants_to_know(corpus, shared_model, tmp_path, capsys):
    corpus = shutil.copytree(corpus, tmp_path / "copy")
    capsys.readouterr()
    assert cli.main(["info", str(corpus), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    opened = shared_model.load_corpus(corpus)
    rows = list(opened.rows(["n_tokens", "text"]))
    assert report["tokens"] == sum(row["n_tokens"] for row in rows)
    assert report["text_bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert report["memory_bytes"] == len(rows) * 4 * opened.vector_bytes
    assert cli.main(["info", str(corpus)]) == 0
    printed = capsys.readouterr().out.splitlines()[:-1]
    lines = {line[: info.COLUMN].strip(): line[info.COLUMN :] for line in printed}
    assert lines["documents"] == "6" and lines["chunks"] == str(len(rows))
    assert lines["text"] == f"{report['tokens']:,} tokens, {report['text_bytes']} bytes"
    assert lines["memories"].endswith(" bytes, 4 vectors of 32 numbers a chunk, as int8")
    assert f" {report['memory_bytes'] / report['text_bytes']:.1f} bytes for a byte" in lines["memories to text"]
    opened.delete(["d0", "d5"])
    assert cli.main(["info", str(corpus), "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)
    left = [row for row in opened.rows(["n_tokens", "text"])]
    assert fewer["tokens"] == sum(row["n_tokens"] for row in left) < report["tokens"]
    assert fewer["memory_bytes"] * 6 == report["memory_bytes"] * 4 and set(fewer) == set(report)
    next((corpus / "data").iterdir()).unlink()
    assert cli.main(["info", str(corpus)]) == 1
    assert "must have" in capsys.readouterr().out
