"""Tiny real models and tokenizers, built in code: seven architectures, three kinds of prompt, with and without BOS.

Every test stands on these. They know nothing of CLaRa: they are what a user's backbone folder looks like.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

HIDDEN = 32
TEXT = (
    "Paris is the capital of France. Berlin is the capital of Germany. The Seine flows through Paris. "
    "What is the capital of Italy? Rome is the capital of Italy. Answer briefly from the background. Question: "
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
DROPS_SYSTEM = NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "{% continue %}")
TEMPLATES = {"system": CHATML, "no_system": NO_SYSTEM, "none": None}
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
ADDED = ["<think>", "</think>", "<tool_call>"]  # added tokens with special=False

DOCUMENTS = [
    "Paris is the capital of France.",
    {"id": "berlin", "title": "Berlin", "text": "Berlin is the capital of Germany, a city of 3.7 million people."},
    "The Seine flows through Paris.",
    {"title": "Rome", "text": "Rome is the capital of Italy."},
]
QUESTIONS = ["What is the capital of Italy?", "Which river flows through Paris, and why?"]

ARCHITECTURES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma2": Gemma2Config,
    "gpt_neox": GPTNeoXConfig,
}


def build_tokenizer(template: str = "system", *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on one paragraph.

    Args:
        template: a key of `TEMPLATES`.
        bos: whether it puts `<s>` in front of a text.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATES[template],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    tokenizer.add_tokens(ADDED)
    return tokenizer


def build_backbone(architecture: str = "llama", *, vocabulary: int, tied: bool = False, seed: int = 0, **fields):
    """A random causal language model of hidden size 32 with two layers, in eval mode."""
    config = ARCHITECTURES[architecture](
        **{
            "vocab_size": vocabulary,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            # twice the usual spread, so that greedy choices are far from ties
            "initializer_range": 0.2,
            **({} if architecture == "gpt_neox" else {"num_key_value_heads": 2}),
            **({"head_dim": 8} if architecture in ("qwen3", "gemma2") else {}),
            **fields,
        }
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def save_backbone(folder: Path, architecture: str = "llama", *, template="system", bos=False, **fields) -> Path:
    """A backbone folder with weights and tokenizer, as a user would have it."""
    tokenizer = build_tokenizer(template, bos=bos)
    build_backbone(architecture, vocabulary=len(tokenizer), **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomize_adapters(model, seed: int = 1) -> None:
    """Give every adapter weights that matter; fresh LoRA is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.backbone.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
