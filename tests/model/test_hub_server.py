"""Holds the loopback Hub against the unmodified client: pull requests, and what is refused, how.
It stands before every test that publishes or downloads through that Hub, which hold the rest of it: uploads, faults.
It does not know the real Hub: that the refusals here are those of huggingface.co is taken from the client's own code.
"""

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

# huggingface_hub 2.4 uploads in a way that its own HTTP client calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")

API = HfApi()


def commit(repo: str, title: str = "a title", **options):
    """Commits `files` (path to content) and deletes the paths `gone`."""
    changes = [CommitOperationAdd(path, content) for path, content in options.pop("files", {}).items()]
    changes += [CommitOperationDelete(path) for path in options.pop("gone", ())]
    return API.create_commit(repo, changes, commit_message=title, **options)


def read(repo: str, revision: str | None = None, path: str = "config.json", **options) -> str:
    return Path(hf_hub_download(repo, path, revision=revision, **options)).read_text()


def titles(repo: str, **options) -> list[str]:
    return [entry.title for entry in API.list_repo_commits(repo, **options)]


def test_a_pull_request_leaves_main_as_it_was(hub):
    """Two of them, each of which starts from main."""
    repo, kind = "served/asked", {"repo_type": "dataset"}
    API.create_repo(repo, **kind)
    options = {"create_pr": True, **kind}
    made = commit(repo, "A title", files={"x/b.txt": b"two\n"}, commit_description="Some words", **options)
    second = commit(repo, "Another", files={"a.txt": b"a"}, **options)
    assert made.pr_url == f"{hub.url}/datasets/{repo}/discussions/1" and made.pr_revision == "refs/pr/1"
    assert API.list_repo_files(repo, **kind) == [".gitattributes"] and titles(repo, **kind) == ["initial commit"]
    newest = API.list_repo_commits(repo, revision=made.pr_revision, **kind)[0]
    assert (newest.title, newest.message) == ("A title", "Some words")
    assert read(repo, "refs/pr/1", "x/b.txt", **kind) == "two\n"
    found = next(API.get_repo_discussions(repo, **kind))
    assert (found.num, found.title, found.url, found.status) == (1, "A title", made.pr_url, "open")
    refs = API.list_repo_refs(repo, include_pull_requests=True, **kind).pull_requests
    assert [ref.ref for ref in refs] == ["refs/pr/1", "refs/pr/2"]
    assert sorted(API.list_repo_files(repo, revision=second.pr_revision, **kind)) == [".gitattributes", "a.txt"]


@pytest.fixture(scope="module")
def repo() -> str:
    """With a tag, a file, and a private repo beside it."""
    for name, private in (("served/repo", False), ("served/private", True)):
        API.create_repo(name, private=private)
        commit(name, files={"config.json": b"{}"})
    API.create_tag("served/repo", tag="v1.0")
    assert read("served/private") == "{}" == read("served/repo", "v1.0")
    return "served/repo"


MISSING, NO_REPO = ("RemoteEntryNotFoundError", "EntryNotFound"), ("RepositoryNotFoundError", "RepoNotFound")
ANY, CHANGE = ("HfHubHTTPError", None), {"files": {"x": b"x"}}


@pytest.mark.parametrize(
    ("call", "status", "expected"),
    [
        (lambda repo: read(repo, "v9"), 404, ("RevisionNotFoundError", "RevisionNotFound")),
        (lambda repo: read(repo, path="none.json"), 404, MISSING),
        (lambda repo: list(API.list_repo_tree(repo, "none")), 404, MISSING),
        (lambda repo: commit(repo, gone=["none"]), 404, MISSING),
        (lambda repo: read("served/none"), 404, NO_REPO),
        (lambda repo: API.model_info("served/private", token=False), 401, NO_REPO),
        (lambda repo: API.model_info("served/private", token="hf_wrong"), 404, NO_REPO),
        (lambda repo: API.create_repo("served/free", token=False), 401, ANY),
        (lambda repo: commit(repo, token="hf_wrong", **CHANGE), 403, ANY),
        (lambda repo: commit(repo, token=False, create_pr=True, **CHANGE), 401, ANY),
        (lambda repo: commit(repo, parent_commit=API.list_repo_commits(repo)[-1].commit_id, **CHANGE), 412, ANY),
        (lambda repo: API.create_repo(repo), 409, ANY),
        (lambda repo: API.create_tag(repo, tag="v1.0"), 409, ANY),
        (lambda repo: API.get_collection(repo), 501, ANY),
    ],
)
def test_a_refusal_has_its_status_and_changes_nothing(repo, call, status, expected):
    with pytest.raises(HfHubHTTPError) as caught:
        call(repo)
    response = caught.value.response
    assert response.status_code == status
    assert (type(caught.value).__name__, response.headers.get("X-Error-Code")) == expected
    assert titles(repo) == ["a title", "initial commit"]
