"""A corpus of ten documents, built once a session and copied for every test that changes it."""

import shutil
from pathlib import Path

import pytest
from corpora import build

from modeling_clara import CompressedCorpus


@pytest.fixture(scope="session")
def ten(shared_model, tmp_path_factory) -> Path:
    """d0 to d9 as float16 in three shards; only copied."""
    return build(shared_model, tmp_path_factory.mktemp("ten") / "corpus").folder


@pytest.fixture
def corpus(ten, shared_model, tmp_path) -> CompressedCorpus:
    """A copy of `ten` to change, with its model."""
    return CompressedCorpus.open(shutil.copytree(ten, tmp_path / "corpus"), model=shared_model)
