"""`modeling_clara/demo.py` `load_model`: which model the demo takes. Stands beside tests/test_cli.py, which runs it.

It knows nothing of answers.
"""

import pytest
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, demo


@pytest.fixture
def fetched(backbone_folder, monkeypatch) -> list:
    """The backbone's folder in place of a download; how often it was asked for."""
    asked = []
    monkeypatch.setattr(demo, "fetch_backbone", lambda: asked.append(1) or backbone_folder)
    return asked


def test_a_trained_model_beside_the_package_gets_its_backbone(checkpoint, backbone_folder, fetched, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    model, is_trained = demo.load_model(None, None)
    assert is_trained and fetched == [1] and model.fingerprint == CLaRaForRAG.from_pretrained(checkpoint).fingerprint
    demo.load_model(None, str(backbone_folder))
    demo.load_model(str(checkpoint), None)  # its config.json names the backbone
    assert fetched == [1]


def test_another_backbone_gets_fresh_adapters(checkpoint, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    save_backbone(tmp_path, num_hidden_layers=3)
    model, is_trained = demo.load_model(None, str(tmp_path))
    assert not is_trained and model.config.text_config.num_hidden_layers == 3 and not fetched


def test_without_one_the_adapters_are_fresh(tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", tmp_path / "none")
    model, is_trained = demo.load_model(None, None)
    assert not is_trained and fetched == [1] and isinstance(model, CLaRaForRAG)
