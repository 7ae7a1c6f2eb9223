"""Puts results into a model's card: `python -m recipes.evaluation.update_card FOLDER RUN... [--dataset ID]`.

FOLDER is a checkpoint with README.md, a RUN a folder of `recipes.evaluate` or a results.json. The section between two
marks is replaced, or added at the end; metadata of the same data and systems likewise. It measures nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_clara.cli.console import allow_any_console
from recipes.evaluation.report import read_results, update_card


def main(argv: Sequence[str] | None = None) -> int:
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("results", nargs="+", type=Path, help="results.json files, or folders of runs")
    parser.add_argument("--dataset", help="id of the benchmark on the Hub (default: the file's name)")
    arguments = parser.parse_args(argv)
    try:
        written = update_card(arguments.folder, read_results(arguments.results), arguments.dataset)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
