"""Corpora in clean processes: read by remote code without the package, and what is imported when."""

import json
import subprocess
import sys

import pytest
from corpora import ENVIRONMENT, PACKAGE
from test_corpus_model import QUESTIONS, TEXTS
from tiny import randomize_adapters

from modeling_clara import CompressedCorpus


def run(folder, *arguments, **environment) -> str:
    """What a Python process prints that starts in a folder."""
    options = {"env": ENVIRONMENT | environment, "cwd": folder, "stdin": subprocess.DEVNULL}
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


SCRIPT = """
import json, sys
sys.modules["modeling_clara"] = None  # an import of the package fails
from transformers import AutoModel
checkpoint, own, foreign, questions, package = map(json.loads, sys.argv[1:])
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
model.answer(questions[:1], documents=["Rome is old."], max_new_tokens=2)
optional = {"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"} & set(sys.modules)
assert not optional, optional
corpus = model.load_corpus(own)
assert type(corpus).__module__.startswith("transformers_modules."), type(corpus)
options = {"top_k": 3, "max_new_tokens": 8}
answers = [
    (answer.text, [(source.document_id, source.score) for source in answer.sources])
    for view in (corpus, corpus.with_options(hybrid=True, where={"n": {"$lt": 7}}))
    for answer in model.answer(questions, corpus=view, **options)
]
refused = 0
try:
    model.load_corpus(foreign)
except ValueError as error:
    refused += "fingerprint" in str(error)
refusals = []
for call in (
    lambda: corpus.add(["Rome is new."]),
    lambda: corpus.update([{"id": "0", "text": "Rome is new."}]),
    lambda: corpus.delete(["0"]),
    lambda: corpus.compact(),
    lambda: corpus.convert("int4"),
    lambda: corpus.verify(),
    lambda: corpus.push_to_hub("org/corpus"),
    lambda: type(corpus).build(model, ["Rome is new."], "elsewhere"),
    lambda: model.load_corpus(own, backend="milvus"),
):
    try:
        call()
    except ImportError as error:
        refusals.append(str(error))
n_documents = len(corpus)
# A user may also have the package and open corpora with its class.
del sys.modules["modeling_clara"]
sys.path.insert(0, package)
from modeling_clara import CompressedCorpus
mixed = model.answer(questions, corpus=CompressedCorpus.open(own), **options)
try:
    model.retrieve(questions, corpus=CompressedCorpus.open(foreign))
except ValueError as error:
    refused += "fingerprint" in str(error)
print(json.dumps([answers, [answer.text for answer in mixed], n_documents, refused, refusals]))
"""


def test_a_checkpoint_brings_the_code_that_reads_corpora(shared_model, checkpoint, model, tmp_path):
    own = CompressedCorpus.build(shared_model, TEXTS, tmp_path / "own", codec="float16")
    randomize_adapters(model, seed=5)  # another compressor
    foreign = CompressedCorpus.build(model, TEXTS, tmp_path / "foreign")
    given = [str(checkpoint), str(own.folder), str(foreign.folder), QUESTIONS, str(PACKAGE)]
    printed = run(tmp_path, "-I", "-c", SCRIPT, *map(json.dumps, given))
    answers, mixed, n_documents, refused, refusals = json.loads(printed)
    options = {"top_k": 3, "max_new_tokens": 8}
    expected = shared_model.answer(QUESTIONS, corpus=own, **options)
    expected += shared_model.answer(
        QUESTIONS, corpus=own.with_options(hybrid=True, where={"n": {"$lt": 7}}), **options
    )
    for (text, sources), answer in zip(answers, expected, strict=True):
        assert text == answer.text
        assert [name for name, _ in sources] == [source.document_id for source in answer.sources]
        assert [score for _, score in sources] == pytest.approx([source.score for source in answer.sources], abs=1e-5)
    assert mixed == [answer.text for answer in expected[:3]]
    assert (n_documents, refused) == (8, 2)
    names = ["add", "update", "delete", "compact", "convert", "verify", "push_to_hub", "build"]
    names += ["open(backend='milvus')"]
    assert [refusal.split("`")[1] for refusal in refusals] == [f"CompressedCorpus.{name}" for name in names]
    assert all("install it from a clone of the repository" in refusal for refusal in refusals)
    assert not (tmp_path / "elsewhere").exists() and len(CompressedCorpus.open(own.folder)) == 8


PACKAGE_SCRIPT = """
import sys
import modeling_clara
from modeling_clara import CLaRaForRAG
def optional():
    return {"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"} & set(sys.modules)
assert not optional(), optional()
model = CLaRaForRAG.from_pretrained(sys.argv[1])
model.answer(["What is old?"], documents=["Rome is old."], max_new_tokens=2)
assert not optional(), optional()
assert "CompressedCorpus" in modeling_clara.__all__
corpus = model.load_corpus(sys.argv[2])
assert type(corpus) is modeling_clara.CompressedCorpus and "pyarrow" in optional()
assert corpus.add([{"id": "new", "text": "Rome is new.", "n": 9}]).n_documents == 1
"""


def test_the_package_imports_what_is_optional_when_a_corpus_is_opened(shared_model, checkpoint, tmp_path):
    own = CompressedCorpus.build(shared_model, TEXTS, tmp_path / "own", codec="float16")
    run(tmp_path, "-c", PACKAGE_SCRIPT, str(checkpoint), str(own.folder), PYTHONPATH=str(PACKAGE))
    assert "new" in CompressedCorpus.open(own.folder)
