"""Small checkpoints in the format of the reference, made by hand, and what they must give, without code of CLaRa.

The backbone's table gets the reference's rows, the LoRA products are added to its weights, and one string is tokenised
with the reference's markers: plain transformers do the rest.
"""

import copy
import json
from pathlib import Path

import torch
from tiny import TEXT, build_backbone
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MAX_LENGTH, RATE, RANK, TOP_K = 24, 8, 4, 2
N = MAX_LENGTH // RATE
SYSTEM, PARAPHRASE_SYSTEM = "Use the notes. Be short.", "Say it anew."
PARAPHRASE = ["Notes: {docs} Once more:", "Again: {docs}"]
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set m = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set m = messages %}{% endif %}{{ bos_token }}{% for x in m %}"
    "{% if x['role'] == 'user' %} [INST] {{ s if loop.first }}{{ x['content'] }} [/INST]"
    "{% else %} {{ x['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for x in messages %}{% if x['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ x['role'] }}\n{{ x['content'] | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
CODE = f"""
raise SystemExit("this file must not be run")
PARAPHRASE_INSTRUCTIONS = {PARAPHRASE!r}
class Reference:
    def _blend_paraphrase_prompt(self, docs, answer):
        prompt_system = {PARAPHRASE_SYSTEM!r}
        prompt_user = choice(PARAPHRASE_INSTRUCTIONS).format(docs=docs)
    def _blend_standard_prompt(self, docs: str, query: str, answer: str):
        prompt_system = {SYSTEM!r}
        prompt_user = f"Notes:\\n{{docs}}\\n\\nAsked:{{query}}"
        return prompt_user.replace(':\\ ', ': ')
"""
PROMPTS = {
    "system_prompt": SYSTEM,
    "answer_prompt": "Notes:\n{documents}\n\nAsked:{question}",
    "paraphrase_system_prompt": PARAPHRASE_SYSTEM,
    "paraphrase_prompts": [prompt.replace("{docs}", "{documents}") for prompt in PARAPHRASE],
}


def build_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that puts a blank in front of its input ("first"), of every piece ("prepend") or of none."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "bytes":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        backend.decoder = decoders.Metaspace()
        if kind == "first":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            backend.normalizer = normalizers.Sequence(parts)
    letters = sorted({*TEXT, *"▁\n[]:/<>.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789äßé'"} - {" "})
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else letters
    special = ["<unk>", "<s>", "</s>", "<turn>", "</turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=template,
    )


class Reference:
    """A checkpoint `folder/src` with its backbone `folder/backbone`, and the calls of the reference on it.

    `adapters` are those in the file; without the reasoner's it is the compressor's.
    """

    def __init__(self, folder: Path, architecture="llama", kind="first", template=MISTRAL, adapters=3, tied=False):
        self.source, self.place = folder / "src", folder / "backbone"
        self.tokenizer = build_tokenizer(kind, template)
        self.n_tokens = len(self.tokenizer)
        fields = {"vocabulary": self.n_tokens + 7, "tied": tied, "bos_token_id": 1, "eos_token_id": 2}
        self.backbone = build_backbone(architecture, pad_token_id=2, **fields)
        self.backbone.save_pretrained(self.place)
        self.tokenizer.save_pretrained(self.place)
        generator = torch.Generator().manual_seed(3)
        hidden = self.backbone.config.hidden_size
        rows = torch.randn(N + 3, hidden, generator=generator) * 0.2
        self.table = torch.cat([self.backbone.get_input_embeddings().weight[: self.n_tokens].detach(), rows])
        names = ["encoder_adapter", "decoder_adapter", "query_reasoner_adapter"][:adapters]
        self.adapters = {name: self._adapter(generator) for name in names}
        head = self.backbone.get_output_embeddings().weight[: self.n_tokens].detach()
        self.tables = {"model.embed_tokens.weight": self.table}
        if not tied:
            self.tables["lm_head.weight"] = torch.cat([head, rows])
        self.write()

    def _adapter(self, generator) -> dict[str, torch.Tensor]:
        adapter = {"model.embed_tokens.weight": self.table}  # as one that was made in the run that saved it
        for name, module in self.backbone.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                shape = module.weight.shape
                adapter[f"{name}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.2
                adapter[f"{name}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.2
        return adapter

    def write(self, **settings) -> None:
        """Write config.json, the two files of tensors and the code."""
        self.source.mkdir(exist_ok=True)
        config = {
            "model_type": "CLaRa",
            "decoder_model_name": "/of/their/machine/Tiny",
            "doc_max_length": MAX_LENGTH,
            "compr_rate": RATE,
            "lora": True,
            "lora_r": RANK,
            "sep": True,
            "different_mem_tokens": True,
            "generation_top_k": TOP_K,
            "training_stage": "stage2_reasoning",
            "auto_map": {"AutoModel": "modeling_theirs.Reference"},
        }
        (self.source / "config.json").write_text(json.dumps(config | settings))
        (self.source / "modeling_theirs.py").write_text(CODE)
        torch.save(self.adapters, self.source / "adapters.pth")
        torch.save(self.tables, self.source / "decoder_first_last_layers.pth")

    # --- what the reference does ---------------------------------------------------------------------------------

    def _in_role(self, name: str):
        """The backbone with an adapter added to its weights, and the larger table of embeddings."""
        model, adapter = copy.deepcopy(self.backbone), self.adapters[name]
        for module_name, module in model.named_modules():
            if f"{module_name}.lora_A.weight" in adapter:
                product = adapter[f"{module_name}.lora_B.weight"] @ adapter[f"{module_name}.lora_A.weight"]
                module.weight.data += 2 * product
        return model

    def _ids(self, text: str) -> list[int]:
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_tokens([*(f"<MEM{i}>" for i in range(N)), "<AE>", "<ENC>", "<SEP>"], special_tokens=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def memory(self, text: str, role: str = "encoder_adapter") -> torch.Tensor:
        """(n, hidden) of a document, or with the reasoner's adapter of a question."""
        role = role if role in self.adapters else "encoder_adapter"
        ids = self._ids("<ENC><s>" + text + "</s>" + "".join(f"<MEM{i}>" for i in range(N)))
        with torch.no_grad():
            states = self._in_role(role).model(inputs_embeds=self.table[ids][None]).last_hidden_state
        return states[0, -N:]

    def ranking(self, question: str, documents: list[str]) -> tuple[list[int], torch.Tensor]:
        """The best documents, and the cosines of all."""
        query = self.memory(question, "query_reasoner_adapter").flatten()
        scores = torch.stack([torch.cosine_similarity(query, self.memory(d).flatten(), dim=0) for d in documents])
        return scores.argsort(descending=True)[:TOP_K].tolist(), scores

    def prompt(self, question: str | None, n_documents: int) -> list[int]:
        """Ids of the generator's prompt, with the ids of the markers in its slots."""
        documents = "".join("".join(f"<MEM{i}>" for i in range(N)) + "<SEP>" for _ in range(n_documents))
        system, user = SYSTEM, f"Notes:\n{documents}\n\nAsked:{question}"
        if question is None:
            system, user = PARAPHRASE_SYSTEM, PARAPHRASE[0].format(docs=documents)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        options = {"tokenize": False, "add_generation_prompt": True}
        if "System role not supported" in self.tokenizer.chat_template:
            messages = [{"role": "user", "content": f"{system}\n{user}"}]
        return self._ids(self.tokenizer.apply_chat_template(messages, **options))

    def answer(self, question: str | None, documents: list[str], max_new_tokens: int = 12) -> tuple[torch.Tensor, str]:
        """Logits (tokens,) of the first token, and the text."""
        ids = torch.tensor(self.prompt(question, len(documents)))
        embeddings = self.table[ids]
        embeddings[(ids >= self.n_tokens) & (ids < self.n_tokens + N)] = torch.cat([self.memory(d) for d in documents])
        model = self._in_role("decoder_adapter")
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings[None]).logits[0, -1, : self.n_tokens]
            options = {"attention_mask": torch.ones(1, len(ids)), "max_new_tokens": max_new_tokens, "do_sample": False}
            generated = model.generate(inputs_embeds=embeddings[None], **options)[0]
        return logits, self.tokenizer.decode(generated, skip_special_tokens=True)
