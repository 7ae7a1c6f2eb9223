"""Scores -> results.json, whose schema is results.schema.json.

It knows nothing of how answers were made.
"""

import datetime
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.evaluation.questions import EvaluationData
from recipes.evaluation.scores import CONFIDENCE, Scores, quantiles, with_intervals
from recipes.evaluation.systems import COMPARING, Bench, System
from recipes.evaluation.tasks import Task
from recipes.evaluation.validation import SCHEMA_VERSION, check_results

RESULTS_FILE = "results.json"
PACKAGES = ("clara-rag", "torch", "transformers", "peft", "datasets", "evaluate", "bm25s")


def build_results(
    *,
    system: dict,
    data: EvaluationData,
    setting: str,
    tasks: Sequence[Task],
    rows: Sequence[Mapping],
    scores: Scores,
    options: dict,
    command: str,
    model: CLaRaForRAG | None = None,
    corpus: CompressedCorpus | None = None,
    comparisons: Sequence[dict] = (),
    latency: Sequence[Mapping[str, float]] = (),
    processes: int = 1,
    device: torch.device | None = None,
) -> dict:
    """The content of results.json.

    `rows` are those of predictions.jsonl, in the order of the tasks; `options` are what else decided the run, `seed`
    and `resamples` among them; `model` is None for predictions of another system, `corpus` unless one was searched.
    """
    failures = Counter(row["failure"].partition(":")[0][:60] for row in rows if row["failure"] is not None)
    content = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "system": system,
        "model": _describe_model(model),
        "corpus": None if corpus is None else _describe_corpus(corpus),
        "data": {
            **{name: getattr(data, name) for name in ("name", "sha256", "format", "half")},
            "questions": len(tasks),
            "file_questions": len(data.ids),
        },
        "setting": setting,
        "counts": {
            "questions": len(rows),
            "answered": sum(row["prediction"] is not None for row in rows),
            "abstained": sum(row["abstained"] for row in rows),
            "failed": failures.total(),
            "without_answers": sum(not task.question.answers for task in tasks),
            "without_gold": sum(not task.question.gold for task in tasks),
        },
        "failures": dict(failures),
        "metrics": with_intervals(scores, seed=options["seed"], resamples=options["resamples"]),
        "efficiency": {
            "bytes_per_span": _over_known(np.mean, rows, "span_bytes"),
            "tokens_read": _over_known(np.mean, rows, "n_tokens"),
            "latency_ms": quantiles(latency),
            "latency_questions": len(latency),
            "seconds": _over_known(np.sum, rows, "seconds"),
            "model_seconds": _over_known(np.sum, rows, "model_seconds"),
        },
        "comparisons": list(comparisons),
        "hardware": _describe_hardware(device, processes),
        "versions": _describe_versions(),
        "options": {**options, "confidence": CONFIDENCE},
    }
    problems = check_results(content)
    if problems:
        raise ValueError(f"the results do not fit their own schema, which is a bug: {problems[0]}.")
    return content


def check_rows(name: str, rows: Sequence[Mapping], scores: Scores) -> None:
    """Raise a ValueError if every question failed, or nothing could be scored."""
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


def _over_known(function, rows: Sequence[Mapping], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return float(function(values)) if values else None


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_system(name: str, system: System, bench: Bench, codec: str) -> dict:
    """The `system` of one of ours."""
    ranks = system.ranks and not bench.read_all
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


def _describe_model(model: CLaRaForRAG | None) -> dict:
    if model is None:
        return dict.fromkeys(("repo", "revision", "fingerprint", "backbone"))
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


def _describe_corpus(corpus: CompressedCorpus) -> dict:
    folder, on_hub = corpus.folder.name, corpus.repo_id is not None
    return {
        "repo": corpus.repo_id,
        "revision": folder if on_hub and len(folder) == 40 else None,
        "documents": len(corpus),
        "spans": corpus.manifest.n_spans,
    }


def _describe_hardware(device: torch.device | None, processes: int) -> dict:
    path, models = Path("/proc/cpuinfo"), []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    on_gpu = device is not None and device.type == "cuda"
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "processes": processes,
    }


def _describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
