"""The stages of training: one record says all that tells a stage from the others.

A stage of other roles, losses or documents is a new entry of `STAGES`, in this file alone. Sections 2 and 3 of the
paper have pretrain, instruct and joint; contrastive is a warm-up of the reasoner, and text the baseline that reads the
documents' text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What a stage is.

    Of its losses, "lm" is the next-token cross entropy of the answers, "alignment" L_MSE (with `alignment_weight`) and
    "contrastive" InfoNCE (with `contrastive_weight`; alone it is the whole loss).
    """

    # train unless `trainable_roles` names others; memory-token embeddings go with the compressor
    roles: tuple[str, ...]
    losses: tuple[str, ...]
    # the reasoner chooses among candidates of the row or of a corpus; else all documents are read
    selects: bool = False
    reads_text: bool = False  # prompts have the documents' text instead of their memories
    needs_gold: bool = False  # rows must name their gold documents (`pos_index`)
    learns_gold_answers: bool = False  # of a row with a teacher's and a gold answer it learns the gold one
    start: str = "checkpoint"  # of an earlier stage, or "backbone" if the stage begins with fresh adapters

    @property
    def generates(self) -> bool:
        """Whether answers are generated and learned."""
        return "lm" in self.losses

    @property
    def reads_memories(self) -> bool:
        """Whether a step compresses the documents of a row and reads all of them from memory.

        Only then may a target have no question: a paraphrase selects nothing, and would copy a text.
        """
        return not (self.selects or self.reads_text)


STAGES = {
    "pretrain": Stage(("compressor", "generator"), ("lm", "alignment", "contrastive"), start="backbone"),
    "instruct": Stage(("compressor", "generator"), ("lm", "alignment", "contrastive")),
    "contrastive": Stage(("reasoner",), ("contrastive",), selects=True, needs_gold=True),
    "joint": Stage(("reasoner", "generator"), ("lm", "contrastive"), selects=True, learns_gold_answers=True),
    "text": Stage(("generator",), ("lm",), reads_text=True, start="backbone"),
}
