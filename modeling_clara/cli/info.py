"""`clara info`: what a checkpoint or a corpus is, and whether every file of it is there and fits the others.

Uses the checks of the loaders. A checkpoint is checked on a model without storage, so no backbone weights are read.
"""

import argparse
import ast
import json
from pathlib import Path

import torch

from .. import ROLES, CLaRaConfig, CLaRaForRAG
from ..backbone_clara import compressor_fingerprint
from ..checkpoint_clara import load_processor
from ..files_clara import CheckpointFiles, load_weights
from ..storage_clara import download_corpus
from .models import describe_weights


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("info", help="describe a checkpoint or a corpus and check its files")
    parser.add_argument("path", help="folder or Hub id of a checkpoint or a corpus")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--verify", action="store_true", help="read every byte of a corpus")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    corpus = find_corpus(arguments.path, arguments.revision)
    if corpus is not None:
        report = describe_corpus(corpus, arguments.verify)
        problems = report["problems"]
    else:
        report = describe_checkpoint(arguments.path, arguments.revision)
        problems = [report["problem"]] if report["problem"] else []
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 1 if problems else 0
    for name, value in report.items():
        if name not in ("problem", "problems"):
            print(f"{name:<24}{value}")
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("every byte is right" if corpus and arguments.verify else "all files are there and fit")
    return 1 if problems else 0


def describe_checkpoint(path: str, revision: str | None = None) -> dict:
    """The fields of a checkpoint as far as they can be read, and `problem`: None, or what is wrong with which file."""
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
            "backbone_weights": describe_weights(path, revision)[0],
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
        check_code(files)
    except (OSError, ValueError, KeyError) as error:
        report["problem"] = str(error) or type(error).__name__
    return report


def check_code(files: CheckpointFiles) -> None:
    """Check the code that a checkpoint carries; one without code is loaded by the installed package.

    Raises:
        FileNotFoundError, ValueError: naming the files that are missing, empty or no Python.
    """
    if files.is_local:
        names = {path.name for path in Path(files.source).glob("*_clara.py")}
    else:
        names = {f"{place.partition('.')[0]}.py" for place in files.json("config.json").get("auto_map", {}).values()}
    waiting, broken = sorted(names), []
    for name in waiting:  # which grows
        try:
            tree = ast.parse(files.path(name).read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):  # such as the text of a symbolic link, in a copy that has none
            tree = ast.Module([], [])
        if not tree.body:
            broken.append(name)
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1)
        found = {f"{node.module}.py" for node in imports if node.module} - names
        names |= found
        waiting += sorted(found)
    if broken:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in broken[:3])} ({len(broken)} files) of {files.source} must hold "
            "Python code, but are empty or damaged, as in a copy without symbolic links: copy or save the checkpoint "
            "again, or remove its *_clara.py to load it with the installed package only."
        )


def find_corpus(path: str, revision: str | None = None) -> Path | None:
    """The folder of a corpus: a local one, or the downloaded files of a dataset on the Hub; None for anything else.

    A Hub id that is a model is not looked up as a dataset.
    """
    from ..manifest_clara import MANIFEST_FILE

    folder = Path(path)
    if folder.is_dir():
        return folder if (folder / MANIFEST_FILE).exists() or (folder / "build").is_dir() else None
    try:
        CheckpointFiles(path, revision=revision).json("config.json")
    except (OSError, ValueError):
        try:
            return download_corpus(path, revision, None, None, False)
        except FileNotFoundError:
            pass
    return None


def describe_corpus(folder: Path, verify: bool = False) -> dict:
    """The fields of a corpus as far as they can be read, and `problems`: what is wrong with which file.

    With `verify` every byte is read.
    """
    from .. import CompressedCorpus
    from ..corpus.verify import verify_files
    from ..manifest_clara import Manifest

    report = {"path": str(folder), "problems": []}
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError) as error:
        return report | {"problems": [str(error)]}
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
        return report | {"problems": verify_files(folder) or CompressedCorpus.open(folder).verify()}
    for shard in manifest.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else "none"
        if size != shard.n_bytes:
            report["problems"].append(
                f"the shard {path} must have {shard.n_bytes} bytes, got {size}. Copy or download it again."
            )
    return report
