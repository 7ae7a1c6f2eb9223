"""Holds the loopback Hub against the unmodified client: uploads, listings, refusals, ranges, races and faults.
It stands before every test that publishes or downloads through that Hub: if it fails, they prove nothing.
It does not know the real Hub: that the refusals here are those of huggingface.co is taken from the client's own code.
"""

import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_client import FOLDER, WEIGHTS, digest
from hub_server import Failure, HubServer

CLIENT = Path(__file__).parents[1] / "hub_client.py"


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
        command = [sys.executable, str(CLIENT), str(home)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
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
