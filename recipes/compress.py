"""Compress more documents than one process should: jobs under datatrove, on this machine, on Slurm or on Ray.

    python -m recipes.compress INPUT -o CORPUS --model MODEL --tasks 8 --workers 2
    python -m recipes.compress INPUT -o CORPUS --model MODEL --tasks 256 --executor slurm --partition gpu --gres gpu:1
    RAY_ADDRESS=HOST:6379 python -m recipes.compress INPUT -o CORPUS --model MODEL --tasks 64 --executor ray

Every task is one rank of `CompressedCorpus.build`: it takes every N-th document and writes its own shards. The last to
finish completes the corpus. A task that was killed, or a machine that was lost, goes on after its last whole shard
when the same command is given again; finished tasks are not repeated. Ray does that by itself for a machine that was
lost. INPUT and CORPUS must be seen by all machines. Slurm has not been run by the tests; Ray on one machine has.
"""

import argparse
import os
import sys

from modeling_clara import CompressedCorpus
from modeling_clara.cli import add_build_options
from modeling_clara.cli.console import allow_any_console
from recipes.cluster import add_cluster_options, build_executor


def main() -> int:
    """Parse, run or submit; exit status 0 if the corpus is complete or was submitted."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_options(parser)
    add_cluster_options(parser)
    arguments = parser.parse_args()
    if arguments.tasks < 1:
        raise SystemExit(f"`--tasks` must be >= 1, got {arguments.tasks}.")
    if not arguments.threads and arguments.executor == "local":
        arguments.threads = max(1, (os.cpu_count() or 1) // (arguments.workers or arguments.tasks))
    build_executor(arguments).run()
    if arguments.executor == "slurm":
        print("submitted; the corpus is complete when its corpus.json is there")
        return 0
    try:
        print(CompressedCorpus.open(arguments.output))
    except (OSError, ValueError) as error:
        print(f"{arguments.output} is not complete: {error} See the logs; the same command resumes.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
