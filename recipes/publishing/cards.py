"""Cards as they are published: rendered from templates and measured numbers, with real ids, commits and checksums.

    python -m recipes.publishing.cards FOLDER CARD.yaml

FOLDER is a checkpoint, or the Parquet or JSON Lines files of a data set. CARD.yaml has the fields of the template that
no file can tell, such as limits and licences; its texts may name what the folder tells. The evaluation section of an
earlier card and what follows it stay, and so do its results.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCardData, ModelCard, ModelCardData

from modeling_clara.checksums import insert_checksums, remove_checksums
from modeling_clara.cli.console import allow_any_console
from modeling_clara.storage_clara import replacing
from recipes.evaluation.report import BEGIN, compression_section
from recipes.publishing.facts import data_facts, model_facts
from recipes.publishing.fields import read_fields, render

CARD_FILE = "README.md"
REPO, COMMIT = "ORG/NAME", "COMMIT"  # placeholders
MODEL_TAGS = ["clara", "soft-compression", "retrieval-augmented-generation"]


def published_card(folder: Path, repo_id: str | None, revision: str | None) -> str:
    """The card of a built folder as it is published.

    A README.md is kept: only placeholders and the list of checksums change.

    Args:
        folder: as built, with its README.md.
        repo_id: put in the place of `ORG/NAME`; None leaves it.
        revision: commit of the files, put in the place of `COMMIT`; None leaves it.

    Raises:
        FileNotFoundError: the folder has no README.md.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be the card, found none. Write one, or see `recipes.publishing.cards`.")
    card = path.read_text(encoding="utf-8")
    for placeholder, value in ((REPO, repo_id), (COMMIT, revision)):
        if value is not None:
            card = re.sub(rf"\b{placeholder}\b", value, card)
    return insert_checksums(card, Path(folder))


def model_card(folder: Path, source: Path) -> str:
    """The card of a checkpoint.

    Args:
        folder: of the checkpoint, with what `facts.model_facts` reads.
        source: CARD.yaml with the fields name, metadata (license at least), description, example (documents,
            question), training, limits and licences; use, results and data (name of a data file -> what it holds) are
            optional.

    Raises:
        ValueError: a field is missing or wrong; it is named.
    """
    path, facts = Path(folder) / CARD_FILE, model_facts(Path(folder))
    earlier = ModelCard(path.read_text(encoding="utf-8")) if path.exists() else ModelCard("---\n---\n")
    fields, metadata = read_fields(source, "model.md", facts), {"library_name": "transformers"}
    config, entries = facts["config"], earlier.data.get("eval_results") or []
    if config.get("backbone_revision"):
        metadata |= {"base_model": config["backbone_name_or_path"], "base_model_relation": "adapter"}
    metadata |= fields["metadata"]
    tags = [*MODEL_TAGS, *metadata.pop("tags", [])]
    results = {"model_name": earlier.data.model_name or fields["name"], "eval_results": entries} if entries else {}
    data = ModelCardData(**metadata, tags=tags, **results)
    known = fields.get("data", {})
    runs = [{**run, "data": "; ".join(known.get(name, name) for name in run["data"])} for run in facts["runs"]]
    fields |= {"card_data": data.to_yaml(), "runs": runs, "compression": compression_section(config, entries)}
    _, mark, rest = remove_checksums(earlier.text).partition(BEGIN)
    return render("model.md", fields) + (f"\n{mark}{rest}" if mark else "")


def data_card(folder: Path, source: Path | None, name: str = "") -> str:
    """The card of a data set.

    Args:
        folder: of Parquet and JSON Lines files; a name such as train-00000-of-00002.parquet is of the split train.
        source: CARD.yaml with the fields name, metadata (license at least), description, source and licences;
            columns (name -> what it holds) is optional. None for a card of the files alone.
        name: of the data set, without CARD.yaml.

    Raises:
        ValueError: a field is missing or wrong, or what `data_facts` raises; field or file is named.
    """
    facts = data_facts(Path(folder))
    fields = {"name": name, "description": "", "source": "Not stated.", "licences": "Not stated."}
    metadata = {"pretty_name": name}
    if source is not None:
        fields = read_fields(source, "data.md", facts)
        metadata = fields["metadata"]
    configs = [
        {"config_name": name, "data_files": [{"split": split["name"], "path": split["files"]} for split in splits]}
        for name, splits in facts["configs"].items()
    ]
    data = DatasetCardData(**metadata, size_categories=[facts["size"]], configs=configs)
    return render("data.md", {**facts, **fields, "card_data": data.to_yaml()})


def write_card(folder: Path, source: Path) -> Path:
    """Render the card of a folder and write it; its path."""
    folder = Path(folder)
    card = (model_card if (folder / "config.json").exists() else data_card)(folder, source)
    with replacing(folder / CARD_FILE) as partial:
        partial.write_text(card, encoding="utf-8")
    return folder / CARD_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Write; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a checkpoint or of data")
    parser.add_argument("card", type=Path, help="the fields of the template, such as recipes/models/pico/card.yaml")
    arguments = parser.parse_args(argv)
    try:
        print(f"Written: {write_card(arguments.folder, arguments.card)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
