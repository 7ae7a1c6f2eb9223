"""A checkpoint's own code in a process without the package: quiet, without optional packages, and opens corpora."""

import shutil
import subprocess
import sys
from pathlib import Path

CARDS = Path(__file__).parents[2] / "model_cards"
SCRIPT = """
import sys
sys.modules["modeling_clara"] = None  # an import of the package fails
import peft, torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging
logging.disable_progress_bar()
optional = {"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"}
before = optional & set(sys.modules)  # what transformers and peft take
model = AutoModel.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert optional & set(sys.modules) == before, optional & set(sys.modules)
corpus = model.load_corpus("corpus")
(answer,) = model.answer(["Where does Otto live?"], corpus=corpus, top_k=1)
assert type(corpus).__module__.startswith("transformers_modules."), type(corpus)
assert answer.sources[0].read_as == "memory" and len(corpus) > 0
print("answered")
"""


def run_clean(script: str, *arguments: str, home: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    """Run a script in `folder`, in a process that knows the Hub of `home` and nothing of this one."""
    return subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        env={"PATH": "", "OMP_NUM_THREADS": "1", **home},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_clean_process_loads_a_model_quietly_and_opens_a_corpus(hub, tmp_path):
    shutil.copytree(CARDS / "clara-pico", tmp_path / "model")
    for path in (CARDS.parent / "modeling_clara").glob("*_clara.py"):  # as upload.py adds it
        shutil.copy(path, tmp_path / "model")
    shutil.copytree(CARDS / "clara-pico-corpus", tmp_path / "corpus")
    run = run_clean(SCRIPT, home=hub.environment(tmp_path / "home"), folder=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "answered\n", "")
