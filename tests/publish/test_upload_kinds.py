"""All five kinds, published by the command to the loopback Hub and used by unmodified clients, then from the cache."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfApi, ModelCard, snapshot_download
from published import CARDS, ROOT, contents

from recipes.publishing.probe import describe_model
from upload import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
SPACES = ROOT / "recipes" / "spaces"
IDS = {kind: f"kinds/{kind}" for kind in ("model", "corpus", "metric", "leaderboard", "data")}
IDS["metric"] = "kinds/rag_answer"  # as `evaluate` wants it
TYPES = {"model": "model", "corpus": "dataset", "metric": "space", "leaderboard": "space", "data": "dataset"}
ROWS = [{"id": str(number), "question": f"Who is number {number}?"} for number in range(3)]
CLIENT = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from recipes.publishing.probe import HiddenPackage, describe_corpus, describe_model
sys.meta_path.insert(0, HiddenPackage())
for name in [name for name in sys.modules if name.startswith("recipes")]:
    del sys.modules[name]
given = json.loads(sys.stdin.read())
import torch
torch.set_num_threads(1)
found = {{}}
for kind, code in given["snippets"].items():
    found[kind] = {{}}
    exec(code, found[kind])
import datasets, evaluate
metric = evaluate.load(given["metric"], module_type="metric", **given["pinned"])
model, corpus = found["corpus"]["model"], found["corpus"]["corpus"]
rows = found["data"]["rows"]
print(json.dumps({{
    "model": describe_model(found["model"]["model"]),
    "corpus": describe_corpus(model, corpus),
    "metric": metric.compute(predictions=["x y"], references=[["y"]]),
    "data": {{split: list(rows[split]) for split in rows}},
}}))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    """Arguments of the command for each kind."""
    rows = tmp_path_factory.mktemp("rows") / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": [str(CARDS / "clara-pico")],
        "corpus": [str(CARDS / "clara-pico-corpus"), "--compressor", IDS["model"]],
        "metric": [str(SPACES / "metrics" / "rag_answer")],
        "leaderboard": [str(SPACES / "leaderboard"), "--variable", "RESULTS_REPO=kinds/results"],
        "data": [str(rows)],
    }


@pytest.fixture(scope="module")
def published(hub, sources) -> dict[str, str]:
    """Kind -> commit of main after all were published."""
    for kind, arguments in sources.items():
        assert main([kind, *arguments, "--repo-id", IDS[kind]]) == 0
    return {kind: hub.repos[TYPES[kind], IDS[kind]].resolve("main") for kind in IDS}


def snippet(card: str) -> str:
    """The first Python block that needs no installed package of ours."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return next(block for block in blocks if "modeling_clara" not in block)


@pytest.fixture(scope="module")
def used(hub, published, tmp_path_factory) -> list[dict]:
    """What a process without this project finds by the snippets of the cards: online, then offline from its cache."""
    cards = {"model": ModelCard, "corpus": DatasetCard, "data": DatasetCard}
    snippets = {kind: snippet(str(card.load(IDS[kind]))) for kind, card in cards.items()}
    metric = {"metric": IDS["metric"], "pinned": {"revision": published["metric"]}}
    home, found = tmp_path_factory.mktemp("home"), []
    environment = {**os.environ, **hub.environment(home), "HF_MODULES_CACHE": str(home / "modules")}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "PYTHONPATH": ""}
    for offline in ("0", "1"):
        start = len(hub.requests)
        process = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps({"snippets": snippets, **metric}),
            env=environment | {"HF_HUB_OFFLINE": offline, "HF_EVALUATE_OFFLINE": offline},
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        found.append(json.loads(process.stdout.splitlines()[-1]) | {"requests": hub.requests[start:]})
    return found


def test_the_snippets_of_the_cards_give_what_the_sources_give(used, published):
    from modeling_clara import CLaRaForRAG

    model = CLaRaForRAG.from_pretrained(CARDS / "clara-pico")
    online, offline = used
    assert online["model"] == describe_model(model)
    assert online["corpus"]["documents"] == 200 and len(online["corpus"]["answers"]) == 2
    assert online["metric"]["containment"] == 1.0 and online["data"] == {"questions": ROWS}
    assert online.pop("requests") and offline.pop("requests") == [] and offline == online


def test_the_cards_name_the_repo_and_commits_with_these_files(hub, published):
    for kind in ("model", "corpus", "data"):
        repo = hub.repos[TYPES[kind], IDS[kind]]
        card = contents(repo)["README.md"].decode()
        (pinned,) = [sha for sha in repo.commits if sha in card and sha != published["model"]]
        assert f'"{IDS[kind]}", revision="{pinned}"' in card and "ORG/NAME" not in card and "COMMIT" not in card
        assert contents(repo, pinned).keys() == contents(repo).keys()
        assert not compare(contents(repo, pinned), contents(repo))
    assert f'"{IDS["model"]}", revision="{published["model"]}"' in card_of(hub, "corpus")


def card_of(hub, kind: str) -> str:
    return contents(hub.repos[TYPES[kind], IDS[kind]])["README.md"].decode()


def compare(one: dict, other: dict) -> set[str]:
    return {name for name in one if one[name] != other[name]} - {"README.md"}


def test_a_space_has_its_variables_and_stands_by_itself(hub, published):
    repo = hub.repos["space", IDS["leaderboard"]]
    assert repo.settings["variables"] == {"RESULTS_REPO": {"value": "kinds/results"}}
    assert HfApi().repo_info(IDS["metric"], repo_type="space").sha == published["metric"]
    folder = Path(snapshot_download(IDS["metric"], repo_type="space"))
    assert {"app.py", "checked_rows.py", "rag_answer.py", "cases.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", IDS)
def test_the_real_command_finds_that_nothing_has_changed(hub, published, sources, kind, tmp_path):
    start = len(hub.requests)
    command = [sys.executable, str(ROOT / "upload.py"), kind, *sources[kind], "--repo-id", IDS[kind]]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0 and "nothing to upload" in process.stdout, process.stderr
    assert {method for method, _ in hub.requests[start:]} == {"GET"}
    assert hub.repos[TYPES[kind], IDS[kind]].resolve("main") == published[kind]


def test_dry_run_prints_files_sizes_card_and_changes(hub, published, sources, capsys, tmp_path):
    start = len(hub.requests)
    assert main(["model", *sources["model"], "--repo-id", "kinds/other", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "modeling_clara.py" in said and "would be added: README.md" in said and "kinds/other would be made" in said
    assert 'from_pretrained("kinds/other", revision="COMMIT"' in said and "weights 2.98 MB" in said
    assert main(["data", *sources["data"], "--repo-id", IDS["data"], "--dry-run"]) == 0
    assert "0 added, 0 changed, 0 deleted" in capsys.readouterr().out
    assert {method for method, _ in hub.requests[start:]} == {"GET"} and ("model", "kinds/other") not in hub.repos


def test_a_corpus_needs_a_compressor_that_the_hub_has(hub, published, sources, capsys):
    for extra, words in ((["--compressor", "kinds/nothing"], "the Hub has no kinds/nothing"), ([], "`--compressor`")):
        assert main(["corpus", sources["corpus"][0], *extra, "--repo-id", "kinds/new"]) == 1
        said = capsys.readouterr().err
        assert words.strip("-`") in said and "Publish the model" in said
    assert ("dataset", "kinds/new") not in hub.repos


def test_a_broken_connection_to_the_compressor_is_one_line(hub, published, sources, capsys):
    corpus = [sources["corpus"][0], "--compressor", IDS["model"], "--compressor-revision", published["model"]]
    hub.break_request(0, "before")
    assert main(["corpus", *corpus, "--repo-id", "kinds/new"]) == 1
    assert "the Hub must be reached" in capsys.readouterr().err and hub.failures.pop().times == 0


def test_a_metric_has_the_name_of_its_module(hub, published, sources, capsys):
    assert main(["metric", *sources["metric"], "--repo-id", "kinds/answers"]) == 1
    assert "must be kinds/rag_answer" in capsys.readouterr().err and ("space", "kinds/answers") not in hub.repos


def test_data_of_several_kinds_of_rows_is_read_whole(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    for name, row in (("questions", {"question": "Q?"}), ("passages", {"title": "T", "text": "x"})):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rows" / "broken.jsonl").write_text('{"title": \n')
    command = ["data", str(tmp_path / "rows"), "--build", str(tmp_path / "out")]
    assert main(command) == 1 and "broken.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "rows" / "broken.jsonl").unlink()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "questions: 1 rows of question" in said and "passages: 1 rows of title, text" in said


CARD = "---\nlicense: mit\n---\n\n# Rows\n"


@pytest.mark.parametrize("card", ["", CARD], ids=["no card", "a card"])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.jsonl": b'{"a": 1}\n\n{"a": NaN}\n'}, "line 3 of train.jsonl must be JSON"),
        ({"train.jsonl": b'{"a": "caf\xe9"}\n'}, "line 1 of train.jsonl must be JSON in UTF-8"),
        ({"train.jsonl": b""}, "train.jsonl must have rows"),
        ({"train.parquet": b"PAR1"}, "train.parquet must be a whole Parquet file"),
        ({"train.jsonl": b'{"a": 1}\n', "more.csv": b"a\n1\n"}, "got more.csv"),
        ({"train.jsonl": b'{"a": 1}\n', "test.parquet": b"PAR1"}, "got test.parquet and train.jsonl"),
    ],
)
def test_data_that_cannot_be_loaded_are_named_by_file(tmp_path, capsys, files, words, card):
    source = tmp_path / "rows"
    source.mkdir()
    for name, content in (files | ({"README.md": card.encode()} if card else {})).items():
        (source / name).write_bytes(content)
    assert main(["data", str(source), "--build", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert words in said and ".building" not in said and not (tmp_path / "out").exists()


def test_the_first_error_behind_a_general_one_is_said(tmp_path, capsys):
    for name, content in {"README.md": CARD, "train.jsonl": '{"a": 1}\n', "test.jsonl": '{"a": 1, "b": 1}\n'}.items():
        (tmp_path / name).write_text(content)
    assert main(["data", str(tmp_path), "--build", str(tmp_path.with_name("out"))]) == 1
    said = capsys.readouterr().err
    assert "because of CastError" in said and "column names don't match" in said and ".building" not in said


@pytest.mark.parametrize("kind", IDS)
def test_a_folder_of_another_kind_is_refused(kind, tmp_path, capsys):
    source = CARDS / "clara-pico" if kind not in ("model", "leaderboard") else SPACES / "metrics" / "retrieval"
    assert main([kind, str(source), "--build", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"{source} must " in said and re.search("Name (a|the|another) |Convert", said)
    assert not (tmp_path / "out").exists()
