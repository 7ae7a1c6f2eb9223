"""Measures the runner of `clara synthesize`: `python -m recipes.benchmarks.synthesis_runs [--documents 100000]`.

The teacher is a function that answers at once, or after a latency: what is left is ours. Listed, sharded and resumed
are all documents; memory is the most that a run of its own process has held.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from transformers.utils import logging

from modeling_clara.synthesis import output, run
from modeling_clara.synthesis.client import Completion, Usage
from modeling_clara.synthesis.documents import iter_chunks, prepare
from modeling_clara.synthesis.outcome import Outcome
from recipes.benchmarks.shared import add_outputs, describe_machine, figures, read_rows, resident_bytes, show

CALLS = 4  # of a document
CONCURRENCY = 32


class Instant:
    """A teacher that answers after a latency; after `n_calls` it is gone."""

    def __init__(self, latency: float, n_calls: int | None = None):
        self.latency, self.left, self.usage = latency, n_calls, Usage()

    async def complete(self, messages, *, max_tokens: int, **_) -> Completion:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("the teacher is gone, as the benchmark wants it")
        await asyncio.sleep(self.latency)
        return Completion("an answer", "stop", 500, 50)

    async def close(self) -> None:
        pass


class Task:
    """A task of `CALLS` calls."""

    @staticmethod
    async def synthesize(chunk, asker, settings, *, guard=None) -> Outcome:
        for number in range(CALLS):
            messages = [{"role": "user", "content": f"{number} {chunk['text']}"}]
            await asker.complete(messages, max_tokens=50, temperature=0.0)
        return Outcome({"id": chunk["id"], "text": chunk["text"], "qas": []})


def write_documents(folder: Path, n: int) -> Path:
    """Documents out of the packaged passages."""
    rows = read_rows(None)
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for number in range(n):
            row = rows[number % len(rows)]
            file.write(json.dumps({"id": f"d{number}", "title": row["title"], "text": row["text"]}) + "\n")
    return folder / "documents.jsonl"


def open_run(documents: Path, folder: Path) -> run.Run:
    """A run of `Task`."""
    import modeling_clara.synthesis.engine  # noqa: F401 - seconds that are no run's

    logging.disable_progress_bar()
    opened = run.open_run(str(documents), str(folder), model="instant")
    opened.task = Task
    return opened


def measure_scale(n: int, queue) -> None:
    """Seconds to list and share n documents, and to take up a run of which all but the last 100 are done."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = open_run(write_documents(folder, n), folder / "data")
        work, start = opened.places.work, time.perf_counter()
        work.mkdir(parents=True)
        counts = prepare(work, opened.source, opened.splitter)
        listed = time.perf_counter() - start
        start = time.perf_counter()
        shared = sum(1 for _ in iter_chunks(work, 3, 8))
        shared_seconds = time.perf_counter() - start
        try:
            run.run_rank(opened, lambda: Instant(0.0, CALLS * (n - 100)), counts["chunks"], CONCURRENCY, None)
        except OSError:
            pass
        start = time.perf_counter()
        run.run_rank(opened, lambda: Instant(0.0), counts["chunks"], CONCURRENCY, None)
        resumed = time.perf_counter() - start
        start = time.perf_counter()
        report = output.finish(opened.places, opened.options, counts, {}, {})
        finished = time.perf_counter() - start
    assert report["accepted"] == n and shared == len(range(3, n, 8))
    queue.put(
        {
            "documents": n,
            "listed": listed,
            "shared": shared_seconds,
            "resumed": resumed,
            "finished": finished,
            "megabytes": resident_bytes("VmHWM") / 1e6,
        }
    )


def measure_overhead(n: int, latency: float, queue) -> None:
    """Seconds of n documents by the runner, and of the same calls by the bare teacher at the same concurrency."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = open_run(write_documents(folder, n), folder / "data")
        opened.places.work.mkdir(parents=True)
        counts = prepare(opened.places.work, opened.source, opened.splitter)
        chunks = [chunk for _, chunk in iter_chunks(opened.places.work)]

        async def bare() -> None:
            teacher, free = Instant(latency), asyncio.Semaphore(CONCURRENCY)

            async def one(chunk: dict) -> None:
                async with free:
                    await Task.synthesize(chunk, teacher, None)

            await asyncio.gather(*map(one, chunks))

        start = time.perf_counter()
        asyncio.run(bare())
        bare_seconds = time.perf_counter() - start
        start = time.perf_counter()
        run.run_rank(opened, lambda: Instant(latency), counts["chunks"], CONCURRENCY, None)
        ours = time.perf_counter() - start
    result = {"documents": n, "latency": latency, "bare": bare_seconds, "ours": ours}
    queue.put(result | {"more": ours / bare_seconds - 1})


def in_process(function, *args) -> dict:
    """What a function puts into a queue, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*args, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000, help="of the largest run (default: 100,000)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.1, 0.5, 2.0], help="seconds of a call")
    arguments = add_outputs(parser).parse_args()
    scales = [in_process(measure_scale, n) for n in (arguments.documents // 10, arguments.documents)]
    overheads = [
        in_process(measure_overhead, round(CONCURRENCY * 20 / latency / CALLS), latency)
        for latency in arguments.latency
    ]
    scale = figures(
        "documents | listed, s | one of 8 ranks, s | resumed, s | files written, s | most memory, MB",
        "{documents:,} | {listed:.1f} | {shared:.2f} | {resumed:.1f} | {finished:.1f} | {megabytes:.0f}",
        scales,
    )
    overhead = figures(
        "seconds a call | documents | bare, s | with the runner, s | more",
        "{latency} | {documents:,} | {bare:.2f} | {ours:.2f} | {more:.1%}",
        overheads,
    )
    report = describe_machine() | {"scale": scales, "overhead": overheads}
    show("synthesis runs", report, f"{scale}\n\n{CONCURRENCY} calls at a time:\n\n{overhead}", arguments)


if __name__ == "__main__":
    main()
