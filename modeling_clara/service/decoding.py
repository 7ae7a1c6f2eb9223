"""Writes the answers of many prompts at once: a row joins when its prompt is read, and leaves when its answer ends.

Greedy text is that of `model.answer`. What prompts have in common from their start on is read once, see `Prefixes`.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch.nn import functional as F
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from ..generation_clara import RefuseNaN
from ..packing_clara import MAX_TOKENS
from ..processing_clara import CLaRaProcessor, Prompt
from ..reading_clara import Reading

QUESTIONS = ("?", "A")  # where prompts with different questions part


class Sampler:
    """Draws tokens; equal numbers give equal draws, whatever else is in the batch."""

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self.warpers = [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(float(top_p))]
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """An id for logits (vocabulary,)."""
        scores = logits[None].double().cpu()
        scores -= scores.max()  # so that no temperature makes the best one infinite
        for warper in self.warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


class Draft:
    """An answer that is being written.

    Attributes:
        reading: what it is written from.
        ids: what was generated so far, with the end token.
        log_probabilities: of each of them, before any sampling.
        error: why there will be no more.
    """

    def __init__(self, reading: Reading, max_new_tokens: int, sampler: Sampler | None = None):
        self.reading, self.max_new_tokens, self.sampler = reading, max_new_tokens, sampler
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.error: Exception | None = None

    @property
    def confidence(self) -> float:
        """As that of `Written`."""
        return math.exp(sum(self.log_probabilities) / len(self.log_probabilities))


class Rows:
    """Prompts that were read: keys and values of all layers, left-padded, and `mask` (rows, length) int64."""

    def __init__(self, cache: DynamicCache, mask: torch.Tensor):
        self.cache, self.mask = cache, mask

    def select(self, kept: list[int]) -> None:
        """Keep these rows only, and no more padding than they need."""
        if len(kept) < len(self.mask):
            index = torch.tensor(kept, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]
            padding = self.mask.shape[1] - int(self.mask.sum(-1).max())
            if padding and not self.mask[:, :padding].any():
                self.mask = self.mask[:, padding:]
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]

    def part(self, row: int, n_tokens: int) -> "Rows":
        """A copy of the first tokens of one row."""
        places = self.mask[row].nonzero()[:n_tokens, 0]
        pairs = [(layer.keys[row, :, places], layer.values[row, :, places]) for layer in self.cache.layers]
        return Rows(DynamicCache([(k[None], v[None]) for k, v in pairs]), self.mask.new_ones(1, n_tokens))

    @property
    def n_bytes(self) -> int:
        """Of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def join(parts: Sequence[Rows]) -> Rows:
    """All rows of several, left-padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    length = max(rows.mask.shape[1] for rows in parts)
    gaps = [length - rows.mask.shape[1] for rows in parts]

    def stack(states: list[torch.Tensor]) -> torch.Tensor:  # (rows, heads, tokens, size) each
        return torch.cat([F.pad(state, (0, 0, gap, 0)) for state, gap in zip(states, gaps, strict=True)])

    layers = list(zip(*(rows.cache.layers for rows in parts), strict=True))
    pairs = [(stack([one.keys for one in layer]), stack([one.values for one in layer])) for layer in layers]
    mask = torch.cat([F.pad(rows.mask, (gap, 0)) for rows, gap in zip(parts, gaps, strict=True)])
    return Rows(DynamicCache(pairs), mask)


class Prefixes:
    """Beginnings of prompts that were read before: the template up to the documents, and the documents after it.

    Prompts that read the same documents part at the question. The latest are kept, up to `limit` bytes. A key holds
    the tokens and a digest of the memories, so a document that has changed is another one. Drafts of more than
    `longest` tokens have none: a sliding window counts the padding between a beginning and the rest as well.
    """

    def __init__(self, processor: CLaRaProcessor, limit: int, longest: int):
        self.processor, self.limit, self.longest, self.n_bytes = processor, limit, longest, 0
        self.kept: OrderedDict[tuple, Rows] = OrderedDict()
        slots = [processor.build_prompt(question, 1, 1) for question in QUESTIONS]
        self.n_head = min(_n_common(*slots), slots[0].memory_mask.index(True))

    def keys(self, draft: Draft) -> list[tuple]:
        """Of the beginnings of a prompt that others may have too, the longest first; empty if none is to be kept."""
        reading, prompt = draft.reading, draft.reading.prompt
        if not self.limit or len(prompt.input_ids) + draft.max_new_tokens > self.longest:
            return []
        n_slots = sum(prompt.memory_mask)
        documents = [{"title": s.title, "text": s.text} for s in reading.sources if s.read_as == "text"]
        n_memories, k = reading.memory.shape[:2]
        others = [
            self.processor.build_prompt(question, n_memories, k, text_documents=documents) for question in QUESTIONS
        ]
        n_common = min(_n_common(prompt, other) for other in others)
        keys = []
        if n_common > self.n_head and sum(prompt.memory_mask[:n_common]) == n_slots:
            memory = reading.memory.contiguous().view(torch.uint8).cpu().numpy()
            keys.append((hashlib.blake2b(memory).digest(), *prompt.input_ids[:n_common]))
        return keys + ([(b"", *prompt.input_ids[: self.n_head])] if self.n_head else [])

    def find(self, keys: list[tuple]) -> tuple[int, Rows | None]:
        """The longest beginning that is kept, as its number of tokens and its row."""
        for key in keys:
            if key in self.kept:
                self.kept.move_to_end(key)
                return len(key) - 1, self.kept[key]
        return 0, None

    def keep(self, keys: list[tuple], rows: Rows, row: int) -> None:
        """Keep the beginnings of a row that are not kept yet."""
        for key in keys:
            if key not in self.kept:
                self.kept[key] = rows.part(row, len(key) - 1)
                self.n_bytes += self.kept[key].n_bytes
        while self.n_bytes > self.limit and self.kept:
            self.n_bytes -= self.kept.popitem(last=False)[1].n_bytes


def _n_common(first: Prompt, second: Prompt) -> int:
    """Positions that two prompts have in common from their start on."""
    pairs = zip(zip(*first[:2], strict=True), zip(*second[:2], strict=True), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Decoder:
    """The answers that are being written.

    Args:
        model: a `CLaRaForRAG`, whose lock the caller holds, in eval mode and without gradient.
        prefix_bytes: of the beginnings of prompts that are kept.

    Attributes:
        drafts: what is being written.
        ended: what was finished since the caller last took it.
    """

    def __init__(self, model, prefix_bytes: int):
        self.model, self.drafts, self.ended = model, [], []
        self.ends = set(model.build_generation_config(None, 1).eos_token_id or ())
        window = model.backbone.config.to_dict().get("sliding_window")
        longest = window // 2 if window else model.config.text_config.max_position_embeddings
        self._prefixes = Prefixes(model.processor, prefix_bytes, longest)
        self._rows: Rows | None = None

    def add(self, drafts: list[Draft]) -> None:
        """Read the prompts of new drafts, and choose their first tokens."""
        found = []
        for draft in drafts:
            keys = self._prefixes.keys(draft)
            found.append((draft, keys, *self._prefixes.find(keys)))
        for group in self._alike(found):
            rows, logits = self._read(group)
            self._take(rows, [draft for draft, *_ in group], logits)

    def step(self) -> None:
        """Choose the next token of each draft."""
        rows, drafts = self._rows, self.drafts
        self._rows, self.drafts = None, []
        device = rows.mask.device
        rows.mask = F.pad(rows.mask, (0, 1), value=1)
        ids = torch.tensor([[draft.ids[-1]] for draft in drafts], device=device)
        self._take(rows, drafts, self._forward(rows, input_ids=ids))

    def drop(self, drafts: Sequence[Draft]) -> None:
        """Write no more of these."""
        kept = [place for place, draft in enumerate(self.drafts) if draft not in drafts]
        self.drafts = [self.drafts[place] for place in kept]
        if not kept:
            self._rows = None
        elif self._rows is not None:
            self._rows.select(kept)

    def _alike(self, found: list[tuple]) -> Iterator[list[tuple]]:
        """Drafts whose prompts are read in one pass: with a beginning or without, of similar length beyond it."""
        found = sorted(found, key=lambda entry: (entry[3] is None, len(entry[0].reading.prompt.input_ids) - entry[2]))
        group = []
        for entry in found:
            length = len(entry[0].reading.prompt.input_ids) - entry[2]
            if group:
                shortest = len(group[0][0].reading.prompt.input_ids) - group[0][2]
                is_unlike = (group[0][3] is None) != (entry[3] is None) or 4 * shortest < 3 * length
                if is_unlike or length * (len(group) + 1) > MAX_TOKENS:
                    yield group
                    group = []
            group.append(entry)
        if group:
            yield group

    def _read(self, group: list[tuple]) -> tuple[Rows, torch.Tensor]:
        """Rows of prompts, and the logits (rows, vocabulary) of their first tokens."""
        inputs = [prompt_embeddings(self.model, draft.reading)[n_read:] for draft, _, n_read, _ in group]
        length = max(map(len, inputs))
        inputs_embeds = torch.stack([F.pad(rows, (0, 0, length - len(rows), 0)) for rows in inputs])
        mask = torch.zeros(len(inputs), length, dtype=torch.long, device=inputs_embeds.device)
        for row, states in enumerate(inputs):
            mask[row, length - len(states) :] = 1
        rows = Rows(DynamicCache(), mask)
        if group[0][3] is not None:
            before = join([rows for *_, rows in group]) if len(group) > 1 else group[0][3].part(0, group[0][2])
            rows = Rows(before.cache, torch.cat([before.mask, mask], dim=1))
        logits = self._forward(rows, inputs_embeds=inputs_embeds)
        for row, (_, keys, *_) in enumerate(group):
            self._prefixes.keep(keys, rows, row)
        return rows, logits

    def _forward(self, rows: Rows, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) float32 after the last token; keys and values are added to the rows."""
        n_new = next(iter(inputs.values())).shape[1]
        positions = (rows.mask.cumsum(-1) - 1).clamp(min=0)[:, -n_new:]
        with self.model.roles.use("generator"):
            output = self.model.backbone(
                attention_mask=rows.mask,
                position_ids=positions,
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
                **inputs,
            )
        return output.logits[:, -1].float()

    def _take(self, rows: Rows, drafts: list[Draft], logits: torch.Tensor) -> None:
        """Give each draft its token; the rows of those that go on join the others."""
        best, kept, log_probabilities = logits.argmax(-1).tolist(), [], logits.log_softmax(-1)
        for place, draft in enumerate(drafts):
            try:
                RefuseNaN()(None, logits[place])
                draft.ids.append(best[place] if draft.sampler is None else draft.sampler(logits[place]))
                draft.log_probabilities.append(float(log_probabilities[place, draft.ids[-1]]))
            except (ValueError, RuntimeError) as error:  # of this draft alone
                draft.error = error
            is_ended = draft.error or draft.ids[-1] in self.ends or len(draft.ids) >= draft.max_new_tokens
            (self.ended if is_ended else kept).append(draft if is_ended else place)
        if kept:
            rows.select(kept)
            self._rows = rows if self._rows is None else join([self._rows, rows])
            self.drafts += [drafts[place] for place in kept]


def prompt_embeddings(model, reading: Reading) -> torch.Tensor:
    """Embeddings (tokens, hidden) of the prompt of a reading."""
    device = model.memory_embeddings.device
    ids, mask = (torch.tensor([values], device=device) for values in reading.prompt[:2])
    is_real = torch.ones(1, len(reading.memory), dtype=torch.bool, device=device)
    return model.prompt_embeddings(ids, mask, reading.memory[None], is_real)[0]


def check_sampling(temperature, top_p, seed) -> Sampler | None:
    """The sampler of these numbers, None for greedy search; a ValueError names a wrong one."""
    for name, value, rule in (
        ("temperature", temperature, "a finite number >= 0"),
        ("top_p", top_p, "a number above 0 and at most 1"),
    ):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (name == "top_p" and not 0 < value <= 1):
            raise ValueError(f"`{name}` must be {rule}, got {value!r}. Leave it out for the default.")
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63
    if seed is not None and not is_seed:
        raise ValueError(f"`seed` must be an int of 64 bits, got {seed!r}. Leave it out for a random one.")
    return Sampler(temperature, top_p, seed) if temperature > 0 else None
