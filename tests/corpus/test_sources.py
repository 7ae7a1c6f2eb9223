"""Where documents come from: rows, places and problems of every kind of input, and the types of their metadata.

Files are written as users have them: nested, half copied, in the wrong encoding, zipped.
"""

import datetime as dt
import decimal
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

from modeling_clara.corpus import sources
from modeling_clara.corpus.formats import format_of
from modeling_clara.corpus.sources import DocumentSource
from modeling_clara.corpus.types import infer_types, type_from_name

ROWS = [
    {"id": "a", "title": "A", "text": "Alpha.", "year": 2001},
    {"id": "b", "title": None, "text": "Beta.", "year": None},
    {"id": "c", "title": "", "text": "Gamma.\nDelta.", "year": 2003},
]


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(path: Path, columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.Table.from_pylist(columns), path)
    return path


def good(source) -> list[dict]:
    return [row.document for row in source if row.document is not None]


def without_ids(documents: list[dict]) -> list[dict]:
    return [{name: value for name, value in document.items() if name != "id"} for document in documents]


def problems(source) -> dict[str, str]:
    found = {row.place: row.problem for row in source if row.document is None}
    assert all(place in problem for place, problem in found.items())
    return found


FILES = {
    "rows.jsonl": lines(*ROWS),
    "rows.ndjson": lines(*ROWS),
    "ROWS.JSONL": lines(*ROWS),
    os.fsdecode(b"caf\xe9.jsonl"): lines(*ROWS),
    "crlf.jsonl": lines(*ROWS).replace(b"\n", b"\r\n"),
    "no last newline.jsonl": lines(*ROWS).rstrip(b"\n"),
    "byte order mark.jsonl": b"\xef\xbb\xbf" + lines(*ROWS),
    "rows.jsonl.gz": gzip.compress(lines(*ROWS)),
    "two members.jsonl.gz": gzip.compress(lines(ROWS[0])) + gzip.compress(lines(*ROWS[1:])),
}
INPUTS = {
    **{name: lambda path, name=name: write(path / name, FILES[name]) for name in FILES},
    "list": lambda path: ROWS,
    "tuple": lambda path: tuple(ROWS),
    "generator": lambda path: (row for row in ROWS),
    "parquet": lambda path: parquet(path / "rows.parquet", ROWS),
    "PARQUET": lambda path: parquet(path / "ROWS.PARQUET", ROWS),
    "path as text": lambda path: str(parquet(path / "rows.parquet", ROWS)),
    "folder": lambda path: (
        parquet(path / "in/0.parquet", ROWS[:2]) and parquet(path / "in/deep/1.parquet", ROWS[2:]).parents[1]
    ),
    "Dataset": lambda path: Dataset.from_list(ROWS),
    "IterableDataset": lambda path: Dataset.from_list(ROWS).to_iterable_dataset(),
    "IterableDataset without features": lambda path: IterableDataset.from_generator(lambda: iter(ROWS)),
}


@pytest.mark.parametrize("kind", INPUTS, ids=ascii)
def test_every_kind_of_input_gives_the_same_documents(kind, tmp_path):
    source = DocumentSource(INPUTS[kind](tmp_path))
    rows = list(source)
    assert [row.document for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1, 2] and all(row.problem is None for row in rows)
    assert len({row.place for row in rows}) == 3 and source.length in (None, 3)
    assert kind == "generator" or list(source) == rows
    description = DocumentSource(INPUTS[kind](tmp_path)).description
    assert source.description == description == json.loads(json.dumps(description))


def test_another_input_is_described_otherwise(tmp_path):
    def description(rows, name="rows.jsonl") -> dict:
        return DocumentSource(write(tmp_path / "in" / name, lines(*rows)).parent).description

    first = description(ROWS)
    longer, more = description([*ROWS, {"text": "x"}]), description(ROWS, "more.jsonl")
    assert first != longer != more != first
    assert DocumentSource(ROWS).description != DocumentSource(ROWS[:2]).description
    assert DocumentSource(ROWS).description != DocumentSource(iter(ROWS)).description


def test_a_folder_names_documents_by_their_path_and_accounts_for_every_file(tmp_path):
    texts = {"b.txt": "Zwölf.\n", "a_first note.md": "One.", "deep/er/C.TXT": "Three.", "broken.pdf": "%PDF"}
    texts |= {"sub/latin.txt": "Düsseldorf".encode("latin-1"), "empty.txt": "", "blank.md": " \n\t\n"}
    texts |= {".git/config": "[core]", ".ipynb_checkpoints/b-checkpoint.md": "old", "program.exe": "MZ"}
    for name, text in {**texts, "utf16.txt": "text".encode("utf-16"), "d.jsonl": lines({"text": "row"})}.items():
        write(tmp_path / name, text if isinstance(text, bytes) else text.encode())
    source = DocumentSource(tmp_path)
    named = {"a_first note.md": "One.", "b.txt": "Zwölf.\n", "deep/er/C.TXT": "Three."}
    named |= {"sub/latin.txt": "Düsseldorf", "utf16.txt": "text"}
    titles = ["a first note", "b", "C", "latin", "utf16"]
    documents = [
        {"id": name, "title": title, "text": text, "path": name}
        for (name, text), title in zip(named.items(), titles, strict=True)
    ]
    assert [document for document in good(source) if "path" in document] == documents
    assert {"id": "d.jsonl:1", "text": "row"} in good(source)
    assert good(DocumentSource(tmp_path / "b.txt")) == documents[1:2]
    statuses = {row.place: row.status for row in source if row.document is None}
    assert statuses == {
        **{".git/": "skipped", ".ipynb_checkpoints/": "skipped", "program.exe": "unsupported"},
        **{"broken.pdf": "failed", "empty.txt": "empty", "blank.md": "empty"},
    }
    assert problems(source)["empty.txt"] == "`empty.txt` is empty." and ".pdf" in problems(source)["broken.pdf"]
    assert [row.index for row in source] == [*range(12)]
    assert {row.file for row in source} == {file.name for file in source.files}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_bad_line_is_a_problem_with_its_file_and_number(tmp_path, name):
    bad = {
        b"[1, 2]": "list",
        b"5": "int",
        b"NaN": "float",
        b"9" * 5000: "JSON",
        b"\0": "JSON",
        b"null": "null",
        b"not json": "JSON",
        b'{"text": "cut': "JSON",
        b'{"text": "\xff"}': "UTF-8",
        b'{"text": ""}': "empty",
        b'{"text": " \\n"}': "empty",
        b'{"text": null}': "NoneType",
        b'{"text": ["a"]}': "list",
        b'{"body": "a"}': "'text'",
        b'{"text": "a", "title": 5}': "title",
        b"[" * 50_000: "JSON",
        b"{": "must be JSON in UTF-8",
    }
    content = lines({"text": "first"}, b" ", *bad, b'"a bare text"', b'{"text": "a", "text": "last"}')
    source = DocumentSource(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content))
    assert without_ids(good(source)) == [{"text": "first"}, {"text": "a bare text"}, {"text": "last"}]
    assert [document["id"] for document in good(source)] == [row.place for row in source if row.document]
    found = problems(source)
    assert list(found) == [f"{name}:{number}" for number in range(3, 3 + len(bad))]
    for reason, expected in zip(found.values(), bad.values(), strict=True):
        assert expected in reason
    assert [row.index for row in source] == list(range(len(bad) + 3))
    for empty in (b"", gzip.compress(b"")):
        path = write(tmp_path / f"empty.jsonl{'.gz' if empty else ''}", empty)
        assert [row.status for row in DocumentSource(path)] == ["empty"]


def test_a_bad_entry_of_a_list_is_a_problem_with_its_number():
    bad = [None, 5, b"text", ["text"], {}, {"text": 5}, {"text": ""}, {"title": "x"}, {"text": "x", "title": b"y"}]
    bad += [{"text": "a", 5: "five"}, {"text": "b", None: 1}]  # columns that could be neither stored nor hashed
    source = DocumentSource(["first", *bad, {"text": "last"}])
    assert list(DocumentSource([])) == list(DocumentSource(iter([]))) == []
    assert list(problems(source)) == [f"documents[{number}]" for number in range(1, 1 + len(bad))]
    assert good(source) == [{"text": "first"}, {"text": "last"}]


@pytest.mark.parametrize("kind", ["text", "date"])
def test_a_parquet_value_that_cannot_be_read_is_one_problem(kind, tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    when = pa.array([0, 2**62, 0], pa.timestamp("us"))  # far beyond the year 9999
    table = pa.table({"text": broken} if kind == "text" else {"text": ["a", "x", "b"], "when": when})
    source = DocumentSource(parquet(tmp_path / "rows.parquet", table))
    assert [document["text"] for document in good(source)] == ["a", "b"]
    assert list(problems(source)) == ["rows.parquet[1]"]


def damaged() -> dict[str, bytes]:
    """What half a download, a bad disk and a wrong name leave."""
    zipped = gzip.compress(lines(*({"text": f"text {number} " * 20} for number in range(3000))))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(5000)]}), buffer)
    rows = buffer.getvalue().to_pybytes()
    return {
        "cut.jsonl.gz": zipped[: len(zipped) // 2],
        "flipped.jsonl.gz": zipped[:5000] + bytes(50) + zipped[5050:],
        "plain.jsonl.gz": b"not gzip at all",
        "cut.parquet": rows[:-100],
        "empty.parquet": b"",
        "text.parquet": b"not parquet at all",
        "holed.parquet": rows[:50] + bytes(1950) + rows[2000:],
    }


@pytest.mark.parametrize(("name", "content"), damaged().items(), ids=list(damaged()))
def test_a_damaged_file_is_an_error_that_names_it_and_in_a_folder_one_problem(name, content, tmp_path):
    taken, path = [], write(tmp_path / "in" / name, content)
    parquet(tmp_path / "in" / "a.parquet", ROWS)
    found = problems(DocumentSource(path.parent))
    assert [*found] == [name] and len(good(DocumentSource(path.parent))) >= 3
    if content:
        with pytest.raises(ValueError, match=re.escape(name)):
            taken.extend(DocumentSource(path))
    if name == "cut.jsonl.gz":  # the rows before the cut are not lost
        assert len(taken) > 100 and taken[0].document["text"] == "text 0 " * 20
        assert f"after {len(taken)} parts" in found[name]


@pytest.mark.parametrize("order", [1, -1])
def test_named_columns_win_over_columns_of_our_names(order):
    row = {"body": "B", "text": "T", "name": "N", "title": "X", "url": "U", "id": "I"}
    columns = {"text_column": "body", "title_column": "name", "id_column": "url"}
    (document,) = good(DocumentSource([dict([*row.items()][::order])], **columns))
    assert [document[name] for name in ("text", "title", "id")] == ["B", "N", "U"]


def test_columns_are_renamed_and_the_others_and_the_rows_that_were_given_stay():
    rows = [{"body": "B", "name": "N", "url": 7, "document_id": 3}]
    source = DocumentSource(rows, text_column="body", title_column="name")
    assert good(source) == [{"text": "B", "title": "N", "url": 7, "id": 3}]
    assert rows == [{"body": "B", "name": "N", "url": 7, "document_id": 3}]
    source = DocumentSource([{"text": "B", "url": 7}, {"text": "C"}], id_column="url")
    assert good(source) == [{"text": "B", "id": 7}, {"text": "C"}]


def test_an_id_is_called_id_or_document_id():
    rows = [{"id": 1}, {"document_id": 2}, {"id": 1, "document_id": 2}, {"id": None, "document_id": 2}]
    found = good(DocumentSource([{"text": "a", **row} for row in rows]))
    assert found == [{"text": "a", "id": document_id} for document_id in (1, 2, 1, 2)]


def test_a_schema_tells_the_types(tmp_path):
    columns = {"year": pa.array([1], pa.int16()), "tags": [["x"]], "none": pa.nulls(1, pa.float32())}
    table = pa.table({"body": ["a"], "url": ["u"], **columns, "n_tokens": [5], "memory": [b""]})
    source = DocumentSource(parquet(tmp_path / "a.parquet", table), text_column="body", id_column="url")
    types = source.scan().stored()
    assert list(types) == ["year", "tags", "none"]
    assert types["year"] == pa.int16() and types["none"] == pa.float32() and types["tags"].value_type == pa.string()
    features = Features({"text": Value("string"), "year": Value("int32"), "lang": Value("large_string")})
    dataset = Dataset.from_dict({"text": ["a"], "year": [1], "lang": [None]}, features=features)
    expected = {"year": pa.int32(), "lang": pa.large_string()}
    assert DocumentSource(dataset).scan().stored() == expected
    assert DocumentSource(dataset.to_iterable_dataset()).scan().stored() == expected
    for untold in (ROWS, iter(ROWS), write(tmp_path / "a.jsonl", lines(*ROWS))):
        assert DocumentSource(untold).scan().stored() == {"year": pa.int64()}


TEXT, TEXTS = pa.string(), pa.list_(pa.string())
INFERRED = {
    pa.int64(): [[1, 2], [1, None], [1, "a"], [1, "\ud800"]],
    pa.float64(): [[1, 2.5]],
    pa.bool_(): [[True, False], [True, 1]],
    TEXT: [["a", None], [None, None], ["a", 1], [2**70], [["a", 1]], [1j], ["\ud800"], ["a", "\ud800"]],
    TEXTS: [[[], ["a"]], [[]], [[None]]],
    pa.struct({"a": pa.int64()}): [[{"a": 1}]],
    pa.date32(): [[dt.date(2020, 1, 1)]],
    pa.timestamp("us"): [[dt.datetime(2020, 1, 1)]],
    pa.timestamp("us", "UTC"): [[dt.datetime(2020, 1, 1, tzinfo=dt.UTC)]],
    pa.decimal128(3, 2): [[decimal.Decimal("1.25")]],
    pa.binary(): [[b"x"]],
}


@pytest.mark.parametrize(
    ("values", "kind"), [(values, kind) for kind, columns in INFERRED.items() for values in columns], ids=ascii
)
def test_values_tell_the_types(values, kind):
    assert infer_types([{"text": "a", "id": 1, "m": value} for value in values]) == {"m": kind}


@pytest.mark.parametrize("value", [[], {}, {"a": {}}, {"a": None}, [[]], [{}], None, {"a": [{}]}], ids=str)
def test_inferred_types_can_be_written_to_parquet(value, tmp_path):
    (kind,) = infer_types([{"text": "a", "m": value}]).values()
    pq.write_table(pa.table({"m": pa.array([None], kind)}), tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet")["m"].to_pylist() == [None]


@pytest.mark.parametrize("kind", [kind for kind in INFERRED if not pa.types.is_struct(kind)], ids=str)
def test_a_type_comes_back_from_its_name(kind):
    assert type_from_name(str(kind)) == kind


def test_types_have_names_that_users_know():
    assert [type_from_name(name) for name in ("str", "int", "float")] == [pa.string(), pa.int64(), pa.float64()]
    assert type_from_name("list<element: string not null>").value_type == pa.string()
    for name in ("", "text", "list<", "list<>", "list<item: nonsense>", "INT"):
        with pytest.raises(ValueError, match="Arrow types"):
            type_from_name(name)


@pytest.mark.parametrize("value", [5, None, b"text", {"text": "a"}, DatasetDict(train=Dataset.from_list(ROWS)), 1.5])
def test_what_is_no_list_is_a_type_error(value):
    message = rf"`documents` must be a path, a data set or a list, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        DocumentSource(value)


def test_a_path_that_leads_nowhere_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "here" / "stray.txt", b"not meant").parent)
    for missing in ("", "missing.jsonl", "/missing/folder", "x" * 5000, "A text."):
        with pytest.raises((FileNotFoundError, ValueError), match="`documents`"):
            DocumentSource(missing)


def test_files_of_other_kinds_alone_are_an_error_that_lists_ours(tmp_path):
    for documents in (write(tmp_path / "in" / "program.exe", b"MZ"), tmp_path / "in"):
        with pytest.raises(ValueError, match=r"`documents` must be .*\.pdf.*got program\.exe in .*Convert them"):
            DocumentSource(documents)


# --- types over all files --------------------------------------------------------------------------------------------


def test_types_are_united_over_files_before_the_first_row(tmp_path):
    parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "year": pa.nulls(1), "size": pa.array([1], pa.int32())}))
    parquet(tmp_path / "b.parquet", pa.table({"text": ["b"], "year": [2020], "size": [1.5], "more": ["x"]}))
    write(
        tmp_path / "c.jsonl", lines({"text": "c", "size": 2, "tags": []}, {"text": "d", "tags": ["t"], "flag": True})
    )
    write(tmp_path / "d.csv", b"text,year,day,code,flag\nd,1999,2020-02-01,007,true\ne,,2021-03-04,11,\n")
    types = DocumentSource(tmp_path).scan().stored()
    assert {name: str(kind) for name, kind in types.items() if name != "tags"} == {
        **{"year": "int64", "size": "double", "more": "string", "flag": "bool", "day": "date32[day]"},
        **{"code": "string", "path": "string", "page": "int32", "section": "string", "sheet": "string"},
    }
    assert types["tags"].value_type == pa.string()


def test_schemas_that_cannot_be_united_are_an_error_and_values_are_counted(tmp_path):
    parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "year": [1]}))
    parquet(tmp_path / "b.parquet", pa.table({"text": ["b"], "year": ["old"]}))
    source = DocumentSource(tmp_path)
    with pytest.raises(ValueError, match=r"'year' must have one type .* string in b\.parquet and int64"):
        source.scan()
    assert "year" not in source.scan({"year"}).types
    write(tmp_path / "rows.jsonl", lines(*({"text": "a", "n": n if n % 10 else "none"} for n in range(1, 41))))
    columns = DocumentSource(tmp_path / "rows.jsonl").scan()
    assert columns.types["n"] == pa.int64() and columns.misfits["n"].number == 4
    assert columns.misfits["n"].place == "rows.jsonl:10" and columns.misfits["n"].value == "none"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_two_columns_of_one_name_are_refused(name, tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    content = b"text,text\na,b\n" if name.endswith("csv") else None
    path = parquet(tmp_path / name, table) if content is None else write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}.*different names, got 'text' twice"):
        list(DocumentSource(path))


def test_the_size_of_an_input_is_counted_once_and_not_for_every_document(tmp_path, monkeypatch):
    for number in range(20):
        write(tmp_path / f"{number}.pdf.txt", b"text")
    source, calls = DocumentSource(tmp_path), []
    monkeypatch.setattr(sources, "format_of", lambda file: calls.append(file.name) or format_of(file))
    shares = [source.share() for _ in source]
    assert shares[-1] == 20 and source.n_bytes == 80
    assert len(calls) <= 2 * len(source.files)  # where a file ends, and for the sum
