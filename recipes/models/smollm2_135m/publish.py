"""clara-smollm2-135m as it is shipped: `python -m recipes.models.smollm2_135m.publish RUN FOLDER [--backbone PATH]`.

RUN is the last run of a chain, which its run.json tells. FOLDER gets the checkpoint with bfloat16 adapters and without
the backbone, the log of all runs, and a card to which `update_card.py` adds the results.
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


def write(run: Path, folder: Path, backbone: str | None) -> None:
    """Write the checkpoint of a finished run into a folder that has none."""
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} has a checkpoint already. Remove it, or name another folder.")
    log, model = training_log(run), CLaRaForRAG.from_pretrained(run, backbone=backbone, dtype=torch.float32)
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
    parser.add_argument("--backbone", help="where the backbone is (default: where the run had it)")
    arguments = parser.parse_args(argv)
    try:
        write(arguments.run, arguments.folder, arguments.backbone)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
