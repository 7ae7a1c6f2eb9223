"""Rows of any known format -> records that the collators read, each checked, each knowing where it came from.

Stands between files or the Hub and the collators. It knows nothing of tensors. Formats of a row:

    {title?, text, qas: [{question, answers}], paraphrase?}           stage 1; a passage with its questions
    {data_type, question: [], answers: [], docs: []}                  stage 1 as the reference publishes it
    {question, docs, answer | gold_answer | answers, pos_index?}      the other stages, the reference's as well

A document is a text, "title\\n text", or a dict with `text` and optionally `title`.
"""

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from datasets import Features, List, Value, load_dataset
from datasets.exceptions import DatasetsError
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaProcessor
from modeling_clara.text_clara import read_document

# One record: spans of the documents, indices of the gold ones among them, targets (a paraphrase has no question), the
# tokens of its longest prompt (for `train_sampling_strategy: group_by_length`), and the file and line.
FEATURES = Features(
    {
        "documents": List({"title": Value("string"), "text": Value("string")}),
        "positives": List(Value("int32")),
        "questions": List(Value("string")),
        "answers": List(Value("string")),
        "length": Value("int32"),
        "source": Value("string"),
    }
)
MAX_TITLE = 200  # characters of a first line that can still be a title
MAX_SPLIT = 50_000  # documents whose spans are remembered while rows are read


class BadRow(ValueError):
    """A row that cannot be used; `place` is its file and line, which the message begins with, where that is known."""

    def __init__(self, message: str, place: str = ""):
        super().__init__(f"{place} {message}".strip())
        self.place = place


# --- rows out of files ---------------------------------------------------------------------------------------------


def read_rows(source: DatasetConfig, on_bad_row: Callable[[BadRow], None] | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row of a source; the place is "file:line", or the row's number.

    Args:
        source: file or data set.
        on_bad_row: called with what is no JSON object, and reading goes on; without it that is raised.

    Raises:
        FileNotFoundError, ValueError: naming file and line.
    """
    path = Path(source.path)
    if path.suffix in (".jsonl", ".gz", ".json"):
        yield from _read_jsonl(path, on_bad_row)
        return
    options = {"data_dir": source.data_dir, "data_files": source.data_files}
    if path.suffix == ".parquet":
        if not path.exists():
            raise FileNotFoundError(f"`{path}` must be a file, found none. Correct the path.")
        try:
            rows = load_dataset("parquet", data_files=str(path), split="train")
        except (ValueError, DatasetsError) as error:
            raise ValueError(f"{path} cannot be read: {error.__cause__ or error}. Copy the file again.") from error
    elif path.is_file():
        raise ValueError(f"{path} must be a .jsonl, .jsonl.gz or .parquet file. Convert it.")
    else:
        rows = load_dataset(source.path, source.name, split=source.split, **options)
    for number, row in enumerate(rows, 1):
        yield f"{source.path}:{number}", row


def _read_jsonl(path: Path, on_bad_row: Callable[[BadRow], None] | None) -> Iterator[tuple[str, dict]]:
    if not path.exists():
        raise FileNotFoundError(f"`{path}` must be a file, found none. Correct the path.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines, (0, b""))
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read: {error}. Copy or compress the file again.") from error
            if not number:
                return
            if not line.strip():
                continue
            try:
                row = _parse(line, f"{path}:{number}")
            except BadRow as error:
                if on_bad_row is None:
                    raise
                on_bad_row(error)
                continue
            yield f"{path}:{number}", row


def _parse(line: bytes, place: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"must be JSON in UTF-8: {error}. Correct or remove the line.", place) from error
    if not isinstance(row, dict):
        raise BadRow(f"must be a JSON object, got {type(row).__name__}. Correct the line.", place)
    return row


# --- rows to records -------------------------------------------------------------------------------------------------


def read_documents(row: Mapping) -> list[dict]:
    """The documents of a row as `{title, text}`.

    Raises:
        BadRow: there are none, or one is empty.
    """
    documents = row.get("docs", row.get("documents"))
    if documents is None and "text" in row:
        documents = [row]
    if isinstance(documents, str | Mapping):
        documents = [documents]
    if not documents or not _is_list(documents):
        raise BadRow("must have `docs` or `text` with at least one document")
    read = []
    for index, document in enumerate(documents):
        if isinstance(document, str):
            title, newline, text = document.partition("\n")
            if newline and title.strip() and text.strip() and len(title) <= MAX_TITLE:
                document = {"title": title, "text": text}
        try:
            title, text = read_document(document, f"docs[{index}]")
        except (TypeError, ValueError) as error:
            raise BadRow(str(error)) from error
        read.append({"title": title, "text": text.strip()})
    return read


def read_targets(row: Mapping, stage: str) -> list[tuple[str | None, str]]:
    """(question, answer) pairs of a row; the question of a paraphrase is None.

    Raises:
        BadRow: there is no answer, or questions and answers do not pair.
    """
    question, answers = row.get("question"), row.get("answers")
    is_paraphrase = "qas" not in row and row.get("data_type") == "paraphrase"
    if "qas" in row:
        if not _is_list(row["qas"]) or not all(isinstance(pair, Mapping) for pair in row["qas"]):
            raise BadRow(f"`qas` must be a list of {{question, answers}}, got {row['qas']!r}")
        pairs = [(pair.get("question", ""), pair.get("answers") or pair.get("answer")) for pair in row["qas"]]
    elif is_paraphrase:  # the reference's instruction is left aside for our own
        pairs = [(None, answers)]
    elif _is_list(question):
        if not _is_list(answers) or len(answers) != len(question):
            raise BadRow("must have as many `answers` as entries in `question`")
        pairs = list(zip(question, answers, strict=True))
    elif question is not None:
        # Stage 2 learns the teacher's answer, stage 3 the gold one, where a row has both.
        order = ("gold_answer", "answer") if stage == "joint" else ("answer", "gold_answer")
        given = [row[name] for name in (*order, "answers") if row.get(name) is not None]
        pairs = [(question, given[0] if given else None)]
    else:
        pairs = []
    targets = [(None if is_paraphrase else _question(question), _answer(answer)) for question, answer in pairs]
    if row.get("paraphrase") is not None:
        targets.append((None, _answer(row["paraphrase"])))
    if not targets:
        raise BadRow("must have `question` and `answers`, `qas`, or `paraphrase`")
    return targets


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _question(question) -> str:
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f"`question` must be a text that is not empty, got {question!r}")
    return question.strip()


def _answer(answer) -> str:
    """The first of several answers; never an empty one."""
    if _is_list(answer):
        answer = answer[0] if answer else None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise BadRow(f"must have an answer that is a text and not empty, got {answer!r}")
    return answer.strip()


def read_positives(row: Mapping, n_documents: int) -> list[int]:
    """Indices of the gold documents, empty where they are not known."""
    positives = row.get("pos_index", [])
    if not n_documents and positives not in ([], ()):
        raise BadRow(f"`pos_index` must be left out where there are no documents, got {positives}")
    positives = [positives] if not _is_list(positives) else list(positives)
    if any(
        isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n_documents for index in positives
    ):
        raise BadRow(f"`pos_index` must hold numbers from 0 to {n_documents - 1}, got {positives}")
    return sorted(set(positives))


class RecordReader:
    """Turns a row into records and refuses what cannot be trained on.

    Args:
        processor: cuts documents into spans and measures prompts.
        stage: see `arguments.STAGES`.
        window: positions of the backbone.
        memory_size: the largest k.
        top_k: documents that a prompt reads after the selection (contrastive and joint).
        targets_per_document: targets of one record.
        long_documents: "split" or "first_span".
        num_candidates: documents of a record of the joint and contrastive stages.
        needs_candidates: whether those stages choose among the row's own documents, and not in a corpus.
        text_share: of the records of pretrain and instruct that read one document as text, see `text_places`.
    """

    def __init__(
        self,
        processor: CLaRaProcessor,
        stage: str,
        *,
        window: int,
        memory_size: int,
        top_k: int,
        targets_per_document: int = 1,
        long_documents: str = "split",
        num_candidates: int = 20,
        needs_candidates: bool = True,
        text_share: float = 0.0,
    ):
        self.processor, self.stage, self.window = processor, stage, window
        self.memory_size, self.top_k = memory_size, top_k
        self.targets_per_document, self.long_documents = targets_per_document, long_documents
        self.num_candidates, self.needs_candidates = num_candidates, needs_candidates
        self.text_share = text_share
        self._split: dict[tuple[str, str], list[dict]] = {}

    @property
    def selects(self) -> bool:
        """Whether the stage selects among candidates."""
        return self.stage in ("contrastive", "joint")

    def __call__(self, place: str, row: dict) -> list[dict]:
        """The records of a row.

        Raises:
            BadRow: naming file, line and rule.
        """
        row = {name: value for name, value in row.items() if value is not None}  # Parquet fills what is missing
        try:
            documents, targets = read_documents(row), read_targets(row, self.stage)
            positives = read_positives(row, len(documents))
            documents, positives = self._spans(documents, positives)
            if self.selects:
                targets = [target for target in targets if target[0] is not None]
                documents, positives = self._cut(documents, positives)
                if not targets:
                    raise BadRow("must have a question: a paraphrase selects nothing")
                if self.needs_candidates and len(documents) < self.top_k:
                    raise BadRow(
                        f"must have at least `retrieval_top_k` ({self.top_k}) candidates, got {len(documents)}; lower "
                        "`retrieval_top_k` or add documents"
                    )
                if self.stage == "contrastive" and not positives:
                    raise BadRow("must have `pos_index`: the contrastive stage learns from known gold documents")
            elif self.stage == "text":
                targets = [target for target in targets if target[0] is not None]
                if not targets:
                    raise BadRow("must have a question: who reads the text has nothing to say again")
            size = 1 if self.selects else self.targets_per_document
            chunks = [targets[start : start + size] for start in range(0, len(targets), size)]
            return [self._record(place, documents, positives, *zip(*chunk, strict=True)) for chunk in chunks]
        except BadRow as error:
            raise BadRow(str(error), place) from error

    def _record(
        self, place: str, documents: list[dict], positives: list[int], questions: tuple, answers: tuple
    ) -> dict:
        """One record; raises `BadRow` where one of its prompts does not fit."""
        record = {
            "documents": documents,
            "positives": positives,
            "questions": list(questions),
            "answers": list(answers),
            "length": 0,
            "source": place,
        }
        texts = [documents[index] for index in text_places(record, self.text_share)]
        lengths = [self._length(*target, documents, texts) for target in zip(questions, answers, strict=True)]
        return {**record, "length": max(lengths)}

    def _spans(self, documents: list[dict], positives: list[int]) -> tuple[list[dict], list[int]]:
        spans, owners = [], []
        for index, document in enumerate(documents):
            key = (document["title"], document["text"])
            if key not in self._split:  # candidates come back in many rows
                self._split[key] = self._split_document(document, f"docs[{index}]")
                if len(self._split) > MAX_SPLIT:
                    del self._split[next(iter(self._split))]
            spans += self._split[key]
            owners += [index] * len(self._split[key])
        return spans, [number for number, owner in enumerate(owners) if owner in positives]

    def _split_document(self, document: dict, name: str) -> list[dict]:
        try:
            parts = self.processor.split_document(document, name)
        except ValueError as error:
            raise BadRow(str(error)) from error
        parts = parts[:1] if self.long_documents == "first_span" else parts
        return [{"title": part["title"], "text": part["text"]} for part in parts]

    def _cut(self, documents: list[dict], positives: list[int]) -> tuple[list[dict], list[int]]:
        """At most `num_candidates` documents, the gold ones among them, in their order."""
        if len(documents) <= self.num_candidates:
            return documents, positives
        rest = [index for index in range(len(documents)) if index not in positives]
        kept = sorted((positives + rest)[: self.num_candidates])
        return [documents[index] for index in kept], [new for new, old in enumerate(kept) if old in positives]

    def _length(self, question: str | None, answer: str, documents: list[dict], texts: list[dict]) -> int:
        """Tokens of a prompt with its target, which must fit into the window."""
        reads = self.top_k if self.selects else len(documents)
        n_memories, texts = (0, documents) if self.stage == "text" else (reads - len(texts), texts)
        try:
            prompt = self.processor.build_prompt(question, n_memories, self.memory_size, answer, text_documents=texts)
        except ValueError as error:
            raise BadRow(str(error)) from error
        if len(prompt.input_ids) > self.window:
            memories = f"{n_memories} memories of {self.memory_size}" + (" and one text" if texts else "")
            what = f"{reads} texts" if self.stage == "text" else memories
            raise BadRow(
                f"needs {len(prompt.input_ids)} positions for {what}, question and answer, the backbone has "
                f"{self.window}; shorten the answer, or lower the number of documents"
            )
        return len(prompt.input_ids)


def text_places(record: Mapping, share: float) -> list[int]:
    """Places of the documents that a record's prompts read as text instead of from memory: one, or none.

    The draw depends on the record's source alone, so it is the same in every epoch and process. Every document is as
    likely as the others, gold or not: the answer is not always in the text. A record with a paraphrase reads no text,
    which it would only copy.

    Args:
        record: with `source`, `documents` and `questions`.
        share: of the records with a text, between 0 and 1.
    """
    if None in record["questions"]:
        return []
    generator = random.Random(record["source"])
    return [generator.randrange(len(record["documents"]))] if generator.random() < share else []


def document_key(document: Mapping) -> str:
    """What tells documents apart: a hash of title and text."""
    return hashlib.sha256(f"{document['title']}\x00{document['text']}".encode()).hexdigest()
