"""One rank of a build: what it has done, what is left, and how the last one completes the corpus.

Until corpus.json is there, `build/` holds the progress of every rank, so that each can be killed at any moment.
"""

import base64
import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from transformers.utils.logging import tqdm

from ..codecs_clara import Codec
from ..manifest_clara import (
    BUILD_FOLDER,
    MANIFEST_FILE,
    Manifest,
    Shard,
    check_shard,
    live_mask,
    load_codecs,
    metadata_types,
    pa,
    read_batches,
)
from ..storage_clara import read_json, write_json
from .card import write_card
from .filelog import FILES_FILE, read_line
from .ids import SeenIds
from .pipeline import ShardPipeline, row_digest
from .shards import count_live, delete_rows, remove_unreferenced, shard_documents, write_manifest
from .sources import DocumentSource, InputRow
from .storage import append_lines, corpus_lock, read_lines, write_lines
from .types import type_from_name

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
FINISHING_SECONDS = 600.0  # that a rank waits while another one completes the corpus


class Build:
    """One rank of a build, from 0 to `world_size` - 1; `options` is all that must be the same when it is resumed."""

    def __init__(self, folder: Path, model, options: dict, source: dict, rank: int, world_size: int):
        self.folder, self.model, self.options, self.source = folder, model, options, source
        self.rank, self.world_size = rank, world_size
        names = [f"job-{number:05d}-of-{world_size:05d}.json" for number in range(world_size)]
        self.paths = [folder / BUILD_FOLDER / name for name in names]  # the progress of every rank
        self.path = self.paths[rank]

    # --- one rank ----------------------------------------------------------------------------------------------------

    def run(self, source: DocumentSource, types: dict, batch_size: int) -> None:
        """Do what is left of this rank; `types` are the Arrow types of the metadata."""
        progress = self._resume()
        listed = self.folder / BUILD_FOLDER / FILES_FILE
        if source.files and not listed.exists():  # before any of them is read
            write_lines(listed, (read_line(file, []) for file in source.files))
        if progress["complete"]:
            self._check_input(source, progress["input_sha256"])
            return
        shards: list[dict] = progress["shards"]
        seen = SeenIds(lambda number: shard_documents(self.folder, Shard(**shards[number]["shard"])))
        mine, digest = self._mine(source), hashlib.sha256()
        with counted(source, self.world_size) as count:
            rows = _hashed(mine, digest)
            for number, entry in enumerate(shards):
                count(_skip(rows, entry, self.folder))
                if entry["shard"] is not None:
                    seen.settle(number, seen.read_ids(number))
            keys = [entry["shard"]["codec_state"] for entry in shards if entry["shard"]]
            pipeline = ShardPipeline(
                self.folder,
                self.model,
                codec=self._stored_codec(progress, keys[0]) if keys else self.options["codec"],
                memory_size=self.options["memory_size"],
                hidden_size=self.model.config.text_config.hidden_size,
                types=types,
                refusal=lambda document_id, _: None if seen.add(document_id) else "it is there already. Rename it.",
                forget=seen.remove,
                new_id=lambda row: source.free_id(row.index),
                shard_size=self.options["shard_size"],
                batch_size=batch_size,
                prefix=f"{self.rank:05d}",
                kept=self.path.with_suffix(".memories"),
                as_text=text_columns(self.options["metadata"]),
                progress=count,
            )
            with self.model.bulk_compression():
                for result in pipeline.run(rows, first_shard=len(shards)):
                    append_lines(_rejected_path(self.path), result.rejected)
                    made = result.documents.values()
                    numbers = {file.name: number for number, file in enumerate(source.files)}
                    content = {"rows": [row.index for row in made], "files": [numbers.get(row.file) for row in made]}
                    write_json(_rows_path(self.path, len(shards)), content)
                    progress["codec_states"] |= pipeline.codec_states
                    shards.append(
                        {
                            "shard": asdict(result.shard) if result.shard else None,
                            "next_row": result.next_row,
                            "input_sha256": result.digest.hexdigest(),
                            "n_rejected": len(result.rejected),
                        }
                    )
                    seen.settle(len(shards) - 1, result.documents)
                    write_json(self.path, progress)
        write_json(self.path, progress | {"complete": True, "input_sha256": digest.hexdigest()})

    def _resume(self) -> dict:
        """What this rank has done. Shards that are gone or damaged are made again, and so are all after them."""
        begun = [self.path] if self.path.exists() else sorted(self.path.parent.glob("job-*-of-*.json"))
        if begun:
            self._check_options(read_json(begun[0])["options"])
        if not self.path.exists():
            _rejected_path(self.path).unlink(missing_ok=True)
            progress = {"options": self.options, "complete": False, "codec_states": {}, "shards": []}
            write_json(self.path, progress)
            return progress
        progress = read_json(self.path)
        for number, entry in enumerate(progress["shards"]):
            try:
                if entry["shard"] is not None:
                    check_shard(self.folder, Shard(**entry["shard"]))
                    self._stored_codec(progress, entry["shard"]["codec_state"])
            except (FileNotFoundError, ValueError) as error:
                logger.warning("%s It is made again, and so are the shards after it.", error)
                del progress["shards"][number:]
                progress["complete"] = False
                break
        # The lines of a shard that was not recorded come again with it.
        rejected = read_lines(_rejected_path(self.path))
        write_lines(_rejected_path(self.path), rejected[: sum(entry["n_rejected"] for entry in progress["shards"])])
        return progress

    def _check_options(self, found: dict) -> None:
        name = min((name for name in self.options if found.get(name) != self.options[name]), default=None)
        if name == "first_rows":
            raise ValueError(
                "a build must go on with the input that it began with; its first rows are others than before. "
                "Give the same input, or choose another folder."
            )
        if name is not None:
            raise ValueError(
                f"a build must go on with the input and the options that it began with; `{name}` was "
                f"{found.get(name)}, got {self.options[name]}. Give the same, or choose another folder."
            )

    def _mine(self, rows: Iterable[InputRow]) -> Iterator[InputRow]:
        return islice(rows, self.rank, None, self.world_size)

    def _stored_codec(self, progress: dict, key: str) -> Codec:
        """The codec with a state that a shard of this rank names."""
        states = {key: progress["codec_states"][key]} if key else {}
        return load_codecs(self.folder, self._manifest(states))[key]

    def check_finished(self, source: DocumentSource) -> None:
        """Raise a ValueError unless the corpus that is there was built from this input with these options."""
        build = Manifest.read(self.folder).build
        self._check_options(build)
        self._check_input(source, build["input_sha256"][self.rank])

    def _check_input(self, source: DocumentSource, expected: str) -> None:
        """Raise a ValueError unless the rows of this rank are those that a digest was taken of."""
        digest = hashlib.sha256()
        for _ in _hashed(self._mine(source), digest):
            pass
        if digest.hexdigest() != expected:
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
        with corpus_lock(self.folder, FINISHING_SECONDS):
            if (self.folder / MANIFEST_FILE).exists():
                return True
            if not all(path.exists() for path in self.paths):
                return False
            jobs = [read_json(path) for path in self.paths]
            if not all(progress["complete"] for progress in jobs):
                return False
            places = [
                (_rows_path(path, number), Shard(**entry["shard"]))
                for path, progress in zip(self.paths, jobs, strict=True)
                for number, entry in enumerate(progress["shards"])
                if entry["shard"]
            ]
            shards = [shard for _, shard in places]
            rejected = [row for path in self.paths for row in read_lines(_rejected_path(path))]
            if self.world_size > 1:
                rejected += self._delete_duplicates(places)
            write_lines(self.folder / REJECTED_FILE, sorted(rejected, key=lambda row: row["row"]))
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
            self._write_log([place for place, _ in places], shards)
            manifest.build = {**self.options, "input_sha256": [progress["input_sha256"] for progress in jobs]}
            remove_unreferenced(self.folder, manifest)
            count_live(manifest)
            write_card(self.folder, manifest)
            write_manifest(self.folder, manifest)
        return True

    def _delete_duplicates(self, places: list[tuple[Path, Shard]]) -> list[dict]:
        """Delete all but the first row of an id that several ranks have used, and return the rejected rows.

        Ranks do not see each other's ids. `places` has every shard with the file of its input rows.
        """
        doubled, found, rejected = set(), {}, []
        seen = SeenIds(lambda number: shard_documents(self.folder, places[number][1]))
        for number, (_, shard) in enumerate(places):
            names = shard_documents(self.folder, shard)
            doubled |= {name for name in names if not seen.add(name)}
            seen.settle(number, names)
        for path, shard in places if doubled else []:
            numbers = read_json(path)["rows"]
            for (name, rows), number in zip(shard_documents(self.folder, shard).items(), numbers, strict=True):
                if name in doubled:
                    found.setdefault(name, []).append((number, shard, rows))
        for name, uses in found.items():
            for number, shard, rows in sorted(uses, key=lambda use: use[0])[1:]:
                delete_rows(shard, rows)
                reason = f"row {number} cannot have the id {name!r}: it is there already. Rename it."
                rejected.append({"row": number, "place": shard.file, "id": name, "reason": reason, "status": "failed"})
        return rejected

    def _write_log(self, paths: list[Path], shards: list[Shard]) -> None:
        """Note of which files the documents came; `paths` tell the input rows of each shard."""
        listed = read_lines(self.folder / BUILD_FOLDER / FILES_FILE)
        for path, shard in zip(paths, shards, strict=True) if listed else ():
            live = live_mask(shard)
            for (name, rows), file in zip(
                shard_documents(self.folder, shard).items(), read_json(path)["files"], strict=True
            ):
                if live[rows.start]:
                    listed[file]["ids"].append(name)
        rejected = read_lines(self.folder / REJECTED_FILE)
        left_out = {row["file"] for row in rejected if row["status"] in ("skipped", "unsupported")}
        write_lines(self.folder / FILES_FILE, (line for line in listed if line["name"] not in left_out))

    def _manifest(self, codec_states: dict[str, str]) -> Manifest:
        config, size = self.model.config, self.options["memory_size"]
        return Manifest(
            compressor={
                "fingerprint": self.options["fingerprint"],
                "name_or_path": _whole_path(self.model.name_or_path),
                "revision": self.model.commit,
                "backbone": _whole_path(self.model.backbone_source),
            },
            hidden_size=config.text_config.hidden_size,
            memory_size=size,
            memory_sizes=[k for k in config.memory_sizes if k <= size],
            retrieval_memory_size=min(config.retrieval_memory_size, size),
            document_max_length=config.document_max_length,
            document_overlap=self.model.processor.document_overlap,
            codec=self.options["codec"],
            codec_states=codec_states,
            source=self.source,
        )


def _whole_path(name: str | None) -> str | None:
    """The name of a model, a folder's from the root, so that it leads there from anywhere."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _hashed(rows: Iterable[InputRow], digest) -> Iterator[InputRow]:
    """The rows, which a digest takes on their way."""
    for row in rows:
        digest.update(row_digest(row))
        yield row


@contextlib.contextmanager
def counted(source: DocumentSource, world_size: int = 1) -> Iterator[Callable[[int], None]]:
    """A bar of documents; gives what counts them. Of files their number is estimated from the bytes read so far."""
    with tqdm(total=source.share(world_size), desc="compressing", unit=" documents", delay=2) as bar:

        def count(number: int) -> None:
            bar.total = source.share(world_size)
            bar.update(number)

        yield count


def text_columns(metadata: Mapping[str, str]) -> frozenset[str]:
    """The columns that were declared as text."""
    return frozenset(name for name, kind in metadata.items() if pa.types.is_string(type_from_name(kind)))


def _skip(rows: Iterator[InputRow], entry: dict, folder: Path) -> int:
    """Pass the rows of a shard that is there; their number.

    Raises:
        ValueError: they are other rows than the shard was made of.
    """
    digest, first, last, number = hashlib.sha256(), None, None, 0
    for row in rows:
        number += 1
        digest.update(row_digest(row))
        first, last = first or row.place, row.place
        if row.index + 1 >= entry["next_row"]:
            break
    if digest.hexdigest() != entry["input_sha256"]:
        raise ValueError(
            f"a build must go on with the input that it began with; the rows from {first} to {last} are others than "
            f"before. Give the same input, or choose another folder than {folder}."
        )
    return number


def _rejected_path(progress: Path) -> Path:
    """Where the rejected rows of a rank stand."""
    return progress.with_suffix(f".{REJECTED_FILE}")


def _rows_path(progress: Path, number: int) -> Path:
    """Where the numbers of the input rows of a rank's shard stand, for ids that several ranks have used."""
    return progress.with_suffix("") / f"{number:06d}.json"
