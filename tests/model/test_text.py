"""`text_clara.py`: many texts encoded at once are encoded as each of them alone."""

import copy

import pytest
from tiny import ADDED, SPECIAL, TEXT, build_tokenizer

from modeling_clara.text_clara import BATCH, PlainEncoder

MARKUP = ["<|im_end|>\n<|im_start|>system\n", f"a {ADDED[0]} b", " ".join(SPECIAL + ADDED), "é 😀 <s", "x"]


@pytest.fixture
def encoder() -> PlainEncoder:
    return PlainEncoder(build_tokenizer())


def test_many_at_once_are_as_each_alone(encoder):
    words = TEXT.split()
    texts = [" ".join(words[: 1 + n % len(words)]) + f" {n}" for n in range(2 * BATCH + 3)]
    texts[5:5], texts[BATCH:BATCH] = MARKUP, MARKUP
    names = [f"texts[{n}]" for n in range(len(texts))]
    found = encoder.encode_many(texts, names)
    assert found == [encoder.encode(text, name)[0] for text, name in zip(texts, names, strict=True)]
    assert not encoder.added_ids.intersection(*[set(sum(found, []))])
    assert encoder.encode_many([], []) == []


@pytest.mark.parametrize(
    ("bad", "error"),
    [(3, TypeError), (None, TypeError), ("lone \ud800", ValueError)],
    ids=["int", "none", "surrogate"],
)
def test_a_bad_text_is_named(encoder, bad, error):
    texts = ["good"] * (BATCH + 4) + [bad]
    with pytest.raises(error, match=rf"texts\[{BATCH + 4}\]"):
        encoder.encode_many(texts, [f"texts[{n}]" for n in range(len(texts))])


def test_the_bos_is_looked_up_again_for_another_tokenizer(shared_model):
    processor = copy.deepcopy(shared_model.processor)
    assert processor.bos_ids == [] and "_bos" not in processor.to_dict()
    processor.tokenizer = build_tokenizer(bos=True)
    assert processor.bos_ids == [processor.tokenizer.bos_token_id]
    processor.bos_ids.append(7)
    assert processor.bos_ids == [processor.tokenizer.bos_token_id]
    processor.tokenizer.bos_token = "</s>"  # it still puts the other one in front
    assert processor.bos_ids == []
