"""Records into batches: literal small tensors, and the processor's own batches for every k.

Prompts are written with a template of three marks, so that whole batches can be spelt out as tokens.
"""

import doctest
from functools import partial

import pytest
import torch
from tiny import build_tokenizer

from modeling_clara import CLaRaProcessor
from recipes.training import collators
from recipes.training.collators import ReadingCollator, SelectingCollator, TextCollator, with_slots
from recipes.training.data import text_places

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"


def marked(*paraphrase_prompts: str) -> CLaRaProcessor:
    """Answer prompts read `x {documents} {question} <|im_start|> {answer} </s>`."""
    prompts = {"answer_prompt": "x{documents}{question}", "paraphrase_prompts": list(paraphrase_prompts)}
    limits = {"document_max_length": 32, "document_overlap": 4}
    return CLaRaProcessor(build_tokenizer(), system_prompt="", chat_template=TEMPLATE, **prompts, **limits)


@pytest.fixture(scope="module")
def processor() -> CLaRaProcessor:
    """A paraphrase begins with y or z, so it cannot share a row with an answer."""
    return marked("y{documents}", "z{documents}")


@pytest.fixture(scope="module")
def alike() -> CLaRaProcessor:
    """A paraphrase reads `x {documents} y`, so a row may hold both kinds."""
    return marked("x{documents}y", "x{documents}z")


def plain(text: str, title: str = "") -> dict:
    return {"title": title, "text": text}


def record(documents: list[dict], *targets: tuple[str | None, str], positives=(), source="rows.jsonl:1") -> dict:
    questions, answers = zip(*targets, strict=True)
    targets = {"questions": list(questions), "answers": list(answers)}
    return {"documents": documents, "positives": list(positives), "source": source, **targets}


def spelt(processor: CLaRaProcessor, ids: torch.Tensor):
    """Token names of a tensor of ids, "-" for -100, rows joined by spaces."""
    if ids.dim() > 1:
        return [spelt(processor, row) for row in ids]
    names = [processor.tokenizer.convert_ids_to_tokens(i) if i != -100 else "-" for i in ids.tolist()]
    return " ".join(name.replace("<pad>", "_") for name in names)


def inputs(batch: dict, size: int) -> dict:
    """What a step passes to `forward` for this k."""
    rest = {name: value for name, value in batch.items() if name not in ("prompts", "labels", "gold_documents")}
    return {**rest, **batch.get("prompts", {}).get(size, {}), "memory_size": size}


def test_examples():
    assert doctest.testmod(collators).failed == 0


# --- literal batches -------------------------------------------------------------------------------------------------

TWO = [
    record([plain("ab"), plain("c", "T")], ("q", "uv"), ("rr", "u")),
    record([plain("d")], ("s", "w")),
]


def test_a_batch_of_readings_is_exactly_this(processor):
    batch = ReadingCollator(processor, [1, 2])(TWO)
    assert spelt(processor, batch["document_input_ids"]) == [["a b _", "T Ċ c"], ["d _ _", "_ _ _"]]
    assert batch["document_attention_mask"].tolist() == [[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]]
    one, two = batch["prompts"][1], batch["prompts"][2]
    assert spelt(processor, one["input_ids"]) == [
        "x _ _ _ _ q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "_ _ _ _ _ _ _ _ x _ _ s <|im_start|> w </s>",
    ]
    assert one["memory_mask"].long().tolist() == [[0, 1, 1, 1, 1] + [0] * 10, [0] * 9 + [1, 1] + [0] * 4]
    assert one["attention_mask"].tolist() == [[1] * 15, [0] * 8 + [1] * 7]
    assert one["position_ids"].tolist() == [[*range(10), *range(5, 10)], [0] * 8 + [*range(7)]]
    assert one["prompt_segments"].tolist() == [[0] * 5 + [1] * 5 + [2] * 5, [0] * 8 + [1] * 7]
    assert spelt(processor, one["labels"]) == [
        "- - - - - - - u v </s> - - - u </s>",
        "- - - - - - - - - - - - - w </s>",
    ]
    assert spelt(processor, two["input_ids"]) == [
        "x _ _ _ _ _ _ q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "_ _ _ _ _ _ _ _ _ x _ _ _ s <|im_start|> w </s>",
    ]
    assert batch["labels"] is two["labels"]
    assert set(batch) == {"document_input_ids", "document_attention_mask", "prompts", "labels"}
    names = {"input_ids", "attention_mask", "memory_mask", "labels", "position_ids", "prompt_segments"}
    assert set(one) == set(two) == names
    single = ReadingCollator(processor, [1])([record([plain("ab")], ("q", "uv")), TWO[1]])
    assert set(single["prompts"][1]) == names - {"position_ids", "prompt_segments"}


def test_a_batch_that_reads_some_texts_is_exactly_this(processor):
    """Of `ab` and `c` one is text, after the memory of the other; a record of one document has no slots left."""
    records = [*TWO, record(TWO[0]["documents"], (None, "u"))]
    (place,) = text_places(TWO[0], 1.0)
    batch = ReadingCollator(processor, [1, 2], text_share=1.0)(records)
    text = ["a b", "T Ċ c"][place]
    prompts = [
        f"x _ _ {text} q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "x d s <|im_start|> w </s>",
        "y _ _ _ _ <|im_start|> u </s>",
    ]
    length = len(prompts[0].split())
    expected = [" ".join(["_"] * (length - len(prompt.split())) + prompt.split()) for prompt in prompts]
    found = spelt(processor, batch["prompts"][1]["input_ids"])
    assert [row.replace("z", "y") for row in found] == expected
    n_common = 3 + len(text.split())
    assert batch["prompts"][1]["prompt_segments"][0].tolist() == [0] * n_common + [1] * 5 + [2] * 5
    assert [batch["prompts"][k]["memory_mask"].sum(-1).tolist() for k in (1, 2)] == [[2, 0, 4], [3, 0, 6]]
    assert batch["prompt_document_mask"].tolist() == [[place != 0, place != 1], [False, True], [True, True]]


def test_a_batch_of_texts_is_exactly_this(processor):
    batch = TextCollator(processor, [1, 2], 3)(TWO)
    assert batch["memory"].shape == (2, 0, 2, 3) and batch["memory"].dtype == torch.float32
    layout = batch["prompts"][2]
    assert spelt(processor, layout["input_ids"]) == [
        "x a b Ċ Ċ T Ċ c q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "_ _ _ _ _ _ _ _ _ _ _ _ x d s <|im_start|> w </s>",
    ]
    assert spelt(processor, layout["labels"]) == [
        "- - - - - - - - - - u v </s> - - - u </s>",
        "- - - - - - - - - - - - - - - - w </s>",
    ]
    assert layout["attention_mask"].tolist() == [[1] * 18, [0] * 12 + [1] * 6]
    assert layout["position_ids"].tolist() == [[*range(13), *range(8, 13)], [0] * 12 + [*range(6)]]
    assert layout["prompt_segments"].tolist() == [[0] * 8 + [1] * 5 + [2] * 5, [0] * 12 + [1] * 6]
    assert not layout["memory_mask"].any() and layout["memory_mask"].shape == (2, 18)
    assert batch["labels"] is layout["labels"] and batch["prompts"][1] is layout
    assert set(batch) == {"memory", "prompts", "labels"}


def test_questions_of_a_batch_are_exactly_these(alike):
    """Two of the three of the first record, none of one that has paraphrases alone; gold in any row."""
    records = [
        record([plain("ab"), plain("c", "T")], ("q", "u"), (None, "p"), ("rr", "u"), ("ss", "u"), positives=[1]),
        record([plain("d")], (None, "w"), positives=[0]),
        record([plain("c", "T"), plain("e")], ("t", "w")),  # no gold: all of its documents are
    ]
    batch = ReadingCollator(alike, [1], n_queries=2)(records)
    assert spelt(alike, batch["query_input_ids"]) == ["q _", "r r", "t _"]
    assert batch["query_attention_mask"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert batch["query_rows"].tolist() == [0, 0, 2]
    first = [False, True, False, False, True, False]  # `c` stands in two rows; the fourth place is padding
    assert batch["batch_positive_mask"].tolist() == [first, first, [False, True, False, False, True, True]]
    names = {"query_input_ids", "query_attention_mask", "query_rows", "batch_positive_mask"}
    assert names <= set(batch) and not names & set(ReadingCollator(alike, [1], n_queries=2)(records[1:2]))
    assert not names & set(ReadingCollator(alike, [1])(records))


def test_a_batch_of_selections_is_exactly_this(processor):
    records = [
        record([plain("a"), plain("b"), plain("c")], ("q", "u"), positives=[0, 2]),
        record([plain("d")], ("rr", "w")),
    ]
    batch = SelectingCollator(processor, [1, 2], top_k=2, store=None)(records)
    assert spelt(processor, batch["query_input_ids"]) == ["q _", "r r"]
    assert batch["query_attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["positive_mask"].tolist() == [[True, False, True], [False, False, False]]
    assert spelt(processor, batch["document_input_ids"]) == [["a", "b", "c"], ["d", "_", "_"]]
    assert spelt(processor, batch["prompts"][1]["input_ids"]) == [
        "x _ _ _ _ q <|im_start|> u </s>",
        "_ x _ _ r r <|im_start|> w </s>",
    ]
    assert batch["prompts"][2]["memory_mask"].sum(-1).tolist() == [2 * 3, 1 * 3]
    assert "prompt_segments" not in batch["prompts"][1]
    alone = SelectingCollator(processor, [1, 2], top_k=1, store=None, with_prompts=False)(records)
    assert set(alone) == set(batch) - {"prompts", "labels"}


class StoredMemories:
    """What a collator asks of stored memories, with numbers that can be read."""

    def lookup(self, documents: list[dict]) -> torch.Tensor:
        numbers = torch.arange(12.0).view(3, 2, 2)
        return torch.stack([numbers["abc".index(document["text"])] for document in documents])


def test_stored_memories_stand_in_for_the_documents(processor):
    a, b, c = (plain(text) for text in "abc")
    records = [record([c, a], ("q", "u"), positives=[1]), record([b], ("r", "w"))]
    batch = SelectingCollator(processor, [1, 2], top_k=2, store=StoredMemories())(records)
    assert batch["memory"].dtype == torch.float32
    assert batch["memory"].tolist() == [[[[8, 9], [10, 11]], [[0, 1], [2, 3]]], [[[4, 5], [6, 7]], [[0, 0], [0, 0]]]]
    assert batch["document_mask"].tolist() == [[True, True], [True, False]]
    assert batch["positive_mask"].tolist() == [[False, True], [False, False]]
    assert not {"document_input_ids", "document_attention_mask"} & set(batch)


@pytest.mark.parametrize("num_candidates, reads", [(5, 3), (2, 2)])
def test_a_live_corpus_leaves_slots_for_its_candidates_and_carries_the_gold_documents(
    processor, num_candidates, reads
):
    records = [record([plain("a"), plain("b")], ("q", "u"), positives=[1]), record([plain("d")], ("r", "w"))]
    options = {"top_k": 3, "store": None, "from_corpus": True, "num_candidates": num_candidates}
    batch = SelectingCollator(processor, [1, 2], **options)(records)
    assert batch["gold_documents"] == [[plain("b")], []]
    assert batch["prompts"][2]["memory_mask"].sum(-1).tolist() == [reads * 3] * 2
    assert set(batch) == {"query_input_ids", "query_attention_mask", "gold_documents", "prompts", "labels"}


def test_in_batch_negatives_are_never_gold(processor):
    """`a` is gold for two questions and stands in both rows, `c` is gold for a question whose row lacks it."""
    records = [
        record([plain("a"), plain("b"), plain("c")], ("q", "u"), positives=[0]),
        record([plain("c"), plain("a")], ("r", "w"), positives=[0, 1]),
    ]
    batch = SelectingCollator(processor, [1], top_k=2, store=None, in_batch_negatives=True)(records)
    assert batch["positive_mask"].tolist() == [[True, False, False], [True, True, False]]
    assert batch["batch_positive_mask"].tolist() == [
        [True, False, False, False, True, False],
        [True, False, True, True, True, False],
    ]


# --- layouts and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("prompt", ["x{documents}{question}", "{question} y {documents} z", None])
def test_with_slots_is_the_prompt_that_is_built_for_that_k(shared_model, template, prompt):
    processor = shared_model.processor
    if prompt is not None:
        tokenizer = build_tokenizer("none", bos=True)
        tokenizer.chat_template = template
        processor = CLaRaProcessor(tokenizer, answer_prompt=prompt)
    for question in ("Who is it?", None):
        for documents in (1, 3):
            largest = processor.build_prompt(question, documents, 16, "an answer")
            for size in (1, 4, 16):
                built = processor.build_prompt(question, documents, size, "an answer")
                assert with_slots(largest, documents * (size + 1), processor.pad_token_id) == built


def test_a_paraphrase_has_one_of_the_instructions_and_keeps_it(processor):
    collator = ReadingCollator(processor, [1])
    records = [record([plain("a")], (None, "u"), source=f"rows.jsonl:{line}") for line in range(40)]
    first = [spelt(processor, row)[0] for row in collator(records)["prompts"][1]["input_ids"]]
    assert set(first) == {"y", "z"}
    again = [spelt(processor, collator([one])["prompts"][1]["input_ids"])[0][0] for one in reversed(records)]
    assert again[::-1] == first


@pytest.mark.parametrize(
    "collator, one, message",
    [
        (ReadingCollator, record([plain("a")], ("q", "u"), (None, "p")), "must begin alike up to `{documents}`"),
        (
            ReadingCollator,
            record([plain("a"), plain("x" * 99)], ("q", "u")),
            r"docs\[1\]` must fit into one span of 32",
        ),
        (partial(TextCollator, hidden_size=3), record([plain("a")], (7, "u")), "rows.jsonl:1 question"),
    ],
)
def test_what_makes_no_batch_is_named(processor, collator, one, message):
    with pytest.raises((TypeError, ValueError), match=message):
        collator(processor, [1])([one])


def test_batches_are_those_of_the_processor_for_every_k(shared_model):
    make, sizes = shared_model.processor, shared_model.config.memory_sizes
    questions, answers = ["What is old?", "Which city is large, and how large?"], ["Rome", "Berlin"]
    documents = [[plain("Paris is a capital."), plain("Rome is old.", "Rome"), plain("The Seine.")]]
    documents.append([plain("Berlin is large."), plain("Berlin")])
    texts = questions, documents, answers
    records = [record(docs, (q, a), positives=[0]) for q, docs, a in zip(*texts, strict=True)]
    prompts = [make.build_prompt(q, 0, 4, a, text_documents=docs) for q, docs, a in zip(*texts, strict=True)]
    reading = ReadingCollator(make, sizes)(records)
    selecting = SelectingCollator(make, sizes, top_k=2, store=None)(records)
    reading_texts = TextCollator(make, sizes, 32)(records)
    for size in sizes:
        for batch, expected in (
            (reading, make(*texts, memory_size=size)),
            (selecting, make(*texts, memory_size=size, top_k=2)),
            (reading_texts, make.pad_prompts(prompts)),
        ):
            found = inputs(batch, size)
            assert set(found) - set(expected) <= {"memory_size", "positive_mask", "memory"}
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (name, size)
                assert found[name].dtype == tensor.dtype
