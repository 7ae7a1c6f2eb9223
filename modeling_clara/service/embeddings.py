"""`/v1/embeddings`: vectors of questions, in the space of the memories.

A vector is the first k memory vectors of a question, one after the other, scaled to length one: the dot product with
the same vector of a memory is the score of a search. A longer vector begins with the direction of a shorter one.
"""

import base64
import re

import torch
from fastapi import APIRouter, Request

from ..retrieval_clara import flatten_memory
from .asking import Service
from .errors import ApiError, Json
from .limits import bounded
from .schemas import EmbeddingsBody

PASS = 16  # questions that are encoded at once: answers wait for it
router = APIRouter()


@router.post("/v1/embeddings", summary="Vectors of questions, as with OpenAI's embeddings")
async def embed(body: EmbeddingsBody, request: Request):
    """`dimensions` is k times the hidden size; by default k is what a search compares."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if len(body.input) > service.limits.inputs:
        most, given = service.limits.inputs, len(body.input)
        message = f"`input` must have at most {most} texts, got {given}. Send less at a time."
        raise ApiError(400, message, param="input", code="too_long")
    questions = [service.check_question(text, f"input[{index}]") for index, text in enumerate(body.input)]
    size = memory_size(service, body.dimensions)
    memory = await bounded(request, _embed(service, questions, size), service.limits.answer_seconds)
    vectors = flatten_memory(memory, size).cpu().numpy().astype("<f4")
    as_text = body.encoding_format == "base64"
    rows = [base64.b64encode(row.tobytes()).decode() if as_text else row.tolist() for row in vectors]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    n_tokens = sum(map(len, service.engine.model.processor.encode_questions(questions)))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return Json({"object": "list", "data": data, "model": service.model_id, "usage": usage})


async def _embed(service: Service, questions: list[str], size: int) -> torch.Tensor:
    """Queries (questions, k, hidden) float32; an error names the text by its place in `input`."""
    parts = []
    for start in range(0, len(questions), PASS):
        try:
            parts.append(await service.engine.embed(questions[start : start + PASS], size))
        except ValueError as error:
            if not (place := re.search(r"`questions\[(\d+)\]`", str(error))):
                raise
            name = f"input[{start + int(place[1])}]"
            message = str(error).replace(place[0], f"`{name}`")
            raise ApiError(400, message, param=name, code="invalid_value") from error
    return torch.cat(parts)


def memory_size(service: Service, dimensions: int | None) -> int:
    """k of vectors with so many numbers."""
    config = service.engine.model.config
    most = config.retrieval_memory_size if config.memory_layout == "windows" else config.memory_sizes[-1]
    sizes = {size * config.text_config.hidden_size: size for size in config.memory_sizes if size <= most}
    if dimensions is None:
        return config.retrieval_memory_size
    if dimensions not in sizes:
        message = f"`dimensions` must be one of {sorted(sizes)}, got {dimensions}. Leave it out for what is searched."
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    return sizes[dimensions]
