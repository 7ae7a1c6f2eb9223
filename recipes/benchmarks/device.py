"""Measures int8 weights on a CPU: `python -m recipes.benchmarks.device --model FOLDER --backbone FOLDER`.

Prints Markdown tables. Decoding is timed in seconds of the processor, side by side in one process, so that what else
runs on the machine takes no part but for the memory that it reads. Each resident size is that of a process of its own.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import GenerationConfig

from modeling_clara import CompressedCorpus
from modeling_clara.cli.models import load_model
from recipes.benchmarks import shared

QUESTION = "What is the capital of France?"
DOCUMENTS = ("Paris is the capital of France.", "Berlin is the capital of Germany.", "Rome is the capital of Italy.")
DTYPES = ("float32", "bfloat16", "int8")
PROBE = """
import json, re, sys
import torch
from modeling_clara.cli.models import load_model, silence_libraries

def sizes():
    text = open("/proc/self/status").read()
    return [int(re.search(rf"{name}:\\s+(\\d+)", text)[1]) / 1024 for name in ("RssAnon", "RssFile")]

silence_libraries()
torch.set_num_threads(1)
name, backbone, dtype, folder = sys.argv[1:]
found = {"imported": sizes()}
model = load_model(name, backbone=backbone or None, dtype=dtype)
found["loaded"] = sizes()
corpus = model.load_corpus(folder)
for index in range(4):
    model.answer([f"What is passage {index}?"], corpus=corpus, min_score=-1, max_new_tokens=32)
found["answered"] = sizes()
print(json.dumps(found))
"""


def rows_with_memories(model, n_chunks: int):
    """Documents of one chunk each whose memories, of three passages, are made different by noise."""
    memories = model.compress(list(DOCUMENTS))
    spread, generator = memories.flatten(0, 1).std(0), torch.Generator().manual_seed(0)
    for index in range(n_chunks):
        which = index % len(DOCUMENTS)
        noise = 0.5 * spread * torch.randn(memories.shape[1:], generator=generator)
        yield {"id": str(index), "text": f"{index}: {DOCUMENTS[which]}", "memory": memories[which] + noise}


def decode(models: dict, rounds: int, n_tokens: int = 64) -> dict[str, float]:
    """Milliseconds of the processor for each token after the first, from one memory, the models taking turns."""
    memory = models["float32"].compress(DOCUMENTS[:1])
    stored = [{"text": DOCUMENTS[0], "memory": memory[0]}]

    def seconds(model, length: int) -> float:
        forced = GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=False)
        start = time.process_time()
        model.answer([QUESTION], documents=stored, min_score=-1, generation_config=forced)
        return time.process_time() - start

    found = {name: [] for name in [*models, "float32, merged"]}
    for _ in range(rounds + 1):
        for name in found:
            model = models[name.partition(",")[0]]
            with model.bulk_answering() if "merged" in name else contextlib.nullcontext():
                found[name].append(1e3 * (seconds(model, n_tokens) - seconds(model, 1)) / (n_tokens - 1))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def resident(arguments: argparse.Namespace, folder: str, dtype: str) -> dict:
    """[anonymous, file-backed] MiB of a process after imports, loading, and answers from the corpus."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, arguments.model, arguments.backbone or "", dtype, folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def render(report: dict) -> str:
    """The tables."""
    speeds = [
        {"name": name, "ms": ms, "times": report["decode"]["float32"] / ms} for name, ms in report["decode"].items()
    ]
    sizes = [
        {
            "dtype": dtype,
            **{
                f"{part}_{kind}": value for part, pair in found.items() for kind, value in zip("af", pair, strict=True)
            },
        }
        for dtype, found in report["resident"].items()
    ]
    return "\n\n".join(
        [
            "Each further token of an answer, one question, in milliseconds of the processor:",
            shared.figures("weights | ms | times float32", "{name} | {ms:.1f} | {times:.2f}", speeds),
            f"Resident MiB of a process, anonymous + file-backed, with a corpus of {report['chunks']:,} chunks (64 "
            "vectors each, int8):",
            shared.figures(
                "weights | libraries | model loaded | corpus opened, 4 answers",
                "{dtype} | {imported_a:.0f} + {imported_f:.0f} | {loaded_a:.0f} + {loaded_f:.0f} | "
                "{answered_a:.0f} + {answered_f:.0f}",
                sizes,
            ),
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison (default: 5)")
    parser.add_argument("--chunks", type=int, default=10_000, help="of the corpus (default: 10000)")
    arguments = shared.add_outputs(parser).parse_args()
    torch.set_num_threads(1)
    models = {dtype: load_model(arguments.model, backbone=arguments.backbone, dtype=dtype) for dtype in DTYPES}
    report = shared.describe_machine() | {"chunks": arguments.chunks, "decode": decode(models, arguments.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        CompressedCorpus.build(models["float32"], rows_with_memories(models["float32"], arguments.chunks), folder)
        report["resident"] = {dtype: resident(arguments, folder, dtype) for dtype in DTYPES}
    shared.show("device", report, render(report), arguments)


if __name__ == "__main__":
    main()
