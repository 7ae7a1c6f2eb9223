"""Turns rows of an input into shards: documents are checked, split, compressed, encoded and written.

The memory that it needs does not depend on the number of documents.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..codecs_clara import Codec
from ..manifest_clara import RESERVED_COLUMNS, Shard, pa
from ..storage_clara import replacing
from .encode import encode, fit_codec, fits
from .formats import COLUMNS
from .shards import ShardWriter, shard_schema, write_state
from .sources import InputRow, is_utf8
from .tables import Cell, cell_value

logger = logging.getLogger(__name__)

COMPRESSED_SPANS = 1024  # encoded together, and the sample that a codec is fitted on
PASS_SPANS = 128  # compressed in one call
SAVE_SECONDS = 30.0  # of compressing after which memories whose shard is not written are saved
OURS = ("span", "n_tokens")  # columns that a document cannot bring


@dataclass
class ShardDraft:
    """The input rows of one shard, and the shard once it is written.

    Attributes:
        shard: None if all of these rows were rejected.
        next_row: number of the first input row that is not among them.
        digest: SHA-256 over the rows.
        spans: chunks that are not written yet.
        documents: of the shard, by id: their input rows without the text.
        doubles: later rows with their ids, and the chunks of each: one counts if the first memory cannot be used.
        rejected: `{row, place, id, reason, status, file}` of each rejected row.
        stored: ids of documents that are in the corpus already as they were given, by the file of their rows.
        kept: files of saved memories, which the shard makes needless.
    """

    shard: Shard | None = None
    next_row: int = 0
    digest: object = field(default_factory=hashlib.sha256)
    spans: list[dict] = field(default_factory=list)
    documents: dict[str, InputRow] = field(default_factory=dict)
    doubles: list[tuple[InputRow, list[dict]]] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    stored: dict[str | None, list[str]] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)

    def take(self, row: InputRow, spans: list[dict]) -> None:
        document_id = spans[0]["document_id"]
        self.spans += spans
        self.documents[document_id] = InputRow(row.index, row.place, {"id": document_id}, file=row.file)

    def reject(self, row: InputRow, reason: str) -> None:
        given = row.document.get("id") if row.document else None
        status = row.status or "failed"
        self.rejected.append(
            {"row": row.index, "place": row.place, "id": given, "reason": reason, "status": status, "file": row.file}
        )


@dataclass
class ShardPipeline:
    """Makes shards.

    Attributes:
        folder: of the corpus.
        model: `CLaRaForRAG`; None if every document brings its memory.
        codec: name of a codec, which is fitted on the first memories, or a fitted one.
        memory_size, hidden_size: n and H of the memories.
        types: Arrow types of the metadata.
        refusal: takes an id and its row; why the document cannot have it, or None.
        forget: takes an id that was not refused, but whose document was rejected later.
        new_id: takes a row without an id; the id that it gets. Not needed for files, whose rows all have one.
        is_stored: takes the chunks of a document; whether it need not be compressed again.
        shard_size: chunks at which a shard is closed.
        batch_size: documents per pass, see `CLaRaForRAG.compress`.
        prefix: of the shards' names.
        kept: folder for memories whose shard is not written yet, so that a killed call does not lose them.
        as_text: columns in which numbers are kept as text.
        progress: called with numbers of documents that were compressed or rejected.
        codec_states: files of states that were fitted here.
        dropped: columns of files that the corpus does not have.
    """

    folder: Path
    model: object
    _: KW_ONLY
    codec: str | Codec
    memory_size: int
    hidden_size: int
    types: "dict[str, pa.DataType]"
    refusal: Callable[[str, InputRow], str | None]
    forget: Callable[[str], object]
    shard_size: int
    batch_size: int
    prefix: str
    kept: Path
    new_id: Callable[[InputRow], str] | None = None
    is_stored: Callable[[list[dict]], bool] | None = None
    as_text: frozenset[str] = frozenset()
    progress: Callable[[int], object] = int
    codec_states: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def run(self, rows: Iterator[InputRow], first_shard: int = 0) -> Iterator[ShardDraft]:
        """Write shards of these rows; each result comes when its shard is on disk."""
        with ThreadPoolExecutor(1) as writer:  # a shard is written while the next one is compressed
            writing: Future | None = None
            try:
                for number, draft in enumerate(self._drafts(rows), start=first_shard):
                    codes = self._encode(draft)
                    if writing is not None:
                        yield writing.result()
                    writing = writer.submit(self._write, f"{self.prefix}-{number:06d}", draft, codes)
            except (Exception, KeyboardInterrupt):  # the shard that is being written is not lost
                if writing is not None:
                    yield writing.result()
                raise
            if writing is not None:
                yield writing.result()

    def _drafts(self, rows: Iterator[InputRow]) -> Iterator[ShardDraft]:
        """Rows of one shard each; a document is never cut in two."""
        draft = ShardDraft()
        for row in rows:
            draft.digest.update(row_digest(row))
            draft.next_row = row.index + 1
            try:
                spans = self._spans(row)
                if spans[0]["document_id"] in draft.documents:
                    draft.doubles.append((row, spans))
                else:
                    self._check_id(row, spans)
                    if self.is_stored is not None and self.is_stored(spans):
                        draft.stored.setdefault(row.file, []).append(spans[0]["document_id"])
                        self.progress(1)
                    else:
                        draft.take(row, spans)
            except (TypeError, ValueError) as error:
                draft.reject(row, str(error))
                self.progress(1)
            if len(draft.spans) >= self.shard_size or len(draft.rejected) + len(draft.doubles) >= COMPRESSED_SPANS:
                yield draft
                draft = ShardDraft()
        if draft.spans or draft.rejected or draft.stored:
            yield draft

    # --- documents -> chunks -----------------------------------------------------------------------------------------

    def _spans(self, row: InputRow) -> list[dict]:
        """The chunks of a document, each with all columns but the memory."""
        if row.document is None:
            raise ValueError(row.problem)
        document_id, metadata = self._document_id(row), self._metadata(row)
        fields = {name: row.document.get(name) for name in ("title", "text")}
        for name, value in {**fields, "id": document_id}.items():
            if value and not is_utf8(value):
                raise ValueError(
                    f"`{row.place}[{name!r}]` must be valid UTF-8, got a lone surrogate. Correct its source."
                )
        if row.document.get("memory") is not None:
            title, memory = (fields["title"] or "").strip(), self._given_memory(row)
            spans = [{"title": title, "text": fields["text"], "span": 0, "n_tokens": None, "memory": memory}]
        else:
            spans = self.model.processor.split_document(fields, row.place)
        common = {"document_id": document_id, **metadata}
        return [{**span, **common, "id": f"{document_id}#{span['span']}"} for span in spans]

    def _check_id(self, row: InputRow, spans: list[dict]) -> None:
        document_id = spans[0]["document_id"]
        reason = self.refusal(document_id, row)
        if reason is not None:
            raise ValueError(f"`{row.place}` cannot have the id {document_id!r}: {reason}")

    def _document_id(self, row: InputRow) -> str:
        given = row.document.get("id")
        if given is None:
            return self.new_id(row)
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise TypeError(f"`{row.place}['id']` must be text or an int, got {given!r}. Give it one.")
        return str(given)

    def _metadata(self, row: InputRow) -> dict:
        values = {name: value for name, value in row.document.items() if name not in RESERVED_COLUMNS}
        if row.file is not None:  # a corpus has the columns of its first files; a later one may have more
            for name in values.keys() - self.types.keys() - set(COLUMNS) - self.dropped - set(OURS):
                self.dropped.add(name)
                logger.warning("The corpus has no column `%s`; %s and other files lose it.", name, row.file)
            values = {name: value for name, value in values.items() if name in self.types or name in OURS}
        values = {name: self._stored_value(name, value) for name, value in values.items()}
        taken = [name for name in OURS if name in row.document]
        if taken:
            raise ValueError(f"`{row.place}` must not have the column {taken[0]!r}, which is ours. Rename it.")
        for name, value in values.items():
            if name not in self.types:
                raise ValueError(
                    f"`{row.place}` must have the metadata of the corpus ({', '.join(self.types) or 'none'}), got "
                    f"{name!r}. Build the corpus with `metadata={{{name!r}: 'string'}}`, or leave it out."
                )
            if not _can_hold(self.types[name], value):
                raise TypeError(f"`{row.place}[{name!r}]` must be {self.types[name]}, got {value!r}. Convert it.")
        return {name: values.get(name) for name in self.types}

    def _stored_value(self, name: str, value):
        """A value as its column has it: of a table's cell a number or a time, of an empty object nothing."""
        if isinstance(value, Cell) and name in self.types:
            return cell_value(value, self.types[name])
        if (name in self.as_text or name in COLUMNS) and isinstance(value, bool | int | float):
            if not pa.types.is_string(self.types.get(name, pa.string())):
                return value
            return json.dumps(value)
        return None if value == {} else value

    def _given_memory(self, row: InputRow) -> torch.Tensor:
        try:
            memory = torch.as_tensor(row.document["memory"], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`{row.place}['memory']` must be numbers. Pass a tensor.") from error
        if memory.ndim != 2 or memory.shape[0] < self.memory_size or memory.shape[1] != self.hidden_size:
            raise ValueError(
                f"`{row.place}['memory']` must have the shape ({self.memory_size}, {self.hidden_size}), got "
                f"{tuple(memory.shape)}. Compress the document with the corpus's model."
            )
        if not memory.isfinite().all():
            raise ValueError(f"`{row.place}['memory']` must be finite, got NaN or infinity. Compress it again.")
        return memory[: self.memory_size]

    # --- chunks -> memories -> codes ---------------------------------------------------------------------------------

    def _encode(self, draft: ShardDraft) -> np.ndarray:
        """(chunks, row_bytes) uint8; documents without a usable memory are rejected."""
        compressed = {span["document_id"] for span in draft.spans if "memory" not in span}
        usable = self._usable(draft, draft.spans)
        if len(compressed) > 1 and not compressed & draft.documents.keys():
            raise ValueError(
                f"memories must be finite and fit into {self._codec_name}, but none of a shard does. The weights of "
                "the model are broken: reload it with `from_pretrained`, or take an earlier checkpoint."
            )
        for row, spans in draft.doubles:
            try:
                self._check_id(row, spans)
            except ValueError as error:
                draft.reject(row, str(error))
            else:
                draft.take(row, spans)
                usable += self._usable(draft, spans)
        order = {name: row.index for name, row in draft.documents.items()}
        draft.documents = {name: draft.documents[name] for name in sorted(order, key=order.get)}
        usable.sort(key=lambda pair: order[pair[0]["document_id"]])
        draft.spans = [span for span, _ in usable]
        return np.stack([codes for _, codes in usable]) if usable else np.empty((0, 0), np.uint8)

    def _usable(self, draft: ShardDraft, spans: list[dict]) -> list[tuple[dict, np.ndarray]]:
        """Chunks of a draft, each with its (row_bytes,) uint8; a document with an unusable memory is rejected."""
        usable, broken = [], set()
        for start in range(0, len(spans), COMPRESSED_SPANS):
            some = spans[start : start + COMPRESSED_SPANS]
            memory = self._memories(draft, some)
            good = memory.isfinite().flatten(1).all(-1)
            if isinstance(self.codec, str) and good.any():
                self.codec = fit_codec(self.codec, memory[good])
                self.codec_states |= write_state(self.folder, self.codec)  # before the first shard that needs it
            if isinstance(self.codec, Codec):
                good &= fits(self.codec, memory)
                usable += zip(itertools.compress(some, good.tolist()), encode(self.codec, memory[good]), strict=True)
            broken |= {span["document_id"] for span in itertools.compress(some, (~good).tolist())}
        for document_id in broken:
            self.forget(document_id)
            row = draft.documents.pop(document_id)
            reason = f"the memory of `{row.place}` must be finite and fit into {self._codec_name}. Check its text."
            draft.reject(row, reason)
        return [pair for pair in usable if pair[0]["document_id"] not in broken]

    @property
    def _codec_name(self) -> str:
        return self.codec if isinstance(self.codec, str) else self.codec.name

    def _memories(self, draft: ShardDraft, spans: Sequence[Mapping]) -> torch.Tensor:
        """(chunks, n, H) float32, NaN if a memory is not finite."""
        memory = torch.full((len(spans), self.memory_size, self.hidden_size), torch.nan)
        for place, span in enumerate(spans):
            if "memory" in span:
                memory[place] = span["memory"]
        unsaved: dict[Path, torch.Tensor] = {}
        saved_at = time.monotonic()
        try:
            for start in range(0, len(spans), PASS_SPANS):
                part = spans[start : start + PASS_SPANS]
                places = [start + place for place, span in enumerate(part) if "memory" not in span]
                if places:
                    texts = [spans[place] for place in places]
                    path = self.kept / f"{_texts_digest(texts)}.npy"
                    memory[places] = unsaved[path] = self._load(path, texts)
                self.progress(sum(span["span"] == 0 for span in part))
                if time.monotonic() - saved_at > SAVE_SECONDS:
                    draft.kept += _save(unsaved)
                    unsaved, saved_at = {}, time.monotonic()
        except KeyboardInterrupt:
            _save(unsaved)
            raise
        return memory

    def _load(self, path: Path, spans: Sequence[Mapping]) -> torch.Tensor:
        """Memories (chunks, n, H) of chunks, from the file of a call that was killed or computed now."""
        if path.exists():
            with contextlib.suppress(ValueError, EOFError, OSError):
                return torch.from_numpy(np.load(path))
        options = {"memory_size": self.memory_size, "batch_size": self.batch_size}
        try:
            return self.model.compress(spans, **options).cpu()
        except ValueError:  # one of them has a memory that is not finite: find it
            memory = torch.full((len(spans), self.memory_size, self.hidden_size), torch.nan)
            for place, span in enumerate(spans):
                with contextlib.suppress(ValueError):
                    memory[place] = self.model.compress([span], **options)[0].cpu()
            return memory

    # --- codes -> shard ----------------------------------------------------------------------------------------------

    def _write(self, name: str, draft: ShardDraft, codes: np.ndarray) -> ShardDraft:
        if draft.spans:
            with ShardWriter(self.folder, shard_schema(self.types), name, self.codec.key) as writer:
                writer.write(draft.spans, codes)
                draft.shard = writer.close()
        draft.spans = []
        for path in draft.kept:
            path.unlink(missing_ok=True)
        draft.rejected.sort(key=lambda row: row["row"])
        return draft


def row_digest(row: InputRow) -> bytes:
    """What tells that an input has not changed: the row with all of its columns."""
    if row.document is None:
        return f"{row.index} {row.problem}".encode("utf-8", "surrogatepass")
    try:
        text = json.dumps(row.document, sort_keys=True, default=_as_text, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # a list in itself, keys that are no text: it will be rejected
        text = f"{sorted(map(repr, row.document))}"
    return f"{row.index} {text}".encode("utf-8", "surrogatepass")


def _save(memories: Mapping[Path, torch.Tensor]) -> list[Path]:
    """Save memories for a call that goes on where this one was killed; a full disk only costs the time."""
    with contextlib.suppress(OSError):
        for path, memory in memories.items():
            with replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, memory.numpy())
    return list(memories)


def _texts_digest(spans: Sequence[Mapping]) -> str:
    texts = json.dumps([[span["title"], span["text"]] for span in spans], ensure_ascii=True)
    return hashlib.sha256(texts.encode()).hexdigest()[:32]


def _can_hold(kind: "pa.DataType", value) -> bool:
    """Whether Arrow can store a value in a column of this type as it is."""
    try:
        return _is_kept(value, pa.scalar(value, kind).as_py())
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False


def _is_kept(given, stored) -> bool:
    """Whether Arrow has kept a value as it was; it cuts 1.5 to 1 and a text into letters without a word."""
    if isinstance(given, Mapping):
        if not isinstance(stored, Mapping) or not set(given) <= set(stored):
            return False
        return all(_is_kept(given.get(name), value) for name, value in stored.items())
    if isinstance(stored, list):
        if isinstance(given, str | bytes) or len(given) != len(stored):
            return False
        return all(map(_is_kept, given, stored))
    if isinstance(stored, float):
        return not isinstance(given, int) or given == stored  # float32 rounds, but a number of 18 digits is a name
    return bool(given == stored)


def _as_text(value) -> str:
    """A value that JSON does not have; of a memory a hash, because it is large."""
    if isinstance(value, torch.Tensor | np.ndarray):
        array = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else value
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return str(value)
