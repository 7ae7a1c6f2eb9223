"""The three roles: gradients reach every one of them, with and without recomputation, and each can train alone."""

import copy

import pytest
import torch
from peft.functional import set_adapter
from tiny import HIDDEN
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM

from modeling_clara import ROLES
from recipes.benchmarks.training import padded_passes


def batch_for(model, *, query: bool) -> dict:
    """Two rows of documents, questions and answers."""
    documents = [["Paris is the capital of France.", "Rome is in Italy."], ["The Seine flows.", "Berlin is a city."]]
    inputs = model.processor(
        ["Which city?", "Which river is it?"],
        documents,
        ["Paris", "the Seine"],
        memory_size=4,
        top_k=2 if query else None,
    )
    return dict(inputs, memory_size=4)


def joint_batch(model) -> dict:
    """As in stage 3: memories are given, the query is encoded."""
    inputs = batch_for(model, query=True)
    for name in ("document_input_ids", "document_attention_mask"):
        del inputs[name]
    generator = torch.Generator().manual_seed(3)
    return {**inputs, "memory": torch.randn(2, 5, 4, HIDDEN, generator=generator)}


def gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    """Gradient of the loss for every trainable parameter; None where none arrived."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize(
    ("roles", "make_batch"),
    [
        (("compressor", "generator"), lambda model: batch_for(model, query=False)),
        (("reasoner", "generator"), joint_batch),
        (ROLES, lambda model: batch_for(model, query=True)),
    ],
    ids=["compressor_memory_generator", "reasoner_generator", "all"],
)
def test_checkpointing_gradients_equal(model, monkeypatch, roles, make_batch):
    model.set_trainable_roles(roles)
    inputs = make_batch(without_dropout(model))
    with padded_passes():  # as recomputed ones are
        plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    activate, switched = model.roles._activate, []
    monkeypatch.setattr(model.roles, "_activate", lambda role: switched.append(role) or activate(role))
    recomputed = gradients(model, inputs)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and recomputed[name] is not None, name
        assert torch.equal(gradient, recomputed[name]), name
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    assert len(switched) <= 2 * len(roles) + 4, "the backward pass switches once per role, not per layer"


def test_checkpointing_without_the_context_does_not_pass_unnoticed(model):
    """The trap itself: plain recomputation runs in the role of the backward pass, here none, and so it is caught."""
    model.set_trainable_roles(("compressor", "generator"))
    inputs = batch_for(without_dropout(model), query=False)
    model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(CheckpointError):
        gradients(model, inputs)


def test_checkpointing_survives_an_evaluation_between_steps(model):
    inputs = batch_for(without_dropout(model), query=True)
    with padded_passes():
        plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    model.answer(["Which city?"], documents=["Paris.", "Rome."], max_new_tokens=2)
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(model, inputs).items())


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="use_reentrant.*must be False"):
        model.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("role", ROLES)
def test_each_role_trains_alone(model, role):
    model.set_trainable_roles([role])
    inputs = batch_for(without_dropout(model), query=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    wanted = {name for name in before if f".{role}." in name}
    if role == "compressor":
        wanted |= {"memory_embeddings", "separator_embedding"}
    assert changed == wanted


def test_the_gradient_of_one_pass_survives_the_switch_to_the_next(model):
    """`set_adapter` between two passes drops the first adapter's gradient; the role switch does not."""
    model.set_trainable_roles(ROLES)
    found = gradients(without_dropout(model), batch_for(model, query=True))
    for role in ROLES:
        assert all(gradient is not None for name, gradient in found.items() if f".{role}." in name)


@pytest.mark.parametrize("role", ROLES)
def test_the_switch_computes_what_set_adapter_computes(model, role):
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), model.roles.use(role):
        ours = model.backbone(ids).logits
    reference = copy.deepcopy(model.backbone)
    set_adapter(reference, role)
    with torch.no_grad():
        assert torch.equal(ours, reference(ids).logits)


def test_without_a_role_the_backbone_is_plain(model, backbone_folder):
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), model.roles.use(None):
        assert torch.equal(
            model.backbone(ids).logits, AutoModelForCausalLM.from_pretrained(backbone_folder)(ids).logits
        )


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


@pytest.mark.parametrize("context", ["bulk_compression", "bulk_answering"])
def test_merging_restores_the_very_same_tensors(model, documents, questions, context):
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    memory = model.compress(documents)
    answers = model.answer(questions, documents=documents, max_new_tokens=5)
    with torch.inference_mode(), getattr(model, context)():
        torch.testing.assert_close(model.compress(documents), memory, atol=1e-5, rtol=1e-5)
        merged = model.answer(questions, documents=documents, max_new_tokens=5)
    assert [answer.text for answer in merged] == [answer.text for answer in answers]
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.compress(documents), memory)


def test_merging_is_undone_after_an_exception_and_cannot_be_nested(model, documents):
    memory = model.compress(documents)
    with pytest.raises(RuntimeError, match="already"), model.bulk_compression(), model.bulk_answering():
        pass
    assert not model.roles.merged_weights
    assert torch.equal(model.compress(documents), memory)


def test_training_inside_a_bulk_context_still_trains_the_adapters(model):
    model.set_trainable_roles(("compressor", "generator"))
    inputs = batch_for(without_dropout(model), query=False)
    plain = gradients(model, inputs)
    with model.bulk_compression():
        merged = gradients(model, inputs)
    assert all(torch.equal(gradient, merged[name]) for name, gradient in plain.items())
