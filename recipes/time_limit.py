"""A callback that ends a training run with a checkpoint when its time is over.

Stands beside `trainer.py`. It knows nothing of models or losses.
"""

import time

START = time.monotonic()  # of this process: train.py imports this file before all that takes seconds

import logging  # noqa: E402

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

logger = logging.getLogger(__name__)


class TimeLimit(TrainerCallback):
    """Stops on all processes at the same step, where the run then goes on as if nothing had been.

    Args:
        minutes: since this process started.
        accelerator: of the run.
    """

    def __init__(self, minutes: float, accelerator):
        self.minutes, self.accelerator, self.pauses = minutes, accelerator, False

    def on_step_end(self, args, state, control, **kwargs):
        # an epoch's last step is evaluated and saved at the epoch's end, and then paused
        if abs(state.epoch - round(state.epoch)) > 1e-6 and self._is_over(args, state):
            self._pause(state, control)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.pauses:  # the epoch is not at its end: the loop was left
            control.should_evaluate = control.should_save = control.should_log = False
        elif self._is_over(args, state):
            self._pause(state, control)
        return control

    def _is_over(self, args, state) -> bool:
        is_over = torch.tensor(float(time.monotonic() - START > 60 * self.minutes), device=args.device)
        return bool(self.accelerator.reduce(is_over, "sum") > 0) and state.global_step < state.max_steps

    def _pause(self, state, control) -> None:
        logger.info("%.1f minutes are over at step %d of %d.", self.minutes, state.global_step, state.max_steps)
        self.pauses = True
        control.should_log = control.should_save = control.should_training_stop = True
