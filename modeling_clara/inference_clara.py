"""The text-level calls of a model: compress, encode_queries, retrieve, answer, stream, paraphrase, explain_queries.

Stands between the user's strings and the passes of `modeling_clara.py`. Every call runs in eval mode without gradient,
one thread at a time, and changes nothing. It knows nothing of losses, files or how a role is switched.
"""

import functools
import math
import numbers
import os
from collections.abc import Generator, Mapping, Sequence

import torch
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from .candidates_clara import Source, collect_candidates, rank_candidates, read_stored_memory
from .corpus_clara import CompressedCorpus
from .generation_clara import Answer, ReaderMixin, eval_mode, returning
from .packing_clara import can_pack, cut_batches
from .processing_clara import CLaRaProcessor
from .text_clara import check_count, check_list, check_text


def text_call(method):
    """Run a method alone, in eval mode, without gradient, and put the training flags back."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with self.lock, eval_mode(self), torch.no_grad():
            return method(self, *args, **kwargs)

    return wrapper


class InferenceMixin(ReaderMixin):
    """Text in, text out. Mixed into `CLaRaForRAG`; needs `model.processor`."""

    @text_call
    def compress(
        self, documents: Sequence[str | Mapping], *, memory_size: int | None = None, batch_size: int = 16
    ) -> torch.Tensor:
        """Compress documents of one span each into memories.

        Args:
            documents: texts, or dicts with `text` and optionally `title`.
            memory_size: k, one of `config.memory_sizes`; default the largest.
            batch_size: documents per pass at most. They are sorted by length first, so a batch has little padding; on
                CPU they are packed without any, up to `packing_clara.MAX_TOKENS` tokens.

        Returns:
            (documents, k, hidden) float32 on the model's device, in the order given.

        Raises:
            TypeError, ValueError: naming the document that is malformed, empty or longer than one span (split it with
                `processor.split_document()`), or that gives a memory that is not finite.
        """
        memory_size = self.config.check_memory_size(memory_size)
        return self._encode_ids(
            "compressor", self.text_processor().encode_documents(documents), memory_size, batch_size
        )

    @text_call
    def encode_queries(
        self, questions: Sequence[str], *, memory_size: int | None = None, batch_size: int = 16
    ) -> torch.Tensor:
        """Encode questions into the space of the memories; arguments and errors as in `compress`.

        With `memory_layout` "windows" the largest `memory_size`, and its default, is `config.retrieval_memory_size`:
        questions are read with memory tokens, of which only those that are compared have been trained.

        Returns:
            (questions, k, hidden) float32 on the model's device.
        """
        trained = self.config.retrieval_memory_size
        if self.config.memory_layout == "windows":
            memory_size = trained if memory_size is None else memory_size
        memory_size = self.config.check_memory_size(memory_size)
        if self.config.memory_layout == "windows" and memory_size > trained:
            raise ValueError(
                f"`memory_size` of questions must be <= `config.retrieval_memory_size` ({trained}), got "
                f"{memory_size}. No more memory tokens were trained; pass a smaller size."
            )
        ids = self.text_processor().encode_questions(questions)
        for index, question_ids in enumerate(ids):
            self.check_window(len(question_ids) + memory_size, f"questions[{index}]")
        return self._encode_ids("reasoner", ids, memory_size, batch_size, name="questions")

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

        Args:
            questions: list of texts.
            documents: one list for all questions, or a list of documents for every question. A document is a text or a
                dict with `text` and optionally `title`, `id` (default: its index) and `memory`, a stored memory
                (n, hidden) that is then not computed again. Long documents are split into spans.
            corpus: in place of `documents`, a `CompressedCorpus` (filters and more: `corpus.with_options`), or any
                object with `search(query_memory, top_k)` that returns for each question a list of dicts, best first:
                `{document_id, span, score, title, text, memory}`.
            top_k: documents per question, each by its best span; default min(`config.retrieval_top_k`, candidates).
            retrieval_memory_size: k that is compared; default `config.retrieval_memory_size`.
            min_score: sources with a lower cosine are left out.

        Returns:
            For each question its sources, best first; ties go to the lower index.

        Raises:
            TypeError, ValueError: naming the argument, the index and the rule.
        """
        hits, _ = self._search(questions, documents, corpus, top_k, retrieval_memory_size, min_score)
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
    ) -> list[Answer]:
        """Retrieve, then read the memories of the best documents, or the text of the very best, and answer.

        Args:
            questions: list of texts.
            documents: as in `retrieve`.
            corpus: as in `retrieve`.
            top_k: as in `retrieve`; every document retrieved is read.
            retrieval_memory_size: as in `retrieve`.
            min_score: as in `retrieve`; if no source reaches it, the model abstains. By default the model abstains if
                no source reaches `config.min_score`, and otherwise reads all sources; -1 switches that off, and so
                does another `retrieval_memory_size` than the config's, of which the threshold was measured.
            memory_size: k that is read; default the largest, or with `memory_layout` "windows" the largest whose
                windows hold 3/4 of a token of the longest source.
            max_new_tokens: length limit of an answer, in tokens; a limit set in `generation_config` wins.
            generation_config: sampling and search options; default greedy.
            explain: also fill `Answer.keywords`.
            expand: number of best sources whose title and text are read instead of the memory, >= 0; a number larger
                than that of the sources reads all as text. The prompt has the memories first, then the text.

        Returns:
            One `Answer` per question.

        Raises:
            TypeError, ValueError: naming the argument, the index and the rule, also when a prompt and its answer do
                not fit into the backbone's window, or when a source to be read as text has none.
        """
        largest = self.config.check_memory_size(memory_size)
        check_count(expand, "expand", "Pass 0 to read memories only.", least=0)
        hits, queries = self._search_to_read(
            questions, documents, corpus, top_k, retrieval_memory_size, min_score, largest
        )
        generation = self.build_generation_config(generation_config, max_new_tokens)
        readings = {
            index: self.prepare_reading(question, row, memory_size, expand, generation, f"questions[{index}]")
            for index, (question, row) in enumerate(zip(questions, hits, strict=True))
            if row
        }
        prompts, memories = [r.prompt for r in readings.values()], [r.memory for r in readings.values()]
        texts = self.generate_texts(prompts, memories, generation)
        keywords = self._keywords(queries, 50) if explain else [None] * len(hits)
        answers = [Answer("", [], keywords[index], abstained=True) for index in range(len(hits))]
        for (index, reading), text in zip(readings.items(), texts, strict=True):
            n_tokens = len(reading.prompt.input_ids)
            answers[index] = Answer(text, reading.sources, keywords[index], prompt_tokens=n_tokens)
        return answers

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
    ) -> Generator[str, None, Answer]:
        """Answer one question piece by piece; arguments and errors as in `answer`.

        Bad arguments raise here, not at the first piece. Generation runs in a thread of its own and stops when the
        iterator is closed.

        Returns:
            Iterator of str. The `Answer` is its return value: `answer = yield from model.stream(...)`, or
            `StopIteration.value`. Beam search cannot stream and is a ValueError.
        """
        check_text(question, "question")
        check_count(expand, "expand", "Pass 0 to read memories only.", least=0)
        largest = self.config.check_memory_size(memory_size)
        with self.lock, eval_mode(self), torch.no_grad():
            hits, queries = self._search_to_read(
                [question], documents, corpus, top_k, retrieval_memory_size, min_score, largest
            )
            keywords = self._keywords(queries, 50)[0] if explain else None
        generation = self.build_generation_config(generation_config, max_new_tokens)
        if (generation.num_beams or 1) > 1:
            raise ValueError(f"`num_beams` must be 1 to stream, got {generation.num_beams}. Use `answer` for beams.")
        if not hits[0]:
            return returning(Answer("", [], keywords, abstained=True))
        prompt, memory, sources = self.prepare_reading(question, hits[0], memory_size, expand, generation, "question")
        answer = Answer("", sources, keywords, prompt_tokens=len(prompt.input_ids))
        return self.stream_text(prompt, memory, generation, answer)

    @text_call
    def paraphrase(
        self,
        documents: Sequence[str | Mapping],
        *,
        memory_size: int | None = None,
        max_new_tokens: int = 256,
        generation_config: GenerationConfig | None = None,
    ) -> list[str]:
        """What each document's memory says back; documents of one span each, as in `compress`.

        Returns:
            One text per document.
        """
        memory_size = self.config.check_memory_size(memory_size)
        generation = self.build_generation_config(generation_config, max_new_tokens)
        ids = self.text_processor().encode_documents(documents)
        memory = self._encode_ids("compressor", ids, memory_size, batch_size=16)
        prompt = self.checked_prompt(None, 1, memory_size, generation, "documents")
        return self.generate_texts([prompt] * len(ids), list(memory[:, None]), generation)

    @text_call
    def explain_queries(self, questions: Sequence[str], top_n: int = 50) -> list[list[str]]:
        """Words that the query memories stand for: each vector through the LM head (paper, section 5).

        Args:
            questions: list of texts.
            top_n: tokens taken from every memory vector and words returned, between 1 and the vocabulary's size.

        Returns:
            For each question at most `top_n` words without punctuation and special tokens, those that more vectors
            name first, then by their summed probability.
        """
        vocabulary = self.config.text_config.vocab_size
        if check_count(top_n, "top_n", "Default: 50.") > vocabulary:
            raise ValueError(f"`top_n` must be <= the vocabulary's {vocabulary} tokens, got {top_n}. Default: 50.")
        return self._keywords(self.encode_queries(questions), top_n)

    def load_corpus(self, path_or_repo: str | os.PathLike, revision: str | None = None, **options) -> CompressedCorpus:
        """Open a corpus that this model's compressor made, to search it and to add to it.

        Args:
            path_or_repo: folder, or id of a dataset on the Hub.
            revision: branch, tag or commit of the dataset.
            options: of `CompressedCorpus.open`: token, cache_dir, local_files_only, index, backend, uri, collection.

        Raises:
            FileNotFoundError: there is no corpus, or a file of it is missing.
            ValueError: a file is damaged, or another compressor made the memories.
        """
        return CompressedCorpus.open(path_or_repo, revision, model=self, **options)

    # --- encoding ----------------------------------------------------------------------------------------------------

    def text_processor(self) -> CLaRaProcessor:
        if self.processor is None:
            raise ValueError(
                "`model.processor` must be set for calls on text, got None. Load the model with `from_pretrained` or "
                "`from_backbone`, or set it to a CLaRaProcessor."
            )
        return self.processor

    def _encode_ids(
        self, role: str, ids: list[list[int]], memory_size: int, batch_size: int, name: str = "documents"
    ) -> torch.Tensor:
        """(texts, k, hidden) float32 of id lists; batches of similar length, one synchronisation at the end."""
        check_count(batch_size, "batch_size", "Default: 16.")
        device = self.memory_embeddings.device
        memory = torch.empty(len(ids), memory_size, self.config.text_config.hidden_size, device=device)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        is_packed = can_pack(self.backbone, len(ids[order[-1]]) + memory_size)
        batches = list(cut_batches(order, [len(text) + memory_size for text in ids], batch_size, is_packed))
        for rows in tqdm(batches, desc=f"{role} passes", delay=2, leave=False):  # a bar after two seconds
            batch = self.text_processor().pad([ids[row] for row in rows], self.text_processor().pad_token_id)
            lengths = torch.tensor([len(ids[row]) for row in rows])
            encoded, _ = self.encode(role, batch.to(device), lengths.to(device), memory_size)
            memory[torch.tensor(rows, device=device)] = encoded.float()
        broken = (~memory.isfinite().flatten(1).all(-1)).nonzero()
        if len(broken):
            raise ValueError(
                f"the memory of `{name}[{int(broken[0])}]` must be finite, got NaN or infinity. The weights of the "
                f"backbone or the {role} are broken: reload them with `from_pretrained`."
            )
        return memory

    # --- retrieval ---------------------------------------------------------------------------------------------------

    def _search(
        self, questions, documents, corpus, top_k, retrieval_memory_size, min_score, memory_size=0
    ) -> tuple[list[list[tuple[Source, torch.Tensor]]], torch.Tensor]:
        """For each question (source, memory (n, hidden)) pairs, best first; and the query memories.

        `memory_size` is what will be read, 0 where nothing is.
        """
        check_list(questions, "questions")
        k_score = self.config.check_memory_size(
            self.config.retrieval_memory_size if retrieval_memory_size is None else retrieval_memory_size,
            "retrieval_memory_size",
        )
        if (documents is None) == (corpus is None):
            raise ValueError("`documents` or `corpus` must be given, not both and not neither. Pass one of them.")
        if top_k is not None:
            check_count(top_k, "top_k", "Leave it out for the default.")
        is_number = isinstance(min_score, numbers.Real) and not isinstance(min_score, bool)
        if min_score is not None and not (is_number and math.isfinite(min_score)):
            raise ValueError(
                f"`min_score` must be a finite number, got {min_score!r}. Pass a cosine between -1 and 1."
            )
        if corpus is not None:
            queries = self.encode_queries(questions, memory_size=k_score)
            options = {}
            if hasattr(corpus, "check_model"):  # a `CompressedCorpus`, also of another copy of this code
                corpus.check_model(self)
                options["questions"] = questions
            hits = corpus.search(queries, top_k or self.config.retrieval_top_k, **options)
            ranked = [[self._read_hit(hit, memory_size) for hit in row] for row in hits]
        else:
            candidates, memory = collect_candidates(self, documents, len(questions), top_k, max(k_score, memory_size))
            queries = self.encode_queries(questions, memory_size=k_score)
            ranked = rank_candidates(queries, candidates, memory, k_score, top_k or self.config.retrieval_top_k)
        if min_score not in (None, -1):  # of -1 nothing is left out, also where rounding made a cosine smaller
            ranked = [[hit for hit in row if hit[0].score >= min_score] for row in ranked]
        return ranked, queries

    def _search_to_read(
        self, questions, documents, corpus, top_k, retrieval_memory_size, min_score, memory_size
    ) -> tuple[list[list[tuple[Source, torch.Tensor]]], torch.Tensor]:
        """`_search`, where a question without a source of `config.min_score` gets none unless the caller sets one."""
        hits, queries = self._search(
            questions, documents, corpus, top_k, retrieval_memory_size, min_score, memory_size
        )
        least, measured = self.config.min_score, self.config.retrieval_memory_size
        if min_score is None and least is not None and retrieval_memory_size in (None, measured):
            hits = [row if any(source.score >= least for source, _ in row) else [] for row in hits]
        return hits, queries

    def _read_hit(self, hit: Mapping, memory_size: int) -> tuple[Source, torch.Tensor]:
        source = Source(**{name: hit[name] for name in ("document_id", "span", "score", "title", "text")})
        name = f"memory of {source.document_id!r} in the corpus"
        return source, read_stored_memory(self, hit["memory"], memory_size, name)

    def _keywords(self, queries: torch.Tensor, top_n: int) -> list[list[str]]:
        """Words of (questions, k, hidden) query memories, see `explain_queries`."""
        head = self.get_output_embeddings()
        tokenizer = self.text_processor().tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        words_of = []
        for query in queries:
            probabilities, tokens = head(self.as_states(query).to(head.weight.dtype)).float().softmax(-1).topk(top_n)
            tokens, probabilities = tokens.tolist(), probabilities.tolist()
            words = {token: tokenizer.decode([token]).strip() for token in set().union(*tokens) - special}
            counts = {}
            for vector_tokens, vector_probabilities in zip(tokens, probabilities, strict=True):
                named = {}
                for token, probability in zip(vector_tokens, vector_probabilities, strict=True):
                    word = words.get(token, "")
                    if any(character.isalnum() for character in word):
                        named[word] = named.get(word, 0.0) + probability
                for word, probability in named.items():
                    count, total = counts.get(word, (0, 0.0))
                    counts[word] = (count + 1, total + probability)
            ranked = sorted(counts, key=lambda word: (-counts[word][0], -counts[word][1], word))  # noqa: B023
            words_of.append(ranked[:top_n])
        return words_of
