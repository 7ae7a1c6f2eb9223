"""CLaRaForRAG: compress, retrieve, answer, stream, paraphrase and explain, all on text.

Every call runs in eval mode without gradient, one thread at a time, and leaves the model as it found it.
"""

import contextlib
import functools
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import GenerationConfig

from .adapters_clara import eval_mode
from .candidates_clara import Source, encode_documents, encode_questions, search
from .checkpoint_clara import CLaRaCheckpoint, sample_embeddings
from .configuration_clara import MEMORY_STATISTICS
from .generation_clara import (
    Answer,
    build_generation_config,
    decode_answer,
    generate_texts,
    keywords,
    stream_text,
    write_answers,
)
from .memory_clara import memory_statistics
from .passes_clara import CLaRaOutput
from .reading_clara import check_expand_below, prepare_reading, prepare_readings
from .text_clara import check_count, check_list, check_text, read_document

__all__ = ["CLaRaForRAG", "CLaRaOutput"]


def text_call(method):
    """Run a method alone, in eval mode, without gradient, and put the training flags back."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with self.lock, eval_mode(self), torch.no_grad():
            return method(self, *args, **kwargs)

    return wrapper


class CLaRaForRAG(CLaRaCheckpoint):
    """Compressor, query reasoner and generator over one causal language model (arXiv 2511.18659).

    Use `from_pretrained` for a trained model and `from_backbone` for fresh adapters on a backbone of your own; both
    attach `model.processor`, which the calls on text need. `CLaRaForRAG(config)` has a backbone with random weights,
    or a loaded causal language model that is given as `backbone`.
    """

    # What training and evaluation use below the calls on text.
    build_generation_config = build_generation_config
    generate_texts = generate_texts
    decode_answer = decode_answer

    @torch.no_grad()
    def compress(
        self, documents: Sequence[str | Mapping], *, memory_size: int | None = None, batch_size: int = 16
    ) -> torch.Tensor:
        """Compress documents of one chunk each into memories; calls of other threads may run between its passes.

        A TypeError or ValueError names the document that is malformed, empty or longer than one chunk (split it with
        `processor.split_document()`), or whose memory is not finite.

        Args:
            documents: texts, or dicts with `text` and optionally `title`.
            memory_size: k, one of `config.memory_sizes`; default the largest.
            batch_size: documents per pass at most, those of similar length together; on CPU they are packed without
                padding, up to `packing_clara.MAX_TOKENS` tokens.

        Returns:
            (documents, k, hidden) float32 on the model's device, in the order given.
        """
        return encode_documents(self, documents, self.config.check_memory_size(memory_size), batch_size)

    @text_call
    def encode_queries(
        self, questions: Sequence[str], *, memory_size: int | None = None, batch_size: int = 16
    ) -> torch.Tensor:
        """Encode questions into the space of the memories: (questions, k, hidden), otherwise as `compress`.

        With `memory_layout` "windows" the largest `memory_size`, and its default, is `config.retrieval_memory_size`:
        questions are read with memory tokens, of which only those that are compared have been trained.
        """
        if memory_size is None and self.config.memory_layout == "windows":
            memory_size = self.config.retrieval_memory_size
        return encode_questions(self, questions, self.config.check_memory_size(memory_size), batch_size)

    @text_call
    def retrieve(
        self,
        questions: Sequence[str],
        *,
        documents: Sequence | None = None,
        corpus=None,
        top_k: int | None = None,
        retrieval_memory_size: int | None = None,
        min_score: float | None = None,
    ) -> list[list[Source]]:
        """Rank documents by the cosine of question and document memory (eq. 3.1).

        A TypeError or ValueError names the argument, the index and the rule.

        Args:
            questions: list of texts.
            documents: one list for all questions, or a list of documents for every question. A document is a text or a
                dict with `text` and optionally `title`, `id` (default: its index) and `memory`, a stored memory
                (n, hidden) that is then not computed again. Long documents are split into chunks.
            corpus: instead of `documents`, a `CompressedCorpus` (filters and more: `corpus.with_options`), or any
                object with `search(query_memory, top_k)` that returns for each question a list of dicts, best first:
                `{document_id, span, score, title, text, memory}`, and `metadata` if it has some. The folder or the Hub
                id of a corpus does as well: it is opened once, and refreshed at every call.
            top_k: documents per question, each by its best chunk; default min(`config.retrieval_top_k`, candidates).
            retrieval_memory_size: k that is compared; default `config.retrieval_memory_size`.
            min_score: sources with a lower cosine are left out.

        Returns:
            For each question its sources, best first; ties go to the lower index.
        """
        hits, _ = search(self, questions, documents, corpus, top_k, retrieval_memory_size, min_score)
        return [[source for source, _ in row] for row in hits]

    @text_call
    def answer(
        self,
        questions: Sequence[str],
        *,
        documents: Sequence | None = None,
        corpus=None,
        top_k: int | None = None,
        memory_size: int | None = None,
        retrieval_memory_size: int | None = None,
        min_score: float | None = None,
        max_new_tokens: int = 64,
        generation_config: GenerationConfig | None = None,
        explain: bool = False,
        expand: int = 0,
        expand_below: float | None = None,
    ) -> list[Answer]:
        """Retrieve, then read the memories of the best documents, or the text of the very best: an `Answer` each.

        Every document that `retrieve` finds with the same arguments is read. Errors are as there; it is also one if a
        prompt and its answer do not fit into the backbone's window, or if a source to be read as text has none.

        Other arguments than those of `retrieve`:
            min_score: if no source reaches it, the model abstains. By default the model abstains if no source reaches
                `config.min_score`, and otherwise reads all sources; -1 switches that off, and so does another
                `retrieval_memory_size` than the config's, of which the threshold was measured.
            memory_size: k that is read; default the largest, or with `memory_layout` "windows" the smallest that has
                a window for every token of the longest source, if one has.
            max_new_tokens: length limit of an answer, in tokens; a limit set in `generation_config` wins.
            generation_config: sampling and search options; default greedy.
            explain: also fill `Answer.keywords`.
            expand: number of best sources whose title and text are read instead of the memory, >= 0; a number larger
                than that of the sources reads all as text. The prompt has the memories first, then the text.
            expand_below: a confidence, above 0 and at most 1. All sources are read from memory, and only a question
                whose `Answer.confidence` is lower then is asked again with `expand`, if the prompt fits into the
                backbone's window. Texts of no more tokens than a memory has vectors are read at once: they cost no
                more. Default: `expand` always holds.
        """
        searched = (documents, corpus, top_k, retrieval_memory_size, min_score)
        hits, words = self.search_to_read(questions, searched, memory_size, expand, explain)
        generation = self.build_generation_config(generation_config, max_new_tokens)
        check_expand_below(expand_below, expand, generation.num_beams)
        readings = {
            index: prepare_readings(
                self, question, row, memory_size, expand, expand_below, generation, f"questions[{index}]"
            )
            for index, (question, row) in enumerate(zip(questions, hits, strict=True))
            if row
        }
        written = dict(zip(readings, write_answers(self, [*readings.values()], generation, expand_below), strict=True))
        return [
            replace(written.get(index, Answer("", [], abstained=True)), keywords=word)
            for index, word in enumerate(words)
        ]

    def stream(
        self,
        question: str,
        *,
        documents: Sequence | None = None,
        corpus=None,
        top_k: int | None = None,
        memory_size: int | None = None,
        retrieval_memory_size: int | None = None,
        min_score: float | None = None,
        max_new_tokens: int = 64,
        generation_config: GenerationConfig | None = None,
        explain: bool = False,
        expand: int = 0,
        expand_below: float | None = None,
    ) -> Generator[str, None, Answer]:
        """Answer one question piece by piece; arguments and errors as in `answer`, and beam search cannot stream.

        With `expand_below` an answer from memory comes in one piece, when it is known to be sure enough.

        Bad arguments raise here, not at the first piece. Generation runs in a thread of its own and stops when the
        iterator of str is closed. The `Answer` is its return value: `answer = yield from model.stream(...)`, or
        `StopIteration.value`.
        """
        check_text(question, "question")
        searched = (documents, corpus, top_k, retrieval_memory_size, min_score)
        hits, words = self.search_to_read([question], searched, memory_size, expand, explain)
        generation = self.build_generation_config(generation_config, max_new_tokens)
        if (generation.num_beams or 1) > 1:
            raise ValueError(f"`num_beams` must be 1 to stream, got {generation.num_beams}. Use `answer` for beams.")
        check_expand_below(expand_below, expand, generation.num_beams)
        options = (memory_size, expand, expand_below, generation, "question")
        readings = prepare_readings(self, question, hits[0], *options) if hits[0] else []
        return stream_text(self, readings, generation, expand_below, words[0])

    @text_call
    def search_to_read(self, questions, searched: tuple, memory_size, expand, explain):
        """Hits, and keywords or None, of each question: the first half of `answer`, `stream` and of a service."""
        largest = self.config.check_memory_size(memory_size)
        check_count(expand, "expand", "Pass 0 to read memories only.", least=0)
        hits, queries = search(self, questions, *searched, largest)
        return hits, keywords(self, queries, 50) if explain else [None] * len(hits)

    @text_call
    def paraphrase(
        self,
        documents: Sequence[str | Mapping],
        *,
        memory_size: int | None = None,
        max_new_tokens: int = 256,
        generation_config: GenerationConfig | None = None,
    ) -> list[str]:
        """Paraphrase each document from its memory, documents as in `compress`, the other arguments as in `answer`."""
        largest = self.config.check_memory_size(memory_size)
        generation = self.build_generation_config(generation_config, max_new_tokens)
        readings = []
        for document, memory in zip(documents, encode_documents(self, documents, largest), strict=True):
            hits = [(Source("", 0, 1.0, *read_document(document, "documents")), memory)]
            readings.append(prepare_reading(self, None, hits, memory_size, 0, generation, "documents"))
        return self.generate_texts([r.prompt for r in readings], [r.memory for r in readings], generation)

    @text_call
    def explain_queries(self, questions: Sequence[str], top_n: int = 50) -> list[list[str]]:
        """Words that the query memories stand for: each vector through the LM head (paper, section 5).

        For each question at most `top_n` words without punctuation and special tokens, those that more vectors name
        first, then by their summed probability. As many tokens are taken from every memory vector.
        """
        vocabulary = self.config.text_config.vocab_size
        if check_count(top_n, "top_n", "Default: 50.") > vocabulary:
            raise ValueError(f"`top_n` must be <= the vocabulary's {vocabulary} tokens, got {top_n}. Default: 50.")
        return keywords(self, self.encode_queries(questions), top_n)

    def load_corpus(self, path_or_repo: str | os.PathLike, revision: str | None = None, **options):
        """Open a `CompressedCorpus` that this model's compressor made, to search it and to add to it.

        Args:
            path_or_repo: folder, or id of a dataset on the Hub.
            revision: branch, tag or commit of the dataset.
            options: of `CompressedCorpus.open`, which has the errors as well: token, cache_dir, local_files_only,
                index, backend, uri, collection.
        """
        return self.corpus_class().open(path_or_repo, revision, model=self, **options)

    @staticmethod
    def corpus_class():
        """The class of `load_corpus`: here the reader; the installed package sets the one that also writes."""
        from .corpus_clara import CompressedCorpus  # here, because a model is loaded without what corpora need

        return CompressedCorpus

    # --- states of the model -----------------------------------------------------------------------------------------

    def normalize_memories(self, documents: Sequence[str | Mapping], *, batch_size: int = 16) -> None:
        """Measure the memories of two or more documents, as `compress` takes them, and normalise all from now on.

        Every channel gets mean 0 and the standard deviation of the token embeddings, see `normalize_memory`. (What
        is measured of windows has their token embeddings in it, which are small beside the states.) For fresh
        adapters, before they train, and for a few hundred documents of the kind that will be compressed. Changes the
        fingerprint; the numbers are saved with the memory tokens. After an error nothing is changed.
        """
        if len(check_list(documents, "documents")) < 2:
            raise ValueError(f"`documents` must be at least 2 to measure a spread, got {len(documents)}. Pass more.")
        with self.lock:
            before, self.config.memory_normalization = self.config.memory_normalization, False
            try:
                states = self.as_read(self.compress(documents, batch_size=batch_size)).flatten(0, 1)
            finally:
                self.config.memory_normalization = before
            sample, scale = sample_embeddings(self)
            statistics = memory_statistics(states, float(sample.std()) * scale)
            for name, values in zip(MEMORY_STATISTICS, statistics, strict=True):
                parameter = nn.Parameter(values.to(self.memory_embeddings.device), requires_grad=False)
                self.register_parameter(name, parameter)
            self.config.memory_normalization = True

    def bulk_compression(self) -> contextlib.AbstractContextManager[None]:
        """Context: merge the compressor for long runs of `compress`; the exact unmerged model is restored on leaving.

        Holds a second copy of the adapted weights while open. All other calls work inside as well, from any thread;
        training there runs unmerged. Legal inside `torch.inference_mode()`, not inside another bulk context.
        """
        return self.roles.merged(("compressor",), self.lock)

    def bulk_answering(self) -> contextlib.AbstractContextManager[None]:
        """`bulk_compression` of reasoner and generator for many questions: two more copies of the adapted weights."""
        return self.roles.merged(("reasoner", "generator"), self.lock)


CLaRaForRAG.register_for_auto_class("AutoModel")
