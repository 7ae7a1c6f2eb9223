"""Publishes a corpus as a dataset on the Hub, in one commit."""

import os

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..manifest_clara import MANIFEST_FILE, state_file
from .card import CARD_FILE
from .changes import commit, writing
from .compact import rewrite
from .jobs import REJECTED_FILE
from .verify import verify_files


def push_to_hub(
    corpus,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    compressor: str | None,
    compressor_revision: str | None,
) -> str:
    """Do what `CompressedCorpus.push_to_hub` says."""
    name = compressor or corpus.manifest.compressor.get("name_or_path")
    if not name or os.path.exists(name) or name.startswith((".", "/", "~")):
        raise ValueError(
            f"`compressor` must name the model on the Hub that made the memories, got {name!r}. Publish the model "
            "and pass its id."
        )
    with writing(corpus) as manifest:
        known = manifest.compressor.get("name_or_path") == name and compressor_revision is None
        named = {"name_or_path": name}
        named["revision"] = manifest.compressor.get("revision") if known else compressor_revision
        if manifest.compressor != manifest.compressor | named:
            manifest.compressor |= named
            commit(corpus, manifest)
        if manifest.has_tombstones:
            rewrite(corpus, manifest, 1024, None)
        problems = verify_files(corpus.folder)
        if problems:
            raise ValueError(f"the corpus must be whole to be published: {problems[0]}")
        return _upload(corpus, repo_id, private, token, revision, commit_message)


def _upload(corpus, repo_id: str, private, token, revision, commit_message: str) -> str:
    """Put the files of the corpus into a dataset repo; its URL."""
    names = [MANIFEST_FILE, CARD_FILE, *(shard.file for shard in corpus.manifest.shards)]
    names += [state_file(key) for key in corpus.manifest.codec_states]
    names += [REJECTED_FILE] if (corpus.folder / REJECTED_FILE).exists() else []
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
    there = {sibling.rfilename for sibling in info.siblings or []}
    stale = [name for name in there if name.startswith(("data/", "codec/")) or name == REJECTED_FILE]
    operations = [CommitOperationAdd(name, str(corpus.folder / name)) for name in names]
    operations += [CommitOperationDelete(name) for name in sorted(set(stale) - set(names))]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        repo_type="dataset",
        revision=revision,
        parent_commit=info.sha,
    )
    return commit.commit_url
