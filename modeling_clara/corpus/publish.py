"""Publishes a corpus as a dataset on the Hub, in one commit."""

import os

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..manifest_clara import MANIFEST_FILE, Manifest, state_file
from .card import CARD_FILE, filled_card
from .changes import commit, writing
from .compact import rewrite
from .jobs import REJECTED_FILE
from .verify import verify_files


def push_to_hub(
    corpus,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a compressed corpus",
    compressor: str | None = None,
    compressor_revision: str | None = None,
) -> str:
    """Publish the corpus as a dataset, in one commit: the Hub has all of it or none.

    Deleted documents are taken out of the files first (`compact`); shards of an earlier push that the corpus no longer
    has are removed from the repo.

    Args:
        corpus: that is published.
        repo_id: of the dataset, made if there is none.
        private: of a new repo.
        token: for the Hub.
        revision: branch; default main.
        commit_message: of the commit.
        compressor: id of the compressor's model on the Hub, for the card and for `clara ask`; needed if the corpus was
            made with a model from a folder, whose path tells others nothing.
        compressor_revision: its commit.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the compressor has no id on the Hub, or a file is damaged.
    """
    name = check_compressor(compressor or corpus.manifest.compressor.get("name_or_path"))
    with writing(corpus) as manifest:
        known = manifest.compressor.get("name_or_path") == name and compressor_revision is None
        names = prepare(corpus, manifest, name, manifest.compressor.get("revision") if known else compressor_revision)
        api, repo = HfApi(token=token), {"repo_id": repo_id, "repo_type": "dataset"}
        api.create_repo(**repo, private=private, exist_ok=True)
        info = api.repo_info(**repo, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        stale = {name for name in there if name.startswith(("data/", "codec/")) or name == REJECTED_FILE}
        operations = [CommitOperationAdd(name, str(corpus.folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in sorted(stale - set(names))]
        operations.append(CommitOperationAdd(CARD_FILE, filled_card(corpus.folder, repo_id).encode()))
        options = {"commit_message": commit_message, "revision": revision, "parent_commit": info.sha}
        return api.create_commit(**repo, operations=operations, **options).commit_url


def check_compressor(name: str | None) -> str:
    """The id of a compressor on the Hub; a ValueError if it is a path, which tells others nothing, or missing."""
    if not name or os.path.exists(name) or name.startswith((".", "/", "~")):
        raise ValueError(
            f"`compressor` must name the model on the Hub that made the memories, got {name!r}. Publish the model "
            "and pass its id."
        )
    return name


def prepare(corpus, manifest: Manifest, compressor: str, compressor_revision: str | None) -> list[str]:
    """Make a corpus ready to be published: its compressor named, deleted documents gone, every byte verified.

    Args:
        corpus: that `writing` holds.
        manifest: its own, from `writing`.
        compressor: id on the Hub.
        compressor_revision: its commit.

    Returns:
        Names of the files to publish beside the card.

    Raises:
        ValueError: a file is damaged.
    """
    named = {"name_or_path": compressor, "revision": compressor_revision}
    named["backbone"] = None  # its path tells others nothing
    if manifest.compressor != manifest.compressor | named:
        manifest.compressor |= named
        commit(corpus, manifest)
    if manifest.has_tombstones:
        rewrite(corpus, manifest)
    if problems := verify_files(corpus.folder):
        raise ValueError(f"the corpus must be whole to be published: {problems[0]}")
    names = [MANIFEST_FILE, *(shard.file for shard in manifest.shards)]
    names += [state_file(key) for key in manifest.codec_states]
    return names + ([REJECTED_FILE] if (corpus.folder / REJECTED_FILE).exists() else [])
