"""Holds the loopback Hub against the unmodified client: what it does, what it refuses, and how it breaks.
It stands before every test that publishes or downloads through that Hub, which hold the rest of it against the client.
It does not know the real Hub: what is expected of huggingface.co is taken from the client's code and its own tests.
"""

import hashlib
from pathlib import Path

import pytest
from httpx2 import TransportError
from hub_repos import CUTS, Failure, break_points
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

# huggingface_hub 2.4 uploads in a way that its own HTTP client calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=")]

API = HfApi()
WEIGHTS = b"weights " * 5000


def commit(repo: str, files=(("x", b"x"),), gone=(), **options):
    changes = [CommitOperationAdd(path, content) for path, content in files]
    changes += [CommitOperationDelete(path) for path in gone]
    return API.create_commit(repo, changes, **{"commit_message": "a title"} | options)


def read(repo: str, revision: str | None = None, path: str = "config.json") -> str:
    return Path(hf_hub_download(repo, path, revision=revision)).read_text()


def files(repo: str, revision: str | None = None) -> set[str]:
    return set(API.list_repo_files(repo, revision=revision)) - {".gitattributes"}


@pytest.fixture
def new(request) -> str:
    """A repo of this test alone."""
    name = hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    return API.create_repo(f"served/{name}").repo_id


@pytest.fixture(scope="module")
def tokens(hub) -> dict[str, str]:
    """Those of a stranger, who has a repo, and of loopback for reading."""
    found = {"stranger": hub.add_token("stranger"), "reader": hub.add_token("loopback", write=False)}
    API.create_repo("stranger/model", token=found["stranger"])
    return found


@pytest.fixture(scope="module")
def repo(tokens) -> str:
    """With a tag, a file, and a private repo beside it."""
    for name, private in (("served/repo", False), ("served/private", True)):
        API.create_repo(name, private=private)
        commit(name, [("config.json", b"{}")])
    commit("served/private", [("elsewhere.safetensors", b"elsewhere")])
    API.create_tag("served/repo", tag="v1.0")
    assert read("served/private") == "{}" == read("served/repo", "v1.0")
    return "served/repo"


NO_REVISION, MISSING = ("RevisionNotFoundError", "RevisionNotFound"), ("RemoteEntryNotFoundError", "EntryNotFound")
NO_REPO, BAD, ANY = ("RepositoryNotFoundError", "RepoNotFound"), ("BadRequestError", None), ("HfHubHTTPError", None)
LFS_FILE, GONE_FILE = (CommitOperationAdd("model.safetensors", content) for content in (b"refused", b"elsewhere"))
LFS_FILE._upload_mode, GONE_FILE._upload_mode, GONE_FILE._is_uploaded = "lfs", "lfs", True


@pytest.mark.parametrize(
    ("call", "status", "expected"),
    [
        (lambda repo, at: read(repo, "v9"), 404, NO_REVISION),
        (lambda repo, at: read(repo, path="none.json"), 404, MISSING),
        (lambda repo, at: list(API.list_repo_tree(repo, "none")), 404, MISSING),
        (lambda repo, at: commit(repo, (), ["none"]), 404, MISSING),
        (lambda repo, at: commit(repo, revision="v1.0"), 404, NO_REVISION),
        (lambda repo, at: commit(repo, revision="v1.0", create_pr=True), 404, NO_REVISION),
        (lambda repo, at: commit(repo, parent_commit=API.list_repo_commits(repo)[-1].commit_id), 412, ANY),
        (lambda repo, at: API.create_commit(repo, [GONE_FILE], commit_message="a"), 400, BAD),
        (lambda repo, at: API.create_repo(repo), 409, ANY),
        (lambda repo, at: API.create_tag(repo, tag="v1.0"), 409, ANY),
        (lambda repo, at: API.create_tag(repo, tag="v1 0"), 400, BAD),
        (lambda repo, at: API.create_tag(repo, tag="v2.0", revision="none"), 404, NO_REVISION),
        (lambda repo, at: API.delete_tag(repo, tag="v2.0"), 404, NO_REVISION),
        (lambda repo, at: API.create_branch(repo, branch="refs/pr/5"), 400, BAD),
        (lambda repo, at: API.delete_branch(repo, branch="v1.0"), 404, NO_REVISION),
        (lambda repo, at: API.delete_branch(repo, branch="main"), 403, ANY),
        (lambda repo, at: API.merge_pull_request(repo, 1), 404, ANY),
        (lambda repo, at: API.get_collection(repo), 501, ANY),
        # who may do what
        (lambda repo, at: read("served/none"), 404, NO_REPO),
        (lambda repo, at: API.model_info("served/private", token=False), 401, NO_REPO),
        (lambda repo, at: API.model_info("served/private", token=at["stranger"]), 404, NO_REPO),
        (lambda repo, at: commit("served/private", token=at["stranger"], create_pr=True), 404, NO_REPO),
        (lambda repo, at: API.model_info(repo, token="hf_wrong"), 401, ANY),
        (lambda repo, at: commit(repo, token="hf_wrong"), 401, ANY),
        (lambda repo, at: commit(repo, token=False, create_pr=True), 401, ANY),
        (lambda repo, at: commit(repo, token=at["stranger"]), 403, ANY),
        (lambda repo, at: API.preupload_lfs_files(repo, [LFS_FILE], token=at["stranger"]), 403, ANY),
        (lambda repo, at: commit(repo, token=at["reader"], create_pr=True), 403, ANY),
        (lambda repo, at: commit("stranger/model"), 403, ANY),
        (lambda repo, at: API.auth_check(repo, write=True, token=at["reader"]), 403, ANY),
        (lambda repo, at: API.create_repo("served/free", token=False), 401, ANY),
        (lambda repo, at: API.create_repo("served/free", token=at["reader"]), 403, ANY),
        (lambda repo, at: API.create_repo("served/free", token=at["stranger"]), 403, ANY),
        (lambda repo, at: API.create_repo("stranger/free"), 403, ANY),
    ],
)
def test_a_refusal_has_its_status_and_changes_nothing(repo, tokens, call, status, expected):
    with pytest.raises(HfHubHTTPError) as caught:
        call(repo, tokens)
    response = caught.value.response
    assert response.status_code == status
    assert (type(caught.value).__name__, response.headers.get("X-Error-Code")) == expected
    assert [entry.title for entry in API.list_repo_commits(repo)] == ["a title", "initial commit"]
    refs = API.list_repo_refs(repo, include_pull_requests=True)
    assert [ref.name for ref in refs.branches + refs.tags + refs.pull_requests] == ["main", "v1.0"]
    assert not API.repo_exists("served/free") and not API.repo_exists("stranger/free")


def test_rights_go_with_the_user_and_the_token(repo, tokens):
    users = {name: API.whoami(token=token) for name, token in tokens.items()}
    assert {name: user["name"] for name, user in users.items()} == {"stranger": "stranger", "reader": "loopback"}
    assert users["reader"]["auth"]["accessToken"]["role"] == "read"
    assert API.model_info("served/private", token=tokens["reader"]).private
    API.auth_check("stranger/model", write=True, token=tokens["stranger"])
    assert API.create_repo("stranger/model", exist_ok=True).repo_id == "stranger/model"  # another's, but it is there
    opened = commit("stranger/model", [("x.bin", b"x")], create_pr=True)
    commit("stranger/model", [("y.bin", b"y")], revision=opened.pr_revision)  # as its author may
    assert files("stranger/model", "refs/pr/1") == {"x.bin", "y.bin"} and files("stranger/model") == set()


def test_a_pull_request_grows_and_is_merged_into_what_main_is_by_then(new):
    commit(new, [("a", b"a"), ("b", b"b")])
    opened = commit(new, [("c", b"c")], gone=["a"], create_pr=True, commit_message="Three changes")
    second = commit(new, [("w.bin", WEIGHTS)], revision=opened.pr_revision, parent_commit=opened.oid)
    commit(new, [("d", b"d")])
    assert files(new) == {"a", "b", "d"} and files(new, "refs/pr/1") == {"b", "c", "w.bin"} == files(new, second.oid)
    assert Path(hf_hub_download(new, "w.bin", revision=second.oid)).read_bytes() == WEIGHTS
    details = API.get_discussion_details(new, opened.pr_num)
    assert (details.status, details.title, details.target_branch) == ("open", "Three changes", "refs/heads/main")
    assert [event.oid for event in details.events] == [opened.oid, second.oid] and not details.conflicting_files
    API.merge_pull_request(new, opened.pr_num)
    details = API.get_discussion_details(new, opened.pr_num)
    assert details.status == "merged" and details.merge_commit_oid == API.model_info(new).sha
    assert files(new) == {"b", "c", "d", "w.bin"} and API.list_repo_commits(new)[0].title == "Three changes (#1)"
    assert [[*API.get_repo_discussions(new, discussion_status=s)] != [] for s in ("open", "all")] == [False, True]


def test_a_pull_request_begins_where_it_says_and_is_not_merged_over_another_change(new):
    start = API.model_info(new).sha
    commit(new, [("a", b"1")])
    opened = commit(new, [("a", b"2")], create_pr=True, parent_commit=start)
    assert files(new, opened.oid) == {"a"} and len(API.list_repo_commits(new, revision=opened.oid)) == 2
    assert API.get_discussion_details(new, 1).conflicting_files == ["a"]
    with pytest.raises(HfHubHTTPError) as caught:
        API.merge_pull_request(new, 1)
    assert caught.value.response.status_code == 409 and len(API.list_repo_commits(new)) == 2


def test_commits_outlive_their_branch(new):
    start = API.model_info(new).sha
    commit(new, [("config.json", b"on main")])
    API.create_branch(new, branch="staging", revision=start)
    API.create_branch(new, branch="staging", exist_ok=True)
    staged = commit(new, [("config.json", b"staged")], revision="staging").oid
    assert API.revision_exists(new, "staging") and files(new, start) == set()
    API.create_tag(new, tag="kept", revision=staged)
    API.create_tag(new, tag="kept", exist_ok=True)  # stays where it is
    API.delete_branch(new, branch="staging")
    assert not API.revision_exists(new, "staging")
    assert read(new, staged) == read(new, "kept") == "staged" and read(new) == "on main"
    assert [ref.target_commit for ref in API.list_repo_refs(new).tags] == [staged]
    API.delete_tag(new, tag="kept")
    assert not API.revision_exists(new, "kept") and read(new, staged) == "staged"


def test_listings_tell_ids_sizes_and_last_commits(new):
    first = commit(new, [("w.bin", WEIGHTS), ("a/b/x", b"x")], commit_message="first").oid
    second = commit(new, [("a/y", b"y")], commit_message="second").oid
    found = {item.path: item for item in API.list_repo_tree(new, recursive=True, expand=True)}
    last = {path: item.last_commit.oid for path, item in found.items() if path != ".gitattributes"}
    assert last == {"w.bin": first, "a/b": first, "a/b/x": first, "a": second, "a/y": second}
    paths = API.get_paths_info(new, ["a", "w.bin", "none"])
    assert [item.path for item in paths] == ["a", "w.bin"] and paths[1].last_commit is None
    weights = next(file for file in API.repo_info(new, files_metadata=True).siblings if file.rfilename == "w.bin")
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() == paths[1].lfs.sha256
    assert weights.size == len(WEIGHTS) == paths[1].size and weights.blob_id == found["w.bin"].blob_id
    assert all(file.size is None for file in API.model_info(new).siblings)
    assert API.file_exists(new, "a/y") and not API.file_exists(new, "a/y", revision=first)


def test_the_kinds_do_not_share_names_and_a_repo_becomes_private(new, tokens):
    API.create_repo(new, repo_type="dataset")
    API.create_repo(new, repo_type="space", space_sdk="gradio")
    assert API.space_info(new).sdk == "gradio" and not API.dataset_info(new).private
    commit(new, [("only", b"here")], repo_type="dataset")
    assert files(new) == set() and API.file_exists(new, "only", repo_type="dataset")
    API.update_repo_settings(new, private=True, repo_type="dataset")
    assert API.dataset_info(new).private and not API.model_info(new).private
    with pytest.raises(RepositoryNotFoundError):
        API.dataset_info(new, token=tokens["stranger"])
    API.update_repo_settings(new, private=False, repo_type="dataset")
    assert API.dataset_info(new, token=tokens["stranger"]).id == new


def test_large_files_are_uploaded_once_to_each_repo_and_verified(new, hub):
    start = len(hub.requests)
    commit(new, [("w.bin", WEIGHTS), ("empty.bin", b"")])
    API.create_commit(new, [CommitOperationCopy("w.bin", "copy.bin")], commit_message="copy")
    commit(new, [("again.bin", WEIGHTS)])
    paths = [path for method, path in hub.requests[start:] if method == "PUT" or path.endswith("/verify")]
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    assert paths == [f"/lfs/model/{new}/{oid}", f"/{new}.git/info/lfs/objects/verify"]
    assert files(new) == {"w.bin", "empty.bin", "copy.bin", "again.bin"}
    assert get_session().put(f"{hub.url}{paths[0]}", content=b"other").status_code == 400
    other = API.create_repo(f"{new}-other").repo_id
    commit(other, [("w.bin", WEIGHTS)])
    assert ("PUT", f"/lfs/model/{other}/{oid}") in hub.requests


def test_what_gitignore_names_is_left_out(new):
    commit(new, [(".gitignore", b"*.log\n/build/\nlogs/\n"), ("a/x.log", b"x"), ("build/y", b"y"), ("z/build", b"z")])
    assert files(new) == {".gitignore", "z/build"}
    commit(new, [("logs/a/b", b"b"), ("logs.txt", b"c")])  # by the one that is there
    assert files(new) == {".gitignore", "z/build", "logs.txt"}


@pytest.mark.parametrize("range_", ["0-0", "3-9", "39990-", "-7", "39999-50000", "40000-", "-0"])
def test_a_range_is_that_part_of_the_file(range_, repo):
    commit("served/private", [("w.bin", WEIGHTS)])
    url, first, last = f"{API.endpoint}/served/private/resolve/main/w.bin", *range_.split("-")
    answer = get_session().get(url, headers=API._build_hf_headers() | {"Range": f"bytes={range_}"})
    start, stop = (int(first), int(last or 39_999) + 1) if first else (40_000 - int(last), 40_000)
    if start >= 40_000:
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */40000")
    else:
        assert (answer.status_code, answer.content) == (206, WEIGHTS[start:stop])


@pytest.mark.parametrize("cut", CUTS)
def test_a_broken_request_was_carried_out_or_not(cut, new, hub):
    hub.failures.append(Failure(f"/api/models/{new}/commit", method="POST", cut=cut, skip=1))
    commit(new, [("a", b"a")])
    with pytest.raises(TransportError):
        commit(new, [("b", b"b" * 1_000_000)])
    assert files(new) == ({"a", "b"} if cut in ("after", "answer") else {"a"})
    commit(new, [("c", b"c")])
    assert hub.failures.pop().times == 0


@pytest.mark.parametrize(("share", "cut"), break_points(8))
def test_a_run_that_breaks_anywhere_leaves_the_old_or_the_new_state_and_can_be_repeated(share, cut, new, hub):
    changes = [("x", b"x"), ("w.bin", WEIGHTS + share.hex().encode())]
    failure = hub.break_request(int(share * 5), cut)  # preupload, batch, PUT, verify, commit
    try:
        commit(new, changes)
    except TransportError:
        pass
    hub.failures.remove(failure)
    assert failure.times == 0 and files(new) in (set(), {"w.bin", "x"})
    commit(new, changes)
    assert files(new) == {"w.bin", "x"} and len(API.list_repo_commits(new)) == 2


def test_of_two_writers_one_wins(new, hub):
    parent = API.model_info(new).sha
    hub.before("POST", f"/api/models/{new}/commit", lambda: commit(new, [("theirs", b"1")], parent_commit=parent))
    with pytest.raises(HfHubHTTPError) as caught:
        commit(new, [("ours", b"2")], parent_commit=parent)
    assert caught.value.response.status_code == 412 and files(new) == {"theirs"}
    commit(new, [("ours", b"2")])  # the hook ran once
    assert files(new) == {"theirs", "ours"} and hub.hooks == []
