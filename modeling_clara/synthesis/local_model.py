"""A transformers model in this process as a backend.
Requests that wait at the same time share a batch, in one thread.
"""

import asyncio
import queue
import threading
from concurrent.futures import Future
from pathlib import Path

import jinja2

from .backends import Failed, in_words

GATHER_SECONDS = 0.02  # how long a batch waits for more requests


class LocalModel:
    """A causal language model of transformers in this process; requests that wait at one time share a batch.

    A schema is an instruction only. Sampled answers depend on what else is in the batch.

    Args:
        model: folder or Hub id.
        batch_size: most requests of a batch.
        device: default is a GPU if there is one.
    """

    def __init__(self, model: str | Path, batch_size: int = 8, device: str | None = None):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        dtype = torch.float32 if device == "cpu" else "auto"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        self.batch_size, self.left, self.waiting = batch_size, None, queue.Queue()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    async def send(self, payload: dict) -> dict:
        payload, future = in_words(payload), Future()
        text = self._prompt(payload["messages"])
        n_tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        window = getattr(self.model.config, "max_position_embeddings", None)
        if window and n_tokens + payload["max_tokens"] > window:
            raise Failed(
                f"prompt and answer must fit into {window} tokens, got {n_tokens} and `max_tokens` "
                f"{payload['max_tokens']}. Lower it, or shorten the chunks.",
                400,
            )
        self.waiting.put((payload, text, future))
        return await asyncio.wrap_future(future)

    def _prompt(self, messages: list[dict]) -> str:
        """The chat as text; a template without system role gets the instruction before the user's text."""
        if self.tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except jinja2.TemplateError:
            if messages[0]["role"] != "system":
                raise
        system, user, *rest = messages
        return self._prompt([{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])

    def _work(self) -> None:
        """The thread of the worker: batch after batch until `close`."""
        while (batch := self._next_batch()) is not None:
            batch = [item for item in batch if item[2].set_running_or_notify_cancel()]
            try:
                replies = self._generate(batch) if batch else []
            except Exception as error:  # handed to those who wait for it
                status = 503 if "out of memory" in str(error).lower() else 500
                for _, _, future in batch:
                    future.set_exception(Failed(f"{type(error).__name__}: {error}", status))
                continue
            for (_, _, future), reply in zip(batch, replies, strict=True):
                future.set_result(reply)

    def _next_batch(self) -> list | None:
        """What waits now and has the same temperature; None at the end."""
        first = self.left or self.waiting.get()
        batch, self.left = [first], None
        while first is not None and len(batch) < self.batch_size:
            try:
                item = self.waiting.get(timeout=GATHER_SECONDS)
            except queue.Empty:
                break
            if item is None or item[0].get("temperature") != first[0].get("temperature"):
                self.left = item
                if item is None:
                    self.waiting.put(None)
                break
            batch.append(item)
        return None if first is None else batch

    def _generate(self, batch: list[tuple[dict, str, Future]]) -> list[dict]:
        import torch

        payloads, texts = [item[0] for item in batch], [item[1] for item in batch]
        temperature = payloads[0].get("temperature") or 0.0
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        if temperature:
            torch.manual_seed(payloads[0].get("seed") or 0)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        with torch.inference_mode():
            rows = self.model.generate(
                **inputs,
                **sampling,
                max_new_tokens=max(payload["max_tokens"] for payload in payloads),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        n_prompt = inputs["attention_mask"].sum(dim=1).tolist()
        width = inputs["input_ids"].shape[1]
        answers = [row[width:].tolist() for row in rows]
        return [self._reply(*part) for part in zip(answers, n_prompt, payloads, strict=True)]

    def _reply(self, ids: list[int], n_prompt: int, payload: dict) -> dict:
        """A completion of the ids before the end, or of as many as may be."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        length = next((at for at, token in enumerate(ids) if token in ends), None)
        cut = length is None or length > payload["max_tokens"]
        ids = ids[: payload["max_tokens"] if cut else length]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"index": 0, "finish_reason": "length" if cut else "stop"}
        choice["message"] = {"role": "assistant", "content": text.strip()}
        usage = {"prompt_tokens": n_prompt, "completion_tokens": len(ids)}
        return {"choices": [choice], "usage": usage | {"total_tokens": sum(usage.values())}}

    async def close(self) -> None:
        self.waiting.put(None)
        await asyncio.to_thread(self.worker.join)
