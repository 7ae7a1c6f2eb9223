"""A checkpoint of the reference as one of ours, without ever loading the backbone.

The facts of its format: docs/migration.md. Everything is read and checked before the first file is written.
"""

import json
import re
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_clara import CLaRaConfig, CLaRaForRAG, CLaRaProcessor
from modeling_clara.backbone_clara import backbone_digests
from modeling_clara.configuration_clara import ROLES
from modeling_clara.files_clara import PEFT_PREFIX, live_tensors, model_card

from .prompts import read_prompts
from .weights import BackboneFiles, check_rows, check_tensor, load_torch_file

ADAPTERS_FILE, TABLES_FILE = "adapters.pth", "decoder_first_last_layers.pth"
ADAPTERS = {"compressor": "encoder_adapter", "generator": "decoder_adapter", "reasoner": "query_reasoner_adapter"}
NUMBERS = ("doc_max_length", "compr_rate", "lora_r")
# Fixed in the code of the reference (docs/migration.md).
LORA_DROPOUT, TEMPERATURE, ALIGNMENT_WEIGHT = 0.1, 0.02, 0.1


@dataclass(frozen=True)
class Conversion:
    """What was converted: the model without weights, and the roles that the checkpoint had no adapter of."""

    model: CLaRaForRAG
    missing: list[str]
    notes: list[str]  # what the user should know
    n_parameters: int  # of the backbone

    def footprint(self) -> dict[str, float]:
        """GB of weights at float16, int8 and 4 bits: adapters and embeddings at 16 bits, the other layers rounded."""
        backbone, model = self.model.backbone, self.model
        tables = {
            id(t): t.numel() for t in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        }
        n_kept = sum(tables.values()) + sum(p.numel() for n, p in backbone.named_parameters() if ".lora_" in n)
        n_rounded = self.n_parameters - sum(tables.values())
        return {name: (2 * n_kept + n_rounded * size) / 1e9 for name, size in SIZES.items()}


SIZES = {"float16": 2, "int8": 1, "4-bit": 0.5 + 4 / 64}  # bytes a weight; 4-bit with a scale for every 64


def convert(source: Path, target: Path, backbone: str | None = None, prompts: Path | None = None) -> Conversion:
    """Write a checkpoint of the reference as one of ours.

    Args:
        source: folder with config.json, adapters.pth and decoder_first_last_layers.pth.
        target: new or empty folder.
        backbone: folder or Hub id of the backbone; default what config.json names, if it is there.
        prompts: JSON file with the prompts, instead of those in the checkpoint's Python file.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: a file is missing, damaged or does not fit. Nothing
            is written then.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"DST must be a new or empty folder, got {target}. Name another one.")
    settings = read_settings(source)
    texts = read_prompts(source, settings.get("auto_map"), prompts)
    files = find_backbone(settings, backbone)
    tokenizer = read_tokenizer(files, settings["decoder_model_name"])
    model = build_model(settings, files)
    model.processor = CLaRaProcessor(
        tokenizer,
        settings["doc_max_length"],
        document_overlap=min(32, settings["doc_max_length"] // 2),
        encode_in_place=True,
        add_bos_token=True,
        add_eos_token=True,
        system_joiner="\n",
        stop_at_answer_end=False,
        **texts,
    )
    weights = read_rows(load_torch_file(source / TABLES_FILE), settings, model, files, len(tokenizer))
    adapters = load_torch_file(source / ADAPTERS_FILE)
    weights |= read_adapters(adapters, settings, model)
    missing = [role for role, name in ADAPTERS.items() if name not in adapters]
    check_prompts(model)
    write(model, weights, target, card(model.config))
    n_parameters = sum(p.numel() for name, p in model.backbone.named_parameters() if ".lora_" not in name)
    return Conversion(model, missing, notes(adapters, tokenizer), n_parameters)


def check_prompts(model: CLaRaForRAG) -> None:
    """A ValueError unless the backbone's chat template takes instruction and text as the reference gives them."""
    processor, source = model.processor, model.config.backbone_name_or_path
    remedy = "Use the newest tokenizer files of the backbone that the checkpoint was trained on."
    template = processor.tokenizer.chat_template
    if not isinstance(template, str):
        found = "none" if template is None else f"several: {sorted(template)}"
        raise ValueError(f"the tokenizer of {source} must have one chat template, found {found}. {remedy}")
    messages = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
    options = {"tokenize": False, "add_generation_prompt": True, **processor.chat_template_kwargs}
    try:
        text = processor.tokenizer.apply_chat_template(messages, **options)
        problem = None if "SYSTEM" in text else "it leaves out the instruction"
    except TemplateError as error:
        problem = None if "System role not supported" in str(error) else str(error)
    try:
        for question in ("a", None):
            processor.build_prompt(question, 1, model.config.max_memory_size)
    except (TemplateError, ValueError, TypeError) as error:
        problem = problem or str(error)
    if problem:
        rule = "must show the instruction and the text, or say that it has no system role"
        raise ValueError(f"the chat template of {source} {rule}, but: {problem} {remedy}")


def write(model: CLaRaForRAG, weights: dict[str, torch.Tensor], target: Path, readme: str) -> None:
    """The checkpoint; after an error the folder is as it was before."""
    is_new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "README.md").write_text(readme, encoding="utf-8")
        model.save_pretrained(target, state_dict=weights)
    except BaseException as error:
        shutil.rmtree(target)  # it was empty
        if not is_new:
            target.mkdir()
        if isinstance(error, OSError):
            raise OSError(
                f"DST must have room for the checkpoint, but {target}: {error}. Name another place."
            ) from error
        raise


def read_settings(source: Path) -> dict:
    """config.json of the checkpoint, its numbers checked."""
    path = source / "config.json"
    if not path.is_file():
        inside = sorted(p.parent.name for p in source.glob("*/config.json")) if source.is_dir() else []
        rule = f"Name one of its checkpoints: {', '.join(inside)}." if inside else "Name the folder of a checkpoint."
        raise FileNotFoundError(f"SRC must be a folder with config.json, found none in {source}. {rule}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}. Get it again.") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "CLaRa":
        found = settings.get("model_type") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"`model_type` in {path} must be 'CLaRa', got {found!r}. Name a checkpoint of the reference.")
    for name in NUMBERS:
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` in {path} must be an int >= 1, got {value!r}. Get the file again.")
    if settings["doc_max_length"] < settings["compr_rate"]:
        raise ValueError(f"`compr_rate` in {path} must leave a memory token of `doc_max_length`. Get the file again.")
    top_k = settings.get("generation_top_k", 1)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`generation_top_k` in {path} must be an int >= 1, got {top_k!r}. Get the file again.")
    for name in ("lora", "sep"):
        if settings.get(name, True) is not True:
            raise ValueError(f"`{name}` in {path} must be true, got {settings[name]!r}. Others cannot be converted.")
    if not isinstance(settings.get("decoder_model_name"), str):
        raise ValueError(f"`decoder_model_name` in {path} must be text, got none. Get the file again.")
    return settings


def find_backbone(settings: Mapping, given: str | None) -> BackboneFiles:
    """The files of the backbone; an OSError that names `--backbone` if there are none at hand."""
    name = given or settings["decoder_model_name"]
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    if not Path(name).is_dir() and not is_id:
        raise FileNotFoundError(
            f"the backbone `{name}` must be at hand, but there is no such folder. Name one with `--backbone`."
        )
    try:
        return BackboneFiles(name)
    except (OSError, ValueError, HTTPError) as error:
        if given and Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"the backbone `{name}` must be at hand, but: {error} Name it with `--backbone PATH_OR_ID`."
        ) from error


def read_tokenizer(files: BackboneFiles, name: str) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer, with the BOS and EOS that the reference gives to those that lack them."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(files.folder)  # tokenizer.json as it is, as the reference
    except Exception as error:  # the library raises this very class
        reason = " ".join(str(error).split())
        raise ValueError(f"the backbone {files.source} must have a tokenizer.json, but: {reason}. Add it.") from error
    extra = list(tokenizer.extra_special_tokens)
    for number, role in enumerate(("bos_token", "eos_token")):
        if getattr(tokenizer, role) is None and "qwen" in name.lower() and len(extra) > number:
            setattr(tokenizer, role, extra[number])
        if getattr(tokenizer, role) is None:
            raise ValueError(
                f"the tokenizer of {files.source} must have a {role}, which stands beside every text, found none. "
                "Name the backbone that the checkpoint was trained on with `--backbone`."
            )
    return tokenizer


def build_model(settings: Mapping, files: BackboneFiles) -> CLaRaForRAG:
    """Our model of a checkpoint with all of its shapes and none of its weights (on the device "meta")."""
    try:
        text_config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the backbone {files.source} must be a model that transformers has: {str(error).splitlines()[0]} Name "
            "another one with `--backbone`."
        ) from error
    text_config._name_or_path, text_config.dtype = "", None
    n = settings["doc_max_length"] // settings["compr_rate"]
    lora = {"rank": settings["lora_r"], "alpha": 2 * settings["lora_r"], "dropout": LORA_DROPOUT}
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(deepcopy(text_config), dtype=torch.float32)
    scale = float(getattr(backbone.get_input_embeddings(), "scalar_embed_scale", 1.0))
    if scale != 1.0:
        raise ValueError(
            f"the backbone {files.source} must not scale its embeddings, but does by {scale:.1f}. Checkpoints of the "
            "reference on such a backbone cannot be converted."
        )
    files.check(backbone)
    digests = read_digests(backbone, files)
    config = CLaRaConfig(
        text_config=text_config,
        backbone_name_or_path=files.source,
        backbone_revision=files.commit,
        backbone_digests=digests,
        memory_sizes=[n],
        start_embedding=True,
        document_max_length=settings["doc_max_length"],
        retrieval_top_k=settings.get("generation_top_k", 1),
        retrieval_temperature=TEMPERATURE,
        alignment_weight=ALIGNMENT_WEIGHT,
        lora={role: {**lora, "target_modules": None} for role in ROLES},
    )
    with torch.device("meta"):
        return CLaRaForRAG(config, backbone)


def read_digests(backbone: nn.Module, files: BackboneFiles) -> dict:
    """`backbone_digests` of a backbone without weights: what they cover is read, hashed and let go again."""
    lists = (module for module in backbone.base_model.modules() if isinstance(module, nn.ModuleList))
    last = max(lists, key=len)[-1]
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    read = []
    for module in [backbone.get_input_embeddings(), *last.modules()]:
        for key, parameter in list(module.named_parameters(recurse=False)):
            tensor = check_tensor(files.tensor(names[id(parameter)]), parameter.shape, names[id(parameter)])
            read.append((module, key, parameter))
            tensor = tensor.float() if tensor.dtype == torch.float16 else tensor  # as the backbone is loaded on a CPU
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    digests = backbone_digests(backbone)
    for module, key, parameter in read:
        setattr(module, key, parameter)
    return digests


def read_rows(tables: Mapping, settings: Mapping, model: CLaRaForRAG, files: BackboneFiles, n_tokens: int) -> dict:
    """Memory tokens, start (`<ENC>`) and separator (`<SEP>`) out of the rows that stand after the backbone's."""
    place = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    name, hidden = place.removeprefix("backbone."), model.config.text_config.hidden_size
    if name not in tables:
        raise ValueError(f"{TABLES_FILE} must hold {name}, found {sorted(map(str, tables))}. Get the file again.")
    n, is_one = model.config.max_memory_size, settings.get("different_mem_tokens", True) is False
    n_rows = n_tokens + (1 if is_one else n) + 3 + bool(settings.get("kbtc_training"))
    head = next((k for k, p in model.named_parameters() if p is model.get_output_embeddings().weight), place)
    head = head.removeprefix("backbone.")
    if head not in tables:
        raise ValueError(f"{TABLES_FILE} must hold {head}, found {sorted(map(str, tables))}. Get the file again.")
    for key in tables:
        check_tensor(tables[key], (n_rows, hidden), f"{key} in {TABLES_FILE}")
        if key in (name, head) and key in files.places:
            check_rows(tables[key], files, key, n_tokens, TABLES_FILE)
    table, first = tables[name], n_tokens + (1 if is_one else n)
    return {
        "memory_embeddings": (
            table[n_tokens : n_tokens + 1].repeat(n, 1) if is_one else table[n_tokens:first]
        ).clone(),
        "start_embedding": table[first + 1 : first + 2].clone(),
        "separator_embedding": table[first + 2 : first + 3].clone(),
    }


def read_adapters(adapters: Mapping, settings: Mapping, model: CLaRaForRAG) -> dict:
    """Weights of the three roles under the names of the model; the reasoner is the compressor's if there is none."""
    weights = {}
    for role in ROLES:
        name = ADAPTERS[role]
        if role == "reasoner" and name not in adapters:
            name = ADAPTERS["compressor"]
        found = adapters.get(name)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"{ADAPTERS_FILE} must hold {name}, found {sorted(map(str, adapters))}. Get the file again."
            )
        expected = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in live_tensors(model, role).items()}
        for key, parameter in expected.items():
            if key not in found:
                raise ValueError(
                    f"{name} in {ADAPTERS_FILE} must hold {key}, found none. The file is incomplete or of another "
                    "backbone: get it again."
                )
            tensor = check_tensor(found[key], parameter.shape, f"{key} of {name}")
            weights["backbone." + re.sub(r"(lora_[AB])\.weight$", rf"\1.{role}.weight", key)] = tensor
        unknown = sorted(key for key in map(str, found) if ".lora_" in key and key not in expected)
        if unknown:
            raise ValueError(
                f"{name} in {ADAPTERS_FILE} must fit the backbone, but has {unknown[0]} ({len(unknown)} such). Name "
                "the backbone that it was trained on with `--backbone`."
            )
    return weights


def notes(adapters: Mapping, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What is left out or read differently."""
    found = [f"left out: the adapter {name}, which no role has" for name in set(adapters) - set(ADAPTERS.values())]
    plain = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    if plain:
        found.append(
            f"the tokenizer has {len(plain)} added tokens that are not special, such as {plain[0]!r}: the reference "
            "reads them in a text, here they are plain characters, so memories of such texts differ"
        )
    return found


def card(config: CLaRaConfig) -> str:
    """The README.md of the result."""
    size = f"{config.max_memory_size} memory vectors of {config.document_max_length} tokens"
    note = (
        "Converted by `recipes/convert_reference.py` from a CLaRa checkpoint of the reference implementation "
        f"(apple/ml-clara), {size}. The licence of that checkpoint applies.\n"
    )
    return f"{model_card(config, include_backbone=False).rstrip()}\n\n{note}"
