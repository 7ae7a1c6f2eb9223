"""Arguments -> model, records, memories and trainer: everything that happens before the first step.

Every bad input ends here, in an error that names it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from modeling_clara import CLaRaForRAG
from modeling_clara.backbone_clara import check_digests
from recipes.training.arguments import CONFIG_FIELDS, FRESH, CLaRaTrainingArguments, DataArguments, ModelArguments
from recipes.training.checkpoints import CACHE_FOLDER, MEMORY_FOLDER
from recipes.training.collators import Collator, ReadingCollator, SelectingCollator, TextCollator
from recipes.training.memories import CorpusCandidates, DocumentMemories, open_or_compress
from recipes.training.mixtures import distinct_documents, load_records
from recipes.training.records import RecordReader
from recipes.training.stages import STAGES, Stage
from recipes.training.trainer import CLaRaTrainer, part_of

logger = logging.getLogger(__name__)

MEASURED_DOCUMENTS = 128  # of which memories are normalised
QUERIES_PER_RECORD = 2  # of the contrastive term in the stages that read memories
CHANGES_MEMORIES = ("compressor", "rows", "backbone")


def given(arguments: ModelArguments | DataArguments, *names: str) -> dict:
    """Those of the arguments that are not None."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def prepare_model(arguments: ModelArguments, training: CLaRaTrainingArguments) -> CLaRaForRAG:
    """The model with what trains in float32, its roles set and its reasoner initialised.

    Raises:
        OSError, ValueError: the model cannot be loaded, or is of another backbone.
    """
    loader = given(arguments, "revision", "dtype", "attn_implementation")
    if arguments.checkpoint is None:
        own = given(arguments, "memory_sizes", "lora_rank", "lora_alpha", "lora_dropout", "processor_kwargs")
        config = given(arguments, *CONFIG_FIELDS, "document_max_length", "memory_layout")
        model = CLaRaForRAG.from_backbone(arguments.backbone, config_kwargs=config, **own, **loader)
    else:
        model = CLaRaForRAG.from_pretrained(arguments.checkpoint, **loader, **given(arguments, "backbone"))
        # `from_pretrained` lets a named backbone of other weights pass with a warning; to train on would lose the work
        check_digests(model.backbone, model.config, str(arguments.backbone), is_explicit=False)
        check_settings(model, arguments)
        model.config.min_score = None  # of other cosines than those of the trained model
        for name, value in given(arguments, *CONFIG_FIELDS).items():
            setattr(model.config, name, value)
        type(model.config).__post_init__(model.config)  # the checks of the fields, on the new values
    initialise_reasoner(model, arguments.reasoner_init, STAGES[training.stage])
    model.set_trainable_roles(training.roles)
    if arguments.train_backbone:
        for name, parameter in model.backbone.named_parameters():
            if "lora_" not in name:
                parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def check_settings(model: CLaRaForRAG, arguments: ModelArguments) -> None:
    """A checkpoint keeps what it was made with; raise if the command line says otherwise, log if a file does."""
    config, lora, processor = model.config, model.config.lora["compressor"], arguments.processor_kwargs or {}
    has = {f"lora_{name}": lora[name] for name in ("rank", "alpha", "dropout")}
    has |= {name: getattr(config, name) for name in FRESH if name not in has and name != "processor_kwargs"}
    has |= {f"processor_kwargs.{name}": getattr(model.processor, name, None) for name in processor}
    asked = vars(arguments) | {f"processor_kwargs.{name}": value for name, value in processor.items()}
    differing = [name for name, value in has.items() if asked[name] is not None and asked[name] != value]
    wrong = [name for name in differing if name.partition(".")[0] not in arguments.from_files]
    if wrong:
        asked, kept = ({name: values[name] for name in wrong} for values in (asked, has))
        raise ValueError(f"{asked} must be what `checkpoint` has, {kept}. Leave them out, or start from `backbone`.")
    if differing:
        kept = ", ".join(f"{name} {has[name]!r} (not {asked[name]!r})" for name in differing)
        logger.warning("The checkpoint keeps its own %s; the recipe's are for fresh adapters on `backbone`.", kept)


def is_untrained(model: CLaRaForRAG, role: str) -> bool:
    """Whether a role's adapters change nothing, as fresh ones do."""
    state = get_peft_model_state_dict(model.backbone, adapter_name=role, save_embedding_layers=False)
    return not any(tensor.any() for name, tensor in state.items() if "lora_B" in name)


def initialise_reasoner(model: CLaRaForRAG, choice: str | None, stage: Stage | None = None) -> None:
    """Copy the compressor into the reasoner if `ModelArguments.reasoner_init` says so, or by default a stage."""
    if choice is None:
        needs_copy = stage is not None and stage.selects and is_untrained(model, "reasoner")
        choice = "compressor" if needs_copy else "keep"
    if choice == "compressor":
        own = get_peft_model_state_dict(model.backbone, adapter_name="compressor", save_embedding_layers=False)
        copies = {name: tensor.clone() for name, tensor in own.items()}
        set_peft_model_state_dict(model.backbone, copies, adapter_name="reasoner")
    elif choice == "random":
        for layer in model.roles.layers:
            layer.reset_lora_parameters("reasoner", init_lora_weights=True)


def normalize_memories(model: CLaRaForRAG, train: Dataset, training: CLaRaTrainingArguments) -> None:
    """Fix the space of memories by documents from all parts of the training data, the same ones on every process."""
    documents = list(distinct_documents([train]).values())
    number = min(MEASURED_DOCUMENTS, len(documents))
    documents = [documents[place * len(documents) // number] for place in range(number)]
    model.to(training.device).normalize_memories(documents, batch_size=training.per_device_eval_batch_size)


def read_data(
    model: CLaRaForRAG, data: DataArguments, training: CLaRaTrainingArguments
) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation records, every row checked."""
    reader = RecordReader(
        model.processor,
        training.stage,
        window=model.config.text_config.max_position_embeddings,
        memory_size=model.config.max_memory_size,
        top_k=model.config.retrieval_top_k,
        needs_candidates=data.candidates == "given",
        **given(data, "targets_per_document", "long_documents", "num_candidates", "text_share"),
    )
    folder = Path(training.output_dir) / CACHE_FOLDER
    with training.main_process_first(desc="reading the data"):
        train = load_records(data.datasets, reader, training.order_seed, folder)
        evaluation = load_records(data.eval_datasets, reader, training.seed, folder) if data.eval_datasets else None
    return train, evaluation


def prepare_memories(
    model: CLaRaForRAG, data: DataArguments, training: CLaRaTrainingArguments, datasets: Sequence[Dataset]
) -> tuple[DocumentMemories | None, DocumentMemories | None]:
    """(corpus to search or None, memories of the records' documents or None)."""
    if data.compress_online:
        return None, None
    trains = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trains.intersection(CHANGES_MEMORIES):
        raise ValueError(
            "`trainable_roles` must not have the compressor, and `train_backbone` must be false, when stored memories "
            "are read: they would go stale. Leave them out, or set `compress_online`."
        )
    documents = list(distinct_documents(datasets).values())
    corpus = DocumentMemories(model.load_corpus(data.corpus)) if data.corpus else None
    if corpus is not None and ((data.candidates == "corpus" and not data.add_gold) or not corpus.missing(documents)):
        return corpus, corpus
    folder, batch_size = Path(training.output_dir) / MEMORY_FOLDER, training.per_device_eval_batch_size
    with training.main_process_first(desc="compressing the documents"):
        store = open_or_compress(model, documents, folder, batch_size)
    return corpus or store, store


def check_stage(
    model: CLaRaForRAG, arguments: ModelArguments, data: DataArguments, training: CLaRaTrainingArguments
) -> None:
    """Raise a ValueError if the arguments ask for what the stage has no term or no pass for."""
    stage, name, config = STAGES[training.stage], training.stage, model.config
    drawn, sizes = training.train_memory_sizes, config.memory_sizes
    implementation = model.backbone.config._attn_implementation
    if data.text_share and not stage.reads_memories:
        readers = " and ".join(other for other, one in STAGES.items() if one.reads_memories)
        raise ValueError(
            f"`text_share` must be 0 in the stage {name!r}, got {data.text_share}. Leave it out; it is for {readers}."
        )
    if arguments.contrastive_weight and "contrastive" not in stage.losses:
        raise ValueError(
            f"`contrastive_weight` must be 0 in the stage {name!r}, got {arguments.contrastive_weight}: it has no "
            "contrastive term. Leave it out."
        )
    if arguments.contrastive_weight and stage.reads_memories and "reasoner" not in training.roles:
        raise ValueError(
            f"`trainable_roles` must have the reasoner with `contrastive_weight` > 0 in the stage {name!r}, got "
            f"{list(training.roles)}: only the reasoner encodes questions. Add it, or leave the weight out."
        )
    if stage.selects and data.num_candidates < config.retrieval_top_k:
        raise ValueError(
            f"`num_candidates` must be >= `retrieval_top_k` ({config.retrieval_top_k}), got {data.num_candidates}. "
            "Raise it."
        )
    if data.in_batch_negatives and stage.selects and stage.generates and not config.contrastive_weight:
        raise ValueError(
            "`in_batch_negatives` must be false if `contrastive_weight` is 0, since no term has negatives. Raise the "
            "weight, or leave it out."
        )
    if data.targets_per_document > 1 and not stage.selects and implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"`attn_implementation` must be 'sdpa' or 'eager' with several targets per document, got "
            f"{implementation!r}, which does not take the mask of several prompts in a row. Change it, or set "
            "`targets_per_document: 1`."
        )
    if drawn is not None and not (drawn and set(drawn) <= set(sizes)):
        raise ValueError(
            f"`train_memory_sizes` must name some of the model's `memory_sizes` {sizes}, got {drawn}. "
            "Correct it, or leave it out to draw from all."
        )


def prepare_batches(
    model: CLaRaForRAG, data: DataArguments, training: CLaRaTrainingArguments, datasets: Sequence[Dataset]
) -> tuple[Collator, CorpusCandidates | None]:
    """What makes the batches, and the candidates that are searched live, if any."""
    stage, config = STAGES[training.stage], model.config
    processor, sizes, top_k = model.processor, config.memory_sizes, config.retrieval_top_k
    if stage.reads_text:
        return TextCollator(processor, sizes, config.text_config.hidden_size), None
    if not stage.selects:
        asks = "contrastive" in stage.losses and config.contrastive_weight > 0 and "reasoner" in training.roles
        n_queries = QUERIES_PER_RECORD if asks else 0
        return ReadingCollator(processor, sizes, n_queries=n_queries, text_share=data.text_share), None
    corpus, store = prepare_memories(model.to(training.device), data, training, datasets)
    options = {"top_k": top_k, "store": store, "with_prompts": stage.generates}
    if data.candidates == "given":
        return SelectingCollator(processor, sizes, in_batch_negatives=data.in_batch_negatives, **options), None
    if len(corpus) < top_k:
        raise ValueError(
            f"the corpus must hold at least `retrieval_top_k` ({top_k}) documents, got {len(corpus)}. Lower "
            "`retrieval_top_k` or add documents."
        )
    n_candidates = min(data.num_candidates, len(corpus))
    collator = SelectingCollator(processor, sizes, from_corpus=True, num_candidates=n_candidates, **options)
    return collator, CorpusCandidates(corpus, data.num_candidates, add_gold=data.add_gold, gold_store=store)


def prepare_trainer(
    model_arguments: ModelArguments, data: DataArguments, training: CLaRaTrainingArguments
) -> CLaRaTrainer:
    """Everything before the first step.

    Raises:
        OSError, ValueError: whatever is wrong with model, data or folders, named.
    """
    if training.n_gpu > 1:
        raise ValueError(
            f"one process must have one GPU, got {training.n_gpu}. Start it with `accelerate launch --config_file "
            "recipes/configs/accelerate/ddp.yaml`, or set CUDA_VISIBLE_DEVICES=0."
        )
    torch.manual_seed(training.seed)  # fresh adapters are drawn before the Trainer sets its seed
    model = prepare_model(model_arguments, training)
    check_stage(model, model_arguments, data, training)
    train, evaluation = read_data(model, data, training)
    if model_arguments.memory_normalization and model_arguments.checkpoint is None:
        normalize_memories(model, train, training)
    datasets = [dataset for dataset in (train, evaluation) if dataset is not None]
    collator, candidates = prepare_batches(model, data, training, datasets)
    samples = datasets[-1].select(range(min(training.num_samples, len(datasets[-1]))))
    trainer = CLaRaTrainer(
        model,
        training,
        candidates=candidates,
        train_backbone=model_arguments.train_backbone,
        samples=list(samples),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=evaluation,
    )
    n_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%d records, %s trainable parameters, roles %s", len(train), f"{n_trainable:,}", training.roles)
    return trainer
