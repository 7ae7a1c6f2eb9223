"""What publishing a checkpoint from its training runs needs: rounded weights, linked code, curves.

Stands between the folders of training runs and a folder of `model_cards/`. It knows nothing of cards' words.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.backbone_clara import backbone_digests

CARDS = Path(__file__).parent.parent / "model_cards"
DROPPED = {"grad_norm", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second"}


def round_weights(model: CLaRaForRAG, dtype: torch.dtype, *, with_backbone: bool = False) -> None:
    """Round the adapters to what `dtype` can hold, so that results are those of the file that is shipped.

    Args:
        model: changed in place; the dtype of its parameters stays.
        dtype: of the shipped file.
        with_backbone: round the special rows and the backbone as well, for a checkpoint that includes it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if with_backbone or ".lora_" in name:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    model._stored = None  # what was loaded is not what is meant any more
    if with_backbone:
        model.config.backbone_digests = backbone_digests(model.backbone)


def link_code(folder: Path) -> None:
    """Inside this repository the code of a checkpoint is links to the package's files, so that there is one copy."""
    package = CARDS.parent / "modeling_clara"
    if folder.resolve().is_relative_to(CARDS.resolve()):
        for path in folder.glob("*_clara.py"):
            path.unlink()
            path.symlink_to(os.path.relpath(package / path.name, folder.resolve()))


def read_curves(runs: Sequence[Path], every: int = 100) -> dict[str, list[dict]]:
    """Folder name of a run -> its log entries, every `every`-th step, the last, and all evaluations.

    Raises:
        FileNotFoundError: a run has no trainer_state.json.
    """
    curves = {}
    for run in runs:
        history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        kept = [e for e in history if "eval_loss" in e or e["step"] % every == 0 or e is history[-1]]
        curves[run.name] = [
            {
                name: round(value, 5)
                for name, value in entry.items()
                if name not in DROPPED and not name.startswith("grad")
            }
            for entry in kept
        ]
    return curves
