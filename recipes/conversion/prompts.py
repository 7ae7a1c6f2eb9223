"""Prompts of a reference checkpoint: from a JSON file, or from its Python file, which is parsed and never run."""

import ast
import json
import warnings
from collections import Counter
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
        prompts = parse_prompts(source.read_bytes(), str(source))
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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--prompts` must be a JSON file, but {path}: {error}. Correct it.") from error
    if not isinstance(content, dict) or set(content) != set(FIELDS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"`--prompts` must have exactly the keys {list(FIELDS)}, {path} has {found}. Correct it.")
    return content


def _code_file(folder: Path, auto_map: Mapping[str, str]) -> Path:
    """The Python file with the prompts: what `auto_map` names, else any that defines them."""
    entries = auto_map.values() if isinstance(auto_map, Mapping) else ()
    named = [str(entry).rpartition("--")[2].split(".")[0] + ".py" for entry in entries]
    for path in [folder / name for name in dict.fromkeys(named)] + sorted(folder.glob("*.py")):
        if path.is_file() and any(f"def {name}".encode() in path.read_bytes() for name in ANSWER_FUNCTIONS):
            return path
    raise ValueError(f"{folder} must have the Python file with the prompts of the reference, found none. {REMEDY}")


def parse_prompts(code: str | bytes, name: str) -> dict:
    """The prompts (`FIELDS`) that the code of the reference spells out; errors call it `name`.

    A ValueError if a prompt is put together of parts that only running the code would tell, or the functions that
    answer do not have the same.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the code has escapes that Python warns of
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} must be Python to read its prompts: {error}. {REMEDY}") from error
    constants = _bound_once(tree, tree.body)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    answers = [functions[function] for function in ANSWER_FUNCTIONS if function in functions]
    paraphrase, listed = functions.get(PARAPHRASE_FUNCTION), constants.get(PARAPHRASE_LIST)
    if not answers or paraphrase is None or not isinstance(listed, ast.List | ast.Tuple):
        missing = f"{ANSWER_FUNCTIONS[0]}, {PARAPHRASE_FUNCTION} and {PARAPHRASE_LIST}"
        raise ValueError(f"{name} must define {missing}, which hold the prompts. {REMEDY}")
    try:
        found = []
        for function in answers:
            local = _bound_once(function)
            found.append(tuple(_text(local[part], constants) for part in ("prompt_system", "prompt_user")))
        if len(set(found)) > 1:
            raise ValueError(f"{name} must have one prompt for answers, but {ANSWER_FUNCTIONS} differ. {REMEDY}")
        paraphrases = [_text(item, constants).format(docs=DOCUMENTS) for item in listed.elts]
        prompts = {
            "system_prompt": found[0][0],
            "answer_prompt": found[0][1],
            "paraphrase_system_prompt": _text(_bound_once(paraphrase)["prompt_system"], constants),
            "paraphrase_prompts": paraphrases,
        }
    except (KeyError, IndexError) as error:
        raise ValueError(f"{name} must spell out {error} of its prompts. {REMEDY}") from error
    if any("\\ " in text for text in [*prompts["paraphrase_prompts"], prompts["answer_prompt"]]):
        raise ValueError(f"{name} must have prompts without backslashes, which its code replaces. {REMEDY}")
    return prompts


def _bound_once(scope: ast.AST, statements: list[ast.stmt] | None = None) -> dict[str, ast.AST]:
    """Name -> value of the names that a scope binds exactly once, in one plain assignment (of `statements`)."""
    stores = Counter(n.id for n in ast.walk(scope) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    found = {}
    for node in ast.walk(scope) if statements is None else statements:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and len(targets) == 1 and isinstance(targets[0], ast.Name):
            if node.value is not None and stores[targets[0].id] == 1:
                found[targets[0].id] = node.value
    return found


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
