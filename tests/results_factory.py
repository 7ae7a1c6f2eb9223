"""Makes results.json contents that are valid, and changes of them: for tests of the leaderboard and of the evaluation.
It stands beside the tests and imports nothing of the project.
It does not know the schema; tests/test_leaderboard.py holds it against recipes/leaderboard/results.schema.json.
"""

import copy
import hashlib

DATA_FILES = {
    "musique": {"sha256": hashlib.sha256(b"musique").hexdigest(), "questions": 2417},
    "hotpotqa": {"sha256": hashlib.sha256(b"hotpotqa").hexdigest(), "questions": 7405},
}
METRICS = {"em": 0.3, "f1": 0.41, "containment": 0.45, "bag_containment": 0.47, "recall@5": 0.6, "recall@10": 0.7}
METRICS |= {"hit@5": 0.8, "hit@10": 0.9, "ndcg@10": 0.5, "mrr": 0.55}


def metric(value: float, n: int = 2417, width: float = 0.02) -> dict:
    """A score in [0, 1] with its interval and the number of questions."""
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": n}


def _base() -> dict:
    scores = {name: metric(value) for name, value in METRICS.items()}
    parts = {"query": 3.0, "search": 1.0, "read": 20.0, "decode": 100.0, "total": 124.0}
    return {
        "schema_version": 1,
        "created": "2026-03-01T12:00:00+00:00",
        "command": "python recipes/evaluate.py --model loopback/clara --data musique.jsonl",
        "system": {
            "name": "clara",
            "kind": "clara",
            "retriever": "clara",
            "reader": "memory",
            "top_k": 5,
            "memory_size": 16,
            "retrieval_memory_size": 4,
            "codec": "int8",
            "max_new_tokens": 32,
            "url": None,
        },
        "model": {"repo": "loopback/clara", "revision": "a" * 40, "fingerprint": "b" * 64, "backbone": "SmolLM2-135M"},
        "corpus": {"repo": None, "revision": None, "documents": 1000, "spans": 1200},
        "data": {"name": "musique", "format": "multihop", **copy.deepcopy(DATA_FILES["musique"])},
        "setting": "normal",
        "counts": {
            "questions": 2417,
            "answered": 2400,
            "abstained": 10,
            "failed": 7,
            "without_answers": 0,
            "without_gold": 0,
        },
        "failures": {"out of memory": 5, "no text": 2},
        "metrics": scores,
        "efficiency": {
            "bytes_per_span": 9216.0,
            "tokens_read": 130.5,
            "latency_ms": {name: {"p50": value, "p95": 2 * value} for name, value in parts.items()},
            "latency_questions": 100,
            "seconds": 300.0,
            "model_seconds": 280.0,
        },
        "comparisons": [
            {
                "system": "bm25-text",
                "metric": "f1",
                "difference": 0.05,
                "low": 0.01,
                "high": 0.09,
                "p_value": 0.01,
                "n": 2417,
            }
        ],
        "hardware": {
            "cpu": "Some CPU",
            "cores": 16,
            "memory_gib": 128.0,
            "accelerator": "NVIDIA H200",
            "processes": 1,
        },
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
