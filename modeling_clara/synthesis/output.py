"""What a finished run leaves: Parquet files and a card, or one JSONL file; rejects and the report beside.

It reads outcomes as a stream, twice for Parquet: first their types, then their rows.
"""

import collections
import contextlib
import itertools
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..corpus.card import size_category
from ..corpus.storage import iter_lines, read_lines, write_lines
from ..manifest_clara import pa, pq
from ..storage_clara import replacing, write_json
from .documents import LEFT_OUT_FILE

ROWS_PER_FILE = 10_000
BATCH = 1_000
CARD = Path(__file__).parent / "card.md"


@dataclass(frozen=True)
class Places:
    """Where a run writes.

    Attributes:
        output: a folder, or a file that ends in .jsonl.
    """

    output: Path

    @property
    def is_file(self) -> bool:
        return self.output.suffix == ".jsonl"

    def _beside(self, name: str) -> Path:
        return self.output.with_suffix(f".{name}") if self.is_file else self.output / name

    @property
    def rejects(self) -> Path:
        return self._beside("rejects.jsonl")

    @property
    def report(self) -> Path:
        """The options and counts of a finished run; written last."""
        return self._beside("synthesis.json")

    @property
    def work(self) -> Path:
        """The folder of a run that is not finished."""
        return self._beside("work")


@dataclass
class Tally:
    """Sums over outcomes.

    Attributes:
        chunks, accepted: outcomes, and those with a record.
        calls, prompt_tokens, completion_tokens: of the answers that they were made of.
        counts: what the task counts, summed by name.
        pairs: accepted ones by kind and round.
        rejects: numbers by kind and reason, a reason without its details.
    """

    chunks: int = 0
    accepted: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counts: collections.Counter = field(default_factory=collections.Counter)
    pairs: dict[str, collections.Counter] = field(default_factory=dict)
    rejects: dict[str, collections.Counter] = field(default_factory=dict)

    def add(self, outcome: Mapping) -> None:
        """Count an outcome."""
        self.chunks += 1
        self.accepted += outcome["record"] is not None
        for pair in (outcome["record"] or {}).get("qas") or ():
            self.pairs.setdefault(pair["kind"], collections.Counter())[str(pair["round"])] += 1
        for name in ("calls", "prompt_tokens", "completion_tokens"):
            setattr(self, name, getattr(self, name) + outcome["usage"][name])
        self.counts.update(outcome["counts"])
        for reject in outcome["rejects"]:
            self.add_reject(reject)

    def add_reject(self, reject: Mapping) -> None:
        """Count a reject."""
        reason = reject["reason"].partition(":")[0][:80]
        self.rejects.setdefault(reject["kind"], collections.Counter())[reason] += 1

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def describe(self) -> dict:
        """As JSON."""
        rejects = {kind: dict(reasons.most_common()) for kind, reasons in sorted(self.rejects.items())}
        names = ("chunks", "accepted", "calls", "prompt_tokens", "completion_tokens")
        sums = {name: getattr(self, name) for name in names}
        pairs = {kind: dict(sorted(rounds.items())) for kind, rounds in sorted(self.pairs.items())}
        return sums | {"counts": dict(sorted(self.counts.items())), "pairs": pairs, "rejects": rejects}


def cost_of(prompt_tokens: float, completion_tokens: float, prices: Mapping[str, float] | None) -> float:
    """Cost of tokens at prices of a million; 0 without prices."""
    return (prompt_tokens * prices["prompt"] + completion_tokens * prices["completion"]) / 1e6 if prices else 0.0


def iter_outcomes(work: Path) -> Iterator[dict]:
    """The outcomes of all ranks, in the order of their files."""
    paths = {tuple(map(int, path.stem.split("_"))): path for path in (work / "outcomes").glob("*.jsonl")}
    for _, path in sorted(paths.items()):
        for number, outcome, problem in iter_lines(path):
            if problem is not None:
                raise ValueError(f"{path}:{number} {problem}. The disk has damaged it: begin in another `output`.")
            yield outcome


def iter_done(work: Path, rank: int) -> Iterator[dict]:
    """What an earlier call of a rank has done: outcomes of whole files, then those in datatrove's checkpoints."""
    last = last_whole_file(work, rank)
    for number in range(last + 1):
        yield from read_lines(work / "outcomes" / f"{rank:05d}_{number}.jsonl")
    for path in (work / "checkpoints" / f"{rank:05d}").glob("chunk_*.jsonl"):
        if int(path.stem.partition("_")[2]) > last:
            for document in read_lines(path):
                yield from document["metadata"]["rollout_results"]


def used_tokens(work: Path, rank: int) -> tuple[int, int]:
    """(prompt, completion) tokens of all answers that a rank has on disk, those of unfinished chunks too."""
    last, used = last_whole_file(work, rank), Tally()
    for number in range(last + 1):
        for outcome in read_lines(work / "outcomes" / f"{rank:05d}_{number}.jsonl"):
            used.add(outcome)
    cache = work / "checkpoints" / f"{rank:05d}" / "replay.sqlite3"
    if not cache.exists():
        return used.prompt_tokens, used.completion_tokens
    sums = ", ".join(
        f"coalesce(sum(json_extract(CAST(result AS TEXT), '$.usage.{name}')), 0)"
        for name in ("prompt_tokens", "completion_tokens")
    )
    with contextlib.closing(sqlite3.connect(cache)) as answers:
        if not answers.execute("SELECT 1 FROM sqlite_master WHERE name = 'request_cache'").fetchone():
            return used.prompt_tokens, used.completion_tokens
        found = answers.execute(f"SELECT {sums} FROM request_cache WHERE chunk_index > ?", (last,)).fetchone()
    return used.prompt_tokens + found[0], used.completion_tokens + found[1]


def last_whole_file(work: Path, rank: int) -> int:
    """Number of the last file of outcomes that is whole, as datatrove notes it; -1 if none is."""
    path = work / "checkpoints" / "last_chunk" / f"{rank:05d}.txt"
    return int(path.read_text()) if path.exists() else -1


def finish(places: Places, options: Mapping, counts: Mapping, prices: Mapping, card: Mapping) -> dict:
    """Write everything, the report last, which is returned.

    Args:
        places: where.
        options: of the run, as its fingerprint has them.
        counts: of `documents.prepare`.
        prices: of a million tokens, `prompt` and `completion`; empty if they are not known.
        card: `name`, `license`, `language` of the documents, as far as they are known.
    """
    tally = Tally()

    def rejects() -> Iterator[dict]:
        for reject in read_lines(places.work / LEFT_OUT_FILE):
            tally.add_reject(reject)
            yield reject
        for outcome in iter_outcomes(places.work):
            tally.add(outcome)
            yield from outcome["rejects"]

    write_lines(places.rejects, rejects())
    if tally.chunks != counts["chunks"]:
        raise RuntimeError(
            f"{places.work} must have an outcome of each of {counts['chunks']} chunks, found {tally.chunks}. Its "
            "files were changed: begin in another `output`."
        )
    report = {"options": dict(options), **counts, **tally.describe()}
    if prices:
        report["cost"] = cost_of(tally.prompt_tokens, tally.completion_tokens, prices)
    records = (outcome["record"] for outcome in iter_outcomes(places.work) if outcome["record"] is not None)
    if places.is_file:
        if not write_lines(places.output, records):
            places.output.touch()
    else:
        report["columns"] = write_parquet(places.output / "data", places.work, tally.accepted)
        with replacing(places.output / "README.md") as partial:
            partial.write_text(render_card(report, places.output.resolve().name, card), encoding="utf-8")
    write_json(places.report, report)
    return report


def write_parquet(folder: Path, work: Path, n_rows: int) -> dict[str, str]:
    """Write the records as train-NNNNN-of-NNNNN.parquet; the type of each column."""

    def batches() -> Iterator[list[dict]]:
        records = (outcome["record"] for outcome in iter_outcomes(work) if outcome["record"] is not None)
        while batch := list(itertools.islice(records, BATCH)):
            yield batch

    schema = pa.schema([])
    for batch in batches():  # a null of one batch is a text in another
        names = dict.fromkeys(name for row in batch for name in row)
        found = pa.table({name: [row.get(name) for row in batch] for name in names}).schema
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    n_files = max(1, -(-n_rows // ROWS_PER_FILE))
    rows = batches()
    for number in range(n_files):
        with replacing(folder / f"train-{number:05d}-of-{n_files:05d}.parquet") as partial:
            with pq.ParquetWriter(partial, schema) as writer:
                for batch in itertools.islice(rows, ROWS_PER_FILE // BATCH):
                    writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return {field.name: str(field.type) for field in schema}


def render_card(report: Mapping, name: str, card: Mapping) -> str:
    """README.md of a folder, with what the Hub needs to show and load it."""
    from huggingface_hub import DatasetCardData

    files = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
    data = DatasetCardData(
        license=card.get("license"),
        language=card.get("language"),
        pretty_name=name,
        size_categories=[size_category(report["accepted"])],
        task_categories=["question-answering"],
        tags=["clara", "synthetic", "retrieval-augmented-generation"],
        configs=files,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CARD.read_text(encoding="utf-8"))
    return template.render(**report, name=name, card=dict(card), card_data=data.to_yaml()) + "\n"
