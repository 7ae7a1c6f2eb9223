"""OpenAI's own client against the service: what it reads is what `model.answer` gives."""

import asyncio
import base64
import struct
import time

import openai
import pytest
import torch
from http_service import KEY, MODEL, QUESTION, chat

from modeling_clara.service.asking import ABSTAINED, cut, held

OPTIONS = {"max_new_tokens": 8}


@pytest.fixture
def client(service):
    return service.client()


def offline(service, question=QUESTION, **options):
    """The same question without HTTP."""
    (answer,) = service.reference.answer([question], corpus=service.engine.corpus, **OPTIONS | options)
    return answer


def ask(client, question=QUESTION, **options):
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=8, **options
    )


def test_an_answer_is_that_of_the_model(service, client):
    got, expected = ask(client), offline(service)
    assert got.choices[0].message.content == expected.text
    assert got.usage.prompt_tokens == expected.prompt_tokens
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert 0 < got.usage.completion_tokens <= 8
    assert got.choices[0].finish_reason == "length"  # random weights do not stop by themselves
    assert (got.object, got.model, got.choices[0].message.role) == ("chat.completion", MODEL, "assistant")
    assert got._request_id
    assert not got.abstained


def test_sources_are_a_list_and_annotations(service, client):
    got, expected = ask(client, extra_body={"top_k": 4}), offline(service, top_k=4)
    assert [(s["document_id"], s["chunk"]) for s in got.sources] == [(s.document_id, s.span) for s in expected.sources]
    for source, wanted in zip(got.sources, expected.sources, strict=True):
        assert source["score"] == pytest.approx(wanted.score, abs=1e-6)
        assert (source["title"], source["text"], source["read_as"]) == (wanted.title, wanted.text, "memory")
    by_kind = {a.type: a for a in got.choices[0].message.annotations}
    assert by_kind["url_citation"].url_citation.url == "https://example.org/paris"
    assert by_kind["url_citation"].url_citation.end_index == len(got.choices[0].message.content)
    cited = [a.file_citation for a in got.choices[0].message.annotations if a.type == "file_citation"]
    assert {c["file_id"] for c in cited} == {"berlin", "seine/river", "rome"}
    assert all(got.sources[c["index"]]["document_id"] == c["file_id"] for c in cited)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"memory_size": 2, "retrieval_memory_size": 2},
        {"expand": 1},
        {"expand": 1, "expand_below": 1.0},
        {"where": {"year": {"$gte": 2020}}},
        {"hybrid": True},
        {"min_score": -1},
    ],
    ids=str,
)
def test_options_of_ours(service, client, options):
    got = ask(client, extra_body=options)
    corpus_options = {name: options[name] for name in ("where", "hybrid") if name in options}
    given = {name: value for name, value in options.items() if name not in corpus_options}
    corpus = service.engine.corpus.with_options(**corpus_options)
    (expected,) = service.reference.answer([QUESTION], corpus=corpus, **OPTIONS, **given)
    assert got.choices[0].message.content == expected.text
    assert [s["document_id"] for s in got.sources] == [s.document_id for s in expected.sources]
    assert [s["read_as"] for s in got.sources] == [s.read_as for s in expected.sources]


def test_a_stream_joins_to_the_answer(service, client):
    whole = ask(client, extra_body={"top_k": 2})
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 2}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].sources == chunks[-2].sources == whole.sources
    assert chunks[-2].choices[0].delta.annotations == [
        a.model_dump(exclude_none=True) for a in whole.choices[0].message.annotations
    ]
    assert len({c.id for c in chunks}) == 1


def test_a_stream_without_usage_ends_with_the_sources(client):
    chunks = list(ask(client, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].sources and not chunks[-1].abstained
    assert all(c.usage is None for c in chunks)


def test_many_at_once_are_not_mixed_up(service):
    questions = [f"What is the capital of {name}?" for name in ("Italy", "France", "Germany", "Spain", "Peru", "Oman")]
    expected = [offline(service, question).text for question in questions]

    async def one(client, question, stream):
        got = await client.chat.completions.create(**chat(question), stream=stream)
        if not stream:
            return got.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in got])

    async def everything():
        async with service.client(kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, q, s) for s in (False, True) for q in questions))

    assert asyncio.run(everything()) == expected * 2


def test_earlier_turns_are_context(service, client):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": "Paris?"}]},
        {"role": "assistant", "content": "In France."},
        {"role": "user", "content": "And Rome?"},
    ]
    got = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8)
    history = (("Where is\nParis?", "In France."),)
    expected = asyncio.run(_answer(service, "And Rome?", history))
    assert got.choices[0].message.content == expected.text
    got = client.responses.create(model=MODEL, input=turns, max_output_tokens=8, instructions="Be brief.")
    assert got.output_text == expected.text


async def _answer(service, question, history):
    from modeling_clara.service.engine import AskOptions

    return await service.engine.answer(question, AskOptions(**OPTIONS), history)


def test_it_says_so_if_nothing_is_near(client):
    got = ask(client, extra_body={"min_score": 1})
    assert got.choices[0].message.content == ABSTAINED
    assert (got.abstained, got.choices[0].finish_reason, got.sources) == (True, "stop", [])
    assert got.choices[0].message.annotations == []
    chunks = list(ask(client, stream=True, extra_body={"min_score": 1}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ABSTAINED
    assert chunks[-1].abstained and chunks[-1].choices[0].finish_reason == "stop"


def test_stop_ends_the_text_before_it(service, client):
    text = offline(service).text
    stop = text[2:4]
    expected = text[: text.index(stop)]
    got = ask(client, stop=[stop, "never there"])
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (expected, "stop")
    chunks = list(ask(client, stream=True, stop=stop))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].sources


def test_a_stop_is_found_across_pieces():
    """What may be the beginning of a stop is held back until it is not."""
    text, stops = "one two END three", ["END", "E"]
    for stops in (["END"], ["END", "two EN"], ["absent"]):
        shown, n_shown = "", 0
        for end in range(1, len(text) + 1):
            ready = len(cut(text[:end], stops)) - held(text[:end], stops)
            shown += text[n_shown : max(ready, n_shown)]
            n_shown = max(ready, n_shown)
        assert shown == cut(text, stops)[: len(shown)] and len(shown) >= len(cut(text, stops)) - 5


def test_a_stop_may_be_much_longer_than_the_text():
    """What it costs to look for its beginning depends on the text."""
    stop = "three" + "x" * 1_000_000
    start = time.perf_counter()
    assert (held("one two three", [stop]), held("one t", [stop]), held("", [stop])) == (5, 1, 0)
    assert time.perf_counter() - start < 0.5


def test_sampling_has_a_seed(client):
    texts = {ask(client, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)}
    assert len(texts) == 3


def test_a_response_is_the_same_answer(service, client):
    got, expected = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=8), offline(service)
    assert got.output_text == expected.text
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert got.usage.input_tokens == expected.prompt_tokens
    assert {a.type for a in got.output[0].content[0].annotations} <= {"file_citation", "url_citation"}
    assert [s["document_id"] for s in got.sources] == [s.document_id for s in expected.sources]
    abstained = client.responses.create(model=MODEL, input=QUESTION, extra_body={"min_score": 1})
    assert (abstained.output_text, abstained.status, abstained.abstained) == (ABSTAINED, "completed", True)


def test_a_response_streams_typed_events(service, client):
    events = list(client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=8, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.annotation.added", "output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    expected = offline(service).text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].response.output_text == expected and events[-1].response.sources
    assert events[0].response.id == events[-1].response.id


def test_the_client_gathers_a_response_of_a_stream(service, client):
    """Its helper checks the order of the events and builds the response by itself."""
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=8) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == offline(service).text
    with client.responses.stream(model=MODEL, input=QUESTION, extra_body={"min_score": 1}) as stream:
        assert stream.get_final_response().output_text == ABSTAINED
    with client.chat.completions.stream(**chat(), extra_body={"min_score": 1}) as stream:
        assert stream.get_final_completion().choices[0].message.content == ABSTAINED


def test_embeddings_are_the_vectors_of_a_search(service, client):
    questions = [QUESTION, "Where is Paris?"]
    got = client.embeddings.create(model=MODEL, input=questions)  # as base64, which the client decodes
    floats = client.embeddings.create(model=MODEL, input=questions, encoding_format="float")
    assert [row.embedding for row in got.data] == [row.embedding for row in floats.data]
    vectors = torch.tensor([row.embedding for row in floats.data])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    stored = torch.stack([d["memory"][0] for d in service.engine.corpus.get(["rome", "paris"])]).flatten(1)
    scores = vectors @ torch.nn.functional.normalize(stored, dim=-1).T
    hits = service.reference.retrieve(questions, corpus=service.engine.corpus, top_k=4)
    expected = [[{s.document_id: s.score for s in row}[name] for name in ("rome", "paris")] for row in hits]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    raw = service.send(
        "POST", "/v1/embeddings", {"model": MODEL, "input": QUESTION, "encoding_format": "base64"}, key=KEY
    )
    decoded = base64.b64decode(raw.json["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(decoded) // 4}f", decoded)) == pytest.approx(floats.data[0].embedding, abs=1e-6)
    assert raw.json["usage"]["prompt_tokens"] > 0


def test_shorter_embeddings_are_the_first_vectors(service, client):
    long = client.embeddings.create(model=MODEL, input=QUESTION, dimensions=4 * 32).data[0].embedding
    short = client.embeddings.create(model=MODEL, input=QUESTION, dimensions=2 * 32).data[0].embedding
    memory = service.reference.encode_queries([QUESTION], memory_size=2).flatten(1)
    torch.testing.assert_close(torch.tensor([short]), torch.nn.functional.normalize(memory, dim=-1), atol=1e-5, rtol=0)
    assert (len(long), len(short)) == (128, 64)
    with pytest.raises(openai.BadRequestError, match=r"one of \[64, 128\], got 7"):
        client.embeddings.create(model=MODEL, input=QUESTION, dimensions=7)


def test_many_embeddings_are_made_in_parts(service, client):
    """Between these parts answers are written; vectors and the places of errors are those of the whole list."""
    questions = [f"What is the capital of country {n}?" for n in range(40)]
    got = client.embeddings.create(model=MODEL, input=questions)
    alone = [client.embeddings.create(model=MODEL, input=questions[n]).data[0].embedding for n in (0, 17, 39)]
    torch.testing.assert_close(torch.tensor([got.data[n].embedding for n in (0, 17, 39)]), torch.tensor(alone))
    with pytest.raises(openai.BadRequestError, match=r"`input\[33\]` must fit into the backbone's window") as error:
        client.embeddings.create(model=MODEL, input=[*questions[:33], "Paris " * 900])
    assert error.value.param == "input[33]"


def test_there_is_one_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    for name in ("gpt-5", "../tiny-clara"):
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve(name)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="must be 'someone/tiny-clara', got 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "?"}])


UNSUPPORTED = {
    "n": 2,
    "logprobs": True,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "presence_penalty": 0.5,
    "logit_bias": {"1": 2},
    "prompt_embeds": "gAJ9",
    "top_K": 3,
    "temperature": 3,
    "top_p": "0.5",
    "max_tokens": 0,
    "top_k": 0,
    "memory_size": 3,
    "where": {"nope": 1},
    "messages": [],
    "stop": ["a", "b", "c", "d", "e"],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(service, name):
    got = service.send("POST", "/v1/chat/completions", chat(**{name: UNSUPPORTED[name]}), key=KEY)
    assert got.status == 400 and got.error["type"] == "invalid_request_error"
    assert name in got.error["message"]
    assert got.error["param"] in (name, None)


def test_what_does_no_harm_is_accepted(service):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "logprobs": False, "tools": []}
    harmless |= {"response_format": {"type": "text"}, "tool_choice": "none", "presence_penalty": 0.0, "seed": None}
    harmless |= {"max_tokens": None, "max_completion_tokens": 8, "reasoning_effort": "low", "stop": None}
    plain = service.send("POST", "/v1/chat/completions", chat(), key=KEY).json
    got = service.send("POST", "/v1/chat/completions", chat(**harmless), key=KEY).json
    assert got["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "system", "content": "a"}],
        [{"role": "tool", "content": "a", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "gAJ9"}]}],
        [{"role": "user", "content": "  "}],
        [{"role": "user"}],
    ],
    ids=str,
)
def test_messages_that_are_no_question(service, messages):
    got = service.send("POST", "/v1/chat/completions", chat(messages=messages), key=KEY)
    assert got.status == 400 and got.error["param"].startswith("messages")


@pytest.mark.parametrize(
    "fields",
    [{"previous_response_id": "resp_1"}, {"background": True}, {"tools": [{"type": "file_search"}]}, {"input": []}],
    ids=str,
)
def test_responses_that_are_not_supported(service, fields):
    got = service.send("POST", "/v1/responses", {"model": MODEL, "input": QUESTION, **fields}, key=KEY)
    assert got.status == 400 and next(iter(fields)) in got.error["message"]


@pytest.mark.parametrize("text", [{"verbosity": "low"}, {"format": {"type": "text"}, "verbosity": "high"}], ids=str)
def test_text_of_responses_may_say_what_changes_nothing(service, text):
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8}
    plain, got = (service.send("POST", "/v1/responses", {**body, **more}, key=KEY) for more in ({}, {"text": text}))
    assert got.status == 200 and got.json["output"][0]["content"] == plain.json["output"][0]["content"]
    wrong = {**body, "text": {**text, "format": {"type": "json_object"}}}
    assert service.send("POST", "/v1/responses", wrong, key=KEY).error["param"] == "text"
