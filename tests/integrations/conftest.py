"""A model that was loaded from its folder, and a corpus that names it: what a user of a framework has on disk."""

import os
from pathlib import Path

import pytest
from frameworks import ROWS

from modeling_clara import CLaRaForRAG, CompressedCorpus

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when haystack is imported, in the tests below


@pytest.fixture(scope="session")
def clara(checkpoint) -> CLaRaForRAG:
    """`shared_model`, loaded from its folder, whose name it knows."""
    return CLaRaForRAG.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def folder(clara, tmp_path_factory) -> Path:
    """A corpus of `ROWS`; d5 has several chunks. Only read."""
    folder = tmp_path_factory.mktemp("integrations") / "corpus"
    CompressedCorpus.build(clara, ROWS, folder, codec="float16")
    return folder


@pytest.fixture(scope="session")
def corpus(clara, folder) -> CompressedCorpus:
    """It, open. Only read."""
    return clara.load_corpus(folder)
