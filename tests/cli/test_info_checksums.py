"""`clara info` holds a copy against the list of its card: a folder, a repo on the Hub, and its files in the cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from test_hub_loading import upload

from modeling_clara import CLaRaForRAG, CompressedCorpus, cli
from modeling_clara.checksums import insert_checksums
from recipes.spaces.publish import LEADERBOARD, METRICS, build_space

ROOT = Path(__file__).parents[2]
REPO = "checksums/clara"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
NO_NETWORK = """
import importlib, pkgutil, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise OSError(f"an import must not use the network, got {event} {arguments}")

sys.addaudithook(refuse)
import modeling_clara, recipes.publishing, upload
for package in (modeling_clara, recipes.publishing):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            print(importlib.import_module(module.name).__name__)
"""


@pytest.fixture
def listed(checkpoint_copy) -> Path:
    """A checkpoint whose card has a list."""
    card = checkpoint_copy / "README.md"
    card.write_text(insert_checksums(card.read_text(), checkpoint_copy))
    return checkpoint_copy


def info(capsys, *arguments) -> tuple[int, dict]:
    status = cli.main(["info", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_copy_that_is_right_and_one_without_a_list(listed, checkpoint, capsys):
    status, report = info(capsys, listed)
    assert status == 0 and report["differs"] == []
    n_files = sum(path.suffix in (".py", ".safetensors", ".jinja", ".json") for path in listed.rglob("*"))
    assert report["checksums"] == f"{n_files} of {n_files} listed files compared"
    status, report = info(capsys, checkpoint)
    assert (status, report["checksums"]) == (0, "none: the card has no list")


def test_files_that_differ_are_missing_or_not_listed_are_named_at_once(listed, capsys):
    with open(listed / "memory_clara.py", "a") as file:
        file.write("# one line more\n")
    (listed / "payload_clara.py").write_text("x = 1\n")
    (listed / "text_clara.py").unlink()
    status, report = info(capsys, listed)
    assert status == 1 and [text.split("`")[1] for text in report["differs"]] == [
        "memory_clara.py",
        "text_clara.py",
        "payload_clara.py",
    ]
    assert cli.main(["info", str(listed)]) == 1
    out = capsys.readouterr().out
    assert "payload_clara.py" in out and "all files are there and fit" not in out


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_settings_that_were_altered_are_named(listed, capsys, name):
    settings = json.loads((listed / name).read_text())
    (listed / name).write_text(json.dumps(settings | {"note": "altered"}))
    status, report = info(capsys, listed)
    assert status == 1 and report["differs"][0].startswith(f"`{name}` must have the SHA-256")


@pytest.fixture(params=["metric", "leaderboard", "data"])
def files(request, tmp_path) -> tuple[Path, str, str]:
    """What is neither checkpoint nor corpus, with a list: folder, type of its repo, one of its files."""
    folder, sources = tmp_path / "files", {"metric": METRICS / "retrieval", "leaderboard": LEADERBOARD}
    if request.param == "data":
        folder.mkdir()
        (folder / "rows.jsonl").write_text('{"a": 1}\n')
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    else:
        build_space(sources[request.param], folder)
    card = folder / "README.md"
    card.write_text(insert_checksums(card.read_text(), folder))
    name = "rows.jsonl" if request.param == "data" else "requirements.txt"
    return folder, "dataset" if request.param == "data" else "space", name


def test_a_space_and_data_are_compared_as_well(files, capsys, hub, request):
    folder, repo_type, name = files
    repo = f"checksums/{request.node.callspec.id}"
    for change, words in ((None, ""), ("\naltered\n", f"`{name}` must have the SHA-256")):
        if change:
            (folder / name).write_text((folder / name).read_text() + change)
        HfApi().create_repo(
            repo, repo_type=repo_type, exist_ok=True, **({"space_sdk": "gradio"} if repo_type == "space" else {})
        )
        HfApi().upload_folder(repo_id=repo, repo_type=repo_type, folder_path=folder)
        for place in (folder, repo):
            status, report = info(capsys, place)
            assert (
                status == bool(change) and "listed files compared" in report["checksums"] and report["problem"] is None
            )
            assert [text[: len(words)] for text in report["differs"]] == [words] * bool(change)
    assert cli.main(["info", repo]) == 1 and cli.main(["info", "checksums/nothing"]) == 1


def test_a_checkpoint_without_config_is_no_folder_of_files(listed, capsys):
    (listed / "config.json").unlink()
    status, report = info(capsys, listed)
    assert status == 1 and "`config.json` must be in" in report["problem"]


def test_a_corpus_that_was_exchanged(shared_model, tmp_path, capsys):
    for name in ("mine", "other"):
        CompressedCorpus.build(shared_model, [f"{name} text"], tmp_path / name)
    card = tmp_path / "mine" / "README.md"
    card.write_text(insert_checksums(card.read_text(), tmp_path / "mine"))
    assert info(capsys, tmp_path / "mine")[0] == 0
    shutil.copy(card, tmp_path / "other" / "README.md")
    status, report = info(capsys, tmp_path / "other")
    assert status == 1 and "`corpus.json` must have the SHA-256" in report["differs"][0]


def test_a_repo_on_the_hub_and_offline_from_the_cache(listed, capsys, monkeypatch, hub):
    upload(listed, REPO)
    CLaRaForRAG.from_pretrained(REPO)
    status, report = info(capsys, REPO)
    assert status == 0 and "listed files compared" in report["checksums"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    n_requests = len(hub.requests)
    assert info(capsys, REPO) == (0, report) and len(hub.requests) == n_requests
    cached = Path(hf_hub_download(REPO, "memory_clara.py", local_files_only=True))
    blob, content = cached.resolve(), cached.read_bytes()
    try:
        blob.write_bytes(content + b"# one line more\n")
        status, report = info(capsys, REPO)
        assert status == 1 and report["differs"][0].startswith("`memory_clara.py`")
    finally:
        blob.write_bytes(content)


def test_what_the_cache_lacks_is_no_difference(listed, capsys, tmp_path):
    folder = shutil.copytree(listed, tmp_path / "more")
    (folder / "extra.safetensors").write_bytes(b"not asked for")
    (folder / "README.md").write_text(insert_checksums((folder / "README.md").read_text(), folder))
    upload(folder, f"{REPO}-more")
    status, report = info(capsys, f"{REPO}-more")
    first, _, n_files = report["checksums"].split()[:3]
    assert status == 0 and int(first) < int(n_files)
    whole = snapshot_download(f"{REPO}-more")
    assert info(capsys, whole)[1]["checksums"].startswith(f"{n_files} of {n_files} ")


def test_importing_uses_no_network():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"modeling_clara.checksums", "modeling_clara.cli.info", "recipes.publishing.cards"} <= {
        *done.stdout.split()
    }
