"""Records -> tensors of a batch, for every k of `memory_sizes`, so that the trainer can draw k per optimizer step."""

import zlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain, takewhile

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_clara import CLaRaProcessor
from modeling_clara.processing_clara import Prompt
from recipes.training.data import document_key, text_places
from recipes.training.memories import DocumentMemories


def with_slots(prompt: Prompt, n_slots: int, pad_id: int) -> Prompt:
    """The same prompt with another number of memory slots; they stand in one block.

    >>> with_slots(Prompt([7, 0, 0, 8], [False, True, True, False], [-100, -100, -100, 8]), 1, 0)
    Prompt(input_ids=[7, 0, 8], memory_mask=[False, True, False], labels=[-100, -100, 8])
    """
    if True not in prompt.memory_mask:  # all of its documents are read as text
        return prompt
    start = prompt.memory_mask.index(True)
    end = start + sum(prompt.memory_mask)
    return Prompt(
        prompt.input_ids[:start] + [pad_id] * n_slots + prompt.input_ids[end:],
        prompt.memory_mask[:start] + [True] * n_slots + prompt.memory_mask[end:],
        prompt.labels[:start] + [-100] * n_slots + prompt.labels[end:],
    )


def shared_prompt(prompts: Sequence[Prompt]) -> tuple[Prompt, list[int], list[int]]:
    """Prompts in one row that read what they have in common once.

    The prefix ends before the first answer: the token in front of an answer must stand directly before it.

    Returns:
        The row; the position of every token, counted as in its own prompt; and its segment: 0 in the common prefix, i
        in the rest of prompt i - 1. A token attends to the prefix and to what precedes it in its own segment.

    >>> first = Prompt([7, 0, 5, 8, 1], [False, True, False, False, False], [-100, -100, -100, -100, 1])
    >>> other = Prompt([7, 0, 6, 8, 2], [False, True, False, False, False], [-100, -100, -100, -100, 2])
    >>> row, positions, segments = shared_prompt([first, other])
    >>> row.input_ids, positions, segments
    ([7, 0, 5, 8, 1, 6, 8, 2], [0, 1, 2, 3, 4, 2, 3, 4], [0, 0, 1, 1, 1, 2, 2, 2])
    """
    starts = [next((i for i, label in enumerate(p.labels) if label != -100), len(p.labels)) for p in prompts]
    limit = max(min(starts) - 1, 0) if len(prompts) > 1 else 0
    tokens = zip(*(zip(p.input_ids[:limit], p.memory_mask[:limit], strict=True) for p in prompts), strict=True)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, tokens))
    if any(any(prompt.memory_mask[length:]) for prompt in prompts) and len(prompts) > 1:
        raise ValueError(
            "`answer_prompt` and `paraphrase_prompts` must begin alike up to `{documents}` for records of several "
            "targets. Put `{documents}` first, or set `targets_per_document: 1`."
        )
    parts = [
        [*column[0][:length], *chain(*(part[length:] for part in column))] for column in zip(*prompts, strict=True)
    ]
    rests = [range(length, len(prompt.input_ids)) for prompt in prompts]
    positions = [*range(length), *chain(*rests)]
    segments = [0] * length + [number for number, rest in enumerate(rests, 1) for _ in rest]
    return Prompt(*parts), positions, segments


@dataclass
class Collator:
    """What all collators share: the prompts of a record stand in one row, their common part once (`shared_prompt`)."""

    processor: CLaRaProcessor
    memory_sizes: Sequence[int]  # layouts of the prompts that are made, ascending

    def prompt(self, record: dict, question: str | None, answer: str, n_documents: int, texts=()) -> Prompt:
        """The prompt of the largest k. A paraphrase takes one of the instructions, the same one every time."""
        instruction = None
        if question is None:
            instructions = self.processor.paraphrase_prompts
            instruction = instructions[zlib.crc32(record["source"].encode()) % len(instructions)]
        options = {"text_documents": texts, "prompt": instruction, "name": f"{record['source']} question"}
        return self.processor.build_prompt(question, n_documents, self.memory_sizes[-1], answer, **options)

    def layouts(self, rows: list[list[Prompt]]) -> dict:
        """`prompts` and `labels` of the prompts of each row, which were made for the largest k."""
        largest, pad_id = self.memory_sizes[-1], self.processor.pad_token_id

        def fitted(prompt: Prompt, size: int) -> Prompt:
            return with_slots(prompt, sum(prompt.memory_mask) // (largest + 1) * (size + 1), pad_id)

        layouts = {size: self.pad_rows([[fitted(p, size) for p in row] for row in rows]) for size in self.memory_sizes}
        return {"prompts": layouts, "labels": layouts[largest]["labels"]}

    def pad_rows(self, rows: list[list[Prompt]]) -> dict[str, torch.Tensor]:
        """What `forward` takes of rows of prompts; rows of one prompt need neither positions nor segments."""
        shared = [shared_prompt(row) for row in rows]
        padded = self.processor.pad_prompts([row for row, _, _ in shared])
        if any(len(row) > 1 for row in rows):
            padded["position_ids"] = self.processor.pad([positions for _, positions, _ in shared], 0, "left")
            padded["prompt_segments"] = self.processor.pad([segments for _, _, segments in shared], 0, "left")
        return padded

    def documents(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """(rows, documents, length) ids and mask; a row with fewer documents has rows of zeros."""
        return self.processor.pad_documents(
            [self.processor.encode_documents(record["documents"], f"{record['source']} docs") for record in records]
        )


@dataclass
class ReadingCollator(Collator):
    """Batches of the stages that read memories: documents to compress and the prompts that read them.

    Returns of a call with `rows` records:
        - `document_input_ids`, `document_attention_mask`: (rows, documents, length) int64.
        - with `n_queries`: `query_input_ids`, `query_attention_mask` (questions, length) int64, `query_rows`
          (questions,) int64, the record of each, and `batch_positive_mask` (questions, rows * documents) bool.
        - `prompts`: k -> `input_ids`, `attention_mask`, `memory_mask`, `labels`, `position_ids`, `prompt_segments`,
          each (rows, length of this k).
        - `labels`: those of the largest k, for the Trainer's count of targets.
        - with `text_share`: `prompt_document_mask` (rows, documents) bool, False for a document that is read as text.
    """

    _: KW_ONLY
    n_queries: int = 0  # questions of a record that the reasoner encodes for the contrastive term
    text_share: float = 0.0  # of the records whose prompts read one document as text, see `data.text_places`

    def __call__(self, records: list[dict]) -> dict:
        as_text = [text_places(record, self.text_share) for record in records]
        rows = []
        for record, places in zip(records, as_text, strict=True):
            texts = [record["documents"][place] for place in places]
            targets = zip(record["questions"], record["answers"], strict=True)
            n_memories = len(record["documents"]) - len(places)
            rows.append([self.prompt(record, *target, n_memories, texts) for target in targets])
        batch = {**self.documents(records), **self.queries(records), **self.layouts(rows)}
        if self.text_share:
            n_documents = max(len(record["documents"]) for record in records)
            mask = [[place not in places for place in range(n_documents)] for places in as_text]
            batch["prompt_document_mask"] = torch.tensor(mask)
        return batch

    def queries(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """The first questions of each record, and their gold documents among those of all records."""
        asked = [[question for question in r["questions"] if question is not None][: self.n_queries] for r in records]
        rows = [row for row, questions in enumerate(asked) for _ in questions]
        if not rows:
            return {}
        gold = batch_positive_mask([{**r, "positives": r["positives"] or range(len(r["documents"]))} for r in records])
        encoded = self.processor.encode_questions(list(chain(*asked)))
        queries = self.processor.pad_queries(encoded)
        return {**queries, "query_rows": torch.tensor(rows), "batch_positive_mask": gold[rows]}


@dataclass
class TextCollator(Collator):
    """Batches of the text baseline: the prompts have the documents' text where the other stages have slots.

    Returns of a call with `rows` records: `prompts` and `labels` as `ReadingCollator`, and
        - `memory`: (rows, 0, n, hidden) float32, no documents.
    """

    hidden_size: int  # of the backbone

    def __call__(self, records: list[dict]) -> dict:
        rows = [
            [self.prompt(r, *target, 0, r["documents"]) for target in zip(r["questions"], r["answers"], strict=True)]
            for r in records
        ]
        layout = self.pad_rows(rows)  # the same for every k
        return {
            "memory": torch.zeros(len(rows), 0, self.memory_sizes[-1], self.hidden_size),
            "prompts": dict.fromkeys(self.memory_sizes, layout),
            "labels": layout["labels"],
        }


@dataclass
class SelectingCollator(Collator):
    """Batches of the stages that select: a question, its candidates, and a prompt with open slots.

    Returns of a call with `rows` records, beside `prompts` and `labels` (see `ReadingCollator`):
        - `query_input_ids`, `query_attention_mask`: (rows, length) int64.
        - `positive_mask`: (rows, documents) bool, the gold ones, with `in_batch_negatives` also
          `batch_positive_mask`: (rows, rows * documents) bool, the same among the documents of all rows; and
        - `memory` (rows, documents, n, hidden) float32 with `document_mask` (rows, documents) bool, or the two
          `document_` tensors without a store; or
        - with `from_corpus` only `gold_documents`: the gold documents of each row.
    """

    _: KW_ONLY
    top_k: int  # documents that a prompt reads
    store: DocumentMemories | None  # memories of the candidates; None compresses them in the step
    from_corpus: bool = False  # the trainer searches the candidates; here are none
    with_prompts: bool = True  # False for a stage that does not generate
    num_candidates: int = 20  # of each row with `from_corpus`
    in_batch_negatives: bool = False  # the documents of the other rows are candidates of the contrastive term

    def __call__(self, records: list[dict]) -> dict:
        questions = [record["questions"][0] for record in records]
        batch = self.processor.pad_queries(self.processor.encode_questions(questions))
        if self.from_corpus:
            gold = [[record["documents"][index] for index in record["positives"]] for record in records]
            batch["gold_documents"] = gold
            n_candidates = [self.num_candidates] * len(records)
        else:
            batch |= self.documents(records) if self.store is None else self.memories(records)
            n_candidates = [len(record["documents"]) for record in records]
            positives = [[i in record["positives"] for i in range(max(n_candidates))] for record in records]
            batch["positive_mask"] = torch.tensor(positives)
            if self.in_batch_negatives:
                batch["batch_positive_mask"] = batch_positive_mask(records)
        if self.with_prompts:
            rows = zip(records, questions, n_candidates, strict=True)
            batch |= self.layouts([[self.prompt(r, q, r["answers"][0], min(self.top_k, n))] for r, q, n in rows])
        return batch

    def memories(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """Stored memories of all candidates, zeros where a row has fewer."""
        rows = [self.store.lookup(record["documents"]) for record in records]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return {"memory": pad_sequence(rows, batch_first=True), "document_mask": pad_sequence(masks, batch_first=True)}


def batch_positive_mask(records: list[dict]) -> torch.Tensor:
    """(rows, rows * documents) bool: gold documents of each row, in whichever row they stand.

    What is gold for one question and stands among another's candidates would be its own negative otherwise.
    """
    n_documents = max(len(record["documents"]) for record in records)
    keys = [[document_key(document) for document in record["documents"]] for record in records]
    places = [key for row in keys for key in [*row, *[None] * (n_documents - len(row))]]
    gold = [{row[place] for place in record["positives"]} for row, record in zip(keys, records, strict=True)]
    return torch.tensor([[key in own for key in places] for own in gold])
