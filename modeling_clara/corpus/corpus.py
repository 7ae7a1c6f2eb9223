"""`CompressedCorpus` of the installed package: the reader, and the calls that build, change and publish a corpus.

Each call is a function of a module beside this one; its first argument is the corpus.
"""

from ..corpus_clara import CompressedCorpus as Reader
from . import build, changes, compact, milvus, publish, sync, verify


class CompressedCorpus(Reader):
    __doc__ = Reader.__doc__

    build, is_complete = classmethod(build.build), staticmethod(build.is_complete)
    add, update, upsert, delete, sync = changes.add, changes.update, changes.upsert, changes.delete, sync.sync
    compact, convert = compact.compact, compact.convert
    verify, record_measurement = verify.verify, changes.record_measurement
    push_to_hub = publish.push_to_hub
    milvus_index = staticmethod(milvus.index_maker)
