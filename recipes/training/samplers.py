"""The order in which a trainer takes its rows.

Stands beside the trainers. It knows nothing of models.
"""

import random

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from recipes.training.arguments import CLaRaTrainingArguments


class EpochLengthSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order that follows from seed and epoch alone.

    transformers' own draws from the global random state, so a run that goes on within its second epoch would see other
    rows than one that was not interrupted, and a step of two processes other rows than a step of one.

    Args:
        rows_of_step: rows of an optimizer step, over all processes.
        lengths: of every row.
        seed: of the order.
    """

    def __init__(self, rows_of_step: int, lengths: list[int], seed: int):
        super().__init__(rows_of_step, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return super().__iter__()


def data_seed(args: CLaRaTrainingArguments) -> int:
    """The seed of the order and the choice of rows."""
    return args.seed if args.data_seed is None else args.data_seed


def in_steps(rows: list[dict], rows_of_step: int, generator: random.Random) -> list[dict]:
    """Sorted rows in an order for sequential sampling: neighbours make a step, steps come in any order.

    >>> in_steps([1, 2, 3, 4, 5], 2, random.Random(1))
    [3, 4, 1, 2]
    """
    rows = rows[: len(rows) // rows_of_step * rows_of_step] or rows  # a smaller step would shift all behind it
    steps = [rows[start : start + rows_of_step] for start in range(0, len(rows), rows_of_step)]
    generator.shuffle(steps)
    return [row for step in steps for row in step]
