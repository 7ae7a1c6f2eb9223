"""Train one stage of CLaRa: `python -m recipes.train --config recipes/configs/stages/pretrain.yaml key=value ...`.

The same command resumes a run that was killed, or stopped by `max_minutes`. With several processes: `accelerate launch
--config_file recipes/configs/accelerate/ddp.yaml -m recipes.train --config ...`.
"""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends it otherwise
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers that make batches are processes already

from modeling_clara.cli.console import allow_any_console  # noqa: E402
from recipes.training.arguments import parse_arguments  # noqa: E402
from recipes.training.checkpoints import check_folder, claim_folder, describe_run, is_at_its_end  # noqa: E402
from recipes.training.preparation import prepare_trainer  # noqa: E402
from recipes.training.trainer import CLaRaTrainer  # noqa: E402


def prepare() -> tuple[CLaRaTrainer, Path | None]:
    """The trainer of the command line, and the checkpoint that it resumes from; what is wrong is an error here."""
    model_arguments, data_arguments, training_arguments = parse_arguments()
    logging.basicConfig(format="%(message)s", level=training_arguments.get_process_log_level())
    description = describe_run(model_arguments, data_arguments, training_arguments)
    with training_arguments.main_process_first(desc="looking into the output folder"):
        checkpoint = check_folder(training_arguments.output_dir, description)
    trainer = prepare_trainer(model_arguments, data_arguments, training_arguments)
    if training_arguments.should_save:
        claim_folder(training_arguments.output_dir, description)
    return trainer, checkpoint


def train(trainer: CLaRaTrainer, checkpoint: Path | None) -> None:
    """All steps that are left, or those until `max_minutes` are over; a whole run is evaluated and saved."""
    if checkpoint and is_at_its_end(checkpoint):
        trainer.take_over(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, output = trainer.state, trainer.args.output_dir
    if state.global_step < state.max_steps:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            print(f"Stopped at step {state.global_step} of {state.max_steps}: the same command resumes {output}.")
        return
    if trainer.args.eval_strategy != "no" and not trainer.was_just_evaluated:
        trainer.evaluate()
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    allow_any_console()
    try:
        prepared = prepare()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    train(*prepared)
