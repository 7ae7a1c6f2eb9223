"""Scores -> results.json, whose schema is results.schema.json.

Stands between the scores and everything that shows them. It knows nothing of how answers were made.
"""

import datetime
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.storage_clara import write_json
from recipes.evaluation.questions import EvaluationData
from recipes.evaluation.scores import CONFIDENCE, Scores, quantiles, with_intervals
from recipes.evaluation.systems import COMPARING, RANKING, Bench, System
from recipes.evaluation.tasks import Task
from recipes.evaluation.validation import SCHEMA_VERSION, check_results

RESULTS_FILE = "results.json"
PACKAGES = ("clara-rag", "torch", "transformers", "peft", "datasets", "evaluate", "bm25s")


def build_results(
    *,
    system: dict,
    model: dict,
    corpus: dict | None,
    data: EvaluationData,
    setting: str,
    tasks: Sequence[Task],
    rows: Sequence[Mapping],
    scores: Scores,
    comparisons: list[dict],
    latency: list[dict[str, float]],
    options: dict,
    command: str,
    processes: int = 1,
    device: torch.device | None = None,
) -> dict:
    """The content of results.json.

    Args:
        system: as `describe_system` or `describe_external` gives it.
        model: as `describe_model` gives it.
        corpus: as `describe_corpus` gives it; None if none was searched.
        data: that was asked.
        setting: of the run.
        tasks: of the run.
        rows: of predictions.jsonl, in the order of the tasks.
        scores: of `score_questions`.
        comparisons: of `compare`.
        latency: of `measure_latency`.
        options: what else decided the run; `seed` and `resamples` among them.
        command: that was given.
        processes: that shared the work.
        device: of the model.

    Raises:
        ValueError: every question failed, or nothing could be scored.
    """
    check_rows(system["name"], rows, scores)
    return _checked(
        {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "system": system,
            "model": model,
            "corpus": corpus,
            "data": _describe_data(data, len(tasks)),
            "setting": setting,
            **_count(tasks, rows),
            "metrics": with_intervals(scores, seed=options["seed"], resamples=options["resamples"]),
            "efficiency": _measure(rows, latency),
            "comparisons": comparisons,
            "hardware": describe_hardware(device, processes),
            "versions": describe_versions(),
            "options": {**options, "confidence": CONFIDENCE},
        }
    )


def _checked(content: dict) -> dict:
    problems = check_results(content)
    if problems:
        raise ValueError(f"the results do not fit their own schema, which is a bug: {problems[0]}.")
    return content


def _describe_data(data: EvaluationData, n_asked: int) -> dict:
    known = {name: getattr(data, name) for name in ("name", "sha256", "format", "half")}
    return {**known, "questions": n_asked, "file_questions": len(data.ids)}


def _count(tasks: Sequence[Task], rows: Sequence[Mapping]) -> dict:
    """`counts` and `failures`."""
    failures = Counter(row["failure"].partition(":")[0][:60] for row in rows if row["failure"] is not None)
    counts = {
        "questions": len(rows),
        "answered": sum(row["prediction"] is not None for row in rows),
        "abstained": sum(row["abstained"] for row in rows),
        "failed": failures.total(),
        "without_answers": sum(not task.question.answers for task in tasks),
        "without_gold": sum(not task.question.gold for task in tasks),
    }
    return {"counts": counts, "failures": dict(failures)}


def _measure(rows: Sequence[Mapping], latency: list[dict[str, float]]) -> dict:
    """`efficiency`."""
    return {
        "bytes_per_span": _mean(row["span_bytes"] for row in rows),
        "tokens_read": _mean(row["n_tokens"] for row in rows),
        "latency_ms": quantiles(latency),
        "latency_questions": len(latency),
        "seconds": _sum(row["seconds"] for row in rows),
        "model_seconds": _sum(row["model_seconds"] for row in rows),
    }


def check_rows(name: str, rows: Sequence[Mapping], scores: Scores) -> None:
    """Raise a ValueError where every question failed, or nothing could be scored."""
    if all(row["failure"] is not None for row in rows):
        raise ValueError(
            f"all {len(rows)} questions failed with {name}, the first ({rows[0]['id']}): "
            f"{rows[0]['failure'].rstrip('.')}. "
            "Correct the cause, remove the output folder and run again."
        )
    if not scores:
        raise ValueError(
            f"nothing of {name} could be scored: no question has gold answers, and none has gold documents that it "
            "could retrieve. Use another setting or data."
        )


def write_results(folder: Path, content: dict) -> Path:
    """Write results.json; its path."""
    write_json(folder / RESULTS_FILE, content)
    return folder / RESULTS_FILE


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def _sum(values) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.sum(values)) if values else None


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_system(name: str, system: System, bench: Bench, codec: str) -> dict:
    """The `system` of one of ours."""
    ranks = system.retriever in RANKING and not bench.read_all
    compares, reads = ranks and system.retriever in COMPARING, system.reads_memory
    return {
        "name": name.replace("_", "-"),
        "kind": system.kind,
        "retriever": system.retriever if ranks else None,
        "reader": system.reader,
        "top_k": bench.top_k if system.retriever and not bench.read_all else None,
        "memory_size": bench.memory_size if reads else None,
        "retrieval_memory_size": bench.retrieval_memory_size if compares else None,
        "codec": codec if compares or reads else None,
        "max_new_tokens": bench.max_new_tokens,
        "url": None,
    }


def describe_external(name: str, url: str | None) -> dict:
    """The `system` of predictions that were brought."""
    fields = ("retriever", "reader", "top_k", "memory_size", "retrieval_memory_size", "codec", "max_new_tokens")
    return {"name": name, "kind": "external", **dict.fromkeys(fields), "url": url}


def describe_model(model: CLaRaForRAG | None) -> dict:
    """Where a model is on the Hub; nulls where it is not there."""
    if model is None:
        return {"repo": None, "revision": None, "fingerprint": None, "backbone": None}
    name = model.name_or_path
    is_local = not name or os.path.exists(name)
    return {
        "repo": None if is_local else name,
        "revision": None if is_local else model.commit,
        "fingerprint": model.fingerprint,
        "backbone": public_name(model.config.backbone_name_or_path),
    }


def public_name(name: str | None) -> str | None:
    """A Hub id as it is, of a folder its last part: paths of somebody's machine tell others nothing."""
    return Path(name).name if name and os.path.exists(name) else name


def describe_corpus(corpus) -> dict:
    """The `corpus` of a `CompressedCorpus`."""
    on_hub = corpus.repo_id is not None
    return {
        "repo": corpus.repo_id,
        "revision": corpus.folder.name if on_hub and len(corpus.folder.name) == 40 else None,
        "documents": len(corpus),
        "spans": corpus.manifest.n_spans,
    }


def describe_hardware(device: torch.device | None, processes: int) -> dict:
    """This machine."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "processes": processes,
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of Python and of what takes part."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
