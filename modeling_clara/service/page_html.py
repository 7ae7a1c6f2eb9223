"""The parts of the page that are HTML: passages with bars, costs, words, the picture. All text is escaped here.

Gradio renders a value as a template as well, so that braces and the like are escaped too.
"""

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cli.ask import name_place

if TYPE_CHECKING:
    from .. import Source
    from .page_rate import Rate
    from .page_session import Asked, Cost, Passage

N_WORDS = 24
NO_ANSWER = "(no answer)"
NOTHING = "(nothing was written)"
NEIGHBOUR = 400  # characters of a neighbouring chunk that are shown
TEMPLATE = {ord(character): f"&#{ord(character)};" for character in "{}$`@\\"}


def escaped(text) -> str:
    """Text as HTML that shows it and does nothing else, in an attribute too."""
    return html.escape(str(text)).translate(TEMPLATE)


def message_html(*lines: str, kind: str = "note", heard: str = "") -> str:
    """Lines for the reader, a "note" or a "problem", and what only screen readers say; nothing if there are none."""
    if not lines:
        return ""
    said = f"<p class='clara-heard'>{escaped(heard)}</p>" if heard else ""
    return f"<div class='clara-{kind}'>{''.join(f'<p>{escaped(line)}</p>' for line in lines)}{said}</div>"


# --- what happens ----------------------------------------------------------------------------------------------------


def intro_html(n_tokens: int, memory_size: int) -> str:
    """What happens to a document and to a question, in words."""
    return (
        "<h1>Ask compressed documents</h1>"
        f"<p>A language model has read every document once. Of each piece of up to {n_tokens} tokens (about "
        f"{3 * n_tokens // 4} words) it kept a memory: at most {memory_size} vectors of numbers. A question becomes "
        "vectors of the same kind. The memories that point the same way are found, and the model answers from them "
        "without reading the words again. This is called soft compression.</p>"
    )


def picture_html(n_tokens: int, memory_size: int) -> str:
    """The picture: lines of text, `memory_size` cells, an answer. It has the colours of the text around it."""
    lines = "".join(
        f"<rect x='8' y='{18 + 9 * row}' width='{(96, 88, 94, 70, 92, 84, 96, 52)[row]}' height='4' rx='2'/>"
        for row in range(8)
    )
    columns = 16 if memory_size > 16 else memory_size
    cells = "".join(
        f"<rect x='{196 + 8 * (cell % columns) + 4 * (16 - columns)}' y='{34 + 9 * (cell // columns)}' width='6' "
        "height='7' rx='1'/>"
        for cell in range(min(memory_size, 64))
    )
    label = (
        f"{n_tokens} tokens of text become a memory of {memory_size} vectors. It is compared with the vectors of the "
        "question, and the answer is written from it."
    )
    arrow = "<path d='M{0} {1}h44m-7 -5l7 5l-7 5' class='line'/>"
    return (
        f"<svg class='clara-picture' viewBox='0 0 480 118' role='img' aria-label='{escaped(label)}'>"
        f"<g class='faint'>{lines}</g><g class='strong'>{cells}</g>"
        f"{arrow.format(126, 52)}{arrow.format(346, 52)}<text x='148' y='42' text-anchor='middle'>once</text>"
        "<text x='368' y='42' text-anchor='middle'>reads</text><path d='M260 112v-24m-5 7l5 -7l5 7' class='line'/>"
        "<text x='56' y='108' text-anchor='middle'>"
        f"{n_tokens} tokens</text><text x='260' y='22' text-anchor='middle'>{memory_size} vectors</text>"
        "<text x='276' y='108'>question, as vectors</text>"
        "<text x='436' y='57' text-anchor='middle'>answer</text></svg>"
    )


def abstained_lines(asked: "Asked", least: float | None) -> list[str]:
    """That there is no answer, and why; `least` is the cosine that the nearest passage must have."""
    best = max((passage.source.score for passage in asked.passages), default=None)
    nearest = (
        "There is no passage"
        if best is None
        else f"The nearest passage has a similarity of {best:.3f} to the question"
    )
    threshold = f"; below {least:.3f} this model does not answer from it" if least is not None else ""
    return [f"Not answered. {nearest}{threshold}.", "The nearest passages stand below. Nothing was read."]


def compressed_lines(corpus) -> list[str]:
    """What was made of a visitor's files."""
    manifest = corpus.manifest
    size = manifest.n_spans * manifest.memory_size * corpus.vector_bytes
    return [
        f"Compressed: {_counted(len(corpus), 'document')}, {_counted(manifest.n_spans, 'piece')}, "
        f"{readable(size, 'B')} of memories as {manifest.codec}.",
        "Questions now go to your files; choose above which documents are asked.",
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def progress_html(done: int, total: int) -> str:
    """How far a compression is; a total of 0 is not known yet."""
    if not total:
        return message_html("Reading the files ...")
    bar = f"<progress value='{done}' max='{total}' aria-label='Compressed pieces'></progress>"
    return f"<div class='clara-note'><p>Compressing: {done:,} of {_counted(total, 'piece')}</p>{bar}</div>"


# --- passages --------------------------------------------------------------------------------------------------------


def without_overlap(before: str, text: str) -> str:
    """`before` without the end with which `text` begins: neighbouring chunks may share some words."""
    longest = min(len(before), len(text))
    shared = next((size for size in range(longest, 0, -1) if before.endswith(text[:size])), 0)
    return before[: len(before) - shared]


def passages_html(asked: "Asked", least: float | None, name: str) -> str:
    """What stands above the passages, which come from the documents of this name."""
    title = "Nearest passages" if asked.answer.abstained else "Passages that were read"
    line = "" if least is None else " The line across it is the least that one passage must have."
    return (
        f"<h2>{title}, from {escaped(name)}</h2><p class='place'>The bar is the similarity of the question's vectors "
        f"and the passage's, at most 1.{line} What the vectors hold is marked; grey text belongs to the pieces beside "
        "it.</p>"
    )


def passage_html(number: int, passage: "Passage", least: float | None) -> str:
    """A source with its bar, and its chunk marked in the text around it."""
    source, text = passage.source, passage.source.text
    before = without_overlap(passage.before, text)[-NEIGHBOUR:]
    after = passage.after
    after = after[len(text) - len(without_overlap(text, after)) :][:NEIGHBOUR]
    before = f"<span class='near'>{'' if before == passage.before else '… '}{_lines(before)} </span>" if before else ""
    after = (
        f"<span class='near'> {_lines(after)}{'' if passage.after.endswith(after) else ' …'}</span>" if after else ""
    )
    chunk = f", chunk {source.span + 1} of {passage.n_chunks}" if passage.n_chunks > 1 else ""
    read = "read as text" if source.read_as == "text" else f"read from {passage.n_vectors} vectors"
    return (
        f"<article class='clara-passage'><h3>{number}. {escaped(source.title or source.document_id)}</h3>"
        f"{bar_html(source, least)}"
        f"<p class='place'>{escaped(name_place(source))}{chunk} &middot; {passage.n_tokens:,} tokens &middot; "
        f"{read if passage.is_read else 'not read'}</p>"
        f"<p class='text'>{before}<mark>{_lines(text)}</mark>{after}</p></article>"
    )


def _lines(text: str) -> str:
    """Text as HTML, without empty lines."""
    return escaped(re.sub(r"\n\s*\n", "\n", text))


def bar_html(source: "Source", least: float | None) -> str:
    """The cosine as a bar from 0 to 1, with a tick at what it must be at least."""
    width = 100 * min(max(source.score, 0), 1)
    tick = f"<i style='left: {100 * least:.1f}%'></i>" if least is not None and 0 < least < 1 else ""
    return (
        f"<div class='score'><span class='bar' role='img' aria-label='similarity {source.score:.3f} of at most 1'>"
        f"<b style='width: {width:.1f}%'></b>{tick}</span><span>similarity {source.score:.3f}</span></div>"
    )


def words_html(words: Sequence[str]) -> str:
    """The words that the vectors of the question stand for."""
    if not words:
        return "<p>No words: the vectors of this question name punctuation only.</p>"
    items = "".join(f"<li>{escaped(word)}</li>" for word in words[:N_WORDS])
    return (
        f"<h2>What the question's vectors stand for</h2><ul class='clara-words'>{items}</ul>"
        "<p class='place'>Pieces of words that the model finds nearest to these vectors, the commonest first. "
        "The search compares the vectors, not the words.</p>"
    )


# --- costs -----------------------------------------------------------------------------------------------------------


def readable(number: float | None, unit: str = "") -> str:
    """A number with its unit; bytes in kB and MB of 1,000."""
    if number is None:
        return "&ndash;"
    if unit == "B":
        size, unit = next(((n, u) for n, u in ((1e6, "MB"), (1e3, "kB")) if number >= n), (1, "B"))
        number = number / size
        return f"{number:,.0f} {unit}" if number >= 100 or unit == "B" else f"{number:,.1f} {unit}"
    return f"{number:,.0f} {unit}".strip()


def costs_html(memory: "Cost", text: "Cost | None", codec: str) -> str:
    """Both answers by what they cost; what is counted stands below."""
    rows = [
        ("Positions of the prompt", "prompt_tokens", ""),
        ("of these for the passages", "passage_tokens", ""),
        ("Stored bytes of what was read", "stored_bytes", "B"),
        ("Cache for the prompt", "cache_bytes", "B"),
        ("Until the first word", "first_ms", "ms"),
        ("Until the end", "total_ms", "ms"),
    ]
    cells = "".join(
        f"<tr><th scope='row'>{label}</th><td>{readable(getattr(memory, name), unit)}</td>"
        f"<td>{readable(getattr(text, name), unit) if text else '&hellip;'}</td></tr>"
        for label, name, unit in rows
    )
    return (
        "<table class='clara-costs'><thead><tr><th></th><th scope='col'>From memory</th>"
        f"<th scope='col'>From full text</th></tr></thead><tbody>{cells}</tbody></table>"
        "<p class='place'>A memory takes more bytes than its text, but fewer positions if the passage is long. "
        "Positions are what the model works through at every question.</p>"
        "<details><summary>What is counted</summary><p>A position is a token or a vector: both cost the model the "
        f"same work. Stored bytes are those of the vectors that were read, as {escaped(codec)}, without what all "
        "share; of text those of its title and words in UTF-8. The cache holds keys and values of all layers for the "
        "prompt, in the model's own precision. Times are of this machine, now. They begin with the question: encoding "
        "it, searching, reading and writing. Both answers search. The text that is read is that of the same "
        "passages.</p>"
        "</details>"
    )


# --- rates -----------------------------------------------------------------------------------------------------------


def rates_html(rates: Sequence["Rate"]) -> str:
    """The figures of the card as a table, and what they are."""
    if not rates:
        return "<p>The card of this model has no measurements at several memory sizes.</p>"
    rows = "".join(
        f"<tr><th scope='row'>{escaped(rate.data)}</th><td>{'text' if rate.is_text else rate.memory_size}</td>"
        f"<td>{rate.value:.3f}</td><td>{'' if rate.low is None else f'{rate.low:.3f} to {rate.high:.3f}'}</td></tr>"
        for rate in rates
    )
    return (
        "<p>From the model's card: how well answers agree with the right ones (F1, at most 1), by the number of "
        "vectors that are read of a passage, and if the same model reads the text instead.</p>"
        "<details><summary>As a table</summary><table class='clara-costs'><thead><tr><th scope='col'>Data</th>"
        "<th scope='col'>Vectors</th><th scope='col'>F1</th><th scope='col'>95 % interval</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )
