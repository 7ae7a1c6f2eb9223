"""A callback that stops training with a checkpoint when its time is over.

All processes stop at the same step, and the run resumes from there as if nothing had been.
"""

import time

import torch
from transformers import TrainerCallback


class TimeLimit(TrainerCallback):
    """Saves and stops some minutes after the first step of this start."""

    def __init__(self, minutes: float, accelerator):
        self.minutes, self.accelerator = minutes, accelerator
        self.start, self.stops = 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.stops = time.monotonic(), False

    def on_step_end(self, args, state, control, **kwargs):
        if abs(state.epoch - round(state.epoch)) > 1e-6:  # else at the end of the epoch, which evaluates and saves
            self._stop_if_over(args, state, control)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stops:  # the loop was left within the epoch
            control.should_evaluate = control.should_save = control.should_log = False
        else:
            self._stop_if_over(args, state, control)
        return control

    def _stop_if_over(self, args, state, control) -> None:
        """Stop if the time of any process is over, unless this was the last step anyway."""
        is_over = torch.tensor(float(time.monotonic() - self.start > 60 * self.minutes), device=args.device)
        if self.accelerator.reduce(is_over, "sum") > 0 and state.global_step < state.max_steps:
            self.stops = True
            control.should_log = control.should_save = control.should_training_stop = True
