"""The spans that an evaluation retrieves and reads: rows with text, their memories if a system needs them.

All systems see the same rows, so that only what ranks and what reads them differs.
"""

import functools
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.candidates_clara import Source
from recipes.evaluation.progress import Progress


class Spans:
    """Rows `{document_id, span, title, text}`, numbered as in the corpus that holds their memories, if one does.

    `numbers` are those of the rows' spans in their documents; `live` (rows,) bool is False for rows that were deleted.
    """

    def __init__(
        self,
        document_ids: Sequence[str],
        numbers: Sequence[int],
        titles: Sequence[str],
        texts: Sequence[str],
        *,
        live: np.ndarray | None = None,
        corpus: CompressedCorpus | None = None,
    ):
        self.document_ids, self.titles, self.texts, self.corpus = document_ids, titles, texts, corpus
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.live = np.ones(len(texts), dtype=bool) if live is None else live
        starts = [*np.flatnonzero(self.numbers == 0).tolist(), len(texts)]
        pairs = zip(starts, starts[1:], strict=False)
        self.rows = {document_ids[first]: range(first, end) for first, end in pairs if self.live[first]}

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of_documents(cls, model: CLaRaForRAG, documents: Mapping[str, Mapping]) -> "Spans":
        """Spans of documents `{title, text}` by id, cut as the compressor reads them, without memories."""
        spans = [
            {**span, "document_id": document_id}
            for document_id, document in documents.items()
            for span in model.processor.split_document(dict(document), f"document {document_id!r}")
        ]
        return cls(*([span[name] for span in spans] for name in ("document_id", "span", "title", "text")))

    @classmethod
    def of_corpus(cls, corpus: CompressedCorpus) -> "Spans":
        """All spans of a corpus; their texts are held in memory."""
        found = list(corpus.rows())
        n_rows = found[-1]["row"] + 1 if found else 0
        ids, titles, texts = ([""] * n_rows for _ in range(3))  # deleted rows keep their numbers and nothing else
        numbers, live = np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows, dtype=bool)
        for values in found:
            row = values["row"]
            ids[row], titles[row], texts[row] = values["document_id"], values["title"], values["text"]
            numbers[row], live[row] = values["span"], True
        return cls(ids, numbers, titles, texts, live=live, corpus=corpus)

    @functools.cached_property
    def names(self) -> list[str]:
        """Ids of all documents, sorted: several processes that compress leave them in another order."""
        return sorted(self.rows)

    # --- rows --------------------------------------------------------------------------------------------------------

    def rows_of(self, document_ids: Iterable[str]) -> np.ndarray:
        """Rows of these documents, in their order."""
        return np.array([row for name in document_ids for row in self.rows[name]], dtype=np.int64)

    def document(self, row: int) -> dict:
        """`{title, text}` of a row's span."""
        return {"title": self.titles[row], "text": self.texts[row]}

    def source(self, row: int) -> Source:
        """A row's span as the model's own retrieval gives it; its score is not known here."""
        return Source(self.document_ids[row], int(self.numbers[row]), 0.0, self.titles[row], self.texts[row])

    def best_of_documents(self, rows: np.ndarray, scores: np.ndarray, depth: int) -> list[tuple[int, float]]:
        """(row, score) of the best `depth` documents, each by its best span; ties go to the lower row."""
        order = np.lexsort((rows, -scores))
        _, first = np.unique((rows - self.numbers[rows])[order], return_index=True)
        best = order[np.sort(first)][:depth]
        return [(int(rows[index]), float(scores[index])) for index in best]

    def text_bytes(self, row: int) -> int:
        """Bytes of a span's title and text in UTF-8."""
        return len(f"{self.titles[row]}\n{self.texts[row]}".strip().encode())

    # --- memories ----------------------------------------------------------------------------------------------------

    def cosines(self, query: torch.Tensor, rows: np.ndarray | None, depth: int, **options) -> list[tuple[int, float]]:
        """(row, cosine) of the best documents' best spans, by exact cosine (eq. 3.1) with a (k, H) query memory.

        No `rows` search the whole corpus as users do, through its index and with these options, such as `hybrid`.
        """
        if rows is not None:
            return self.corpus.cosines(query[None], rows[None])[0][:depth]
        (hits,) = self.corpus.search(query[None], min(depth, len(self.corpus)), **options)
        return [(self.rows[hit["document_id"]].start + hit["span"], hit["score"]) for hit in hits]

    def memories(self, rows: Sequence[int], memory_size: int) -> torch.Tensor:
        """(rows, k, H) float32."""
        return self.corpus.decode(rows, memory_size)

    def memory_bytes(self, memory_size: int) -> int:
        """Stored bytes of k vectors of a span."""
        return memory_size * self.corpus.vector_bytes


def compress_documents(
    model: CLaRaForRAG, documents: Mapping[str, Mapping], folder: Path, *, rank: int = 0, world_size: int = 1
) -> None:
    """Compress documents `{title, text}` by id into the float16 corpus `folder/float16`; what is there is kept.

    `world_size` processes share the work; whatever their number, the rows are in the order of `documents`.
    """
    given = [{"id": document_id, **document} for document_id, document in documents.items()]
    rows, start = [{}] * len(given), 0
    for number in range(world_size):  # a rank takes every N-th row and they stand rank after rank: the order is kept
        size = len(range(number, len(given), world_size))
        rows[number::world_size] = given[start : start + size]
        start += size
    with Progress("compressing", len(rows), "documents", shown=rank == 0, own_bar=False) as progress:
        options = {"codec": "float16", "batch_size": 16, "rank": rank, "world_size": world_size}
        CompressedCorpus.build(model, _Counted(rows, progress), folder / "float16", **options)


class _Counted(list):
    """Rows that are counted when they are read, anew each time."""

    def __init__(self, rows: Sequence[Mapping], progress: Progress):
        super().__init__(rows)
        self.progress = progress

    def __iter__(self) -> Iterator[Mapping]:
        self.progress.done = 0
        for row in super().__iter__():
            self.progress.update()
            yield row


def finish_codec(folder: Path, codec: str) -> None:
    """Make `folder/CODEC` out of `folder/float16`, unless it is there."""
    if codec == "float16" or CompressedCorpus.is_complete(folder / codec):
        return
    partial = folder / f"{codec}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "float16", partial, ignore=shutil.ignore_patterns("index", "build"))
    CompressedCorpus.open(partial).convert(codec)
    shutil.rmtree(partial / "index", ignore_errors=True)
    partial.rename(folder / codec)


def open_memories(model: CLaRaForRAG, folder: Path, codec: str, n_documents: int) -> Spans:
    """The spans of `compress_documents`, with their memories; a ValueError unless all were compressed."""
    corpus = CompressedCorpus.open(folder / codec, model=model)
    if len(corpus) != n_documents:
        raise ValueError(
            f"all {n_documents} documents must be compressed, but {folder / codec} holds {len(corpus)}: see "
            f"{folder / 'float16' / 'rejected.jsonl'}. Correct the documents or the weights."
        )
    return Spans.of_corpus(corpus)


def match_documents(spans: Spans, documents: Mapping[str, Mapping], titles: Mapping[str, str]) -> dict[str, str]:
    """Ids of a data file -> ids of the same documents in a corpus, of those that it has.

    A document is the same if title and text have the same words; of a corpus document of several spans the first one
    must be the beginning of the data's text. If the data has no text (KILT) it is the document with its id and title,
    or else the only one with its title.
    """
    by_words, by_title, long = {}, defaultdict(list), defaultdict(list)
    for document_id, rows in spans.rows.items():
        title, text = _words(spans.document(rows.start))
        by_title[spans.titles[rows.start].casefold()].append(document_id)
        if len(rows) == 1:
            by_words.setdefault((title, text), document_id)
        else:
            long[title].append((text, document_id))
    found = {}
    for name, document in documents.items():
        title, text = _words(document)
        longer = [document_id for start, document_id in long.get(title, ()) if text.startswith(start)]
        same = by_words.get((title, text), longer[0] if longer else None)
        if same is not None:
            found[name] = same
    for name, title in titles.items():
        candidates = by_title.get(title.casefold(), [])
        if name in spans.rows and (not title or name in candidates or not spans.titles[spans.rows[name].start]):
            found[name] = name
        elif title and len(candidates) == 1:
            found[name] = candidates[0]
    return found


def _words(document: Mapping) -> tuple[str, str]:
    """Title and text without case, white space and punctuation."""
    return tuple(re.sub(r"[\W_]+", "", document[name].casefold()) for name in ("title", "text"))
