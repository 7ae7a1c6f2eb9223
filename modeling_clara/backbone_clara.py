"""The backbone of a checkpoint: loading it whole, holding it against what the adapters were trained on, writing it.

Stands between `AutoModelForCausalLM` and the checkpoint. It knows nothing of memories, prompts or the other files.
"""

import logging
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_clara import CLaRaConfig
from .digest_clara import backbone_digests

logger = logging.getLogger(__name__)

STRUCTURE_FIELDS = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")


def load_backbone(source: str, revision: str | None, subfolder: str = "", **kwargs):
    """A causal language model in the given place, all of its weights from the files.

    Raises:
        OSError: not to be had; the message says how to name another place.
        ValueError: weights are missing in the files or do not fit.
    """
    if subfolder:
        kwargs["subfolder"] = subfolder
    kwargs["ignore_mismatched_sizes"] = True  # so that they are reported and named below
    try:
        backbone, report = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, output_loading_info=True, **kwargs
        )
    except (OSError, HTTPError, SafetensorError) as error:
        where = f"`{subfolder or source}`" + (f" (revision {revision})" if revision else "")
        raise OSError(
            f"the backbone {where} could not be loaded: {error} Pass `backbone=PATH` with a folder or id that has it."
        ) from error
    missing, unfit = sorted(report["missing_keys"]), sorted(name for name, *_ in report["mismatched_keys"])
    if missing or unfit:
        raise ValueError(
            f"the backbone `{source}` must hold all of its weights, missing: {missing[:3]} ({len(missing)}), of "
            f"another shape: {unfit[:3]} ({len(unfit)}). Get it again, or pass `backbone=PATH` with a complete one."
        )
    return backbone


def check_structure(found, config: CLaRaConfig, source: str) -> None:
    """Raise a ValueError unless a backbone configuration has the structure that config.json describes."""
    for field in STRUCTURE_FIELDS:
        wanted, given = getattr(config.text_config, field), getattr(found, field)
        if wanted != given:
            raise ValueError(
                f"the backbone `{source}` must have {field} {wanted} as in `text_config` of config.json, got {given}. "
                f"Pass `backbone=PATH` with {config.backbone_name_or_path}, on which the adapters were trained."
            )


def check_digests(backbone, config: CLaRaConfig, source: str, *, is_explicit: bool) -> None:
    """Compare the backbone's weights with those the adapters were trained on.

    Raises:
        ValueError: they differ and the backbone was not given explicitly; else a warning says so.
    """
    found = backbone_digests(backbone)
    differing = [
        part
        for part, digest in (config.backbone_digests or {}).items()
        if found.get(part) is not None and digest is not None and found[part] != digest
    ]
    if not differing:
        return
    message = (
        f"the weights of the backbone `{source}` must be those the adapters were trained on "
        f"({config.backbone_name_or_path}, revision {config.backbone_revision}), but differ in {sorted(differing)}. "
    )
    if not is_explicit:
        raise ValueError(message + "Pass `backbone=PATH` with the right weights, or with these to use them knowingly.")
    logger.warning(message + "Memories and answers can differ: pass the weights named above to `backbone=`.")


def default_dtype(kwargs: dict) -> dict:
    """Fill in `dtype`: float32 on CPU, else what the backbone was saved in; `torch_dtype` is the old name."""
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype
    device_map = kwargs.get("device_map")
    devices = set(map(str, device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]))
    on_cpu = devices == {"cpu"} or not torch.accelerator.is_available()
    on_cpu = on_cpu and kwargs.get("quantization_config") is None
    return {**kwargs, "dtype": dtype or (torch.float32 if on_cpu else "auto")}


def backbone_config(place: dict, hub: dict):
    options = {"subfolder": place["subfolder"]} if place["subfolder"] else {}
    try:
        return AutoConfig.from_pretrained(place["source"], revision=place["revision"], **options, **hub)
    except (OSError, HTTPError, ValueError) as error:
        where = f"`{place['source']}`" + (f" (revision {place['revision']})" if place["revision"] else "")
        raise OSError(
            f"the backbone {where} could not be found: {error} Pass `backbone=PATH` with a folder or id that has it."
        ) from error


def backbone_part(state_dict: dict) -> dict:
    """The backbone's entries of a state dict of the whole model, under the backbone's own names."""
    prefix = "backbone."
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def write_backbone(model, folder: Path, max_shard_size: int | str, state_dict: dict | None = None) -> None:
    """The backbone's own weights under their own names, without the adapters that were injected.

    Args:
        model: `CLaRaForRAG`.
        folder: to make.
        max_shard_size: largest file.
        state_dict: of the whole model, in place of its own weights.
    """
    backbone = model.backbone
    if getattr(backbone, "hf_quantizer", None) is not None:
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
    config.architectures, config.dtype = [type(backbone).__name__], backbone.dtype
    config.save_pretrained(folder)
    backbone.generation_config.save_pretrained(folder)
