"""Sources into one data set: shares of a mixture, the cache of a run, and which documents there are.

Mixtures are counted by hand; files are written to disk and read through `load_records`.
"""

import os

import pytest
from datasets import Dataset
from test_data import GOOD, load, plain, write
from tiny import build_tokenizer
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaProcessor
from recipes.training.data import document_key
from recipes.training.mixtures import distinct_documents, mix


def parts_of(*sizes: int) -> list[Dataset]:
    return [Dataset.from_dict({"row": [f"{part}.{row}" for row in range(n)]}) for part, n in enumerate(sizes)]


@pytest.mark.parametrize(
    "sizes, fractions, kept",
    [
        ((30, 10, 100), (0.5, 0.25, 0.25), (20, 10, 10)),
        ((30, 10, 100), (2, 1, 1), (20, 10, 10)),
        ((7, 7), (1, 1), (7, 7)),
        ((3, 100), (0.9, 0.1), (3, 1)),  # a third of a row is still a row
        ((9,), (0.3,), (9,)),
        ((2, 1), (None, None), (2, 1)),
    ],
)
def test_fractions_are_shares_of_the_largest_mixture_without_repeats(sizes, fractions, kept):
    parts = parts_of(*sizes)
    rows = mix(parts, fractions, seed=0)["row"]
    assert [sum(row.startswith(f"{part}.") for row in rows) for part in range(len(sizes))] == list(kept)
    every = [row for part in parts for row in part["row"]]
    assert [row for row in every if row in set(rows)] == list(rows)  # each once, in order
    assert mix(parts, fractions, seed=0)["row"] == rows
    assert (mix(parts, fractions, seed=1)["row"] != rows) == (len(rows) < len(every))


@pytest.mark.parametrize("fractions", [(0.5, None), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_fractions_are_given_for_all_sources_and_positive(fractions):
    with pytest.raises(ValueError, match=r"`fraction` must be > 0 in all `datasets` or given in none, got \["):
        mix(parts_of(2, 2), fractions, 0)


def test_sources_are_mixed_by_their_fractions(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", [{**GOOD, "question": f"{n}.{i}"} for i in range(n)]) for n in (4, 8)]
    questions = load(tmp_path, [DatasetConfig(path=str(path), fraction=0.5) for path in paths])["questions"]
    assert [question[0][0] for question in questions] == ["4"] * 4 + ["8"] * 4
    assert len(load(tmp_path, paths)) == 12


def test_a_second_call_reads_the_cache_and_a_change_of_file_or_settings_does_not(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD])
    first, second = load(tmp_path, path), load(tmp_path, path)
    assert list(first) == list(second) and first.cache_files == second.cache_files
    write(path, [{**GOOD, "answer": "y"}, GOOD])  # of the same size
    os.utime(path, ns=(1, 1))
    assert load(tmp_path, path)["answers"] == [["y"], ["x"]]
    assert load(tmp_path, path, "joint", num_candidates=1)[0]["documents"] == [plain("a")]
    wordy = CLaRaProcessor(build_tokenizer(), document_max_length=32, document_overlap=4, system_prompt="x" * 90)
    assert load(tmp_path, path, processor=wordy)["length"][0] > first["length"][0]


def test_a_changed_file_in_a_folder_is_read_again(tmp_path):
    (tmp_path / "folder").mkdir()
    for answer in "xyz":
        write(tmp_path / "folder" / "train.jsonl", [{**GOOD, "answer": answer * 3}])
        assert load(tmp_path, tmp_path / "folder")["answers"] == [[answer * 3]]


def test_documents_are_told_apart_by_title_and_text(tmp_path):
    rows = [{**GOOD, "docs": ["a", "T\na", "b"]}, {**GOOD, "docs": ["b", plain("a", "U"), "a"]}]
    dataset = load(tmp_path, rows)
    found = distinct_documents([dataset, dataset])
    assert list(found.values()) == [plain("a"), plain("a", "T"), plain("b"), plain("a", "U")]
    assert list(found) == [document_key(document) for document in found.values()]
    assert document_key({"title": "T", "text": "a", "id": 5}) == document_key(plain("a", "T"))
    assert document_key(plain("ab")) != document_key(plain("b", "a"))


@pytest.mark.parametrize("name", ["rows[12].parquet", "rows*.parquet", "rows?.parquet", "rows[12].jsonl"])
def test_a_file_whose_name_looks_like_a_pattern_is_read_itself(tmp_path, name):
    """Beside it is a file that the pattern would match."""
    path = write(tmp_path / name, [{**GOOD, "question": "named"}])
    write(tmp_path / f"rows1{path.suffix}", [{**GOOD, "question": "other"}])
    (record,) = load(tmp_path, path)
    assert record["questions"] == ["named"] and record["source"] == f"{path}:1"
    builder = "parquet" if path.suffix == ".parquet" else "json"
    (record,) = load(tmp_path, DatasetConfig(path=builder, data_files=str(path)))
    assert record["questions"] == ["named"]


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    for name in ("rows[12]", "rows1"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [{**GOOD, "question": name}])
    with pytest.raises(ValueError, match=r"`path` must not have the characters .*rows\[12\]\. Rename the folder"):
        load(tmp_path, tmp_path / "rows[12]")
    (record,) = load(tmp_path, tmp_path / "rows[12]" / "train.jsonl")
    assert record["questions"] == ["rows[12]"]
