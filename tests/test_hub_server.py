"""Holds the loopback Hub against the unmodified client: uploads, listings, refusals, ranges, races and faults.
It stands before every test that publishes or downloads through that Hub: if it fails, they prove nothing.
It does not know the real Hub: that the refusals here are those of huggingface.co is taken from the client's own code.
"""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_server import Failure, HubServer

WEIGHTS = bytes(range(256)) * 1200  # 300 kB, each byte known by its place
FOLDER = {
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n# A card\n",
    "data/x/weights.bin": WEIGHTS,
}


class Session(NamedTuple):
    """A client's whole run: the server it spoke to and what it saw."""

    hub: HubServer
    seen: dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Runs `client` once in a process of its own, because HF_ENDPOINT is read at the import."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        hub.failures += [
            Failure("/loopback/cut/resolve/", method="GET"),
            Failure("/api/models/loopback/busy/preupload/", status=503),
            Failure("/api/models/loopback/broken/commit/", status=501, times=2),
        ]
        environment = {**os.environ, **hub.environment(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, __file__, str(home)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        yield Session(hub, json.loads(run.stdout))


def test_upload_folder_is_one_commit_and_downloads_equal(session: Session) -> None:
    seen = session.seen["folder"]
    assert seen["url"] == f"{session.hub.url}/loopback/model"
    assert seen["again"] == ["HfHubHTTPError", 409, None] and seen["exist_ok"] == seen["url"]
    assert seen["titles"] == ["the folder", "initial commit"]
    assert seen["snapshot"] == {path: digest(content) for path, content in FOLDER.items()}
    assert seen["lfs"] == ["data/x/weights.bin"]
    assert seen["listing"] == [".gitattributes", "README.md", "config.json", "data", "data/x", "data/x/weights.bin"]
    assert seen["top"] == [".gitattributes", "README.md", "config.json", "data"]
    assert seen["unchanged"] == seen["commit"]  # the client found every file there already


def test_large_files_go_to_lfs_and_small_ones_to_git(session: Session) -> None:
    uploads = [path for method, path in session.hub.requests if method == "PUT"]
    assert f"/lfs/{digest(WEIGHTS)}" in uploads and f"/lfs/{digest(FOLDER['config.json'])}" not in uploads
    assert len(uploads) == len(set(uploads))  # no object twice
    assert session.hub.blobs[digest(WEIGHTS)] == WEIGHTS


def test_create_commit_adds_and_deletes_at_once(session: Session) -> None:
    assert session.seen["commit"]["files"] == [".gitattributes", "README.md", "b.safetensors", "config.json"]
    assert session.seen["commit"]["config"] == '{"a": 2}'


def test_tags_pin_and_branches_move(session: Session) -> None:
    seen = session.seen["refs"]
    assert seen["tagged"] == '{"a": 1}' and seen["short_id"] == '{"a": 1}' and seen["branch"] == '{"a": 3}'
    assert seen["refs"] == [["dev/x", "main"], ["v1.0"]]
    assert seen["tag_again"] == ["HfHubHTTPError", 409, None]
    assert seen["after_deleting"] == [["main"], []]


def test_stale_parent_is_refused(session: Session) -> None:
    assert session.seen["race"] == {"stale": ["HfHubHTTPError", 412, None], "unmoved": True}


def test_a_pull_request_leaves_main_as_it_was(session: Session) -> None:
    seen = session.seen["pull_request"]
    assert seen["url"] == f"{session.hub.url}/datasets/loopback/asked/discussions/1" and seen["ref"] == "refs/pr/1"
    assert seen["on_main"] == [".gitattributes"] and seen["titles_of_main"] == ["initial commit"]
    assert seen["asked"] == ["A title", "Some words", "two\n"] and seen["listed"] == [
        [1, "A title", seen["url"], "open"]
    ]
    assert seen["refs"] == ["refs/pr/1", "refs/pr/2"] and seen["second"] == ["a.txt"]
    assert seen["without_token"] == ["HfHubHTTPError", 401, None]


def test_each_missing_thing_has_its_own_error(session: Session) -> None:
    seen = session.seen["missing"]
    assert seen["revision"] == ["RevisionNotFoundError", 404, "RevisionNotFound"]
    assert seen["entry"] == ["RemoteEntryNotFoundError", 404, "EntryNotFound"]
    assert seen["folder"] == ["RemoteEntryNotFoundError", 404, "EntryNotFound"]
    assert seen["deletion"] == ["RemoteEntryNotFoundError", 404, "EntryNotFound"]
    assert seen["repo"] == ["RepositoryNotFoundError", 404, "RepoNotFound"]
    assert seen["deleted_repo"] == ["RepositoryNotFoundError", 404, "RepoNotFound"]
    assert seen["route"] == ["HfHubHTTPError", 501, None]


def test_ranges_through_the_file_system(session: Session) -> None:
    seen = session.seen["ranges"]
    assert bytes.fromhex(seen["middle"]) == WEIGHTS[1000:1016] and bytes.fromhex(seen["end"]) == WEIGHTS[-16:]
    assert seen["ls"] == ["datasets/loopback/data/train"] and seen["size"] == len(WEIGHTS)
    assert seen["exact"] == [206, f"bytes 10-19/{len(WEIGHTS)}", WEIGHTS[10:20].hex()]
    assert seen["beyond"] == ["HfHubHTTPError", 416, None]


def test_private_repo_looks_missing_without_the_token(session: Session) -> None:
    seen = session.seen["private"]
    assert seen["with_token"] == '{"secret": 1}' and seen["is_private"] is True
    for thing in ("info", "file"):
        assert seen[f"{thing}_without_token"] == ["RepositoryNotFoundError", 401, "RepoNotFound"]
        assert seen[f"{thing}_with_wrong_token"] == ["RepositoryNotFoundError", 404, "RepoNotFound"]


def test_writes_and_whoami_need_the_token(session: Session) -> None:
    seen = session.seen["token"]
    assert seen["name"] == "loopback"
    assert seen["create_without"] == ["HfHubHTTPError", 401, None]
    assert seen["commit_with_wrong"] == ["HfHubHTTPError", 403, None]


def test_client_gets_over_faults(session: Session) -> None:
    seen, requests = session.seen["faults"], session.hub.requests
    assert seen["cut"] == digest(WEIGHTS)
    assert requests.count(("GET", "/loopback/cut/resolve/main/weights.bin")) == 2  # the second one for the rest
    assert requests.count(("POST", "/api/models/loopback/busy/preupload/main")) == 2
    assert seen["busy"] is True


def test_refused_commit_leaves_no_trace(session: Session) -> None:
    seen = session.seen["faults"]
    assert seen["broken"] == [["HfHubHTTPError", 501, None]] * 2
    assert seen["broken_titles"] == ["at the third attempt", "initial commit"]


def test_servers_share_nothing() -> None:
    with HubServer("hf_one") as one, HubServer("hf_two") as two:
        assert status(one, "POST", "/api/repos/create", "hf_one", {"name": "x"}) == (200, None)
        assert status(one, "GET", "/api/models/loopback/x", None) == (200, None)
        assert status(two, "GET", "/api/models/loopback/x", "hf_two") == (404, "RepoNotFound")
        assert status(two, "POST", "/api/repos/create", "hf_one", {"name": "x"}) == (403, None)
        assert len(one.requests) == 2 and len(two.requests) == 2 and not two.repos
    with pytest.raises(urllib.error.URLError):
        status(one, "GET", "/api/models/loopback/x", None)


def test_stopped_server_answers_no_open_connection() -> None:
    with HubServer() as hub:
        connection = http.client.HTTPConnection("127.0.0.1", hub.server_port, timeout=5)
        connection.request("POST", "/api/validate-yaml", body="{}")
        assert json.loads(connection.getresponse().read()) == {"errors": [], "warnings": []}
    with closing(connection), pytest.raises(ConnectionError):
        connection.request("POST", "/api/validate-yaml", body="{}")
        connection.getresponse()


def test_environment_overrides_the_user_s_own(tmp_path: Path) -> None:
    with HubServer() as hub:
        environment = hub.environment(tmp_path)
    assert environment["HF_ENDPOINT"] == hub.url and environment["HF_TOKEN"] == hub.token
    assert environment["HF_HOME"] == str(tmp_path) and environment["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert environment["HF_HUB_DISABLE_XET"] == environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "0" and environment["NO_PROXY"] == "127.0.0.1"


def status(
    hub: HubServer, method: str, path: str, token: str | None, body: dict[str, Any] | None = None
) -> tuple[int, str | None]:
    """Asks without the client; returns the status and the error code."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(hub.url + path, data=data, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as response:
            return response.status, response.headers["X-Error-Code"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["X-Error-Code"]


def digest(content: bytes) -> str:
    """SHA-256 in hex digits."""
    return hashlib.sha256(content).hexdigest()


# From here on: what runs in the client's process. Every part returns what it saw, and the tests above judge it.


def client(home: Path) -> dict[str, Any]:
    """The whole run."""
    parts = (folder, commit, refs, race, pull_request, missing, ranges, private, token, faults)
    return {part.__name__: part(home) for part in parts}


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The error's class, its status and its code; an unexpected success is no refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code, error.response.headers.get("X-Error-Code")]
    return ["no error", 200, None]


def add(path: str, content: bytes) -> Any:
    """An operation of a commit."""
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, content)


def read(repo_id: str, revision: str | None = None, path: str = "config.json", **options: Any) -> str:
    """The text of a downloaded file."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, path, revision=revision, **options)).read_text()


def folder(home: Path) -> dict[str, Any]:
    """A folder goes up and comes down again."""
    from huggingface_hub import HfApi, RepoFile, snapshot_download

    api, source = HfApi(), home / "source"
    for path, content in FOLDER.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    seen: dict[str, Any] = {"url": str(api.create_repo("loopback/model"))}
    seen["again"] = refusal(api.create_repo, "loopback/model")
    seen["exist_ok"] = str(api.create_repo("loopback/model", exist_ok=True))
    upload = {"repo_id": "loopback/model", "folder_path": source, "commit_message": "the folder"}
    seen["commit"] = api.upload_folder(**upload).oid
    seen["unchanged"] = api.upload_folder(**upload).oid
    seen["titles"] = [entry.title for entry in api.list_repo_commits("loopback/model")]
    copy = Path(snapshot_download("loopback/model"))
    found = [path for path in copy.rglob("*") if path.is_file() and path.name != ".gitattributes"]
    seen["snapshot"] = {path.relative_to(copy).as_posix(): digest(path.read_bytes()) for path in found}
    items = list(api.list_repo_tree("loopback/model", recursive=True))
    seen["listing"] = [item.path for item in items]
    seen["top"] = [item.path for item in api.list_repo_tree("loopback/model")]
    seen["lfs"] = [item.path for item in items if isinstance(item, RepoFile) and item.lfs]
    return seen


def commit(home: Path) -> dict[str, Any]:
    """Regular and LFS files and two deletions in one commit; its predecessor gets the tag v1.0."""
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    api.create_tag("loopback/model", tag="v1.0")
    operations = [add("config.json", b'{"a": 2}'), add("b.safetensors", WEIGHTS[::-1]), add("c.json", b"{}")]
    api.create_commit("loopback/model", operations, commit_message="more")
    operations = [CommitOperationDelete("data/", is_folder=True), CommitOperationDelete("c.json")]
    api.create_commit("loopback/model", operations, commit_message="less")
    return {"files": sorted(api.list_repo_files("loopback/model")), "config": read("loopback/model")}


def refs(home: Path) -> dict[str, Any]:
    """A tag, a branch with a slash in its name, and the first digits of a commit's id as revisions."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), "loopback/model"
    api.create_branch(repo, branch="dev/x", revision="v1.0")
    api.create_commit(repo, [add("config.json", b'{"a": 3}')], commit_message="on the branch", revision="dev/x")
    tagged = api.model_info(repo, revision="v1.0").sha
    seen = {"tagged": read(repo, "v1.0"), "short_id": read(repo, tagged[:10]), "branch": read(repo, "dev/x")}
    seen["tag_again"] = refusal(api.create_tag, repo, tag="v1.0")

    def names() -> list[list[str]]:
        found = api.list_repo_refs(repo)
        return [sorted(ref.name for ref in found.branches), [ref.name for ref in found.tags]]

    seen["refs"] = names()
    api.delete_branch(repo, branch="dev/x")
    api.delete_tag(repo, tag="v1.0")
    return {**seen, "after_deleting": names()}


def race(home: Path) -> dict[str, Any]:
    """Two writers start from one commit: the second is refused."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), "loopback/model"
    parent = api.model_info(repo).sha
    first = api.create_commit(repo, [add("race.txt", b"1")], commit_message="first", parent_commit=parent)
    late = {"operations": [add("race.txt", b"2")], "commit_message": "second", "parent_commit": parent}
    stale = refusal(api.create_commit, repo, **late)
    return {"stale": stale, "unmoved": api.model_info(repo).sha == first.oid}


def pull_request(home: Path) -> dict[str, Any]:
    """Two pull requests, each of which starts from main."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), {"repo_id": "loopback/asked", "repo_type": "dataset"}
    api.create_repo(**repo)
    words = {"commit_message": "A title", "commit_description": "Some words", "create_pr": True}
    made = api.create_commit(operations=[add("x/b.txt", b"two\n")], **words, **repo)
    second = api.create_commit(operations=[add("a.txt", b"a")], commit_message="Another", create_pr=True, **repo)
    newest = api.list_repo_commits(revision=made.pr_revision, **repo)[0]
    found = list(api.get_repo_discussions(**repo))[:1]
    return {
        "url": made.pr_url,
        "ref": made.pr_revision,
        "on_main": api.list_repo_files(**repo),
        "titles_of_main": [entry.title for entry in api.list_repo_commits(**repo)],
        "asked": [newest.title, newest.message, read(revision="refs/pr/1", path="x/b.txt", **repo)],
        "listed": [[one.num, one.title, one.url, one.status] for one in found],
        "refs": [ref.ref for ref in api.list_repo_refs(include_pull_requests=True, **repo).pull_requests],
        "second": [path for path in api.list_repo_files(revision=second.pr_revision, **repo) if path[0] != "."],
        "without_token": refusal(
            api.create_commit, operations=[add("c", b"c")], commit_message="c", create_pr=True, token=False, **repo
        ),
    }


def missing(home: Path) -> dict[str, Any]:
    """What is not there, in every sense."""
    from huggingface_hub import CommitOperationDelete, HfApi

    api, repo = HfApi(), "loopback/model"
    api.create_repo("loopback/gone", repo_type="space", space_sdk="static")
    api.space_info("loopback/gone")
    api.delete_repo("loopback/gone", repo_type="space")
    return {
        "revision": refusal(read, repo, "v9"),
        "entry": refusal(read, repo, path="none.json"),
        "folder": refusal(lambda: list(api.list_repo_tree(repo, "none"))),
        "deletion": refusal(api.create_commit, repo, [CommitOperationDelete("none")], commit_message="none"),
        "repo": refusal(read, "loopback/none"),
        "deleted_repo": refusal(api.space_info, "loopback/gone"),
        "route": refusal(api.get_collection, "loopback/none"),
    }


def ranges(home: Path) -> dict[str, Any]:
    """Parts of a dataset's file, without a download of the whole."""
    from huggingface_hub import HfApi, HfFileSystem, get_session, hf_hub_url
    from huggingface_hub.utils import hf_raise_for_status

    api = HfApi()
    api.create_repo("loopback/data", repo_type="dataset")
    api.create_commit("loopback/data", [add("train/w.bin", WEIGHTS)], commit_message="data", repo_type="dataset")
    files = HfFileSystem()
    path = "datasets/loopback/data/train/w.bin"
    with files.open(path, "rb", block_size=16) as file:
        file.seek(1000)
        middle = file.read(16)
        file.seek(-16, 2)
        end = file.read(16)
    listed = [name for name in files.ls("datasets/loopback/data", detail=False) if not name.endswith(".gitattributes")]
    url = hf_hub_url("loopback/data", "train/w.bin", repo_type="dataset")
    ten = get_session().get(url, headers={"Range": "bytes=10-19"})
    exact = [ten.status_code, ten.headers["Content-Range"], ten.content.hex()]
    beyond = refusal(hf_raise_for_status, get_session().get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}))
    parts = {"middle": middle.hex(), "end": end.hex(), "exact": exact, "beyond": beyond}
    return {**parts, "ls": listed, "size": files.size(path)}


def private(home: Path) -> dict[str, Any]:
    """A private repo with the token, without one and with somebody else's."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), "loopback/private"
    api.create_repo(repo, private=True)
    api.create_commit(repo, [add("config.json", b'{"secret": 1}')], commit_message="a secret")
    seen: dict[str, Any] = {}
    for name, given in (("without_token", False), ("with_wrong_token", "hf_wrong")):
        seen[f"info_{name}"] = refusal(api.model_info, repo, token=given)
        seen[f"file_{name}"] = refusal(read, repo, token=given)
    return {**seen, "with_token": read(repo), "is_private": api.model_info(repo).private}


def token(home: Path) -> dict[str, Any]:
    """Writes without the right token, to a repo that everyone can read."""
    from huggingface_hub import HfApi

    api, change = HfApi(), [add("x.txt", b"x")]
    return {
        "name": api.whoami()["name"],
        "create_without": refusal(api.create_repo, "loopback/free", token=False),
        "commit_with_wrong": refusal(
            api.create_commit, "loopback/model", change, commit_message="x", token="hf_wrong"
        ),
    }


def faults(home: Path) -> dict[str, Any]:
    """The faults that the fixture has laid out: an answer cut short, one 503 and two refused commits."""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    for name in ("cut", "busy", "broken"):
        api.create_repo(f"loopback/{name}")
    api.create_commit("loopback/cut", [add("weights.bin", WEIGHTS)], commit_message="weights")
    cut = digest(Path(hf_hub_download("loopback/cut", "weights.bin")).read_bytes())
    api.create_commit("loopback/busy", [add("a.txt", b"a")], commit_message="after one retry")

    def attempt() -> None:
        api.create_commit("loopback/broken", [add("a.txt", b"a")], commit_message="at the third attempt")

    broken = [refusal(attempt), refusal(attempt)]
    attempt()
    titles = [entry.title for entry in api.list_repo_commits("loopback/broken")]
    return {"cut": cut, "busy": api.file_exists("loopback/busy", "a.txt"), "broken": broken, "broken_titles": titles}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(client(Path(sys.argv[1]))))
