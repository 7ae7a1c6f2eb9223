"""Rows -> records that the collators read: each checked against its stage, each knowing where it came from.

A record is rejected before the first step if one of its prompts does not fit into the backbone's window.
"""

from dataclasses import KW_ONLY, dataclass

from modeling_clara import CLaRaProcessor
from recipes.training.data import BadRow, read_documents, read_positives, read_targets, text_places
from recipes.training.stages import STAGES

MAX_SPLIT = 50_000  # documents whose chunks are remembered while rows are read


@dataclass
class RecordReader:
    """Turns a row into records and refuses what cannot be trained on."""

    processor: CLaRaProcessor  # cuts documents into chunks and measures prompts
    stage: str  # a name of `STAGES`
    _: KW_ONLY
    window: int  # positions of the backbone
    memory_size: int  # the largest k
    top_k: int  # documents that a prompt reads after the selection, in the stages that select
    targets_per_document: int = 1
    long_documents: str = "split"  # or "first_span"
    num_candidates: int = 20  # documents of a record of the stages that select
    needs_candidates: bool = True  # whether these choose among the row's own documents, and not in a corpus
    text_share: float = 0.0  # of the records that read one document as text, see `text_places`

    def __post_init__(self):
        self.rules = STAGES[self.stage]
        self._split: dict[tuple[str, str], list[dict]] = {}

    def __call__(self, place: str, row: dict) -> list[dict]:
        """The records of a row, or a `BadRow` with file, line and rule."""
        try:
            documents = read_documents(row)
            targets = read_targets(row, gold_first=self.rules.learns_gold_answers)
            documents, positives = self._split_all(documents, read_positives(row, len(documents)))
            if not self.rules.reads_memories:
                targets = [target for target in targets if target[0] is not None]
                if not targets:
                    raise BadRow("must have a question: this stage learns no paraphrases")
            if self.rules.selects:
                documents, positives = self._candidates(documents, positives)
            size = 1 if self.rules.selects else self.targets_per_document
            groups = [targets[start : start + size] for start in range(0, len(targets), size)]
            return [self._record(place, documents, positives, group) for group in groups]
        except ValueError as error:  # of ours, or of the processor
            raise BadRow(str(error), place) from error

    def _record(self, place: str, documents: list[dict], positives: list[int], targets: list[tuple]) -> dict:
        questions, answers = map(list, zip(*targets, strict=True))
        record = {"documents": documents, "positives": positives, "questions": questions, "answers": answers}
        record["source"] = place
        texts = [documents[index] for index in text_places(record, self.text_share)]
        return {**record, "length": max(self._length(*target, documents, texts) for target in targets)}

    def _split_all(self, documents: list[dict], positives: list[int]) -> tuple[list[dict], list[int]]:
        """The chunks of all documents, and the indices of those of gold documents."""
        chunks, gold = [], []
        for index, document in enumerate(documents):
            key = (document["title"], document["text"])
            if key not in self._split:  # candidates come back in many rows
                parts = self.processor.split_document(document, f"docs[{index}]")
                parts = parts[:1] if self.long_documents == "first_span" else parts
                self._split[key] = [{"title": part["title"], "text": part["text"]} for part in parts]
                if len(self._split) > MAX_SPLIT:
                    del self._split[next(iter(self._split))]
            if index in positives:
                gold += range(len(chunks), len(chunks) + len(self._split[key]))
            chunks += self._split[key]
        return chunks, gold

    def _candidates(self, documents: list[dict], positives: list[int]) -> tuple[list[dict], list[int]]:
        """At most `num_candidates` documents, the gold ones among them, in their order; too few are a `BadRow`."""
        rest = [index for index in range(len(documents)) if index not in positives]
        kept = sorted((positives + rest)[: self.num_candidates])
        positives = [new for new, old in enumerate(kept) if old in positives]
        if self.needs_candidates and len(kept) < self.top_k:
            raise BadRow(
                f"must have at least `retrieval_top_k` ({self.top_k}) candidates, got {len(kept)}; lower "
                "`retrieval_top_k` or add documents"
            )
        if self.rules.needs_gold and not positives:
            raise BadRow("must have `pos_index`: the stage learns from known gold documents")
        return [documents[index] for index in kept], positives

    def _length(self, question: str | None, answer: str, documents: list[dict], texts: list[dict]) -> int:
        """Tokens of a prompt with its target, which must fit into the window."""
        reads = self.top_k if self.rules.selects else len(documents)
        n_memories, texts = (0, documents) if self.rules.reads_text else (reads - len(texts), texts)
        prompt = self.processor.build_prompt(question, n_memories, self.memory_size, answer, text_documents=texts)
        if len(prompt.input_ids) > self.window:
            memories = f"{n_memories} memories of {self.memory_size}" + (" and one text" if texts else "")
            what = f"{reads} texts" if self.rules.reads_text else memories
            raise BadRow(
                f"needs {len(prompt.input_ids)} positions for {what}, question and answer, the backbone has "
                f"{self.window}; shorten the answer, or lower the number of documents"
            )
        return len(prompt.input_ids)
