"""Arguments of a training run: dataclasses of the model, the data and the run, filled by YAML files and `key=value`.

Later YAML files win over earlier ones, `key=value` wins over files, and keys under a stage's name
(`joint: {learning_rate: ...}`) count in that stage only.
"""

import argparse
import contextlib
import dataclasses
import types
import typing
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl.scripts.utils import DatasetConfig

from modeling_clara.configuration_clara import ROLES
from recipes.training.stages import STAGES

# Keys of fresh adapters: a checkpoint has its own values.
FRESH = (
    "memory_sizes", "memory_layout", "memory_normalization", "lora_rank", "lora_alpha", "lora_dropout",
    "document_max_length", "processor_kwargs",
)  # fmt: skip
# Fields of `CLaRaConfig`; None keeps the checkpoint's, or the default.
CONFIG_FIELDS = (
    "retrieval_top_k", "retrieval_temperature", "retrieval_memory_size", "alignment_weight", "contrastive_weight",
)  # fmt: skip


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}. Correct it in the recipe.")


@dataclass
class ModelArguments:
    """The model a run starts from: fresh adapters on `backbone`, or the `checkpoint` of an earlier stage.

    A checkpoint keeps its own values of the keys in `FRESH`: other values in a YAML file are ignored with a log line,
    other values on the command line are an error.
    """

    backbone: str | None = None  # Hub id or folder; with a checkpoint where its own is now, another one is an error
    checkpoint: str | None = None  # Hub id or folder of a CLaRa checkpoint
    revision: str | None = None  # of the checkpoint, without one of the backbone
    dtype: str | None = None  # of the frozen backbone, for example bfloat16; what trains is float32 in any case
    attn_implementation: str | None = None  # as in transformers
    memory_sizes: list[int] | None = None
    memory_layout: str | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    document_max_length: int | None = None
    processor_kwargs: dict | None = None
    memory_normalization: bool | None = None  # by 128 documents of the data, see `CLaRaForRAG.normalize_memories`
    retrieval_top_k: int | None = None
    retrieval_temperature: float | None = None
    retrieval_memory_size: int | None = None
    alignment_weight: float | None = None
    contrastive_weight: float | None = None
    train_backbone: bool = False  # all weights train, for a backbone from scratch; checkpoints then include it
    # "compressor" copies the compressor into the reasoner (paper: + 4 F1), "random" gives it fresh weights, "keep"
    # leaves it; default: "compressor" in a stage that selects if the reasoner is untrained, else "keep"
    reasoner_init: str | None = None
    from_files: typing.ClassVar[frozenset[str]] = frozenset()  # keys that no `key=value` gave

    def __post_init__(self):
        if self.backbone is None and self.checkpoint is None:
            raise ValueError(
                "`backbone` or `checkpoint` must be given, got neither. Name the language model to put fresh adapters "
                "on, or the checkpoint of an earlier stage."
            )
        if self.reasoner_init is not None:
            check_choice("reasoner_init", self.reasoner_init, ("compressor", "random", "keep"))


@dataclass
class DataArguments:
    """What is read.

    A source is a mapping with the fields of TRL's `DatasetConfig`: `path` (a .jsonl, .jsonl.gz or .parquet file, a
    folder, or a Hub id), `name`, `split`, `data_files`, and `fraction`, its share of the mixture (all or none; no
    source is oversampled).
    """

    datasets: list[dict] = field(default_factory=list)
    eval_datasets: list[dict] = field(default_factory=list)
    targets_per_document: int = 1  # questions and paraphrases that share one compression, in pretrain and instruct
    # share of the records of pretrain and instruct whose prompts read one of the documents as text instead of from
    # memory, as `answer(expand=1)` does, in training and evaluation
    text_share: float = 0.0
    long_documents: str = "split"  # reads all chunks of a long document; "first_span" cuts it (the paper)
    num_candidates: int = 20  # documents that the selection chooses from; longer lists are cut after it, gold kept
    # "given", the row's own documents, or "corpus", the live best ones among all documents of `corpus`, or of the data
    candidates: str = "given"
    add_gold: bool = False  # with "corpus": the row's gold documents join the candidates ("oracle")
    # with "given": the documents of the other rows of a pass are candidates of the contrastive term as well (rows of
    # `per_device_train_batch_size`, of one process)
    in_batch_negatives: bool = False
    corpus: str | None = None  # folder of memories that this compressor made; others are compressed before training
    compress_online: bool = False  # run the compressor in every step, for comparison

    def __post_init__(self):
        if not self.datasets:
            raise ValueError("`datasets` must name at least one source, got none. Add `datasets: [{path: ...}]`.")
        for name in ("datasets", "eval_datasets"):
            setattr(self, name, [read_source(entry, f"{name}[{i}]") for i, entry in enumerate(getattr(self, name))])
        for name in ("targets_per_document", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}. Correct it in the recipe.")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"`text_share` must be between 0 and 1, got {self.text_share}. Correct it in the recipe.")
        check_choice("long_documents", self.long_documents, ("split", "first_span"))
        check_choice("candidates", self.candidates, ("given", "corpus"))
        if self.in_batch_negatives and self.candidates == "corpus":
            raise ValueError(
                "`in_batch_negatives` must be false with `candidates: corpus`, which searches all documents anyway. "
                "Raise `num_candidates` instead."
            )
        if self.compress_online and self.candidates == "corpus":
            raise ValueError(
                "`compress_online` must be false with `candidates: corpus`, which searches stored memories."
            )


@dataclass
class CLaRaTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, and what CLaRa adds."""

    stage: str = "pretrain"  # a name of `stages.STAGES`
    trainable_roles: list[str] | None = None  # default: the stage's
    num_samples: int = 4  # rows whose answers are generated and written to samples.jsonl at every evaluation
    max_minutes: float | None = None  # of training until a stop with a checkpoint; the same command resumes the run
    # from which a step draws k, some of the model's; one that stands twice is drawn twice as often; default: all
    train_memory_sizes: list[int] | None = None

    def __post_init__(self):
        check_choice("stage", self.stage, list(STAGES))
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"`max_minutes` must be > 0, got {self.max_minutes}. Raise it or leave it out.")
        if self.max_minutes is not None and getattr(self.save_strategy, "value", self.save_strategy) == "best":
            raise ValueError(
                "`save_strategy` must be steps, epoch or no with `max_minutes`, got best, which would not save the "
                "step that a run stops at. Change it, or leave `max_minutes` out."
            )
        for role in self.trainable_roles or ():
            check_choice("trainable_roles", role, ROLES)
        self.remove_unused_columns = False  # the collators read columns that `forward` does not take
        super().__post_init__()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that train."""
        return tuple(self.trainable_roles or STAGES[self.stage].roles)

    @property
    def order_seed(self) -> int:
        """Of the order and the choice of rows."""
        return self.seed if self.data_seed is None else self.data_seed


ARGUMENTS = (ModelArguments, DataArguments, CLaRaTrainingArguments)


def read_source(entry, name: str) -> DatasetConfig:
    """A `DatasetConfig` of one entry of `datasets`."""
    known = {field.name for field in dataclasses.fields(DatasetConfig)} - {"columns"}  # the formats name their fields
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= known:
        raise ValueError(f"`{name}` must be a mapping with `path` and fields among {sorted(known)}, got {entry!r}.")
    return DatasetConfig(**entry)


def read_recipe(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict:
    """Merge YAML files and `key=value` overrides into one flat dict of the known keys, types checked.

    Raises:
        FileNotFoundError, ValueError: naming file, key, rule and remedy.
    """
    given = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(
                f"an override must look like key=value, got {override!r}. Write for example max_steps=10."
            )
        given[key.lstrip("-")] = yaml.safe_load(value)
    files = [_read_yaml(path) for path in paths]
    stage = ChainMap(given, *reversed(files)).get("stage")
    merged = {}
    for values in files:
        sections = {name: check_types(values.pop(name)) for name in STAGES if name in values}
        merged |= values | sections.get(stage, {})
    return check_types(merged | given)


def _read_yaml(path: str | Path) -> dict:
    """A YAML mapping whose stage sections are mappings as well."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` must be YAML: {error}. Correct it.") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` must hold a YAML mapping, got {type(values).__name__}. Write `key: value` lines.")
    for name in [name for name in STAGES if name in values]:
        values[name] = {} if values[name] is None else values[name]
        if not isinstance(values[name], dict):
            raise ValueError(
                f"`{name}` in `{path}` must be a mapping of keys for that stage, got {values[name]!r}. Indent "
                "its keys."
            )
    return values


def check_types(values: dict) -> dict:
    """Return the values in the types that the dataclasses ask for, or raise a ValueError that names the key."""
    hints = {}
    for dataclass_type in ARGUMENTS:
        types_of = typing.get_type_hints(dataclass_type)
        hints |= {item.name: types_of[item.name] for item in dataclasses.fields(dataclass_type) if item.init}
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"the recipe must not have the unknown keys {unknown}. Correct or remove them.")
    return {key: _typed(key, value, hints[key]) for key, value in values.items()}


def _typed(key: str, value, hint):
    """A value of YAML in one of the types of a hint, or a ValueError."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = {
        typing.get_origin(option) or option: option for option in (typing.get_args(hint) if is_union else [hint])
    }
    if not {bool, int, float, str, list, dict} & set(options):
        return value  # an enum: TrainingArguments checks it
    if type(value) is list and list in options:
        (kind,) = typing.get_args(options[list]) or (object,)
        return [_typed(f"{key}[{index}]", entry, kind) for index, entry in enumerate(value)]
    if type(value) in options:
        return value
    if value is False and str in options:  # YAML 1.1 reads a bare no as false: `eval_strategy: no`
        return "no"
    if type(value) in (int, str) and float in options:  # YAML 1.1 reads 1e-4 as a text
        with contextlib.suppress(ValueError):
            return float(value)
    wanted = " or ".join(kind.__name__ for kind in options if kind is not type(None) and hasattr(kind, "__name__"))
    raise ValueError(f"`{key}` must be of type {wanted}, got {value!r}. Correct it in the recipe.")


def parse_arguments(
    command_line: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, CLaRaTrainingArguments]:
    """`--config FILE [FILE ...] key=value ...` as the three dataclasses."""
    parser = argparse.ArgumentParser(description="Train a stage of CLaRa; see docs/training.md.")
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="YAML files, later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the files; values are YAML")
    known, rest = parser.parse_known_args(command_line)
    files = [entry for entry in known.config if "=" not in entry]
    overrides = [entry for entry in known.config if "=" in entry] + known.overrides + rest
    recipe = read_recipe(files, overrides)
    model, data, training = HfArgumentParser(ARGUMENTS).parse_dict(recipe)
    model.from_files = frozenset(recipe) - {entry.lstrip("-").partition("=")[0] for entry in overrides}
    return model, data, training
