"""Builds that are killed or find no room on the disk, and damaged files: nothing is lost, doubled or taken for good.

Builders are processes that are forked from one that has loaded the model, and are ended by SIGKILL.
"""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import randomize_adapters, save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus

NURSERY = """
import json, os, resource, sys, time
import torch
from transformers.utils import logging
from modeling_clara import CLaRaForRAG, CompressedCorpus

torch.set_num_threads(1)
logging.disable_progress_bar()
model = CLaRaForRAG.from_pretrained(sys.argv[1])
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            if order["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
            mine = CLaRaForRAG.from_pretrained(order["checkpoint"]) if order["checkpoint"] else model
            corpus = CompressedCorpus.build(mine, order["documents"], order["path"], **order["options"])
            outcome = {"documents": len(corpus)}
        except BaseException as error:
            outcome = {"error": repr(error), "of_system": isinstance(error, OSError)}
        print(json.dumps(outcome), flush=True)
        os._exit(0)
    print(json.dumps({"child": child}), flush=True)
    print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""
N_ROWS = 72
OPTIONS = {"shard_size": 8, "batch_size": 1}


class Nursery:
    """One process that forks builders, one at a time."""

    def __init__(self, checkpoint: Path, log):
        command = [sys.executable, "-c", NURSERY, str(checkpoint)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.outcome: dict = {}

    def _read_until(self, name: str):
        while name not in self.outcome:
            self.outcome |= json.loads(self.process.stdout.readline())
        return self.outcome[name]

    def start(self, documents, path, *, limit: int = 0, checkpoint: str = "", **options) -> int:
        """Begin a build; returns its pid."""
        order = {"documents": str(documents), "path": str(path), "limit": limit, "checkpoint": str(checkpoint)}
        self.outcome = {}
        self.process.stdin.write(json.dumps(order | {"options": OPTIONS | options}) + "\n")
        self.process.stdin.flush()
        return self._read_until("child")

    def wait(self) -> dict:
        """What became of it: `status`, and `documents` or `error`."""
        self._read_until("status")
        return self.outcome

    def build(self, documents, path, **options) -> dict:
        self.start(documents, path, **options)
        return self.wait()

    def kill_when(self, documents, path, condition, **options) -> bool:
        """Kill a build as soon as a condition holds; whether it was still at work."""
        child = self.start(documents, path, **options)
        while not condition() and not select.select([self.process.stdout], [], [], 0)[0]:  # what it says at its end
            pass
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self.wait()["status"] == -signal.SIGKILL


@pytest.fixture(scope="module")
def nursery(checkpoint, tmp_path_factory):
    with open(tmp_path_factory.mktemp("nursery") / "log", "w") as log:
        nursery = Nursery(checkpoint, log)
        yield nursery
        nursery.process.stdin.close()
        nursery.process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Rows with long documents, ids given twice and lines that are broken."""
    lines = []
    for number in range(N_ROWS):
        row = {"id": f"d{number}", "text": f"Document number {number} is about Paris.", "year": number}
        if number % 10 == 3:
            row["text"] = " ".join(f"Part {part} of document {number} is about Rome." for part in range(9))
        if number % 25 == 7:
            row["id"] = f"d{number - 5}"
        lines.append("{" if number % 17 == 5 else json.dumps(row))
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(corpus: CompressedCorpus) -> tuple:
    """All that a corpus holds, in order, and what it left out."""
    ids = list(corpus.document_ids())
    assert len(ids) == len(set(ids)) == len(corpus) and corpus.verify() == []
    found = corpus.get(ids)
    memory = torch.cat([document.pop("memory") for document in found])
    lines = (corpus.folder / "rejected.jsonl").read_text().splitlines()
    return found, memory, [json.loads(line) for line in lines], corpus.manifest.n_rejected


@pytest.fixture(scope="module")
def expected(nursery, source, tmp_path_factory) -> tuple:
    """Of a build that was left alone."""
    folder = tmp_path_factory.mktemp("expected") / "c"
    outcome = nursery.build(source, folder)
    assert outcome.get("documents") == 65, outcome
    return contents(CompressedCorpus.open(folder))


def check_same(corpus: CompressedCorpus, expected: tuple) -> None:
    found = contents(corpus)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and found[2:] == expected[2:]
    names = {path.relative_to(corpus.folder).as_posix() for path in corpus.folder.rglob("*") if path.is_file()}
    named = {shard.file for shard in corpus.manifest.shards}
    assert {name for name in names if name.startswith(("data/", "codec/"))} - named == {
        f"codec/{key}.safetensors" for key in corpus.manifest.codec_states
    }
    assert not [name for name in names if "partial" in name or name.startswith("build/")]


def n_shards(folder: Path) -> int:
    return len(list((folder / "data").glob("0*.parquet")))


@pytest.fixture(scope="module")
def killed(nursery, source, tmp_path_factory) -> Path:
    """An unfinished build with five shards or a few more; copy it."""
    folder = tmp_path_factory.mktemp("killed") / "c"
    assert nursery.kill_when(source, folder, lambda: n_shards(folder) >= 5)
    assert not (folder / "corpus.json").exists()
    return folder


@pytest.fixture
def unfinished(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "c"))


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_build_that_is_killed_twice_goes_on(nursery, source, expected, tmp_path):
    folder = tmp_path / "c"
    assert nursery.kill_when(source, folder, lambda: n_shards(folder) >= 2)
    shards = {path: path.stat().st_ino for path in (folder / "data").glob("0*.parquet")}
    assert nursery.kill_when(source, folder, lambda: n_shards(folder) >= len(shards) + 3)
    kept = [path for path, inode in shards.items() if path.exists() and path.stat().st_ino == inode]
    assert len(kept) >= len(shards) - 1  # the last may have been written and not recorded
    assert nursery.build(source, folder)["documents"] == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_build_that_is_killed_twenty_times_goes_on(nursery, source, expected, tmp_path, seed):
    folder, chance, n_killed = tmp_path / "c", random.Random(seed), 0
    while n_killed < 20:  # every second time it gets at least one shard further
        n_before, pause = n_shards(folder), chance.uniform(0, 0.05)

        def is_time(wanted=n_before + n_killed % 2, pause=pause):
            return n_shards(folder) >= wanted and time.sleep(pause) is None

        if not nursery.kill_when(source, folder, is_time):
            break
        n_killed += 1
    assert n_killed > 0 and nursery.build(source, folder).get("documents") == len(expected[0]), nursery.outcome
    check_same(CompressedCorpus.open(folder), expected)


MOMENTS = ["build/*.json", "build/*.ids", "codec/.*.partial", "codec/*", "data/.*.partial", "build/*.rejected.jsonl"]
MOMENTS += ["README.md", ".README.md.*.partial", ".corpus.json.*.partial", "corpus.json", "index", "rejected.jsonl"]
MOMENTS += ["index/segments/.*.partial", "index/segments/*/segment.json"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_that_is_killed_at_a_certain_moment_goes_on(nursery, source, expected, tmp_path, moment):
    folder = tmp_path / "c"
    nursery.kill_when(source, folder, lambda: any(folder.glob(moment)))
    assert nursery.build(source, folder).get("documents") == len(expected[0]), nursery.outcome
    check_same(CompressedCorpus.open(folder), expected)


@pytest.mark.parametrize(
    "name", [".corpus.json.4711.partial", ".README.md.4711.partial", "data/.00000-000002.4711.partial"]
)
def test_what_a_killed_writer_leaves_stops_nothing(shared_model, source, expected, unfinished, name):
    (unfinished / name).write_text("half of it")
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


def test_opening_an_unfinished_build_says_so_and_stops_nothing(shared_model, source, expected, unfinished):
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="must be finished first. Run the same build again"):
            CompressedCorpus.open(unfinished)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


def test_opening_what_is_no_corpus_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="corpus.json"):
        CompressedCorpus.open(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no codec", "damaged codec"])
def test_what_was_damaged_in_an_unfinished_build_is_made_again(shared_model, source, expected, unfinished, damage):
    path = sorted((unfinished / ("codec" if "codec" in damage else "data")).glob("[0-9a-f]*"))[0]
    if damage in ("missing", "no codec"):
        path.unlink()
    else:
        change(path, damage)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


def test_other_rows_than_an_unfinished_build_began_with_are_an_error(shared_model, source, expected, unfinished):
    kept = source.read_text()
    paths = [path for path in unfinished.rglob("*") if path.is_file() and path.suffix not in (".lock", ".pid", ".ids")]
    before = {path: path.read_bytes() for path in paths}
    try:
        source.write_text(kept.replace("number 2 is", "number 2 IS"))
        with pytest.raises(ValueError, match="its first rows are others than before"):
            CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS)
    finally:
        source.write_text(kept)
    assert {path: path.read_bytes() for path in before} == before
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 1500, 9000])
def test_a_full_disk_loses_nothing(nursery, shared_model, source, expected, tmp_path, limit):
    outcome = nursery.build(source, tmp_path / "c", limit=limit)
    assert outcome.get("of_system") and outcome["status"] == 0, outcome
    check_same(CompressedCorpus.build(shared_model, source, tmp_path / "c", **OPTIONS), expected)


def test_a_full_disk_under_the_codecs_state(nursery, source, tmp_path):
    model = CLaRaForRAG.from_backbone(save_backbone(tmp_path / "b", hidden_size=128), memory_sizes=(8,), lora_rank=2)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "checkpoint")
    outcome = nursery.build(source, tmp_path / "c", limit=8200, checkpoint=tmp_path / "checkpoint")
    assert outcome.get("of_system"), outcome


def test_a_full_disk_does_not_lose_the_list_of_rejected_rows(nursery, source, expected, unfinished):
    outcome = nursery.build(source, unfinished, limit=150)
    assert outcome.get("of_system"), outcome
    assert nursery.build(source, unfinished).get("documents") == len(expected[0])
    check_same(CompressedCorpus.open(unfinished), expected)


# --- damaged files ---------------------------------------------------------------------------------------------------


def change(path: Path, damage: str, other: Path | None = None) -> None:
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return
    if damage == "truncated":
        del data[-7:]
    elif damage == "exchanged":
        data = other.read_bytes()
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def finished(killed, source, shared_model, tmp_path_factory) -> Path:
    """A corpus of several shards; copy it."""
    folder = Path(shutil.copytree(killed, tmp_path_factory.mktemp("finished") / "c"))
    CompressedCorpus.build(shared_model, source, folder, **OPTIONS)
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy that keeps the times of the files."""
    return Path(shutil.copytree(finished, tmp_path / "c"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "exchanged"])
@pytest.mark.parametrize("opened", [False, True], ids=["first", "again"])
def test_a_damaged_shard_is_named(folder, damage, opened, shared_model, tmp_path):
    corpus = CompressedCorpus.open(folder)
    CompressedCorpus.build(shared_model, ["another"], tmp_path / "other", codec="int8")
    shard = corpus.manifest.shards[3].file
    change(folder / shard, damage, next((tmp_path / "other" / "data").iterdir()))
    assert shard in corpus.verify()[0]
    if not opened:
        shutil.rmtree(folder / "index")
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match=Path(shard).name):
        CompressedCorpus.open(folder)


DAMAGES = {
    f"{name} is {kind}": (name, kind)
    for name in ("rows.bin", "table.arrow", "ids.npy", "segment.json")
    for kind in ("missing", "cut", "empty", "garbage")
}
DAMAGES |= {f"segment.json is {text}": ("segment.json", text) for text in ("[]", "null", "{}", '{"shards": 5}')}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_derived_files_are_made_again(folder, expected, name):
    file, kind = DAMAGES[name]
    (path,) = folder.glob(f"index/segments/*/{file}")
    data = path.read_bytes()
    garbage = random.Random(0).randbytes(len(data) + 9)
    texts = {"cut": data[: len(data) // 2], "empty": b"", "garbage": garbage}
    path.unlink() if kind == "missing" else path.write_bytes(texts.get(kind, kind.encode()))
    check_same(CompressedCorpus.open(folder), expected)


@pytest.mark.parametrize("pattern", ["*.faiss", "*.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "garbage"])
def test_a_damaged_search_index_is_made_again(folder, shared_model, pattern, kind):
    query = shared_model.encode_queries(["What is about Rome?"])
    before = CompressedCorpus.open(folder, index="flat").search(query, 5)
    (path,) = folder.glob(f"index/k4/{pattern}")
    data = path.read_bytes()
    texts = {"cut": data[: len(data) // 2], "empty": b"", "garbage": random.Random(0).randbytes(len(data))}
    path.unlink()
    if kind != "missing":
        path.write_bytes(texts[kind])
    after = CompressedCorpus.open(folder, index="flat").search(query, 5)
    assert [hit["document_id"] for hit in after[0]] == [hit["document_id"] for hit in before[0]]


# --- what does not belong together -----------------------------------------------------------------------------------


def test_a_second_builder_is_told_who_works(nursery, shared_model, source, expected, tmp_path):
    folder = tmp_path / "c"
    child = nursery.start(source, folder)
    while not n_shards(folder):
        pass
    with pytest.raises(RuntimeError, match=f"process {child} writes to it. Wait until it is done, or end it"):
        CompressedCorpus.build(shared_model, source, folder, **OPTIONS)
    assert nursery.wait().get("documents") == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


def test_another_compressor_is_refused_with_both_fingerprints(folder, model, shared_model):
    assert CompressedCorpus.open(folder, model=shared_model).model is shared_model
    with torch.no_grad():
        model.memory_embeddings += 0.5
    both = f"{shared_model.fingerprint[:12]}.*{model.fingerprint[:12]}"
    with pytest.raises(ValueError, match=both):
        CompressedCorpus.open(folder, model=model)
    with pytest.raises(ValueError, match=both):
        CompressedCorpus.open(folder).attach(model)


def test_a_newer_format_is_refused(folder):
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2, "news": 1}))
    with pytest.raises(ValueError, match="`format_version` of .* must be <= 1, got 2.*upgrade"):
        CompressedCorpus.open(folder)
