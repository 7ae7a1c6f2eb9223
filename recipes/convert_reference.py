"""Converts a checkpoint of the reference (apple/CLaRa-7B-*): `python -m recipes.convert_reference SRC DST`.

SRC is the folder of one checkpoint, such as CLaRa-7B-E2E/compression-16. The backbone is read from its files, never
loaded: converting 7 B parameters takes less than 2 GB of memory. Code of the checkpoint is never run.
"""

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).parents[1])

from modeling_clara.cli.console import allow_any_console


def main() -> int:
    """Convert and say what was converted; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the reference's checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone that it was trained on")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON file instead of the prompts in its code")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from recipes.conversion.convert import ADAPTERS, convert

    try:
        conversion = convert(arguments.source, arguments.target, arguments.backbone, arguments.prompts)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"convert_reference: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_reference: interrupted, nothing is left. Run the same command again.", file=sys.stderr)
        return 130
    config = conversion.model.config
    print(f"{arguments.target}: {config.max_memory_size} memory vectors of {config.text_config.hidden_size} values")
    for role, name in ADAPTERS.items():
        copied = f"a copy of {ADAPTERS['compressor']}: the checkpoint has no {name}"
        print(f"  {role:<10}  {copied if role in conversion.missing else name}")
    for note in conversion.notes:
        print(f"  {note}")
    sizes = conversion.footprint().items()
    print("  weights with the backbone: " + ", ".join(f"{size:,.1f} GB at {name}" for name, size in sizes))
    print(f"try it: clara ask DOCUMENTS --model {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
