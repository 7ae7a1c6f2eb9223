"""A service in a thread, one in a process, and raw HTTP to both."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import openai

from modeling_clara.service.app import create_app
from modeling_clara.service.engine import Engine
from modeling_clara.service.server import build_server

ROOT = Path(__file__).parents[2]
KEY, READ_KEY = "a-key-that-may-do-everything", "a-key-that-may-only-read"
MODEL = "someone/tiny-clara"
QUESTION = "What is the capital of Italy?"


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        """The error, which has OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error


def send(url: str, method: str, path: str, body=None, *, key: str | None = None, headers=None, timeout=60) -> Response:
    """One request; `body` is bytes, or something that becomes JSON. The path is sent as it is."""
    address = urlsplit(url)
    headers = (
        {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}) | (headers or {})
    )
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, content, headers)
        got = connection.getresponse()
        return Response(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())


def chat(question: str = QUESTION, **fields) -> dict:
    """A body of `/v1/chat/completions`."""
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": 8, **fields}


def raw(url: str, body: bytes, path: str = "/v1/chat/completions", length: int | None = None) -> socket.socket:
    """A connection that has sent a request, its body perhaps in part."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return connection


def wait_until(is_so, seconds: float = 30) -> None:
    """Until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Served:
    """A service in a thread of this process: `engine`, `app`, `url`."""

    def __init__(self, model, corpus, *, max_batch=16, max_queue=64, generator=None, **options):
        self.engine = Engine(model, corpus, max_batch=max_batch, max_queue=max_queue, generator=generator)
        self.app = create_app(self.engine, model_id=MODEL, **options)
        self.server = build_server(self.app, host="127.0.0.1", port=0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def send(self, method: str, path: str, body=None, **options) -> Response:
        return send(self.url, method, path, body, **options)

    def client(self, key: str = KEY, kind=openai.OpenAI):
        """OpenAI's own client, which does not try again."""
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


class Process:
    """`clara serve` as a process of its own, ready to be asked."""

    def __init__(self, corpus, model, *options: str, environment=None):
        command = [
            sys.executable,
            "-m",
            "modeling_clara.cli",
            "serve",
            str(corpus),
            "--model",
            str(model),
            "--port",
            "0",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )
        self.out, self.err = [], []  # lines; a pipe that nobody reads would stop the service
        streams = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()
        wait_until(lambda: self.out or self.process.poll() is not None, 120)
        self.ready = json.loads(self.out[0]) if self.out else {}
        assert self.ready.get("event") == "ready", "".join(self.err)
        self.url = self.ready["url"]

    @staticmethod
    def _read(stream, lines: list[str]) -> None:
        for line in stream:
            lines.append(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def stop(self, number: int) -> tuple[int, list[dict]]:
        """Send a signal; the exit status, and what was logged."""
        self.process.send_signal(number)
        status = self.process.wait(120)
        for reader in self._readers:
            reader.join()
        return status, [json.loads(line) for line in self.out[1:]]
