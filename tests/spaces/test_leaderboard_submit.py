"""Submissions to the leaderboard: checked uploads become pull requests on the loopback Hub, byte for byte, once.

It stands on the loopback Hub, which opens real pull requests; the page around it is tested in a browser.
"""

import json
import re
from pathlib import Path

import board  # noqa: F401
import pytest
from hub_server import Failure
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from leaderboard_revisions import RevisionChecker
from leaderboard_submit import Checked, check_upload, submit
from results_factory import DATA_FILES, valid_results

WRONG = "hf_wrong_secret_token"
NAMES = ["../../../.github/x", "..", "/", "/etc/passwd", ".hidden", "a\\..\\b", "%2e%2e/x", "a\0b:d", "名"]


@pytest.fixture
def repo(request, hub) -> str:
    """A results repository of this test."""
    name = f"submissions/{re.sub(r'[^a-z]+', '-', request.node.name)[:60].strip('-')}"
    api = HfApi()
    api.create_repo(name, repo_type="dataset", exist_ok=True)
    data_files = CommitOperationAdd("data_files.json", json.dumps(DATA_FILES).encode())
    api.create_commit(name, [data_files], commit_message="data", repo_type="dataset")
    return name


def upload(**changes) -> bytes:
    """A file with a layout of its own, which must survive."""
    return json.dumps(valid_results(**changes), indent=7).encode() + b"\n\n"


def checked(**changes) -> Checked:
    found = check_upload(upload(**changes), DATA_FILES, None)
    assert found.problems == []
    return found


def files(repo: str, revision: str = "main") -> set[str]:
    return set(HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)) - {".gitattributes"}


def test_a_pull_request_has_the_file_and_nothing_else(repo, hub):
    found = checked()
    before = HfApi().dataset_info(repo).sha
    outcome = submit(found, repo, hub.token)
    assert outcome.url == f"{hub.url}/datasets/{repo}/discussions/1" and "open" in outcome.message
    assert re.fullmatch(r"results/loopback__clara/musique/normal-clara-[0-9a-f]{12}\.json", found.path)
    assert HfApi().dataset_info(repo).sha == before and files(repo) == {"data_files.json"}
    assert files(repo, "refs/pr/1") == {"data_files.json", found.path}
    path = hf_hub_download(repo, found.path, repo_type="dataset", revision="refs/pr/1")
    assert Path(path).read_bytes() == upload()
    commit = HfApi().list_repo_commits(repo, repo_type="dataset", revision="refs/pr/1")[0]
    assert commit.title == f"Results: clara on musique, normal [{found.digest}]"
    assert "| f1 | 0.410 | 0.390 to 0.430 | 2417 |" in commit.message and "`loopback/clara`" in commit.message


def test_the_same_file_twice_is_recognised(repo, hub):
    found = checked()
    first = submit(found, repo, hub.token)
    again = submit(found, repo, hub.token)
    assert again.url == first.url and "submitted already" in again.message
    other = submit(checked(system__codec="int4"), repo, hub.token)
    assert other.url.endswith("/discussions/2")
    merged = CommitOperationAdd(found.path, found.content)
    HfApi().create_commit(repo, [merged], commit_message="merged", repo_type="dataset")
    there = submit(found, repo, hub.token)
    assert there.url == "" and there.message == f"This file is on the leaderboard already, as {found.path}."
    assert len(HfApi().list_repo_refs(repo, repo_type="dataset", include_pull_requests=True).pull_requests) == 2


@pytest.mark.parametrize("name", [*NAMES, "x" * 100, "`]($)|@all\n#"])
def test_no_name_leads_out_of_the_folder(name, repo, hub):
    data_files = DATA_FILES | {name: DATA_FILES["musique"]}
    external = {"model__repo": None, "system__kind": "external", "system__url": "http://a.b"}
    content = upload(system__name=name, data__name=name, **external)
    found = check_upload(content, data_files, None)
    assert found.problems == []
    part = r"[\w.-]{1,60}"
    assert re.fullmatch(rf"results/{part}/{part}/normal-{part}-[0-9a-f]{{12}}\.json", found.path, re.ASCII)
    assert ".." not in found.path and "/." not in found.path and "\n" not in found.title
    assert submit(found, repo, hub.token).url and files(repo) == {"data_files.json"}
    assert not re.search(r"`[^`]*`[^`]*`[^`]*`[^`]*`", found.description.splitlines()[0])  # two code spans, no more


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"{", "must be JSON"),
        (b" " * 1_500_000, "at most 1,000,000 bytes"),
        (upload(schema_version=7), "schema_version must be 1, got 7"),
        (upload(data__name="mine"), "data.name must be one of"),
        (upload(model__repo=None), "model.repo must name"),
        (upload(metrics={"em": 0.9, "f1": 0.1}), "metrics.em must be <= metrics.f1"),
    ],
)
def test_a_file_with_problems_is_not_submitted(content, reason, repo, hub):
    found = check_upload(content, DATA_FILES, None)
    assert any(reason in problem for problem in found.problems) and found.path == ""
    with pytest.raises(ValueError, match="must have no problems"):
        submit(found, repo, hub.token)


def test_the_model_must_be_there(hub):
    api = HfApi()
    api.create_repo("submissions/model", exist_ok=True)
    revision = api.model_info("submissions/model").sha
    there = upload(model__repo="submissions/model", model__revision=revision)
    assert check_upload(there, DATA_FILES, RevisionChecker()).problems == []
    elsewhere = check_upload(upload(model__repo="submissions/model"), DATA_FILES, RevisionChecker())
    assert "has no commit aaaaaaaaaaaa" in elsewhere.problems[0]
    hub.failures.append(Failure("/api/models/submissions/model", status=500, times=20))
    try:
        unchecked = check_upload(there, DATA_FILES, RevisionChecker())
    finally:
        hub.failures.clear()
    assert unchecked.problems == [] and "could not be looked up" in unchecked.notes[0]


def test_failures_are_told_without_the_token(repo, hub):
    found = checked()
    assert "Sign in" in submit(found, repo, None).message and "Sign in" in submit(found, repo, "").message
    cases = [(WRONG, repo, "(401)"), (hub.token, "submissions/nowhere", "was not found"), (f"{WRONG}\n", repo, "")]
    outcomes = [(submit(found, place, token), told) for token, place, told in cases]
    for status, told in ((401, "(401)"), (403, "write-discussions"), (429, "(429)"), (500, "(500)")):
        hub.failures.append(Failure(f"/api/datasets/{repo}/commit", status=status, times=20))
        try:
            outcomes.append((submit(found, repo, hub.token), told))
        finally:
            hub.failures.clear()
    for outcome, told in outcomes:
        assert outcome.url == "" and told in outcome.message and len(outcome.message) > 30, outcome
        assert WRONG not in outcome.message and hub.token not in outcome.message
    assert files(repo) == {"data_files.json"}
    assert not HfApi().list_repo_refs(repo, repo_type="dataset", include_pull_requests=True).pull_requests
