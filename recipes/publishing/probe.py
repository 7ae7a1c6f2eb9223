"""A clean process, which cannot import this project, loads what was built and says what it finds.

It runs as a script. What a model and a corpus give is compared with the source, bit for bit.
"""

import hashlib
import importlib.abc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

DOCUMENTS = [
    {"id": "oslo", "title": "Oslo", "text": "Oslo is the capital of Norway. It had 709,037 inhabitants in 2022."},
    {"id": "skagen", "title": "", "text": "The lighthouse of Skagen was built in 1858. It is 46 metres high."},
]
QUESTIONS = ["How many people live in Oslo?", "When was the lighthouse built?"]
PACKAGES = ("modeling_clara", "recipes")


class HiddenPackage(importlib.abc.MetaPathFinder):
    """Makes this project look like one that is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def describe_model(model) -> dict:
    """What a model makes of two documents and two questions.

    Returns:
        `fingerprint`; `memory` and `query_memory`, SHA-256 of their float32 bytes; `answers`, from memory and with the
        best document read as text.
    """
    documents = [model.processor.split_document(document)[0] for document in DOCUMENTS]  # of the first chunk
    options = {"documents": documents, "top_k": 1, "min_score": -1.0, "max_new_tokens": 6}
    answers = [*model.answer(QUESTIONS, **options), *model.answer(QUESTIONS, **options, expand=1)]
    query_memory = model.encode_queries(QUESTIONS, memory_size=model.config.memory_sizes[0])
    return {
        "fingerprint": model.fingerprint,
        "memory": _sha256(model.compress(documents)),
        "query_memory": _sha256(query_memory),
        "answers": [answer.text for answer in answers],
    }


def describe_corpus(model, corpus) -> dict:
    """What a model reads in a corpus.

    Returns:
        `documents`, their number; `memory`, SHA-256 of the float32 memories of the first ten; `found`, ids that two
        questions find; `answers` to them.
    """
    answers = model.answer(QUESTIONS, corpus=corpus, top_k=2, min_score=-1.0, max_new_tokens=16)
    first = corpus.get(list(islice(corpus.document_ids(), 10)))
    return {
        "documents": len(corpus),
        "memory": [_sha256(document["memory"]) for document in first],
        "found": [[source.document_id for source in answer.sources] for answer in answers],
        "answers": [answer.text for answer in answers],
    }


def clean_model(folder: str, corpus: str | None = None) -> dict:
    """`describe_model` of a built folder; a corpus of it must open as well."""
    model = _load_model(folder)
    if corpus:
        model.load_corpus(corpus)
    return describe_model(model)


def clean_corpus(folder: str, compressor: str, revision: str) -> dict:
    """`describe_corpus` of a built folder, read by its compressor from the Hub."""
    model = _load_model(compressor, revision=revision)
    return describe_corpus(model, model.load_corpus(folder))


def clean_metric(folder: str, module: str) -> dict:
    """What a metric gives for the inputs of its cases.json: a list of scores."""
    import evaluate

    metric = evaluate.load(str(Path(folder, module)))
    cases = json.loads(Path(folder, "cases.json").read_text(encoding="utf-8"))
    return {"scores": [metric.compute(**case["inputs"]) for case in cases]}


def clean_data(folder: str) -> dict:
    """Rows and columns of every split that `datasets` reads, by configuration."""
    import datasets

    splits = {}
    for config in datasets.get_dataset_config_names(folder):
        with tempfile.TemporaryDirectory() as cache:
            loaded = datasets.load_dataset(folder, config, cache_dir=cache)
        splits |= {f"{config}/{name}": [split.num_rows, split.column_names] for name, split in loaded.items()}
    if empty := [name for name, (n_rows, _) in splits.items() if not n_rows]:
        raise ValueError(f"every split must have rows, but {empty[0]} has no rows. Remove it, or write them.")
    return {"splits": splits}


def _load_model(source: str, **options):
    from transformers import AutoModel

    return AutoModel.from_pretrained(source, trust_remote_code=True, **options)


def _sha256(tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


CLEAN = {"model": clean_model, "corpus": clean_corpus, "metric": clean_metric, "data": clean_data}


def probe(kind: str, folder: Path, **arguments: str) -> dict:
    """What a built folder gives in a process that cannot import this project.

    Args:
        kind: of `CLEAN`.
        folder: as built.
        arguments: further ones of the function for the kind.

    Raises:
        ValueError: the folder does not load there; of data the file and its line are named, if they are the reason.
    """
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    if kind == "data":
        from recipes.publishing.facts import data_files, read_table

        for path in data_files(folder):  # the library reads some wrong files, and names the line of none
            read_table(path, path.relative_to(folder).as_posix())
    task = {"kind": kind, "threads": threads, "arguments": {"folder": str(folder.resolve()), **arguments}}
    with tempfile.TemporaryDirectory(prefix="clara-probe-") as place:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), json.dumps(task)]
        environment = {**os.environ, "HF_MODULES_CACHE": place, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"what is built must load in a process without this project, but there: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def main(task: Mapping) -> None:
    """The clean process."""
    sys.meta_path.insert(0, HiddenPackage())
    if task["threads"]:  # the order of sums, and so the bits, depend on it
        import torch

        torch.set_num_threads(task["threads"])
    try:
        found = CLEAN[task["kind"]](**task["arguments"])
    except Exception as error:
        place = task["arguments"]["folder"] + os.sep  # gone when this is read
        sys.exit(_reason(error).replace(place, ""))
    print(json.dumps(found))


def _reason(error: BaseException) -> str:
    """An error as one line, with the first one behind it, which a library often hides behind a general one."""
    root = error
    while behind := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = behind
    texts = [" ".join(f"{type(one).__name__}: {one}".split()) for one in dict.fromkeys((error, root))]
    return ", because of ".join(text[:500] for text in texts)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
