"""The fields of CARD.yaml: held against what a template takes, and filled with what a folder tells."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
import yaml

Rule = tuple[str, Callable[[object], bool]]  # in words, and whether a value keeps it


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_named(value) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value))


def _is_document(value) -> bool:
    return _is_text(value) or (_is_named(value) and _is_text(value.get("text")))


TEXT: Rule = ("a text", _is_text)
TEXTS: Rule = ("a list of texts", _are_texts)
TEXT_OR_TEXTS: Rule = ("a text or a list of texts", lambda value: _is_text(value) or _are_texts(value))
NAMED: Rule = ("names with values", _is_named)
NAMED_TEXTS: Rule = ("names with a text each", lambda value: _is_named(value) and all(map(_is_text, value.values())))
DOCUMENTS: Rule = (
    "a list of documents, each a text or names with values of which `text` is one",
    lambda value: isinstance(value, list) and bool(value) and all(map(_is_document, value)),
)
METADATA = {"metadata": NAMED, "metadata.license": TEXT_OR_TEXTS}
REQUIRED: dict[str, dict[str, Rule]] = {
    "model.md": {
        **{name: TEXT for name in ("name", "description", "training", "limits", "licences")},
        **METADATA,
        "example": NAMED,
        "example.documents": DOCUMENTS,
        "example.question": TEXT,
    },
    "data.md": {**{name: TEXT for name in ("name", "description", "source", "licences")}, **METADATA},
}
OPTIONAL: dict[str, dict[str, Rule]] = {
    "model.md": {"use": TEXT, "results": TEXT, "data": NAMED_TEXTS},
    "data.md": {"columns": NAMED_TEXTS},
}
OF_METADATA = {"metadata.tags": TEXTS} | {
    f"metadata.{k}": TEXT_OR_TEXTS for k in ("language", "base_model", "datasets")
}
WRITTEN = {"model.md": {"eval_results", "model_name", "model-index"}, "data.md": {"configs", "size_categories"}}
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def read_fields(source: Path, template: str, facts: Mapping) -> dict:
    """The fields of CARD.yaml for a template, with facts of the folder filled into their texts.

    Raises:
        ValueError: a field is missing, unknown, of the wrong kind or cannot be filled in; it is named.
    """
    try:
        fields = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} must be YAML in UTF-8: {reason}. Correct it.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must hold fields and their values, got {type(fields).__name__}. See the models'.")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check(fields, template, source)
    known = set(fields.get("data", {}))
    facts = {**facts, "unknown_data": sorted({n for run in facts.get("runs", ()) for n in run["data"]} - known)}

    def fill(value, place: str):
        if isinstance(value, str):
            return _fill_text(value, facts, place, source)
        if isinstance(value, dict):
            return {key: fill(entry, f"{place}.{key}") for key, entry in value.items()}
        return [fill(entry, place) for entry in value] if isinstance(value, list) else value

    return {name: fill(value, name) for name, value in fields.items()}


def _check(fields: Mapping, template: str, source: Path) -> None:
    required, optional = REQUIRED[template], OPTIONAL[template] | OF_METADATA
    known = {name for name in [*required, *optional] if "." not in name}
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(
            f"`{unknown[0]}` of {source} must be a field of the template {template}, which are: "
            f"{', '.join(sorted(known))}. Rename or remove it."
        )
    for name, (words, holds) in (required | optional).items():
        value = fields
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and name in required:
            raise ValueError(f"`{name}` must be in {source} for the template {template}, found none. Add the field.")
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` of {source} must be {words}, got {value!r:.80}. Correct it.")
    if written := sorted(WRITTEN[template] & set(fields["metadata"])):
        raise ValueError(f"`metadata.{written[0]}` of {source} must be left out: it is written anew. Remove it.")


def _fill_text(text: str, facts: Mapping, place: str, source: Path) -> str:
    try:
        return ENVIRONMENT.from_string(text).render(facts).strip()
    except Exception as error:  # an expression can raise anything
        raise ValueError(
            f"`{place}` of {source} must be a text that can be filled in, but: {error}. Correct what is in braces."
        ) from error


def render(template: str, fields: Mapping) -> str:
    """A template with its fields."""
    return ENVIRONMENT.get_template(template).render(fields)


def _code(value) -> str:
    """A value of YAML as Python, with the quotes of the house."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_code(key)}: {_code(entry)}" for key, entry in value.items()) + "}"
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if isinstance(value, str) else str(value)


def _cell(value) -> str:
    """A text inside a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


ENVIRONMENT.filters |= {"code": _code, "cell": _cell}
