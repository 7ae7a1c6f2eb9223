"""A card that was edited on the Hub since it was published stays, unless the one here was edited as well."""

import re
from collections.abc import Callable

from .build import Built
from .files import File

COMMIT = re.compile(r"\b[0-9a-f]{40}\b")


def kept_card(built: Built, repo_id: str, published: str, edited: str) -> Callable[[str | None], File] | None:
    """The edited card for any commit of the files, in the place of `Built.card`.

    Args:
        built: with the card that is here.
        repo_id: of the repo.
        published: the card as it was published last.
        edited: the card that the repo has now.

    Returns:
        None if the card here is not the published one any more: then it is what is meant.
    """
    from modeling_clara.checksums import insert_checksums, remove_checksums

    pins = [None, *dict.fromkeys(COMMIT.findall(remove_checksums(published)))]
    cards = {pin: built.card(repo_id, pin).content.decode() for pin in pins}
    same = [pin for pin, card in cards.items() if remove_checksums(card) == remove_checksums(published)]
    if not same:
        return None

    def card(pinned: str | None) -> File:
        text = edited.replace(same[-1], pinned) if same[-1] and pinned else edited
        return File(insert_checksums(text, built.folder).encode())

    return card
