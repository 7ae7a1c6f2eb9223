"""The rules of the house that can be counted: what travels, how long files and functions are, who imports whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = [*(ROOT / "modeling_clara").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), ROOT / "upload.py"]
FILES = [*CODE, *(ROOT / "tests").rglob("*.py")]
TRAVELLING_FILES, TRAVELLING_LINES = 24, 5_670
FILE_LINES, FUNCTION_LINES = 400, 60


def relative_imports(path: Path) -> list[Path]:
    """The files beside this one that it imports, inside functions as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    return [path.parent / f"{name}.py" for name in sorted(filter(None, names))]


def closure(path: Path) -> set[Path]:
    """A file and all that it imports from beside it."""
    found, left = set(), [path]
    while left:
        if (path := left.pop()) not in found:
            found.add(path)
            left += relative_imports(path)
    return found


def test_what_travels_is_small():
    files = closure(ROOT / "modeling_clara" / "modeling_clara.py")
    assert files == set((ROOT / "modeling_clara").glob("*_clara.py"))  # and all of it is reached
    assert len(files) <= TRAVELLING_FILES
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= TRAVELLING_LINES


def test_every_import_of_ours_exists():
    """An editable install elsewhere would hide a missing file from the other tests."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.level == 0 and node.module.split(".")[0] not in ("modeling_clara", "recipes"):
                continue
            place = ROOT if node.level == 0 else path.parents[node.level - 1]
            module = place / node.module.replace(".", "/")
            assert module.with_suffix(".py").is_file() or module.is_dir(), f"{path}: {node.module}"


def test_the_installed_part_does_not_import_what_stands_above():
    for path in CODE:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        place = path.relative_to(ROOT).parts
        assert not imported & {"tests", "upload"}, path
        if place[0] == "modeling_clara":
            assert "recipes" not in imported, path
            assert not (path.name.endswith("_clara.py") and "modeling_clara" in imported), path


def test_files_and_functions_are_short():
    """The lines of a function are those after its docstring: an argument that is explained is no reason to split."""
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (n_lines := len(text.splitlines())) > FILE_LINES:
            found.append(f"{path.relative_to(ROOT)} has {n_lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if (n_lines := node.end_lineno - first.lineno + 1) > FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {n_lines} lines")
    assert not found
