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
from .reading_clara import Reading
from .text_clara import check_count

PROMPTS_PER_BATCH, ON_ACCELERATOR = 8, 32  # an accelerator takes as long for one token of many prompts as of one


@dataclass(frozen=True)
class Answer:
    """An answer with what it was read from, best source first; each source says by `read_as` how it was read.

    `keywords` explains the query if `explain=True`, else it is None. `abstained` is True if every source scored
    below `min_score`: then `text` is empty and nothing was generated. `prompt_tokens` counts the positions of the
    generator's input: tokens of the prompt and of sources read as text, memory vectors and separators; 0 if it
    abstained, of both readings if it read again (`expand_below`). `confidence` is that of `Written`, of the reading
    that `text` is from. The service fills in `completion_tokens`, those that it wrote, without the end token.
    """

    text: str
    sources: list[Source]
    keywords: list[str] | None = None
    abstained: bool = False
    prompt_tokens: int = 0
    completion_tokens: int | None = field(default=None, compare=False)
    confidence: float | None = field(default=None, compare=False)


class Written(NamedTuple):
    """A text that was generated, and how sure the generator was of it."""

    text: str
    # geometric mean of the probabilities of its tokens, the end token among them, in (0, 1]; None of beam search
    confidence: float | None


class RefuseNaN(LogitsProcessor):
    """Turns NaN logits, which greedy search would read as token 0, into an error."""

    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise ValueError(
                "the generator must give finite logits, got NaN. Its weights are broken: reload them with "
                "`from_pretrained` or lower the learning rate."
            )
        return scores


class TokenProbabilities(LogitsProcessor):
    """Log-probabilities of the tokens that are chosen, summed in every row up to its first end token."""

    def __init__(self, ends: list[int]):
        self.ends, self.last = torch.tensor(ends, dtype=torch.long), None

    def __call__(self, input_ids, scores):
        if self.last is None:
            self.sums, self.counts = scores.new_zeros(2, len(scores), dtype=torch.float32)
            self.is_open = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        else:
            self.add(input_ids[:, -1])
        self.last = scores.float().log_softmax(-1)
        return scores

    def add(self, chosen: torch.Tensor) -> None:
        """The tokens (rows,) that were chosen by the probabilities of the last call."""
        self.sums += self.last.gather(-1, chosen[:, None])[:, 0] * self.is_open
        self.counts += self.is_open
        self.is_open &= ~torch.isin(chosen, self.ends.to(chosen.device))

    def means(self) -> list[float]:
        """The geometric mean of the probabilities of each row."""
        return (self.sums / self.counts).exp().tolist()


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


def generate_texts(model: CLaRaPasses, *args, **kwargs) -> list[str]:
    """The texts alone of `write_texts`."""
    return [written.text for written in write_texts(model, *args, **kwargs)]


def write_answers(
    model: CLaRaPasses, readings: list[list[Reading]], generation: GenerationConfig, expand_below: float | None = None
) -> list[Answer]:
    """An answer from the first reading of each question, or where that is less sure than this, from the second."""

    def write(chosen: list[Reading]) -> list[Written]:
        return write_texts(model, [r.prompt for r in chosen], [r.memory for r in chosen], generation)

    firsts = write([mine[0] for mine in readings])
    found = [_answer(written, mine[:1]) for written, mine in zip(firsts, readings, strict=True)]
    unsure = [n for n, mine in enumerate(readings) if len(mine) > 1 and found[n].confidence < expand_below]
    for n, written in zip(unsure, write([readings[n][1] for n in unsure]), strict=True):
        found[n] = _answer(written, readings[n])
    return found


def write_texts(
    model: CLaRaPasses,
    prompts: list[Prompt],
    memories: list[torch.Tensor],
    generation: GenerationConfig,
    role: str | None = "generator",
    **kwargs,
) -> list[Written]:
    """What is written to the prompts, whose memories are (documents, k, hidden); batches of one k and similar length.

    A prompt without slots has a memory of no documents; the role None is the plain backbone.
    """
    found = [Written("", None)] * len(prompts)
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
        ends = generation.eos_token_id
        probabilities = TokenProbabilities(ends if isinstance(ends, list) else [] if ends is None else [ends])
        has_beams = (generation.num_beams or 1) > 1
        with model.roles.use(role):
            generated = model.backbone.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=inputs["attention_mask"],
                generation_config=generation,
                logits_processor=LogitsProcessorList([RefuseNaN(), *([] if has_beams else [probabilities])]),
                **kwargs,
            )
        confidences = [None] * len(rows)
        if not has_beams:
            probabilities.add(generated[:, -1])
            confidences = probabilities.means()
        for row, ids, confidence in zip(rows, generated.tolist(), confidences, strict=True):
            found[row] = Written(decode_answer(model, ids, ends), confidence)
    return found


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
    model: CLaRaPasses,
    readings: list[Reading],
    generation: GenerationConfig,
    expand_below: float | None = None,
    words: list[str] | None = None,
) -> Generator[str, None, Answer]:
    """Pieces of an answer as `write_answers` has it; the return value is the answer, with `words` as its keywords.

    Of two readings the first comes in one piece. Without any the answer is that the model abstains.
    """
    if not readings:
        return Answer("", [], words, abstained=True)
    if len(readings) > 1:
        first = _last_value(stream_text(model, readings[:1], generation, words=words))
        if first.confidence >= expand_below:
            if first.text:
                yield first.text
            return first
        answer = yield from stream_text(model, readings[1:], generation, words=words)
        return replace(answer, prompt_tokens=first.prompt_tokens + answer.prompt_tokens)
    streamer = _Streamer(lambda ids: decode_answer(model, ids, generation.eos_token_id))
    outcome = {}

    def work():
        try:
            with model.lock, eval_mode(model), torch.no_grad():
                prompts, memories = [readings[0].prompt], [readings[0].memory]
                outcome["written"] = write_texts(model, prompts, memories, generation, streamer=streamer)[0]
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
    return replace(_answer(outcome["written"], readings), keywords=words)


def _answer(written: Written, readings: list[Reading]) -> Answer:
    """From the last of the readings that it took."""
    n_tokens = sum(len(reading.prompt.input_ids) for reading in readings)
    return Answer(written.text, readings[-1].sources, prompt_tokens=n_tokens, confidence=written.confidence)


def _last_value(stream: Generator):
    """What a generator returns."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


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
