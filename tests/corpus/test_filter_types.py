"""Filters on columns of every type: what is compared rightly, with text of JSON and with objects of Python.

The definition is Python's own comparison of the values, exact for numbers.
"""

import datetime as dt
import itertools
import operator
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from modeling_clara.search_clara import check_where, rows_where

SIGNS = {"$eq": operator.eq, "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
UTC = dt.UTC
UNITS = ("s", "ms", "us", "ns")
DAYS = [dt.date(1969, 12, 31), None, dt.date(2021, 1, 1), dt.date(2021, 1, 31), dt.date(2200, 5, 6)]
MOMENTS = [
    day and dt.datetime.combine(day, dt.time(second)) for day, second in zip(DAYS, (0, 0, 10, 23, 5), strict=True)
]
CLOCKS = [dt.time(0), None, dt.time(10, 30), dt.time(10, 30, 1), dt.time(23, 59, 59)]
NUMBERS = [-7, None, 0, 2, 100]


def met(array: pa.Array, where) -> list[bool]:
    """As a table of two chunks, the second of them a slice."""
    table = pa.table({"column": pa.chunked_array([array[:2], array[2:]])})
    check_where({"column": where}, ["column"])
    return rows_where(table, {"column": where}).tolist()


def assert_compares(array: pa.Array, values: list, pairs: list) -> None:
    """`pairs` are operands with what they mean, which `values`, those of the array, can be compared with."""
    for (name, sign), (given, means) in itertools.product(SIGNS.items(), pairs):
        expected = [value is not None and sign(value, means) for value in values]
        assert met(array, {name: given}) == expected, (array.type, name, given)
        if name == "$eq":
            assert met(array, {"$in": [given]}) == met(array, given) == expected
            assert met(array, {"$ne": given}) == met(array, {"$nin": [given]}) == [not value for value in expected]


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()], ids=str)
def test_days(kind):
    midnight = [day and dt.datetime.combine(day, dt.time(), UTC) for day in DAYS]
    given = [
        "2021-01-01",
        "20210131",
        "2021-01-01T10:00",
        "1900-01-01T00:00:00Z",
        "9999-12-31",
        "2021-01-01T01:00+02:00",
    ]
    pairs = [(text, dt.datetime.fromisoformat(text)) for text in given]
    pairs += [(day, dt.datetime.combine(day, dt.time())) for day in DAYS if day] + [(MOMENTS[2], MOMENTS[2])]
    pairs = [(one, means if means.tzinfo else means.replace(tzinfo=UTC)) for one, means in pairs]
    assert_compares(pa.array(DAYS, kind), midnight, pairs)


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "+05:30"])
@pytest.mark.parametrize("unit", UNITS)
def test_moments(unit, zone):
    values = [moment and moment.replace(tzinfo=UTC) for moment in MOMENTS]
    array = pa.array(values, pa.timestamp(unit, "UTC")).cast(pa.timestamp(unit, zone))
    given = ["2021-01-31", "2021-01-01 10:00:00", "2021-01-01T11:00:00+01:00", "2021-01-31T23:00:00Z", "9999-01-01"]
    given += ["0001-01-01", "2021-01-01T10:00:00.000001", "1969-12-31T23:59:59.999"]
    pairs = [(text, dt.datetime.fromisoformat(text)) for text in given]
    pairs += [(moment, moment) for moment in MOMENTS if moment] + [(values[3], values[3])]
    pairs += [(DAYS[3], dt.datetime.combine(DAYS[3], dt.time()))]
    assert_compares(
        array, values, [(one, means if means.tzinfo else means.replace(tzinfo=UTC)) for one, means in pairs]
    )


@pytest.mark.parametrize("kind", [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")], ids=str)
def test_clocks(kind):
    given = ["00:00", "10:30", "10:30:01", "10:30:00.5", "23:59:59.999999"]
    pairs = [(text, dt.time.fromisoformat(text)) for text in given] + [(clock, clock) for clock in CLOCKS if clock]
    assert_compares(pa.array(CLOCKS, kind), CLOCKS, pairs)


def test_nanoseconds_are_compared():
    array = pa.array([1609459200123456788, 1609459200123456789], pa.int64()).cast(pa.timestamp("ns"))
    assert met(array, "2021-01-01T00:00:00.123456789") == [False, True]
    assert met(array, {"$lt": "2021-01-01T00:00:00.123456789Z"}) == [True, False]
    assert met(pa.array([5, 6], pa.time64("ns")), {"$gt": "00:00:00.000000005"}) == [False, True]


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FAR = [10**30, -(10**30), 2**63, 2**64 - 1, 300, -300, 1e300, float("inf"), float("-inf"), float("nan"), 10**400]


@pytest.mark.parametrize(
    "kind", [*INTEGERS, pa.decimal128(5, 2), pa.decimal256(60, 30), pa.decimal128(38, 0)], ids=str
)
def test_whole_numbers_and_decimals(kind):
    values = [value if value is None else abs(value) if str(kind)[0] == "u" else value for value in NUMBERS]
    given = [*FAR, 0, 2, 2.0, 2.5, -7, -7.5, Decimal("1.99"), Decimal("2.000"), -0.0]
    assert_compares(pa.array(values, kind), values, [(number, number) for number in given])


def test_a_decimal_is_what_is_written():
    values = [Decimal("0.10"), Decimal("0.30"), None, Decimal("-99.99")]
    pairs = [(0.1, Decimal("0.1")), (0.3, Decimal("0.3")), (0.1 + 0.2, Decimal("0.30000000000000004"))]
    assert_compares(pa.array(values, pa.decimal128(4, 2)), values, [*pairs, (Decimal("-99.99"), Decimal("-99.99"))])


def test_large_integers_are_not_rounded():
    values = [2**53, 2**53 + 1, None, 2**63 - 1]
    assert_compares(
        pa.array(values, pa.int64()), values, [(n, n) for n in (2**53, 2**53 + 1, 2.0**53, 2**63 - 1, 2**63)]
    )


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_floats(kind):
    nan, inf = float("nan"), float("inf")
    stored = pa.array([None if value is None else np.float16(value) for value in (0.5, nan, None, inf, -inf, -3)])
    values = [0.5, nan, None, inf, -inf, -3.0]
    pairs = [(number, number) for number in (0.5, 0, -3, nan, inf, -inf, 10)] + [(Decimal("0.5"), 0.5)]
    assert_compares(stored.cast(kind), values, [*pairs, (10**400, inf), (-(10**400), -inf)])
    assert met(pa.array([np.float16(0.1), np.float16(3)]).cast(pa.float32()), {"$lt": 2}) == [True, False]
    assert met(pa.array([0.1, 3.0], pa.float32()), 0.1) == [True, False]


LISTS = [[1, 5], [], None, [None, 3], [7], [5, 5]]


@pytest.mark.parametrize("make", [pa.list_, pa.large_list], ids=("list", "large_list"))
def test_a_list_meets_what_one_of_its_elements_meets(make):
    array = pa.array(LISTS, make(pa.int32()))
    for (name, sign), number in itertools.product(SIGNS.items(), (0, 1, 3, 4.5, 5, 10**30)):
        expected = [any(value is not None and sign(value, number) for value in row or []) for row in LISTS]
        assert met(array, {name: number}) == expected
        assert name != "$eq" or met(array, {"$ne": number}) == [not value for value in expected]
    assert met(array, {"$in": [3, 7]}) == [False, False, False, True, True, False]
    assert met(array, {"$nin": [3, 7]}) == [True, True, True, False, False, True]
    assert met(array, {"$gt": 1, "$lt": 5}) == [True, False, False, True, False, False]  # each by an element


def test_lists_of_other_kinds():
    assert met(pa.array([["a", "b"], None, [], ["b"]], pa.list_(pa.string())), "b") == [True, False, False, True]
    fixed = pa.array([[1, 2], None, [3, None], [2, 2]], pa.list_(pa.int64(), 2))
    assert met(fixed, 2) == [True, False, False, True] and met(fixed, {"$gt": 2}) == [False, False, True, False]
    nested = pa.array([[["a"], []], None, [["b"], None]])
    assert met(nested, "b") == [False, False, True]
    days = pa.array([[DAYS[0], DAYS[3]], None, []], pa.list_(pa.date32()))
    assert met(days, {"$gte": "2021-01-01"}) == [True, False, False]


def test_other_columns():
    assert met(pa.array(["a", None, "b", "a"]).dictionary_encode(), "a") == [True, False, False, True]
    assert met(pa.nulls(3), 5) == [False] * 3 and met(pa.nulls(3), {"$ne": "x"}) == [True] * 3
    assert met(pa.array(["a", "b", None], pa.large_string()), {"$gte": "b"}) == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "wrong", "example"),
    [
        (pa.date32(), ["yesterday", 5, True, "2021-13-01", dt.time(1)], "'2021-01-31'"),
        (pa.timestamp("ms", "UTC"), ["", 1.5, dt.time(1), "10:30"], "'2021-01-31T10:30:00'"),
        (pa.time64("us"), ["2021-01-01", DAYS[0], MOMENTS[0], 3, "10:30Z"], "'10:30:00'"),
        (pa.int16(), ["5", True, DAYS[0]], "2020"),
        (pa.decimal128(5, 2), ["5", False, CLOCKS[0]], "9.99"),
        (pa.float32(), ["0.5", True, DAYS[0]], "0.5"),
        (pa.bool_(), ["true", 1, 0.0], "True"),
        (pa.string(), [5, float("nan"), True, DAYS[0], "\ud800"], "'en'"),
        (pa.list_(pa.date32()), ["x", 5], "'2021-01-31'"),
        (pa.list_(pa.list_(pa.string())), [5], "'en'"),
        (pa.dictionary(pa.int32(), pa.string()), [5], "'en'"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_named_with_an_example(kind, wrong, example):
    for value, name in itertools.product(wrong, ("$eq", "$lt", "$in", "$nin")):
        with pytest.raises(TypeError) as error:
            met(pa.nulls(3, kind), {name: [value] if "in" in name else value})
        for part in (f"column, which is {kind}", repr(value), type(value).__name__, f"such as {example}."):
            assert part in str(error.value)


@pytest.mark.parametrize("kind", [pa.struct({"a": pa.int32()}), pa.binary(), pa.duration("s")], ids=str)
def test_a_column_that_nothing_compares_with_says_so(kind):
    for value in (5, "x", DAYS[0]):
        with pytest.raises(TypeError, match="Leave it out: no value is comparable"):
            met(pa.nulls(2, kind), value)
