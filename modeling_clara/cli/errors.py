"""What a command prints of an error: one line, in which arguments of our Python calls are options of the command.

It knows no command: what a call may name is read from the command's parser.
"""

import argparse
import re

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, KeyError, ImportError)
# Libraries that read files and networks; their own exception classes are not all OSErrors.
READERS = (
    "aiohttp",
    "botocore",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "pyarrow",
    "pymilvus",
    "safetensors",
    "subprocess",
    "zipfile",
)
# Arguments of Python calls that commands take under another name, which is used if the command has one of these.
OTHER_NAMES = {"documents": ("input",), "questions": ("question",), "path": ("output",), "ask_all": ("all",)}


def describe_error(error: Exception, parser: argparse.ArgumentParser) -> str:
    """The error in one line; it is raised again if it is a fault of ours, which needs its traceback."""
    if not isinstance(error, USER_ERRORS) and not type(error).__module__.startswith(READERS):
        raise error
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # str() would quote it
    return name_options(" ".join(text.split()) or type(error).__name__, parser)


def name_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message in which the arguments that a command has are its options.

    "`top_k` must" becomes "`--top-k` must", "`backbone=PATH`" "`--backbone PATH`", "expand=0" "--expand 0", and
    "`hybrid=True`" "`--hybrid`". An argument without dashes keeps the name that the help shows.
    """
    shown = {}  # how the help writes each argument, and whether it takes a value
    for action in parser._actions:  # argparse has no public way to list them
        option = max(action.option_strings, key=len, default=action.metavar or action.dest)
        shown[action.dest] = (option, action.nargs != 0)
    for name, others in OTHER_NAMES.items():
        known = [other for other in others if other in shown]
        if known and name not in shown:
            shown[name] = shown[known[0]]
    names = "|".join(sorted(map(re.escape, shown), key=len, reverse=True))

    def with_value(match: re.Match) -> str:
        option, takes_value = shown[match["name"]]
        value = match["value"].strip("'\"")
        return f"{match['open']}{option}{match['close']}{f' {value}' if takes_value else ''}"

    # Neither the name in `config.top_k` nor in `top_k_max` or in a path is an argument.
    value = r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s`,;]*[^\s`,;.)])"
    assigned = rf"(?<![\w./\\-])(?P<open>`?)\b(?P<name>{names})(?P<close>`?)={value}"
    message = re.sub(assigned, with_value, message)
    return re.sub(rf"`({names})(?=[`\[])", lambda match: f"`{shown[match[1]][0]}", message)
