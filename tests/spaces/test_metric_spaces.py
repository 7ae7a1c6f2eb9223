"""The metrics as Spaces: read by `evaluate` from a folder, a file and the Hub, with a card and a page that work."""

import doctest
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import yaml
from huggingface_hub import HfApi

from recipes.spaces.publish import build_space

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "recipes" / "spaces" / "metrics"
NAMES = ("rag_answer", "retrieval", "compression_fidelity")
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # those that the Hub knows


def read_cases(name: str) -> list[dict]:
    return json.loads((METRICS / name / "cases.json").read_text(encoding="utf-8"))


def front_matter(name: str) -> dict:
    return yaml.safe_load((METRICS / name / "README.md").read_text(encoding="utf-8").split("---\n")[1])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with every metric as it is published."""
    folder = tmp_path_factory.mktemp("metrics")
    for name in NAMES:
        build_space(METRICS / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_told_elsewhere(monkeypatch):
    """Loading from the Hub, and gradio, tell addresses outside this machine, unless this is off."""
    monkeypatch.setattr(evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")


def load_page(path: Path) -> SimpleNamespace:
    """The module of an app.py, which serves nothing."""
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_every_metric_is_a_folder_of_the_same_files():
    folders = {path.name for path in METRICS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(NAMES)
    for name in NAMES:
        found = {path.name for path in (METRICS / name).iterdir() if path.name != "__pycache__"}
        assert found == {f"{name}.py", "README.md", "requirements.txt", "cases.json"}
        required = (METRICS / name / "requirements.txt").read_text().split()
        assert {"evaluate", "datasets"} <= {re.split("[<>=]", line)[0] for line in required}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_a_file_and_every_revision_of_a_space_are_the_same_metric(name, hub, built):
    repo, api = f"metricspaces/{name}", HfApi()
    api.create_repo(repo, repo_type="space", space_sdk="gradio")
    first = api.upload_folder(repo_id=repo, repo_type="space", folder_path=built / name).oid
    api.create_tag(repo, tag="1.0.0", repo_type="space")
    changed = (built / name / f"{name}.py").read_text().replace('"description": """\\\n', '"description": """New. ', 1)
    api.upload_file(path_or_fileobj=changed.encode(), path_in_repo=f"{name}.py", repo_id=repo, repo_type="space")
    local, by_itself = evaluate.load(str(METRICS / name)), evaluate.load(str(built / name))
    pinned, newest = evaluate.load(repo, revision=first), evaluate.load(repo)
    assert pinned.description == local.description and newest.description == "New. " + local.description
    assert ("GET", f"/spaces/{repo}/resolve/{first}/{name}.py") in hub.requests
    assert "recipes." not in type(by_itself).__mro__[1].__module__  # its checks are its own copy
    assert local.module_type == "metric" and local.name == name and local.citation and local.reference_urls
    for case in read_cases(name):
        found = local.compute(**case["inputs"])
        for metric in (evaluate.load(str(METRICS / name / f"{name}.py")), by_itself, pinned, newest):
            assert metric.compute(**case["inputs"]) == found


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_the_metadata_of_a_space(name):
    meta = front_matter(name)
    assert meta.pop("emoji") and meta.pop("title") and {meta.pop("colorFrom"), meta.pop("colorTo")} <= COLORS
    assert 20 < len(meta.pop("description")) < 120
    assert meta == {
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "app_file": "app.py",
        "pinned": False,
        "tags": ["evaluate", "metric"],
        "license": "apache-2.0",
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_every_input_and_output_and_its_example_runs(name):
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    headings = ["What it measures", "How to use it", "Inputs", "Outputs", "Limits"]
    assert re.findall(r"^## (.+)$", card, re.MULTILINE) == headings
    (example,) = re.findall(r"```pycon\n(.+?)```", card, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(example.replace("ORG/NAME", str(METRICS / name)), {}, name, None, 0)
    failed, attempted = doctest.DocTestRunner().run(test)
    assert failed == 0 and attempted >= 3
    case = read_cases(name)[0]
    for output in evaluate.load(str(METRICS / name)).compute(**case["inputs"]):
        assert f"`{re.sub('@.*', '@k', output)}`" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_page_scores_what_is_typed(name, built):
    page = load_page(built / name / "app.py")
    assert page.FOLDER == built / name and page.find_module(page.FOLDER).name == f"{name}.py"
    metric = evaluate.load(str(METRICS / name))
    interface = page.build(page.FOLDER)
    examples, cases = page.read_examples(page.FOLDER), read_cases(name)
    assert len(examples) == len(cases) and len(interface.input_components) == 3
    for example, case in zip(examples, cases, strict=True):
        expected = metric.compute(**case["inputs"])
        assert interface.fn(*example) == json.loads(json.dumps(expected)) == expected
    rows = {key: cases[0]["inputs"][key] for key in ("predictions", "references")}
    assert interface.fn(*examples[0][:2], "") == metric.compute(**rows)


def test_the_page_shows_errors(built):
    page = load_page(built / "rag_answer" / "app.py")
    compute = page.make_compute(evaluate.load(str(METRICS / "rag_answer")))
    for inputs, message in [
        (("[", "[]", ""), "`predictions` must be JSON"),
        (('["a"]', '"b"', ""), "`references` must be a JSON list, got str"),
        (('["a"]', '[["b"]]', "[1]"), "`options` must be a JSON dict, got list"),
        (('["a", null]', '[["b"], ["c"]]', ""), r"`predictions\[1\]` must be a string, got None"),
        (('["a"]', "[[]]", ""), r"`references\[0\]` must have a gold answer"),
        (('["a"]', '[["b"]]', '{"colour": 1}'), "colour"),
    ]:
        with pytest.raises(page.gr.Error, match=message):
            compute(*inputs)
    with pytest.raises(FileNotFoundError, match="must have one metric beside app.py"):
        page.find_module(ROOT / "recipes" / "configs")
