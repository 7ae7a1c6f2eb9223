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
from recipes.models.pico.evaluate import evaluate
from recipes.models.pico.facts import FactSheets
from recipes.publishing.cards import write_card
from recipes.publishing.runs import CARDS, round_weights, training_log, write_folder

N_SHEETS = 200
CARD = Path(__file__).with_name("card.yaml")


def write_model(model: CLaRaForRAG, folder: Path, results: dict, log: dict) -> None:
    """Checkpoint with backbone in float16, results, log, and the card that shows them."""
    model.config.backbone_name_or_path = "clara-pico"
    write_folder(model.half(), folder, log, include_backbone=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_card(folder, CARD)


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
    log = training_log(arguments.checkpoint)
    model = CLaRaForRAG.from_pretrained(arguments.checkpoint)
    round_weights(model, torch.float16, with_backbone=True)
    results = evaluate(model)
    write_model(model, arguments.output / "clara-pico", results, log)
    model = CLaRaForRAG.from_pretrained(arguments.output / "clara-pico")  # as everybody will load it
    write_corpus(model, arguments.output / "clara-pico-corpus")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
