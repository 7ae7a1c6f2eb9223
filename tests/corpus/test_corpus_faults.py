"""Builds that are killed or find no room on the disk, and damaged files: nothing is lost, doubled or taken for good.

Builders are other processes, and are ended by SIGKILL.
"""

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from corpora import assert_has_no_strays, damage, ids, read_all, receive, rejected, stamps, start
from tiny import randomize_adapters, save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus

N_ROWS = 72
OPTIONS = {"shard_size": 8, "batch_size": 1}


def work(connection, checkpoint, documents, path, limit):
    """Build where no file may grow beyond `limit` bytes; sends the number of documents or the error."""
    torch.set_num_threads(1)
    model = CLaRaForRAG.from_pretrained(checkpoint)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        connection.send(len(CompressedCorpus.build(model, documents, path, **OPTIONS)))
    except Exception as error:
        connection.send(f"{'OSError' if isinstance(error, OSError) else ''} {error!r}")


def build(checkpoint, documents, path, limit: int = 0) -> int | str:
    """Build in another process; the number of documents, or the error."""
    process, connection = start(work, checkpoint, documents, path, limit)
    outcome = receive(connection)
    process.join()
    return outcome


def kill_when(checkpoint, documents, path, condition) -> bool:
    """Kill a build as soon as a condition holds; whether it was still at work."""
    process, _ = start(work, checkpoint, documents, path, 0)
    while process.is_alive() and not condition():
        pass
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


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
    found = read_all(corpus)
    memory = torch.cat([document.pop("memory") for document in found])
    return found, memory, rejected(corpus.folder), corpus.manifest.n_rejected


@pytest.fixture(scope="module")
def finished(shared_model, source, tmp_path_factory) -> Path:
    """A build that was left alone; copy it."""
    folder = tmp_path_factory.mktemp("finished") / "c"
    assert len(CompressedCorpus.build(shared_model, source, folder, **OPTIONS)) == 65
    return folder


@pytest.fixture(scope="module")
def expected(finished) -> tuple:
    return contents(CompressedCorpus.open(finished))


def check_same(corpus: CompressedCorpus, expected: tuple) -> None:
    found = contents(corpus)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and found[2:] == expected[2:]
    assert corpus.verify() == []
    assert_has_no_strays(corpus)


def n_shards(folder: Path) -> int:
    return len(list((folder / "data").glob("0*.parquet")))


@pytest.fixture(scope="module")
def killed(checkpoint, source, tmp_path_factory) -> Path:
    """An unfinished build with five shards or a few more; copy it."""
    folder = tmp_path_factory.mktemp("killed") / "c"
    assert kill_when(checkpoint, source, folder, lambda: n_shards(folder) >= 5)
    assert not (folder / "corpus.json").exists()
    return folder


@pytest.fixture
def unfinished(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "c"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_build_that_is_killed_again_and_again_goes_on(checkpoint, source, expected, tmp_path, seed):
    folder, draw = tmp_path / "c", random.Random(seed)
    for number in range(20 if seed else 2):  # of twenty, every second gets at least one shard further
        shards = {path: path.stat().st_ino for path in (folder / "data").glob("0*.parquet")}
        wanted, pause = (len(shards) + number % 2, draw.uniform(0, 0.05)) if seed else (len(shards) + 2 + number, 0)

        def is_time(wanted=wanted, pause=pause) -> bool:
            return n_shards(folder) >= wanted and time.sleep(pause) is None

        if not kill_when(checkpoint, source, folder, is_time):
            assert seed and number
            break
        kept = [path for path, inode in shards.items() if path.exists() and path.stat().st_ino == inode]
        assert len(kept) >= len(shards) - 1  # the last may have been written and not recorded
    assert build(checkpoint, source, folder) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


MOMENTS = ["build/*.json", "build/*.ids", "codec/.*.partial", "codec/*", "data/.*.partial", "build/*.rejected.jsonl"]
MOMENTS += ["README.md", ".README.md.*.partial", ".corpus.json.*.partial", "corpus.json", "index", "rejected.jsonl"]
MOMENTS += ["index/segments/.*.partial", "index/segments/*/segment.json"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_that_is_killed_at_a_certain_moment_goes_on(checkpoint, source, expected, tmp_path, moment):
    folder = tmp_path / "c"
    kill_when(checkpoint, source, folder, lambda: any(folder.glob(moment)))
    assert build(checkpoint, source, folder) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


def test_what_a_killed_writer_leaves_and_opening_it_stop_nothing(shared_model, source, expected, unfinished, tmp_path):
    for name in (".corpus.json.4711.partial", ".README.md.4711.partial", "data/.00000-000002.4711.partial"):
        (unfinished / name).write_text("half of it")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="corpus.json"):
        CompressedCorpus.open(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="must be finished first. Run the same build again"):
            CompressedCorpus.open(unfinished)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.mark.parametrize(("folder", "kind"), [("data", "short"), ("data", "missing"), ("codec", "flipped")])
def test_what_was_damaged_before_a_build_goes_on_is_made_again(
    shared_model, source, expected, unfinished, folder, kind
):
    damage(min((unfinished / folder).glob("[0-9a-f]*")), kind)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


def test_an_unfinished_build_goes_on_with_its_rows_and_options_alone(shared_model, source, expected, unfinished):
    def kept() -> dict:
        return {name: stamp for name, stamp in stamps(unfinished).items() if not name.endswith((".pid", ".ids"))}

    rows, before = source.read_text(), kept()
    options = [{"codec": "int4"}, {"shard_size": 5}, {"memory_size": 2}, {"metadata": {"year": "int32"}}]
    options += [{"title_column": "name"}, {"rank": 0, "world_size": 2}]
    changes = [("number 2 is", "number 2 IS"), ('"d2"', '"x2"'), ('"year": 2}', '"year": 3}'), ('"d71"', '"d711"')]
    for other in options:
        with pytest.raises(ValueError, match="must go on with the input"):
            CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS | other)
    try:
        for old, new in changes:
            source.write_text(rows.replace(old, new))
            with pytest.raises(ValueError, match="must go on with the input|first rows are others than before"):
                CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS)
    finally:
        source.write_text(rows)
    assert kept() == before
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.mark.parametrize("limit", [100, 9000])
def test_a_full_disk_loses_nothing(checkpoint, shared_model, source, expected, tmp_path, limit):
    assert build(checkpoint, source, tmp_path / "c", limit).startswith("OSError")
    check_same(CompressedCorpus.build(shared_model, source, tmp_path / "c", **OPTIONS), expected)


def test_a_full_disk_under_the_codecs_state(source, tmp_path):
    model = CLaRaForRAG.from_backbone(save_backbone(tmp_path / "b", hidden_size=128), memory_sizes=(8,), lora_rank=2)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "checkpoint")
    assert build(tmp_path / "checkpoint", source, tmp_path / "c", 8200).startswith("OSError")


def test_a_full_disk_does_not_lose_the_list_of_rejected_rows(checkpoint, shared_model, source, expected, unfinished):
    assert build(checkpoint, source, unfinished, 150).startswith("OSError")
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy that keeps the times of the files."""
    return Path(shutil.copytree(finished, tmp_path / "c"))


KINDS = ("missing", "cut", "empty", "garbage")
FILES = [*(f"index/segments/*/{name}" for name in ("rows.bin", "table.arrow", "ids.npy"))]
FILES += [f"index/{name}" for name in ("segments/*/segment.json", "k4/*.faiss", "k4/*.safetensors")]
DERIVED = [(name, kind) for name in FILES for kind in KINDS]
DERIVED += [("index/segments/*/segment.json", text) for text in ("[]", "null", "{}", '{"shards": 5}')]


@pytest.mark.parametrize(("pattern", "kind"), DERIVED)
def test_damaged_derived_files_are_made_again(folder, shared_model, expected, pattern, kind):
    query = shared_model.encode_queries(["What is about Rome?"])
    before = CompressedCorpus.open(folder, index="flat").search(query, 5)
    (path,) = folder.glob(pattern)
    damage(path, kind)
    opened = CompressedCorpus.open(folder, index="flat")
    assert ids(opened.search(query, 5)) == ids(before)
    check_same(opened, expected)


def test_a_second_builder_is_told_who_works(checkpoint, shared_model, source, expected, tmp_path):
    folder = tmp_path / "c"
    process, connection = start(work, checkpoint, source, folder, 0)
    while not n_shards(folder):
        pass
    with pytest.raises(RuntimeError, match=f"process {process.pid} writes to it. Wait until it is done, or end it"):
        CompressedCorpus.build(shared_model, source, folder, **OPTIONS)
    assert receive(connection) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)
