"""Texts to compress, the smallest corpus, and what reading them should give, for the tests of the text-level calls."""

import random

import torch

from modeling_clara import Answer

WORDS = "Paris Rome Berlin Seine capital river France Italy Germany answer question the of is flows through".split()


def random_texts(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(n)]


def read_stream(stream) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def greedy_reference(
    model, question: str | None, memory: torch.Tensor, n_tokens: int, text_documents=(), role: str | None = "generator"
) -> str:
    """Argmax after argmax, the whole prompt again for every token, no `generate`."""
    prompt = model.processor.build_prompt(question, len(memory), memory.shape[1], text_documents=text_documents)
    inputs = model.processor.pad_prompts([prompt])
    is_real = torch.ones(1, len(memory), dtype=torch.bool)
    ids = []
    with torch.no_grad(), model.roles.use(role):
        embeds = model.prompt_embeddings(inputs["input_ids"], inputs["memory_mask"], memory[None], is_real)
        for _ in range(n_tokens):
            token = model.backbone(inputs_embeds=embeds).logits[0, -1].argmax()
            if token in (model.processor.answer_end_id, model.processor.tokenizer.eos_token_id):
                break
            ids.append(int(token))
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], dim=1)
    return model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


class ExactScan:
    """The smallest corpus there is: every memory in one tensor, scanned in float64."""

    def __init__(self, model, documents: list[dict]):
        self.documents, self.memory = documents, model.compress(documents)

    def search(self, query_memory, top_k):
        found = []
        for scores in cosines(query_memory, self.memory, query_memory.shape[1]):
            best = sorted(range(len(self.documents)), key=lambda i, scores=scores: (-scores[i], i))[:top_k]
            hits = [{"span": 0, "score": scores[i], "memory": self.memory[i].numpy()} for i in best]
            found.append([{**hit, **self.documents[i]} for hit, i in zip(hits, best, strict=True)])
        return found


def corpus_documents() -> list[dict]:
    return [
        {"document_id": f"doc-{i}", "title": "T" if i % 3 else "", "text": text}
        for i, text in enumerate(random_texts(9, seed=4))
    ]


def cosines(queries: torch.Tensor, memory: torch.Tensor, memory_size: int) -> list[list[float]]:
    """eq. 3.1 in float64: the first k vectors as one vector."""
    flat = [tensor[:, :memory_size].double().flatten(1) for tensor in (queries, memory)]
    return torch.nn.functional.cosine_similarity(flat[0][:, None], flat[1][None], dim=-1).tolist()
