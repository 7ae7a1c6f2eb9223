"""Measures training steps, side by side in one process: `python -m recipes.benchmarks.training --data FILE`.

Real backbone, real passages, the batches and the `forward` of the recipes; prints Markdown tables. Three comparisons:
a stage-1 step against its own arithmetic at the GEMM speed of the same run; the same targets in padded rows of one
prompt, in padded rows with a common prefix, and packed; a joint step on stored memories against one that compresses
its candidates. It knows nothing of quality.
"""

import contextlib
import ctypes
import gc
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

import modeling_clara.passes_clara as passes
from modeling_clara import CLaRaForRAG
from recipes.benchmarks.shared import benchmark_parser, in_turn, linear_layers, load_subject, ratio, show
from recipes.evaluation.report import table
from recipes.training.collators import ReadingCollator, SelectingCollator
from recipes.training.data import document_key
from recipes.training.memories import compress_documents
from recipes.training.records import RecordReader

N_CANDIDATES = 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_above(run: Callable[[], object]) -> int:
    """Highest resident memory while `run` runs, above what it was before, sampled every 10 ms in a thread."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system first (glibc)
    base, done = resident_bytes(), threading.Event()
    highest = [base]

    def watch():
        while not done.wait(0.01):
            highest[0] = max(highest[0], resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return highest[0] - base


def training_step(model: CLaRaForRAG, optimizer, batch: dict, memory_size: int) -> float:
    """Forward, backward, clip and update as a Trainer's step; returns the loss."""
    model.train()
    loss = loss_of(model, batch, memory_size)
    update(model, optimizer, loss)
    return float(loss.detach())


def loss_of(model: CLaRaForRAG, batch: dict, memory_size: int) -> torch.Tensor:
    """The loss of a collator's batch."""
    layout = {name: value for name, value in batch.items() if name not in ("prompts", "labels", "positive_mask")}
    if "prompts" in batch:
        layout |= batch["prompts"][memory_size]
    return model(**layout, memory_size=memory_size).loss


def update(model: CLaRaForRAG, optimizer, loss: torch.Tensor) -> None:
    """Backward, clip and update."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def padded_passes() -> Iterator[None]:
    """Context: no training pass packs its rows, which is how they run everywhere but on a CPU."""
    before, passes.can_pack = passes.can_pack, lambda *_: False
    try:
        yield
    finally:
        passes.can_pack = before


def optimizer_of(model: CLaRaForRAG) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def reader_of(model: CLaRaForRAG, stage: str, targets: int = 1) -> RecordReader:
    return RecordReader(
        model.processor,
        stage,
        window=model.config.text_config.max_position_embeddings,
        memory_size=model.config.max_memory_size,
        top_k=model.config.retrieval_top_k,
        targets_per_document=targets,
        num_candidates=N_CANDIDATES,
    )


def set_dropout(model: CLaRaForRAG, probability: float) -> None:
    """The LoRA dropout of all roles; the backbone has none."""
    for layer in model.roles.layers:
        for role in layer.lora_dropout:
            layer.lora_dropout[role] = torch.nn.Dropout(probability) if probability else torch.nn.Identity()


def step_flops(model: CLaRaForRAG, batch: dict, memory_size: int) -> tuple[int, int]:
    """(operations, tokens) of a stage-1 step, padding left out.

    Forward, and backward for the inputs, of every linear layer (its own weights are frozen); three times the LoRA
    products; the LM head, both ways, on target positions only. Attention, norms and the optimizer are left out, so the
    bound is a lower one.
    """
    layers = model.roles.layers
    frozen = sum(layer.get_base_layer().weight.numel() for layer in layers)
    lora = sum(
        layer.lora_A["compressor"].weight.numel() + layer.lora_B["compressor"].weight.numel() for layer in layers
    )
    layout = batch["prompts"][memory_size]
    n_documents = int(batch["document_attention_mask"].any(-1).sum())
    tokens = int(batch["document_attention_mask"].sum()) + n_documents * memory_size
    tokens += int(layout["attention_mask"].sum())
    targets = int((layout["labels"][:, 1:] != -100).sum())
    head = model.get_output_embeddings().weight.numel()
    return tokens * (4 * frozen + 6 * lora) + 4 * targets * head, tokens


def reading_records(model: CLaRaForRAG, rows: list[dict], n_rows: int) -> list[dict]:
    """Records of one document and four questions, of middling and similar length, as `group_by_length` draws them."""
    reader = reader_of(model, "pretrain", targets=4)
    records = [record for index, row in enumerate(rows) for record in reader(f"row {index}", row)[:1]]
    records = [record for record in records if len(record["documents"]) == 1 and len(record["questions"]) == 4]
    records = sorted(records[: 50 * n_rows], key=lambda record: record["length"])
    return records[len(records) // 2 :][:n_rows]


def benchmark_pretraining(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int) -> dict:
    """Share of its own arithmetic bound that a stage-1 step reaches."""
    model.set_trainable_roles(("compressor", "generator"))
    records = reading_records(model, rows, n_rows)
    batch = ReadingCollator(model.processor, model.config.memory_sizes)(records)
    memory_size = model.config.max_memory_size
    flops, tokens = step_flops(model, batch, memory_size)
    optimizer = optimizer_of(model)
    weights = linear_layers(model)
    inputs = {width: torch.randn(tokens, width) for width in {weight.shape[1] for weight in weights}}
    head_rows = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: head_rows.append(args[0].shape[:-1].numel())
    )

    @torch.no_grad()
    def gemm():
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    def step(dropout: float):
        set_dropout(model, dropout)
        training_step(model, optimizer, batch, memory_size)

    runs = {"gemm": gemm, "step": lambda: step(0.0), "gemm again": gemm, "step with dropout": lambda: step(0.1)}
    seconds = in_turn(runs, rounds)
    hook.remove()
    work = 2 * sum(weight.numel() for weight in weights) * tokens
    speeds = [2 * work / (a + b) for a, b in zip(seconds["gemm"], seconds["gemm again"], strict=True)]
    targets = int((batch["labels"][:, 1:] != -100).sum())
    return {
        "documents": len(records),
        "prompts": sum(len(record["questions"]) for record in records),
        "tokens": tokens,
        "targets": targets,
        "head_rows": head_rows[-1],
        "gflop": flops / 1e9,
        "gemm_gflops": statistics.median(speeds) / 1e9,
        "seconds": {name: statistics.median(seconds[name]) for name in ("step", "step with dropout")},
        "share_of_bound": {
            name: statistics.median(
                flops / speed / second for speed, second in zip(speeds, seconds[name], strict=True)
            )
            for name in ("step", "step with dropout")
        },
    }


def loss_of_single_prompts(model: CLaRaForRAG, records: list[dict], batch: dict, memory_size: int) -> torch.Tensor:
    """The loss of the same targets, each in a row of its own that reads the memories of its record.

    Args:
        model: the model.
        records: of the batch.
        batch: `ReadingCollator`'s, for the documents, with `single` from `single_prompts`.
        memory_size: k.
    """
    documents = {name: tensor for name, tensor in batch.items() if name.startswith("document_")}
    compressed = model(**documents, memory_size=memory_size)
    rows = torch.tensor([row for row, record in enumerate(records) for _ in record["questions"]])
    mask = batch["document_attention_mask"].any(-1)[rows]
    read = model(memory=compressed.memory[rows], document_mask=mask, memory_size=memory_size, **batch["single"])
    if compressed.alignment_loss is None:
        return read.loss
    return read.loss + model.config.alignment_weight * compressed.alignment_loss


def single_prompts(collator: ReadingCollator, records: list[dict], memory_size: int) -> dict:
    """Prompts of one question a row."""
    single = [
        {**record, "questions": [question], "answers": [answer]}
        for record in records
        for question, answer in zip(record["questions"], record["answers"], strict=True)
    ]
    return collator(single)["prompts"][memory_size]


@contextlib.contextmanager
def backbone_in(model: CLaRaForRAG, dtype: torch.dtype) -> Iterator[None]:
    """Context: the backbone's own weights in this dtype; what trains stays float32."""
    own = [(p, p.data) for name, p in model.backbone.named_parameters() if "lora_" not in name]
    for parameter, values in own:
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in own:
            parameter.data = values


def benchmark_targets(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int, dtype: torch.dtype) -> dict:
    """Target tokens a second of the same records: one prompt a row, a shared prefix, and that packed."""
    model.set_trainable_roles(("compressor", "generator"))
    set_dropout(model, 0.0)
    records, memory_size = reading_records(model, rows, n_rows), model.config.max_memory_size
    collator = ReadingCollator(model.processor, model.config.memory_sizes)
    batch = collator(records)
    layouts = {**batch, "single": single_prompts(collator, records, memory_size)}
    optimizer = optimizer_of(model)
    ways = {
        "one prompt a row, padded": (
            padded_passes,
            lambda: loss_of_single_prompts(model, records, layouts, memory_size),
        ),
        "shared prefix, padded": (padded_passes, lambda: loss_of(model, batch, memory_size)),
        "shared prefix, packed": (contextlib.nullcontext, lambda: loss_of(model, batch, memory_size)),
    }

    def step(context: Callable, loss: Callable) -> None:
        with context():
            update(model, optimizer, loss())

    with backbone_in(model.train(), dtype):
        losses = {}
        for name, (context, loss) in ways.items():
            with context():
                losses[name] = float(loss().detach())
        seconds = in_turn({name: lambda way=way: step(*way) for name, way in ways.items()}, rounds)
    targets, (slowest, *_) = int((batch["labels"][:, 1:] != -100).sum()), ways
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "documents": len(records),
        "prompts": sum(len(record["questions"]) for record in records),
        "targets": targets,
        "losses": losses,
        "seconds": seconds,
        "targets_per_second": {name: targets / statistics.median(values) for name, values in seconds.items()},
        "times_faster": {name: ratio(seconds[slowest], values) for name, values in seconds.items()},
    }


def benchmark_joint(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int) -> list[dict]:
    """Joint steps on stored memories and with the compressor in the step: time and peak memory."""
    model.set_trainable_roles(("reasoner", "generator"))
    reader = reader_of(model, "joint")
    passages = [row for row in rows if len(model.processor.split_document(row)) == 1][: n_rows * N_CANDIDATES]
    records = []
    for index in range(n_rows):
        candidates = passages[index * N_CANDIDATES : (index + 1) * N_CANDIDATES]
        pair = candidates[0]["qas"][0]
        docs = [{"title": row["title"], "text": row["text"]} for row in candidates]
        row = {"question": pair["question"], "answers": pair["answers"], "docs": docs, "pos_index": [0]}
        records += reader(f"row {index}", row)
    documents = {document_key(document): document for record in records for document in record["documents"]}
    folder = tempfile.TemporaryDirectory()  # removed when this returns
    store = compress_documents(model, list(documents.values()), Path(folder.name))
    sizes, top_k = model.config.memory_sizes, model.config.retrieval_top_k
    batches = {
        "stored": SelectingCollator(model.processor, sizes, top_k=top_k, store=store)(records),
        "online": SelectingCollator(model.processor, sizes, top_k=top_k, store=None)(records),
    }
    optimizer = optimizer_of(model)
    set_dropout(model, 0.0)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        runs = {
            name: lambda batch=batch: training_step(model, optimizer, batch, sizes[-1])
            for name, batch in batches.items()
        }
        losses = {name: run() for name, run in runs.items()}
        seconds = in_turn(runs, rounds)
        peaks = {}
        for name, run in runs.items():
            peaks[name] = statistics.median(peak_above(run) for _ in range(rounds))
        results.append(
            {
                "checkpointing": checkpointing,
                "losses": losses,
                "seconds": {name: statistics.median(values) for name, values in seconds.items()},
                "times_faster": ratio(seconds["online"], seconds["stored"]),
                "peak_mib": {name: value / 2**20 for name, value in peaks.items()},
                "peak_ratio": peaks["stored"] / peaks["online"],
            }
        )
    return results


def render_targets(report: dict) -> str:
    """The table of `benchmark_targets`."""
    rows = [
        [name, f"{speed:.1f}", f"{report['times_faster'][name]:.2f}", f"{report['losses'][name]:.4f}"]
        for name, speed in report["targets_per_second"].items()
    ]
    head = f"{report['documents']} documents, {report['prompts']} prompts, {report['targets']} target positions"
    return f"{head}, backbone in {report['dtype']}:\n\n" + table(["way", "targets/s", "times faster", "loss"], rows)


def render(report: dict) -> str:
    """The tables."""
    step, parts = report["pretraining"], []
    parts.append(
        f"Stage-1 step: {step['documents']} documents, {step['prompts']} prompts, {step['tokens']:,} tokens, "
        f"{step['targets']} target positions, {step['head_rows']} rows through the LM head; {step['gflop']:.0f} GFLOP "
        f"at {step['gemm_gflops']:.0f} GFLOP/s; "
        + "; ".join(
            f"{name} {step['seconds'][name]:.2f} s, {100 * share:.0f} % of its bound"
            for name, share in step["share_of_bound"].items()
        )
        + "."
    )
    parts.append(render_targets(report["targets"]))
    parts.append(
        table(
            [
                "joint step",
                "stored memories",
                "compressed online",
                "times faster",
                "peak stored",
                "peak online",
                "ratio",
            ],
            [
                [
                    "with checkpointing" if row["checkpointing"] else "without checkpointing",
                    f"{row['seconds']['stored']:.2f} s",
                    f"{row['seconds']['online']:.2f} s",
                    f"{row['times_faster']:.1f}",
                    f"{row['peak_mib']['stored']:.0f} MiB",
                    f"{row['peak_mib']['online']:.0f} MiB",
                    f"{row['peak_ratio']:.2f}",
                ]
                for row in report["joint"]
            ],
        )
    )
    return "\n\n".join(parts)


def main() -> None:
    """Parse, measure, print."""
    parser = benchmark_parser(__doc__, rounds=2)
    parser.add_argument("--documents", type=int, default=8, help="documents of the stage-1 step (default: 8)")
    parser.add_argument("--questions", type=int, default=2, help="questions of the joint step (default: 2)")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(
            "--data must name passages with their questions (`qas`); the packaged ones have none in that form"
        )
    rows, model, report = load_subject(arguments)
    report["pretraining"] = benchmark_pretraining(model, rows, arguments.rounds, arguments.documents)
    dtype = torch.bfloat16 if "bf16" in Path("/proc/cpuinfo").read_text() else torch.float32
    report["targets"] = benchmark_targets(model, rows, arguments.rounds, arguments.documents, dtype)
    report["joint"] = benchmark_joint(model, rows, arguments.rounds, arguments.questions)
    show("training", report, render(report), arguments)


if __name__ == "__main__":
    main()
