"""The passes of CLaRa over one backbone with three LoRA roles: texts to memories, prompts to logits, a step to a loss.

Tensors only, no text and no files.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapters_clara import CallLock, RoleSwitch, add_roles, eval_mode
from .configuration_clara import MEMORY_STATISTICS, ROLES, TRAINED_ROWS, CLaRaConfig
from .memory_clara import (
    check_slots,
    memory_alignment_loss,
    nest_windows,
    normalize_memory,
    place_memory_tokens,
    read_memory,
    read_windows,
    restore_states,
    right_padded,
    segment_mask,
    whole_tokens,
    window_means,
    write_memory,
)
from .packing_clara import PackedRows, can_pack, full_mask, packed
from .processing_clara import IGNORE_INDEX
from .retrieval_clara import choose_documents, contrast_batch, contrastive_loss


@dataclass
class CLaRaOutput(ModelOutput):
    """What `CLaRaForRAG.forward` returns.

    Attributes:
        loss: () float32, `lm_loss + alignment_weight * alignment_loss + contrastive_weight * contrastive_loss`
            (eq. 2.2), the last two if they apply; without a prompt the contrastive loss alone; else None.
        lm_loss: () float32, next-token cross entropy of the labels; None without labels.
        alignment_loss: () float32, L_MSE (eq. 2.1); None unless documents were compressed here, into memory tokens.
        contrastive_loss: () float32, InfoNCE; None without `positive_mask`.
        logits: (prompts, length, vocabulary) of the generator; with labels those of the targets (targets, vocabulary).
        memory: (batch, candidates, n, hidden), what was compressed here or given.
        scores: (batch, candidates) float32 cosines, -inf where there is no candidate; with `query_rows` (questions,
            batch * candidates); None without a query.
        selected: (batch, k) int64, index of the document read in each slot, -1 for none; None if nothing is chosen.
    """

    loss: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    alignment_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    memory: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    selected: torch.LongTensor | None = None


class CLaRaPasses(PreTrainedModel):
    """The tensor side of `CLaRaForRAG`."""

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
        if config.start_embedding:
            self.start_embedding = nn.Parameter(torch.empty(1, hidden_size))
        for name in MEMORY_STATISTICS:  # fixed numbers: they never train
            row = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if config.memory_normalization else None
            self.register_parameter(name, row)
        self.processor = None
        self.post_init()
        self.backbone.requires_grad_(False)
        add_roles(self.backbone, config)
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
            if self.config.start_embedding:
                init.normal_(self.start_embedding, mean=0.0, std=std)
            if self.config.memory_normalization:
                init.zeros_(self.memory_shift)
                init.ones_(self.memory_scale)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_trainable_roles(self, roles: Iterable[str]) -> None:
        """Let the adapters of these roles train and freeze everything else; an unknown role is a ValueError.

        The memory-token embeddings and the separator embedding train with the compressor: they are part of its
        fingerprint, and a corpus compressed with them must stay valid while reasoner and generator train.
        """
        roles = set(roles)
        self.roles.set_trainable(roles)
        for name in TRAINED_ROWS:
            if hasattr(self, name):
                getattr(self, name).requires_grad_("compressor" in roles)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute activations in the backward pass, each layer in the role of its forward pass."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "`use_reentrant` must be False, got True: reentrant checkpointing recomputes in the wrong role. Leave "
                "it out."
            )
        options["context_fn"] = self.roles.checkpoint_context
        super().activation_checkpointing_enable(options, **kwargs)

    # --- the space of memories ---------------------------------------------------------------------------------------

    def as_memory(self, states: torch.Tensor) -> torch.Tensor:
        """Final-layer states (..., hidden) in the space of memories: the states themselves unless normalised."""
        is_normal = self.config.memory_normalization
        return normalize_memory(states, self.memory_shift, self.memory_scale) if is_normal else states

    def as_states(self, memory: torch.Tensor) -> torch.Tensor:
        """Memories (..., hidden) as the final-layer states that the LM head reads."""
        is_normal = self.config.memory_normalization
        return restore_states(memory, self.memory_shift, self.memory_scale) if is_normal else memory

    def as_read(self, memory: torch.Tensor) -> torch.Tensor:
        """The vectors (..., k, hidden) that the generator reads of memories (..., k, hidden)."""
        is_windows = self.config.memory_layout == "windows"
        return read_windows(memory, self.config.memory_sizes[0]) if is_windows else memory

    def with_whole_tokens(self, memory: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
        """Memories (..., k, hidden) of texts of `n_tokens` (...) tokens as they are read, but not compared."""
        is_short = (n_tokens > 0) & (n_tokens <= memory.shape[-2])
        if self.config.memory_layout == "tokens" or not is_short.any():
            return memory
        windows = whole_tokens(self.as_read(memory).flatten(0, -3), n_tokens.flatten())
        return nest_windows(windows, self.config.memory_sizes[0]).view_as(memory)

    # --- passes ------------------------------------------------------------------------------------------------------

    def encode(
        self, role: str, input_ids: torch.Tensor, lengths: torch.Tensor, memory_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read texts as compressor or reasoner: backbone without LM head, last hidden state only.

        The texts (batch, length) int64 are right-padded and have `lengths` (batch,) int64 real tokens.

        Returns:
            memory: (batch, k, hidden), normalised if the config says so.
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
        """Final-layer states (batch, length, hidden) of right-padded texts, without that of the start embedding."""
        if self.config.start_embedding:
            start = self.start_embedding.to(inputs_embeds.dtype).expand(len(lengths), -1, -1)
            inputs_embeds, lengths = torch.cat([start, inputs_embeds], dim=1), lengths + 1
        n_start, length = int(self.config.start_embedding), inputs_embeds.shape[1]
        if can_pack(self.backbone, length, len(lengths)):
            rows = PackedRows(torch.arange(length) < lengths[:, None])
            with self.roles.use(role), self.roles.fused(), packed(self.backbone):
                states = self.backbone.base_model(
                    inputs_embeds=rows.pack(inputs_embeds),
                    position_ids=rows.pack(torch.arange(length).expand(len(lengths), -1)),
                    packed_rows=rows,
                    use_cache=False,
                ).last_hidden_state
            return rows.unpack(states)[:, n_start:]
        with self.roles.use(role):
            # Right padding after causal attention needs no mask, which leaves the fast attention kernels open.
            states = self.backbone.base_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        return states[:, n_start:]

    def prompt_embeddings(
        self, input_ids: torch.Tensor, memory_mask: torch.Tensor, memory: torch.Tensor, memory_is_real: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings (batch, length, hidden) of prompts with `[memory, separator]` of every document in their slots.

        `input_ids` (batch, length) have any ids at the slots that `memory_mask` (batch, length) marks. Of `memory`
        (batch, documents, k, hidden) those are read that are True in `memory_is_real` (batch, documents). A ValueError
        if a prompt has more or fewer slots than vectors to read.
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
        chosen through the straight-through top-k, without one all are read. Contradicting inputs are a ValueError.

        Args:
            document_input_ids: (batch, documents, length) int64.
            document_attention_mask: (batch, documents, length), 1 at real tokens; a row of zeros is no document.
            memory: (batch, documents, n, hidden) instead of the two above.
            document_mask: (batch, documents) bool, False where there is no document; for `memory` only.
            query_input_ids: (batch, length) int64, the question.
            query_attention_mask: (batch, length), 1 at real tokens.
            query_memory: (batch, n, hidden), what the reasoner made of the question before; it is not asked again.
            query_rows: (questions,) int64, the row of each question if a row has several. Nothing is selected then:
                the questions are for the contrastive term alone, and `batch_positive_mask` has a row for each.
            positive_mask: (batch, documents) bool, the gold documents, for the contrastive term.
            batch_positive_mask: (batch, batch * documents) bool instead, with the other rows as in-batch negatives.
            input_ids: (prompts, length) int64, the generator's prompts with pad ids at slots.
            attention_mask: (prompts, length), 1 at prompt tokens and slots; either padding side.
            memory_mask: (prompts, length) bool, True at slots: k + 1 of them for every document read.
            position_ids: (prompts, length) int64, default: real tokens counted from 0.
            prompt_segments: (prompts, length) int64, for rows of several prompts with a common beginning: 0 in that
                beginning, i in the rest of prompt i. A token sees the beginning and its own segment only.
            prompt_document_mask: (prompts, documents) bool, False if the prompt has the document as text instead.
            labels: (prompts, length) int64, -100 where there is no loss; the LM head runs on the targets only.
            num_items_in_batch: label tokens over all accumulated micro-batches; default: of this batch.
            num_samples_in_batch: the same of rows, for the terms that are means over rows.
            memory_size: k to compress to and read, default `max(memory_sizes)`.
        """
        has_query = query_input_ids is not None or query_memory is not None
        k_read = self.config.check_memory_size(memory_size)
        n_vectors = max(k_read, self.config.retrieval_memory_size) if has_query else k_read
        memory, document_mask, alignment = self._documents(
            document_input_ids, document_attention_mask, memory, document_mask, n_vectors
        )
        read, read_mask, scores, selected, contrastive = memory[:, :, :k_read], document_mask, None, None, None
        if document_attention_mask is not None:
            read = self.with_whole_tokens(read, document_attention_mask.sum(-1))
        if has_query or query_rows is not None:
            query = self._query(query_input_ids, query_attention_mask, query_memory, query_rows, batch_positive_mask)
            compared, temperature = (query, memory, document_mask), self.config.retrieval_temperature
            sizes = {"score_size": self.config.retrieval_memory_size, "temperature": temperature}
            if batch_positive_mask is not None:
                scores, contrastive = contrast_batch(*compared, batch_positive_mask, **sizes)
            if query_rows is not None:
                contrastive = contrastive / query_rows.bincount()[query_rows]  # a row's questions count as their mean
            else:  # windows as they are: a step that selects does not know the lengths of stored documents
                read, read_mask, scores, selected = choose_documents(
                    *compared, k_read, self.config.retrieval_top_k, **sizes
                )
                if batch_positive_mask is None and positive_mask is not None:
                    contrastive = contrastive_loss(scores, positive_mask, temperature, document_mask)
        logits = None
        if input_ids is not None:
            if prompt_document_mask is not None:
                read_mask = read_mask & prompt_document_mask
            inputs_embeds = self.prompt_embeddings(input_ids, memory_mask, read, read_mask)
            logits = self._generator_logits(inputs_embeds, attention_mask, position_ids, prompt_segments, labels)
        n_samples = len(memory) if num_samples_in_batch is None else num_samples_in_batch
        alignment = None if alignment is None else alignment.sum() / n_samples
        contrastive = None if contrastive is None else contrastive.sum() / n_samples
        lm_loss, loss = None, contrastive if input_ids is None else None
        if labels is not None:
            targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
            n_targets = max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch
            loss = lm_loss = cross_entropy(logits.float(), targets, reduction="sum") / n_targets
            if alignment is not None and selected is None:  # stage 3, with a choice, is the LM loss alone
                loss = loss + self.config.alignment_weight * alignment
            if contrastive is not None:
                loss = loss + self.config.contrastive_weight * contrastive
        return CLaRaOutput(loss, lm_loss, alignment, contrastive, logits, memory, scores, selected)

    def _documents(self, input_ids, attention_mask, memory, mask, n_vectors: int):
        """Memory, mask (batch, documents) and L_MSE (batch,) or None of the documents of a step."""
        if (input_ids is None) == (memory is None):
            raise ValueError("`document_input_ids` or `memory` must be given, not both and not neither. Pass one.")
        if memory is not None:
            _check_vectors("memory", memory, n_vectors)
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if mask is None else mask
            return memory, mask, None
        step = (input_ids, attention_mask, n_vectors)
        if self.memory_embeddings.requires_grad or self.get_input_embeddings().weight.requires_grad:
            memory, alignment = self._compress_step(*step)
        else:  # as a corpus would hold them: no dropout, and no graph, which activation checkpointing would ask for
            with eval_mode(self), torch.no_grad():
                memory, alignment = self._compress_step(*step)
        return memory, attention_mask.any(-1), alignment

    def _query(self, input_ids, attention_mask, memory, rows, batch_positive_mask) -> torch.Tensor:
        """Memories (questions, k, hidden) of the questions of a step."""
        if rows is not None and (input_ids is None or batch_positive_mask is None):
            raise ValueError("`query_rows` must come with `query_input_ids` and `batch_positive_mask`. Pass them too.")
        if memory is not None and rows is None:
            _check_vectors("query_memory", memory, self.config.retrieval_memory_size)
            return memory
        query = right_padded(input_ids, attention_mask)
        return self.encode("reasoner", *query, self.config.retrieval_memory_size)[0]

    def _compress_step(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, memory_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory (batch, documents, k, hidden) and L_MSE (batch,) of (batch, documents, length) ids.

        None for windows, whose states have the mean of the document's by themselves.
        """
        *shape, length = input_ids.shape  # batch, documents
        flat_ids, lengths = right_padded(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
        memory, hidden_states = self.encode("compressor", flat_ids, lengths, memory_size)
        if self.config.memory_layout == "windows":
            return memory.unflatten(0, shape), None
        is_document_token = torch.arange(length, device=lengths.device) < lengths[:, None]
        document_states = self.as_memory(hidden_states[:, :length])  # compared in the space of memories
        per_document = memory_alignment_loss(document_states, is_document_token, memory).view(shape)
        is_document = (lengths > 0).view(shape)
        per_row = (per_document * is_document).sum(-1) / is_document.sum(-1).clamp(min=1)
        return memory.unflatten(0, shape), per_row

    def _generator_logits(self, inputs_embeds, attention_mask, position_ids, segments, labels) -> torch.Tensor:
        """Logits of the generator, see `CLaRaOutput`."""
        if position_ids is None:  # counts real tokens, so the padding side is free
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        places = None if labels is None else (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        seen = None if segments is None else segment_mask(segments, attention_mask)
        inputs = {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.roles.use("generator"))
            if places is not None and torch.is_grad_enabled() and can_pack(self.backbone, *inputs_embeds.shape[1::-1]):
                rows = PackedRows(attention_mask.bool(), None if seen is None else seen[:, 0])
                inputs = {name: rows.pack(value) for name, value in inputs.items()} | {"packed_rows": rows}
                flat = rows.sources.view(attention_mask.shape)[places]
                places = (torch.zeros_like(flat), flat)
                stack.enter_context(self.roles.fused())
                stack.enter_context(packed(self.backbone))
            elif seen is None:
                inputs["attention_mask"] = attention_mask
            else:
                inputs["attention_mask"] = full_mask(self.backbone, seen, inputs_embeds.dtype)
            if places is not None:  # a hook: what an architecture does with its logits after the head stays in force
                hook = self.get_output_embeddings().register_forward_pre_hook
                stack.enter_context(hook(lambda _, inputs: (inputs[0][places][None], *inputs[1:])))
            logits = self.backbone(**inputs, use_cache=False).logits
        return logits if places is None else logits[0]


def _check_vectors(name: str, memory: torch.Tensor, least: int) -> None:
    if memory.shape[-2] < least:
        raise ValueError(f"`{name}` must have at least {least} vectors, got {memory.shape[-2]}. Pass larger ones.")
