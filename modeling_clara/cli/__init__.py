"""The `clara` command, each of its commands in a file of its own.

Exit status 0 if all is well, 1 if something is wrong, 2 for a wrong call, 130 after Ctrl-C. Help and wrong calls are
answered at once: the files of commands import torch, transformers and what needs them inside their functions.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ..version import __version__
from . import add, ask, compress, convert, delete, demo, info, merge, serve, sync, synthesize, ui, update
from .compress import add_build_options, build_options
from .console import allow_any_console
from .errors import describe_error
from .models import DTYPES, silence_libraries, weight_options

__all__ = ["DTYPES", "add_build_options", "build_options", "build_parser", "main", "weight_options"]

COMMANDS = (demo, compress, ask, ui, serve, sync, add, update, delete, convert, info, merge, synthesize)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="clara", description="Documents compressed into memory tokens, and asked.")
    parser.add_argument("--version", action="version", version=f"clara {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command_parser = command.add_parser(commands)
        command_parser.add_argument("--json", action="store_true", help="print JSON")
        command_parser.set_defaults(parser=command_parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; a wrong call prints the usage and exits with status 2."""
    parser = build_parser()
    arguments, left = parser.parse_known_args(argv)
    # Older argparse leaves a question after an option over, because `nargs="*"` was content with none before it.
    is_question = arguments.command == "ask" and not arguments.question
    if is_question and not any(word.startswith("-") for word in left):
        arguments.question, left = left, []
    if left:
        arguments.parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    allow_any_console()
    arguments = parse(argv)
    try:
        silence_libraries()
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"clara {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered has no place to go
        return 1
    except Exception as error:
        message = describe_error(error, arguments.parser)
    if arguments.json:
        print(json.dumps({"problem": message}))
    print(f"clara {arguments.command}: {message}", file=sys.stderr)
    return 1
