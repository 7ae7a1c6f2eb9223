"""What the page does, without the page: it asks and measures, and compresses a visitor's own files.

A visitor's files and their corpus lie in a temporary folder, which goes when they have left or the program ends.
"""

import contextlib
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import Answer, CompressedCorpus, Source
from ..corpus.files import InputFile, find_files
from ..corpus.formats import format_of
from ..corpus.sources import DocumentSource
from ..generation_clara import stream_text
from ..reading_clara import default_memory_size, prepare_reading, token_counts

MB = 2**20
ANSWER_TOKENS, PARAPHRASE_TOKENS = 64, 128
SHOWN_PROBLEMS = 10
PASS_CHUNKS = 8  # compressed between two reports; other visitors' questions come in between
Report = Callable[[int, int], None]  # chunks that are done, chunks in all


@dataclass(frozen=True)
class Limits:
    """What a visitor may send.

    Attributes:
        files: at a time.
        file_bytes: of one file as it is sent; `unpacked_bytes` are those of the content of all.
        chunks: of all files of a visitor.
        question: characters.
        visitors: that have files at the same time.
        keep_seconds: after which the files of a visitor who has left are removed.
    """

    files: int = 20
    file_bytes: int = 10 * MB
    unpacked_bytes: int = 50 * MB
    chunks: int = 500
    question: int = 2000
    visitors: int = 50
    keep_seconds: float = 600.0


class Stopped(Exception):
    """The visitor has stopped the compression, or has left."""


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A source with what stands around its chunk."""

    source: Source
    before: str = ""
    after: str = ""
    n_chunks: int = 1
    n_tokens: int = 0
    n_vectors: int = 0
    is_read: bool = True


@dataclass(frozen=True)
class Cost:
    """What an answer took, see `page_html.costs_html`; times are milliseconds, None if no word was written."""

    prompt_tokens: int
    passage_tokens: int
    stored_bytes: int
    cache_bytes: int
    first_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Asked:
    """An answer with its passages; of an abstained one those that were nearest, which nobody read."""

    corpus: CompressedCorpus
    question: str
    top_k: int
    answer: Answer
    passages: list[Passage]
    cost: Cost
    is_new: bool = True  # until the next question


def ask(model, corpus, question: str, *, memory_size: int, top_k: int, expand: int) -> Iterator[str | Asked]:
    """The answer so far, again and again, then all of it.

    `memory_size` is one of the sizes of the corpus. The largest leaves it to the model, which reads fewer vectors of
    short passages.
    """
    if memory_size == model.config.memory_sizes[-1]:
        memory_size = None
    options = {"corpus": corpus, "top_k": top_k, "memory_size": memory_size, "expand": expand}
    options["max_new_tokens"] = ANSWER_TOKENS
    start, first, text = time.perf_counter(), None, ""
    stream = model.stream(question, **options)
    with contextlib.closing(stream):
        while True:
            try:
                piece = next(stream)
            except StopIteration as stop:
                answer = stop.value
                break
            first = first or time.perf_counter()
            text += piece
            yield text
    end = time.perf_counter()
    sources = answer.sources
    if answer.abstained:
        sources = model.retrieve([question], corpus=corpus, top_k=top_k)[0]
    remembered = [(source.title, source.text) for source in answer.sources if source.read_as == "memory"]
    size = default_memory_size(model, token_counts(model, remembered)) if memory_size is None else memory_size
    passages = [find_passage(model, corpus, source, size, not answer.abstained) for source in sources]
    first_ms = None if first is None else 1e3 * (first - start)
    cost = _cost(model, corpus, answer, passages, first_ms, 1e3 * (end - start))
    yield Asked(corpus, question, top_k, answer, passages, cost)


def _cost(model, corpus, answer: Answer, passages: Sequence[Passage], first_ms: float | None, total_ms: float) -> Cost:
    tokens = stored = 0
    for passage in passages if answer.sources else ():
        source = passage.source
        is_text = source.read_as == "text"
        tokens += passage.n_tokens if is_text else passage.n_vectors
        text_bytes = len(f"{source.title}{source.text}".encode("utf-8", "replace"))
        stored += text_bytes if is_text else passage.n_vectors * corpus.vector_bytes
    cache = answer.prompt_tokens * cache_bytes(model)
    return Cost(answer.prompt_tokens, tokens, stored, cache, first_ms, total_ms)


def cache_bytes(model) -> int:
    """Bytes of the keys and values of one position in all layers."""
    config = model.config.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # some backbones share none
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first = torch.zeros(1, dtype=torch.long, device=model.memory_embeddings.device)
    state = model.get_input_embeddings()(first)  # of the dtype that is computed in, also if weights are rounded
    return 2 * config.num_hidden_layers * heads * size * state.element_size()


def find_passage(model, corpus, source: Source, n_vectors: int, is_read: bool) -> Passage:
    """The source with the chunks before and after it, if its document has some."""
    snapshot = corpus.snapshot
    rows = snapshot.find(source.document_id) or range(0)  # None if it was deleted since it was found
    near = [rows[span] if 0 <= span < len(rows) else None for span in (source.span - 1, source.span + 1)]
    before, after = ("" if row is None else snapshot.record(row, ["text"])["text"] or "" for row in near)
    n_tokens = len(model.processor.encode_text(f"{source.title}\n{source.text}".strip()))
    return Passage(source, before, after, max(len(rows), 1), n_tokens, n_vectors, is_read)


def paraphrase(model, corpus, source: Source, memory_size: int) -> Iterator[str]:
    """What the generator says of a passage from its stored memory alone: the text so far, again and again."""
    rows = corpus.snapshot.find(source.document_id)
    if rows is None or source.span >= len(rows):
        raise ValueError("This passage is no longer in the corpus. Ask again.")
    memory = corpus.decode([rows[source.span]], memory_size)[0].to(model.memory_embeddings.device)
    generation = model.build_generation_config(None, PARAPHRASE_TOKENS)
    reading = prepare_reading(model, None, [(source, memory)], memory_size, 0, generation, "passage")
    text = ""
    with contextlib.closing(stream_text(model, [reading], generation)) as stream:
        for piece in stream:
            text += piece
            yield text


# --- own files -------------------------------------------------------------------------------------------------------


@dataclass
class Visitor:
    """One session of the page: what was asked last, the corpus of own files, and the files as Gradio has them."""

    asked: Asked | None = None
    corpus: CompressedCorpus | None = None
    folder: Path | None = None
    uploads: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)
    leaving: threading.Timer | None = None


class Visitors:
    """All sessions by their names; `close` removes everything that they left on disk."""

    def __init__(self, model, corpus, limits: Limits):
        self.model, self.corpus, self.limits = model, corpus, limits
        self.root = tempfile.TemporaryDirectory(prefix="clara-ui-")
        self._known: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Visitor:
        """The session, which begins with its first call."""
        with self._lock:
            visitor = self._known.setdefault(name, Visitor())
            if visitor.leaving is not None:  # the connection was lost and is there again
                visitor.leaving.cancel()
                visitor.leaving = None
            return visitor

    def leave(self, name: str) -> None:
        """The page of a session is closed, or out of reach: its files are removed unless it comes back."""
        with self._lock:
            visitor = self._known.get(name)
            if visitor is not None and visitor.leaving is None:
                visitor.leaving = threading.Timer(self.limits.keep_seconds, self._forget, [name])
                visitor.leaving.daemon = True
                visitor.leaving.start()

    def _forget(self, name: str) -> None:
        with self._lock:
            visitor = self._known.pop(name, None)
        if visitor is not None:
            visitor.stop.set()
            self.remove_files(visitor)

    def remove_files(self, visitor: Visitor) -> None:
        """Remove the files of a session and what was made of them."""
        self._remove_corpus(visitor)
        uploads, visitor.uploads = visitor.uploads, set()
        others = set().union(*(other.uploads for other in self._known.values()))  # equal files have one place
        for path in map(Path, uploads - others):
            path.unlink(missing_ok=True)

    def _remove_corpus(self, visitor: Visitor) -> None:
        folder, visitor.folder, visitor.corpus = visitor.folder, None, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Forget all sessions."""
        for name in list(self._known):
            self._forget(name)
        self.root.cleanup()

    def compress(self, visitor: Visitor, paths: Sequence[str], report: Report) -> list[str]:
        """Make the corpus of a session from these files; the one before stays if this fails.

        Returns:
            What could not be read, in words.

        Raises:
            ValueError: nothing can be read, or it is too much.
            Stopped: `visitor.stop` was set.
        """
        self._check(paths)
        folder = Path(tempfile.mkdtemp(dir=self.root.name))
        try:
            copy_files(paths, folder / "files")
            files = self._good_files(find_files(folder / "files")[1], problems := [])
            if not files:
                raise ValueError("\n".join(problems))
            n_chunks = self._count_chunks(files, problems, visitor.stop)
            manifest, watched = self.corpus.manifest, _Watched(self.model, n_chunks, report, visitor.stop)
            options = {"codec": manifest.codec, "memory_size": manifest.memory_size}
            report(0, n_chunks)
            corpus = CompressedCorpus.build(watched, files, folder / "corpus", **options)
            corpus = corpus.attach(self.model, fingerprint=manifest.fingerprint).with_options(
                hybrid=self.corpus.hybrid
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._remove_corpus(visitor)
        visitor.folder, visitor.corpus = folder, corpus
        if visitor.stop.is_set():  # who left meanwhile has nothing removed any more
            self.remove_files(visitor)
            raise Stopped
        return [problem.replace(f"{folder}/files/", "") for problem in problems]

    def _check(self, paths: Sequence[str]) -> None:
        limits = self.limits
        if not paths:
            raise ValueError("Choose at least one file first.")
        if len(paths) > limits.files:
            raise ValueError(
                f"At most {limits.files} files can be read at a time, these are {len(paths)}. Take fewer."
            )
        if sum(visitor.folder is not None for visitor in self._known.values()) >= limits.visitors:
            raise ValueError("Too many people have files here at the moment. Try again in some minutes.")

    def _good_files(self, files: Sequence[InputFile], problems: list[str]) -> list[InputFile]:
        """Files that are small enough; of the others a problem each."""
        good, left = [], self.limits.unpacked_bytes
        for file in files:
            n_bytes = unpacked_bytes(file, left)
            if file.size > self.limits.file_bytes:
                problems.append(f"{file.name} has more than {self.limits.file_bytes // MB} MB and was left out.")
            elif n_bytes > left:
                most = self.limits.unpacked_bytes // MB
                problems.append(f"{file.name} was left out: all files may have {most} MB when unpacked.")
            else:
                good.append(file)
                left -= n_bytes
        return good

    def _count_chunks(self, files: Sequence[InputFile], problems: list[str], stop: threading.Event) -> int:
        """Chunks of all files; adds what cannot be read. A ValueError if nothing can, or if they are too many."""
        n_chunks = n_bad = 0
        for row in DocumentSource(files):
            if stop.is_set():
                raise Stopped
            if row.document is None:
                n_bad += 1
                if n_bad <= SHOWN_PROBLEMS:
                    problems.append(row.problem.replace("`", ""))
                continue
            fields = {name: row.document.get(name) for name in ("title", "text")}
            n_chunks += len(self.model.processor.split_document(fields, row.place))
            if n_chunks > self.limits.chunks:
                size = self.model.config.document_max_length
                raise ValueError(
                    f"The files have more than {self.limits.chunks} pieces of {size} tokens, which takes too long "
                    "here. Take fewer or shorter files, or use `clara compress` on your own machine."
                )
        if n_bad > SHOWN_PROBLEMS:
            problems.append(f"... and {n_bad - SHOWN_PROBLEMS:,} more.")
        if not n_chunks:
            raise ValueError("\n".join(problems) or "The files have no text.")
        return n_chunks


def copy_files(paths: Sequence[str], folder: Path) -> None:
    """Copy files into a new folder; of two with one name the second gets a number."""
    folder.mkdir()
    for path in map(Path, paths):
        target, number = folder / path.name, 2
        while target.exists():
            target, number = folder / f"{number} {path.name}", number + 1
        shutil.copyfile(path, target)


def unpacked_bytes(file: InputFile, most: int) -> int:
    """Bytes of a file unpacked, counted up to `most` + 1; of one that is damaged those before the damage."""
    if format_of(file) is None:
        return 0
    n_bytes = 0
    try:
        if zipfile.is_zipfile(file.path):
            with zipfile.ZipFile(file.path) as archive:
                return sum(entry.file_size for entry in archive.infolist())
        with file.open() as stream:
            while n_bytes <= most and (block := stream.read(min(MB, most - n_bytes + 1))):
                n_bytes += len(block)
        return n_bytes
    except Exception:  # of other people's formats
        return n_bytes


class _Watched:
    """The model of a build: it reports what is done, can be stopped, and is locked for a few chunks at a time."""

    def __init__(self, model, n_chunks: int, report: Report, stop: threading.Event):
        self.model, self.n_chunks, self.report, self.stop, self.n_done = model, n_chunks, report, stop, 0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def bulk_compression(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is merged: only one build at a time could do that."""
        return contextlib.nullcontext()

    def compress(self, documents: Sequence, **options):
        """As the model's."""
        import torch

        parts = []
        for start in range(0, len(documents), PASS_CHUNKS):
            if self.stop.is_set():
                raise Stopped
            parts.append(self.model.compress(documents[start : start + PASS_CHUNKS], **options))
            self.n_done = min(self.n_done + len(parts[-1]), self.n_chunks)
            self.report(self.n_done, self.n_chunks)
        return torch.cat(parts)
