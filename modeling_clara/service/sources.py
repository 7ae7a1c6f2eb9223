"""Sources of an answer: a list of our own with scores and texts, and the annotations that OpenAI's clients know.

What a corpus holds may be anything; here it becomes JSON.
"""

import datetime
import math
from collections.abc import Mapping, Sequence

from ..candidates_clara import Source

EXCERPT = 500  # characters of a source's text beside an answer


def json_value(value):
    """A value of metadata as JSON has it: times as ISO text, NaN and infinity as null, else what Python prints."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def url_of(source: Source) -> str | None:
    """Where a source can be opened: the column `url` of its metadata, if it is an address of the web."""
    url = source.metadata.get("url")
    return url if isinstance(url, str) and url.lower().startswith(("https://", "http://")) else None


def source_row(source: Source, excerpt: int | None = EXCERPT) -> dict:
    """A source with at most `excerpt` characters of its text."""
    return {
        "document_id": source.document_id,
        "title": source.title,
        "chunk": source.span,
        "score": json_value(source.score),
        "text": (source.text or "")[:excerpt],
        "read_as": source.read_as,
        "url": url_of(source),
        "metadata": json_value(source.metadata),
    }


def annotations(sources: Sequence[Source], text: str, *, nested: bool) -> list[dict]:
    """A citation of each source: by its url, over the whole text, if it has one, else by document id.

    `nested` is the form of chat completions, in which the fields stand under the citation's type.
    """
    found = []
    for index, source in enumerate(sources):
        title = source.title or source.document_id
        if url := url_of(source):
            kind, fields = "url_citation", {"url": url, "title": title, "start_index": 0, "end_index": len(text)}
        else:
            kind, fields = "file_citation", {"file_id": source.document_id, "filename": title, "index": index}
        found.append({"type": kind, kind: fields} if nested else {"type": kind, **fields})
    return found
