"""Training passes without padding: losses and gradients are those of padded passes, and LoRA layers those of PEFT.

Padded passes run PEFT's own layers.
"""

from contextlib import nullcontext

import pytest
import torch
from test_collators import inputs, plain, record
from tiny import randomize_adapters, save_backbone

from modeling_clara import ROLES, CLaRaForRAG
from modeling_clara.adapters_clara import _can_fuse
from modeling_clara.packing_clara import full_mask
from recipes.benchmarks.training import padded_passes
from recipes.training.collators import ReadingCollator

RECORDS = [
    record(
        [plain("Paris is the capital of France."), plain("Rome is old.", "Rome"), plain("The Seine.")],
        ("What is old, and why is it?", "Rome"), ("Where?", "In the capital of France"), ("What flows?", "the Seine"),
        positives=[1],
    ),
    record([plain("Berlin is large. " * 4)], ("Which city is large, and how large is it?", "Berlin")),
    record([plain("Oslo", "Oslo"), plain("Bern is small.")], (None, "Bern is small."), ("Small?", "yes"), source="b"),
]  # fmt: skip
BACKBONES = {
    "grouped": ("llama", {}),
    "ungrouped": ("llama", {"num_key_value_heads": 4}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {}),
}


def fresh(folder, layout: str, **fields) -> CLaRaForRAG:
    """A model without dropout, in training mode."""
    torch.manual_seed(0)
    fields = {"retrieval_top_k": 2, "memory_layout": layout, "contrastive_weight": 0.3, **fields}
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(2, 4), lora_rank=4, lora_dropout=0.0, config_kwargs=fields)
    randomize_adapters(model)
    return model.train()


@pytest.fixture
def windows_model(backbone_folder) -> CLaRaForRAG:
    return fresh(backbone_folder, "windows")


def batch_of(model, records=RECORDS, size: int = 4, **options) -> dict:
    options = {"n_queries": 2, **options}
    return inputs(ReadingCollator(model.processor, model.config.memory_sizes, **options)(records), size)


def step(model, batch: dict, is_padded: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradient of everything that trains, zeros where none arrived."""
    model.zero_grad()
    with padded_passes() if is_padded else nullcontext():
        output = model(**batch)
        output.loss.backward()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return output.loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def assert_same_step(one, other, rtol: float = 1e-5) -> None:
    """Equal losses, and gradients that differ by little of the largest entry of their tensor."""
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=0)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        bound = 10 * rtol * max(1e-3, float(gradient.abs().max()))
        assert (other[1][name] - gradient).abs().max() <= bound, name


def count_packed(model) -> list[bool]:
    """Whether each pass of the backbone from now on is packed."""
    seen = []

    def note(_module, _arguments, keywords):
        seen.append("packed_rows" in keywords)

    model.backbone.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("layout", ["tokens", "windows"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_and_gradients_are_those_of_padded_passes(tmp_path, backbone, layout):
    """And under autocast the loss is near."""
    architecture, fields = BACKBONES[backbone]
    model = fresh(save_backbone(tmp_path, architecture, **fields), layout)
    for size in (2, 4):
        batch, seen = batch_of(model, size=size), count_packed(model)
        found, expected = step(model, batch), step(model, batch, is_padded=True)
        assert_same_step(expected, found)
        assert all(seen[: len(seen) // 2]) and not any(seen[len(seen) // 2 :]) and len(seen) == 6
        for role in ROLES:
            assert any(gradient.abs().max() > 0 for name, gradient in found[1].items() if f".{role}." in name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach().float(), found[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("layout", ["tokens", "windows"])
def test_text_that_a_prompt_reads_changes_nothing_of_that(backbone_folder, layout):
    model = fresh(backbone_folder, layout)
    batch = batch_of(model, text_share=1.0, n_queries=0)
    assert not batch["prompt_document_mask"].all()
    assert_same_step(step(model, batch, is_padded=True), step(model, batch))


def test_prompts_padded_on_either_side(windows_model):
    """One prompt a row, as the processor pads it, and the same moved to the front."""
    records = [{**one, "questions": one["questions"][-1:], "answers": one["answers"][-1:]} for one in RECORDS]
    batch = batch_of(windows_model, records)
    assert "prompt_segments" not in batch and not batch["attention_mask"][:, 0].all()
    order = batch["attention_mask"].argsort(dim=-1, descending=True, stable=True)
    names = ("input_ids", "attention_mask", "memory_mask", "labels")
    moved = {**batch, **{name: batch[name].gather(-1, order) for name in names}}
    expected = step(windows_model, batch, is_padded=True)
    for one in (batch, moved):
        assert_same_step(expected, step(windows_model, one))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_eager_attention_falls_back_and_tells_prompts_of_a_row_apart(tmp_path, architecture):
    model = fresh(save_backbone(tmp_path, architecture), "tokens", contrastive_weight=0.0)
    model.backbone.set_attn_implementation("eager")
    batch, seen = batch_of(model, n_queries=0), count_packed(model)
    pairs = [(one, *pair) for one in RECORDS for pair in zip(one["questions"], one["answers"], strict=True)]
    alone = [{**one, "questions": [question], "answers": [answer]} for one, question, answer in pairs]
    expected = model(**batch_of(model, alone, n_queries=0)).lm_loss
    assert "prompt_segments" in batch
    torch.testing.assert_close(model(**batch).lm_loss, expected, rtol=1e-5, atol=0)
    assert not any(seen)


def test_attention_that_cannot_tell_prompts_of_a_row_apart_is_refused(windows_model):
    batch = batch_of(windows_model, n_queries=0)
    windows_model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="`attn_implementation` must be 'sdpa' or 'eager' for rows of several"):
        full_mask(windows_model.backbone, batch["prompt_segments"], torch.float32)


def test_only_plain_layers_in_training_are_fused(model, tmp_path):
    layer, role = model.roles.layers[0], "generator"
    weights, base = layer.lora_A[role].weight, layer.get_base_layer().weight
    assert _can_fuse(layer.eval(), role) and not _can_fuse(layer, None)
    with torch.no_grad():
        assert not _can_fuse(layer, role)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _can_fuse(layer, role)
    layer.train().lora_dropout[role] = torch.nn.Dropout(0.1)
    assert not _can_fuse(layer, role)
    layer.lora_dropout[role] = torch.nn.Identity()
    assert _can_fuse(layer, role)
    base.requires_grad_(True)
    assert not _can_fuse(layer, role)
    base.requires_grad_(False)
    weights.data = weights.data.bfloat16()
    assert not _can_fuse(layer, role)
    biased = fresh(save_backbone(tmp_path, "gpt_neox"), "tokens").roles.layers
    assert biased and not any(_can_fuse(layer, role) for layer in biased)


def test_dropout_of_the_adapters_stays_in_force(model):
    """Two packed training passes differ, and those of the same random state do not."""
    model.train()
    for layer in model.roles.layers:
        layer.lora_dropout["generator"] = torch.nn.Dropout(0.5)
    batch, losses = batch_of(model, n_queries=0), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(model(**batch).loss.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_layers_and_attention_are_restored_after_an_exception(windows_model):
    batch, before = batch_of(windows_model), windows_model.backbone.config._attn_implementation

    def fail(*_):
        raise KeyError("in the pass")

    hook = windows_model.backbone.base_model.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        windows_model(**batch)
    hook.remove()
    assert not any("forward" in vars(layer) for layer in windows_model.roles.layers)
    assert windows_model.backbone.config._attn_implementation == before and windows_model.roles.active is None
    assert windows_model(**batch).loss.isfinite()
