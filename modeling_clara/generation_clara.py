"""Generation: prompts with memories in, text out, at once or piece by piece.

The functions take a model with its processor and pass on to the backbone's `generate`; they retrieve nothing.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from .adapters_clara import eval_mode
from .candidates_clara import Source, text_processor
from .passes_clara import CLaRaPasses
from .processing_clara import Prompt
from .text_clara import check_count

PROMPTS_PER_BATCH, ON_ACCELERATOR = 8, 32  # an accelerator takes as long for one token of many prompts as of one


@dataclass(frozen=True)
class Answer:
    """An answer with what it was read from, best source first; each source says by `read_as` how it was read.

    `keywords` explains the query if `explain=True`, else it is None. `abstained` is True if every source scored
    below `min_score`: then `text` is empty and nothing was generated. `prompt_tokens` counts the positions of the
    generator's input: tokens of the prompt and of sources read as text, memory vectors and separators; 0 if it
    abstained. The service fills in `completion_tokens`, those that it wrote, without the end token.
    """

    text: str
    sources: list[Source]
    keywords: list[str] | None = None
    abstained: bool = False
    prompt_tokens: int = 0
    completion_tokens: int | None = field(default=None, compare=False)


class Reading(NamedTuple):
    """Input of the generator for one question."""

    prompt: Prompt  # with slots for the memories, after them the text
    memory: torch.Tensor  # (sources read from memory, k, hidden) float32
    sources: list[Source]  # all that are read, best first, `read_as` filled in


class RefuseNaN(LogitsProcessor):
    """Turns NaN logits, which greedy search would read as token 0, into an error."""

    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise ValueError(
                "the generator must give finite logits, got NaN. Its weights are broken: reload them with "
                "`from_pretrained` or lower the learning rate."
            )
        return scores


class _ReaderLeft(Exception):
    """Ends generation when nobody reads the stream any more."""


class Pieces:
    """Cuts a text that grows into pieces, which join to it; a character that is unfinished so far waits."""

    def __init__(self):
        self.n_sent = 0  # characters

    def cut(self, text: str, is_whole: bool = False) -> str:
        """What `text` has beyond the pieces before."""
        text = text if is_whole else text.rstrip("\ufffd")
        piece = text[self.n_sent :]
        self.n_sent += len(piece)
        return piece


class _Streamer(BaseStreamer):
    """Pieces of a text as it is generated, for the thread that iterates over them."""

    def __init__(self, decode: Callable[[list[int]], str]):  # longer with more ids, but for an unfinished character
        self.decode, self.ids, self.pieces = decode, [], Pieces()
        self.queue, self.reader_left = queue.SimpleQueue(), False

    def put(self, value):
        if self.reader_left:
            raise _ReaderLeft
        self.ids += value.flatten().tolist()
        self._send()

    def end(self):
        self._send(is_whole=True)

    def _send(self, is_whole: bool = False):
        if piece := self.pieces.cut(self.decode(self.ids), is_whole):
            self.queue.put(piece)

    def __iter__(self):
        return iter(self.queue.get, None)


def build_generation_config(
    model: CLaRaPasses, given: GenerationConfig | None, max_new_tokens: int
) -> GenerationConfig:
    """A copy of `given`, or greedy search, with the length limit and the end tokens filled in."""
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
        own = model.backbone.generation_config.eos_token_id
        ends = set(own if isinstance(own, list) else [own])
        if model.processor.stop_at_answer_end:
            ends |= {model.processor.answer_end_id, model.processor.tokenizer.eos_token_id}
        config.eos_token_id = sorted(ends - {None}) or None
    config.pad_token_id = model.processor.pad_token_id
    config.return_dict_in_generate = False
    return config


def prepare_reading(
    model: CLaRaPasses,
    question: str | None,
    hits: list[tuple[Source, torch.Tensor]],
    memory_size: int | None,
    expand: int,
    generation: GenerationConfig,
    name: str,
) -> Reading:
    """What the generator reads: the memories of all hits but the best `expand`, then the text of these.

    Without a question it is a paraphrase. k is `memory_size`, by default `default_memory_size` of the sources that are
    read from memory. A ValueError if a source has no text, or prompt and answer do not fit into the backbone's window.
    """
    texts = [replace(source, read_as="text") for source, _ in hits[:expand]]
    remembered = [source for source, _ in hits[expand:]]
    for source in texts:
        if not isinstance(source.text, str) or not source.text.strip():
            raise ValueError(
                f"the text of document {source.document_id!r} must be stored to read it with `expand`={expand}, "
                f"got {source.text!r}. Pass expand=0, which reads memories only, or store the text in the corpus."
            )
    documents = [{"title": source.title, "text": source.text} for source in texts]
    if memory_size is None:
        memory_size = default_memory_size(model, [(source.title, source.text) for source in remembered])
    prompt = text_processor(model).build_prompt(
        question, len(remembered), memory_size, text_documents=documents, name=name
    )
    options = "`expand`, `top_k`, `memory_size`" if texts else "`top_k`, `memory_size`"
    remedy = f"Shorten the question, or lower {options} or `max_new_tokens`."
    model.config.check_window(len(prompt.input_ids) + generation.max_new_tokens, name, remedy)
    memory = torch.stack([memory[:memory_size] for _, memory in hits])[expand:]
    return Reading(prompt, memory, texts + remembered)


def default_memory_size(model: CLaRaPasses, documents: list[tuple[str, str]]) -> int:
    """k that is read by default of (title, text) documents: the largest.

    Of windows the largest that hold 3/4 of a token of the longest text, if all have one: the generator repeats what
    much narrower windows repeat (docs/experiments.md).
    """
    sizes = model.config.memory_sizes
    if model.config.memory_layout == "tokens" or not all(text for _, text in documents):
        return sizes[-1]
    texts = [f"{title}\n{text}".strip() for title, text in documents]
    longest = max((len(text_processor(model).encode_text(text)) for text in texts), default=0)
    return max((size for size in sizes if 3 * size <= 4 * longest), default=sizes[0])


def generate_texts(
    model: CLaRaPasses,
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
    device = model.memory_embeddings.device
    order = sorted(range(len(prompts)), key=lambda i: (memories[i].shape[1], len(prompts[i].input_ids)))
    size = PROMPTS_PER_BATCH if device.type == "cpu" else ON_ACCELERATOR
    alike = [list(rows) for _, rows in groupby(order, key=lambda index: memories[index].shape[1])]
    for rows in (group[start : start + size] for group in alike for start in range(0, len(group), size)):
        inputs = text_processor(model).pad_prompts([prompts[row] for row in rows])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        memory = torch.nn.utils.rnn.pad_sequence([memories[row] for row in rows], batch_first=True)
        counts = torch.tensor([len(memories[row]) for row in rows], device=memory.device)
        is_real = torch.arange(memory.shape[1], device=memory.device) < counts[:, None]
        inputs_embeds = model.prompt_embeddings(inputs["input_ids"], inputs["memory_mask"], memory, is_real)
        with model.roles.use(role):
            generated = model.backbone.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=inputs["attention_mask"],
                generation_config=generation,
                logits_processor=LogitsProcessorList([RefuseNaN()]),
                **kwargs,
            )
        for row, ids in zip(rows, generated.tolist(), strict=True):
            texts[row] = decode_answer(model, ids, generation.eos_token_id)
    return texts


def decode_answer(model: CLaRaPasses, ids: list[int], ends: int | list[int]) -> str:
    """Text of generated ids up to the first of the end tokens, without blanks around it if texts are encoded apart.

    Special tokens are left out. An end token that is none ends the text, unless it ends at `answer_end_id` anyway.
    """
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    processor = model.processor
    text = processor.tokenizer.decode(ids[: stop + (not processor.stop_at_answer_end)], skip_special_tokens=True)
    return text if processor.encode_in_place else text.strip()


def stream_text(
    model: CLaRaPasses, reading: Reading | None, generation: GenerationConfig, answer: Answer
) -> Generator[str, None, Answer]:
    """Pieces of one prompt's text; the return value is `answer` with the whole text, as it is without a reading."""
    if reading is None:
        return answer
    streamer = _Streamer(lambda ids: decode_answer(model, ids, generation.eos_token_id))
    outcome = {}

    def work():
        try:
            with model.lock, eval_mode(model), torch.no_grad():
                prompts, memories = [reading.prompt], [reading.memory]
                outcome["text"] = generate_texts(model, prompts, memories, generation, streamer=streamer)[0]
        except BaseException as error:  # handed to the reader, who raises it
            outcome["error"] = error
        finally:
            streamer.queue.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        streamer.reader_left = True
        worker.join()
    if "error" in outcome:
        raise outcome["error"]
    return replace(answer, text=outcome["text"])


def keywords(model: CLaRaPasses, queries: torch.Tensor, top_n: int) -> list[list[str]]:
    """Words of (questions, k, hidden) query memories, see `CLaRaForRAG.explain_queries`."""
    head, dtype = model.get_output_embeddings(), model.backbone.dtype
    tokenizer = text_processor(model).tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    words_of = []
    for query in queries:
        probabilities, tokens = head(model.as_states(query).to(dtype)).float().softmax(-1).topk(top_n)
        tokens, probabilities = tokens.tolist(), probabilities.tolist()
        words = {token: tokenizer.decode([token]).strip() for token in set().union(*tokens) - special}
        counts, sums = Counter(), Counter()  # of each word the vectors that name it, and its probability
        for vector_tokens, vector_probabilities in zip(tokens, probabilities, strict=True):
            named = Counter()
            for token, probability in zip(vector_tokens, vector_probabilities, strict=True):
                if any(map(str.isalnum, words.get(token, ""))):
                    named[words[token]] += probability
            counts.update(named.keys())
            sums.update(named)
        words_of.append(sorted(counts, key=lambda word: (-counts[word], -sums[word], word))[:top_n])  # noqa: B023
    return words_of
