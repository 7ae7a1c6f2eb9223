"""Generation: prompts with memories in, text out, at once or piece by piece.

Stands between the text-level calls and the backbone's `generate`. It knows nothing of retrieval or files.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from .candidates_clara import Source
from .processing_clara import Prompt
from .text_clara import check_count

PROMPTS_PER_BATCH, ON_ACCELERATOR = 8, 32  # an accelerator takes as long for one token of many prompts as of one


@dataclass(frozen=True)
class Answer:
    """An answer with what it was read from, best source first.

    `keywords` explains the query where `explain=True`, else it is None. `abstained` is True where every source scored
    below `min_score`: then `text` is empty and nothing was generated. `prompt_tokens` counts the positions of the
    generator's input: tokens of the prompt and of sources read as text, memory vectors and separators. It is 0 if the
    model abstained. Each source says by `read_as` how it was read.
    """

    text: str
    sources: list[Source]
    keywords: list[str] | None = None
    abstained: bool = False
    prompt_tokens: int = 0


class Reading(NamedTuple):
    """Input of the generator for one question.

    Attributes:
        prompt: with slots for the memories, after them the text.
        memory: (sources read from memory, k, hidden) float32.
        sources: all that are read, best first, `read_as` filled in.
    """

    prompt: Prompt
    memory: torch.Tensor
    sources: list[Source]


class _RefuseNaN(LogitsProcessor):
    """Turns NaN logits, which greedy search would read as token 0, into an error."""

    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise ValueError(
                "the generator must give finite logits, got NaN. Its weights are broken: reload them with "
                "`from_pretrained` or lower the learning rate."
            )
        return scores


class _StopOnEvent(StoppingCriteria):
    """Ends generation when the reader of a stream has left."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Pieces(BaseStreamer):
    """Text as it is generated, for the thread that reads it; the pieces join to the text of all ids.

    Args:
        decode: ids -> text. It must only get longer with more ids, but for a character that is not complete yet.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.ids, self.n_sent = decode, [], 0
        self.queue = queue.SimpleQueue()

    def put(self, value):
        self.ids += value.flatten().tolist()
        self._send(self.decode(self.ids).rstrip("\ufffd"))

    def end(self):
        self._send(self.decode(self.ids))

    def close(self):
        self.queue.put(None)

    def _send(self, text: str):
        if len(text) > self.n_sent:
            self.queue.put(text[self.n_sent :])
            self.n_sent = len(text)

    def __iter__(self):
        return iter(self.queue.get, None)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ReaderMixin:
    """The generator's side of `CLaRaForRAG`: from prompts and memories to text."""

    def build_generation_config(self, given: GenerationConfig | None, max_new_tokens: int) -> GenerationConfig:
        """A copy of the given configuration, or greedy search, with the length limit and the end tokens filled in."""
        check_count(max_new_tokens, "max_new_tokens", "Default: 64.")
        if given is None:  # spelled out, because `generate` fills gaps from the backbone's own settings
            given = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0)
        if not isinstance(given, GenerationConfig):
            raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(given).__name__}. Pass one.")
        config = GenerationConfig.from_dict(given.to_dict())
        if config.max_new_tokens is None:
            if config.max_length is not None:  # would count the prompt and its padding, and so depend on the batch
                raise ValueError(
                    f"`max_length` in `generation_config` must be None, got {config.max_length}. Set `max_new_tokens`."
                )
            config.max_new_tokens = max_new_tokens
        if (config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"`num_return_sequences` must be 1, got {config.num_return_sequences}. Repeat the question instead."
            )
        if config.eos_token_id is None:
            own = self.backbone.generation_config.eos_token_id
            ends = {self.processor.answer_end_id, self.processor.tokenizer.eos_token_id}
            ends |= set(own if isinstance(own, list) else [own])
            config.eos_token_id = sorted(ends - {None})
        config.pad_token_id = self.processor.pad_token_id
        config.return_dict_in_generate = False
        return config

    def check_window(self, n_tokens: int, name: str, remedy: str = "Shorten it.") -> None:
        window = self.config.text_config.max_position_embeddings
        if n_tokens > window:
            raise ValueError(
                f"the prompt of `{name}` must fit into the backbone's window of {window} tokens, got {n_tokens}. "
                f"{remedy}"
            )

    def checked_prompt(
        self, question, n_documents, memory_size, generation: GenerationConfig, name: str, text_documents=()
    ) -> Prompt:
        """`build_prompt`, and a ValueError unless prompt and answer fit into the window."""
        prompt = self.text_processor().build_prompt(
            question, n_documents, memory_size, text_documents=text_documents, name=name
        )
        options = "`expand`, `top_k`, `memory_size`" if text_documents else "`top_k`, `memory_size`"
        self.check_window(
            len(prompt.input_ids) + generation.max_new_tokens,
            name,
            f"Shorten the question, or lower {options} or `max_new_tokens`.",
        )
        return prompt

    def prepare_reading(
        self,
        question: str,
        hits: list[tuple[Source, torch.Tensor]],
        memory_size: int | None,
        expand: int,
        generation: GenerationConfig,
        name: str,
    ) -> Reading:
        """What the generator reads: the memories of all sources but the best `expand`, then the text of these.

        Args:
            question: text.
            hits: (source, memory (>= k, hidden)) pairs, best first, at least one.
            memory_size: k; default `default_memory_size` of the sources that are read from memory.
            expand: sources that are read as text; all of them if there are fewer.
            generation: has the length limit of the answer.
            name: how an error names the question.

        Raises:
            ValueError: a source has no text, or prompt and answer do not fit into the backbone's window.
        """
        texts = [replace(source, read_as="text") for source, _ in hits[:expand]]
        sources = texts + [source for source, _ in hits[expand:]]
        for source in texts:
            if not isinstance(source.text, str) or not source.text.strip():
                raise ValueError(
                    f"the text of document {source.document_id!r} must be stored to read it with `expand`={expand}, "
                    f"got {source.text!r}. Pass expand=0, which reads memories only, or store the text in the corpus."
                )
        documents = [{"title": source.title, "text": source.text} for source in texts]
        if memory_size is None:
            memory_size = self.default_memory_size([source for source, _ in hits[expand:]])
        n_memories = len(hits) - len(texts)
        prompt = self.checked_prompt(question, n_memories, memory_size, generation, name, documents)
        memory = torch.stack([memory[:memory_size] for _, memory in hits])[expand:]
        return Reading(prompt, memory, sources)

    def default_memory_size(self, sources: list[Source]) -> int:
        """k that is read by default: the largest; of windows the largest that hold 3/4 of a token of the longest text.

        Windows that are much narrower than a token repeat it, and the generator does so as well (recipes/LOG.md).
        """
        sizes = self.config.memory_sizes
        if self.config.memory_layout == "tokens" or not all(source.text for source in sources):
            return sizes[-1]
        texts = [f"{source.title}\n{source.text}".strip() for source in sources]
        longest = max((len(self.text_processor().encode_text(text)) for text in texts), default=0)
        return max((size for size in sizes if 3 * size <= 4 * longest), default=sizes[0])

    def generate_texts(
        self,
        prompts: list[Prompt],
        memories: list[torch.Tensor],
        generation: GenerationConfig,
        role: str | None = "generator",
        **kwargs,
    ) -> list[str]:
        """Texts of the prompts, whose memories are (documents, k, hidden); batches of one k and similar length.

        A prompt without slots has a memory of no documents; the role None is the plain backbone.
        """
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (memories[i].shape[1], len(prompts[i].input_ids)))
        size = PROMPTS_PER_BATCH if self.memory_embeddings.device.type == "cpu" else ON_ACCELERATOR
        alike = [list(rows) for _, rows in groupby(order, key=lambda index: memories[index].shape[1])]
        for rows in (group[start : start + size] for group in alike for start in range(0, len(group), size)):
            inputs = self.text_processor().pad_prompts([prompts[row] for row in rows])
            inputs = {name: tensor.to(self.memory_embeddings.device) for name, tensor in inputs.items()}
            memory = torch.nn.utils.rnn.pad_sequence([memories[row] for row in rows], batch_first=True)
            counts = torch.tensor([len(memories[row]) for row in rows], device=memory.device)
            is_real = torch.arange(memory.shape[1], device=memory.device) < counts[:, None]
            inputs_embeds = self.prompt_embeddings(inputs["input_ids"], inputs["memory_mask"], memory, is_real)
            with self.roles.use(role):
                generated = self.backbone.generate(
                    inputs_embeds=inputs_embeds,
                    attention_mask=inputs["attention_mask"],
                    generation_config=generation,
                    logits_processor=LogitsProcessorList([_RefuseNaN()]),
                    **kwargs,
                )
            for row, ids in zip(rows, generated.tolist(), strict=True):
                texts[row] = self.decode_answer(ids, generation.eos_token_id)
        return texts

    def decode_answer(self, ids: list[int], ends: int | list[int]) -> str:
        ends = ends if isinstance(ends, list) else [ends]
        stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
        return self.processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()

    def stream_text(self, prompt, memory, generation, answer: Answer) -> Generator[str, None, Answer]:
        streamer = _Pieces(lambda ids: self.decode_answer(ids, generation.eos_token_id))
        stop = threading.Event()
        outcome = {}

        def work():
            try:
                with self.lock, eval_mode(self), torch.no_grad():
                    stopping = StoppingCriteriaList([_StopOnEvent(stop)])
                    outcome["text"] = self.generate_texts(
                        [prompt], [memory], generation, streamer=streamer, stopping_criteria=stopping
                    )[0]
            except BaseException as error:  # handed to the reader, who raises it
                outcome["error"] = error
            finally:
                streamer.close()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stop.set()
            worker.join()
        if "error" in outcome:
            raise outcome["error"]
        return replace(answer, text=outcome["text"])


def returning(answer: Answer) -> Generator[str, None, Answer]:
    """An empty stream with a return value."""
    return answer
    yield


@contextlib.contextmanager
def head_at(head: torch.nn.Module, positions: tuple[torch.Tensor, torch.Tensor] | None) -> Iterator[None]:
    """Context: the LM head sees only the states at `positions` (rows, columns), as one row; everywhere for None.

    A hook, because what an architecture does with its logits behind the head (scaling, soft capping) stays in force.
    """
    if positions is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions][None], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
