"""A tiny Llama with its own tokenizer, trained from scratch until it copies and reads: the backbone of clara-pico.

Stands before stage 1: it knows nothing of memories or roles. Two phases of plain language modelling. First sequences
that are repeated, on which copying heads form (a model without them only guesses among the values of a sheet, for
thousands of steps); then questions with the sheet's text in view, in the prompt format of the other stages.

    python -m recipes.models.pico.backbone --data data/pico --output runs/pico/backbone
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaProcessor
from recipes.training.data import read_rows

# The prompts of clara-pico, as short as they can be: every token costs time on two cores.
PROMPTS = {
    "system_prompt": "",
    "answer_prompt": "{documents}\nQuestion: {question}",
    "paraphrase_prompts": ["{documents}\nTell the sheet again."],
}
VOCABULARY = 2048
COPY_LENGTHS = (8, 24)  # tokens that are repeated
BATCH = 64


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be written, the words of the sheets are one or two tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The random backbone: hidden 128, four layers, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def repeated_sequence(seed: int, vocabulary: int) -> dict[str, list[int]]:
    """Random tokens, twice: only the second half has labels, since nothing tells the first."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(*COPY_LENGTHS, (), generator=generator))
    ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
    return {"input_ids": ids + ids, "labels": [-100] * length + ids}


def sheets_in_view(rows: list[dict], processor: CLaRaProcessor) -> list[dict[str, list[int]]]:
    """Questions and paraphrases after the text of their sheet; labels on the answer and the sheet, for fluency."""
    targets = [(row, pair["question"], pair["answers"][0]) for row in rows for pair in row.get("qas", [])]
    targets += [(row, None, row["paraphrase"]) for row in rows if "paraphrase" in row]
    prompts = (processor.build_prompt(asked, 0, 1, told, text_documents=[row]) for row, asked, told in targets)
    return [{"input_ids": prompt.input_ids, "labels": prompt.input_ids} for prompt in prompts]


def train_phase(model: LlamaForCausalLM, tokenizer, dataset: list[dict], folder: Path, n_steps: int) -> None:
    """One phase with a checkpoint every 200 steps; run again, it resumes from the last one."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=n_steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,  # AdamW without weight decay at this size: what the first trials on symbolic sheets took
        warmup_steps=20,
        adam_beta2=0.95,
        logging_steps=20,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )

    trainer = Trainer(model, arguments, data_collator=DataCollatorForSeq2Seq(tokenizer), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/pico"))
    parser.add_argument("--output", type=Path, default=Path("runs/pico/backbone"))
    parser.add_argument("--copy-steps", type=int, default=400)
    parser.add_argument("--reading-steps", type=int, default=1200)
    arguments = parser.parse_args()
    set_seed(0)
    rows = [row for _, row in islice(read_rows(DatasetConfig(str(arguments.data / "pretrain.jsonl"))), 20_000)]
    pairs = [pair for row in rows for pair in row.get("qas", [])]
    texts = [f"{row['title']}\n{row['text']}\nTell the sheet again.\nQuestion:\nAnswer:" for row in rows]
    texts += [pair["question"] for pair in pairs]  # by itself, as it is encoded
    texts += [f" {pair['answers'][0]}" for pair in pairs]
    tokenizer = build_tokenizer(texts)
    processor, model = CLaRaProcessor(tokenizer, **PROMPTS), build_model(tokenizer)
    copies = [repeated_sequence(seed, len(tokenizer)) for seed in range(BATCH * arguments.copy_steps)]
    train_phase(model, tokenizer, copies, arguments.output / "copying", arguments.copy_steps)
    sheets = sheets_in_view(rows, processor)
    train_phase(model, tokenizer, sheets, arguments.output / "reading", arguments.reading_steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
