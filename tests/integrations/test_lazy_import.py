"""A framework that is not installed is named, with its extra; that none is imported at once is tested in tests/cli."""

import importlib
import sys

import pytest

import modeling_clara.integrations.retrieval


@pytest.mark.parametrize(
    ("extra", "package", "name"),
    [
        ("langchain", "langchain_core", "langchain-core"),
        ("llama-index", "llama_index", "llama-index-core"),
        ("haystack", "haystack", "haystack-ai"),
        ("mteb", "mteb", "mteb"),
    ],
)
def test_a_missing_framework_is_named(extra, package, name, monkeypatch):
    module = f"{modeling_clara.integrations.__name__}.{extra.replace('-', '_')}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for known in [package, *(known for known in sys.modules if known.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, known, None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"`{module}` needs {name}: pip install {name}, or the extra `{extra}`"):
        importlib.import_module(module)
