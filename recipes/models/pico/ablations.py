"""What the parts of the method are worth on clara-pico: `python -m recipes.models.pico.ablations VARIANT ...`.

Each variant is a short run of `train.py` with one thing changed. Without a variant's name it prints the curves of the
runs that are there.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from modeling_clara import retrieval_clara
from modeling_clara.cli.console import allow_any_console
from recipes import train
from recipes.evaluation.report import table

STEPS = {"pretrain": 800, "joint": 200}  # of a variant: enough to tell them apart
MEASURES = ("ce", "mse", "exact_match", "recall@1", "recall@5", "margin")

# name -> stage, overrides; `start` is the run that it begins from.
VARIANTS = {
    "joint": ("joint", "instruct", []),
    "joint-random-reasoner": ("joint", "instruct", ["reasoner_init=random"]),
    "joint-top3": ("joint", "instruct", ["retrieval_top_k=3"]),
    "joint-top3-mask-1e-8": ("joint", "instruct", ["retrieval_top_k=3"]),
    "pretrain": ("pretrain", "backbone", []),
    "pretrain-without-mse": ("pretrain", "backbone", ["alignment_weight=0.0"]),
    "joint-after-pretrain": ("joint", "ablations/pretrain", []),
    "joint-after-pretrain-without-mse": ("joint", "ablations/pretrain-without-mse", []),
}


def masked_with_1e_8(scores: torch.Tensor, top_k: int, temperature: float, candidate_mask: torch.Tensor | None = None):
    """The reference's way of leaving out taken documents: log(1e-8) is added to their scores / temperature.

    As `straight_through_topk`, but a document whose cosine leads by more than 18.4 * temperature is taken twice.
    """
    if candidate_mask is None:
        candidate_mask = torch.ones_like(scores, dtype=torch.bool)
    logits = (scores / temperature).masked_fill(~candidate_mask, -torch.inf)
    slots, selected, taken = [], [], torch.zeros_like(scores)
    for _ in range(top_k):
        soft = torch.softmax(logits + torch.log(1 - taken + 1e-8), dim=-1)
        selected.append(soft.argmax(-1))
        hard = torch.nn.functional.one_hot(selected[-1], scores.shape[1]).to(scores.dtype)
        slots.append(hard + soft - soft.detach())
        taken = (taken + hard).clamp(max=1)
    return torch.stack(slots, 1), torch.stack(selected, 1)


def run_variant(folder: Path, name: str) -> None:
    """Train one variant in this process."""
    stage, start, overrides = VARIANTS[name]
    steps = STEPS[stage]
    arguments = [
        *("--config", str(Path(__file__).parent / f"{stage}.yaml")),
        f"{'backbone' if stage == 'pretrain' else 'checkpoint'}={folder / start}",
        f"output_dir={folder / 'ablations' / name}",
        f"datasets=[{{path: {folder / 'data' / f'{stage}.jsonl'}}}]",
        f"eval_datasets=[{{path: {folder / 'data' / f'test_{stage}.jsonl'}}}]",
        f"max_steps={steps}",
        f"eval_steps={steps // 10}",
        "eval_on_start=true",
        "save_steps=200",
        *overrides,
    ]
    topk = masked_with_1e_8 if name.endswith("mask-1e-8") else retrieval_clara.straight_through_topk
    with (
        mock.patch.object(sys, "argv", ["train.py", *arguments]),
        mock.patch.object(retrieval_clara, "straight_through_topk", topk),
    ):
        train.train(*train.prepare())


def curve(run: Path) -> str:
    """A Markdown table of the evaluations of a run, a row a measure."""
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [entry for entry in history if "eval_loss" in entry]
    shown = [name for name in MEASURES if any(f"eval_{name}" in entry for entry in entries)]
    rows = [[name, *(f"{entry[f'eval_{name}']:.3f}" for entry in entries)] for name in shown]
    return table(["step", *(str(entry["step"]) for entry in entries)], rows)


def main() -> None:
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--run", type=Path, default=Path("runs/pico"), help="folder of recipes/models/pico/run.sh")
    arguments = parser.parse_args()
    unknown = set(arguments.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; choose from {list(VARIANTS)}")
    for name in arguments.variants:
        run_variant(arguments.run, name)
    for name in VARIANTS:
        run = arguments.run / "ablations" / name
        if (run / "trainer_state.json").exists():
            print(f"\n{name}\n\n{curve(run)}")


if __name__ == "__main__":
    main()
