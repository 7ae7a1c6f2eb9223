"""The service with a generator on another server: the same answers, and its failures as those of HTTP."""

import argparse
import asyncio

import openai
import pytest
from completions_server import CompletionsServer
from http_service import Served
from tiny import QUESTIONS

from modeling_clara import CompressedCorpus, cli
from modeling_clara.cli.serve import index_options
from modeling_clara.service.engine import AskOptions, Engine
from modeling_clara.service.remote import GeneratorError, RemoteGenerator
from recipes.benchmarks import service

TOKENS = 12


@pytest.fixture(scope="module")
def merged(shared_model, tmp_path_factory):
    return shared_model.merge_generator(tmp_path_factory.mktemp("merged") / "generator")


@pytest.fixture
def server(merged, monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    with CompletionsServer(merged) as server:
        yield server


def test_the_engine_answers_as_in_process(server, http_model, http_corpus):
    settings = [{}, {"expand": 1}, {"top_k": 1, "memory_size": 2}, {"explain": True}, {"min_score": 0.9999}]
    settings = [{"max_new_tokens": TOKENS, **given} for given in settings]
    wanted = [http_model.answer(QUESTIONS, corpus=http_corpus, **given) for given in settings]
    options = [AskOptions(**given) for given in settings]

    async def run():
        engine = Engine(http_model, http_corpus, generator=RemoteGenerator(server.base_url))
        await engine.start()
        calls = [engine.answer(question, option) for option in options for question in QUESTIONS]
        answers = await asyncio.gather(*calls)
        streams = [[item async for item in engine.stream(QUESTIONS[0], option)] for option in options]
        await engine.close()
        return answers, streams

    answers, streams = asyncio.run(run())
    assert list(map(told, answers)) == [told(answer) for row in wanted for answer in row]
    assert [told(stream[-1]) for stream in streams] == [told(row[0]) for row in wanted]
    assert all("".join(stream[:-1]) == stream[-1].text for stream in streams)
    assert server.peak > 1  # many at a time


def told(answer) -> tuple:
    """All of an answer but the last digits of its scores."""
    sources = [(source.document_id, source.read_as, round(source.score, 4)) for source in answer.sources]
    return answer.text, sources, answer.keywords, answer.abstained, answer.prompt_tokens


def ask(client, stream: bool = False):
    given = {"model": client.models.list().data[0].id, "max_tokens": TOKENS, "stream": stream}
    return client.chat.completions.create(messages=[{"role": "user", "content": QUESTIONS[0]}], **given)


def test_failures_of_the_generator_are_those_of_a_gateway(server, http_model, http_corpus):
    remote = RemoteGenerator(server.base_url)
    with Served(http_model, http_corpus, generator=remote) as served:
        client = served.client()
        wanted = ask(client).choices[0].message.content
        server.faults = ["429", "503"]
        assert ask(client).choices[0].message.content == wanted  # tried again
        for fault, status in {"500": 502, "429": 503, "cut": 503}.items():
            server.faults = [fault] * 4
            with pytest.raises(openai.InternalServerError) as error:
                ask(client)
            assert error.value.status_code == status and int(error.value.response.headers["retry-after"]) > 0
            assert server.base_url not in str(error.value)  # which is nothing for clients
        server.faults = ["cut"]
        with pytest.raises(openai.APIError):
            list(ask(client, stream=True))
        remote.timeout, server.faults = 0.3, ["hang"]
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
        assert error.value.status_code == 504
        remote.timeout = 30
        assert ask(client).choices[0].message.content == wanted  # the service is as it was
        assert served.server.started and client.models.list().data


def test_the_service_does_not_start_with_another_generator(server, http_model, http_corpus):
    server.name = "clara-generator-0000000000000000"
    for url, kind in ((server.base_url, ValueError), ("http://127.0.0.1:9/v1", GeneratorError)):
        engine = Engine(http_model, http_corpus, generator=RemoteGenerator(url))
        with pytest.raises(kind):
            asyncio.run(engine.start())
        asyncio.run(engine.close())


def test_the_benchmark_gives_both_the_same_questions(server, http_model, http_corpus):
    options = {"max_new_tokens": 4, "expand": 0, "top_k": None, "rounds": 1, "clients": 3, "max_batch": 4, "check": 0}
    options |= {"unmerged": False, "prefix_mb": 1, "url": None, "generator": server.base_url}
    rows = asyncio.run(service.measure(http_model, http_corpus, QUESTIONS * 2, argparse.Namespace(**options)))
    ways = [f"{name}, {many}" for name in ("engine", "generator") for many in ("1 client", "3 clients")]
    assert [row["way"] for row in rows] == ["model.answer", *ways]
    assert all(row["different"] == 0 and row["per_second"] > 0 for row in rows)


def test_the_service_searches_on_milvus(http_model, http_corpus, tmp_path):
    """By a URI, here of Milvus Lite; what is written is found there as well."""
    pytest.importorskip("milvus_lite")
    options = ["--milvus", str(tmp_path / "milvus.db"), "--collection", "service", "--model", "m"]
    arguments = cli.parse(["serve", str(http_corpus.folder), *options])
    corpus = CompressedCorpus.open(http_corpus.folder, **index_options(arguments))
    questions = ["What is the capital of Italy?", "Which river flows through Paris?"]
    wanted = [[source.document_id for source in row] for row in http_model.retrieve(questions, corpus=http_corpus)]

    async def run():
        async with Engine(http_model, corpus) as engine:
            found = [await engine.search(question) for question in questions]
            new = {"id": "madrid", "text": "Madrid is the capital of Spain."}
            await engine.write(lambda corpus: corpus.add([new]))
            return found, await engine.search("Madrid is the capital of Spain.", AskOptions(top_k=5))

    found, later = asyncio.run(run())
    assert [[source.document_id for source in row] for row in found] == wanted
    assert "madrid" in [source.document_id for source in later]
