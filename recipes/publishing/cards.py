"""Cards as they are published: rendered from templates and measured numbers, with real ids, commits and checksums.

A README.md that is there is kept; only its placeholders and its list of checksums change.
"""

import re
from pathlib import Path

from modeling_clara.checksums import insert_checksums

CARD_FILE = "README.md"
REPO, COMMIT = "ORG/NAME", "COMMIT"  # placeholders


def published_card(folder: Path, repo_id: str | None, revision: str | None) -> str:
    """The card of a built folder as it is published.

    Args:
        folder: as built, with its README.md.
        repo_id: put in the place of `ORG/NAME`; None leaves it.
        revision: commit of the files, put in the place of `COMMIT`; None leaves it.

    Raises:
        FileNotFoundError: the folder has no README.md.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be the card, found none. Write one, with its licence.")
    card = path.read_text(encoding="utf-8")
    for placeholder, value in ((REPO, repo_id), (COMMIT, revision)):
        if value is not None:
            card = re.sub(rf"\b{placeholder}\b", value, card)
    return insert_checksums(card, Path(folder))
