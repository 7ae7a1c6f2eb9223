"""Search and documents over HTTP: a change is on the disk when it is answered, and an id is text."""

import datetime
import errno
import json
import os
import signal
import threading
from urllib.parse import quote

import pytest
from http_service import KEY, QUESTION, Process, Served, send, wait_until

from modeling_clara import CompressedCorpus
from modeling_clara.corpus.storage import corpus_lock
from modeling_clara.service import app
from modeling_clara.service.limits import Limits
from modeling_clara.service.sources import json_value

IDS = ["a/b", "../../etc/passwd", "..", "%2e%2e", "a?b#c", "a&b=c", " x ", "Größe", "日本", "a\\b", "-rf", "💥"]


def documents(*ids: str, text: str = "Text of {}.") -> dict:
    return {"documents": [{"id": name, "text": text.format(name)} for name in ids]}


def stored(served) -> dict[str, str]:
    """What another reader of the folder finds."""
    corpus = CompressedCorpus.open(served.engine.corpus.folder)
    return {row["document_id"]: row["text"] for row in corpus.rows()}


def test_a_search_is_that_of_the_model(strict):
    got = strict.send("POST", "/search", {"query": QUESTION, "top_k": 3})
    (expected,) = strict.engine.model.retrieve([QUESTION], corpus=strict.engine.corpus, top_k=3)
    rows = got.json["sources"]
    assert [(row["document_id"], row["text"]) for row in rows] == [(s.document_id, s.text) for s in expected]
    assert [row["score"] for row in rows] == pytest.approx([s.score for s in expected], abs=1e-6)
    got = strict.send("POST", "/search", {"query": QUESTION, "where": {"year": 2020}})
    assert [row["document_id"] for row in got.json["sources"]] == ["seine/river"]
    for wrong in ({"query": " "}, {"where": {"$nope": 1}}, {"embedding": [1]}, {"top_k": 0}, {"query": None}):
        assert strict.send("POST", "/search", {"query": QUESTION, **wrong}).status == 400


def test_documents_are_added_replaced_and_deleted(strict):
    got = strict.send("POST", "/documents", documents("new"))
    assert got.json == {"documents": 1, "chunks": 1, "unchanged": 0, "ids": ["new"], "rejected": []}
    assert stored(strict)["new"] == "Text of new."
    assert strict.send("GET", "/documents/new").json == {
        "document_id": "new",
        "title": "",
        "metadata": {"url": None, "year": None},
        "chunks": [{"chunk": 0, "text": "Text of new.", "n_tokens": 10}],
    }
    body = {"documents": [{"id": "new", "text": "Another text.", "title": "T", "metadata": {"year": 7}}]}
    assert strict.send("PUT", "/documents", body).json["documents"] == 1
    counts = {"documents": 0, "chunks": 0, "unchanged": 1}
    assert strict.send("PUT", "/documents", body).json == {**counts, "ids": ["new"], "rejected": []}
    got = strict.send("GET", "/documents/new").json
    assert (got["title"], got["metadata"]["year"], got["chunks"][0]["text"]) == ("T", 7, "Another text.")
    assert strict.send("PUT", "/documents", {**documents("other"), "create": False}).status == 422
    assert strict.send("PUT", "/documents", documents("other")).json["documents"] == 1
    assert strict.send("DELETE", "/documents/new").json == {"deleted": 1, "documents": 5}
    for method in ("GET", "DELETE"):
        got = strict.send(method, "/documents/new")
        assert got.status == 404 and got.error["code"] == "document_not_found"
    assert strict.send("DELETE", "/documents?id=other&id=rome").json == {"deleted": 2, "documents": 3}
    assert strict.send("DELETE", "/documents?id=paris&id=rome").status == 404  # all or none
    assert set(stored(strict)) == {"paris", "berlin", "seine/river"}


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_document_without_an_id_gets_one_and_is_told_it(strict, method):
    rows = [{"text": "The first."}, {"id": "mine", "text": "The second."}, {"text": "The third."}]
    ids = strict.send(method, "/documents", {"documents": rows}).json["ids"]
    assert len(set(ids)) == 3 and ids[1] == "mine"
    found = stored(strict)
    assert [found[name] for name in ids] == [row["text"] for row in rows]
    assert strict.send("DELETE", f"/documents/{ids[0]}").status == 200
    got = strict.send("PUT", "/documents", {"documents": rows[:1], "create": False})
    assert got.status == 422 and "must have an id" in got.error["message"]


def test_a_document_is_found_once_it_is_acknowledged(strict):
    strict.send("POST", "/documents", documents("new", text="Which words are these"))
    got = strict.send("POST", "/search", {"query": "Which words are these", "top_k": 5})
    assert "new" in [row["document_id"] for row in got.json["sources"]]
    strict.send("DELETE", "/documents/new")
    got = strict.send("POST", "/search", {"query": "Which words are these", "top_k": 5})
    assert "new" not in [row["document_id"] for row in got.json["sources"]]


def test_rejected_documents_are_listed(strict):
    rows = [{"id": "good", "text": "Good."}, {"id": "rome", "text": "x"}, {"text": " "}, {"id": "bad", "text": "x"}]
    rows[-1]["metadata"] = {"year": "not a number"}
    got = strict.send("POST", "/documents", {"documents": rows}).json
    assert got["documents"] == 1
    assert [row["row"] for row in got["rejected"]] == [1, 2, 3]
    reasons = [row["reason"] for row in got["rejected"]]
    assert "already" in reasons[0] and "empty" in reasons[1] and "int64" in reasons[2]
    assert got["ids"] == ["good", None, None, None]
    got = strict.send("PUT", "/documents", {"documents": [{"id": "blank", "text": " "}], "create": False})
    assert got.status == 422 and got.json["rejected"][0]["id"] == "blank"
    got = strict.send("POST", "/documents", documents("rome"))
    assert got.status == 422 and got.error["code"] == "rejected" and got.json["rejected"][0]["id"] == "rome"


@pytest.mark.parametrize(
    "document",
    [
        {"text": "x", "memory": [[0.0] * 32] * 4},
        {"text": "x", "metadata": {"memory": [[0.0] * 32] * 4}},
        {"text": "x", "metadata": {"document_id": "paris"}},
        {"text": "x", "metadata": {"_id": "paris"}},
        {"text": "x", "metadata": {"span": 1}},
        {"id": "", "text": "x"},
        {"id": 1, "text": "x"},
        {"id": "x"},
        {"id": "\ud800", "text": "x"},
        "text",
    ],
    ids=str,
)
def test_documents_that_are_none(service, document):
    assert service.send("POST", "/documents", {"documents": [document]}, key=KEY).status == 400
    assert len(service.engine.corpus) == 4


def test_ids_are_text(strict):
    """No id is a path, in the address or on the disk."""
    outside = strict.engine.corpus.folder.parent
    before = set(outside.iterdir())
    assert strict.send("POST", "/documents", documents(*IDS)).json["documents"] == len(IDS)
    for name in IDS:
        for path in (f"/documents/{quote(name, safe='')}", f"/documents?id={quote(name, safe='')}"):
            got = strict.send("GET", path)
            assert (got.status, got.json["document_id"]) == (200, name), path
            assert got.json["chunks"][0]["text"] == f"Text of {name}."
    assert strict.send("GET", "/documents/a/b").json["document_id"] == "a/b"
    for name in IDS:
        assert strict.send("DELETE", f"/documents?id={quote(name, safe='')}").status == 200
    assert len(strict.engine.corpus) == 4
    for path in ("..%2fcorpus.json", "/etc/passwd", "%00", "%ff", ""):
        got = strict.send("GET", f"/documents/{path}")
        assert got.status == 404 and got.error["code"] == "document_not_found", path
    assert set(outside.iterdir()) == before


def test_times_and_odd_values_are_json(http_model, tmp_path):
    rows = [{"id": "a", "text": "A text.", "day": datetime.date(2024, 5, 1), "weight": float("nan"), "tags": ["x"]}]
    rows[0]["at"] = datetime.datetime(2024, 5, 1, 12)
    corpus = CompressedCorpus.build(http_model, rows, tmp_path / "corpus")
    with Served(http_model, corpus) as served:
        expected = {"day": "2024-05-01", "weight": None, "tags": ["x"], "at": "2024-05-01T12:00:00"}
        assert served.send("GET", "/documents/a").json["metadata"] == expected
        metadata = {"day": "2025-01-02", "at": "2025-01-02T03:04:05", "weight": 1.5}
        got = served.send("POST", "/documents", {"documents": [{"id": "b", "text": "B.", "metadata": metadata}]})
        assert got.json["documents"] == 1, got.body
        got = served.send("POST", "/search", {"query": "A?", "where": {"day": "2025-01-02"}}).json["sources"]
        assert [row["metadata"] for row in got] == [{**metadata, "tags": None}]
    assert json_value({1: b"x", "inf": float("inf"), "t": (1, None)}) == {"1": "b'x'", "inf": None, "t": [1, None]}


def test_a_service_that_only_reads(http_model, http_corpus):
    with Served(http_model, http_corpus, read_only=True) as served:
        got = served.send("POST", "/documents", documents("new"))
        assert got.status == 403 and got.error["code"] == "read_only"
        assert served.send("GET", "/documents/rome").status == 200


@pytest.mark.parametrize(
    "number, status, code", [("EROFS", 403, "read_only"), ("EACCES", 403, "read_only"), ("ENOSPC", 507, "disk_full")]
)
def test_a_disk_that_takes_nothing_is_told_without_its_place(strict, monkeypatch, number, status, code):
    def fail(*_, **__):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), str(strict.engine.corpus.folder))

    with monkeypatch.context() as patch:
        patch.setattr("modeling_clara.corpus.changes.write_manifest", fail)
        for got in (strict.send("POST", "/documents", documents("new")), strict.send("DELETE", "/documents/rome")):
            assert got.status == status and got.error["code"] == code
            assert str(strict.engine.corpus.folder) not in got.body.decode()
    assert set(stored(strict)) == {"paris", "berlin", "seine/river", "rome"}
    assert strict.send("POST", "/documents", documents("new")).status == 200


def test_a_corpus_of_the_hub_is_not_changed(strict):
    strict.engine.corpus.repo_id = "someone/corpus"
    for method, path in (("POST", "/documents"), ("PUT", "/documents"), ("DELETE", "/documents/rome")):
        got = strict.send(method, path, documents("new"))
        assert got.status == 403 and got.error["code"] == "read_only"


def test_what_is_wrong_with_the_corpus_is_no_fault_of_a_client(strict):
    """It is not told where the corpus lies, and a folder that is gone is not made again."""
    folder = strict.engine.corpus.folder
    manifest, away = folder / "corpus.json", folder.with_name("away")
    kept = manifest.read_bytes()

    def changes() -> list:
        body = {"documents": [{"id": "oslo", "text": "Oslo is the capital of Norway."}]}
        return [strict.send("PUT", "/documents", body), strict.send("DELETE", "/documents/rome")]

    manifest.write_text("{")
    for got in changes():
        assert got.status == 500 and str(folder) not in got.error["message"]
    manifest.write_bytes(kept)
    folder.rename(away)
    assert [got.status for got in changes()] == [500, 500] and not folder.exists()
    away.rename(folder)
    assert [got.status for got in changes()] == [200, 200]


def test_another_writer_is_waited_for(strict):
    with corpus_lock(strict.engine.corpus.folder):
        got = strict.send("POST", "/documents", documents("new"))
        assert got.status == 503 and got.error["code"] == "locked" and got.headers["retry-after"] == "5"
        assert str(strict.engine.corpus.folder) not in got.body.decode()
    assert strict.send("POST", "/documents", documents("new")).status == 200


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(http_model, http_corpus, checkpoint):
    """kill -9 while documents are written, twenty times; each time what was acknowledged is there, and it verifies."""
    folder, expected = http_corpus.folder, {row["document_id"]: row["text"] for row in http_corpus.rows()}
    number = 0
    for kill in range(20):
        with Process(folder, checkpoint) as served:
            unknown: dict[str, str] = {}
            is_over = threading.Event()

            def write(url=served.url, unknown=unknown, is_over=is_over, kill=kill):
                nonlocal number
                while not is_over.is_set():
                    number += 1
                    name, text = f"doc-{number}", f"Document {number} of round {kill}."
                    unknown.clear()
                    unknown[name] = text
                    try:
                        got = send(url, "POST", "/documents", documents(name, text=text))
                    except OSError:
                        return
                    assert got.status == 200 and got.json["documents"] == 1
                    expected[name] = text

            writer = threading.Thread(target=write)
            writer.start()
            least = len(expected) + 1 + kill % 4
            wait_until(lambda least=least: len(expected) >= least, 120)
            served.process.send_signal(signal.SIGKILL)
            is_over.set()
            writer.join(60)
            assert not writer.is_alive()
        corpus = CompressedCorpus.open(folder)
        found = {row["document_id"]: row["text"] for row in corpus.rows()}
        for name, text in unknown.items():
            if found.get(name) == text:  # it was written, and the answer did not arrive
                expected.setdefault(name, text)
        assert found == expected
        assert not corpus.verify()
    assert json.loads((folder / "corpus.json").read_text(encoding="utf-8"))


def test_a_change_past_its_time_keeps_its_place(http_model, http_corpus):
    with Served(http_model, http_corpus, limits=Limits(writes=1, write_seconds=0.3)) as served:
        with http_model.lock:  # a change waits for the compressor
            assert served.send("POST", "/documents", documents("a")).status == 504
            assert served.send("POST", "/documents", documents("b")).status == 429
        wait_until(lambda: not served.engine.n_writes)
        assert served.send("GET", "/documents/a").status == 200
        assert served.send("POST", "/documents", documents("b")).status == 200


def test_what_another_process_changes_is_seen(http_model, http_corpus, monkeypatch, caplog):
    monkeypatch.setattr(app, "REFRESH_SECONDS", 0.05)
    with Served(http_model, http_corpus) as served:
        other = CompressedCorpus.open(http_corpus.folder)
        other.delete(["rome"])
        wait_until(lambda: served.send("GET", "/documents/rome").status == 404)
        content = (other.folder / "corpus.json").read_bytes()
        (other.folder / "corpus.json").write_bytes(b"{")
        wait_until(lambda: "refresh" in caplog.messages)
        assert served.send("POST", "/search", {"query": QUESTION}).status == 200  # by what is open
        (other.folder / "corpus.json").write_bytes(content)
        assert served.send("POST", "/documents", documents("new")).status == 200


def test_a_probe_may_ask_for_the_head(strict):
    for path in ("/health", "/health/ready", "/health/live"):
        got = strict.send("HEAD", path)
        assert (got.status, got.body) == (200, b"")
