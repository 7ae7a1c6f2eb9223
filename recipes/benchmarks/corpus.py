"""Measures corpora: building, opening, searching, adding, in one table by size; `--help` tells how to call it.

    python -m recipes.benchmarks.corpus --data corpus.jsonl.gz --questions questions.jsonl.gz --folder bench

Real passages are compressed by SmolLM2 with fresh adapters; larger corpora are filled up with mixtures of two of their
memories, with a fixed seed. The folder keeps what was built (about 20 KB a chunk), and a second call goes on there.
Every corpus is measured in a process of its own with one thread. It knows nothing of answer quality.
"""

import itertools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.codecs_clara import CODECS
from modeling_clara.corpus.encode import encode, fit_codec
from modeling_clara.index_clara import choose_kind
from modeling_clara.smollm2 import fetch_backbone
from recipes.benchmarks import codecs, shared
from recipes.benchmarks.shared import in_turn, medians, seconds_of

N_QUESTIONS = 200
TOP_K = 10
REAL, QUERIES = "real", "queries.safetensors"


def disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def mixed_documents(real: CompressedCorpus, n: int) -> Iterator[dict]:
    """n documents with memories: the real ones first, then mixtures of two, always the same."""
    rows = list(real.rows())
    generator = torch.Generator().manual_seed(0)
    for row in range(n):
        pair, share = [row, row], 1.0
        if row >= len(rows):
            pair = torch.randint(0, len(rows), (2,), generator=generator).tolist()
            share = float(torch.rand((), generator=generator))
        first, second = real.decode([rows[number]["row"] for number in pair])
        record = {name: rows[pair[0]][name] for name in ("title", "text")}
        yield {"id": f"{row}", **record, "memory": share * first + (1 - share) * second}


# --- one corpus, in a process of its own -----------------------------------------------------------------------------


def build_mixed(folder: Path, n: int, backbone: str | None) -> dict:
    """Build a corpus of n chunks; its time, and the peak memory of the process beyond the model."""
    torch.manual_seed(0)
    model = CLaRaForRAG.from_backbone(backbone or fetch_backbone())
    documents = mixed_documents(CompressedCorpus.open(folder / REAL, model=model), n)
    before = shared.resident_bytes()
    seconds = seconds_of(lambda: CompressedCorpus.build(model, documents, folder / f"mixed-{n}", shard_size=1024))
    return {"build_seconds": seconds, "build_peak_mb": (shared.resident_bytes("VmHWM") - before) / 1e6}


def open_first(folder: Path) -> dict:
    """The first opening: what it takes and leaves on the disk."""
    shutil.rmtree(folder / "index", ignore_errors=True)
    start = time.perf_counter()
    corpus = CompressedCorpus.open(folder)
    seconds = time.perf_counter() - start
    index = disk(folder / "index" / f"k{corpus.manifest.retrieval_memory_size}")
    return {"first_open_seconds": seconds, "first_open_mb": disk(folder / "index") / 1e6, "index_bytes": index}


def search_one(folder: Path, n_exact: int = 5) -> dict:
    """Opening a second time, and searching question by question on one thread."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries = load_file(folder.parent / QUERIES)["queries"].float()
    before, start = shared.resident_bytes(), time.perf_counter()
    corpus = CompressedCorpus.open(folder)
    report = {"open_seconds": time.perf_counter() - start, "open_mb": (shared.resident_bytes() - before) / 1e6}
    corpus.search(queries[:1], TOP_K)

    found = []
    milliseconds = [1e3 * seconds_of(lambda q=q: found.extend(corpus.search(q[None], TOP_K))) for q in queries]
    report |= {"p50_ms": statistics.median(milliseconds), "p95_ms": float(np.percentile(milliseconds, 95))}
    report["searched_mb"] = (shared.resident_bytes() - before) / 1e6
    scans = [1e3 * seconds_of(lambda q=q: corpus.search(q[None], TOP_K, exact=True)) for q in queries[:n_exact]]
    recall = codecs.overlap(found, corpus.search(queries, TOP_K, exact=True))
    report |= {"exact_ms": statistics.median(scans), "recall@10": recall}
    report["times_faster"] = report["exact_ms"] / report["p50_ms"]
    batch = queries.repeat(5, 1, 1)
    report["batch_ms_per_query"] = 1e3 * seconds_of(lambda: corpus.search(batch, TOP_K)) / len(batch)
    report |= add_and_find(corpus, queries)
    return report | {"kind": choose_kind(corpus.manifest.n_spans), "spans": corpus.manifest.n_spans}


def add_and_find(corpus: CompressedCorpus, queries: torch.Tensor, rounds: int = 9) -> dict:
    """A document whose memory is computed: until the next search finds it."""
    seconds = []
    for query in queries[:rounds]:
        document = {"id": f"added-{time.time_ns()}", "text": "new", "memory": query}
        start = time.perf_counter()
        corpus.add([document])
        hit = corpus.search(query[None], 1)[0][0]
        seconds.append(1e3 * (time.perf_counter() - start))
        if hit["document_id"] != document["id"]:
            raise RuntimeError(f"the added document must be found, got {hit['document_id']}")
        corpus.delete([document["id"]])
    return {"add_and_find_ms": statistics.median(seconds), "add_and_find_max_ms": max(seconds)}


def in_process(step: Callable[..., dict], *arguments) -> dict:
    """A step in a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, *arguments).result()


# --- building and codecs, in this process ----------------------------------------------------------------------------


def benchmark_build(model: CLaRaForRAG, rows: list[dict], rounds: int, n_documents: int = 128) -> dict:
    """Documents per second of a whole build, and of `compress` alone on the same chunks."""
    documents = [{"title": row.get("title", ""), "text": row["text"]} for row in rows[:n_documents]]
    chunks = shared.split_rows(model, documents)

    def alone():
        with model.bulk_compression():
            model.compress(chunks)

    def build():
        with tempfile.TemporaryDirectory() as folder:
            CompressedCorpus.build(model, documents, Path(folder) / "corpus")

    seconds = in_turn({"compress": alone, "build": build}, rounds)
    share = shared.ratio(seconds["compress"], seconds["build"])
    return {"documents": n_documents, "seconds": seconds, "share_of_compress": share}


def benchmark_decode(real: CompressedCorpus, rounds: int = 50) -> dict:
    """Milliseconds to decode 100 memories, by number of threads and codec."""
    memory = real.decode([row["row"] for row in itertools.islice(real.rows(), 1024)])
    fitted = {name: fit_codec(name, memory) for name in CODECS}
    codes = {name: encode(codec, memory)[:100] for name, codec in fitted.items()}
    runs = {name: lambda name=name: fitted[name].decode(codes[name]) for name in CODECS}
    report = {}
    for n_threads in (1, torch.get_num_threads()):
        torch.set_num_threads(n_threads)
        report[n_threads] = {name: 1e3 * second for name, second in medians(in_turn(runs, rounds)).items()}
    return report


def render(report: dict) -> str:
    """The tables."""
    sizes = []
    for row in report["sizes"]:
        peak = f"{row['build_peak_mb']:.0f} MB" if "build_peak_mb" in row else ""
        sizes.append({**row, "peak": peak, "index_a_chunk": row["index_bytes"] / row["spans"]})
    decode = "; ".join(
        f"{n} thread(s): " + ", ".join(f"{name} {value:.2f} ms" for name, value in row.items())
        for n, row in report["decode_ms"].items()
    )
    build = report["build"]
    return "\n\n".join(
        [
            f"Building {build['documents']} documents: {100 * build['share_of_compress']:.1f} % of `compress` alone.",
            shared.figures(
                "chunks | index | p50 | p95 | exact scan | times | recall@10 | batch, per question",
                "{spans:,} | {kind} | {p50_ms:.1f} ms | {p95_ms:.1f} ms | {exact_ms:,.0f} ms | {times_faster:.0f} | "
                "{recall@10:.4f} | {batch_ms_per_query:.1f} ms",
                sizes,
            ),
            shared.figures(
                "chunks | build peak | first opening | its disk | index a chunk | opening | memory | searched | add",
                "{spans:,} | {peak} | {first_open_seconds:.1f} s | {first_open_mb:,.0f} MB | "
                "{index_a_chunk:.0f} bytes | {open_seconds:.2f} s | {open_mb:.0f} MB | {searched_mb:.0f} MB | "
                "{add_and_find_ms:.0f} ms",
                sizes,
            ),
            f"Decoding 100 memories of 16 x 576. {decode}.",
            codecs.render(report["codecs"]),
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = shared.benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--questions", required=True, help="JSONL of questions, .gz or plain")
    parser.add_argument("--folder", type=Path, required=True, help="for the corpora; kept, and used again")
    parser.add_argument("--spans", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000])
    arguments = shared.parse_with_data(parser, "a JSONL of documents and --questions one of questions")
    rows, model, report = shared.load_subject(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    real = CompressedCorpus.build(model, arguments.data, arguments.folder / REAL, codec="float16")
    report["real_spans"] = real.manifest.n_spans
    questions = [row["question"] for row in shared.read_rows(arguments.questions)[:N_QUESTIONS]]
    if not (arguments.folder / QUERIES).exists():
        with model.bulk_compression():
            save_file({"queries": model.encode_queries(questions)}, arguments.folder / QUERIES)
    report["build"] = benchmark_build(model, rows, arguments.rounds)
    report["decode_ms"] = benchmark_decode(real)
    report["codecs"] = codecs.measure_codecs(model, arguments.folder / REAL, questions, None)
    report["sizes"] = []
    for n in arguments.spans:
        folder, row = arguments.folder / f"mixed-{n}", {}
        if not (folder / "corpus.json").exists():
            row |= in_process(build_mixed, arguments.folder, n, arguments.backbone)
        report["sizes"].append(row | in_process(open_first, folder) | in_process(search_one, folder))
    shared.show("corpus", report, render(report), arguments)


if __name__ == "__main__":
    main()
