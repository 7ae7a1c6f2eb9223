"""A real service on loopback for the session: uvicorn in a thread, a tiny model, a corpus of four documents."""

import copy
import shutil
from pathlib import Path

import pytest
from http_service import KEY, READ_KEY, Served

from modeling_clara import CompressedCorpus
from modeling_clara.service.limits import Limits

DOCUMENTS = [
    {"id": "paris", "title": "Paris", "text": "Paris is the capital of France.", "url": "https://example.org/paris"},
    {"id": "berlin", "title": "Berlin", "text": "Berlin is the capital of Germany, a city of 3.7 million people."},
    {"id": "seine/river", "text": "The Seine flows through Paris.", "year": 2020},
    {"id": "rome", "title": "Rome", "text": "Rome is the capital of Italy.", "year": 2021},
]


@pytest.fixture
def http_model(shared_model):
    """A copy of the model: while it is served, it is the engine's."""
    return copy.deepcopy(shared_model)


@pytest.fixture(scope="session")
def built_corpus(shared_model, tmp_path_factory) -> Path:
    """The folder of a corpus to copy."""
    return CompressedCorpus.build(shared_model, DOCUMENTS, tmp_path_factory.mktemp("service") / "corpus").folder


@pytest.fixture
def http_corpus(built_corpus, tmp_path) -> CompressedCorpus:
    """A corpus to change."""
    return CompressedCorpus.open(shutil.copytree(built_corpus, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def service(shared_model, built_corpus):
    """A service that tests only read, with keys; `reference` is its model outside of it."""
    corpus = CompressedCorpus.open(built_corpus)
    with Served(copy.deepcopy(shared_model), corpus, api_keys=[KEY], read_keys=[READ_KEY]) as served:
        served.reference = shared_model
        yield served


@pytest.fixture
def strict(http_model, http_corpus):
    """A service that a test may change, without keys, in which one question runs and one waits."""
    limits = Limits(body_seconds=1.0)
    with Served(http_model, http_corpus, max_batch=1, max_queue=1, limits=limits) as served:
        yield served
