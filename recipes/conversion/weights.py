"""Weights of a reference checkpoint and of its backbone, read tensor by tensor: no file is held in memory whole.

Files of `torch.save` are opened with `weights_only=True`; what they hold is checked before anything is written.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

ROWS = 2048  # of a table that are compared at once
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_torch_file(path: Path) -> dict:
    """The dict of a file of `torch.save`, its tensors mapped from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of `torch.save`, holds code, or is compressed (its tensors cannot be larger than it).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} must be in {path.parent}, found none. Copy the whole folder.")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise ValueError("it is compressed")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch advises to load it all the same
            reason = "it holds more than tensors"
        raise ValueError(
            f"{path} must be a file of tensors as `torch.save` writes it: {reason}. It was not loaded: get it "
            "again from where you trust."
        ) from error
    return content


def check_tensor(tensor, shape: tuple, name: str) -> torch.Tensor:
    """Return a finite floating-point tensor of this shape, or raise a ValueError that names it."""
    is_tensor = isinstance(tensor, torch.Tensor)
    if not is_tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        found = f"{tensor.dtype}, {tensor.layout}" if is_tensor else type(tensor).__name__
        raise ValueError(f"`{name}` must be a dense tensor of floats, got {found}. Get the file again.")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape {tuple(shape)}, got {tuple(tensor.shape)}. Rank (`lora_r`), memory tokens "
            "or backbone differ from config.json: use the files of one checkpoint and the backbone it was trained on."
        )
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity. Get the file again.")
    return tensor


class BackboneFiles:
    """The safetensors files of a backbone, in a folder or on the Hub, read by the name of a tensor.

    A FileNotFoundError if there is no config.json or no safetensors file.
    """

    def __init__(self, source: str):
        self.folder, self.commit = Path(source), None
        is_local = self.folder.is_dir()
        self.source = str(self.folder.resolve()) if is_local else source
        if not is_local:
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
            self.folder = Path(snapshot_download(source, allow_patterns=patterns))
            self.commit = self.folder.name
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self.places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} must be JSON with a weight_map: {error!r}. Get it again.") from error
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            self.places = {key: name for name in names for key in self._open(name).keys()}  # noqa: SIM118
        if not (self.folder / "config.json").is_file() or not self.places:
            raise FileNotFoundError(
                f"the backbone {source} must have config.json and safetensors files, found none. Save it with "
                "`save_pretrained`, or name another folder with `--backbone`."
            )

    def _open(self, name: str):
        try:
            return safe_open(self.folder / name, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder / name} must be a whole safetensors file: {error}. Get it again."
            ) from error

    def check(self, backbone: nn.Module) -> None:
        """Raise a ValueError unless the files have the tensors of a backbone, by name and shape; none is read."""
        tied = set(backbone.all_tied_weights_keys) if backbone.config.tie_word_embeddings else set()
        for name, parameter in backbone.named_parameters():
            if name in self.places:
                found = tuple(self._open(self.places[name]).get_slice(name).get_shape())
                if found == tuple(parameter.shape):
                    continue
            elif name in tied:
                continue
            else:
                found = "none"
            raise ValueError(
                f"the backbone {self.source} must have {name} of shape {tuple(parameter.shape)}, found {found}. "
                "Get it again, or name another one with `--backbone`."
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the dtype of the file; a ValueError if there is none of this name."""
        if name not in self.places:
            raise ValueError(f"the backbone {self.source} must have the tensor {name}, found none. Get it again.")
        return self._open(self.places[name]).get_tensor(name)

    def rows(self, name: str, n_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of the first `n_rows` of a table, `ROWS` at a time."""
        if name not in self.places:
            raise ValueError(f"the backbone {self.source} must have the tensor {name}, found none. Get it again.")
        table = self._open(self.places[name]).get_slice(name)
        for start in range(0, n_rows, ROWS):
            yield start, table[start : min(start + ROWS, n_rows)]


def check_rows(stored: torch.Tensor, backbone: BackboneFiles, name: str, n_tokens: int, where: str) -> None:
    """Raise a ValueError unless the first rows of a stored table (rows, hidden) are those of the backbone.

    They are compared in the dtype of the stored table, to which the reference cast its backbone.
    """
    for start, rows in backbone.rows(name, n_tokens):
        equal = (stored[start : start + len(rows)] == rows.to(stored.dtype)).all(-1)
        if not equal.all():
            row = start + int((~equal).nonzero()[0])
            raise ValueError(
                f"the rows of the backbone's {n_tokens} tokens in `{name}` of {where} must be those of "
                f"{backbone.source}, but row {row} differs. Name the backbone that the checkpoint was trained on with "
                "`--backbone`; a checkpoint that has trained these rows cannot be converted."
            )
