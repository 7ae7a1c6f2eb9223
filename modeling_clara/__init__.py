"""CLaRa: documents compressed once into memory tokens, retrieved and read in one space (arXiv 2511.18659).

The package's public names. Importing it lets the Auto classes of transformers load CLaRa checkpoints without remote
code. `CompressedCorpus` is imported when it is first used, because it needs the extra `corpus`.
"""

import sys
from os.path import basename
from typing import TYPE_CHECKING

from .version import __version__

__all__ = [
    "ROLES",
    "__version__",
    "Answer",
    "CLaRaConfig",
    "CLaRaForRAG",
    "CLaRaOutput",
    "CLaRaProcessor",
    "CompressedCorpus",
    "Source",
]

# Registration takes the seconds that torch and transformers take to import. It must not wait for a first use: who
# imports this package and then calls `AutoModel` uses no name of ours. Only the process of the command line waits,
# so that `clara --help` answers at once. Its commands take what they need from here, and the first name registers.
# (While `python -m` looks for its module, sys.argv[0] is "-m".)
_program = basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
_IS_COMMAND = _program in ("clara", "clara.exe") or (_program == "-m" and "modeling_clara.cli" in sys.orig_argv)

if TYPE_CHECKING or not _IS_COMMAND:
    from .names import ROLES, Answer, CLaRaConfig, CLaRaForRAG, CLaRaOutput, CLaRaProcessor, Source
if TYPE_CHECKING:
    from .corpus.corpus import CompressedCorpus


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import names

    return names.corpus_class() if name == "CompressedCorpus" else getattr(names, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
