"""Cards: rendered from templates and measured numbers, published with real ids, commits and checksums."""

import pytest

from modeling_clara.checksums import compare_checksums, read_checksums
from recipes.publishing.cards import published_card

CARD = '---\nlicense: mit\n---\n\nload("ORG/NAME", revision="COMMIT") of https://huggingface.co/ORG/NAME, COMMITTED\n'


def test_a_published_card_has_ids_commit_and_checksums(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "code.py").write_text("x = 1\n")
    card = published_card(tmp_path, "me/model", "0" * 40)
    filled = CARD.replace("ORG/NAME", "me/model").replace('"COMMIT"', f'"{"0" * 40}"')
    assert card.startswith(filled) and read_checksums(card) and not compare_checksums(card, tmp_path)
    assert published_card(tmp_path, None, None).startswith(CARD)
    (tmp_path / "README.md").write_text(card)
    assert published_card(tmp_path, "other/model", None) == card  # no placeholder is left


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"README.md must be the card"):
        published_card(tmp_path, "me/model", None)
