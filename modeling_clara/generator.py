"""Writes the generator of a model as a plain causal language model, which servers such as vLLM load.

The server reads embeddings of prompts. Searching, memories and prompts stay with the whole model.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from peft.utils.other import transpose
from transformers import GenerationConfig

from .backbone_clara import is_quantised, write_backbone
from .corpus.storage import foreign_files
from .files_clara import PEFT_PREFIX, complete_tokenizer_config
from .storage_clara import read_json, write_json
from .version import __version__

MARKER = "clara_generator.json"
WRITTEN = (MARKER, "README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
WRITTEN += ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")
WRITTEN += ("chat_template.jinja", "chat_templates")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CARD = """# Generator of a CLaRa model

A plain causal language model: the backbone of {source} with its generator merged in float32, saved in {dtype}.
It reads prompts of CLaRa, which come to it as embeddings:

```sh
vllm serve FOLDER --served-model-name {name} --enable-prompt-embeds
clara serve CORPUS --generator http://HOST:8000/v1
```

The name lets the service check that this is the generator of its model, whose whole fingerprint is in
`clara_generator.json`.
"""


def merge_generator(model, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Path:
    """Write the generator as a plain causal language model of the backbone's architecture, without code of ours.

    The folder has weights, config, tokenizer and chat template of the backbone, a README.md with the command that
    serves it, and `clara_generator.json`, which tells what it came from. It appears at once; a merged generator that
    was there is replaced. The model is not changed. Takes memory for the weights in `dtype`.

    Args:
        model: a `CLaRaForRAG`; its backbone must not be quantised.
        path: the folder; it must not exist, be empty, or hold a merged generator and nothing else. No mount point.
        dtype: of the weights: float32, bfloat16 or float16; default the backbone's. The sums are float32.

    Returns:
        The folder.

    Raises:
        ValueError: the backbone is quantised, there is no processor, the folder holds something else, or `dtype`.
    """
    dtype = model.backbone.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(map(str, DTYPES))}, got {dtype}. Use one of these.")
    if model.processor is None:
        raise ValueError("`model.processor` must be set to merge, got None. Set it to a CLaRaProcessor first.")
    if is_quantised(model.backbone):
        raise ValueError(
            "the backbone must not be quantised to be merged. Load the model without `quantization_config`."
        )
    given, target = Path(os.path.abspath(path)), Path(os.path.realpath(path))  # a link stays one
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        merged = Path(temporary) / "merged"
        with model.lock, torch.no_grad():
            fingerprint = generator_fingerprint(model)
            write_backbone(model.backbone, merged, "5GB", merged_state(model, dtype))
            generation = model.build_generation_config(None, 1)
            settings = {"eos_token_id": generation.eos_token_id, "pad_token_id": generation.pad_token_id}
            settings["bos_token_id"] = model.backbone.generation_config.bos_token_id
            # Not the backbone's own, whose sampling settings a server would take for those of every request.
            GenerationConfig(**settings).save_pretrained(merged)
            model.processor.tokenizer.save_pretrained(merged)
            complete_tokenizer_config(merged)
            compressor = model.fingerprint
        source, short = model.name_or_path or model.config.backbone_name_or_path, str(dtype).removeprefix("torch.")
        marker = {"generator": fingerprint, "compressor": compressor, "name_or_path": source, "revision": model.commit}
        write_json(merged / MARKER, {**marker, "dtype": short, "clara": __version__})
        name = served_name(fingerprint)
        card = CARD.format(source=f"`{source}`", dtype=short, name=name)
        (merged / "README.md").write_text(card, encoding="utf-8")
        for file in merged.glob("*.safetensors"):  # their writer lets only the owner read
            file.chmod((merged / "config.json").stat().st_mode)
        _check_target(target)  # once more: merging took a while
        if target.exists():
            os.rename(target, Path(temporary) / "earlier")
        os.rename(merged, target)
    return given


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"`path` must be a folder, got the file {target}. Choose another name.")
    if os.path.ismount(target):  # which cannot be put in place at once
        raise ValueError(f"`path` must not be where a volume is mounted, got {target}. Choose a folder in it.")
    foreign = foreign_files(target, WRITTEN)
    if not foreign and target.exists() and any(target.iterdir()) and not (target / MARKER).exists():
        foreign = sorted(file.name for file in target.iterdir())  # a language model that is none of ours
    if foreign:
        raise ValueError(
            f"`path` must be a new folder or that of a merged generator, but {target} has {foreign[:3]}. "
            "Choose another folder, or move these away."
        )


def merged_state(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of the model whose backbone has the generator added: W + scaling B A in float32, as `dtype`."""
    exact = model._exact_tensors("generator")
    state = dict(model.state_dict())
    for name, layer in model.backbone.named_modules():
        if f"{PEFT_PREFIX}{name}.lora_A.weight" not in exact:
            continue
        weight = layer.get_base_layer().weight
        lora_a, lora_b = (exact[f"{PEFT_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        added = transpose(lora_b @ lora_a, layer.fan_in_fan_out) * layer.scaling["generator"]
        state[f"backbone.{name}.base_layer.weight"] = (weight.float() + added.to(weight.device)).to(dtype)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }


def generator_fingerprint(model) -> str:
    """SHA-256 in hex over the generator's adapter, its scaling and the backbone's sign digests.

    It tells which model a merged generator came from. The dtype that a model was loaded in does not enter.
    """
    digests = {name: value for name, value in (model.config.backbone_digests or {}).items() if "signs" in name}
    scaling = model.config.lora["generator"]["alpha"] / model.config.lora["generator"]["rank"]
    digest = hashlib.sha256(json.dumps([digests, scaling], sort_keys=True).encode())
    for name, tensor in sorted(model._exact_tensors("generator").items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def served_name(fingerprint: str) -> str:
    """The name under which a server offers the generator with this fingerprint, so that a service can check it."""
    return f"clara-generator-{fingerprint[:16]}"


def read_marker(folder: str | os.PathLike) -> dict:
    """What a merged generator came from: generator and compressor fingerprints, name_or_path, revision, dtype."""
    return read_json(Path(folder) / MARKER)
