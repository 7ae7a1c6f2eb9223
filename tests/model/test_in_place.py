"""Texts that are encoded in their place, with BOS, EOS and a start embedding: by every way, saved and trained."""

import json

import pytest
import torch
from tiny import DOCUMENTS, QUESTIONS, build_backbone, randomize_adapters
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_clara import CLaRaForRAG
from modeling_clara.text_clara import PlainEncoder

IN_PLACE = {"encode_in_place": True, "add_bos_token": True, "add_eos_token": True, "document_overlap": 8}
TEXTS = ["Paris", " Paris is ", "is  it\nRome", "x"]


@pytest.fixture(scope="module", params=["tokens", "windows"])
def model(request, backbone_folder):
    torch.manual_seed(0)
    fields = {"document_max_length": 64, "start_embedding": True, "memory_layout": request.param}
    model = CLaRaForRAG.from_backbone(
        backbone_folder, memory_sizes=(2, 4), lora_rank=4, config_kwargs=fields, processor_kwargs=IN_PLACE
    )
    randomize_adapters(model)
    return model


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes blanks as ▁ and puts one in front of its input or of every piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([*TEXTS, *QUESTIONS, "abcdefghijklmnopqrstuvwxyz"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["first", "always", "never", "prepend"])
def test_a_text_is_encoded_as_after_a_special_token(kind):
    tokenizer = sentencepiece_like(kind)
    first, later = PlainEncoder(tokenizer), PlainEncoder(tokenizer, is_first=False)
    for text in TEXTS:
        whole = tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]
        assert [1, *later.encode(text, "text")[0]] == whole
        assert later.encode_many([text], ["text"]) == [later.encode(text, "text")[0]]
        assert first.encode(text, "text")[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_memories_do_not_hang_on_the_way(model):
    """Packed, padded, one by one, merged and by `forward`."""
    documents = DOCUMENTS[:3]
    memory = model.compress(documents)
    assert torch.allclose(torch.cat([model.compress([document]) for document in documents]), memory, atol=1e-5)
    model.backbone.set_attn_implementation("eager")  # not packed
    try:
        assert torch.allclose(model.compress(documents), memory, atol=1e-5)
    finally:
        model.backbone.set_attn_implementation("sdpa")
    with model.bulk_compression():
        assert torch.allclose(model.compress(documents), memory, atol=1e-5)
    batch = model.processor([None], [documents], memory_size=4)
    with torch.no_grad():
        assert torch.allclose(model(**batch, memory_size=4).memory[0], memory, atol=1e-5)


def test_the_start_embedding_and_the_layout_count(model):
    """They change memories and query vectors, and with them the fingerprint."""
    memory, query, fingerprint = model.compress(DOCUMENTS), model.encode_queries(QUESTIONS), model.fingerprint
    before = model.start_embedding.data.clone()
    model.start_embedding.data += 1
    try:
        assert not torch.allclose(model.compress(DOCUMENTS), memory, atol=1e-3)
        assert not torch.allclose(model.encode_queries(QUESTIONS), query, atol=1e-3)
        assert model.fingerprint != fingerprint
    finally:
        model.start_embedding.data = before
    model.processor.encode_in_place = False
    try:
        assert model.fingerprint != fingerprint
    finally:
        model.processor.encode_in_place = True
    assert model.fingerprint == fingerprint


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CLaRaForRAG.from_pretrained(tmp_path)
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.compress(DOCUMENTS), model.compress(DOCUMENTS))
    options = {"documents": DOCUMENTS, "max_new_tokens": 4}
    assert again.answer(QUESTIONS, **options) == model.answer(QUESTIONS, **options)


def test_the_start_embedding_trains_with_the_compressor(model):
    batch = model.processor(["Why?"], [DOCUMENTS[:2]], ["so"], memory_size=4)
    for roles, trains in ((["compressor"], True), (["generator"], False)):
        model.zero_grad()
        model.set_trainable_roles(roles)
        model(**batch, memory_size=4).loss.backward()
        assert (model.start_embedding.grad is not None) == trains
    model.zero_grad()


def test_chunks_of_a_long_text_fit_and_cover_it(model):
    words = [f"w{number}" for number in range(200)]
    document = {"title": "A title", "text": " ".join(words)}
    chunks = model.processor.split_document(document)
    assert len(chunks) > 2 and {chunk["title"] for chunk in chunks} == {"A title"}
    assert {word for chunk in chunks for word in chunk["text"].split()} == set(words)
    ids = model.processor.encode_documents(chunks)
    assert [len(row) for row in ids] == [chunk["n_tokens"] for chunk in chunks]
    assert max(map(len, ids)) <= 64 + 2  # BOS and EOS, which were asked for, do not count
    assert model.compress(chunks).isfinite().all()


def test_a_tokenizer_without_the_token_that_is_asked_for_is_refused(model):
    tokenizer = sentencepiece_like("first")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have a eos_token for `add_eos_token`"):
        type(model.processor)(tokenizer, **IN_PLACE)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_saved_tokenizer_cuts_texts_as_before(legacy, tmp_path):
    """The class of Llama's tokenizer builds its parts from settings that it does not save."""
    folder = tmp_path / "backbone"
    tokenizer = sentencepiece_like("prepend" if legacy else "first")
    tokenizer.save_pretrained(folder)
    build_backbone(vocabulary=len(tokenizer)).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    path.write_text(json.dumps(settings | {"add_bos_token": True, "add_eos_token": False}))
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "LlamaTokenizer"
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(2,), lora_rank=2)
    model.save_pretrained(tmp_path / "model")
    again = CLaRaForRAG.from_pretrained(tmp_path / "model")
    assert again.fingerprint == model.fingerprint
    assert again.processor.encode_documents(TEXTS) == model.processor.encode_documents(TEXTS)
    assert again.processor.encode_questions(TEXTS) == model.processor.encode_questions(TEXTS)
