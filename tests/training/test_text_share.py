"""`text_share`: records whose prompts read one document as text, in the batch, the loss and a whole run.

A literal batch shows the layout; losses are held against prompts that are built here.
"""

import json
from collections import Counter

import pytest
import torch
from test_collators import inputs, plain, processor, record, spelt  # noqa: F401

from modeling_clara.processing_clara import Prompt
from recipes.training.arguments import CLaRaTrainingArguments, DataArguments, ModelArguments
from recipes.training.checkpoints import check_folder, claim_folder, describe_run
from recipes.training.collators import ReadingCollator, with_slots
from recipes.training.data import BadRow, text_places
from recipes.training.records import RecordReader

THREE = [plain("Rome is old.", "Rome"), plain("Paris"), plain("The Seine flows.", "Seine")]


def draws(share: float, n: int = 2000, n_documents: int = 3) -> list[list[int]]:
    documents = THREE[:n_documents]
    rows = ({"source": f"rows.jsonl:{i}", "documents": documents, "questions": ["Who?"]} for i in range(n))
    return [text_places(row, share) for row in rows]


# --- the draw --------------------------------------------------------------------------------------------------------


def test_the_share_is_kept_and_every_document_is_as_likely():
    assert draws(0.0) == [[]] * 2000 and all(len(places) == 1 for places in draws(1.0))
    drawn = draws(0.3)
    counts = Counter(place for places in drawn for place in places)
    assert sum(counts.values()) == pytest.approx(600, abs=80) and set(counts) == {0, 1, 2}
    assert all(count == pytest.approx(200, abs=50) for count in counts.values())
    assert drawn == draws(0.3)
    # a larger share only adds: the same records have the same text
    assert all(few in ([], many) for few, many in zip(drawn, draws(0.6), strict=True))


def test_the_draw_is_of_the_source_and_not_for_paraphrases():
    one = record(THREE, ("a", "b"))
    drawn = {source: text_places({**one, "source": source}, 0.5) for source in (f"x:{n}" for n in range(40))}
    assert len({tuple(places) for places in drawn.values()}) == 4
    for source, places in drawn.items():  # whatever else a record of this row has
        other = {**record(THREE, ("c", "d"), ("e", "f"), positives=[1]), "source": source}
        assert text_places(other, 0.5) == places
        assert text_places({**other, "questions": ["c", None]}, 1.0) == []


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_exactly_this(processor):  # noqa: F811
    """Of `ab` and `c` one is text, after the memory of the other; a record of one document has no slots left."""
    two = [plain("ab"), plain("c", "T")]
    records = [record(two, ("q", "uv"), ("rr", "u")), record([plain("d")], ("s", "w")), record(two, (None, "u"))]
    (place,) = text_places(records[0], 1.0)
    batch = ReadingCollator(processor, [1, 2], text_share=1.0)(records)
    text = ["a b", "T Ċ c"][place]
    prompts = [
        f"x _ _ {text} q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "x d s <|im_start|> w </s>",
        "z _ _ _ _ <|im_start|> u </s>",
    ]
    found = [" ".join(row.split()) for row in spelt(processor, batch["prompts"][1]["input_ids"])]
    length = max(len(prompt.split()) for prompt in prompts)
    for row, prompt in zip(found, prompts, strict=True):
        padded = " ".join(["_"] * (length - len(prompt.split())) + prompt.split())
        assert row in (padded, padded.replace("z", "y"))
    n_common = 3 + len(text.split())
    segments = batch["prompts"][1]["prompt_segments"]
    assert segments[0].tolist() == [0] * n_common + [1] * 5 + [2] * 5
    assert [mask.sum(-1).tolist() for mask in (batch["prompts"][k]["memory_mask"] for k in (1, 2))] == [
        [2, 0, 4], [3, 0, 6],
    ]  # fmt: skip
    expected = [[place != 0, place != 1], [False, True], [True, True]]
    assert batch["prompt_document_mask"].tolist() == expected


def test_a_prompt_without_slots_is_the_same_for_every_k():
    prompt = Prompt([7, 8], [False, False], [-100, 8])
    assert with_slots(prompt, 0, 0) == prompt


def test_without_a_share_the_batch_is_todays(processor):  # noqa: F811
    records = [record([plain("ab"), plain("c", "T")], ("q", "uv"), ("rr", "u")), record([plain("d")], ("s", "w"))]
    batch, other = (ReadingCollator(processor, [1, 2], text_share=share)(records) for share in (0.0, 1e-9))
    assert "prompt_document_mask" not in batch
    assert other.pop("prompt_document_mask")[0].all()
    for name in ("document_input_ids", "labels"):
        assert torch.equal(batch[name], other[name])
    for size, layout in batch["prompts"].items():
        assert all(torch.equal(tensor, other["prompts"][size][name]) for name, tensor in layout.items())


# --- the loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_prompts_built_by_hand(shared_model, share):
    """Memories of the other documents first, then the text, each prompt alone; the batch mixes their numbers."""
    model, make = shared_model, shared_model.processor
    targets = [("What is old?", "Rome"), ("Who flows?", "the Seine"), ("Where?", "Paris")]
    records = [
        record(THREE, *targets),
        record(THREE[:1], *targets[:2], source="rows.jsonl:2"),
        record(THREE, (None, "Rome is old"), targets[0], source="rows.jsonl:3"),
        record(THREE, *targets[1:], source="rows.jsonl:4"),
    ]
    collator = ReadingCollator(make, model.config.memory_sizes, text_share=share)
    for size in model.config.memory_sizes:
        losses, counts, reads = [], [], []
        for one in records:
            memory = model.compress(one["documents"], memory_size=size)
            places = text_places(one, share)
            kept = [place for place in range(len(memory)) if place not in places]
            texts = [one["documents"][place] for place in places]
            for question, answer in zip(one["questions"], one["answers"], strict=True):
                reads.append(len(kept))
                instruction = collator.prompt(one, question, answer, len(kept)) if question is None else None
                prompt = instruction and with_slots(instruction, len(kept) * (size + 1), make.pad_token_id)
                prompt = prompt or make.build_prompt(question, len(kept), size, answer, text_documents=texts)
                batch = make.pad_prompts([prompt])
                read = {"memory": memory[kept][None]} if kept else {"memory": torch.zeros(1, 0, size, 32)}
                losses.append(model(**read, **batch, memory_size=size).lm_loss)
                counts.append((batch["labels"] != -100).sum())
        weights = torch.stack(counts).double()
        expected = (torch.stack(losses).double() * weights).sum() / weights.sum()
        found = model(**inputs(collator(records), size)).lm_loss
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        assert share == 0 or len(set(reads)) > 1


# --- records and runs ------------------------------------------------------------------------------------------------


def reader(processor, share: float, window: int) -> RecordReader:  # noqa: F811
    return RecordReader(processor, "instruct", window=window, memory_size=4, top_k=2, text_share=share)


def test_lengths_and_the_window_count_the_text(shared_model):
    make, row = shared_model.processor, {"question": "Who?", "docs": ["Rome " * 12, "Seine " * 12], "answer": "x"}
    (plain_record,), (one,) = (reader(make, share, 512)("rows.jsonl:1", row) for share in (0.0, 1.0))
    (place,) = text_places(one, 1.0)
    prompt = make.build_prompt("Who?", 1, 4, "x", text_documents=[one["documents"][place]])
    assert one["length"] == len(prompt.input_ids) > plain_record["length"]
    assert {**one, "length": 0} == {**plain_record, "length": 0}
    window = one["length"] - 1
    assert reader(make, 0.0, window)("rows.jsonl:1", row)
    with pytest.raises(BadRow, match=r"rows.jsonl:1.*positions for 1 memories of 4 and one text, question and answer"):
        reader(make, 1.0, window)("rows.jsonl:1", row)


def test_the_length_of_a_record_with_a_paraphrase_counts_memories_alone(shared_model):
    """Its questions read no text either, so a long text must not be refused, nor a short one pass for its slots."""
    make = shared_model.processor
    row = {"docs": ["Rome " * 12, "Seine"], "qas": [{"question": "Who?", "answers": ["x"]}], "paraphrase": "R"}
    pairs = [
        RecordReader(make, "pretrain", window=512, memory_size=4, top_k=2, targets_per_document=2, text_share=share)
        for share in (0.0, 1.0)
    ]
    (without,), (one,) = (read("rows.jsonl:1", row) for read in pairs)
    assert None in one["questions"] and len(one["questions"]) == 2 and one == without


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_run_learns_and_reads_the_same_prompts_in_every_epoch(build, stage):
    trainer = build(stage, data_options={"text_share": 0.5}, max_steps=3)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    records = list(trainer.train_dataset)
    assert 0 < sum(len(text_places(one, 0.5)) for one in records) < len(records)
    trainer.train()
    moved = {n.split(".")[0] for n, tensor in trainer.model.state_dict().items() if not torch.equal(before[n], tensor)}
    assert {"backbone", "memory_embeddings", "separator_embedding"} <= moved
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.parametrize("stage", ["contrastive", "joint", "text"])
def test_other_stages_have_no_such_prompts(build, stage):
    with pytest.raises(ValueError, match=f"`text_share` must be 0 in the stage '{stage}', got 0.5"):
        build(stage, data_options={"text_share": 0.5})


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(build, share):
    with pytest.raises(ValueError, match="`text_share` must be between 0 and 1"):
        build(data_options={"text_share": share})


def test_a_run_from_before_the_option_goes_on(tmp_path):
    model, training = ModelArguments(checkpoint="c"), CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def describe(share: float) -> dict:
        return describe_run(model, DataArguments([{"path": "a"}], text_share=share), training)

    before = describe(0.0)
    del before["data"]["text_share"]
    claim_folder(tmp_path, before)
    assert json.loads((tmp_path / "run.json").read_text()) == before
    assert check_folder(tmp_path, describe(0.0)) is None
    with pytest.raises(ValueError, match=r"\['data.text_share'\] differ"):
        check_folder(tmp_path, describe(0.5))
