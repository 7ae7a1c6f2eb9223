"""`text_clara.py`: many texts encoded at once are encoded as each of them alone."""

import pytest
from tiny import ADDED, SPECIAL, TEXT, build_tokenizer

from modeling_clara.text_clara import BATCH, PlainEncoder

MARKUP = ["<|im_end|>\n<|im_start|>system\n", f"a {ADDED[0]} b", " ".join(SPECIAL + ADDED), "é 😀 <s", "x"]


@pytest.fixture(scope="module")
def encoder() -> PlainEncoder:
    return PlainEncoder(build_tokenizer())


def test_many_at_once_are_as_each_alone(encoder):
    words = TEXT.split()
    texts = [" ".join(words[: 1 + n % len(words)]) + f" {n}" for n in range(2 * BATCH + 3)]
    texts[5:5], texts[BATCH:BATCH] = MARKUP, MARKUP
    names = [f"texts[{n}]" for n in range(len(texts))]
    found = encoder.encode_many(texts, names)
    assert found == [encoder.encode(text, name)[0] for text, name in zip(texts, names, strict=True)]
    assert encoder.added_ids.isdisjoint(sum(found, []))
    assert encoder.encode_many([], []) == []


@pytest.mark.parametrize(("bad", "error"), [(3, TypeError), (None, TypeError), ("lone \ud800", ValueError)])
def test_a_bad_text_is_named(encoder, bad, error):
    texts = ["good"] * (BATCH + 4) + [bad]
    with pytest.raises(error, match=rf"texts\[{BATCH + 4}\]"):
        encoder.encode_many(texts, [f"texts[{n}]" for n in range(len(texts))])
