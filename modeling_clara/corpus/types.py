"""Arrow types of metadata: united over all rows of an input before the first one is compressed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..manifest_clara import RESERVED_COLUMNS, pa
from .tables import Cell, cell_type


@dataclass
class Misfits:
    """Values of a column that its type cannot hold: their number, and the first one."""

    place: str
    value: object
    number: int = 0


@dataclass
class ColumnTypes:
    """The types of the columns seen so far.

    Attributes:
        types: by column; null for one without a value.
        misfits: by column, of values that could not be united with those before.
    """

    types: "dict[str, pa.DataType]" = field(default_factory=dict)
    misfits: dict[str, Misfits] = field(default_factory=dict)
    _of_cells: set[str] = field(default_factory=set)  # columns in which text and numbers are both text

    def add(self, rows: Sequence[tuple[str, Mapping]]) -> None:
        """Take (place, metadata) rows into account."""
        columns: dict[str, list[tuple[str, object]]] = {}
        for place, values in rows:
            for name, value in values.items():
                found = columns.setdefault(name, [])
                if value is not None and value != {}:
                    found.append((place, value))
        for name, entries in columns.items():
            self._add_column(name, entries)

    def _add_column(self, name: str, entries: list[tuple[str, object]]) -> None:
        if name not in self.types:
            self.types[name] = pa.null()
            self._of_cells.add(name)
        if not all(isinstance(value, Cell) for _, value in entries):
            self._of_cells.discard(name)
        kind = value_type([value for _, value in entries])
        united = kind and unite(self.types[name], kind)
        if united is None and name in self._of_cells:
            united = pa.string()
        if united is not None:
            self.types[name] = united
            return
        if len(entries) == 1:
            misfits = self.misfits.setdefault(name, Misfits(*entries[0]))
            misfits.number += 1
            return
        for entry in entries:  # some of them do not fit
            self._add_column(name, [entry])

    def add_schema(self, schema: Mapping[str, "pa.DataType"], place: str) -> None:
        """Take the columns of a file with a schema into account; a ValueError if they cannot be united."""
        for name, kind in schema.items():
            self._of_cells.discard(name)
            united = unite(self.types.get(name, pa.null()), kind)
            if united is None:
                raise ValueError(
                    f"the column {name!r} must have one type in all files, but is {kind} in {place} and "
                    f"{self.types[name]} in others. Pass `metadata={{{name!r}: 'string'}}` to keep it as text."
                )
            self.types[name] = united

    def stored(self) -> "dict[str, pa.DataType]":
        """The types that a shard is written with; a column without any value is text."""
        return {name: _stored(kind) for name, kind in self.types.items() if name not in RESERVED_COLUMNS}


def infer_types(documents: Iterable[Mapping]) -> "dict[str, pa.DataType]":
    """Arrow types of the metadata of some documents."""
    columns = ColumnTypes()
    columns.add([("", {n: v for n, v in document.items() if n not in RESERVED_COLUMNS}) for document in documents])
    return columns.stored()


def value_type(values: list) -> "pa.DataType | None":
    """The Arrow type of some values; None if there is no common one."""
    if values and all(isinstance(value, Cell) for value in values):
        return cell_type(values)
    try:
        return pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def unite(first: "pa.DataType", second: "pa.DataType") -> "pa.DataType | None":
    """The type that holds the values of both: of integers and floats a float, of nothing and anything the latter."""
    schemas = [pa.schema([("column", kind)]) for kind in (first, second)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowException, TypeError):
        return None


def _stored(kind: "pa.DataType") -> "pa.DataType":
    """The type itself; text in place of what Parquet has no place for: nothing, and an object without fields."""
    if pa.types.is_null(kind) or (pa.types.is_struct(kind) and not kind.num_fields):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_stored(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_stored(field.type)) for field in kind])
    return kind


def type_from_name(name: str) -> "pa.DataType":
    """An Arrow type by its name: those of `pyarrow.type_for_alias`, `list<...>`, times with a zone and decimals.

    Raises:
        ValueError: there is none.
    """
    aliases = {"str": "string", "int": "int64", "float": "double"}
    if name.startswith("list<") and name.endswith(">"):
        inner = name[5:-1].partition(":")[2].removesuffix(" not null").strip()
        return pa.list_(type_from_name(inner))
    if zoned := re.fullmatch(r"timestamp\[(\w+), tz=(.+)\]", name):
        return pa.timestamp(*zoned.groups())
    if decimal := re.fullmatch(r"decimal128\((\d+), (\d+)\)", name):
        return pa.decimal128(*map(int, decimal.groups()))
    try:
        return pa.type_for_alias(aliases.get(name, name))
    except ValueError as error:
        raise ValueError(f"`metadata` must name Arrow types, got {name!r}. Example: 'int64', 'string'.") from error
