"""Every package that the code imports is a declared dependency.

Read from the syntax trees, without importing anything.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
OTHER_NAMES = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "stemmer": "pystemmer", "yaml": "pyyaml"}
OTHER_NAMES |= {"bs4": "beautifulsoup4", "docx": "python-docx", "pptx": "python-pptx"}
OTHER_NAMES |= {"haystack": "haystack-ai", "llama_index": "llama-index-core"}
EXTRAS = {"service": ("serve", "ui")}  # folders of the package whose files are imported inside functions alone
UNDECLARED = {"bert-score"}  # an option of one metric, whose error names it


def declared(requirements: list[str]) -> set[str]:
    """Names of the distributions, normalised."""
    return {re.split(r"[^\w.-]", requirement)[0].replace("_", "-").lower() for requirement in requirements}


def imported(path: Path, local: set[str], *, at_import: bool) -> set[str]:
    """Distributions that a file imports; with `at_import` only those it cannot be imported without."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import else ast.walk(tree)
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = tree.body if at_import else ast.walk(tree)
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - local
    return {OTHER_NAMES.get(name.lower(), name.lower().replace("_", "-")) for name in names}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def test_what_the_package_imports_at_once_is_a_dependency_of_the_package():
    for path in files("modeling_clara"):
        extras = EXTRAS.get(path.parent.name, ())
        known = declared(PROJECT["dependencies"]).union(*(declared(OPTIONAL[extra]) for extra in extras))
        assert not imported(path, set(), at_import=True) - known, path


def test_everything_imported_anywhere_is_declared_somewhere():
    extras = [name for names in OPTIONAL.values() for name in names]
    names = declared(PROJECT["dependencies"]) | declared(extras) | UNDECLARED
    recipes = files("recipes")
    local = {"modeling_clara", "recipes"} | {path.stem for path in recipes} | {path.parent.name for path in recipes}
    missing = {}
    for path in [*files("modeling_clara"), *recipes]:
        if unknown := imported(path, local - {"evaluate"}, at_import=False) - names:
            missing[str(path.relative_to(ROOT))] = sorted(unknown)
    assert not missing
