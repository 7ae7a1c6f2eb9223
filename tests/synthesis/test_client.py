"""The teacher against a loopback server that fails on a schedule: what it repeats, waits for, counts and gives up."""

import asyncio
import itertools
import json
import time

import pytest
from teacher_server import TeacherServer

from modeling_clara.synthesis.backends import Endpoint
from modeling_clara.synthesis.client import (
    BadRequest,
    Completion,
    GaveUp,
    OutOfBudget,
    Teacher,
    TeacherDown,
    read_prices,
)

QUICK = {"backoff": 0.01, "timeout": 5.0}
PRICES = {"prompt": 1.0, "completion": 10.0}


def teacher_of(server: TeacherServer, **options) -> Teacher:
    return Teacher(Endpoint(server.base_url), "loopback-teacher", **QUICK | options)


def ask(teacher: Teacher, text: str, **options):
    return teacher.complete([{"role": "user", "content": text}], **{"max_tokens": 50, **options})


def run(teacher: Teacher, *calls) -> list:
    """What each call returned or raised, all at the same time; the teacher is closed."""

    async def all_calls():
        async with teacher:
            return await asyncio.gather(*(ask(teacher, call) for call in calls), return_exceptions=True)

    return asyncio.run(all_calls())


def one_by_one(teacher: Teacher, *calls) -> list:
    async def all_calls():
        async with teacher:
            return [(await asyncio.gather(ask(teacher, call), return_exceptions=True))[0] for call in calls]

    return asyncio.run(all_calls())


def test_a_call_is_sent_as_the_interface_says():
    schema = {"title": "verdict", "type": "object", "properties": {"supported": {"type": "boolean"}}}
    text = "<document>Oslo is a city.</document><question>What is Oslo?</question><answer>a city</answer>"
    with TeacherServer(keep=True) as server:
        teacher = teacher_of(server)

        async def calls():
            async with teacher:
                return await ask(teacher, text, schema=schema, temperature=0.5, seed=3)

        completion = asyncio.run(calls())
    assert json.loads(completion.text) == {"supported": True} and completion.finish_reason == "stop"
    (sent,) = server.requests
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.5, 3, 50)
    assert sent["response_format"]["json_schema"] == {"name": "verdict", "schema": schema, "strict": True}
    usage = teacher.usage
    assert (usage.calls, usage.tries, usage.prompt_tokens, usage.completion_tokens) == (1, 1, 7, 2)


@pytest.mark.parametrize("fault", ["500", "502", "408", "409", "429", "429 after 0", "503", "529", "hangup", "page"])
def test_what_passes_is_tried_again(fault):
    with TeacherServer(faults=[fault, fault]) as server:
        teacher = teacher_of(server)
        (completion,) = run(teacher, "a")
    assert completion == Completion("Answer to: a", "stop", 1, 3)
    assert (teacher.usage.calls, teacher.usage.tries, server.calls.total()) == (1, 3, 3)


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_what_will_never_work_is_not_tried_again(status):
    with TeacherServer(faults=[None, status, None]) as server:
        first, refused, last = one_by_one(teacher_of(server), "a", "b", "c")
    assert type(refused) is BadRequest and f"HTTP {status}: " in str(refused) and "failed on purpose" in str(refused)
    assert server.calls.total() == 3 and first.text == "Answer to: a" and last.text == "Answer to: c"


@pytest.mark.parametrize("fault", ["empty", "null", "truncated"])
def test_what_was_answered_is_no_failure(fault):
    with TeacherServer(faults=[fault]) as server:
        (completion,) = run(teacher_of(server), "a")
    assert server.calls.total() == 1
    assert (completion.text, completion.finish_reason) == (
        ("Answer", "length") if fault == "truncated" else ("", "stop")
    )


def test_a_call_that_hangs_is_cut_off_and_counts_towards_the_budget():
    with TeacherServer(faults=["hang"]) as server:
        teacher = teacher_of(server, timeout=0.5, max_tokens_total=10_000)
        start = time.monotonic()
        (completion,) = run(teacher, "a")
    assert completion.text == "Answer to: a" and 0.5 < time.monotonic() - start < 10
    assert teacher.usage.lost_tokens > 50 and teacher.usage.prompt_tokens == 1


def test_a_request_that_always_fails_is_given_up_and_the_others_are_not():
    with TeacherServer(faults=[None, *["500"] * 4]) as server:
        _, failed, fine = one_by_one(teacher_of(server, retries=3), "a", "b", "c")
    assert isinstance(failed, GaveUp) and "4 tries failed, HTTP 500" in str(failed) and fine.text == "Answer to: c"
    assert server.calls.total() == 6


@pytest.mark.parametrize("fault", ["429 after 2", "429 on 2", "500 after 2"])
def test_retry_after_holds_back_every_call(fault):
    """Of both forms, and calls that were not sent yet wait as well."""
    with TeacherServer(faults=[fault], latency=0.05, keep=True) as server:
        start = time.monotonic()
        run(teacher_of(server, concurrency=1), *"abcd")
        took = time.monotonic() - start
    assert server.calls.total() == 5
    assert (0.9 if "on" in fault else 2.0) < took < 8  # a date has whole seconds


def test_no_slot_is_held_while_a_call_sleeps():
    with TeacherServer(faults=["500"]) as server:
        teacher = teacher_of(server, concurrency=1, backoff=1.0)
        seen = []

        async def calls():
            async def note(text):
                seen.append((await ask(teacher, text)).text[-1])

            async with teacher:
                await asyncio.gather(*map(note, "abc"))

        asyncio.run(calls())
    assert seen == ["b", "c", "a"]


def test_overload_finds_the_requests_at_a_time_that_the_endpoint_bears():
    with TeacherServer(latency=0.04, max_concurrent=5) as server:
        teacher = teacher_of(server, concurrency=32, retries=20)
        completions = run(teacher, *map(str, range(200)))
        assert {completion.text for completion in completions} == {f"Answer to: {n}" for n in range(200)}
        assert server.peak > 5 and teacher.concurrency <= 12 and server.calls.total() < 300


def test_one_more_at_a_time_after_as_many_successes_as_slots():
    with TeacherServer(faults=["429"]) as server:
        teacher = teacher_of(server, concurrency=8)
        one_by_one(teacher, *map(str, range(14)))
    assert teacher.concurrency == 6  # 4 of 8 after the refusal, 5 after four calls, 6 after five more


def test_one_burst_of_refusals_halves_once():
    with TeacherServer(latency=0.1, faults=["429"] * 8) as server:
        teacher = teacher_of(server, concurrency=16, backoff=0.5)
        run(teacher, *map(str, range(16)))
        assert 8 <= teacher.concurrency < 16


def test_lasting_overload_ends_the_run_with_what_the_endpoint_said():
    with TeacherServer(every={"429": 1}) as server:
        teacher = teacher_of(server, outage_seconds=0.5)
        errors = run(teacher, *map(str, range(50)))
    assert all(isinstance(error, TeacherDown) for error in errors)
    assert "HTTP 429: " in str(errors[0]) and "failed on purpose" in str(errors[0])


def test_a_long_retry_after_ends_the_run_at_once():
    with TeacherServer(faults=["429 after 3600"]) as server:
        (error,) = run(teacher_of(server), "a")
    assert isinstance(error, TeacherDown) and "in 3600 s" in str(error)


def test_calls_that_fail_in_a_row_end_the_run():
    with TeacherServer(faults=[None], every={"500": 1}) as server:
        teacher = teacher_of(server, retries=1, outage_calls=4)
        _, *errors = one_by_one(teacher, *map(str, range(10)))
    assert [type(error) for error in errors] == [GaveUp] * 3 + [TeacherDown] * 6
    assert server.calls.total() == 1 + 4 * 2 and "4 calls in a row failed" in str(errors[-1])


def test_a_server_that_refuses_all_from_the_start_ends_the_run():
    with TeacherServer(every={"400": 1}) as server:
        errors = one_by_one(teacher_of(server), *map(str, range(5)))
    assert [type(error) for error in errors] == [BadRequest] * 2 + [TeacherDown] * 3
    assert server.calls.total() == 3 and "HTTP 400: " in str(errors[-1])


def test_a_server_that_is_not_there_ends_the_run_soon():
    with TeacherServer() as server:
        address = server.base_url
    teacher = Teacher(Endpoint(address), "m", **QUICK, retries=2)
    errors = run(teacher, *map(str, range(40)))
    assert {type(error) for error in errors} <= {GaveUp, TeacherDown}
    assert isinstance(errors[-1], TeacherDown) and address in str(errors[-1])


@pytest.mark.parametrize("status", ["401", "402", "403"])
def test_no_access_ends_the_run_and_names_the_key(status, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with TeacherServer(every={status: 1}) as server:
        teacher = Teacher(Endpoint(server.base_url, "MY_KEY"), "m", **QUICK)
        first, second = one_by_one(teacher, "a", "b")
    assert isinstance(first, TeacherDown) and isinstance(second, TeacherDown) and server.calls.total() == 1
    assert status == "402" or "MY_KEY, which is not set" in str(first)


def test_a_wrong_address_or_model_ends_the_run_before_it_has_begun():
    with TeacherServer(every={"404": 1}) as server:
        (error,) = run(teacher_of(server), "a")
    assert isinstance(error, TeacherDown) and "model's name" in str(error)


def test_those_that_sleep_learn_of_the_end_at_once():
    with TeacherServer(faults=["500", "401"]) as server:
        start = time.monotonic()
        errors = run(teacher_of(server, concurrency=1, backoff=30.0), "a", "b")
        assert time.monotonic() - start < 10
    assert all(isinstance(error, TeacherDown) for error in errors)


@pytest.mark.parametrize("limit", [{"max_tokens_total": 3_000}, {"max_cost": 0.02, "prices": PRICES}])
def test_the_budget_is_never_exceeded(limit):
    """Not by calls at the same time, and nothing is left that another call would fit into."""
    with TeacherServer(latency=0.01) as server:
        teacher = teacher_of(server, concurrency=16, **limit)
        answers = run(teacher, *(f"{n} and some words more" for n in range(400)))
    usage, done = teacher.usage, [answer for answer in answers if isinstance(answer, Completion)]
    assert len(done) == usage.calls == server.calls.total() and 200 < len(done) < 400
    assert all(isinstance(answer, Completion | OutOfBudget) for answer in answers)
    assert usage.prompt_tokens == sum(answer.prompt_tokens for answer in done)
    cost = (usage.prompt_tokens + 10 * usage.completion_tokens) / 1e6
    if "max_cost" in limit:
        assert usage.cost == pytest.approx(cost) and 0.019 < cost <= 0.02
    else:
        assert 2_900 < usage.tokens <= 3_000
    assert str(next(answer for answer in answers if isinstance(answer, OutOfBudget))).count(next(iter(limit))) == 1


def test_a_call_that_is_too_large_is_not_sent():
    with TeacherServer() as server:
        (error,) = run(teacher_of(server, max_tokens_total=40), "a")
    assert isinstance(error, OutOfBudget) and server.calls.total() == 0


def test_prices_are_read_and_wanted(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"m": PRICES}))
    assert read_prices(path, "m") == PRICES
    with pytest.raises(ValueError, match="other.*Add it"):
        read_prices(path, "other")
    with pytest.raises(ValueError, match="max_cost"):
        Teacher(Endpoint("http://127.0.0.1:1/v1"), "m", max_cost=1.0)
    for limit in ({"max_tokens_total": -5}, {"max_tokens_total": 0}, {"max_cost": float("nan"), "prices": PRICES}):
        with pytest.raises(ValueError, match=f"`{[*limit][0]}` must be > 0"):
            Teacher(Endpoint("http://127.0.0.1:1/v1"), "m", **limit)


def test_every_call_is_answered_under_faults_of_all_kinds():
    """400 calls, a third of which fail in some way: each gets its own answer."""
    every = {"500": 7, "hangup": 11, "429": 13, "page": 17, "503 after 0": 19}
    with TeacherServer(every=every, latency=0.002) as server:
        teacher = teacher_of(server, concurrency=16)
        completions = run(teacher, *map(str, range(400)))
    assert [completion.text for completion in completions] == [f"Answer to: {n}" for n in range(400)]
    assert server.answered.total() == teacher.usage.calls == 400
    assert teacher.usage.tries == server.calls.total() > 450


def test_a_cancelled_call_gives_its_slot_back():
    with TeacherServer(faults=["hang"]) as server:
        teacher = teacher_of(server, concurrency=1)

        async def calls():
            async with teacher:
                task = asyncio.create_task(ask(teacher, "a"))
                while not server.calls.total():
                    await asyncio.sleep(0.01)
                task.cancel()
                return await ask(teacher, "b")

        assert asyncio.run(calls()).text == "Answer to: b"


def test_pauses_grow_and_differ(monkeypatch):
    """Doubled from try to try, and no two clients repeat in step."""
    with TeacherServer(faults=["500"] * 5, keep=True) as server:
        times = []
        enter = server.enter
        server.enter = lambda *arguments: times.append(time.monotonic()) or enter(*arguments)
        run(teacher_of(server, backoff=0.04), "a")
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for number, pause in enumerate(pauses):
        assert 0.02 * 2**number <= pause < 0.04 * 2**number + 0.5
