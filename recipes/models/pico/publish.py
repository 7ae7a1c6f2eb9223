"""clara-pico as it is shipped: float16 weights, card, results and a small corpus, in model_cards/.

    python -m recipes.models.pico.publish runs/pico/joint

Every number of the card is measured on the rounded weights by `evaluate.py` beside it.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.benchmarks.codecs import measure_codecs
from recipes.evaluation.report import table
from recipes.models.pico.evaluate import SPLITS, evaluate
from recipes.models.pico.facts import FactSheets
from recipes.models.publishing import CARDS, lineage, read_curves, round_weights, write_folder

N_SHEETS = 200
FOUND = {"recall@1, 20 candidates": "recall@1", "recall@5": "recall@5", "MRR": "mrr"}
ANSWERED = {"answers, retrieved": "answers_retrieved", "answers, wrong sheet": "answers_wrong_memory"}

CARD = """---
library_name: transformers
license: apache-2.0
language: en
tags:
- clara
- soft-compression
- retrieval-augmented-generation
---

# clara-pico

A CLaRa model (arXiv 2511.18659) of {parameters:.2f}M parameters, its backbone included: a Llama of hidden size
{hidden} with {layers} layers and a tokenizer of its own, trained from scratch on generated English fact sheets about
people. It is an instrument, not a product: it tells in seconds whether compression, retrieval and answering still
work. It knows the words of its sheets and nothing else.

```python
# in a clone of the repository; a published folder loads by AutoModel with trust_remote_code=True
from modeling_clara import CLaRaForRAG

model = CLaRaForRAG.from_pretrained("model_cards/clara-pico")
documents = [
    {{"title": "Mira Talbot", "text": "Mira works as a baker. The home of Mira is in Oslo."}},
    {{"title": "Otto Garner", "text": "Otto is a pilot by trade. Otto has a home in Lima."}},
]
model.answer(["Where does Otto Garner live?"], documents=documents, top_k=1)
```

## Results

{questions} questions about people that training never showed, {candidates} candidate sheets each, written to and read
from memories of {sizes} vectors. The reasoner was trained by the language-modelling loss alone: no label ever said
which sheet is the right one. Measured by `recipes.models.pico.evaluate` (seed {seed}) on the weights in this folder.

{table}

Guessing gives {chance[answers]:.2f} for answers and {chance[recall@1]:.2f} for recall@1.

![F1 and recall@1 at both memory sizes](rate.png)

![Memories beside their documents](states.png)

What it does badly: saying a whole sheet back (`paraphrase`), and reading several sheets at once;
docs/experiments.md has numbers.

## Training

`make pico` makes it again from nothing: the sheets, the backbone, and the three stages with the files in
`recipes/models/pico/`. `training_log.json` has the curves.
"""


def results_table(results: dict, sizes: list[int]) -> str:
    """Markdown: one row a measure, one column a split."""
    splits = [results[split] for split in SPLITS]
    measures = {label: [split[key] for split in splits] for label, key in FOUND.items()}
    for size in sizes:
        given = [split["answers_gold_given"][str(size)] for split in splits]
        measures[f"answers, gold sheet given, k = {size}"] = given
    measures |= {label: [split[key] for split in splits] for label, key in ANSWERED.items()}
    return table(["", *SPLITS], [[label, *(f"{value:.3f}" for value in values)] for label, values in measures.items()])


def write_model(model: CLaRaForRAG, folder: Path, results: dict, curves: dict) -> None:
    """Checkpoint with backbone in float16, card, results, curves."""
    sizes, text_config = model.config.memory_sizes, model.config.text_config
    card = CARD.format(
        **results,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        hidden=text_config.hidden_size,
        layers=text_config.num_hidden_layers,
        sizes=" or ".join(map(str, sizes)),
        table=results_table(results, sizes),
    )
    model.config.backbone_name_or_path = "clara-pico"
    write_folder(model.half(), folder, card, curves, include_backbone=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_corpus(model: CLaRaForRAG, folder: Path) -> None:
    """A small compressed corpus of sheets about unseen people; its card says what the codecs cost."""
    sheets = FactSheets(78, test=True)
    found = sheets.of_different_people(N_SHEETS, sheets.sheet)
    documents = [document for document, _ in found]
    questions, answers = zip(*(sheets.question(*sheet) for sheet in found), strict=True)
    source = {"name": "generated fact sheets of clara-pico", "license": "apache-2.0", "language": "en"}
    shutil.rmtree(folder, ignore_errors=True)
    corpus = CompressedCorpus.build(model, documents, folder, batch_size=64, source=source)
    with tempfile.TemporaryDirectory() as temporary:
        exact = Path(temporary) / "float16"
        CompressedCorpus.build(model, documents, exact, codec="float16", batch_size=64)
        codecs = measure_codecs(model, exact, questions, [[answer] for answer in answers], top_k=1)
    data = "the same generator, one of every sheet"
    corpus.record_measurement({"data": data, "questions": len(questions), "codecs": codecs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the joint stage's run")
    parser.add_argument("--output", type=Path, default=CARDS, help="where clara-pico/ and clara-pico-corpus/ go")
    arguments = parser.parse_args()
    runs, _ = lineage(arguments.checkpoint)
    model = CLaRaForRAG.from_pretrained(arguments.checkpoint)
    round_weights(model, torch.float16, with_backbone=True)
    results = evaluate(model)
    write_model(model, arguments.output / "clara-pico", results, read_curves(runs))
    model = CLaRaForRAG.from_pretrained(arguments.output / "clara-pico")  # as everybody will load it
    write_corpus(model, arguments.output / "clara-pico-corpus")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
