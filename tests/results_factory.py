"""Makes results.json contents that are valid, and changes of them: for tests of the leaderboard and of the evaluation.
It stands beside the tests and imports nothing of the project.
It does not know the schema; tests/evaluation/test_validation.py holds it against the schema.
"""

import hashlib
from datetime import UTC, datetime, timedelta

DATA_FILES = {
    "musique": {"sha256": hashlib.sha256(b"musique").hexdigest(), "questions": 2417},
    "hotpotqa": {"sha256": hashlib.sha256(b"hotpotqa").hexdigest(), "questions": 7405},
}
HARDWARE = {"cpu": "Some CPU", "cores": 16, "memory_gib": 128.0, "accelerator": "NVIDIA H200", "processes": 1}


def metric(value: float, n: int = 2417, width: float = 0.02) -> dict:
    """A score in [0, 1] with its interval and the number of questions."""
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": n}


def _base() -> dict:
    system = {"name": "clara", "kind": "clara", "retriever": "clara", "reader": "memory", "codec": "int8", "url": None}
    system |= {"top_k": 5, "memory_size": 16, "retrieval_memory_size": 4, "max_new_tokens": 32}
    counts = {"questions": 2417, "answered": 2400, "abstained": 10, "failed": 7}
    scores = {"em": 0.3, "f1": 0.41, "containment": 0.45, "bag_containment": 0.47, "recall@5": 0.6, "recall@10": 0.7}
    scores |= {"hit@5": 0.8, "hit@10": 0.9, "ndcg@10": 0.5, "mrr": 0.55}
    parts = {"query": 3.0, "search": 1.0, "read": 20.0, "decode": 100.0, "total": 124.0}
    latency = {name: {"p50": value, "p95": 2 * value} for name, value in parts.items()}
    efficiency = {"bytes_per_span": 9216.0, "tokens_read": 130.5, "latency_ms": latency, "latency_questions": 100}
    comparison = {
        "system": "bm25-text",
        "metric": "f1",
        "difference": 0.05,
        "low": 0.01,
        "high": 0.09,
        "p_value": 0.01,
    }
    return {
        "schema_version": 1,
        "created": "2026-03-01T12:00:00+00:00",
        "command": "python -m recipes.evaluate --model loopback/clara --data musique.jsonl",
        "system": system,
        "model": {"repo": "loopback/clara", "revision": "a" * 40, "fingerprint": "b" * 64, "backbone": "SmolLM2-135M"},
        "corpus": {"repo": None, "revision": None, "documents": 1000, "spans": 1200},
        "data": {"name": "musique", "format": "multihop", **DATA_FILES["musique"]},
        "setting": "normal",
        "counts": {**counts, "without_answers": 0, "without_gold": 0},
        "failures": {"out of memory": 5, "no text": 2},
        "metrics": {name: metric(value) for name, value in scores.items()},
        "efficiency": {**efficiency, "seconds": 300.0, "model_seconds": 280.0},
        "comparisons": [{**comparison, "n": 2417}],
        "hardware": dict(HARDWARE),
        "versions": {"torch": "2.9.0", "clara": "0.1"},
        "options": {"seed": 0, "limit": None, "batch_size": 8, "confidence": 0.95, "resamples": 1000},
    }


def valid_results(**changes: object) -> dict:
    """A schema-valid results.json as a dict of its own, with changes.

    The name of a change is a path with `__` for each step, such as `system__name="mine"` or `counts__failed=3`.
    `metrics={"f1": 0.5, "recall@5": 0.7}` replaces all metrics; a number becomes a score with an interval.
    """
    results = _base()
    scores = changes.get("metrics")
    if isinstance(scores, dict):
        n = results["counts"]["questions"]
        changes["metrics"] = {k: metric(v, n) if isinstance(v, int | float) else v for k, v in scores.items()}
    for path, value in changes.items():
        *above, last = path.split("__")
        place = results
        for step in above:
            place = place[step]
        place[last] = value
    return results


LATE = (datetime.now(UTC) + timedelta(days=3)).isoformat()
PROBLEMS = [  # changes of valid results, and what is told of them
    ({"schema_version": 2}, "schema_version must be 1, got 2: made by a newer recipes.evaluate; update the leader"),
    ({"schema_version": 0}, "schema_version must be 1, got 0: made by an older"),
    ({"schema_version": True}, "schema_version must be 1, got True"),
    ({"more": 1}, "'more' was unexpected"),
    ({"setting": "best"}, "setting: 'best' is not one of"),
    ({"metrics__f1": {**metric(0.5), "value": 1.5, "high": 1}}, "metrics.f1.value: 1.5 is greater than"),
    ({"metrics__f1": {"value": 0.5, "low": 0.51, "high": 0.6, "n": 9}}, "metrics.f1: low <= value <= high"),
    ({"metrics": {}}, "metrics must have at least one"),
    ({"metrics__f1": metric(0.5, n=3)}, "metrics.f1.n must be all 2417 questions"),
    ({"metrics__mrr": metric(0.5, n=3)}, "metrics.mrr.n must be all 2417 questions"),
    ({"metrics": {"mrr": 0.1, "hit@1": 0.4}}, "metrics.hit@1 must be <= metrics.mrr"),
    ({"setting": "closed_book", "metrics": {"f1": 0.5, "mrr": 0.5}}, "metrics.mrr must be left out in the setting"),
    (
        {"metrics": {"f1": 0.5}, "counts__answered": 10, "counts__abstained": 2400},
        "metrics.f1 must be <= the share of",
    ),
    ({"metrics__f1": metric(0.5, n=2418)}, "metrics.f1.n must be <= counts.questions (2417), got 2418"),
    ({"metrics": {"em": 0.5, "f1": 0.4}}, "metrics.em must be <= metrics.f1 (0.4), got 0.5"),
    ({"metrics": {"em": 0.5, "containment": 0.4}}, "metrics.em must be <= metrics.containment"),
    ({"metrics": {"recall@5": 0.5, "recall@10": 0.4}}, "metrics.recall@5 must be <= metrics.recall@10 (0.4)"),
    ({"metrics": {"hit@9": 0.5, "hit@10": 0.4}}, "metrics.hit@9 must be <= metrics.hit@10 (0.4)"),
    ({"counts__answered": 1}, "answered + abstained + failed must be questions (2417), got 18"),
    ({"data__questions": 10}, "counts.questions must be data.questions (10), got 2417"),
    ({"failures": {}}, "failures: their sum must be counts.failed (7), got 0"),
    ({"counts__without_gold": 9999}, "counts.without_gold must be <= questions"),
    ({"efficiency__latency_ms__total": {"p50": 2.0, "p95": 1.0}}, "latency_ms.total: p50 must be <= p95"),
    ({"created": LATE}, "created must not lie in the future"),
    ({"created": "2026-01-01T00:00:00"}, "created: '2026-01-01T00:00:00' is not a 'date-time'"),
    ({"system__codec": None}, "system.codec must be given where system.kind is clara"),
    ({"system__memory_size": None}, "system.memory_size must be given"),
    ({"system__url": "javascript:alert(1)"}, "system.url: 'javascript:alert(1)' is not a 'uri'"),
    ({"options": {"a": [float("nan")]}}, "options.a.0: must be a finite number, got nan"),
    ({"metrics__f1__value": float("inf")}, "metrics.f1.value: must be a finite number, got inf"),
    ({"options": {"a": 10**400}}, "options.a: must be a finite number"),
    ({"system__name": "\ud800"}, "system.name: the text has half of a surrogate pair"),
]
PLACES = [  # what only the leaderboard asks for
    ({"data__name": "mine"}, "data.name must be one of data_files.json (hotpotqa, musique), got 'mine'"),
    ({"data__sha256": "0" * 64}, "data.sha256 must be that of musique"),
    ({"model__repo": None}, "model.repo must name the model on the Hub, got null"),
    ({"model__repo": "../../etc"}, "model.repo must be owner/name"),
    ({"model__revision": None}, "model.revision must be the commit of 40 hex digits, got null"),
    ({"model__revision": "a" * 40 + "\n"}, "model.revision must be the commit of 40 hex digits"),
    ({"system__kind": "external", "model__repo": None}, "Give system.url or publish the model"),
]


def limited(n: int = 10) -> dict:
    """Valid results of a part of the data."""
    done = {"questions": n, "answered": n, "abstained": 0, "failed": 0, "without_answers": 0, "without_gold": 0}
    return valid_results(data__questions=n, counts=done, failures={}, metrics={"f1": metric(0.4, n)})
