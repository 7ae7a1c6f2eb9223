"""A user's text: checks of what is given, documents, ids without added tokens, borders of chunks, words.

An error calls a value by the name that it is given, for example `documents[3]`.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from copy import deepcopy

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

BATCH = 256  # texts that are encoded at once
STEM = 5  # first letters by which `word_overlap` compares words
WORD = "(?:(?<!{letter}['’])|(?={letter}{{2}})){letter}+{marks}"  # no s of "it's", no t of "don't"
ASCII_WORD = re.compile(WORD.format(letter="[a-z0-9]", marks=""))
# Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters with their extensions.
NO_SPACES = (
    "\u0e01-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
SPACELESS = re.compile(f"[{NO_SPACES}]")
# Soft hyphens, joiners and variation selectors stand inside words and say nothing.
IGNORED = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")


def check_list(values, name: str) -> list:
    """Return `values` as a list, or raise a TypeError or ValueError that says what was expected."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a list, got {type(values).__name__}. Wrap a single one in [].")
    if not values:
        raise ValueError(f"`{name}` must have at least one entry, got an empty list. Pass at least one.")
    return list(values)


def check_string(text, name: str) -> None:
    """Raise a TypeError for what is no string."""
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a str, got {type(text).__name__}. Pass its text.")


def check_text(text, name: str) -> str:
    """Return `text`, or raise a TypeError for what is no string and a ValueError for what is empty."""
    check_string(text, name)
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r}. Remove it from the list.")
    return text


def check_count(value, name: str, remedy: str, least: int = 1) -> int:
    """Return `value`, or raise a ValueError unless it is an int >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an int >= {least}, got {value!r}. {remedy}")
    return value


def check_id(document_id) -> str:
    """Return the id of a document, or raise a TypeError unless it is text."""
    if not isinstance(document_id, str):
        raise TypeError(f"`ids` must be texts, got {document_id!r}. Ids are stored as text: pass '{document_id}'.")
    return document_id


def given_id(document: Mapping):
    """The id that a document brings, in `answer` and in `build`: its `id`, else its `document_id`, else None."""
    return document["id"] if document.get("id") is not None else document.get("document_id")


def read_document(document: str | Mapping, name: str) -> tuple[str, str]:
    """(title, text) of a document, the title "" if it has none; a TypeError or ValueError names it and the field."""
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


def _not_first(part):
    """A component of a tokenizer, as JSON, with everything left out that it does at the start of its input only."""
    if isinstance(part, list):
        return [_not_first(item) for item in part]
    if not isinstance(part, dict):
        return part
    is_first = part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
    return {name: _not_first(item) for name, item in part.items()} | ({"prepend_scheme": "never"} if is_first else {})


class PlainEncoder:
    """Encodes text as data: a fast tokenizer without its added tokens.

    Text is encoded as the start of an input, or with `is_first=False` as what follows a special token: the two differ
    if the tokenizer puts a blank in front of its input.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_first: bool = True):
        backend = tokenizer.backend_tokenizer
        self.tokenizer = Tokenizer(backend.model)
        self.tokenizer.normalizer, self.tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        if not is_first and backend.pre_tokenizer is not None:
            pre_tokenizer = deepcopy(backend.pre_tokenizer)
            state = _not_first(json.loads(pre_tokenizer.__getstate__()))
            pre_tokenizer.__setstate__(json.dumps(state).encode())
            self.tokenizer.pre_tokenizer = pre_tokenizer
        self.added_ids = set(tokenizer.added_tokens_decoder)
        # From a text the unknown token says only that a character was not known, unless it doubles as a turn's mark.
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            self.added_ids.discard(tokenizer.unk_token_id)

    def _check(self, text: str, name: str) -> None:
        check_string(text, name)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must be valid UTF-8, got a lone surrogate at character {error.start}. Decode the source "
                "with the right encoding."
            ) from error

    def encode_many(self, texts: Sequence[str], names: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, as `encode` gives them one by one; on several cores if the tokenizer may use them."""
        found, named = [], list(zip(texts, names, strict=True))
        for start in range(0, len(named), BATCH):  # an encoding is many times larger than its ids
            batch = named[start : start + BATCH]
            for text, name in batch:
                self._check(text, name)
            encodings = self.tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (text, name), ids in zip(batch, [encoding.ids for encoding in encodings], strict=True):
                found.append(ids if self.added_ids.isdisjoint(ids) else self.encode(text, name)[0])
        return found

    def encode(self, text: str, name: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their character ranges in `text`, none of them an added token.

        A TypeError if it is no string, a ValueError if it is no UTF-8 or has a character that exists as an added
        token only.
        """
        self._check(text, name)
        ids, offsets, pieces = [], [], [(0, len(text))]
        while pieces:
            start, end = pieces.pop()
            encoding = self.tokenizer.encode(text[start:end], add_special_tokens=False)
            if self.added_ids.isdisjoint(encoding.ids):
                ids += encoding.ids
                offsets += [(start + first, start + last) for first, last in encoding.offsets]
                continue
            # A model that holds markup as ordinary pieces (Unigram does): cut the text inside each of them.
            cuts = [start]
            for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self.added_ids and last - first < 2:
                    raise ValueError(
                        f"`{name}` must not contain {text[start + first : start + last]!r} (character "
                        f"{start + first}), which this tokenizer can only read as markup. Remove it."
                    )
                if token in self.added_ids:
                    cuts.append(start + first + 1)
            cuts.append(end)
            pieces += reversed(list(zip(cuts[:-1], cuts[1:], strict=True)))
        return ids, offsets


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


def word_overlap(question: str, text: str) -> float:
    """How much of a question's words a text has, 0 to 1.

    Words are compared by their first five letters and count as the square of these: short ones say little.

    >>> word_overlap("Who painted the ceiling?", "Its ceilings were painted in 1512.").__round__(3)
    0.735
    """
    asked, found = ({word[:STEM] for word in raw_words(given)} for given in (question, text))
    weights = {word: len(word) ** 2 for word in asked}
    return sum(weights[word] for word in asked & found) / max(1, sum(weights.values()))


def raw_words(text: str) -> list[str]:
    """Letters, digits and combining marks, in NFKC without case; of scripts without spaces pairs of characters."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    text = unicodedata.normalize("NFKC", IGNORED.sub("", text)).casefold()
    marks, find_words, find_runs = _patterns()
    words = find_words(text)
    if not SPACELESS.search(text):
        return words
    pairs = []
    for run in (run for word in words for run in find_runs(word)):
        characters = []  # each with its marks
        for character in run if SPACELESS.match(run) else [run]:
            if characters and character in marks:
                characters[-1] += character
            else:
                characters.append(character)
        pairs += map(str.__add__, characters, characters[1:]) if len(characters) > 1 else characters
    return pairs


@functools.cache
def _patterns() -> tuple:
    """The combining marks; what finds words; what finds the parts of a word with and without spaces."""
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    words = WORD.format(letter=r"[^\W_]", marks=f"(?:[{marks}]+[^\\W_]*)*")
    runs = f"[{NO_SPACES}][{NO_SPACES}{marks}]*|[^{NO_SPACES}]+"
    return frozenset(marks), re.compile(words).findall, re.compile(runs).findall
