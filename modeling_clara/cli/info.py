"""`clara info`: what a checkpoint or a corpus is, and whether its files are there, fit, and are those of its card.

Of a metric, a leaderboard or data, whose card lists the files, that alone is checked.

Uses the checks of the loaders. A checkpoint is checked on a model without storage, so no backbone weights are read.
"""

import argparse
import ast
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .models import describe_weights
from .terminal import Screen, one_line

if TYPE_CHECKING:
    from ..files_clara import CheckpointFiles
    from ..manifest_clara import Manifest

COLUMN = 24  # in which values begin


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser(
        "info", help="describe a checkpoint or a corpus, and check its files or those of a Space"
    )
    parser.add_argument("path", help="folder or Hub id of a checkpoint, a corpus, or of files that a card lists")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--verify", action="store_true", help="read every byte of a corpus")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    kind, folder = find_folder(arguments.path, arguments.revision)
    corpus = folder if kind == "corpus" else None
    if corpus is not None:
        report = describe_corpus(corpus, arguments.verify)
        problems = report["problems"]
    elif kind == "files":
        report, problems = {"path": arguments.path, "problem": None}, []
    else:
        report = describe_checkpoint(arguments.path, arguments.revision)
        problems = [report["problem"]] if report["problem"] else []
    report["checksums"], report["differs"] = describe_checksums(folder or arguments.path, arguments.revision)
    problems = [*problems, *report["differs"]]
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 1 if problems else 0
    shown = report if corpus is None or "codec" not in report else summarize_corpus(report)
    screen = Screen(hanging=COLUMN)
    for name, value in shown.items():
        if name not in ("problem", "problems", "differs"):
            screen(f"{name:<{COLUMN}}{one_line(readable(name, value))}\n")
    for problem in problems:
        screen(f"{'problem':<{COLUMN}}{one_line(problem)}\n")
    if not problems:
        print("every byte is right" if corpus and arguments.verify else "all files are there and fit")
    return 1 if problems else 0


# --- what is shown ---------------------------------------------------------------------------------------------------


def readable(name: str, value) -> str:
    """A value of a report as people write it; of a fingerprint as much as errors show."""
    if name == "fingerprint":
        return value[:12]
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {readable(key, entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(readable(name, entry) for entry in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def readable_bytes(n_bytes: int) -> str:
    """
    >>> [readable_bytes(n) for n in (0, 999, 1000, 1_250_000, 45_000_000_000)]
    ['0 bytes', '999 bytes', '1.0 kB', '1.2 MB', '45.0 GB']
    """
    if n_bytes < 1000:
        return f"{n_bytes} bytes"
    power = min(3, (len(str(n_bytes)) - 1) // 3)
    return f"{n_bytes / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"


def summarize_corpus(report: Mapping) -> dict:
    """The report of a corpus for people: related numbers in one line each, with their units and what they come to."""
    rest = dict(report)
    documents = f"{rest.pop('documents'):,}"
    deleted, rejected = rest.pop("deleted_documents"), rest.pop("rejected_rows")
    documents += f", and {deleted:,} that are marked as deleted" if deleted else ""
    summary = {"path": rest.pop("path"), "documents": documents}
    summary |= {"rejected rows": f"{rejected:,}, see rejected.jsonl"} if rejected else {}
    summary["chunks"] = n_chunks = rest.pop("spans")
    memory, codec = rest.pop("memory"), rest.pop("codec")
    n_vectors, hidden_size = map(int, memory.split(" x "))
    summary["memories"] = f"{n_vectors:,} vectors of {hidden_size:,} numbers a chunk, as {codec}"
    if "tokens" in rest:
        tokens, text_bytes, memory_bytes = (rest.pop(name) for name in ("tokens", "text_bytes", "memory_bytes"))
        summary["text"] = f"{tokens:,} tokens, {readable_bytes(text_bytes)}"
        summary["memories"] = f"{readable_bytes(memory_bytes)}, {summary.pop('memories')}"
        if tokens and text_bytes:
            share = f"{memory_bytes / text_bytes:.1f} bytes for a byte of text"
            summary["memories to text"] = f"a vector for {tokens / (n_chunks * n_vectors):.1f} tokens, {share}"
    size, n_files = readable_bytes(rest.pop("bytes")), rest.pop("shards")
    summary["files"] = f"{n_files:,} shard{'s' * (n_files != 1)}, {size}, {rest.pop('bytes_per_span'):,} bytes a chunk"
    return summary | {name: value for name, value in rest.items() if value not in (None, {}, [])}


# --- what is read ----------------------------------------------------------------------------------------------------


def describe_checkpoint(path: str, revision: str | None = None) -> dict:
    """The fields of a checkpoint as far as they can be read, and `problem`: None, or what is wrong with which file."""
    import torch

    from .. import ROLES, CLaRaConfig, CLaRaForRAG
    from ..backbone_clara import compressor_fingerprint
    from ..checkpoint_clara import load_processor
    from ..files_clara import CheckpointFiles, load_weights

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
            "overlap_weight": config.overlap_weight,
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


def describe_checksums(path: str | Path, revision: str | None = None) -> tuple[str, list[str]]:
    """How much of a copy was held against the list in its card, and a sentence for each file that differs.

    Of a checkpoint on the Hub the files in the cache are compared, with the card of their commit.
    """
    from ..checksums import compare_checksums, read_checksums
    from ..files_clara import CheckpointFiles

    try:
        files = CheckpointFiles(path, revision=revision)
        card = files.path("README.md")
    except (OSError, ValueError):
        return "none: there is no card", []
    text = card.read_text(encoding="utf-8", errors="replace")
    folder = card.parent if not files.is_local else Path(path)
    if not (listed := read_checksums(text)):
        return "none: the card has no list", []
    there = sum((folder / name).is_file() for name in listed)
    hint = ", among them the list of shards, which --verify reads" if "corpus.json" in listed else ""
    return f"{there} of {len(listed)} listed files compared{hint}", compare_checksums(
        text, folder, complete=files.is_local
    )


def check_code(files: "CheckpointFiles") -> None:
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


def find_folder(path: str, revision: str | None = None) -> tuple[str, Path | None]:
    """What a folder or a Hub id is, looked up as a model, a dataset and a Space in turn, and where its files are.

    Returns:
        "checkpoint" and None; "corpus", or "files" that a card lists, and their folder, downloaded if need be.
    """
    from ..files_clara import CheckpointFiles
    from ..manifest_clara import MANIFEST_FILE
    from ..storage_clara import download_corpus

    folder = Path(path)
    if folder.is_dir():
        if (folder / MANIFEST_FILE).exists() or (folder / "build").is_dir():
            return "corpus", folder
        return ("files", folder) if has_list_alone(folder) else ("checkpoint", None)
    try:
        CheckpointFiles(path, revision=revision).json("config.json")
        return "checkpoint", None
    except (OSError, ValueError):
        pass
    try:
        corpus = download_corpus(path, revision, None, None, False)
    except FileNotFoundError:
        corpus = None
    if corpus is None or not (corpus / MANIFEST_FILE).exists():
        for repo_type in ("dataset", "space"):
            if (files := download_listed(path, repo_type, revision)) is not None:
                return "files", files
    return ("checkpoint", None) if corpus is None else ("corpus", corpus)


def has_list_alone(folder: Path) -> bool:
    """Whether the card of a folder lists files, and none of a checkpoint or a corpus."""
    from ..checksums import MANIFEST, read_checksums
    from ..files_clara import PARTS

    card = folder / "README.md"
    listed = read_checksums(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    return bool(listed) and not {PARTS["rows"], MANIFEST} & set(listed)


def download_listed(repo_id: str, repo_type: str, revision: str | None) -> Path | None:
    """The files of a repo whose card lists them; None if there is none."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError

    options = {"repo_type": repo_type, "revision": revision}
    try:
        folder = Path(hf_hub_download(repo_id, "README.md", **options)).parent
        return Path(snapshot_download(repo_id, **options)) if has_list_alone(folder) else None
    except (OSError, ValueError, HTTPError):
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
    with contextlib.suppress(OSError, ValueError, ImportError):  # a broken shard is a problem below
        report |= measure_text(folder, manifest)
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


def measure_text(folder: Path, manifest: "Manifest") -> dict[str, int]:
    """What the documents of a corpus take, without deleted ones.

    Returns:
        `tokens` and `text_bytes` (UTF-8) of the chunks, which overlap; `memory_bytes` of their memories. Chunks that
        brought a memory with them have no tokens. An OSError or ValueError if a shard cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from ..codecs_clara import Codec
    from ..manifest_clara import live_mask, read_batches

    tokens = text_bytes = 0
    for shard in manifest.shards:
        mask, first = live_mask(shard), 0
        for batch in read_batches(folder, shard, ["n_tokens", "text"]):
            live = batch.filter(pa.array(mask[first : first + len(batch)]))
            first += len(batch)
            tokens += pc.sum(live["n_tokens"]).as_py() or 0
            text_bytes += pc.sum(pc.binary_length(live["text"])).as_py() or 0
    row_bytes = Codec(manifest.codec, manifest.memory_size, manifest.hidden_size).row_bytes
    return {"tokens": tokens, "text_bytes": text_bytes, "memory_bytes": manifest.n_spans * row_bytes}
