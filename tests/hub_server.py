"""A small real Hugging Face Hub on 127.0.0.1, to which the unmodified huggingface_hub client uploads and downloads.
It stands in for huggingface.co in the tests, each server with its own state in memory; only tests import it.
It does not know Xet, which is off in `environment`, discussions other than pull requests, gated repos, redirects to a
CDN, pages of listings or chunked requests; an unknown route answers 501.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import LFS_BYTES, LFS_SUFFIXES, Failure, Refusal, Reply, Repo, is_ignored

USER = "loopback"  # to whom every namespace belongs but those of other users
PLAIN_REPO = r"/(?P<kind>datasets/|spaces/|)(?P<repo>[^/]+/[^/]+)"
API_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
PULL = r"/discussions/(?P<pull>\d+)"
ROUTES = (  # method, path before percent-decoding, the Handler's method, the right that is needed
    ("POST", "/api/validate-yaml", "validate_yaml", ""),
    ("GET", "/api/whoami-v2", "whoami", "login"),
    ("POST", "/api/repos/create", "create_repo", "login"),
    ("PUT", rf"{API_REPO}/settings", "settings", "write"),
    ("GET", rf"{API_REPO}/auth-check", "nothing", ""),
    ("GET", rf"{API_REPO}/auth-check/write", "nothing", "write"),
    ("GET", rf"{API_REPO}(?:/revision{REVISION})?", "info", ""),
    ("GET", rf"{API_REPO}/tree{REVISION}(?:/(?P<path>.+))?", "tree", ""),
    ("POST", rf"{API_REPO}/paths-info{REVISION}", "paths_info", ""),
    ("GET", rf"{PLAIN_REPO}/resolve{REVISION}/(?P<path>.+)", "download", ""),
    ("POST", rf"{API_REPO}/preupload{REVISION}", "preupload", "propose"),
    ("POST", rf"{PLAIN_REPO}\.git/info/lfs/objects/batch", "lfs_batch", "upload"),
    ("PUT", r"/lfs/(?P<kind>model|dataset|space)/(?P<repo>.+)/(?P<sha256>[0-9a-f]{64})", "put_lfs", "signed"),
    ("POST", rf"{PLAIN_REPO}\.git/info/lfs/objects/verify", "lfs_verify", "login"),
    ("POST", rf"{API_REPO}/commit{REVISION}", "commit", "propose"),
    ("GET", rf"{API_REPO}/commits{REVISION}", "commits", ""),
    ("GET", rf"{API_REPO}/variables", "variables", "write"),
    ("POST", rf"{API_REPO}/variables", "variables", "write"),
    ("GET", rf"{API_REPO}/discussions", "discussions", ""),
    ("GET", rf"{API_REPO}{PULL}", "discussion", ""),
    ("POST", rf"{API_REPO}{PULL}/merge", "merge", "write"),
    ("GET", rf"{API_REPO}/refs", "list_refs", ""),
    ("POST", rf"{API_REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)", "add_ref", "write"),
    ("DELETE", rf"{API_REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)", "delete_ref", "write"),
)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route and writes the answer; a route's method returns a JSON value or a Reply."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: "HubServer"

    def serve(self) -> None:
        """Answers one request; the state is touched under the lock only."""
        url, hub, length = urlsplit(self.path), self.server, int(self.headers.get("Content-Length", 0))
        failure, hooks = hub.note(self.command, unquote(url.path))
        cut = failure.cut if failure and failure.status is None else ""
        self.query, self.body = parse_qs(url.query), self.rfile.read(length // 2 if cut == "upload" else length)
        self.close_connection = self.close_connection or bool(cut)
        if cut in ("upload", "before") or len(self.body) < length:
            self.close_connection = True  # this server, or the client, is gone in the middle of the request
            return
        for hook in hooks:
            hook()
        with hub.lock:
            try:
                if failure and failure.status:
                    raise Refusal(failure.status, "Failed on purpose")
                answer = self.call_route(url.path)
            except Refusal as refusal:
                answer = refusal.reply
            except (KeyError, ValueError) as error:
                answer = Refusal(400, f"Malformed request: {error!r}").reply
        if cut != "after":
            self.write(answer, cut=cut == "answer")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def write(self, answer: Any, cut: bool) -> None:
        """Sends the answer, or with `cut` half of its body."""
        reply = answer if isinstance(answer, Reply) else Reply(200, {}, json.dumps(answer).encode())
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))} | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)

    def call_route(self, path: str) -> Any:
        """Checks the token and calls the route with the decoded parts of its path."""
        for method, pattern, name, right in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                self.user, self.may_write = self.authenticate()
                parts: dict[str, Any] = {key: unquote(part) for key, part in match.groupdict(default="").items()}
                if "repo" in parts:
                    kind = parts.pop("kind").rstrip("s/") or "model"
                    parts["repo"] = self.find_repo(kind, parts["repo"], anyone=right == "signed")
                self.check_right(right, parts)
                return getattr(self, name)(**parts)
        raise Refusal(501, f"This small Hub has no route {self.command} {path}.")

    def authenticate(self) -> tuple[str, bool]:
        """Who asks, "" for nobody, and whether the token is for writing."""
        header = self.headers.get("Authorization")
        if header is None:
            return "", False
        if header.removeprefix("Bearer ") not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users[header.removeprefix("Bearer ")]

    def owns(self, namespace: str) -> bool:
        """Whether a namespace is the user's."""
        others = {user for user, _ in self.server.users.values()} - {USER}
        return self.user != "" and (namespace == self.user or (self.user == USER and namespace not in others))

    def check_right(self, right: str, parts: dict[str, Any]) -> None:
        """Refuses who is not known, has a token for reading or wants to write to another's repo."""
        if right in ("", "signed"):
            return
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        if right == "login":
            return
        if not self.may_write:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        repo, revision = parts["repo"], parts.get("revision")
        proposes = right == "propose" and self.query.get("create_pr") == ["1"]
        if right == "upload":  # the client names no branch if a pull request is to come
            revision = json.loads(self.body).get("ref", {}).get("name")
            proposes = revision is None
        own_pull = right in ("propose", "upload") and repo.pulls.get(revision, {}).get("author") == self.user
        if not (proposes or own_pull or self.owns(repo.name.split("/")[0])):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")

    def find_repo(self, kind: str, name: str, anyone: bool = False) -> Repo:
        """The repo; a private one is as if it did not exist to all but its owner."""
        repo = self.server.repos.get((kind, name))
        if repo is None or not (anyone or not repo.settings["private"] or self.owns(name.split("/")[0])):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def validate_yaml(self) -> Any:
        """The check of a README's metadata, which always passes."""
        return {"errors": [], "warnings": []}

    def nothing(self, repo: Repo) -> Any:
        """All that there is to know was checked by now."""
        return {}

    def whoami(self) -> Any:
        """The user and what the token is for."""
        token = {"displayName": "token", "role": "write" if self.may_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}

    def create_repo(self) -> Any:
        """A repo with one commit on main; those of other kinds do not take its name."""
        asked = json.loads(self.body)
        kind, space = asked.get("type") or "model", asked.get("organization") or self.user
        if not self.may_write or not self.owns(space):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{space}"')
        name = f"{space}/{asked['name']}"
        if kind == "space" and "sdk" not in asked:
            raise Refusal(400, "A Space needs an sdk.")
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.server.repos:
            return Reply(409, {}, json.dumps({"error": f"You already created this {kind} repo", "url": url}).encode())
        settings = {
            "private": asked.get("visibility") == "private",
            **({"sdk": asked["sdk"]} if "sdk" in asked else {}),
        }
        self.server.repos[kind, name] = Repo(kind, name, self.user, self.server.blobs, **settings)
        return {"url": url, "name": name}

    def settings(self, repo: Repo) -> Any:
        """Makes a repo private or public."""
        repo.settings["private"] = json.loads(self.body)["visibility"] == "private"
        return {"private": repo.settings["private"]}

    def info(self, repo: Repo, revision: str) -> Any:
        """What the client's `model_info`, `dataset_info` and `space_info` read."""
        return repo.info(revision, blobs=self.query.get("blobs") == ["true"])

    def tree(self, repo: Repo, revision: str, path: str) -> Any:
        """What is in a folder and, with `recursive=true`, below it."""
        items, prefix = repo.items(revision, self.query.get("expand") == ["true"]), f"{path}/" if path else ""
        if path and items.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} is no folder of {revision}", "EntryNotFound")
        inside = [name for name in sorted(items) if name.startswith(prefix)]
        deep = self.query.get("recursive") == ["true"]
        return [items[name] for name in inside if deep or "/" not in name.removeprefix(prefix)]

    def paths_info(self, repo: Repo, revision: str) -> Any:
        """Those of the paths that are there."""
        form = parse_qs(self.body.decode())
        items = repo.items(revision, form.get("expand") == ["true"])
        return [items[path] for path in dict.fromkeys(form.get("paths", [])) if path in items]

    def download(self, repo: Repo, revision: str, path: str) -> Reply:
        """A file or the one range of it that the Range header asks for."""
        sha = repo.resolve(revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        etag, size = file.get("lfs", file)["oid"], file["size"]
        content = self.server.blobs[etag]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        headers["Accept-Ranges"] = "bytes"
        if "lfs" in file:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", ""))
        if asked is None:
            return Reply(200, headers, content)
        first, stop = max(0, size - int(asked[3] or 0)), size
        if asked[1]:
            first, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if first >= stop:
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return Reply(206, headers | {"Content-Range": f"bytes {first}-{stop - 1}/{size}"}, content[first:stop])

    def preupload(self, repo: Repo, revision: str) -> Any:
        """Which way each file is to go, and what is there already: the client leaves out a file of the same id."""
        present, asked = repo.commits[repo.resolve(revision)], json.loads(self.body)
        rules = asked.get("gitIgnore")
        if rules is None and ".gitignore" in present:
            rules = self.server.blobs[present[".gitignore"]["oid"]].decode()
        for file in asked["files"]:
            large = file["size"] > LFS_BYTES or file["path"].endswith(LFS_SUFFIXES)
            there = present.get(file["path"], {"oid": None})
            oid, ignored = there.get("lfs", there)["oid"], is_ignored(file["path"], rules or "")
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored, "oid": oid}
        return {"files": asked["files"]}

    def lfs_batch(self, repo: Repo) -> Any:
        """Where to put each LFS object that this repo does not have, and where to have it verified."""
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.lfs:
                upload = f"{self.server.url}/lfs/{repo.kind}/{repo.name}/{item['oid']}"
                verify = f"{self.server.url}/{repo.path}.git/info/lfs/objects/verify"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def put_lfs(self, repo: Repo, sha256: str) -> Any:
        """Takes an LFS object; who has the address needs no token, as it is signed on the Hub."""
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "The content does not have this SHA-256.")
        self.server.blobs[sha256] = self.body
        repo.lfs.add(sha256)
        return {}

    def lfs_verify(self, repo: Repo) -> Any:
        """Whether an LFS object has arrived whole."""
        asked = json.loads(self.body)
        if asked["oid"] not in repo.lfs or len(self.server.blobs[asked["oid"]]) != asked["size"]:
            raise Refusal(404, "This LFS object is not there, or has another size.")
        return {}

    def commit(self, repo: Repo, revision: str) -> Any:
        """Makes a commit on a branch or a pull request, or with `create_pr=1` a pull request."""
        create_pr = self.query.get("create_pr") == ["1"]
        lines = [json.loads(line) for line in self.body.splitlines()]
        sha, name = repo.commit(revision, lines, self.user, create_pr)
        url = f"{self.server.url}/{repo.path}"
        asked = {"pullRequestUrl": f"{url}/discussions/{name.rsplit('/', 1)[-1]}", "pullRequestRevision": name}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **(asked if create_pr else {})}

    def variables(self, repo: Repo) -> Any:
        """The variables of a Space, after one was set if the request has a body."""
        known = repo.settings.setdefault("variables", {})
        if self.body:
            asked = json.loads(self.body)
            known[asked["key"]] = {"value": asked["value"]}
        return known

    def discussions(self, repo: Repo) -> Any:
        """All pull requests, or those of one status or author."""
        status, author = (self.query.get(key, ["all"])[0] for key in ("status", "author"))
        found = [repo.discussion(ref) for ref in repo.pulls]
        found = [item for item in found if status in ("all", item["status"])]
        found = [item for item in found if author in ("all", item["author"]["name"])]
        return {"discussions": found, "count": len(found), "start": 0}

    def pull_request(self, repo: Repo, number: str) -> str:
        """refs/pr/1, if there is such a pull request."""
        if f"refs/pr/{number}" not in repo.pulls:
            raise Refusal(404, f"There is no discussion {number}.")
        return f"refs/pr/{number}"

    def discussion(self, repo: Repo, pull: str) -> Any:
        """A pull request with its commits."""
        return repo.discussion(self.pull_request(repo, pull))

    def merge(self, repo: Repo, pull: str) -> Any:
        """Merges a pull request into its branch."""
        repo.merge(self.pull_request(repo, pull), self.user)
        return {}

    def commits(self, repo: Repo, revision: str) -> Any:
        """The history of a revision, newest first."""
        return repo.history[repo.resolve(revision)]

    def list_refs(self, repo: Repo) -> Any:
        """All branches, tags and pull requests."""
        branches, tags, pulls = map(repo.listed, ("branch", "tag", "pr"))
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls}

    def add_ref(self, repo: Repo, ref: str, name: str) -> Any:
        """A branch of this name; or a tag, then `name` is the revision to be tagged."""
        asked = json.loads(self.body)
        repo.add_ref(ref, *((name, asked.get("startingPoint", "")) if ref == "branch" else (asked["tag"], name)))
        return {}

    def delete_ref(self, repo: Repo, ref: str, name: str) -> Any:
        """Deletes a branch or a tag; its commits stay."""
        repo.delete_ref(ref, name)
        return {}

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean; `HubServer.requests` has it all."""


class HubServer(ThreadingHTTPServer):
    """The Hub of one test, reachable inside its `with` block only.

    `requests` lists every request as (method, decoded path without the query); `failures` takes faults to come.
    HF_ENDPOINT is read when huggingface_hub is imported: run the client in a process that starts with `environment`.
    `token` is that of the user "loopback", who may write to all namespaces but those of the users of `add_token`.
    """

    request_queue_size = 64  # the client downloads on several connections at once

    def __init__(self, token: str = "hf_loopback") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.token = f"http://127.0.0.1:{self.server_port}", token
        self.users: dict[str, tuple[str, bool]] = {token: (USER, True)}  # name and right to write, by token
        self.requests: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.hooks: list[tuple[str, str, Callable[[], object]]] = []
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model", "dataset" or "space") and "namespace/name"
        self.blobs: dict[str, bytes] = {}  # by git id (40 digits) or, for LFS, SHA-256 (64 digits)
        self.lock = threading.Lock()

    def add_token(self, user: str, write: bool = True) -> str:
        """A token of a user, who is new or has others; their namespace is then nobody else's."""
        token = f"hf_{user}_{'write' if write else 'read'}"
        self.users[token] = user, write
        return token

    def break_request(self, number: int, cut: str = "after", times: int = 1) -> Failure:
        """Breaks one request to come: the first one from now on is number 0. See `Failure` and `break_points`."""
        self.failures.append(Failure(cut=cut, skip=number, times=times))
        return self.failures[-1]

    def before(self, method: str, prefix: str, function: Callable[[], object]) -> None:
        """Calls `function` once, before the next request of this method to a path that begins so is carried out.

        It runs in a thread of the server while the client waits, and may use a client itself.
        """
        self.hooks.append((method, prefix, function))

    def note(self, method: str, path: str) -> tuple[Failure | None, list[Callable[[], object]]]:
        """Lists a request; returns the fault that it meets and what is to be called before it."""
        with self.lock:
            self.requests.append((method, path))
            due = [hook for hook in self.hooks if hook[0] == method and path.startswith(hook[1])]
            self.hooks = [hook for hook in self.hooks if hook not in due]
            failure = next((failure for failure in self.failures if failure.strikes(method, path)), None)
        return failure, [hook[2] for hook in due]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that lead a client to this server, with its cache and settings under `home`."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        folders = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        no_proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, **folders, **switches, **no_proxy}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is gone is no error; the others are printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
