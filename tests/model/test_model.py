"""The same properties on seven architectures, three kinds of prompt, tied and untied embeddings, with and without BOS.

And `forward`: what it selects, what it reads, what it refuses.
"""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from test_hub_loading import observe
from tiny import ARCHITECTURES, DOCUMENTS, QUESTIONS, TEMPLATES, randomize_adapters, save_backbone

import modeling_clara
from modeling_clara import CLaRaConfig, CLaRaForRAG
from modeling_clara.packing_clara import can_pack
from recipes.benchmarks.training import padded_passes

CASES = [
    ("llama", "system", False, True),
    ("mistral", "no_system", True, False),
    ("qwen2", "system", False, False),
    ("qwen3", "none", False, True),
    ("phi3", "no_system", False, False),
    ("gemma2", "no_system", True, True),
    ("gpt_neox", "none", True, False),
    ("llama", "none", True, False),
]
assert {case[0] for case in CASES} == set(ARCHITECTURES) and {case[1] for case in CASES} == set(TEMPLATES)
WINDOWS = ("llama", "system", False, True, "windows")


@pytest.fixture(scope="module", params=[*CASES, WINDOWS], ids=lambda case: "-".join(map(str, case)))
def any_model(request, tmp_path_factory):
    architecture, template, bos, tied, *layout = request.param
    folder = tmp_path_factory.mktemp(architecture)
    save_backbone(folder, architecture, template=template, bos=bos, tied=tied)
    torch.manual_seed(0)
    fields = {"memory_layout": layout[0]} if layout else {}
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(1, 2, 4), lora_rank=2, config_kwargs=fields)
    randomize_adapters(model)
    return model


def test_a_memory_is_nested_and_depends_neither_on_its_batch_nor_on_packing(any_model):
    """Where packing applies it changes nothing; Gemma's eager attention never packs. The roles differ."""
    whole, near = any_model.compress(DOCUMENTS), {"atol": 1e-5, "rtol": 1e-4}
    assert whole.shape == (4, 4, 32) and whole.dtype == torch.float32
    for k in (1, 2):
        torch.testing.assert_close(any_model.compress(DOCUMENTS, memory_size=k), whole[:, :k], **near)
    for index, document in enumerate(DOCUMENTS):
        torch.testing.assert_close(any_model.compress([document])[0], whole[index], **near)
    assert can_pack(any_model.backbone, 100) != (any_model.config.text_config.model_type == "gemma2")
    queries = any_model.encode_queries(QUESTIONS)
    with padded_passes():
        torch.testing.assert_close(any_model.compress(DOCUMENTS), whole, **near)
        torch.testing.assert_close(any_model.encode_queries(QUESTIONS), queries, **near)
    assert not torch.allclose(any_model.compress(QUESTIONS), queries, atol=1e-3)


def test_answers_do_not_depend_on_the_batch(any_model):
    questions = ["Paris?", "What is the capital of Germany, and how many people live there?", "Rome"]
    together = any_model.answer(questions, documents=DOCUMENTS, max_new_tokens=6)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = any_model.answer([question], documents=DOCUMENTS, max_new_tokens=6)
        assert alone.text == answer.text
        assert [source.document_id for source in alone.sources] == [source.document_id for source in answer.sources]


def test_training_step_reaches_every_role(any_model):
    """With windows the memory tokens are of questions alone."""
    model, documents = copy.deepcopy(any_model).train(), [["Paris.", "Rome."], ["Berlin is a city."]]
    output = model(**model.processor(["Which?", None], documents, ["a", "b"], memory_size=2), memory_size=2)
    is_windows = model.config.memory_layout == "windows"
    assert (output.alignment_loss is None) == is_windows
    torch.testing.assert_close(output.loss, output.lm_loss + (0 if is_windows else 0.1 * output.alignment_loss))
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grads[name] is not None for name in grads if ".compressor." in name or ".generator." in name)
    assert all(grads[name] is None for name in grads if ".reasoner." in name)
    if is_windows:
        assert (grads["residual_scale"] != 0).all() and grads["memory_embeddings"] is None
    else:
        assert grads["memory_embeddings"][:2].abs().sum() > 0 and grads["memory_embeddings"][2:].abs().sum() == 0


def test_save_and_reload_is_bit_equal(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    assert observe(CLaRaForRAG.from_pretrained(tmp_path)) == observe(any_model)


@pytest.fixture
def joint_inputs(shared_model) -> dict:
    documents = [["Paris.", "Rome is far.", "x y"], ["Oslo."]]
    return dict(shared_model.processor(["Which city?", "What?"], documents, ["a", "b c"], memory_size=4, top_k=2))


@torch.no_grad()
def test_forward_selects_by_score_and_pads_what_is_missing(shared_model, joint_inputs):
    """On whichever side padding stands."""
    output = shared_model(**joint_inputs)
    assert output.scores.shape == (2, 3) and output.selected.shape == (2, 2)
    assert output.selected[0].tolist() == output.scores[0].topk(2).indices.tolist()
    assert output.scores[1].isinf().tolist() == [False, True, True]
    assert output.selected[1].tolist() == [0, -1]
    torch.testing.assert_close(output.loss, output.lm_loss)  # stage 3: the language-modelling loss alone
    for name in ("document", "query"):
        ids, mask = f"{name}_input_ids", f"{name}_attention_mask"
        order = joint_inputs[mask].argsort(dim=-1, stable=True)
        joint_inputs |= {key: joint_inputs[key].gather(-1, order) for key in (ids, mask)}
    left = shared_model(**joint_inputs)
    torch.testing.assert_close(left.loss, output.loss)
    assert torch.equal(left.selected, output.selected)


@torch.no_grad()
def test_forward_reads_given_memories_like_the_texts_themselves(shared_model, joint_inputs):
    """Also a question's of documents that are compressed here, whose alignment loss is no part of stage 3."""
    whole = shared_model(**joint_inputs)
    query, lengths = joint_inputs.pop("query_input_ids"), joint_inputs.pop("query_attention_mask").sum(-1)
    query = shared_model.encode("reasoner", query, lengths, shared_model.config.retrieval_memory_size)[0]
    given = shared_model(**joint_inputs, query_memory=query)
    torch.testing.assert_close(given.loss, whole.loss)
    assert torch.equal(given.loss, given.lm_loss) and given.alignment_loss > 0
    mask = joint_inputs.pop("document_attention_mask").any(-1)
    del joint_inputs["document_input_ids"]
    given = shared_model(**joint_inputs, query_memory=query, memory=whole.memory, document_mask=mask)
    torch.testing.assert_close((given.loss, given.logits), (whole.loss, whole.logits))


def test_the_head_runs_on_target_positions_only(any_model):
    """The targets' logits and the loss are those of the whole prompt, soft capping and scaling included."""
    batch = any_model.processor(
        ["Where?", "What is the capital?"], [["Paris"], ["Rome is old"]], ["a", "here and there"], memory_size=2
    )
    rows = []
    head = any_model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:-1].numel()))
    with torch.no_grad():
        whole = any_model(**{name: value for name, value in batch.items() if name != "labels"}, memory_size=2).logits
        output = any_model(**batch, memory_size=2)
    hook.remove()
    is_target = batch["labels"][:, 1:] != -100
    assert whole.shape[:2] == batch["input_ids"].shape and rows == [batch["input_ids"].numel(), int(is_target.sum())]
    torch.testing.assert_close(output.logits, whole[:, :-1][is_target], atol=1e-5, rtol=1e-4)
    wanted = torch.nn.functional.cross_entropy(whole[:, :-1][is_target].float(), batch["labels"][:, 1:][is_target])
    torch.testing.assert_close(output.lm_loss, wanted, atol=1e-5, rtol=1e-5)
    assert not head._forward_pre_hooks


def test_without_a_prompt_the_loss_is_the_contrastive_one(shared_model):
    batch = shared_model.processor(["Where is Rome?"], [["Paris", "Rome is old", "Oslo"]], memory_size=4, top_k=2)
    inputs = {name: value for name, value in batch.items() if name.startswith(("document_", "query_"))}
    output = shared_model(**inputs, positive_mask=torch.tensor([[False, True, False]]))
    logits = output.scores / shared_model.config.retrieval_temperature
    torch.testing.assert_close(output.loss, logits.logsumexp(-1)[0] - logits[0, 1])
    assert output.logits is None and shared_model(**inputs).loss is None


def test_a_frozen_compressor_runs_without_dropout(model):
    batch = model.processor(["Where?"], [["Paris", "Rome is old"]], memory_size=4, top_k=2)
    model.train()
    model.set_trainable_roles(("reasoner", "generator"))
    first, second = (model(**batch, memory_size=4) for _ in range(2))
    assert torch.equal(first.memory, second.memory) and not torch.equal(first.scores, second.scores)
    assert model.training and not first.memory.requires_grad
    model.set_trainable_roles(("compressor",))
    assert not torch.equal(*(model(**batch, memory_size=4).memory for _ in range(2)))


def test_forward_names_contradicting_inputs(shared_model, joint_inputs):
    with pytest.raises(ValueError, match="`document_input_ids` or `memory` must be given"):
        shared_model(**joint_inputs, memory=torch.zeros(2, 3, 4, 32))
    with pytest.raises(ValueError, match="`memory` must have at least 4 vectors, got 2"):
        shared_model(memory=torch.zeros(2, 3, 2, 32))
    with pytest.raises(ValueError, match="`memory_size` must be one of .*got 3"):
        shared_model(**joint_inputs, memory_size=3)
    with pytest.raises(ValueError, match="`query_rows` must come with"):
        shared_model(**joint_inputs, query_rows=torch.zeros(2, dtype=torch.long))
    joint_inputs["memory_mask"] = joint_inputs["memory_mask"].roll(1, 0)
    with pytest.raises(ValueError, match=r"memory_mask\[0\]` must mark 10 slots"):
        shared_model(**joint_inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_sizes": ()}, "memory_sizes"),
        ({"memory_sizes": (8, 4)}, "ascending"),
        ({"memory_sizes": (0, 4)}, ">= 1"),
        ({"memory_layout": "rows"}, r"`memory_layout` must be one of \['tokens', 'windows'\], got 'rows'"),
        ({"memory_layout": "windows", "memory_sizes": (4, 12)}, "the smallest times powers of two.*got \\[4, 12\\]"),
        ({"memory_sizes": (4,), "retrieval_memory_size": 8}, "retrieval_memory_size"),
        ({"retrieval_top_k": 0}, "retrieval_top_k"),
        ({"retrieval_temperature": 0.0}, "retrieval_temperature"),
        ({"min_score": 1.5}, "`min_score` must be None or a cosine from -1 to 1, got 1.5"),
        ({"min_score": float("nan")}, "min_score"),
        ({"overlap_weight": -0.1}, "`overlap_weight` must be a number from 0 to 1, got -0.1"),
        ({"overlap_weight": float("nan")}, "overlap_weight"),
        ({"alignment_weight": -1.0}, "alignment_weight"),
        ({"contrastive_weight": -1.0}, "contrastive_weight"),
        ({"document_max_length": 4}, "document_max_length"),
        ({"format_version": 99}, "format_version.*must be 1, got 99.*Update"),
        ({"lora": {"compressor": {}}}, "roles"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        CLaRaConfig(**fields)


def test_every_config_field_is_read_by_the_package():
    own = set(CLaRaConfig.__annotations__) - {"config", "model_type", "sub_configs_defaults", "format_version"}
    paths = Path(inspect.getfile(modeling_clara)).parent.glob("*.py")
    code = "\n".join(path.read_text() for path in paths if path.name != "configuration_clara.py")
    assert not {field for field in own if not re.search(rf"config\.{field}\b", code)}


def test_fresh_memory_tokens_are_like_token_embeddings_and_the_same_each_time(backbone_folder):
    model, again = (CLaRaForRAG.from_backbone(backbone_folder) for _ in range(2))
    table = model.get_input_embeddings().weight
    assert table is model.backbone.get_input_embeddings().weight
    assert 0.5 < (model.memory_embeddings.std() / table.std()).item() < 2
    assert torch.equal(model.memory_embeddings, again.memory_embeddings)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
