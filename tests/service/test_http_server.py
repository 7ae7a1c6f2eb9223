"""`clara serve` as a process: what it refuses, how it stops, what it logs, and fuzzing against its own document."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_service import KEY, Process, Served, chat, raw, send, wait_until

from modeling_clara import CompressedCorpus, cli
from modeling_clara.cli.serve import listen
from modeling_clara.service.auth import KEYS
from recipes.benchmarks.service import measure_ready

CHAT = "/v1/chat/completions"
FUZZ_SECONDS = int(os.environ.get("CLARA_FUZZ_SECONDS", 600))


@pytest.fixture
def corpus_folder(shared_model, tmp_path) -> Path:
    """A corpus that no process has open."""
    documents = [{"id": str(n), "text": f"Document {n}."} for n in range(3)]
    return CompressedCorpus.build(shared_model, documents, tmp_path / "corpus").folder


def test_it_does_not_listen_to_everybody_without_keys(corpus_folder, capsys, monkeypatch):
    monkeypatch.delenv(KEYS, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert cli.main(["serve", str(corpus_folder), "--host", host]) == 1
        err = capsys.readouterr().err
        assert "`--host` must be a loopback address" in err and "--api-keys FILE" in err and "--allow-anonymous" in err


def test_a_port_is_taken_before_the_model_is_loaded():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"`port` {port} of 127.0.0.1 must be free"):
            listen("127.0.0.1", port)


def test_options_that_are_wrong(corpus_folder, checkpoint, capsys, tmp_path):
    for options, message in (
        (["--timeout", "0"], "`--timeout` must be > 0 seconds, got 0"),
        (["--max-queue", "0"], "`--max-queue` must be an int >= 1, got 0"),
        (["--api-keys", str(tmp_path / "missing")], "No such file"),
    ):
        command = ["serve", str(corpus_folder), "--model", str(checkpoint), "--port", "0"]
        assert cli.main([*command, *options]) == 1
        assert message in capsys.readouterr().err


def test_it_finishes_what_runs_and_logs_no_text(corpus_folder, checkpoint):
    """One process for all of it, because starting one takes seconds."""
    environment = {KEYS: KEY}
    with Process(corpus_folder, checkpoint, "--served-name", "someone/tiny-clara", environment=environment) as served:
        secret, headers = "Xylophon?", {"X-Request-ID": "mine"}
        assert send(served.url, "GET", "/v1/models").status == 401
        assert send(served.url, "POST", CHAT, chat(secret), key=KEY, headers=headers).status == 200
        document = {"documents": [{"id": "Quodlibet", "text": "Zinnober."}]}
        assert send(served.url, "POST", "/documents", document, key=KEY).status == 200
        assert send(served.url, "GET", "/documents/Quodlibet", key=KEY).status == 200
        assert send(served.url, "POST", CHAT, {**chat(secret), "temperature": "Ultramarin"}, key=KEY).status == 400
        body = json.dumps(chat(secret, stream=True, max_tokens=350)).encode()
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(send, served.url, "POST", CHAT, chat(secret, max_tokens=350), key=KEY)
            stream = pool.submit(send, served.url, "POST", CHAT, body, key=KEY)
            running = "clara_running_requests 2.0"
            wait_until(lambda: running in send(served.url, "GET", "/metrics", key=KEY).body.decode())
            status, log = served.stop(signal.SIGTERM)
            assert whole.result().status == 200 and len(whole.result().json["choices"][0]["message"]["content"]) > 100
            assert stream.result().body.endswith(b"data: [DONE]\n\n")
        assert status == 0
        with pytest.raises(OSError):
            send(served.url, "GET", "/health")
    lines = json.dumps(log) + "".join(served.err)
    for text in (secret, "Quodlibet", "Zinnober", "Ultramarin", KEY):
        assert text not in lines
    requests = [line for line in log if line["event"] == "request"]
    (first,) = [line for line in requests if line["request_id"] == "mine"]
    assert (first["route"], first["method"], first["status"]) == (CHAT, "POST", 200)
    assert first["prompt_tokens"] > 0 and first["completion_tokens"] == 8 and first["ms"] > 0
    assert {line["status"] for line in requests} == {200, 400, 401}
    assert log[-1]["event"] == "stopped"
    assert served.ready["load_seconds"] > 0 and served.ready["start_seconds"] < 20  # 2 on a machine that is not busy


def test_a_signal_while_nothing_runs_ends_it_at_once(shared_model, corpus_folder):
    """In a thread, where signals do not arrive: the same stop."""
    import copy

    with Served(copy.deepcopy(shared_model), CompressedCorpus.open(corpus_folder)) as served:
        with raw(served.url, b"", length=10):  # a client that is in the middle of its body is not waited for long
            wait_until(lambda: served.server.server_state.connections)
            start = time.monotonic()
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_it_withstands_its_own_document(corpus_folder, checkpoint, tmp_path):
    """schemathesis: whatever the OpenAPI document allows or forbids is answered, and never with 5xx."""
    command = [str(Path(sys.executable).with_name("st")), "run", f"--max-time={FUZZ_SECONDS}", "--no-color"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command += [f"--checks={checks}", f"--header=Authorization: Bearer {KEY}", "--request-timeout=60"]
    with Process(corpus_folder, checkpoint, "--served-name", "tiny", environment={KEYS: KEY}) as served:
        command += [f"{served.url}/openapi.json"]
        fuzz = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert fuzz.returncode == 0, fuzz.stdout[-6000:]
        metrics = send(served.url, "GET", "/metrics", key=KEY).body.decode()
        assert not [line for line in metrics.splitlines() if 'status="5' in line]
        assert send(served.url, "POST", CHAT, chat(model="tiny"), key=KEY).status == 200


@pytest.mark.slow
def test_the_benchmark_waits_until_it_is_ready(corpus_folder, checkpoint, tmp_path):
    arguments = argparse.Namespace(
        corpus=str(corpus_folder), model=str(checkpoint), backbone=None, dtype=None, ready=1
    )
    found = measure_ready(arguments)
    assert found["loaded"] > 0 and found["beyond"] == pytest.approx(found["ready"] - found["loaded"])
    arguments.corpus = str(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        measure_ready(arguments)


@pytest.mark.slow
def test_ten_thousand_answers_are_those_of_the_model(shared_model, tmp_path):
    """None is lost or mixed up: sixteen clients at a time, streams among them, against answers without HTTP."""
    import copy

    texts = [f"The capital of land number {n} is town number {n * 7 % 101}." for n in range(50)]
    corpus = CompressedCorpus.build(shared_model, texts, tmp_path / "corpus")
    questions = [f"What is the capital of land number {n}?" for n in range(100)]
    answers = shared_model.answer(questions, corpus=corpus, max_new_tokens=4)
    expected = {question: answer.text for question, answer in zip(questions, answers, strict=True)}
    with Served(copy.deepcopy(shared_model), corpus, max_queue=1000) as served:

        def ask(number: int) -> bool:
            question = questions[number * 37 % 100]
            got = served.send("POST", CHAT, chat(question, max_tokens=4, stream=number % 4 == 0))
            assert got.status == 200
            if number % 4:
                return got.json["choices"][0]["message"]["content"] == expected[question]
            chunks = [json.loads(line[6:]) for line in got.body.decode().splitlines() if line.startswith("data: {")]
            return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected[question]

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(ask, range(10_000))) == 10_000
        assert "clara_answers_total 10000.0" in served.send("GET", "/metrics").body.decode()
