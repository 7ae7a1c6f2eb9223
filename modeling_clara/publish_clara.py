"""Whether every byte of a corpus is right, and its way to the Hub.

Stands beside the writer. It knows nothing of search.
"""

import os
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .builder_clara import REJECTED_FILE
from .card_clara import CARD_FILE, write_card
from .manifest_clara import MANIFEST_FILE, Manifest
from .shards_clara import check_shard, live_mask, memory_rows, read_batches
from .snapshot_clara import load_codecs, state_file
from .storage_clara import SeenIds

MAX_PROBLEMS = 100


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
        """Compare the mapped memories with those of the shards."""
        snapshot, start, problems = self.snapshot, 0, []
        for shard in snapshot.manifest.shards:
            try:
                for batch in read_batches(self.folder, shard, ["memory"]):
                    rows = memory_rows(batch["memory"], snapshot.codec.row_bytes, shard.file)
                    segment, place = snapshot.locate(start)
                    if not np.array_equal(rows, segment.rows[place : place + len(rows)]):
                        problems.append(f"{segment.folder} differs from {shard.file}. Remove it: it is made again.")
                        break
                    start += len(batch)
            except (OSError, ValueError):  # `verify_corpus` tells of it
                return problems
        return problems

    def record_measurement(self, measured: dict) -> None:
        """Write what a codec costs into corpus.json and the card.

        Args:
            measured: `data`, `questions` and `codecs`: for each codec `bytes` and any of `recall@5`, `f1`, `em`.
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
        with self._writing() as manifest:
            named = {"name_or_path": compressor, "revision": compressor_revision}
            if compressor is not None and any(manifest.compressor.get(key) != value for key, value in named.items()):
                manifest.compressor |= named
                self._commit(manifest)
        name = self.manifest.compressor.get("name_or_path")
        if not name or os.path.exists(name) or name.startswith((".", "/", "~")):
            raise ValueError(
                f"`compressor` must name the model on the Hub that made the memories, which were made with {name!r}. "
                "Publish the model and pass its id."
            )
        if self.manifest.has_tombstones:
            self.compact()
        problems = verify_corpus(self.folder, None)
        if problems:
            raise ValueError(f"the corpus must be whole to be published: {problems[0]}")
        write_card(self.folder, self.manifest)
        names = [MANIFEST_FILE, CARD_FILE, *(shard.file for shard in self.manifest.shards)]
        names += [state_file(key) for key in self.manifest.codec_states]
        names += [REJECTED_FILE] if (self.folder / REJECTED_FILE).exists() else []
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        stale = [n for n in there if n.startswith(("data/", "codec/")) or n == REJECTED_FILE]
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
                documents, spans = _verify_rows(folder, shard, codec, seen)
                n_documents, n_spans = n_documents + documents, n_spans + spans
            except (OSError, ValueError) as error:
                problems.append(str(error))
    if not problems and (n_documents, n_spans) != (manifest.n_documents, manifest.n_spans):
        problems.append(
            f"{MANIFEST_FILE} must count {n_documents} documents and {n_spans} spans, it says "
            f"{manifest.n_documents} and {manifest.n_spans}. Copy it again."
        )
    return problems[:MAX_PROBLEMS]


def _verify_rows(folder: Path, shard, codec, seen: SeenIds) -> tuple[int, int]:
    """Check the rows of a shard; returns live documents and spans.

    Raises:
        ValueError: naming shard and row.
    """
    live, row, previous = live_mask(shard), 0, (None, -1)
    documents = spans = 0
    for batch in read_batches(folder, shard):
        memory = codec.decode(memory_rows(batch["memory"], codec.row_bytes, shard.file))
        if not memory.isfinite().all():
            raise ValueError(f"{shard.file} must hold finite memories, got NaN or infinity. Copy it again.")
        columns = [batch[name].to_pylist() for name in ("id", "document_id", "span", "text")]
        for span_id, document_id, span, text in zip(*columns, strict=True):
            expected = span == 0 or (document_id, span) == (previous[0], previous[1] + 1)
            if not expected or span_id != f"{document_id}#{span}" or text is None:
                raise ValueError(
                    f"{shard.file} must hold the spans of each document in order, row {row} is {span_id!r}. The shard "
                    "was not written by this package: build the corpus again."
                )
            if span == 0 and live[row]:
                documents += 1
                if not seen.add(document_id):
                    raise ValueError(f"{shard.file} has the document {document_id!r}, which is there already.")
            spans += bool(live[row])
            previous, row = (document_id, span), row + 1
    return documents, spans
