"""The three backends: what an endpoint refuses, a llama-server that ends with its owner, a local model in batches."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from teacher_server import TeacherServer
from tiny import save_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_clara.synthesis.backends import Endpoint, Failed, connect
from modeling_clara.synthesis.client import BadRequest, Teacher, TeacherDown
from modeling_clara.synthesis.llama_server import LlamaServer
from modeling_clara.synthesis.local_model import LocalModel

SCHEMA = {"title": "verdict", "type": "object", "properties": {"supported": {"type": "boolean"}}}
PROMPT = "<document>Oslo is a city.</document><question>What is Oslo?</question><answer>a city</answer>"
ROOT = Path(__file__).parents[2]


def payload_of(text: str, max_tokens: int = 8, **options) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **options}


def send(backend, *payloads: dict) -> list:
    """The replies to requests at the same time; the backend is closed."""

    async def all_of_them():
        try:
            return await asyncio.gather(*map(backend.send, payloads), return_exceptions=True)
        finally:
            await backend.close()

    return asyncio.run(all_of_them())


def text_of(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


# --- an endpoint -----------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with TeacherServer() as server:
        send(connect("m", base_url=server.base_url, api_key_env="MY_KEY"), payload_of("a"))
        send(connect("m", base_url=server.base_url, api_key_env="NO_SUCH_KEY"), payload_of("a"))
    assert set(server.keys) == {"Bearer secret", "Bearer none"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Additional properties are not allowed ('response_format' was unexpected)"),
        (400, "response_format value as json_schema is enabled only for api versions 2024-08-01-preview and later"),
        (400, "Invalid value: 'json_schema'. Supported values are: 'text' and 'json_object'."),
        (
            422,
            "[{'loc': ['body', 'response_format'], 'msg': 'Extra inputs are not permitted'}]",
        ),
        (501, "response_format is not implemented"),
    ],
)
def test_endpoints_refuse_a_schema_in_many_words(status, message):
    error = SimpleNamespace(status_code=status, message=message)
    endpoint, body = Endpoint("http://localhost/v1"), payload_of("a", response_format={})
    assert endpoint._learn(error, body) and endpoint.refused == {"response_format"}
    assert not endpoint._learn(error, payload_of("a"))


@pytest.mark.parametrize("refuses", [("response_format",), ("max_tokens",), ("temperature", "seed")])
def test_what_an_endpoint_refuses_by_name_is_left_out(refuses, caplog):
    with TeacherServer(refuses=refuses, keep=True) as server:

        async def calls():
            async with Teacher(Endpoint(server.base_url), "m") as teacher:
                message, options = (
                    {"role": "user", "content": PROMPT},
                    {"max_tokens": 50, "temperature": 0.5, "seed": 1},
                )
                return [await teacher.complete([message], schema=SCHEMA, **options) for _ in range(2)]

        completions = asyncio.run(calls())
    assert [json.loads(completion.text) for completion in completions] == [{"supported": True}] * 2
    assert len(server.requests) == 2 + len(refuses)  # it asks once for what is refused
    assert not set(refuses) & set(server.requests[-1])
    assert ("max_completion_tokens" in server.requests[-1]) == ("max_tokens" in refuses)
    assert len(caplog.records) == len(refuses)


def test_other_bad_requests_are_not_sent_again():
    with TeacherServer(every={"400": 1}) as server:
        (error,) = send(Endpoint(server.base_url), payload_of("a"))
    assert isinstance(error, Failed) and error.status == 400 and server.calls.total() == 1


def test_a_reply_that_is_no_completion_is_told(tmp_path):
    with TeacherServer(faults=["page"]) as server:
        (error,) = send(Endpoint(server.base_url), payload_of("a"))
    assert isinstance(error, Failed) and error.status is None and "Sign in to the proxy" in str(error)


# --- llama-server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def binary(tmp_path, monkeypatch) -> Path:
    """A program with llama-server's options that is the loopback teacher."""
    path = tmp_path / "llama-server"
    script = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--ctx-size"] == "8192" and options["--parallel"] == "2"
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
sys.argv = ["teacher_server", "--port", options["--port"]]
from teacher_server import main
main()
"""
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(path))
    return path


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_llama_server_is_started_and_stopped(binary, model_file, tmp_path):
    backend = connect(str(model_file), concurrency=2)
    assert isinstance(backend, LlamaServer)
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    (reply,) = send(backend, payload_of("a"))
    assert text_of(reply) == "Answer to: a"
    wait_for_end(pid)


def test_llama_server_ends_with_a_process_that_is_killed(binary, model_file, tmp_path):
    code = f"""
import time
from modeling_clara.synthesis.llama_server import LlamaServer
server = LlamaServer({str(model_file)!r}, slots=2)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"ready\n"
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
        process.send_signal(signal.SIGKILL)
    wait_for_end(pid)


def test_a_llama_server_that_does_not_start_is_told(binary, model_file, monkeypatch):
    binary.write_text("#!/bin/sh\necho error: this is no model >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="ended.*this is no model"):
        LlamaServer(model_file)
    with pytest.raises(FileNotFoundError, match="Pass its path"):
        LlamaServer("missing.gguf")
    monkeypatch.delenv("LLAMA_SERVER")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="LLAMA_SERVER"):
        LlamaServer(model_file)


# --- a transformers model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(backbone_folder) -> dict[str, tuple[str, int]]:
    """Greedy answers of 8 tokens, each alone, and the tokens of their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
    model, found = AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32), {}
    for text in ("Paris", "What is the capital of Italy?", "Rome is the capital of Italy. Answer briefly."):
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = inputs["input_ids"] if not isinstance(inputs, torch.Tensor) else inputs
        row = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0]
        found[text] = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True).strip(), ids.shape[1]
    return found


def test_a_local_model_answers_in_batches_as_it_does_alone(backbone_folder, references):
    backend, sizes = LocalModel(backbone_folder, batch_size=2), []
    generate = backend.model.generate
    backend.model.generate = lambda **options: sizes.append(len(options["input_ids"])) or generate(**options)
    replies = send(backend, *(payload_of(text, 4 + 4 * (text != "Paris")) for text in references))
    assert sorted(sizes) == [1, 2]
    for (text, (answer, n_prompt)), reply in zip(references.items(), replies, strict=True):
        usage = reply["usage"]
        assert usage["prompt_tokens"] == n_prompt and usage["total_tokens"] == n_prompt + usage["completion_tokens"]
        if text == "Paris":  # in one batch with an answer of twice as many tokens
            assert answer.startswith(text_of(reply)) and usage["completion_tokens"] <= 4
        else:
            assert text_of(reply) == answer


def test_a_local_model_samples_by_seed(backbone_folder):
    def sample(seed):
        (reply,) = send(LocalModel(backbone_folder), payload_of("Paris", temperature=2.0, seed=seed))
        return text_of(reply)

    assert sample(1) == sample(1) != sample(2)


def test_the_end_of_an_answer_is_told_from_its_limit(backbone_folder):
    backend = LocalModel(backbone_folder)
    ids, end = [5, 6, 7], backend.tokenizer.eos_token_id
    ended = backend._reply([*ids, end, end, 9], 10, payload_of("a"))
    cut = backend._reply([*ids, 8], 10, payload_of("a", max_tokens=3))
    full = backend._reply([*ids, end], 10, payload_of("a", max_tokens=3))
    assert [reply["choices"][0]["finish_reason"] for reply in (ended, cut, full)] == ["stop", "length", "stop"]
    assert [reply["usage"]["completion_tokens"] for reply in (ended, cut, full)] == [3, 3, 3]
    asyncio.run(backend.close())


def test_a_prompt_beyond_the_window_is_a_bad_request(backbone_folder):
    async def call():
        async with Teacher(LocalModel(backbone_folder), "tiny") as teacher:
            for text in ("short", "long " * 600):
                await teacher.complete([{"role": "user", "content": text}], max_tokens=4)

    with pytest.raises(BadRequest, match="fit into 512 tokens"):
        asyncio.run(call())


@pytest.mark.parametrize("template", ["no_system", "none"])
def test_a_system_message_is_read_by_every_template(tmp_path, template):
    backend = LocalModel(save_backbone(tmp_path, template=template))
    prompt = backend._prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    assert "Be brief.\n\nWhy?" in prompt
    asyncio.run(backend.close())


def test_a_local_model_that_breaks_ends_the_run(backbone_folder):
    async def call():
        async with Teacher(LocalModel(backbone_folder), "tiny", retries=1, backoff=0.01) as teacher:
            teacher.backend.model.forward = None
            calls = (teacher.complete([{"role": "user", "content": "a"}], max_tokens=4) for _ in range(3))
            return await asyncio.gather(*calls, return_exceptions=True)

    assert any(isinstance(error, TeacherDown) for error in asyncio.run(call()))


def test_the_schema_is_an_instruction_to_a_local_model(backbone_folder):
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
    backend, texts = LocalModel(backbone_folder), []
    prompt_of = backend._prompt
    backend._prompt = lambda messages: texts.append(prompt_of(messages)) or texts[-1]
    send(backend, payload_of("Is it so?", response_format=form))
    assert "Is it so?" in texts[0] and json.dumps(SCHEMA) in texts[0]
