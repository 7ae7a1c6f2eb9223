"""Prompts and batches of the processor, ids and text exactly as the backbone sees them."""

import pytest
import torch
from test_processing import INSTRUCTION, THINKING, build, plain
from tiny import CHATML, DROPS_SYSTEM, NO_SYSTEM

from modeling_clara.prompting_clara import PARAPHRASE_PROMPTS

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


def render(processor, question="Q", n_documents=1, memory_size=1, **options) -> str:
    return processor.tokenizer.decode(processor.build_prompt(question, n_documents, memory_size, **options).input_ids)


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
    assert "Restate the background in your own words." in render(processor, None)
    for text in PARAPHRASE_PROMPTS:
        assert text.replace("{documents}", "<pad>" * 3) in render(processor, None, 1, 2, prompt=text)


def test_text_documents_stand_after_the_memories():
    shown = render(build(), text_documents=["one", {"title": "T", "text": "two"}])
    assert "Background: <pad><pad>one\n\nT\ntwo\nQuestion: Q" in shown and shown.count("<pad>") == 2


@pytest.mark.parametrize(("value", "shown"), [(None, True), ({"enable_thinking": False}, True), ({}, False)])
def test_template_variables_reach_the_template(value, shown):
    processor = build(THINKING, chat_template_kwargs=value)
    assert render(processor).endswith("<think></think>") == shown
    processor.chat_template_kwargs = {"enable_thinking": shown}  # the other way round: nothing stale is kept
    assert render(processor).endswith("<think></think>") != shown


def test_changed_prompts_take_effect_and_may_put_the_question_first():
    processor = build()
    render(processor)
    processor.answer_prompt, processor.system_prompt = "{question}\n{documents}", "Be brief."
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\nQ\n<pad><pad><|im_end|>" in render(processor)
    processor.chat_template = NO_SYSTEM
    assert render(processor).count("Be brief.\n\nQ\n<pad>") == 1
    processor.system_prompt = ""
    expected = "<s><start_of_turn>user\nQ\n<pad><pad><end_of_turn>\n<start_of_turn>assistant\n"
    assert render(processor) == expected


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
    short = prompt._replace(input_ids=[9], memory_mask=[False], labels=[9])
    assert processor.pad_prompts([prompt, short])["input_ids"][1].tolist()[-2:] == [pad, 9]


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
