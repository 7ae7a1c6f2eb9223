"""A loopback server with vLLM's form of completions, which runs a merged generator on the embeddings it gets.

It stands in for vLLM: it decodes `prompt_embeds`, generates with transformers, and streams server-sent events.
Checks and messages are those of vLLM 0.32. `faults` is a list, one entry a request to /completions and None for none:
a status ("500"), a status with the header Retry-After ("429 after 1"), "hang" (until the server closes), or "cut" (the
connection ends after the first token, and before the answer if there is no stream).

    requests    bodies of /completions in order, failed ones too
    peak        the most requests at one time
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class Refused(Exception):
    """An error answer: status and message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: "CompletionsServer"

    def do_GET(self) -> None:
        entry = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "vllm"}
        self.reply(200, {"object": "list", "data": [{**entry, "max_model_len": self.server.max_length}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.enter(body)
        try:
            if self.server.api_key and self.headers["Authorization"] != f"Bearer {self.server.api_key}":
                raise Refused(401, "Unauthorized")
            if (fault or "")[:1].isdigit():
                raise Refused(int(fault.split()[0]), "failed on purpose")
            if fault == "hang":
                self.server.closing.wait()
                self.close_connection = True
                return
            self.answer(body, self.server.generate(body), fault)
        except Refused as refused:
            status, message = refused.args
            retry = {"Retry-After": fault.split()[2]} if fault and " after " in fault else {}
            self.reply(status, {"error": {"message": message, "type": "BadRequestError", "code": status}}, retry)
        finally:
            self.server.leave()

    def answer(self, body: dict, ids: list[int], fault: str | None) -> None:
        ended = ids[-1] in self.server.ends(body)
        reason, base = "stop" if ended else "length", {"id": "cmpl-0", "object": "text_completion", "created": 0}
        base["model"] = self.server.name

        def choice(tokens, reason):
            text = self.server.tokenizer.decode(tokens, skip_special_tokens=True)
            found = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
            return {**base, "choices": [found | ({"token_ids": tokens} if body.get("return_token_ids") else {})]}

        if not body.get("stream"):
            self.close_connection = fault == "cut"
            return None if fault == "cut" else self.reply(200, choice(ids, reason))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for place, token in enumerate(ids):
            self.event(json.dumps(choice([token], reason if place == len(ids) - 1 else None)))
            if fault == "cut":
                self.close_connection = True
                return None
            if self.server.closing.wait(self.server.pause):
                return None
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        except OSError:
            self.server.left += 1
            raise

    def reply(self, status: int, content: dict, headers: dict | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class CompletionsServer(ThreadingHTTPServer):
    """`with CompletionsServer(folder) as server: ... server.base_url`; `folder` is a merged generator."""

    daemon_threads = True

    def __init__(self, folder: Path, name: str = "generator", *, prompt_embeds: bool = True, api_key: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        self.name, self.prompt_embeds, self.api_key = name, prompt_embeds, api_key
        self.max_length, self.pause = self.model.config.max_position_embeddings, 0.0
        self.faults, self.requests, self.now, self.peak, self.left = [], [], 0, 0, 0
        self.closing, self.lock, self.generating = threading.Event(), threading.Lock(), threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, *_) -> None:
        pass  # a client that left

    def enter(self, body: dict) -> str | None:
        with self.lock:
            self.requests.append(body)
            self.now += 1
            self.peak = max(self.peak, self.now)
            return self.faults.pop(0) if self.faults else None

    def leave(self) -> None:
        with self.lock:
            self.now -= 1

    def ends(self, body: dict) -> set[int]:
        own = self.model.generation_config.eos_token_id
        return {*(own if isinstance(own, list) else [own]), *(body.get("stop_token_ids") or ())} - {None}

    def generate(self, body: dict) -> list[int]:
        """Ids of an answer with the one that ended it."""
        if body["model"] != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if not self.prompt_embeds:
            raise Refused(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        embeds = embeds.to(self.model.dtype)
        if embeds.shape[1] != (hidden := self.model.config.hidden_size):
            raise Refused(400, f"`prompt_embeds` hidden_size {embeds.shape[1]} does not match the model's {hidden}.")
        if len(embeds) >= self.max_length:  # vLLM shortens an answer that does not fit
            raise Refused(400, f"This model's maximum context length is {self.max_length} tokens.")
        sampling = {"do_sample": False}
        if body["temperature"]:
            sampling = {"do_sample": True, "temperature": body["temperature"], "top_p": body["top_p"], "top_k": 0}
        config = GenerationConfig(max_new_tokens=body["max_tokens"], eos_token_id=sorted(self.ends(body)), **sampling)
        config.pad_token_id = self.model.generation_config.pad_token_id
        with self.generating:
            torch.manual_seed(body.get("seed") or 0)
            return self.model.generate(inputs_embeds=embeds[None], generation_config=config)[0].tolist()
