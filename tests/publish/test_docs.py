"""README and docs are true: every block runs, every link and named file exists, lines are short."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]+)")
FILE = re.compile(r"\b(?:recipes|modeling_clara|model_cards|tests|docs)/[\w./-]+\.(?:py|yaml|sh|md)\b")
MAX_LINES = {"README.md": 150}
MAX_COLUMNS = 120


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """(language, code, reason not to run it) of every shell and Python block."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(m["language"], m["code"], m["reason"]) for m in found if m["language"] in ("sh", "python")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a fresh clone has, to run in."""
    folder = tmp_path_factory.mktemp("clone") / "clara"
    made_here = {".git", ".venv", "runs", "data", "build"}

    def left_out(place: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__" or (Path(place) == ROOT and name in made_here)}

    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, clone):
    """In the order of the page, in one folder; a failing block is shown with what it printed."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PYTHONPATH": str(clone), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MODEL": "model_cards/clara-pico", "HAYSTACK_TELEMETRY_ENABLED": "False"}
    for language, code, reason in blocks(page):
        if reason:
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        process = subprocess.run(
            command,
            cwd=clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert process.returncode == 0, f"{page.name}:\n{code}\n{process.stdout[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_parse(page):
    """The cheap half, with every default run: Python compiles, shell parses, named modules and files of ours exist."""
    for language, code, _ in blocks(page):
        if language == "python":
            compile(code, page.name, "exec")
        else:
            process = subprocess.run(["bash", "-n", "-c", code], capture_output=True, text=True)
            assert process.returncode == 0, process.stderr
        for module in re.findall(r"-m (recipes[\w.]*)", code):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} names {module}"
        for name in FILE.findall(code):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [name for name in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_stay_short(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES.get(page.name, 10_000)
    assert not [line for line in lines if len(line) > MAX_COLUMNS]
