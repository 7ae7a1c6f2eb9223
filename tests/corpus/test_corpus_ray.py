"""`python -m recipes.compress --executor ray` on a cluster of two nodes, one of which is killed while it works."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.corpus.jobs import BUILD_FOLDER

MODEL = Path(__file__).parents[2] / "model_cards" / "clara-pico"
TASKS, DOCUMENTS = 4, 2000

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed (make ray)")


def write_documents(path: Path) -> list[str]:
    text = "Document {0} is about the town {1}, which has {0} houses."
    rows = [{"id": f"d{n}", "text": text.format(n, n % 97)} for n in range(DOCUMENTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["id"] for row in rows]


def shards_of(corpus: Path) -> list[int]:
    """Shards that each rank has finished."""
    files = sorted((corpus / BUILD_FOLDER).glob("job-?????-of-?????.json"))
    return [len(json.loads(file.read_text())["shards"]) for file in files]


def compress(cluster, source: Path, corpus: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.compress", source, "-o", corpus, "--model", MODEL, "--executor", "ray"]
    command += ["--tasks", str(TASKS), "--cpus-per-task", "1", "--mem-per-cpu-gb", "1", "--shard-size", "16"]
    command += ["--threads", "1", "--codec", "float16"]
    with open(corpus.parent / "driver.log", "ab") as log:
        return subprocess.Popen(
            list(map(str, command)),
            env=cluster.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=MODEL.parents[1],
        )


def wait_for_work(driver: subprocess.Popen, corpus: Path) -> list[int]:
    """Wait until every rank has finished a shard, and none all of its own."""
    while driver.poll() is None:
        if len(found := shards_of(corpus)) == TASKS and all(found):
            return found
        time.sleep(0.05)
    raise AssertionError((corpus.parent / "driver.log").read_text()[-4000:])


def memories(corpus: CompressedCorpus) -> dict[str, torch.Tensor]:
    ids = [row["document_id"] for row in corpus.rows(["document_id"])]
    return dict(zip(ids, corpus.decode(range(len(ids))), strict=True))


def assert_is_whole(folder: Path, ids: list[str], alone: CompressedCorpus) -> None:
    """Every document once, with the memories that one process gives it, and every byte as it was written."""
    corpus = CompressedCorpus.open(folder)
    assert sorted(corpus.document_ids()) == sorted(ids)
    ours, wanted = memories(corpus), memories(alone)
    assert all(torch.allclose(ours[name].float(), wanted[name].float(), atol=0.02) for name in ids)
    command = [sys.executable, "-m", "modeling_clara.cli", "info", folder, "--verify", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["problems"] == []


@pytest.mark.parametrize("lost", ["machine", "raylet"])
def test_a_node_that_is_lost_loses_and_doubles_nothing(lost, tmp_path):
    """A machine, or Ray on it alone, whose ranks can still be at work when Ray starts them elsewhere."""
    from ray_cluster import RayCluster

    source, folder = tmp_path / "documents.jsonl", tmp_path / "corpus"
    ids = write_documents(source)
    with RayCluster(tmp_path) as cluster:
        driver = compress(cluster, source, folder)
        try:
            done = wait_for_work(driver, folder)
            if lost == "machine":
                cluster.kill(cluster.nodes[1])
            else:
                os.kill(cluster.processes(cluster.nodes[1], "raylet/raylet")[0], signal.SIGKILL)
            status = driver.wait(900)
            log = (tmp_path / "driver.log").read_text()
            assert "failed with RayActorError" in log
            if lost == "raylet" and status:  # a rank was refused, because it was still at work
                assert "must have one writer at a time" in log
                wait_for_ranks(cluster)
                status = compress(cluster, source, folder).wait(900)
        finally:
            driver.kill()
        assert status == 0, log[-4000:]
    assert sum(done) < DOCUMENTS / 16
    model = CLaRaForRAG.from_pretrained(MODEL)
    assert_is_whole(folder, ids, CompressedCorpus.build(model, str(source), tmp_path / "alone", codec="float16"))


def wait_for_ranks(cluster) -> None:
    """Until what was left of the lost node is done."""
    for _ in range(600):
        if not cluster.processes(cluster.nodes[1], "ray::RankWorker"):
            return
        time.sleep(1)
    raise AssertionError("ranks of a lost node still run")
