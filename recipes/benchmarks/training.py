"""Measures training steps, side by side in one process: `python -m recipes.benchmarks.training --data FILE`.

Real backbone, real passages, the batches and the `forward` of the recipes; prints Markdown tables. Three comparisons:
a stage-1 step against its own arithmetic at the GEMM speed of the same run; the same targets in padded rows of one
prompt, in padded rows with a common prefix, and packed; a joint step on stored memories against one that compresses
its candidates. It knows nothing of quality.
"""

import contextlib
import ctypes
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

import modeling_clara.passes_clara as passes
from modeling_clara import CLaRaForRAG
from recipes.benchmarks import shared
from recipes.benchmarks.shared import in_turn, linear_layers, medians, ratio
from recipes.training.collators import ReadingCollator, SelectingCollator
from recipes.training.data import document_key
from recipes.training.memories import compress_documents
from recipes.training.records import RecordReader

N_CANDIDATES = 20


def peak_above(run: Callable[[], object]) -> int:
    """Highest resident memory while `run` runs, above what it was before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system first (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = shared.resident_bytes()
    run()
    return shared.resident_bytes("VmHWM") - before


def training_step(model: CLaRaForRAG, optimizer, batch: dict, memory_size: int) -> float:
    """Forward, backward, clip and update as a Trainer's step; returns the loss."""
    loss = loss_of(model.train(), batch, memory_size)
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


def padded_passes() -> contextlib.AbstractContextManager:
    """Context: no training pass packs its rows, which is how they run everywhere but on a CPU."""
    return mock.patch.object(passes, "can_pack", lambda *_: False)


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
    """(operations, tokens) of a stage-1 step, padding left out: a lower bound, without attention, norms and optimizer.

    Forward, and backward for the inputs, of every linear layer (its own weights are frozen); three times the LoRA
    products; the LM head, both ways, on target positions only.
    """
    frozen = sum(weight.numel() for weight in linear_layers(model))
    adapters = [part["compressor"] for layer in model.roles.layers for part in (layer.lora_A, layer.lora_B)]
    lora = sum(adapter.weight.numel() for adapter in adapters)
    documents, prompts = batch["document_attention_mask"], batch["prompts"][memory_size]["attention_mask"]
    tokens = int(documents.sum() + documents.any(-1).sum() * memory_size + prompts.sum())
    head = model.get_output_embeddings().weight.numel()
    return tokens * (4 * frozen + 6 * lora) + 4 * count_targets(batch) * head, tokens


def count_targets(batch: dict) -> int:
    """Positions of a `ReadingCollator`'s batch that have a loss."""
    return int((batch["labels"][:, 1:] != -100).sum())


def reading_records(model: CLaRaForRAG, rows: Sequence[dict]) -> list[dict]:
    """Records of stage 1 with four questions."""
    reader = reader_of(model, "pretrain", targets=4)
    records = [record for index, row in enumerate(rows) for record in reader(f"row {index}", row)[:1]]
    return [record for record in records if len(record["questions"]) == 4]


def middle_records(model: CLaRaForRAG, rows: Sequence[dict], n_rows: int) -> list[dict]:
    """Records of one document and of middling and similar length, as `group_by_length` draws them."""
    records = [record for record in reading_records(model, rows) if len(record["documents"]) == 1]
    records = sorted(records[: 50 * n_rows], key=lambda record: record["length"])
    return records[len(records) // 2 :][:n_rows]


def count(records: list[dict], batch: dict) -> dict[str, int]:
    """`documents`, `prompts` and `targets` of a batch."""
    prompts = sum(len(record["questions"]) for record in records)
    return {"documents": len(records), "prompts": prompts, "targets": count_targets(batch)}


def benchmark_pretraining(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int) -> dict:
    """Share of its own arithmetic bound that a stage-1 step reaches."""
    model.set_trainable_roles(("compressor", "generator"))
    records = middle_records(model, rows, n_rows)
    batch = ReadingCollator(model.processor, model.config.memory_sizes)(records)
    memory_size = model.config.max_memory_size
    flops, tokens = step_flops(model, batch, memory_size)
    optimizer, head_rows = optimizer_of(model), []
    gemm, gemm_work = shared.gemm_run(model, tokens)
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: head_rows.append(args[0].shape[:-1].numel())
    )

    def step(dropout: float):
        set_dropout(model, dropout)
        training_step(model, optimizer, batch, memory_size)

    runs = {"gemm": gemm, "step": lambda: step(0.0), "gemm again": gemm, "step with dropout": lambda: step(0.1)}
    seconds = in_turn(runs, rounds)
    hook.remove()
    speeds, steps = shared.gemm_speeds(seconds, gemm_work), ("step", "step with dropout")
    return {
        **count(records, batch),
        "tokens": tokens,
        "head_rows": head_rows[-1],
        "gflop": flops / 1e9,
        "gemm_gflops": statistics.median(speeds) / 1e9,
        "seconds": medians({name: seconds[name] for name in steps}),
        "share_of_bound": {name: ratio([flops / second for second in seconds[name]], speeds) for name in steps},
    }


def loss_of_single_prompts(model: CLaRaForRAG, records: list[dict], batch: dict, memory_size: int) -> torch.Tensor:
    """The loss of a batch whose `single` prompts have one question a row, which reads the memories of its record."""
    documents = {name: tensor for name, tensor in batch.items() if name.startswith("document_")}
    compressed = model(**documents, memory_size=memory_size)
    rows = torch.tensor([row for row, record in enumerate(records) for _ in record["questions"]])
    mask = batch["document_attention_mask"].any(-1)[rows]
    read = model(memory=compressed.memory[rows], document_mask=mask, memory_size=memory_size, **batch["single"])
    if compressed.alignment_loss is None:
        return read.loss
    return read.loss + model.config.alignment_weight * compressed.alignment_loss


@contextlib.contextmanager
def backbone_in(model: CLaRaForRAG, dtype: torch.dtype) -> Iterator[None]:
    """Context: the backbone's own weights in this dtype; what trains stays float32."""
    own = [(p, p.data) for name, p in model.backbone.named_parameters() if "lora_" not in name]
    try:
        for parameter, values in own:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in own:
            parameter.data = values


def benchmark_targets(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int, dtype: torch.dtype) -> dict:
    """Target tokens a second of the same records: one prompt a row, a shared prefix, and that packed."""
    model.set_trainable_roles(("compressor", "generator"))
    set_dropout(model, 0.0)
    records, memory_size = middle_records(model, rows, n_rows), model.config.max_memory_size
    collator = ReadingCollator(model.processor, model.config.memory_sizes)
    batch, optimizer = collator(records), optimizer_of(model)
    single = [
        {**record, "questions": [question], "answers": [answer]}
        for record in records
        for question, answer in zip(record["questions"], record["answers"], strict=True)
    ]
    layouts = {**batch, "single": collator(single)["prompts"][memory_size]}
    slowest = "one prompt a row, padded"

    def of_single() -> torch.Tensor:
        return loss_of_single_prompts(model, records, layouts, memory_size)

    def of_shared() -> torch.Tensor:
        return loss_of(model, batch, memory_size)

    ways = {
        slowest: (padded_passes, of_single),
        "shared prefix, padded": (padded_passes, of_shared),
        "shared prefix, packed": (contextlib.nullcontext, of_shared),
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
    counts = count(records, batch)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        **counts,
        "losses": losses,
        "seconds": seconds,
        "targets_per_second": {name: counts["targets"] / second for name, second in medians(seconds).items()},
        "times_faster": {name: ratio(seconds[slowest], values) for name, values in seconds.items()},
    }


def joint_records(model: CLaRaForRAG, rows: list[dict], n_rows: int) -> list[dict]:
    """Records of the joint stage: a passage with its first question, among the passages after it."""
    reader = reader_of(model, "joint")
    passages = [row for row in rows if len(model.processor.split_document(row)) == 1]
    records = []
    for index in range(n_rows):
        candidates = passages[index * N_CANDIDATES :][:N_CANDIDATES]
        pair = candidates[0]["qas"][0]
        docs = [{"title": row["title"], "text": row["text"]} for row in candidates]
        row = {"question": pair["question"], "answers": pair["answers"], "docs": docs, "pos_index": [0]}
        records += reader(f"row {index}", row)
    return records


def benchmark_joint(model: CLaRaForRAG, rows: list[dict], rounds: int, n_rows: int) -> list[dict]:
    """Joint steps on stored memories and with the compressor in the step: time and peak memory."""
    model.set_trainable_roles(("reasoner", "generator"))
    records = joint_records(model, rows, n_rows)
    documents = {document_key(document): document for record in records for document in record["documents"]}
    folder = tempfile.TemporaryDirectory()  # removed when this returns
    store = compress_documents(model, list(documents.values()), Path(folder.name))
    sizes, top_k = model.config.memory_sizes, model.config.retrieval_top_k
    runs = {}
    for name, memories in (("stored", store), ("online", None)):
        batch = SelectingCollator(model.processor, sizes, top_k=top_k, store=memories)(records)
        runs[name] = lambda batch=batch: training_step(model, optimizer, batch, sizes[-1])
    optimizer = optimizer_of(model)
    set_dropout(model, 0.0)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        losses = {name: run() for name, run in runs.items()}
        seconds = in_turn(runs, rounds)
        peaks = medians({name: [peak_above(run) for _ in range(rounds)] for name, run in runs.items()})
        results.append(
            {
                "checkpointing": checkpointing,
                "losses": losses,
                "seconds": medians(seconds),
                "times_faster": ratio(seconds["online"], seconds["stored"]),
                "peak_mib": {name: value / 2**20 for name, value in peaks.items()},
                "peak_ratio": peaks["stored"] / peaks["online"],
            }
        )
    return results


def render(report: dict) -> str:
    """The tables."""
    step, targets, joint = report["pretraining"], report["targets"], report["joint"]
    columns = ("targets_per_second", "times_faster", "losses")
    ways = [{"way": name} | {column: targets[column][name] for column in columns} for name in targets["losses"]]
    steps = [{**row, "step": "with" if row["checkpointing"] else "without"} for row in joint]
    return "\n\n".join(
        [
            f"Stage-1 step: {step['documents']} documents, {step['prompts']} prompts, {step['tokens']:,} tokens, "
            f"{step['targets']} target positions, {step['head_rows']} rows through the LM head; "
            f"{step['gflop']:.0f} GFLOP at {step['gemm_gflops']:.0f} GFLOP/s; "
            + "; ".join(
                f"{name} {step['seconds'][name]:.2f} s, {100 * share:.0f} % of its bound"
                for name, share in step["share_of_bound"].items()
            )
            + ".",
            f"{targets['documents']} documents, {targets['prompts']} prompts, {targets['targets']} target positions, "
            f"backbone in {targets['dtype']}:",
            shared.figures(
                "way | targets/s | times faster | loss",
                "{way} | {targets_per_second:.1f} | {times_faster:.2f} | {losses:.4f}",
                ways,
            ),
            shared.figures(
                "joint step | stored memories | compressed online | times faster | peak stored | peak online | ratio",
                "{step} checkpointing | {seconds[stored]:.2f} s | {seconds[online]:.2f} s | {times_faster:.1f} | "
                "{peak_mib[stored]:.0f} MiB | {peak_mib[online]:.0f} MiB | {peak_ratio:.2f}",
                steps,
            ),
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = shared.benchmark_parser(__doc__, rounds=2)
    parser.add_argument("--documents", type=int, default=8, help="documents of the stage-1 step (default: 8)")
    parser.add_argument("--questions", type=int, default=2, help="questions of the joint step (default: 2)")
    needed = "passages with their questions (`qas`); the packaged ones have none in that form"
    arguments = shared.parse_with_data(parser, needed)
    rows, model, report = shared.load_subject(arguments)
    report["pretraining"] = benchmark_pretraining(model, rows, arguments.rounds, arguments.documents)
    dtype = torch.bfloat16 if "bf16" in Path("/proc/cpuinfo").read_text() else torch.float32
    report["targets"] = benchmark_targets(model, rows, arguments.rounds, arguments.documents, dtype)
    report["joint"] = benchmark_joint(model, rows, arguments.rounds, arguments.questions)
    shared.show("training", report, render(report), arguments)


if __name__ == "__main__":
    main()
