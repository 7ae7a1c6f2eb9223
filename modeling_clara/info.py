"""`clara info`: what a checkpoint or a corpus is, and whether every file of it is there and fits the others.

Stands beside the loaders and uses their checks; for a checkpoint on a model without storage, so that no backbone
weights are read.
"""

from pathlib import Path

import torch

from .checkpoint_clara import load_processor, load_weights
from .configuration_clara import ROLES, CLaRaConfig
from .corpus_clara import CompressedCorpus, download_corpus
from .digest_clara import compressor_fingerprint
from .files_clara import CheckpointFiles
from .manifest_clara import MANIFEST_FILE, Manifest
from .modeling_clara import CLaRaForRAG
from .publish_clara import verify_corpus


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
            "min_score": config.min_score,
            "memory_layout": config.memory_layout,
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


def find_corpus(path: str, revision: str | None = None) -> Path | None:
    """The folder of a corpus: a local one, or the downloaded files of a dataset on the Hub; None for anything else.

    A Hub id that is a model is not looked up as a dataset.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder if (folder / MANIFEST_FILE).exists() or (folder / "build").is_dir() else None
    try:
        CheckpointFiles(path, revision=revision).json("config.json")
        return None
    except (OSError, ValueError):
        try:
            return download_corpus(path, revision, None, None, False)
        except FileNotFoundError:
            return None


def describe_corpus(folder: Path, verify: bool = False) -> dict:
    """Describe and check a corpus.

    Args:
        folder: of its files.
        verify: also read every byte.

    Returns:
        Its fields as far as they could be read, and `problems`: what is wrong with which file.
    """
    report = {"path": str(folder), "problems": []}
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError) as error:
        report["problems"] = [str(error)]
        return report
    n_bytes = sum(shard.n_bytes for shard in manifest.shards)
    n_stored = sum(shard.n_spans for shard in manifest.shards)
    report |= {
        "format_version": manifest.format_version,
        "documents": manifest.n_documents,
        "spans": manifest.n_spans,
        "deleted_documents": sum(shard.n_deleted for shard in manifest.shards),
        "rejected_rows": manifest.n_rejected,
        "memory": f"{manifest.memory_size} x {manifest.hidden_size}",
        "memory_sizes": manifest.memory_sizes,
        "retrieval_memory_size": manifest.retrieval_memory_size,
        "codec": manifest.codec,
        "shards": len(manifest.shards),
        "bytes": n_bytes,
        "bytes_per_span": round(n_bytes / n_stored) if n_stored else 0,
        "metadata": manifest.metadata,
        "source": manifest.source,
        "compressor": manifest.compressor.get("name_or_path"),
        "compressor_revision": manifest.compressor.get("revision"),
        "fingerprint": manifest.fingerprint,
        "measured": manifest.measured,
    }
    if verify:
        report["problems"] = verify_corpus(folder, None)
        if not report["problems"]:
            report["problems"] = CompressedCorpus.open(folder).verify()
        return report
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.n_bytes:
            size = path.stat().st_size if path.is_file() else "none"
            report["problems"].append(
                f"the shard {path} must have {shard.n_bytes} bytes, got {size}. Copy or download it again."
            )
    return report
