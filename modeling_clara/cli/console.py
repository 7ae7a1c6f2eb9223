"""Printing in consoles that are not UTF-8, for the commands of the package and of the recipes.

Stderr needs nothing: Python escapes there what the console lacks.
"""

import sys


def allow_any_console() -> None:
    """Print "?" for a letter that the console lacks instead of raising an error, and read so too."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have put something else there
            stream.reconfigure(errors="replace")
