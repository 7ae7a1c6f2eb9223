"""What a GPU makes of compressing and of a stage-1 step: `python -m recipes.benchmarks.gpu --data FILE`.

Everything side by side in one process, in bfloat16: products of matrices of the model's own shapes, bulk compression
with tokenising and without, stage-1 steps. Prints Markdown tables. It knows nothing of quality: its adapters are
untrained.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from modeling_clara import CLaRaForRAG
from modeling_clara.smollm2 import fetch_backbone
from recipes.benchmarks.shared import benchmark_parser, describe_machine, in_turn, linear_layers, read_rows, show
from recipes.benchmarks.training import optimizer_of, reader_of, set_dropout, step_flops, training_step
from recipes.evaluation.report import table
from recipes.training.collators import ReadingCollator

GEMM_TOKENS = 16384  # rows of the matrices, as many as a large pass has tokens
REPEATS = 5  # passes over all matrices in one measurement


def synchronized(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`run` to its end: a GPU works on after a call has returned."""

    def whole():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


def gemm_run(model: CLaRaForRAG, n_tokens: int) -> tuple[Callable[[], None], int]:
    """Products of all adapted layers with `n_tokens` rows, and their operations."""
    weights = linear_layers(model)
    device, dtype = weights[0].device, weights[0].dtype
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(n_tokens, width, device=device, dtype=dtype) for width in widths}

    @torch.no_grad()
    def gemm():
        for _ in range(REPEATS):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return synchronized(gemm, device), 2 * REPEATS * n_tokens * sum(weight.numel() for weight in weights)


def benchmark_compression(
    model: CLaRaForRAG, rows: Sequence[dict], batch_sizes: Sequence[int], rounds: int, n_tokens: int
) -> dict:
    """Documents per second and the share of the matrix products' rate, merged, for every batch size."""
    documents = [{"title": row.get("title", ""), "text": row["text"]} for row in rows]
    spans = [span for document in documents for span in model.processor.split_document(document)]
    memory_size, device = model.config.max_memory_size, model.memory_embeddings.device
    tokens = sum(span["n_tokens"] for span in spans) + memory_size * len(spans)
    work = 2 * tokens * sum(weight.numel() for weight in linear_layers(model))
    gemm, gemm_work = gemm_run(model, n_tokens)
    runs = {"gemm": gemm, "tokenise": lambda: model.processor.encode_documents(spans)}
    for size in batch_sizes:
        runs[f"compress {size}"] = synchronized(lambda size=size: model.compress(spans, batch_size=size), device)
    with model.bulk_compression():
        seconds = in_turn(runs, rounds)
    rate = gemm_work / statistics.median(seconds["gemm"])
    ways = []
    for size in batch_sizes:
        whole = statistics.median(seconds[f"compress {size}"])
        model_alone = max(whole - statistics.median(seconds["tokenise"]), 1e-9)
        ways.append(
            {
                "batch_size": size,
                "documents_per_second": len(spans) / whole,
                "tflops": work / whole / 1e12,
                "share_of_gemm": work / whole / rate,
                "share_without_tokenising": work / model_alone / rate,
            }
        )
    return {"spans": len(spans), "tokens": tokens, "gemm_tflops": rate / 1e12, "seconds": seconds, "ways": ways}


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
    reader = reader_of(model, "pretrain", targets=4)
    records = [record for index, row in enumerate(rows) if row["qas"] for record in reader(f"row {index}", row)[:1]]
    records = sorted((r for r in records if len(r["questions"]) == 4), key=lambda record: record["length"])
    middle = records[len(records) // 4 :]  # rows of similar length, as group_by_length puts them together
    collator, optimizer = ReadingCollator(model.processor, model.config.memory_sizes), optimizer_of(model)
    memory_size = model.config.max_memory_size
    gemm, gemm_work = gemm_run(model, n_tokens)
    runs, work = {"gemm": gemm}, {}
    for size in sizes:
        if size > len(middle):
            raise ValueError(f"--steps must be <= the {len(middle)} usable passages, got {size}. Lower it.")
        batch = on_device(collator(middle[:size]), device)
        work[size] = step_flops(model, batch, memory_size)

        def step(batch=batch):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                training_step(model, optimizer, batch, memory_size)

        runs[f"step {size}"] = synchronized(step, device)
    seconds = in_turn(runs, rounds)
    rate = gemm_work / statistics.median(seconds["gemm"])
    ways = []
    for size in sizes:
        flops, tokens = work[size]
        second = statistics.median(seconds[f"step {size}"])
        figures = {"seconds": second, "tokens_per_second": tokens / second, "tflops": flops / second / 1e12}
        ways.append({"documents": size, "tokens": tokens, **figures, "share_of_gemm": flops / second / rate})
    return {"gemm_tflops": rate / 1e12, "seconds": seconds, "ways": ways}


def on_device(value, device: torch.device):
    """A batch with all of its tensors on the device."""
    if isinstance(value, dict):
        return {key: on_device(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def render(report: dict) -> str:
    """The tables."""
    compression, steps = report["compression"], report["steps"]
    return "\n\n".join(
        [
            f"{report['machine']}, torch {report['versions']['torch']}, {report['dtype']}.",
            f"Bulk compression, {compression['spans']:,} chunks, {compression['tokens']:,} tokens, matrix products at "
            f"{compression['gemm_tflops']:.2f} TFLOP/s:",
            table(
                ["batch size", "chunks/s", "TFLOP/s", "share of the products' rate", "without tokenising"],
                [
                    [
                        way["batch_size"],
                        f"{way['documents_per_second']:,.1f}",
                        f"{way['tflops']:.2f}",
                        f"{100 * way['share_of_gemm']:.0f} %",
                        f"{100 * way['share_without_tokenising']:.0f} %",
                    ]
                    for way in compression["ways"]
                ],
            ),
            f"Stage-1 step, four questions a document, matrix products at {steps['gemm_tflops']:.2f} TFLOP/s:",
            table(
                ["documents", "tokens", "ms", "tokens/s", "TFLOP/s", "share of the products' rate"],
                [
                    [
                        way["documents"],
                        f"{way['tokens']:,}",
                        f"{1e3 * way['seconds']:.0f}",
                        f"{way['tokens_per_second']:,.0f}",
                        f"{way['tflops']:.2f}",
                        f"{100 * way['share_of_gemm']:.0f} %",
                    ]
                    for way in steps["ways"]
                ],
            ),
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone (default: bfloat16)")
    parser.add_argument("--limit", type=int, help="first passages of the file only")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024], help="documents of a pass")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64], help="documents of a stage-1 step")
    parser.add_argument("--gemm-tokens", type=int, default=GEMM_TOKENS, help=f"rows (default: {GEMM_TOKENS})")
    parser.add_argument("--attention", default="sdpa", help="attention implementation (default: sdpa)")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data must name passages with their questions (`qas`)")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = read_rows(arguments.data)[: arguments.limit]
    torch.manual_seed(0)
    model = CLaRaForRAG.from_backbone(
        arguments.backbone or fetch_backbone(),
        lora_rank=8,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attention,
    ).to(device)
    report = {
        **describe_machine(device),
        "data": Path(arguments.data).name,
        "dtype": arguments.dtype,
        "attention": arguments.attention,
        "compression": benchmark_compression(
            model, rows, arguments.batch_sizes, arguments.rounds, arguments.gemm_tokens
        ),
    }
    if arguments.output:  # kept, should the steps not fit into the memory
        Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report["steps"] = benchmark_steps(model, rows, arguments.steps, arguments.rounds, arguments.gemm_tokens)
    show("gpu", report, render(report), arguments)


if __name__ == "__main__":
    main()
