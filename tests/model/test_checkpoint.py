"""Checkpoints in local folders: what is written, and that it comes back bit for bit.

The Hub is in test_hub_loading.py, what is wrong with a folder in test_checkpoint_faults.py.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_hub_loading import contents, observe
from tiny import DOCUMENTS, QUESTIONS, randomize_adapters, save_backbone
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, TorchAoConfig

import modeling_clara
from modeling_clara import ROLES, CLaRaConfig, CLaRaForRAG, CLaRaProcessor
from modeling_clara.backbone_clara import backbone_digests

CODE = {path.name for path in Path(modeling_clara.__file__).parent.glob("*_clara.py")}
WEIGHTS = {"clara.safetensors", *(f"{role}/adapter_model.safetensors" for role in ROLES)}
JSON = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"} | {
    f"{role}/adapter_config.json" for role in ROLES
}


def test_the_folder_has_exactly_the_files_of_the_layout(checkpoint):
    assert set(contents(checkpoint)) == CODE | WEIGHTS | JSON | {"README.md", "chat_template.jinja"}


def test_weights_are_memory_token_embeddings_and_lora_only(checkpoint, shared_model):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(checkpoint / "clara.safetensors").items()}
    assert shapes == {"memory_embeddings": (4, 32), "separator_embedding": (1, 32)}
    for role in ROLES:
        names = list(load_file(checkpoint / role / "adapter_model.safetensors"))
        assert len(names) == 2 * len(shared_model.roles.layers)
        assert all(re.fullmatch(r"base_model\.model\.model\..+\.lora_[AB]\.weight", name) for name in names)


def test_the_chat_template_is_in_both_its_files_and_no_trace_of_where_it_came_from(checkpoint, shared_model):
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    template = shared_model.processor.tokenizer.chat_template
    assert (checkpoint / "chat_template.jinja").read_text() == tokenizer["chat_template"] == template
    assert not {"is_local", "local_files_only", "token"} & set(tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_is_equal_byte_for_byte(checkpoint, tmp_path, dtype):
    CLaRaForRAG.from_pretrained(checkpoint, dtype=dtype).save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(checkpoint)


def test_saving_over_a_checkpoint_keeps_its_card_and_removes_what_is_stale(model, checkpoint_copy, tmp_path):
    model.save_pretrained(checkpoint_copy, include_backbone=True, max_shard_size="20KB")
    assert len(list(checkpoint_copy.glob("backbone/*.safetensors"))) > 2
    (checkpoint_copy / "README.md").write_text("mine")
    (checkpoint_copy / "notes.txt").write_text("mine")
    model.processor.tokenizer.chat_template = model.processor.chat_template = None
    for target in (checkpoint_copy, tmp_path / "new"):
        model.save_pretrained(target, include_backbone=True)
    old, new = contents(checkpoint_copy), contents(tmp_path / "new")
    assert old.pop("README.md") == old.pop("notes.txt") == b"mine" != new.pop("README.md")
    assert old == new and "chat_template.jinja" not in new


@pytest.mark.parametrize("auto_class", [CLaRaForRAG, AutoModel])
def test_everything_comes_back_equal_also_without_the_file_of_the_chat_template(
    checkpoint_copy, shared_model, auto_class
):
    """The Auto classes know the package without remote code."""
    (checkpoint_copy / "chat_template.jinja").unlink()
    loaded = auto_class.from_pretrained(checkpoint_copy)
    assert observe(loaded) == observe(shared_model) and not loaded.training
    assert type(loaded) is CLaRaForRAG and type(AutoProcessor.from_pretrained(checkpoint_copy)) is CLaRaProcessor


def test_the_fingerprint_ignores_dtype_merging_and_random_state(checkpoint, shared_model):
    model = CLaRaForRAG.from_pretrained(checkpoint, dtype=torch.bfloat16)
    torch.manual_seed(12345)
    with model.bulk_compression():
        assert model.fingerprint == shared_model.fingerprint
    assert model.fingerprint == copy.deepcopy(model).fingerprint == shared_model.fingerprint
    assert CLaRaForRAG.from_pretrained(checkpoint).to(torch.bfloat16).fingerprint == shared_model.fingerprint


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_fingerprint_changes_with_all_that_makes_a_memory_and_nothing_else(checkpoint, model, is_loaded):
    model = CLaRaForRAG.from_pretrained(checkpoint) if is_loaded else model
    seen = [model.fingerprint]
    for part in ("reasoner", "generator", "compressor", "memory_embeddings", "separator_embedding"):
        name = [name for name, _ in model.named_parameters() if part in name][-1]
        model.get_parameter(name).data[0, 0] += 1.0
        if part in ("reasoner", "generator"):
            assert model.fingerprint == seen[0]
        else:
            seen.append(model.fingerprint)
    model.config.document_max_length = 128
    seen.append(model.fingerprint)
    model.processor.tokenizer.add_tokens(["<other>"])
    assert len({*seen, model.fingerprint}) == 6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
@pytest.mark.parametrize("role", ROLES)
def test_plain_peft_loads_a_role_folder(checkpoint, shared_model, backbone_folder, role):
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone_folder), checkpoint / role)
    ids = torch.tensor([[3, 50, 70, 90, 110, 130]])
    with torch.no_grad(), shared_model.roles.use(role):
        ours = shared_model.backbone(ids).logits
        assert torch.equal(peft_model.eval()(ids).logits, ours)
        with peft_model.disable_adapter():
            assert not torch.allclose(peft_model(ids).logits, ours, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_an_included_backbone_needs_no_other_folder(tmp_path, tied):
    backbone = save_backbone(tmp_path / "backbone", tied=tied)
    model = CLaRaForRAG.from_backbone(backbone, memory_sizes=(2, 4), lora_rank=4)
    randomize_adapters(model)
    with model.bulk_compression():  # its merged weights are not the ones to write
        model.save_pretrained(tmp_path / "whole", include_backbone=True)
    shutil.rmtree(backbone)
    loaded, seen = CLaRaForRAG.from_pretrained(tmp_path / "whole"), observe(model)
    assert observe(loaded) == seen
    assert ("lm_head.weight" in load_file(tmp_path / "whole/backbone/model.safetensors")) is not tied
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "small", include_backbone=False)
    with pytest.raises(OSError, match=r"(?s)the backbone `.*` could not be found.*Pass `backbone=PATH`"):
        CLaRaForRAG.from_pretrained(tmp_path / "small")
    assert observe(CLaRaForRAG.from_pretrained(tmp_path / "small", backbone=tmp_path / "whole/backbone")) == seen


def test_dtype_is_float32_on_cpu_whatever_the_backbone_was_saved_in(checkpoint, backbone_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    devices = [{"device_map": value} for value in (None, "cpu", {"": "cpu"}, torch.device("cpu"))]
    for keywords in (*devices, {"dtype": "auto"}):
        model = CLaRaForRAG.from_pretrained(checkpoint, backbone=tmp_path, **keywords)
        wanted = torch.bfloat16 if "dtype" in keywords else torch.float32
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}


@pytest.mark.parametrize("auto_class", [CLaRaForRAG, AutoModel])
@pytest.mark.parametrize(
    "keywords, tolerance",
    [({"attn_implementation": "eager"}, 1e-4), ({"dtype": "bfloat16"}, 0.2), ({"torch_dtype": torch.bfloat16}, 0.2)],
)
def test_loader_keywords_reach_the_backbone(checkpoint, shared_model, auto_class, keywords, tolerance):
    model = auto_class.from_pretrained(checkpoint, **keywords)
    assert model.backbone.config._attn_implementation == keywords.get("attn_implementation", "sdpa")
    assert model.dtype == (torch.bfloat16 if tolerance == 0.2 else torch.float32)
    memory = model.compress(DOCUMENTS)
    assert memory.dtype == torch.float32
    torch.testing.assert_close(memory, shared_model.compress(DOCUMENTS), atol=tolerance, rtol=0)


@pytest.mark.parametrize("auto_class", [CLaRaForRAG, AutoModel])
def test_a_quantised_backbone_loads_and_saves_its_adapters(checkpoint, shared_model, tmp_path, caplog, auto_class):
    torchao = pytest.importorskip("torchao.quantization")
    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = auto_class.from_pretrained(checkpoint, quantization_config=quantization)
    assert backbone_digests(model.backbone)["layer_signs"] is None
    expected, memory = shared_model.compress(DOCUMENTS), model.compress(DOCUMENTS)
    assert 0 < (memory - expected).abs().max() < 0.1 * expected.abs().max()
    with model.bulk_compression():
        assert "are not merged" in caplog.text and torch.equal(model.compress(DOCUMENTS), memory)
    assert model.fingerprint == shared_model.fingerprint
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(checkpoint)
    with pytest.raises(ValueError, match="`include_backbone` must be False for a quantised backbone"):
        model.save_pretrained(tmp_path / "whole", include_backbone=True)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_a_checkpoint_loads_from_a_subfolder(shared_model, tmp_path, include_backbone):
    shared_model.save_pretrained(tmp_path / "runs/best", include_backbone=include_backbone)
    for auto_class in (CLaRaForRAG, AutoModel):
        assert observe(auto_class.from_pretrained(tmp_path, subfolder="runs/best")) == observe(shared_model)


def test_a_given_config_takes_the_place_of_the_file(checkpoint_copy, shared_model):
    config = CLaRaConfig.from_pretrained(checkpoint_copy, retrieval_top_k=1)
    (checkpoint_copy / "config.json").unlink()
    model = CLaRaForRAG.from_pretrained(checkpoint_copy, config=config)
    assert torch.equal(model.compress(DOCUMENTS), shared_model.compress(DOCUMENTS))
    assert [len(row) for row in model.retrieve(QUESTIONS, documents=DOCUMENTS)] == [1, 1]
    model.config.retrieval_top_k = 3
    assert config.retrieval_top_k == 1
