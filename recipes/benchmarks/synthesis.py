"""What synthesis costs beside the teacher's own time: our client against the bare one, at many requests at a time.

    python -m recipes.benchmarks.synthesis --concurrency 32 --latency 0.05

The endpoint is the loopback server of the tests, in a process of its own. Both clients send the same requests in turn.
"""

import argparse
import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import openai

from modeling_clara.synthesis.backends import Endpoint
from modeling_clara.synthesis.client import Teacher
from modeling_clara.synthesis.schemas import SIMPLE_PAIRS
from recipes.benchmarks.shared import add_outputs, describe_machine, figures, medians, ratio, show

SERVER = Path(__file__).parents[2] / "tests" / "teacher_server.py"
MODEL, MAX_TOKENS = "loopback-teacher", 256


def prompts(n: int) -> list[list[dict]]:
    """Messages of about 150 words, each over another document."""
    sentences = [f"The tower of place {number} was built in {1500 + number}." for number in range(12)]
    text = "Write one question and its answer for each fact of the document.\n<document>\n{}\n</document>"
    return [
        [{"role": "user", "content": text.format(f"Place {k} is a town. " + " ".join(sentences))}] for k in range(n)
    ]


async def bare(base_url: str, chats: list, concurrency: int, *, typed: bool = True) -> None:
    """The `openai` client and a semaphore: as its users call it, or without the typed reply, as ours calls it."""
    slots = asyncio.Semaphore(concurrency)
    form = {
        "type": "json_schema",
        "json_schema": {"name": SIMPLE_PAIRS["title"], "schema": SIMPLE_PAIRS, "strict": True},
    }
    options = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0.0, "response_format": form}
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def one(messages: list[dict]) -> str:
            body = {**options, "messages": messages}
            async with slots:
                if typed:
                    return (await client.chat.completions.create(**body)).choices[0].message.content
                reply = await client.post("/chat/completions", cast_to=object, body=body)
                return reply["choices"][0]["message"]["content"]

        await asyncio.gather(*map(one, chats))


async def ours(base_url: str, chats: list, concurrency: int) -> None:
    """The same through `Teacher`, with a budget to count."""
    async with Teacher(Endpoint(base_url), MODEL, concurrency=concurrency, max_tokens_total=10**12) as teacher:
        await asyncio.gather(*(teacher.complete(chat, schema=SIMPLE_PAIRS, max_tokens=MAX_TOKENS) for chat in chats))


def seconds_of(run: Callable[..., Awaitable], *arguments) -> tuple[float, float]:
    """Wall time and CPU time of this process."""
    start = time.perf_counter(), time.process_time()
    asyncio.run(run(*arguments))
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure_client(calls: int, concurrency: int, latency: float, rounds: int) -> dict:
    """Seconds of all calls with either client, round by round in turn after one round of warming up."""
    command = [sys.executable, str(SERVER), "--latency", str(latency)]
    runs = {"bare": bare, "untyped": functools.partial(bare, typed=False), "ours": ours}
    wall, cpu = ({name: [] for name in runs} for _ in range(2))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            arguments = server.stdout.readline().strip(), prompts(calls), concurrency
            for number in range(rounds + 1):
                first = number % len(runs)  # each of them begins a round
                for name in [*runs, *runs][first : first + len(runs)]:
                    seconds = seconds_of(runs[name], *arguments)
                    wall[name].append(seconds[0])
                    cpu[name].append(seconds[1])
        finally:
            server.kill()
    wall, cpu = ({name: values[1:] for name, values in found.items()} for found in (wall, cpu))
    return {
        "calls": calls,
        "concurrency": concurrency,
        "latency": latency,
        "ideal": calls / concurrency * latency,
        **medians(wall),
        "over_bare": ratio(wall["ours"], wall["bare"]) - 1,
        "over_untyped": ratio(wall["ours"], wall["untyped"]) - 1,
        **{f"cpu_{name}": seconds / calls * 1000 for name, seconds in medians(cpu).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=640, help="requests of a round")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the server takes")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every comparison")
    arguments = add_outputs(parser).parse_args()
    report = describe_machine()
    report["client"] = found = measure_client(
        arguments.calls, arguments.concurrency, arguments.latency, arguments.rounds
    )
    text = figures(
        "client | all calls | CPU of a call | ours takes more",
        "{name} | {wall:.2f} s | {cpu:.2f} ms | {more}",
        [
            {"name": "openai", "wall": found["bare"], "cpu": found["cpu_bare"], "more": f"{found['over_bare']:+.1%}"},
            {
                "name": "openai without typed replies",
                "wall": found["untyped"],
                "cpu": found["cpu_untyped"],
                "more": f"{found['over_untyped']:+.1%}",
            },
            {"name": "ours", "wall": found["ours"], "cpu": found["cpu_ours"], "more": ""},
        ],
    )
    show("synthesis", report, text, arguments)


if __name__ == "__main__":
    main()
