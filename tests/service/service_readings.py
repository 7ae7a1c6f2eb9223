"""Prompts as the generator of a model reads them, for tests that send them elsewhere."""

import torch

from modeling_clara.candidates_clara import search
from modeling_clara.reading_clara import prepare_reading
from modeling_clara.service.remote import reading_embeddings


def embed_prompts(model, questions: list[str], documents: list, n_tokens: int, expand: int = 0) -> list[torch.Tensor]:
    """Embeddings (tokens, hidden) of the prompts that `model.answer` reads with the same arguments."""
    with model.lock, torch.no_grad():
        hits, _ = search(model, questions, documents, None, None, None, None, model.config.memory_sizes[-1])
        generation = model.build_generation_config(None, n_tokens)
        return [
            reading_embeddings(model, prepare_reading(model, question, row, None, expand, generation, "question"))
            for question, row in zip(questions, hits, strict=True)
        ]
