"""int8 weights on a CPU: all calls, roles and files stay what they are but for rounding."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from modeling_clara import CLaRaForRAG
from modeling_clara.adapters_clara import ROLES
from modeling_clara.cli.models import load_model
from modeling_clara.generator import merge_generator
from modeling_clara.quantization import FEW_ROWS, Int8Linear, int8_product, quantize_model, to_int8
from tests.tiny import DOCUMENTS, QUESTIONS, randomize_adapters, save_backbone

ARCHITECTURES = [("llama", True), ("llama", False), ("qwen2", True), ("phi3", False), ("gemma2", True)]


def build_model(folder, architecture="llama", tied=True, **fields):
    backbone = save_backbone(folder, architecture, tied=tied, **fields)
    model = CLaRaForRAG.from_backbone(backbone, memory_sizes=(2, 4), lora_rank=2)
    randomize_adapters(model)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    build_model(folder / "backbone").save_pretrained(folder / "model")
    return folder / "model"


def test_a_product_is_that_of_the_rounded_weights():
    """One row or many, with or without gradient, any width: the same numbers, those of scale * (weight @ x)."""
    for width in (16, 20, 24, 32, 48, 80, 576):
        plain = torch.randn(48, width)
        weight, scale = to_int8(plain)
        assert (weight.float() * scale.float()[:, None] - plain).abs().max() <= plain.abs().max() / 127
        for n_rows in (1, FEW_ROWS, FEW_ROWS + 1, 64):
            states = torch.randn(n_rows, width).to(torch.bfloat16).float()  # which rounds no more inside
            expected = states @ (weight.float() * scale.float()[:, None]).T
            output = int8_product(states, weight, scale)
            assert output.dtype == torch.float32
            torch.testing.assert_close(output, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    states.requires_grad_()
    int8_product(states[:1], weight, scale).sum().backward()
    assert states.grad[0].abs().sum() > 0


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_every_role_is_what_it_was_but_for_rounding(tmp_path, architecture, tied):
    model = build_model(tmp_path / "backbone", architecture, tied)
    ids = torch.tensor([model.processor.encode_text("The Seine flows through Paris. Rome is the capital of Italy.")])

    def logits(role, of):
        with of.roles.use(role), torch.no_grad():
            return of.backbone(input_ids=ids).logits[0]

    expected = {role: logits(role, model) for role in (*ROLES, None)}
    quantize_model(model)
    for role, wanted in expected.items():
        found = logits(role, model)
        assert 0 < (found - wanted).abs().max() < 0.15 * wanted.abs().max()
        nearest = min(expected, key=lambda other: float((found - expected[other]).norm()))
        assert nearest == role


def test_all_calls_work_and_are_close_to_float32(checkpoint, caplog):
    whole, small = load_model(str(checkpoint)), load_model(str(checkpoint), dtype="int8")
    memory, expected = small.compress(DOCUMENTS), whole.compress(DOCUMENTS)
    assert torch.cosine_similarity(memory.flatten(1), expected.flatten(1)).min() > 0.99 and not memory.equal(expected)
    queries = [model.encode_queries(QUESTIONS).flatten(1) for model in (small, whole)]
    assert torch.cosine_similarity(*queries).min() > 0.99
    options = {"documents": DOCUMENTS, "top_k": 2, "min_score": -1}
    found, wanted = (model.retrieve(QUESTIONS, **options) for model in (small, whole))
    for row, other in zip(found, wanted, strict=True):
        assert [source.score for source in row] == pytest.approx([source.score for source in other], abs=0.05)
    forced = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    answers = small.answer(QUESTIONS, generation_config=forced, explain=True, expand=1, **options)
    assert all(answer.text and answer.keywords for answer in answers)
    alone = [small.answer([question], generation_config=forced, **options)[0].text for question in QUESTIONS]
    streamed = ["".join(small.stream(question, generation_config=forced, **options)) for question in QUESTIONS]
    assert streamed == alone
    assert len(small.paraphrase(DOCUMENTS, max_new_tokens=4)) == len(DOCUMENTS)
    with small.bulk_answering():  # nothing to merge: the generator is in the weights
        assert [a.text for a in small.answer(QUESTIONS, generation_config=forced, **options)] == [
            a.text for a in small.answer(QUESTIONS, generation_config=forced, **options)
        ]
    assert "are not merged" in caplog.text


def test_it_takes_less_memory_and_keeps_one_copy_of_what_is_tied(tmp_path):
    model = build_model(tmp_path / "backbone", hidden_size=128, intermediate_size=512)

    def size():
        return sum(p.nbytes for name, p in model.backbone.named_parameters() if ".lora_" not in name)

    before = size()
    quantize_model(model)
    assert size() < 0.27 * before
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear) and head.weight is model.get_input_embeddings().weight


def test_the_checkpoint_stays_exact_and_the_weights_are_not_written(checkpoint, tmp_path):
    whole, small = load_model(str(checkpoint)), load_model(str(checkpoint), dtype="int8")
    assert small.fingerprint == whole.fingerprint
    small.save_pretrained(tmp_path / "saved")
    again = CLaRaForRAG.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.compress(DOCUMENTS), whole.compress(DOCUMENTS))
    for write in (
        lambda: small.save_pretrained(tmp_path / "whole", include_backbone=True),
        lambda: merge_generator(small, tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="quantised"):
            write()
    twin = copy.deepcopy(small)
    assert torch.equal(twin.compress(DOCUMENTS), small.compress(DOCUMENTS))


def test_a_backbone_in_bfloat16_is_rounded_from_what_is_there(checkpoint):
    whole = load_model(str(checkpoint))
    small = quantize_model(load_model(str(checkpoint), dtype="bfloat16"))
    assert small.fingerprint == whole.fingerprint and small.memory_embeddings.equal(whole.memory_embeddings)
    memory, expected = small.compress(DOCUMENTS).flatten(1), whole.compress(DOCUMENTS).flatten(1)
    assert torch.cosine_similarity(memory, expected).min() > 0.99


def test_weights_that_are_rounded_or_merged_are_refused(checkpoint):
    with pytest.raises(ValueError, match="must have unmerged Linear layers on cpu"):
        quantize_model(load_model(str(checkpoint), dtype="int8"))
    model = load_model(str(checkpoint))
    with model.bulk_answering(), pytest.raises(ValueError, match="unmerged"):
        quantize_model(model)
