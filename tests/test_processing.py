"""Text to tensors: exact ids, spans that lose nothing, prompts rendered once, batches as small tensors.

Every expectation is written out or computed with the plain tokenizer; no model is run.
"""

import copy
import random

import pytest
import torch
from tiny import CHATML, DROPS_SYSTEM, NO_SYSTEM, build_tokenizer
from tokenizers import normalizers, pre_tokenizers

from modeling_clara import CLaRaProcessor
from modeling_clara.prompting_clara import ANSWER_PROMPT, PARAPHRASE_PROMPTS, SYSTEM_PROMPT

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


# --- documents and questions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_documents_and_questions_become_exactly_these_ids(bos):
    processor = build(bos=bos)
    tokens = processor.tokenizer.convert_tokens_to_ids
    first = [tokens("<s>")] if bos else []
    ids = processor.encode_documents(["ab", {"text": "b", "title": " a "}, {"text": " b\n", "title": None}])
    assert ids == [
        [*first, *tokens(["a", "b"])],
        [*first, *tokens(["a", "Ċ", "b"])],
        [*first, *tokens(["Ġb", "Ċ"])],
    ]
    assert processor.encode_questions([" ab\n"]) == [[*first, *tokens(["a", "b"])]]
    assert processor.encode_text("ab") == tokens(["a", "b"])


def test_a_document_of_exactly_one_span_is_accepted_and_one_token_more_is_not():
    processor = build(bos=True, document_max_length=16, document_overlap=4)
    assert len(processor.encode_documents(["x" * 15])[0]) == 16
    with pytest.raises(ValueError, match=r"`documents\[1\]` must fit into one span of 16 tokens, got 2 spans"):
        processor.encode_documents(["x", "x" * 16])


# --- spans -----------------------------------------------------------------------------------------------------------


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


ALPHABETS = {
    "words": "abc the of capital   \n\t",
    "cjk": "日本語中文。",
    "emoji": "😀👩‍👩‍👧‍👦🇫🇷 a",
    "accents": "e\u0301a\u0308½Ⅷ ",
    "odd": "\u200b\u00a0\u3000x\x00\ud7ff\ue000 ",
    "markup": ["</s>", "<s>", "<|im_end|>", "<think>", " ", "a"],
    "any": [
        chr(code)
        for low, high in ((32, 127), (160, 1280), (0x4E00, 0x4E80), (0x1F600, 0x1F640))
        for code in range(low, high)
    ],
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
        for _ in range(30):
            text = "".join(generator.choices("e\u0301a\u0308ﷺ½ⅧＡ 日", k=150))
            check_spans(processor, {"title": "", "text": text})


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


def test_words_are_not_cut_where_spaces_allow_it():
    processor = build(document_max_length=24, document_overlap=6)
    text = "The Seine flows through Paris, the capital of France, and Berlin is the capital of Germany. " * 3
    for span in check_spans(processor, {"title": "Rivers", "text": text}):
        assert set(span["text"].split()) <= set(text.split())
        assert span["title"] == "Rivers"


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
    title, short = "A very long title " * 4, "Title"
    spans = check_spans(processor, {"title": title, "text": "text " * 30})
    assert {span["title"] for span in spans} == {""}
    assert spans[0]["text"].startswith("A very long title")
    assert {span["title"] for span in check_spans(processor, {"title": short, "text": "text " * 30})} == {short}
    (whole,) = check_spans(processor, {"title": "x" * 20, "text": "text"})  # fits as it is
    assert whole["title"] == "x" * 20


def test_whitespace_around_a_text_makes_no_span():
    processor = build(document_max_length=16, document_overlap=4)
    (span,) = check_spans(processor, {"title": "", "text": " \n" * 60 + "word" + "\t " * 60})
    assert span["text"] == "word"


def test_a_span_keeps_the_fields_of_its_document():
    processor = build(document_max_length=16, document_overlap=4)
    document = {"document_id": "d", "title": "T", "text": "word " * 20, "metadata": {"year": 3}}
    given = copy.deepcopy(document)
    spans = check_spans(processor, document)
    assert len(spans) > 3 and document == given
    assert all(span["document_id"] == "d" and span["metadata"] == {"year": 3} for span in spans)
    assert check_spans(processor, {"title": "", "text": "a"})[0]["n_tokens"] == 1
    assert processor.split_document("a") == [{"title": "", "text": "a", "span": 0, "n_tokens": 1}]


# --- prompts ---------------------------------------------------------------------------------------------------------

USER = "Background: <pad><pad><pad><pad><pad><pad>\nQuestion: What?"
RENDERED = {
    "system": (
        CHATML,
        f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "no_system": (
        NO_SYSTEM,
        f"<s><start_of_turn>user\n{INSTRUCTION}\n\n{USER}<end_of_turn>\n<start_of_turn>assistant\n",
    ),
    "none": (None, f"{INSTRUCTION}\n\n{USER}\nAnswer:"),
}
RENDERED["drops_system"] = (DROPS_SYSTEM, RENDERED["no_system"][1])
ENDS = {"system": "<|im_end|>", "no_system": "<end_of_turn>", "drops_system": "<end_of_turn>", "none": "</s>"}


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_is_exactly_this_text(name, bos):
    template, text = RENDERED[name]
    processor = build(template, bos=bos)
    prompt = processor.build_prompt(" What? ", n_documents=2, memory_size=2)
    expected = ("<s>" if bos and name == "none" else "") + text
    assert processor.tokenizer.decode(prompt.input_ids) == expected
    assert expected.count(INSTRUCTION) == 1
    pad = processor.pad_token_id
    assert prompt.memory_mask == [token == pad for token in prompt.input_ids]
    assert sum(prompt.memory_mask) == 2 * (2 + 1)
    assert prompt.labels == [-100] * len(prompt.input_ids)


@pytest.mark.parametrize("name", RENDERED)
def test_labels_are_the_answer_and_the_end_of_the_turn(name):
    processor = build(RENDERED[name][0])
    end = processor.tokenizer.convert_tokens_to_ids(ENDS[name])
    assert processor.answer_end_id == end
    without = processor.build_prompt("What?", 1, 4)
    prompt = processor.build_prompt("What?", 1, 4, "Rome.")
    target = [*plain(processor, " Rome." if name == "none" else "Rome."), end]
    assert prompt.input_ids == without.input_ids + target
    assert prompt.labels == [-100] * len(without.input_ids) + target
    assert prompt.memory_mask == without.memory_mask + [False] * len(target)
    assert processor.build_prompt("What?", 1, 4, "").labels[-1] == end


def test_a_paraphrase_has_no_question_and_any_prompt_can_be_drawn():
    processor = build()
    default = processor.build_prompt(None, 1, 2)
    assert processor.tokenizer.decode(default.input_ids).count("Restate the background in your own words.") == 1
    for text in PARAPHRASE_PROMPTS:
        prompt = processor.build_prompt(None, 1, 2, prompt=text)
        assert text.replace("{documents}", "<pad>" * 3) in processor.tokenizer.decode(prompt.input_ids)


def test_text_documents_stand_behind_the_memories():
    processor = build()
    prompt = processor.build_prompt("Q", 1, 1, text_documents=["one", {"title": "T", "text": "two"}])
    assert "Background: <pad><pad>one\n\nT\ntwo\nQuestion: Q" in processor.tokenizer.decode(prompt.input_ids)
    assert sum(prompt.memory_mask) == 2


@pytest.mark.parametrize(("value", "shown"), [(None, True), ({"enable_thinking": False}, True), ({}, False)])
def test_template_variables_reach_the_template(value, shown):
    processor = build(THINKING, chat_template_kwargs=value)
    text = processor.tokenizer.decode(processor.build_prompt("Q", 1, 1).input_ids)
    assert text.endswith("<think></think>") == shown
    processor.chat_template_kwargs = {"enable_thinking": shown}  # the other way round: nothing stale is kept
    text = processor.tokenizer.decode(processor.build_prompt("Q", 1, 1).input_ids)
    assert text.endswith("<think></think>") != shown


def test_changed_prompts_take_effect_and_may_put_the_question_first():
    processor = build()
    processor.build_prompt("Q", 1, 1)
    processor.answer_prompt, processor.system_prompt = "{question}\n{documents}", "Be brief."
    text = processor.tokenizer.decode(processor.build_prompt("Q", 1, 1).input_ids)
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\nQ\n<pad><pad><|im_end|>" in text
    processor.chat_template = NO_SYSTEM
    assert processor.tokenizer.decode(processor.build_prompt("Q", 1, 1).input_ids).count("Be brief.\n\nQ\n<pad>") == 1
    processor.system_prompt = ""
    text = processor.tokenizer.decode(processor.build_prompt("Q", 1, 1).input_ids)
    assert text == "<s><start_of_turn>user\nQ\n<pad><pad><end_of_turn>\n<start_of_turn>assistant\n"


SHOWN = "{% for m in messages %}{{ m['role'] }}:CONTENT{% endfor %}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must show the instruction exactly once"),
        ("{{ m['content'] }}{{ m['content'] }}", "must show the instruction exactly once"),
        ("{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}", "must show the user's text exactly once"),
        ("{{ m['content'].split('Question')[0] }}", "must show the user's text exactly once"),
        ("{{ m['content'] | upper }}", "must show the instruction exactly once"),
    ],
)
def test_a_template_that_drops_or_repeats_text_is_an_error(content, message):
    with pytest.raises(ValueError, match=message):
        build(SHOWN.replace("CONTENT", content)).build_prompt("Q", 1, 1)


def test_a_template_that_does_not_show_answers_ends_them_with_eos():
    processor = build("{% for m in messages if m['role'] != 'assistant' %}<|im_start|>{{ m['content'] }}{% endfor %}")
    assert processor.answer_end_id == processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("absent", "pad", "end"), [((), 2, 1), (("pad_token",), 1, 1), (("pad_token", "eos_token"), 0, 0)]
)
def test_the_pad_id_is_the_pad_else_the_eos_else_zero(absent, pad, end):
    processor = build(None)
    for name in absent:
        setattr(processor.tokenizer, name, None)
    assert (processor.pad_token_id, processor.answer_end_id) == (pad, end)
    prompt = processor.build_prompt("Q", 1, 2)
    assert [t for t, slot in zip(prompt.input_ids, prompt.memory_mask, strict=True) if slot] == [pad] * 3
    assert processor.pad_prompts([prompt, prompt._replace(input_ids=[9], memory_mask=[False], labels=[9])])[
        "input_ids"
    ][1].tolist() == [pad] * (len(prompt.input_ids) - 1) + [9]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_exactly_these_tensors():
    processor = build(None, system_prompt="", answer_prompt="{documents}{question}")
    a, b, line, colon, answer = (plain(processor, text) for text in ("a", "b", "\n\n", "\nAnswer:", " b"))
    assert all(len(ids) == 1 for ids in (a, b, answer))
    batch = processor(["b", "bb"], [["a", {"title": "a", "text": "b"}], ["ab"]], ["b", "b"], memory_size=1, top_k=1)
    newline = plain(processor, "\n")
    assert batch["document_input_ids"].tolist() == [[[*a, 2, 2], [*a, *newline, *b]], [[*a, *b, 2], [2, 2, 2]]]
    assert batch["document_attention_mask"].tolist() == [[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]
    rows = [[*line, 2, 2, *question, *colon, *answer, 1] for question in (b, b + b)]
    assert batch["input_ids"].tolist() == [[2, *rows[0]], rows[1]]
    assert batch["attention_mask"].tolist() == [[0] + [1] * len(rows[0]), [1] * len(rows[1])]
    n = len(rows[1])
    assert batch["labels"].tolist() == [[-100] * (n - 2) + [*answer, 1]] * 2
    slots = [[0] * len(line) + [1, 1] + [0] * (n - len(line) - 2), None]
    assert batch["memory_mask"].int().tolist() == [[0, *slots[0][:-1]], slots[0]]
    assert batch["query_input_ids"].tolist() == [[*b, 2], [*b, *b]]
    assert batch["query_attention_mask"].tolist() == [[1, 0], [1, 1]]
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes.pop("memory_mask") == torch.bool
    assert set(dtypes.values()) == {torch.int64}


@pytest.mark.parametrize(("top_k", "slots"), [(None, [6, 3]), (1, [3, 3]), (5, [6, 3])])
def test_slots_follow_what_will_be_read(top_k, slots):
    batch = build()(["Q", None if top_k is None else "Q"], [["a", "b"], ["c"]], memory_size=2, top_k=top_k)
    assert batch["memory_mask"].sum(-1).tolist() == slots
    assert ("query_input_ids" in batch, "labels" in batch) == (top_k is not None, False)


def test_prompts_are_padded_on_the_left():
    processor = build()
    prompts = [processor.build_prompt(text, 1, 2, "Rome") for text in ("Q", "a much longer question")]
    batch = processor.pad_prompts(prompts)
    missing = len(prompts[1].input_ids) - len(prompts[0].input_ids)
    assert missing > 0
    assert batch["attention_mask"].tolist() == [
        [0] * missing + [1] * len(prompts[0].input_ids),
        [1] * len(prompts[1].input_ids),
    ]
    assert batch["input_ids"][0].tolist() == [processor.pad_token_id] * missing + prompts[0].input_ids
    assert batch["memory_mask"][0].tolist() == [False] * missing + prompts[0].memory_mask
    assert batch["labels"][0].tolist() == [-100] * missing + prompts[0].labels


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((["q", "r"], [["a"]]), {}, ValueError, r"`documents` must have one entry per question \(2\), got 1"),
        ((["q"], [["a"]], ["x", "y"]), {}, ValueError, r"`answers` must have one entry per question \(1\), got 2"),
        ((["q"], [["a"]], [5]), {}, TypeError, r"`answers\[0\]` must be a str, got int"),
        ((["q", "r"], [["a"]] * 2, ["x", None]), {}, TypeError, r"`answers\[1\]` must be a str, got NoneType"),
        ((["q", "r"], [["a"]] * 2, ["x", "\udc00"]), {}, ValueError, r"`answers\[1\]` must be valid UTF-8"),
        (([], []), {}, ValueError, "`questions` must have at least one entry"),
        (("q", [["a"]]), {}, TypeError, "`questions` must be a list, got str"),
        ((["q"], ["a"]), {}, TypeError, r"`documents\[0\]` must be a list, got str"),
        ((["q", "r"], [["a"], []]), {}, ValueError, r"`documents\[1\]` must have at least one entry"),
        ((["q", "r"], [["a"], ["b", ""]]), {}, ValueError, r"`documents\[1\]\[1\]` must not be empty"),
        ((["q", " "], [["a"]] * 2), {}, ValueError, r"`questions\[1\]` must not be empty"),
        (([None], [["a"]]), {"top_k": 1}, TypeError, r"`questions\[0\]` must be a str, got NoneType"),
        ((["q"], [["a"]]), {"top_k": 0}, ValueError, "`top_k` must be an int >= 1, got 0"),
        ((["q"], [["a"]]), {"return_tensors": "np"}, ValueError, "`return_tensors` must be 'pt', got 'np'"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused_by_name(arguments, options, error, message):
    with pytest.raises(error, match=message):
        build()(*arguments, memory_size=2, **options)


# --- the processor itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer_prompt": "{question}"}, r"`answer_prompt` must contain \{documents\} 1 time\(s\), got 0"),
        ({"answer_prompt": "{documents}"}, r"`answer_prompt` must contain \{question\} 1 time\(s\), got 0"),
        ({"answer_prompt": ANSWER_PROMPT * 2}, r"`answer_prompt` must contain \{documents\} 1 time\(s\), got 2"),
        ({"paraphrase_prompts": ["{documents}", "x"]}, r"`paraphrase_prompts` must contain \{documents\} 1 time"),
        (
            {"paraphrase_prompts": [ANSWER_PROMPT]},
            r"`paraphrase_prompts` must contain \{question\} 0 time\(s\), got 1",
        ),
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
    processor = build(THINKING, bos=True, **fields)
    processor.build_prompt("Q", 1, 2, "A")  # what is cached is not saved
    processor.save_pretrained(tmp_path)
    loaded = CLaRaProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    document = {"title": "T", "text": "word " * 40 + "</s>"}
    assert loaded.split_document(document) == processor.split_document(document)
    assert loaded.build_prompt("Q", 2, 4, "A") == processor.build_prompt("Q", 2, 4, "A")
    assert loaded.build_prompt(None, 2, 4, "A") == processor.build_prompt(None, 2, 4, "A")
    assert SYSTEM_PROMPT == INSTRUCTION


def test_a_tokenizer_with_another_pre_tokenizer_is_read_with_it():
    processor = build(bos=True)
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert processor.encode_text("a") == plain(processor, "a") == plain(build(), " a")
