"""Writes answers on another server: sends embeddings of prompts to the completions of vLLM, and reads its tokens.

The server holds what `merge_generator` wrote. The embeddings are made here, of text and memories, never by a client.
"""

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import contextmanager

import torch

from ..candidates_clara import Source, encode_documents
from ..generation_clara import decode_answer
from ..generator import generator_fingerprint, served_name
from ..reading_clara import prepare_reading

RETRIES = 3  # after 429, 5xx and lost connections, waiting longer each time or as long as Retry-After says
CONNECT_SECONDS = 5.0
NAME = served_name("")
# The server must paraphrase a memory as this model does, which only its own generator can, whatever its name.
PROBE, PROBE_TOKENS = "The old lighthouse of Tarva stands 43 metres above the sea.", 12
PROBE_MARGIN = 1.0  # by which the logit of a token may lie below the best one, through rounding in the server's dtype


class GeneratorError(RuntimeError):
    """The generator's server failed; `status` is the HTTP status that a service answers."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class RemoteGenerator:
    """The generator of a model on a server that speaks vLLM's completions with `prompt_embeds`.

    Args:
        base_url: of the API, as http://HOST:8000/v1.
        model: name of the model on the server; default the only one there.
        api_key: of the server.
        timeout: seconds for an answer with all tries; of a stream for its first token, and between two.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None, timeout: float = 60.0):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "`generator` on a server needs the openai client: pip install openai, or the extra `serve` from a "
                "clone of the repository."
            ) from error
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"`generator` must be an address such as http://HOST:8000/v1, got {base_url!r}.")
        self.base_url, self.name, self.timeout = base_url, model, timeout
        self.max_length: int | None = None  # positions of a prompt and its answer that the server takes
        self._model = None
        limits = openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or "none", timeout=limits, max_retries=RETRIES
        )

    async def connect(self, model) -> None:
        """Find the server's model, and check that it is the generator of `model`.

        Raises:
            GeneratorError: the server is out of reach, or does not take prompts as embeddings.
            ValueError: it has not the model that was named, or another model's generator.
        """
        with self._errors("GET /models"):
            async with asyncio.timeout(self.timeout):
                served = (await self._client.models.list()).data
        names = [entry.id for entry in served]
        wanted = await asyncio.to_thread(lambda: served_name(generator_fingerprint(model)))
        if self.name is None and len(names) > 1 and wanted in names:
            self.name = wanted
        if (self.name is None and len(names) != 1) or (self.name is not None and self.name not in names):
            raise ValueError(
                f"`model` of the generator must be one that {self.base_url} serves, got {self.name!r}. It serves "
                f"{names}."
            )
        self.name = self.name or names[0]
        self.max_length = (served[names.index(self.name)].model_extra or {}).get("max_model_len")
        self._model = model
        is_ours = self.name == wanted or not self.name.startswith(NAME)
        if not (is_ours and await self._paraphrases()):
            self._model = None
            raise ValueError(
                f"the generator at {self.base_url} must be that of {model.name_or_path or 'this model'} ({wanted}), "
                f"but `{self.name}` is another one. Serve what `merge_generator` wrote of this model."
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def generate(
        self,
        inputs_embeds: Sequence[torch.Tensor],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> list[str]:
        """Texts of prompts, each the embeddings (tokens, hidden) of one; they are sent at the same time.

        Args:
            inputs_embeds: as `model.prompt_embeddings` makes them, without padding.
            max_new_tokens: length limit of an answer, in tokens.
            temperature: 0 is greedy search.
            top_p: the share of probability that is sampled from.
            seed: of the sampling.
            stop_ids: tokens that end an answer; default those of the model.

        Raises:
            GeneratorError: the server failed, or could not be reached after all tries.
            ValueError: a prompt and its answer are longer than the server's window, or not finite.
        """
        options = self._options(max_new_tokens, temperature, top_p, seed, stop_ids)
        ids = await asyncio.gather(*(self._generate(prompt, options) for prompt in inputs_embeds))
        return [self._decode(row, options) for row in ids]

    async def stream(
        self,
        inputs_embeds: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> AsyncIterator[str]:
        """Pieces of the text of one prompt (tokens, hidden); closing the iterator stops the server's generation."""
        options = self._options(max_new_tokens, temperature, top_p, seed, stop_ids)
        ids, n_sent, is_whole = [], 0, False
        with self._errors("POST /completions"):
            async with asyncio.timeout(self.timeout):
                chunks = await self._client.completions.create(**self._request(inputs_embeds, options), stream=True)
            async with chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        ids += self._token_ids(choice)
                        is_whole |= choice.finish_reason is not None
                    text = self._decode(ids, options)
                    text = text if is_whole else text.rstrip("\ufffd")
                    if len(text) > n_sent:
                        yield text[n_sent:]
                        n_sent = len(text)
        if not is_whole:
            raise GeneratorError(f"the generator at {self.base_url} ended a stream before the answer's end.", 502)

    # --- one request -------------------------------------------------------------------------------------------------

    def _options(self, max_new_tokens, temperature, top_p, seed, stop_ids) -> dict:
        if self._model is None:
            raise RuntimeError("the generator is not connected. Call `await generator.connect(model)` first.")
        if stop_ids is None:
            stop_ids = self._model.build_generation_config(None, max_new_tokens).eos_token_id
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        options |= {} if seed is None else {"seed": seed}
        return {**options, "stop_token_ids": list(stop_ids or ())}

    def _request(self, inputs_embeds: torch.Tensor, options: dict) -> dict:
        """Keywords of `completions.create`."""
        n_tokens, limit = len(inputs_embeds), self.max_length
        if limit is not None and n_tokens + options["max_tokens"] > limit:
            raise ValueError(
                f"a prompt and its answer must have <= {limit} positions, the window of the generator's server, got "
                f"{n_tokens} + {options['max_tokens']}. Shorten the question, or lower `expand`, `top_k`, "
                "`memory_size` or `max_new_tokens`."
            )
        if not inputs_embeds.isfinite().all():
            raise ValueError("a prompt must have finite embeddings, got NaN or infinity. A memory of it is damaged.")
        buffer = io.BytesIO()
        torch.save(inputs_embeds.detach().cpu().clone(), buffer)  # a view would be saved with all that it is part of
        extra = {"prompt_embeds": base64.b64encode(buffer.getvalue()).decode(), "return_token_ids": True}
        extra["stop_token_ids"] = options["stop_token_ids"]
        sampling = {name: value for name, value in options.items() if name != "stop_token_ids"}
        return {"model": self.name, "prompt": None, **sampling, "extra_body": extra}

    async def _generate(self, inputs_embeds: torch.Tensor, options: dict) -> list[int]:
        request = self._request(inputs_embeds, options)
        with self._errors("POST /completions"):
            async with asyncio.timeout(self.timeout):
                completion = await self._client.completions.create(**request)
        if not completion.choices:
            raise GeneratorError(f"the generator at {self.base_url} gave no answer.", 502)
        return self._token_ids(completion.choices[0])

    def _token_ids(self, choice) -> list[int]:
        ids = (choice.model_extra or {}).get("token_ids")
        if ids is None:
            raise GeneratorError(
                f"the generator at {self.base_url} must return the ids of its tokens (`return_token_ids`), got none. "
                "Serve it with vLLM 0.11 or newer.",
                502,
            )
        return ids

    def _decode(self, ids: list[int], options: dict) -> str:
        return decode_answer(self._model, ids, options["stop_token_ids"])

    @contextmanager
    def _errors(self, what: str):
        """Turns errors of the client into a GeneratorError or, if a prompt is at fault, a ValueError."""
        import openai

        place = f"the generator at {self.base_url}"
        try:
            yield
        except (TimeoutError, openai.APITimeoutError) as error:
            raise GeneratorError(
                f"{place} must answer within {self.timeout:g} s. Is it overloaded? Raise `timeout`, or add replicas.",
                504,
            ) from error
        except openai.APIConnectionError as error:
            message = f"{place} cannot be reached ({what}): {error.__cause__ or error}. Start it, or name another."
            raise GeneratorError(message, 503) from error
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            message = str(body.get("message") or error)
            if error.status_code == 400 and "maximum context length" in message:
                raise ValueError(f"a prompt is too long for {place}: {message}") from error
            if "enable-prompt-embeds" in message or "Either prompt or prompt_embeds" in message:
                message = f"it does not take embeddings. Start vLLM with --enable-prompt-embeds. ({message})"
            status = 503 if error.status_code in (429, 503) else 502
            raise GeneratorError(f"{place} answered {error.status_code} ({what}): {message}", status) from error
        except openai.APIError as error:  # in the middle of a stream
            raise GeneratorError(f"{place} failed while it answered: {error.message}", 502) from error

    # --- whose generator it is ---------------------------------------------------------------------------------------

    async def _paraphrases(self) -> bool:
        """Whether the server's model paraphrases a memory of this model as its own generator does."""
        prompt = await asyncio.to_thread(self._probe)
        options = self._options(PROBE_TOKENS, 0.0, 1.0, None, None)
        try:
            ids = await self._generate(prompt, options)
        except GeneratorError as error:
            if "hidden_size" in str(error):  # of embeddings: it is a model of another size
                return False
            raise
        return await asyncio.to_thread(self._could_say, prompt, ids)

    def _probe(self) -> torch.Tensor:
        """Embeddings (tokens, hidden) of a prompt that asks for a paraphrase."""
        model = self._model
        with model.lock, torch.no_grad():
            hits = [
                (Source("", 0, 1.0, "", PROBE), encode_documents(model, [PROBE], model.config.memory_sizes[-1])[0])
            ]
            generation = model.build_generation_config(None, PROBE_TOKENS)
            return reading_embeddings(model, prepare_reading(model, None, hits, None, 0, generation, "probe"))

    def _could_say(self, prompt: torch.Tensor, ids: list[int]) -> bool:
        """Whether each token is the greedy choice of our generator, up to rounding, after those before it."""
        model = self._model
        with model.lock, torch.no_grad(), model.roles.use("generator"):
            said = model.get_input_embeddings()(torch.tensor(ids, device=prompt.device))
            embeddings = torch.cat([prompt, said])[None]
            logits = model.backbone(inputs_embeds=embeddings).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
        return bool(ids) and bool((logits.max(-1).values - chosen <= PROBE_MARGIN).all())


def reading_embeddings(model, reading) -> torch.Tensor:
    """Embeddings (tokens, hidden) of the prompt of a `Reading`, as the generator reads them."""
    inputs = model.processor.pad_prompts([reading.prompt])
    device = model.memory_embeddings.device
    memory = reading.memory[None].to(device)
    is_real = torch.ones(memory.shape[:2], dtype=torch.bool, device=device)
    ids, mask = inputs["input_ids"].to(device), inputs["memory_mask"].to(device)
    return model.prompt_embeddings(ids, mask, memory, is_real)[0]
