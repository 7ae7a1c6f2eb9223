"""recipes/deploy/ray_serve.py on a Ray node: OpenAI's client against two replicas, one of which is killed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from modeling_clara import CLaRaForRAG, CompressedCorpus

ROOT = Path(__file__).parents[2]
MODEL, CORPUS = ROOT / "model_cards" / "clara-pico", ROOT / "model_cards" / "clara-pico-corpus"
QUESTIONS = 30

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed (make ray)")
openai = pytest.importorskip("openai")


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: int = 600) -> None:
    for _ in range(seconds):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def ask(client, question: str) -> str:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=8).choices[0].message.content


def see_all(url: str, n_documents: int) -> None:
    """Wait until all replicas see that many documents: twenty answers in a row."""
    seen = 0
    for _ in range(600):
        with urllib.request.urlopen(url, timeout=60) as response:
            seen = seen + 1 if json.load(response)["documents"] == n_documents else 0
        if seen == 20:
            return
        time.sleep(0.2)
    raise AssertionError("a replica does not see what was added")


def test_a_replica_that_dies_is_replaced_and_its_questions_are_answered(tmp_path):
    from ray_cluster import RayCluster

    corpus, log = shutil.copytree(CORPUS, tmp_path / "corpus"), tmp_path / "serve.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "config.yaml"
    options = f"{corpus} --model {MODEL} --allow-anonymous"
    config.write_text(
        f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
        "applications:\n- name: default\n  route_prefix: /\n  import_path: recipes.deploy.ray_serve:build\n"
        f"  args: {{serve: '{options}', replicas: '2', cpus: '0.1'}}\n"
    )
    with RayCluster(tmp_path, n_nodes=1) as cluster:
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(config)]
        with open(log, "wb") as output:
            server = subprocess.Popen(
                command, env=cluster.environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=20, timeout=120) as client:
                first = ask(client, "What is the colour of item 1?")
                replicas = cluster.processes(cluster.nodes[0], "ServeReplica:default:clara")
                assert len(replicas) == 2
                os.kill(replicas[0], signal.SIGKILL)
                assert {ask(client, "What is the colour of item 1?") for _ in range(QUESTIONS)} == {first}
                for _ in range(300):
                    now = cluster.processes(cluster.nodes[0], "ServeReplica:default:clara")
                    if len(now) == 2 and replicas[0] not in now:
                        break
                    time.sleep(1)
                assert len(now) == 2 and replicas[0] not in now
                assert ask(client, "What is the colour of item 1?") == first
            model = CLaRaForRAG.from_pretrained(MODEL)
            opened = CompressedCorpus.open(corpus, model=model)
            opened.add([{"id": "new", "text": "Item 99 is green."}])
            see_all(f"http://127.0.0.1:{port}/health", len(opened))
        finally:
            server.terminate()
            server.wait(60)
