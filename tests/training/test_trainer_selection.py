"""The trainers of the stages that choose documents: stored and live candidates, gold ones, how the reasoner starts.

The runs are those of `training_runs.py`; what all trainers share is in `test_trainer.py`.
"""

import math
from pathlib import Path

import pytest
import torch
from training_runs import HOMES, assert_equal, count_roles, loss_curve

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.training import trainer as trainer_module
from recipes.training.trainer import has_dropout

CORPUS = {"candidates": "corpus", "num_candidates": 3}


def test_the_joint_step_never_runs_the_compressor(build):
    curves = []
    for name, online in (("stored", {}), ("online", {"compressor": 4})):
        trainer = build("joint", name, data_options={"compress_online": bool(online)})
        counts = count_roles(trainer.model)
        trainer.train()
        assert counts == {"reasoner": 4, "generator": 4} | online
        curves.append(loss_curve(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)  # stored memories are float16


@pytest.mark.parametrize("changes, is_complete", [({}, False), ({"num_candidates": 2, "add_gold": True}, True)])
def test_candidates_from_a_corpus(train, changes, is_complete):
    """The live best documents of all; with the gold one added its recall among the candidates is complete."""
    trainer = train("joint", data_options={**CORPUS, **changes})
    trainer.model.eval()
    gold = []
    for batch in trainer.get_train_dataloader():
        inputs = trainer._prepare_inputs(batch)
        assert inputs["memory"].shape[:2] == (2, changes.get("num_candidates", 3))
        gold += inputs["positive_mask"].any(-1).tolist()
    assert len(gold) == 8 and all(gold) == is_complete


@pytest.mark.parametrize("stage", ["contrastive", "joint"])
def test_a_search_and_its_step_read_the_question_once(build, monkeypatch, stage):
    """Without dropout; with it the search reads the question that is asked. Both learn the same where it is 0."""
    curves, passes = [], []
    for name, dropout in (("once", False), ("twice", True)):
        trainer = build(stage, name, data_options={**CORPUS, "add_gold": True}, dropout=False)
        monkeypatch.setattr(trainer_module, "has_dropout", lambda model, dropout=dropout: dropout)
        counts = count_roles(trainer.model)
        trainer.train()
        norms = (entry["grad_norm/reasoner"] for entry in trainer.state.log_history[:4])
        curves.append([*loss_curve(trainer), *norms])
        passes.append(counts["reasoner"])
    assert passes == [4, 8] and curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_dropout_is_seen_in_layers_and_in_both_settings(build):
    model = build("contrastive").model
    settings = model.config.lora["reasoner"]
    assert has_dropout(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert has_dropout(model) == bool(settings["dropout"])
    model.config.lora["reasoner"] = {**settings, "dropout": 0.0}
    assert not has_dropout(model)
    model.config.text_config.attention_dropout = 0.1
    assert has_dropout(model)


@pytest.mark.parametrize("candidates", ["corpus", "given"])
def test_a_users_corpus_serves_the_joint_stage(train, shared_model, tmp_path, candidates):
    """Any corpus of the compressor: its own ids, codec and shards; what it lacks is compressed beside it."""
    documents = [{"id": f"mine-{name}", "title": name, "text": f"{name} lives in {city}."} for name, city in HOMES]
    kept = documents if candidates == "corpus" else documents[1:]
    CompressedCorpus.build(shared_model, kept, tmp_path / "mine", codec="int8", shard_size=3)
    options = {"candidates": candidates, "corpus": str(tmp_path / "mine"), "num_candidates": 3}
    trainer = train("joint", data_options=options)
    assert all(map(math.isfinite, loss_curve(trainer)))
    is_there = (Path(trainer.args.output_dir) / "memories" / "corpus.json").exists()
    assert is_there == (candidates == "given")
    if candidates == "corpus":
        (hits,) = trainer.candidates.corpus.search(shared_model.encode_queries(["Which?"]), 1)
        assert hits[0]["document_id"].startswith("mine-")


def test_what_is_only_compared_needs_no_larger_memory(train, shared_model, tmp_path):
    """The contrastive stage draws no k to read: a corpus of the vectors that are compared serves it."""
    documents = [{"id": name, "title": name, "text": f"{name} lives in {city}."} for name, city in HOMES]
    CompressedCorpus.build(shared_model, documents, tmp_path / "small", memory_size=2)
    options = {"data_options": {**CORPUS, "add_gold": True, "corpus": str(tmp_path / "small")}}
    compared = {"retrieval_memory_size": 2}
    trainer = train("contrastive", model_options=compared, **options)
    assert all(map(math.isfinite, loss_curve(trainer))) and trainer.unwrapped.config.retrieval_memory_size == 2
    with pytest.raises(ValueError, match="memory"):
        train("joint", "reads", model_options=compared, **options)


def first_step(train, stage: str, name: str, weight: float | None, **data_options) -> dict:
    options = {} if weight is None else {"contrastive_weight": weight}
    return train(stage, name, model_options=options, data_options=data_options, max_steps=1).state.log_history[0]


def test_the_contrastive_term_needs_its_weight(train):
    """Without it, gold documents change nothing in the joint stage. Documents of other rows make the term harder."""
    plain, own = (first_step(train, "joint", f"weight {weight}", weight) for weight in (None, 1.0))
    assert "contrastive" not in plain and plain["loss"] == pytest.approx(plain["ce"], rel=1e-5)
    assert own["loss"] == pytest.approx(own["ce"] + own["contrastive"], rel=1e-5)
    shared = first_step(train, "joint", "shared", 1.0, in_batch_negatives=True)
    assert shared["contrastive"] > own["contrastive"] > 0
    assert shared["recall@1"] == own["recall@1"] and shared["ce"] == pytest.approx(own["ce"], rel=1e-5)
    alone = first_step(train, "contrastive", "alone", None)
    assert alone["loss"] == pytest.approx(alone["contrastive"], rel=1e-5) and "ce" not in alone
    with pytest.raises(ValueError, match="`in_batch_negatives` must be false if `contrastive_weight` is 0"):
        first_step(train, "joint", "unlabelled", None, in_batch_negatives=True)


def adapters(model: CLaRaForRAG, role: str) -> dict[str, torch.Tensor]:
    return {name.replace(role, "role"): t for name, t in model.state_dict().items() if f".{role}." in name}


def test_the_reasoner_starts_from_the_compressor(build, shared_model, model, tmp_path):
    def start(name: str, **options):
        return build("joint", name, model_options=options).model

    copied, fresh = start("copied", reasoner_init="compressor"), start("fresh", reasoner_init="random")
    assert_equal(adapters(copied, "reasoner"), adapters(copied, "compressor"))
    assert not any(tensor.any() for name, tensor in adapters(fresh, "reasoner").items() if "lora_B" in name)
    assert_equal(adapters(start("kept"), "reasoner"), adapters(shared_model, "reasoner"))  # it is trained already
    for name, tensor in adapters(model, "reasoner").items():
        if "lora_B" in name:
            tensor.zero_()
    model.save_pretrained(tmp_path / "stage2")
    untrained = start("untrained", checkpoint=str(tmp_path / "stage2"))
    assert_equal(adapters(untrained, "reasoner"), adapters(shared_model, "compressor"))
