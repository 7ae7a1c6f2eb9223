"""Chooses below which cosine a model does not answer: `min_score` and `overlap_weight` of its config.json.

    python -m recipes.evaluation.calibrate MODEL --data ANSWERABLE... --unanswerable FILE... [--write]

Asks answerable questions, whose candidates contain the gold documents, and two kinds that cannot be answered: those of
`--unanswerable` (rows with `answers: []`) beside their passages, and the answerable ones beside other documents. All
have the same number of candidates, because the best of many is nearer than the best of few. It reads no answers.

A document with words of the question needs less of a cosine, by `--overlap-weight` with all of them.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from modeling_clara import CLaRaForRAG
from modeling_clara.candidates_clara import source_overlap
from modeling_clara.cli.console import allow_any_console
from modeling_clara.storage_clara import replacing, write_json
from recipes.evaluation.abstention import LOSSES, area_under_curve, signals, trade_off
from recipes.evaluation.formats import Question
from recipes.evaluation.questions import HALVES, EvaluationData, read_data
from recipes.evaluation.rankers import Bm25Ranker
from recipes.evaluation.report import CALIBRATION_FILE, table
from recipes.evaluation.spans import Spans, compress_documents, open_memories

ANSWERABLE, SAME, OTHER = "answerable", "same subject", "other documents"
OVERLAP_WEIGHT = 0.4  # docs/experiments.md, "Words of the question in its document"
Asked = list[tuple[str, list[str]]]  # questions, each with the ids of its documents


def with_candidates(model: CLaRaForRAG, data: EvaluationData, questions: Sequence[Question], n: int) -> Asked:
    """Gold documents, what the row brings, and BM25's best of the file until there are n."""
    spans = Spans.of_documents(model, data.documents)
    ranker, found = Bm25Ranker(spans), []
    ranked = ranker.rank([question.text for question in questions], [None] * len(questions), n)
    ranker.warn_of_chance()
    for question, hits in zip(questions, ranked, strict=True):
        own = dict.fromkeys((*question.gold, *question.candidates))
        names = dict.fromkeys((*own, *(spans.document_ids[row] for row, _ in hits)))
        found.append((question.text, list(names)[: max(n, len(own))]))
    return found


def with_others(asked: Asked, names: Sequence[str], seed: int = 0) -> Asked:
    """The same questions beside as many documents that are not their candidates; left out if there is none."""
    draws, found = random.Random(seed), []
    for text, candidates in asked:
        others = sorted(set(names).difference(candidates))
        if others:
            found.append((text, draws.sample(others, min(len(candidates), len(others)))))
    return found


def measure(model: CLaRaForRAG, documents: Mapping[str, Mapping], asked: Asked) -> list[list[tuple[float, float]]]:
    """For each question (cosine, `word_overlap`) of the chunks that would be read, best first."""
    needed = {name for _, names in asked for name in names}
    documents = {name: document for name, document in documents.items() if name in needed}
    queries = model.encode_queries([text for text, _ in asked], memory_size=model.config.retrieval_memory_size).cpu()
    with tempfile.TemporaryDirectory() as folder:
        compress_documents(model, documents, Path(folder))
        spans = open_memories(model, Path(folder), "float16", len(documents))
        return [
            [
                (cosine, source_overlap(text, spans.source(row)))
                for row, cosine in spans.cosines(query, spans.rows_of(names), model.config.retrieval_top_k)
            ]
            for query, (text, names) in zip(queries, asked, strict=True)
        ]


def read_questions(path: str, arguments: argparse.Namespace, answerable: bool) -> tuple[EvaluationData, list]:
    """The questions of a file that are of use; a ValueError if there is none."""
    data = read_data(path, half=arguments.half, limit=arguments.limit, may_abstain=True)
    kept = [
        question
        for question in data.questions
        if bool(question.answers) == answerable
        and question.asks_answer
        and data.documents.keys() >= {*question.gold}
        and (question.gold or not answerable)
    ]
    if not kept or not data.documents:
        wanted = "answers and gold documents" if answerable else "`answers: []` and documents"
        raise ValueError(f"{path} must have questions with {wanted}, found none. Leave it out.")
    return data, kept


def score_files(model: CLaRaForRAG, arguments: argparse.Namespace) -> dict[str, list[list[tuple[float, float]]]]:
    """Kind of question -> what `measure` found for each question; kinds without questions are left out."""
    kinds = defaultdict(list)
    paths = [(path, True) for path in arguments.data] + [(path, False) for path in arguments.unanswerable]
    for path, answerable in paths:
        data, questions = read_questions(path, arguments, answerable)
        asked = with_candidates(model, data, questions, arguments.num_candidates)
        others = with_others(asked, list(data.documents)) if answerable else []
        found = measure(model, data.documents, asked + others)
        kinds[ANSWERABLE if answerable else SAME] += found[: len(asked)]
        kinds[OTHER] += found[len(asked) :]
    return {kind: kinds[kind] for kind in (ANSWERABLE, SAME, OTHER) if kinds[kind]}


def report(measured: Mapping[str, list], max_loss: float, overlap_weight: float) -> tuple[str, dict]:
    """Tables of both signals, and the row of the second for `max_loss` with its areas under the curve."""
    found = {kind: signals(rows, overlap_weight) for kind, rows in measured.items()}
    parts, chosen = [], {}
    for name, answerable in found[ANSWERABLE].items():
        unanswerable = {kind: scores[name] for kind, scores in found.items() if kind != ANSWERABLE}
        rows = trade_off(answerable, unanswerable, sorted({*LOSSES, max_loss}))
        areas = {kind: area_under_curve(answerable, scores) for kind, scores in unanswerable.items()}
        cells = [
            [f"{row['threshold']:.4f}", f"{row['lost']:.3f}", *(f"{share:.3f}" for share in row["refused"].values())]
            for row in rows
        ]
        cells.append(["AUC", "", *(f"{area:.3f}" for area in areas.values())])
        header = [name, f"lost of {len(answerable)}"]
        header += [f"refused of {len(scores)}, {kind}" for kind, scores in unanswerable.items()]
        parts.append(table(header, cells))
        row = next(row for row in rows if row["max_loss"] == max_loss)
        chosen = {"min_score": row["threshold"], "overlap_weight": overlap_weight}
        chosen |= {key: row[key] for key in ("max_loss", "lost", "refused")}
        chosen |= {"area_under_curve": areas, "questions": {kind: len(rows) for kind, rows in measured.items()}}
    return "\n\n".join(parts), chosen


def write(folder: Path, chosen: Mapping) -> None:
    """Put threshold and weight into config.json, and how they were chosen beside it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: chosen[name] for name in ("min_score", "overlap_weight")}
    with replacing(folder / "config.json") as partial:  # as transformers writes it
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_json(folder / CALIBRATION_FILE, dict(chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--data", nargs="+", required=True, help="files of answerable questions with gold documents")
    parser.add_argument("--unanswerable", nargs="+", default=[], help="files with rows whose `answers` are []")
    parser.add_argument("--max-loss", type=float, default=0.05, help="share that may be lost (default: 0.05)")
    parser.add_argument(
        "--overlap-weight",
        type=float,
        default=OVERLAP_WEIGHT,
        help=f"cosine that words of the question stand for, 0 to 1 (default: {OVERLAP_WEIGHT}; 0: none)",
    )
    parser.add_argument("--num-candidates", type=int, default=20, help="documents of a question (default: 20)")
    parser.add_argument("--half", choices=HALVES, help="of the questions, as in recipes.evaluate")
    parser.add_argument("--limit", type=int, help="first questions of every file only")
    parser.add_argument("--backbone", help="where the model's backbone is")
    parser.add_argument("--write", action="store_true", help=f"into config.json and {CALIBRATION_FILE} of MODEL")
    arguments = parser.parse_args(argv)
    try:
        if not 0 <= arguments.max_loss < 1:
            raise ValueError(f"--max-loss must be from 0 to below 1, got {arguments.max_loss}. Correct it.")
        if not 0 <= arguments.overlap_weight <= 1:
            raise ValueError(f"--overlap-weight must be from 0 to 1, got {arguments.overlap_weight}. Correct it.")
        if arguments.write and not (Path(arguments.model) / "config.json").exists():
            raise ValueError(f"--write needs a checkpoint in a folder, got {arguments.model}. Download it first.")
        model = CLaRaForRAG.from_pretrained(arguments.model, backbone=arguments.backbone)
        text, chosen = report(score_files(model, arguments), arguments.max_loss, arguments.overlap_weight)
        print(f"{text}\n\nmin_score {chosen['min_score']} loses {chosen['lost']:.1%} of the answerable questions.")
        chosen |= {name: [Path(path).name for path in getattr(arguments, name)] for name in ("data", "unanswerable")}
        chosen |= {"half": arguments.half, "num_candidates": arguments.num_candidates}
        if arguments.write:
            write(Path(arguments.model), chosen)
            print(f"Written: {arguments.model}/config.json, {arguments.model}/{CALIBRATION_FILE}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
