"""What a GPU makes of compressing and of a stage-1 step: `python -m recipes.benchmarks.gpu --data FILE`.

Everything side by side in one process, in bfloat16: products of matrices of the model's own shapes, bulk compression
with tokenising and without, stage-1 steps. Prints Markdown tables. It knows nothing of quality: its adapters are
untrained.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device

from modeling_clara import CLaRaForRAG
from recipes.benchmarks import shared
from recipes.benchmarks.shared import in_turn, linear_layers, medians
from recipes.benchmarks.training import optimizer_of, reading_records, set_dropout, step_flops, training_step
from recipes.training.collators import ReadingCollator

GEMM_TOKENS = 16384  # rows of the matrices, as many as a large pass has tokens
REPEATS = 5  # passes over all matrices in one measurement


def benchmark_compression(
    model: CLaRaForRAG, rows: Sequence[dict], batch_sizes: Sequence[int], rounds: int, n_tokens: int
) -> dict:
    """Documents per second and the share of the matrix products' rate, merged, for every batch size."""
    chunks = shared.split_rows(model, rows)
    tokens = sum(chunk["n_tokens"] for chunk in chunks) + model.config.max_memory_size * len(chunks)
    gemm, gemm_work = shared.gemm_run(model, n_tokens, REPEATS)
    work = gemm_work * tokens / (REPEATS * n_tokens)
    runs = {"gemm": gemm, "tokenise": lambda: model.processor.encode_documents(chunks)}
    for size in batch_sizes:
        runs[f"compress {size}"] = lambda size=size: model.compress(chunks, batch_size=size)
    with model.bulk_compression():
        seconds = in_turn(runs, rounds)
    median = medians(seconds)
    rate, ways = gemm_work / median["gemm"], []
    for size in batch_sizes:
        whole = median[f"compress {size}"]
        speed, alone = work / whole, work / max(whole - median["tokenise"], 1e-9)
        shares = {"share_of_gemm": speed / rate, "share_without_tokenising": alone / rate}
        speeds = {"documents_per_second": len(chunks) / whole, "tflops": speed / 1e12}
        ways.append({"batch_size": size, **speeds, **shares})
    return {"spans": len(chunks), "tokens": tokens, "gemm_tflops": rate / 1e12, "seconds": seconds, "ways": ways}


def benchmark_steps(
    model: CLaRaForRAG, rows: Sequence[dict], sizes: Sequence[int], rounds: int, n_tokens: int
) -> dict:
    """Stage-1 steps of so many documents with four questions each: tokens per second and operations per second."""
    model.set_trainable_roles(("compressor", "generator"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_dropout(model, 0.0)
    device, dtype = model.memory_embeddings.device, linear_layers(model)[0].dtype
    records = sorted(reading_records(model, [row for row in rows if row["qas"]]), key=lambda record: record["length"])
    middle = records[len(records) // 4 :]  # rows of similar length, as group_by_length puts them together
    if max(sizes) > len(middle):
        raise ValueError(f"--steps must be <= the {len(middle)} usable passages, got {max(sizes)}. Lower it.")
    collator, optimizer = ReadingCollator(model.processor, model.config.memory_sizes), optimizer_of(model)
    memory_size = model.config.max_memory_size
    batches = {size: send_to_device(dict(collator(middle[:size])), device) for size in sizes}
    gemm, gemm_work = shared.gemm_run(model, n_tokens, REPEATS)

    def step(size: int):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            training_step(model, optimizer, batches[size], memory_size)

    runs = {"gemm": gemm} | {f"step {size}": lambda size=size: step(size) for size in sizes}
    seconds = in_turn(runs, rounds)
    median = medians(seconds)
    rate, ways = gemm_work / median["gemm"], []
    for size, batch in batches.items():
        flops, tokens = step_flops(model, batch, memory_size)
        second = median[f"step {size}"]
        speeds = {"tokens_per_second": tokens / second, "tflops": flops / second / 1e12}
        share = {"share_of_gemm": flops / second / rate}
        ways.append({"documents": size, "tokens": tokens, "seconds": second, **speeds, **share})
    return {"gemm_tflops": rate / 1e12, "seconds": seconds, "ways": ways}


def render(report: dict) -> str:
    """The tables."""
    compression, steps = report["compression"], report["steps"]
    return "\n\n".join(
        [
            f"{report['machine']}, torch {report['versions']['torch']}, {report['dtype']}.",
            f"Bulk compression, {compression['spans']:,} chunks, {compression['tokens']:,} tokens, matrix products at "
            f"{compression['gemm_tflops']:.2f} TFLOP/s:",
            shared.figures(
                "batch size | chunks/s | TFLOP/s | share of the products' rate | without tokenising",
                "{batch_size} | {documents_per_second:,.1f} | {tflops:.2f} | {share_of_gemm:.0%} | "
                "{share_without_tokenising:.0%}",
                compression["ways"],
            ),
            f"Stage-1 step, four questions a document, matrix products at {steps['gemm_tflops']:.2f} TFLOP/s:",
            shared.figures(
                "documents | tokens | ms | tokens/s | TFLOP/s | share of the products' rate",
                "{documents} | {tokens:,} | {ms:.0f} | {tokens_per_second:,.0f} | {tflops:.2f} | {share_of_gemm:.0%}",
                [{**way, "ms": 1e3 * way["seconds"]} for way in steps["ways"]],
            ),
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = shared.benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone (default: bfloat16)")
    parser.add_argument("--limit", type=int, help="first passages of the file only")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024], help="documents of a pass")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64], help="documents of a stage-1 step")
    parser.add_argument("--gemm-tokens", type=int, default=GEMM_TOKENS, help=f"rows (default: {GEMM_TOKENS})")
    parser.add_argument("--attention", default="sdpa", help="attention implementation (default: sdpa)")
    arguments = shared.parse_with_data(parser, "passages with their questions (`qas`)")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"lora_rank": 8, "dtype": getattr(torch, arguments.dtype), "attn_implementation": arguments.attention}
    rows, model, report = shared.load_subject(arguments, device, **options)
    rows, sizes = rows[: arguments.limit], (arguments.rounds, arguments.gemm_tokens)
    report |= {"dtype": arguments.dtype, "attention": arguments.attention}
    report["compression"] = benchmark_compression(model, rows, arguments.batch_sizes, *sizes)
    if arguments.output:  # kept, should the steps not fit into the memory
        Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report["steps"] = benchmark_steps(model, rows, arguments.steps, *sizes)
    shared.show("gpu", report, render(report), arguments)


if __name__ == "__main__":
    main()
