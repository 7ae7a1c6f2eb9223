"""Publishes a built folder to the Hub: a repo is at its old state or at the new one, never between.

All files go to a branch of their own, are downloaded and compared there, and become the repo's in one commit, together
with the card that names the commit they were compared at. Whatever breaks, the same command finishes it.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, constants
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .assemble import BESIDE_A_METRIC
from .build import Built
from .checks import CARD_FILE
from .edits import COMMIT, kept_card
from .errors import PublishError, explained
from .files import File, content_id
from .kinds import kind_of

OF_THE_HUB = (".gitattributes", ".eval_results/*", "LICENSE*")  # what others have added there stays
WITHOUT_CONTENT = (*OF_THE_HUB, CARD_FILE)
NO_TAG = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|^[./-]|[./]$|//|\.lock$")  # as git has it
Tree = Mapping[str, RepoFile]
Files = Mapping[str, File]


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        repo_id: ORG/NAME, made if there is none.
        branch: that is moved.
        private: a repo that is made is private; one that is there must be.
        tag: of the commit.
        create_pr: open a pull request; the branch stays.
        variables: of a Space's environment.
    """

    repo_id: str
    branch: str = "main"
    private: bool = False
    tag: str | None = None
    create_pr: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Changes:
    """What publishing changes in a repo: names of files.

    Attributes:
        added, changed, deleted: names; all empty if the repo is as it should be.
        commit: of the new state, or of the one that is as it should be; None if nothing was done.
        pinned: commit that the card names.
        url: page of the commit or of the pull request.
        is_new: whether the repo is made.
        overwritten: commit whose card was edited on the Hub, and gives way to one that was edited here too.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    commit: str | None = None
    pinned: str | None = None
    url: str = ""
    is_new: bool = False
    overwritten: str | None = None

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.deleted)


def compare(tree: Tree, wanted: Files) -> Changes:
    """What differs between a tree of the Hub and the files that should be there."""
    names = set(wanted)
    return Changes(
        added=sorted(names - set(tree)),
        changed=sorted(name for name in names & set(tree) if not is_same(tree[name], wanted[name])),
        deleted=sorted(n for n in set(tree) - names if not any(fnmatch(n, known) for known in OF_THE_HUB)),
    )


def is_same(there: RepoFile, file: File) -> bool:
    """Whether a file of the Hub has the content of one here, by SHA-256 or git's id."""
    if there.size != file.size:
        return False
    return there.lfs.sha256 == file.sha256 if there.lfs else there.blob_id == file.git_id


def publish(built: Built, target: Target, *, dry_run: bool = False) -> tuple[Changes, File]:
    """Publish a built folder, or only say what would change; also the card.

    Raises:
        PublishError: the Hub refuses or cannot be reached, somebody else publishes, or what arrived is not what was
            sent.
    """
    if target.create_pr and (target.tag or target.branch != "main"):
        raise PublishError("`--create-pr` must go without `--tag` and `--revision`. Tag the commit after the merge.")
    if target.tag and NO_TAG.search(target.tag):
        raise PublishError(f"`--tag` must be a name that git takes, got {target.tag!r}. Choose one such as v1.0.")
    owner, _, name = target.repo_id.partition("/")
    if built.kind.is_named and f"{name}.py" not in built.files:
        module = next(one for one in built.files if one.endswith(".py") and one not in BESIDE_A_METRIC)
        raise PublishError(
            f"`--repo-id` must be {owner}/{module.removesuffix('.py')} for `evaluate` to find the metric, got "
            f"{target.repo_id}. Use that name."
        )
    with explained(target.repo_id):
        repo = Repo(built, target)
        if not repo.open(make=not dry_run):
            card = built.card(target.repo_id, None)
            changes = compare({}, {**built.files, CARD_FILE: card})
            changes.is_new = True
            return changes, card
        return repo.plan() if dry_run else repo.publish()


class Repo:
    """A repo of the Hub to which a built folder is published."""

    def __init__(self, built: Built, target: Target):
        self.built, self.target, self.api = built, target, HfApi()
        self.place = {"repo_id": target.repo_id, "repo_type": built.kind.repo_type}
        self.content = content_id(built.files)
        self.staging, self.files_tag = f"publish-{self.content}", f"files-{self.content}"
        self.card, self.is_new, self.overwritten = partial(built.card, target.repo_id), False, None

    # --- what is there -----------------------------------------------------------------------------------------------

    def open(self, make: bool) -> bool:
        """Read the repo's state; one that is missing is made, or with `make=False` the answer is False."""
        try:
            info = self.api.repo_info(**self.place)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._check_new()
            if not make:
                return False
            sdk = "gradio" if self.built.kind.repo_type == "space" else None
            self.api.create_repo(**self.place, private=self.target.private or None, space_sdk=sdk, exist_ok=True)
            self.is_new, info = True, self.api.repo_info(**self.place)
        if self.target.private and not info.private:
            raise PublishError(
                f"{self.target.repo_id} must be private for `--private`, but is public. Change that in its settings, "
                "or leave the option out."
            )
        refs = self.api.list_repo_refs(**self.place)
        self.branches = {ref.name: ref.target_commit for ref in refs.branches}
        self.tags = {ref.name: ref.target_commit for ref in refs.tags}
        if self.target.branch not in self.branches:
            raise PublishError(
                f"`--revision` must be a branch of {self.target.repo_id}, one of {sorted(self.branches)}, got "
                f"{self.target.branch}. Make it: `hf repos branch create {self.target.repo_id} {self.target.branch}`."
            )
        self.head = self.branches[self.target.branch]
        self.tree = self.list(self.head)
        self._check_kind()
        return True

    def _check_new(self) -> None:
        kinds = [kind for kind in constants.REPO_TYPES if kind != self.built.kind.repo_type]
        others = [kind for kind in kinds if self.api.repo_exists(self.target.repo_id, repo_type=kind)]
        if others:
            raise PublishError(
                f"{self.target.repo_id} must be a {self.built.kind.repo_type} or a free name, but is a {others[0]}. "
                f"Choose another `--repo-id`; to have both, make the {self.built.kind.repo_type} first."
            )
        if self.target.branch != "main" or self.target.create_pr:
            raise PublishError(
                f"{self.target.repo_id} must be there for `--revision` or `--create-pr`, but the Hub has no such "
                "repo. Publish without them first."
            )

    def _check_kind(self) -> None:
        content = [name for name in self.tree if not any(fnmatch(name, known) for known in WITHOUT_CONTENT)]
        found = kind_of(self.tree, self.built.kind.repo_type)
        if content and found != self.built.kind:
            what = found.what if found else f"something else, such as {content[0]}"
            raise PublishError(
                f"{self.target.repo_id} must be empty or have {self.built.kind.what}, but has {what}. Choose another "
                "`--repo-id`, or remove its files first."
            )

    def list(self, commit: str) -> dict[str, RepoFile]:
        """Files at a commit."""
        found = self.api.list_repo_tree(**self.place, revision=commit, recursive=True)
        return {item.path: item for item in found if isinstance(item, RepoFile)}

    def has_files(self, tree: Tree) -> bool:
        """Whether a tree has exactly the files of the build, whatever its card."""
        return not compare({name: file for name, file in tree.items() if name != CARD_FILE}, self.built.files)

    def find_pinned(self) -> str | None:
        """A commit that has these files: of an earlier run, or the one that the card there names."""
        commits = [self.tags[self.files_tag]] if self.files_tag in self.tags else []
        if not commits and CARD_FILE in self.tree and self.has_files(self.tree):
            commits = COMMIT.findall(self._read_card(self.head))
        for commit in dict.fromkeys(commits):
            with suppress(RevisionNotFoundError):
                if self.has_files(self.list(commit)):
                    return commit
        return None

    def wanted(self, pinned: str | None) -> dict[str, File]:
        """All files, with the card for a commit of the others."""
        return {**self.built.files, CARD_FILE: self.card(pinned)}

    def compare(self) -> tuple[Changes, Files, str | None]:
        """What is to be changed, what is wanted, and the commit of the files if there is one already."""
        pinned = self.find_pinned() if self.built.kind.is_pinned else None
        if compare(self.tree, wanted := self.wanted(pinned)) and not is_same_in(self.tree, wanted, CARD_FILE):
            self._keep_edits()
            wanted = self.wanted(pinned)
        changes = compare(self.tree, wanted)
        changes.is_new, changes.overwritten = self.is_new, self.overwritten
        return changes, wanted, pinned

    def _keep_edits(self) -> None:
        """Take the card that was edited on the Hub since the last publication, unless the one here was edited too."""
        history = self.api.list_repo_commits(**self.place, revision=self.head)
        title = f"Publish {self.built.kind.what}"
        last = next((entry.commit_id for entry in history if entry.title.startswith(title)), self.head)
        if last == self.head or CARD_FILE not in self.tree or not (tree := self.list(last)).get(CARD_FILE):
            return
        if tree[CARD_FILE].blob_id == self.tree[CARD_FILE].blob_id:
            return
        card = kept_card(self.built, self.target.repo_id, self._read_card(last), self._read_card(self.head))
        self.card, self.overwritten = card or self.card, None if card else self.head

    def _read_card(self, commit: str) -> str:
        return Path(self.api.hf_hub_download(**self.place, filename=CARD_FILE, revision=commit)).read_text("utf-8")

    # --- what is done ------------------------------------------------------------------------------------------------

    def plan(self) -> tuple[Changes, File]:
        """What publishing would change."""
        changes, wanted, _ = self.compare()
        self._check_tag(bool(changes))
        return changes, wanted[CARD_FILE]

    def publish(self) -> tuple[Changes, File]:
        """Publish, or find that all is there; remains of a run that broke off go."""
        changes, wanted, pinned = self.compare()
        self._check_tag(bool(changes))
        if changes and self.target.create_pr:
            return self._propose()
        if changes and self.built.kind.is_pinned and pinned is None:
            pinned = self._stage()
            wanted = self.wanted(pinned)
        try:
            commit = self.commit(wanted, self.tree, self.head, self.target.branch) if changes else self.head
        except HTTPError as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 412:  # somebody else was first
                self._remove_staging()
            raise
        if changes:
            self.verify(commit, wanted, [CARD_FILE] if pinned else [*changes.added, *changes.changed])
        self._finish(commit)
        changes.commit, changes.pinned = commit, pinned
        changes.url = self._url(f"commit/{commit}")
        return changes, wanted[CARD_FILE]

    def _check_tag(self, changes: bool) -> None:
        if self.target.tag in self.branches:
            raise PublishError(f"`--tag` must not be the name of a branch, got {self.target.tag}. Choose another.")
        at = self.tags.get(self.target.tag)
        if at is not None and (changes or at != self.head):
            raise PublishError(
                f"`--tag` must be new, but {self.target.repo_id} has {self.target.tag} at {at[:12]}. Choose another."
            )

    def _stage(self) -> str:
        """Bring the files to a branch of their own and compare them there; the commit, which a tag keeps."""
        wanted = self.wanted(self.files_tag)  # the commit has no name yet
        head = self.branches.get(self.staging)
        if head is None:
            self.api.create_branch(**self.place, branch=self.staging, revision=self.head)
        tree = self.list(head) if head else self.tree
        changes = compare(tree, wanted)
        commit = self.commit(wanted, tree, head or self.head, self.staging) if changes else head
        self.branches[self.staging] = commit
        sent = compare(self.tree, wanted)
        self.verify(commit, wanted, [*sent.added, *sent.changed])
        self.api.create_tag(**self.place, tag=self.files_tag, revision=commit, exist_ok=True)
        return commit

    def _propose(self) -> tuple[Changes, File]:
        """A pull request with the files, and then with the card that names their commit; an open one is finished."""
        title = f"Publish {self.built.kind.what} ({self.content})"
        options = {"discussion_type": "pull_request", "discussion_status": "open"}
        found = self.api.get_repo_discussions(**self.place, **options)
        number = next((request.num for request in found if request.title == title), None)
        wanted, first = self.wanted(None), None
        changes = compare(self.tree, wanted)
        if number is None:
            operations = self._operations(changes, wanted)
            made = {"commit_message": title, "parent_commit": self.head, "create_pr": True}
            info = self.api.create_commit(**self.place, operations=operations, **made)
            number, first = info.pr_num, info.oid
        ref = f"refs/pr/{number}"
        history = self.api.list_repo_commits(**self.place, revision=ref)
        commit = history[0].commit_id
        tree = self.list(commit)
        if not self.has_files(tree):
            raise PublishError(
                f"the open pull request {number} of {self.target.repo_id} must have what is built, but was changed. "
                "Close it, and run the command again."
            )
        if first is not None:
            self.verify(commit, wanted, [*changes.added, *changes.changed])
        if self.built.kind.is_pinned:
            cards = {entry.commit_id: self.wanted(entry.commit_id) for entry in history[:3]}
            pinned = next((name for name, files in cards.items() if not compare(tree, files)), None)
            if pinned is None:
                pinned, wanted = commit, cards[commit]
                commit = self.commit(wanted, tree, commit, ref)
                self.verify(commit, wanted, [CARD_FILE])
            changes.pinned, wanted = pinned, cards[pinned]
        changes.commit, changes.url = commit, self._url(f"discussions/{number}")
        return changes, wanted[CARD_FILE]

    def commit(self, wanted: Files, tree: Tree, parent: str, revision: str) -> str:
        """One commit that turns the tree of the parent into the files that are wanted."""
        operations = self._operations(compare(tree, wanted), wanted)
        message = {"commit_message": f"Publish {self.built.kind.what}", "commit_description": f"Files {self.content}."}
        where = {"revision": revision, "parent_commit": parent}
        try:
            return self.api.create_commit(**self.place, operations=operations, **message, **where).oid
        except HTTPError:
            with suppress(HTTPError):  # the answer may be lost, not the commit
                refs = self.api.list_repo_refs(**self.place, include_pull_requests=True)
                heads = {ref.name: ref.target_commit for ref in refs.branches}
                heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests}
                if not compare(self.list(heads[revision]), wanted):
                    return heads[revision]
            raise

    def _operations(self, changes: Changes, wanted: Files) -> list:
        contents = {name: wanted[name].content for name in [*changes.added, *changes.changed]}
        adds = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in contents.items()
        ]
        return [*adds, *(CommitOperationDelete(name) for name in changes.deleted)]

    def verify(self, commit: str, wanted: Files, names: Iterable[str]) -> None:
        """Compare the tree of a commit, and the content of these files, downloaded, with what was sent."""
        changes = compare(self.list(commit), wanted)
        wrong = [*changes.added, *changes.changed, *changes.deleted]
        with tempfile.TemporaryDirectory(dir=self.built.cards.parent, prefix="verify-") as folder:

            def differs(name: str) -> bool:
                path = self.api.hf_hub_download(**self.place, filename=name, revision=commit, local_dir=folder)
                return File(Path(path)).sha256 != wanted[name].sha256

            with ThreadPoolExecutor(4) as pool:
                names = list(names)
                wrong += [name for name, bad in zip(names, pool.map(differs, names), strict=True) if bad]
        if wrong:
            raise PublishError(
                f"{self.target.repo_id} must have what was sent at {commit[:12]}, but differs in "
                f"{sorted(set(wrong))[:5]}. Run the command again; if it stays so, look for a .gitignore in the repo."
            )

    def _finish(self, commit: str) -> None:
        """What comes after the commit: the staging branch goes, the tag and variables are set."""
        self._remove_staging()
        if self.target.tag and self.target.tag not in self.tags:
            self.api.create_tag(**self.place, tag=self.target.tag, revision=commit)
        if self.target.variables:
            there = self.api.get_space_variables(self.target.repo_id)
            for name, value in self.target.variables.items():
                if name not in there or there[name].value != value:
                    self.api.add_space_variable(self.target.repo_id, name, value)

    def _remove_staging(self) -> None:
        if self.staging in self.branches:
            with suppress(RevisionNotFoundError):
                self.api.delete_branch(**self.place, branch=self.staging)

    def _url(self, page: str) -> str:
        folder = {"model": "", "dataset": "datasets/", "space": "spaces/"}[self.built.kind.repo_type]
        return f"{self.api.endpoint}/{folder}{self.target.repo_id}/{page}"


def is_same_in(tree: Tree, wanted: Files, name: str) -> bool:
    """Whether a tree has a file as it is wanted."""
    return name in tree and is_same(tree[name], wanted[name])
