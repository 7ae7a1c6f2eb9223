"""Measure a checkpoint on fact sheets about people it never saw: `python -m recipes.models.pico.evaluate CHECKPOINT`.

It asks through the public calls, `compress`, `retrieve` and `answer`.
"""

import argparse
import json
from pathlib import Path

from modeling_clara import CLaRaForRAG
from recipes.models.pico.facts import RELATIONS, FactSheets
from recipes.spaces.metrics.retrieval.retrieval import score_ranking
from recipes.training.data import read_documents

SPLITS = {"unseen people": False, "unseen people and wordings": True}


def share(answers: list, expected: list[str]) -> float:
    """Share of `Answer`s whose text is the expected value, letter case aside."""
    pairs = zip(answers, expected, strict=True)
    return sum(answer.text.strip().lower() == value.lower() for answer, value in pairs) / len(answers)


def read_rows(n_rows: int, n_documents: int, seed: int, unseen_wordings: bool) -> tuple[list, list, list, list]:
    """Questions, expected answers, documents `{title, text}` of each, and the index of the gold one."""
    sheets = FactSheets(seed, test=True, unseen_wordings=unseen_wordings)
    rows = list(sheets.retrieval_rows(n_rows, n_documents))
    documents = [read_documents(row) for row in rows]
    return [r["question"] for r in rows], [r["answers"][0] for r in rows], documents, [r["pos_index"][0] for r in rows]


def evaluate_split(model: CLaRaForRAG, n_rows: int, n_documents: int, seed: int, unseen_wordings: bool) -> dict:
    """Answers from the gold memory at every k, from retrieved memories, from a wrong one; and the retrieval itself."""
    questions, expected, lists, gold = read_rows(n_rows, n_documents, seed, unseen_wordings)
    memory = model.compress([document for documents in lists for document in documents], batch_size=64)
    stored = [
        [{**document, "memory": rows} for document, rows in zip(documents, memories, strict=True)]
        for documents, memories in zip(lists, memory.unflatten(0, (n_rows, n_documents)), strict=True)
    ]
    ranked = model.retrieve(questions, documents=stored, top_k=n_documents)
    rankings = [
        score_ranking([source.document_id for source in sources], [str(index)], (1, 5))
        for sources, index in zip(ranked, gold, strict=True)
    ]
    given = [[documents[index]] for documents, index in zip(stored, gold, strict=True)]
    wrong = [[documents[(index + 1) % n_documents]] for documents, index in zip(stored, gold, strict=True)]

    def answered(documents: list, **options) -> float:
        answers = model.answer(questions, documents=documents, max_new_tokens=8, min_score=-1, **options)
        return share(answers, expected)

    return {
        "answers_gold_given": {str(k): answered(given, memory_size=k) for k in model.config.memory_sizes},
        "answers_retrieved": answered(stored, top_k=1),
        "answers_wrong_memory": answered(wrong),
        **{name: sum(row[name] for row in rankings) / n_rows for name in ("recall@1", "recall@5", "mrr")},
    }


def evaluate(model: CLaRaForRAG, n_rows: int = 500, n_documents: int = 20, seed: int = 77) -> dict:
    """All splits; and what guessing gives."""
    values = sum(len(relation["values"]) for relation in RELATIONS.values()) / len(RELATIONS)
    return {
        "questions": n_rows,
        "candidates": n_documents,
        "seed": seed,
        "chance": {"answers": 1 / values, "recall@1": 1 / n_documents},
        **{name: evaluate_split(model, n_rows, n_documents, seed, unseen) for name, unseen in SPLITS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=77, help="of the sheets, none of which training showed")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    results = evaluate(CLaRaForRAG.from_pretrained(arguments.checkpoint), arguments.questions, seed=arguments.seed)
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
