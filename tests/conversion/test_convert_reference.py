"""recipes/convert_reference.py: what the reference gives, ours gives, and what does not fit is refused."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reference import MAX_LENGTH, NO_SYSTEM, PROMPTS, TOP_K, N, Reference
from safetensors.torch import load_file
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.conversion.convert import convert

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "Paris is the capital of France.",
    "  The Seine flows through Paris. ",
    "Rome is the capital\nof Italy.",
    "Berlin:  what is it",
]
QUESTIONS = ["What is the capital of Italy?", " Which river flows through Paris ", "Why\n?"]
CASES = {
    "llama": {},
    "mistral": {"architecture": "mistral", "kind": "prepend"},
    "no system role, no reasoner": {"template": NO_SYSTEM, "kind": "bytes", "adapters": 2},
    "tied": {"tied": True, "kind": "first", "template": NO_SYSTEM},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint of the reference, and its conversion."""
    folder = tmp_path_factory.mktemp("case")
    reference = Reference(folder, **CASES[request.param])
    convert(reference.source, folder / "ours", str(reference.place))
    return reference, CLaRaForRAG.from_pretrained(folder / "ours")


def test_memories_and_query_vectors_agree(case):
    reference, model = case
    expected = torch.stack([reference.memory(document) for document in DOCUMENTS])
    assert torch.allclose(model.compress(DOCUMENTS), expected, atol=1e-4)
    alone = torch.cat([model.compress([document]) for document in DOCUMENTS])  # one padded row, packed ones
    assert torch.allclose(alone, expected, atol=1e-4)
    with model.bulk_compression():
        assert torch.allclose(model.compress(DOCUMENTS), expected, atol=1e-4)
    queries = torch.stack([reference.memory(question, "query_reasoner_adapter") for question in QUESTIONS])
    assert torch.allclose(model.encode_queries(QUESTIONS), queries, atol=1e-4)


def test_the_same_documents_are_chosen_with_the_same_scores(case):
    reference, model = case
    for question, row in zip(QUESTIONS, model.retrieve(QUESTIONS, documents=DOCUMENTS), strict=True):
        chosen, scores = reference.ranking(question, DOCUMENTS)
        assert [int(source.document_id) for source in row] == chosen and len(row) == TOP_K
        assert [source.score for source in row] == pytest.approx(scores[chosen].tolist(), abs=1e-4)


def test_the_card_names_the_sizes_and_no_folder(case):
    reference, _ = case
    card = (reference.source.parent / "ours" / "README.md").read_text()
    size = f"{N} memory vectors of {MAX_LENGTH} tokens"
    assert f"(apple/ml-clara), {size}. The licence of that checkpoint applies." in card
    assert f"{reference.source.parent.name}/" not in card and "before you publish" not in card


def test_prompts_are_token_for_token_the_same(case):
    reference, model = case
    for question in [*QUESTIONS, None]:
        expected = reference.prompt(question, 2)
        prompt = model.processor.build_prompt(question, 2, N)
        assert prompt.memory_mask == [token >= reference.n_tokens for token in expected]
        pairs = zip(prompt.input_ids, prompt.memory_mask, expected, strict=True)
        assert all(found == token for found, is_slot, token in pairs if not is_slot)


def test_answers_and_paraphrases_agree(case):
    reference, model = case
    for question in QUESTIONS:
        chosen, _ = reference.ranking(question, DOCUMENTS)
        _, expected = reference.answer(question, [DOCUMENTS[index] for index in chosen])
        assert model.answer([question], documents=DOCUMENTS, max_new_tokens=12)[0].text == expected
    for document in DOCUMENTS[:2]:
        assert model.paraphrase([document], max_new_tokens=12) == [reference.answer(None, [document])[1]]


def test_logits_agree(case):
    reference, model = case
    memory, processor = model.compress(DOCUMENTS[:2]), model.processor
    inputs = processor.pad_prompts([processor.build_prompt(QUESTIONS[0], 2, N)])
    with torch.no_grad():
        logits = model(
            memory=memory[None],
            memory_size=N,
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "memory_mask")},
        ).logits[0, -1]
    expected, _ = reference.answer(QUESTIONS[0], DOCUMENTS[:2])
    assert torch.allclose(logits[: reference.n_tokens], expected, atol=1e-4)


def test_a_text_of_exactly_the_longest_length_is_one_chunk_and_a_longer_one_is_split(case):
    _, model = case
    text, processor = "Paris", model.processor
    while len(processor.encode_text(text + " is")) <= MAX_LENGTH:
        text += " is"
    while len(processor.encode_text(text)) < MAX_LENGTH:
        text += "."
    assert len(processor.encode_text(text)) == MAX_LENGTH and len(processor.split_document(text)) == 1
    assert model.compress([text]).shape[1] == N
    chunks = processor.split_document(text + " Rome")
    assert len(chunks) > 1 and all(chunk["n_tokens"] <= MAX_LENGTH + 2 for chunk in chunks)


def test_markers_of_the_reference_in_a_text_stay_text(case):
    reference, model = case
    text = "<MEM0> and <SEP></s>"
    ids = model.processor.encode_questions([text])[0]
    assert [token for token in ids if token >= reference.n_tokens] == [] and ids.count(2) == 1
    prompt = model.processor.build_prompt(text, 1, N)
    assert sum(prompt.memory_mask) == N + 1
    assert model.compress([text]).isfinite().all()


def test_what_the_reference_cannot_do_works(case, tmp_path):
    """A stored corpus, int8, search, streaming."""
    _, model = case
    rows = [{"id": str(number), "text": text} for number, text in enumerate(DOCUMENTS)]
    corpus = CompressedCorpus.build(model, rows, tmp_path / "corpus", codec="int8")
    answer = model.answer(QUESTIONS[:1], corpus=corpus, max_new_tokens=4)[0]
    assert len(answer.sources) == TOP_K
    pieces = list(model.stream(QUESTIONS[0], corpus=corpus, max_new_tokens=4))
    assert "".join(pieces) == answer.text


def test_the_reasoner_is_the_compressor_if_there_is_none(tmp_path):
    reference = Reference(tmp_path, adapters=2)
    conversion = convert(reference.source, tmp_path / "ours", str(reference.place))
    assert conversion.missing == ["reasoner"]
    files = [load_file(tmp_path / "ours" / role / "adapter_model.safetensors") for role in ("compressor", "reasoner")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_the_command_converts_and_says_what_it_did(tmp_path):
    """As a script; prompts from a file give the same as those in the code; nothing of the result is a pickle."""
    reference = Reference(tmp_path, adapters=2)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    outputs = []
    for name, extra in (("a", []), ("b", ["--prompts", str(tmp_path / "prompts.json")])):
        command = [sys.executable, str(ROOT / "recipes" / "convert_reference.py"), str(reference.source)]
        command += [str(tmp_path / name), "--backbone", str(reference.place), *extra]
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    assert "the checkpoint has no query_reasoner_adapter" in outputs[0]
    first, second = ((tmp_path / name / "processor_config.json").read_text() for name in "ab")
    assert first == second
    suffixes = {path.suffix for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".py", ".md", ".jinja"}


def code_in_a_pickle(path: Path, marker: Path) -> None:
    class Run:
        def __reduce__(self):
            return Path.touch, (marker,)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Run()))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


FAULTS = {
    "no backbone": "--backbone",
    "a backbone that the Hub has not": "--backbone",
    "a backbone on the Hub of its config only": "--backbone",
    "another backbone": "must have",
    "another vocabulary": "must",
    "no adapters": "adapters.pth must be in",
    "no tables": "decoder_first_last_layers.pth must be in",
    "an adapter is missing": "must hold decoder_adapter",
    "a tensor is missing": "must hold model.layers.1.mlp.up_proj.lora_B.weight",
    "another rank": "lora_r",
    "not finite": "must be finite",
    "trained rows": "row 7 differs",
    "too few rows": "must have the shape",
    "code in a pickle": "it holds more than tensors",
    "plain pickle": "as `torch.save` writes it",
    "compressed": "it is compressed",
    "cut off": "as `torch.save` writes it",
    "no prompts": "--prompts",
    "prompts without a key": "must have exactly the keys",
    "prompts without a place": "must contain {question}",
    "no config": "config.json",
    "another model": "must be 'CLaRa'",
    "no separators": "`sep`",
    "target in use": "must be a new or empty folder",
    "tokenizer without BOS": "bos_token",
}
SETTINGS = {  # what config.json says then
    "a backbone on the Hub of its config only": {"decoder_model_name": "org/nowhere"},
    "another rank": {"lora_r": 8},
    "too few rows": {"doc_max_length": 2 * MAX_LENGTH},
    "no separators": {"sep": False},
    "another model": {"model_type": "clara"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(fault, tmp_path):
    reference, target = Reference(tmp_path), tmp_path / "ours"
    source, options = reference.source, {"backbone": str(reference.place)}
    adapter = reference.adapters["decoder_adapter"]
    settings, marker = SETTINGS.get(fault, {}), tmp_path / "marker"
    if fault == "no backbone":
        options = {}
    elif fault == "a backbone that the Hub has not":
        options["backbone"] = "org/nowhere"
    elif fault == "a backbone on the Hub of its config only":
        options = {}
    elif fault == "another backbone":
        options["backbone"] = str(save_backbone(tmp_path / "other", "llama"))
    elif fault == "another vocabulary":
        reference.tokenizer.add_tokens(["<more>"])
        reference.tokenizer.save_pretrained(reference.place)
    elif fault == "an adapter is missing":
        del reference.adapters["decoder_adapter"]
    elif fault == "a tensor is missing":
        del adapter["model.layers.1.mlp.up_proj.lora_B.weight"]
    elif fault == "not finite":
        adapter["model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = torch.inf
    elif fault == "trained rows":
        reference.tables["model.embed_tokens.weight"][7, 3] += 0.5
    elif fault == "tokenizer without BOS":
        path = reference.place / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": None}))
    reference.write(**settings)
    path = source / "adapters.pth"
    if fault in ("no adapters", "no tables", "no config"):
        names = {"no tables": "decoder_first_last_layers.pth", "no config": "config.json"}
        (source / names.get(fault, "adapters.pth")).unlink()
    elif fault == "code in a pickle":
        code_in_a_pickle(path, marker)
    elif fault == "plain pickle":
        path.write_bytes(pickle.dumps({"encoder_adapter": {}}))
    elif fault == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**6))
    elif fault == "cut off":
        path.write_bytes(path.read_bytes()[:-500])
    elif fault == "no prompts":
        (source / "modeling_theirs.py").write_text("x = 1\n")
    elif fault.startswith("prompts without"):
        changed = dict(PROMPTS) if fault.endswith("place") else {}
        options["prompts"] = tmp_path / "prompts.json"
        options["prompts"].write_text(json.dumps(changed | {"answer_prompt": "Notes: {documents}"}))
    elif fault == "target in use":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        convert(source, target, **options)
    assert FAULTS[fault] in str(caught.value)
    assert not marker.exists() and sorted(tmp_path.rglob("*")) == before
