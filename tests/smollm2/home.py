"""What tests of the legs of clara-smollm2-135m need: small data, what runs left, commands that start in no time.

Stands beside the tests of this folder and its conftest.py.
"""

import gzip
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import smollm2_legs
import smollm2_stages as stages
import torch
from safetensors.torch import load_file
from smollm2_call import BACKBONE, DATA

from modeling_clara import CLaRaForRAG
from modeling_clara.configuration_clara import ROLES

ADAPTER = "adapter_model.safetensors"
TINY = [
    "max_steps=3", "save_steps=1", "logging_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
    "warmup_steps=0", "learning_rate=1e-2",
]  # fmt: skip
FRESH = ["lora_rank=2", "lora_alpha=4", "document_max_length=64", "processor_kwargs={document_overlap: 8}"]
HELD_OUT = ["eval_strategy=steps", "eval_steps=3", f"eval_datasets=[{{path: {DATA}/dev/multihop_hotpotqa_dev.jsonl}}]"]
TEXT = [*TINY, *FRESH, "max_steps=6"]
ROOT = Path(smollm2_legs.__file__).parent.parent
LINEAGE = ("curriculum", "pretrain", "instruct", "contrastive", "joint", "joint-search")
ALL_EVALUATIONS = stages.evaluations
EVALUATED = "passages_squad-k16 passages_nq-k16-int4 multihop_hotpotqa_dev-k16 multihop_musique_dev-k4".split()
EVALUATED += ["multihop_2wiki_dev-label-free"]
TOWN = (
    "In {year} the town {n} had a harbour, and its mayor was Otto Berg {n}, who liked old boats very much. It had "
    "a mill and a well, and a road led to it from the hills in the east, where sheep were kept."
)


def passage(n: int) -> dict:
    pairs = [{"question": f"Who was mayor of {n}?", "answers": [f"Otto Berg {n}"]}]
    return {"title": f"Town {n}", "text": TOWN.format(year=1800 + n, n=n), "qas": pairs}


def multihop(name: str, start: int) -> list[dict]:
    """Rows of six documents."""
    rows = []
    for index in range(3):
        docs = [f"Town {n}\n{passage(n)['text']}" for n in range(start + index, start + index + 6)]
        row = {"id": f"{name}{index}", "question": f"Who of {name} {index}?", "answers": ["Otto"], "docs": docs}
        rows.append({**row, "pos_index": [0, 1]})
    return rows


def write_source(folder: Path) -> Path:
    """Every kind of data once."""
    texts = [{"id": str(n), "title": f"Town {n}", "text": passage(n)["text"]} for n in range(300, 310)]
    unanswerable = [
        {"question": "Why?", "answers": [], "docs": [f"Town {n}\n{passage(n)['text']}"]} for n in (400, 401)
    ]
    files = {
        "passages_squad": [passage(n) for n in range(40)],
        "passages_nq": [passage(n) for n in range(40, 80)],
        "corpus_wikipedia_2wiki": texts,
        "multihop_hotpotqa_train": multihop("hotpot", 100),
        "multihop_musique_train": multihop("musique", 120),
        "multihop_hotpotqa_train_gold_only": [
            {**row, "docs": row["docs"][:2]} for row in multihop("hotpot-gold", 140)
        ],
        "multihop_hotpotqa_dev": multihop("hotpot-dev", 200),
        "multihop_musique_dev": multihop("musique-dev", 220),
        "multihop_2wiki_dev": multihop("wiki-dev", 300),
        "unanswerable_squad": unanswerable,
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def write_wheel(folder: Path) -> Path:
    """A wheel of one empty module, `clara_test_module`."""
    info, wheel = "clara_test-1.dist-info", folder / "clara_test-1-py3-none-any.whl"
    files = {"clara_test_module.py": "", f"{info}/METADATA": "Metadata-Version: 2.1\nName: clara-test\nVersion: 1\n"}
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


# --- calls of the command --------------------------------------------------------------------------------------------


def run(home: Path, *words, tiny: list[str] = TINY) -> int:
    """`smollm2_legs.py run WORDS` on a CPU; the exit status."""
    given = ["--set", *tiny] if tiny else []
    return smollm2_legs.main(["run", *map(str, words), "--home", str(home), "--cpu", *given])


def fails(capsys, *words) -> str:
    """The one line of a command line that ends with status 1."""
    capsys.readouterr()
    assert smollm2_legs.main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# --- what a training run left ----------------------------------------------------------------------------------------


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that training changes."""
    found = {f"{role}.{n}": tensor for role in ROLES for n, tensor in load_file(run / role / ADAPTER).items()}
    return found | load_file(run / "clara.safetensors")


def changed(run: Path, before: Path) -> set[str]:
    ours, theirs = weights(run), weights(before)
    return {name.split(".")[0] for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


def log(run: Path) -> dict:
    return json.loads((run / "trainer_state.json").read_text())


def load(folder: Path, home: Path) -> CLaRaForRAG:
    return CLaRaForRAG.from_pretrained(folder, backbone=home / BACKBONE)


# --- commands in forks of one process --------------------------------------------------------------------------------


def run_recipe(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """What `python WORDS` does, in a fork."""
    import time_limit

    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    time_limit.START = time.monotonic()
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


class Fork:
    """As much of `subprocess.Popen` as the legs use."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, line: list[str], cwd: Path, env: dict[str, str]):
        self.process = self.context.Process(target=run_recipe, args=(line[1:], cwd, env))
        self.process.start()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("recipe", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
