"""The backbone of a checkpoint: loading, comparing and writing it; hashes that tell which weights belong together.

Digests of the backbone go into config.json, the fingerprint of a compressor into compressed corpora.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_clara import CLaRaConfig

logger = logging.getLogger(__name__)

STRUCTURE_FIELDS = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")


def trained_backbone(config: CLaRaConfig, place: dict, hub: dict, *, is_explicit: bool, **kwargs):
    """The backbone of a checkpoint: an OSError if it cannot be loaded, a ValueError if it is another one.

    `place` has source, revision and subfolder. Other weights than those trained on are a warning if the backbone
    `is_explicit`, given by the caller.
    """
    source, options = place["source"], {"subfolder": place["subfolder"]} if place["subfolder"] else {}
    try:
        found = AutoConfig.from_pretrained(source, revision=place["revision"], **options, **hub)
    except (OSError, HTTPError, ValueError) as error:
        raise _out_of_reach("found", source, place["revision"], error) from error
    for field in STRUCTURE_FIELDS:
        wanted, given = getattr(config.text_config, field), getattr(found, field)
        if wanted != given:
            raise ValueError(
                f"the backbone `{source}` must have {field} {wanted} as in `text_config` of config.json, got {given}. "
                f"Pass `backbone=PATH` with {config.backbone_name_or_path}, on which the adapters were trained."
            )
    backbone = load_backbone(**place, **kwargs)
    check_digests(backbone, config, source, is_explicit=is_explicit)
    return backbone


def load_backbone(source: str, revision: str | None, subfolder: str = "", **kwargs):
    """A causal language model, all of its weights from the files; else an OSError or ValueError with the remedy."""
    options = {"subfolder": subfolder} if subfolder else {}
    options["ignore_mismatched_sizes"] = True  # so that they are reported and named below
    try:
        backbone, report = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, output_loading_info=True, **options, **_with_dtype(kwargs)
        )
    except (OSError, HTTPError, SafetensorError) as error:
        raise _out_of_reach("loaded", subfolder or source, revision, error) from error
    missing, unfit = sorted(report["missing_keys"]), sorted(name for name, *_ in report["mismatched_keys"])
    if missing or unfit:
        raise ValueError(
            f"the backbone `{source}` must hold all of its weights, missing: {missing[:3]} ({len(missing)}), of "
            f"another shape: {unfit[:3]} ({len(unfit)}). Get it again, or pass `backbone=PATH` with a complete one."
        )
    return backbone


def _out_of_reach(verb: str, source: str, revision: str | None, error: Exception) -> OSError:
    where = f"`{source}`" + (f" (revision {revision})" if revision else "")
    remedy = "Pass `backbone=PATH` with a folder or id that has it."
    return OSError(f"the backbone {where} could not be {verb}: {error} {remedy}")


def _with_dtype(kwargs: dict) -> dict:
    """Fill in `dtype`: float32 on CPU, else what the backbone was saved in; `torch_dtype` is the old name."""
    kwargs, device_map = dict(kwargs), kwargs.get("device_map")
    old_name = kwargs.pop("torch_dtype", None)
    devices = set(map(str, device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]))
    on_cpu = devices == {"cpu"} or not torch.accelerator.is_available()
    default = torch.float32 if on_cpu and kwargs.get("quantization_config") is None else "auto"
    return {**kwargs, "dtype": kwargs.get("dtype") or old_name or default}


def check_digests(backbone, config: CLaRaConfig, source: str, *, is_explicit: bool) -> None:
    """Raise a ValueError if the weights are not those trained on; warn if the backbone was given explicitly."""
    found, wanted = backbone_digests(backbone), config.backbone_digests or {}
    differing = [part for part, digest in wanted.items() if digest and found.get(part) not in (None, digest)]
    if not differing:
        return
    message = (
        f"the weights of the backbone `{source}` must be those the adapters were trained on "
        f"({config.backbone_name_or_path}, revision {config.backbone_revision}), but differ in {sorted(differing)}. "
    )
    if not is_explicit:
        raise ValueError(message + "Pass `backbone=PATH` with the right weights, or with these to use them knowingly.")
    logger.warning(message + "Memories and answers can differ: pass the weights named above to `backbone=`.")


def backbone_part(state_dict: dict) -> dict:
    """The backbone's entries of a state dict of the whole model, under the backbone's own names."""
    prefix = "backbone."
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def is_quantised(backbone: nn.Module) -> bool:
    """Whether weights were rounded to integers, by transformers or by `quantize_model` of the installed package."""
    is_plain = all(parameter.is_floating_point() for parameter in backbone.parameters())
    return getattr(backbone, "hf_quantizer", None) is not None or not is_plain


def write_backbone(backbone, folder: Path, max_shard_size: int | str, state_dict: dict | None = None) -> None:
    """Write the backbone's own weights under their own names, without the adapters that were injected.

    `state_dict`, of the whole model, replaces the weights of the backbone.
    """
    if is_quantised(backbone):
        raise ValueError(
            "`include_backbone` must be False for a quantised backbone, got True. Load it without "
            "`quantization_config` to include it."
        )
    folder.mkdir()
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in (backbone.state_dict() if state_dict is None else backbone_part(state_dict)).items()
        if ".lora_" not in name
    }
    if backbone.config.tie_word_embeddings:
        for name in backbone.all_tied_weights_keys:
            state.pop(name, None)
    save_torch_state_dict(state, str(folder), max_shard_size=max_shard_size)
    config = deepcopy(backbone.config)
    config.architectures = [type(backbone).__name__]
    config.dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), backbone.dtype)
    config.save_pretrained(folder)
    backbone.generation_config.save_pretrained(folder)


def backbone_digests(backbone: nn.Module) -> dict[str, str | None]:
    """SHA-256 in hex, or None, of the token embedding and the last layer, as they stand in `config.backbone_digests`.

    `*_values` covers the weights rounded to bfloat16, equal for float32 and bfloat16 loads of one checkpoint and None
    for other dtypes, which round differently; `*_signs` the signs alone, which no rounding changes. Quantised layers
    have no hash.
    """
    lists = (module for module in backbone.base_model.modules() if isinstance(module, nn.ModuleList))
    layers = max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
    weights = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in layers[-1].named_parameters()
        if "lora_" not in name
    }
    parts = {
        "embedding": [backbone.get_input_embeddings().weight],
        "layer": [weights[name] for name in sorted(weights)],
    }
    digests = {}
    for part, parameters in parts.items():
        is_plain = all(type(p) is nn.Parameter and p.dtype.is_floating_point for p in parameters)
        keeps_values = is_plain and all(p.dtype in (torch.float32, torch.bfloat16) for p in parameters)
        digests[f"{part}_values"] = _hash(p.to(torch.bfloat16) for p in parameters) if keeps_values else None
        digests[f"{part}_signs"] = _hash(torch.signbit(p) for p in parameters) if is_plain else None
    return digests


def compressor_fingerprint(tensors: Mapping[str, torch.Tensor], processor, config) -> str:
    """SHA-256 in hex over all that a memory depends on; device, compute dtype and merging do not enter.

    That is (name, shape, dtype, bytes) of the compressor's adapter (PEFT names) and of clara.safetensors in the order
    of their names, how a document becomes ids, the tokenizer, `document_max_length`, the backbone's sign digests, and
    the LoRA scaling.
    """
    digest = hashlib.sha256()
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    text_to_ids = {
        "document": "[BOS?] title \\n text",
        "bos_ids": processor.bos_ids,
        "document_max_length": config.document_max_length,
        "tokenizer": {name: backend[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")},
        "backbone": {name: value for name, value in (config.backbone_digests or {}).items() if "signs" in name},
        "scaling": config.lora["compressor"]["alpha"] / config.lora["compressor"]["rank"],
    }
    if processor.encode_in_place or processor.add_eos_token:  # others stay what they were without these
        text_to_ids["text"] = [processor.encode_in_place, processor.eos_ids]
    if config.memory_layout != "tokens":  # fingerprints from before there were layouts stay what they are
        text_to_ids["memory_layout"] = [config.memory_layout, config.memory_sizes[0]]
    digest.update(json.dumps(text_to_ids, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _hash(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
