"""The rules of the house that can be counted: what travels, how long files and functions are, who imports whom."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [*(ROOT / "modeling_clara").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), ROOT / "upload.py"]
FILES = [*CODE, *(ROOT / "tests").rglob("*.py")]
TRAVELLING_FILES, TRAVELLING_LINES = 25, 6_180
FILE_LINES, FUNCTION_LINES = 400, 60


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative_imports(path: Path) -> list[Path]:
    """The files beside this one that it imports, inside functions as well."""
    nodes = ast.walk(tree(path))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}
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
        for node in ast.walk(tree(path)):
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
        for node in ast.walk(tree(path)):
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
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if (n_lines := node.end_lineno - first.lineno + 1) > FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {n_lines} lines")
    assert not found


class Classes(ast.NodeVisitor):
    """Imports of a file by function or not, and of each class its bases and the attributes that it has and uses."""

    def __init__(self, source: str):
        self.imports, self.classes = set(), {}
        self.visit(ast.parse(source))

    def visit_ImportFrom(self, node):
        self.imports |= {node.module} if node.level else set()

    def visit_ClassDef(self, node):
        has, uses = set(), set()
        for part in node.body:
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            has |= {target.id for target in targets if isinstance(target, ast.Name)} | {getattr(part, "name", None)}
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and getattr(part.value, "id", None) in ("self", "cls"):
                (uses if isinstance(part.ctx, ast.Load) else has).add(part.attr)
        self.classes[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], has, uses)
        self.generic_visit(node)


def needs(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each file what it imports, and the files whose classes define what its own classes use through `self`."""
    files = {name: Classes(source) for name, source in sources.items()}
    graph = {name: file.imports & set(files) for name, file in files.items()}
    home = {name: (file, *entry) for file, found in files.items() for name, entry in found.classes.items()}

    def line(name):  # the class and its bases, those of other files too
        return {name}.union(*map(line, home[name][1])) if name in home else set()

    for family in map(line, home):
        for name in family:
            file, _, _, uses = home[name]
            given = set().union(*(home[other][2] for other in line(name)))
            definers = {home[other][0] for other in family if home[other][2] & (uses - given)}
            graph[file] |= definers - {file}
    return graph


def test_no_file_that_travels_needs_one_that_needs_it():
    """Not through `self` either."""
    files = (ROOT / "modeling_clara").glob("*_clara.py")
    TopologicalSorter(needs({path.stem: path.read_text(encoding="utf-8") for path in files})).prepare()


def test_a_circle_through_self_is_found():
    sources = {"a": "class A:\n    x = 1\n    def f(self): return self.y\n", "b": "class B:\n    y: int = 1\n"}
    sources["c"] = "from .a import A\nfrom .b import B\nclass C(A, B):\n    pass\n"
    assert needs(sources) == {"a": {"b"}, "b": set(), "c": {"a", "b"}}
    sources["b"] += "    def g(self): return self.x\n"
    with pytest.raises(CycleError):
        TopologicalSorter(needs(sources)).prepare()
