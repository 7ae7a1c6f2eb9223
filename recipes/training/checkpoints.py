"""The folder of a run: whose it is, where it resumes, and how trained weights come back into a model.

run.json has all that enters the result of a run, with the hashes of its local data files.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRAG
from modeling_clara.checkpoint_clara import BACKBONE_FOLDER, load_weights
from modeling_clara.corpus.storage import foreign_files
from modeling_clara.files_clara import CheckpointFiles
from modeling_clara.storage_clara import file_sha256, write_json
from recipes.training.data import local_files

logger = logging.getLogger(__name__)

RUN_FILE, PARTIAL = "run.json", ".run.json.*"  # the second is what a kill leaves of the first
CACHE_FOLDER, MEMORY_FOLDER = "dataset_cache", "memories"  # made before the first step, worth nothing by themselves
STATE_FILE = "trainer_state.json"  # the Trainer writes it last: a checkpoint with it is complete
# What may differ between the start and the continuation of a run without changing what it learns.
FREE = {
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "hub_token", "push_to_hub", "log_level", "log_level_replica", "logging_dir",
    "logging_first_step", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "local_rank", "num_samples", "output_dir", "resume_from_checkpoint",
    "save_steps", "save_strategy", "eval_steps", "eval_strategy", "eval_on_start", "ddp_timeout", "do_train",
    "do_eval", "max_minutes",
}  # fmt: skip


def describe_run(model_arguments, data_arguments, training_arguments) -> dict:
    """What a run is, as JSON: every argument that enters its result, and path -> SHA-256 of its local data files."""
    training = {name: value for name, value in training_arguments.to_dict().items() if name not in FREE}
    data = dataclasses.asdict(data_arguments)
    if data_arguments.candidates == "given":  # then it says where the memories lie, not what they are
        data["corpus"] = None
    data["text_share"] = data_arguments.text_share or None  # a run from before the option goes on
    sources = [*data_arguments.datasets, *data_arguments.eval_datasets]
    files = {str(path): file_sha256(path) for source in sources for path in local_files(source)}
    description = {"model": dataclasses.asdict(model_arguments), "data": data, "training": training, "files": files}
    return json.loads(json.dumps(description, default=str))


def check_folder(folder: str | Path, description: dict) -> Path | None:
    """The last complete checkpoint of the run of this description in its output folder, None at the start.

    Nothing is changed but a half-written checkpoint removed.

    Raises:
        ValueError: the folder holds something else, the run is finished, or its data files have changed.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"`output_dir` must be a folder, got the file {folder}. Choose another name.")
    path = folder / RUN_FILE
    if not path.exists():
        if foreign := foreign_files(folder, (CACHE_FOLDER, MEMORY_FOLDER, PARTIAL))[:3]:
            raise ValueError(
                f"`output_dir` must be a new or empty folder, or one of this run, but {folder} holds {foreign}. "
                "Choose another name or empty it."
            )
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Choose another `output_dir`, or delete this one.") from error
    differing = sorted(
        f"{part}.{name}"
        for part in (set(before) | set(description)) - {"files"}
        for name in set(before.get(part, {})) | set(description.get(part, {}))
        if before.get(part, {}).get(name) != description.get(part, {}).get(name)
    )
    if differing:
        raise ValueError(
            f"`output_dir` {folder} holds another run: {differing} differ (see {path}). Choose another name, or give "
            "the same arguments to go on with that run."
        )
    now = description["files"]
    began = before.get("files", now)  # an earlier version did not record them
    for name in sorted({**began, **now}):
        if began.get(name) != now.get(name):
            was, found = (f"SHA-256 {files[name]}" if name in files else "no such file" for files in (began, now))
            raise ValueError(
                f"{name} must be what the run in {folder} began with, {was}, but is {found}. Put the old file back, "
                "or choose another `output_dir`."
            )
    if (folder / "config.json").exists():
        raise ValueError(f"the run in {folder} is finished. Choose another `output_dir`, or delete it to train again.")
    return last_checkpoint(folder)


def claim_folder(folder: str | Path, description: dict) -> None:
    """Record whose folder this is; to be called when everything before the first step has gone well."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / RUN_FILE, description)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to the end; what a kill left half written is removed."""
    complete = None
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.partition("-")[2])):
        try:
            json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("removing %s, which was not written to the end; training goes on before it.", path)
            shutil.rmtree(path)
        else:
            complete = path
    return complete


def is_at_its_end(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the last step: what is left of its run is evaluating and saving."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def load_trained(model: CLaRaForRAG, folder: str | Path) -> None:
    """Copy the weights of a checkpoint of the same run into the model, the backbone's too if it is included."""
    load_weights(model, CheckpointFiles(str(folder)))
    if (backbone := Path(folder) / BACKBONE_FOLDER).is_dir():
        stored = AutoModelForCausalLM.from_pretrained(backbone, dtype="auto").state_dict()
        with torch.no_grad():
            for name, tensor in model.backbone.state_dict().items():
                if "lora_" not in name:
                    tensor.copy_(stored[name.replace(".base_layer", "")])
