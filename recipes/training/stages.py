"""The stages of training: one record says all that tells a stage from the others.

A new stage is a new entry of `STAGES`, in this file alone. Sections 2 and 3 of the paper have pretrain, instruct and
joint; contrastive is a warm-up of the reasoner, and text the baseline that reads the documents' text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from modeling_clara import CLaRaConfig, CLaRaProcessor
from recipes.training.collators import ReadingCollator, SelectingCollator, TextCollator
from recipes.training.memories import DocumentMemories


@dataclass
class Batching:
    """What the batches of a run are made with.

    Args:
        processor, config: of the model.
        n_queries: questions of a record that the reasoner encodes for the contrastive term of a stage that reads.
        text_share: of the records that read one document as text.
        store: memories of the candidates; None compresses them in the step.
        num_candidates: documents that a stage selects from.
        from_corpus: the trainer searches the candidates.
        in_batch_negatives: the documents of the other rows are candidates of the contrastive term.
    """

    processor: CLaRaProcessor
    config: CLaRaConfig
    n_queries: int = 0
    text_share: float = 0.0
    store: DocumentMemories | None = None
    num_candidates: int = 20
    from_corpus: bool = False
    in_batch_negatives: bool = False


@dataclass(frozen=True)
class Stage:
    """What a stage is.

    Args:
        roles: that train unless `trainable_roles` names others; memory-token embeddings go with the compressor.
        losses: "lm" (next-token cross entropy of the answers), "alignment" (L_MSE, with `alignment_weight`),
            "contrastive" (InfoNCE, with `contrastive_weight`; alone it is the whole loss).
        collator: makes the batches.
        selects: the reasoner chooses among candidates, which the rows give or a corpus; else all documents are read.
        reads_text: prompts have the documents' text instead of their memories.
        needs_gold: rows must name their gold documents (`pos_index`).
        learns_gold_answers: of a row with a teacher's and a gold answer it learns the gold one.
        start: "backbone" if the stage begins with fresh adapters, "checkpoint" if it goes on from an earlier stage.
    """

    roles: tuple[str, ...]
    losses: tuple[str, ...]
    collator: Callable[[Batching], ReadingCollator] = field(repr=False)
    selects: bool = False
    reads_text: bool = False
    needs_gold: bool = False
    learns_gold_answers: bool = False
    start: str = "checkpoint"

    @property
    def generates(self) -> bool:
        """Whether answers are generated and learned."""
        return "lm" in self.losses

    @property
    def reads_memories(self) -> bool:
        """Whether a step compresses the documents of a row and reads all of them from memory."""
        return not (self.selects or self.reads_text)

    @property
    def takes_paraphrases(self) -> bool:
        """Whether a target may have no question: a paraphrase selects nothing, and would copy a text."""
        return self.reads_memories


def read_memories(run: Batching) -> ReadingCollator:
    """Documents to compress and prompts that read all of them."""
    return ReadingCollator(run.processor, run.config.memory_sizes, n_queries=run.n_queries, text_share=run.text_share)


def read_texts(run: Batching) -> TextCollator:
    """Prompts with the documents' text."""
    return TextCollator(run.processor, run.config.memory_sizes, run.config.text_config.hidden_size)


def select(run: Batching, with_prompts: bool = True) -> SelectingCollator:
    """Questions and their candidates, and prompts with open slots."""
    return SelectingCollator(
        run.processor,
        run.config.memory_sizes,
        top_k=run.config.retrieval_top_k,
        store=run.store,
        from_corpus=run.from_corpus,
        with_prompts=with_prompts,
        num_candidates=run.num_candidates,
        in_batch_negatives=run.in_batch_negatives,
    )


def select_alone(run: Batching) -> SelectingCollator:
    """Questions and their candidates: nothing is generated."""
    return select(run, with_prompts=False)


STAGES = {
    "pretrain": Stage(
        roles=("compressor", "generator"),
        losses=("lm", "alignment", "contrastive"),
        collator=read_memories,
        start="backbone",
    ),
    "instruct": Stage(
        roles=("compressor", "generator"),
        losses=("lm", "alignment", "contrastive"),
        collator=read_memories,
    ),
    "contrastive": Stage(
        roles=("reasoner",),
        losses=("contrastive",),
        collator=select_alone,
        selects=True,
        needs_gold=True,
    ),
    "joint": Stage(
        roles=("reasoner", "generator"),
        losses=("lm", "contrastive"),
        collator=select,
        selects=True,
        learns_gold_answers=True,
    ),
    "text": Stage(
        roles=("generator",),
        losses=("lm",),
        collator=read_texts,
        reads_text=True,
        start="backbone",
    ),
}
