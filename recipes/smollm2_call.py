"""One call of `smollm2_legs.py run`: what it was told, where things lie, and commands that end with its time.

Stands before the legs of `smollm2_stages.py`. Needs the standard library alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parent
CONFIGS = RECIPES / "configs"
PAUSED = 3  # exit status: the same command goes on
MARGIN = 1.0  # minutes for the step, the evaluation and the checkpoint that a stopped leg is at
# Places below the home folder; the recipes name them in the same words, and run there.
DATA, RUNS, SITE = Path("data/smollm2"), Path("runs/smollm2"), Path("site")
SOURCE, BACKBONE, GGUF = DATA / "source", DATA / "backbone", DATA / "gguf"
PUBLISHED, CORPUS = RUNS / "clara-smollm2-135m", RUNS / "corpus"
# Files that `prepare` must find, and the run that each leg starts from, or publishes.
FILES = ["corpus", "curriculum", "instruct", "pretrain_cloze", "pretrain_paraphrase", "pretrain_questions"]
FILES += ["pretrain_small", "reading", "retrieval", "retrieval_made", "retrieval_multihop", "retrieval_small"]
STARTS = {
    "pretrain": "curriculum", "instruct": "pretrain", "contrastive": "instruct", "joint": "contrastive",
    "joint-search": "joint", "joint-label-free": "instruct", "publish": "joint-search",
}  # fmt: skip


class Paused(Exception):
    """A leg's time is over; the same command goes on."""


@dataclass
class Call:
    """What one call of `run` was told.

    Attributes:
        home: folder with data/ and runs/; every command runs in it.
        deadline: `time.monotonic()` at which everything must be written.
        on_cpu: train in float32 on a CPU.
        scale: share of the training rows that `prepare` writes.
        limit: questions of every evaluation; None asks all.
        overrides: `key=value` of the training legs, which win over everything else.
        source: folder of the data; None where `receive` has brought it.
        variants: names of `configs/smollm2/variants.yaml` that a training leg tries in place of its own run.
        start: finished run that the leg starts from, or publishes, in place of the one before it.
    """

    home: Path
    deadline: float
    on_cpu: bool = False
    scale: float = 1.0
    limit: int | None = None
    overrides: Sequence[str] = ()
    source: Path | None = None
    variants: Sequence[str] = ()
    start: str | None = None

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def environment(self) -> dict[str, str]:
        """Of every command: what `receive` installed comes first, then this project."""
        paths = [str(self.home / SITE)] if (self.home / SITE).is_dir() else []
        given = os.environ.get("PYTHONPATH")
        offline = {"HF_HUB_OFFLINE": "1"} if (self.home / BACKBONE).is_dir() else {}
        return {
            **os.environ,
            **offline,
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT), *([given] if given else [])]),
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, script: str, *arguments: str | Path) -> None:
        """Run a recipe, or a module after "-m", in the home folder, interrupted when the time is over.

        Raises:
            Paused: the time is over.
            RuntimeError: it failed and has printed why.
        """
        if self.minutes_left() <= 0:
            raise Paused
        line = [sys.executable, script if script == "-m" else str(RECIPES / script), *map(str, arguments)]
        process = subprocess.Popen(line, cwd=self.home, env=self.environment())
        try:
            status = process.wait(timeout=60 * self.minutes_left())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the recipes keep what they have
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise Paused from None
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status == PAUSED:
            raise Paused
        if status:
            raise RuntimeError(f"{' '.join(line[1:3])} ended with status {status}")

    def start_of(self, leg: str) -> str:
        """The name of the finished run that a leg starts from: the one that was asked for, else the usual one.

        Raises:
            ValueError: it is not finished.
        """
        start = self.start or STARTS[leg]
        self.needs(start, start)
        return start

    def needs(self, run: str, leg: str) -> None:
        """Raise a ValueError unless the run that a leg starts from is finished."""
        if not is_finished(self.home / RUNS / run):
            raise ValueError(
                f"this leg needs {self.home / RUNS / run}, which is not finished. Run the leg {leg}, or bring the "
                "run with `pack --runs`."
            )


def is_finished(run: Path) -> bool:
    """Whether a training run wrote its last checkpoint."""
    return (run / "config.json").exists()


def start_of_run(run: Path) -> str | None:
    """The name of the run that a training run started from, by its run.json."""
    checkpoint = json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]["checkpoint"]
    return checkpoint and Path(checkpoint).name
