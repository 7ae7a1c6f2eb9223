"""Prompts of a reference checkpoint: from a JSON file, or from its Python file, which is parsed and never run."""

import ast
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from modeling_clara.prompting_clara import DOCUMENTS, QUESTION, check_prompt

FIELDS = ("system_prompt", "answer_prompt", "paraphrase_system_prompt", "paraphrase_prompts")
# Functions of the reference that hold an instruction and a user turn.
ANSWER_FUNCTIONS = ("_blend_standard_prompt", "_blend_prompt_and_selected_memory_tokens")
PARAPHRASE_FUNCTION, PARAPHRASE_LIST = "_blend_paraphrase_prompt", "PARAPHRASE_INSTRUCTIONS"
SLOTS = {"docs": DOCUMENTS, "query": QUESTION, "question": QUESTION}  # variables of the user turn -> our placeholders
REMEDY = "Give the prompts with `--prompts FILE.json`, which has the keys " + ", ".join(FIELDS) + "."


def read_prompts(folder: Path, auto_map: Mapping[str, str] | None, given: Path | None = None) -> dict:
    """The processor's prompts (`FIELDS`) of a checkpoint.

    Args:
        folder: of the checkpoint.
        auto_map: of its config.json, which names the module with the model's code.
        given: JSON file that is taken instead of the code.

    Raises:
        ValueError: there are none, or one lacks a placeholder.
    """
    if given is not None:
        prompts, source = _read_json(given), given
    else:
        source = _code_file(folder, auto_map or {})
        prompts = parse_prompts(source.read_text(encoding="utf-8"), str(source))
    for name in ("system_prompt", "paraphrase_system_prompt", "answer_prompt"):
        if not isinstance(prompts[name], str):
            raise ValueError(f"`{name}` in {source} must be text, got {type(prompts[name]).__name__}. Correct it.")
    paraphrases = prompts["paraphrase_prompts"]
    if not isinstance(paraphrases, list) or not paraphrases or not all(isinstance(p, str) for p in paraphrases):
        raise ValueError(f"`paraphrase_prompts` in {source} must be a list of texts, got {paraphrases!r}. Correct it.")
    for name, texts, has_question in (("answer_prompt", [prompts["answer_prompt"]], True),) + (
        ("paraphrase_prompts", paraphrases, False),
    ):
        for text in texts:
            try:
                check_prompt(text, name=name, has_question=has_question)
            except ValueError as error:
                raise ValueError(f"{source}: {error}".replace("processor_config.json", str(source))) from error
    return {name: prompts[name] for name in FIELDS}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--prompts` must be a JSON file, but {path}: {error}. Correct it.") from error
    if not isinstance(content, dict) or set(content) != set(FIELDS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"`--prompts` must have exactly the keys {list(FIELDS)}, {path} has {found}. Correct it.")
    return content


def _code_file(folder: Path, auto_map: Mapping[str, str]) -> Path:
    """The Python file with the prompts: what `auto_map` names, else any that defines them."""
    named = [str(entry).rpartition("--")[2].split(".")[0] + ".py" for entry in auto_map.values()]
    files = [folder / name for name in dict.fromkeys(named)] + sorted(folder.glob("*.py"))
    for path in files:
        if path.is_file() and any(f"def {name}" in path.read_text(encoding="utf-8") for name in ANSWER_FUNCTIONS):
            return path
    raise ValueError(f"{folder} must have the Python file with the prompts of the reference, found none. {REMEDY}")


def parse_prompts(code: str, name: str) -> dict:
    """The prompts (`FIELDS`) that the code of the reference spells out; errors call it `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the code has escapes that Python warns of
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} must be Python to read its prompts: {error}. {REMEDY}") from error
    constants = {target: node.value for node in tree.body for target, node in _assignments(node)}
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    answer = next((functions[function] for function in ANSWER_FUNCTIONS if function in functions), None)
    paraphrase = functions.get(PARAPHRASE_FUNCTION)
    listed = constants.get(PARAPHRASE_LIST)
    if answer is None or paraphrase is None or not isinstance(listed, ast.List | ast.Tuple):
        missing = f"{ANSWER_FUNCTIONS[0]}, {PARAPHRASE_FUNCTION} and {PARAPHRASE_LIST}"
        raise ValueError(f"{name} must define {missing}, which hold the prompts. {REMEDY}")
    local = {
        function.name: {target: inner.value for part in ast.walk(function) for target, inner in _assignments(part)}
        for function in (answer, paraphrase)
    }
    try:
        return {
            "system_prompt": _text(local[answer.name]["prompt_system"], constants),
            "answer_prompt": _text(local[answer.name]["prompt_user"], constants),
            "paraphrase_system_prompt": _text(local[paraphrase.name]["prompt_system"], constants),
            "paraphrase_prompts": [_text(item, constants).replace("{docs}", DOCUMENTS) for item in listed.elts],
        }
    except KeyError as error:
        raise ValueError(f"{name} must spell out {error} of its prompts. {REMEDY}") from error


def _assignments(node: ast.AST):
    """(name, statement) of an assignment to one plain name."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node


def _text(node: ast.AST, constants: Mapping[str, ast.AST]) -> str:
    """The text of an expression of strings, with our placeholders for its variables; else a KeyError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        if node.conversion != -1 or node.format_spec is not None:
            raise KeyError(ast.unparse(node))
        return _text(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in SLOTS:
        return SLOTS[node.id]
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], {})
    raise KeyError(ast.unparse(node))
