"""`where`: conditions on the columns of a corpus, as dictionaries.

Stands between a user's filter and the rows that it leaves. It knows nothing of memories or search engines but for
`milvus_expression`, which writes the same conditions in Milvus' language.

    {"year": 2020}                             equal
    {"year": {"$gte": 2000, "$lt": 2010}}      $eq $ne $gt $gte $lt $lte $in $nin
    {"$or": [{"lang": "en"}, {"lang": {"$in": ["de", "fr"]}}]}      $and $or $not
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

try:
    import pyarrow.compute as pc
except ImportError:  # `require_arrow` names the remedy
    pc = None

# operator -> its sign in Milvus, its function in Arrow
COMPARISONS = {
    "$eq": ("==", "equal"),
    "$ne": ("!=", "not_equal"),
    "$gt": (">", "greater"),
    "$gte": (">=", "greater_equal"),
    "$lt": ("<", "less"),
    "$lte": ("<=", "less_equal"),
    "$in": ("in", None),
    "$nin": ("not in", None),
}
JUNCTIONS = ("$and", "$or")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MILVUS_WORDS = {"and", "or", "not", "in", "like", "true", "false", "is", "null", "exists"}


def check_where(where, columns: Sequence[str], name: str = "where") -> None:
    """Raise unless a filter is well formed and names columns of the corpus.

    Raises:
        TypeError, ValueError: naming the part that is not.
    """
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
            for operator, operand in _conditions(value):
                _check_operand(operator, operand, f"{name}[{key!r}]")


def _check_operand(operator: str, operand, name: str) -> None:
    if operator not in COMPARISONS:
        raise ValueError(f"`{name}` must use one of {', '.join(COMPARISONS)}, got {operator!r}. Choose one of them.")
    many = operator in ("$in", "$nin")
    if many and not isinstance(operand, list | tuple):
        raise TypeError(f"`{name}[{operator!r}]` must be a list, got {type(operand).__name__}. Wrap it in [].")
    for value in operand if many else [operand]:
        if not isinstance(value, str | int | float | bool):
            raise TypeError(
                f"`{name}[{operator!r}]` must be text, a number or a bool, got {type(value).__name__}. Compare "
                "with one."
            )


def _conditions(value) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from value.items()
    else:
        yield "$eq", value


def rows_where(table, where: Mapping) -> np.ndarray:
    """(rows,) bool: which rows of an Arrow table meet a checked filter. A missing value meets only $ne and $nin.

    Raises:
        TypeError: a column cannot be compared with a value.
    """
    keep = np.ones(len(table), dtype=bool)
    for key, value in where.items():
        if key == "$and":
            keep &= np.logical_and.reduce([rows_where(table, part) for part in value])
        elif key == "$or":
            keep &= np.logical_or.reduce([rows_where(table, part) for part in value])
        elif key == "$not":
            keep &= ~rows_where(table, value)
        else:
            for operator, operand in _conditions(value):
                keep &= _compare(table[key], operator, operand, key)
    return keep


def _compare(column, operator: str, operand, name: str) -> np.ndarray:
    try:
        if operator in ("$in", "$nin"):
            found = np.zeros(len(column), dtype=bool)
            for value in operand:
                found |= _to_mask(pc.equal(column, value), missing=False)
            return ~found if operator == "$nin" else found
        return _to_mask(getattr(pc, COMPARISONS[operator][1])(column, operand), missing=operator == "$ne")
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's exceptions are of these types
        raise TypeError(
            f"`where[{name!r}]` must be comparable with the column, which is {column.type}, got {operand!r}. Compare "
            "with a value of that type."
        ) from error


def _to_mask(compared, missing: bool) -> np.ndarray:
    return pc.fill_null(compared, missing).to_numpy(zero_copy_only=False) if len(compared) else np.zeros(0, dtype=bool)


def milvus_expression(where: Mapping) -> str | None:
    """A checked filter in the language of Milvus; None where Milvus would not say the same.

    That is: a negation, about which missing values disagree, a column that is no identifier, a number that is not
    finite, and text with control characters.
    """
    parts = []
    for key, value in where.items():
        if key in JUNCTIONS:
            inner = [milvus_expression(part) for part in value]
            if None in inner:
                return None
            parts.append((" and " if key == "$and" else " or ").join(f"({part})" for part in inner))
            continue
        if not IDENTIFIER.fullmatch(key) or key.lower() in MILVUS_WORDS or key.startswith("clara_"):
            return None
        for operator, operand in _conditions(value):
            if operator in ("$ne", "$nin") or not _is_plain(operand):
                return None
            parts.append(f"{key} {COMPARISONS[operator][0]} {json.dumps(operand, ensure_ascii=False)}")
    return " and ".join(f"({part})" for part in parts)


def _is_plain(operand) -> bool:
    """Whether a value is written in Milvus as in JSON."""
    if isinstance(operand, list | tuple):
        return all(map(_is_plain, operand))
    if isinstance(operand, str):
        return operand.isprintable()
    return not isinstance(operand, float) or math.isfinite(operand)
