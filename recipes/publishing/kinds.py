"""The kinds of what is published: a record each of how it is built, checked, loaded and kept on the Hub.

A new kind is a new record here, with its functions in `assemble.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from . import assemble
from .assemble import Assembled
from .checks import DATA_SUFFIXES, EVERYWHERE, OF_MODELS, Check
from .files import find

Options = Mapping[str, str | None]


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: as the command has it; `what` in words.
        repo_type: of the Hub.
        inputs: files of the source that a build reads.
        assemble: writes a new folder from a source and options; says what a clean process must find.
        checks: of the built folder.
        marks: what is built has one of these files, and so has a repo of this kind.
        is_pinned: whether the card names the commit of its files.
        is_named: whether the repo must have the name of a Python file, by which `evaluate` finds the metric.
    """

    name: str
    what: str
    repo_type: str
    inputs: Callable[[Path], list[Path]]
    assemble: Callable[[Path, Path, Options], Assembled]
    checks: tuple[Check, ...] = EVERYWHERE
    marks: tuple[str, ...] = ()
    is_pinned: bool = True
    is_named: bool = False

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether files of these names can be of this kind."""
        return any(fnmatch(name, mark) for name in names for mark in self.marks)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "model",
            "a CLaRa checkpoint",
            "model",
            assemble.model_inputs,
            assemble.assemble_model,
            OF_MODELS,
            marks=("clara.safetensors",),
        ),
        Kind(
            "corpus",
            "a compressed corpus",
            "dataset",
            assemble.corpus_inputs,
            assemble.assemble_corpus,
            marks=("corpus.json",),
        ),
        Kind(
            "metric",
            "a metric",
            "space",
            find,
            assemble.assemble_metric,
            marks=("cases.json",),
            is_pinned=False,
            is_named=True,
        ),
        Kind(
            "leaderboard",
            "the leaderboard",
            "space",
            find,
            assemble.assemble_space,
            marks=("leaderboard_rules.py",),
            is_pinned=False,
        ),
        Kind(
            "page",
            "the page",
            "space",
            find,
            assemble.assemble_space,
            marks=("modeling_clara/service/page.py",),
            is_pinned=False,
        ),
        Kind(
            "data",
            "data",
            "dataset",
            assemble.data_inputs,
            assemble.assemble_data,
            marks=tuple(f"*{s}" for s in DATA_SUFFIXES),
        ),
    )
}


def kind_of(names: Iterable[str], repo_type: str) -> Kind | None:
    """The kind that a repo with these files has."""
    names = list(names)
    return next((kind for kind in KINDS.values() if kind.repo_type == repo_type and kind.is_in(names)), None)
