"""Documents of any source as chunks, written down once: every rank and every resumed run reads the same lines.

A chunk has all fields of its document; its id is the document's with the number of the chunk, as in a corpus.
"""

import array
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..corpus.sources import DocumentSource, InputRow, is_utf8
from ..corpus.storage import append_lines, writer_lock
from ..snapshot_clara import id_hash
from ..storage_clara import read_json, write_json
from ..text_clara import check_count, read_document
from .outcome import DOCUMENT

DOCUMENTS_FILE, LEFT_OUT_FILE, COUNTS_FILE = "documents.jsonl", "left_out.jsonl", "documents.json"
MAX_DOCUMENT_TOKENS = 256  # of a chunk, as in the paper
WORDS_PER_TOKEN = 0.75  # of English, where no tokenizer counts
NO_SPACES = "\u2e80-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")  # a letter of a script without spaces counts as a word
SENTENCE_END = re.compile(r"""[.!?。！？]["')\]]*$""")
BATCH = 1024  # chunks that are written together


class WordSplitter:
    """Cuts a text after sentences into parts of at most `max_document_tokens` tokens, counted by words."""

    def __init__(self, max_document_tokens: int = MAX_DOCUMENT_TOKENS):
        self.limit = max(1, int(check_count(max_document_tokens, "max_document_tokens", "") * WORDS_PER_TOKEN))

    def split_document(self, document: Mapping, name: str = "document") -> list[dict]:
        """The chunks, as `CLaRaProcessor.split_document` gives them but without `n_tokens`."""
        title, text = read_document(document, name)
        words, parts, first = list(WORD.finditer(text)), [], 0
        while first < len(words):
            last = min(first + self.limit, len(words))
            if last < len(words):
                ends = (
                    end for end in range(last, first + self.limit // 2, -1) if SENTENCE_END.search(words[end - 1][0])
                )
                last = next(ends, last)
            parts.append(text[words[first].start() : words[last - 1].end()])
            first = last
        return [{**document, "title": title, "text": part, "span": number} for number, part in enumerate(parts)]


def load_splitter(tokenizer: str | None = None, max_document_tokens: int | None = None):
    """What cuts documents: by words, or as the processor of a checkpoint or one around another model's tokenizer does.

    Args:
        tokenizer: folder or Hub id of a checkpoint of ours, or of any model with a fast tokenizer.
        max_document_tokens: of a chunk; default the checkpoint's, else `MAX_DOCUMENT_TOKENS`.
    """
    if tokenizer is None:
        return WordSplitter(MAX_DOCUMENT_TOKENS if max_document_tokens is None else max_document_tokens)
    from transformers import AutoTokenizer

    from .. import CLaRaProcessor
    from ..files_clara import CheckpointFiles

    limit = {} if max_document_tokens is None else {"document_max_length": max_document_tokens}
    try:
        CheckpointFiles(tokenizer).json("processor_config.json")
    except (OSError, ValueError):
        limit = {"document_max_length": MAX_DOCUMENT_TOKENS} | limit
        limit["document_overlap"] = min(32, limit["document_max_length"] // 8)
        return CLaRaProcessor(AutoTokenizer.from_pretrained(tokenizer), **limit)
    return CLaRaProcessor.from_pretrained(tokenizer, **limit)


def read_chunks(source: DocumentSource, splitter) -> Iterator[list[dict] | InputRow]:
    """The chunks of each document; in place of one that cannot be read its row, with the problem."""
    seen = set()  # hashes of ids: the id of a chunk is its label
    for row in source:
        if row.document is None:
            yield row
            continue
        given = row.document.get("id")
        document_id = source.free_id(row.index) if given is None else str(given)
        try:
            if not is_utf8(json.dumps(row.document, ensure_ascii=False, default=str)):
                raise ValueError(f"`{row.place}` has half of a character, a lone surrogate. Remove it.")
            chunks = splitter.split_document(row.document, row.place)
            if (key := id_hash(document_id)) in seen:
                raise ValueError(f"`{row.place}` has the id {document_id!r}, which is there already. Rename it.")
        except (TypeError, ValueError) as error:
            yield InputRow(row.index, row.place, None, str(error), "failed", row.file)
            continue
        seen.add(key)
        yield [{**chunk, "id": f"{document_id}#{chunk['span']}", "document_id": document_id} for chunk in chunks]


def prepare(work: Path, source: DocumentSource, splitter) -> dict:
    """Write the chunks of all documents, unless that is done; how many `documents`, `chunks` and `left_out` rows.

    Other ranks wait meanwhile.
    """
    with writer_lock(work / "documents.lock", f"the documents of {work}", timeout=-1):
        if (work / COUNTS_FILE).exists():
            return read_json(work / COUNTS_FILE)
        for name in (DOCUMENTS_FILE, LEFT_OUT_FILE):  # of a run that was killed here
            (work / name).unlink(missing_ok=True)
        counts = {"documents": 0, "chunks": 0, "left_out": 0}
        rows = read_chunks(source, splitter)
        while batch := list(itertools.islice(rows, BATCH)):
            chunks = [chunk for found in batch if isinstance(found, list) for chunk in found]
            problems = [row for row in batch if isinstance(row, InputRow)]
            append_lines(work / DOCUMENTS_FILE, chunks)
            append_lines(work / LEFT_OUT_FILE, map(left_out, problems))
            counts["documents"] += len(batch) - len(problems)
            counts["chunks"] += len(chunks)
            counts["left_out"] += len(problems)
        write_json(work / COUNTS_FILE, counts)
        return counts


def left_out(row: InputRow) -> dict:
    """A line of rejects.jsonl."""
    reason = f"{row.status or 'failed'}: {row.problem}"
    return {"kind": DOCUMENT, "reason": reason, "value": None, "document_id": row.place, "round": 0}


class Lines(Sequence):
    """The chunks of a run by number, each read from the file when it is asked for; 8 bytes of memory a chunk."""

    def __init__(self, work: Path):
        self.file = open(work / DOCUMENTS_FILE, "rb") if (work / DOCUMENTS_FILE).exists() else io.BytesIO()
        self.starts = array.array("q", itertools.accumulate(map(len, self.file), initial=0))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> dict:
        if not 0 <= number < len(self):
            raise IndexError(number)
        self.file.seek(self.starts[number])
        return json.loads(self.file.readline())


def iter_chunks(work: Path, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, dict]]:
    """(number, chunk) of one rank, which has every `world_size`-th."""
    if not (work / DOCUMENTS_FILE).exists():  # no document could be read
        return
    with open(work / DOCUMENTS_FILE, "rb") as lines:
        for number, line in enumerate(itertools.islice(lines, rank, None, world_size)):
            yield rank + number * world_size, json.loads(line)
