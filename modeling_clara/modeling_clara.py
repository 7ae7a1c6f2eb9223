"""CLaRaForRAG: one backbone, three LoRA roles, and the passes that turn tensors into memories, scores and a loss.

Stands between the processor (text -> tensors) and the text-level calls of `inference_clara.py`. It knows nothing of
text, prompts, training stages or files; loading and saving are in `checkpoint_clara.py`.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapters_clara import CallLock, RoleSwitch, check_role, linear_module_names, lora_config
from .checkpoint_clara import CheckpointMixin
from .configuration_clara import MEMORY_STATISTICS, ROLES, TRAINED_ROWS, CLaRaConfig
from .generation_clara import eval_mode, head_at
from .inference_clara import InferenceMixin
from .memory_clara import (
    check_slots,
    memory_alignment_loss,
    nest_windows,
    place_memory_tokens,
    read_memory,
    right_padded,
    segment_mask,
    window_means,
    write_memory,
)
from .normalization_clara import NormalizationMixin
from .packing_clara import PackedRows, can_pack, full_mask, packed
from .processing_clara import IGNORE_INDEX
from .retrieval_clara import batch_scores, contrastive_loss, cosine_scores, select_memory, straight_through_topk


@dataclass
class CLaRaOutput(ModelOutput):
    """What `CLaRaForRAG.forward` returns.

    Attributes:
        loss: () float32, `lm_loss + alignment_weight * alignment_loss + contrastive_weight * contrastive_loss`
            (eq. 2.2), the last two where they apply; without a prompt the contrastive loss alone; else None.
        lm_loss: () float32, next-token cross entropy of the labels; None without labels.
        alignment_loss: () float32, L_MSE (eq. 2.1); None unless documents were compressed here, into memory tokens.
        contrastive_loss: () float32, InfoNCE; None without `positive_mask`.
        logits: (prompts, length, vocabulary) of the generator; with labels (targets, vocabulary), those of the target
            positions only, row after row.
        memory: (batch, candidates, n, hidden), what was compressed here or given.
        scores: (batch, candidates) float32 cosines, -inf where there is no candidate; None without a query. With
            `query_rows` (questions, batch * candidates).
        selected: (batch, k) int64, index of the document read in each slot, -1 for none; None without a query.
    """

    loss: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    alignment_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    memory: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    selected: torch.LongTensor | None = None


class CLaRaForRAG(InferenceMixin, NormalizationMixin, CheckpointMixin, PreTrainedModel):
    """Compressor, query reasoner and generator over one causal language model (arXiv 2511.18659).

    Args:
        config (`CLaRaConfig`): everything the model is built from.
        backbone (`PreTrainedModel`, *optional*): a loaded causal language model; without it one with random weights is
            built from `config.text_config`.

    Use `from_pretrained` for a trained model and `from_backbone` for fresh adapters on a backbone of your own; both
    attach `model.processor`, which the text-level calls need.
    """

    config_class = CLaRaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch` and divides by nothing itself
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CLaRaConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.text_config) if backbone is None else backbone
        hidden_size = config.text_config.hidden_size
        self.memory_embeddings = nn.Parameter(torch.empty(config.max_memory_size, hidden_size))
        self.separator_embedding = nn.Parameter(torch.empty(1, hidden_size))
        if config.memory_layout == "windows":
            self.residual_scale = nn.Parameter(torch.empty(hidden_size))
        for name in MEMORY_STATISTICS:  # fixed numbers: they never train
            row = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if config.memory_normalization else None
            self.register_parameter(name, row)
        self.processor = None
        self.post_init()
        self.backbone.requires_grad_(False)
        for role in ROLES:
            settings = config.lora[role]
            settings["target_modules"] = sorted(settings["target_modules"] or linear_module_names(self.backbone))
            with warnings.catch_warnings():  # PEFT warns of several adapters on one model, which is the point here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                self.backbone.add_adapter(lora_config(config, role), role)
        self.roles = RoleSwitch(self.backbone)
        self.lock = CallLock()
        self.set_trainable_roles(ROLES)

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            std = self.config.text_config.initializer_range
            init.normal_(self.memory_embeddings, mean=0.0, std=std)
            init.normal_(self.separator_embedding, mean=0.0, std=std)
            if self.config.memory_layout == "windows":
                init.ones_(self.residual_scale)
            if self.config.memory_normalization:
                init.zeros_(self.memory_shift)
                init.ones_(self.memory_scale)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_trainable_roles(self, roles: Iterable[str]) -> None:
        """Let the adapters of these roles train and freeze everything else.

        The memory rows and the separator train with the compressor: they are part of its fingerprint, and a corpus
        compressed with them must stay valid while reasoner and generator train.

        Raises:
            ValueError: unknown role; nothing is changed then.
        """
        roles = {check_role(role) for role in roles}
        self.roles.set_trainable(roles)
        for name in TRAINED_ROWS:
            if hasattr(self, name):
                getattr(self, name).requires_grad_("compressor" in roles)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute activations in the backward pass, each layer in the role of its forward pass.

        Raises:
            ValueError: `use_reentrant=True`, which cannot remember the role.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "`use_reentrant` must be False, got True: reentrant checkpointing recomputes in the wrong role. Leave "
                "it out."
            )
        options["context_fn"] = self.roles.checkpoint_context(options.get("context_fn"))
        super().activation_checkpointing_enable(options, **kwargs)

    def bulk_compression(self) -> contextlib.AbstractContextManager[None]:
        """Context: merge the compressor for long runs of `compress`; the exact unmerged model is restored on leaving.

        Holds a second copy of the adapted weights while open. All other calls work inside as well, from any thread;
        training there runs unmerged. Legal inside `torch.inference_mode()`.

        Raises:
            RuntimeError: a bulk context is open already.
        """
        return self._merged(("compressor",))

    def bulk_answering(self) -> contextlib.AbstractContextManager[None]:
        """Context: merge reasoner and generator for many questions, two more copies of the adapted weights.

        Otherwise as `bulk_compression`.
        """
        return self._merged(("reasoner", "generator"))

    @contextlib.contextmanager
    def _merged(self, roles: tuple[str, ...]) -> Iterator[None]:
        with self.lock:
            self.roles.merge(roles)
        try:
            yield
        finally:
            with self.lock:
                self.roles.unmerge()

    def encode(
        self, role: str, input_ids: torch.Tensor, lengths: torch.Tensor, memory_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read texts as compressor or reasoner: backbone without LM head, last hidden state only.

        Args:
            role: "compressor" or "reasoner".
            input_ids: (batch, length) int64, right-padded.
            lengths: (batch,) int64, real tokens of each text.
            memory_size: k.

        Returns:
            memory: (batch, k, hidden), normalised where the config says so.
            hidden_states: (batch, length + k, hidden), final-layer states of texts and memory tokens; (batch, length,
                hidden) of documents in the layout "windows".
        """
        token_embeddings = self.get_input_embeddings()(input_ids)
        if self.config.memory_layout == "windows" and role == "compressor":
            hidden_states = self._states(role, token_embeddings, lengths)
            memory = self.as_memory(window_means(hidden_states, lengths, memory_size))
            memory = memory + self.residual_scale * window_means(token_embeddings, lengths, memory_size)
            return nest_windows(memory, self.config.memory_sizes[0]), hidden_states
        inputs_embeds = place_memory_tokens(token_embeddings, lengths, self.memory_embeddings[:memory_size])
        hidden_states = self._states(role, inputs_embeds, lengths + memory_size)
        memory = self.as_memory(read_memory(hidden_states, lengths, memory_size))
        if self.config.memory_layout == "windows":  # a question is one window, whose halves do not differ
            n_base = self.config.memory_sizes[0]
            base = memory[:, :n_base] + self.residual_scale * window_means(token_embeddings, lengths, 1)
            memory = torch.cat([base, memory[:, n_base:]], dim=1)
        return memory, hidden_states

    def _states(self, role: str, inputs_embeds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Final-layer states (batch, length, hidden) of right-padded texts."""
        length = inputs_embeds.shape[1]
        if can_pack(self.backbone, length, len(lengths)):
            rows = PackedRows(torch.arange(length) < lengths[:, None])
            with self.roles.use(role), self.roles.fused(), packed(self.backbone):
                states = self.backbone.base_model(
                    inputs_embeds=rows.pack(inputs_embeds),
                    position_ids=rows.pack(torch.arange(length).expand(len(lengths), -1)),
                    packed_rows=rows,
                    use_cache=False,
                ).last_hidden_state
            return rows.unpack(states)
        with self.roles.use(role):
            # Right padding behind causal attention needs no mask, which leaves the fast attention kernels open.
            return self.backbone.base_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state

    def prompt_embeddings(
        self, input_ids: torch.Tensor, memory_mask: torch.Tensor, memory: torch.Tensor, memory_is_real: torch.Tensor
    ) -> torch.Tensor:
        """Embed prompts and write `[memory, separator]` of every document into their slots.

        Args:
            input_ids: (batch, length) int64, pad ids at slots.
            memory_mask: (batch, length) bool, True at slots.
            memory: (batch, documents, k, hidden).
            memory_is_real: (batch, documents) bool, False where a prompt reads fewer documents.

        Returns:
            (batch, length, hidden)

        Raises:
            ValueError: a prompt has more or fewer slots than rows.
        """
        memory = self.as_read(memory)
        separator = self.separator_embedding.to(memory.dtype).expand(*memory.shape[:2], 1, -1)
        rows = torch.cat([memory, separator], dim=2)  # (batch, documents, k + 1, hidden)
        check_slots(memory_mask, memory_is_real.sum(-1) * rows.shape[2])
        return write_memory(self.get_input_embeddings()(input_ids), memory_mask, rows[memory_is_real].flatten(0, 1))

    def forward(
        self,
        document_input_ids: torch.LongTensor | None = None,
        document_attention_mask: torch.LongTensor | None = None,
        memory: torch.FloatTensor | None = None,
        document_mask: torch.BoolTensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.LongTensor | None = None,
        query_memory: torch.FloatTensor | None = None,
        query_rows: torch.LongTensor | None = None,
        positive_mask: torch.BoolTensor | None = None,
        batch_positive_mask: torch.BoolTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        memory_mask: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        prompt_segments: torch.LongTensor | None = None,
        prompt_document_mask: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_samples_in_batch: int | torch.Tensor | None = None,
        memory_size: int | None = None,
    ) -> CLaRaOutput:
        """All passes of a training step in one graph; `CLaRaProcessor.__call__` makes the inputs.

        Documents are compressed (stages 1 and 2) or come as `memory` (stage 3). With a query the top documents are
        chosen through the straight-through top-k, without one all are read.

        Args:
            document_input_ids: (batch, documents, length) int64.
            document_attention_mask: (batch, documents, length), 1 at real tokens; a row of zeros is no document.
            memory: (batch, documents, n, hidden) in place of the two above.
            document_mask: (batch, documents) bool, False where there is no document; for `memory` only.
            query_input_ids: (batch, length) int64, the question.
            query_attention_mask: (batch, length), 1 at real tokens.
            query_memory: (batch, n, hidden), what the reasoner made of the question before; it is not asked again.
            query_rows: (questions,) int64, the row of each question where a row has several. Nothing is selected then;
                the questions are for the contrastive term alone, and `batch_positive_mask` has a row for each.
            positive_mask: (batch, documents) bool, the gold documents, for the contrastive term.
            batch_positive_mask: (batch, batch * documents) bool in its place, gold among the documents of all rows:
                those of the others are in-batch negatives.
            input_ids: (prompts, length) int64, the generator's prompts with pad ids at slots.
            attention_mask: (prompts, length), 1 at prompt tokens and slots; either padding side.
            memory_mask: (prompts, length) bool, True at slots: k + 1 of them for every document read.
            position_ids: (prompts, length) int64, default: real tokens counted from 0.
            prompt_segments: (prompts, length) int64, for rows that hold several prompts with a common beginning: 0 in
                that beginning, i in what follows of prompt i. A token sees the beginning and its own segment only.
            prompt_document_mask: (prompts, documents) bool, False for a document that the prompt has as text, so that
                its memory is not read; default: all memories are read.
            labels: (prompts, length) int64, -100 where there is no loss. With labels the LM head runs on the target
                positions only.
            num_items_in_batch: label tokens over all accumulated micro-batches; default: of this batch.
            num_samples_in_batch: rows over all accumulated micro-batches, for the terms that are means over rows;
                default: of this batch.
            memory_size: k to compress to and read, default `max(memory_sizes)`.

        Returns:
            `CLaRaOutput`

        Raises:
            ValueError: inputs that contradict each other, naming them.
        """
        k_read = self.config.check_memory_size(memory_size)
        k_score = self.config.retrieval_memory_size
        alignment = contrastive = scores = selected = None
        if (document_input_ids is None) == (memory is None):
            raise ValueError("`document_input_ids` or `memory` must be given, not both and not neither. Pass one.")
        has_query = query_input_ids is not None or query_memory is not None
        needed = max(k_read, k_score) if has_query else k_read
        if memory is None:
            document_mask = document_attention_mask.any(-1)
            with self._frozen_compressor():
                memory, alignment = self._compress_step(document_input_ids, document_attention_mask, needed)
        elif memory.shape[2] < needed:
            raise ValueError(f"`memory` must have at least {needed} vectors, got {memory.shape[2]}. Pass larger ones.")
        if query_rows is not None and (query_input_ids is None or batch_positive_mask is None):
            raise ValueError("`query_rows` must come with `query_input_ids` and `batch_positive_mask`. Pass them too.")
        if query_memory is not None and query_memory.shape[1] < k_score:
            raise ValueError(
                f"`query_memory` must have at least {k_score} vectors, got {query_memory.shape[1]}. Pass larger ones."
            )
        if document_mask is None:
            document_mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)

        read, read_mask = memory[:, :, :k_read], document_mask
        if query_rows is not None:
            query, _ = self.encode("reasoner", *right_padded(query_input_ids, query_attention_mask), k_score)
            compared = batch_scores(query, memory, k_score)
            mask = document_mask.flatten().expand_as(batch_positive_mask)
            contrastive = contrastive_loss(compared, batch_positive_mask, self.config.retrieval_temperature, mask)
            contrastive = contrastive / query_rows.bincount()[query_rows]  # of each row the mean
            scores = compared.masked_fill(~mask, -torch.inf)
        elif has_query:
            if query_memory is None:
                query = right_padded(query_input_ids, query_attention_mask)
                query_memory, _ = self.encode("reasoner", *query, k_score)
            scores = cosine_scores(query_memory, memory, k_score)
            top_k = min(self.config.retrieval_top_k, memory.shape[1])
            selection, selected = straight_through_topk(
                scores, top_k, self.config.retrieval_temperature, document_mask
            )
            read, read_mask = select_memory(selection, read), selected >= 0
            compared, mask = scores, document_mask
            if batch_positive_mask is not None:
                compared, positive_mask = batch_scores(query_memory, memory, k_score), batch_positive_mask
                mask = document_mask.flatten().expand_as(positive_mask)
            if positive_mask is not None:
                contrastive = contrastive_loss(compared, positive_mask, self.config.retrieval_temperature, mask)
            scores = scores.masked_fill(~document_mask, -torch.inf)

        logits = loss = lm_loss = None
        if input_ids is not None:
            if prompt_document_mask is not None:
                read_mask = read_mask & prompt_document_mask
            inputs_embeds = self.prompt_embeddings(input_ids, memory_mask, read, read_mask)
            if position_ids is None:  # counts real tokens, so the padding side is free
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            logits = self._generator_logits(inputs_embeds, attention_mask, position_ids, prompt_segments, labels)
        n_samples = memory.shape[0] if num_samples_in_batch is None else num_samples_in_batch
        alignment = None if alignment is None else alignment.sum() / n_samples
        contrastive = None if contrastive is None else contrastive.sum() / n_samples
        if labels is not None:
            targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
            n_targets = max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch
            loss = lm_loss = cross_entropy(logits.float(), targets, reduction="sum") / n_targets
            if alignment is not None and selected is None:  # stage 3 is the LM loss alone
                loss = loss + self.config.alignment_weight * alignment
            if contrastive is not None:
                loss = loss + self.config.contrastive_weight * contrastive
        elif input_ids is None:
            loss = contrastive
        return CLaRaOutput(loss, lm_loss, alignment, contrastive, logits, memory, scores, selected)

    @contextlib.contextmanager
    def _frozen_compressor(self) -> Iterator[None]:
        """Context: a compressor that does not train makes the memories that a corpus would hold, without dropout.

        And without a graph, which activation checkpointing would ask for by letting the embeddings require gradients.
        """
        if self.memory_embeddings.requires_grad or self.get_input_embeddings().weight.requires_grad:
            yield
            return
        with eval_mode(self), torch.no_grad():
            yield

    def _compress_step(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, memory_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory (batch, documents, k, hidden) and L_MSE (batch,) of (batch, documents, length) ids.

        None for windows, whose states have the mean of the document's by themselves.
        """
        batch, n_documents, length = input_ids.shape
        flat_ids, lengths = right_padded(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
        memory, hidden_states = self.encode("compressor", flat_ids, lengths, memory_size)
        if self.config.memory_layout == "windows":
            return memory.unflatten(0, (batch, n_documents)), None
        is_document_token = torch.arange(length, device=lengths.device) < lengths[:, None]
        document_states = self.as_memory(hidden_states[:, :length])  # compared in the space of memories
        per_document = memory_alignment_loss(document_states, is_document_token, memory)
        is_document = (lengths > 0).view(batch, n_documents)
        per_row = (per_document.view(batch, n_documents) * is_document).sum(-1) / is_document.sum(-1).clamp(min=1)
        return memory.unflatten(0, (batch, n_documents)), per_row

    def _generator_logits(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the generator, see `CLaRaOutput`."""
        places = None if labels is None else (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        inputs = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "use_cache": False}
        is_packed = False
        if places is not None and torch.is_grad_enabled() and can_pack(self.backbone, *inputs_embeds.shape[1::-1]):
            seen = None if segments is None else segment_mask(segments, attention_mask)[:, 0]
            rows = PackedRows(attention_mask.bool(), seen)
            inputs = {name: rows.pack(value) if name != "use_cache" else value for name, value in inputs.items()}
            inputs["packed_rows"] = rows
            flat = rows.sources.view(attention_mask.shape)[places]
            places, is_packed = (torch.zeros_like(flat), flat), True
        else:
            inputs["attention_mask"] = attention_mask
            if segments is not None:
                seen = segment_mask(segments, attention_mask)
                inputs["attention_mask"] = full_mask(self.backbone, seen, inputs_embeds.dtype)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.roles.use("generator"))
            if is_packed:
                stack.enter_context(self.roles.fused())
                stack.enter_context(packed(self.backbone))
            stack.enter_context(head_at(self.get_output_embeddings(), places))
            logits = self.backbone(**inputs).logits
        return logits if places is None else logits[0]


CLaRaForRAG.register_for_auto_class("AutoModel")
