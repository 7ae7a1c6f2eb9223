"""Reads all results of a results repository, a folder or a dataset on the Hub, into valid ones and refused ones.

Whatever stands in a file, it becomes an entry or a refusal with its reasons.
"""

import glob
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from leaderboard_revisions import MISSING, UNCHECKED, RevisionChecker
from leaderboard_rules import check_data_files, check_place
from validation import MAX_BYTES, REPO_ID, check_results, parse_results, parse_time

DATA_FILES = "data_files.json"
FOLDER = "results"
# options that change answers
DECISIVE = (
    "weights",
    "text_reader",
    "expand",
    "expand_below",
    "min_score",
    "num_candidates",
    "dense",
    "limit",
    "dtype",
)
RUN_FILE, RUN_RESULT = "run.json", "results.json"  # of a folder that recipes.evaluate made


@dataclass
class Entry:
    """A valid results.json: its path in the results repository and its content."""

    path: str
    results: dict
    model_state: str = UNCHECKED  # of leaderboard_revisions; also for one without a model on the Hub

    @property
    def model(self) -> tuple[str | None, str | None]:
        return self.results["model"]["repo"], self.results["model"]["revision"]


@dataclass
class Refused:
    """A file that is not shown, and why."""

    path: str
    reasons: list[str]


@dataclass
class Loaded:
    """All that a source holds at one time."""

    place: str  # such as `folder /data/results` or `dataset owner/name at commit 0123abc`
    entries: list[Entry] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    data_files: dict | None = None


class Source:
    """A folder, or a dataset repo of the Hub (`owner/name`) if there is no such folder.

    Both have `data_files.json` and `results/`; a folder may also be any with runs of recipes.evaluate. With
    `check_revisions` the models are looked up on the Hub at their commits.
    """

    def __init__(self, place: str | Path, check_revisions: bool = True) -> None:
        self.place = str(place)
        self.is_repo = not Path(self.place).is_dir()
        if self.is_repo and REPO_ID.fullmatch(self.place) is None:
            rule = "`results` must be a folder that exists or a dataset repo as owner/name"
            raise ValueError(f"{rule}, got {self.place!r}. Create the folder or name the repo.")
        self.checker = RevisionChecker() if check_revisions else None
        self.valid_files: dict[tuple[str, int, int], dict] = {}  # real path, time in ns, bytes -> a checked content
        self.last = Loaded(f"dataset {self.place}")  # shown on if the Hub cannot be reached
        self.lock = threading.Lock()

    def load(self) -> Loaded:
        """Reads everything anew, without parsing unchanged files again; what was there before if the Hub is away."""
        with self.lock:
            folder, loaded = Path(self.place), Loaded(f"folder {self.place}")
            try:
                if self.is_repo:
                    folder, loaded = self._download()
            except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:  # told without address or token
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else type(error).__name__
                told = f"The dataset {self.place} cannot be read now ({status}). Check its name and the network"
                return replace(self.last, warnings=[f"{told}, then refresh.", *self.last.warnings])
            loaded.data_files = self._read_data_files(folder, loaded)
            self._keep_newest(self._read_files(folder, loaded), loaded)
            self._check_models(loaded)
            loaded.refused.sort(key=lambda refused: refused.path)
            self.last = loaded
            return loaded

    def _download(self) -> tuple[Path, Loaded]:
        """A snapshot of the newest commit, without files that are too large to be results."""
        commit = HfApi().dataset_info(self.place, timeout=30).sha
        loaded = Loaded(f"dataset {self.place} at commit {commit}")
        tree = HfApi().list_repo_tree(self.place, repo_type="dataset", revision=commit, recursive=True)
        large = {item.path: item.size for item in tree if isinstance(item, RepoFile) and item.size > MAX_BYTES}
        for path, size in large.items():
            if path.startswith(f"{FOLDER}/") and path.endswith(".json"):
                loaded.refused.append(Refused(path, [_too_large(size)]))
        folder = snapshot_download(
            self.place,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[DATA_FILES, f"{FOLDER}/*.json"],
            ignore_patterns=[glob.escape(path) for path in large],
            max_workers=16,
        )
        return Path(folder), loaded

    def _read_data_files(self, folder: Path, loaded: Loaded) -> dict | None:
        """The data that count, or None and a warning where nobody says which."""
        path = folder / DATA_FILES
        if not path.is_file():
            loaded.warnings.append(
                f"There is no {DATA_FILES} in {self.place}: neither the data nor the models of these results are "
                "checked, and a part of a data file looks like the whole."
            )
            return None
        try:
            content = parse_results(path.read_bytes())
            problems = check_data_files(content)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            told = " ".join(problems)
            loaded.warnings.append(f"{DATA_FILES} cannot be used, so that data are not checked: {told}")
            return None
        return content

    def _read_files(self, folder: Path, loaded: Loaded) -> dict[str, dict]:
        """The valid contents by their paths; the others join the refused."""
        contents, valid = {}, {}
        for path in _json_files(folder):
            name = path.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
            try:
                state = path.stat()
                key = (os.path.realpath(path), state.st_mtime_ns, state.st_size)
                content, reasons = self.valid_files.get(key), []
                if content is None and state.st_size > MAX_BYTES:
                    reasons = [_too_large(state.st_size)]
                elif content is None:
                    content = parse_results(path.read_bytes())
                    reasons = check_results(content)
            except ValueError as error:
                reasons = [str(error)]
            except OSError as error:
                reasons = [f"the file cannot be read: {error.strerror}. Check its permissions."]
            if not reasons:
                valid[key] = content
                if self.is_repo or loaded.data_files is not None:  # a folder without data files is somebody's own
                    reasons = check_place(content, loaded.data_files)
            if reasons:
                loaded.refused.append(Refused(name, reasons))
            else:
                contents[name] = content
        self.valid_files = valid
        return contents

    def _keep_newest(self, contents: dict[str, dict], loaded: Loaded) -> None:
        """Of the same system on the same data in the same setting the newest is kept."""
        newest: dict[str, str] = {}
        aged = [(parse_time(content["created"]).timestamp(), path) for path, content in contents.items()]
        for _, path in sorted(aged, reverse=True):
            kept = newest.setdefault(identity(contents[path]), path)
            if kept != path:
                reason = f"the same system, model, data and setting are in {kept}, which is newer: that one is shown."
                loaded.refused.append(Refused(path, [reason]))
        loaded.entries = [Entry(path, contents[path]) for path in sorted(newest.values())]

    def _check_models(self, loaded: Loaded) -> None:
        """Refuses results of models that are not on the Hub at their commit."""
        if self.checker is None:
            return
        named = [entry for entry in loaded.entries if all(entry.model)]
        outcomes = self.checker.check(entry.model for entry in named)
        for entry in named:
            entry.model_state = outcomes[entry.model]
            if entry.model_state == MISSING:
                loaded.refused.append(Refused(entry.path, [missing_model(*entry.model)]))
        loaded.entries = [entry for entry in loaded.entries if entry.model_state != MISSING]
        n_unchecked = sum(entry.model_state == UNCHECKED for entry in named)
        if n_unchecked:
            loaded.warnings.append(
                f"The models of {n_unchecked} results could not be looked up on the Hub: they are shown as unchecked. "
                "Refresh later."
            )


def identity(results: dict) -> str:
    """What two results of one measurement share: system and options that matter, model, corpus, data and setting."""
    model = [results["model"][name] for name in ("repo", "revision", "fingerprint")]
    data = [results["data"].get(name) for name in ("name", "sha256", "half", "questions")]
    options = [results["options"].get(name) for name in DECISIVE]
    parts = [results["system"], options, model, results["corpus"], data, results["setting"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def missing_model(repo: str, revision: str) -> str:
    """Why results of such a model are refused."""
    rule = f"model.repo must be public on the Hub at model.revision, but {repo} has no commit {revision[:12]}"
    return f"{rule}. Publish the model, or evaluate the commit that is there."


def _json_files(folder: Path) -> list[Path]:
    """The `.json` files below `results/`, in order; if that is missing, the results.json of runs in any folder."""
    found, has_layout = [], (folder / FOLDER).is_dir()
    for above, below, names in os.walk(folder / FOLDER if has_layout else folder):
        is_run = RUN_FILE in names
        if is_run:  # its memories and parts are none of ours
            below[:] = [name for name in below if name == "baselines"]
        any_name = has_layout and not is_run
        found += [Path(above, name) for name in names if name.endswith(".json") and (any_name or name == RUN_RESULT)]
    return sorted(path for path in found if path.is_file())


def _too_large(size: int) -> str:
    return f"the file must have at most {MAX_BYTES:,} bytes, got {size:,}. This is no results.json."
