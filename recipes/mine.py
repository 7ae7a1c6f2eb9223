"""Mine hard negatives with a trained reasoner: `python -m recipes.mine rows.jsonl --model CHECKPOINT ...`."""

import sys

from recipes.training.mine_negatives import main

if __name__ == "__main__":
    sys.exit(main())
