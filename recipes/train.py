"""Train one stage of CLaRa: `python recipes/train.py --config recipes/configs/pretrain.yaml key=value ...`.

The same command goes on with a run that was killed, or paused by `max_minutes` (exit status 3, which accelerate makes
1). With several processes: `accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/train.py --config
...`. README.md, section Training, has the stages.
"""

import logging
import os
import sys

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends it otherwise
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers that make batches are processes already

import time_limit  # noqa: E402, F401, I001  (its clock starts here)
from arguments import parse_arguments  # noqa: E402
from checkpoints import check_folder, claim_folder, describe_run, is_at_its_end  # noqa: E402
from preparation import prepare_trainer, seed_everything  # noqa: E402

PAUSED = 3  # exit status


def main() -> int:
    model_arguments, data_arguments, training_arguments = parse_arguments()
    logging.basicConfig(format="%(message)s", level=training_arguments.get_process_log_level())
    output = training_arguments.output_dir
    description = describe_run(model_arguments, data_arguments, training_arguments)
    with training_arguments.main_process_first(desc="looking into the output folder"):
        checkpoint = check_folder(output, description)
    seed_everything(training_arguments)
    trainer = prepare_trainer(model_arguments, data_arguments, training_arguments)
    if training_arguments.should_save:
        claim_folder(output, description)
    if checkpoint and is_at_its_end(checkpoint):
        trainer.take_over(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_paused:
        trainer.accelerator.wait_for_everyone()
        logging.info("Paused with a checkpoint in %s: the same command goes on.", output)
        return PAUSED
    if training_arguments.eval_strategy != "no" and not trainer.was_just_evaluated:
        trainer.evaluate()
    trainer.save_state()
    trainer.save_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
