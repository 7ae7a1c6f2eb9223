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

    Without a total nothing is counted. `own_bar` is False if what is called draws a bar on a terminal itself.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, shown: bool = True, own_bar: bool = True
    ):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.stream, self.start, self.ended = sys.stderr, time.monotonic(), threading.Event()
        has_bar = total is not None and self.stream.isatty()
        self.bar = tqdm(
            total=total, desc=what, unit=f" {unit}", delay=2, leave=False, disable=not (shown and has_bar and own_bar)
        )
        self.thread = threading.Thread(target=self._write_lines, daemon=True) if shown and not has_bar else None

    def __enter__(self) -> "Progress":
        if self.thread:
            self.thread.start()
        return self

    def update(self, n: int = 1) -> None:
        self.done += n
        self.bar.update(n)

    def _write_lines(self) -> None:
        wait = FIRST
        while not self.ended.wait(wait):
            seconds = int(time.monotonic() - self.start)
            counts = "" if self.total is None else f": {self.done:,} of {self.total:,} {self.unit}"
            print(f"{self.what}{counts}, {seconds // 60}:{seconds % 60:02d} min", file=self.stream, flush=True)
            wait = EVERY

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join()
        self.bar.close()
