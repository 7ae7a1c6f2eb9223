"""The trainer of all stages: `transformers.Trainer` with its own loading, logging and saving.

Every loss is in `CLaRaForRAG.forward`; what tells the stages from each other is in `stages.py`.
"""

import contextlib
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_clara import CLaRaForRAG
from modeling_clara.backbone_clara import backbone_digests
from modeling_clara.configuration_clara import MEMORY_STATISTICS, ROLES, TRAINED_ROWS
from modeling_clara.corpus.storage import append_lines
from modeling_clara.generation_clara import eval_mode
from recipes.training.arguments import CLaRaTrainingArguments
from recipes.training.checkpoints import STATE_FILE, load_trained
from recipes.training.memories import CorpusCandidates
from recipes.training.stages import STAGES
from recipes.training.time_limit import TimeLimit
from recipes.training.training_metrics import MetricSums, exact_matches, ranking_metrics

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 32  # of an answer in samples.jsonl


def memory_size_of_step(memory_sizes: list[int], seed: int, step: int) -> int:
    """k of an optimizer step: the same for all of its micro-batches, on every process and after a restart."""
    return random.Random(f"{seed}:{step}").choice(memory_sizes)


class EpochLengthSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order that follows from seed and epoch alone.

    transformers' own draws from the global random state, so a run that goes on within its second epoch would see other
    rows than one that was not interrupted, and a step of two processes other rows than a step of one.
    """

    def __init__(self, rows_of_step: int, lengths: list[int], seed: int):
        super().__init__(rows_of_step, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return super().__iter__()


class CLaRaTrainer(Trainer):
    """Trains the stage that its arguments name.

    Args:
        model: with its trainable roles set.
        args: of this run.
        candidates: found live in a corpus; None reads those of the batch.
        train_backbone: the backbone trains as well and is saved with every checkpoint.
        samples: records whose answers are generated at every evaluation.
        kwargs: of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: CLaRaForRAG,
        args: CLaRaTrainingArguments,
        *,
        candidates: CorpusCandidates | None = None,
        train_backbone: bool = False,
        samples: Sequence[dict] = (),
        **kwargs,
    ):
        super().__init__(model, args, **kwargs)
        self.stage, self.candidates = STAGES[args.stage], candidates
        self.train_backbone, self.samples = train_backbone, samples
        self.loss_is_scaled_for_ga = True  # `forward` divides by counts over the whole accumulated batch
        self.train_sums, self.eval_sums = MetricSums(), MetricSums()
        self.role_norms: dict[str, torch.Tensor] = {}
        self._n_samples: torch.Tensor | None = None
        self._last_log = None
        if args.max_minutes is not None:
            self.add_callback(TimeLimit(args.max_minutes, self.accelerator))

    # --- loading: the order of rows, the counts of a step, and the layout of its k -----------------------------------

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or dataset is None:
            return super()._get_train_sampler(train_dataset)
        rows_of_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochLengthSampler(rows_of_step, dataset["length"], self.args.order_seed)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        n_rows = torch.tensor(float(sum(map(_n_rows, batches))), device=self.args.device)
        self._n_samples = self.accelerator.reduce(n_rows, "sum").to(device)
        self._last_log = self._last_log or time.perf_counter()
        # a stage that does not generate has no labels; its loss is a mean over rows
        return batches, self._n_samples if n_items is None else n_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        """The inputs of `forward`: the prompts of this step's k, the counts, everything on the device."""
        gold = inputs.get("gold_documents")
        inputs = super()._prepare_inputs({name: value for name, value in inputs.items() if name != "gold_documents"})
        config = self.unwrapped.config
        size = config.memory_sizes[-1] if self.stage.generates else config.retrieval_memory_size
        if self.model.training:
            if self.stage.generates:
                drawn = self.args.train_memory_sizes or config.memory_sizes
                size = memory_size_of_step(drawn, self.args.seed, self.state.global_step)
            inputs["num_samples_in_batch"] = self._n_samples
        inputs |= inputs.pop("prompts", {}).get(size, {}) | {"memory_size": size}
        if gold is not None:
            query = self._encode_questions(inputs)
            if query.requires_grad:
                inputs["query_memory"] = query  # the step goes on from here
            inputs |= self.candidates.search(query.detach(), gold)
        return inputs

    def _encode_questions(self, inputs: dict) -> torch.Tensor:
        """(rows, k, hidden) questions as the reasoner sees them; with their graph if the step can go on from it."""
        model = self.unwrapped
        lengths, size = inputs["query_attention_mask"].sum(-1), model.config.retrieval_memory_size
        # Dropout would search for another question than the one that is asked, and what wraps a model that several
        # processes train expects its whole pass in `forward`.
        is_one_pass = model.training and self.accelerator.num_processes == 1 and not has_dropout(model)
        mode = contextlib.nullcontext() if is_one_pass else eval_mode(model)
        with mode, torch.set_grad_enabled(is_one_pass), self.accelerator.autocast():
            return model.encode("reasoner", inputs["query_input_ids"], lengths, size)[0]

    @property
    def unwrapped(self) -> CLaRaForRAG:
        """The model itself, without DDP or compilation around it."""
        return self.accelerator.unwrap_model(self.model)

    # --- logging -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        positive_mask = inputs.get("batch_positive_mask" if "query_rows" in inputs else "positive_mask")
        if self.stage.generates and not self.unwrapped.config.contrastive_weight:
            for name in ("positive_mask", "batch_positive_mask"):
                inputs.pop(name, None)  # the language-modelling loss alone: gold is for the metrics
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        sums = self.train_sums if self.model.training else self.eval_sums
        self._record(sums, inputs, outputs, num_items_in_batch, positive_mask)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, sums: MetricSums, inputs: dict, outputs, n_items, positive_mask) -> None:
        """Add the metrics of a micro-batch to the sums, as totals and counts, so that any grouping gives the same."""
        n_rows, n_samples = _n_rows(inputs), inputs.get("num_samples_in_batch")
        n_samples = n_rows if n_samples is None else n_samples
        if outputs.lm_loss is not None:
            targets = inputs["labels"][:, 1:] != -100
            n_targets = targets.sum()
            sums.add("ce", outputs.lm_loss.detach() * (n_targets if n_items is None else n_items), n_targets)
            sums.add("exact_match", *exact_matches(outputs.logits, inputs["labels"], inputs.get("prompt_segments")))
        for name, value in (("mse", outputs.alignment_loss), ("contrastive", outputs.contrastive_loss)):
            if value is not None:
                sums.add(name, value.detach() * n_samples, n_rows)
        if outputs.scores is not None and positive_mask is not None:
            for name, total, count in ranking_metrics(outputs.scores, positive_mask):
                sums.add(name, total, count)
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
        sums.add("tokens", sum(mask.sum() for mask in masks), 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sums of all steps since the last log, reduced over all processes."""
        if "loss" in logs:
            metrics, now = self.train_sums.reduce(self.accelerator), time.perf_counter()
            tokens = metrics.pop("tokens", 0.0)
            if self._last_log is not None:
                metrics["tokens_per_second"] = tokens / (now - self._last_log)
            self.train_sums, self._last_log = MetricSums(), now
            norms = {f"grad_norm/{part}": float(norm) for part, norm in self.role_norms.items()}
            logs = {**logs, **metrics, **norms}
        super().log(logs, start_time)

    def _clip_grad_norm(self, model):
        """The norm of each part's gradient is taken before it is clipped."""
        parts: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.unwrapped.named_parameters():
            if parameter.grad is not None:
                parts.setdefault(part_of(name), []).append(parameter.grad)
        self.role_norms = {part: get_total_norm(gradients) for part, gradients in sorted(parts.items())}
        return super()._clip_grad_norm(model)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.eval_sums = MetricSums()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = self.eval_sums.reduce(self.accelerator)
        metrics.pop("tokens", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._write_samples()
        self._last_log = time.perf_counter()  # the time of an evaluation is not that of the next steps
        return output

    @property
    def was_just_evaluated(self) -> bool:
        """Whether the last step has its evaluation already."""
        step = self.state.global_step
        return any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)

    def _write_samples(self) -> None:
        """Append generated answers to samples.jsonl."""
        if not self.samples or not self.is_world_process_zero():
            return
        step, rows = self.state.global_step, []
        for record in self.samples:
            question, expected = record["questions"][0], record["answers"][0]
            answer = self._sample(self.unwrapped, question, record["documents"])
            rows.append({"step": step, "question": question, "expected": expected, "answer": answer})
        append_lines(Path(self.args.output_dir) / "samples.jsonl", rows)
        shown = "\n".join(f"  {row['question']} -> {row['answer']!r} (expected {row['expected']!r})" for row in rows)
        logger.info("samples at step %d:\n%s", step, shown)

    def _sample(self, model: CLaRaForRAG, question: str | None, documents: list[dict]) -> str:
        """What the model says to a question, or its paraphrase of the first document without one."""
        if question is None:
            return model.paraphrase(documents[:1])[0]
        if not self.stage.reads_text:
            return model.answer([question], documents=documents, max_new_tokens=SAMPLE_TOKENS)[0].text
        k, hidden = model.config.max_memory_size, model.config.text_config.hidden_size
        prompt = model.processor.build_prompt(question, 0, k, text_documents=documents)
        no_memory = torch.zeros(0, k, hidden, device=model.memory_embeddings.device)
        generation = model.build_generation_config(None, SAMPLE_TOKENS)
        with eval_mode(model), torch.no_grad():
            return model.generate_texts([prompt], [no_memory], generation)[0]

    # --- saving ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A CLaRa checkpoint, without the pickled arguments that the Trainer would add."""
        if not self.args.should_save:
            return
        model = self.unwrapped
        if self.train_backbone:
            model.config.backbone_digests = backbone_digests(model.backbone)
        model.save_pretrained(
            output_dir or self.args.output_dir, include_backbone=self.train_backbone or None, state_dict=state_dict
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def take_over(self, checkpoint: Path) -> None:
        """The weights and the log of a checkpoint of the last step, as if this process had trained to there."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def _load_best_model(self) -> None:
        load_trained(self.unwrapped, self.state.best_model_checkpoint)


def part_of(parameter_name: str) -> str:
    """The role that a parameter belongs to, "rows" for memory-token and separator embeddings, else "backbone"."""
    names = parameter_name.split(".")
    role = next((role for role in ROLES if role in names), None)
    return role or ("rows" if names[-1] in (*TRAINED_ROWS, *MEMORY_STATISTICS) else "backbone")


def has_dropout(model: CLaRaForRAG) -> bool:
    """Whether a pass of the reasoner in training differs from one without."""
    settings, attention = model.config.lora["reasoner"], getattr(model.config.text_config, "attention_dropout", 0.0)
    layers = (module for module in model.backbone.modules() if isinstance(module, torch.nn.Dropout))
    return bool(settings["dropout"] or attention) or any(layer.p for layer in layers)


def _n_rows(batch: dict) -> int:
    """Rows of documents or questions in a micro-batch."""
    return len(next(batch[name] for name in ("document_input_ids", "query_input_ids", "memory") if name in batch))
