"""What publishing a checkpoint from its training runs needs: the chain of runs, rounded weights, its log, the folder.

A published folder has no code: `upload.py` adds it.
"""

import itertools
import json
from collections.abc import Collection
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.backbone_clara import backbone_digests

CARDS = Path(__file__).parents[2] / "model_cards"
# names of log entries that are dropped, by prefix
DROPPED = ("grad", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second")
LOG_FILE = "training_log.json"


def describe(run: Path) -> dict:
    """The run.json of a training run."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def lineage(run: Path) -> tuple[list[Path], Path | None]:
    """The runs that a finished run stands on, the first one first, and the checkpoint that the first started from.

    The checkpoint is None if it had fresh adapters. A run names its `checkpoint` as a path from where it was started;
    one that is not there any more is looked for beside the run that started from it. A `FileNotFoundError` if the run
    is not finished.
    """
    if not (run / "config.json").exists():
        raise FileNotFoundError(f"{run} must be a finished run, but has no config.json. Train it to its end first.")
    found = [run]
    while (start := describe(found[0])["model"]["checkpoint"]) is not None:
        places = (Path(start), found[0].parent / Path(start).name)
        known = [place for place in places if (place / "run.json").exists() and place not in found]
        if not known:
            return found, next((place for place in places if place.exists()), Path(start))
        found.insert(0, known[0])
    return found, None


def round_weights(model: CLaRaForRAG, dtype: torch.dtype, *, with_backbone: bool = False) -> None:
    """Round the adapters, in place, to what `dtype` can hold, so that results are those of the file that is shipped.

    `with_backbone` rounds memory-token embeddings and backbone too, for a checkpoint that includes it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if with_backbone or ".lora_" in name:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    model._stored = None  # what was loaded is not what is meant any more
    if with_backbone:
        model.config.backbone_digests = backbone_digests(model.backbone)


def training_log(run: Path, every: int = 100) -> dict[str, dict]:
    """What training_log.json has of a finished run and of those that it stands on, the first one first.

    Runs of a published checkpoint that the first one started from come before, with a number if their name is taken.

    Returns:
        Folder name of a run -> `data`, names of the files that it read; `device`; `log`, its log entries: every
        `every`-th step, the last, and all evaluations.
    """
    runs, start = lineage(run)
    found = {run.name: read_run(run, every) for run in runs}
    return (_published_log(start, found) if start else {}) | found


def read_run(run: Path, every: int = 100) -> dict:
    """The entry of one run in `training_log`."""
    facts, state = describe(run), json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    history = state["log_history"]
    kept = [e for e in history if "eval_loss" in e or e["step"] % every == 0 or e is history[-1]]
    return {
        "data": [Path(dataset["path"]).stem for dataset in facts["data"]["datasets"]],
        "device": "a CPU" if facts["training"]["use_cpu"] else "a GPU",
        "log": [
            {name: round(value, 5) for name, value in entry.items() if not name.startswith(DROPPED)} for entry in kept
        ],
    }


def _published_log(start: Path, taken: Collection[str]) -> dict[str, dict]:
    found, log = {start.name: {"data": [f"the data of {start.name}"], "device": "", "log": []}}, {}
    if (start / LOG_FILE).exists():
        found = json.loads((start / LOG_FILE).read_text(encoding="utf-8"))
    for name, run in found.items():
        free = (f"{name}-{number}" for number in itertools.count(1))
        log[next(other for other in free if other not in found) if name in taken else name] = run
    return log


def write_folder(model: CLaRaForRAG, folder: Path, log: dict, *, include_backbone: bool = False) -> None:
    """The checkpoint with its log, without code and with the card that it had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_FILE).write_text(json.dumps(log) + "\n", encoding="utf-8")
    model.save_pretrained(folder, include_backbone=include_backbone or None)
    for path in folder.glob("*_clara.py"):
        path.unlink()
