"""Scores a model, or any other RAG system: `python -m recipes.evaluate --model MODEL --data FILE --output FOLDER`.

The parts are in `evaluation/`; `--help` lists the options. It runs as a module, from the root of the repository: run
as a script it would stand in the way of the library `evaluate`, because Python looks beside a script first.
"""

import sys

if not __package__:
    MESSAGE = (
        f"{__file__} has the name of the library `evaluate` and must not be found in its place. Run it from the root "
        "of the repository as `python -m recipes.evaluate`, and leave recipes/ out of sys.path."
    )
    if __name__ == "__main__":
        sys.exit(f"error: {MESSAGE}")
    raise ImportError(MESSAGE)

if __name__ == "__main__":
    from recipes.evaluation.cli import main

    sys.exit(main())
