"""Make training data of more documents than one process should: ranks under datatrove, here, on Slurm or on Ray.

    python -m recipes.synthesize INPUT -o DATA --model NAME --base-url URL --tasks 4
    python -m recipes.synthesize INPUT -o DATA --model NAME --base-url URL --tasks 64 --executor slurm --partition cpu

Every task is one rank of `clara synthesize`, with its share of the chunks and of the budget. The last to finish writes
the files. A task that was killed goes on when the same command is given again; finished tasks are not repeated. INPUT
and DATA must be seen by all machines. Slurm and Ray have not been run by the tests; two local workers have.
"""

import argparse
import sys
from pathlib import Path

from modeling_clara.cli.console import allow_any_console
from modeling_clara.cli.synthesize import add_run_options, describe_report
from modeling_clara.storage_clara import read_json
from modeling_clara.synthesis.output import Places
from recipes.cluster import SynthesizeData, add_cluster_options, build_executor


def main() -> int:
    """Parse, run or submit; exit status 0 if the data are complete or were submitted."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    add_cluster_options(parser)
    arguments = parser.parse_args()
    if arguments.tasks < 1 or not arguments.output:
        raise SystemExit("`--tasks` must be >= 1, and `-o` must name the output. Correct the command.")
    build_executor(arguments, SynthesizeData).run()
    if arguments.executor == "slurm":
        print("submitted; the data are complete when their synthesis.json is there")
        return 0
    places = Places(Path(arguments.output))
    if not places.report.exists():
        print(f"{arguments.output} is not complete. See the logs; the same command resumes.", file=sys.stderr)
        return 1
    print(describe_report({"path": arguments.output, **read_json(places.report)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
