"""Rows of all three stages: read by the stages they are for, with the right gold documents and nothing ambiguous."""

import json
from collections import Counter

import pytest
from rule_teacher import RuleTeacher, documents, run
from tiny import build_tokenizer
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaProcessor, CompressedCorpus
from modeling_clara.corpus.storage import append_lines
from modeling_clara.synthesis import instruct, retrieval, scp
from modeling_clara.synthesis.checks import stands_in
from modeling_clara.synthesis.distractors import Bm25Search, MemorySearch
from modeling_clara.synthesis.documents import DOCUMENTS_FILE, Lines
from recipes.evaluation.questions import read_data
from recipes.training.mixtures import load_records
from recipes.training.records import RecordReader

ROWS = documents(10)
SEARCH = Bm25Search(ROWS)
PROCESSOR = CLaRaProcessor(build_tokenizer(), document_max_length=256, document_overlap=4)


def read(folder, rows: list[dict], stage: str, **settings):
    """The records of a stage."""
    path = folder / f"{stage}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = RecordReader(PROCESSOR, stage, **{"window": 4000, "memory_size": 4, "top_k": 2, **settings})
    return load_records([DatasetConfig(path=str(path))], reader, 0, folder / f"run-{stage}")


def outcomes(task, teacher=None, rows=ROWS, **settings) -> list:
    teacher = teacher or RuleTeacher()
    return [run(task.synthesize, row, teacher, task.Settings(**settings), search=SEARCH) for row in rows]


def test_rows_of_stage_1_are_read_by_pretrain(tmp_path):
    rows = [run(scp.synthesize, row, RuleTeacher(wrong_every=3), scp.Settings()).record for row in ROWS]
    records = read(tmp_path, rows, "pretrain", targets_per_document=99)
    assert len(records) == len(ROWS)
    for record, row in zip(records, rows, strict=True):
        assert record["documents"] == [{"title": row["title"], "text": row["text"]}]
        asked = [(pair["question"], pair["answers"][0]) for pair in row["qas"]]
        expected = asked + ([(None, row["paraphrase"])] if row["paraphrase"] else [])
        assert list(zip(record["questions"], record["answers"], strict=True)) == expected


def test_rows_of_stage_2_are_read_by_instruct_text_and_joint(tmp_path):
    found = outcomes(instruct, documents=4, unanswerable=0.0)
    rows = [outcome.record for outcome in found if outcome.record]
    assert len(rows) == len(ROWS) and {len(row["pos_index"]) for row in rows} == {1, 2}
    by_id = {row["id"]: row for row in ROWS}
    for row in rows:
        assert len(row["docs"]) == 4 == len({document["id"] for document in row["docs"]})
        assert by_id[row["id"]]["text"] in [row["docs"][place]["text"] for place in row["pos_index"]]
    for stage in ("instruct", "text", "joint"):
        records = read(tmp_path, rows, stage)
        assert [record["answers"] for record in records] == [row["answers"] for row in rows]
        assert [record["positives"] for record in records] == [row["pos_index"] for row in rows]


def test_some_rows_of_stage_2_have_no_answer(tmp_path):
    rows = [outcome.record for outcome in outcomes(instruct, unanswerable=0.5, gold=1) if outcome.record]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds.total() == len(ROWS) and 2 <= kinds["unanswerable"] <= 8
    for row in rows:
        own = row["id"] in [document["id"] for document in row["docs"]]
        assert own == (row["kind"] == "instruct") == bool(row["pos_index"])
        assert (row["answers"] == [instruct.NO_ANSWER]) == (row["kind"] == "unanswerable")
    assert len(read(tmp_path, rows, "instruct")) == len(rows)
    again = [outcome.record for outcome in outcomes(instruct, unanswerable=0.5, gold=1) if outcome.record]
    assert again == rows


def test_an_unanswerable_question_that_others_answer_is_rejected():
    twin = {"id": "twin", "title": "Tarn again", "span": 0, "text": ROWS[0]["text"] + " It rains."}
    search = Bm25Search([*ROWS, twin])
    outcome = run(
        instruct.synthesize, ROWS[0], RuleTeacher(), instruct.Settings(unanswerable=1.0, gold=1), search=search
    )
    assert outcome.record is None
    reasons = [reject["reason"] for reject in outcome.rejects if reject["kind"] == "unanswerable"]
    assert reasons == ["answerable: the teacher finds an answer in other documents"] * 3


def test_rows_of_stage_3_are_read_by_joint_contrastive_and_the_evaluation(tmp_path):
    rows = [outcome.record for outcome in outcomes(retrieval, candidates=6) if outcome.record]
    assert len(rows) == len(ROWS)
    for row in rows:
        (gold,) = row["pos_index"]
        assert row["docs"][gold]["id"] == row["id"] and 2 <= len(row["docs"]) <= 6
        others = [document for place, document in enumerate(row["docs"]) if place != gold]
        assert not any(stands_in(document["text"], row["answers"][0]) for document in others)
    for stage in ("joint", "contrastive"):
        records = read(tmp_path, rows, stage)
        assert [record["positives"] for record in records] == [row["pos_index"] for row in rows]
    data = read_data(str(tmp_path / "joint.jsonl"))
    assert [question.id for question in data.questions] == [row["id"] for row in rows]
    assert [question.answers for question in data.questions] == [tuple(row["answers"]) for row in rows]


@pytest.mark.parametrize(("task", "kind"), [(instruct, "instruct"), (retrieval, "retrieval")])
def test_what_fails_is_kept_with_its_reason(task, kind):
    settings = {"unanswerable": 0.0} if task is instruct else {}
    mute = RuleTeacher(dict.fromkeys(range(99), "broken"))
    (outcome,) = outcomes(task, mute, ROWS[:1], attempts=2, **settings)
    assert outcome.record is None and [reject["kind"] for reject in outcome.rejects] == [kind, kind, "document"]
    alone = Bm25Search(ROWS[:1])
    settings = task.Settings(**settings | ({"gold": 1} if task is instruct else {}))
    outcome = run(task.synthesize, ROWS[0], RuleTeacher(), settings, search=alone)
    if task is retrieval:
        assert outcome.record is None and outcome.rejects[0]["reason"].startswith("no other documents")
    else:
        assert [document["id"] for document in outcome.record["docs"]] == ["doc-0"]


def test_bm25_finds_what_looks_alike_and_fills_up():
    found = SEARCH("When was the tower of Selby built?", 4)
    assert found[0]["title"] == "Selby" and len({document["id"] for document in found}) == 4
    fills = {tuple(document["id"] for document in SEARCH(f"zzz{number}", 3)) for number in range(9)}
    assert len(fills) > 3 and SEARCH("zzz1", 99) == SEARCH("zzz1", 10)
    with pytest.raises(ValueError, match="`documents` must have at least one document"):
        Bm25Search([])


def test_chunks_on_disk_are_found_like_those_in_memory(tmp_path):
    chunks = [{**row, "title": row["title"] + " \N{SNOWMAN}", "page": 3} for row in ROWS]
    append_lines(tmp_path / DOCUMENTS_FILE, chunks)
    (tmp_path / "bm25").mkdir()  # of a run that was killed while it wrote the index
    (tmp_path / "bm25" / "data.csc.index.npy").write_bytes(b"half")
    lines = Lines(tmp_path)
    assert [lines[number] for number in (2, 0, 1)] == [chunks[number] for number in (2, 0, 1)]
    with pytest.raises(IndexError):
        lines[len(chunks)]
    for search in (Bm25Search(lines, tmp_path / "bm25"), Bm25Search(Lines(tmp_path), tmp_path / "bm25")):
        for question in ("When was the tower of Selby built?", "zzz1"):
            assert search(question, 4) == Bm25Search(chunks)(question, 4)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / DOCUMENTS_FILE).touch()
    assert len(Lines(tmp_path / "none")) == len(Lines(tmp_path / "nowhere")) == 0


def test_a_model_searches_its_own_corpus(shared_model, tmp_path):
    rows = [{"id": row["id"], "title": row["title"], "text": row["text"].split(".")[0]} for row in ROWS]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "corpus")
    found = MemorySearch(shared_model, corpus)("tower", 3)
    (expected,) = shared_model.retrieve(["tower"], corpus=corpus, top_k=3)
    assert [document["id"] for document in found] == [source.document_id for source in expected]
    assert all(document["text"] for document in found)
