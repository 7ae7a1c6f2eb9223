"""CLaRa: documents compressed once into memory tokens, retrieved and read in one space (arXiv 2511.18659).

The package's public names. Importing it lets the Auto classes of transformers load CLaRa checkpoints without
remote code.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .candidates_clara import Source
from .configuration_clara import ROLES, CLaRaConfig
from .corpus_clara import CompressedCorpus
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

AutoConfig.register("clara", CLaRaConfig)
AutoModel.register(CLaRaConfig, CLaRaForRAG)
AutoProcessor.register(CLaRaConfig, CLaRaProcessor)
