"""Publishing Spaces on the loopback Hub, describing data files, and the script that shares a library's name."""

import json
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import spaces
from huggingface_hub import HfApi
from leaderboard.validation import check_data_files

RECIPES = Path(spaces.__file__).parent
ROW = '{"id": "a", "question": "Q?", "docs": ["T\\nx"], "answers": ["x"], "pos_index": [0]}\n'


@pytest.mark.parametrize(
    "name", ["metrics/rag_answer", "metrics/retrieval", "metrics/compression_fidelity", "leaderboard"]
)
def test_a_space_has_the_files_of_its_folder_in_one_commit(hub, name):
    repo = f"spaces/{name.replace('/', '-')}"
    spaces.push_space(RECIPES / name, repo)
    api = HfApi()
    commits = len(api.list_repo_commits(repo, repo_type="space"))
    files = {path.relative_to(RECIPES / name).as_posix() for path in (RECIPES / name).rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path}
    assert {"README.md", "app.py", "requirements.txt"} <= files
    assert set(api.list_repo_files(repo, repo_type="space")) - {".gitattributes"} == files
    path = api.hf_hub_download(repo, "app.py", repo_type="space")
    assert Path(path).read_bytes() == (RECIPES / name / "app.py").read_bytes()  # a link is published as its content
    spaces.push_space(RECIPES / name, repo)
    assert len(api.list_repo_commits(repo, repo_type="space")) <= commits + 1


def test_files_that_are_gone_leave_the_space(hub, tmp_path):
    folder = tmp_path / "space"
    folder.mkdir()
    for name in ("README.md", "app.py", "old.py"):
        (folder / name).write_text(name)
    spaces.push_space(folder, "spaces/changing")
    (folder / "old.py").unlink()
    spaces.push_space(folder, "spaces/changing")
    assert set(HfApi().list_repo_files("spaces/changing", repo_type="space")) >= {"README.md", "app.py"}
    assert "old.py" not in HfApi().list_repo_files("spaces/changing", repo_type="space")


def test_a_folder_that_is_no_space_is_refused(tmp_path, capsys):
    assert spaces.main(["push", str(tmp_path), "spaces/none"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert spaces.main(["push", str(RECIPES / "leaderboard"), "spaces/none", "--variable", "X"]) == 1
    assert "NAME=VALUE" in capsys.readouterr().err


def test_described_data_files_are_what_a_leaderboard_takes(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text(ROW + ROW.replace('"a"', '"b"'))
    assert spaces.main(["describe", str(path)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["questions.jsonl"]["questions"] == 2 and not check_data_files(described)
    assert spaces.main(["describe", str(tmp_path / "nowhere.jsonl")]) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_text(ROW)
    assert spaces.main(["describe", str(path), str(tmp_path / "other" / path.name)]) == 1
    assert "questions.jsonl twice" in capsys.readouterr().err


def test_the_script_steps_aside_for_the_library():
    assert "site-packages" in evaluate.__file__ and evaluate.load
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import evaluate; print(evaluate.__file__); print(evaluate.load)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES)], capture_output=True, text=True, check=True, cwd=RECIPES
    )
    assert "site-packages" in found.stdout.splitlines()[0]
    told = subprocess.run(
        [sys.executable, str(RECIPES / "evaluate.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--setting" in told.stdout and "wrong_memory" in told.stdout
