"""`clara ask CORPUS` as a chat: line by line in a pipe; at a real pseudo-terminal with prompt, 80 columns, Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import modeling_clara
from modeling_clara import CompressedCorpus, cli
from modeling_clara.adapters_clara import CallLock
from modeling_clara.cli.ask import PROMPT
from modeling_clara.cli.terminal import columns

ROOT = Path(modeling_clara.__file__).parents[1]
LONG = "reports of all offices/minutes of the meetings/second half/list of members of the board.xlsx#sheet=B"
ROWS = [
    {"id": "report.pdf", "title": "Rome", "text": "Rome is the capital of Italy.", "page": 3, "sheet": None},
    {"id": LONG, "title": "Members", "text": "Paris is the capital of France.", "page": None, "sheet": "B"},
    {"id": "beep", "title": "\x1b[31mred\x07\nline", "text": "Berlin is a city.", "page": None, "sheet": None},
]  # fmt: skip
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def corpus(checkpoint, tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    folder = tmp_path / "corpus"
    assert cli.main(["compress", str(tmp_path / "rows.jsonl"), "-o", str(folder), "--model", str(checkpoint)]) == 0
    return folder


class Lines(io.StringIO):
    """Standard input of a pipe; a line may be a function, which is called when it is its turn, and writes nothing."""

    def __init__(self, *lines):
        super().__init__()
        self.left = list(lines)

    def readline(self, *_):
        while self.left and callable(self.left[0]):
            self.left.pop(0)()
        return self.left.pop(0) + "\n" if self.left else ""


def ask(monkeypatch, capsys, lines, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", Lines(*lines))
    status = cli.main(["ask", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("below", [[], ["--expand-below", "1e-9"]])
def test_a_pipe_is_answered_line_by_line_as_single_calls_are(corpus, shared_model, monkeypatch, capsys, below):
    questions = ["What is the capital of Italy?", "And of France?"]
    lines = [questions[0], "", f"  {questions[1]} ", "/quit", "not asked"]
    options = [corpus, "--max-new-tokens", "8", "--expand", "1", *below]
    status, out, err = ask(monkeypatch, capsys, lines, *options, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["question"] for row in rows] == questions and PROMPT not in out + err
    opened = shared_model.load_corpus(corpus).with_options(hybrid=True)
    given = {"max_new_tokens": 8, "expand": 1, "expand_below": float(below[1]) if below else None}
    for row, answer in zip(rows, shared_model.answer(questions, corpus=opened, **given), strict=True):
        assert (row["answer"], row["prompt_tokens"]) == (answer.text, answer.prompt_tokens)
        assert row["confidence"] == pytest.approx(answer.confidence, rel=1e-3)
        assert row["sources"][0]["read_as"] == ("memory" if below else "text")
        assert [source["score"] for source in row["sources"]] == pytest.approx([s.score for s in answer.sources])
        assert [source["metadata"] for source in row["sources"]] == [source.metadata for source in answer.sources]
    assert cli.main(["ask", *map(str, options), *questions]) == 0
    printed = capsys.readouterr().out.splitlines()[:-1]  # without the time of the call
    shown = ask(monkeypatch, capsys, lines, *options)[1].splitlines()
    assert [line.split() for line in shown] == [line.split() for line in printed]


def test_ctrl_c_between_two_bytecodes_of_a_lock_loses_nothing(corpus, monkeypatch, capsys):
    """Where the signal raised at once, the lock would be held for ever."""
    enter, signals = CallLock.__enter__, []

    def interrupted(lock):
        enter(lock)
        if not signals and threading.current_thread() is threading.main_thread() and is_asking:
            signals.append(os.kill(os.getpid(), signal.SIGINT))

    is_asking = []
    monkeypatch.setattr(CallLock, "__enter__", interrupted)
    monkeypatch.setattr(Lines, "isatty", lambda lines: True)
    lines = [lambda: is_asking.append(1), "What is the capital of Italy?", "And of France?", "/quit"]
    status, out, err = ask(monkeypatch, capsys, lines, corpus, "--max-new-tokens", "8")
    assert status == 0 and signals and err.count("(stopped)") == 1 and out.count("prompt tokens") == 1


def test_what_changes_between_two_questions_is_found(corpus, shared_model, monkeypatch, capsys):
    changed = CompressedCorpus.open(corpus, model=shared_model)
    new = [{"id": "new", "text": "Oslo is the capital of Norway."}]
    lines = ["Oslo?", lambda: changed.add(new), "Oslo?", lambda: changed.delete(["new"]), "Oslo?"]
    _, out, _ = ask(monkeypatch, capsys, lines, corpus, "--json", "--top-k", "9", "--max-new-tokens", "2")
    found = [{source["document_id"] for source in json.loads(line)["sources"]} for line in out.splitlines()]
    assert found == [before := {row["id"] for row in ROWS}, before | {"new"}, before]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_is_wrong_with_one_question_does_not_end_the_chat(corpus, monkeypatch, capsys, options):
    lines = ["word " * 600, "Why?"]
    status, out, err = ask(monkeypatch, capsys, lines, corpus, "--max-new-tokens", "2", *options)
    assert status == 1 and "clara ask: " in err and "Traceback" not in err
    if options:
        first, second = map(json.loads, out.splitlines())
        assert "tokens" in first["problem"] and first["question"] == lines[0].strip() and "answer" in second
    else:
        assert out.rstrip().endswith("prompt tokens") and "\nWhy?\n" in out


def test_sources_say_where_they_stand_unless_the_id_does(corpus, monkeypatch, capsys):
    _, out, _ = ask(monkeypatch, capsys, ["Why?"], corpus, "--top-k", "3", "--max-new-tokens", "2")
    assert "  report.pdf, page 3  Rome\n" in out and f"  {LONG}  Members\n" in out
    assert "  beep  [31mred line\n" in out and not CONTROL.search(out)


def test_a_reader_who_leaves_is_no_error(corpus):
    command = [sys.executable, "-m", "modeling_clara.cli", "ask", str(corpus), "Why?", "--max-new-tokens", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and done.stderr.splitlines() == done.stderr.splitlines()[:1]  # the weights' line


class Terminal:
    """A process at a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "dumb"}
        command = [sys.executable, "-m", "modeling_clara.cli", *arguments]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        # whoever runs the tests in the background ignores Ctrl-C, and so would the command
        streams["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(theirs)

    def read_until(self, text: str | None, seconds: float = 120) -> str:
        """What comes next, up to a text or, with None, the end."""
        end, found = time.monotonic() + seconds, b""
        while text is None or text.encode() not in found.replace(b"\r\n", b"\n"):
            assert time.monotonic() < end, found
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    found += os.read(self.ours, 1)
                except OSError:  # the other side was closed
                    assert text is None, found
                    break
        return found.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@pytest.fixture
def chat(corpus):
    terminal = Terminal("ask", str(corpus), "--top-k", "3", "--max-new-tokens", "300")
    terminal.read_until("\n" + PROMPT)
    yield terminal
    terminal.process.kill()
    os.close(terminal.ours)


def test_a_chat_at_a_terminal(chat):
    """Answers and sources in 80 columns; Ctrl-C stops an answer while it streams, and a line; an empty line ends."""
    chat.type("What is the capital of France?\n")
    answer = chat.read_until("\n" + PROMPT)
    lines = answer.splitlines()
    assert lines[-2].endswith(" prompt tokens") and max(map(columns, lines)) <= 80
    assert " ".join(answer.split()).count(f"{LONG} Members") == 1 and "  report.pdf, page 3  Rome" in answer
    for _ in range(20):  # an answer may be done before the signal comes
        chat.type("What is the capital of Italy?\n")
        chat.read_until("\n  ")  # it has begun
        chat.process.send_signal(signal.SIGINT)
        if "(stopped)" in (stopped := chat.read_until("\n" + PROMPT)):
            break
    assert "(stopped)" in stopped and "prompt tokens" not in stopped and "Traceback" not in stopped
    chat.type("half a line")
    chat.read_until("half a line")
    time.sleep(1)  # readline does not see a signal that comes while it draws, before it waits for the next key
    chat.process.send_signal(signal.SIGINT)
    chat.read_until("\n" + PROMPT)
    chat.type("Why?\n")
    assert "prompt tokens" in chat.read_until("\n" + PROMPT)
    chat.type("\n")
    chat.read_until(None)
    assert chat.process.wait(20) == 0


def test_ctrl_d_ends_a_chat(chat):
    chat.type("\x04")
    chat.read_until(None)
    assert chat.process.wait(20) == 0
