"""A checkpoint on disk or on the Hub: three PEFT folders, the special rows, the processor, the backbone by reference.

Stands between files and the model. Everything that does not fit is an error that names the file and the remedy, never
a warning. It knows nothing of forward passes or text-level calls. The layout:

    config.json  clara.safetensors  processor_config.json  tokenizer files  *_clara.py  README.md
    compressor/ reasoner/ generator/   adapter_config.json + adapter_model.safetensors
    backbone/                          only with `include_backbone=True`
"""

import json
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save

from .adapters_clara import linear_module_names
from .backbone_clara import (
    backbone_config,
    backbone_part,
    check_digests,
    check_structure,
    default_dtype,
    load_backbone,
    write_backbone,
)
from .configuration_clara import MEMORY_STATISTICS, ROLES, TRAINED_ROWS, CLaRaConfig
from .digest_clara import backbone_digests, compressor_fingerprint
from .files_clara import HUB_KEYWORDS, CheckpointFiles, check_tensors, complete_tokenizer_config, move_files
from .processing_clara import CLaRaProcessor

SPECIAL_ROWS_FILE = "clara.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
BACKBONE_FOLDER = "backbone"
PEFT_PREFIX = "base_model.model."

CARD = """---
library_name: transformers
pipeline_tag: text-generation
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

model = AutoModel.from_pretrained("path/or/id", trust_remote_code=True)
model.answer(["..."], documents=["...", "..."])
```

`compressor/`, `reasoner/` and `generator/` are plain PEFT adapters of `{backbone}`.
"""


def adapter_tensors(model, role: str, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The live tensors of a role, or those of a state dict of the model, under the names of a plain PEFT file."""
    if state_dict is not None:
        state_dict = backbone_part(state_dict)
    state = get_peft_model_state_dict(
        model.backbone, state_dict=state_dict, adapter_name=role, save_embedding_layers=False
    )
    return {PEFT_PREFIX + name: tensor for name, tensor in state.items()}


def special_rows(model, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """memory_embeddings (max(memory_sizes), hidden) and separator_embedding (1, hidden).

    With windows also residual_scale, and where memories are normalised memory_shift and memory_scale, (hidden,) each.
    """
    names = [name for name in TRAINED_ROWS if name != "residual_scale" or model.config.memory_layout == "windows"]
    names += MEMORY_STATISTICS if model.config.memory_normalization else ()
    return {name: getattr(model, name) if state_dict is None else state_dict[name] for name in names}


def load_weights(model, files: CheckpointFiles, *, copy: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """Check adapters and special rows against the model and copy them in, all or nothing.

    Args:
        model: `CLaRaForRAG`.
        files: where the tensors are.
        copy: False only checks, for `clara info` on a model without storage.

    Returns:
        The stored tensors by role, and the special rows under "rows".

    Raises:
        FileNotFoundError, ValueError: naming file and remedy.
    """
    stored, pairs = {}, []
    for role in ROLES:
        settings, given = model.config.lora[role], files.json(f"{role}/{ADAPTER_CONFIG_FILE}")
        wanted = {"r": settings["rank"], "lora_alpha": settings["alpha"], "target_modules": settings["target_modules"]}
        given["target_modules"] = sorted(given.get("target_modules") or [])
        for field, value in wanted.items():
            if given.get(field) != value:
                raise ValueError(
                    f"`{field}` in `{role}/{ADAPTER_CONFIG_FILE}` must be {value} as in config.json, got "
                    f"{given.get(field)}. Use the files of one `save_pretrained`."
                )
        name, live = f"{role}/{ADAPTER_FILE}", adapter_tensors(model, role)
        stored[role] = files.tensors(name)
        check_tensors(stored[role], live, name)
        pairs += [(live[key], tensor) for key, tensor in stored[role].items()]
    stored["rows"], live = files.tensors(SPECIAL_ROWS_FILE), special_rows(model)
    check_tensors(stored["rows"], live, SPECIAL_ROWS_FILE)
    pairs += [(live[key], tensor) for key, tensor in stored["rows"].items()]
    if copy:
        with torch.no_grad():
            for live_tensor, tensor in pairs:
                live_tensor.copy_(tensor)
    return stored


class CheckpointMixin:
    """`from_backbone`, `from_pretrained`, `save_pretrained` and `fingerprint` of `CLaRaForRAG`."""

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike,
        *,
        memory_sizes: tuple[int, ...] = (4, 8, 16),
        lora_rank: int = 16,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        lora_alpha: int | None = None,
        lora_dropout: float = 0.1,
        config_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        **loader_kwargs,
    ):
        """Fresh adapters on a causal language model. They are untrained: memories carry no meaning yet.

        Args:
            name_or_path: Hub id or folder of the backbone.
            memory_sizes: memory vectors per document, see `CLaRaConfig`.
            lora_rank: rank of all three adapters (paper: 16).
            dtype: default float32 on CPU, else the backbone's.
            revision: of the backbone; the commit it resolves to is written to the config.
            lora_alpha: default twice the rank (paper: 32).
            lora_dropout: default 0.1 (paper).
            config_kwargs: further fields of `CLaRaConfig`.
            processor_kwargs: further fields of `CLaRaProcessor`.
            loader_kwargs: for `AutoModelForCausalLM.from_pretrained`: token, cache_dir, device_map, ...

        Returns:
            `CLaRaForRAG` in eval mode with `processor` attached.

        Raises:
            OSError, ValueError: the backbone cannot be had or an argument is out of its range.
        """
        source = str(name_or_path)
        hub = {name: loader_kwargs[name] for name in HUB_KEYWORDS if loader_kwargs.get(name) is not None}
        files = CheckpointFiles(source, revision=revision, **hub)
        backbone = load_backbone(source, files.revision, **default_dtype({**loader_kwargs, "dtype": dtype}))
        targets = linear_module_names(backbone)
        if not targets:
            raise ValueError(f"the backbone `{source}` must have linear layers for LoRA, found none. Choose another.")
        alpha = 2 * lora_rank if lora_alpha is None else lora_alpha
        lora = {"rank": lora_rank, "alpha": alpha, "dropout": lora_dropout, "target_modules": targets}
        text_config = deepcopy(backbone.config)
        text_config._name_or_path, text_config.dtype = "", None
        if hasattr(text_config, "quantization_config"):
            del text_config.quantization_config
        if (config_kwargs or {}).get("memory_normalization"):
            raise ValueError(
                "`memory_normalization` must be left out of `config_kwargs`: its numbers are measured. Call "
                "`normalize_memories(documents)` on the model."
            )
        config = CLaRaConfig(
            text_config=text_config,
            backbone_name_or_path=source,
            backbone_revision=files.commit,
            backbone_digests=backbone_digests(backbone),
            memory_sizes=list(memory_sizes),
            lora={role: dict(lora) for role in ROLES},
            **(config_kwargs or {}),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=files.revision, **hub)
        processor = CLaRaProcessor(
            tokenizer, document_max_length=config.document_max_length, **(processor_kwargs or {})
        )
        model = cls(config, backbone=backbone)
        model._match_embeddings()
        model.processor = processor
        return model.eval()

    def _match_embeddings(self) -> None:
        """Start the special rows at the mean of the token embeddings with their spread, and on their device."""
        table = self.get_input_embeddings().weight.detach()
        # A sample bounds the cost on large vocabularies; a seed of its own leaves the user's random state alone.
        sample = table[:: max(1, len(table) // 8192)].float()
        generator = torch.Generator().manual_seed(0)
        scale = float(getattr(self.get_input_embeddings(), "scalar_embed_scale", 1.0))  # Gemma scales its embeddings
        for rows in (self.memory_embeddings, self.separator_embedding):
            noise = torch.randn(rows.shape, generator=generator).to(table.device)
            rows.data = ((sample.mean(0) + noise * sample.std(0)) * scale).to(table.dtype)
        if self.config.memory_layout == "windows":
            self.residual_scale.data = self.residual_scale.data.to(table.device, table.dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        config: CLaRaConfig | None = None,
        backbone: str | os.PathLike | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs,
    ):
        """Load a checkpoint from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *model_args: none.
            config: in place of the checkpoint's config.json.
            backbone: folder or Hub id of the backbone, in place of the one that config.json names.
            revision: branch, tag or commit of the checkpoint; all of its files come from one commit. The backbone's
                revision is the one in config.json.
            subfolder: folder of the repo that holds the checkpoint.
            kwargs: token, cache_dir, force_download, local_files_only; and for the backbone dtype (default float32 on
                CPU, else the backbone's), device_map, attn_implementation, quantization_config, max_memory, ...

        Returns:
            `CLaRaForRAG` in eval mode with `processor` attached.

        Raises:
            FileNotFoundError: a file of the checkpoint is missing.
            OSError: the backbone cannot be had.
            ValueError: a file is damaged, does not fit config.json, or the backbone is another one.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in _AUTO_KEYWORDS}
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
        files = CheckpointFiles(pretrained_model_name_or_path, subfolder, revision, **hub)
        if config is None:
            model_type = files.json("config.json").get("model_type")
            if model_type != cls.config_class.model_type:
                raise ValueError(
                    f"`model_type` in `config.json` of {files.source} must be {cls.config_class.model_type!r}, got "
                    f"{model_type!r}. Give a CLaRa checkpoint, or start one on a language model with `from_backbone`."
                )
            config = CLaRaConfig.from_pretrained(files.source, subfolder=subfolder, revision=files.revision, **hub)
        config = deepcopy(config)
        config.dtype = None
        if config._attn_implementation is not None:  # where AutoModel puts the keyword
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        is_explicit = backbone is not None
        place = {"source": str(backbone or config.backbone_name_or_path), "revision": None, "subfolder": ""}
        if not is_explicit and config.backbone_included:
            folder = f"{subfolder}/{BACKBONE_FOLDER}".strip("/")
            files.path(f"{BACKBONE_FOLDER}/config.json")
            place = {"source": files.source, "revision": files.revision, "subfolder": folder}
        elif not is_explicit:
            place["revision"] = config.backbone_revision
        found = backbone_config(place, hub)
        check_structure(found, config, place["source"])
        model = cls(config, backbone=load_backbone(**place, **default_dtype(kwargs)))
        check_digests(model.backbone, config, place["source"], is_explicit=is_explicit)
        table = model.get_input_embeddings().weight
        for name, rows in special_rows(model).items():
            rows.data = rows.data.to(table.device, torch.float32 if name in MEMORY_STATISTICS else table.dtype)
        # Copies: the loaded tensors are mapped from the files, which may be overwritten while the model lives.
        stored = load_weights(model, files)
        model._stored = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in stored.items()}
        model.processor = load_processor(files, config)
        model.name_or_path, model.commit = files.source, files.commit
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        include_backbone: bool | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the checkpoint folder; see the head of this file for its layout.

        Files are written beside the folder first and moved in one by one, so none is ever half written.

        Args:
            save_directory: folder, made where needed. A README.md that is there is kept.
            include_backbone: also write the backbone's weights; default: as the checkpoint this was loaded from.
            max_shard_size: largest file of backbone weights.
            is_main_process: False writes nothing, for all but one process of a distributed run.
            state_dict: the weights to write in place of the model's own, as gathered from a sharded model.

        Raises:
            ValueError: there is no processor or it contradicts the config, or the backbone is quantised and should be
                included.
        """
        if not is_main_process:
            return
        if self.processor is None:
            raise ValueError("`model.processor` must be set to save, got None. Set it to a CLaRaProcessor first.")
        if self.processor.document_max_length != self.config.document_max_length:
            raise ValueError(
                f"`processor.document_max_length` must be {self.config.document_max_length} as in the config to save, "
                f"got {self.processor.document_max_length}. Set both alike."
            )
        include_backbone = self.config.backbone_included if include_backbone is None else include_backbone
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}. Choose another name.")
        target.mkdir(parents=True, exist_ok=True)
        with self.lock, tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
            folder = Path(temporary)
            self._write_config(folder, include_backbone)
            for role in ROLES:
                self._write_adapter(folder / role, role, state_dict)
            save_file(self._exact_tensors("rows", state_dict), folder / SPECIAL_ROWS_FILE, metadata={"format": "pt"})
            self.processor.save_pretrained(folder)
            complete_tokenizer_config(folder)
            if include_backbone:
                write_backbone(self, folder / BACKBONE_FOLDER, max_shard_size, state_dict)
            if not (target / "README.md").exists():
                (folder / "README.md").write_text(self._card(include_backbone), encoding="utf-8")
            move_files(folder, target)

    def _write_config(self, folder: Path, include_backbone: bool) -> None:
        config = deepcopy(self.config)
        config.backbone_included, config.dtype = include_backbone, None
        config.architectures = [type(self).__name__]
        custom_object_save(self, folder, config=config)
        config.save_pretrained(folder)

    def _write_adapter(self, folder: Path, role: str, state_dict: dict | None) -> None:
        folder.mkdir()
        save_file(self._exact_tensors(role, state_dict), folder / ADAPTER_FILE, metadata={"format": "pt"})
        settings = self.backbone.peft_config[role].to_dict()
        settings |= {
            "base_model_name_or_path": self.config.backbone_name_or_path,
            "revision": self.config.backbone_revision,
            "target_modules": self.config.lora[role]["target_modules"],  # a list: PEFT's own is an unordered set
            "inference_mode": True,
        }
        text = json.dumps(settings, indent=2, sort_keys=True, default=list) + "\n"
        (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")

    def _card(self, include_backbone: bool) -> str:
        name = self.config.backbone_name_or_path or "the backbone"
        is_hub_id = not include_backbone and self.config.backbone_revision is not None
        return CARD.format(
            base_model=f"base_model: {name}\n" if is_hub_id else "",
            memory_sizes=", ".join(map(str, self.config.memory_sizes)),
            backbone=name if is_hub_id else "the backbone",
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 that tells whether memories of two models can be compared; see `digest_clara.py`."""
        tensors = {**self._exact_tensors("compressor"), **self._exact_tensors("rows")}
        return compressor_fingerprint(tensors, self.processor, self.config)

    commit: str | None = None  # of the checkpoint on the Hub

    def compressor_versions(self) -> tuple:
        """Changes whenever a weight that the fingerprint covers may have changed; costs nothing."""
        tensors = [p for name, p in self.backbone.named_parameters() if "compressor" in name.split(".")]
        rows = list(special_rows(self).values())
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors + rows]
        # Of what is small also the values: assignments to `.data` are not counted.
        return (self.config.document_max_length, *(float(row.detach().sum()) for row in rows), *versions)

    _stored: dict[str, dict[str, torch.Tensor]] | None = None

    def _exact_tensors(self, part: str, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """What to save and hash of a role or of "rows": the live tensors on CPU, or what they were rounded from.

        A model that was loaded in another dtype holds rounded adapters. While nothing but the rounding has changed
        them, the stored tensors are meant: the compute dtype enters neither the fingerprint nor a saved checkpoint.
        """
        live = special_rows(self, state_dict) if part == "rows" else adapter_tensors(self, part, state_dict)
        live = {name: tensor.detach().cpu().contiguous() for name, tensor in live.items()}
        stored = self._stored[part] if self._stored else live
        is_same = {
            name: name in stored and torch.equal(stored[name].to(tensor.dtype), tensor)
            for name, tensor in live.items()
        }
        return {name: stored[name] if is_same[name] else tensor for name, tensor in live.items()}


_AUTO_KEYWORDS = ("_from_auto", "adapter_kwargs", "trust_remote_code", "code_revision", "state_dict")


def load_processor(files: CheckpointFiles, config: CLaRaConfig) -> CLaRaProcessor:
    """The checkpoint's processor.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or not of this config.json.
    """
    settings = files.json("processor_config.json")
    if settings.get("document_max_length") != config.document_max_length:
        raise ValueError(
            f"`document_max_length` in `processor_config.json` must be {config.document_max_length} as in "
            f"config.json, got {settings.get('document_max_length')}. Use the files of one `save_pretrained`."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files.json(name)
    # Left out, the tokenizer's loader would ask on the terminal whether to run the code that config.json names.
    place = {"subfolder": files.subfolder, "revision": files.revision, "trust_remote_code": False}
    return CLaRaProcessor.from_pretrained(files.source, **place, **files.hub_keywords)
