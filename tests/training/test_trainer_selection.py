"""The trainers of the stages that choose documents: stored and live candidates, gold ones, how the reasoner starts.

The runs are those of `training_runs.py`; what all trainers share is in `test_trainer.py`.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from training_runs import CITIES, NAMES, assert_equal, count_roles, loss_curve

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.training import trainer as trainer_module
from recipes.training.trainer import has_dropout


def test_the_joint_step_never_runs_the_compressor(build):
    stored = build("joint", "stored")
    counts = count_roles(stored.model)
    stored.train()
    assert counts == {"reasoner": 4, "generator": 4}
    online = build("joint", "online", data_options={"compress_online": True})
    counts = count_roles(online.model)
    online.train()
    assert counts == {"compressor": 4, "reasoner": 4, "generator": 4}
    for a, b in zip(loss_curve(stored), loss_curve(online), strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # stored memories are float16


def test_candidates_from_a_corpus(build):
    """The live best documents of all; with the gold one added its recall among the candidates is complete."""
    options = {"candidates": "corpus", "num_candidates": 3}
    trainer = build("joint", data_options=options)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    inputs = trainer._prepare_inputs(batch)
    assert inputs["memory"].shape[:2] == (2, 3)
    queries = [record["questions"][0] for record in trainer.train_dataset]
    added = build("joint", "added", data_options={**options, "num_candidates": 2, "add_gold": True})
    added.model.eval()
    for batch in added.get_train_dataloader():
        inputs = added._prepare_inputs(batch)
        assert inputs["positive_mask"].any(-1).all()
    assert len(queries) == 8


@pytest.mark.parametrize("stage", ["contrastive", "joint"])
def test_a_search_and_its_step_read_the_question_once(build, monkeypatch, stage):
    """Without dropout; with it the search reads the question that is asked. Both learn the same where it is 0."""
    options = {"data_options": {"candidates": "corpus", "num_candidates": 3, "add_gold": True}}
    curves, passes = [], []
    for name, dropout in (("once", False), ("twice", True)):
        trainer = build(stage, name, **options)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        monkeypatch.setattr(trainer_module, "has_dropout", lambda model, dropout=dropout: dropout)
        counts = count_roles(trainer.model)
        trainer.train()
        curves.append(
            [*loss_curve(trainer), *(entry["grad_norm/reasoner"] for entry in trainer.state.log_history[:4])]
        )
        passes.append(counts["reasoner"])
    assert passes == [4, 8] and curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_dropout_is_seen_wherever_it_is(build):
    model = build("contrastive").model
    assert has_dropout(model) == bool(model.config.lora["reasoner"]["dropout"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.lora["reasoner"] = {**model.config.lora["reasoner"], "dropout": 0.0}
    assert not has_dropout(model)
    model.config.text_config.attention_dropout = 0.1
    assert has_dropout(model)


@pytest.mark.parametrize("candidates", ["corpus", "given"])
def test_a_users_corpus_serves_the_joint_stage(build, trained, tmp_path, candidates):
    """Any corpus of the compressor: its own ids, codec and shards; what it lacks is compressed beside it."""
    documents = [
        {"id": f"mine-{name}", "title": name, "text": f"{name} lives in {city}."}
        for name, city in zip(NAMES, CITIES, strict=True)
    ]
    kept = documents if candidates == "corpus" else documents[1:]
    model = CLaRaForRAG.from_pretrained(trained)
    CompressedCorpus.build(model, kept, tmp_path / "mine", codec="int8", shard_size=3)
    options = {"candidates": candidates, "corpus": str(tmp_path / "mine"), "num_candidates": 3}
    trainer = build("joint", data_options=options)
    trainer.train()
    assert all(math.isfinite(loss) for loss in loss_curve(trainer))
    is_there = (Path(trainer.args.output_dir) / "memories" / "corpus.json").exists()
    assert is_there == (candidates == "given")
    if candidates == "corpus":
        (hits,) = trainer.candidates.corpus.search(model.encode_queries(["Which?"]), 1)
        assert hits[0]["document_id"].startswith("mine-")


def test_the_contrastive_term_needs_its_weight(build):
    """Without a weight, gold documents change nothing in the joint stage; with one they do."""
    plain, weighted = build("joint", "plain"), build("joint", "weighted", model_options={"contrastive_weight": 1.0})
    plain.train()
    weighted.train()
    assert "contrastive" not in plain.state.log_history[0]
    first = weighted.state.log_history[0]
    assert first["loss"] == pytest.approx(first["ce"] + first["contrastive"], rel=1e-5)
    contrastive = build("contrastive", "alone", max_steps=1)
    contrastive.train()
    step = contrastive.state.log_history[0]
    assert step["loss"] == pytest.approx(step["contrastive"], rel=1e-5) and "ce" not in step


def test_in_batch_negatives_make_the_contrastive_term_harder(build):
    def first_step(name: str, in_batch_negatives: bool) -> dict:
        data = {"in_batch_negatives": in_batch_negatives}
        trainer = build("joint", name, model_options={"contrastive_weight": 1.0}, data_options=data, max_steps=1)
        trainer.train()
        return trainer.state.log_history[0]

    own, shared = first_step("own", False), first_step("shared", True)
    assert shared["contrastive"] > own["contrastive"] > 0
    assert shared["recall@1"] == own["recall@1"] and shared["ce"] == pytest.approx(own["ce"], rel=1e-5)
    with pytest.raises(ValueError, match="`in_batch_negatives` must be false if `contrastive_weight` is 0"):
        build("joint", "unlabelled", data_options={"in_batch_negatives": True})


def test_the_reasoner_starts_from_the_compressor(build, trained):
    def adapters(model, role):
        return {n.replace(role, "role"): t for n, t in model.state_dict().items() if f".{role}." in n}

    kept = build("joint", "kept").model  # its reasoner is trained already
    copied = build("joint", "copied", model_options={"reasoner_init": "compressor"}).model
    fresh = build("joint", "fresh", model_options={"reasoner_init": "random"}).model
    assert_equal(adapters(copied, "reasoner"), adapters(copied, "compressor"))
    assert_equal(adapters(kept, "reasoner"), adapters(CLaRaForRAG.from_pretrained(trained), "reasoner"))
    assert not any(tensor.any() for name, tensor in adapters(fresh, "reasoner").items() if "lora_B" in name)


def test_an_untrained_reasoner_is_initialised_by_itself(build, shared_model, tmp_path):
    model = copy.deepcopy(shared_model)
    for name, parameter in model.named_parameters():
        if ".reasoner." in name and "lora_B" in name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "stage2")
    joint = build("joint", model_options={"checkpoint": str(tmp_path / "stage2")}).model
    names = [name for name in joint.state_dict() if ".reasoner." in name]
    assert all(
        torch.equal(joint.state_dict()[name], joint.state_dict()[name.replace("reasoner", "compressor")])
        for name in names
    )
