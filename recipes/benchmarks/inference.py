"""Measures compressing and answering on the real backbone: `python -m recipes.benchmarks.inference --data FILE`.

Prints Markdown tables. It knows nothing of answer quality: its adapters are untrained.
"""

import resource
import statistics
import time

import torch
import transformers
from torch.nn import functional as F

from modeling_clara import CLaRaForRAG
from modeling_clara.packing_clara import MAX_TOKENS
from recipes.benchmarks.shared import benchmark_parser, in_turn, linear_layers, load_subject, ratio, show
from recipes.evaluation.report import table

QUESTION = "Who is the editor-in-chief of Thrasher magazine, as mentioned in the document?"
SPAN_WITH_SLOTS = 272  # the naive way pads every document to this: 256 tokens and 16 slots


@torch.no_grad()
def naive_compress(model: CLaRaForRAG, ids: list[list[int]], memory_size: int) -> None:
    """The plain way: every document padded to 272, masked, through the LM head, all hidden states kept, 16 a pass."""
    pad = model.processor.pad_token_id
    rows = model.memory_embeddings[:memory_size]
    for start in range(0, len(ids), 16):
        batch = ids[start : start + 16]
        length = SPAN_WITH_SLOTS - memory_size
        tokens = torch.tensor([[pad] * (length - len(text)) + text for text in batch])
        mask = torch.tensor([[0] * (length - len(text)) + [1] * (len(text) + memory_size) for text in batch])
        embeds = torch.cat([model.get_input_embeddings()(tokens), rows.expand(len(batch), -1, -1)], dim=1)
        with model.roles.use("compressor"):
            output = model.backbone(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        output.hidden_states[-1][:, -memory_size:].clone()


def benchmark_compression(model: CLaRaForRAG, rows: list[dict], rounds: int) -> dict:
    """Documents per second of every way to compress, and the share of what the machine's GEMM allows."""
    passages = [{"title": row.get("title", ""), "text": row["text"]} for row in rows[:64]]
    documents = [span for passage in passages for span in model.processor.split_document(passage)]
    ids = model.processor.encode_documents(documents)
    memory_size = model.config.max_memory_size
    tokens = sum(map(len, ids)) + memory_size * len(ids)
    weights = linear_layers(model)
    # matrices of the model's own shapes, with as many rows as a packed pass has tokens
    inputs = {width: torch.randn(MAX_TOKENS, width) for width in {weight.shape[1] for weight in weights}}
    parameters = sum(weight.numel() for weight in weights)

    @torch.no_grad()
    def gemm():
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    def merged():
        with model.bulk_compression():
            start = time.perf_counter()
            model.compress(documents)
            merged_seconds.append(time.perf_counter() - start)

    merged_seconds = []
    runs = {
        "gemm": gemm,
        "bulk": merged,
        "gemm again": gemm,
        "compress": lambda: model.compress(documents),
        "naive": lambda: naive_compress(model, ids, memory_size),
    }
    seconds = in_turn(runs, rounds)
    seconds["bulk"] = merged_seconds[1:]  # without merging, which a long run pays once
    speed = [
        2 * 2 * parameters * MAX_TOKENS / (a + b) for a, b in zip(seconds["gemm"], seconds["gemm again"], strict=True)
    ]
    share = {
        name: statistics.median(
            2 * parameters * tokens / second / flops for second, flops in zip(seconds[name], speed, strict=True)
        )
        for name in ("bulk", "compress", "naive")
    }
    return {
        "passages": len(passages),
        "spans": len(documents),
        "document_tokens": tokens - memory_size * len(ids),
        "tokens": tokens,
        "gemm_gflops": statistics.median(speed) / 1e9,
        "documents_per_second": {name: len(documents) / statistics.median(seconds[name]) for name in share},
        "share_of_gemm": share,
        "times_naive": {name: ratio(seconds["naive"], seconds[name]) for name in ("bulk", "compress")},
        "seconds": seconds,
    }


def first_token_runs(model: CLaRaForRAG, documents: list[dict], memory_size: int) -> tuple[dict, int, int]:
    """The two ways to the first token, and how many prompt tokens each reads."""
    memory = model.compress(documents)
    stored = [{**document, "memory": rows} for document, rows in zip(documents, memory, strict=True)]
    prompt = model.processor.build_prompt(QUESTION, 0, memory_size, text_documents=documents)
    ids = torch.tensor([prompt.input_ids])
    first = model.build_generation_config(None, 1)

    def from_text():
        with model.roles.use(None), torch.no_grad():
            model.backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=first)

    def from_memory():
        model.answer(
            [QUESTION], documents=stored, top_k=len(stored), memory_size=memory_size, max_new_tokens=1,
            retrieval_memory_size=memory_size, min_score=-1,
        )  # fmt: skip

    short = model.processor.build_prompt(QUESTION, len(documents), memory_size)
    return {"text": from_text, "memory": from_memory}, ids.shape[1], len(short.input_ids)


def cut_to(model: CLaRaForRAG, rows: list[dict], n_tokens: int) -> list[dict]:
    """Five documents of exactly `n_tokens` tokens out of the rows' running text."""
    ids = [token for row in rows for token in model.processor.encode_text(row["text"] + "\n")]
    pieces = [ids[start : start + n_tokens] for start in range(0, 5 * n_tokens, n_tokens)]
    return [{"text": model.processor.tokenizer.decode(piece)} for piece in pieces]


def benchmark_first_token(model: CLaRaForRAG, rows: list[dict], rounds: int) -> list[dict]:
    """Time to the first token from stored memories, question included, against reading the text."""
    passages = [span for row in rows[:5] for span in model.processor.split_document(
        {"title": row.get("title", ""), "text": row["text"]})[:1]]  # fmt: skip
    cases = [("first 5 passages", passages, 16)]
    cases += [(f"5 x {n} tokens", cut_to(model, rows, n), 16) for n in (60, 120, 250)]
    cases += [("5 x 250 tokens", cut_to(model, rows, 250), k) for k in (4, 8)]
    results = []
    for name, documents, memory_size in cases:
        if max(map(len, model.processor.encode_documents(documents))) > model.processor.document_max_length:
            raise ValueError(f"the documents of {name!r} must fit into one span. Choose other data.")
        runs, text_tokens, memory_tokens = first_token_runs(model, documents, memory_size)
        seconds = in_turn(runs, rounds)
        with model.bulk_answering():
            merged = in_turn(runs, rounds)
        results.append(
            {
                "documents": name,
                "memory_size": memory_size,
                "text_tokens": text_tokens,
                "memory_tokens": memory_tokens,
                "text_ms": 1e3 * statistics.median(seconds["text"]),
                "memory_ms": 1e3 * statistics.median(seconds["memory"]),
                "merged_ms": 1e3 * statistics.median(merged["memory"]),
                "times": ratio(seconds["text"], seconds["memory"]),
                "times_merged": ratio(merged["text"], merged["memory"]),
            }
        )
    return results


def benchmark_decode(model: CLaRaForRAG, rows: list[dict], rounds: int, n_tokens: int = 16) -> dict:
    """Milliseconds per generated token after the first, from memories, with LoRA beside the weights and merged."""
    documents = [{"text": row["text"]} for row in rows[:5]]
    spans = [span for document in documents for span in model.processor.split_document(document)][:5]
    stored = [{"text": s["text"], "memory": rows} for s, rows in zip(spans, model.compress(spans), strict=True)]

    def ask(length: int):
        forced = transformers.GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=False)
        return lambda: model.answer([QUESTION], documents=stored, min_score=-1, generation_config=forced)

    runs = {"one": ask(1), "many": ask(n_tokens)}
    report = {}
    for name, context in (("ms_per_token", None), ("ms_per_token_merged", model.bulk_answering)):
        if context is None:
            seconds = in_turn(runs, rounds)
        else:
            with context():
                seconds = in_turn(runs, rounds)
        extra = statistics.median(seconds["many"]) - statistics.median(seconds["one"])
        report[name] = 1e3 * extra / (n_tokens - 1)
    return report


def render(report: dict) -> str:
    """The tables."""
    compression = report["compression"]
    names = {"bulk": "`compress` in `bulk_compression()`", "compress": "`compress`", "naive": "naive"}
    parts = [
        f"Compression: {compression['passages']} passages, {compression['spans']} chunks, "
        f"{compression['document_tokens']:,} document tokens; GEMM {compression['gemm_gflops']:.0f} GFLOP/s.",
        table(
            ["way", "chunks/s", "share of GEMM", "times naive"],
            [
                [
                    label,
                    f"{compression['documents_per_second'][name]:.2f}",
                    f"{100 * compression['share_of_gemm'][name]:.0f} %",
                    f"{compression['times_naive'].get(name, 1):.1f}",
                ]
                for name, label in names.items()
            ],
        ),
        "Time to the first token, question encoded, documents ranked and read:",
        table(
            ["documents", "k", "prompt tokens text / memory", "text", "memory", "merged", "times sooner", "merged"],
            [
                [
                    row["documents"],
                    row["memory_size"],
                    f"{row['text_tokens']} / {row['memory_tokens']}",
                    f"{row['text_ms']:.0f} ms",
                    f"{row['memory_ms']:.0f} ms",
                    f"{row['merged_ms']:.0f} ms",
                    f"{row['times']:.1f}",
                    f"{row['times_merged']:.1f}",
                ]
                for row in report["first_token"]
            ],
        ),
        f"Each further token: {report['decode']['ms_per_token']:.0f} ms, in `bulk_answering()` "
        f"{report['decode']['ms_per_token_merged']:.0f} ms.",
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Parse, measure, print."""
    arguments = benchmark_parser(__doc__, rounds=5).parse_args()
    rows, model, report = load_subject(arguments)
    report["compression"] = benchmark_compression(model, rows, arguments.rounds)
    report["first_token"] = benchmark_first_token(model, rows, arguments.rounds)
    report["decode"] = benchmark_decode(model, rows, arguments.rounds)
    report["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    show("inference", report, render(report), arguments)


if __name__ == "__main__":
    main()
