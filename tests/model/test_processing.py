"""Text to tensors: exact ids, and spans that lose nothing; prompts and batches are in test_prompts.py.

Every expectation is written out or computed with the plain tokenizer; no model is run.
"""

import copy
import random

import pytest
from tiny import ADDED, CHATML, NO_SYSTEM, TEXT, build_tokenizer
from tokenizers import normalizers, pre_tokenizers

from modeling_clara import CLaRaProcessor
from modeling_clara.prompting_clara import ANSWER_PROMPT, SYSTEM_PROMPT
from modeling_clara.text_clara import BATCH, PlainEncoder

INSTRUCTION = "Answer briefly from the background."
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def build(template: str | None = CHATML, *, bos: bool = False, normalizer=None, **fields) -> CLaRaProcessor:
    tokenizer = build_tokenizer("none", bos=bos)
    tokenizer.chat_template = template
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return CLaRaProcessor(tokenizer, **fields)


def plain(processor: CLaRaProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("bos", [False, True])
def test_documents_and_questions_become_exactly_these_ids(bos):
    processor = build(bos=bos)
    tokens = processor.tokenizer.convert_tokens_to_ids
    first = [tokens("<s>")] if bos else []
    ids = processor.encode_documents(["ab", {"text": "b", "title": " a "}, {"text": " b\n", "title": None}])
    assert ids == [[*first, *tokens(["a", "b"])], [*first, *tokens(["a", "Ċ", "b"])], [*first, *tokens(["Ġb", "Ċ"])]]
    assert processor.encode_questions([" ab\n"]) == [[*first, *tokens(["a", "b"])]]
    assert processor.encode_text("ab") == tokens(["a", "b"])


def test_a_document_of_exactly_one_span_is_accepted_and_one_token_more_is_not():
    processor = build(bos=True, document_max_length=16, document_overlap=4)
    assert len(processor.encode_documents(["x" * 15])[0]) == 16
    with pytest.raises(ValueError, match=r"`documents\[1\]` must fit into one span of 16 tokens, got 2 spans"):
        processor.encode_documents(["x", "x" * 16])


def check_spans(processor: CLaRaProcessor, document: dict) -> list[dict]:
    """The spans of a document, checked: each fits, is what gets compressed, and together they lose nothing."""
    spans = processor.split_document(document)
    assert [span["span"] for span in spans] == list(range(len(spans)))
    encoded = processor.encode_documents(spans)
    for span, ids in zip(spans, encoded, strict=True):
        title = processor.encode_text(span["title"] + "\n") if span["title"] else []
        assert ids == [*processor.bos_ids, *title, *processor.encode_text(span["text"])]
        assert span["n_tokens"] == len(ids) <= processor.document_max_length
        assert {**span, "text": 0, "title": 0} == {**document, **span, "text": 0, "title": 0}
    title = document["title"].strip()
    whole = document["text"] if spans[0]["title"] or not title else f"{title}\n{document['text']}"
    # (begin of the last span, end of what is covered) for every way in which the spans can lie in the text
    places = {(0, 0)}
    for span in spans:
        found, begin = set(), whole.find(span["text"])
        while begin >= 0:
            end = begin + len(span["text"])
            found |= {(begin, max(e, end)) for b, e in places if b <= begin and not whole[e:begin].strip()}
            begin = whole.find(span["text"], begin + 1)
        places = found
    assert any(not whole[end:].strip() for _, end in places), (whole, [span["text"] for span in spans])
    return spans


RANGES = ((32, 127), (160, 1280), (0x4E00, 0x4E80), (0x1F600, 0x1F640))
ALPHABETS = {
    "words": "abc the of capital   \n\t",
    "cjk": "日本語中文。",
    "emoji": "😀👩‍👩‍👧‍👦🇫🇷 a",
    "accents": "e\u0301a\u0308½Ⅷ ",
    "odd": "\u200b\u00a0\u3000x\x00\x7f\x1b\u202e\ufeff\ud7ff\ue000\U0010ffff ",
    "markup": ["</s>", "<s>", "<|im_end|>", "<think>", " ", "a"],
    "any": [chr(code) for low, high in RANGES for code in range(low, high)],
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("bos", [False, True])
def test_spans_of_random_texts_fit_and_lose_nothing(alphabet, bos):
    generator = random.Random(alphabet)
    for length in (16, 23, 64):
        for overlap in (0, 3, length // 2):
            processor = build(bos=bos, document_max_length=length, document_overlap=overlap)
            for _ in range(8):
                text = "".join(generator.choices(ALPHABETS[alphabet], k=generator.randint(1, 200)))
                title = generator.choice(["", "T", "A Title", " x" * 40])
                if text.strip():
                    check_spans(processor, {"id": "d", "title": title, "text": text, "year": 3})


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.NFD(), normalizers.Lowercase()])
def test_spans_lose_nothing_under_a_normalizer(normalizer):
    generator = random.Random(0)
    for overlap in (0, 8):
        processor = build(normalizer=normalizer, document_max_length=48, document_overlap=overlap)
        for _ in range(20):
            check_spans(processor, {"title": "", "text": "".join(generator.choices("e\u0301a\u0308ﷺ½ⅧＡ 日", k=150))})


def test_a_character_longer_than_a_span_is_an_error_and_not_lost():
    processor = build(normalizer=normalizers.NFKC(), document_max_length=16, document_overlap=0)
    with pytest.raises(ValueError, match="`document_max_length` must leave room .* got 16 for 'ﷺ' in `documents"):
        processor.encode_documents(["words before ﷺ"])  # 18 letters after normalisation


@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_spans_share_the_overlap_with_their_neighbours(overlap):
    processor = build(document_max_length=32, document_overlap=overlap)
    words = [f"w{index}" for index in range(100)]
    spans = [span["text"].split() for span in check_spans(processor, {"title": "", "text": " ".join(words)})]
    for before, after in zip(spans[:-1], spans[1:], strict=True):
        shared = [word for word in after if word in before]
        assert after[: len(shared)] == before[len(before) - len(shared) :] == shared
        assert len(plain(processor, " " + " ".join(shared))) <= overlap + 1 if shared else overlap < 4
    assert [word for word in words if not any(word in span for span in spans)] == []


def test_words_are_not_cut_if_spaces_allow_it_and_whitespace_around_makes_no_span():
    processor = build(document_max_length=24, document_overlap=6)
    text = "The Seine flows through Paris, the capital of France, and Berlin is the capital of Germany. " * 3
    for span in check_spans(processor, {"title": "Rivers", "text": text}):
        assert set(span["text"].split()) <= set(text.split()) and span["title"] == "Rivers"
    (span,) = check_spans(processor, {"title": "", "text": " \n" * 60 + "word" + "\t " * 60})
    assert span["text"] == "word"


@pytest.mark.parametrize("alphabet", ["日本語中文", "xyzw", "😀👩👦"])
def test_a_short_beginning_before_text_without_spaces_is_not_repeated_span_after_span(alphabet):
    processor = build(document_max_length=64, document_overlap=32)
    tail = "".join(random.Random(0).choices(alphabet, k=200))
    document = {"title": "", "text": "Paris is the capital of France and so on " + tail}
    spans = check_spans(processor, document)
    n_tokens = len(plain(processor, document["text"]))
    assert len(spans) <= 2 + n_tokens // 16
    assert len({span["text"] for span in spans}) == len(spans)


def test_a_long_title_becomes_the_beginning_of_the_text():
    processor = build(document_max_length=32, document_overlap=4)
    spans = check_spans(processor, {"title": "A very long title " * 4, "text": "text " * 30})
    assert {span["title"] for span in spans} == {""} and spans[0]["text"].startswith("A very long title")
    assert {span["title"] for span in check_spans(processor, {"title": "Title", "text": "text " * 30})} == {"Title"}
    (whole,) = check_spans(processor, {"title": "x" * 20, "text": "text"})  # fits as it is
    assert whole["title"] == "x" * 20


def test_a_span_keeps_the_fields_of_its_document():
    processor = build(document_max_length=16, document_overlap=4)
    document = {"document_id": "d", "title": "T", "text": "word " * 20, "metadata": {"year": 3}}
    given = copy.deepcopy(document)
    assert len(check_spans(processor, document)) > 3 and document == given
    assert processor.split_document("a") == [{"title": "", "text": "a", "span": 0, "n_tokens": 1}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer_prompt": "{question}"}, r"`answer_prompt` must contain \{documents\} 1 time\(s\), got 0"),
        ({"answer_prompt": "{documents}"}, r"`answer_prompt` must contain \{question\} 1 time\(s\), got 0"),
        ({"answer_prompt": ANSWER_PROMPT * 2}, r"`answer_prompt` must contain \{documents\} 1 time\(s\), got 2"),
        ({"paraphrase_prompts": ["{documents}", "x"]}, r"`paraphrase_prompts` must contain \{documents\} 1 time"),
        ({"paraphrase_prompts": [ANSWER_PROMPT]}, r"`paraphrase_prompts` must contain \{question\} 0 time.*, got 1"),
        ({"document_overlap": -1}, r"`document_overlap` must be between 0 and half .* \(256\), got -1"),
        ({"document_max_length": 16, "document_overlap": 9}, r"`document_overlap` .* \(16\), got 9"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


@pytest.mark.parametrize("own_template", [False, True])
def test_saving_and_loading_keeps_every_setting_and_every_id(tmp_path, own_template):
    fields = {
        "document_max_length": 32,
        "document_overlap": 3,
        "system_prompt": "S {documents}",
        "answer_prompt": "{question} <- {documents}",
        "paraphrase_prompts": ["P {documents}"],
        "chat_template_kwargs": {"enable_thinking": True},
        **({"chat_template": NO_SYSTEM} if own_template else {}),
    }
    processor, document = build(THINKING, bos=True, **fields), {"title": "T", "text": "word " * 40 + "</s>"}
    processor.build_prompt("Q", 1, 2, "A")  # what is cached is not saved
    processor.save_pretrained(tmp_path)
    loaded = CLaRaProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.split_document(document) == processor.split_document(document)
    for question in ("Q", None):
        assert loaded.build_prompt(question, 2, 4, "A") == processor.build_prompt(question, 2, 4, "A")
    assert SYSTEM_PROMPT == INSTRUCTION


def test_a_tokenizer_with_another_pre_tokenizer_is_read_with_it():
    processor = build(bos=True)
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert processor.encode_text("a") == plain(processor, "a") == plain(build(), " a")


def test_what_follows_from_a_tokenizer_is_made_again_for_another_one():
    processor, other = build(), build_tokenizer(bos=True)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    before = processor.encode_text("a"), processor.build_prompt("Q", 1, 4, "A")
    assert processor.bos_ids == [] and not {"_bos", "_plain", "_prompts"} & set(processor.to_dict())
    processor.tokenizer = other
    fresh = CLaRaProcessor(other, processor.document_max_length)
    after = processor.encode_text("a"), processor.build_prompt("Q", 1, 4, "A")
    assert after == (fresh.encode_text("a"), fresh.build_prompt("Q", 1, 4, "A")) != before
    assert processor.bos_ids == [processor.tokenizer.bos_token_id]
    processor.bos_ids.append(7)
    assert processor.bos_ids == [processor.tokenizer.bos_token_id]
    processor.tokenizer.bos_token = "</s>"  # it still puts the other one before a text
    assert processor.bos_ids == []


def test_many_texts_at_once_are_encoded_as_each_alone_and_a_bad_one_is_named():
    encoder, words = PlainEncoder(build_tokenizer()), TEXT.split()
    texts = [" ".join(words[: 1 + n % len(words)]) + f" {n}" for n in range(2 * BATCH + 3)]
    texts[5:5] = texts[BATCH:BATCH] = ["<|im_end|>\n<|im_start|>system\n", f"a {ADDED[0]} b", "é 😀 <s", "x"]
    names = [f"texts[{n}]" for n in range(len(texts))]
    found = encoder.encode_many(texts, names)
    assert found == [encoder.encode(text, name)[0] for text, name in zip(texts, names, strict=True)]
    assert encoder.added_ids.isdisjoint(sum(found, [])) and encoder.encode_many([], []) == []
    for bad, error in ((3, TypeError), (None, TypeError), ("lone \ud800", ValueError)):
        with pytest.raises(error, match=rf"texts\[{BATCH + 4}\]"):
            encoder.encode_many([*texts[: BATCH + 4], bad], names[: BATCH + 5])
