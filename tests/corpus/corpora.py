"""Corpora for these tests: documents that bring their memories, and what a corpus of them must hold and find.

What is found is compared with plain tensor arithmetic over all stored memories. Other processes are forked from a
server that has imported the package once; they open corpora by their paths.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modeling_clara
from modeling_clara import CompressedCorpus
from modeling_clara.retrieval_clara import cosine_scores

PACKAGE = Path(modeling_clara.__file__).parent.parent  # what another process puts on its path
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CODECS = ("float16", "int8", "int4")
ERRORS = {"float16": 1e-3, "int8": 0.02, "int4": 0.3}  # of a stored memory, as a share of its length
LONG = " ".join(f"Sentence number {n} says that Paris is the capital of France." for n in range(12))

# --- processes -------------------------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["corpora", "datasets", "faiss", "modeling_clara.corpus.corpus", "transformers.models.llama.modeling_llama"]
)


def start(function, *arguments):
    """Call `function(connection, *arguments)` in another process; returns it and our end of the connection."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(connection):
    assert connection.poll(60), "the other process does not answer"
    return connection.recv()


def limit_files(n_bytes: int) -> None:
    """Let no file of this process grow beyond this, if it is not 0."""
    if n_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


# --- documents -------------------------------------------------------------------------------------------------------


def memory(seed: int) -> torch.Tensor:
    """(4, 32) float32 that float16 holds exactly."""
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).half().float()


def make(name: str, seed: int, **fields) -> dict:
    """A document with its memory; both tell the seed."""
    return {"id": name, "text": f"text {seed} of {name}", "memory": memory(seed), "year": 2000 + seed, **fields}


def make_many(count: int, name: str = "d", first: int = 0) -> list[dict]:
    return [make(f"{name}{index}", index) for index in range(first, first + count)]


def by_id(documents: list[dict]) -> dict[str, dict]:
    return {document["id"]: document for document in documents}


def make_memory(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 4, 32) memories that look like real ones: a common mean, few directions, clusters."""
    fixed = torch.Generator().manual_seed(12345)
    mean = torch.randn(128, generator=fixed) * 2
    directions = torch.randn(16, 128, generator=fixed)
    centres = torch.randn(40, 16, generator=fixed)
    own = torch.Generator().manual_seed(seed)
    place = centres[torch.randint(40, (n,), generator=own)] + 0.6 * torch.randn(n, 16, generator=own)
    return (mean + place @ directions + 0.3 * torch.randn(n, 128, generator=own)).view(n, 4, 32)


def make_documents(n: int, seed: int = 0, prefix: str = "d") -> list[dict]:
    """Documents of one chunk that bring such a memory; `part` is 0 to 99, `year` 2000 to 2009."""
    return [
        {"id": f"{prefix}{row}", "text": f"text {row}", "memory": memory, "year": 2000 + row % 10, "part": row % 100}
        for row, memory in enumerate(make_memory(n, seed))
    ]


def build(model, path: Path, count: int = 10, **options) -> CompressedCorpus:
    """d0, d1, ... as float16 in shards of four."""
    return CompressedCorpus.build(model, make_many(count), path, **{"codec": "float16", "shard_size": 4} | options)


# --- files -----------------------------------------------------------------------------------------------------------


def read_json(corpus) -> dict:
    return json.loads((corpus.folder / "corpus.json").read_text())


def edit_json(corpus, **fields) -> None:
    (corpus.folder / "corpus.json").write_text(json.dumps(read_json(corpus) | fields))


def rejected(folder: Path) -> list[dict]:
    path = folder / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def named_files(corpus) -> set[str]:
    """What corpus.json names, with itself and the card."""
    content = read_json(corpus)
    states = {f"codec/{key}.safetensors" for key in content["codec_states"]}
    return {"corpus.json", "README.md", *(shard["file"] for shard in content["shards"]), *states}


def assert_has_no_strays(corpus) -> None:
    """Every file is published, the list of rejected rows, or derived and in use."""
    found = files(corpus.folder)
    published = {name for name in found if not name.startswith("index/")} - {"rejected.jsonl", "files.jsonl"}
    segments = {name.split("/")[2] for name in found if name.startswith("index/segments/")}
    assert published == named_files(corpus) and segments == {segment.key for segment in corpus.snapshot.segments}
    assert not [name for name in found if "partial" in name or name.endswith((".pid", ".ids", ".tmp"))]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file but locks: equal only if nothing was written again."""
    found = {name: (folder / name).stat() for name in files(folder) if ".lock" not in name}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def damage(path: Path, kind: str) -> None:
    """Make a file missing, or put its half, a part of it or other bytes in its place; else `kind` is the new text."""
    data = path.read_bytes()
    middle = len(data) // 2
    contents = {"empty": b"", "cut": data[:middle], "short": data[:-7], "longer": data + b"\0"}
    contents["flipped"] = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    contents["garbage"] = random.Random(0).randbytes(len(data) + 9)
    path.unlink()
    if kind != "missing":
        path.write_bytes(contents.get(kind, kind.encode()))


def n_shards(folder: Path) -> int:
    return len(list((folder / "data").glob("0*.parquet")))


# --- what a corpus holds ---------------------------------------------------------------------------------------------


def read_all(corpus) -> list[dict]:
    """Every document, in order."""
    ids = list(corpus.document_ids())
    assert len(ids) == len(set(ids)) == len(corpus)
    return corpus.get(ids) if ids else []


def texts(corpus) -> dict[str, str]:
    """The first text of every document, in order."""
    return {found["document_id"]: found["spans"][0]["text"] for found in read_all(corpus)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of any vector."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def assert_holds(corpus, expected: dict[str, dict], error: float = 1e-3) -> None:
    """The corpus has exactly these documents in this order, with their memories, and every byte is right."""
    found = read_all(corpus)
    assert [document["document_id"] for document in found] == list(expected)
    for document, given in zip(found, expected.values(), strict=True):
        assert [span["text"] for span in document["spans"]] == [given["text"]]
        assert relative_error(document["memory"][0], given["memory"]) <= error
        assert document["metadata"] == {"year": given["year"]} and document["title"] == ""
    content = read_json(corpus)
    assert content["n_documents"] == content["n_spans"] == len(expected)
    for k in (2, 4):
        query = torch.randn(3, k, 32, generator=torch.Generator().manual_seed(k))
        assert_ranked(corpus.search(query, 7), ranking(corpus, query, 7))
    assert corpus.verify() == []


def contents(corpus: CompressedCorpus) -> tuple:
    """All that a corpus holds, in order, and what it left out."""
    found = read_all(corpus)
    memory = torch.cat([document.pop("memory") for document in found])
    return found, memory, rejected(corpus.folder), corpus.manifest.n_rejected


def check_same(corpus: CompressedCorpus, expected: tuple) -> None:
    found = contents(corpus)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and found[2:] == expected[2:]
    assert corpus.verify() == []
    assert_has_no_strays(corpus)


def assert_takes_another(folder: Path) -> None:
    corpus = CompressedCorpus.open(folder)
    assert corpus.add([make("last", 5000)]).n_documents == 1 and corpus.verify() == []
    assert_has_no_strays(corpus)


# --- what search finds -----------------------------------------------------------------------------------------------


def ids(found: list[list[dict]]) -> list[list[str]]:
    return [[hit["document_id"] for hit in hits] for hits in found]


def top(corpus, document: dict) -> dict:
    """The best hit for a document's own memory."""
    return corpus.search(document["memory"][None], 1)[0][0]


def ranking(corpus, queries: torch.Tensor, top_k: int, keep: Callable[[dict], bool] = lambda document: True) -> list:
    """(document_id, span, score) rows of every question, by `cosine_scores` over all memories of the corpus."""
    documents = [document for document in read_all(corpus) if keep(document)]
    if not documents:
        return [[] for _ in queries]
    memory = torch.cat([document["memory"] for document in documents])
    scores = cosine_scores(queries, memory.expand(len(queries), *memory.shape), queries.shape[1])
    parts = scores.split([len(document["memory"]) for document in documents], dim=1)
    best = torch.stack([part.max(1).values for part in parts], 1)
    spans = torch.stack([part.max(1).indices for part in parts], 1)
    order = best.sort(dim=1, descending=True, stable=True).indices[:, :top_k].tolist()
    return [
        [(documents[place]["document_id"], int(spans[row, place]), float(best[row, place])) for place in places]
        for row, places in enumerate(order)
    ]


def assert_ranked(found: list[list[dict]], expected: list) -> None:
    """Ids, spans and order are equal, scores to 1e-5."""
    for hits, rows in zip(found, expected, strict=True):
        assert [(hit["document_id"], hit["span"]) for hit in hits] == [row[:2] for row in rows]
        assert [hit["score"] for hit in hits] == pytest.approx([row[2] for row in rows], abs=1e-5)


def assert_alike(found: list[list[dict]], exact: list[list[dict]]) -> None:
    """As many hits each, at least 95 % of them the same, with the same scores, the best first."""
    both = 0
    for mine, others in zip(found, exact, strict=True):
        scores = {hit["document_id"]: hit["score"] for hit in others}
        assert len(mine) == len(others) == len({hit["document_id"] for hit in mine})
        assert [hit["score"] for hit in mine] == sorted((hit["score"] for hit in mine), reverse=True)
        for hit in mine:
            both += hit["document_id"] in scores
            assert hit["score"] == pytest.approx(scores.get(hit["document_id"], hit["score"]), abs=1e-6)
    assert both >= 0.95 * sum(map(len, exact))
