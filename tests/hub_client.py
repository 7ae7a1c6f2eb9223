"""A run of the unmodified client against the loopback Hub, as a script: every part returns what it saw.

tests/model/test_hub_server.py starts it in a process of its own and judges what it prints.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = bytes(range(256)) * 1200  # 300 kB, each byte known by its place
FOLDER = {
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n# A card\n",
    "data/x/weights.bin": WEIGHTS,
}


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
