"""Measures the codecs of a corpus: `python -m recipes.benchmarks.codecs MODEL --data FILE --questions FILE`.

Compresses the documents once as float16, converts the corpus, and compares retrieval and answers, question by
question. Stands on the public API; `--record CORPUS` writes the result into a corpus's card.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.codecs_clara import CODECS
from recipes.benchmarks.shared import add_outputs, describe_machine, figures, read_rows, show
from recipes.evaluation.results import public_name
from recipes.spaces.metrics.rag_answer.rag_answer import score_answer

ANSWERS = ("f1", "em", "containment")


def overlap(found: Sequence[Sequence[dict]], best: Sequence[Sequence[dict]]) -> float:
    """The mean share of each question's best hits whose documents were found."""
    shares = []
    for hits, wanted in zip(found, best, strict=True):
        ids, wanted_ids = ({hit["document_id"] for hit in row} for row in (hits, wanted))
        shares.append(len(ids & wanted_ids) / len(wanted_ids))
    return sum(shares) / len(shares)


def measure_codecs(
    model: CLaRaForRAG,
    folder: Path,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]] | None,
    *,
    top_k: int | None = None,
) -> dict[str, dict]:
    """Copies of a float16 corpus, each converted to another codec.

    For each codec `bytes` of a memory, `recall@5` against float16 by exact cosine and, with gold answers, `f1`, `em`
    and `containment`; `top_k` documents are read, by default the model's.
    """
    queries = model.encode_queries(questions, memory_size=model.config.retrieval_memory_size)
    results, reference = {}, None
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for codec in CODECS:
            copy = Path(temporary) / codec
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("index"))
            corpus = model.load_corpus(copy)
            corpus.convert(codec)
            found = corpus.search(queries, 5, exact=True)
            reference = reference or found
            n_bytes = corpus.vector_bytes * corpus.manifest.memory_size
            results[codec] = {"bytes": n_bytes, "recall@5": overlap(found, reference)}
            if answers is None:
                continue
            options = {"top_k": top_k, "max_new_tokens": 16, "min_score": -1}
            texts = [answer.text for answer in model.answer(questions, corpus=corpus, **options)]
            wrong = dict.fromkeys(ANSWERS, 0.0)  # as an empty answer is
            scores = [score_answer(text, gold) if text else wrong for text, gold in zip(texts, answers, strict=True)]
            results[codec] |= {name: sum(row[name] for row in scores) / len(scores) for name in ANSWERS}
    return results


def render(results: dict[str, dict]) -> str:
    """A Markdown table."""
    names = [name for name in ("recall@5", *ANSWERS) if name in results["float16"]]
    cells = "".join(f" | {{{name}:.3f}}" for name in names)
    rows = [{"codec": codec, **row} for codec, row in results.items()]
    return figures(" | ".join(["codec", "bytes a memory", *names]), "{codec} | {bytes:,}" + cells, rows)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--data", required=True, help="documents, as `clara compress` takes them")
    parser.add_argument("--questions", required=True, help="JSONL of {question, answers}, .gz or plain")
    parser.add_argument("--number", type=int, default=200, help="questions that are asked (default: 200)")
    parser.add_argument("--record", type=Path, help="corpus whose card gets the result")
    arguments = add_outputs(parser).parse_args()
    model = CLaRaForRAG.from_pretrained(arguments.model)
    rows = read_rows(arguments.questions)[: arguments.number]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        CompressedCorpus.build(model, arguments.data, folder, codec="float16")
        results = measure_codecs(model, folder, [row["question"] for row in rows], [row["answers"] for row in rows])
    measured = {"data": Path(arguments.questions).name, "questions": len(rows), "codecs": results}
    if arguments.record:
        CompressedCorpus.open(arguments.record).record_measurement(measured)
    text = f"{len(rows):,} questions, {public_name(arguments.model)}.\n\n{render(results)}"
    show("codecs", {**describe_machine(), **measured}, text, arguments)


if __name__ == "__main__":
    main()
