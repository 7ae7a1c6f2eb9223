"""Checks and cuts of a user's text: what is a document, where may a span begin and end.

Stands before the processor. It knows nothing of tokenizers' markup, tensors or models.
"""

from collections.abc import Mapping, Sequence


def check_list(values, name: str) -> list:
    """Return `values` as a list, or raise a TypeError or ValueError that says what was expected."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a list, got {type(values).__name__}. Wrap a single one: [{name[:-1]}].")
    if not values:
        raise ValueError(f"`{name}` must have at least one entry, got an empty list. Pass at least one.")
    return list(values)


def check_text(text, name: str) -> str:
    """Return `text`, or raise a TypeError for what is no string and a ValueError for what is empty."""
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a str, got {type(text).__name__}. Pass its text.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r}. Remove it from the list.")
    return text


def read_document(document: str | Mapping, name: str) -> tuple[str, str]:
    """(title, text) of a document, the title "" where there is none.

    Raises:
        TypeError, ValueError: naming the document and the field.
    """
    if isinstance(document, str):
        return "", check_text(document, name)
    if not isinstance(document, Mapping):
        raise TypeError(f"`{name}` must be a str or a dict, got {type(document).__name__}. Pass text or a dict.")
    if "text" not in document:
        raise ValueError(f"`{name}` must have the field 'text', got {sorted(map(str, document))}. Add its text.")
    title = document.get("title")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"`{name}['title']` must be a str, got {type(title).__name__}. Pass text or leave it out.")
    return (title or "").strip(), check_text(document["text"], f"{name}['text']")


def overlap_start(text: str, offsets: list[tuple[int, int]], first: int, following: int) -> int:
    """The first token in [first, following) at the start of a word; else `first`."""
    for index in range(first, following):
        position = offsets[index][0]
        if text[position].isspace() or text[position - 1].isspace():
            return index
    return first


def word_start(text: str, start: int, end: int) -> int:
    """The last start of a word at or before `end`, in the second half of text[start:end]; else `end`."""
    for position in range(end, start + (end - start) // 2, -1):
        if text[position - 1].isspace() or (position < len(text) and text[position].isspace()):
            return position
    return end
