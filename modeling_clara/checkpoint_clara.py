"""A checkpoint on disk or on the Hub: three PEFT folders, memory tokens, processor, the backbone by reference.

Everything that does not fit is an error that names the file and the remedy, never a warning. The layout:

    config.json  clara.safetensors  processor_config.json  tokenizer files  *_clara.py  README.md
    compressor/ reasoner/ generator/   adapter_config.json + adapter_model.safetensors
    backbone/                          only with `include_backbone=True`
"""

import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save

from .backbone_clara import backbone_digests, compressor_fingerprint, load_backbone, trained_backbone, write_backbone
from .configuration_clara import MEMORY_STATISTICS, ROLES, CLaRaConfig
from .files_clara import (
    HUB_KEYWORDS,
    PARTS,
    CheckpointFiles,
    complete_tokenizer_config,
    live_tensors,
    load_weights,
    model_card,
    move_files,
    write_adapter_config,
)
from .passes_clara import CLaRaPasses
from .processing_clara import CLaRaProcessor

BACKBONE_FOLDER = "backbone"
_AUTO_KEYWORDS = ("_from_auto", "adapter_kwargs", "trust_remote_code", "code_revision", "state_dict")


def load_processor(files: CheckpointFiles, config: CLaRaConfig) -> CLaRaProcessor:
    """The checkpoint's processor, or a FileNotFoundError or ValueError if it does not fit this config.json."""
    settings = files.json("processor_config.json")
    if settings.get("document_max_length") != config.document_max_length:
        raise ValueError(
            f"`document_max_length` in `processor_config.json` must be {config.document_max_length} as in "
            f"config.json, got {settings.get('document_max_length')}. Use the files of one `save_pretrained`."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files.json(name)
    # Without the config, the tokenizer's loader would read config.json and warn of a model type that it does not know.
    place = {"subfolder": files.subfolder, "revision": files.revision, "trust_remote_code": False, "config": config}
    return CLaRaProcessor.from_pretrained(files.source, **place, **files.hub_keywords)


class CLaRaCheckpoint(CLaRaPasses):
    """The side of `CLaRaForRAG` that loads, saves and publishes."""

    commit: str | None = None  # of the checkpoint on the Hub
    backbone_source: str | None = None  # that was given to `from_pretrained`
    _stored: dict[str, dict[str, torch.Tensor]] | None = None  # as loaded, before rounding to the compute dtype

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
    ) -> Self:
        """Fresh adapters on a causal language model, in eval mode with `processor` attached.

        They are untrained: memories carry no meaning yet. An OSError or ValueError if the backbone cannot be loaded or
        an argument is out of its range.

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
        """
        source, settings = str(name_or_path), config_kwargs or {}
        if settings.get("memory_normalization"):
            raise ValueError(
                "`memory_normalization` must be left out of `config_kwargs`: its numbers are measured. Call "
                "`normalize_memories(documents)` on the model."
            )
        hub = {name: loader_kwargs[name] for name in HUB_KEYWORDS if loader_kwargs.get(name) is not None}
        files = CheckpointFiles(source, revision=revision, **hub)
        backbone = load_backbone(source, files.revision, dtype=dtype, **loader_kwargs)
        lora = {"rank": lora_rank, "alpha": 2 * lora_rank if lora_alpha is None else lora_alpha}
        lora |= {"dropout": lora_dropout, "target_modules": None}  # all linear layers
        text_config = deepcopy(backbone.config)
        text_config._name_or_path, text_config.dtype = "", None
        if hasattr(text_config, "quantization_config"):
            del text_config.quantization_config
        config = CLaRaConfig(
            text_config=text_config,
            backbone_name_or_path=source,
            backbone_revision=files.commit,
            backbone_digests=backbone_digests(backbone),
            memory_sizes=list(memory_sizes),
            lora={role: dict(lora) for role in ROLES},
            **settings,
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=files.revision, **hub)
        except (OSError, ValueError) as error:
            raise OSError(
                f"the backbone `{source}` must have a tokenizer: {error} Put a tokenizer.json beside its weights."
            ) from error
        model = cls(config, backbone=backbone)
        _start_like_tokens(model)
        model.processor = CLaRaProcessor(tokenizer, config.document_max_length, **(processor_kwargs or {}))
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: CLaRaConfig | None = None,
        backbone: str | os.PathLike | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs,
    ) -> Self:
        """Load a checkpoint from a folder or the Hub, in eval mode with `processor` attached.

        A FileNotFoundError if a file of the checkpoint is missing, an OSError if the backbone cannot be loaded, a
        ValueError if a file is damaged or does not fit config.json, or the backbone is another one.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            config: instead of the checkpoint's config.json.
            backbone: folder or Hub id of the backbone, instead of the one that config.json names.
            revision: branch, tag or commit of the checkpoint; all of its files come from one commit. The backbone's
                revision is the one in config.json.
            subfolder: folder of the repo that holds the checkpoint.
            kwargs: token, cache_dir, force_download, local_files_only; and for the backbone dtype (default float32 on
                CPU, else the backbone's), device_map, attn_implementation, quantization_config, max_memory, ...
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in _AUTO_KEYWORDS}
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
        files = CheckpointFiles(pretrained_model_name_or_path, subfolder, revision, **hub)
        config = deepcopy(_read_config(files, hub) if config is None else config)
        config.dtype = None
        if config._attn_implementation is not None:  # where AutoModel puts the keyword
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        place = {"source": str(backbone or config.backbone_name_or_path), "subfolder": ""}
        place["revision"] = config.backbone_revision if backbone is None else None
        if backbone is None and config.backbone_included:
            files.path(f"{BACKBONE_FOLDER}/config.json")
            folder = f"{subfolder}/{BACKBONE_FOLDER}".strip("/")
            place = {"source": files.source, "subfolder": folder, "revision": files.revision}
        model = cls(config, trained_backbone(config, place, hub, is_explicit=backbone is not None, **kwargs))
        table = model.get_input_embeddings().weight
        for name, rows in live_tensors(model, "rows").items():
            rows.data = rows.data.to(table.device, torch.float32 if name in MEMORY_STATISTICS else table.dtype)
        # Copies: the loaded tensors are mapped from the files, which may be overwritten while the model lives.
        stored = load_weights(model, files)
        model._stored = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in stored.items()}
        model.processor = load_processor(files, config)
        model.name_or_path, model.commit = files.source, files.commit
        model.backbone_source = None if backbone is None else str(backbone)
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
        """Write the checkpoint folder: config, adapters, processor, code and card.

        Files are written beside the folder first and moved in one by one, so none is ever half written. A ValueError
        if there is no processor, it contradicts the config, or a quantised backbone should be included.

        Args:
            save_directory: folder, made if needed. A README.md that is there is kept.
            include_backbone: also write the backbone's weights; default: as the checkpoint this was loaded from.
            max_shard_size: largest file of backbone weights.
            is_main_process: False writes nothing, for all but one process of a distributed run.
            state_dict: the weights to write instead of the model's own, as gathered from a sharded model.
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
            config = deepcopy(self.config)
            config.backbone_included, config.dtype = include_backbone, None
            config.architectures = [type(self).__name__]
            custom_object_save(self, folder, config=config)
            config.save_pretrained(folder)
            for role in ROLES:
                write_adapter_config(self, role, folder / role)
            for part, name in PARTS.items():
                save_file(self._exact_tensors(part, state_dict), folder / name, metadata={"format": "pt"})
            self.processor.save_pretrained(folder)
            complete_tokenizer_config(folder)
            if include_backbone:
                write_backbone(self.backbone, folder / BACKBONE_FOLDER, max_shard_size, state_dict)
            if not (target / "README.md").exists():
                (folder / "README.md").write_text(model_card(self.config, include_backbone), encoding="utf-8")
            move_files(folder, target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Commit the checkpoint to a Hub repo, made if needed, whose card is kept; arguments as in transformers."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder, "README.md")
            if api.file_exists(repo_id, card.name, revision=revision):
                card.write_bytes(Path(api.hf_hub_download(repo_id, card.name, revision=revision)).read_bytes())
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tags = [*(self.model_tags or []), *(tags or [])]
            if tags:
                content = ModelCard.load(card)
                content.data.tags = list(dict.fromkeys([*(content.data.tags or []), *tags]))
                content.save(card)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 that tells whether memories of two models can be compared; see `compressor_fingerprint`."""
        tensors = {**self._exact_tensors("compressor"), **self._exact_tensors("rows")}
        return compressor_fingerprint(tensors, self.processor, self.config)

    def compressor_versions(self) -> tuple:
        """Changes whenever a weight that the fingerprint covers may have changed; costs nothing."""
        tensors = [p for name, p in self.backbone.named_parameters() if "compressor" in name.split(".")]
        rows = list(live_tensors(self, "rows").values())
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors + rows]
        # Of what is small also the values: assignments to `.data` are not counted.
        return (self.config.document_max_length, *(float(row.detach().sum()) for row in rows), *versions)

    def _exact_tensors(self, part: str, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """What to save and hash of a part of `PARTS`: the live tensors on CPU, or what they were rounded from.

        A model that was loaded in another dtype holds rounded adapters. While nothing but the rounding has changed
        them, the stored tensors are meant: the compute dtype enters neither the fingerprint nor a saved checkpoint.
        """
        tensors, stored = {}, self._stored[part] if self._stored else {}
        for name, live in live_tensors(self, part, state_dict).items():
            live = live.detach().cpu().contiguous()
            is_stored = name in stored and torch.equal(stored[name].to(live.dtype), live)
            tensors[name] = stored[name] if is_stored else live
        return tensors


def sample_embeddings(model: CLaRaPasses) -> tuple[torch.Tensor, float]:
    """Up to 16,383 token embeddings (tokens, hidden) float32, and the number by which the backbone scales them."""
    embeddings = model.get_input_embeddings()
    table = embeddings.weight.detach()
    return table[:: max(1, len(table) // 8192)].float(), float(getattr(embeddings, "scalar_embed_scale", 1.0))  # Gemma


def _start_like_tokens(model: CLaRaPasses) -> None:
    """Start the new rows of a prompt at the mean of the token embeddings with their spread, on their device."""
    table, (sample, scale) = model.get_input_embeddings().weight, sample_embeddings(model)
    generator = torch.Generator().manual_seed(0)  # leaves the user's random state alone
    starts = [model.start_embedding] if model.config.start_embedding else []
    for rows in (model.memory_embeddings, model.separator_embedding, *starts):
        noise = torch.randn(rows.shape, generator=generator).to(table.device)
        rows.data = ((sample.mean(0) + noise * sample.std(0)) * scale).to(table.dtype)
    if model.config.memory_layout == "windows":
        model.residual_scale.data = model.residual_scale.data.to(table.device, table.dtype)


def _read_config(files: CheckpointFiles, hub: dict) -> CLaRaConfig:
    model_type = files.json("config.json").get("model_type")
    if model_type != CLaRaConfig.model_type:
        raise ValueError(
            f"`model_type` in `config.json` of {files.source} must be {CLaRaConfig.model_type!r}, got "
            f"{model_type!r}. Give a CLaRa checkpoint, or start one on a language model with `from_backbone`."
        )
    return CLaRaConfig.from_pretrained(files.source, subfolder=files.subfolder, revision=files.revision, **hub)
