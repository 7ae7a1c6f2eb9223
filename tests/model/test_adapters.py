"""The three roles: gradients reach every one of them, with and without recomputation, and each can train alone."""

import copy

import pytest
import torch
from peft.functional import set_adapter
from tiny import HIDDEN
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM

from modeling_clara import ROLES, CLaRaForRAG
from modeling_clara.adapters_clara import add_roles
from modeling_clara.packing_clara import can_pack
from recipes.benchmarks.training import padded_passes

IDS = torch.arange(3, 9)[None]


@pytest.fixture
def model(model) -> CLaRaForRAG:
    """In training mode without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batch_for(model, *, query: bool = True) -> dict:
    """Two rows of documents, questions and answers."""
    documents = [["Paris is the capital of France.", "Rome is in Italy."], ["The Seine flows.", "Berlin is a city."]]
    questions, answers = ["Which city?", "Which river is it?"], ["Paris", "the Seine"]
    return dict(model.processor(questions, documents, answers, memory_size=4, top_k=2 if query else None))


def joint_batch(model) -> dict:
    """As in stage 3: memories are given, the query is encoded."""
    inputs = {name: value for name, value in batch_for(model).items() if not name.startswith("document_")}
    return {**inputs, "memory": torch.randn(2, 5, 4, HIDDEN, generator=torch.Generator().manual_seed(3))}


def gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    """Gradient of the loss for every trainable parameter; None where none arrived."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("roles", "make_batch"),
    [
        (("compressor", "generator"), lambda model: batch_for(model, query=False)),
        (("reasoner", "generator"), joint_batch),
        (ROLES, batch_for),
    ],
    ids=["compressor_memory_generator", "reasoner_generator", "all"],
)
def test_checkpointing_gradients_equal(model, monkeypatch, roles, make_batch):
    """Also after an evaluation between the steps, which recomputes nothing and so may pack."""
    model.set_trainable_roles(roles)
    inputs = make_batch(model)
    with padded_passes():  # as recomputed ones are
        plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    model.answer(["Which city?"], documents=["Paris.", "Rome."], max_new_tokens=2)
    assert not can_pack(model.backbone, 8)
    activate, switched = model.roles._activate, []
    monkeypatch.setattr(model.roles, "_activate", lambda role: switched.append(role) or activate(role))
    recomputed = gradients(model, inputs)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and recomputed[name] is not None, name
        assert torch.equal(gradient, recomputed[name]), name
    for role in roles:
        assert any(gradient.abs().max() > 0 for name, gradient in plain.items() if f".{role}." in name)
    assert len(switched) <= 2 * len(roles) + 4, "the backward pass switches once per role, not per layer"
    assert can_pack(model.eval().backbone, 8)


def test_checkpointing_without_the_context_does_not_pass_unnoticed(model):
    """The trap itself: plain recomputation runs in the role of the backward pass, here none, and so it is caught."""
    model.set_trainable_roles(("compressor", "generator"))
    model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(CheckpointError):
        gradients(model, batch_for(model, query=False))
    with pytest.raises(ValueError, match="use_reentrant.*must be False"):
        model.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("role", ROLES)
def test_each_role_trains_alone(model, role):
    model.set_trainable_roles([role])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch_for(model)).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    wanted = {name for name in before if f".{role}." in name}
    assert changed == wanted | ({"memory_embeddings", "separator_embedding"} if role == "compressor" else set())


@pytest.mark.parametrize("role", [*ROLES, None])
def test_the_switch_computes_what_set_adapter_computes(shared_model, backbone_folder, role):
    """And without a role what the plain backbone does."""
    reference = copy.deepcopy(shared_model.backbone)
    if role is None:
        reference = AutoModelForCausalLM.from_pretrained(backbone_folder)
    else:
        set_adapter(reference, role)
    with torch.no_grad(), shared_model.roles.use(role):
        assert torch.equal(shared_model.backbone(IDS).logits, reference(IDS).logits)


def test_a_role_is_restored_after_an_exception(model):
    with pytest.raises(KeyError), model.roles.use("generator"):
        with model.roles.use("compressor"):
            assert model.roles.active == "compressor"
        assert model.roles.active == "generator"
        raise KeyError
    assert model.roles.active is None


def test_unknown_roles_are_errors_that_change_nothing(model):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="`role` must be one of .*'reader'"):
        model.set_trainable_roles(["generator", "reader"])
    with pytest.raises(ValueError, match="`role` must be one of"), model.roles.use("reader"):
        pass
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_training_inside_a_bulk_context_still_trains_the_adapters(model):
    inputs = batch_for(model)
    plain = gradients(model, inputs)
    with model.bulk_compression():
        merged = gradients(model, inputs)
    assert all(torch.equal(gradient, merged[name]) for name, gradient in plain.items())


def test_a_backbone_without_linear_layers_is_refused(model):
    model.config.lora["compressor"]["target_modules"] = None
    with pytest.raises(ValueError, match="must have linear layers for LoRA, found none"):
        add_roles(torch.nn.ModuleDict({"base_model": torch.nn.Identity()}), model.config)
