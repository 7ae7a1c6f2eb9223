"""Prompts that share a row, and the contrastive term of stages that read given documents.

Losses are compared with separate prompts and with InfoNCE in double precision. Literal batches: `test_collators.py`.
"""

import math
from functools import partial

import pytest
import torch
from test_collators import inputs, plain, record
from test_packing import fresh
from training_runs import EMBEDDINGS, moved, state_of

from modeling_clara import ROLES
from modeling_clara.processing_clara import Prompt
from recipes.training.collators import ReadingCollator, TextCollator, shared_prompt
from recipes.training.data import document_key

DOCUMENTS = [plain("Paris is the capital of France."), plain("Rome is old.", "Rome"), plain("The Seine.")]
TARGETS = [("What is old?", "Rome"), ("What is old?", "It is Rome, I think"), ("Who?", "Paris"), ("What flows?", "x")]
RECORDS = [
    record(DOCUMENTS, *TARGETS, positives=[1]),
    record([plain("Berlin is large.")], ("Which city is large?", "Berlin"), source="rows.jsonl:2"),
    record(DOCUMENTS[:2], (None, "Paris is it."), ("Who is old?", "Rome"), source="rows.jsonl:3"),
]


@pytest.fixture(scope="module", params=["tokens", "windows"])
def any_layout(request, backbone_folder):
    """A model in training mode without dropout, of either layout; only read."""
    return fresh(backbone_folder, request.param)


def alone(records: list[dict]) -> list[dict]:
    """Every target in a record of its own."""
    return [
        {**one, "questions": [question], "answers": [answer]}
        for one in records
        for question, answer in zip(one["questions"], one["answers"], strict=True)
    ]


# --- rows ------------------------------------------------------------------------------------------------------------


def prompt(ids: list[int], n_answer: int) -> Prompt:
    return Prompt(ids, [False] * len(ids), [-100] * (len(ids) - n_answer) + ids[-n_answer:])


@pytest.mark.parametrize(
    "prompts, ids, positions, segments",
    [
        # they differ in the answer alone: the token before an answer predicts another one in each and is not shared
        (
            [prompt([7, 8, 9, 1], 1), prompt([7, 8, 9, 2, 3], 2)],
            [7, 8, 9, 1, 9, 2, 3], [0, 1, 2, 3, 2, 3, 4], [0, 0, 1, 1, 2, 2, 2],
        ),
        ([prompt([7, 8, 9], 1)] * 3, [7, 8, 9, 8, 9, 8, 9], [0, 1, 2, 1, 2, 1, 2], [0, 1, 1, 2, 2, 3, 3]),
        ([prompt([7, 8, 9], 1)], [7, 8, 9], [0, 1, 2], [1, 1, 1]),
        ([prompt([1, 2, 3], 1), prompt([4, 5], 1)], [1, 2, 3, 4, 5], [0, 1, 2, 0, 1], [1, 1, 1, 2, 2]),
        # an answer from the start
        ([prompt([1, 2], 2), prompt([1, 2, 3], 1)], [1, 2, 1, 2, 3], [0, 1, 0, 1, 2], [1, 1, 2, 2, 2]),
    ],
)  # fmt: skip
def test_the_prefix_ends_before_the_token_that_predicts_an_answer(prompts, ids, positions, segments):
    row, *rest = shared_prompt(prompts)
    assert row.input_ids == ids and rest == [positions, segments]
    answers = [[label for label in one.labels if label != -100] for one in prompts]
    assert [label for label in row.labels if label != -100] == sum(answers, [])


@pytest.mark.parametrize("is_grad", [True, False])
@pytest.mark.parametrize(
    "make, records",
    [
        (ReadingCollator, RECORDS),
        (partial(ReadingCollator, text_share=1.0), RECORDS[:2]),  # one with a paraphrase reads none of its texts
        (partial(TextCollator, hidden_size=32), [*RECORDS[:2], record(DOCUMENTS[:1], *TARGETS[:2])]),
    ],
    ids=["memories", "with texts", "texts alone"],
)
def test_a_row_of_questions_loses_what_they_lose_alone(any_layout, make, records, is_grad):
    """Packed in training and padded in evaluation; gradients of the compressor and the generator as well."""
    model = any_layout
    collator = make(model.processor, model.config.memory_sizes)
    batches = [collator(rows) for rows in (records, alone(records))]
    assert batches[0]["labels"].shape[0] == len(records) < batches[1]["labels"].shape[0]
    for size in model.config.memory_sizes:
        losses, logits, gradients = [], [], []
        for batch in batches:
            model.zero_grad()
            with torch.set_grad_enabled(is_grad):
                output = model(**inputs(batch, size))
            losses.append(output.lm_loss.detach())
            logits.append(output.logits.detach())
            if is_grad:
                output.lm_loss.backward()
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)  # of the targets alone
        for name, gradient in (gradients[0] if is_grad else {}).items():
            bound = 1e-4 * float(gradient.abs().max().clamp(min=1e-3))
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=bound)


# --- the contrastive term --------------------------------------------------------------------------------------------

GOLD = [
    record(DOCUMENTS, ("What is old?", "Rome"), ("Where is it?", "x"), ("Not asked", "x"), positives=[0, 1]),
    record([plain("Berlin is large."), DOCUMENTS[1]], ("Which city is large?", "Berlin"), positives=[0], source="b"),
    record([plain("Oslo.")], (None, "Oslo."), (None, "In Oslo."), source="c"),
    record([plain("Bern is small.")], (None, "Bern."), ("Small?", "yes"), source="d"),
]  # fmt: skip


def by_hand(model, records: list[dict], n_queries: int) -> float:
    """The mean over records of the mean over their questions of InfoNCE, document by document in double precision."""
    temperature, size = model.config.retrieval_temperature, model.config.retrieval_memory_size
    documents = [document for one in records for document in one["documents"]]
    memories = model.compress(documents).double()
    total = 0.0
    for one in records:
        gold = {document_key(one["documents"][i]) for i in one["positives"] or range(len(one["documents"]))}
        questions = [question for question in one["questions"] if question is not None][:n_queries]
        for question in questions:
            query = model.encode_queries([question]).double()[0, :size].flatten()
            weights = {True: 0.0, False: 0.0}
            for document, memory in zip(documents, memories, strict=True):
                vector = memory[:size].flatten()
                cosine = float(query @ vector / query.norm() / vector.norm())
                weights[document_key(document) in gold] += math.exp(cosine / temperature)
            total -= math.log(weights[True] / sum(weights.values())) / len(questions)
    return total / len(records)


@pytest.mark.parametrize("n_queries", [1, 2, 5])
def test_the_term_is_infonce_by_hand(any_layout, n_queries):
    """With several positives, a document in two rows, and a record of paraphrases, whose documents are negatives."""
    model = any_layout
    collator = ReadingCollator(model.processor, model.config.memory_sizes, n_queries=n_queries)
    expected = by_hand(model, GOLD, n_queries)
    for size in model.config.memory_sizes:
        output = model(**inputs(collator(GOLD), size))
        assert output.contrastive_loss.item() == pytest.approx(expected, rel=1e-3)
        aligned = 0 if output.alignment_loss is None else model.config.alignment_weight * output.alignment_loss
        weighted = output.lm_loss + aligned + model.config.contrastive_weight * output.contrastive_loss
        torch.testing.assert_close(output.loss, weighted)
        assert output.selected is None
        n_asked = {1: 3, 2: 4, 5: 5}[n_queries]
        assert output.scores.shape == (n_asked, 4 * 3) and int(output.scores.isinf().sum()) == n_asked * 5
        half = model(**inputs(collator(GOLD), size), num_samples_in_batch=2 * len(GOLD))  # one of two micro-batches
        torch.testing.assert_close(2 * half.contrastive_loss, output.contrastive_loss)


@pytest.mark.parametrize("weight, trains, n_queries", [(0.5, True, 2), (0.0, True, 0), (0.0, False, 0)])
def test_only_a_weight_and_a_reasoner_that_trains_add_questions(build, weight, trains, n_queries):
    roles = ROLES if trains else ["compressor", "generator"]
    options = {"model_options": {"contrastive_weight": weight}, "data_options": {"targets_per_document": 3}}
    trainer = build(**options, trainable_roles=list(roles))
    batch = trainer.data_collator([trainer.train_dataset[1]])  # two questions and a paraphrase
    assert ("query_rows" in batch) == ("batch_positive_mask" in batch) == bool(n_queries)
    assert len(batch.get("query_rows", ())) == n_queries


def test_the_weight_of_a_checkpoint_asks_for_nothing(build, model, tmp_path):
    """A stage without the reasoner goes on from a checkpoint that was trained with the term."""
    model.config.contrastive_weight = 0.5
    model.save_pretrained(tmp_path / "start")
    trainer = build("instruct", model_options={"checkpoint": str(tmp_path / "start")})
    assert trainer.model.config.contrastive_weight == 0.5
    assert "query_rows" not in trainer.data_collator([trainer.train_dataset[0]])


@pytest.mark.parametrize(
    "stage, message", [("pretrain", "reasoner"), ("instruct", "reasoner"), ("text", "it has no contrastive term")]
)
def test_a_weight_that_nothing_would_use_is_refused(build, stage, message):
    with pytest.raises(ValueError, match=message):
        build(stage, model_options={"contrastive_weight": 0.5})


@pytest.mark.parametrize("stage, targets", [("pretrain", 2), ("instruct", 1)])
def test_a_run_moves_reasoner_and_compressor(build, stage, targets):
    trainer = build(
        stage, model_options={"contrastive_weight": 1.0, "retrieval_temperature": 0.2},
        data_options={"targets_per_document": targets}, trainable_roles=list(ROLES), max_steps=6,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3,
    )  # fmt: skip
    before = state_of(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) >= EMBEDDINGS | {name for name in before if set(ROLES) & set(name.split("."))}
    logged = [entry for entry in trainer.state.log_history if "contrastive" in entry]
    assert {"ce", "mse", "grad_norm/reasoner", "grad_norm/compressor"} <= set(logged[0])
    losses = [entry["contrastive"] for entry in logged]
    assert len(losses) == 6 and all(map(math.isfinite, losses)) and sum(losses[-2:]) < sum(losses[:2])
    assert "eval_contrastive" in trainer.evaluate()
