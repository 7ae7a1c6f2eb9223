"""`clara compress`, `ask`, `info`, `convert`: a folder becomes a corpus and answers; errors are one line, status 1."""

import argparse
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Failure
from huggingface_hub import HfApi

from modeling_clara import CompressedCorpus, cli
from recipes import compress
from recipes.cluster import add_cluster_options, build_executor

CAPITALS = {"rome": "Rome is the capital of Italy.", "paris": "Paris is the capital of France.", "bad": ""}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in CAPITALS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(texts, checkpoint, tmp_path_factory) -> Path:
    """A corpus that `clara compress` has made."""
    folder = tmp_path_factory.mktemp("built") / "corpus"
    assert cli.main(["compress", str(texts), "-o", str(folder), "--model", str(checkpoint)]) == 0
    return folder


def run(capsys, *arguments: str) -> dict:
    """The JSON object that a call prints; it must end with status 0."""
    assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_compress_says_what_it_made_and_again_does_nothing(texts, checkpoint, tmp_path, capsys):
    arguments = ["compress", str(texts), "-o", str(tmp_path / "c"), "--model", str(checkpoint), "--codec", "int4"]
    report = run(capsys, *arguments)
    assert report["documents"] == report["spans"] == 2 and report["rejected"] == 1 and report["complete"]
    assert report["codec"] == "int4" and report["bytes"] > 0
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "data").iterdir()}
    assert run(capsys, *arguments) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "data").iterdir()} == shards
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 documents of 3 files, 2 chunks" in out and "left out: 1 empty; see" in out


def test_memories_are_computed_in_another_dtype(texts, built, checkpoint, tmp_path, capsys):
    folder = tmp_path / "c"
    run(capsys, "compress", str(texts), "-o", str(folder), "--model", str(checkpoint), "--dtype", "bfloat16")
    exact, rounded = (CompressedCorpus.open(place) for place in (built, folder))
    assert rounded.manifest.fingerprint == exact.manifest.fingerprint
    ours, theirs = (corpus.get(["rome.txt"])[0]["memory"] for corpus in (rounded, exact))
    assert not torch.equal(ours, theirs) and torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99


def test_ranks_by_hand_make_one_corpus(texts, checkpoint, tmp_path, capsys):
    """The second by the old form of the two options, which help does not show."""
    arguments = ["compress", str(texts), "-o", str(tmp_path / "c"), "--model", str(checkpoint)]
    assert not run(capsys, *arguments, "--rank", "1", "--world-size", "2")["complete"]
    assert cli.main(["info", str(tmp_path / "c"), "--json"]) == 1
    assert "must be finished first" in json.loads(capsys.readouterr().out)["problems"][0]
    assert run(capsys, *arguments, "--shard", "0/2")["documents"] == 2
    assert sorted(CompressedCorpus.open(tmp_path / "c").document_ids()) == ["paris.txt", "rome.txt"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compress", "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "usage: clara compress" in shown and "--rank" in shown and "--shard " not in shown


def test_columns_by_name_and_any_console_takes_any_title(checkpoint, tmp_path, capsys, monkeypatch):
    """A console that has no letter for a title: printed with question marks, as JSON whole and in ASCII."""
    rows = [{"key": "tokyo", "head": "東京", "body": "It is large.", "year": 1}, {"key": "b", "body": "It is new."}]
    path, folder, question = tmp_path / "rows.jsonl", str(tmp_path / "c"), "What is the capital of 日本?"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ["--text-column", "body", "--title-column", "head", "--id-column", "key", "--metadata", "year=int32"]
    run(capsys, "compress", str(path), "-o", folder, "--model", str(checkpoint), *options)
    corpus = CompressedCorpus.open(folder)
    found = [(row["title"], row["metadata"]) for row in corpus.get(["tokyo", "b"])]
    assert found == [("東京", {"year": 1}), ("", {"year": None})] and corpus.manifest.metadata == {"year": "int32"}

    def printed(*options: str) -> str:
        console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
        monkeypatch.setattr(sys, "stdout", console)
        assert cli.main(["ask", folder, question, "--where", '{"year": 1}', "--max-new-tokens", "4", *options]) == 0
        return console.buffer.getvalue().decode("ascii" if options else "cp1252")

    assert "tokyo  ??" in (shown := printed()) and "the capital of ??" in shown
    (answer,) = json.loads(printed("--json"))["answers"]
    assert answer["sources"][0]["title"] == "東京" and answer["question"] == question


def test_ask_goes_by_words_as_well_unless_told_otherwise(built, shared_model, capsys, monkeypatch):
    """By default only where bm25s is installed; who asks for it without gets the remedy."""
    question, corpus = "And of France?", shared_model.load_corpus(built)
    orders = [
        [source.document_id for source in shared_model.retrieve([question], corpus=corpus.with_options(hybrid=way))[0]]
        for way in (True, False)
    ]
    assert orders[0] != orders[1]

    def order(*options: str) -> list[str]:
        report = run(capsys, "ask", str(built), question, "--max-new-tokens", "1", *options)
        return [source["document_id"] for source in report["answers"][0]["sources"]]

    assert [order(), order("--hybrid"), order("--no-hybrid")] == [orders[0], orders[0], orders[1]]
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bm25s" else find(name))
    monkeypatch.setattr("modeling_clara.lexical_clara.bm25s", None)
    assert order() == orders[1]
    capsys.readouterr()
    assert cli.main(["ask", str(built), question, "--hybrid", "--json"]) == 1
    assert "BM25 needs bm25s and PyStemmer: pip install" in json.loads(capsys.readouterr().out)["problem"]


def test_ask_filters_and_abstains(built, capsys):
    def first(*options: str) -> dict:
        return run(capsys, "ask", str(built), "What is the capital of Italy?", *options)["answers"][0]

    filtered = first("--where", '{"document_id": "paris.txt"}', "--hybrid")
    assert [source["document_id"] for source in filtered["sources"]] == ["paris.txt"]
    assert first("--min-score", "2")["abstained"] and len(first("--top-k", "1")["sources"]) == 1


@pytest.mark.parametrize("expand", [0, 1, 5])
def test_ask_answers_from_the_corpus_and_says_what_was_read_as_text(built, shared_model, capsys, expand):
    """As JSON and printed: how each source was read, the tokens of each prompt, the time of the call."""
    questions = ["What is the capital of Italy?", "And of France?"]
    options = ["ask", str(built), *questions, "--max-new-tokens", "4", "--expand", str(expand)]
    report, corpus = run(capsys, *options), shared_model.load_corpus(built).with_options(hybrid=True)
    expected = shared_model.answer(questions, corpus=corpus, max_new_tokens=4, expand=expand)
    as_read = (["text"] * expand + ["memory"] * 2)[:2]
    for question, row, answer in zip(questions, report["answers"], expected, strict=True):
        assert (row["question"], row["answer"], row["prompt_tokens"]) == (question, answer.text, answer.prompt_tokens)
        assert [source["document_id"] for source in row["sources"]] == [s.document_id for s in answer.sources]
        assert [source["read_as"] for source in row["sources"]] == as_read
    assert report["answer_ms"] > 0
    assert cli.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if ".txt  " in line] == as_read * 2
    counts = [line for line in lines if line.endswith(" prompt tokens")]
    told = [f"  confidence {answer.confidence:.2f}, {answer.prompt_tokens} prompt tokens" for answer in expected]
    assert counts == told
    assert cli.main([*options, "--min-score", "2"]) == 0  # an answer that was not written has none
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("  0 prompt tokens") == lines.count("  --min-score -1 answers in any case") == 2
    assert lines[-1].startswith("retrieved and answered in ") and lines[-1].endswith(" ms")


@pytest.mark.parametrize(
    "options, below", [([], None), (["--expand-below", "1e-9"], 1e-9), (["--expand-below", "1"], 1.0)]
)
def test_by_default_the_text_is_read_where_memory_is_unsure(built, shared_model, capsys, monkeypatch, options, below):
    """With the suggested confidence, here the one between those of two questions, or with a given one."""
    questions = ["What is the capital of Italy?", "And of France?"]
    corpus = shared_model.load_corpus(built).with_options(hybrid=True)
    sure = [answer.confidence for answer in shared_model.answer(questions, corpus=corpus, max_new_tokens=4)]
    monkeypatch.setattr("modeling_clara.cli.ask.UNSURE", sum(sure) / 2)
    rows = run(capsys, "ask", str(built), *questions, "--max-new-tokens", "4", *options)["answers"]
    given = {"expand": 1, "expand_below": below or sum(sure) / 2, "max_new_tokens": 4}
    expected = shared_model.answer(questions, corpus=corpus, **given)
    assert [(row["answer"], row["prompt_tokens"]) for row in rows] == [(a.text, a.prompt_tokens) for a in expected]
    is_text = [row["sources"][0]["read_as"] == "text" for row in rows]
    assert is_text == [confidence < given["expand_below"] for confidence in sure]


def test_info_describes_and_verifies_and_convert_changes_the_codec(texts, checkpoint, tmp_path, capsys):
    folder = str(tmp_path / "c")
    options = ["--model", str(checkpoint), "--codec", "float16", "--license", "mit"]
    run(capsys, "compress", str(texts), "-o", folder, *options)
    report = run(capsys, "convert", folder, "--codec", "int8")
    assert (report["codec_before"], report["codec"]) == ("float16", "int8") and report["bytes"] > 0
    report = run(capsys, "info", folder, "--verify")
    assert report["documents"] == 2 and report["codec"] == "int8" and report["problems"] == []
    assert report["source"] == {"license": "mit"} and len(report["fingerprint"]) == 64
    assert cli.main(["info", folder, "--verify"]) == cli.main(["convert", folder, "--codec", "int4"]) == 0
    assert "every byte is right" in (shown := capsys.readouterr().out) and "int8" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "missing.jsonl", "-o", "{new}", "--model", "{model}"], "`input` must be a file"),
        (["compress", "{texts}", "-o", "{new}", "--model", "{model}", "--codec", "int2"], "`--codec` must be one of"),
        (["compress", "{texts}", "-o", "{built}", "--model", "{model}", "--codec", "int4"], "`--codec` was int8"),
        (["compress", "{texts}", "-o", "{new}", "--model", "{model}", "--metadata", "text=string"], "`--metadata`"),
        (["compress", "{texts}", "-o", "{new}", "--model", "{texts}"], "`config.json` must be in"),
        (["compress", "{texts}", "-o", "{new}", "--model", "{model}", "--rank", "2"], "`--rank` must be from 0 to"),
        (["compress", "{texts}", "-o", "{new}", "--model", "{model}", "--world-size", "0"], "`--rank` must be"),
        (["ask", "{texts}", "Why?"], "`corpus.json` must be in"),
        (["ask", "{built}", "Why?", "--model", "{texts}"], "`config.json` must be in"),
        (["ask", "{built}", "Why?", "--where", '{"year": 1}'], "`--where` must name columns"),
        (["ask", "{built}", "Why?", "--top-k", "0"], "`--top-k` must be an int >= 1"),
        (["ask", "{built}", "Why?", "--expand", "-1"], "`--expand` must be an int >= 0"),
        (["ask", "{built}", " "], "must not be empty"),
        (["convert", "{built}", "--codec", "int2"], "`--codec` must be one of"),
        (["convert", "{texts}", "--codec", "int4"], "`corpus.json` must be in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_and_status_1(arguments, message, texts, built, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"texts": texts, "built": built, "model": checkpoint, "new": tmp_path / "new"}
    given = [str(places.get(argument.strip("{}"), argument)) for argument in arguments]
    assert cli.main(given) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert cli.main([*given, "--json"]) == 1
    assert message in json.loads(capsys.readouterr().out)["problem"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["someone/unknown"], "the Hub has no such dataset, or the token may not read it"),
        (["someone/corpus", "--revision", "gone"], "the dataset has no such revision"),
        (["someone/out-of-reach"], "the Hub did not give it and the cache has no copy of it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_corpus_that_the_hub_does_not_give_is_two_sentences(arguments, reason, hub, capsys):
    """Not the paragraphs of the Hub's client, with its addresses and request ids."""
    HfApi().create_repo("someone/corpus", repo_type="dataset", exist_ok=True)
    hub.failures.append(Failure("/api/datasets/someone/out-of-reach", status=403))
    assert cli.main(["ask", *arguments, "Why?"]) == 1
    assert capsys.readouterr().err == (
        f"clara ask: `{arguments[0]}` must be a folder with a compressed corpus or the id of a dataset on the Hub, "
        f"but {reason}. Check the name, the revision, the token and the connection.\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--shard", "2/2"], ["--shard", "1"], ["--rank", "x"], ["--metadata", "year"], ["--metadata", "=int64"]),
        *(["--dtype", "float8"], ["--where", "{year: 1}"], ["--where", "[1]"], ["--where", "year"]),
    ],
    ids=" ".join,
)
def test_wrong_calls_are_status_2(arguments, texts, built, checkpoint, tmp_path, capsys):
    call = ["compress", str(texts), "-o", str(tmp_path / "c"), "--model", str(checkpoint)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*(["ask", str(built), "Why?"] if arguments[0] == "--where" else call), *arguments])
    assert exit_.value.code == 2 and arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_two_workers_of_the_recipe_make_the_corpus(checkpoint, tmp_path, monkeypatch, capsys):
    """Real processes under datatrove; given again, the command does nothing more."""
    rows = [{"title": f"City {n}", "text": f"The city number {n} is the capital of country {n}."} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["compress", "rows.jsonl", "-o", "corpus", "--model", str(checkpoint), "--tasks", "3", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--shard-size", "4", "--codec", "float16"])
    monkeypatch.chdir(tmp_path)
    seen = []
    for _ in range(2):
        assert compress.main() == 0 and "documents=30" in capsys.readouterr().out
        seen.append({path: path.stat().st_mtime_ns for path in (tmp_path / "corpus/data").iterdir()})
    assert seen[0] == seen[1] and {path.name.split("-")[0] for path in seen[0]} == {"00000", "00001", "00002"}
    corpus = CompressedCorpus.open(tmp_path / "corpus")
    assert set(corpus.document_ids()) == {f"rows.jsonl:{n}" for n in range(1, 31)} and corpus.verify() == []


def test_a_task_on_ray_asks_for_its_cores_and_gpus():
    """Ray hides the GPUs of a machine from who has not asked for them."""
    parser = argparse.ArgumentParser()
    cli.add_build_options(parser)
    add_cluster_options(parser)
    command = "rows.jsonl -o corpus --model m --tasks 3 --executor ray --gpus-per-task 1 --cpus-per-task 2"
    executor = build_executor(parser.parse_args(command.split()))
    asked = (executor.gpus_per_task, executor.cpus_per_task, executor.tasks, executor.workers)
    assert type(executor).__name__ == "RayPipelineExecutor" and asked == (1, 2, 3, 3)
