"""Whether every byte of a corpus is right, and its way to the Hub.

Stands beside the writer. It knows nothing of search.
"""

import os
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .card_clara import CARD_FILE
from .codecs_clara import Codec
from .jobs_clara import REJECTED_FILE
from .manifest_clara import MANIFEST_FILE, Manifest, Shard
from .segments_clara import id_table
from .shards_clara import check_shard, live_mask, memory_rows, pa, read_batches
from .snapshot_clara import load_codecs, state_file
from .storage_clara import SeenIds

MAX_PROBLEMS = 100
REMEDY = "Copy or download the corpus again, or build it again."


class PublishMixin:
    """`verify`, `record_measurement` and `push_to_hub` of `CompressedCorpus`."""

    def verify(self) -> list[str]:
        """Read every byte of the corpus.

        Checked are the checksums of all shards and codec states, the columns, that spans of a document stand together
        and in order, that ids are unique, that memories decode to finite values, the counts, and the derived files.

        Returns:
            What is wrong, at most 100 problems; an empty list where all is well.
        """
        return verify_corpus(self.folder, self.index_folder) or self._verify_derived()

    def _verify_derived(self) -> list[str]:
        """Compare what was derived with the shards, column by column."""
        snapshot, first, wrong = self.snapshot, 0, {}
        for shard in snapshot.manifest.shards:
            start = first
            for batch in read_batches(self.folder, shard):
                segment, place = snapshot.locate(start)
                rows = memory_rows(batch["memory"], snapshot.codec.row_bytes, shard.file)
                columns = segment.table.schema.names
                table = segment.table.slice(place, len(batch)).combine_chunks()
                same = np.array_equal(rows, segment.rows[place : place + len(batch)])
                if not same or not table.equals(pa.Table.from_batches([batch.select(columns)]).cast(table.schema)):
                    wrong[segment.folder] = shard.file
                start += len(batch)
            first += shard.n_spans
        for segment in snapshot.segments:
            if segment.folder not in wrong and not np.array_equal(segment.ids, id_table(segment.table)):
                wrong[segment.folder] = "the ids of its documents"
        return [f"{folder} differs from {what}. Remove it: it is made again." for folder, what in wrong.items()]

    def record_measurement(self, measured: dict) -> None:
        """Write what a codec costs into corpus.json and the card.

        Args:
            measured: `data`, `questions` and `codecs`: for each codec `bytes` and any of `recall@5`, `f1`, `em`,
                `containment`.
        """
        with self._writing() as manifest:
            manifest.measured = measured
            self._commit(manifest)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a compressed corpus",
        compressor: str | None = None,
        compressor_revision: str | None = None,
    ) -> str:
        """Publish the corpus as a dataset, in one commit: the Hub has all of it or none.

        Deleted documents are taken out of the files first (`compact`); shards of an earlier push that the corpus no
        longer has are removed from the repo.

        Args:
            repo_id: of the dataset, made where needed.
            private: of a new repo.
            token: for the Hub.
            revision: branch; default main.
            commit_message: of the commit.
            compressor: id of the compressor's model on the Hub, for the card and for `clara ask`; needed where the
                corpus was made with a model from a folder, whose path tells others nothing.
            compressor_revision: its commit.

        Returns:
            URL of the commit.

        Raises:
            ValueError: the compressor has no id on the Hub, or a file is damaged.
        """
        name = compressor or self.manifest.compressor.get("name_or_path")
        if not name or os.path.exists(name) or name.startswith((".", "/", "~")):
            raise ValueError(
                f"`compressor` must name the model on the Hub that made the memories, got {name!r}. Publish the model "
                "and pass its id."
            )
        with self._writing() as manifest:
            known = manifest.compressor.get("name_or_path") == name and compressor_revision is None
            named = {"name_or_path": name}
            named["revision"] = manifest.compressor.get("revision") if known else compressor_revision
            if manifest.compressor != manifest.compressor | named:
                manifest.compressor |= named
                self._commit(manifest)
            if manifest.has_tombstones:
                self._rewrite(manifest, 1024, None)
            problems = verify_corpus(self.folder, None)
            if problems:
                raise ValueError(f"the corpus must be whole to be published: {problems[0]}")
            return self._upload(repo_id, private, token, revision, commit_message)

    def _upload(self, repo_id: str, private, token, revision, commit_message: str) -> str:
        """Put the files of the corpus into a dataset repo; its URL."""
        names = [MANIFEST_FILE, CARD_FILE, *(shard.file for shard in self.manifest.shards)]
        names += [state_file(key) for key in self.manifest.codec_states]
        names += [REJECTED_FILE] if (self.folder / REJECTED_FILE).exists() else []
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        stale = [name for name in there if name.startswith(("data/", "codec/")) or name == REJECTED_FILE]
        operations = [CommitOperationAdd(name, str(self.folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in sorted(set(stale) - set(names))]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            repo_type="dataset",
            revision=revision,
            parent_commit=info.sha,
        )
        return commit.commit_url


def verify_corpus(folder: Path, index_folder: Path | None) -> list[str]:
    """Problems of the published files of a corpus, see `CompressedCorpus.verify`.

    Args:
        folder: of the corpus.
        index_folder: where a file may be written meanwhile; default beside the corpus's own.
    """
    folder, problems = Path(folder), []
    try:
        manifest = Manifest.read(folder)
        codecs = load_codecs(folder, manifest)
    except (OSError, ValueError) as error:
        return [str(error)]
    scratch = (index_folder or folder) / f".verify.{os.getpid()}.ids"
    n_documents = n_spans = 0
    with SeenIds(scratch) as seen:
        for shard in manifest.shards:
            try:
                check_shard(folder, shard)
                codec = codecs.get(shard.codec_state)
                if codec is None:
                    raise ValueError(f"{shard.file} must name a state of the codec, got {shard.codec_state!r}.")
                documents, spans = _verify_rows(folder, shard, codec, seen, manifest.metadata)
                n_documents, n_spans = n_documents + documents, n_spans + spans
            except (OSError, ValueError) as error:
                problems.append(str(error))
    if not problems and (n_documents, n_spans) != (manifest.n_documents, manifest.n_spans):
        problems.append(
            f"{MANIFEST_FILE} must count {n_documents} documents and {n_spans} spans, it says "
            f"{manifest.n_documents} and {manifest.n_spans}. Copy it again."
        )
    return problems[:MAX_PROBLEMS]


def _verify_rows(folder: Path, shard: Shard, codec: Codec, seen: SeenIds, metadata: dict) -> tuple[int, int]:
    """Check the rows of a shard; returns live documents and spans.

    Raises:
        ValueError: naming shard and row.
    """
    live, row, previous = live_mask(shard), 0, (None, -1, True)
    n_documents = n_live = n_spans = 0
    missing = set(metadata) - set(next(read_batches(folder, shard)).schema.names) if shard.n_spans else set()
    if missing:
        raise ValueError(f"{MANIFEST_FILE} names the columns {sorted(missing)}, which {shard.file} lacks. {REMEDY}")
    for batch in read_batches(folder, shard):
        memory = codec.decode(memory_rows(batch["memory"], codec.row_bytes, shard.file))
        if not memory.isfinite().all():
            raise ValueError(f"{shard.file} must hold finite memories, got NaN or infinity. {REMEDY}")
        columns = [batch[name].to_pylist() for name in ("id", "document_id", "span", "text")]
        for span_id, document_id, span, text in zip(*columns, strict=True):
            is_live = bool(live[row])
            follows = (document_id, span) == (previous[0], previous[1] + 1) and is_live == previous[2]
            if not (span == 0 or follows) or span_id != f"{document_id}#{span}" or text is None:
                raise ValueError(
                    f"{shard.file} must hold the spans of each document in order, all live or all deleted; row {row} "
                    f"is {span_id!r}. {REMEDY}"
                )
            if span == 0:
                n_documents, n_live = n_documents + 1, n_live + is_live
                if is_live and not seen.add(document_id):
                    raise ValueError(
                        f"{shard.file} has the document {document_id!r}, which is there already. {REMEDY}"
                    )
            n_spans += is_live
            previous, row = (document_id, span, is_live), row + 1
    if (n_documents, n_documents - n_live) != (shard.n_documents, shard.n_deleted):
        raise ValueError(
            f"{shard.file} must count {n_documents} documents, {n_documents - n_live} of them deleted; "
            f"{MANIFEST_FILE} says {shard.n_documents} and {shard.n_deleted}. {REMEDY}"
        )
    return n_live, n_spans
