"""Measures conversion and use of a reference checkpoint of 7 B parameters: `python -m recipes.benchmarks.conversion`.

The checkpoint has the shapes of CLaRa-7B-E2E/compression-16 and weights that are zero, so that the 14 GB of its
backbone are holes in files and take no disk. The memory is that of a process of its own. `--dtypes bfloat16 int8 int4`
also loads what was converted on this CPU, compresses one document and answers one question.
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

from modeling_clara.cli import DTYPES
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
USE = """
import json, sys
from modeling_clara import CLaRaForRAG
from modeling_clara.cli import weight_options
from recipes.benchmarks.shared import resident_bytes, seconds_of
found, document = {}, {"text": " ".join(f"w{number}" for number in range(10, 200))}
def load():
    found["model"] = CLaRaForRAG.from_pretrained(sys.argv[1], **weight_options(sys.argv[2]))
def compress():
    document["memory"] = model.compress([document])[0]
def answer():
    model.answer(["w5 w6 w7"], documents=[document], max_new_tokens=8)
row = {"load": seconds_of(load)}
model = found["model"]
row["weights"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
compress()
row |= {"compress": seconds_of(compress), "answer": seconds_of(answer), "memory": resident_bytes("RssAnon") / 1e9}
print(json.dumps(row))
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


def measure(dtypes: list[str]) -> tuple[dict, list[dict]]:
    """Seconds and GB of the conversion and of a use in each dtype; the processes say what memory they had."""
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
        uses = []
        for dtype in dtypes:
            command = [sys.executable, "-c", USE, str(folder / "ours"), dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            uses.append({"dtype": dtype, **json.loads(output.splitlines()[-1])})
    peak = int(found["output"].splitlines()[-1])
    tensor = 2 * VOCABULARY * 4096 / 1e9
    return {"seconds": took, "peak": peak / 1e9, "tensor": tensor, "written": written / 1e6}, uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="*", default=[], choices=DTYPES, help="to use the converted checkpoint in")
    arguments = add_outputs(parser).parse_args()
    report = describe_machine()
    report["conversion"], report["use"] = measure(arguments.dtypes)
    text = figures(
        "checkpoint | seconds | peak memory | largest tensor | written",
        "7 B parameters, three roles | {seconds:.0f} | {peak:.2f} GB | {tensor:.2f} GB | {written:.0f} MB",
        [report["conversion"]],
    )
    if report["use"]:
        text += "\n\n" + figures(
            "weights in | GB | memory but for mapped files | load | compress 190 tokens | 8 tokens of an answer",
            "{dtype} | {weights:.1f} | {memory:.1f} GB | {load:.0f} s | {compress:.1f} s | {answer:.1f} s",
            report["use"],
        )
    show("conversion", report, text, arguments)


if __name__ == "__main__":
    main()
