"""The `clara` command, each of its commands in a file of its own.

Exit status 0 if all is well, 1 if something is wrong, 2 for a wrong call, 130 after Ctrl-C.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from . import add, ask, compress, convert, delete, demo, info, sync, update
from .compress import DTYPES, add_build_options, build_options
from .console import allow_any_console
from .models import silence_libraries

__all__ = ["DTYPES", "add_build_options", "build_options", "build_parser", "main"]

COMMANDS = (demo, compress, ask, sync, add, update, delete, convert, info)
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, KeyError, ImportError)
# Libraries that read files and networks; their own exception classes are not all OSErrors.
READERS = ("httpx", "huggingface_hub", "pyarrow", "pymilvus", "safetensors", "subprocess", "zipfile")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="clara", description="Documents compressed into memory tokens, and asked.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands).add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    allow_any_console()
    arguments = build_parser().parse_args(argv)
    silence_libraries()
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"clara {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, USER_ERRORS) and not type(error).__module__.startswith(READERS):
            raise  # a fault of ours, which needs its traceback
        message = " ".join(str(error).split()) or type(error).__name__
        message = message.replace("`backbone=PATH`", "`--backbone PATH`")
    if arguments.json:
        print(json.dumps({"problem": message}))
    print(f"clara {arguments.command}: {message}", file=sys.stderr)
    return 1
