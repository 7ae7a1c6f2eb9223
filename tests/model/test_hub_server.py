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


MISSING, NO_REPO = ["RemoteEntryNotFoundError", 404, "EntryNotFound"], ["RepositoryNotFoundError", 404, "RepoNotFound"]
SEEN = {
    "commit": {"files": [".gitattributes", "README.md", "b.safetensors", "config.json"], "config": '{"a": 2}'},
    "refs": {  # tags pin, branches move
        **{"tagged": '{"a": 1}', "short_id": '{"a": 1}', "branch": '{"a": 3}'},
        "refs": [["dev/x", "main"], ["v1.0"]],
        "tag_again": ["HfHubHTTPError", 409, None],
        "after_deleting": [["main"], []],
    },
    "race": {"stale": ["HfHubHTTPError", 412, None], "unmoved": True},
    "missing": {
        **{"revision": ["RevisionNotFoundError", 404, "RevisionNotFound"], "route": ["HfHubHTTPError", 501, None]},
        **{"entry": MISSING, "folder": MISSING, "deletion": MISSING, "repo": NO_REPO, "deleted_repo": NO_REPO},
    },
    "ranges": {
        **{"middle": WEIGHTS[1000:1016].hex(), "end": WEIGHTS[-16:].hex()},
        **{"ls": ["datasets/loopback/data/train"], "size": len(WEIGHTS)},
        "exact": [206, f"bytes 10-19/{len(WEIGHTS)}", WEIGHTS[10:20].hex()],
        "beyond": ["HfHubHTTPError", 416, None],
    },
    "private": {
        **{"with_token": '{"secret": 1}', "is_private": True},
        **{f"{thing}_without_token": [NO_REPO[0], 401, NO_REPO[2]] for thing in ("info", "file")},
        **{f"{thing}_with_wrong_token": NO_REPO for thing in ("info", "file")},
    },
    "token": {
        "name": "loopback",
        "create_without": ["HfHubHTTPError", 401, None],
        "commit_with_wrong": ["HfHubHTTPError", 403, None],
    },
    "faults": {
        **{"cut": digest(WEIGHTS), "busy": True, "broken": [["HfHubHTTPError", 501, None]] * 2},
        "broken_titles": ["at the third attempt", "initial commit"],  # a refused commit leaves no trace
    },
}


@pytest.mark.parametrize("name", SEEN)
def test_the_client_sees(session, name: str):
    assert {key: session.seen[name][key] for key in SEEN[name]} == SEEN[name]


def test_the_client_gets_over_faults(session):
    requests = session.hub.requests
    assert requests.count(("GET", "/loopback/cut/resolve/main/weights.bin")) == 2  # the second one for the rest
    assert requests.count(("POST", "/api/models/loopback/busy/preupload/main")) == 2


def test_upload_folder_is_one_commit_and_downloads_equal(session):
    seen, top = session.seen["folder"], [".gitattributes", "README.md", "config.json", "data"]
    assert seen["url"] == f"{session.hub.url}/loopback/model" == seen["exist_ok"]
    assert seen["again"] == ["HfHubHTTPError", 409, None]
    assert seen["titles"] == ["the folder", "initial commit"]
    assert seen["snapshot"] == {path: digest(content) for path, content in FOLDER.items()}
    assert seen["lfs"] == ["data/x/weights.bin"] and seen["top"] == top
    assert seen["listing"] == [*top, "data/x", "data/x/weights.bin"]
    assert seen["unchanged"] == seen["commit"]  # the client found every file there already


def test_large_files_go_to_lfs_and_small_ones_to_git(session):
    uploads = [path for method, path in session.hub.requests if method == "PUT"]
    assert f"/lfs/{digest(WEIGHTS)}" in uploads and f"/lfs/{digest(FOLDER['config.json'])}" not in uploads
    assert len(uploads) == len(set(uploads))  # no object twice
    assert session.hub.blobs[digest(WEIGHTS)] == WEIGHTS


def test_a_pull_request_leaves_main_as_it_was(session):
    seen = session.seen["pull_request"]
    assert seen["url"] == f"{session.hub.url}/datasets/loopback/asked/discussions/1" and seen["ref"] == "refs/pr/1"
    assert seen["on_main"] == [".gitattributes"] and seen["titles_of_main"] == ["initial commit"]
    assert seen["asked"] == ["A title", "Some words", "two\n"] and seen["listed"] == [
        [1, "A title", seen["url"], "open"]
    ]
    assert seen["refs"] == ["refs/pr/1", "refs/pr/2"] and seen["second"] == ["a.txt"]
    assert seen["without_token"] == ["HfHubHTTPError", 401, None]


def test_servers_share_nothing():
    with HubServer("hf_one") as one, HubServer("hf_two") as two:
        assert status(one, "POST", "/api/repos/create", "hf_one", {"name": "x"}) == (200, None)
        assert status(one, "GET", "/api/models/loopback/x", None) == (200, None)
        assert status(two, "GET", "/api/models/loopback/x", "hf_two") == (404, "RepoNotFound")
        assert status(two, "POST", "/api/repos/create", "hf_one", {"name": "x"}) == (403, None)
        assert len(one.requests) == 2 and len(two.requests) == 2 and not two.repos
    with pytest.raises(urllib.error.URLError):
        status(one, "GET", "/api/models/loopback/x", None)


def test_stopped_server_answers_no_open_connection():
    with HubServer() as hub:
        connection = http.client.HTTPConnection("127.0.0.1", hub.server_port, timeout=5)
        connection.request("POST", "/api/validate-yaml", body="{}")
        assert json.loads(connection.getresponse().read()) == {"errors": [], "warnings": []}
    with closing(connection), pytest.raises(ConnectionError):
        connection.request("POST", "/api/validate-yaml", body="{}")
        connection.getresponse()


def status(hub: HubServer, method: str, path: str, token: str | None, body: dict | None = None) -> tuple:
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
