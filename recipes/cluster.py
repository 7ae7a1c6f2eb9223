"""A build of a corpus as tasks of datatrove: on this machine, on Slurm or on Ray.

Every task is one job of `CompressedCorpus.build`; `compress.py` has the command.
"""

import argparse

import torch
from datatrove.pipeline.base import PipelineStep

from modeling_clara import CLaRaForRAG, CompressedCorpus


class CompressDocuments(PipelineStep):
    """One task: a job of a build.

    Args:
        documents: path or id of the input.
        output: folder of the corpus.
        model, backbone: of the compressor.
        dtype: that it computes in; None is the default of `from_pretrained`.
        options: keywords of `CompressedCorpus.build`.
        threads: of each task on a CPU; 0 leaves torch's default.
    """

    name = "CLaRa compressor"
    type = "Model call"

    def __init__(
        self,
        documents: str,
        output: str,
        model: str,
        backbone: str | None,
        dtype: str | None,
        options: dict,
        threads: int,
    ):
        super().__init__()
        self.documents, self.output, self.model, self.backbone = documents, output, model, backbone
        self.dtype, self.options, self.threads = dtype, options, threads

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        """Do job `rank` of `world_size`."""
        if self.threads:
            torch.set_num_threads(self.threads)
        model = CLaRaForRAG.from_pretrained(self.model, backbone=self.backbone, dtype=self.dtype)
        if torch.cuda.is_available():
            model = model.to(f"cuda:{rank % torch.cuda.device_count()}")
        with self.track_time("job"):
            CompressedCorpus.build(
                model, self.documents, self.output, rank=rank, world_size=world_size, **self.options
            )
        return data


def build_executor(arguments: argparse.Namespace, pipeline: list):
    """datatrove's executor for this machine, Slurm or Ray."""
    logs = str(arguments.logs or f"{arguments.output.rstrip('/')}-logs")
    workers = arguments.workers or -1
    machine = {"cpus_per_task": arguments.cpus_per_task, "mem_per_cpu_gb": arguments.mem_per_cpu_gb}
    if arguments.executor == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        machine |= {"time": arguments.time, "partition": arguments.partition, "job_name": "clara-compress"}
        machine["sbatch_args"] = {"gres": arguments.gres} if arguments.gres else {}
        return SlurmPipelineExecutor(pipeline, tasks=arguments.tasks, workers=workers, logging_dir=logs, **machine)
    if arguments.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(pipeline, tasks=arguments.tasks, workers=workers, logging_dir=logs, **machine)
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(
        pipeline, tasks=arguments.tasks, workers=arguments.workers or arguments.tasks, logging_dir=logs
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
    parser.add_argument("--cpus-per-task", type=int, default=4, help="on Slurm and Ray (default: 4)")
    parser.add_argument("--mem-per-cpu-gb", type=int, default=4, help="on Slurm and Ray (default: 4)")
