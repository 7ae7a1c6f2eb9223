"""Measures the service: `python -m recipes.benchmarks.service --model MODEL --corpus CORPUS --clients 16`.

The same questions go to `model.answer` one by one, to the engine by one client and by many, with `--generator` to an
engine whose answers vLLM writes, and with `--url` to a running `clara serve` of the same model and corpus. All answers
must be equal to those of `model.answer` before anything was merged; otherwise the exit status is 1. `--ready` measures
how long `clara serve` takes to answer. It knows nothing of answer quality.
"""

import argparse
import asyncio
import contextlib
import itertools
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2
import numpy as np

from modeling_clara import CompressedCorpus
from modeling_clara.cli.models import load_model, load_model_of
from modeling_clara.service.engine import AskOptions, Engine
from modeling_clara.service.remote import RemoteGenerator
from recipes.benchmarks import shared
from recipes.evaluation.results import public_name

Ask = Callable[[str], Awaitable[str]]  # question to text
ALONE = "model.answer"


def direct(model, corpus, options: AskOptions) -> Ask:
    """`model.answer` of one question."""

    async def ask(question: str) -> str:
        given = {"expand": options.expand, "max_new_tokens": options.max_new_tokens, "top_k": options.top_k}
        return model.answer([question], corpus=corpus, **given)[0].text

    return ask


def through(engine: Engine, options: AskOptions) -> Ask:
    """The engine, in this process or with another server's generator."""

    async def ask(question: str) -> str:
        return (await engine.answer(question, options)).text

    return ask


@contextlib.asynccontextmanager
async def over_http(arguments: argparse.Namespace, options: AskOptions) -> AsyncIterator[Ask]:
    """Chat completions of a server; abstentions, which it puts into words, count as empty texts."""
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx2.Limits(max_connections=arguments.clients, max_keepalive_connections=arguments.clients)
    async with httpx2.AsyncClient(base_url=arguments.url, headers=headers, timeout=600, limits=limits) as client:
        name = (await client.get("models")).raise_for_status().json()["data"][0]["id"]
        body = {"model": name, "max_completion_tokens": options.max_new_tokens, "expand": options.expand}
        body |= {} if options.top_k is None else {"top_k": options.top_k}

        async def ask(question: str) -> str:
            turns = [{"role": "user", "content": question}]
            response = await client.post("chat/completions", json={**body, "messages": turns})
            reply = response.raise_for_status().json()
            return reply["choices"][0]["message"]["content"] if reply["sources"] else ""

        yield ask


async def ask_all(ask: Ask, questions: list[str], n_clients: int) -> tuple[float, list[float], list[str]]:
    """Seconds of all, seconds of each, and the texts; every client asks its next question when it has its answer."""
    texts, seconds, numbers = [""] * len(questions), [0.0] * len(questions), iter(range(len(questions)))

    async def client() -> None:
        for number in numbers:
            start = time.perf_counter()
            texts[number] = await ask(questions[number])
            seconds[number] = time.perf_counter() - start

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    return time.perf_counter() - start, seconds, texts


async def measure(model, corpus, questions: list[str], arguments: argparse.Namespace) -> list[dict]:
    """A row for each way to ask, the ways taking turns in every round after one warm-up."""
    options = AskOptions(max_new_tokens=arguments.max_new_tokens, expand=arguments.expand, top_k=arguments.top_k)
    wanted = (await ask_all(direct(model, corpus, options), questions, 1))[2]
    async with contextlib.AsyncExitStack() as stack:
        limits = {"max_batch": arguments.max_batch, "max_queue": max(64, arguments.clients)}
        limits |= {"merge": not arguments.unmerged, "prefix_bytes": arguments.prefix_mb * 2**20}
        engine = await stack.enter_async_context(Engine(model, corpus, **limits))

        many = f"{arguments.clients} clients"
        ask = through(engine, options)
        ways = {ALONE: (direct(model, corpus, options), 1)}
        ways |= {"engine, 1 client": (ask, 1), f"engine, {many}": (ask, arguments.clients)}
        if arguments.generator:
            remote = RemoteGenerator(arguments.generator, timeout=600)  # what is merged is merged already
            engine = Engine(model, corpus, **limits | {"merge": False}, generator=remote)
            ask = through(await stack.enter_async_context(engine), options)
            ways |= {"generator, 1 client": (ask, 1), f"generator, {many}": (ask, arguments.clients)}
        if arguments.url:
            ask = await stack.enter_async_context(over_http(arguments, options))
            ways |= {"HTTP, 1 client": (ask, 1), f"HTTP, {many}": (ask, arguments.clients)}
        rounds = {name: [] for name in ways}
        for number, (name, way) in itertools.product(range(arguments.rounds + 1), ways.items()):
            found = await ask_all(way[0], questions, way[1])
            if number:
                rounds[name].append(found)
        if arguments.check:
            asked = list(itertools.islice(itertools.cycle(questions), arguments.check))
            name, way = list(ways.items())[-1]
            rounds[f"{name}, check"] = [await ask_all(way[0], asked, way[1])]
    return [summarize(name, found, rounds, wanted) for name, found in rounds.items()]


def summarize(name: str, found: list[tuple], rounds: dict[str, list[tuple]], wanted: list[str]) -> dict:
    """Figures of one way to ask; ratios and differences are medians over the rounds, which all ways share."""
    seconds = [total / len(each) for total, each, _ in found]
    texts = [text for *_, texts in found for text in texts]
    n_different = sum(text != expected for text, expected in zip(texts, itertools.cycle(wanted), strict=False))
    each = [1e3 * second for _, each, _ in found for second in each]
    base = rounds[name.replace("check", "").split(",")[0] + ", 1 client"] if name != ALONE else rounds[ALONE]

    def times(below: list[tuple]) -> float:
        pairs = zip(below, seconds, strict=False)
        return statistics.median(total / len(each) / second for (total, each, _), second in pairs)

    later = [
        1e3 * (one - other)
        for (_, ours, _), (_, theirs, _) in zip(found, rounds[ALONE], strict=False)
        for one, other in zip(ours, theirs, strict=False)
    ]
    return {
        "way": name,
        "answers": len(texts),
        "per_second": 1 / statistics.median(seconds),
        "times_direct": times(rounds[ALONE]),
        "times_one_client": times(base),
        "p50_ms": statistics.median(each),
        "p95_ms": float(np.percentile(each, 95)),
        "later_ms": statistics.median(later),
        "different": n_different,
    }


LOAD = """
import sys
from modeling_clara import CompressedCorpus
from modeling_clara.cli.models import load_model_of
corpus = CompressedCorpus.open(sys.argv[1])
corpus.attach(load_model_of(corpus, sys.argv[2] or None, sys.argv[3] or None, dtype=sys.argv[4] or None))
print("loaded", flush=True)
"""


def seconds_until(command: list[str], is_there: Callable[[subprocess.Popen], None]) -> float:
    """From the start of a process until `is_there` returns; the process is ended."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        is_there(process)
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)
        process.communicate()
    return seconds


def measure_ready(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds until `/health` of `clara serve` answers, until another process has loaded, and between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--model": arguments.model, "--backbone": arguments.backbone, "--dtype": arguments.dtype}
    given = [word for name, value in options.items() if value for word in (name, value)]
    serve = [sys.executable, "-m", "modeling_clara.cli", "serve", arguments.corpus, "--port", str(port), *given]
    load = [sys.executable, "-c", LOAD, arguments.corpus, *(value or "" for value in options.values())]

    def is_healthy(process: subprocess.Popen) -> None:
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                return
            time.sleep(0.01)
        raise RuntimeError(f"`clara serve` must run, ended with status {process.returncode}. Start it by hand.")

    pairs = [
        (seconds_until(serve, is_healthy), seconds_until(load, lambda process: process.stdout.readline()))
        for _ in range(arguments.ready + 1)
    ][1:]
    served, loaded = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ready": served, "loaded": loaded, "beyond": statistics.median(one - other for one, other in pairs)}


def render(rows: list[dict]) -> str:
    """A Markdown table."""
    head = (
        "way | answers | answers/s | times model.answer | times 1 client | p50 | p95 | beyond model.answer | different"
    )
    cells = "{way} | {answers:,} | {per_second:.2f} | {times_direct:.2f} | {times_one_client:.2f} | {p50_ms:.0f} ms | "
    return shared.figures(head, cells + "{p95_ms:.0f} ms | {later_ms:+.1f} ms | {different}", rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the one that made the corpus)")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    parser.add_argument("--dtype", help="of the backbone's weights, as in `clara ask`")
    parser.add_argument("--corpus", help="of this model (default: built of the packaged passages; needs --model)")
    parser.add_argument("--questions", help="JSONL with `question` (default: those of the packaged passages)")
    parser.add_argument("--number", type=int, default=48, help="different questions (default: 48)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time (default: 16)")
    parser.add_argument("--max-batch", type=int, default=16, help="answers that are written together (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways (default: 3)")
    parser.add_argument("--top-k", type=int, help="documents that are read (default: the model's)")
    parser.add_argument("--expand", type=int, default=0, help="best sources that are read as text (default: 0)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (default: 64)")
    parser.add_argument("--unmerged", action="store_true", help="keep the adapters beside the weights")
    parser.add_argument("--prefix-mb", type=int, default=256, help="for beginnings of prompts (default: 256)")
    parser.add_argument(
        "--generator", help="also write answers with the merged generator on vLLM: http://HOST:PORT/v1"
    )
    parser.add_argument("--url", help="also ask a running service: http://HOST:PORT/v1")
    parser.add_argument("--api-key", help="of that service")
    parser.add_argument("--check", type=int, default=0, help="requests of a last run, such as 10000, of the last way")
    parser.add_argument("--ready", type=int, default=0, help="starts of `clara serve` that are timed; needs --corpus")
    arguments = shared.add_outputs(parser).parse_args()
    if not (arguments.model or arguments.corpus):
        parser.error("--model or --corpus must be given")
    if arguments.ready and not arguments.corpus:
        parser.error("--ready needs --corpus")
    return arguments


def main() -> int:
    """Parse, measure, print; returns the exit status."""
    arguments = parse_arguments()
    rows = shared.read_rows(arguments.questions)
    questions = [row["question"] for row in rows if "question" in row]
    questions += [asked["question"] for row in rows for asked in row.get("questions", ())]
    options = {"backbone": arguments.backbone, "dtype": arguments.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.corpus:
            corpus = CompressedCorpus.open(arguments.corpus)
            model = load_model_of(corpus, arguments.model, **options)
            corpus.attach(model)
        else:
            model = load_model(arguments.model, **options)
            documents = [{name: row[name] for name in ("id", "title", "text")} for row in shared.read_rows(None)]
            corpus = CompressedCorpus.build(model, documents, Path(folder) / "corpus")
        found = asyncio.run(measure(model, corpus, questions[: arguments.number], arguments))
    report = {**shared.describe_machine(), "data": Path(arguments.questions or shared.PASSAGES).name, "ways": found}
    name = public_name(str(model.name_or_path))
    text = f"{name}, {len(corpus):,} documents, {arguments.clients} clients.\n\n{render(found)}"
    if arguments.ready:
        report["ready"] = measure_ready(arguments)
        line = (
            "Ready after {ready:.1f} s; another process had loaded after {loaded:.1f} s; between them {beyond:.1f} s."
        )
        text += f"\n\n{line.format(**report['ready'])}"
    shared.show(f"service of {name}", report, text, arguments)
    return int(any(row["different"] for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
