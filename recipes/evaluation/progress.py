"""Progress of long work: a bar on a terminal, elsewhere and without counts a line on standard error every 30 seconds.

The lines come from a thread, so that work that does not count for minutes, such as one large batch, is seen too.
"""

import sys
import threading
import time

from transformers.utils.logging import tqdm

FIRST, EVERY = 5.0, 30.0  # seconds until the first line, and between lines


class Progress:
    """Context that counts work: `with Progress("answering", 200, "questions") as progress: ... progress.update(4)`.

    Args:
        what: is done.
        total: of what is counted; None if nothing is.
        unit: of the counts.
        shown: False in all processes but one.
        own_bar: False if what is called draws a bar on a terminal itself.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, shown: bool = True, own_bar: bool = True
    ):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.stream, self.start, self.ended = sys.stderr, time.monotonic(), threading.Event()
        on_terminal, self.bar, self.thread = self.stream.isatty(), None, None
        if shown and on_terminal and own_bar and total is not None:
            self.bar = tqdm(total=total, desc=what, unit=f" {unit}", delay=2, leave=False)
        elif shown and (total is None or not on_terminal):
            self.thread = threading.Thread(target=self._write_lines, daemon=True)

    def __enter__(self) -> "Progress":
        if self.thread is not None:
            self.thread.start()
        return self

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)

    def line(self) -> str:
        """What is done, how much of it and for how long."""
        seconds = int(time.monotonic() - self.start)
        counts = "" if self.total is None else f": {self.done:,} of {self.total:,} {self.unit}"
        return f"{self.what}{counts}, {seconds // 60}:{seconds % 60:02d} min"

    def _write_lines(self) -> None:
        wait = FIRST
        while not self.ended.wait(wait):
            print(self.line(), file=self.stream, flush=True)
            wait = EVERY

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
        if self.bar is not None:
            self.bar.close()
