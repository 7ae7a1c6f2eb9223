"""Text for a terminal: whole words within its width. In a pipe or a file a line stays a line.

What is printed is the text of strangers: control characters, which could move the cursor or worse, become spaces.
"""

import re
import shutil
import sys
import unicodedata

WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # may be parted between any two
PARTS = re.compile(rf"\n| +|[{WIDE}]|[^ \n{WIDE}]+")


class Screen:
    """Prints text that comes in pieces, a word when it is complete; `screen("\\n")` prints what is left of a line.

    A line that is too long goes on below, behind the spaces that it began with and `hanging` more.
    """

    def __init__(self, hanging: int = 2):
        is_terminal = sys.stdout.isatty()
        self.width, self.hanging = shutil.get_terminal_size().columns if is_terminal else None, hanging
        self.word, self.gap, self.column, self.indent = "", 0, 0, 0  # gap: spaces that the next word has before it

    def __call__(self, text: str) -> None:
        text = without_controls(text)
        if self.width is None:
            _write(text)
            return
        for part in PARTS.findall(text):
            is_word = part[0] not in " \n" and columns(part[0]) == 1
            if not is_word:
                self._put(self.word)
                self.word = ""
            if part == "\n":
                _write("\n")
                self.gap = self.column = 0
            elif part[0] == " ":
                self.gap += len(part)
            elif is_word:
                self.word += part
            else:
                self._put(part)

    def _put(self, word: str) -> None:
        if not word:
            return
        if self.column == 0:
            self.indent = min(self.gap + self.hanging, self.width // 2)
        is_over = self.column + self.gap + columns(word) > self.width
        if is_over and self.column:
            self._break_line()
        _write(" " * self.gap)
        self.column += self.gap
        for part in word if is_over else [word]:  # letter by letter, because it may be longer than a line
            if is_over and self.column + columns(part) > self.width:
                self._break_line()
            _write(part)
            self.column += columns(part)
        self.gap = 0

    def _break_line(self) -> None:
        _write("\n" + " " * self.indent)
        self.column, self.gap = self.indent, 0


def one_line(text) -> str:
    """The text without line breaks, control characters and runs of spaces."""
    return " ".join(without_controls(str(text)).split())


def without_controls(text: str) -> str:
    """The text with a space for every control character but the line feed."""
    return "".join(" " if c != "\n" and unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def columns(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide letter, none for an accent of its own.

    >>> columns("Rome"), columns("東京"), columns("e\u0301")
    (4, 4, 1)
    """
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _write(text: str) -> None:
    print(text, end="", flush=True)
