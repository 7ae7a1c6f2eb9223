"""Records into batches: literal small tensors, the processor's own batches for every k, and the model that takes them.

Prompts are written with a template of three marks, so that whole batches can be spelt out as tokens.
"""

import pytest
import torch
from tiny import build_tokenizer

from modeling_clara import CLaRaProcessor
from recipes.training.collators import ReadingCollator, SelectingCollator, with_slots
from recipes.training.memories import compress_documents

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
PAD, END = "<pad>", "</s>"


def marked(paraphrase_prompts: list[str]) -> CLaRaProcessor:
    """Answer prompts read `x {documents} {question} <|im_start|> {answer} </s>`."""
    return CLaRaProcessor(
        build_tokenizer(),
        document_max_length=32,
        document_overlap=4,
        system_prompt="",
        answer_prompt="x{documents}{question}",
        paraphrase_prompts=paraphrase_prompts,
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def processor() -> CLaRaProcessor:
    """A paraphrase begins with y or z, so it cannot share a row with an answer."""
    return marked(["y{documents}", "z{documents}"])


@pytest.fixture(scope="module")
def alike() -> CLaRaProcessor:
    """A paraphrase reads `x {documents} y`, so a row may hold both kinds."""
    return marked(["x{documents}y", "x{documents}z"])


def test_prompts_that_do_not_begin_alike_cannot_share_a_row(processor):
    records = [record([plain("a")], ("q", "u"), (None, "p"))]
    with pytest.raises(ValueError, match="must begin alike up to `{documents}`"):
        ReadingCollator(processor, [1])(records)


def plain(text: str, title: str = "") -> dict:
    return {"title": title, "text": text}


def record(documents: list[dict], *targets: tuple[str | None, str], positives=(), source="rows.jsonl:1") -> dict:
    questions, answers = zip(*targets, strict=True)
    return {
        "documents": documents,
        "positives": list(positives),
        "questions": list(questions),
        "answers": list(answers),
        "source": source,
    }


def spelt(processor: CLaRaProcessor, ids: torch.Tensor):
    """Token names of a tensor of ids, "-" for -100, rows joined by spaces."""
    if ids.dim() > 1:
        return [spelt(processor, row) for row in ids]
    names = [processor.tokenizer.convert_ids_to_tokens(i) if i != -100 else "-" for i in ids.tolist()]
    return " ".join(name.replace(PAD, "_") for name in names)


# --- literal batches -------------------------------------------------------------------------------------------------


def test_a_batch_of_readings_is_exactly_this(processor):
    records = [
        record([plain("ab"), plain("c", "T")], ("q", "uv"), ("rr", "u")),
        record([plain("d")], ("s", "w")),
    ]
    batch = ReadingCollator(processor, [1, 2])(records)
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


def test_a_batch_of_single_prompts_has_neither_positions_nor_segments(processor):
    batch = ReadingCollator(processor, [1])([record([plain("ab")], ("q", "uv")), record([plain("d")], ("s", "w"))])
    assert set(batch["prompts"][1]) == {"input_ids", "attention_mask", "memory_mask", "labels"}


def test_questions_of_a_batch_are_exactly_these(alike):
    """Two of the three of the first record, none of one that has paraphrases alone; gold wherever it stands."""
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
    without = ReadingCollator(alike, [1], n_queries=2)(records[1:2])
    assert names <= set(batch) and not names & set(without)
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


class StoredMemories:
    """What a collator asks of stored memories, with numbers that can be read."""

    memory_shape = (2, 2)

    def __init__(self, memories: dict[str, torch.Tensor]):
        self.memories = memories

    def lookup(self, documents: list[dict]) -> torch.Tensor:
        return torch.stack([self.memories[document["text"]] for document in documents])


def test_stored_memories_stand_in_for_the_documents(processor):
    documents = [plain(text) for text in "abc"]
    memories = dict(zip("abc", torch.arange(12.0).view(3, 2, 2), strict=True))
    store = StoredMemories(memories)
    records = [record([documents[2], documents[0]], ("q", "u"), positives=[1]), record([documents[1]], ("r", "w"))]
    batch = SelectingCollator(processor, [1, 2], top_k=2, store=store)(records)
    assert batch["memory"].dtype == torch.float32
    assert batch["memory"].tolist() == [[[[8, 9], [10, 11]], [[0, 1], [2, 3]]], [[[4, 5], [6, 7]], [[0, 0], [0, 0]]]]
    assert batch["document_mask"].tolist() == [[True, True], [True, False]]
    assert batch["positive_mask"].tolist() == [[False, True], [False, False]]
    assert not {"document_input_ids", "document_attention_mask"} & set(batch)


def test_a_live_corpus_leaves_slots_for_its_candidates_and_carries_the_gold_documents(processor):
    records = [record([plain("a"), plain("b")], ("q", "u"), positives=[1]), record([plain("d")], ("r", "w"))]
    for num_candidates, reads in ((5, 3), (2, 2)):
        collator = SelectingCollator(
            processor, [1, 2], top_k=3, store=None, from_corpus=True, num_candidates=num_candidates
        )
        batch = collator(records)
        assert batch["gold_documents"] == [[plain("b")], []]
        assert batch["prompts"][2]["memory_mask"].sum(-1).tolist() == [reads * 3] * 2
        assert set(batch) == {"query_input_ids", "query_attention_mask", "gold_documents", "prompts", "labels"}


def test_the_contrastive_stage_has_no_prompts(processor):
    records = [record([plain("a"), plain("b")], ("q", "u"), positives=[1])]
    batch = SelectingCollator(processor, [1, 2], top_k=1, store=None, with_prompts=False)(records)
    documents = {"document_input_ids", "document_attention_mask"}
    assert set(batch) == documents | {"query_input_ids", "query_attention_mask", "positive_mask"}


def test_in_batch_negatives_are_never_gold(processor):
    """`a` is gold for two questions and stands in both rows, `c` is gold where it does not stand in its own row."""
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


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, None, "processor"])
@pytest.mark.parametrize("prompt", ["x{documents}{question}", "{question} y {documents} z"])
def test_with_slots_is_the_prompt_that_is_built_for_that_k(processor, shared_model, template, prompt):
    if template == "processor":
        processor = shared_model.processor
    else:
        tokenizer = build_tokenizer("none", bos=True)
        tokenizer.chat_template = template
        processor = CLaRaProcessor(tokenizer, answer_prompt=prompt)
    for question in ("Who is it?", None):
        for documents in (1, 3):
            largest = processor.build_prompt(question, documents, 16, "an answer")
            for size in (1, 4, 16):
                built = processor.build_prompt(question, documents, size, "an answer")
                assert with_slots(largest, documents * (size + 1), processor.pad_token_id) == built


def test_labels_of_all_layouts_are_equal_but_for_the_padding(alike):
    records = [
        record([plain("a"), plain("b")], ("q", "uv"), (None, "long answer")),
        record([plain("c")], ("rrrrrrrr", "w")),
    ]
    for collator in (
        ReadingCollator(alike, [1, 2, 8]),
        SelectingCollator(alike, [1, 2, 8], top_k=2, store=None),
    ):
        prompts = collator(records)["prompts"]
        targets = {size: [row[row != -100].tolist() for row in layout["labels"]] for size, layout in prompts.items()}
        assert targets[1] == targets[2] == targets[8]
        for layout in prompts.values():
            is_target = layout["labels"] != -100
            assert torch.equal(layout["labels"][is_target], layout["input_ids"][is_target])
            assert layout["attention_mask"][is_target].all() and not (layout["memory_mask"] & is_target).any()


def test_a_paraphrase_has_one_of_the_instructions_and_keeps_it(processor):
    collator = ReadingCollator(processor, [1])
    records = [record([plain("a")], (None, "u"), source=f"rows.jsonl:{line}") for line in range(40)]
    first = [spelt(processor, row)[0] for row in collator(records)["prompts"][1]["input_ids"]]
    assert set(first) == {"y", "z"}
    again = [spelt(processor, collator([one])["prompts"][1]["input_ids"])[0][0] for one in reversed(records)]
    assert again[::-1] == first


def test_a_document_longer_than_a_span_is_named_with_its_row(processor):
    with pytest.raises(ValueError, match=r"`rows.jsonl:7 docs\[1\]` must fit into one span of 32 tokens"):
        ReadingCollator(processor, [1])([record([plain("a"), plain("x" * 99)], ("q", "u"), source="rows.jsonl:7")])


# --- the processor's batches, and the model --------------------------------------------------------------------------

RECORDS = [
    record(
        [plain("Paris is the capital of France."), plain("Rome is old.", "Rome"), plain("The Seine.")],
        ("What is old?", "Rome"),
        positives=[1],
    ),
    record(
        [plain("Berlin is large."), plain("Berlin")], ("Which city is large, and how large?", "Berlin"), positives=[0]
    ),
]


def texts(records: list[dict]) -> tuple[list, list, list]:
    return tuple(
        [pick(one) for one in records]
        for pick in (lambda r: r["questions"][0], lambda r: r["documents"], lambda r: r["answers"][0])
    )


def inputs(batch: dict, size: int) -> dict:
    """What a step passes to `forward` for this k."""
    rest = {name: value for name, value in batch.items() if name not in ("prompts", "labels", "gold_documents")}
    return {**rest, **batch.get("prompts", {}).get(size, {}), "memory_size": size}


def test_batches_are_those_of_the_processor_for_every_k(shared_model):
    processor, sizes = shared_model.processor, shared_model.config.memory_sizes
    reading = ReadingCollator(processor, sizes)(RECORDS)
    selecting = SelectingCollator(processor, sizes, top_k=2, store=None)(RECORDS)
    for size in sizes:
        for batch, top_k in ((reading, None), (selecting, 2)):
            expected = processor(*texts(RECORDS), memory_size=size, top_k=top_k)
            found = inputs(batch, size)
            assert set(found) - set(expected) <= {"memory_size", "positive_mask"}
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (name, size)
                assert found[name].dtype == tensor.dtype


@torch.no_grad()
def test_the_model_takes_every_layout(shared_model, tmp_path):
    processor, sizes = shared_model.processor, shared_model.config.memory_sizes
    documents = {document["text"]: document for one in RECORDS for document in one["documents"]}
    store = compress_documents(shared_model, list(documents.values()), tmp_path / "memories")
    online = SelectingCollator(processor, sizes, top_k=2, store=None)(RECORDS)
    stored = SelectingCollator(processor, sizes, top_k=2, store=store)(RECORDS)
    contrastive = SelectingCollator(processor, sizes, top_k=2, store=store, with_prompts=False)(RECORDS)
    for size in sizes:
        assert shared_model(**inputs(ReadingCollator(processor, sizes)(RECORDS), size)).loss.isfinite()
        computed, read = shared_model(**inputs(online, size)), shared_model(**inputs(stored, size))
        assert computed.loss.isfinite()
        torch.testing.assert_close(read.scores, computed.scores, rtol=0, atol=2e-3)  # memories are stored in float16
        torch.testing.assert_close(read.lm_loss, computed.lm_loss, rtol=5e-3, atol=0)
    loss = shared_model(**inputs(contrastive, sizes[-1])).loss
    torch.testing.assert_close(loss, shared_model(**inputs(stored, sizes[-1])).contrastive_loss)
