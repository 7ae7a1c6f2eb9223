"""CLaRa: documents compressed once into memory tokens, retrieved and read in one space (arXiv 2511.18659).

The package's public names. Importing it lets the Auto classes of transformers load CLaRa checkpoints without remote
code. `CompressedCorpus` is imported when it is first used, because it needs the extra `corpus`.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .candidates_clara import Source
from .configuration_clara import ROLES, CLaRaConfig
from .generation_clara import Answer
from .modeling_clara import CLaRaForRAG, CLaRaOutput
from .processing_clara import CLaRaProcessor
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


def _corpus_class():
    from .corpus.corpus import CompressedCorpus

    return CompressedCorpus


def __getattr__(name: str):
    if name == "CompressedCorpus":
        return _corpus_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register("clara", CLaRaConfig)
AutoModel.register(CLaRaConfig, CLaRaForRAG)
AutoProcessor.register(CLaRaConfig, CLaRaProcessor)
CLaRaForRAG.corpus_class = staticmethod(_corpus_class)  # corpora that this package opens can also be changed
