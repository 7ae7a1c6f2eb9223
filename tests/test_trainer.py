"""The trainers: what moves, what is held, equal results for any batching, and a restart that changes nothing.

Every test trains a tiny real model for a few steps on rows written to disk, through the same preparation as
`train.py`.
"""

import copy
import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import trainer as trainer_module
from arguments import CLaRaTrainingArguments, DataArguments, ModelArguments
from checkpoints import last_checkpoint
from preparation import prepare_trainer, seed_everything
from trainer import has_dropout, memory_size_of_step, part_of

from modeling_clara import CLaRaForRAG, CompressedCorpus

NAMES = ["Mira", "Anton", "Clara", "Boris", "Dora", "Emil", "Flora", "Gustav"]
CITIES = ["Paris", "Rome", "Berlin", "Lima", "Oslo", "Cairo", "Prague", "Vienna in the snow"]
PARTS = {
    "pretrain": {"compressor", "generator", "rows"},
    "instruct": {"compressor", "generator", "rows"},
    "contrastive": {"reasoner"},
    "joint": {"reasoner", "generator"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file for stage 1 and one for the others; answers, documents and lists differ in length."""
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "pretrain.jsonl", "w") as file:
        for name, city in zip(NAMES, CITIES, strict=True):
            pairs = [{"question": f"Where does {name} live?", "answers": [city]}] * (1 + len(name) % 2)
            row = {
                "title": name,
                "text": f"{name} lives in {city}.",
                "qas": pairs,
                "paraphrase": f"In {city} lives {name}.",
            }
            file.write(json.dumps(row) + "\n")
    with open(folder / "select.jsonl", "w") as file:
        for index, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
            others = [(index + step) % 8 for step in range(3 + index % 2)]
            docs = [f"{NAMES[other]}\n{NAMES[other]} lives in {CITIES[other]}." for other in sorted(others)]
            row = {"question": f"Where does {name} live?", "answer": city, "docs": docs}
            file.write(json.dumps({**row, "pos_index": [sorted(others).index(index)]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(shared_model, tmp_path_factory):
    """A checkpoint whose adapters matter, its reasoner untrained: what stage 2 leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    shared_model.save_pretrained(folder)
    return folder


@pytest.fixture
def build(files, trained, tmp_path):
    """`build(stage, name, **options)`: a trainer in a folder of its own."""

    def make(stage="pretrain", name="run", model_options=None, data_options=None, **options):
        path = str(files / ("pretrain.jsonl" if stage == "pretrain" else "select.jsonl"))
        model_arguments = ModelArguments(**{"checkpoint": str(trained), **(model_options or {})})
        data = DataArguments(datasets=[{"path": path}], eval_datasets=[{"path": path}], **(data_options or {}))
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "num_samples": 1,
        }
        training = CLaRaTrainingArguments(output_dir=str(tmp_path / name), stage=stage, **{**defaults, **options})
        seed_everything(training)
        return prepare_trainer(model_arguments, data, training)

    return make


def state_of(model: CLaRaForRAG) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict, right: dict, **tolerance) -> None:
    for name, tensor in left.items():
        if tolerance:
            torch.testing.assert_close(tensor, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("stage", PARTS)
def test_what_should_train_moves_and_nothing_else(build, stage):
    trainer = build(stage, max_steps=3)
    before = state_of(trainer.model)
    trainer.train()
    after = state_of(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trainable} == PARTS[stage]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}


def test_a_backbone_that_trains_is_saved_and_comes_back(build, tmp_path):
    trainer = build(model_options={"train_backbone": True}, max_steps=2)
    before = state_of(trainer.model)
    trainer.train()
    moved = {
        part_of(name) for name, tensor in state_of(trainer.model).items() if not torch.equal(before[name], tensor)
    }
    assert moved == PARTS["pretrain"] | {"backbone"}
    trainer.save_model()
    loaded = CLaRaForRAG.from_pretrained(tmp_path / "run")
    assert_equal(state_of(trainer.model), state_of(loaded))


@pytest.mark.parametrize("stage, order", [*product(PARTS, ("random", "group_by_length")), ("pretrain", "sequential")])
def test_resuming_equals_not_stopping(build, stage, order):
    """Bit-equal, dropout and the draw of k included, wherever in the second epoch the run was killed."""
    options = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": order}
    per_epoch = len(build(stage, "count").train_dataset) // 4
    options |= {"max_steps": 2 * per_epoch, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    whole = build(stage, "whole", **options)
    whole.train()
    killed = build(stage, "killed", **options)
    folder = killed.args.output_dir
    killed.train()
    for step in range(per_epoch + 2, 2 * per_epoch + 1):
        shutil.rmtree(f"{folder}/checkpoint-{step}")
    resumed = build(stage, "killed", **options)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(Path(folder))))
    assert resumed.state.global_step == 2 * per_epoch
    assert_equal(state_of(whole.model), state_of(resumed.model))
    assert loss_curve(whole) == loss_curve(resumed)


def loss_curve(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resuming_a_trained_backbone_equals_not_stopping(build):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "model_options": {"train_backbone": True}}
    whole = build(name="whole", **options)
    whole.train()
    killed = build(name="killed", **options)
    killed.train()
    resumed = build(name="killed", **options)
    resumed.train(resume_from_checkpoint=f"{killed.args.output_dir}/checkpoint-1")
    assert_equal(state_of(whole.model), state_of(resumed.model))


@pytest.mark.parametrize("stage", PARTS)
def test_accumulating_micro_batches_equals_one_batch(build, stage):
    """4 x 1 == 1 x 4, with targets and candidate lists of unequal length."""
    runs = []
    for name, size, accumulation in (("one", 4, 1), ("four", 1, 4)):
        trainer = build(
            stage,
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",  # AdamW's first steps are signs, which rounding flips
            learning_rate=1e-1,
        )
        without_dropout(trainer.model)
        trainer.train()
        runs.append(trainer)
    assert_equal(state_of(runs[0].model), state_of(runs[1].model), rtol=1e-4, atol=1e-6)
    for one, four in zip(*(trainer.state.log_history[:2] for trainer in runs), strict=True):
        for name in set(one) - {"epoch", "tokens_per_second", "step"}:
            assert one[name] == pytest.approx(four[name], rel=1e-4, abs=1e-6), name


def without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("stage", PARTS)
def test_checkpointing_activations_changes_nothing(build, stage):
    plain = build(stage, "plain", max_steps=2)
    plain.train()
    checkpointed = build(stage, "checkpointed", max_steps=2, activation_checkpointing=True)
    checkpointed.train()
    assert_equal(state_of(plain.model), state_of(checkpointed.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", PARTS)
def test_bfloat16_keeps_what_trains_in_float32(build, stage):
    exact = build(stage, "exact", max_steps=2)
    exact.train()
    half = build(stage, "half", max_steps=2, bf16=True, model_options={"dtype": "bfloat16"})
    half.train()
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for a, b in zip(loss_curve(exact), loss_curve(half), strict=True):
        assert b == pytest.approx(a, rel=0.1, abs=0.05)


def test_k_is_drawn_from_seed_and_step(build):
    sizes = [2, 4]
    drawn = [memory_size_of_step(sizes, 7, step) for step in range(200)]
    assert drawn == [memory_size_of_step(sizes, 7, step) for step in range(200)]
    assert drawn != [memory_size_of_step(sizes, 8, step) for step in range(200)]
    assert 60 < drawn.count(2) < 140
    trainer = build(max_steps=6, gradient_accumulation_steps=2)
    read = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append((kwargs["memory_size"], kwargs["num_samples_in_batch"])),
        with_kwargs=True,
    )
    trainer.train()
    wanted = [memory_size_of_step(sizes, trainer.args.seed, step) for step in range(6) for _ in range(2)]
    assert [size for size, _ in read] == wanted
    assert {float(samples) for _, samples in read} == {4.0}


def test_k_can_be_held_to_some_sizes(build):
    trainer = build(max_steps=6, train_memory_sizes=[4])
    read = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append(kwargs["memory_size"]), with_kwargs=True
    )
    trainer.train()
    assert read == [4] * 6
    for wrong in ([], [3], [4, 8], [4, 4]):
        with pytest.raises(ValueError, match="`train_memory_sizes` must name some"):
            build(max_steps=6, train_memory_sizes=wrong)


def test_a_checkpoint_keeps_its_settings(build, shared_model):
    """A recipe may say them again, and is refused where it says something else."""
    config, overlap = shared_model.config, shared_model.processor.document_overlap
    same = {"memory_sizes": config.memory_sizes, "lora_rank": config.lora["compressor"]["rank"]}
    build(model_options={**same, "processor_kwargs": {"document_overlap": overlap}, "memory_normalization": False})
    wrong = {"lora_dropout": 0.7, "processor_kwargs": {"document_overlap": overlap + 1}, "memory_normalization": True}
    with pytest.raises(ValueError, match="must be what `checkpoint` has.*Leave them out") as error:
        build(model_options={**same, **wrong})
    for name in ("'lora_dropout': 0.7", "processor_kwargs.document_overlap", "'memory_normalization': True"):
        assert name in str(error.value)
    assert "lora_rank" not in str(error.value)


def test_the_log_of_a_step(build):
    trainer = build("joint", max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    step = trainer.state.log_history[0]
    assert {"ce", "learning_rate", "tokens_per_second", "recall@1", "recall@3", "recall@5", "mrr", "margin"} <= set(
        step
    )
    assert {"grad_norm/reasoner", "grad_norm/generator"} <= set(step)
    assert step["loss"] == pytest.approx(step["ce"], rel=1e-5)
    assert step["grad_norm"] ** 2 == pytest.approx(step["grad_norm/reasoner"] ** 2 + step["grad_norm/generator"] ** 2)
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {"eval_ce", "eval_exact_match", "eval_recall@1", "eval_mrr"} <= set(evaluation)
    samples = [json.loads(line) for line in open(f"{trainer.args.output_dir}/samples.jsonl")]
    assert samples[0]["step"] == 2 and samples[0]["expected"] == CITIES[0]
    pretraining = build("pretrain", "other", max_steps=1)
    pretraining.train()
    step, weight = pretraining.state.log_history[0], pretraining.model.config.alignment_weight
    assert step["loss"] == pytest.approx(step["ce"] + weight * step["mse"], rel=1e-5)


def test_evaluation_is_the_same_for_any_batch(build):
    results = [build("joint", f"run{size}", per_device_eval_batch_size=size).evaluate() for size in (1, 3, 8)]
    for name in ("eval_ce", "eval_recall@1", "eval_mrr", "eval_margin", "eval_exact_match"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)
        assert results[0][name] == pytest.approx(results[2][name], rel=1e-4)


def count_roles(model) -> dict[str, int]:
    """How often the backbone's base model runs in each role from now on."""
    counts = {}
    model.backbone.base_model.register_forward_pre_hook(
        lambda *_: counts.__setitem__(model.roles.active, counts.get(model.roles.active, 0) + 1)
    )
    return counts


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
        (hits,) = trainer.corpus.search(model.encode_queries(["Which?"]), 1)
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
