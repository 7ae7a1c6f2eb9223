"""Documents that look like the right one: by BM25, or by any function from a question to documents, best first."""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..lexical_clara import Bm25, split_words

# From a question and a number to as many documents `{id, title, text}`, best first.
Search = Callable[[str, int], Sequence[Mapping]]
INDEXED = 1024  # documents that are split into words together


class Bm25Search:
    """Searches documents `{id, title, text}` by BM25; what no word finds is filled up by others.

    Args:
        documents: to search; `Lines` are read from their file one by one.
        folder: where the index is, or is made; it is then memory-mapped. Without one it is in memory.
    """

    def __init__(self, documents: Sequence[Mapping], folder: Path | None = None):
        self.documents = documents
        if not len(documents):
            raise ValueError("`documents` must have at least one document, got none. Pass the chunks to search.")
        if folder is None:
            self._bm25 = Bm25.of_words(self._words())
        else:
            with FileLock(f"{folder}.lock"):  # other ranks wait for the one that makes it
                self._bm25 = Bm25.stored(folder, len(documents), self._words)

    def _words(self) -> Iterator[list[str]]:
        texts = (f"{document.get('title') or ''} {document['text']}" for document in self.documents)
        while batch := list(itertools.islice(texts, INDEXED)):
            yield from split_words(batch)

    def __call__(self, question: str, n: int) -> list[Mapping]:
        """The n best documents; those without a word of the question come last, and differ from question to question.

        The same question finds the same documents in every process.
        """
        scores = self._bm25.scores(split_words([question])[0])
        found = np.flatnonzero(scores > 0)
        found = found[np.lexsort((found, -scores[found]))][:n].tolist()
        n_documents, known = len(self.documents), set(found)
        place = zlib.crc32(question.encode())
        while len(found) < min(n, n_documents):
            if (other := place % n_documents) not in known:
                found.append(other)
                known.add(other)
            place += 1
        return [self.documents[number] for number in found]


class MemorySearch:
    """Searches a corpus by its model: `documents` of a chunk each, as the model's own reasoner ranks them."""

    def __init__(self, model, corpus):
        self.model, self.corpus = model, corpus

    def __call__(self, question: str, n: int) -> list[dict]:
        """The n best documents, each by its best chunk."""
        (sources,) = self.model.retrieve([question], corpus=self.corpus, top_k=n)
        return [
            {"id": source.document_id, "title": source.title, "text": source.text, "span": source.span}
            for source in sources
        ]


def draw(*parts) -> random.Random:
    """A generator that gives the same numbers for the same parts, in every process."""
    return random.Random("\0".join(map(str, parts)))


def is_same(document: Mapping, other: Mapping) -> bool:
    """Whether two chunks are one, or have the same text."""
    same_id = document.get("id") is not None and document.get("id") == other.get("id")
    return (same_id and document.get("span", 0) == other.get("span", 0)) or document["text"] == other["text"]


def labelled(document: Mapping) -> dict:
    """A document as a row has it: title and text, and the id of its chunk as a label."""
    return {"id": document.get("id"), "title": document.get("title") or "", "text": document["text"]}


def mixed(
    gold: Sequence[Mapping], others: Sequence[Mapping], generator: random.Random
) -> tuple[list[dict], list[int]]:
    """(documents in a random order, places of the gold ones)."""
    order = list(range(len(gold) + len(others)))
    generator.shuffle(order)
    documents = [*gold, *others]
    places = [place for place, number in enumerate(order) if number < len(gold)]
    return [labelled(documents[number]) for number in order], places
