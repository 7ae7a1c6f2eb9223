"""Questions in scripts without spaces: BM25 chooses their candidates, and says so if it cannot."""

import json

import pytest
from scripts import CHINESE, make_passages

from recipes.evaluation.cli import main


@pytest.mark.parametrize("find", [True, False], ids=("found", "of other words"))
def test_chinese_questions_have_their_gold_passage_among_the_candidates(checkpoint, tmp_path, caplog, find):
    texts, questions = make_passages(CHINESE, 100, 20)
    rows = [{"title": "", "text": text, "qas": []} for text in texts]
    for question, gold in questions:
        rows[gold]["qas"].append({"question": question if find else "ψξ?", "answers": ["x"]})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options = ["--setting", "normal", "--systems", "closed_book", "bm25_text", "--max-new-tokens", "2"]
    options += ["--latency-questions", "0", "--resamples", "100", "--output", str(tmp_path / "out")]
    assert main(["--model", str(checkpoint), "--data", str(data), *options]) == 0
    path = tmp_path / "out" / "baselines" / "bm25-text" / "predictions.jsonl"
    predictions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    among = sum(str(gold) in row["retrieved"] for row, (_, gold) in zip(predictions, questions, strict=True))
    told = "BM25 found no word of " in caplog.text
    assert (among >= 18 and not told) if find else (among < 18 and told)
