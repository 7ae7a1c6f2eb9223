"""The systems that read texts with a generator trained for it: `tuned_text`, `bm25_tuned_text` and --text-reader.

Held against the text reader's own public calls on a tiny model; runs are calls of the command's `main`.
"""

import copy
import json
import shutil
from pathlib import Path

import board  # noqa: F401
import pytest
import torch
from evaluation_runs import N_QUESTIONS, assert_same, failing, predictions, results, without_seconds, write_data
from evaluation_systems import N_TOKENS, documents, generate, make_data, nothing, predict
from evaluation_systems import without_seconds as untimed
from leaderboard_source import Source, identity
from tiny import randomize_adapters

from modeling_clara import CLaRaForRAG
from modeling_clara.generation_clara import eval_mode
from recipes.evaluation.cli import build_parser, check_arguments, main
from recipes.evaluation.evaluation import weights_digest
from recipes.evaluation.spans import Spans, compress_documents, open_memories
from recipes.evaluation.systems import SYSTEMS, Bench, Clock, read, retrieve, rows_to_read, time_one
from recipes.evaluation.tasks import Task, make_tasks

TUNED = {"tuned_text": "text", "bm25_tuned_text": "bm25_text"}  # and the system with the same ranking
LEAD = "Answer in one word. "  # of the text reader's own prompt


@pytest.fixture(scope="module")
def text_reader(shared_model) -> CLaRaForRAG:
    """Another generator on the same backbone, with a prompt of its own."""
    model = copy.deepcopy(shared_model)
    randomize_adapters(model, seed=7)
    model.processor.system_prompt = LEAD + model.processor.system_prompt
    return model


@pytest.fixture(scope="module")
def reader_folder(text_reader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text-reader")
    text_reader.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spans(shared_model, tmp_path_factory) -> Spans:
    folder = tmp_path_factory.mktemp("memories")
    compress_documents(shared_model, documents(), folder)
    return open_memories(shared_model, folder, "float16", len(documents()))


@pytest.fixture
def bench(shared_model, text_reader, spans) -> Bench:
    return Bench(shared_model, spans, top_k=2, memory_size=4, retrieval_memory_size=2, max_new_tokens=N_TOKENS,
                 text_reader=text_reader)  # fmt: skip


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks(make_data(), "normal", nothing)


# --- what is read, and by whom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNED)
def test_answers_are_those_of_the_text_readers_own_call(bench, text_reader, tasks, name):
    """The retrieved texts in the reader's prompt: `generate_texts` of the reader, and `generate` of its backbone."""
    hits = retrieve(bench, SYSTEMS[name], tasks, Clock())
    chosen = [[bench.spans.document(row) for row in rows_to_read(bench, SYSTEMS[name], mine)] for mine in hits]
    prompts = [
        text_reader.processor.build_prompt(task.question.text, 0, 4, text_documents=texts)
        for task, texts in zip(tasks, chosen, strict=True)
    ]
    config = text_reader.build_generation_config(None, N_TOKENS)
    with torch.no_grad(), eval_mode(text_reader):
        answers = text_reader.generate_texts(prompts, [torch.zeros(0, 4, 32)] * len(tasks), config)
    for task, row, texts, prompt, answer in zip(
        tasks, predict(bench, name, tasks), chosen, prompts, answers, strict=True
    ):
        assert (row["prediction"] or "") == answer and (row["failure"] is None) == bool(answer)
        assert answer == generate(text_reader, task.question.text, texts, "generator")
        assert row["n_tokens"] == len(prompt.input_ids)
        assert row["n_tokens"] > len(bench.model.processor.build_prompt(task.question.text, 0, 4).input_ids)


@pytest.mark.parametrize("name, other", TUNED.items())
def test_the_same_ranking_as_the_plain_reader_and_other_answers(bench, tasks, name, other):
    tuned, plainly = predict(bench, name, tasks), predict(bench, other, tasks)
    for mine, theirs in zip(tuned, plainly, strict=True):
        for key in ("retrieved", "scores", "read", "span_bytes", "abstained"):
            assert mine[key] == theirs[key], key
    assert [row["prediction"] for row in tuned] != [row["prediction"] for row in plainly]
    bench.text_reader = bench.model  # the compressor's generator is another one as well
    assert [row["prediction"] for row in predict(bench, name, tasks)] != [row["prediction"] for row in tuned]


def test_a_text_reader_of_other_memory_sizes(bench, backbone_folder, tasks):
    """Its memories are never read, so that their number does not matter."""
    torch.manual_seed(3)
    other = CLaRaForRAG.from_backbone(backbone_folder, memory_sizes=(3,), lora_rank=2)
    randomize_adapters(other, seed=9)
    bench.text_reader = other.eval()
    (hits,), (row,) = retrieve(bench, SYSTEMS["text"], tasks[1:2], Clock()), predict(bench, "tuned_text", tasks[1:2])
    texts = [bench.spans.document(number) for number in rows_to_read(bench, SYSTEMS["text"], hits)]
    assert (row["prediction"] or "") == generate(other, tasks[1].question.text, texts, "generator")


@pytest.mark.parametrize("name", TUNED)
def test_batches_change_nothing(bench, tasks, name):
    together = untimed(predict(bench, name, tasks))
    for number, task in enumerate(tasks):
        alone = untimed(predict(bench, name, [task]))[0]
        assert alone.pop("scores") == pytest.approx(together[number].pop("scores"), abs=2e-6)
        assert alone == together[number]


def test_abstaining_and_gold_only(bench, tasks):
    """A cosine asks the model's own retrieval alone; where all gold is read, nothing is ranked."""
    bench.min_score = 1.1
    assert all(row["abstained"] and row["n_tokens"] is None for row in predict(bench, "tuned_text", tasks))
    assert not any(row["abstained"] for row in predict(bench, "bm25_tuned_text", tasks))
    bench.min_score, bench.read_all = None, True
    gold = ("d1", "d2", "d3")
    (row,) = predict(bench, "tuned_text", [Task(tasks[0].question, gold, gold)])
    assert row["read"] == list(gold) and row["retrieved"] == []


def test_a_prompt_beyond_the_readers_window_is_named(bench, tasks):
    task = Task(make_data().questions[0], tuple(documents()), ())
    with pytest.raises(ValueError, match="window of 512 tokens, got .* Lower --top-k"):
        read(bench, SYSTEMS["tuned_text"], [task], [list(range(len(bench.spans)))], Clock())


def test_a_call_leaves_both_models_as_they_were(bench, tasks):
    models = (bench.model, bench.text_reader)
    before = [
        (weights_digest(m), m.roles.active, m.training, [p.requires_grad for p in m.parameters()]) for m in models
    ]
    predict(bench, "tuned_text", tasks[:2])
    after = [
        (weights_digest(m), m.roles.active, m.training, [p.requires_grad for p in m.parameters()]) for m in models
    ]
    assert before == after


@pytest.mark.parametrize("name", TUNED)
def test_parts_of_the_time(bench, tasks, name):
    times = time_one(bench, SYSTEMS[name], tasks[0])
    assert times["total"] == pytest.approx(sum(times[part] for part in ("query", "search", "read", "decode")))
    assert times["read"] > 0 and times["decode"] > 0 and (times["query"] > 0) == (name == "tuned_text")


# --- options ---------------------------------------------------------------------------------------------------------


def checked(*options: str) -> list[str]:
    """The systems of a command."""
    arguments = build_parser().parse_args(["--model", "m", "--data", "d", "--output", "o", *options])
    check_arguments(arguments)
    return arguments.systems


def test_all_systems_have_the_tuned_ones_with_a_text_reader_only():
    everything = [name for name in SYSTEMS if name != "dense_text"]
    assert checked("--systems", "all", "--text-reader", "r") == everything
    assert checked("--systems", "all") == [name for name in everything if name not in TUNED]
    assert checked("--systems", "all", "--text-reader", "r", "--dense", "e") == list(SYSTEMS)
    gold_only = checked("--systems", "all", "--text-reader", "r", "--setting", "gold_only")
    assert set(gold_only) == {name for name in everything if not name.startswith(("bm25", "hybrid"))}


@pytest.mark.parametrize("systems", [["tuned_text"], ["clara", "bm25_tuned_text"], ["bm25_tuned_text", "tuned_text"]])
def test_a_text_reader_that_is_missing(systems):
    first = sorted(TUNED.keys() & set(systems))[0]
    with pytest.raises(
        ValueError, match=f"the system '{first}' needs --text-reader CHECKPOINT. Pass it, or leave out"
    ):
        checked("--systems", *systems)
    assert checked("--systems", *systems, "--text-reader", "r") == systems


@pytest.mark.parametrize(
    "options",
    [[], ["--systems", "text", "bm25_text"], ["--setting", "closed_book"],
     ["--setting", "closed_book", "--systems", "all"]],
)  # fmt: skip
def test_a_text_reader_that_nobody_asks(options):
    with pytest.raises(ValueError, match="--text-reader has no effect without the systems tuned_text or bm25_tuned"):
        checked("--text-reader", "r", *options)


def test_a_text_reader_of_another_systems_predictions():
    arguments = build_parser().parse_args(
        ["--predictions", "p", "--name", "n", "--data", "d", "--output", "o", "--text-reader", "r"]
    )
    with pytest.raises(ValueError, match="--text-reader has no effect with --predictions, got 'r'. Leave it out"):
        check_arguments(arguments)


@pytest.mark.parametrize("setting, name", [("closed_book", "tuned_text"), ("gold_only", "bm25_tuned_text")])
def test_settings_that_have_nothing_for_it(setting, name):
    with pytest.raises(ValueError, match=f"the setting '{setting}' .* --systems has '{name}'"):
        checked("--systems", name, "--text-reader", "r", "--setting", setting)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memories(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run-memories")


@pytest.fixture
def evaluate(checkpoint, reader_folder, tmp_path, memories, capsys):
    """`evaluate(*systems, expect=0, output="run", reader=FOLDER)`: what the command prints, errors included."""
    data = write_data(tmp_path / "data.jsonl")

    def call(*systems: str, expect: int = 0, output: str = "run", reader: Path | None = reader_folder) -> str:
        given = {"model": checkpoint, "data": data, "output": tmp_path / output, "memories": memories}
        named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        named += ["--resamples", "100", "--max-new-tokens", "6", "--latency-questions", "0", "--batch-size", "4"]
        named += [] if reader is None else ["--text-reader", str(reader)]
        capsys.readouterr()
        status = main([*named, "--systems", *systems])
        captured = capsys.readouterr()
        assert status == expect, captured.err
        return captured.out + captured.err

    return call


@pytest.fixture(scope="module")
def other_reader(reader_folder, shared_model, tmp_path_factory) -> Path:
    """The text reader after some more training."""
    folder = tmp_path_factory.mktemp("other-reader")
    model = copy.deepcopy(shared_model)
    randomize_adapters(model, seed=8)
    model.save_pretrained(folder)
    return folder


def test_a_run_and_its_results(evaluate, reader_folder, tmp_path):
    """Valid by the schema; named as tables show it; the weights of the text reader are among the options."""
    printed = evaluate("clara", "text", "tuned_text", "bm25_tuned_text")
    folder = tmp_path / "run"
    first, digest = results(folder), weights_digest(CLaRaForRAG.from_pretrained(reader_folder))
    assert {line["system"] for line in first["comparisons"]} == {"text", "tuned-text", "bm25-tuned-text"}
    for name, retriever in (("tuned-text", "clara"), ("bm25-tuned-text", "bm25")):
        content = results(folder / "baselines" / name)
        assert content["system"] == {
            "name": name, "kind": "text", "retriever": retriever, "reader": "tuned_text", "top_k": 2,
            "memory_size": None, "max_new_tokens": 6, "url": None,
            "retrieval_memory_size": first["system"]["retrieval_memory_size"] if retriever == "clara" else None,
            "codec": "float16" if retriever == "clara" else None,
        }  # fmt: skip
        assert content["options"]["text_reader"] == digest != content["options"]["weights"]
        assert content["counts"]["questions"] == N_QUESTIONS and f"| {name} |" in printed
    texts = [predictions(folder / "baselines" / name) for name in ("text", "tuned-text")]
    assert [row["read"] for row in texts[0]] == [row["read"] for row in texts[1]]
    assert [row["prediction"] for row in texts[0]] != [row["prediction"] for row in texts[1]]


def test_the_tuned_reader_may_be_the_only_system(evaluate, tmp_path):
    evaluate("bm25_tuned_text")
    content = results(tmp_path / "run")
    assert content["system"]["name"] == "bm25-tuned-text" and content["comparisons"] == []
    assert not (tmp_path / "run" / "baselines").exists()


def test_another_text_reader_in_the_same_folder_is_refused(evaluate, other_reader, tmp_path, reader_folder):
    evaluate("tuned_text")
    folder = tmp_path / "run"
    before = (folder / "predictions.jsonl").read_bytes()
    moved = shutil.copytree(reader_folder, tmp_path / "moved")
    evaluate("tuned_text", reader=moved)  # the same weights in another place are the same reader
    printed = evaluate("tuned_text", reader=other_reader, expect=1)
    assert "`text_reader` must be" in printed and "as when" in printed and "Choose another --output" in printed
    config = json.loads((moved / "processor_config.json").read_text())
    (moved / "processor_config.json").write_text(json.dumps({**config, "system_prompt": "Answer at length."}))
    assert "`text_reader` must be" in evaluate("tuned_text", reader=moved, expect=1)
    assert (folder / "predictions.jsonl").read_bytes() == before and results(folder)


def test_interrupted_and_begun_again(evaluate, tmp_path, monkeypatch):
    """Nothing is asked twice, and the predictions are those of a run without interruption."""
    evaluate("tuned_text", "clara", output="whole")
    with monkeypatch.context() as patch:
        first = failing(patch, KeyboardInterrupt(), "number 4?", after=4)
        assert "the same command goes on" in evaluate("tuned_text", "clara", expect=130)
    assert len(first) == 4 and not (tmp_path / "run" / "predictions.jsonl").exists()
    second = failing(monkeypatch, ValueError(), "no such text")
    evaluate("tuned_text", "clara")
    assert not set(first) & set(second[:6]) and len(second) == 6 + N_QUESTIONS
    for folder in (".", "baselines/clara"):
        ours, theirs = (predictions(tmp_path / name / folder) for name in ("run", "whole"))
        assert without_seconds(ours) == without_seconds(theirs)
    assert results(tmp_path / "run")["metrics"] == results(tmp_path / "whole")["metrics"]


def test_one_question_that_fails_is_counted_alone(evaluate, text_reader, tmp_path, monkeypatch):
    """Only the text reader fails, and only at one prompt: the model's own system is untouched."""
    evaluate("clara", "tuned_text", output="whole")
    original = CLaRaForRAG.generate_texts
    marker = text_reader.processor.encode_text("number 5?")

    def generate_texts(self, prompts, *args, **kwargs):
        is_tuned = self.processor.system_prompt.startswith(LEAD)
        if is_tuned and any(str(marker)[1:-1] in str(prompt.input_ids) for prompt in prompts):
            raise ValueError("odd")
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(CLaRaForRAG, "generate_texts", generate_texts)
    evaluate("clara", "tuned_text")
    assert_same(predictions(tmp_path / "run"), predictions(tmp_path / "whole"))
    tuned, whole = (predictions(tmp_path / name / "baselines" / "tuned-text") for name in ("run", "whole"))
    assert [row["failure"] for row in tuned] == [None] * 5 + ["ValueError: odd"] + [None] * 4
    assert_same(tuned[:5] + tuned[6:], whole[:5] + whole[6:])


@pytest.mark.parametrize("kind", ["empty", "no folder", "file", "backbone"])
def test_what_is_no_checkpoint_is_an_error_and_leaves_no_run(evaluate, backbone_folder, tmp_path, kind):
    """The place is named, nothing is asked, and the right command can begin in the same folder."""
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("text")
    elif kind == "backbone":
        place = backbone_folder
    printed = evaluate("clara", "tuned_text", reader=place, expect=1)
    assert printed.startswith("error: ") and str(place) in printed and len(printed.splitlines()) < 4, printed
    assert not (tmp_path / "run" / "run.json").exists()
    if kind == "empty":
        evaluate("tuned_text")


def test_other_readers_are_other_entries_of_the_leaderboard(evaluate, other_reader, tmp_path):
    """The same reader twice is one entry, the newest; two readers are two."""
    contents = {}
    for name, reader in (("one", None), ("again", None), ("other", other_reader)):
        evaluate("tuned_text", output=f"runs/{name}", **({} if reader is None else {"reader": reader}))
        contents[name] = results(tmp_path / "runs" / name)
    assert identity(contents["one"]) == identity(contents["again"]) != identity(contents["other"])
    loaded = Source(tmp_path / "runs", check_revisions=False).load()
    shown = {Path(entry.path).parts[0] for entry in loaded.entries}
    assert len(shown) == 2 and "other" in shown and len(loaded.refused) == 1


def test_a_text_reader_does_not_make_another_entry_of_who_does_not_read_with_it(evaluate, tmp_path):
    """The answers of `clara` do not depend on the text reader of its rivals: one system, one entry."""
    evaluate("clara", output="alone", reader=None)
    evaluate("clara", "tuned_text", output="beside")
    assert_same(predictions(tmp_path / "alone"), predictions(tmp_path / "beside"))
    assert identity(results(tmp_path / "alone")) == identity(results(tmp_path / "beside"))
