"""Small folders of every kind that are built in code, and what the Hub has of a repo, for the tests of publishing."""

import json
import shutil
from pathlib import Path

import torch
from hub_repos import Repo
from safetensors.torch import save_file

from recipes.publishing.build import Built
from recipes.publishing.files import listing
from recipes.publishing.kinds import KINDS

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
CARD = '---\nlicense: mit\n---\n\n# a model\n\nload("ORG/NAME", revision="COMMIT")\n'


def write_model(folder: Path, seed: int = 0) -> Path:
    """What has the names of a checkpoint, with other contents for another seed; it cannot be loaded."""
    (folder / "compressor").mkdir(parents=True, exist_ok=True)
    tensors = {"x": torch.arange(40.0) + seed}
    for name in ("clara.safetensors", "compressor/adapter_model.safetensors"):
        save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "clara", "seed": seed}))
    (folder / f"seed_{seed}.json").write_text("{}")
    (folder / "README.md").write_text(CARD + f"\nSeed {seed}.\n")
    return folder


def as_built(folder: Path, kind: str = "model") -> Built:
    """A folder as if `building` had checked and loaded it."""
    files = {name: file for name, file in listing(folder).items() if name != "README.md"}
    cards = folder.with_name(f"{folder.name}-cards")
    shutil.rmtree(cards, ignore_errors=True)
    return Built(KINDS[kind], folder, files, {}, False, cards)


def contents(repo: Repo, revision: str = "main") -> dict[str, bytes]:
    """Name -> content of every file of a revision but the Hub's own."""
    files = repo.commits[repo.resolve(revision)]
    found = {name: repo.blobs[file.get("lfs", file)["oid"]] for name, file in files.items()}
    found.pop(".gitattributes")
    return found
