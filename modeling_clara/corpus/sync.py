"""Makes a corpus agree with a folder: what is new is added, what changed is replaced, what is gone is deleted.

A call that is killed has done a part of this, and the next one does the rest. Documents that did not change, in a file
that did, are not compressed again.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..manifest_clara import Manifest
from .changes import Changes, changing, commit, count_changes, delete_ids, is_stored, replace_ids, writing
from .filelog import KnownFile, append_log, compact_log, read_line, read_log
from .files import InputFile, find_files
from .formats import format_of, missing_packages
from .jobs import REJECTED_FILE, counted
from .pipeline import ShardDraft
from .sources import DocumentSource, InputRow
from .storage import append_lines, read_lines, write_lines

SUSPICIOUS = 10  # files, all of which are gone: more likely it is another folder


@dataclass
class Plan:
    """What a corpus and a folder differ in.

    Attributes:
        new, changed, unchanged: files of the folder that can be read.
        left_out: files that are skipped or of no known format.
        gone: names of files that the corpus was made of and that are no more.
        known: all files that the corpus was made of; none if it was not made of files.
        touched: unchanged files whose time has changed.
        sha256: of files, as far as they were compared by it.
    """

    new: list[InputFile] = field(default_factory=list)
    changed: list[InputFile] = field(default_factory=list)
    unchanged: list[InputFile] = field(default_factory=list)
    left_out: list[InputFile] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    known: dict[str, KnownFile] = field(default_factory=dict)
    touched: list[InputFile] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be done."""
        return not (self.new or self.changed or self.gone)


def plan_sync(folder: Path, location) -> Plan:
    """Compare the corpus in a folder with the files of a location; nothing is written.

    Size and time of a file tell that it has not changed; if the time differs, its bytes do.

    Raises:
        FileNotFoundError: there is no such location.
        ValueError: it holds no file at all, but the corpus was made of some.
    """
    is_folder, files = find_files(location, exclude=folder)
    plan = Plan(known=read_log(folder))
    generation = Manifest.read(folder).generation if plan.known else 0
    closed = tuple(file.name for file in files if file.is_closed)
    for file in files:
        known = plan.known.get(file.name)
        if file.skipped is not None or format_of(file) is None or missing_packages(file):
            plan.left_out.append(file)
        elif known is None:
            plan.new.append(file)
        elif _is_unchanged(file, known, plan, generation):
            plan.unchanged.append(file)
        else:
            plan.changed.append(file)
    if is_folder:  # a single file tells of itself alone
        gone = set(plan.known) - {file.name for file in files}
        plan.gone = sorted(name for name in gone if not name.startswith(closed))
    is_other = len(plan.gone) == len(plan.known) and (len(plan.gone) >= SUSPICIOUS or not plan.new)
    if plan.gone and is_other:
        raise ValueError(
            f"{location} must have files that the corpus was made of, found none of all {len(plan.gone)}, which would "
            "be deleted. Check the path, or choose another folder for the corpus."
        )
    return plan


def _is_unchanged(file: InputFile, known: KnownFile, plan: Plan, generation: int) -> bool:
    if not known.is_complete or file.size != known.size or known.retry not in (None, generation):
        return False
    if file.modified is not None and file.modified == known.modified:
        return True
    plan.sha256[file.name] = _sha256(file)
    if plan.sha256[file.name] is None or plan.sha256[file.name] != known.sha256:
        return False
    plan.touched.append(file)
    return True


def _sha256(file: InputFile) -> str | None:
    """Of the bytes of a file; None if it cannot be opened, or is remote and its time tells its state."""
    if file.fs is not None and file.modified is not None:
        return None
    try:
        with file.open_raw() as stream:
            digest = hashlib.sha256()
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except Exception:  # of the disk, or of any remote file system: reading it will say why
        return None


def sync(corpus, location, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
    """Make the corpus agree with a folder of files, see `plan_sync`.

    Documents that were added by other calls stay. Nothing is written if nothing has changed.

    Args:
        corpus: that is changed.
        location: path or fsspec address of a file or folder.
        shard_size: chunks of a shard.
        batch_size: documents per pass.
        columns: of `DocumentSource`; default those of the build.

    Returns:
        What was added, replaced and deleted, and what was left out.

    Raises:
        FileNotFoundError, TypeError, ValueError: the location is wrong, or there is no model.
        RuntimeError: another process writes to the corpus; it is named.
    """
    if plan_sync(corpus.folder, location).is_empty:
        return Changes()
    if corpus.model is not None:
        corpus.check_model(corpus.model)
    columns = {**corpus.manifest.build.get("columns", {}), **columns}
    with writing(corpus) as manifest:
        plan = plan_sync(corpus.folder, location)  # again: another writer may have been at work until now
        changes = _Sync(corpus, manifest, plan).run(shard_size, batch_size, columns)
        compact_log(corpus.folder)
    return changes


class _Sync:
    """One call of `sync`."""

    def __init__(self, corpus, manifest: Manifest, plan: Plan):
        self.corpus, self.manifest, self.plan, self.changes = corpus, manifest, plan, Changes()
        self.files = {file.name: file for file in [*plan.new, *plan.changed]}
        self.given: dict[str, str] = {}  # id -> file, of this call
        self.ids: dict[str, list[str]] = {name: [] for name in self.files}  # of documents, once they are in the corpus
        self.ends: dict[str, int] = {}  # of files that were read: number of the row after their last one
        self.done: set[str] = set()  # files of which all rows are in the corpus
        self.failed: set[str] = set()  # files and parts of files that cannot be read now: what they held stays
        self.refused: set[str] = set()  # files with an id that another one has: read again after the next change
        kept = {file.name for file in plan.unchanged} | {file.name for file in plan.left_out}
        self.owners = {name: file for file in kept & set(plan.known) for name in plan.known[file].ids}
        self.replaceable = {name for file, known in plan.known.items() if file not in kept for name in known.ids}

    def run(self, shard_size: int, batch_size: int, columns: dict) -> Changes:
        self._forget_rejected()
        for name, file in self.files.items():  # before it is read: what changes meanwhile has another hash next time
            self.plan.sha256.setdefault(name, _sha256(file))
        source = DocumentSource([*self.files.values(), *self.plan.left_out], **columns) if self.files else None
        if self.files:
            pipeline = changing(
                self.corpus,
                self.manifest,
                refusal=self._refusal,
                forget=self.given.pop,
                shard_size=shard_size,
                batch_size=batch_size,
                is_stored=partial(is_stored, self.corpus),
            )
            with counted(source) as pipeline.progress:
                for draft in pipeline.run(self._watched(source)):
                    self._commit(draft, pipeline.codec_states)
        gone = [name for file in self.plan.gone for name in self.plan.known[file].ids if name not in self.given]
        self.changes.n_deleted += delete_ids(self.corpus, self.manifest, gone)
        commit(self.corpus, self.manifest)
        lines = [self._line(name) for name in self.ids]  # those without a document too
        known = self.plan.known
        lines += [read_line(f, known[f.name].ids, self.plan.sha256[f.name]) for f in self.plan.touched]
        append_log(self.corpus.folder, [*lines, *({"name": name} for name in self.plan.gone)])
        return self.changes

    def _forget_rejected(self) -> None:
        """What is read again has its reasons again."""
        path = self.corpus.folder / REJECTED_FILE
        again = {*self.files, *self.plan.gone, *(file.name for file in self.plan.left_out if self.files)}
        lines = [line for line in read_lines(path) if line.get("file") not in again]
        if len(lines) < self.manifest.n_rejected:
            write_lines(path, lines)
            self.manifest.n_rejected = len(lines)

    def _refusal(self, document_id: str, row: InputRow) -> str | None:
        reason = self._conflict(document_id)
        if reason is None:
            self.given[document_id] = row.file
        else:
            self.refused.add(row.file)
        return reason

    def _conflict(self, document_id: str) -> str | None:
        if document_id in self.given:
            return f"{self.given[document_id]} has it too. Rename one."
        if document_id in self.owners:
            return f"{self.owners[document_id]} has it too. Rename one."
        is_there = self.corpus.snapshot.find(document_id) is not None
        if is_there and self.plan.known and document_id not in self.replaceable:
            return "it was added without a file. Delete that one, or rename this one."
        return None

    def _watched(self, rows: Iterable[InputRow]) -> Iterator[InputRow]:
        """The rows; notes where files end."""
        last, number = None, 0
        for row in rows:
            if last is not None and row.file != last:
                self.ends[last] = row.index
            last, number = row.file, row.index + 1
            if row.status == "failed":
                self.failed.add(row.place)
            yield row
        if last is not None:
            self.ends[last] = number

    def _commit(self, draft: ShardDraft, codec_states: dict) -> None:
        """Make one shard part of the corpus, and what it replaces no part of it, at once."""
        by_file: dict[str, list[str]] = {}
        for name, row in draft.documents.items():
            by_file.setdefault(row.file, []).append(name)
        append_log(self.corpus.folder, [{"name": file, "pending": names} for file, names in by_file.items()])
        for file, names in [*by_file.items(), *draft.stored.items()]:
            self.ids[file] += names
        append_lines(self.corpus.folder / REJECTED_FILE, draft.rejected)
        replace_ids(self.corpus, self.manifest, draft, codec_states)
        done = [name for name, end in self.ends.items() if end <= draft.next_row and name not in self.done]
        done = [name for name in done if name in self.ids]
        obsolete = []
        for file in done:
            left = [name for name in self._known_ids(file) if name not in self.given and name not in self.owners]
            kept = left if file in self.failed else [name for name in left if name in self.failed]
            self.ids[file] += kept
            obsolete += [name for name in left if name not in kept]
        self.changes.n_deleted += delete_ids(self.corpus, self.manifest, obsolete)
        count_changes(self.changes, draft)
        commit(self.corpus, self.manifest)
        noted = [name for name in done if name not in self.refused]  # of these the last commit must be known
        append_log(self.corpus.folder, [self._line(name) for name in noted])
        for name in noted:
            del self.ids[name]
        self.done.update(done)

    def _known_ids(self, file: str) -> list[str]:
        return self.plan.known[file].ids if file in self.plan.known else []

    def _line(self, name: str) -> dict:
        retry = self.manifest.generation if name in self.refused else None
        if name in self.failed and self.plan.sha256[name] is None:  # it could not be opened
            retry = -1
        return read_line(self.files[name], self.ids[name], self.plan.sha256[name], retry)
