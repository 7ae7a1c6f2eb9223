"""The progress of an evaluation: a line now and then on standard error, with counts, and none for what is quick."""

import io
import re
import sys
import time

import pytest

from recipes.evaluation import progress as module
from recipes.evaluation.progress import Progress


def standard_error(monkeypatch, first: float, is_terminal: bool = False) -> io.StringIO:
    """Another standard error, and seconds until the first line and between lines."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(module, "FIRST", first)
    monkeypatch.setattr(module, "EVERY", first)
    return sys.stderr


def wait_for(stream: io.StringIO, pattern: str) -> None:
    until = time.monotonic() + 20
    while not re.search(pattern, stream.getvalue()):
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.005)


def test_lines_come_while_nothing_is_counted(monkeypatch):
    stream = standard_error(monkeypatch, 0.01)
    with Progress("answering", 1200, "questions") as progress:
        wait_for(stream, r"answering: 0 of 1,200 questions, \d+:\d\d min\nanswering: 0 of")
        progress.update(7)
        wait_for(stream, "answering: 7 of 1,200 questions")
    lines = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == lines  # the thread has ended
    with Progress("loading the model"):
        wait_for(stream, r"loading the model, \d+:\d\d min")


@pytest.mark.parametrize(
    "first, shown, is_terminal", [(module.FIRST, True, False), (0, False, False), (0, True, True)]
)
def test_what_is_quick_or_not_shown_or_on_a_terminal_writes_no_lines(monkeypatch, first, shown, is_terminal):
    stream = standard_error(monkeypatch, first, is_terminal)
    with Progress("answering", 2, "questions", shown=shown) as progress:
        progress.update(2)
        time.sleep(0.02)
    assert "min" not in stream.getvalue() and progress.done == 2
    assert is_terminal or stream.getvalue() == ""
