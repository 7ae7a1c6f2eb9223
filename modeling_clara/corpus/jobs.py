"""One rank of a build: what it has done, what is left, and how the last one completes the corpus.

Until corpus.json is there, `build/` holds the progress of every rank, so that each can be killed at any moment.
"""

import base64
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from transformers.utils.logging import tqdm

from ..manifest_clara import (
    BUILD_FOLDER,
    MANIFEST_FILE,
    Manifest,
    Shard,
    check_shard,
    load_codecs,
    metadata_types,
    pa,
    read_batches,
)
from ..storage_clara import write_json
from .card import write_card
from .ids import SeenIds
from .pipeline import ShardPipeline, row_digest
from .shards import count_live, delete_rows, remove_unreferenced, shard_documents, write_manifest
from .sources import DocumentSource, InputRow, infer_types
from .storage import append_lines, corpus_lock, read_lines, write_lines

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
FINISHING_SECONDS = 600.0  # that a rank waits while another one completes the corpus


class Build:
    """One rank of a build.

    Args:
        folder: of the corpus.
        model: whose compressor is used.
        options: all that must be the same when a build goes on.
        source: of the text.
        rank, world_size: this is one of `world_size` processes, the first has rank 0.
    """

    def __init__(self, folder: Path, model, options: dict, source: dict, rank: int, world_size: int):
        self.folder, self.model, self.options, self.source = folder, model, options, source
        self.rank, self.world_size = rank, world_size
        self.name = job_name(rank, world_size)
        self.path = self._progress_path(rank)
        self.rejected_path = self.path.with_suffix(f".{REJECTED_FILE}")

    def _progress_path(self, number: int) -> Path:
        return self.folder / BUILD_FOLDER / f"{job_name(number, self.world_size)}.json"

    # --- one rank ----------------------------------------------------------------------------------------------------

    def run(self, source: DocumentSource, types: dict, batch_size: int) -> None:
        """Do what is left of this rank.

        Args:
            source: of the documents.
            types: Arrow types of metadata columns that were declared; the others follow from the input.
            batch_size: documents per pass.
        """
        types = _all_types(source, types)
        progress = self._resume()
        if progress["complete"]:
            self._check_input(source, progress["input_sha256"])
            return
        total = None if source.length is None else len(range(self.rank, source.length, self.world_size))
        seen = SeenIds(lambda number: shard_documents(self.folder, Shard(**progress["shards"][number]["shard"])))
        with tqdm(total=total, desc="compressing", unit=" documents", delay=2) as bar:
            rows = _CountedRows(self._mine(source), bar.update)
            for number, entry in enumerate(progress["shards"]):
                rows.skip(entry, self.folder)
                if entry["shard"] is not None:
                    seen.settle(number, shard_documents(self.folder, Shard(**entry["shard"])))
            pipeline = ShardPipeline(
                self.folder,
                self.model,
                codec=self._codec(progress),
                memory_size=self.options["memory_size"],
                hidden_size=self.model.config.text_config.hidden_size,
                types=types,
                refusal=lambda document_id: None if seen.add(document_id) else "it is there already. Rename it.",
                forget=seen.remove,
                new_id=lambda row: str(row.index),
                shard_size=self.options["shard_size"],
                batch_size=batch_size,
                prefix=f"{self.rank:05d}",
            )
            with self.model.bulk_compression():
                for result in pipeline.run(rows, first_shard=len(progress["shards"])):
                    append_lines(self.rejected_path, result.rejected)
                    write_json(rows_path(self.path, len(progress["shards"])), {"rows": result.rows})
                    progress["codec_states"] |= pipeline.codec_states
                    progress["shards"].append(
                        {
                            "shard": asdict(result.shard) if result.shard else None,
                            "next_row": result.next_row,
                            "input_sha256": result.input_sha256,
                            "n_rejected": len(result.rejected),
                        }
                    )
                    seen.settle(len(progress["shards"]) - 1, result.document_ids)
                    write_json(self.path, progress)
        progress |= {"complete": True, "input_sha256": rows.digest.hexdigest()}
        write_json(self.path, progress)

    def _resume(self) -> dict:
        """What this rank has done. Shards that are gone or damaged are made again, and so are all after them."""
        others = sorted((self.folder / BUILD_FOLDER).glob("job-*-of-*.json"))
        for path in [self.path] if self.path.exists() else others[:1]:
            self._check_options(json.loads(path.read_text(encoding="utf-8"))["options"])
        if not self.path.exists():
            self.rejected_path.unlink(missing_ok=True)
            progress = {"options": self.options, "complete": False, "codec_states": {}, "shards": []}
            write_json(self.path, progress)
            return progress
        progress = json.loads(self.path.read_text(encoding="utf-8"))
        for number, entry in enumerate(progress["shards"]):
            try:
                if entry["shard"] is not None:
                    check_shard(self.folder, Shard(**entry["shard"]))
                    key = entry["shard"]["codec_state"]
                    load_codecs(self.folder, self._manifest({key: progress["codec_states"][key]} if key else {}))
            except (FileNotFoundError, ValueError) as error:
                logger.warning("%s It is made again, and so are the shards after it.", error)
                del progress["shards"][number:]
                progress["complete"] = False
                break
        # The lines of a shard that was not recorded come again with it.
        rejected = read_lines(self.rejected_path)[: sum(entry["n_rejected"] for entry in progress["shards"])]
        write_lines(self.rejected_path, rejected)
        return progress

    def _check_options(self, found: dict) -> None:
        different = sorted(name for name in self.options if found.get(name) != self.options[name])
        if different:
            name = different[0]
            if name == "first_rows":
                raise ValueError(
                    "a build must go on with the input that it began with; its first rows are others than before. "
                    "Give the same input, or choose another folder."
                )
            raise ValueError(
                f"a build must go on with the input and the options that it began with; `{name}` was "
                f"{found.get(name)}, got {self.options[name]}. Give the same, or choose another folder."
            )

    def _mine(self, rows: Iterable[InputRow]) -> Iterator[InputRow]:
        return (row for row in rows if row.index % self.world_size == self.rank)

    def _codec(self, progress: dict):
        """The codec of the shards that are there; its name where there are none."""
        keys = {entry["shard"]["codec_state"] for entry in progress["shards"] if entry["shard"]} - {""}
        if not keys:
            return self.options["codec"]
        manifest = self._manifest({key: progress["codec_states"][key] for key in keys})
        return load_codecs(self.folder, manifest)[keys.pop()]

    def check_finished(self, source: DocumentSource) -> None:
        """Raise a ValueError unless the corpus that is there was built from this input with these options."""
        build = Manifest.read(self.folder).build
        self._check_options(build)
        self._check_input(source, build["input_sha256"][self.rank])

    def _check_input(self, source: DocumentSource, expected: str) -> None:
        """Raise a ValueError unless the rows of this rank are those that a digest was taken of."""
        rows = _CountedRows(self._mine(source), lambda n: None)
        for _ in rows:
            pass
        if rows.digest.hexdigest() != expected:
            raise ValueError(
                f"the corpus in {self.folder} was built from other documents than these. Change it with `add`, "
                "`update` and `delete`, or choose another folder."
            )

    # --- all ranks ---------------------------------------------------------------------------------------------------

    def finish(self) -> bool:
        """Write corpus.json if every rank is complete; whether it is there.

        Raises:
            ValueError: no document could be used.
        """
        paths = [self._progress_path(number) for number in range(self.world_size)]
        with corpus_lock(self.folder, FINISHING_SECONDS):
            if (self.folder / MANIFEST_FILE).exists():
                return True
            if not all(path.exists() for path in paths):
                return False
            jobs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            if not all(progress["complete"] for progress in jobs):
                return False
            places = [
                (rows_path(path, number), Shard(**entry["shard"]))
                for path, progress in zip(paths, jobs, strict=True)
                for number, entry in enumerate(progress["shards"])
                if entry["shard"]
            ]
            shards = [shard for _, shard in places]
            rejected = [row for path in paths for row in read_lines(path.with_suffix(f".{REJECTED_FILE}"))]
            if self.world_size > 1:
                rejected += self._delete_duplicates(places)
            rejected.sort(key=lambda row: row["row"])
            write_lines(self.folder / REJECTED_FILE, rejected)
            if not shards:
                shutil.rmtree(self.folder / BUILD_FOLDER, ignore_errors=True)
                raise ValueError(
                    f"the input must have at least one usable document, {len(rejected)} rows were rejected. See "
                    f"{self.folder / REJECTED_FILE} for the reasons, and choose another input."
                )
            states = {key: value for progress in jobs for key, value in progress["codec_states"].items()}
            manifest = self._manifest({shard.codec_state: states[shard.codec_state] for shard in shards if states})
            manifest.shards, manifest.n_rejected = shards, len(rejected)
            types = metadata_types(next(read_batches(self.folder, shards[0])).schema)
            manifest.metadata = {name: str(kind) for name, kind in types.items()}
            manifest.metadata_schema = base64.b64encode(pa.schema(list(types.items())).serialize()).decode()
            manifest.build = {**self.options, "input_sha256": [progress["input_sha256"] for progress in jobs]}
            count_live(manifest)
            remove_unreferenced(self.folder, manifest)
            write_card(self.folder, manifest)
            write_manifest(self.folder, manifest)
        return True

    def _delete_duplicates(self, places: list[tuple[Path, Shard]]) -> list[dict]:
        """Delete all but the first row of an id that several ranks have used; ranks do not see each other's.

        Args:
            places: every shard with the file of its input rows.

        Returns:
            The rejected rows.
        """
        doubled, found, rejected = set(), {}, []
        seen = SeenIds(lambda number: shard_documents(self.folder, places[number][1]))
        for number, (_, shard) in enumerate(places):
            names = shard_documents(self.folder, shard)
            doubled |= {name for name in names if not seen.add(name)}
            seen.settle(number, names)
        for path, shard in places if doubled else []:
            numbers = json.loads(path.read_text(encoding="utf-8"))["rows"]
            for (name, rows), number in zip(shard_documents(self.folder, shard).items(), numbers, strict=True):
                if name in doubled:
                    found.setdefault(name, []).append((number, shard, rows))
        for name, uses in found.items():
            for number, shard, rows in sorted(uses, key=lambda use: use[0])[1:]:
                delete_rows(shard, rows)
                reason = f"row {number} cannot have the id {name!r}: it is there already. Rename it."
                rejected.append({"row": number, "place": shard.file, "id": name, "reason": reason})
        return rejected

    def _manifest(self, codec_states: dict[str, str]) -> Manifest:
        config, size = self.model.config, self.options["memory_size"]
        sizes = [k for k in config.memory_sizes if k <= size]
        return Manifest(
            compressor={
                "fingerprint": self.options["fingerprint"],
                "name_or_path": self.model.name_or_path,
                "revision": self.model.commit,
            },
            hidden_size=config.text_config.hidden_size,
            memory_size=size,
            memory_sizes=sizes,
            retrieval_memory_size=min(config.retrieval_memory_size, size),
            document_max_length=config.document_max_length,
            document_overlap=self.model.processor.document_overlap,
            codec=self.options["codec"],
            codec_states=codec_states,
            source=self.source,
        )


class _CountedRows:
    """Rows that are counted on a bar and hashed on their way."""

    def __init__(self, rows: Iterator[InputRow], count):
        self.rows, self.count, self.digest = rows, count, hashlib.sha256()

    def __iter__(self) -> "_CountedRows":
        return self

    def __next__(self) -> InputRow:
        row = next(self.rows)
        self.digest.update(row_digest(row))
        self.count(1)
        return row

    def skip(self, entry: dict, folder: Path) -> None:
        """Pass the rows of a shard that is there.

        Raises:
            ValueError: they are other rows than the shard was made of.
        """
        digest = hashlib.sha256()
        first = last = None
        for row in self:
            digest.update(row_digest(row))
            first, last = first or row.place, row.place
            if row.index + 1 >= entry["next_row"]:
                break
        if digest.hexdigest() != entry["input_sha256"]:
            raise ValueError(
                f"a build must go on with the input that it began with; the rows from {first} to {last} are others "
                f"than before. Give the same input, or choose another folder than {folder}."
            )


def _all_types(source: DocumentSource, declared: dict) -> dict:
    """Arrow types of the metadata: the input's, else those of its first rows; what was declared wins."""
    types = source.metadata_types()
    if types is None:
        types = infer_types([row.document for row in source.peek() if row.document is not None])
    return types | declared


def rows_path(progress: Path, number: int) -> Path:
    """Where the numbers of the input rows behind a shard of a job stand, for duplicate ids across jobs."""
    return progress.with_suffix("") / f"{number:06d}.json"


def job_name(number: int, n_jobs: int) -> str:
    """The name of a job's files."""
    return f"job-{number:05d}-of-{n_jobs:05d}"
