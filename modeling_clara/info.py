"""`clara info`: what a checkpoint is, and whether every file of it is there and fits the others.

Stands beside the loader and uses its checks on a model without storage, so no backbone weights are read.
"""

import torch

from .checkpoint_clara import load_processor, load_weights
from .configuration_clara import ROLES, CLaRaConfig
from .digest_clara import compressor_fingerprint
from .files_clara import CheckpointFiles
from .modeling_clara import CLaRaForRAG


def describe_checkpoint(path: str, revision: str | None = None) -> dict:
    """Describe and check a checkpoint.

    Args:
        path: folder or Hub id.
        revision: branch, tag or commit of a Hub id.

    Returns:
        Its fields as far as they could be read, and `problem`: None, or what is wrong with which file.
    """
    report = {"path": path, "problem": None}
    try:
        files = CheckpointFiles(path, revision=revision)
        files.json("config.json")
        config = CLaRaConfig.from_pretrained(files.source, revision=files.revision)
        text_config = config.text_config
        report |= {
            "format_version": config.format_version,
            "backbone": config.backbone_name_or_path,
            "backbone_revision": config.backbone_revision,
            "backbone_included": config.backbone_included,
            "architecture": f"{text_config.model_type}, {text_config.num_hidden_layers} x {text_config.hidden_size}",
            "memory_sizes": config.memory_sizes,
            "retrieval_memory_size": config.retrieval_memory_size,
            "document_max_length": config.document_max_length,
            "retrieval_top_k": config.retrieval_top_k,
            "lora_rank": {role: config.lora[role]["rank"] for role in ROLES},
        }
        with torch.device("meta"):
            model = CLaRaForRAG(config)
        stored = load_weights(model, files, copy=False)
        report["adapter_parameters"] = {role: sum(t.numel() for t in stored[role].values()) for role in ROLES}
        report["bytes_per_memory"] = {k: 4 * k * text_config.hidden_size for k in config.memory_sizes}
        processor = load_processor(files, config)
        report["fingerprint"] = compressor_fingerprint({**stored["compressor"], **stored["rows"]}, processor, config)
        if config.backbone_included:
            files.path("backbone/config.json")
    except (OSError, ValueError, KeyError) as error:
        report["problem"] = str(error) or type(error).__name__
    return report
