"""clara-smollm2-135m from data to card, in legs of at most ten minutes on one GPU.

    python recipes/smollm2_legs.py list                                  what the legs are
    python recipes/smollm2_legs.py run prepare curriculum --source DATA  here, where there are data and a GPU
    python recipes/smollm2_legs.py run prepare curriculum --source DATA --cpu --scale 0.01 --minutes 60  a rehearsal

A machine with a GPU but without internet takes it in parts, and gives results back in parts:

    python recipes/smollm2_legs.py pack DATA parcels --there freeze.txt  here: parcels/1, parcels/2, ...
    python recipes/smollm2_legs.py receive parcels/1 --home HOME         there, once for each part
    python recipes/smollm2_legs.py run curriculum --home HOME --results OUT
    python recipes/smollm2_legs.py collect OUT                           here again

A leg that was stopped by its time or killed goes on with the same command. Needs nothing but Python until `receive`
has installed what it brought. It knows nothing of models or losses: every leg is commands of the other recipes.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from parcels import MIB, pack, unpack
from smollm2_call import GGUF, PAUSED, PUBLISHED, RUNS, SITE, SOURCE, STARTS, Call, Paused, is_finished
from smollm2_stages import LEGS, leg_name

RESULT_PART = 15 * MIB  # of what comes back
PAUSED_RUN = 66  # MiB of a checkpoint with its optimizer, before it is packed


def run(call: Call, legs: Sequence[str], results: Path | None, results_limit: float | None = None) -> int:
    """Run legs one after the other, as long as there is time and room for what they bring home; the exit status.

    Raises:
        RuntimeError, ValueError: a leg failed, or what it needs is not there. Results are packed before.
    """
    if results is not None and results.exists() and any(results.iterdir()):
        raise ValueError(f"--results must be a new or empty folder, got {results}. Choose another name.")
    call.home.mkdir(parents=True, exist_ok=True)
    status, begun = 0, []
    try:
        for leg in legs:
            size = sum(path.stat().st_size for path in results_of(call.home, begun)) / MIB
            if results is not None and results_limit and begun and size + PAUSED_RUN > results_limit:
                status = PAUSED
                print(f"leg {leg}: another call, {size:.0f} MiB of results are enough for this one", flush=True)
                break
            begun.append(leg)
            start = time.monotonic()
            print(f"leg {leg}, {call.minutes_left():.1f} minutes left", flush=True)
            try:
                LEGS[leg](call)
            except Paused:
                status = PAUSED
                print(f"leg {leg}: its time is over; the same command goes on", flush=True)
                break
            print(f"leg {leg}: done in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    finally:
        if results is not None:
            content = {str(path.relative_to(call.home)): path for path in results_of(call.home, begun)}
            if content:
                parts = pack(content, results, limit=RESULT_PART, own_folders=False)
                print(f"results: {len(content)} files in {len(parts)} parts in {results}", flush=True)
    return status


# --- what travels ----------------------------------------------------------------------------------------------------


def results_of(home: Path, legs: Sequence[str]) -> list[Path]:
    """Files that are worth taking home from these legs."""
    runs = home / RUNS
    found = []
    for leg in legs:
        if leg == "prepare":
            found += [runs / "gpu.json"]
        elif leg == "publish":
            found += sorted((home / PUBLISHED).rglob("*"))
        elif leg in ("evaluate", "corpus"):
            found += [path for path in (home / PUBLISHED).glob("*") if path.name == "README.md"]
            found += [p for p in sorted((runs / "evaluation").rglob("*")) if p.suffix in (".json", ".jsonl")]
        else:
            found += files_of_run(runs / leg)
            for variant in sorted((runs / "variants" / leg).glob("*")):
                found += [
                    p for p in files_of_run(variant) if p.name in ("run.json", "trainer_state.json", "samples.jsonl")
                ]
    found = [path for path in dict.fromkeys(found) if path.is_file() and not path.name.startswith(".")]
    return [path for path in found if "memories" not in path.relative_to(runs).parts]


def files_of_run(run: Path) -> list[Path]:
    """A finished run without its checkpoints, or the last checkpoint of one that goes on."""
    skipped = ("dataset_cache", "memories")
    if is_finished(run):
        skipped += tuple(path.name for path in run.glob("checkpoint-*"))
    else:
        complete = [p for p in run.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
        last = max(complete, key=lambda path: int(path.name.partition("-")[2]), default=None)
        skipped += tuple(path.name for path in run.glob("checkpoint-*") if path != last)
    return [path for path in sorted(run.rglob("*")) if path.relative_to(run).parts[0] not in skipped]


def pack_all(arguments: argparse.Namespace) -> None:
    """Data, backbone, wheels and finished runs as parcels."""
    from wheels import download_wheels, missing_packages, read_freeze

    if not arguments.source.is_dir():
        raise FileNotFoundError(f"the data must be a folder, got {arguments.source}. Correct the path.")
    content = {str(SOURCE / path.name): path for path in sorted(arguments.source.glob("*.jsonl.gz"))}
    if not content:
        raise FileNotFoundError(f"{arguments.source} must have files *.jsonl.gz, found none. Name another folder.")
    for name in arguments.runs:
        files = files_of_run(arguments.home / RUNS / name)
        if not files:
            raise ValueError(f"--runs must be of {arguments.home / RUNS}, found no {name!r}. Leave it out.")
        content |= {str(path.relative_to(arguments.home)): path for path in files if path.is_file()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.backbone:
            from modeling_clara.smollm2 import download_gguf

            path = download_gguf(folder)
            content[str(GGUF / path.name)] = path
        if arguments.there is not None:
            needed = missing_packages(read_freeze(arguments.there), python=arguments.python)
            for path in download_wheels(needed, folder / "wheels", python=arguments.python):
                content[f"wheels/{path.name}"] = path
        for path in pack(content, arguments.folder, limit=int(arguments.limit * MIB)):
            print(f"{path}: {path.stat().st_size / MIB:.1f} MiB")


def receive(places: Sequence[Path], home: Path) -> int:
    """Take parcels in; with the last one, install the wheels. The exit status."""
    missing = unpack(places, home)
    if missing:
        print(f"still missing: {', '.join(missing)}")
        return PAUSED
    wheels = sorted((home / "wheels").glob("*.whl"))
    if wheels:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--upgrade", "--target", str(home / SITE), *map(str, wheels)], check=True)
    print(f"everything is in {home}")
    return 0


# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the legs and what they do")
    running = commands.add_parser("run", help="run legs")
    running.add_argument("legs", nargs="+", metavar="LEG", help="names or numbers")
    running.add_argument("--home", type=Path, default=Path("."), help="folder with data/ and runs/ (default: here)")
    running.add_argument("--source", type=Path, help="folder of the data (default: what `receive` has brought)")
    running.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    running.add_argument("--results", type=Path, help="new folder for what is worth taking home, in parts of 15 MiB")
    running.add_argument("--results-limit", type=float, metavar="MIB", help="begin no leg that could bring more home")
    running.add_argument("--cpu", action="store_true", help="train in float32 on a CPU, in small steps")
    running.add_argument("--scale", type=float, default=1.0, help="share of the training rows that prepare writes")
    running.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the training; wins over its files"
    )
    running.add_argument("--limit", type=int, help="questions of every evaluation (default: all)")
    running.add_argument(
        "--from", dest="start", metavar="RUN", help="start from this run, or publish it, to skip legs"
    )
    running.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="short runs with one thing changed")
    packing = commands.add_parser("pack", help="write what a machine without internet needs")
    packing.add_argument("source", type=Path, help="folder of the data")
    packing.add_argument("folder", type=Path, help="of the parcels; new")
    packing.add_argument("--there", type=Path, metavar="FILE", help="`pip freeze` of that machine; wheels are packed")
    packing.add_argument("--python", default="3.12", help="of that machine (default: 3.12)")
    packing.add_argument("--limit", type=float, default=55, help="MiB of a part (default: 55)")
    packing.add_argument("--no-backbone", dest="backbone", action="store_false", help="it is there, or on the Hub")
    packing.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="runs to go on from, such as instruct")
    packing.add_argument("--home", type=Path, default=Path("."), help="folder with these runs (default: here)")
    receiving = commands.add_parser("receive", help="take parcels in")
    receiving.add_argument("places", nargs="+", type=Path, metavar="PARCEL")
    receiving.add_argument("--home", type=Path, default=Path("."))
    collecting = commands.add_parser("collect", help="take results in")
    collecting.add_argument("places", nargs="+", type=Path, metavar="RESULTS")
    collecting.add_argument("--home", type=Path, default=Path("."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do it; the exit status: 0 done, 1 an error that is printed, 3 not at its end yet."""
    start = time.monotonic()
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "list":
            for number, (name, leg) in enumerate(LEGS.items(), 1):
                print(f"{number:2}  {name:17} {leg.__doc__.splitlines()[0]}")
            return 0
        if arguments.command == "pack":
            pack_all(arguments)
            return 0
        if arguments.command in ("receive", "collect"):
            return receive(arguments.places, arguments.home)
        if not arguments.minutes > 0:
            raise ValueError(f"--minutes must be > 0, got {arguments.minutes}. Raise it.")
        legs = [leg_name(word) for word in arguments.legs]
        if any(word.startswith("max_minutes") for word in arguments.set):
            raise ValueError("--set must not have max_minutes, which follows from --minutes. Pass that.")
        if arguments.start and (len(legs) > 1 or legs[0] not in STARTS):
            raise ValueError(f"--from must be of one leg of {', '.join(STARTS)}, got {', '.join(legs)}. Leave it out.")
        call = Call(
            home=arguments.home.resolve(),
            deadline=start + 60 * arguments.minutes,
            on_cpu=arguments.cpu,
            scale=arguments.scale,
            limit=arguments.limit,
            overrides=arguments.set,
            source=arguments.source,
            variants=arguments.variants,
            start=arguments.start,
        )
        return run(call, legs, arguments.results, arguments.results_limit)
    except (OSError, ValueError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def _interrupted(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, _interrupted)
    sys.exit(main())
