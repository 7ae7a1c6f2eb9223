"""Checkpoints in local folders: what is written, that it comes back bit for bit, and what is wrong with a damaged one.

The Hub is in test_hub_loading.py.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_hub_loading import contents, edit_json, observe
from tiny import DOCUMENTS, QUESTIONS, build_backbone, randomize_adapters, save_backbone
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, TorchAoConfig

import modeling_clara
from modeling_clara import ROLES, CLaRaConfig, CLaRaForRAG, CLaRaProcessor
from modeling_clara.backbone_clara import backbone_digests
from modeling_clara.cli import weight_options

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


@pytest.mark.parametrize(
    ("auto_class", "kind"), [(CLaRaForRAG, "torchao"), (AutoModel, "torchao"), (CLaRaForRAG, "int8")]
)
def test_a_quantised_backbone_loads_and_saves_its_adapters(
    checkpoint, shared_model, tmp_path, caplog, auto_class, kind
):
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        options = {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig())}
    else:  # what the commands pass on for --dtype
        pytest.importorskip("bitsandbytes")
        options = weight_options(kind)
    model = auto_class.from_pretrained(checkpoint, **options)
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


def test_four_bits_give_nearly_the_memories(tmp_path):
    """bitsandbytes packs 64 inputs of a layer at a time."""
    pytest.importorskip("bitsandbytes")
    backbone = save_backbone(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    CLaRaForRAG.from_backbone(backbone, memory_sizes=(2,), lora_rank=2).save_pretrained(tmp_path / "model")
    whole, small = (CLaRaForRAG.from_pretrained(tmp_path / "model", **weight_options(kind)) for kind in (None, "int4"))
    memory, expected = small.compress(DOCUMENTS), whole.compress(DOCUMENTS)
    assert torch.cosine_similarity(memory.flatten(1), expected.flatten(1)).min() > 0.9 and not memory.equal(expected)
    assert small.retrieve(QUESTIONS, documents=DOCUMENTS, top_k=1)


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


def edit_tensors(path: Path, change) -> None:
    """Rewrite a safetensors file; `change` takes its tensors and the name of the first."""
    tensors = load_file(path)
    change(tensors, min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", sorted(WEIGHTS | JSON))
def test_a_missing_or_damaged_file_is_named(checkpoint_copy, name):
    path, rule = checkpoint_copy / name, "JSON" if name in JSON else "a complete safetensors file"
    content = path.read_bytes()
    damaged = [b'{"a": ', b"[1]"] if name in JSON else [b"", content[: int(len(content) * 0.9)]]
    for text in damaged:
        path.write_bytes(text)
        with pytest.raises(ValueError, match=rf"`{name}` of .* must be {rule}.*copy or download it again"):
            CLaRaForRAG.from_pretrained(checkpoint_copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"(?s)`{name}` must be in .*copy or save it again"):
        CLaRaForRAG.from_pretrained(checkpoint_copy)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, name: t.update({name: t[name][:, 1:].clone()}), r"must have the shape \(.*\), got \(.*\)\. Rank"),
        (lambda t, name: t.pop(name), r"must .*; missing: \['.*'\] \(1\), unexpected: \[\] \(0\).*`save_pretrained`"),
        (lambda t, _: t.update(x=torch.ones(1)), r"must .*; missing: \[\] \(0\), unexpected: \['x'\] \(1\).*`save_pr"),
        (lambda t, name: t[name][0].fill_(float("nan")), r"must be finite, got NaN or infinity\. Use an earlier"),
        (lambda t, name: t[name][-1].fill_(float("-inf")), r"must be finite, got NaN or infinity\. Use an earlier"),
    ],
    ids=["shape", "missing", "extra", "nan", "inf"],
)
@pytest.mark.parametrize("name", ["clara.safetensors", "compressor/adapter_model.safetensors"])
def test_wrong_tensors_are_named(checkpoint_copy, name, change, match):
    edit_tensors(checkpoint_copy / name, change)
    with pytest.raises(ValueError, match=rf"`{name}` {match}"):
        CLaRaForRAG.from_pretrained(checkpoint_copy)


@pytest.mark.parametrize(
    "name, fields, match",
    [
        ("compressor/adapter_config", {"r": 8}, r"`r` in `compressor/.*` must be 4 as in config.json, got 8\."),
        ("generator/adapter_config", {"lora_alpha": 64}, r"`lora_alpha` in `generator/.*` must be 8 .*got 64\. Use"),
        ("reasoner/adapter_config", {"target_modules": ["q_proj"]}, r"`target_modules` in `reasoner/.*\['q_proj'\]\."),
        ("config", {"format_version": 2}, r"`format_version` of config.json must be 1, got 2\. Update the package"),
        ("config", {"model_type": "llama"}, r"`model_type` in `config.json` .* got 'llama'\. .*`from_backbone`"),
        ("config", {"memory_sizes": [2, 4, 8]}, r"`memory_embeddings` in `clara.safetensors` must .* \(8, 32\), got"),
        (
            "config",
            {"document_max_length": 96},
            r"in `processor_config.json` must be 96 as in config.json, got 64\. Use the files",
        ),
        ("config", {"memory_normalization": True}, "memory_s"),
        ("config", {"memory_layout": "windows"}, "residual_scale"),
    ],
)
def test_settings_that_contradict_are_named(checkpoint_copy, name, fields, match):
    edit_json(checkpoint_copy / f"{name}.json", **fields)
    with pytest.raises(ValueError, match=match):
        CLaRaForRAG.from_pretrained(checkpoint_copy)


@pytest.mark.parametrize(
    "field, fields",
    [
        ("hidden_size", {"hidden_size": 64}),
        ("vocab_size", {"vocabulary": 400}),
        ("num_hidden_layers", {"num_hidden_layers": 3}),
        ("model_type", {"architecture": "mistral"}),
    ],
)
def test_a_backbone_of_another_structure_is_an_error(checkpoint_copy, tmp_path, field, fields):
    """Given by the caller, or named in config.json."""
    other = tmp_path / "other"
    build_backbone(**{"vocabulary": 343, **fields}).save_pretrained(other)
    edit_json(checkpoint_copy / "config.json", backbone_name_or_path=str(other))
    for keywords in ({"backbone": other}, {}):
        with pytest.raises(ValueError, match=rf"`.*other` must have {field} .* as in `text_config`.*`backbone=PATH`"):
            CLaRaForRAG.from_pretrained(checkpoint_copy, **keywords)


def test_other_backbone_weights_are_an_error_and_a_warning_where_asked_for(checkpoint_copy, tmp_path, caplog):
    other = save_backbone(tmp_path / "other", seed=1)
    remedy = r"(?s)`.*other` must be those the adapters were trained on.*differ in \['embedding_signs', .*backbone="
    model = CLaRaForRAG.from_pretrained(checkpoint_copy, backbone=other)
    assert re.search(remedy, caplog.text)
    embeddings = AutoModelForCausalLM.from_pretrained(other).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    caplog.clear()
    CLaRaForRAG.from_pretrained(checkpoint_copy)
    assert not caplog.text
    edit_json(checkpoint_copy / "config.json", backbone_name_or_path=str(other))
    with pytest.raises(ValueError, match=remedy):
        CLaRaForRAG.from_pretrained(checkpoint_copy)


@pytest.mark.parametrize(
    "damage, error, match",
    [
        (lambda path: edit_tensors(path, lambda t, _: t.pop("model.norm.weight")), ValueError, r"missing: \['model.n"),
        (lambda path: edit_tensors(path, lambda t, n: t.update({n: t[n][1:].clone()})), ValueError, r"shape: \['lm_h"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), OSError, "could not be loaded"),
        (lambda path: path.unlink(), OSError, "could not be loaded"),
    ],
    ids=["tensor missing", "wrong shape", "truncated", "file missing"],
)
def test_incomplete_backbone_weights_are_an_error(backbone_folder, checkpoint, tmp_path, damage, error, match):
    backbone = shutil.copytree(backbone_folder, tmp_path / "damaged")
    damage(backbone / "model.safetensors")
    with pytest.raises(error, match=rf"(?s)the backbone `.*damaged` .*{match}.*[Pp]ass `backbone=PATH`"):
        CLaRaForRAG.from_pretrained(checkpoint, backbone=backbone)


@pytest.mark.parametrize(
    "prepare, match",
    [
        (lambda model, target: setattr(model, "processor", None), "`model.processor` must be set to save"),
        (lambda model, target: setattr(model.config, "document_max_length", 96), r"must be 96 .* got 64\. Set both"),
        (lambda model, target: target.write_text(""), "`save_directory` must be a folder, got the file"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(model, tmp_path, prepare, match):
    prepare(model, tmp_path / "target")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "target")
    assert contents(tmp_path) == before


def test_a_backbone_without_a_tokenizer_is_named(backbone_folder, tmp_path):
    folder = shutil.copytree(backbone_folder, tmp_path / "backbone", ignore=shutil.ignore_patterns("*token*"))
    match = rf"(?s)`{re.escape(str(folder))}` must have a tokenizer: .*Put a tokenizer.json"
    with pytest.raises(OSError, match=match):
        CLaRaForRAG.from_backbone(folder)
