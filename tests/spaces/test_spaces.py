"""Building Spaces, describing data files, and the entries of the recipes."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import board  # noqa: F401
import evaluate
import pytest
from leaderboard_rules import check_data_files

from recipes.evaluation.questions import half_of
from recipes.spaces import publish as spaces

ROOT = Path(__file__).parents[2]
SPACES = ["metrics/rag_answer", "metrics/retrieval", "metrics/compression_fidelity", "leaderboard"]
ROW = '{"id": "a", "question": "Q?", "docs": ["T\\nx"], "answers": ["x"], "pos_index": [0]}\n'


def tracked(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix() for path in paths}


def test_there_are_no_links_in_the_recipes():
    """A zip of the repository, and a checkout on a system without links, are whole."""
    assert [path for path in (ROOT / "recipes").rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("name", SPACES)
def test_a_built_space_stands_by_itself(tmp_path, capsys, name):
    folder, built = spaces.SPACES / name, tmp_path / "out"
    shared = {"app.py", "checked_rows.py"} if "metrics" in name else {"validation.py", "results.schema.json"}
    assert spaces.main(["build", str(folder), str(built)]) == 0
    assert tracked(built) == tracked(folder) | shared and not tracked(folder) & shared
    assert {"README.md", "app.py", "requirements.txt"} <= tracked(built)
    for path in built.glob("*.py"):
        assert not re.search(r"^\s*(from|import) (recipes|modeling_clara)\b", path.read_text(), re.MULTILINE), path
    assert spaces.main(["build", str(folder), str(built)]) == 1
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_a_folder_that_is_no_space_is_refused(tmp_path, capsys):
    assert spaces.main(["build", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "README.md" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_described_data_files_are_what_a_leaderboard_takes(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text(ROW + ROW.replace('"a"', '"b"'))
    assert spaces.main(["describe", str(path)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["questions.jsonl"]["questions"] == 2 and not check_data_files(described)
    assert described["questions.jsonl"]["halves"][half_of("Q?")] == 2
    assert spaces.main(["describe", str(tmp_path / "nowhere.jsonl")]) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_text(ROW)
    assert spaces.main(["describe", str(path), str(tmp_path / "other" / path.name)]) == 1
    assert "questions.jsonl twice" in capsys.readouterr().err


# --- entries ---------------------------------------------------------------------------------------------------------


def test_the_entry_with_the_name_of_a_library_stays_out_of_its_way():
    """`import evaluate` finds the library; run as a script, or found in its place, the file says what to do."""
    assert "site-packages" in evaluate.__file__ and evaluate.load
    entry = ROOT / "recipes" / "evaluate.py"
    script = subprocess.run([sys.executable, str(entry), "--help"], capture_output=True, text=True, check=False)
    code = f"import sys; sys.path.insert(0, {str(entry.parent)!r}); import evaluate"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for found in (script, imported):
        assert found.returncode == 1 and "python -m recipes.evaluate" in found.stderr
    assert "Traceback" not in script.stderr and "ImportError" in imported.stderr


@pytest.mark.parametrize(
    "module, told",
    [
        ("recipes.evaluate", "wrong_memory"),
        ("recipes.figures", "states"),
        ("recipes.evaluation.calibrate", "--unanswerable"),
        ("recipes.evaluation.update_card", "--dataset"),
        ("recipes.spaces.publish", "describe"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_entry_runs_as_a_module(monkeypatch, capsys, module, told):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0 and told in shown and f"{module} [-h]" in shown.splitlines()[0]
