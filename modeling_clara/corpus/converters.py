"""Documents out of PDF, HTML, Word, PowerPoint and EPUB files: their text, and the page or section that it stands on.

Each reader takes an `InputFile` and gives `Item`s. Its library is imported when it is first used; they are the extra
`documents`. What a library raises is the caller's to report.
"""

import contextlib
import posixpath
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

from .encodings import MARKS, decode
from .files import InputFile

MAX_TEXT = 512 * 2**20  # bytes of one text that is read whole; of rows each has this room
MAX_INFLATED = 2**30  # bytes that a zipped document may have inside, unless it is large itself
SPOOLED = 64 * 2**20  # bytes of a compressed or remote file that are held in memory instead of a temporary file
BLOCKS = frozenset(
    "address article aside blockquote br caption dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 "
    "h6 header hr li main nav ol option p pre section summary table tbody tfoot thead title tr ul".split()
)
UNSEEN = ["script", "style", "template", "noscript", "svg", "head"]


class Item(NamedTuple):
    """What a reader found at a place: a document `{id?, title?, text, ...metadata}`, or why there is none."""

    place: str
    document: dict | str | None
    problem: str | None = None
    status: str | None = None  # with a problem: "skipped", "unsupported", "empty" or "failed"


def read_whole(file: InputFile) -> bytes:
    """All bytes of a file, decompressed; a ValueError if they are too many for one text."""
    with file.open() as stream:
        data = stream.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"must be at most {MAX_TEXT // 2**20} MiB of text. Divide it")
    return data


@contextlib.contextmanager
def seekable(file: InputFile) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file, in which a library may jump."""
    with file.open() as stream:
        if file.fs is None and not file.is_compressed:
            yield stream
            return
        with tempfile.SpooledTemporaryFile(SPOOLED) as copy:
            while block := stream.read(2**20):
                copy.write(block)
            copy.seek(0)
            yield copy


@contextlib.contextmanager
def zipped(file: InputFile) -> Iterator[BinaryIO]:
    """A file that is a ZIP inside; a ValueError if it would be far larger unpacked."""
    with seekable(file) as stream:
        with zipfile.ZipFile(stream) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > max(MAX_INFLATED, 20 * file.size):
            raise ValueError(f"must hold at most {MAX_INFLATED // 2**20} MiB unpacked, got {size // 2**20} MiB")
        stream.seek(0)
        yield stream


def in_parts(file: InputFile, kind: str, texts: Iterable[tuple[int, str | None, str]]) -> Iterator[Item]:
    """Items of (number, section, text) parts; `kind` is the column of the number, "page", or "section" for none."""
    for number, section, text in texts:
        place = f"{file.name}#{kind}={number}"
        if not text.strip():
            yield Item(place, None, f"`{place}` has no text", "empty")
            continue
        document = {"id": place, "title": file.title, "text": text.strip(), "path": file.name}
        document |= {"page": number} if kind == "page" else {}
        yield Item(place, document | ({"section": section} if section else {}))


# --- plain text and HTML ---------------------------------------------------------------------------------------------


def read_text(file: InputFile) -> Iterator[Item]:
    """A file of text in any encoding."""
    yield Item(file.name, {"id": file.name, "title": file.title, "text": decode(read_whole(file)), "path": file.name})


def read_html(file: InputFile) -> Iterator[Item]:
    """An HTML page: what a reader sees of it."""
    title, text = html_text(read_whole(file))
    yield Item(file.name, {"id": file.name, "title": title or file.title, "text": text, "path": file.name})


def html_text(data: bytes) -> tuple[str, str]:
    """(title, text) of an HTML or XHTML page, a line for each block."""
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(data, is_html=True, search_entire_document=False)
    if declared in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii"):  # as browsers read them
        declared = "cp1252"
    has_mark = any(data.startswith(mark) for mark, _ in MARKS)
    try:
        text = decode(data) if declared is None or has_mark else data.decode(declared)
    except (LookupError, UnicodeDecodeError):
        text = decode(data)
    soup = BeautifulSoup(re.sub(r"^\s*<\?xml[^>]*\?>", "", text), "lxml")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(UNSEEN):
        tag.decompose()
    parts: list[str] = []
    try:
        _collect_html(soup, parts)
    except RecursionError:  # of thousands of tags that nobody closed
        parts = [soup.get_text("\n")]
    lines = [line.strip() for line in "".join(parts).splitlines()]
    return title, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _collect_html(node, parts: list[str]) -> None:
    from bs4 import CData, NavigableString

    for child in node.children:
        if type(child) in (NavigableString, CData):  # not a comment or a declaration
            parts.append(child if child.find_parent("pre") else re.sub(r"\s+", " ", child))
        elif child.name is not None:
            border = "\n" if child.name in BLOCKS else ""
            is_next_cell = child.name in ("td", "th") and child.find_previous_sibling(["td", "th"])
            seen_instead = f" {child.get('alt', '')} " if child.name == "img" else ""
            parts += [border, " | " if is_next_cell else "", seen_instead]
            _collect_html(child, parts)
            parts.append(border)


# --- PDF -------------------------------------------------------------------------------------------------------------


def read_pdf(file: InputFile) -> Iterator[Item]:
    """A PDF, page by page."""
    import pypdfium2

    with seekable(file) as stream:
        try:
            pdf = pypdfium2.PdfDocument(stream)
        except pypdfium2.PdfiumError as error:
            is_locked = "password" in str(error).lower()
            raise ValueError("it is locked by a password. Save it without one" if is_locked else str(error)) from error
        with contextlib.closing(pdf):
            empty = []
            for number in range(1, len(pdf) + 1):
                try:
                    (item,) = in_parts(file, "page", [(number, None, _page_text(pdf, number - 1))])
                except Exception as error:
                    place = f"{file.name}#page={number}"
                    item = Item(place, None, f"`{place}` cannot be read: {error}", "failed")
                if item.status == "empty":
                    empty.append(item)
                else:
                    yield item
            if len(empty) == len(pdf):
                reason = "has no text on any page. Run a text recognition (OCR) over it if it is a scan"
                empty = [Item(file.name, None, f"`{file.name}` {reason}", "empty")]
            yield from empty


def _page_text(pdf, index: int) -> str:
    with contextlib.closing(pdf[index]) as page, contextlib.closing(page.get_textpage()) as textpage:
        text = textpage.get_text_range()
    return re.sub(r"[\ufffe\x02]\s*", "", text.replace("\r\n", "\n").replace("\0", ""))  # of a word that was divided


# --- Word, PowerPoint, EPUB ------------------------------------------------------------------------------------------

WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
NOTES = re.compile(r"/word/(header|footer|footnotes|endnotes)\d*\.xml")


def read_docx(file: InputFile) -> Iterator[Item]:
    """A Word file, a document for each part under a heading of the first level; notes and headers come last."""
    import docx

    with zipped(file) as stream:
        word = docx.Document(stream)
        top = {style.style_id for style in word.styles if style.name and style.name.lower() == "heading 1"}
        parts: list[tuple[str | None, list[str]]] = [(None, [])]
        for style, line in _word_lines(word.element.body):
            if style in top and line.strip():
                parts.append((line.strip(), []))
            parts[-1][1].append(line)
        rest = []
        for part in word.part.package.iter_parts():
            if NOTES.fullmatch(part.partname):
                root = part.element if hasattr(part, "element") else ElementTree.fromstring(part.blob)
                rest += [line.strip() for _, line in _word_lines(root) if line.strip()]
    parts[-1][1].extend(dict.fromkeys(rest))
    yield from _sections(file, [(heading, "\n".join(lines)) for heading, lines in parts])


def _word_lines(element) -> Iterator[tuple[str | None, str]]:
    """(style, text) of the paragraphs and table rows inside an element, in their order."""
    for child in element:
        if child.tag == f"{WORD}p":
            style = child.find(f"{WORD}pPr/{WORD}pStyle")
            yield None if style is None else style.get(f"{WORD}val"), "".join(_word_text(child))
            for box in child.iter(f"{WORD}txbxContent"):
                if not any(parent.tag == FALLBACK for parent in box.iterancestors()):
                    yield from _word_lines(box)
        elif child.tag == f"{WORD}tr":
            cells = [" ".join(line for _, line in _word_lines(cell)) for cell in child if cell.tag == f"{WORD}tc"]
            yield None, " | ".join(cells)
        elif isinstance(child.tag, str):
            yield from _word_lines(child)


def _word_text(element) -> Iterator[str]:
    for child in element:
        if child.tag in (f"{WORD}t", f"{WORD}tab", f"{WORD}br", f"{WORD}cr", f"{WORD}noBreakHyphen"):
            marks = {f"{WORD}t": child.text or "", f"{WORD}tab": "\t", f"{WORD}noBreakHyphen": "-"}
            yield marks.get(child.tag, "\n")
        elif child.tag not in (f"{WORD}txbxContent", FALLBACK, f"{WORD}pPr", f"{WORD}moveFrom"):
            yield from _word_text(child)


def _sections(file: InputFile, sections: list[tuple[str | None, str]]) -> Iterator[Item]:
    """Items of (heading, text); a file of one section is one document."""
    sections = [(heading, text) for heading, text in sections if text.strip()]
    if len(sections) == 1:
        ((heading, text),) = sections
        document = {"id": file.name, "title": file.title, "text": text.strip(), "path": file.name}
        yield Item(file.name, document | ({"section": heading} if heading else {}))
    elif sections:
        yield from in_parts(file, "section", [(n, heading, text) for n, (heading, text) in enumerate(sections, 1)])


def read_pptx(file: InputFile) -> Iterator[Item]:
    """A PowerPoint file, slide by slide, each with its notes."""
    import pptx

    with zipped(file) as stream:
        slides = pptx.Presentation(stream).slides
        for number, slide in enumerate(slides, 1):
            heading = slide.shapes.title.text_frame.text if slide.shapes.title is not None else None
            lines = list(_slide_lines(slide.shapes))
            if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
                lines.append(slide.notes_slide.notes_text_frame.text)
            heading = " ".join((heading or "").split()) or None
            yield from in_parts(file, "page", [(number, heading, "\n".join(filter(str.strip, lines)))])


def _slide_lines(shapes) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _slide_lines(shape.shapes)
        elif shape.has_text_frame:
            yield shape.text_frame.text.replace("\v", "\n")
        elif getattr(shape, "has_table", False) and shape.has_table:
            for row in shape.table.rows:
                yield " | ".join(cell.text for cell in row.cells)


def read_epub(file: InputFile) -> Iterator[Item]:
    """An EPUB book, chapter by chapter."""
    with zipped(file) as stream, zipfile.ZipFile(stream) as book:
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        package_path = next(node.get("full-path") for node in container.iter() if node.tag.endswith("}rootfile"))
        package = ElementTree.fromstring(book.read(package_path))
        items = {node.get("id"): node.get("href") for node in package.iter() if node.tag.endswith("}item")}
        chapters = [items.get(node.get("idref")) for node in package.iter() if node.tag.endswith("}itemref")]
        for number, href in enumerate(chapters, 1):
            place = f"{file.name}#section={number}"
            try:
                name = posixpath.normpath(posixpath.join(posixpath.dirname(package_path), unquote(href)))
                heading, text = html_text(book.read(name))
            except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
                yield Item(place, None, f"`{place}` cannot be read: {error}", "failed")
                continue
            if text:  # a cover has none
                yield from in_parts(file, "section", [(number, heading, text)])
