"""Scores a model, or any other RAG system: `python recipes/evaluate.py --model MODEL --data FILE --output FOLDER`.

The parts are in `evaluation/`; `--help` lists the options. This file has the name of the library `evaluate`, and
Python looks beside a script first: whoever imports `evaluate` finds this file, and is handed the library.
"""

import importlib
import sys
from pathlib import Path


def import_library() -> None:
    """Put the library in the place of this file in `sys.modules`."""
    here, path = Path(__file__).resolve().parent, list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != here]
    sys.modules.pop("evaluate", None)
    try:
        importlib.import_module("evaluate")
    finally:
        sys.path[:] = path


import_library()

if __name__ == "__main__":
    from evaluation.cli import main

    sys.exit(main())
