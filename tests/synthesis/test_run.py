"""A run is killed, starved and taken up again: every chunk is there once, and no answered call is made again."""

import json
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from teacher_server import TeacherServer

from modeling_clara.cli.demo import PASSAGES
from modeling_clara.corpus.storage import read_lines
from modeling_clara.synthesis.backends import Endpoint
from modeling_clara.synthesis.client import OutOfBudget, Teacher, TeacherDown
from modeling_clara.synthesis.run import synthesize
from recipes.publishing.checks import check_card, check_paths
from recipes.training.data import read_documents, read_targets

ROOT = Path(__file__).parents[2]
CONCURRENCY = 8
PROCESSES = multiprocessing.get_context("forkserver")  # so that a process to kill starts in no time
PRELOADED = ["modeling_clara.synthesis.engine", "modeling_clara.synthesis.scp", "modeling_clara.synthesis.run"]
PRELOADED += ["openai", "datasets", "recipes.publishing.checks", "recipes.training.data"]
PROCESSES.set_forkserver_preload(PRELOADED)


def write_documents(folder: Path, n: int) -> Path:
    passages = read_lines(PASSAGES)
    rows = [{**passages[number % len(passages)], "id": f"d{number}"} for number in range(n)]
    for number, row in enumerate(rows):
        row["text"] += f" Its number in the list of places is {number + 1000}."
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(documents, output, base_url: str, *, teacher: dict | None = None, **options):
    """One call of `synthesize` against a server."""

    def open_teacher() -> Teacher:
        options = {"concurrency": CONCURRENCY, "backoff": 0.01, "timeout": 5.0, **(teacher or {})}
        return Teacher(Endpoint(base_url), "loopback-teacher", **options)

    options = {"model": "loopback-teacher", "settings": {"rounds": 1}, **options}
    return synthesize(documents, output, open_teacher, concurrency=CONCURRENCY, **options)


def run_with_little_disk(n_bytes: int, documents, output, base_url: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        run(documents, output, base_url)
    except OSError as error:
        raise SystemExit(f"full: {error}") from error


def started(target, *args) -> multiprocessing.Process:
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


def load(folder: Path) -> list[dict]:
    """All rows; `datasets` takes two folders of one name for the same if they share its cache."""
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache")).to_list()


def accounted(output: Path, rejects: Path) -> Counter:
    """How often each chunk is there, as record or as rejected document."""
    ids = Counter(record["id"] for record in read_lines(output))
    ids.update(row["document_id"] for row in read_lines(rejects) if row["kind"] == "document")
    return ids


def test_a_run_that_is_killed_repeats_at_most_the_calls_in_flight(tmp_path):
    documents, n, kills = write_documents(tmp_path, 25), 25, 0
    with TeacherServer() as server:
        expected = run(documents, tmp_path / "whole.jsonl", server.base_url)
        once = Counter(server.answered)
    generator = random.Random(0)
    with TeacherServer(latency=0.01) as server:
        output = tmp_path / "killed.jsonl"
        while not (tmp_path / "killed.synthesis.json").exists():
            process = started(run, documents, output, server.base_url)
            until = sum(server.answered.values()) + generator.randrange(10, 100)
            while process.is_alive() and sum(server.answered.values()) < until:
                time.sleep(0.001)
            kills += process.is_alive()
            process.kill()
            process.join()
            assert process.exitcode in (0, -9) and kills < 50
        answered = Counter(server.answered)
    assert kills >= 4
    assert answered.keys() == once.keys()
    assert (answered - once).total() <= kills * CONCURRENCY
    ids = accounted(output, tmp_path / "killed.rejects.jsonl")
    assert set(ids.values()) == {1} and len(ids) == n
    by_id = {record["id"]: record for record in read_lines(tmp_path / "whole.jsonl")}
    assert {record["id"]: record for record in read_lines(output)} == by_id
    report = json.loads((tmp_path / "killed.synthesis.json").read_text())
    left_out = {"options"}
    assert {name: report[name] for name in report if name not in left_out} == {
        name: expected[name] for name in expected if name not in left_out
    }
    assert not (tmp_path / "killed.work").exists()


def test_bad_answers_and_wrong_facts_leave_every_chunk_accounted_for(tmp_path):
    documents = write_documents(tmp_path, 30)
    faults = {"429": 23, "500": 29, "broken": 31, "truncated": 37, "400": 41}
    with TeacherServer(every=faults, wrong_every=5, skip_every=4) as server:
        report = run(documents, tmp_path / "data", server.base_url)
    rows = load(tmp_path / "data")
    ids = Counter(row["id"] for row in rows)
    rejects = read_lines(tmp_path / "data" / "rejects.jsonl")
    ids.update(row["document_id"] for row in rejects if row["kind"] == "document")
    assert set(ids.values()) == {1} and len(ids) == report["chunks"] == 30
    planted = {(entry["question"], entry["answer"]) for entry in server.planted if entry.get("question")}
    kept = {(pair["question"], pair["answers"][0]) for row in rows for pair in row["qas"]}
    assert planted and kept and not planted & kept
    assert sum(report["pairs"]["simple"].values()) == report["counts"]["simple_accepted"]
    assert sum(number for rounds in report["pairs"].values() for number in rounds.values()) == sum(
        len(row["qas"]) for row in rows
    )


@pytest.mark.parametrize("task", ["scp", "instruct", "retrieval"])
def test_training_reads_the_rows_and_the_hub_the_card(task, tmp_path):
    documents, folder = write_documents(tmp_path, 12), tmp_path / "data"
    with TeacherServer() as server:
        run(documents, folder, server.base_url, task=task, settings={}, card={"license": "cc-by-4.0"})
    rows = load(folder)
    assert rows
    for row in rows:
        assert read_documents(row) and read_targets(row)
        if task != "scp":
            assert all(row["docs"][place]["id"].startswith("d") for place in row["pos_index"])
    assert not check_card(folder, folder) + check_paths(folder, folder)
    assert "license: cc-by-4.0" in (folder / "README.md").read_text()


def test_a_run_goes_on_only_as_it_began(tmp_path):
    documents, output = write_documents(tmp_path, 6), tmp_path / "data.jsonl"
    with TeacherServer() as server:
        with pytest.raises(OutOfBudget, match="max_tokens_total"):
            run(documents, output, server.base_url, teacher={"max_tokens_total": 20_000})
        begun = server.answered.total()
        for changed, what in (
            ({"settings": {"rounds": 2}}, "`rounds` was 1, got 2"),
            ({"model": "another"}, "`model` was loopback-teacher, got another"),
            ({"world_size": 2}, "`world_size` was 1, got 2"),
            ({"leakage": [documents]}, "`leakage` was {}"),
        ):
            with pytest.raises(ValueError, match=what):
                run(documents, output, server.base_url, **changed)
        with pytest.raises(OutOfBudget):  # what was used before counts
            run(documents, output, server.base_url, teacher={"max_tokens_total": 20_000})
        report = run(documents, output, server.base_url)
        calls = server.answered.total()
        repeated = calls - len(server.answered)  # what was answered while the budget ended the run
        assert 0 < begun and repeated <= 2 * CONCURRENCY
        assert run(documents, output, server.base_url) == report
        assert server.answered.total() == calls == report["calls"] + repeated
        with pytest.raises(ValueError, match="`rounds` was 1, got 2"):
            run(documents, output, server.base_url, settings={"rounds": 2})
        (tmp_path / "mine.jsonl").write_text("")
        with pytest.raises(ValueError, match="must be a new file"):
            run(documents, tmp_path / "mine.jsonl", server.base_url)


def test_ranks_share_the_chunks_and_the_last_writes_the_files(tmp_path):
    documents = write_documents(tmp_path, 9)
    with TeacherServer() as server:
        whole = run(documents, tmp_path / "whole", server.base_url)
        server.answered.clear()
        assert run(documents, tmp_path / "shared", server.base_url, rank=1, world_size=2) is None
        shared = run(documents, tmp_path / "shared", server.base_url, rank=0, world_size=2)
        assert set(server.answered.values()) == {1}
    for report in (whole, shared):
        report["options"].pop("world_size")
    assert whole == shared
    rows = [{row["id"]: row for row in load(tmp_path / name)} for name in ("whole", "shared")]
    assert len(rows[0]) == 9 and rows[0] == rows[1]


def test_a_full_disk_ends_the_run_and_costs_nothing_that_was_done(tmp_path):
    documents, output = write_documents(tmp_path, 40), tmp_path / "data.jsonl"
    with TeacherServer() as server:
        process = started(run_with_little_disk, 120_000, documents, output, server.base_url)
        process.join()
        assert process.exitcode == 1 and not output.exists()
        run(documents, output, server.base_url)
    ids = accounted(output, tmp_path / "data.rejects.jsonl")
    assert set(ids.values()) == {1} and len(ids) == 40


def test_a_teacher_that_is_gone_ends_the_run(tmp_path):
    documents, output = write_documents(tmp_path, 6), tmp_path / "data.jsonl"
    with TeacherServer() as server:
        gone = server.base_url
    with pytest.raises(TeacherDown, match="the same command goes on"):
        run(documents, output, gone, teacher={"retries": 1})
    with TeacherServer() as server:
        assert run(documents, output, server.base_url)["chunks"] == 6


def test_what_cannot_be_read_is_a_reject(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Oslo is the capital of Norway. It had 709,037 inhabitants in 2022.")
    (folder / "b.txt").write_text("  ")
    (folder / "c.bin").write_bytes(b"\x00\x01")
    with TeacherServer() as server:
        report = run(folder, tmp_path / "data.jsonl", server.base_url)
    assert (report["documents"], report["left_out"]) == (1, 2)
    rejects = [row for row in read_lines(tmp_path / "data.rejects.jsonl") if row["kind"] == "document"]
    assert {row["document_id"]: row["reason"].partition(":")[0] for row in rejects} == {
        "b.txt": "empty",
        "c.bin": "unsupported",
    }


@pytest.mark.slow
def test_two_workers_of_datatrove_share_a_run(tmp_path):
    documents = write_documents(tmp_path, 6)
    with TeacherServer() as server:
        command = ["-m", "recipes.synthesize", str(documents), "-o", str(tmp_path / "data.jsonl"), "--tasks", "2"]
        command += [
            "--model",
            "loopback-teacher",
            "--base-url",
            server.base_url,
            "--rounds",
            "1",
            "--set",
            "complex=0",
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 of 6 chunks accepted" in done.stdout and len(read_lines(tmp_path / "data.jsonl")) == 6
