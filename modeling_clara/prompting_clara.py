"""Prompts: the default instructions and the one renderer that training and inference share, to text and to ids.

It never sees a user's text: documents and questions are spliced in later as token ids, so nothing in them can act as
markup.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

DOCUMENTS = "{documents}"
QUESTION = "{question}"

SYSTEM_PROMPT = "Answer briefly from the background."
ANSWER_PROMPT = "Background: {documents}\nQuestion: {question}"
PARAPHRASE_PROMPTS = (
    "Background: {documents}\nRestate the background in your own words.",
    "Background: {documents}\nTell again, in other words, everything that the background says.",
    "Background: {documents}\nWrite a text that carries the same facts as the background.",
)

# Private-use characters: no tokenizer's markup, left alone by the templates' string filters.
_SYSTEM, _DOCUMENTS, _QUESTION, _ANSWER = "\ue000s\ue001", "\ue000d\ue001", "\ue000q\ue001", "\ue000a\ue001"


class RenderedPrompt(NamedTuple):
    """A prompt cut at the places where ids are spliced in."""

    segments: list[str]  # pieces of template text, in order, between them the entries of `slots`
    slots: list[str]  # `"{documents}"` or `"{question}"`, one fewer than `segments`
    answer_prefix: str  # text before an answer, a space in the plain format
    answer_end: str  # template text after an answer, empty if the tokenizer's EOS ends it
    answer_lead: str = ""  # text that the template puts between prompt and answer
    trims: tuple[bool, bool] = (False, False)  # whether the template strips start and end of the user's text


def check_prompt(prompt: str, *, name: str, has_question: bool) -> None:
    """Raise a ValueError unless `prompt` has each placeholder that it needs exactly once."""
    for placeholder, wanted in ((DOCUMENTS, 1), (QUESTION, int(has_question))):
        if prompt.count(placeholder) != wanted:
            raise ValueError(
                f"`{name}` must contain {placeholder} {wanted} time(s), got {prompt.count(placeholder)} in "
                f"{prompt!r}. Correct it in processor_config.json."
            )


def render_prompt(
    prompt: str, system_prompt: str, render_chat: Callable[..., str] | None, joiner: str = "\n\n"
) -> RenderedPrompt:
    """Put the user's `prompt` and the instruction into the chat template.

    A template that drops or repeats the instruction or the user's text is a ValueError.

    Args:
        prompt: user text with `{documents}` and, for answers, `{question}`.
        system_prompt: the instruction. It becomes the system turn, or stands before the user's text if the template
            has no system role, which is found out by rendering.
        render_chat: `(messages, add_generation_prompt) -> text`, or None for the plain format
            `{system_prompt}\\n\\n{prompt}\\nAnswer:` with a space before the answer and EOS after it.
        joiner: between the instruction and the user's text where there is no system role.
    """
    user = prompt.replace(DOCUMENTS, _DOCUMENTS).replace(QUESTION, _QUESTION)
    marks = [mark for mark in (_DOCUMENTS, _QUESTION) if mark in user]
    if render_chat is None:
        return _cut(f"{system_prompt}\n\n{user}\nAnswer:", marks, answer_prefix=" ", answer_end="")
    start, end = system_prompt.partition(system_prompt.strip())[::2] if system_prompt.strip() else (system_prompt, "")
    system = f"{start}{_SYSTEM}{end}"  # blanks around the instruction are the template's to keep or to strip
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = render_chat(messages, add_generation_prompt=True)
    except TemplateError:
        text = ""
    if text.count(_SYSTEM) != 1:
        messages = [{"role": "user", "content": f"{system}{joiner}{user}" if system_prompt else user}]
        text = render_chat(messages, add_generation_prompt=True)
    if text.count(_SYSTEM) != bool(system_prompt or messages[0]["role"] == "system"):
        raise ValueError(
            "the chat template must show the instruction exactly once. Give the processor another `chat_template`."
        )
    content, longer = messages[-1]["content"], []
    for padded in (f" {content}", f"{content} "):
        padded = [*messages[:-1], {"role": "user", "content": padded}]
        longer.append(render_chat(padded, add_generation_prompt=True) == text)
    trims = (longer[0] and content == user, longer[1])
    closed = render_chat([*messages, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    before, _, answer_end = closed.rpartition(_ANSWER) if _ANSWER in closed else ("", "", "")
    cut = _cut(text.replace(_SYSTEM, system_prompt.strip()), marks, answer_prefix="", answer_end=answer_end)
    lead = before.removeprefix(text) if before.startswith(text) else ""
    return cut._replace(trims=trims, answer_lead=lead)


def _cut(text: str, marks: list[str], *, answer_prefix: str, answer_end: str) -> RenderedPrompt:
    """Cut the rendered text at its markers, in the order in which they stand there."""
    names = {_DOCUMENTS: DOCUMENTS, _QUESTION: QUESTION}
    pieces = re.split(f"({'|'.join(names)})", text)
    if not marks or sorted(pieces[1::2]) != sorted(marks):
        raise ValueError(
            "the chat template must show the user's text exactly once. Give the processor another `chat_template`."
        )
    return RenderedPrompt(pieces[::2], [names[mark] for mark in pieces[1::2]], answer_prefix, answer_end)


class EncodedPrompt(NamedTuple):
    """A rendered prompt as ids, cut where the ids of documents and question are spliced in."""

    segments: list[list[int]]  # between them the entries of `slots`
    slots: list[str]
    around: tuple[str, str]  # text of the template that is encoded together with the question, before and after it
    answer_prefix: str
    end_id: int  # ends an answer: the first token of the template's text after one if it is an added token, else EOS
    trims: tuple[bool, bool]  # whether start and end of the question are stripped

    def place(self, question: str) -> str:
        """The question with the text around it."""
        question = question.lstrip() if self.trims[0] else question
        return (question.rstrip() if self.trims[1] else question).join(self.around)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, rendered: RenderedPrompt, prompt: str, pad_token_id: int, *, in_place: bool
) -> EncodedPrompt:
    """Ids of a rendered `prompt`, each piece by itself, or `in_place` as the tokenizer would cut the whole.

    In place a slot counts as a special token, and the text between the question and the next special token on either
    side becomes `around`. `pad_token_id` ends answers if the tokenizer has no EOS.
    """
    segments, around, added = rendered.segments, ("", ""), tokenizer.added_tokens_decoder
    if in_place and QUESTION in rendered.slots:
        place = rendered.slots.index(QUESTION)
        before, after = segments[place : place + 2]
        first = max((end for _, end in _marks(tokenizer, before)), default=0)
        last = min((start for start, _ in _marks(tokenizer, after)), default=len(after))
        around = before[first:], after[:last]
        segments = [*segments[:place], before[:first], after[last:], *segments[place + 2 :]]
    ids = [tokenizer(segments[0], add_special_tokens=False)["input_ids"]]
    # Any special token, whose one id is left out again.
    special = (token.content for token in added.values() if token.special and not (token.lstrip or token.rstrip))
    mark = next(special, "") if in_place else ""
    for segment in segments[1:]:
        encoded = tokenizer(mark + segment, add_special_tokens=False)["input_ids"]
        ids.append(encoded[1:] if mark else encoded)
    end_ids = tokenizer(rendered.answer_end.lstrip(), add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else pad_token_id
    end_id = end_ids[0] if end_ids and end_ids[0] in added else eos
    if not in_place:
        return EncodedPrompt(ids, rendered.slots, around, rendered.answer_prefix, end_id, (False, False))
    ends = (prompt.lstrip().startswith(QUESTION), prompt.rstrip().endswith(QUESTION))
    trims = (rendered.trims[0] and ends[0], rendered.trims[1] and ends[1])
    answer_prefix = rendered.answer_prefix + rendered.answer_lead
    return EncodedPrompt(ids, rendered.slots, around, answer_prefix, end_id, trims)


def _marks(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """(start, end) in characters of the added tokens in a piece of the template."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [span for token, span in pairs if token in tokenizer.added_tokens_decoder]
