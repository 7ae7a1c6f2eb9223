"""Folders that are damaged, or contradict themselves or their backbone: an error that names file and remedy."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import JSON, WEIGHTS
from test_hub_loading import contents, edit_json
from tiny import build_backbone, save_backbone
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRAG


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
