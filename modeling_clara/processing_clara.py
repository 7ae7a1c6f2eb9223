"""CLaRaProcessor: text to tensors, with chunks, prompts and padding.

Text is data: documents and questions are encoded without added tokens and spliced as ids into the rendered template.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .prompting_clara import (
    ANSWER_PROMPT,
    DOCUMENTS,
    PARAPHRASE_PROMPTS,
    QUESTION,
    SYSTEM_PROMPT,
    EncodedPrompt,
    check_prompt,
    encode_prompt,
    render_prompt,
)
from .text_clara import PlainEncoder, check_count, check_list, check_text, overlap_start, read_document, word_start

IGNORE_INDEX = -100


class Prompt(NamedTuple):
    """One generator input as id lists of equal length."""

    input_ids: list[int]  # the prompt, pad ids at memory slots, and the answer if one was given
    memory_mask: list[bool]  # True at memory slots
    labels: list[int]  # the answer's ids, -100 elsewhere


class CLaRaProcessor(ProcessorMixin):
    """Builds every input of `CLaRaForRAG` from text.

    A ValueError if a prompt lacks a placeholder, a number is out of range, or the tokenizer is not a fast one.

    Args:
        tokenizer: a fast tokenizer, with or without chat template and BOS.
        document_max_length: tokens of one chunk with its title, and BOS unless `add_bos_token` is set (paper: 256).
        document_overlap: tokens that two neighbouring chunks of a document share.
        system_prompt: the generator's instruction.
        answer_prompt: the user turn, with `{documents}` and `{question}`.
        paraphrase_prompts: user turns with `{documents}`; inference uses the first, training draws from all.
        chat_template_kwargs: variables for the chat template; by default `{"enable_thinking": False}`, which templates
            without such a switch ignore: answers here are short.
        chat_template: replaces the tokenizer's.
        encode_in_place: every text is encoded as it stands in its input, after a special token, a question together
            with the template's text around it, and nothing is stripped; False encodes it by itself.
        add_bos_token: BOS before each text of compressor and reasoner; None as the tokenizer does by itself.
        add_eos_token: EOS after each text of compressor and reasoner.
        system_joiner: between instruction and user turn where the chat template has no system role.
        paraphrase_system_prompt: the instruction of paraphrases; None is `system_prompt`.
        stop_at_answer_end: an answer ends at `answer_end_id`, at the tokenizer's EOS, and at what the backbone's
            generation config names; False leaves the last alone.
    """

    attributes = ["tokenizer"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        document_max_length: int = 256,
        document_overlap: int = 32,
        system_prompt: str = SYSTEM_PROMPT,
        answer_prompt: str = ANSWER_PROMPT,
        paraphrase_prompts: Sequence[str] = PARAPHRASE_PROMPTS,
        chat_template_kwargs: dict | None = None,
        chat_template: str | None = None,
        encode_in_place: bool = False,
        add_bos_token: bool | None = None,
        add_eos_token: bool = False,
        system_joiner: str = "\n\n",
        paraphrase_system_prompt: str | None = None,
        stop_at_answer_end: bool = True,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        if not tokenizer.is_fast:
            raise ValueError(
                f"`tokenizer` must be fast, got {type(tokenizer).__name__}. Convert it to tokenizer.json."
            )
        if not 0 <= document_overlap <= document_max_length // 2:
            raise ValueError(
                f"`document_overlap` must be between 0 and half of `document_max_length` ({document_max_length}), got "
                f"{document_overlap}. Lower it."
            )
        for name, is_added in (("bos_token", add_bos_token), ("eos_token", add_eos_token)):
            if is_added and getattr(tokenizer, name) is None:
                raise ValueError(f"`tokenizer` must have a {name} for `add_{name}`, found none. Set one.")
        check_prompt(answer_prompt, name="answer_prompt", has_question=True)
        for prompt in paraphrase_prompts:
            check_prompt(prompt, name="paraphrase_prompts", has_question=False)
        self.document_max_length, self.document_overlap = document_max_length, document_overlap
        self.system_prompt, self.answer_prompt = system_prompt, answer_prompt
        self.encode_in_place, self.add_bos_token, self.add_eos_token = encode_in_place, add_bos_token, add_eos_token
        self.system_joiner, self.paraphrase_system_prompt = system_joiner, paraphrase_system_prompt
        self.stop_at_answer_end, self.paraphrase_prompts = stop_at_answer_end, list(paraphrase_prompts)
        is_default = chat_template_kwargs is None
        self.chat_template_kwargs = {"enable_thinking": False} if is_default else chat_template_kwargs

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        if name in ("tokenizer", "encode_in_place"):  # what follows from it is made when it is first needed
            self._bos = None  # (its BOS, `bos_ids`): asking costs more than encoding a short text
            self._prompts, self._plain = {}, None

    # --- text -> ids -------------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        """Id under padding and memory slots: the tokenizer's pad, else EOS, else 0. Its embedding is never read."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in known if token_id is not None)

    @property
    def bos_ids(self) -> list[int]:
        """`[bos]` if `add_bos_token` is set, or for None the tokenizer puts one before a text by itself; else `[]`."""
        bos = self.tokenizer.bos_token_id
        if self.add_bos_token is not None:
            return [bos] if self.add_bos_token else []
        if self._bos is None or self._bos[0] != bos:
            puts_one = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
            self._bos = (bos, [bos] if puts_one else [])
        return list(self._bos[1])

    @property
    def eos_ids(self) -> list[int]:
        """`[eos]` with `add_eos_token`, else `[]`."""
        return [self.tokenizer.eos_token_id] if self.add_eos_token else []

    @property
    def _input_limit(self) -> int:
        """Ids of a compressor input at most; BOS and EOS that were asked for do not count."""
        return self.document_max_length + bool(self.add_bos_token) + self.add_eos_token

    def encode_text(self, text: str, name: str = "text") -> list[int]:
        """Ids of a user's text, whose markup is plain characters: no BOS and no added token, special or not."""
        return self._encoder.encode(text, name)[0]

    @property
    def _encoder(self) -> PlainEncoder:
        self._plain = self._plain or PlainEncoder(self.tokenizer, is_first=not self.encode_in_place)
        return self._plain

    def encode_questions(self, questions: Sequence[str], name: str = "questions") -> list[list[int]]:
        """Reasoner input of each question: `[BOS?] question [EOS?]`, without memory tokens; errors name the index."""
        encoded = []
        for index, question in enumerate(check_list(questions, name)):
            check_text(question, f"{name}[{index}]")
            ids = self.encode_text(self._stripped(question), f"{name}[{index}]")
            encoded.append(self.bos_ids + ids + self.eos_ids)
        return encoded

    def encode_documents(self, documents: Sequence[str | Mapping], name: str = "documents") -> list[list[int]]:
        """Compressor input of each document: `[BOS?] title "\\n" text [EOS?]`, without the memory tokens.

        A TypeError or ValueError names the index of one that is malformed, empty, or longer than one chunk.
        """
        documents = check_list(documents, name)
        names = [f"{name}[{index}]" for index in range(len(documents))]
        read = [read_document(document, name) for document, name in zip(documents, names, strict=True)]
        headers, texts = [title + "\n" if title else "" for title, _ in read], [text for _, text in read]
        if self.encode_in_place:
            ids_of = self._encoder.encode_many(list(map(str.__add__, headers, texts)), names)
        else:
            pairs = (self._encoder.encode_many(part, names) for part in (headers, texts))
            ids_of = map(list.__add__, *pairs)
        encoded = []
        for index, text_ids in enumerate(ids_of):
            ids = self.bos_ids + text_ids + self.eos_ids
            if len(ids) > self._input_limit:
                spans = self._spans(*read[index], names[index])
                if len(spans) > 1:
                    raise ValueError(
                        f"`{names[index]}` must fit into one span of {self.document_max_length} tokens, got "
                        f"{len(spans)} spans. Split it with `processor.split_document()` and compress the spans."
                    )
                ids = spans[0][2]
            encoded.append(ids)
        return encoded

    def split_document(self, document: str | Mapping, name: str = "document") -> list[dict]:
        """Cut a document, which errors call `name`, into overlapping chunks that share its title and its id.

        One dict per chunk has the document's own fields, `span` (its number), `text` (its part of the text) and
        `n_tokens` (compressor input without memory tokens). A chunk is a document: `compress` takes it. A title of
        more than a quarter of a chunk is not repeated: it becomes the beginning of the text.
        """
        title, text = read_document(document, name)
        fields = dict(document) if isinstance(document, Mapping) else {}
        return [
            {**fields, "title": header, "text": part, "span": number, "n_tokens": len(ids)}
            for number, (header, part, ids) in enumerate(self._spans(title, text, name))
        ]

    def _spans(self, title: str, text: str, name: str) -> list[tuple[str, str, list[int]]]:
        """(title, text, ids) of each chunk, every one at most `_input_limit` ids long."""
        header, offsets = self._input_ids(title, "", name), self._encoder.encode(text, name)[1]
        if len(offsets) <= (limit := self._input_limit) and len(ids := self._input_ids(title, text, name)) <= limit:
            return [(title, text, ids)]
        if title and len(header) > limit // 4:  # too long to stand on every chunk: read once, as text
            return self._spans("", f"{title}\n{text}", name)
        budget = limit - len(header)
        spans, first, covered = [], 0, 0  # the token at which the next chunk begins, the characters that chunks have
        while first < len(offsets):
            start, last = offsets[first][0], min(first + budget, len(offsets))
            end = len(text) if last == len(offsets) else word_start(text, start, offsets[last][0])
            part = text[start:end].strip()
            while (excess := len(ids := self._input_ids(title, part, name)) - limit) > 0:
                last -= excess  # out of its context a text can take more
                end = word_start(text, start, offsets[last][0])
                part = text[start:end].strip()
            if end <= start:
                raise ValueError(
                    f"`document_max_length` must leave room for every character, got {self.document_max_length} for "
                    f"{text[start]!r} in `{name}`. Raise it, or remove the character."
                )
            if text[covered:end].strip():
                spans.append((title, part, ids))
            covered = max(covered, end)
            following = next((index for index in range(first, len(offsets)) if offsets[index][1] > end), len(offsets))
            if following == len(offsets):
                break
            overlap = min(self.document_overlap, (following - first) // 2)  # a short chunk is not repeated whole
            first = overlap_start(text, offsets, max(first + 1, following - overlap), following)
        return spans

    def _input_ids(self, title: str, text: str, name: str) -> list[int]:
        """Ids of one chunk, as `encode_documents` makes them."""
        header = title + "\n" if title else ""
        parts = [header + text] if self.encode_in_place else [header, text]
        return self.bos_ids + [token for part in parts for token in self.encode_text(part, name)] + self.eos_ids

    def _stripped(self, text: str) -> str:
        return text if self.encode_in_place else text.strip()

    # --- prompts -----------------------------------------------------------------------------------------------------

    def build_prompt(
        self,
        question: str | None,
        n_documents: int,
        memory_size: int,
        answer: str | None = None,
        *,
        text_documents: Sequence[str | Mapping] = (),
        prompt: str | None = None,
        name: str = "questions",
    ) -> Prompt:
        """One generator input, the same for training and inference.

        Args:
            question: the question, or None for a paraphrase.
            n_documents: documents read from memory; each takes `memory_size` slots and one for the separator.
            memory_size: k.
            answer: target text; it is followed by the token that ends a turn.
            text_documents: documents whose title and text are written out after the memories.
            prompt: user turn instead of `answer_prompt` or the first of `paraphrase_prompts`.
            name: how an error names the question.
        """
        if prompt is None:
            prompt = self.paraphrase_prompts[0] if question is None else self.answer_prompt
        template = self._encoded_prompt(prompt)
        n_slots = n_documents * (memory_size + 1)
        input_ids, memory_mask = list(template.segments[0]), [False] * len(template.segments[0])
        for slot, segment in zip(template.slots, template.segments[1:], strict=True):
            if slot == DOCUMENTS:
                input_ids += [self.pad_token_id] * n_slots
                memory_mask += [True] * n_slots
                ids = self._text_ids(text_documents)
            else:
                text = template.place(self._stripped(check_text(question, name)))
                ids = self.encode_text(text, name)
            input_ids += ids + segment
            memory_mask += [False] * (len(ids) + len(segment))
        labels = [IGNORE_INDEX] * len(input_ids)
        if answer is not None:
            text = template.answer_prefix + answer if isinstance(answer, str) else answer  # else the next line raises
            answer_ids = [*self.encode_text(text, name.replace("question", "answer")), template.end_id]
            input_ids, labels = input_ids + answer_ids, labels + answer_ids
            memory_mask += [False] * len(answer_ids)
        return Prompt(input_ids, memory_mask, labels)

    def _text_ids(self, documents: Sequence[str | Mapping]) -> list[int]:
        """Ids of documents written out, title and text, a blank line between them."""
        parts = [read_document(document, f"documents[{index}]") for index, document in enumerate(documents)]
        return self.encode_text("\n\n".join(f"{title}\n{text}".strip() for title, text in parts), "documents")

    @property
    def answer_end_id(self) -> int:
        """Id that ends an answer: the first token the chat template puts after one, else EOS."""
        return self._encoded_prompt(self.answer_prompt).end_id

    def _encoded_prompt(self, prompt: str) -> EncodedPrompt:
        """A prompt as ids; only here, in the template, markup counts. Cached."""
        template = self.chat_template or self.tokenizer.chat_template
        is_paraphrase = QUESTION not in prompt and self.paraphrase_system_prompt is not None
        instruction = self.paraphrase_system_prompt if is_paraphrase else self.system_prompt
        settings = (self.system_joiner, self.encode_in_place, str(template), str(self.chat_template_kwargs))
        key = (prompt, instruction, *settings)
        if key not in self._prompts:
            options = {"chat_template": self.chat_template, "tokenize": False, **self.chat_template_kwargs}
            render_chat = partial(self.tokenizer.apply_chat_template, **options) if template else None
            rendered = render_prompt(prompt, instruction, render_chat, self.system_joiner)
            encoded = encode_prompt(self.tokenizer, rendered, prompt, self.pad_token_id, in_place=self.encode_in_place)
            if not template:
                encoded.segments[0][:0] = self.bos_ids
            self._prompts[key] = encoded
        return self._prompts[key]

    # --- ids -> tensors ----------------------------------------------------------------------------------------------

    def pad(self, sequences: Sequence[Sequence], value: int | bool, side: str = "right") -> torch.Tensor:
        """Pad id lists to the longest of them: (rows, length) int64, or bool for a bool `value`."""
        length = max(map(len, sequences))
        padding = [[value] * (length - len(row)) for row in sequences]
        pairs = zip(sequences, padding, strict=True) if side == "right" else zip(padding, sequences, strict=True)
        return torch.tensor([[*first, *last] for first, last in pairs])

    def _pad_ids(self, prefix: str, encoded: Sequence[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
        return {
            f"{prefix}input_ids": self.pad(encoded, self.pad_token_id, side),
            f"{prefix}attention_mask": self.pad([[1] * len(ids) for ids in encoded], 0, side),
        }

    def pad_prompts(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids`, `attention_mask`, `labels` int64 and `memory_mask` bool, all (batch, length)."""
        input_ids, memory_masks, labels = zip(*prompts, strict=True)
        return {
            **self._pad_ids("", input_ids, "left"),
            "memory_mask": self.pad(memory_masks, False, "left"),
            "labels": self.pad(labels, IGNORE_INDEX, "left"),
        }

    def pad_documents(self, encoded: Sequence[Sequence[list[int]]]) -> dict[str, torch.Tensor]:
        """Right-padded `document_input_ids`, `document_attention_mask` (rows, documents, length) int64.

        `encoded` has for each row what `encode_documents` returns; what a row lacks has a mask of zeros.
        """
        n_documents = max(map(len, encoded))
        flat = [ids for row in encoded for ids in [*row, *[[]] * (n_documents - len(row))]]
        shape = (len(encoded), n_documents, -1)
        return {name: rows.view(shape) for name, rows in self._pad_ids("document_", flat).items()}

    def pad_queries(self, encoded: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Right-padded `query_input_ids`, `query_attention_mask` (rows, length) int64, from `encode_questions`."""
        return self._pad_ids("query_", encoded)

    def __call__(
        self,
        questions: Sequence[str | None],
        documents: Sequence[Sequence[str | Mapping]],
        answers: Sequence[str] | None = None,
        *,
        memory_size: int,
        top_k: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A batch for `CLaRaForRAG.forward`: what `pad_documents` and `pad_prompts` return.

        Args:
            questions: one per row, None for a paraphrase of the row's documents.
            documents: a list of documents per row; the lists may differ in length.
            answers: target of each row; without it there are no labels.
            memory_size: k, to be passed to `forward` as well.
            top_k: with it the question is also encoded as a query (`pad_queries`), and min(top_k, documents) slots are
                left for what the selection takes; without it all documents are read.
            return_tensors: only "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}. Leave it out.")
        check_list(questions, "questions")
        if top_k is not None:
            check_count(top_k, "top_k", "Leave it out to read all documents.")
        targets = [None] * len(questions) if answers is None else answers
        for name, values in (("documents", documents), ("answers", targets)):
            if len(check_list(values, name)) != len(questions):
                rule = f"one entry per question ({len(questions)}), got {len(values)}. Make the lists equally long."
                raise ValueError(f"`{name}` must have {rule}")
        if answers is not None and None in answers:
            raise TypeError(f"`answers[{answers.index(None)}]` must be a str, got NoneType. Leave out `answers`.")
        encoded = [self.encode_documents(row, f"documents[{index}]") for index, row in enumerate(documents)]
        features, prompts = self.pad_documents(encoded), []
        for index, (question, row, answer) in enumerate(zip(questions, encoded, targets, strict=True)):
            count = len(row) if top_k is None else min(top_k, len(row))
            prompts.append(self.build_prompt(question, count, memory_size, answer, name=f"questions[{index}]"))
        features |= self.pad_prompts(prompts)
        if answers is None:
            del features["labels"]
        if top_k is not None:
            features |= self.pad_queries(self.encode_questions(questions))
        return BatchFeature(features)


CLaRaProcessor.register_for_auto_class()
