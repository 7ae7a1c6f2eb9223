"""The chain of legs of clara-smollm2-135m on a tiny backbone. It runs once, for all tests of this folder.

Its commands run in processes of their own; most of these are forks of one that has imported everything already:
importing takes longer than what a leg does here.
"""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import smollm2_call
import smollm2_stages as stages
from smollm2_call import BACKBONE
from tiny import save_backbone

from smollm2.home import ALL_EVALUATIONS, EVALUATED, FRESH, HELD_OUT, ROOT, TEXT, TINY, Fork, run, write_source


@pytest.fixture(scope="package")
def forks():
    """Legs run their commands in forks."""
    Fork.context.set_forkserver_preload(["preparation", "evaluation.cli", "modeling_clara.cli", Fork.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "recipes"), str(ROOT)]))
        patch.setattr(
            smollm2_call, "subprocess", SimpleNamespace(Popen=Fork, TimeoutExpired=subprocess.TimeoutExpired)
        )
        patch.setattr(
            stages, "evaluations", lambda *has: (one for one in ALL_EVALUATIONS(*has) if one[0] in EVALUATED)
        )
        yield


@pytest.fixture
def no_command(monkeypatch):
    """Nothing may be run."""

    def refuse(*arguments, **kwargs):
        raise AssertionError(f"a command was run: {arguments}")

    monkeypatch.setattr(smollm2_call, "subprocess", SimpleNamespace(Popen=refuse))


@pytest.fixture(scope="package")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="package")
def prepared(forks, source, tmp_path_factory) -> Path:
    """A home with data and backbone."""
    home = tmp_path_factory.mktemp("prepared")
    save_backbone(home / BACKBONE, max_position_embeddings=2048)
    assert run(home, "prepare", "--source", source, tiny=[]) == 0
    return home


@pytest.fixture(scope="package")
def trained(prepared, tmp_path_factory) -> Path:
    """All training legs are finished."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(prepared, home, dirs_exist_ok=True)
    assert run(home, "curriculum", tiny=[*TINY, *FRESH, "train_memory_sizes=null"]) == 0
    assert run(home, "pretrain", tiny=[*TINY, *FRESH]) == 0
    assert run(home, "instruct", tiny=[*TINY, *HELD_OUT]) == 0
    assert run(home, "contrastive", "joint", "joint-search", "joint-label-free") == 0
    assert run(home, "text", tiny=TEXT) == 0
    return home


@pytest.fixture(scope="package")
def published(trained) -> Path:
    assert run(trained, "10", tiny=[]) == 0
    return trained


@pytest.fixture(scope="package")
def measured(published, source) -> Path:
    results = published / "results"
    assert run(published, "evaluate", "corpus", "--limit", 2, "--source", source, "--results", results, tiny=[]) == 0
    return published
