"""Searches an open corpus: options, filters, the indexes that are made once, fusion with BM25, and what a hit holds.

A filter is a dictionary of conditions on columns:

    {"year": 2020}                             equal
    {"year": {"$gte": 2000, "$lt": 2010}}      $eq $ne $gt $gte $lt $lte $in $nin
    {"$or": [{"lang": "en"}, {"lang": {"$in": ["de", "fr"]}}]}      $and $or $not
    {"day": {"$gte": "2021-01-31"}}            ISO text, or a date, datetime or time; what has no zone is taken as UTC
    {"tags": "news"}                           a list meets a condition if one of its elements does

Numbers are compared exactly, 0.1 as a tenth, but for columns of floats, which round what they are compared with.
"""

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Self

import numpy as np
import torch
from transformers.utils.logging import tqdm

from .index_clara import SMALL, Ranked, exact_cosines
from .lexical_clara import FUSIONS, LexicalIndex, fuse, lexical_key
from .manifest_clara import Manifest
from .snapshot_clara import Snapshot
from .text_clara import check_count

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError:  # `require_arrow` names the remedy
    pa = pc = None

SHORTLIST = 100

# --- options ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """The options of `CompressedCorpus.search` that a view of a corpus can have as its defaults."""

    where: Mapping | None = None
    hybrid: bool | str = False
    exact: bool = False
    shortlist: int = SHORTLIST

    def updated(self, columns: Sequence[str], **given) -> Self:
        """The same with what is given and not None; raises a TypeError or ValueError that names a wrong option.

        `columns` are those that a filter may name, `given` has values by the names of the fields.
        """
        options = dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})
        check_count(options.shortlist, "shortlist", f"Default: {SHORTLIST}.")
        if options.hybrid not in (True, False, *FUSIONS):
            raise ValueError(
                f"`hybrid` must be True, False, {' or '.join(map(repr, FUSIONS))}, got {options.hybrid!r}. Pass one "
                "of them."
            )
        if options.where is not None:
            check_where(options.where, columns)
        return options


def check_query(query_memory, manifest: Manifest) -> torch.Tensor:
    """(questions, k, H) float32 on the CPU; raises a TypeError or ValueError unless the corpus can compare it."""
    hidden, sizes = manifest.hidden_size, manifest.memory_sizes
    try:
        query_memory = torch.as_tensor(query_memory).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`query_memory` must be a tensor, got {type(query_memory).__name__}. Encode the questions with the "
            "corpus's model: `encode_queries`, or search through `model.retrieve`."
        ) from error
    if query_memory.ndim != 3 or query_memory.shape[2] != hidden or query_memory.shape[1] not in sizes:
        raise ValueError(
            f"`query_memory` must have the shape (questions, k, {hidden}) with k one of {sizes}, got "
            f"{tuple(query_memory.shape)}. Encode the questions with the corpus's model: `encode_queries`."
        )
    if not query_memory.isfinite().all():
        raise ValueError("`query_memory` must be finite, got NaN or infinity. Encode the questions again.")
    return query_memory


# --- filters ---------------------------------------------------------------------------------------------------------

# operator -> its function in Arrow
COMPARISONS = {"$eq": "equal", "$gt": "greater", "$gte": "greater_equal", "$lt": "less", "$lte": "less_equal"}
NEGATIONS = {"$ne": "$eq", "$nin": "$in"}
OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin")
NANOSECONDS = {"day": 86_400 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BEYOND = 10**400  # larger than anything that a column holds; in place of infinity
# kind of Arrow type -> a value that compares with it
EXAMPLES = {"boolean": "True", "integer": "2020", "floating": "0.5", "decimal": "9.99", "date": "'2021-01-31'"}
EXAMPLES |= {"time": "'10:30:00'", "timestamp": "'2021-01-31T10:30:00'", "string": "'en'", "large_string": "'en'"}
JUNCTIONS = {"$and": np.logical_and, "$or": np.logical_or}


def check_where(where, columns: Sequence[str], name: str = "where") -> None:
    """Raise a TypeError or ValueError that names the part of a filter that is malformed or no column of the corpus."""
    if not isinstance(where, Mapping):
        raise TypeError(f"`{name}` must be a dict, got {type(where).__name__}. Example: {{'year': {{'$gte': 2000}}}}.")
    if not where:
        raise ValueError(f"`{name}` must have a condition, got {{}}. Leave it out for all documents.")
    for key, value in where.items():
        if key in JUNCTIONS:
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise TypeError(f"`{name}[{key!r}]` must be a list of filters, got {value!r}. Wrap them in [].")
            for number, part in enumerate(value):
                check_where(part, columns, f"{name}[{key!r}][{number}]")
        elif key == "$not":
            check_where(value, columns, f"{name}['$not']")
        elif key not in columns:
            raise ValueError(
                f"`{name}` must name columns of the corpus ({', '.join(columns)}), got {key!r}. Choose one of them, "
                "or one of $and, $or, $not."
            )
        elif isinstance(value, Mapping) and not value:
            raise ValueError(f"`{name}[{key!r}]` must have a condition, got {{}}. Example: {{'$gte': 2000}}.")
        else:
            for operator, operand in conditions(value):
                _check_operand(operator, operand, f"{name}[{key!r}]")


def _check_operand(operator: str, operand, name: str) -> None:
    if operator not in OPERATORS:
        raise ValueError(f"`{name}` must use one of {', '.join(OPERATORS)}, got {operator!r}. Choose one of them.")
    many = operator in ("$in", "$nin")
    if many and not isinstance(operand, list | tuple):
        raise TypeError(f"`{name}[{operator!r}]` must be a list, got {type(operand).__name__}. Wrap it in [].")
    for value in operand if many else [operand]:
        if not isinstance(value, str | int | float | Decimal | date | time):  # a bool is an int, a datetime a date
            raise TypeError(
                f"`{name}[{operator!r}]` must be text, a number, a bool, a date or a time, got "
                f"{type(value).__name__}. Compare with one."
            )


def conditions(value) -> Iterator[tuple[str, object]]:
    """(operator, operand) of every condition on a column."""
    if isinstance(value, Mapping):
        yield from value.items()
    else:
        yield "$eq", value


def rows_where(table, where: Mapping) -> np.ndarray:
    """(rows,) bool: which rows of an Arrow table meet a checked filter. A missing value meets only $ne and $nin.

    A TypeError if a column cannot be compared with a value.
    """
    keep = np.ones(len(table), dtype=bool)
    for key, value in where.items():
        if key in JUNCTIONS:
            keep &= JUNCTIONS[key].reduce([rows_where(table, part) for part in value])
        elif key == "$not":
            keep &= ~rows_where(table, value)
        else:
            for operator, operand in conditions(value):
                keep &= _compare(table[key], operator, operand, key)
    return keep


def _compare(column, operator: str, operand, name: str) -> np.ndarray:
    if operator in NEGATIONS:
        return ~_compare(column, NEGATIONS[operator], operand, name)
    comparison, values = ("equal", operand) if operator == "$in" else (COMPARISONS[operator], [operand])
    met = np.zeros(len(column), dtype=bool)
    for value in values:
        try:
            met |= np.concatenate([met[:0], *(_meets(chunk, comparison, value) for chunk in column.chunks)])
        except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's exceptions are of these types
            example = _example(column.type)
            remedy = f"Compare with a value such as {example}." if example else "Leave it out: no value is comparable."
            raise TypeError(
                f"`where[{name!r}]` must be comparable with the column, which is {column.type}, got {value!r} of type "
                f"{type(value).__name__}. {remedy}"
            ) from error
    return met


def _meets(array, comparison: str, value) -> np.ndarray:
    """(rows,) bool: which values of an Arrow array compare so with a value; a TypeError or ValueError if none can."""
    kind, types = array.type, pa.types
    if isinstance(kind, _lists()):
        met = np.zeros(len(array), dtype=bool)
        parents = pc.list_parent_indices(array).to_numpy()
        met[parents[_meets(pc.list_flatten(array), comparison, value)]] = True
        return met
    if types.is_dictionary(kind):
        return _meets(array.dictionary_decode(), comparison, value)
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        unit = NANOSECONDS["day" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit]
        integers = array.view(pa.int32() if kind.bit_width == 32 else pa.int64())
        return _meets_exactly(integers, comparison, Fraction(_nanoseconds(kind, value), unit))
    if types.is_integer(kind) or types.is_decimal(kind) or types.is_floating(kind):
        number = _number(value)
        if number is None or not types.is_floating(kind):
            return np.zeros(len(array), bool) if number is None else _meets_exactly(array, comparison, number)
        array = array.cast(pa.float32()) if types.is_float16(kind) else array
        value = pa.scalar(_nearest_float(number), array.type)
    elif types.is_null(kind):
        return np.zeros(len(array), dtype=bool)
    elif _example(kind) is None or not isinstance(value, bool if types.is_boolean(kind) else str):
        raise TypeError("of another type")
    return _to_mask(getattr(pc, comparison)(array, value))


def _meets_exactly(array, comparison: str, value: Fraction) -> np.ndarray:
    """The same for integers or decimals and a number that may lie between or beyond what their type holds."""
    kind, scale = array.type, 0
    if pa.types.is_decimal(kind):
        most, scale = 10**kind.precision - 1, kind.scale
        least = -most
    else:
        limits = np.iinfo(kind.to_pandas_dtype())
        least, most = limits.min, limits.max
    value *= Fraction(10) ** scale
    below = math.floor(value)
    if below != value and comparison != "equal":
        comparison = "greater" if comparison.startswith("greater") else "less_equal"
    elif below != value:
        return np.zeros(len(array), dtype=bool)
    if not least <= below <= most:  # then all that is there meets it, or nothing
        is_met = comparison.startswith("less" if below > most else "greater")
        return _to_mask(array.is_valid()) & is_met
    below = Decimal(f"{below}e{-scale}") if pa.types.is_decimal(kind) else int(below)
    return _to_mask(getattr(pc, comparison)(array, pa.scalar(below, kind)))


def _number(value) -> Fraction | None:
    """A number exactly; None for NaN, which is neither equal to anything nor larger or smaller."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError("no number")
    if value != value:
        return None
    if value in (math.inf, -math.inf):
        return Fraction(BEYOND if value > 0 else -BEYOND)
    return Fraction(value if isinstance(value, int) else str(value))


def _nearest_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _nanoseconds(kind, value) -> int:
    """Since midnight for a column of times, otherwise since 1970 in UTC."""
    digits = re.search(r"[.,]\d{6}(\d{1,3})", value) if isinstance(value, str) else None  # Python has microseconds
    if pa.types.is_time(kind):
        value = time.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(value, time) or value.tzinfo is not None:
            raise TypeError("no time without a zone")
        value = datetime.combine(EPOCH, value, UTC)
    elif isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif not isinstance(value, datetime):
        value = datetime.combine(value, time())  # a TypeError of what is no date
    since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - EPOCH
    microseconds = (since.days * 86_400 + since.seconds) * 10**6 + since.microseconds
    return microseconds * 1000 + (int(digits[1].ljust(3, "0")) if digits else 0)


def _lists() -> tuple:
    return pa.ListType, pa.LargeListType, pa.FixedSizeListType


def _example(kind) -> str | None:
    """A value that a column of this type compares with, as it is written in Python; None if there is none."""
    while isinstance(kind, (*_lists(), pa.DictionaryType)):
        kind = kind.value_type
    for name, example in EXAMPLES.items():
        if getattr(pa.types, f"is_{name}")(kind):
            return example
    return None


def _to_mask(compared) -> np.ndarray:
    return pc.fill_null(compared, False).to_numpy(zero_copy_only=False) if len(compared) else np.zeros(0, dtype=bool)


def allowed_rows(snapshot: Snapshot, where: Mapping | None) -> np.ndarray | None:
    """(rows,) bool: rows that are not deleted and meet a checked filter; None for all."""
    allowed = None if snapshot.n_live == snapshot.n_rows else snapshot.live
    if where is None:
        return allowed
    masks = (rows_where(segment.table, where) for segment in snapshot.segments)
    met = np.concatenate([np.zeros(0, dtype=bool), *masks])
    return met if allowed is None else met & allowed


# --- indexes ---------------------------------------------------------------------------------------------------------


class SearchState:
    """What all views of an open corpus share: the newest snapshot and its indexes, each made once.

    `make_index` takes snapshot, memory_size, progress= and previous=, see `VectorIndex`. With `always` even a corpus
    that is small enough to be compared row by row has an index.
    """

    def __init__(self, make_index: Callable, always: bool):
        self.make_index, self.always = make_index, always
        self.lock = threading.RLock()
        self.snapshot: Snapshot | None = None
        self.indexes: dict = {}  # by k
        self.lexical: LexicalIndex | None = None
        self.checked: tuple | None = None  # a fingerprint, the model that has it, its weights' versions

    def show(self, snapshot: Snapshot) -> None:
        """Make a snapshot the newest, with the indexes that the last one had; to be called with the lock held."""
        known = self.indexes if self.is_indexed(snapshot) else {}
        indexes = {k: self._make(snapshot, k, previous=index) for k, index in known.items()}
        self.snapshot, self.indexes = snapshot, indexes

    def is_indexed(self, snapshot: Snapshot) -> bool:
        """Whether the index is worth it: a small corpus is compared row by row."""
        wanted = snapshot.n_rows > SMALL or self.always
        return bool(snapshot.segments) and wanted and snapshot.segments[0].n_rows > 0

    def index_of(self, snapshot: Snapshot, memory_size: int):
        """The index of a snapshot for memories of k vectors."""
        with self.lock:  # made once, however many threads ask
            if snapshot is not self.snapshot:
                return self._make(snapshot, memory_size)
            if memory_size not in self.indexes:
                self.indexes[memory_size] = self._make(snapshot, memory_size)
            return self.indexes[memory_size]

    def _make(self, snapshot: Snapshot, memory_size: int, previous=None):
        with tqdm(total=snapshot.n_rows, desc="indexing the corpus", unit=" chunks", delay=2, leave=False) as bar:
            return self.make_index(snapshot, memory_size, progress=bar.update, previous=previous)

    def lexical_of(self, snapshot: Snapshot) -> LexicalIndex:
        """BM25 over the texts of a snapshot."""
        with self.lock:
            if self.lexical is None or self.lexical.key != lexical_key(snapshot):
                self.lexical = LexicalIndex(snapshot)
            return self.lexical


# --- words and hits --------------------------------------------------------------------------------------------------


def check_questions(questions, n_questions: int) -> None:
    """Raise a TypeError or ValueError unless these are the texts of so many query memories."""
    if isinstance(questions, str) or not all(isinstance(question, str) for question in questions or []):
        raise TypeError("`questions` must be a list of texts for `hybrid`. Pass the texts of the query memories.")
    if questions is None or len(questions) != n_questions:
        raise ValueError(
            f"`questions` must be the {n_questions} texts of the query memories for `hybrid`, got "
            f"{None if questions is None else len(questions)}. Pass them, or search through the model."
        )


def fuse_words(
    snapshot: Snapshot,
    query_memory: torch.Tensor,
    ranked: Ranked,
    found: Sequence[tuple[np.ndarray, np.ndarray]],
    hybrid: bool | str,
) -> Ranked:
    """One order of `ranked`, which the memories found, and of `found`, which `LexicalIndex.shortlist` gave."""
    fusion = hybrid if hybrid in FUSIONS else FUSIONS[0]
    cosines = exact_cosines(snapshot, query_memory, [rows for rows, _ in found])
    fused = []
    for by_memory, by_words, lexical_cosines in zip(ranked, found, cosines, strict=True):
        best = {snapshot.first_row(row): (row, score) for row, score in [*lexical_cosines, *by_memory]}
        words = {}
        for row, score in zip(*by_words, strict=True):  # the best chunk of a document comes first
            words.setdefault(snapshot.first_row(int(row)), float(score))
        memories = [snapshot.first_row(row) for row, _ in by_memory]
        order = fuse(memories, words, {document: score for document, (_, score) in best.items()}, fusion)
        fused.append([best[document] for document in order])
    return fused


def read_hits(snapshot: Snapshot, ranked: list[tuple[int, float]]) -> list[dict]:
    """The hits of one question, as `CompressedCorpus.search` gives them."""
    if not ranked:
        return []
    metadata = list(snapshot.manifest.metadata)
    memory = snapshot.decode(np.array([row for row, _ in ranked]), snapshot.manifest.memory_size)
    hits = []
    for (row, score), rows in zip(ranked, memory, strict=True):
        record = snapshot.record(row, ["document_id", "span", "title", "text", *metadata])
        values = {name: record.pop(name) for name in metadata}
        hits.append({**record, "score": score, "memory": rows, "metadata": values})
    return hits
