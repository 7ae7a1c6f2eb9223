"""Publishing to the loopback Hub: one state, whatever breaks, whoever else publishes; refusals are sentences."""

import subprocess
import sys
import threading
import zlib

import pytest
from hub_repos import Failure, break_points
from huggingface_hub import HfApi
from published import CARD, ROOT, as_built, contents, write_model

from recipes.publishing.errors import PublishError
from recipes.publishing.files import content_id
from recipes.publishing.remote import Target, publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")


@pytest.fixture
def repo_id(request) -> str:
    return f"publishing/{zlib.crc32(request.node.name.encode()):08x}"


@pytest.fixture
def built(tmp_path):
    return as_built(write_model(tmp_path / "one"))


@pytest.fixture
def changed(tmp_path):
    return as_built(write_model(tmp_path / "two", seed=2))


def expected(built, repo_id: str, pinned: str) -> dict[str, bytes]:
    files = {name: file.content.read_bytes() for name, file in built.files.items()}
    return {**files, "README.md": built.card(repo_id, pinned).content}


def is_at(hub, repo_id: str, built, revision: str = "main") -> bool:
    """Whether a revision is what publishing `built` makes, its card pinned to a commit with the same files."""
    repo = hub.repos["model", repo_id]
    found = contents(repo, revision)
    pins = [sha for sha in repo.commits if f'revision="{sha}"' in found.get("README.md", b"").decode()]
    return (
        len(pins) == 1
        and all(
            contents(repo, at) | {"README.md": b""} == expected(built, repo_id, pins[0]) | {"README.md": b""}
            for at in (revision, pins[0])
        )
        and found["README.md"] == expected(built, repo_id, pins[0])["README.md"]
    )


def test_a_publication_is_one_commit_whose_card_names_the_files(hub, built, changed, repo_id):
    changes, card = publish(built, Target(repo_id, tag="v1"))
    repo = hub.repos["model", repo_id]
    assert is_at(hub, repo_id, built) and is_at(hub, repo_id, built, "v1") and changes.is_new
    assert repo.resolve("main") == changes.commit and changes.commit in changes.url
    assert [entry["title"] for entry in repo.history[changes.commit]] == [
        "Publish a CLaRa checkpoint",
        "initial commit",
    ]
    assert list(repo.refs["branch"]) == ["main"] and set(repo.refs["tag"]) == {
        "v1",
        f"files-{content_id(built.files)}",
    }
    publish(changed, Target(repo_id))
    assert is_at(hub, repo_id, changed) and is_at(hub, repo_id, built, "v1")
    assert "seed_0.json" not in contents(repo)
    assert publish(built, Target(repo_id))[0].pinned == changes.pinned  # the files of v1 are there already
    assert is_at(hub, repo_id, built)


def test_a_second_run_uploads_nothing(hub, built, repo_id):
    first, _ = publish(built, Target(repo_id))
    start, commits = len(hub.requests), len(hub.repos["model", repo_id].commits)
    again, _ = publish(built, Target(repo_id))
    assert not again and again.commit == first.commit
    assert {method for method, _ in hub.requests[start:]} == {"GET"} and len(hub.requests) - start <= 5
    assert len(hub.repos["model", repo_id].commits) == commits
    publish(built, Target(repo_id, tag="late"))
    assert hub.repos["model", repo_id].resolve("late") == first.commit


def test_only_what_changed_is_sent_and_a_changed_card_needs_no_new_files(hub, built, repo_id):
    first, _ = publish(built, Target(repo_id))
    (built.folder / "README.md").write_text(CARD + "\nBy hand.\n")
    start = len(hub.requests)
    changes, card = publish(as_built(built.folder), Target(repo_id))
    assert changes.changed == ["README.md"] and changes.pinned == first.pinned and b"By hand." in card.content
    assert not [path for method, path in hub.requests[start:] if method == "PUT" or "/branch/" in path]
    assert is_at(hub, repo_id, as_built(built.folder))


def test_a_card_that_was_edited_on_the_hub_stays_until_the_one_here_is_edited(hub, built, changed, repo_id):
    first, _ = publish(built, Target(repo_id))
    repo = hub.repos["model", repo_id]
    edited = contents(repo)["README.md"].decode().replace("# a model", "# my model, as I say on the Hub")
    edit = HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=repo_id)
    again, _ = publish(built, Target(repo_id))
    assert not again and again.commit == edit.oid and contents(repo)["README.md"].decode() == edited
    (built.folder / "more.json").write_text("{}")
    more, _ = publish(as_built(built.folder), Target(repo_id))
    card = contents(repo)["README.md"].decode()
    assert "my model, as I say" in card and more.pinned in card and first.pinned not in card and not more.overwritten
    (built.folder / "README.md").write_text(CARD + "\nNew here.\n")
    HfApi().upload_file(path_or_fileobj=b"other", path_in_repo="README.md", repo_id=repo_id)
    last, _ = publish(as_built(built.folder), Target(repo_id))
    assert "New here." in contents(repo)["README.md"].decode()
    assert contents(repo, last.overwritten)["README.md"] == b"other"


@pytest.mark.parametrize("name", [".eval_results/theirs.yaml", "LICENSE"])
def test_what_others_added_on_the_hub_stays(hub, built, changed, repo_id, name):
    publish(built, Target(repo_id))
    HfApi().upload_file(path_or_fileobj=b"- theirs\n", path_in_repo=name, repo_id=repo_id)
    assert not publish(built, Target(repo_id))[0]
    publish(changed, Target(repo_id))
    assert contents(hub.repos["model", repo_id])[name] == b"- theirs\n"


def test_dry_run_changes_nothing(hub, built, changed, repo_id):
    changes, card = publish(built, Target(repo_id), dry_run=True)
    assert changes.is_new and set(changes.added) == {*built.files, "README.md"} and repo_id.encode() in card.content
    assert ("model", repo_id) not in hub.repos
    publish(built, Target(repo_id))
    before = dict(hub.repos["model", repo_id].refs["branch"])
    changes, _ = publish(changed, Target(repo_id), dry_run=True)
    assert (changes.added, changes.deleted) == (["seed_2.json"], ["seed_0.json"])
    assert "clara.safetensors" in changes.changed and hub.repos["model", repo_id].refs["branch"] == before


def test_a_branch_moves_and_main_stays(hub, built, changed, repo_id):
    publish(built, Target(repo_id))
    HfApi().create_branch(repo_id, branch="next")
    publish(changed, Target(repo_id, branch="next"))
    assert is_at(hub, repo_id, built) and is_at(hub, repo_id, changed, "next")


def test_a_pull_request_has_the_new_state_and_is_opened_once(hub, built, changed, repo_id):
    publish(built, Target(repo_id))
    for _ in range(2):
        changes, _ = publish(changed, Target(repo_id, create_pr=True))
        assert is_at(hub, repo_id, built) and is_at(hub, repo_id, changed, "refs/pr/1")
        assert changes.url.endswith("/discussions/1") and len(hub.repos["model", repo_id].pulls) == 1
    HfApi().merge_pull_request(repo_id, 1)
    assert is_at(hub, repo_id, changed) and not publish(changed, Target(repo_id, create_pr=True))[0]


def test_a_private_repo_is_made_private_and_a_public_one_is_no_place_for_it(hub, built, repo_id):
    publish(built, Target(repo_id, private=True))
    assert hub.repos["model", repo_id].settings["private"] and not publish(built, Target(repo_id, private=True))[0]
    publish(built, Target(f"{repo_id}-public"))
    with pytest.raises(PublishError, match="must be private for `--private`"):
        publish(built, Target(f"{repo_id}-public", private=True))


@pytest.mark.parametrize("number", [n if n % 4 == 0 else pytest.param(n, marks=pytest.mark.slow) for n in range(20)])
def test_a_broken_connection_leaves_the_old_or_the_new_state_and_a_second_run_finishes(
    hub, built, changed, repo_id, number
):
    publish(built, Target(repo_id))
    publish(built, Target(f"{repo_id}-twin"))
    start = len(hub.requests)
    publish(changed, Target(f"{repo_id}-twin", tag="v2"))
    share, cut = break_points(20)[number]
    hub.break_request(int(share * (len(hub.requests) - start)), cut)
    try:
        publish(changed, Target(repo_id, tag="v2"))
    except PublishError as error:
        assert "run the same command again" in str(error)
        assert is_at(hub, repo_id, built) or is_at(hub, repo_id, changed)
    finally:
        hub.failures.clear()
    publish(changed, Target(repo_id, tag="v2"))
    assert is_at(hub, repo_id, changed) and is_at(hub, repo_id, changed, "v2")
    assert list(hub.repos["model", repo_id].refs["branch"]) == ["main"]


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("at", ["main", "refs/pr"])
def test_a_broken_pull_request_is_finished_by_a_second_run(hub, built, changed, repo_id, at, cut):
    publish(built, Target(repo_id))
    hub.failures.append(Failure(f"/api/models/{repo_id}/commit/{at}", cut=cut))
    try:
        publish(changed, Target(repo_id, create_pr=True))
    except PublishError:
        publish(changed, Target(repo_id, create_pr=True))
    assert hub.failures.pop().times == 0 and len(hub.repos["model", repo_id].pulls) == 1
    assert is_at(hub, repo_id, built) and is_at(hub, repo_id, changed, "refs/pr/1")


@pytest.mark.parametrize("at", ["branch/publish", "commit/publish", "tag/", "commit/main"])
def test_of_two_publishers_one_wins_and_the_other_says_so(hub, built, changed, repo_id, at, tmp_path):
    publish(built, Target(repo_id))
    other = as_built(write_model(tmp_path / "three", seed=3))
    hub.before("POST", f"/api/models/{repo_id}/{at}", lambda: publish(other, Target(repo_id)))
    with pytest.raises(PublishError, match="changed by somebody else.*nothing is mixed"):
        publish(changed, Target(repo_id))
    assert is_at(hub, repo_id, other) and list(hub.repos["model", repo_id].refs["branch"]) == ["main"]
    publish(changed, Target(repo_id))
    assert is_at(hub, repo_id, changed) and list(hub.repos["model", repo_id].refs["branch"]) == ["main"]


def test_two_publishers_at_once_make_one_state_of_one(hub, repo_id, tmp_path):
    built = [as_built(write_model(tmp_path / f"of-{seed}", seed)) for seed in range(2)]
    HfApi().create_repo(repo_id)
    outcomes: list = [None, None]

    def work(seed: int) -> None:
        try:
            outcomes[seed] = publish(built[seed], Target(repo_id))[0]
        except PublishError as error:
            outcomes[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = [seed for seed in range(2) if is_at(hub, repo_id, built[seed])]
    assert len(last) == 1 and not isinstance(outcomes[last[0]], Exception)
    assert all("changed by somebody else" in str(o) for o in outcomes if isinstance(o, Exception))


@pytest.mark.parametrize("tag", ["bad tag", "a..b", "-x", "main", "v1.lock", "x/"])
def test_a_tag_that_cannot_be_is_refused_before_anything_is_sent(hub, built, changed, repo_id, tag):
    publish(built, Target(repo_id))
    with pytest.raises(PublishError, match="`--tag` must"):
        publish(changed, Target(repo_id, tag=tag))
    assert is_at(hub, repo_id, built)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_are_one_sentence_with_the_remedy_and_write_nothing(hub, built, changed, repo_id, monkeypatch):
    publish(built, Target(repo_id))
    stranger, reader = hub.add_token("stranger"), hub.add_token("loopback", write=False)
    HfApi().create_repo(f"{repo_id}-private", private=True)
    HfApi().create_repo(f"{repo_id}-data", repo_type="dataset")
    HfApi().create_repo(f"{repo_id}-llama")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=f"{repo_id}-llama")
    publish(built, Target(f"{repo_id}-tagged", tag="v1"))
    cases = [
        ("hf_wrong", Target(repo_id), "the Hub must accept the token.*hf auth login"),
        ("hf_wrong", Target("publishing/new"), "the Hub must accept the token.*hf auth login"),
        (stranger, Target(repo_id), "allowed to write.*--create-pr"),
        (reader, Target(repo_id), "allowed to write.*write permission"),
        (stranger, Target("publishing/new"), "allowed to write"),
        (stranger, Target(f"{repo_id}-private"), "(allowed to write|the name is taken)"),
        (hub.token, Target(f"{repo_id}-data"), "is a dataset.*Choose another `--repo-id`"),
        (hub.token, Target(f"{repo_id}-llama"), "has something else, such as config.json.*Choose another"),
        (hub.token, Target(repo_id, branch="nowhere"), "`--revision` must be a branch.*'main'.*branch create"),
        (hub.token, Target("publishing/new", branch="nowhere"), "must be there for `--revision` or `--create-pr`"),
        (hub.token, Target("publishing/new", create_pr=True), "must be there for `--revision` or `--create-pr`"),
        (hub.token, Target(f"{repo_id}-tagged", tag="v1"), "`--tag` must be new"),
        (hub.token, Target(repo_id, create_pr=True, tag="v1"), "without `--tag`"),
        (hub.token, Target("publishing/a b"), "`--repo-id` must be ORG/NAME"),
    ]
    before = {name: dict(repo.refs["branch"]) for name, repo in hub.repos.items()}
    for token, target, match in cases:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PublishError, match=match) as caught:
            publish(changed, target)
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
        assert {name: dict(repo.refs["branch"]) for name, repo in hub.repos.items()} == before, target
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="needs a token of the Hub, found none"):
        publish(changed, Target(repo_id))


def test_what_arrives_is_compared_before_it_is_published(hub, built, changed, repo_id):
    """A .gitignore of the repo makes the client leave files out."""
    publish(built, Target(repo_id))
    repo, api = hub.repos["model", repo_id], HfApi()
    ignored = api.upload_file(path_or_fileobj=b"*.safetensors\n", path_in_repo=".gitignore", repo_id=repo_id)
    before = contents(repo)
    with pytest.raises(PublishError, match=r"differs in \['clara.safetensors'.*gitignore"):
        publish(changed, Target(repo_id))
    assert contents(repo) == before and repo.resolve("main") == ignored.oid


def test_the_command_says_what_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "upload.py"), "model", str(tmp_path)]
    for extra, match in (([], "`--repo-id` must be given"), (["--repo-id", "x"], "ORG/NAME")):
        process = subprocess.run([*command, *extra], capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 1 and match in process.stderr and "Traceback" not in process.stderr
