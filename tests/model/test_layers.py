"""The files that travel import each other without a circle, those hidden in `self` included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import modeling_clara


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


def test_no_file_needs_one_that_needs_it():
    files = Path(modeling_clara.__file__).parent.glob("*_clara.py")
    TopologicalSorter(needs({path.stem: path.read_text() for path in files})).prepare()


def test_a_circle_through_self_is_found():
    sources = {"a": "class A:\n    x = 1\n    def f(self): return self.y\n", "b": "class B:\n    y: int = 1\n"}
    sources["c"] = "from .a import A\nfrom .b import B\nclass C(A, B):\n    pass\n"
    assert needs(sources) == {"a": {"b"}, "b": set(), "c": {"a", "b"}}
    sources["b"] += "    def g(self): return self.x\n"
    with pytest.raises(CycleError):
        TopologicalSorter(needs(sources)).prepare()
