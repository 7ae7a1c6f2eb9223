"""Measures compressing and answering on the real backbone: `python -m recipes.benchmarks.inference --data FILE`.

Prints Markdown tables. It knows nothing of answer quality: its adapters are untrained.
"""

import statistics

import torch
import transformers

from modeling_clara import CLaRaForRAG
from modeling_clara.packing_clara import MAX_TOKENS
from recipes.benchmarks import shared
from recipes.benchmarks.shared import in_turn, ratio, seconds_of, split_rows

QUESTION = "Who is the editor-in-chief of Thrasher magazine, as mentioned in the document?"
CHUNK_WITH_SLOTS = 272  # the naive way pads every document to this: 256 tokens and 16 slots
LENGTHS = ((60, 16), (120, 16), (250, 16), (250, 8), (250, 4))  # tokens of each of five documents, k
WAYS = {"bulk": "`compress` in `bulk_compression()`", "compress": "`compress`", "naive": "naive"}


@torch.no_grad()
def naive_compress(model: CLaRaForRAG, ids: list[list[int]], memory_size: int) -> None:
    """The plain way: every document padded to 272, masked, through the LM head, all hidden states kept, 16 a pass."""
    pad = model.processor.pad_token_id
    rows = model.memory_embeddings[:memory_size]
    length = CHUNK_WITH_SLOTS - memory_size
    for start in range(0, len(ids), 16):
        batch = ids[start : start + 16]
        tokens = torch.tensor([[pad] * (length - len(text)) + text for text in batch])
        mask = torch.tensor([[0] * (length - len(text)) + [1] * (len(text) + memory_size) for text in batch])
        embeds = torch.cat([model.get_input_embeddings()(tokens), rows.expand(len(batch), -1, -1)], dim=1)
        with model.roles.use("compressor"):
            output = model.backbone(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        output.hidden_states[-1][:, -memory_size:].clone()


def benchmark_compression(model: CLaRaForRAG, rows: list[dict], rounds: int) -> dict:
    """Documents per second of every way to compress, and the share of what the machine's GEMM allows."""
    passages = rows[:64]
    documents = split_rows(model, passages)
    ids = model.processor.encode_documents(documents)
    memory_size = model.config.max_memory_size
    tokens = sum(map(len, ids)) + memory_size * len(ids)
    gemm, gemm_work = shared.gemm_run(model, MAX_TOKENS)  # with as many rows as a packed pass has tokens
    work = gemm_work * tokens / MAX_TOKENS
    merged_seconds = []

    def merged():
        with model.bulk_compression():
            merged_seconds.append(seconds_of(lambda: model.compress(documents)))

    runs = {
        "gemm": gemm,
        "bulk": merged,
        "gemm again": gemm,
        "compress": lambda: model.compress(documents),
        "naive": lambda: naive_compress(model, ids, memory_size),
    }
    seconds = in_turn(runs, rounds)
    seconds["bulk"] = merged_seconds[1:]  # without merging, which a long run pays once
    speeds = shared.gemm_speeds(seconds, gemm_work)
    return {
        "passages": len(passages),
        "spans": len(documents),
        "document_tokens": tokens - memory_size * len(ids),
        "tokens": tokens,
        "gemm_gflops": statistics.median(speeds) / 1e9,
        "documents_per_second": {name: len(documents) / statistics.median(seconds[name]) for name in WAYS},
        "share_of_gemm": {name: ratio([work / second for second in seconds[name]], speeds) for name in WAYS},
        "times_naive": {name: ratio(seconds["naive"], seconds[name]) for name in WAYS},
        "seconds": seconds,
    }


def first_token_runs(model: CLaRaForRAG, documents: list[dict], memory_size: int) -> tuple[dict, int, int]:
    """The two ways to the first token, and how many prompt tokens each reads."""
    memory = model.compress(documents)
    stored = [{**document, "memory": rows} for document, rows in zip(documents, memory, strict=True)]
    prompt = model.processor.build_prompt(QUESTION, 0, memory_size, text_documents=documents)
    short = model.processor.build_prompt(QUESTION, len(documents), memory_size)
    ids = torch.tensor([prompt.input_ids])
    first = model.build_generation_config(None, 1)
    options = {"top_k": len(stored), "memory_size": memory_size, "retrieval_memory_size": memory_size}

    def from_text():
        with model.roles.use(None), torch.no_grad():
            model.backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=first)

    def from_memory():
        model.answer([QUESTION], documents=stored, max_new_tokens=1, min_score=-1, **options)

    return {"text": from_text, "memory": from_memory}, ids.shape[1], len(short.input_ids)


def cut_to(model: CLaRaForRAG, rows: list[dict], n_tokens: int) -> list[dict]:
    """Five documents of exactly `n_tokens` tokens out of the rows' running text."""
    ids = [token for row in rows for token in model.processor.encode_text(row["text"] + "\n")]
    pieces = [ids[start : start + n_tokens] for start in range(0, 5 * n_tokens, n_tokens)]
    return [{"text": model.processor.tokenizer.decode(piece)} for piece in pieces]


def benchmark_first_token(model: CLaRaForRAG, rows: list[dict], rounds: int) -> list[dict]:
    """Time to the first token from stored memories, question included, against reading the text."""
    cases = [("first 5 passages", [split_rows(model, [row])[0] for row in rows[:5]], 16)]
    cases += [(f"5 x {n} tokens", cut_to(model, rows, n), k) for n, k in LENGTHS]
    results = []
    for name, documents, memory_size in cases:
        if max(map(len, model.processor.encode_documents(documents))) > model.processor.document_max_length:
            raise ValueError(f"the documents of {name!r} must fit into one chunk. Choose other data.")
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
    chunks = split_rows(model, [{"text": row["text"]} for row in rows[:5]])[:5]
    memories = model.compress(chunks)
    stored = [{"text": chunk["text"], "memory": memory} for chunk, memory in zip(chunks, memories, strict=True)]

    def ask(length: int):
        forced = transformers.GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=False)
        return lambda: model.answer([QUESTION], documents=stored, min_score=-1, generation_config=forced)

    def per_token() -> float:
        seconds = shared.medians(in_turn({"one": ask(1), "many": ask(n_tokens)}, rounds))
        return 1e3 * (seconds["many"] - seconds["one"]) / (n_tokens - 1)

    report = {"ms_per_token": per_token()}
    with model.bulk_answering():
        return report | {"ms_per_token_merged": per_token()}


def render(report: dict) -> str:
    """The tables."""
    compression, decode = report["compression"], report["decode"]
    columns = ("documents_per_second", "share_of_gemm", "times_naive")
    ways = [{"way": label} | {column: compression[column][name] for column in columns} for name, label in WAYS.items()]
    return "\n\n".join(
        [
            f"Compression: {compression['passages']} passages, {compression['spans']} chunks, "
            f"{compression['document_tokens']:,} document tokens; GEMM {compression['gemm_gflops']:.0f} GFLOP/s.",
            shared.figures(
                "way | chunks/s | share of GEMM | times naive",
                "{way} | {documents_per_second:.2f} | {share_of_gemm:.0%} | {times_naive:.1f}",
                ways,
            ),
            "Time to the first token, question encoded, documents ranked and read:",
            shared.figures(
                "documents | k | prompt tokens text / memory | text | memory | merged | times sooner | merged",
                "{documents} | {memory_size} | {text_tokens} / {memory_tokens} | {text_ms:.0f} ms | "
                "{memory_ms:.0f} ms | {merged_ms:.0f} ms | {times:.1f} | {times_merged:.1f}",
                report["first_token"],
            ),
            f"Each further token: {decode['ms_per_token']:.0f} ms, in `bulk_answering()` "
            f"{decode['ms_per_token_merged']:.0f} ms.",
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    arguments = shared.benchmark_parser(__doc__, rounds=5).parse_args()
    rows, model, report = shared.load_subject(arguments)
    report["compression"] = benchmark_compression(model, rows, arguments.rounds)
    report["first_token"] = benchmark_first_token(model, rows, arguments.rounds)
    report["decode"] = benchmark_decode(model, rows, arguments.rounds)
    report["peak_memory_mib"] = shared.resident_bytes("VmHWM") / 2**20
    shared.show("inference", report, render(report), arguments)


if __name__ == "__main__":
    main()
