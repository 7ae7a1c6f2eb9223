"""The files of one checkpoint, in a folder or on the Hub: finding, reading, checking and writing them.

What is missing or damaged is an error that names the file and the remedy.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ResolvedRevision
from huggingface_hub.errors import HTTPError
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

from .backbone_clara import backbone_part
from .configuration_clara import MEMORY_STATISTICS, ROLES, TRAINED_ROWS, CLaRaConfig
from .passes_clara import CLaRaPasses

ADAPTER_CONFIG_FILE = "adapter_config.json"
# The files of weights: memory tokens and the like, and an adapter of each role.
PARTS = {**{role: f"{role}/adapter_model.safetensors" for role in ROLES}, "rows": "clara.safetensors"}
PEFT_PREFIX = "base_model.model."
HUB_KEYWORDS = ("token", "cache_dir", "force_download", "local_files_only", "proxies")

# No `pipeline_tag`: the Hub would offer a pipeline of transformers, which cannot run this model.
CARD = """---
library_name: transformers
tags:
- clara
- soft-compression
- retrieval-augmented-generation
{base_model}---

# CLaRa checkpoint

Compresses a document into {memory_sizes} memory tokens, retrieves by cosine in the same space and answers from the
memories (CLaRa, arXiv 2511.18659).

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("ORG/NAME", revision="COMMIT", trust_remote_code=True)
model.answer(["..."], documents=["...", "..."])
```

`compressor/`, `reasoner/` and `generator/` are plain PEFT adapters of {backbone}.
"""


class CheckpointFiles:
    """Finds the files of one checkpoint: a folder, or a Hub repo at one commit.

    A revision is resolved once, so that all files are of one commit; `hub_keywords` are `HUB_KEYWORDS`.
    """

    def __init__(self, source: str | os.PathLike, subfolder: str = "", revision: str | None = None, **hub_keywords):
        self.source, self.subfolder, self.hub_keywords = str(source), subfolder, hub_keywords
        self.is_local = os.path.isdir(self.source)
        names = ("token", "cache_dir", "local_files_only")
        options = {name: hub_keywords[name] for name in names if hub_keywords.get(name) is not None}
        self.revision = None if self.is_local else resolve_revision(self.source, revision, **options)

    @property
    def commit(self) -> str | None:
        """Commit of a Hub repo; None for a folder."""
        return self.revision.resolved if isinstance(self.revision, ResolvedRevision) else self.revision

    def path(self, name: str) -> Path:
        """Local path of a file, downloaded if needed, or a FileNotFoundError."""
        subfolder, _, filename = f"{self.subfolder}/{name}".strip("/").rpartition("/")
        try:
            path = cached_file(self.source, filename, subfolder=subfolder, revision=self.revision, **self.hub_keywords)
            if path is None:  # what it returns for a missing config.json, where it raises for any other file
                raise FileNotFoundError("there is no such file.")
        except (OSError, HTTPError) as error:  # the second: the connection broke off, and so did all retries
            where = self.source if self.is_local else f"{self.source} (revision {self.revision or 'main'})"
            raise FileNotFoundError(
                f"`{name}` must be in {where}, but could not be read there: {error} The checkpoint is incomplete or "
                "out of reach: copy or save it again, or check id, revision and token."
            ) from error
        return Path(path)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a safetensors file, as stored; a ValueError if it is truncated or none."""
        path = self.path(name)
        try:
            return load_file(path)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` of {self.source} must be a complete safetensors file: {error}. It is damaged or was copied "
                "in part: copy or download it again (`force_download=True`)."
            ) from error

    def json(self, name: str) -> dict:
        """The object of a JSON file; a ValueError if it holds none."""
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, no object")
        except ValueError as error:
            raise ValueError(
                f"`{name}` of {self.source} must be JSON: {error}. It is damaged: copy or download it again "
                "(`force_download=True`)."
            ) from error
        return content


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise a ValueError unless a file has exactly the expected tensors, in shape and finite."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"`{name}` must hold the tensors that config.json describes; missing: {missing[:3]} ({len(missing)}), "
            f"unexpected: {unexpected[:3]} ({len(unexpected)}). The file belongs to another checkpoint or another "
            "backbone: use the files of one `save_pretrained`."
        )
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"`{key}` in `{name}` must have the shape {tuple(tensor.shape)}, got {tuple(found[key].shape)}. Rank, "
                "memory sizes or backbone differ from config.json: use the files of one `save_pretrained`."
            )
        if not found[key].isfinite().all():
            raise ValueError(
                f"`{key}` in `{name}` must be finite, got NaN or infinity. Use an earlier checkpoint of the training."
            )


def live_tensors(model: CLaRaPasses, part: str, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The model's tensors of a part of `PARTS`, or those of its `state_dict`, under the names in the part's file.

    Those of a role are a plain PEFT adapter. "rows" are memory_embeddings (max(memory_sizes), hidden) and
    separator_embedding (1, hidden), with windows also residual_scale, and if memories are normalised memory_shift and
    memory_scale, (hidden,) each.
    """
    if part == "rows":
        rows = {name: getattr(model, name, None) for name in (*TRAINED_ROWS, *MEMORY_STATISTICS)}
        return {name: (state_dict or rows)[name] for name, row in rows.items() if row is not None}
    weights = None if state_dict is None else backbone_part(state_dict)
    state = get_peft_model_state_dict(model.backbone, weights, part, save_embedding_layers=False)
    return {PEFT_PREFIX + name: tensor for name, tensor in state.items()}


def load_weights(
    model: CLaRaPasses, files: CheckpointFiles, *, copy: bool = True
) -> dict[str, dict[str, torch.Tensor]]:
    """Check all `PARTS` against the model and copy them in, all or nothing; `copy=False` only checks.

    Returns the stored tensors of each part. A FileNotFoundError or ValueError names file and remedy.
    """
    stored, pairs = {}, []
    for part, name in PARTS.items():
        if part in ROLES:
            _check_adapter_config(part, model.config.lora[part], files)
        stored[part], live = files.tensors(name), live_tensors(model, part)
        check_tensors(stored[part], live, name)
        pairs += [(live[key], tensor) for key, tensor in stored[part].items()]
    if copy:
        with torch.no_grad():
            for live_tensor, tensor in pairs:
                live_tensor.copy_(tensor)
    return stored


def _check_adapter_config(role: str, settings: dict, files: CheckpointFiles) -> None:
    name = f"{role}/{ADAPTER_CONFIG_FILE}"
    given = files.json(name)
    given["target_modules"] = sorted(given.get("target_modules") or [])
    for field, setting in (("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "target_modules")):
        if given.get(field) != settings[setting]:
            raise ValueError(
                f"`{field}` in `{name}` must be {settings[setting]} as in config.json, got {given.get(field)}. Use "
                "the files of one `save_pretrained`."
            )


def write_adapter_config(model: CLaRaPasses, role: str, folder: Path) -> None:
    """Make a folder with what makes the tensors of a role a plain PEFT adapter."""
    folder.mkdir()
    settings = model.backbone.peft_config[role].to_dict()
    settings |= {
        "base_model_name_or_path": model.config.backbone_name_or_path,
        "revision": model.config.backbone_revision,
        "target_modules": model.config.lora[role]["target_modules"],  # a list: PEFT's own is an unordered set
        "inference_mode": True,
    }
    text = json.dumps(settings, indent=2, sort_keys=True, default=list) + "\n"
    (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")


def model_card(config: CLaRaConfig, include_backbone: bool) -> str:
    """The README.md that a checkpoint starts with."""
    name = config.backbone_name_or_path or "the backbone"
    is_hub_id = not include_backbone and config.backbone_revision is not None
    return CARD.format(
        base_model=f"base_model: {name}\n" if is_hub_id else "",
        memory_sizes=" or ".join(map(str, config.memory_sizes)),
        backbone=f"`{name}`" if is_hub_id else "its backbone",
    )


def complete_tokenizer_config(folder: Path) -> None:
    """Take out where the tokenizer was loaded from; repeat the chat template, so that no prompt hangs on one file.

    The class becomes the general one, which reads tokenizer.json as it is: those of Llama and others build parts of it
    anew from settings that they do not save.
    """
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def move_files(folder: Path, target: Path) -> None:
    """Move every file into its place, config.json last: a folder without it is not a checkpoint.

    Files of an earlier checkpoint that transformers would read with the new one are removed: chat templates, and
    shards of the backbone where one is moved in.
    """
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    patterns = ["chat_template.jinja", "chat_templates/*.jinja"]
    if Path("backbone/config.json") in names:
        patterns.append("backbone/*.safetensors*")
    old = {path.relative_to(target) for pattern in patterns for path in target.glob(pattern)}
    for name in old.difference(names):
        (target / name).unlink()
    for name in sorted(names, key=lambda name: name == Path("config.json")):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.move(folder / name, target / name)
