"""Draws figures for model cards: `python -m recipes.figures rate RUN... --output FILE`, or `states MODEL ...`.

`evaluation/figures.py` draws; `--help` of each command lists its options.
"""

import sys

if __name__ == "__main__":
    from recipes.evaluation.figures import main

    sys.exit(main())
