"""CLaRaConfig: the numbers that define a checkpoint, as they stand in its config.json.

A value out of its range is an error that names the field and the rule.
"""

from collections.abc import Iterator

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

FORMAT_VERSION = 1
MEMORY_LAYOUTS = ("tokens", "windows")
ROLES = ("compressor", "reasoner", "generator")
MEMORY_STATISTICS = ("memory_shift", "memory_scale")  # (hidden,) each, where `memory_normalization` is set
# The last two only with the layout "windows" and with `start_embedding`.
TRAINED_ROWS = ("memory_embeddings", "separator_embedding", "residual_scale", "start_embedding")
LORA_SETTINGS = ("rank", "alpha", "dropout", "target_modules")


class WindowError(ValueError):
    """A prompt does not fit into the backbone's window; the message says what to shorten or lower."""


@strict
class CLaRaConfig(PreTrainedConfig):
    """Configuration of `CLaRaForRAG` (arXiv 2511.18659); what a field must be is a ValueError that names it.

    Args:
        format_version: layout of the checkpoint folder; a reader refuses what it does not know.
        text_config: configuration of the backbone, any causal language model.
        backbone_name_or_path: Hub id or folder the backbone weights come from.
        backbone_revision: commit the backbone weights were trained at, None for a folder.
        backbone_digests: hashes of the backbone's embedding and last layer, see `backbone_clara.py`.
        backbone_included: whether the checkpoint carries the backbone in its folder `backbone/`.
        memory_sizes: memory vectors per document the compressor is trained for, ascending. The first k vectors of a
            memory are the memory of size k (nested memory).
        memory_layout: "tokens", the states of learned memory tokens after the document (paper), or "windows", the
            means of the document's states and token embeddings over k equal windows; then every size of
            `memory_sizes` must be a power of two times the smallest.
        retrieval_memory_size: memory vectors compared by `retrieve`; None means `max(memory_sizes)`.
        memory_normalization: memories are final-layer states with every channel shifted and scaled to the spread of
            the token embeddings, by rows that `normalize_memories` measured once; False is the paper.
        start_embedding: whether compressor and reasoner read a row of its own before each text; False is the paper.
        document_max_length: tokens of one chunk with its title, as `CLaRaProcessor` counts them (paper: 256).
        retrieval_top_k: documents that are read by default (paper: 5).
        min_score: cosine of `retrieval_memory_size` vectors, -1 to 1, that a document without a word of the question
            must have; `answer` and `stream` abstain by default if no document has it. None never abstains.
            `recipes/evaluation/calibrate.py` chooses it.
        overlap_weight: how much less it is for a document with all words of the question, 0 to 1 (`word_overlap`).
        retrieval_temperature: temperature of the differentiable top-k (paper: 0.02).
        alignment_weight: lambda of L_MSE, eq. 2.2 (paper: 0.1); the loss is a mean over the hidden size.
        contrastive_weight: weight of the InfoNCE term where positives are given; 0 is the paper.
        lora: role -> rank, alpha, dropout, target_modules of all `ROLES` (paper: 16, 32, 0.1, all linear layers).
    """

    model_type = "clara"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    format_version: int = FORMAT_VERSION
    text_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_digests: dict | None = None
    backbone_included: bool = False
    memory_sizes: list[int] | tuple[int, ...] = (4, 8, 16)
    memory_layout: str = "tokens"
    retrieval_memory_size: int | None = None
    memory_normalization: bool = False
    start_embedding: bool = False
    document_max_length: int = 256
    retrieval_top_k: int = 5
    min_score: float | None = None
    overlap_weight: float = 0.0
    retrieval_temperature: float = 0.02
    alignment_weight: float = 0.1
    contrastive_weight: float = 0.0
    lora: dict | None = None

    def __post_init__(self, **kwargs):
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of config.json must be {FORMAT_VERSION}, got {self.format_version}. Update the "
                "package (`pip install -U clara-rag`), or load with `trust_remote_code=True` in a process that does "
                "not import modeling_clara, to use the code that was saved with the checkpoint."
            )
        super().__post_init__(**kwargs)
        self.memory_sizes = list(self.memory_sizes)
        if self.lora is None:
            self.lora = {role: {"rank": 16, "alpha": 32, "dropout": 0.1, "target_modules": None} for role in ROLES}
        for is_valid, message in self._rules():
            if not is_valid:
                raise ValueError(message)
        if self.retrieval_memory_size is None:
            self.retrieval_memory_size = self.max_memory_size
        self.check_memory_size(self.retrieval_memory_size, "retrieval_memory_size")

    @property
    def max_memory_size(self) -> int:
        """Memory vectors of a complete memory."""
        return self.memory_sizes[-1]

    def check_memory_size(self, memory_size: int | None, name: str = "memory_size") -> int:
        """Return `memory_size`, or `max(memory_sizes)` for None; a ValueError unless it is one of `memory_sizes`."""
        if memory_size is None:
            return self.max_memory_size
        if isinstance(memory_size, bool) or memory_size not in self.memory_sizes:
            raise ValueError(
                f"`{name}` must be one of `config.memory_sizes` {self.memory_sizes}, got {memory_size!r}. Pass one of "
                "them, or train a checkpoint whose `memory_sizes` include it."
            )
        return int(memory_size)

    def check_window(self, n_tokens: int, name: str, remedy: str = "Shorten it.") -> None:
        """Raise a `WindowError` unless a prompt of `n_tokens` fits into the backbone's window."""
        window = self.text_config.max_position_embeddings
        if n_tokens > window:
            raise WindowError(
                f"the prompt of `{name}` must fit into the backbone's window of {window} tokens, got {n_tokens}. "
                f"{remedy}"
            )

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Whether each rule holds, and its error; a rule may rely on those before it."""
        sizes, example, correct = self.memory_sizes, "Pass for example (4, 8, 16).", "Correct it in the config."
        ascends = bool(sizes) and sizes[0] >= 1 and sizes == sorted(set(sizes))
        yield ascends, f"`memory_sizes` must be ascending, distinct and >= 1, got {sizes}. {example}"
        yield (
            self.memory_layout in MEMORY_LAYOUTS,
            f"`memory_layout` must be one of {list(MEMORY_LAYOUTS)}, got {self.memory_layout!r}. Choose one.",
        )
        yield (
            self.memory_layout == "tokens" or set(sizes) <= {sizes[0] * 2**number for number in range(16)},
            f"`memory_sizes` must be the smallest times powers of two where `memory_layout` is 'windows', got "
            f"{sizes}. {example}",
        )
        for name, is_valid, rule in (
            ("document_max_length", self.document_max_length >= 8, ">= 8 tokens"),
            ("retrieval_top_k", self.retrieval_top_k >= 1, ">= 1"),
            ("min_score", self.min_score is None or -1 <= self.min_score <= 1, "None or a cosine from -1 to 1"),
            ("overlap_weight", 0 <= self.overlap_weight <= 1, "a number from 0 to 1"),
            ("retrieval_temperature", self.retrieval_temperature > 0, "> 0"),
            ("alignment_weight", self.alignment_weight >= 0, ">= 0"),
            ("contrastive_weight", self.contrastive_weight >= 0, ">= 0"),
        ):
            yield is_valid, f"`{name}` must be {rule}, got {getattr(self, name)}. {correct}"
        roles, settings = set(self.lora), list(LORA_SETTINGS)
        yield (
            roles == set(ROLES),
            f"`lora` must have the roles {list(ROLES)}, got {sorted(roles)}. Name each role once.",
        )
        for role, given in self.lora.items():
            place = f"`lora[{role!r}]"
            yield (
                set(given) == set(settings),
                f"{place}` must have the settings {settings}, got {sorted(given)}. {correct}",
            )
            yield given["rank"] >= 1, f"{place}['rank']` must be >= 1, got {given['rank']}. Paper: 16."


CLaRaConfig.register_for_auto_class()
