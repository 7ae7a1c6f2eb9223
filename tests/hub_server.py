"""A small real Hugging Face Hub on 127.0.0.1, to which the unmodified huggingface_hub client uploads and downloads.
It stands in for huggingface.co in the tests, each server with its own state in memory; only tests import it.
It does not know Xet, merging, gated repos, redirects to a CDN or chunked requests; an unknown route answers 501.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

USER = "loopback"  # the one user, to whom every namespace belongs
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".faiss", ".npy", ".npz", ".tar", ".gguf")
LFS_BYTES = 10_000_000  # a larger file goes to LFS whatever its name, as on the Hub
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class Refusal(Exception):
    """Any answer but success: the client picks the class of its exception by `code`, the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"X-Error-Message": message}
        headers |= {"X-Error-Code": code} if code else {}
        self.reply = Reply(status, headers, json.dumps({"error": message}).encode())


@dataclass
class Failure:
    """A fault to come: the next `times` requests to a decoded path that begins with `prefix` fail.

    With a `status` the request is refused and changes nothing. With None it is carried out, but the answer breaks off
    after half of its body; a HEAD, which has no body, then does not count. `method` limits the fault to one method.
    """

    prefix: str
    status: int | None = None
    times: int = 1
    method: str | None = None

    def hits(self, method: str, path: str) -> bool:
        """Whether this request is to fail."""
        possible = self.times > 0 and (self.status is not None or method != "HEAD")
        return possible and path.startswith(self.prefix) and self.method in (None, method)


File = dict[str, Any]  # a file of a commit, as an item of the client's listings: type, path, oid, size, perhaps lfs


class Repo:
    """The commits of one repo, and the branches, tags and pull requests that point to them."""

    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.commits: dict[str, dict[str, File]] = {}  # the files by their paths
        self.history: dict[str, list[dict[str, Any]]] = {}  # of each commit, newest first
        self.refs: dict[str, dict[str, str]] = {"branch": {}, "tag": {}, "pr": {}}  # those of pr are refs/pr/1, ...

    def add_commit(self, branch: str, files: dict[str, File], title: str, text: str = "", to: str = "") -> str:
        """Moves the branch, or the pull request `to`, to a new commit of these files; returns the commit's id."""
        parent = self.refs["branch"].get(branch)
        content = [self.kind, self.name, parent, title, sorted(files.items()), len(self.commits)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        log = {"id": sha, "title": title, "message": text, "date": date, "authors": [{"user": USER}]}
        self.commits[sha], self.history[sha] = files, [log, *(self.history[parent] if parent else [])]
        self.refs["pr" if to else "branch"][to or branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, refs/pr/1, seven or more digits of a commit's id or, for main, nothing."""
        name = (revision or "main").removeprefix("refs/heads/").removeprefix("refs/tags/")
        named = [refs[name] for refs in self.refs.values() if name in refs]
        matching = named or [sha for sha in self.commits if len(name) >= 7 and sha.startswith(name)]
        if not matching:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return matching[0]


PLAIN_REPO = r"/(?P<kind>datasets/|spaces/|)(?P<repo>[^/]+/[^/]+)"
API_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
ROUTES = (  # method, path before percent-decoding, the Handler's method, whether the token is needed
    ("POST", "/api/validate-yaml", "validate_yaml", False),
    ("POST", "/api/repos/create", "create_repo", True),
    ("GET", rf"{API_REPO}(?:/revision{REVISION})?", "info", False),
    ("GET", rf"{API_REPO}/tree{REVISION}(?:/(?P<path>.+))?", "tree", False),
    ("GET", rf"{PLAIN_REPO}/resolve{REVISION}/(?P<path>.+)", "download", False),
    ("POST", rf"{API_REPO}/preupload{REVISION}", "preupload", True),
    ("POST", rf"{PLAIN_REPO}\.git/info/lfs/objects/batch", "lfs_batch", True),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", "put_lfs", False),  # like the Hub's signed addresses
    ("POST", rf"{API_REPO}/commit{REVISION}", "commit", True),
    ("GET", rf"{API_REPO}/commits{REVISION}", "commits", False),
    ("GET", rf"{API_REPO}/discussions", "discussions", False),
    ("GET", rf"{API_REPO}/refs", "list_refs", False),
    ("POST", rf"{API_REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)", "add_ref", True),
)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route and writes the answer; a route's method returns a JSON value or a Reply."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: "HubServer"

    def serve(self) -> None:
        """Answers one request; the state is touched under the lock only."""
        url, hub, length = urlsplit(self.path), self.server, int(self.headers.get("Content-Length", 0))
        self.query, self.body = parse_qs(url.query), self.rfile.read(length)
        if len(self.body) < length:
            self.close_connection = True  # the client is gone in the middle of its request
            return
        with hub.lock:
            hub.requests.append((self.command, unquote(url.path)))
            failure = next((failure for failure in hub.failures if failure.hits(*hub.requests[-1])), None)
            if failure:
                failure.times -= 1
            try:
                if failure and failure.status:
                    raise Refusal(failure.status, "Failed on purpose")
                answer = self.call_route(url.path)
            except Refusal as refusal:
                answer = refusal.reply
            except (KeyError, ValueError) as error:
                answer = Refusal(400, f"Malformed request: {error!r}").reply
        self.write(answer, cut=failure is not None and failure.status is None)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def write(self, answer: Any, cut: bool) -> None:
        """Sends the answer, or with `cut` half of its body, and then hangs up."""
        reply = answer if isinstance(answer, Reply) else Reply(200, {}, json.dumps(answer).encode())
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))} | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)
        self.close_connection = self.close_connection or cut

    def call_route(self, path: str) -> Any:
        """Checks the token and calls the route with the decoded parts of its path."""
        for method, pattern, name, needs_token in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                parts: dict[str, Any] = {key: unquote(part) for key, part in match.groupdict(default="").items()}
                if "repo" in parts:
                    parts["repo"] = self.find_repo(parts.pop("kind").rstrip("s/") or "model", parts["repo"])
                if needs_token and not self.has_token():
                    raise Refusal(403 if "Authorization" in self.headers else 401, "This needs the server's token.")
                return getattr(self, name)(**parts)
        raise Refusal(501, f"This small Hub has no route {self.command} {path}.")

    def has_token(self) -> bool:
        """Whether the request carries the server's token."""
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def find_repo(self, kind: str, name: str) -> Repo:
        """The repo; to those without the token a private one is as if it did not exist."""
        repo = self.server.repos.get((kind, name))
        if repo is None or (repo.private and not self.has_token()):
            raise Refusal(404 if "Authorization" in self.headers else 401, "Repository not found", "RepoNotFound")
        return repo

    def store(self, path: str, content: bytes, sha256: str | None = None) -> File:
        """Keeps a file's content by its git id or, in LFS, by its SHA-256."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        in_git = pointer if sha256 else content
        oid, size = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest(), len(content)
        self.server.blobs[sha256 or oid] = content
        lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}} if sha256 else {}
        return {"type": "file", "path": path, "oid": oid, "size": size, **lfs}

    def validate_yaml(self) -> Any:
        """The check of a README's metadata, which always passes."""
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        """A repo with one commit on main."""
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.server.repos:
            return Reply(409, {}, json.dumps({"error": "You already created this repo", "url": url}).encode())
        repo = Repo(kind, name, private=asked.get("visibility") == "private")
        first = self.store(".gitattributes", GIT_ATTRIBUTES.encode())
        repo.add_commit("main", {first["path"]: first}, "initial commit")
        self.server.repos[kind, name] = repo
        return {"url": url, "name": name}

    def info(self, repo: Repo, revision: str) -> Any:
        """What the client's `model_info`, `dataset_info` and `space_info` read."""
        sha = repo.resolve(revision)
        files = repo.commits[sha]
        siblings = [{"rfilename": path, "blobId": file["oid"], **file} for path, file in sorted(files.items())]
        facts = {"id": repo.name, "author": repo.name.split("/")[0], "sha": sha, "private": repo.private, "tags": []}
        return facts | {"lastModified": repo.history[sha][0]["date"], "downloads": 0, "likes": 0, "siblings": siblings}

    def items(self, repo: Repo, revision: str) -> dict[str, File]:
        """Every file and folder of a revision by its path, as an item of a listing."""
        files = repo.commits[repo.resolve(revision)]
        above = {path[:end] for path in files for end, letter in enumerate(path) if letter == "/"}
        return {
            p: {"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in above
        } | files

    def tree(self, repo: Repo, revision: str, path: str) -> Any:
        """What is in a folder and, with `recursive=true`, below it."""
        items, prefix = self.items(repo, revision), f"{path}/" if path else ""
        if path and items.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} is no folder of {revision}", "EntryNotFound")
        inside = [name for name in sorted(items) if name.startswith(prefix)]
        deep = self.query.get("recursive") == ["true"]
        return [items[name] for name in inside if deep or "/" not in name.removeprefix(prefix)]

    def download(self, repo: Repo, revision: str, path: str) -> Reply:
        """A file or the range of it that the Range header asks for."""
        sha = repo.resolve(revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        etag, size = file.get("lfs", file)["oid"], file["size"]
        content = self.server.blobs[etag]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if "lfs" in file:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Reply(200, headers, content)
        first, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if first >= stop:
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return Reply(206, headers | {"Content-Range": f"bytes {first}-{stop - 1}/{size}"}, content[first:stop])

    def preupload(self, repo: Repo, revision: str) -> Any:
        """Which way each file is to go, and what is there already: the client leaves out a file of the same id."""
        present, files = repo.commits[repo.resolve(revision)], json.loads(self.body)["files"]
        for file in files:
            large = file["size"] > LFS_BYTES or file["path"].endswith(LFS_SUFFIXES)
            there = present.get(file["path"], {"oid": None})
            oid = there.get("lfs", there)["oid"]
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
        return {"files": files}

    def lfs_batch(self, repo: Repo) -> Any:
        """Where to put each LFS object that this server does not have."""
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put_lfs(self, sha256: str) -> Any:
        """Takes an LFS object."""
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "The content does not have this SHA-256.")
        self.server.blobs[sha256] = self.body
        return {}

    def commit(self, repo: Repo, revision: str) -> Any:
        """Carries out all operations or, when one is refused, none."""
        parent = repo.resolve(revision)
        if revision not in repo.refs["branch"]:
            raise Refusal(501, "This small Hub commits to branches, or asks to pull into them, only.")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if not parent.startswith(header["value"].get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = self.store(path, base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[path] = self.store(path, self.server.blobs[value["oid"]], value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                above = f"{path.rstrip('/')}/"
                kept = {name: file for name, file in files.items() if not f"{name}/".startswith(above)}
                if kept == files:
                    raise Refusal(404, f"{path} does not exist.", "EntryNotFound")
                files = kept
            else:
                raise Refusal(501, f"This small Hub does not know the operation {key}.")
        number = len(repo.refs["pr"]) + 1
        to = f"refs/pr/{number}" if self.query.get("create_pr") == ["1"] else ""
        sha = repo.add_commit(revision, files, header["value"]["summary"], header["value"].get("description", ""), to)
        url = f"{self.server.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}"
        asked = {"pullRequestUrl": f"{url}/discussions/{number}", "pullRequestRevision": to} if to else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **asked}

    def discussions(self, repo: Repo) -> Any:
        """All pull requests, which stay open; each has the title of its commit."""
        about = {"author": {"name": USER}, "status": "open", "isPullRequest": True}
        about["repo"] = {"name": repo.name, "type": repo.kind}
        logs = [(int(ref.split("/")[-1]), repo.history[sha][0]) for ref, sha in repo.refs["pr"].items()]
        found = [{"num": n, "title": log["title"], "createdAt": log["date"], **about} for n, log in logs]
        return {"discussions": found, "count": len(found), "start": 0}

    def commits(self, repo: Repo, revision: str) -> Any:
        """The history of a revision, newest first."""
        return repo.history[repo.resolve(revision)]

    def list_refs(self, repo: Repo) -> Any:
        """All branches, tags and pull requests."""

        def listed(ref: str, folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{folder}{n}", "targetCommit": sha} for n, sha in repo.refs[ref].items()]

        heads, tags = listed("branch", "refs/heads/"), listed("tag", "refs/tags/")
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": listed("pr", "")}

    def add_ref(self, repo: Repo, ref: str, name: str) -> Any:
        """A branch of this name; or a tag, then `name` is the revision to be tagged."""
        asked = json.loads(self.body)
        name, start = (name, asked.get("startingPoint", "")) if ref == "branch" else (asked["tag"], name)
        if name in repo.refs[ref]:
            raise Refusal(409, f"The {ref} {name} already exists.")
        repo.refs[ref][name] = repo.resolve(start)
        return {}

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean; `HubServer.requests` has it all."""


class HubServer(ThreadingHTTPServer):
    """The Hub of one test, reachable inside its `with` block only.

    `requests` lists every request as (method, decoded path without the query); `failures` takes faults to come.
    HF_ENDPOINT is read when huggingface_hub is imported: run the client in a process that starts with `environment`.
    """

    request_queue_size = 64  # the client downloads on several connections at once

    def __init__(self, token: str = "hf_loopback") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.token = f"http://127.0.0.1:{self.server_port}", token
        self.requests: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model", "dataset" or "space") and "namespace/name"
        self.blobs: dict[str, bytes] = {}  # by git id (40 digits) or, for LFS, SHA-256 (64 digits)
        self.lock = threading.Lock()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that lead a client to this server, with its cache and settings under `home`."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        folders = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        no_proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, **folders, **switches, **no_proxy}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
