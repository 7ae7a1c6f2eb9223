"""`text_share`: records whose prompts read one document as text, in the draw, the loss and a whole run.

Losses are compared with prompts that are built here. Lengths are in `test_data.py`, a batch in `test_collators.py`.
"""

import math
from collections import Counter

import pytest
import torch
from test_collators import inputs, plain, record
from training_runs import EMBEDDINGS, moved, state_of

from recipes.training.collators import ReadingCollator
from recipes.training.data import text_places

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
    assert 0 < sum(len(text_places(one, 0.5)) for one in records) < len(records)
    trainer.train()
    assert {"backbone", *EMBEDDINGS} <= {name.split(".")[0] for name in moved(before, trainer.model)}
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("stage", ["contrastive", "joint", "text"])
def test_other_stages_have_no_such_prompts(build, stage):
    with pytest.raises(ValueError, match=f"`text_share` must be 0 in the stage '{stage}', got 0.5"):
        build(stage, data_options={"text_share": 0.5})
