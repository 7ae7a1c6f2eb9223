"""What the tests' loopback Hub keeps and refuses: repos with their commits, branches, tags and pull requests.

It knows nothing of HTTP but the statuses of refusals, which with their codes and words are those that the client and
its own tests expect of huggingface.co. Unlike there nothing is ever lost: a commit stays after its branch is deleted.
"""

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from random import Random
from typing import Any, NamedTuple

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".faiss", ".npy", ".npz", ".tar", ".gguf")
LFS_BYTES = 10_000_000  # a larger file goes to LFS whatever its name, as on the Hub
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
CUTS = ("upload", "before", "after", "answer")


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

    With a `status` the request is refused and changes nothing. With None the connection breaks, at `cut`: "upload",
    after half of the request's body; "before" it is carried out; "after" it, without an answer; or in the "answer",
    after half of its body, then a HEAD, which has none, passes and does not count. `method` limits the fault to one
    method, and the first `skip` requests that it would meet pass.
    """

    prefix: str = "/"
    status: int | None = None
    times: int = 1
    method: str | None = None
    cut: str = "answer"
    skip: int = 0

    def __post_init__(self) -> None:
        assert self.cut in CUTS, f"`cut` must be one of {CUTS}, got {self.cut!r}."

    def strikes(self, method: str, path: str) -> bool:
        """Counts this request; whether it is to fail."""
        if self.times <= 0 or not path.startswith(self.prefix) or self.method not in (None, method):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if method == "HEAD" and self.status is None and self.cut == "answer":
            return False
        self.times -= 1
        return True


def break_points(count: int = 20, seed: int = 0) -> list[tuple[float, str]]:
    """Random places to break a run, spread evenly: the share of its requests that pass, and `cut` for the next one.

    `hub.break_request(int(share * n_requests), cut)` puts one in, for a run that makes so many requests undisturbed.
    """
    random, cuts = Random(seed), [CUTS[number % len(CUTS)] for number in range(count)]
    random.shuffle(cuts)
    return [(int((number + random.random()) * 100) / count / 100, cut) for number, cut in enumerate(cuts)]


def is_ignored(path: str, rules: str) -> bool:
    """Whether a .gitignore names a file: by name, glob or folder; exceptions (!) are not known here."""
    parts = path.split("/")
    for rule in filter(None, (line.partition("#")[0].strip() for line in rules.splitlines())):
        n_parts = len(parts) - rule.endswith("/")
        rooted = "/" in rule.rstrip("/")
        names = ["/".join(parts[: n + 1]) for n in range(n_parts)] if rooted else parts[:n_parts]
        if any(fnmatchcase(name, rule.strip("/")) for name in names):
            return True
    return False


File = dict[str, Any]  # a file of a commit, as an item of the client's listings: type, path, oid, size, perhaps lfs
Files = dict[str, File]  # by their paths


class Repo:
    """The commits of one repo, and the branches, tags and pull requests that point to them.

    `blobs` has the contents of all repos: by git id (40 digits) or, in LFS, by SHA-256 (64 digits). `lfs` names those
    that were uploaded to this repo, as the Hub does not share them between repos.
    """

    def __init__(self, kind: str, name: str, user: str, blobs: dict[str, bytes], **settings: Any) -> None:
        self.kind, self.name, self.blobs, self.lfs = kind, name, blobs, set()
        self.settings = {"private": False, **settings}  # of a Space its sdk too
        self.commits: dict[str, Files] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}  # of each commit, newest first
        self.refs: dict[str, dict[str, str]] = {"branch": {}, "tag": {}, "pr": {}}  # those of pr are refs/pr/1, ...
        self.pulls: dict[str, dict[str, Any]] = {}  # what else is known of these
        first = self.store(".gitattributes", GIT_ATTRIBUTES.encode())
        self.add_commit("branch", "main", None, {first["path"]: first}, user, "initial commit")

    @property
    def path(self) -> str:
        """The path of its page."""
        return f"{'' if self.kind == 'model' else self.kind + 's/'}{self.name}"

    def store(self, path: str, content: bytes, sha256: str | None = None) -> File:
        """Keeps a file's content by its git id or, in LFS, by its SHA-256."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        in_git = pointer if sha256 else content
        oid, size = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest(), len(content)
        self.blobs[sha256 or oid] = content
        lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}} if sha256 else {}
        return {"type": "file", "path": path, "oid": oid, "size": size, **lfs}

    def add_commit(
        self, ref: str, name: str, parent: str | None, files: Files, user: str, title: str, text: str = ""
    ) -> str:
        """Moves a branch or a pull request to a new commit of these files; returns the commit's id."""
        content = [self.kind, self.name, parent, title, sorted(files.items()), len(self.commits)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        log = {"id": sha, "title": title, "message": text, "date": date, "authors": [{"user": user}]}
        self.commits[sha], self.history[sha] = files, [log, *(self.history[parent] if parent else [])]
        self.refs[ref][name] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, refs/pr/1, seven or more digits of a commit's id or, for main, nothing."""
        name = (revision or "main").removeprefix("refs/heads/").removeprefix("refs/tags/")
        named = [refs[name] for refs in self.refs.values() if name in refs]
        matching = named or [sha for sha in self.commits if len(name) >= 7 and sha.startswith(name)]
        if not matching:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return matching[0]

    def changed(self, files: Files, key: str, value: dict[str, Any]) -> Files:
        """The files after one operation of a commit."""
        path = value["path"]
        if key == "file":
            return files | {path: self.store(path, base64.b64decode(value["content"]))}
        if key == "lfsFile":
            if value["oid"] not in self.lfs:
                reason = "an LFS pointer pointed to a file that does not exist"
                raise Refusal(400, f"Your push was rejected because {reason}. Offending file: - {path}")
            return files | {path: self.store(path, self.blobs[value["oid"]], value["oid"])}
        if key not in ("deletedFile", "deletedFolder"):
            raise Refusal(501, f"This small Hub does not know the operation {key}.")
        above = f"{path.rstrip('/')}/"
        kept = {name: file for name, file in files.items() if not f"{name}/".startswith(above)}
        if kept == files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return kept

    def commit(self, revision: str, lines: list[dict[str, Any]], user: str, create_pr: bool) -> tuple[str, str]:
        """Carries out all operations or, when one is refused, none; returns the commit and its branch or refs/pr/1.

        A pull request begins at `parentCommit`; any other commit is refused if its branch has moved from there.
        """
        refs = [ref for ref in ("branch", "pr") if revision in self.refs[ref]]
        if not refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        (header, *operations), head = lines, self.refs[refs[0]][revision]
        about, parent = header["value"], head
        if about.get("parentCommit"):
            parent = self.resolve(about["parentCommit"])
            if parent != head and not create_pr:
                raise Refusal(412, "The branch was updated since you opened this page. Please refresh and try again.")
        files = self.commits[parent]
        for operation in operations:
            files = self.changed(files, operation["key"], operation["value"])
        title, text, ref, name = about["summary"], about.get("description", ""), refs[0], revision
        if create_pr:
            ref, name = "pr", f"refs/pr/{len(self.pulls) + 1}"
            self.pulls[name] = {"title": title, "author": user, "status": "open", "base": revision, "from": parent}
        return self.add_commit(ref, name, parent, files, user, title, text), name

    def conflicts(self, ref: str) -> list[str]:
        """The files that a pull request and its branch have both changed since, each in its way."""
        pull = self.pulls[ref]
        old, new, there = (self.commits[self.resolve(at)] for at in (pull["from"], ref, pull["base"]))
        return [
            p for p in sorted(old | new) if new.get(p) != old.get(p) and there.get(p) not in (old.get(p), new.get(p))
        ]

    def merge(self, ref: str, user: str) -> None:
        """Makes one commit on the branch of all that a pull request changes, and keeps refs/pr/1."""
        pull = self.pulls[ref]
        if pull["status"] != "open" or self.conflicts(ref):
            raise Refusal(409, f"This pull request is {pull['status']}, or it has conflicts: {self.conflicts(ref)}")
        old, new, parent = self.commits[pull["from"]], self.commits[self.refs["pr"][ref]], self.resolve(pull["base"])
        changes = {path for path in old | new if old.get(path) != new.get(path)}
        files = {path: file for path, file in self.commits[parent].items() if path not in changes}
        files |= {path: new[path] for path in changes if path in new}
        title = f"{pull['title']} (#{ref.rsplit('/', 1)[1]})"
        text = "\n".join(f"- {log['title']} ({log['id']})" for log in reversed(self.added(ref)))
        sha = self.add_commit("branch", pull["base"], parent, files, user, title, text)
        pull |= {"status": "merged", "mergeCommitId": sha}

    def added(self, ref: str) -> list[dict[str, Any]]:
        """The commits of a pull request, newest first."""
        history, start = self.history[self.refs["pr"][ref]], self.pulls[ref]["from"]
        return history[: len(history) - len(self.history[start])]

    def discussion(self, ref: str) -> dict[str, Any]:
        """A pull request as an item of `get_repo_discussions`, and with more than that of `get_discussion_details`."""
        pull, logs = self.pulls[ref], self.added(ref)[::-1]
        author = {"author": {"name": pull["author"]}}
        commits = [
            {"id": log["id"], "type": "commit", "createdAt": log["date"], **author}
            | {"data": {"subject": log["title"], "oid": log["id"]}}
            for log in logs
        ]
        changes = {"base": f"refs/heads/{pull['base']}", "mergeCommitId": pull.get("mergeCommitId")}
        about = {"num": int(ref.rsplit("/", 1)[1]), "title": pull["title"], "status": pull["status"]}
        about |= {"createdAt": logs[0]["date"], "isPullRequest": True, "repo": {"name": self.name, "type": self.kind}}
        conflicts = self.conflicts(ref) if pull["status"] == "open" else []
        return about | author | {"events": commits, "changes": changes, "filesWithConflicts": conflicts, "diff": ""}

    def listed(self, ref: str) -> list[dict[str, str]]:
        """The branches, tags or pull requests as items of a listing."""
        folder = {"branch": "refs/heads/", "tag": "refs/tags/", "pr": ""}[ref]
        return [{"name": n, "ref": f"{folder}{n}", "targetCommit": sha} for n, sha in self.refs[ref].items()]

    def add_ref(self, ref: str, name: str, start: str) -> None:
        """A branch or a tag; a branch may have the name of a tag."""
        if name.startswith("refs/") or not re.fullmatch(r"[^\s~^:?*\[\\]+", name):
            raise Refusal(400, f"Invalid reference for a {ref}: {name}")
        if name in self.refs[ref]:
            raise Refusal(409, f"Reference refs/{'heads' if ref == 'branch' else 'tags'}/{name} already exists")
        self.refs[ref][name] = self.resolve(start)

    def delete_ref(self, ref: str, name: str) -> None:
        """Deletes a branch but main, or a tag."""
        if (ref, name) == ("branch", "main"):
            raise Refusal(403, "Cannot delete refs/heads/main")
        if name not in self.refs[ref]:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        del self.refs[ref][name]

    def info(self, revision: str, blobs: bool) -> dict[str, Any]:
        """The repo at a revision, with ids and sizes of the files if `blobs`."""
        sha = self.resolve(revision)
        files = sorted(self.commits[sha].items())
        siblings = [{"rfilename": path} | ({"blobId": file["oid"], **file} if blobs else {}) for path, file in files]
        facts = {"id": self.name, "author": self.name.split("/")[0], "sha": sha, "tags": [], **self.settings}
        return facts | {"lastModified": self.history[sha][0]["date"], "downloads": 0, "likes": 0, "siblings": siblings}

    def items(self, revision: str, expand: bool) -> Files:
        """Every file and folder of a revision by its path, as an item of a listing; `expand` adds its last commit."""
        sha = self.resolve(revision)
        files = self.commits[sha]
        above = {path[:end] for path in files for end, letter in enumerate(path) if letter == "/"}
        found = {p: {"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in above}
        found |= files
        return {p: item | {"lastCommit": self.last_commit(sha, p)} for p, item in found.items()} if expand else found

    def last_commit(self, sha: str, path: str) -> dict[str, Any]:
        """The commit up to this one that changed a file or a folder last."""

        def content(at: str) -> dict[str, str]:
            return {p: file["oid"] for p, file in self.commits[at].items() if f"{p}/".startswith(f"{path}/")}

        logs = self.history[sha]
        same = [content(log["id"]) == content(sha) for log in logs]
        return logs[same.index(False) - 1 if False in same else -1]
