"""Fixtures of all tests: one loopback Hub for the session, tiny backbones on disk, models to copy.

The Hub starts before transformers is imported, because its client reads HF_ENDPOINT at import. Nothing leaves the
machine.
"""

import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
for folder in (*(path for path in sorted(TESTS.iterdir()) if path.is_dir()), TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))  # tests share their rows and models, whichever folder runs

from hub_server import HubServer  # noqa: E402

HUB = HubServer()
HUB.__enter__()
HOME = tempfile.TemporaryDirectory(prefix="clara-tests-")
os.environ.update(HUB.environment(Path(HOME.name)))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import DOCUMENTS, QUESTIONS, randomize_adapters, save_backbone  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling_clara import CLaRaForRAG  # noqa: E402

pytest_plugins = ["training_runs"]
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_progress_bars():
    """The command line turns them on, for whatever test comes next in this process as well."""
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def hub() -> HubServer:
    """The loopback Hub that HF_ENDPOINT points to."""
    return HUB


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A tiny Llama with a chat template that has a system role."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def shared_model(backbone_folder) -> CLaRaForRAG:
    """A model with adapters that matter, for tests that only read it."""
    torch.manual_seed(0)
    model = CLaRaForRAG.from_backbone(
        backbone_folder,
        memory_sizes=(2, 4),
        lora_rank=4,
        config_kwargs={"document_max_length": 64, "retrieval_top_k": 2},
        processor_kwargs={"document_overlap": 8},
    )
    randomize_adapters(model)
    return model


@pytest.fixture(scope="session")
def shared_windows(backbone_folder) -> CLaRaForRAG:
    """A model of the layout "windows" with adapters and a residual that matter, for tests that only read it."""
    torch.manual_seed(0)
    fields = {"document_max_length": 64, "retrieval_top_k": 2, "memory_layout": "windows"}
    model = CLaRaForRAG.from_backbone(backbone_folder, memory_sizes=(2, 4, 8), lora_rank=4, config_kwargs=fields)
    randomize_adapters(model)
    with torch.no_grad():
        model.residual_scale.copy_(torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5)
    return model


@pytest.fixture
def model(shared_model) -> CLaRaForRAG:
    """A copy to change."""
    return copy.deepcopy(shared_model)


@pytest.fixture(scope="session")
def checkpoint(shared_model, tmp_path_factory) -> Path:
    """`shared_model` saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shared_model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def documents() -> list:
    return copy.deepcopy(DOCUMENTS)


@pytest.fixture
def questions() -> list[str]:
    return list(QUESTIONS)


def pytest_sessionfinish():
    HUB.__exit__(None, None, None)
    HOME.cleanup()
