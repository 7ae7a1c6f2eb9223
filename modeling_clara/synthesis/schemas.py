"""JSON schemas of what the teacher writes, by name; `Asker` sends them with the prompts.

They keep to what every endpoint with structured output takes: all keys required, none besides, no bounds.
"""


def _object(title: str, **properties: dict) -> dict:
    return {
        "title": title,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict) -> dict:
    return {"type": "array", "items": items}


TEXT, YES_NO = {"type": "string"}, {"type": "boolean"}
PAIRS = _list({name: value for name, value in _object("", question=TEXT, answer=TEXT).items() if name != "title"})

SIMPLE_PAIRS = _object("simple_pairs", pairs=PAIRS)  # of one fact each; supplementary ones too
COMPLEX_PAIRS = _object("complex_pairs", pairs=PAIRS)  # of two or more facts
VERDICT = _object("verdict", reason=TEXT, supported=YES_NO)  # the reason first: what is written later sees it
COVERAGE = _object("coverage", uncovered=_list(TEXT))  # facts of the document that no pair asks for
PARAPHRASE = _object("paraphrase", paraphrase=TEXT)
PARAPHRASE_VERDICT = _object("paraphrase_verdict", added=_list(TEXT), lost=_list(TEXT))
INSTRUCT_QUESTION = _object("instruct_question", question=TEXT)
TEACHER_ANSWER = _object("teacher_answer", answerable=YES_NO, answer=TEXT)
RETRIEVAL_QUESTION = _object("retrieval_question", question=TEXT, answer=TEXT)

SCHEMAS = {
    schema["title"]: schema
    for schema in (
        SIMPLE_PAIRS,
        COMPLEX_PAIRS,
        VERDICT,
        COVERAGE,
        PARAPHRASE,
        PARAPHRASE_VERDICT,
        INSTRUCT_QUESTION,
        TEACHER_ANSWER,
        RETRIEVAL_QUESTION,
    )
}
