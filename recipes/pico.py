"""clara-pico from nothing to the shipped folder: `python recipes/pico.py --output runs/pico`.

Runs the scripts of the other files one after the other, each in a process of its own; a step that is finished is left
out, a step that was killed goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parent
STAGES = ("pretrain", "instruct", "joint")


def run(script: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, str(RECIPES / script), *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pico"))
    parser.add_argument("--publish", type=Path, help="also write clara-pico/ and clara-pico-corpus/ here")
    arguments = parser.parse_args()
    folder = arguments.output
    if not (folder / "data" / "test_wordings_joint.jsonl").exists():
        run("pico_facts.py", "--output", folder / "data")
    if not (folder / "backbone" / "tokenizer_config.json").exists():
        run("pico_backbone.py", "--data", folder / "data", "--output", folder / "backbone")
    for number, stage in enumerate(STAGES):
        if (folder / stage / "config.json").exists():
            continue
        start = f"checkpoint={folder / STAGES[number - 1]}" if number else f"backbone={folder / 'backbone'}"
        data = [
            f"datasets=[{{path: {folder / 'data' / f'{stage}.jsonl'}}}]",
            f"eval_datasets=[{{path: {folder / 'data' / f'test_{stage}.jsonl'}}}]",
        ]
        config = RECIPES / "configs" / "pico" / f"{stage}.yaml"
        run("train.py", "--config", config, start, f"output_dir={folder / stage}", *data)
    if arguments.publish:
        run("pico_publish.py", folder / "joint", "--output", arguments.publish)
    else:
        run("pico_evaluate.py", folder / "joint")


if __name__ == "__main__":
    main()
