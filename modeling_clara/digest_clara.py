"""Hashes that tell whether weights and memories belong together: the backbone's digests, the compressor's fingerprint.

Stands beside the checkpoint: digests go into config.json, fingerprints into compressed corpora. It knows nothing of
files or of how a model runs.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn


def backbone_digests(backbone: nn.Module) -> dict[str, str | None]:
    """Hashes of the token embedding and the last layer, as they stand in `config.backbone_digests`.

    Every part is hashed twice. `*_values` covers the weights rounded to bfloat16, equal for float32 and bfloat16 loads
    of one checkpoint and None for other dtypes, which round differently. `*_signs` covers the signs alone, which no
    rounding changes. Quantised layers have no hash.

    Returns:
        `embedding_values`, `embedding_signs`, `layer_values`, `layer_signs`: SHA-256 in hex, or None.
    """
    layers = max((m for m in backbone.base_model.modules() if isinstance(m, nn.ModuleList)), key=_n_parameters)
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
        digests[f"{part}_values"] = _hash(p.detach().to(torch.bfloat16) for p in parameters) if keeps_values else None
        digests[f"{part}_signs"] = _hash(torch.signbit(p.detach()) for p in parameters) if is_plain else None
    return digests


def compressor_fingerprint(tensors: Mapping[str, torch.Tensor], processor, config) -> str:
    """SHA-256 in hex over all that a memory depends on.

    That is: (name, shape, dtype, bytes) of the compressor's adapter and the special rows in the order of their names,
    how a document becomes ids, the tokenizer, `document_max_length`, the backbone's sign digests, and the LoRA
    scaling. Device, compute dtype and merging do not enter.

    Args:
        tensors: adapter tensors under PEFT names, and the tensors of clara.safetensors by name.
        processor: `CLaRaProcessor`.
        config: `CLaRaConfig`.
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
    if config.memory_layout != "tokens":  # fingerprints from before there were layouts stay what they are
        text_to_ids["memory_layout"] = [config.memory_layout, config.memory_sizes[0]]
    digest.update(json.dumps(text_to_ids, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _hash(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(_bytes(tensor.cpu().contiguous()))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
