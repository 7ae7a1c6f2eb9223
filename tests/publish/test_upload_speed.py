"""What publishing costs: a model of 270 MB is built, verified and published, and again without a change.

    python -m pytest -m slow -s tests/publish/test_upload_speed.py

It prints seconds and megabytes, and has no limits: machines differ.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from published import ROOT, contents
from tiny import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_clara import CLaRaForRAG

pytestmark = pytest.mark.slow
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A checkpoint of the size of SmolLM2-135M in bfloat16, its backbone included."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(torch.bfloat16)
    backbone.save_pretrained(folder / "backbone")
    build_tokenizer().save_pretrained(folder / "backbone")
    model = CLaRaForRAG.from_backbone(folder / "backbone", dtype=torch.bfloat16)
    model.save_pretrained(folder / "clara", include_backbone=True)
    (folder / "clara" / "README.md").write_text("---\nlicense: mit\n---\n\n# random weights\n")
    return folder / "clara"


def test_publish_publish_again_and_publish_a_new_card(hub, model_folder, capsys):
    command = [sys.executable, str(ROOT / "upload.py"), "model", str(model_folder), "--repo-id", "speed/model"]
    n_bytes = sum(path.stat().st_size for path in model_folder.rglob("*") if path.is_file())
    lines = [f"{n_bytes / 1e6:,.0f} MB, {len(os.sched_getaffinity(0))} cores"]
    for what in ("first", "without a change", "another card"):
        start, sent = time.perf_counter(), len(hub.requests)
        if what == "another card":
            (model_folder / "README.md").write_text("---\nlicense: mit\n---\n\n# random weights, again\n")
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        requests = hub.requests[sent:]
        uploads = sum(method == "PUT" for method, _ in requests)
        seconds = time.perf_counter() - start
        lines.append(f"{what}: {seconds:.1f} s, {len(requests)} requests, {uploads} large files sent")
        assert (uploads > 0) == (what == "first")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert b"again" in contents(hub.repos["model", "speed/model"])["README.md"]
