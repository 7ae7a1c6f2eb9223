"""What clients do wrong, on purpose or not: proper status codes, and the service stays up."""

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from http_service import KEY, MODEL, QUESTION, READ_KEY, Served, chat, raw, send, wait_until

from modeling_clara.service.auth import Keys, is_loopback, read_keys
from modeling_clara.service.limits import Limits
from modeling_clara.service.logs import JsonLines

CHAT = "/v1/chat/completions"


def is_up(served) -> bool:
    """Whether an answer still comes, and nothing waits or runs when it is there."""
    got = served.send("POST", CHAT, chat(), key=KEY)
    while got.status == 429:  # what was there before is still being answered
        got = served.send("POST", CHAT, chat(), key=KEY)
    assert got.status == 200
    wait_until(lambda: served.engine.n_waiting == served.engine.n_running == 0)
    return True


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong", KEY[:-1], KEY + "x", READ_KEY.upper(), "ü" * 20])
@pytest.mark.parametrize("path", [CHAT, "/documents", "/metrics", "/nowhere"])
def test_without_a_key_nothing_is_told(service, key, path):
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    got = service.send("POST", path, b"{not even JSON", headers=headers)
    assert got.status == 401 and got.error["code"] == "invalid_api_key" and got.error["type"] == "authentication_error"
    assert got.headers["www-authenticate"] == "Bearer"


def test_the_client_raises_its_own_errors(service):
    with pytest.raises(openai.AuthenticationError, match="not known"):
        service.client("a-wrong-key").models.list()
    with pytest.raises(openai.BadRequestError) as error:
        service.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": ""}])
    assert error.value.param == "messages"


def test_other_schemes_are_no_keys(service):
    for value in (KEY, f"Basic {KEY}", f"bearer{KEY}", ""):
        assert service.send("GET", "/v1/models", headers={"Authorization": value}).status == 401
    assert service.send("GET", "/v1/models", headers={"Authorization": f"bearer {KEY}"}).status == 200


def test_health_needs_no_key(service):
    for path in ("/health", "/health/live", "/health/ready"):
        assert service.send("GET", path).status == 200
    assert service.send("GET", "/health").json["documents"] == 4


def test_a_key_may_be_allowed_to_read_only(service):
    assert service.send("POST", CHAT, chat(), key=READ_KEY).status == 200
    for method, path in (("POST", "/documents"), ("PUT", "/documents"), ("DELETE", "/documents/rome")):
        got = service.send(method, path, {"documents": [{"text": "x"}]}, key=READ_KEY)
        assert got.status == 403 and got.error["code"] == "read_only_key"
    assert service.send("GET", "/documents/rome", key=READ_KEY).status == 200


def test_keys_are_of_some_length_and_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    for key in ("short", "with a blank in it, long", "ümläute-sind-keine-schlüssel"):
        with pytest.raises(ValueError, match="at least 16 characters"):
            Keys([key])
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n{KEY}\n", encoding="utf-8")
    monkeypatch.setenv("SOME_KEYS", f" {READ_KEY} ,")
    assert read_keys("SOME_KEYS", file) == [KEY, READ_KEY]
    keys = Keys([KEY], [READ_KEY])
    assert [keys.may_write(key) for key in (KEY, READ_KEY, "other")] == [True, False, None]
    file.write_bytes(f"\ufeff# of Windows\r\n \r\n{KEY}\r\n".encode())
    assert read_keys("SOME_KEYS", file) == [KEY, READ_KEY]
    file.write_text("# none\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must have one key a line"):
        read_keys("SOME_KEYS", file)


def test_addresses_of_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", "")))


# --- bodies ----------------------------------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": json.dumps(chat()).encode("utf-16"),
    "too deep": b"[" * 100_000,
    "digits": b'{"model": ' + b"1" * 10_000 + b"}",
    "NaN": json.dumps(chat(temperature=float("nan"))).encode(),
    "infinity": json.dumps(chat(min_score=float("inf"))).encode(),
    "surrogate": json.dumps(chat("\ud800")).encode(),
    "surrogate as a name": b'{"\\ud800": 1}',
    "surrogate in a filter": json.dumps(chat(where={"\ud800": "\udfff"})).encode(),
    "long": json.dumps(chat("x" * 1_000_000)).encode(),
    "nul": json.dumps(chat(model="\0")).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_is_the_clients_fault(service, name):
    got = service.send("POST", CHAT, BODIES[name], key=KEY)
    assert got.status == (404 if name == "nul" else 400), got.body
    assert got.error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("is_list", [True, False])
def test_a_filter_has_a_bounded_number_of_parts(service, is_list):
    """Each of them is compared with the whole corpus, while no answer is written."""

    def where(n: int) -> dict:
        return {"year": {"$in": [2020] * n}} if is_list else {"$or": [{"$not": {"year": 2020}}] * n}

    for path, body in (("/search", {"query": "Rome?"}), (CHAT, chat())):
        assert service.send("POST", path, {**body, "where": where(300)}, key=KEY).status == 200
        got = service.send("POST", path, {**body, "where": where(1001)}, key=KEY)
        assert got.status == 400 and (got.error["param"], got.error["code"]) == ("where", "too_long")


def test_a_long_question_is_named(service):
    got = service.send("POST", CHAT, BODIES["long"], key=KEY)
    assert "at most 8,000 characters, got 1,000,000" in got.error["message"]
    got = service.send("POST", CHAT, chat("x " * 3900), key=KEY)  # the backbone's window is shorter
    assert got.status == 400


def test_a_body_that_is_too_large_is_refused(service):
    got = service.send("POST", CHAT, b" " * (2**20 + 1), key=KEY)
    assert got.status == 413 and got.headers["connection"] == "close"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    address = service.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
        connection.sendall(head.encode())
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(piece)
            connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert service.send("POST", "/documents", b" " * 2**22, key="a-wrong-key-of-some-length").status == 401
    assert is_up(service)


def test_a_form_of_a_web_page_is_no_request(service):
    """A page may send text/plain to any address without asking its browser."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        got = service.send("POST", CHAT, chat(), key=KEY, headers={"Content-Type": kind})
        assert got.status == 400 and "application/json" in got.error["message"]


def test_other_origins_are_not_allowed(service, strict):
    got = service.send("GET", "/v1/models", key=KEY, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in got.headers
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    got = service.send("OPTIONS", CHAT, headers=preflight)
    assert got.status == 405 and "access-control-allow-origin" not in got.headers


def test_an_origin_may_be_allowed(http_model, http_corpus):
    origin = {"Origin": "https://good.example"}
    with Served(http_model, http_corpus, cors_origins=["https://good.example"], api_keys=[KEY]) as served:
        wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # of OpenAI's client
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
        got = served.send("OPTIONS", CHAT, headers=origin | preflight)
        assert (got.status, got.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert set(wanted.split(",")) <= set(got.headers["access-control-allow-headers"].lower().split(","))
        got = served.send("POST", CHAT, chat(max_tokens=1), key=KEY, headers=origin)
        assert (got.status, got.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert got.headers["access-control-expose-headers"] == "X-Request-ID, Retry-After"
        got = served.send("GET", "/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in got.headers


def test_without_keys_the_host_is_this_machine(http_model, http_corpus):
    """A page of the web whose name leads to 127.0.0.1 has another Host."""
    with Served(http_model, http_corpus, hosts={"127.0.0.1", "localhost", "::1"}) as served:
        for host, status in (("localhost:1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("evil.example", 421)):
            assert served.send("GET", "/health", headers={"Host": host}).status == status
        for host in ("", "[", "127.0.0.1.evil.example", "evil.example#@localhost"):
            assert served.send("GET", "/health", headers={"Host": host}).status in (400, 421)


def test_how_many_of_each(http_model, http_corpus):
    limits = Limits(messages=3, inputs=2, documents=2, writes=1, question_chars=20, body_bytes=1000)
    with Served(http_model, http_corpus, limits=limits) as served:
        turns = [{"role": "user", "content": "Where?"}] * 4
        assert "at most 3, got 4" in served.send("POST", CHAT, chat(messages=turns)).error["message"]
        assert "at most 20 characters, got 29" in served.send("POST", CHAT, chat()).error["message"]
        got = served.send("POST", "/v1/embeddings", {"model": MODEL, "input": ["a", "b", "c"]})
        assert got.status == 400 and "at most 2 texts, got 3" in got.error["message"]
        rows = [{"text": f"Text {n}."} for n in range(3)]
        assert "at most 2, got 3" in served.send("POST", "/documents", {"documents": rows}).error["message"]
        assert served.send("POST", CHAT, chat("x" * 1000)).status == 413
        assert served.send("POST", "/documents", {"documents": [{"text": "x " * 1000}]}).status == 200
        with ThreadPoolExecutor(1) as pool, http_model.lock:  # a change waits for the compressor
            first = pool.submit(served.send, "POST", "/documents", {"documents": rows[:1]})
            wait_until(lambda: served.engine.n_writes == 1)
            got = served.send("POST", "/documents", {"documents": rows[:1]})
            assert got.status == 429 and got.headers["retry-after"] == "5"
        assert first.result().status == 200


def test_paths_and_methods_that_are_not_there(service):
    for method, path in (("GET", "/nowhere"), ("GET", "/../../etc/passwd"), ("GET", "/docs"), ("GET", "//")):
        got = service.send(method, path, key=KEY)
        assert got.status == 404 and got.error["type"] == "not_found_error"
    got = service.send("GET", CHAT, key=KEY)
    assert got.status == 405 and got.headers["allow"] == "POST" and got.error


def test_a_request_has_an_id(service):
    assert len(service.send("GET", "/health").headers["x-request-id"]) == 32
    assert service.send("GET", "/health", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a" * 65, "a b", '"', "{}"):
        assert len(service.send("GET", "/health", headers={"X-Request-ID": bad}).headers["x-request-id"]) == 32


# --- too much, too slow, gone ----------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(strict):
    """While the model is held, one question waits, and the next one is told."""
    with ThreadPoolExecutor(1) as pool, strict.engine.model.lock:
        first = pool.submit(strict.send, "POST", CHAT, chat())
        wait_until(lambda: strict.engine.n_waiting == 1)
        got = strict.send("POST", CHAT, chat())
        assert got.status == 429 and got.error["type"] == "rate_limit_error" and int(got.headers["retry-after"]) >= 1
        assert strict.send("POST", CHAT, chat(stream=True)).status == 429
        assert strict.send("GET", "/health").status == 200
        with pytest.raises(openai.RateLimitError):
            strict.client().chat.completions.create(**chat())
    assert first.result().status == 200
    assert is_up(strict)


def test_an_answer_that_takes_too_long(http_model, http_corpus):
    with Served(http_model, http_corpus, limits=Limits(answer_seconds=0.5)) as served:
        with http_model.lock:
            got = served.send("POST", CHAT, chat())
            assert got.status == 504 and got.error["code"] == "timeout"
            assert served.send("POST", CHAT, chat(stream=True)).status == 504
            assert served.send("POST", "/search", {"query": QUESTION}).status == 504
        wait_until(lambda: served.engine.n_waiting == served.engine.n_running == 0)
        assert served.send("POST", CHAT, chat(max_tokens=1)).status == 200


def test_a_body_byte_by_byte(strict):
    body = json.dumps(chat()).encode()
    with raw(strict.url, b"", length=len(body)) as slow:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in body:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - start > 0.3:
                    assert strict.send("GET", "/health").status == 200
                if time.monotonic() - start > 2:
                    break
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert is_up(strict)


def test_a_stream_that_nobody_reads(strict):
    """The answer is generated and its place is free for others."""
    body = json.dumps(chat(stream=True, max_tokens=100)).encode()
    with raw(strict.url, body):
        assert is_up(strict)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(strict, stream):
    body = json.dumps(chat(stream=stream, max_tokens=300)).encode()
    with strict.engine.model.lock:
        waiting = raw(strict.url, body)
        wait_until(lambda: strict.engine.n_waiting == 1)
        waiting.close()
        wait_until(lambda: strict.engine.n_waiting == 0)  # though the model has not moved
    assert is_up(strict)


def test_a_client_that_leaves_in_mid_stream(strict):
    connection = raw(strict.url, json.dumps(chat(stream=True, max_tokens=300)).encode())
    assert connection.recv(20).startswith(b"HTTP/1.1 200")
    connection.close()
    assert is_up(strict)


def test_a_request_that_is_never_finished(strict):
    with raw(strict.url, b'{"model"', length=1000) as unfinished:
        unfinished.shutdown(socket.SHUT_WR)
        assert is_up(strict)
    left = 'clara_requests_total{method="POST",route="none",status="499"}'
    wait_until(lambda: metrics(strict).get(left) == 1)  # no fault of ours
    with socket.create_connection(unfinished_address(strict), timeout=30) as garbage:
        garbage.sendall(b"\x16\x03\x01\x02\x00 no HTTP at all \r\n\r\n")
        assert garbage.recv(100).startswith(b"HTTP/1.1 400")
    assert is_up(strict)


def unfinished_address(served) -> tuple[str, int]:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return host, int(port)


def test_a_fault_of_ours_is_told_as_such(strict, caplog):
    """The message of an exception may quote a document: it is neither sent nor logged."""

    def broken(*_):
        raise LookupError("the secret text of a document")

    strict.engine.search = broken
    logging.getLogger("uvicorn.error").propagate = True
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        got = strict.send("POST", "/search", {"query": QUESTION}, headers={"X-Request-ID": "mine"})
    assert got.status == 500 and got.error["type"] == "server_error" and got.headers["x-request-id"] == "mine"
    assert b"secret" not in got.body and got.headers["connection"] == "close"
    wait_until(lambda: any(record.exc_info for record in caplog.records))
    record = next(record for record in caplog.records if record.exc_info)
    line = json.loads(JsonLines().format(record))
    assert line["error"] == "LookupError" and "secret" not in json.dumps(line) and "broken" in line["where"][-1]
    assert is_up(strict)


def test_broken_weights_are_no_fault_of_a_client(strict):
    strict.engine.model.get_output_embeddings().weight.data.fill_(float("nan"))
    assert strict.send("POST", CHAT, chat()).status == 500
    assert strict.send("POST", "/search", {"query": QUESTION}).status == 200


# --- what is counted -------------------------------------------------------------------------------------------------


def metrics(served) -> dict[str, float]:
    lines = served.send("GET", "/metrics", key=KEY).body.decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics_count_what_happened(service):
    before = metrics(service)
    answer = service.send("POST", CHAT, chat(), key=KEY).json
    service.send("POST", CHAT, chat(min_score=1), key=KEY)
    service.send("POST", CHAT, b"{", key=KEY)
    service.send("GET", "/documents/no/such/id", key=KEY)
    after = metrics(service)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    def requests(route: str, status: int, method: str = "POST") -> str:
        return f'clara_requests_total{{method="{method}",route="{route}",status="{status}"}}'

    assert grown(requests(CHAT, 200)) == 2 and grown(requests(CHAT, 400)) == 1
    assert grown(requests("/documents/{id:path}", 404, "GET")) == 1
    assert grown(f'clara_request_seconds_count{{route="{CHAT}"}}') == 3
    assert (grown("clara_answers_total"), grown("clara_abstained_total")) == (2, 1)
    assert grown("clara_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("clara_completion_tokens_total") == answer["usage"]["completion_tokens"]
    assert (after["clara_documents"], after["clara_waiting_requests"], after["clara_running_requests"]) == (4, 0, 0)
    assert not any("such" in name for name in after)  # ids are no labels
    assert grown("clara_batch_size_count") >= 8  # a pass for each token
    assert grown("clara_batch_size_sum") == grown("clara_batch_size_count")


def test_answers_go_on_while_documents_change(strict):
    """Reads and writes at the same time: no answer fails, and each change is there when it is acknowledged."""
    stop, failed = threading.Event(), []

    def ask():
        while not stop.is_set():
            got = strict.send("POST", "/search", {"query": QUESTION})
            if got.status not in (200, 429, 504):
                failed.append(got)

    reader = threading.Thread(target=ask)
    reader.start()
    try:
        for number in range(5):
            body = {"documents": [{"id": f"new-{number}", "text": f"Document number {number}."}]}
            assert strict.send("POST", "/documents", body).json["documents"] == 1
            assert strict.send("GET", f"/documents/new-{number}").status == 200
    finally:
        stop.set()
        reader.join()
    assert not failed
    assert send(strict.url, "GET", "/health").json["documents"] == 9
