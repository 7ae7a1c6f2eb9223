"""Measures the conversion of a reference checkpoint of 7 B parameters: `python -m recipes.benchmarks.conversion`.

The checkpoint has the shapes of CLaRa-7B-E2E/compression-16 and weights that are zero, so that the 14 GB of its
backbone are holes in files and take no disk. The memory is that of a process of its own.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from recipes.benchmarks.shared import add_outputs, describe_machine, figures, seconds_of, show
from recipes.conversion.convert import ADAPTERS

RATE, MAX_LENGTH, RANK, VOCABULARY = 16, 256, 16, 32_000
PROMPTS = {
    "system_prompt": "Answer briefly.",
    "answer_prompt": "{documents}\n{question}",
    "paraphrase_system_prompt": "Paraphrase.",
    "paraphrase_prompts": ["{documents}"],
}
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
CONVERT = """
from recipes.convert_reference import main
assert main() == 0
from recipes.benchmarks.shared import resident_bytes
print(resident_bytes("VmHWM"))
"""


def write_holes(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no disk."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)


def write_backbone(folder: Path) -> dict[str, list[int]]:
    """A backbone with the shapes of Mistral-7B, and the shapes of its linear layers."""
    config = MistralConfig(vocab_size=VOCABULARY, max_position_embeddings=32_768)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in backbone.named_parameters()}
    folder.mkdir()
    config.save_pretrained(folder)
    write_holes(folder / "model.safetensors", shapes)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    return {name: shape for name, shape in shapes.items() if "layers" in name and len(shape) == 2}


def write_checkpoint(folder: Path, linear: dict[str, list[int]]) -> None:
    """Three adapters and two tables, as the reference writes them."""
    folder.mkdir()
    adapter = {}
    for name, (n_out, n_in) in linear.items():
        adapter[name.replace(".weight", ".lora_A.weight")] = torch.zeros(RANK, n_in, dtype=torch.bfloat16)
        adapter[name.replace(".weight", ".lora_B.weight")] = torch.zeros(n_out, RANK, dtype=torch.bfloat16)
    torch.save(
        {name: {k: t.clone() for k, t in adapter.items()} for name in ADAPTERS.values()}, folder / "adapters.pth"
    )
    table = torch.zeros(VOCABULARY + MAX_LENGTH // RATE + 3, 4096, dtype=torch.bfloat16)
    tables = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    torch.save(tables, folder / "decoder_first_last_layers.pth")
    settings = {"model_type": "CLaRa", "decoder_model_name": "none", "doc_max_length": MAX_LENGTH, "compr_rate": RATE}
    settings |= {"lora_r": RANK, "generation_top_k": 5}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))


def measure() -> dict:
    """Seconds and GB of the conversion; the process itself says how much memory it had at most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "src", write_backbone(folder / "backbone"))
        arguments = [str(folder / "src"), str(folder / "ours"), "--backbone", str(folder / "backbone")]
        arguments += ["--prompts", str(folder / "src" / "prompts.json")]
        command, found = [sys.executable, "-c", CONVERT, *arguments], {}

        def run() -> None:
            found["output"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout

        took = seconds_of(run)
        written = sum(path.stat().st_size for path in (folder / "ours").rglob("*") if path.is_file())
    peak = int(found["output"].splitlines()[-1])
    return {"seconds": took, "peak": peak / 1e9, "tensor": 2 * VOCABULARY * 4096 / 1e9, "written": written / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = add_outputs(parser).parse_args()
    report = describe_machine() | {"conversion": measure()}
    text = figures(
        "checkpoint | seconds | peak memory | largest tensor | written",
        "7 B parameters, three roles | {seconds:.0f} | {peak:.2f} GB | {tensor:.2f} GB | {written:.0f} MB",
        [report["conversion"]],
    )
    show("conversion", report, text, arguments)


if __name__ == "__main__":
    main()
