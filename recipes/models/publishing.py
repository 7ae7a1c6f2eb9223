"""What publishing a checkpoint from its training runs needs: the chain of runs, rounded weights, curves, the folder.

A published folder has no code: `upload.py` adds it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.backbone_clara import backbone_digests

CARDS = Path(__file__).parents[2] / "model_cards"
# names of log entries that are dropped, by prefix
DROPPED = ("grad", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second")
CURVES_FILE = "training_log.json"


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


def read_curves(runs: Sequence[Path], every: int = 100) -> dict[str, list[dict]]:
    """Folder name of a run -> its log entries, every `every`-th step, the last, and all evaluations."""
    curves = {}
    for run in runs:
        history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        kept = [e for e in history if "eval_loss" in e or e["step"] % every == 0 or e is history[-1]]
        curves[run.name] = [
            {name: round(value, 5) for name, value in entry.items() if not name.startswith(DROPPED)} for entry in kept
        ]
    return curves


def write_folder(model: CLaRaForRAG, folder: Path, card: str, curves: dict, *, include_backbone: bool = False) -> None:
    """The checkpoint with its card and curves, without code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / CURVES_FILE).write_text(json.dumps(curves) + "\n", encoding="utf-8")
    model.save_pretrained(folder, include_backbone=include_backbone or None)
    for path in folder.glob("*_clara.py"):
        path.unlink()
