"""Compress more documents than one process should: jobs under datatrove, on this machine, on Slurm or on Ray.

    python recipes/compress.py INPUT -o CORPUS --model MODEL --tasks 8 --workers 2
    python recipes/compress.py INPUT -o CORPUS --model MODEL --tasks 256 --executor slurm --partition gpu --gres gpu:1

Every task is one job of `CompressedCorpus.build`: it takes every N-th document and writes its own shards. The last to
finish completes the corpus. A task that was killed, or a machine that was lost, goes on after its last whole shard
when the same command is given again; finished tasks are not repeated. INPUT and CORPUS must be seen by all machines.
Slurm and Ray have not been run by the tests; two local workers have.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from datatrove.pipeline.base import PipelineStep

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.cli import add_build_options, build_options
from modeling_clara.manifest_clara import MANIFEST_FILE


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
            CompressedCorpus.build(model, self.documents, self.output, job=(rank, world_size), **self.options)
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


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_options(parser)
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
    return parser


def main() -> int:
    """Parse, run or submit; exit status 0 where the corpus is complete or was submitted."""
    arguments = build_parser().parse_args()
    if arguments.tasks < 1:
        raise SystemExit(f"`--tasks` must be >= 1, got {arguments.tasks}.")
    threads = arguments.threads
    if not threads and arguments.executor == "local":
        threads = max(1, (os.cpu_count() or 1) // (arguments.workers or arguments.tasks))
    options = build_options(arguments)
    model = (arguments.model, arguments.backbone, arguments.dtype)
    step = CompressDocuments(arguments.input, arguments.output, *model, options, threads)
    build_executor(arguments, [step]).run()
    if arguments.executor == "slurm":
        print("submitted; the corpus is complete when its corpus.json is there")
        return 0
    if not (Path(arguments.output) / MANIFEST_FILE).exists():
        print(f"{arguments.output} is not complete: see the logs. Give the same command again.", file=sys.stderr)
        return 1
    print(CompressedCorpus.open(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
