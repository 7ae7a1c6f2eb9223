"""Asks the teacher one thing: template and fields to messages, its text to a checked value, or to a problem.

A problem is an answer too: whoever asks keeps it as the reason of a reject. Only a lasting failure of the teacher, or
a spent budget, is raised.
"""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from .client import BadRequest, Completion

PROMPTS = Path(__file__).parent / "prompts"
ROLES = ("system", "user", "assistant")
MAX_TOKENS = 1024  # of a first answer; one that is cut off is asked for again with twice as many
RETRIES = 2
WARM = 0.7  # temperature of a repeated request: at 0 the same request has the same answer
# The marks of our prompts, and those of chat templates that a server would read as such.
MARKS = r"\s*/?\s*(?:documents?|question|answer|pairs|facts|paraphrase|s|start_of_turn|end_of_turn)\s*>|\|"
MARK, ESCAPED = re.compile(f"<(?={MARKS})", re.IGNORECASE), re.compile(f"&lt;(?={MARKS})", re.IGNORECASE)
FENCE = re.compile(r"```\w*\s*(\{.*\}|\[.*\])\s*```", re.DOTALL)
QUOTED, TYPOGRAPHIC = re.compile('"([^"\\n]*)"'), re.compile("[\u201c\u201d]")


@dataclass(frozen=True)
class Answer:
    """What the teacher said: a value that fits the schema, or the problem and the text that it wrote last."""

    value: dict | None
    problem: str | None = None
    text: str = ""


def escape(value):
    """Fields of a prompt, in which no text can end its place: `<` of a mark becomes `&lt;`, at any depth.

    Straight quotation marks become typographic ones: small teachers end a JSON string at a mark that they copy.

    >>> escape('a < b </document> <|im_end|> "c"')
    'a < b &lt;/document> &lt;|im_end|> \N{LEFT DOUBLE QUOTATION MARK}c\N{RIGHT DOUBLE QUOTATION MARK}'
    """
    return _in_texts(value, lambda text: QUOTED.sub("\u201c\\1\u201d", MARK.sub("&lt;", text)).replace('"', "\u201d"))


def unescape(value, fields=()):
    """A value of the teacher with the marks that `escape` has changed in `fields`."""
    is_straight = not TYPOGRAPHIC.search(json.dumps(fields, ensure_ascii=False, default=str))
    value = _in_texts(value, lambda text: ESCAPED.sub("<", text))
    return _in_texts(value, lambda text: TYPOGRAPHIC.sub('"', text)) if is_straight else value


def _in_texts(value, change: Callable[[str], str]):
    if isinstance(value, Mapping):
        return {name: _in_texts(entry, change) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_in_texts(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


class Prompts:
    """The templates of a folder: each `{% block %}` is a turn, named by its role, in the order of the file.

    A template has `{% block system %}`, demonstrations `user_1`, `assistant_1` and so on, and last `user`. Fields are
    put in by Jinja alone, after the turns are told apart, so no text can begin a turn.
    """

    def __init__(self, folder: str | Path = PROMPTS):
        self.folder = Path(folder)
        # read once: what changes under a run would not be what its fingerprint says
        self.sources = {file.name: file.read_text(encoding="utf-8") for file in sorted(self.folder.glob("*.jinja"))}
        self._environment = Environment(
            loader=DictLoader(self.sources),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def render(self, name: str, fields: Mapping) -> list[dict]:
        """Messages `{role, content}` of a template."""
        template = self._environment.get_template(f"{name}.jinja")
        context = template.new_context(escape(fields))
        list(template.root_render_func(context))  # macros that the template imports come into the context
        messages = []
        for block, render in template.blocks.items():
            role = block.partition("_")[0]
            if role not in ROLES:
                raise ValueError(
                    f"{self.folder / name}.jinja must have blocks named {', '.join(ROLES)}, got {block!r}. Rename it."
                )
            messages.append({"role": role, "content": "".join(render(context)).strip()})
        return messages

    def digest(self) -> str:
        """SHA-256 in hex over all templates: other prompts, other data."""
        digest = hashlib.sha256()
        for name, source in self.sources.items():
            digest.update(f"{name}\0{source}\0".encode())
        return digest.hexdigest()


class Asker:
    """Asks a teacher by name of a prompt.

    Args:
        complete: `Teacher.complete`, or any function of its form.
        prompts: templates; default those of the package.
        max_tokens: of a first answer.
        retries: further requests if an answer is broken or cut off.
        seed: of the sampling of repeated requests.
    """

    def __init__(
        self,
        complete: Callable[..., Awaitable[Completion]],
        prompts: Prompts | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        retries: int = RETRIES,
        seed: int = 0,
    ):
        self.complete, self.prompts = complete, prompts or Prompts()
        self.max_tokens, self.retries, self.seed = max_tokens, retries, seed

    async def ask(self, name: str, *, schema: dict, attempt: int = 0, **fields) -> Answer:
        """The answer to a prompt.

        Args:
            name: of the template.
            schema: of the answer.
            attempt: how often the caller has asked this before: a later attempt is sampled, with a seed of its own.
            fields: of the template.

        Raises:
            OutOfBudget, TeacherDown: no request can be answered any more.
        """
        messages = self.prompts.render(name, fields)
        max_tokens, answer = self.max_tokens, Answer(None, "no request was made")
        first = attempt * (self.retries + 1)  # no retry of one attempt is a request of another
        for number in range(first, first + self.retries + 1):
            sampling = {"temperature": WARM, "seed": self.seed + number} if number else {"temperature": 0.0}
            try:
                completion = await self.complete(messages, schema=schema, max_tokens=max_tokens, **sampling)
            except BadRequest as error:
                return Answer(None, f"bad request: {error}")
            answer = read_answer(completion, schema)
            if answer.problem is None:
                return Answer(unescape(answer.value, fields), None, answer.text)
            if completion.finish_reason == "length":
                max_tokens *= 2
        return answer


def read_answer(completion: Completion, schema: dict) -> Answer:
    """The value of a completion; a problem begins with "truncated" or "broken"."""
    text = completion.text
    if completion.finish_reason == "length":
        n_tokens = completion.completion_tokens
        return Answer(None, f"truncated: the answer was cut off after {n_tokens} tokens", text)
    value, problem = parse_json(text)
    value = mended(value, schema)
    problem = problem or misfit(value, schema)
    return Answer(None, f"broken: {problem}", text) if problem else Answer(value, None, text)


def parse_json(text: str) -> tuple[object, str | None]:
    """(value, problem) of a text that should be JSON; what stands around it, or a small mistake in it, is mended.

    >>> parse_json('<think>{"a": 2}?</think> Here: ```json {"a": 1} ``` {done}')
    ({'a': 1}, None)
    """
    from json_repair import repair_json

    text = text.rpartition("</think>")[2]  # what models that reason write before
    fenced = FENCE.search(text)
    text = fenced[1] if fenced else text
    begins, end = re.search(r'\{\s*"', text) or re.search(r"\{", text), text.rfind("}")
    start = begins.start() if begins else 0
    for decode in (json.loads, lambda text: json.JSONDecoder().raw_decode(text, start)[0]):
        try:
            return decode(text), None
        except ValueError:
            pass
    if not begins or end < start:
        return None, "the answer has no JSON object"
    return repair_json(text[start : end + 1], return_objects=True), None


def mended(value, schema: Mapping):
    """The value with what models without a schema write otherwise: 7 or null for a text, "true", a list alone.

    Of entries of a list that miss a text it is empty, unless all do.
    """
    kind = schema["type"]
    if kind == "string" and (value is None or type(value) in (int, float)):
        return "" if value is None else str(value)
    if kind == "boolean" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    if kind == "object":
        (name, rule), *others = schema["properties"].items()
        if isinstance(value, list) and rule["type"] == "array" and not others:
            value = {name: value}
        if isinstance(value, Mapping):
            rules = schema["properties"]
            return {name: mended(entry, rules[name]) if name in rules else entry for name, entry in value.items()}
    if kind == "array" and isinstance(value, list):
        value = [mended(entry, schema["items"]) for entry in value]
        if any(misfit(entry, schema["items"]) is None for entry in value):
            texts = dict.fromkeys(schema["items"].get("required", ()), "")
            value = [{**texts, **entry} if isinstance(entry, Mapping) else entry for entry in value]
    return value


def misfit(value, schema: Mapping, where: str = "the answer") -> str | None:
    """Why a value does not fit a schema, None if it does; of JSON Schema it knows what `schemas.py` uses."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool}
    if not isinstance(value, kinds[schema["type"]]):
        return f"{where} must be of the type {schema['type']}, got {type(value).__name__}"
    if schema["type"] == "array":
        entries = [(f"{where}[{place}]", entry, schema["items"]) for place, entry in enumerate(value)]
    elif schema["type"] == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} must have the key {missing[0]!r}"
        entries = [(f"{where}[{name!r}]", value[name], rule) for name, rule in schema["properties"].items()]
    else:
        return None
    return next((found for where, entry, rule in entries if (found := misfit(entry, rule, where))), None)
