"""Bodies of requests: those of OpenAI's clients with our options beside theirs, and those of documents.

A parameter that changes what a client gets and that we do not have is refused; one that changes nothing is accepted.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

TEXT_PARTS = ("text", "input_text", "output_text")
# Accepted without effect: nothing here stores, caches, reasons or bills.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning", "reasoning_effort", "verbosity", "parallel_tool_calls", "top_logprobs"),
}
# Accepted with a value that asks for nothing else than what we do.
NEUTRAL = {
    "n": (1,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "text": ({"format": {"type": "text"}}, {}),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
}
REFUSED = {name: "embeddings are made here. Send text" for name in ("prompt_embeds", "input_embeds", "inputs_embeds")}
REFUSED |= dict.fromkeys(
    ("previous_response_id", "conversation", "prompt"), "nothing is stored here. Send the earlier turns as messages"
)


def refuse(param: str, message: str, kind: str) -> PydanticCustomError:
    """An error of a parameter, whose message is told as it is."""
    return PydanticCustomError(kind, "{message}", {"message": message, "param": param})


def join_parts(content: Any) -> Any:
    """The text of a message: a string, or parts of the type text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise refuse(
                "content",
                f"parts must have the type 'text' and a text, got {str(kind)[:40]!r}. Only text is read here.",
                "unsupported_part",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def as_list(value: Any) -> Any:
    """A single string as a list."""
    return [value] if isinstance(value, str) else value


_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Content = Annotated[
    str,
    BeforeValidator(join_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(as_list),
    Field(max_length=4),
    WithJsonSchema(_STRINGS),
]


class Body(BaseModel):
    """A JSON object without unknown fields; null is as good as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, given: Any) -> Any:
        """Nulls are not given."""
        return (
            {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given
        )


class Options(Body):
    """Our own options, in `extra_body` of an OpenAI client; their meaning is that of `CLaRaForRAG.answer`."""

    top_k: int | None = Field(None, ge=1, le=1000, description="documents that are read")
    memory_size: int | None = Field(None, ge=1, description="memory vectors that are read")
    retrieval_memory_size: int | None = Field(None, ge=1, description="memory vectors that are compared")
    expand: int = Field(0, ge=0, description="best sources that are read as text")
    expand_below: float | None = Field(
        None, gt=0, le=1, description="that only where the answer from memory has a lower confidence"
    )
    min_score: float | None = Field(None, description="abstain if no document has this cosine")
    where: dict[str, Any] | None = Field(None, description="a filter on metadata")
    hybrid: bool | None = Field(
        None, description="also rank by BM25 over the text; default: as the server was started"
    )


class Sampling(Options):
    """What both ways of asking share."""

    model: str
    temperature: float = Field(0.0, ge=0, le=2, description="0, the default, is greedy search")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def drop_harmless(cls, given: Any) -> Any:
        """Leave out what changes nothing, and refuse what we cannot do by its name."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in REFUSED and value is not None:
                raise refuse(name, f"`{name}` is not accepted: {REFUSED[name]}.", "unsupported_parameter")
            if name in IGNORED or (name in NEUTRAL and _is_neutral(name, value)):
                continue
            if name in NEUTRAL and name not in cls.model_fields and value is not None:
                allowed = " or ".join(repr(known) for known in NEUTRAL[name])
                message = f"`{name}` must be {allowed}, if it is given: nothing else is supported. Leave it out."
                raise refuse(name, message, "unsupported_value")
            kept[name] = value
        return kept


def _is_neutral(name: str, value: Any) -> bool:
    if name == "text" and isinstance(value, dict):
        value = {key: part for key, part in value.items() if key not in IGNORED}
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in NEUTRAL[name])


class Message(Body):
    """One turn. Other fields, which clients send back with earlier answers, are ignored."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(Body):
    """Of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, description="the last one is the question")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop = []
    stream_options: StreamOptions = StreamOptions()


class ResponsesBody(Sampling):
    """`POST /v1/responses`."""

    input: Annotated[
        list[Message],
        BeforeValidator(lambda value: [{"role": "user", "content": value}] if isinstance(value, str) else value),
        Field(min_length=1, description="the last message is the question"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream_options: dict[str, Any] | None = None


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`: vectors of questions, comparable with those of a corpus."""

    model: str
    input: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(as_list),
        Field(min_length=1),
        WithJsonSchema(_STRINGS),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="memory vectors times hidden size; default: as searched")
    user: str | None = None


class SearchBody(Body):
    """`POST /search`."""

    query: str
    top_k: int | None = Field(None, ge=1, le=1000)
    retrieval_memory_size: int | None = Field(None, ge=1)
    min_score: float | None = None
    where: dict[str, Any] | None = None
    hybrid: bool | None = None


class DocumentBody(Body):
    """A document. `metadata` are columns of the corpus; a memory is not accepted, it is made here."""

    id: str | None = Field(None, min_length=1)
    title: str | None = None
    text: str
    metadata: dict[str, Any] = {}


class DocumentsBody(Body):
    """`POST /documents` adds; `PUT /documents` replaces too."""

    documents: list[DocumentBody] = Field(min_length=1)


class PutBody(DocumentsBody):
    """`PUT /documents`."""

    create: bool = Field(True, description="false: only replace documents that are there")
