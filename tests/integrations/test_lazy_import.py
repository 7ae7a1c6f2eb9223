"""No framework is imported before its own module is, and one that is not installed is named with its extra."""

import os
import subprocess
import sys
from pathlib import Path

import modeling_clara

ROOT = Path(modeling_clara.__file__).parents[1]
CODE = """
import importlib, sys
import modeling_clara, modeling_clara.integrations.retrieval
extras = {
    "langchain": ("langchain_core", "langchain-core"),
    "llama-index": ("llama_index", "llama-index-core"),
    "haystack": ("haystack", "haystack-ai"),
    "mteb": ("mteb", "mteb"),
}
assert not sys.modules.keys() & {package for package, _ in extras.values()}
for extra, (package, name) in extras.items():
    sys.modules[package] = None  # as if it were not installed
    try:
        importlib.import_module("modeling_clara.integrations." + extra.replace("-", "_"))
    except ImportError as error:
        assert f"pip install {name}, or the extra `{extra}`" in str(error), error
    else:
        raise AssertionError(extra)
"""


def test_frameworks_are_imported_when_they_are_used_and_named_when_they_are_missing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
