"""`CompressedCorpus` of the installed package: the reader, and the calls that build, change and publish a corpus.

Each call is a function of a module beside this one.
"""

import functools
from collections.abc import Mapping, Sequence

from ..corpus_clara import CompressedCorpus as Reader
from . import build, changes, compact, milvus, publish, verify


class CompressedCorpus(Reader):
    __doc__ = Reader.__doc__

    @staticmethod
    def milvus_index(uri: str | None, collection: str | None) -> functools.partial:
        """What makes the index of `open(backend="milvus")`."""
        return functools.partial(milvus.MilvusIndex, uri=uri, collection=collection)

    # --- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model,
        documents,
        path,
        *,
        codec: str = "int8",
        shard_size: int = 1024,
        resume: bool = True,
        memory_size: int | None = None,
        batch_size: int = 16,
        metadata: Mapping[str, str] | None = None,
        source: Mapping[str, str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **columns,
    ) -> "CompressedCorpus | None":
        """Compress documents into a corpus folder.

        Killed at any moment, the same call goes on after the last whole shard. Rows that cannot be used are skipped,
        counted and listed with their reason in rejected.jsonl.

        Args:
            model: `CLaRaForRAG` whose compressor is used.
            documents: a path, the id of a data set on the Hub, a `datasets.Dataset` or an iterable of texts or of
                dicts `{id?, title?, text, ...metadata}`, see `DocumentSource`. A dict's `id` counts before its
                `document_id`. A `memory` (n, H) is not computed
                again.
            path: folder of the corpus.
            codec: "float16", "int8" or "int4".
            shard_size: spans of a shard, and what a killed build loses at most. The codec is fitted on the first 1,024
                spans of the first shard.
            resume: resume where an earlier call stopped; False wants a new folder.
            memory_size: n that is stored; default the largest.
            batch_size: documents per pass, see `compress`.
            metadata: Arrow types of metadata columns; default from the input's schema or its first 1,024 rows.
            source: `name`, `license` and `language` of the text, for the card.
            rank: of this process, from 0; it takes every `world_size`-th document.
            world_size: number of processes that share the work. The last to finish completes the corpus.
            columns: `text_column`, `title_column`, `id_column`, `split` and `config_name` of `DocumentSource`.

        Returns:
            The corpus, open; None if other ranks are not finished.

        Raises:
            FileNotFoundError, TypeError, ValueError: the input or an argument is wrong, or the folder holds something
                else: another input, other options, a corpus that was built from other documents.
            RuntimeError: another process has this rank; it is named.
            OSError: the disk is full; nothing is lost, and the same call goes on.
        """
        options = {"codec": codec, "shard_size": shard_size, "memory_size": memory_size, "batch_size": batch_size}
        options |= {"metadata": metadata, "source": source, "rank": rank, "world_size": world_size}
        fingerprint = build.build_corpus(model, documents, path, resume=resume, **options, **columns)
        return None if fingerprint is None else cls.open(path).attach(model, fingerprint=fingerprint)

    # --- changing ----------------------------------------------------------------------------------------------------

    def add(self, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> changes.Changes:
        """Compress further documents and append them.

        They are found by the next search of this object. Each shard becomes part of the corpus as soon as it is
        written: a call that is killed has added its first documents or none, and none twice.

        Args:
            documents: as in `build`. Those that bring their `memory` (n, H) need no model.
            shard_size: spans of a shard.
            batch_size: documents per pass.
            columns: of `DocumentSource`.

        Returns:
            What was added, and which rows were not: an id that is there already is one of the reasons.

        Raises:
            FileNotFoundError, TypeError, ValueError: the input is wrong, or there is no model.
            RuntimeError: another process writes to the corpus; it is named.
        """
        return changes.append(
            self, documents, shard_size=shard_size, batch_size=batch_size, is_update=False, **columns
        )

    def update(self, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> changes.Changes:
        """Replace the documents that have the same ids; arguments as in `add`.

        Returns:
            What was replaced, and which rows were not: an id that is not there is one of the reasons.
        """
        return changes.append(self, documents, shard_size=shard_size, batch_size=batch_size, is_update=True, **columns)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents.

        Their rows are only marked; `compact` takes them out of the files, as publishing does.

        Args:
            ids: of documents of the corpus, each once.

        Returns:
            Their number.

        Raises:
            KeyError: an id that is not there. Nothing is deleted then.
        """
        return changes.delete(self, ids)

    def compact(self, *, shard_size: int = 1024) -> None:
        """Write the shards anew without deleted documents, in shards of `shard_size` spans.

        Memories keep their bytes. The compute cost is that of copying.
        """
        compact.compact(self, shard_size=shard_size)

    def convert(self, codec: str, *, shard_size: int = 1024) -> None:
        """Encode the memories with another codec, without compressing again; deleted documents are left out.

        What a coarser codec has lost a finer one does not bring back.

        Args:
            codec: "float16", "int8" or "int4".
            shard_size: spans of a shard.

        Raises:
            ValueError: unknown codec, or a memory does not fit into it.
        """
        compact.convert(self, codec, shard_size=shard_size)

    # --- verifying and publishing ------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Read every byte of the corpus.

        Checked are the checksums of all shards and codec states, the columns, that spans of a document stand together
        and in order, that ids are unique, that memories decode to finite values, the counts, and the derived files.

        Returns:
            What is wrong, at most 100 problems; an empty list where all is well.
        """
        return verify.verify(self)

    def record_measurement(self, measured: dict) -> None:
        """Write what a codec costs into corpus.json and the card.

        Args:
            measured: `data`, `questions` and `codecs`: for each codec `bytes` and any of `recall@5`, `f1`, `em`,
                `containment`.
        """
        changes.record_measurement(self, measured)

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
        return publish.push_to_hub(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            compressor=compressor,
            compressor_revision=compressor_revision,
        )
