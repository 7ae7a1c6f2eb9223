"""Measures reading of files and following of a folder: `python -m recipes.benchmarks.documents [--pdf FILE...]`.

Reading: how long each format takes, on files that are written here out of the packaged passages, and on PDF files that
are named. Following: a corpus of 10,000 files by clara-pico, with nothing changed and with 100 files changed.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import openpyxl
from docx import Document

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.corpus.sources import DocumentSource
from modeling_clara.corpus.sync import plan_sync
from recipes.benchmarks.shared import (
    add_outputs,
    describe_machine,
    figures,
    in_turn,
    medians,
    read_rows,
    seconds_of,
    show,
)

MODEL = "model_cards/clara-pico"
N_CHANGED = 100
ROUNDS = 3


def write_formats(folder: Path, texts: list[str]) -> None:
    """The same texts as files of several formats, one file each."""
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "page.html").write_text("<html><body>" + "".join(f"<p>{text}</p>" for text in texts) + "</body></html>")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    word, book = Document(), openpyxl.Workbook()
    book.active.append(["text"])
    for text in texts:
        word.add_paragraph(text)
        book.active.append([text])
    word.save(folder / "report.docx")
    book.save(folder / "rows.xlsx")


def measure_reading(files: list[Path]) -> list[dict]:
    """Documents and megabytes of text a second of each file."""
    runs = {str(file): lambda file=file: list(DocumentSource(file)) for file in files}
    seconds, rows = medians(in_turn(runs, ROUNDS)), []
    for file in files:
        documents = [row.document["text"] for row in DocumentSource(file) if row.document is not None]
        n_bytes, took = sum(len(text.encode()) for text in documents), seconds[str(file)]
        rows.append({"file": file.name, "documents": len(documents) / took, "megabytes": n_bytes / took / 1e6})
    return rows


def measure_sync(folder: Path, n_files: int) -> list[dict]:
    """Seconds of a build and of syncs with nothing and with 100 files changed."""
    model = CLaRaForRAG.from_pretrained(MODEL)
    documents = folder / "documents"
    for number in range(n_files):
        path = documents / f"{number % 100:02d}" / f"{number}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Person number {number} works as a pilot and lives in Lima.")
    found: dict[str, object] = {}

    def build() -> None:
        found["corpus"] = CompressedCorpus.build(model, documents, folder / "corpus")

    rows = [{"what": f"build of {n_files:,} files", "seconds": seconds_of(build)}]
    corpus = found["corpus"]
    took = seconds_of(lambda: corpus.sync(documents))
    rows.append({"what": "sync, nothing changed", "seconds": took})
    changed = sorted(documents.rglob("*.md"))[:N_CHANGED]
    for path in changed:
        path.write_text(path.read_text() + " Lately in Oslo.")
    texts = [{"text": path.read_text()} for path in changed]
    alone = seconds_of(lambda: model.compress(texts))
    rows.append({"what": f"sync, {N_CHANGED} files changed", "seconds": seconds_of(lambda: corpus.sync(documents))})
    rows.append({"what": "of which compressing them takes", "seconds": alone})
    assert plan_sync(corpus.folder, documents).is_empty and len(corpus) == n_files
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdf", type=Path, nargs="*", default=[], help="PDF files to read as well")
    parser.add_argument("--files", type=int, default=10_000, help="of the folder that is followed (default: 10,000)")
    arguments = add_outputs(parser).parse_args()
    report = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "formats").mkdir()
        write_formats(folder / "formats", [row["text"] for row in read_rows(None)] * 25)
        report["reading"] = measure_reading([*sorted((folder / "formats").iterdir()), *arguments.pdf])
        report["following"] = measure_sync(folder, arguments.files)
    reading = figures(
        "file | documents a second | MB of text a second",
        "{file} | {documents:,.0f} | {megabytes:.1f}",
        report["reading"],
    )
    following = figures("what | seconds", "{what} | {seconds:.2f}", report["following"])
    show("documents", report, f"{reading}\n\n{following}", arguments)


if __name__ == "__main__":
    main()
