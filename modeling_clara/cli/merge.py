"""`clara merge`: the generator of a checkpoint as a plain language model, which vLLM serves for `clara serve`."""

import argparse
import json
import shlex

from .models import load_model

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("merge", help="write the generator as a plain language model, for vLLM")
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("-o", "--output", required=True, help="folder that is written")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: the checkpoint's)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    import torch

    from ..generator import read_marker, served_name

    model = load_model(arguments.model, backbone=arguments.backbone, revision=arguments.revision)
    folder = model.merge_generator(arguments.output, dtype=getattr(torch, arguments.dtype))
    name = served_name(read_marker(folder)["generator"])
    if arguments.json:
        print(json.dumps({"path": arguments.output, "served_name": name, "dtype": arguments.dtype}))
    else:
        print(f"{arguments.output} holds the generator in {arguments.dtype}. Serve it:")
        print(f"vllm serve {shlex.quote(arguments.output)} --served-model-name {name} --enable-prompt-embeds")
    return 0
