"""`clara --help` imports no library; everywhere else `import modeling_clara` registers the Auto classes at once."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_clara
from modeling_clara import cli
from modeling_clara.version import __version__

ROOT = Path(modeling_clara.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEAVY = {"torch", "transformers", "peft", "pyarrow", "numpy", "huggingface_hub", "safetensors", "tokenizers"}
SCRIPT = "import sys\nfrom modeling_clara.cli import main\nsys.exit(main())\n"  # as pip writes it
FRAMEWORKS = {"langchain_core", "llama_index", "haystack", "mteb", "modeling_clara.integrations"}
LOAD = "assert type(AutoModel.from_pretrained(sys.argv[1])) is modeling_clara.CLaRaForRAG\n"
LOAD += f"assert not sys.modules.keys() & {FRAMEWORKS}\n"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)


def imported(report: str) -> set[str]:
    """Packages in the report of `-X importtime`."""
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", report, re.M)}


@pytest.mark.parametrize("start", ["module", "script"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["nothing"], 2),
        *[([command.__name__.rpartition(".")[2], "--help"], 0) for command in cli.COMMANDS],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_imports_no_library(arguments, status, start, tmp_path):
    script = tmp_path / "clara"
    script.write_text(SCRIPT)
    done = run("-X", "importtime", *(["-m", "modeling_clara.cli"] if start == "module" else [str(script)]), *arguments)
    assert done.returncode == status
    assert "modeling_clara" in (found := imported(done.stderr)) and not found & HEAVY
    assert "usage: clara" in done.stdout + done.stderr or done.stdout == f"clara {__version__}\n"


@pytest.mark.parametrize(
    ("name", "imports"),
    [
        ("first.py", "import modeling_clara\nfrom transformers import AutoModel\n"),
        ("second.py", "from transformers import AutoModel\nimport modeling_clara\n"),
        (
            "clara",
            "from modeling_clara import CLaRaConfig\nfrom transformers import AutoModel\nimport modeling_clara\n",
        ),
    ],
)
def test_auto_classes_know_the_model_in_any_order_of_imports(name, imports, checkpoint, tmp_path):
    """Without remote code; and in the command's own process from its first use of a name."""
    script = tmp_path / name
    script.write_text("import sys\n" + imports + LOAD)
    done = run(str(script), str(checkpoint))
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_public_name_is_there_for_people_and_for_analysers():
    assert set(modeling_clara.__all__) <= set(dir(modeling_clara))
    for name in modeling_clara.__all__:
        assert getattr(modeling_clara, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'CLaRa'"):
        modeling_clara.CLaRa  # noqa: B018
    tree = ast.parse((ROOT / "modeling_clara" / "__init__.py").read_text(encoding="utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(modeling_clara.__all__) <= named
