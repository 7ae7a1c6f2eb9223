"""The progress of an evaluation: a line now and then on standard error, with counts, and none for what is quick."""

import io
import re
import sys
import time

import pytest

from recipes.evaluation import progress as module
from recipes.evaluation.progress import Progress


@pytest.fixture
def standard_error(monkeypatch):
    """A function, because pytest puts its own standard error in place again before a test begins."""

    def replace() -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return sys.stderr

    return replace


def wait_for(stream: io.StringIO, pattern: str) -> None:
    until = time.monotonic() + 20
    while not re.search(pattern, stream.getvalue()):
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.005)


def test_lines_come_while_nothing_is_counted(standard_error, monkeypatch):
    stream = standard_error()
    monkeypatch.setattr(module, "FIRST", 0.01)
    monkeypatch.setattr(module, "EVERY", 0.01)
    with Progress("answering", 1200, "questions") as progress:
        wait_for(stream, r"answering: 0 of 1,200 questions, \d+:\d\d min\nanswering: 0 of")
        progress.update(7)
        wait_for(stream, "answering: 7 of 1,200 questions")
    lines = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == lines  # the thread has ended
    with Progress("loading the model"):
        wait_for(stream, r"loading the model, \d+:\d\d min")


def test_what_is_quick_or_not_shown_writes_nothing(standard_error, monkeypatch):
    stream = standard_error()
    with Progress("answering", 2, "questions") as progress:
        progress.update(2)
    monkeypatch.setattr(module, "FIRST", 0.0)
    with Progress("answering", 2, "questions", shown=False):
        time.sleep(0.02)
    assert stream.getvalue() == ""


def test_on_a_terminal_there_are_no_lines(standard_error, monkeypatch):
    stream = standard_error()
    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with Progress("answering", 2, "questions") as progress:
        progress.update(2)
        time.sleep(0.02)
    assert "min" not in stream.getvalue() and progress.done == 2
