"""The public names of the package, and their registration with the Auto classes of transformers.

Importing this takes seconds, because it imports torch and transformers; `__init__.py` says when that happens.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .candidates_clara import Source
from .configuration_clara import ROLES, CLaRaConfig
from .generation_clara import Answer
from .generator import merge_generator
from .modeling_clara import CLaRaForRAG, CLaRaOutput
from .processing_clara import CLaRaProcessor

__all__ = ["ROLES", "Answer", "CLaRaConfig", "CLaRaForRAG", "CLaRaOutput", "CLaRaProcessor", "Source"]


def corpus_class():
    """`CompressedCorpus` that can also be changed; imported when it is first used, because it needs pyarrow."""
    from .corpus.corpus import CompressedCorpus

    return CompressedCorpus


AutoConfig.register("clara", CLaRaConfig)
AutoModel.register(CLaRaConfig, CLaRaForRAG)
AutoProcessor.register(CLaRaConfig, CLaRaProcessor)
CLaRaForRAG.corpus_class = staticmethod(corpus_class)
CLaRaForRAG.merge_generator = merge_generator
