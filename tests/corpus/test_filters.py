"""Filters: what `rows_where` keeps against plain Python, what `check_where` refuses, and the same in Milvus' language.

Tables are random and have missing values; strings are as nasty as a user's.
"""

import json
import operator
import random
import re

import numpy as np
import pyarrow as pa
import pytest

from modeling_clara.corpus.milvus import milvus_expression
from modeling_clara.search_clara import check_where, rows_where

TYPES = {"year": pa.int64(), "rank": pa.int32(), "score": pa.float64(), "lang": pa.string(), "open": pa.bool_()}
COLUMNS = list(TYPES)
NASTY = [
    "",
    "en",
    "EN",
    "de ",
    'a"b',
    "a'b",
    "back\\slash",
    "new\nline",
    "ünï 🎉",
    '" or 1 == 1 or lang == "',
    "%",
    "null",
]
VALUES = {
    "year": [-3, 0, 1999, 2000, 2001, 2**40],
    "rank": [-1, 0, 1, 2, 3],
    "score": [-1.5, 0.0, 0.5, 1.0, 2.25, float("nan"), float("inf")],
    "lang": NASTY,
    "open": [True, False],
}
PYTHON = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$in": lambda value, many: any(value == one for one in many),
    "$nin": lambda value, many: all(value != one for one in many),
}


def random_table(random_: random.Random, rows: int) -> pa.Table:
    """Every column with about a quarter of missing values, in several chunks."""
    columns = {
        name: [None if random_.random() < 0.25 else random_.choice(VALUES[name]) for _ in range(rows)]
        for name in COLUMNS
    }
    table = pa.table({name: pa.array(column, TYPES[name]) for name, column in columns.items()})
    return pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)])


def random_where(random_: random.Random, depth: int) -> dict:
    kind = random_.choice(["columns", "columns", "$and", "$or", "$not"]) if depth else "columns"
    if kind == "$not":
        return {"$not": random_where(random_, depth - 1)}
    if kind != "columns":
        parts = [random_where(random_, depth - 1) for _ in range(random_.randint(1, 3))]
        return {kind: tuple(parts) if random_.random() < 0.3 else parts}
    where = {}
    for name in random_.sample(COLUMNS, random_.randint(1, 2)):
        names = random_.sample(list(PYTHON), random_.randint(1, 2))
        conditions = {
            sign: random_.choices(VALUES[name], k=random_.randint(0, 3))
            if sign in ("$in", "$nin")
            else random_.choice(VALUES[name])
            for sign in names
        }
        where[name] = random_.choice(VALUES[name]) if random_.random() < 0.3 else conditions
    return where


def meets(row: dict, where: dict) -> bool:
    """The definition: a missing value meets only $ne and $nin."""
    for key, value in where.items():
        if key == "$and":
            kept = all(meets(row, part) for part in value)
        elif key == "$or":
            kept = any(meets(row, part) for part in value)
        elif key == "$not":
            kept = not meets(row, value)
        else:
            conditions = value if isinstance(value, dict) else {"$eq": value}
            kept = all(
                sign in ("$ne", "$nin") if row[key] is None else PYTHON[sign](row[key], operand)
                for sign, operand in conditions.items()
            )
        if not kept:
            return False
    return True


def kept(table, where) -> list[bool]:
    check_where(where, table.schema.names)
    mask = rows_where(table, where)
    assert mask.dtype == bool and mask.shape == (len(table),)
    return mask.tolist()


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_filters_keep_what_plain_python_keeps(seed):
    random_ = random.Random(seed)
    table = random_table(random_, 60)
    rows = table.to_pylist()
    for _ in range(60):
        where = random_where(random_, depth=3)
        assert kept(table, where) == [meets(row, where) for row in rows], where
        milvus_expression(where)


@pytest.mark.parametrize("sign", PYTHON)
@pytest.mark.parametrize("name", COLUMNS)
def test_every_operator_on_every_type(sign, name):
    values = VALUES[name]
    table = pa.table({name: pa.array([*values, None], TYPES[name])})
    for operand in [values[:2], values[2:3], []] if sign in ("$in", "$nin") else values:
        where = {name: {sign: operand}}
        assert kept(table, where) == [meets({name: value}, where) for value in [*values, None]], where


def test_a_missing_value_meets_only_ne_nin_and_not():
    table = pa.table({"year": pa.array([None, 2000], pa.int64())})
    for conditions in ({"$eq": 2000}, {"$gte": 0}, {"$lt": 9999}, {"$in": [2000, 1]}):
        assert kept(table, {"year": conditions}) == [False, True]
        assert kept(table, {"$not": {"year": conditions}}) == [True, False]
    for conditions in ({"$ne": 2000}, {"$nin": [2000]}):
        assert kept(table, {"year": conditions}) == [True, False]


def test_several_conditions_are_all_meant():
    table = pa.table({"year": list(range(2000, 2010)), "lang": ["en", "de"] * 5})
    assert kept(table, {"year": {"$gte": 2003, "$lt": 2006}}) == [3 <= n < 6 for n in range(10)]
    assert kept(table, {"year": {"$gte": 2003}, "lang": "de"}) == [n >= 3 and n % 2 == 1 for n in range(10)]
    both = {"$or": [{"year": 2000}, {"year": 2009}], "lang": "en"}
    assert kept(table, both) == [n == 0 for n in range(10)]


def test_junctions_nest():
    table = pa.table({"n": list(range(8))})
    where = {"n": 5}
    for _ in range(20):
        where = {"$not": {"$and": [{"$or": [where]}]}}
    assert kept(table, where) == [n == 5 for n in range(8)]


def test_numbers_compare_across_their_types():
    table = pa.table({"whole": pa.array([1, 2, 3], pa.int16()), "broken": pa.array([1.0, 2.5, 3.0], pa.float32())})
    assert kept(table, {"whole": 2.0}) == [False, True, False]
    assert kept(table, {"whole": {"$gt": 1.5}}) == [False, True, True]
    assert kept(table, {"broken": {"$in": [1, 3]}}) == [True, False, True]
    assert kept(table, {"whole": {"$lt": 2**40}}) == [True, True, True]  # beyond what the column can hold


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_kinds_of_text_compare_like_text(kind):
    table = pa.table({"lang": pa.array(["en", None, "de"]).cast(kind)})
    assert kept(table, {"lang": "en"}) == [True, False, False]
    assert kept(table, {"lang": {"$in": ["de", "fr"]}}) == [False, False, True]
    assert kept(table, {"lang": {"$ne": "en"}}) == [False, True, True]


@pytest.mark.parametrize("where", [{"year": 1}, {"year": {"$nin": [1]}}, {"$not": {"$or": [{"lang": "a"}]}}])
def test_no_rows_are_no_rows(where):
    table = pa.table({name: pa.array([], kind) for name, kind in TYPES.items()})
    assert kept(table, where) == []
    assert rows_where(table.slice(0, 0), where).dtype == np.bool_


def test_a_filter_and_a_table_stay_as_they_are():
    random_ = random.Random(1)
    table, where = random_table(random_, 20), random_where(random_, 3)
    before, rows = json.dumps(where), table.to_pylist()
    kept(table, where)
    milvus_expression(where)
    assert json.dumps(where) == before and str(table.to_pylist()) == str(rows)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ([], TypeError, "`where` must be a dict, got list"),
        ("year > 5", TypeError, "`where` must be a dict, got str"),
        (None, TypeError, "`where` must be a dict, got NoneType"),
        ({}, ValueError, "`where` must have a condition"),
        ({"month": 5}, ValueError, r"columns of the corpus \(year, .*\), got 'month'.*\$and, \$or, \$not"),
        ({"Year": 5}, ValueError, "got 'Year'"),
        ({5: 5}, ValueError, "got 5"),
        ({"$nor": [{"year": 1}]}, ValueError, r"got '\$nor'"),
        ({"$gt": 5}, ValueError, r"got '\$gt'"),
        ({"$and": []}, TypeError, r"`where\['\$and'\]` must be a list of filters"),
        ({"$or": {"year": 1}}, TypeError, r"`where\['\$or'\]` must be a list of filters"),
        ({"$or": "year"}, TypeError, r"`where\['\$or'\]` must be a list of filters"),
        ({"$or": [{"year": 1}, 5]}, TypeError, r"`where\['\$or'\]\[1\]` must be a dict, got int"),
        ({"$and": [{"year": 1}, {}]}, ValueError, r"`where\['\$and'\]\[1\]` must have a condition"),
        ({"$not": [{"year": 1}]}, TypeError, r"`where\['\$not'\]` must be a dict, got list"),
        ({"$not": {}}, ValueError, r"`where\['\$not'\]` must have a condition"),
        ({"$or": [{"$not": {"month": 1}}]}, ValueError, r"`where\['\$or'\]\[0\]\['\$not'\]` must name columns"),
        ({"year": None}, TypeError, r"`where\['year'\]\['\$eq'\]` must be text, a number or a bool, got NoneType"),
        ({"year": [1, 2]}, TypeError, r"`where\['year'\]\['\$eq'\]` .* got list"),
        ({"year": {}}, ValueError, r"`where\['year'\]` must have a condition"),
        ({"year": {"gte": 5}}, ValueError, r"`where\['year'\]` must use one of \$eq, .*got 'gte'"),
        ({"year": {"$not": {"$gt": 5}}}, ValueError, r"got '\$not'"),
        ({"year": {"$gt": 1, "$max": 2}}, ValueError, r"got '\$max'"),
        ({"year": {None: 2}}, ValueError, "got None"),
        ({"year": {"$gt": None}}, TypeError, r"`where\['year'\]\['\$gt'\]` .* got NoneType"),
        ({"year": {"$gt": [1]}}, TypeError, r"`where\['year'\]\['\$gt'\]` .* got list"),
        ({"lang": {"$in": "en"}}, TypeError, r"`where\['lang'\]\['\$in'\]` must be a list, got str"),
        ({"lang": {"$in": b"en"}}, TypeError, r"`where\['lang'\]\['\$in'\]` must be a list, got bytes"),
        ({"lang": {"$nin": {"en"}}}, TypeError, r"`where\['lang'\]\['\$nin'\]` must be a list, got set"),
        ({"lang": {"$in": ["en", None]}}, TypeError, r"`where\['lang'\]\['\$in'\]` .* got NoneType"),
        ({"lang": {"$in": [["en"]]}}, TypeError, r"`where\['lang'\]\['\$in'\]` .* got list"),
        ({"lang": 1j}, TypeError, "got complex"),
    ],
    ids=str,
)
def test_a_malformed_filter_is_an_error_that_names_the_part(where, kind, message):
    with pytest.raises(kind, match=message):
        check_where(where, COLUMNS)


def test_the_name_of_the_argument_can_be_another_one():
    with pytest.raises(TypeError, match="`--where` must be a dict"):
        check_where([], COLUMNS, "--where")


@pytest.mark.parametrize(
    ("where", "column"),
    [
        ({"year": "2000"}, "year"),
        ({"lang": 5}, "lang"),
        ({"lang": {"$in": ["en", 5]}}, "lang"),
        ({"lang": {"$gt": True}}, "lang"),
        ({"open": "true"}, "open"),
        ({"year": {"$nin": ["x"]}}, "year"),
        ({"tags": "a"}, "tags"),
        ({"year": 2**70}, "year"),
        ({"lang": "\ud800"}, "lang"),
        ({"$not": {"$or": [{"lang": {"$lte": 1.5}}]}}, "lang"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("rows", [3, 0])
def test_a_value_of_another_type_is_an_error_that_names_the_column(where, column, rows):
    table = pa.table({name: pa.array([None] * rows, kind) for name, kind in TYPES.items()})
    table = table.append_column("tags", pa.array([["a"]] * rows, pa.list_(pa.string())))
    check_where(where, table.schema.names)
    with pytest.raises(
        TypeError, match=rf"`where\['{column}'\]` must be comparable with the column, which is {table[column].type}"
    ):
        rows_where(table, where)


# --- in Milvus' language ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expression"),
    [
        ({"year": 2000}, "(year == 2000)"),
        ({"year": {"$ne": -5}}, None),
        ({"year": {"$gte": 2000, "$lt": 2010}}, "(year >= 2000) and (year < 2010)"),
        ({"score": {"$gt": 0.5}, "rank": {"$lte": 3}}, "(score > 0.5) and (rank <= 3)"),
        ({"open": True}, "(open == true)"),
        ({"lang": {"$in": ["de", "fr"]}}, '(lang in ["de", "fr"])'),
        ({"lang": {"$nin": ("de",)}}, None),
        ({"rank": {"$in": []}}, "(rank in [])"),
        ({"$not": {"year": 1}}, None),
        ({"$or": [{"year": 1}, {"lang": "a", "rank": 2}]}, '(((year == 1)) or ((lang == "a") and (rank == 2)))'),
        ({"$and": [{"year": 1}, {"$not": {"rank": 2}}]}, None),
        ({"lang": "ünï 🎉"}, '(lang == "ünï 🎉")'),
    ],
    ids=str,
)
def test_a_filter_in_the_language_of_milvus(where, expression):
    check_where(where, COLUMNS)
    assert milvus_expression(where) == expression


@pytest.mark.parametrize(
    "text", [*NASTY, '\\" or 1 == 1 or lang == \\"', "\\", '\\\\"', "a\tb\r", "{x}", '")'], ids=ascii
)
def test_text_cannot_end_its_quotes(text):
    for where in ({"lang": text}, {"lang": {"$in": [text, "en"]}}):
        expression = milvus_expression(where)
        if not text.isprintable():
            assert expression is None
            continue
        strings = re.findall(r'"(?:[^"\\]|\\.)*"', expression)
        assert [json.loads(string) for string in strings] == [text, "en"][: len(strings)]
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
        assert outside in ("(lang == )", "(lang in [, ])")


@pytest.mark.parametrize("text", ["nul\0", "bell\7", "escape\x1b[0m"], ids=ascii)
def test_control_characters_are_not_said_to_milvus(text):
    assert milvus_expression({"lang": text}) is None and milvus_expression({"lang": {"$in": ["a", text]}}) is None


@pytest.mark.parametrize("column", ["first author", "in", "not", "like", "a-b", "2nd", 'q"', "year > 0) or (year"])
def test_a_column_that_is_no_identifier_is_not_said_to_milvus(column):
    check_where({column: 5}, [column])
    assert milvus_expression({column: 5}) is None
    assert milvus_expression({"$or": [{"year": 1}, {column: 5}]}) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_milvus_cannot_write_do_not_become_names(number):
    try:
        check_where({"score": number}, COLUMNS)
    except (TypeError, ValueError) as error:
        assert "score" in str(error)
    else:
        assert milvus_expression({"score": number}) is None
