"""clara-smollm2-135m as it is shipped: `python -m recipes.models.smollm2_135m.publish RUN FOLDER [--text-run RUN]`.

RUN is the last run of a chain, which its run.json tells. With a run of a generator that reads text alone the published
generator has a share of it. FOLDER gets the checkpoint with bfloat16 adapters and without the backbone, the log of all
runs, and a card to which `update_card.py` adds the results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.cli.console import allow_any_console
from modeling_clara.smollm2 import HUB_ID
from recipes.publishing.cards import write_card
from recipes.publishing.runs import round_weights, training_log, write_folder
from recipes.training.preparation import initialise_reasoner, is_untrained

CARD = Path(__file__).with_name("card.yaml")
TEXT_SHARE = 0.15  # docs/experiments.md, "A share of the reader of text"


@torch.no_grad()
def mix_generators(model: CLaRaForRAG, other: CLaRaForRAG, share: float) -> None:
    """Give the generator (1 - share) of its update of the backbone and `share` of another model's, in its own rank.

    A rank holds no sum of two updates: the largest singular values stay, as in `add_weighted_adapter` of PEFT with
    "svd". Weights are float32.
    """
    for layer, others in zip(model.roles.layers, other.roles.layers, strict=True):
        update = layer.get_delta_weight("generator").lerp(others.get_delta_weight("generator"), share)
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        rank = layer.r["generator"]
        root = (values[:rank] / layer.scaling["generator"]).sqrt()
        layer.lora_A["generator"].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B["generator"].weight.copy_(left[:, :rank] * root)


def write(run: Path, folder: Path, backbone: str | None, text_run: Path | None = None) -> None:
    """Write the checkpoint of finished runs into a folder that has none."""
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} has a checkpoint already. Remove it, or name another folder.")
    options = {"backbone": backbone, "dtype": torch.float32}
    log, model = training_log(run), CLaRaForRAG.from_pretrained(run, **options)
    if text_run is not None:
        log |= training_log(text_run)
        mix_generators(model, CLaRaForRAG.from_pretrained(text_run, **options), TEXT_SHARE)
    if is_untrained(model, "reasoner"):
        initialise_reasoner(model, "compressor")
    round_weights(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.config.backbone_name_or_path = HUB_ID
    write_folder(model, folder, log)
    write_card(folder, CARD)


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the last run, such as runs/smollm2/finding")
    parser.add_argument("folder", type=Path, help="of the checkpoint; new")
    parser.add_argument("--text-run", type=Path, help="folder of the run that reads text, runs/smollm2/text_reader")
    parser.add_argument("--backbone", help="where the backbone is (default: where the run had it)")
    arguments = parser.parse_args(argv)
    try:
        write(arguments.run, arguments.folder, arguments.backbone, arguments.text_run)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
