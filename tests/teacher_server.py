"""A loopback OpenAI-compatible server that answers from rules over the document and fails on a schedule; for tests.
It stands in for an endpoint: `with TeacherServer() as server: ... server.base_url`; teacher_rules.py has the answers.

It knows a task by `response_format.json_schema.name`, one of `teacher_rules.TASKS`; for backends without schemas it
finds `"title": "NAME"` in the last user message. Without a known name it answers "Answer to: " and that message. The
document stands in the last user message between <document> and </document>; teacher_rules.py has the other tags, and
how a schema is filled.

Faults are names: a status ("500", "400", "401", "404"), a status with the header Retry-After ("429 after 2": seconds,
"429 on 2": the HTTP date in 2 s), or "hang" (until the server closes), "hangup", "page" (200 with HTML instead of
JSON), "broken" (a text that is no JSON), "fenced" (JSON in a fence with a comma too many, which can be repaired),
"truncated" (half of the text, finish_reason "length"), "empty" (no text), "null" (no content). `faults` is a list,
one entry a call and None for none; after its end `every={"500": 7}` makes every 7th call fail.

`wrong_every` and `skip_every` plant wrong facts and leave facts out, by a hash of prompt and seed: who repeats a
request gets the same answer. `planted` has every wrong answer that was sent: question, answer, kind, document.

    calls       Counter of requests by key (`key_of` of the payload), failed ones too
    answered    Counter of those that got a completion
    tasks       Counter of requests by task
    requests    the payloads in order, if `keep=True`
    peak        the most requests at one time; over `max_concurrent` the answer is 429
"""

import argparse
import email.utils
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from teacher_rules import TASKS, Settings, answer

MODEL = "loopback-teacher"


def key_of(payload: dict) -> str:
    """The key of a request in `calls`: a hash of its payload."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:16]


def task_of(payload: dict) -> tuple[str, dict]:
    """Name and schema of a request's task; "" without one."""
    form = payload.get("response_format") or {}
    if form.get("type") == "json_schema":
        return form["json_schema"]["name"], form["json_schema"]["schema"]
    prompt = payload["messages"][-1]["content"]
    for place in (at for at, letter in enumerate(prompt) if letter == "{"):
        try:
            schema, _ = json.JSONDecoder().raw_decode(prompt[place:])
        except ValueError:
            continue
        if schema.get("title") in TASKS:
            return schema["title"], schema
    return "", {}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, fails if it is its turn, or answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: "TeacherServer"

    def do_GET(self) -> None:
        if self.path in ("/v1/models", "/health"):
            self.reply(200, {"object": "list", "status": "ok", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.fail("404")

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.enter(payload, self.headers.get("Authorization", ""))
        try:
            if self.server.closing.wait(self.server.latency):
                self.close_connection = True
            elif self.path != "/v1/chat/completions":
                self.fail("404")
            elif (fault or "")[:1].isdigit() or fault in self.server.refuses:
                self.fail(fault)
            elif fault in ("hang", "hangup"):
                self.close_connection = True
                self.server.closing.wait(None if fault == "hang" else 0)
            else:
                self.complete(payload, fault)
        finally:
            self.server.leave()

    def fail(self, fault: str) -> None:
        """An error status, with Retry-After if the fault says so."""
        words, headers = fault.split(), {}
        if words[0] in self.server.refuses:
            instead = " Use 'max_completion_tokens' instead." if words[0] == "max_tokens" else ""
            return self.reply(400, {"error": {"message": f"Unsupported parameter: '{words[0]}'.{instead}"}})
        if len(words) > 1:
            seconds = float(words[2])
            date = email.utils.formatdate(time.time() + seconds, usegmt=True)
            headers["Retry-After"] = date if words[1] == "on" else words[2]
        self.reply(int(words[0]), {"error": {"message": f"failed on purpose with {words[0]}"}}, headers)

    def complete(self, payload: dict, fault: str | None) -> None:
        """A completion, spoiled if the fault says so."""
        if fault == "page":
            return self.reply(200, b"<html>Sign in to the proxy</html>")
        text = self.server.text_of(payload)
        spoiled = {"broken": f"Surely! {text[: len(text) // 2]} and so on", "empty": "", "null": None}
        spoiled |= {"fenced": f"```json\n{text[:-1]},{text[-1]}\n```", "truncated": text[: len(text) // 2]}
        text = spoiled.get(fault, text)
        pieces = (text or "").split(" ")
        reason, limit = "stop", payload.get("max_tokens") or payload.get("max_completion_tokens") or len(pieces)
        if fault == "truncated" or len(pieces) > limit:
            text, reason = text if fault == "truncated" else " ".join(pieces[:limit]), "length"
        prompt = sum(len(message["content"].split()) for message in payload["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": min(len(pieces), limit)}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        body = {"id": key_of(payload), "object": "chat.completion", "created": 0, "model": MODEL}
        self.server.note_answer(payload)
        self.reply(200, {**body, "choices": [choice], "usage": usage})

    def reply(self, status: int, body: dict | bytes, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client was killed, or has given up
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        """Nothing on the terminal."""


class TeacherServer(ThreadingHTTPServer):
    """The server and what it has seen.

    Args:
        latency: seconds before every answer.
        faults: what happens to the first calls, in order.
        every: fault -> n: what happens to every n-th call after them.
        wrong_every: one of n pairs and paraphrases is wrong.
        skip_every: one of n sentences gets no pair at first.
        max_concurrent: more requests at a time than this get 429.
        refuses: keys of a request that get 400: response_format, max_tokens, temperature, seed.
        keep: whether `requests` holds the payloads.
        port: 0 is a free one.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        *,
        latency: float = 0.0,
        faults: list[str | None] | tuple = (),
        every: dict[str, int] | None = None,
        wrong_every: int = 0,
        skip_every: int = 0,
        max_concurrent: int | None = None,
        refuses: tuple[str, ...] = (),
        keep: bool = False,
        port: int = 0,
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.latency, self.faults, self.every = latency, list(faults), every or {}
        self.settings, self.max_concurrent = Settings(wrong_every, skip_every), max_concurrent
        self.refuses, self.keep = refuses, keep
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.calls, self.answered, self.tasks, self.keys = Counter(), Counter(), Counter(), Counter()
        self.requests, self.planted = [], []
        self.count = self.in_flight = self.peak = 0

    @property
    def base_url(self) -> str:
        """What goes to --base-url."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def enter(self, payload: dict, authorization: str) -> str | None:
        """Count a request; returns its fault."""
        task, _ = task_of(payload)
        with self.lock:
            self.calls[key_of(payload)] += 1
            self.tasks[task] += 1
            self.keys[authorization] += 1
            self.requests += [payload] if self.keep else []
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            if self.max_concurrent and self.in_flight > self.max_concurrent:
                return "429"
            if refused := [name for name in self.refuses if name in payload]:
                return refused[0]
            if self.faults:
                return self.faults.pop(0)
            self.count += 1
            return next((fault for fault, n in self.every.items() if self.count % n == 0), None)

    def leave(self) -> None:
        with self.lock:
            self.in_flight -= 1

    def note_answer(self, payload: dict) -> None:
        with self.lock:
            self.answered[key_of(payload)] += 1

    def text_of(self, payload: dict) -> str:
        """What the teacher says."""
        (task, schema), prompt = task_of(payload), payload["messages"][-1]["content"]
        if task not in TASKS:
            return f"Answer to: {prompt}"
        return answer(task, schema, prompt, self.settings, self.planted, str(payload.get("seed")))

    def __enter__(self) -> "TeacherServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


def main() -> None:
    """Serves until it is killed; prints its base URL on the first line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with TeacherServer(latency=arguments.latency, port=arguments.port) as server:
        print(server.base_url, flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
