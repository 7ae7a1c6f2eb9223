"""The stage "text": exact prompts, its records, the plain loss, and what moves.

Stands after `test_collators.py` and `test_data.py`; its trainers run in this process. Knows nothing of pauses.
"""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_collators import TEMPLATE, inputs, plain, record, spelt
from test_data import LONG, without, write
from tiny import build_tokenizer
from training_runs import CITIES, NAMES, assert_equal, count_roles, loss_curve, state_of, without_dropout
from transformers import AutoModelForCausalLM
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaForRAG, CLaRaProcessor
from modeling_clara.generation_clara import eval_mode
from recipes.benchmarks.training import padded_passes
from recipes.training.arguments import CLaRaTrainingArguments, DataArguments, ModelArguments
from recipes.training.collators import TextCollator
from recipes.training.data import BadRow
from recipes.training.mixtures import load_records
from recipes.training.preparation import prepare_trainer
from recipes.training.records import RecordReader
from recipes.training.stages import STAGES
from recipes.training.trainer import part_of


@pytest.fixture(scope="module")
def processor() -> CLaRaProcessor:
    """A prompt reads `x {documents} {question} <|im_start|> {answer} </s>`."""
    return CLaRaProcessor(
        build_tokenizer(),
        document_max_length=32,
        document_overlap=4,
        system_prompt="",
        answer_prompt="x{documents}{question}",
        chat_template=TEMPLATE,
    )


def write_rows(path: Path) -> Path:
    """Rows with one to four documents and one or two targets; half of them have a paraphrase as well."""
    with open(path, "w") as file:
        for index, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
            docs = [f"{NAMES[(index + n) % 8]}\nLives in {CITIES[(index + n) % 8]}." for n in range(1 + index % 4)]
            pairs = [{"question": f"Where does {name} live?", "answers": [city]}]
            pairs += [{"question": f"Who lives in {city}?", "answers": [f"It is {name}"]}] * (index % 2)
            row = {"docs": docs, "qas": pairs, **({"paraphrase": f"In {city}."} if index % 2 else {})}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "text.jsonl")


@pytest.fixture
def build(rows, checkpoint, tmp_path):
    """`build(name, **options)`: a trainer of the stage in a folder of its own."""

    def make(name="run", model_options=None, targets=2, **options):
        sources = [{"path": str(rows)}]
        data = DataArguments(datasets=sources, eval_datasets=sources, targets_per_document=targets)
        defaults = {
            "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "num_samples": 2,
        }  # fmt: skip
        training = CLaRaTrainingArguments(output_dir=str(tmp_path / name), stage="text", **{**defaults, **options})
        return prepare_trainer(ModelArguments(**(model_options or {"checkpoint": str(checkpoint)})), data, training)

    return make


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_texts_is_exactly_this(processor):
    records = [
        record([plain("ab"), plain("c", "T")], ("q", "uv"), ("rr", "u")),
        record([plain("d")], ("s", "w")),
    ]
    batch = TextCollator(processor, [1, 2], 3)(records)
    assert batch["memory"].shape == (2, 0, 2, 3) and batch["memory"].dtype == torch.float32
    layout = batch["prompts"][2]
    assert spelt(processor, layout["input_ids"]) == [
        "x a b Ċ Ċ T Ċ c q <|im_start|> u v </s> r r <|im_start|> u </s>",
        "_ _ _ _ _ _ _ _ _ _ _ _ x d s <|im_start|> w </s>",
    ]
    assert spelt(processor, layout["labels"]) == [
        "- - - - - - - - - - u v </s> - - - u </s>",
        "- - - - - - - - - - - - - - - - w </s>",
    ]
    assert layout["attention_mask"].tolist() == [[1] * 18, [0] * 12 + [1] * 6]
    assert layout["position_ids"].tolist() == [[*range(13), *range(8, 13)], [0] * 12 + [*range(6)]]
    assert layout["prompt_segments"].tolist() == [[0] * 8 + [1] * 5 + [2] * 5, [0] * 12 + [1] * 6]
    assert not layout["memory_mask"].any() and layout["memory_mask"].shape == (2, 18)
    assert batch["labels"] is layout["labels"] and batch["prompts"][1] is layout
    assert set(batch) == {"memory", "prompts", "labels"}


def test_prompts_are_those_that_the_processor_builds_of_texts(shared_model):
    """With a chat template and titles: the same ids, labels and types, padded as it pads, and what shares a row."""
    processor, sizes = shared_model.processor, shared_model.config.memory_sizes
    records = [
        record([plain("Rome is old.", "Rome"), plain("The Seine.")], ("What is old?", "Rome")),
        record([plain("Berlin is large.")], ("Which city is large?", "Berlin"), ("Where? Why?", "There, only")),
    ]
    prompts = [
        [
            processor.build_prompt(question, 0, sizes[-1], answer, text_documents=one["documents"])
            for question, answer in zip(one["questions"], one["answers"], strict=True)
        ]
        for one in records
    ]
    expected = processor.pad_prompts([row[0] for row in prompts])
    single = [{**one, "questions": one["questions"][:1], "answers": one["answers"][:1]} for one in records]
    batch, shared = (TextCollator(processor, sizes, 32)(rows)["prompts"] for rows in (single, records))
    for size in sizes:
        assert set(batch[size]) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(batch[size][name], tensor) and batch[size][name].dtype == tensor.dtype
        for row, segments, own in zip(
            shared[size]["input_ids"], shared[size]["prompt_segments"], prompts, strict=True
        ):
            for number, prompt in enumerate(own, 1):
                is_own = (segments == number) | (segments == 0)
                assert row[is_own][-len(prompt.input_ids) :].tolist() == prompt.input_ids


def test_an_error_of_a_text_names_the_row(processor):
    with pytest.raises((TypeError, ValueError), match="rows.jsonl:7 question"):
        TextCollator(processor, [1], 3)([record([plain("a")], (7, "u"), source="rows.jsonl:7")])


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(processor, tmp_path):
    """`load(*rows, **settings)`: the records that the stage makes of rows.jsonl."""

    def run(*rows: dict, stage: str = "text", **settings) -> list[dict]:
        path = write(tmp_path / "rows.jsonl", list(rows))
        settings = {"window": 512, "memory_size": 4, "top_k": 1, **settings}
        reader = RecordReader(processor, stage, **settings)
        return list(load_records([DatasetConfig(path=str(path))], reader, 0, tmp_path / "cache"))

    return run


QAS = [{"question": f"q{number}", "answers": [f"a{number}"]} for number in range(3)]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "paraphrase": "b"},
        {"data_type": "paraphrase", "question": ["Restate: "], "answers": ["b"], "docs": ["a"]},
        {"text": "a", "qas": [], "paraphrase": "b"},
    ],
)
def test_a_paraphrase_alone_is_refused_with_file_and_line(load, row):
    good = {"question": "q", "docs": ["a"], "answer": "x"}
    with pytest.raises(BadRow, match=r"(?s)1 row\(s\) cannot.*rows.jsonl:2 must have a question") as error:
        load(good, row, good)
    assert "rows.jsonl:1" not in str(error.value)


def test_a_paraphrase_beside_questions_is_left_out(load):
    with_it, without_it = {"text": "a", "qas": QAS, "paraphrase": "p"}, {"text": "a", "qas": QAS}
    for size, counts in ((1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (9, [3])):
        found = load(with_it, targets_per_document=size)
        assert [len(one["questions"]) for one in found] == counts
        assert found == load(without_it, targets_per_document=size)
        assert sum((one["questions"] for one in found), []) == ["q0", "q1", "q2"]
        assert sum((one["answers"] for one in found), []) == ["a0", "a1", "a2"]


def test_records_are_those_of_stage_two_but_for_their_length(load, processor):
    """The same documents, gold ones, targets and answers; all documents are read, however many others take."""
    row = {"question": "q", "docs": ["T\na", plain(LONG, "U"), *"bcd"], "answer": "teacher", "gold_answer": "gold",
           "pos_index": [1, 4]}  # fmt: skip
    for settings in ({"long_documents": "first_span"}, {"long_documents": "split", "window": 4000}):
        settings |= {"num_candidates": 2}
        (ours,), (theirs,) = load(row, **settings), load(row, stage="instruct", **settings)
        assert without(ours, "length") == without(theirs, "length") and ours["answers"] == ["teacher"]
        prompt = processor.build_prompt("q", 0, 4, "teacher", text_documents=ours["documents"])
        assert ours["length"] == len(prompt.input_ids) != theirs["length"]


def test_the_window_is_full_or_the_row_is_refused(load):
    """At its exact length a record passes, one position less refuses it and says which row, how much and of what."""
    row = {"docs": ["a" * 20, "b" * 9], "qas": [{"question": "q", "answer": "x" * n} for n in (3, 9, 5)]}
    longest = max(one["length"] for one in load(row))
    assert [one["length"] for one in load(row, window=longest)] == [longest - 6, longest, longest - 4]
    short = {"question": "q", "docs": ["a"], "answer": "x"}
    message = (
        rf"(?s)1 row\(s\) cannot.*rows.jsonl:2 needs {longest} positions for 2 texts, question and answer, the "
        rf"backbone has {longest - 1}"
    )
    with pytest.raises(BadRow, match=message):
        load(short, row, window=longest - 1)


# --- the loss --------------------------------------------------------------------------------------------------------


def merged(model: CLaRaForRAG, backbone_folder: Path):
    """The backbone as transformers loads it, the generator's low-rank products added to its weights."""
    plain_model = AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=torch.float32).eval()
    names = [name for name, module in model.backbone.named_modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for name in names:
            delta = model.backbone.get_submodule(name).get_delta_weight("generator")
            plain_model.get_submodule(name.removeprefix("base_model.model.")).weight += delta
    assert names
    return plain_model


def plain_loss(plain_model, processor, records: list[dict]) -> float:
    """Mean cross entropy of all answer tokens, prompt by prompt without padding."""
    total, count = 0.0, 0
    for one in records:
        for question, answer in zip(one["questions"], one["answers"], strict=True):
            prompt = processor.build_prompt(question, 0, 4, answer, text_documents=one["documents"])
            with torch.no_grad():
                logits = plain_model(input_ids=torch.tensor([prompt.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(prompt.labels[1:])
            is_target = targets != -100
            total -= float(logits.log_softmax(-1)[is_target].gather(1, targets[is_target][:, None]).sum())
            count += int(is_target.sum())
    return total / count


def test_the_loss_is_that_of_the_backbone_with_the_generator_merged(build, backbone_folder):
    """Of a batch for every k, and of a step of two micro-batches with unequal counts of targets."""
    trainer = build(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    without_dropout(trainer.model)
    model, records = trainer.model, list(trainer.train_dataset)
    assert len(records) == 8 and {len(one["questions"]) for one in records} == {1, 2}
    reference = merged(model, backbone_folder)
    collator = TextCollator(model.processor, model.config.memory_sizes, model.config.text_config.hidden_size)
    for part in (records[:1], records[1:4], records):
        expected = plain_loss(reference, model.processor, part)
        for size in model.config.memory_sizes:
            with torch.no_grad():
                assert float(model(**inputs(collator(part), size)).loss) == pytest.approx(expected, rel=1e-5)
    expected = plain_loss(reference, model.processor, records)
    other = merged(model, backbone_folder).requires_grad_(False)
    for name, parameter in AutoModelForCausalLM.from_pretrained(backbone_folder).named_parameters():
        other.get_parameter(name).copy_(parameter)
    assert abs(plain_loss(other, model.processor, records) - expected) > 0.05  # the adapter matters
    trainer.train()
    step = trainer.state.log_history[0]
    assert step["loss"] == pytest.approx(expected, rel=1e-5) and step["ce"] == pytest.approx(expected, rel=1e-5)
    assert {"grad_norm/generator", "exact_match"} <= set(step) and "mse" not in step


# --- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["checkpoint", "backbone"])
def test_all_of_the_generator_moves_and_nothing_else(build, backbone_folder, start):
    fresh = {"backbone": str(backbone_folder), "memory_sizes": [2, 4], "lora_rank": 4, "document_max_length": 64}
    trainer = build(model_options=fresh if start == "backbone" else None)
    before, counts = state_of(trainer.model), count_roles(trainer.model)
    trainer.train()
    after = state_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "generator" in name.split(".")} and moved
    assert {part_of(name) for name in moved} == set(STAGES["text"].roles) == {"generator"}
    assert counts == {"generator": 3}
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in trainer.model.named_parameters() if name in moved}


def test_what_is_saved_comes_back(build, tmp_path):
    trainer = build(max_steps=1)
    trainer.train()
    trainer.save_model()
    assert_equal(state_of(trainer.model), state_of(CLaRaForRAG.from_pretrained(tmp_path / "run")))


def test_any_micro_batches_and_targets_a_record_give_the_same_step(build):
    """8 x 1, 4 x 2 and 1 x 8 records; and every target in a record of its own, 12 in one batch."""
    runs = []
    for size, accumulation, targets in ((8, 1, 2), (4, 2, 2), (1, 8, 2), (12, 1, 1)):
        trainer = build(
            f"run{size}", targets=targets, per_device_train_batch_size=size, max_steps=1, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=1e-1,
        )  # fmt: skip
        without_dropout(trainer.model)
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        assert_equal(state_of(runs[0].model), state_of(other.model), rtol=1e-4, atol=1e-6)
        for name in ("loss", "ce", "grad_norm/generator", "exact_match"):
            one, two = runs[0].state.log_history[0][name], other.state.log_history[0][name]
            assert one == pytest.approx(two, rel=1e-4), name


def test_checkpointing_activations_changes_nothing(build):
    plainly = build("plain")
    with padded_passes():  # as recomputed ones are: dropout draws the same
        plainly.train()
    checkpointed = build("checkpointed", activation_checkpointing=True)
    checkpointed.train()
    assert_equal(state_of(plainly.model), state_of(checkpointed.model), rtol=1e-5, atol=1e-6)
    assert loss_curve(plainly) == pytest.approx(loss_curve(checkpointed), rel=1e-5)


def test_evaluation_and_samples_are_read_from_texts(build, backbone_folder):
    """The same for any batch; sample answers are what greedy decoding with the merged generator writes."""
    trainers = [build(f"run{size}", per_device_eval_batch_size=size) for size in (1, 3)]
    evaluated = [trainer.evaluate() for trainer in trainers]
    model, records = trainers[0].model, list(trainers[0].eval_dataset)
    reference = merged(model, backbone_folder)
    expected = plain_loss(reference, model.processor, records)
    for found in evaluated:
        assert found["eval_ce"] == pytest.approx(expected, rel=1e-5)
    samples = [json.loads(line) for line in open(f"{trainers[0].args.output_dir}/samples.jsonl")]
    assert [row["expected"] for row in samples] == CITIES[:2]
    for row, one in zip(samples, records, strict=False):
        prompt = model.processor.build_prompt(one["questions"][0], 0, 4, text_documents=one["documents"])
        config = model.build_generation_config(None, 32)
        ids = torch.tensor([prompt.input_ids])
        with torch.no_grad(), eval_mode(model):
            found = reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answer = model.decode_answer(found[0, ids.shape[1] :].tolist(), config.eos_token_id)
        assert row["answer"] == answer and row["question"] == one["questions"][0]
