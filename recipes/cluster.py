"""Work on many documents as tasks of datatrove: on this machine, on Slurm or on Ray.

Every task is one rank of a build (`compress.py`) or of a synthesis (`synthesize.py`).
"""

import argparse

import torch
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.cli import build_options, weight_options
from modeling_clara.cli.models import show_progress
from modeling_clara.cli.synthesize import run_synthesis


class CompressDocuments(PipelineStep):
    """One task of a build, with the arguments of the command."""

    name = "CLaRa compressor"
    type = "Model call"

    def __init__(self, arguments: argparse.Namespace):
        super().__init__()
        self.arguments = arguments

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        """Do rank `rank` of `world_size`."""
        given = self.arguments
        if given.threads:
            torch.set_num_threads(given.threads)
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None
        weights = {"device_map": device, **weight_options(given.dtype)}
        model = CLaRaForRAG.from_pretrained(given.model, backbone=given.backbone, **weights)
        options = {"rank": rank, "world_size": world_size, **build_options(given)}
        with self.track_time("job"):
            CompressedCorpus.build(model, given.input, given.output, **options)
        return data


class SynthesizeData(PipelineStep):
    """One task of a synthesis, with the arguments of the command."""

    name = "CLaRa synthesis"
    type = "Model call"

    def __init__(self, arguments: argparse.Namespace):
        super().__init__()
        self.arguments = arguments

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        """Do rank `rank` of `world_size`."""
        show_progress(False)
        with self.track_time("job"):
            run_synthesis(argparse.Namespace(**vars(self.arguments) | {"rank": rank, "world_size": world_size}))
        return data


def build_executor(arguments: argparse.Namespace, step: type[PipelineStep] = CompressDocuments) -> PipelineExecutor:
    """datatrove's executor of a step, for this machine, Slurm or Ray."""
    logs = str(arguments.logs or f"{arguments.output.rstrip('/')}-logs")
    common = {"pipeline": [step(arguments)], "tasks": arguments.tasks, "logging_dir": logs}
    if arguments.executor == "local":
        return LocalPipelineExecutor(workers=arguments.workers or arguments.tasks, **common)
    common |= {"workers": arguments.workers or -1}
    common |= {"cpus_per_task": arguments.cpus_per_task, "mem_per_cpu_gb": arguments.mem_per_cpu_gb}
    if arguments.executor == "ray":
        # Ray hides the GPUs of a machine from who has not asked for them.
        return RayPipelineExecutor(gpus_per_task=arguments.gpus_per_task, **common)
    common["sbatch_args"] = {"gres": arguments.gres} if arguments.gres else {}
    return SlurmPipelineExecutor(
        time=arguments.time, partition=arguments.partition, job_name=f"clara-{step.__name__.lower()}", **common
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """The options of `build_executor`."""
    parser.add_argument("--tasks", type=int, required=True, help="jobs that the documents are dealt to")
    parser.add_argument("--workers", type=int, help="tasks at a time (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="of each task on a CPU (default: cores / workers)")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--logs", help="folder of datatrove's logs and markers (default: CORPUS-logs)")
    parser.add_argument("--partition", default="gpu", help="of Slurm (default: gpu)")
    parser.add_argument("--time", default="24:00:00", help="limit of a task on Slurm (default: 24:00:00)")
    parser.add_argument("--gres", help="of Slurm, such as gpu:1")
    parser.add_argument("--gpus-per-task", type=int, default=0, help="on Ray (default: 0)")
    parser.add_argument("--cpus-per-task", type=int, default=4, help="on Slurm and Ray (default: 4)")
    parser.add_argument("--mem-per-cpu-gb", type=int, default=4, help="on Slurm and Ray (default: 4)")
