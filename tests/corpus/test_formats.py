"""Files as people have them: every format, encodings, damage; each file accounted for and its text complete."""

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docx
import fsspec
import openpyxl
import pptx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import read_all, rejected
from reportlab.pdfgen.canvas import Canvas

from modeling_clara import CompressedCorpus
from modeling_clara.corpus import converters, formats
from modeling_clara.corpus.encodings import decode
from modeling_clara.corpus.sources import DocumentSource

WORDS = "harbour lantern copper winter bridge orchard signal paper engine violet marble compass".split()
WRITTEN = {  # encoding -> words that it has
    "utf-8": "Straße żółw 東京 naïve",
    "utf-8-sig": "Straße żółw 東京 naïve",
    "utf-16": "Straße żółw 東京 naïve",
    "utf-16-le": "Straße żółw naïve plain words between them",
    "cp1252": "Die Straße führt über die Brücke nach Köln und für Gäste weiter nach Düsseldorf",
    "shift_jis": "東京は日本の首都です。人口は約千四百万人です。",
}


def sentence(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=8)) + f" number{seed}"


# --- writers: bytes of a file that holds some texts ------------------------------------------------------------------


def pdf(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    canvas = Canvas(stream)
    for text in texts:  # a page each
        canvas.drawString(72, 720, text)
        canvas.showPage()
    canvas.save()
    return stream.getvalue()


def saved(document) -> bytes:
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def word(texts: list[str]) -> bytes:
    document = docx.Document()
    document.add_paragraph(texts[0])
    for text in texts[1:-1]:
        document.add_heading(f"About {text.split()[0]}", 1)
        document.add_paragraph(text)
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = texts[-1], "second cell"
    document.sections[0].header.paragraphs[0].text = "in the header"
    return saved(document)


def slides(texts: list[str]) -> bytes:
    show = pptx.Presentation()
    for text in texts:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = f"Slide {text.split()[0]}", text
        slide.notes_slide.notes_text_frame.text = f"notes of {text}"
    return saved(show)


def sheets(texts: list[str], header=("name", "remark")) -> bytes:
    book = openpyxl.Workbook()
    for number, text in enumerate(texts):
        sheet = book.active if not number else book.create_sheet(f"more {number}")
        sheet.append(header)
        sheet.append([f"row {number}", text])
    return saved(book)


def html(texts: list[str]) -> bytes:
    body = "".join(f"<div><p>{text}</p><script>var hidden = 1</script></div>" for text in texts)
    return f"<html><head><title>A page</title><style>p {{}}</style></head><body>{body}</body></html>".encode()


def epub(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as book:
        book.writestr("META-INF/container.xml", CONTAINER)
        items = "".join(f'<item id="c{n}" href="c%20{n}.xhtml"/>' for n in range(len(texts)))
        spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(texts)))
        book.writestr("OEBPS/content.opf", PACKAGE.format(items=items, spine=spine))
        for number, text in enumerate(texts):
            page = f"<html><head><title>Chapter {number}</title></head><body><p>{text}</p></body></html>"
            book.writestr(f"OEBPS/c {number}.xhtml", f'<?xml version="1.0" encoding="utf-8"?>{page}')
    return stream.getvalue()


CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
)
PACKAGE = '<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'


def table(texts: list[str]) -> bytes:
    return "\n".join(["text;year", *(f'"{text}";{2000 + n}' for n, text in enumerate(texts))]).encode()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "year": n}) + "\n" for n, text in enumerate(texts)).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "year": pa.nulls(len(texts))}), sink)
    return sink.getvalue().to_pybytes()


def as_json(texts: list[str]) -> bytes:
    return json.dumps({"data": [{"text": text} for text in texts], "version": 1}).encode()


def tsv(texts: list[str]) -> bytes:
    return "\n".join(["name\tremark", *(f"row\t{text}" for text in texts)]).encode()


def text(texts: list[str]) -> bytes:
    return "\n\n".join(texts).encode()


WRITERS = {
    "txt": text, "md": text, "rst": text, "html": html, "pdf": pdf, "docx": word, "pptx": slides, "xlsx": sheets,
    "epub": epub, "csv": table, "tsv": tsv, "json": as_json, "jsonl": jsonl, "parquet": parquet,
}  # fmt: skip
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """300 files of all formats and six encodings, 20 of them damaged; and the texts by file of the others."""
    root, written, names = tmp_path_factory.mktemp("mixed") / "in", {}, list(WRITERS)
    for number in range(262):
        ending = names[number % len(names)]
        texts = [sentence(10 * number + part) for part in range(3)]
        name, content = f"sub{number % 5}/{number:03d}.{ending}", WRITERS[ending](texts)
        if number % 7 == 0 and ending != "xlsx":
            kind = [*COMPRESSORS][number % 4]
            name, content = f"{name}.{kind}", COMPRESSORS[kind](content)
        write(root / name, content)
        written[name] = texts
    for number in range(18):
        encoding = [*WRITTEN][number % 6]
        write(root / f"{encoding}-{number}.txt", f"{WRITTEN[encoding]} file {number}".encode(encoding))
        written[f"{encoding}-{number}.txt"] = [WRITTEN[encoding], f"file {number}"]
    for number, ending in enumerate(
        (*("pdf", "docx", "pptx", "xlsx", "epub", "parquet", "json", "jsonl.gz") * 2, *"ab")
    ):
        whole = WRITERS.get(ending.partition(".")[0], text)([sentence(n) for n in range(9000, 9040)])
        whole = gzip.compress(whole) if ending.endswith("gz") else whole
        broken = whole[: len(whole) // 2] if number % 2 else bytes(60) + whole[60:]
        write(root / "damaged" / f"{number}.{ending if len(ending) > 1 else 'pdf'}", broken)
    write(root / "damaged" / "18.txt.gz", b"not gzip")
    write(root / "damaged" / "19.txt", b"\x00\x01\x02binary\x00\xff" * 40)
    return root, written


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def flat(value: str) -> str:
    return "".join(value.split())


def test_every_file_of_a_mixed_folder_is_accounted_for_and_its_text_is_complete(folder):
    root, written = folder
    source = DocumentSource(root)
    assert len(source.files) == 300
    found, failed = {}, {}
    for row in source:
        if row.document is not None:
            found[row.file] = found.get(row.file, "") + flat(row.document["text"])
        else:
            failed[row.file] = row
    for name, texts in written.items():
        assert all(flat(text) in found[name] for text in texts), name
    damaged = {file.name for file in source.files if file.name.startswith("damaged/")}
    assert set(failed) >= damaged and len(damaged) == 20
    assert {row.status for row in failed.values()} <= {"failed", "empty"}
    assert all(row.file in row.problem for row in failed.values())
    assert "hidden" not in "".join(found[name] for name in written if name.endswith("html"))


def test_a_corpus_of_a_mixed_folder(shared_model, folder, tmp_path):
    root, _ = folder
    corpus = CompressedCorpus.build(shared_model, root, tmp_path / "c")
    assert corpus.verify() == [] and corpus.manifest.n_rejected == len(rejected(corpus.folder))
    assert corpus.manifest.metadata == {
        "year": "int64", "path": "string", "page": "int32", "section": "string", "sheet": "string"
    }  # fmt: skip
    by_id = {document["document_id"]: document["metadata"] for document in read_all(corpus)}
    page = next(name for name in by_id if ".pdf#page=2" in name)
    assert by_id[page]["page"] == 2 and by_id[page]["path"] == page.partition("#")[0]
    assert {values["section"] for name, values in by_id.items() if ".epub" in name} >= {"Chapter 0", "Chapter 2"}
    assert {values["sheet"] for values in by_id.values()} >= {"Sheet", "more 1"}
    assert {values["year"] for name, values in by_id.items() if ".csv" in name} == {2000, 2001, 2002}


@pytest.mark.parametrize("ending", ["docx", "pptx", "xlsx", "epub", "pdf"])
def test_a_package_that_is_missing_is_one_sentence_that_counts(folder, ending, monkeypatch, caplog):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    root, _ = folder
    source = DocumentSource(root)
    n_files = sum(file.suffix == f".{ending}" for file in source.files)
    (message,) = [record.message for record in caplog.records if "left out" in record.message]
    assert f"{n_files} .{ending}" in message and "pip install" in message and "`documents`" in message
    statuses = {row.status for row in source if row.file.endswith(f".{ending}")}
    assert statuses == {"unsupported"}


@pytest.mark.parametrize("encoding", WRITTEN)
def test_encodings_are_told(encoding):
    assert decode(WRITTEN[encoding].encode(encoding)).strip() == WRITTEN[encoding]


def test_a_zip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(converters, "MAX_INFLATED", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.epub", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("large", bytes(2**21))
    write(tmp_path / "good.txt", b"good")
    (problem,) = [row.problem for row in DocumentSource(tmp_path) if row.document is None]
    assert "bomb.epub" in problem and "unpacked" in problem


def test_remote_folders(tmp_path):
    """fsspec's memory and HTTP file systems stand for buckets."""
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/docs/a.txt": b"Alpha.", "/docs/deep/b.jsonl.gz": gzip.compress(jsonl(["Beta."])), "/docs/.x/c": b"c"}
    )
    source = DocumentSource("memory://docs")
    assert {row.document["text"] for row in source if row.document} == {"Alpha.", "Beta."}
    assert [row.place for row in source if row.status == "skipped"] == [".x/"]
    write(tmp_path / "page.html", html(["Gamma."]))
    write(tmp_path / "paper.pdf", pdf(["Delta."]))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        assert {row.document["text"] for row in DocumentSource(address)} == {"Gamma.", "Delta."}
        assert [row.document["text"] for row in DocumentSource(f"{address}paper.pdf")] == ["Delta."]
        server.shutdown()


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    for number in range(400):
        write(tmp_path / f"{number}.md", b"word " * 50_000)
    code = (
        "import resource, sys\nfrom modeling_clara.corpus.sources import DocumentSource\n"
        "rows = iter(DocumentSource(sys.argv[1]))\n"
        "usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(100): next(rows)\nbefore = usage()\nfor _ in rows: pass\nprint(usage() - before)"
    )
    output = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert int(output.split()[-1]) < 30_000, "KiB, of 75 MB that were read"


def document_of(path: Path, content: bytes) -> dict:
    write(path, content)
    (document,) = [row.document for row in DocumentSource(path) if row.document is not None]
    return document


def test_pages_say_their_encoding_as_browsers_read_it(tmp_path):
    page = '<html><head><meta charset="iso-8859-1"></head><body>{}</body></html>'
    quoted = page.format("“café”").encode("cp1252")
    assert document_of(tmp_path / "a.html", quoted)["text"] == "“café”"
    assert (
        document_of(tmp_path / "b.html", page.format("“café”").encode("utf-8-sig"))["text"] == "“café”"
    )  # the mark wins
    assert "deep" in document_of(tmp_path / "c.html", b"<p>" + b"<font>" * 5000 + b"deep")["text"]
    assert decode("Le café".encode("cp1252")) == "Le café"
    with pytest.raises(ValueError, match="is no text"):
        decode(b"one stray \x00 zero in ASCII text that is long enough to tell")


def test_cells_and_paragraphs_as_they_are_written(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["title", "text", "year"])
    book.active.append([1984, 2024, 7])
    document = document_of(tmp_path / "a.xlsx", saved(book))
    assert (document["title"], document["text"], document["year"]) == ("1984", "2024", 7)
    paper = docx.Document()
    paper.add_table(1, 1).cell(0, 0).add_table(1, 1).cell(0, 0).text = "nested"
    assert document_of(tmp_path / "a.docx", saved(paper))["text"].count("nested") == 1


def test_columns_of_rows_may_have_the_names_of_ours(shared_model, tmp_path):
    write(tmp_path / "in" / "rows.csv", b"id,section,page,text\nr,1,iv,hi\n")
    write(tmp_path / "in" / "paper.pdf", pdf(["A page."]))
    corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    found = {document["document_id"]: document["metadata"] for document in read_all(corpus)}
    assert (found["r"]["section"], found["r"]["page"], found["paper.pdf#page=1"]["page"]) == ("1", "iv", "1")
