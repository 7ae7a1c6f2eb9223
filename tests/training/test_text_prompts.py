"""Texts in prompts: the stage "text", which reads nothing else, and `text_share`, one document in a share of records.

Losses and answers are those of the backbone with the generator merged into its weights, or of prompts that are built
here. Records are in `test_data.py`, batches in `test_collators.py`, what all stages share is in `test_trainer.py`.
"""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_collators import inputs, plain, record
from training_runs import CITIES, EMBEDDINGS, count_roles, moved, state_of
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRAG
from modeling_clara.corpus.storage import read_lines
from modeling_clara.generation_clara import eval_mode
from recipes.training.collators import ReadingCollator
from recipes.training.data import text_places


@pytest.fixture(scope="module")
def merged(shared_model, backbone_folder):
    """The backbone as transformers loads it, the generator's low-rank products added to its weights."""
    reference = AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32).eval()
    names = [name for name, module in shared_model.backbone.named_modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for name in names:
            delta = shared_model.backbone.get_submodule(name).get_delta_weight("generator")
            reference.get_submodule(name.removeprefix("base_model.model.")).weight += delta
    assert names
    return reference


@torch.no_grad()
def plain_loss(reference, model: CLaRaForRAG, records: list[dict]) -> float:
    """Mean cross entropy of all answer tokens, prompt by prompt without padding."""
    total, count = 0.0, 0
    for one in records:
        for question, answer in zip(one["questions"], one["answers"], strict=True):
            prompt = model.processor.build_prompt(question, 0, 4, answer, text_documents=one["documents"])
            logits = reference(input_ids=torch.tensor([prompt.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(prompt.labels[1:])
            is_target = targets != -100
            total -= float(logits.log_softmax(-1)[is_target].gather(1, targets[is_target][:, None]).sum())
            count += int(is_target.sum())
    return total / count


TARGETS = {"data_options": {"targets_per_document": 2}, "dropout": False}


def test_the_loss_is_that_of_the_backbone_with_the_generator_merged(build, merged, backbone_folder):
    """Of a batch for every k, and of a step of two micro-batches with unequal counts of targets."""
    trainer = build("text", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, **TARGETS)
    model, records = trainer.model, list(trainer.train_dataset)
    assert len(records) == 8 and {len(one["questions"]) for one in records} == {1, 2}
    for part in (records[:1], records[1:4], records):
        expected = plain_loss(merged, model, part)
        for size in model.config.memory_sizes:
            with torch.no_grad():
                found = float(model(**inputs(trainer.data_collator(part), size)).loss)
            assert found == pytest.approx(expected, rel=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(backbone_folder).eval()
    assert abs(plain_loss(untrained, model, records) - expected) > 0.05  # the adapter matters
    counts = count_roles(model)
    trainer.train()
    assert counts == {"generator": 2}
    step = trainer.state.log_history[0]
    assert step["loss"] == pytest.approx(expected, rel=1e-5) and step["ce"] == pytest.approx(expected, rel=1e-5)
    assert {"grad_norm/generator", "exact_match"} <= set(step) and "mse" not in step


def test_evaluation_and_samples_are_read_from_texts(build, merged):
    """The same for any batch; sample answers are what greedy decoding with the merged generator writes."""
    for size in (1, 3):
        trainer = build("text", f"run{size}", per_device_eval_batch_size=size, num_samples=2, **TARGETS)
        model, records = trainer.model, list(trainer.eval_dataset)
        assert trainer.evaluate()["eval_ce"] == pytest.approx(plain_loss(merged, model, records), rel=1e-5)
    samples = read_lines(Path(trainer.args.output_dir) / "samples.jsonl")
    assert [row["expected"] for row in samples] == CITIES[:2]
    for row, one in zip(samples, records, strict=False):
        prompt = model.processor.build_prompt(one["questions"][0], 0, 4, text_documents=one["documents"])
        config = model.build_generation_config(None, 32)
        ids = torch.tensor([prompt.input_ids])
        with torch.no_grad(), eval_mode(model):
            found = merged.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answer = model.decode_answer(found[0, ids.shape[1] :].tolist(), config.eos_token_id)
        assert row["answer"] == answer and row["question"] == one["questions"][0]


# --- a share of the records ------------------------------------------------------------------------------------------

THREE = [plain("Rome is old.", "Rome"), plain("Paris"), plain("The Seine flows.", "Seine")]


def draws(share: float) -> list[list[int]]:
    return [text_places(record(THREE, ("Who?", "x"), source=f"rows.jsonl:{i}"), share) for i in range(2000)]


def test_the_share_is_kept_and_every_document_is_as_likely():
    assert draws(0.0) == [[]] * 2000 and all(len(places) == 1 for places in draws(1.0))
    drawn = draws(0.3)
    counts = Counter(place for places in drawn for place in places)
    assert sum(counts.values()) == pytest.approx(600, abs=80) and set(counts) == {0, 1, 2}
    assert all(count == pytest.approx(200, abs=50) for count in counts.values())
    # a larger share only adds: the same records have the same text
    assert all(few in ([], many) for few, many in zip(drawn, draws(0.6), strict=True))


def test_the_draw_is_of_the_source_and_not_for_paraphrases():
    drawn = {source: text_places(record(THREE, ("a", "b"), source=source), 0.5) for source in map(str, range(40))}
    assert len({tuple(places) for places in drawn.values()}) == 4
    for source, places in drawn.items():  # whatever else a record of this row has
        assert text_places(record(THREE, ("c", "d"), ("e", "f"), positives=[1], source=source), 0.5) == places
        assert text_places(record(THREE, ("c", "d"), (None, "f"), source=source), 1.0) == []


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
    for size in model.config.memory_sizes:
        losses, counts, reads = [], [], []
        for one in records:
            memory = model.compress(one["documents"], memory_size=size)
            places = text_places(one, share)
            kept = [place for place in range(len(memory)) if place not in places]
            texts = [one["documents"][place] for place in places]
            for target in zip(one["questions"], one["answers"], strict=True):
                reads.append(len(kept))
                batch = make.pad_prompts([ReadingCollator(make, [size]).prompt(one, *target, len(kept), texts)])
                losses.append(model(memory=memory[kept][None], **batch, memory_size=size).lm_loss)
                counts.append((batch["labels"] != -100).sum())
        weights = torch.stack(counts).double()
        expected = (torch.stack(losses).double() * weights).sum() / weights.sum()
        batch = ReadingCollator(make, model.config.memory_sizes, text_share=share)(records)
        assert float(model(**inputs(batch, size)).lm_loss) == pytest.approx(float(expected), rel=1e-5)
        assert share == 0 or len(set(reads)) > 1


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_run_learns_from_both_kinds_of_records(build, stage):
    trainer = build(stage, data_options={"text_share": 0.5}, max_steps=3)
    before, records = state_of(trainer.model), list(trainer.train_dataset)
    kinds = {len(text_places({**records[0], "source": f"rows.jsonl:{number}"}, 0.5)) for number in range(64)}
    assert kinds == {0, 1}  # of the records here by chance all may be of one kind: their file has a name of its own
    trainer.train()
    assert {"backbone", *EMBEDDINGS} <= {name.split(".")[0] for name in moved(before, trainer.model)}
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("stage", ["contrastive", "joint", "text"])
def test_other_stages_have_no_such_prompts(build, stage):
    with pytest.raises(ValueError, match=f"`text_share` must be 0 in the stage '{stage}', got 0.5"):
        build(stage, data_options={"text_share": 0.5})
