"""Holds the loopback Hub against the unmodified client: what it refuses, and how.
It stands before every test that publishes or downloads through that Hub, which hold the rest of it against the client.
It does not know the real Hub: that the refusals here are those of huggingface.co is taken from the client's own code.
"""

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

# huggingface_hub 2.4 uploads in a way that its own HTTP client calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")

API = HfApi()


def commit(repo: str, files=(("x", b"x"),), gone=(), **options):
    changes = [CommitOperationAdd(path, content) for path, content in files]
    return API.create_commit(repo, [*changes, *map(CommitOperationDelete, gone)], commit_message="a title", **options)


def read(repo: str, revision: str | None = None, path: str = "config.json") -> str:
    return Path(hf_hub_download(repo, path, revision=revision)).read_text()


@pytest.fixture(scope="module")
def repo() -> str:
    """With a tag, a file, and a private repo beside it."""
    for name, private in (("served/repo", False), ("served/private", True)):
        API.create_repo(name, private=private)
        commit(name, [("config.json", b"{}")])
    API.create_tag("served/repo", tag="v1.0")
    assert read("served/private") == "{}" == read("served/repo", "v1.0")
    return "served/repo"


MISSING, NO_REPO = ("RemoteEntryNotFoundError", "EntryNotFound"), ("RepositoryNotFoundError", "RepoNotFound")
ANY = ("HfHubHTTPError", None)


@pytest.mark.parametrize(
    ("call", "status", "expected"),
    [
        (lambda repo: read(repo, "v9"), 404, ("RevisionNotFoundError", "RevisionNotFound")),
        (lambda repo: read(repo, path="none.json"), 404, MISSING),
        (lambda repo: list(API.list_repo_tree(repo, "none")), 404, MISSING),
        (lambda repo: commit(repo, (), ["none"]), 404, MISSING),
        (lambda repo: read("served/none"), 404, NO_REPO),
        (lambda repo: API.model_info("served/private", token=False), 401, NO_REPO),
        (lambda repo: API.model_info("served/private", token="hf_wrong"), 404, NO_REPO),
        (lambda repo: API.create_repo("served/free", token=False), 401, ANY),
        (lambda repo: commit(repo, token="hf_wrong"), 403, ANY),
        (lambda repo: commit(repo, token=False, create_pr=True), 401, ANY),
        (lambda repo: commit(repo, parent_commit=API.list_repo_commits(repo)[-1].commit_id), 412, ANY),
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
    assert [entry.title for entry in API.list_repo_commits(repo)] == ["a title", "initial commit"]
