"""The files of one checkpoint, in a folder or on the Hub, and what their tensors must look like.

Stands below the checkpoint: finds, reads and places files, and turns what is missing or damaged into an error that
names the file and the remedy. It knows nothing of models.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ResolvedRevision
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

HUB_KEYWORDS = ("token", "cache_dir", "force_download", "local_files_only", "proxies")


class CheckpointFiles:
    """Finds the files of one checkpoint: a folder, or a Hub repo at one commit.

    Args:
        source: folder or Hub id.
        subfolder: folder inside it that holds the checkpoint.
        revision: branch, tag or commit; resolved once, so that all files are of one commit.
        hub_keywords: `HUB_KEYWORDS` for the download.
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
        """Local path of a file, downloaded where needed.

        Raises:
            FileNotFoundError: naming the file and the remedy.
        """
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
        """All tensors of a safetensors file, as stored.

        Raises:
            FileNotFoundError: missing.
            ValueError: truncated or no safetensors file.
        """
        path = self.path(name)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in sorted(file.keys())}  # noqa: SIM118 (no dict)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` of {self.source} must be a complete safetensors file: {error}. It is damaged or was copied "
                "in part: copy or download it again (`force_download=True`)."
            ) from error

    def json(self, name: str) -> dict:
        """A JSON file that holds an object.

        Raises:
            FileNotFoundError: missing.
            ValueError: not JSON, or no object.
        """
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


def complete_tokenizer_config(folder: Path) -> None:
    """Take out where the tokenizer was loaded from; repeat the chat template, so that no prompt hangs on one file."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
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
    for path in [path for pattern in patterns for path in target.glob(pattern)]:
        if path.relative_to(target) not in names:
            path.unlink()
    for name in sorted(names, key=lambda name: name == Path("config.json")):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.move(folder / name, target / name)
