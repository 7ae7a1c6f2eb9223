"""Answers of the merged generator on a real vLLM, beside those in process.

CLARA_VLLM names the environment that vLLM is installed in, such as .venv-vllm; `make vllm` makes it.
"""

import asyncio
import os
from pathlib import Path

import pytest
import torch
import vllm_server
from service_readings import embed_prompts

from modeling_clara import CLaRaForRAG, smollm2
from modeling_clara.generator import generator_fingerprint, served_name
from modeling_clara.service.remote import GeneratorError, RemoteGenerator

ENVIRONMENT = os.environ.get("CLARA_VLLM", "")
CHECKPOINT = Path(__file__).parents[2] / "model_cards" / "clara-smollm2-135m"
QUESTIONS, TOKENS = 20, 32
NEAR_TIE = 0.05  # by which the logits of two tokens differ at most where both are right

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVIRONMENT, reason="CLARA_VLLM names no environment with vLLM (make vllm)"),
]


@pytest.fixture(scope="module")
def model():
    return CLaRaForRAG.from_pretrained(CHECKPOINT, backbone=smollm2.fetch_backbone())


@pytest.fixture(scope="module")
def merged(model, tmp_path_factory):
    return model.merge_generator(tmp_path_factory.mktemp("merged") / "generator")


def parting(model, prompt: torch.Tensor, ours: list[int], theirs: list[int]) -> tuple[int, float] | None:
    """Where two answers part, and by how much their tokens differ there in logits; None if they do not."""
    place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return None if len(ours) == len(theirs) else (min(len(ours), len(theirs)), float("inf"))
    with torch.no_grad(), model.roles.use("generator"):
        said = model.get_input_embeddings()(torch.tensor(ours[:place], dtype=torch.long))
        logits = model.backbone(inputs_embeds=torch.cat([prompt, said])[None]).logits[0, -1]
    return place, float(logits[ours[place]] - logits[theirs[place]])


def own_ids(model, prompt: torch.Tensor) -> list[int]:
    with torch.no_grad(), model.roles.use("generator"):
        config = model.build_generation_config(None, TOKENS)
        return model.backbone.generate(inputs_embeds=prompt[None], generation_config=config)[0].tolist()


def test_greedy_answers_equal_those_in_process(model, merged, tmp_path, record_property):
    documents, questions = (rows[:QUESTIONS] for rows in vllm_server.demo_questions())
    prompts = embed_prompts(model, questions, documents, TOKENS)
    wanted = [answer.text for answer in model.answer(questions, documents=documents, max_new_tokens=TOKENS)]

    async def run(url: str):
        generator = RemoteGenerator(url, timeout=600)
        await generator.connect(model)
        texts = await generator.generate(prompts, TOKENS)
        pieces = [piece async for piece in generator.stream(prompts[0], TOKENS)]
        options = generator._options(TOKENS, 0.0, 1.0, None, None)
        other = {i: await generator._generate(prompts[i], options) for i in differing(texts, wanted)}
        with pytest.raises(ValueError, match="window of the generator's server"):
            await generator.generate(prompts[:1], 2048)
        generator.max_length = None  # as if the server had not told
        with pytest.raises(ValueError, match="too long"):
            await generator.generate([prompts[0].repeat(2048 // len(prompts[0]) + 1, 1)], 1)
        await generator.close()
        return texts, pieces, other

    name = served_name(generator_fingerprint(model))
    options = ("--enable-prompt-embeds", "--served-model-name", name)
    with vllm_server.serve(Path(ENVIRONMENT), merged, *options, log=tmp_path / "vllm.log") as url:
        texts, pieces, other = asyncio.run(run(url))
        with pytest.raises(ValueError, match="is another one"):
            asyncio.run(RemoteGenerator(url).connect(other_model()))
    # question -> (token at which the answers part, by how much their logits differ there)
    parted = {i: parting(model, prompts[i], own_ids(model, prompts[i]), ids) for i, ids in other.items()}
    record_property("parted", str(parted))
    assert len(parted) <= QUESTIONS // 10, parted
    assert all(where is None or abs(where[1]) < NEAR_TIE for where in parted.values()), parted
    assert "".join(pieces) == texts[0] and len(pieces) > 1


def differing(texts: list[str], wanted: list[str]) -> list[int]:
    return [i for i, pair in enumerate(zip(texts, wanted, strict=True)) if pair[0] != pair[1]]


def other_model() -> CLaRaForRAG:
    """One with another generator on the same backbone."""
    other = CLaRaForRAG.from_pretrained(CHECKPOINT, backbone=smollm2.fetch_backbone())
    with torch.no_grad():
        for name, parameter in other.backbone.named_parameters():
            if "lora_B.generator" in name:
                parameter.neg_()
    return other


def test_without_prompt_embeds_the_error_names_the_option(model, merged, tmp_path):
    with vllm_server.serve(Path(ENVIRONMENT), merged, log=tmp_path / "vllm.log") as url:
        with pytest.raises(GeneratorError, match="Start vLLM with --enable-prompt-embeds"):
            asyncio.run(RemoteGenerator(url).connect(model))
